-- generate, generate_rows, chat, complete, their streams, apply_chat_template, tokenize, detokenize, count_tokens: what they are declared, and what they refuse
-- before any model is there.  What they return is test/t/010_generate.pl's.

-- Volatility, cost, strictness, parallel safety, and who may execute
SELECT p.proname, pg_get_function_result(p.oid) AS result, p.provolatile AS volatile, p.procost AS cost, p.proisstrict AS strict,
	p.proparallel AS parallel, p.proleakproof AS leakproof, p.prosecdef AS definer, has_function_privilege('public', p.oid, 'EXECUTE') AS public,
	obj_description(p.oid) IS NOT NULL AS described
FROM pg_proc p
WHERE p.pronamespace = 'millm'::regnamespace
	AND p.proname IN ('generate', 'generate_stream', 'generate_rows', 'chat', 'chat_stream', 'complete', 'complete_stream', 'apply_chat_template', 'tokenize', 'detokenize', 'count_tokens')
ORDER BY p.proname, result;

SELECT regexp_split_to_table(pg_get_function_arguments(oid), ', ') AS argument FROM pg_proc
WHERE pronamespace = 'millm'::regnamespace AND proname = 'generate' AND prorettype = 'text'::regtype;
-- The forms for many prompts differ in the first, and in what comes after the last
SELECT count(DISTINCT regexp_replace(regexp_replace(pg_get_function_arguments(oid), '^(prompts text\[\]|query text)', 'prompt text'), ', look_ahead .*', ''))
FROM pg_proc WHERE pronamespace = 'millm'::regnamespace AND proname IN ('generate', 'generate_stream', 'generate_rows');
SELECT substring(pg_get_function_arguments(oid) FROM 'look_ahead .*') FROM pg_proc WHERE pronamespace = 'millm'::regnamespace AND proname = 'generate_rows';
SELECT count(DISTINCT pg_get_function_arguments(oid)) FROM pg_proc WHERE pronamespace = 'millm'::regnamespace AND proname IN ('chat', 'chat_stream');
SELECT regexp_split_to_table(pg_get_function_arguments(oid), ', ') AS argument FROM pg_proc
WHERE pronamespace = 'millm'::regnamespace AND proname = 'chat_stream';
SELECT count(DISTINCT pg_get_function_arguments(oid)) FROM pg_proc WHERE pronamespace = 'millm'::regnamespace AND proname IN ('complete', 'complete_stream');
SELECT regexp_split_to_table(pg_get_function_arguments(oid), ', ') AS argument FROM pg_proc
WHERE pronamespace = 'millm'::regnamespace AND proname = 'complete';
SELECT pg_get_function_arguments(oid) LIKE 'prompt text, tools json%' AS of_text FROM pg_proc
WHERE pronamespace = 'millm'::regnamespace AND proname = 'chat' ORDER BY 1;

-- NULL is no call
SELECT millm.generate(NULL);
SELECT millm.generate(NULL::text[]), millm.generate('{}'::text[]), millm.generate('{NULL,NULL}'::text[]);
SELECT millm.generate_stream(NULL);
SELECT * FROM millm.generate_rows(NULL);
SELECT * FROM millm.generate_rows('SELECT 1, NULL::text', raw => true);
SELECT millm.chat(NULL), millm.apply_chat_template(NULL);
SELECT millm.chat_stream(NULL);
SELECT millm.complete(NULL, n => 2);
SELECT millm.complete_stream(NULL);
SELECT millm.tokenize(NULL), millm.detokenize(NULL), millm.count_tokens(NULL);

-- Refused before the engine is asked
SELECT millm.generate('x', raw => true, system => 'Be brief.');
SELECT millm.generate('x', raw => true, temperature => 'NaN');
SELECT millm.generate('x', raw => true, top_p => '-Infinity');
SELECT millm.generate('x', raw => true, stop => ARRAY['a', NULL]);
SELECT millm.generate_stream('x', raw => true, stop => ARRAY['a', NULL]);
SELECT millm.generate('x', raw => true, model => 'nobody');
SELECT millm.generate('x', raw => true, model => '12345');
SELECT millm.generate('{x}'::text[], raw => true, system => 'Be brief.');
SELECT millm.generate('{x}'::text[], raw => true, model => 'nobody');
SELECT millm.generate_rows('SELECT 1, ''x''', temperature => 'NaN');
SELECT millm.generate_rows('SELECT 1, ''x''', look_ahead => 257);
SELECT millm.generate_rows('SELECT 1');
SELECT millm.generate_rows('SELECT 1, 2');
SELECT millm.generate_rows('DELETE FROM millm.registry RETURNING id, name');
SELECT millm.generate_rows('SELECT 1, ''{}''::jsonb', system => 'Be brief.');
SELECT millm.generate_rows('SELECT 1, ''{}''::jsonb', raw => true);
SELECT millm.chat('[]', stop => ARRAY['a', NULL]);
SELECT millm.complete('x', temperature => 'NaN');
SELECT millm.complete_stream('x', stop => ARRAY['a', NULL]);
SELECT millm.complete('x', model => 'nobody');
SELECT millm.complete('x', logit_bias => '[1]');
SELECT millm.complete('x', logit_bias => '{"1": "a"}');
SELECT millm.complete('x', logit_bias => '{"1": {"2": 3}}');
SELECT millm.chat('[]', logit_bias => '{"1": 5, "2": 1e400}');
SELECT millm.apply_chat_template('[]', model => 'nobody');
SELECT millm.chat(' [{"role": "user", "content": "Hi"}, {"content": [1], "role": "user"}] ');
SELECT millm.detokenize(ARRAY[1, NULL]);
SELECT millm.generate(repeat('x', 17000000), raw => true);
-- A set has no place here
SELECT CASE WHEN true THEN millm.generate_stream('x') END;

-- No model is loaded: MODEL_NOT_LOADED, one SQLSTATE for all
\set VERBOSITY sqlstate
SELECT millm.generate('x', raw => true);
SELECT millm.generate_stream('x', raw => true);
SELECT millm.generate('{x}'::text[]);
SELECT millm.generate_rows('SELECT 1, ''x''');
SELECT millm.generate('x', system => 'Be brief.');
SELECT millm.chat('[]');
SELECT millm.chat_stream('[]');
SELECT millm.complete('x');
SELECT millm.complete_stream('x');
SELECT millm.apply_chat_template('[]');
SELECT millm.tokenize('x');
SELECT millm.detokenize('{1}');
SELECT millm.count_tokens('x');
-- An option that does not exist
SELECT millm.generate('x', raw => true, nonsense => 1);
\set VERBOSITY default

-- plpgsql catches it by that state
DO $$
BEGIN
	PERFORM millm.generate('x', raw => true);
EXCEPTION WHEN SQLSTATE 'ML006' THEN
	RAISE NOTICE 'not loaded';
END
$$;

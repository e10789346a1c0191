-- What the registry's functions refuse, before any hub is asked

-- Names of repositories
SELECT millm.download(NULL);
SELECT millm.download('', 'FP16');
SELECT millm.download('../etc/passwd', 'FP16');
SELECT millm.download('owner/..', 'FP16');
SELECT millm.download('owner/name/more', 'FP16');
SELECT millm.download('owner/a--b', 'FP16');
SELECT millm.download('https://huggingface.co/owner/name', 'FP16');
SELECT millm.download(repeat('x', 97) || '/y', 'FP16');

-- Quantizations
SELECT millm.download('owner/name', 'Q5');
SELECT millm.download('owner/name', '');
SELECT millm.download('owner/name', ' Q4');
SELECT millm.download('owner/name', NULL);
SELECT millm.register_local('/etc', 'gptq');
-- Each has several names, in any case; the registry has one
SET client_min_messages = warning;
BEGIN;
SELECT count(millm.download('owner/repo' || n, q, name => q)) AS queued
FROM unnest('{FP16,fp16,none,Q4,q4,nf4,BNB-4bit,Q8,Int8,bnb-8bit}'::text[]) WITH ORDINALITY AS a(q, n);
SELECT millm.download('owner/name') > 0 AS queued;
SELECT name, quantization, disk_size_mb, estimated_memory_mb FROM millm.models ORDER BY id;
ROLLBACK;
RESET client_min_messages;

-- One repository with two quantizations: two models of one name, which then says too little
BEGIN;
DO $$
DECLARE
	q4 bigint := millm.download('owner/name', 'Q4');
	q8 bigint := millm.download('owner/name', 'Q8');
	statement text;
	detail text;
	hint text;
BEGIN
	FOREACH statement IN ARRAY ARRAY['SELECT millm.delete(''name'')', 'SELECT millm.download(''owner/name'', ''nf4'')',
		'SELECT millm.download(''owner/name'', ''int8'', name => ''again'', revision => ''v2'')', 'SELECT millm.download(''owner/other'', name => ''name'')']
	LOOP
		BEGIN
			EXECUTE statement;
		EXCEPTION WHEN OTHERS THEN
			GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
			detail := replace(replace(detail, q4::text || ' ', '<q4> '), q8::text || ' ', '<q8> ');
			detail := regexp_replace(detail, q4::text || '\.', '<q4>.');
			detail := regexp_replace(detail, q8::text || '\.', '<q8>.');
			RAISE NOTICE E'% %\nDETAIL:  %\nHINT:  %', SQLSTATE, SQLERRM, detail, hint;
		END;
	END LOOP;
	PERFORM millm.download('other/name', 'Q4');
	PERFORM millm.delete(q8);
	PERFORM millm.download('owner/name', 'Q8', name => 'name-Q8');
END
$$;
SELECT name, repo_id, quantization FROM millm.models ORDER BY id;
ROLLBACK;

-- Names, revisions, tokens
SELECT millm.download('owner/name', 'FP16', name => '');
SELECT millm.download('owner/name', 'FP16', name => '42');
SELECT millm.download('owner/name', 'FP16', name => E'a\nb');
SELECT millm.download('owner/name', 'FP16', revision => 'a/../b');
SELECT millm.download('owner/name', 'FP16', revision => 'a?b');
SELECT millm.download('owner/name', 'FP16', hf_token => 'hf secret');
SELECT millm.download('owner/name', 'FP16', hf_token => '');

-- A Hub that cannot be reached: queued all the same, and gone with the transaction
BEGIN;
SELECT millm.download('owner/name', 'FP16') > 0 AS queued;
SELECT name, source, repo_id, revision, quantization, params, status, download_progress, error_code FROM millm.models;
SAVEPOINT s;
SELECT millm.wait('name');
ROLLBACK TO s;
SELECT millm.cancel('name');
ROLLBACK TO s;
SELECT millm.load('name');
ROLLBACK TO s;
PREPARE TRANSACTION 'millm';
SELECT count(*) FROM millm.models;

-- Nobody's model
SELECT millm.wait('nobody');
SELECT millm.wait(4711);
SELECT millm.cancel('nobody');
SELECT millm.retry('nobody');
SELECT millm.delete('nobody');
SELECT millm.load('nobody');
SELECT millm.load(4711);
SELECT millm.load('4711');
SELECT millm.load('99999999999999999999');
SELECT millm.unload();
SELECT millm.unload('-1 s');
SELECT millm.wait('nobody', '2 days');
SELECT millm.load(NULL::text), millm.wait(NULL::bigint), millm.delete(NULL::text), millm.cancel(NULL::text), millm.retry(NULL::text);

-- Local directories
SELECT millm.register_local(NULL);
SELECT millm.register_local('relative/path');
SELECT millm.register_local('/nowhere/at/all');
SELECT millm.register_local('/etc/passwd');
SELECT millm.register_local('/etc', 'Q4');
SELECT millm.register_local('/' || repeat('x', 1024));
\set VERBOSITY sqlstate
SELECT millm.register_local('/etc');
\set VERBOSITY default
SELECT count(*) FROM millm.models;

-- CREATE EXTENSION, and what it leaves
\set VERBOSITY terse
CREATE EXTENSION millm;

-- Its objects
SELECT pg_describe_object(classid, objid, 0) COLLATE "C" AS object
FROM pg_depend WHERE refclassid = 'pg_extension'::regclass AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'millm') AND deptype = 'e' AND classid <> 'pg_type'::regclass
ORDER BY 1;

-- Every function and every relation that people meet says what it is
SELECT oid::regprocedure FROM pg_proc WHERE pronamespace = 'millm'::regnamespace AND obj_description(oid, 'pg_proc') IS NULL;
SELECT oid::regclass FROM pg_class WHERE relnamespace = 'millm'::regnamespace AND relkind IN ('r', 'v') AND obj_description(oid, 'pg_class') IS NULL;

-- Nothing is PUBLIC's
SELECT oid::regprocedure FROM pg_proc WHERE pronamespace = 'millm'::regnamespace AND has_function_privilege('public', oid, 'EXECUTE');
SELECT oid::regclass FROM pg_class WHERE relnamespace = 'millm'::regnamespace AND relkind IN ('r', 'v', 'S')
	AND has_table_privilege('public', oid, 'SELECT, INSERT, UPDATE, DELETE');
SELECT has_schema_privilege('public', 'millm', 'USAGE');

-- Volatility, strictness and parallel safety of what manages models
SELECT proname, count(*) AS forms, provolatile AS volatile, proisstrict AS strict, proparallel AS parallel, prosecdef AS definer
FROM pg_proc WHERE pronamespace = 'millm'::regnamespace AND proname NOT IN ('generate', 'generate_stream', 'tokenize', 'detokenize', 'count_tokens')
GROUP BY 1, 3, 4, 5, 6 ORDER BY 1;

-- The registry and its owner are dumped, the trash is not
SELECT unnest(extconfig)::regclass FROM pg_extension WHERE extname = 'millm' ORDER BY 1;

-- The public face of the registry
SELECT string_agg(attname, ' ' ORDER BY attnum) FROM pg_attribute WHERE attrelid = 'millm.models'::regclass AND attnum > 0;
SELECT * FROM millm.models;
SELECT * FROM millm.progress;

-- The settings
SELECT name, context, setting FROM pg_settings WHERE name LIKE 'millm.%' AND name NOT IN ('millm.cache_dir', 'millm.database', 'millm.hf_endpoint')
ORDER BY name;
SET millm.nonsense = 1;
ALTER SYSTEM SET millm.device = 'gpu';

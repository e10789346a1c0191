-- Who may do what
CREATE ROLE millm_nobody;
CREATE ROLE millm_user;
CREATE ROLE millm_admin;

SET ROLE millm_nobody;
SELECT * FROM millm.models;
SELECT millm.generate('x', raw => true);
RESET ROLE;

SELECT millm.grant_user('millm_user');
SELECT millm.grant_admin('millm_admin');

-- Settings: by whatever way, none
CREATE TEMP TABLE settings AS SELECT name, s.ways
	FROM (SELECT name FROM pg_catalog.pg_settings WHERE name LIKE 'millm.%' UNION ALL SELECT 'millm.hf_token') n,	-- which pg_settings does not list
	LATERAL (SELECT ARRAY[format('SET %s = %L', name, '1'), format('ALTER ROLE millm_admin SET %s = %L', name, '1'),
		format('SELECT set_config(%L, %L, true)', name, '1')] AS ways) s;
GRANT SELECT ON settings TO millm_admin;
SELECT count(*) FROM settings;
SET ROLE millm_admin;
DO $$
DECLARE
	way text;
BEGIN
	FOR way IN SELECT unnest(ways) FROM settings LOOP
		BEGIN
			EXECUTE way;
			RAISE WARNING 'possible: %', way;
		EXCEPTION WHEN insufficient_privilege OR cant_change_runtime_param THEN NULL;
		END;
	END LOOP;
END $$;
ALTER SYSTEM SET millm.cache_dir = '/tmp';
ALTER DATABASE postgres SET millm.hf_token = 'x';
RESET ROLE;
DROP TABLE settings;

-- A user looks and generates
SET ROLE millm_user;
SELECT count(*) FROM millm.models;
SELECT count(*) FROM millm.progress;
SELECT count(*) > 0 AS some FROM millm.errors;
SELECT engine_state IS NOT NULL AS there FROM millm.status();
SELECT millm.download('owner/name', 'FP16');
SELECT millm.load('nobody');
SELECT millm.unload();
SELECT millm.delete('nobody');
SELECT * FROM millm.registry;
INSERT INTO millm.trash VALUES (gen_random_uuid(), '..');
SELECT * FROM millm.owner;
SELECT millm.grant_user('millm_nobody');
SET millm.cache_dir = '/tmp';
\set VERBOSITY sqlstate
SHOW millm.hf_token;
SHOW millm.cache_dir;
\set VERBOSITY default
RESET ROLE;

-- An admin also manages models, never the tables, and reads no file that PostgreSQL would not show
SET ROLE millm_admin;
SELECT millm.delete('nobody');
SELECT millm.register_local('/etc');
SELECT * FROM millm.registry;
DELETE FROM millm.trash;
SELECT millm.grant_user('millm_nobody');
-- the function becomes the owner for one statement, not for what follows it
BEGIN;
SELECT millm.download('owner/name', 'FP16') > 0 AS queued;
SELECT current_user, current_setting('search_path') <> 'pg_catalog' AS own_path;
SELECT count(*) FROM millm.registry;
ROLLBACK;
RESET ROLE;

-- A search path with traps changes nothing
CREATE SCHEMA trap;
CREATE FUNCTION trap.clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$;
CREATE TABLE trap.registry (id int);
SET search_path = trap, pg_catalog;
BEGIN;
SELECT millm.download('owner/name', 'FP16') > 0 AS queued;
ROLLBACK;
RESET search_path;
DROP SCHEMA trap CASCADE;

DROP OWNED BY millm_user, millm_admin;
DROP ROLE millm_nobody, millm_user, millm_admin;

-- API keys: who may make, revoke and see them, what they may act as, and what the bridge's role may do
\set VERBOSITY default
CREATE ROLE millm_app;
CREATE ROLE millm_other;
CREATE ROLE "millm ""odd""";
CREATE ROLE millm_admin;
CREATE ROLE millm_user;
CREATE ROLE millm_bridge LOGIN NOINHERIT;
CREATE ROLE millm_second_bridge LOGIN NOINHERIT;
SELECT millm.grant_user('millm_user');
SELECT millm.grant_admin('millm_admin');
GRANT millm_app TO millm_admin WITH ADMIN OPTION;

-- What a bridge cannot be
CREATE ROLE millm_super SUPERUSER LOGIN NOINHERIT;
SELECT millm.grant_bridge('millm_super');
SELECT millm.grant_bridge('millm_app');
SELECT millm.grant_bridge('millm_bridge');

-- A key, of 256 random bits in base64url; only its hash is stored
CREATE TEMP TABLE made (name text, key text);
GRANT ALL ON made TO millm_admin;
SET ROLE millm_admin;
INSERT INTO made VALUES ('app', millm.create_api_key('app', 'millm_app'));
INSERT INTO made VALUES ('limited', millm.create_api_key('limited', 'millm_app', max_concurrency => 2, max_tokens => 100, timeout => '1.5 s'));
SELECT millm.create_api_key('app', 'millm_app');
SELECT millm.create_api_key('x', 'millm_other');
SELECT millm.create_api_key('x', current_user::regrole);
SELECT id > 0 AS id, name, role, max_concurrency, max_tokens, timeout, created_at IS NOT NULL AS created FROM millm.api_keys ORDER BY name;
SELECT hash FROM millm.api_keys;
SELECT * FROM millm.api_key;
SELECT * FROM millm.authenticate('');
RESET ROLE;
SELECT count(DISTINCT key), bool_and(key ~ '^millm-[A-Za-z0-9_-]{43}$') AS form FROM made;
SELECT bool_and(k.hash = sha256(m.key::bytea)) AS sha256 FROM made m JOIN millm.api_key k USING (name);
SELECT count(*) FROM millm.api_key k, made m WHERE k::text LIKE '%' || substr(m.key, 7) || '%';

-- Nobody else may make, revoke or see them
SET ROLE millm_user;
SELECT millm.create_api_key('x', 'millm_user');
SELECT millm.revoke_api_key('app');
SELECT * FROM millm.api_keys;
SELECT millm.grant_bridge('millm_second_bridge');
RESET ROLE;

-- What a key cannot act as, be named or be limited to; not even for a superuser
SELECT millm.create_api_key('x', 'millm_super');
SELECT millm.create_api_key('x', 'pg_read_all_data');
GRANT millm_super TO millm_other;
SELECT millm.create_api_key('x', 'millm_other');
REVOKE millm_super FROM millm_other;
-- (its context has the GRANT as this version writes it)
\set VERBOSITY terse
SELECT millm.create_api_key('x', 'millm_bridge');
\set VERBOSITY default
SELECT millm.create_api_key('x', 'nobody');
SELECT millm.create_api_key('x', 4294967290::oid::regrole);
SELECT millm.create_api_key('x', NULL);
SELECT millm.create_api_key(NULL, 'millm_app');
SELECT millm.create_api_key('', 'millm_app');
SELECT millm.create_api_key(repeat('x', 64), 'millm_app');
SELECT millm.create_api_key(E'a\nb', 'millm_app');
SELECT millm.create_api_key('x', 'millm_app', max_concurrency => 0);
SELECT millm.create_api_key('x', 'millm_app', max_tokens => -1);
SELECT millm.create_api_key('x', 'millm_app', timeout => '0.5 ms');
SELECT millm.create_api_key('x', 'millm_app', timeout => '2 days');

-- The bridge's role: it learns whose a key is, and may become that role and no other
SET SESSION AUTHORIZATION millm_bridge;
SELECT engine_state IS NOT NULL AS there FROM millm.status();
SELECT count(*) FROM millm.api_keys;
SELECT * FROM millm.api_key;
SELECT * FROM millm.models;
SELECT millm.create_api_key('x', 'millm_app');
SELECT millm.authenticate(sha256('millm-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA'));
SELECT millm.authenticate('');
SELECT millm.authenticate(NULL);
SET ROLE millm_other;
SET ROLE millm_app;
SELECT current_user;
SELECT * FROM millm.api_keys;
RESET SESSION AUTHORIZATION;
SELECT k.name, a.key_id = k.id AS id, a.name, a.role, a.max_concurrency, a.max_tokens, a.timeout_ms
FROM made m JOIN millm.api_key k USING (name), millm.authenticate(sha256(m.key::bytea)) a ORDER BY 1;

-- Those that exist are for every bridge, also for one that comes later; a role's name may be odd, and change
INSERT INTO made SELECT 'odd', millm.create_api_key('odd', '"millm ""odd"""');
SELECT millm.grant_bridge('millm_second_bridge');
SELECT rolname, pg_has_role(rolname, 'millm_app', 'MEMBER') AS app, pg_has_role(rolname, 'millm "odd"', 'MEMBER') AS odd,
	pg_has_role(rolname, 'millm_app', 'USAGE') AS inherits
FROM pg_roles WHERE rolname LIKE 'millm%bridge' ORDER BY 1;
ALTER ROLE "millm ""odd""" RENAME TO millm_renamed;
SELECT a.name, a.role FROM made m, millm.authenticate(sha256(m.key::bytea)) a WHERE m.name = 'odd';

-- One whose role has become able to do everything is good for nothing
ALTER ROLE millm_renamed SUPERUSER;
SELECT a.name FROM made m, millm.authenticate(sha256(m.key::bytea)) a WHERE m.name = 'odd';
ALTER ROLE millm_renamed NOSUPERUSER;
GRANT millm_super TO millm_renamed;
SELECT a.name FROM made m, millm.authenticate(sha256(m.key::bytea)) a WHERE m.name = 'odd';
-- one whose role is gone too, and a new role of that name does not get it; anybody who may revoke may revoke it
DROP ROLE millm_renamed;
CREATE ROLE millm_renamed;
SELECT a.name FROM made m, millm.authenticate(sha256(m.key::bytea)) a WHERE m.name = 'odd';
SET ROLE millm_admin;
SELECT millm.revoke_api_key('odd');
RESET ROLE;

-- Revoking follows the transaction, and needs what making needs
BEGIN;
SELECT millm.revoke_api_key('app');
ROLLBACK;
SELECT a.name FROM made m, millm.authenticate(sha256(m.key::bytea)) a WHERE m.name = 'app';
SELECT millm.revoke_api_key('app');
SELECT a.name FROM made m, millm.authenticate(sha256(m.key::bytea)) a WHERE m.name = 'app';
SELECT millm.revoke_api_key('app');
REVOKE millm_app FROM millm_admin CASCADE;
SET ROLE millm_admin;
SELECT millm.revoke_api_key('limited');
RESET ROLE;
SELECT name FROM millm.api_keys;

-- A search path with traps changes nothing
CREATE SCHEMA trap;
CREATE FUNCTION trap.sha256(bytea) RETURNS bytea LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$;
CREATE TABLE trap.pg_roles (oid oid);
SET search_path = trap, pg_catalog;
SELECT length(millm.create_api_key('trap', 'millm_app'));
SELECT millm.grant_bridge('millm_bridge');
RESET search_path;
DROP SCHEMA trap CASCADE;

SELECT millm.revoke_api_key(name) FROM millm.api_keys;
DROP TABLE made;
DROP OWNED BY millm_user, millm_admin, millm_bridge, millm_second_bridge;
DROP ROLE millm_app, millm_other, millm_renamed, millm_admin, millm_user, millm_bridge, millm_second_bridge, millm_super;

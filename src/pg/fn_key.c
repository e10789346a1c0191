/*
 * fn_key.c -- API keys: who holds one acts, through the bridge, as the key's role.
 *
 * A key is shown once and stored as its hash.  Nobody can hand out more than he could GRANT: create_api_key() demands ADMIN OPTION
 * on the role, and makes the bridges' login roles members of it by a GRANT of the caller's own.  Those are the roles that may
 * execute authenticate(), which is all that a bridge needs to know a key.  No key acts as a superuser, nor as a role that can
 * become one: a bridge that is a member of it could, too.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/catalog.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/syscache.h"

#include "client.h"
#include "compat.h"
#include "interval.h"
#include "registry.h"

PG_FUNCTION_INFO_V1(millm_create_api_key);
PG_FUNCTION_INFO_V1(millm_revoke_api_key);
PG_FUNCTION_INFO_V1(millm_authenticate);
PG_FUNCTION_INFO_V1(millm_grant_bridge);

#define KEY_PREFIX		"millm-"
#define KEY_BYTES		32
#define HASH_BYTES		32
#define MAX_NAME_BYTES	63		/* that of application_name, where the bridge shows it */

/* A superuser that the role is or can become: its name; NULL if there is none.  Read here and not by SQL, since each request asks. */
static const char *
superuser_of(Oid role)
{
	Relation	roles = table_open(AuthIdRelationId, AccessShareLock);
	SysScanDesc scan = systable_beginscan(roles, InvalidOid, false, NULL, 0, NULL);
	const char *name = NULL;
	HeapTuple	tuple;

	while (!name && HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		Form_pg_authid form = (Form_pg_authid) GETSTRUCT(tuple);

		if (form->rolsuper && is_member_of_role_nosuper(role, form->oid))
			name = pstrdup(NameStr(form->rolname));
	}
	systable_endscan(scan);
	table_close(roles, AccessShareLock);
	return name;
}

/* SPI as the caller, with a safe search_path and without "is already a member" notices; returns what end_statements() takes. */
static int
begin_statements(void)
{
	int			guc_level = NewGUCNestLevel();

	(void) set_config_option("search_path", MILLM_SAFE_PATH, PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
	(void) set_config_option("client_min_messages", "warning", PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	return guc_level;
}

static void
end_statements(int guc_level)
{
	SPI_finish();
	AtEOXact_GUC(true, guc_level);
}

static void
execute(const char *sql)
{
	(void) millm_registry_execute(sql, 0, NULL, NULL, NULL);
}

/* Within begin/end, of the last statement's only row; NULL is null.  Lives until the end. */
static char *
value(int column)
{
	return SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, column);
}

/* A key and a bridge that are made at the same time must know of each other: whoever comes second waits for the first's end. */
static void
lock_keys(void)
{
	MillmRegistry r;

	millm_registry_begin(&r);
	execute("LOCK TABLE millm.api_key IN SHARE ROW EXCLUSIVE MODE");
	millm_registry_end(&r);
}

/* Make the bridge able to become the role, and no more than that. */
static void
grant_role(const char *role, const char *bridge)
{
	execute(psprintf("GRANT %s TO %s" MILLM_MEMBER_BY_SET_ONLY, quote_identifier(role), quote_identifier(bridge)));
}

static void
require_admin_option(Oid role)
{
	if (!is_admin_of_role(GetUserId(), role))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("must have admin option on role \"%s\"", GetUserNameFromId(role, false)),
				 errdetail("Whoever holds an API key acts as its role.")));
}

/* Refuse what no key may act as. */
static void
check_key_role(Oid role)
{
	char	   *name = GetUserNameFromId(role, false);
	const char *superuser = superuser_of(role);
	MillmError	err;

	if (superuser && superuser_arg(role))
	{
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "no API key can act as the superuser \"%s\"", name);
		millm_hint(&err, "Make the key for a role with no more privileges than its holder needs.");
		millm_ereport(ERROR, &err);
	}
	if (superuser)
	{
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "no API key can act as \"%s\", which is a member of the superuser \"%s\"", name, superuser);
		millm_hint(&err, "Make the key for a role with no more privileges than its holder needs.");
		millm_ereport(ERROR, &err);
	}
	if (IsReservedName(name))
	{
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "no API key can act as the predefined role \"%s\"", name);
		millm_hint(&err, "GRANT it to a role of its own, and make the key for that.");
		millm_ereport(ERROR, &err);
	}
}

/* It is shown in application_name, logs and metrics. */
static void
check_key_name(const char *name)
{
	MillmError	err;

	if (name[0] == '\0' || strlen(name) > MAX_NAME_BYTES)
	{
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "the name of an API key has 1 to %d bytes, this has %zu", MAX_NAME_BYTES, strlen(name));
		millm_ereport(ERROR, &err);
	}
	for (const char *p = name; *p; p++)
		if ((unsigned char) *p < ' ' || *p == 0x7F)
		{
			millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "the name of an API key has no control characters, this has 0x%02x", (unsigned char) *p);
			millm_ereport(ERROR, &err);
		}
}

static void
check_limit(const char *what, bool is_null, int64 limit)
{
	MillmError	err;

	if (is_null || limit > 0)
		return;
	millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "%s must be more than 0", what);
	millm_hint(&err, "NULL is no limit.");
	millm_ereport(ERROR, &err);
}

/* A new key: the prefix, and random bytes in base64url. */
static text *
make_key(void)
{
	static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
	uint8		bytes[KEY_BYTES];
	char		key[sizeof(KEY_PREFIX) + (KEY_BYTES * 8 + 5) / 6] = KEY_PREFIX;
	char	   *p = key + strlen(KEY_PREFIX);
	uint32		bits = 0;
	int			n_bits = 0;
	text	   *result;

	if (!pg_strong_random(bytes, sizeof(bytes)))
		ereport(ERROR, (errcode(ERRCODE_INTERNAL_ERROR), errmsg("could not generate random values")));
	for (int i = 0; i < KEY_BYTES; i++)
	{
		bits = bits << 8 | bytes[i];
		for (n_bits += 8; n_bits >= 6; n_bits -= 6)
			*p++ = digits[bits >> (n_bits - 6) & 63];
	}
	*p++ = digits[bits << (6 - n_bits) & 63];
	result = cstring_to_text_with_len(key, p - key);
	explicit_bzero(bytes, sizeof(bytes));
	explicit_bzero(key, sizeof(key));
	return result;
}

/* millm.create_api_key(name text, role regrole, max_concurrency, max_tokens integer, timeout interval) RETURNS text */
Datum
millm_create_api_key(PG_FUNCTION_ARGS)
{
	Oid			types[] = {TEXTOID, OIDOID, BYTEAOID, INT4OID, INT4OID, INTERVALOID};
	Datum		values[] = {PG_GETARG_DATUM(0), PG_GETARG_DATUM(1), (Datum) 0, PG_GETARG_DATUM(2), PG_GETARG_DATUM(3), PG_GETARG_DATUM(4)};
	char		nulls[] = {' ', ' ', ' ', PG_ARGISNULL(2) ? 'n' : ' ', PG_ARGISNULL(3) ? 'n' : ' ', PG_ARGISNULL(4) ? 'n' : ' ', '\0'};
	MillmRegistry r;
	MillmError	err;
	char	   *name;
	const char *role_name;
	Oid			role;
	text	   *key;
	uint64		n;
	char	  **bridges;
	int			level;

	if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
	{
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "%s must not be null", PG_ARGISNULL(0) ? "name" : "role");
		millm_ereport(ERROR, &err);
	}
	name = text_to_cstring(PG_GETARG_TEXT_PP(0));
	role = PG_GETARG_OID(1);
	check_key_name(name);
	check_limit("max_concurrency", PG_ARGISNULL(2), PG_ARGISNULL(2) ? 0 : PG_GETARG_INT32(2));
	check_limit("max_tokens", PG_ARGISNULL(3), PG_ARGISNULL(3) ? 0 : PG_GETARG_INT32(3));
	check_limit("timeout", PG_ARGISNULL(4), PG_ARGISNULL(4) ? 0 : millm_interval_ms(PG_GETARG_INTERVAL_P(4)));
	role_name = GetUserNameFromId(role, false);
	require_admin_option(role);
	check_key_role(role);
	lock_keys();

	key = make_key();
	values[2] = DirectFunctionCall1(sha256_bytea, PointerGetDatum(key));
	millm_registry_begin(&r);
	n = millm_registry_execute("INSERT INTO millm.api_key (name, role, hash, max_concurrency, max_tokens, timeout) VALUES ($1, $2, $3, $4, $5, $6) "
							   "ON CONFLICT (name) DO NOTHING", lengthof(types), types, values, nulls);
	millm_registry_end(&r);
	if (n == 0)
		ereport(ERROR,
				(errcode(ERRCODE_DUPLICATE_OBJECT), errmsg("API key \"%s\" already exists", name),
				 errhint("Choose another name, or revoke that key first: millm.revoke_api_key().")));

	level = begin_statements();
	millm_registry_execute("SELECT DISTINCT b.rolname FROM pg_proc p, aclexplode(p.proacl) a, pg_roles b "
						   "WHERE p.oid = 'millm.authenticate(bytea)'::regprocedure AND a.privilege_type = 'EXECUTE' "
						   "AND a.grantee = b.oid AND a.grantee <> p.proowner", 0, NULL, NULL, NULL);
	n = SPI_processed;
	bridges = palloc(n * sizeof(char *));
	for (uint64 i = 0; i < n; i++)
		bridges[i] = SPI_getvalue(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1);
	for (uint64 i = 0; i < n; i++)
		grant_role(role_name, bridges[i]);
	end_statements(level);
	PG_RETURN_TEXT_P(key);
}

/* millm.revoke_api_key(name text) RETURNS void; STRICT */
Datum
millm_revoke_api_key(PG_FUNCTION_ARGS)
{
	char	   *name = text_to_cstring(PG_GETARG_TEXT_PP(0));
	Oid			type = TEXTOID;
	Datum		arg = PG_GETARG_DATUM(0);
	Oid			role = InvalidOid;
	MillmRegistry r;
	bool		isnull;

	millm_registry_begin(&r);
	if (millm_registry_execute("SELECT r.oid FROM millm.api_key k LEFT JOIN pg_roles r ON r.oid = k.role WHERE k.name = $1 FOR UPDATE OF k",
							   1, &type, &arg, NULL) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT), errmsg("API key \"%s\" does not exist", name), errhint("The view millm.api_keys lists them.")));
	role = DatumGetObjectId(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	millm_registry_end(&r);
	/* that of a role which was dropped is good for nothing, whoever revokes it */
	if (!isnull)
		require_admin_option(role);
	millm_registry_begin(&r);
	millm_registry_execute("DELETE FROM millm.api_key WHERE name = $1", 1, &type, &arg, NULL);
	millm_registry_end(&r);
	PG_RETURN_VOID();
}

/*
 * millm.authenticate(key_hash bytea) RETURNS record; STRICT: the key of that SHA-256, or INVALID_API_KEY.  What a key is for may
 * have changed since it was made: one whose role is now a superuser is refused, one whose role is gone is not known.
 */
Datum
millm_authenticate(PG_FUNCTION_ARGS)
{
	bytea	   *hash = PG_GETARG_BYTEA_PP(0);
	Oid			type = BYTEAOID;
	Datum		arg = PointerGetDatum(hash);
	MillmRegistry r;
	MillmError	err;
	TupleDesc	desc;
	HeapTuple	tuple;
	bool		known;
	char	   *values[6];
	const char *superuser;
	Oid			role = InvalidOid;
	bool		isnull;

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	millm_registry_begin(&r);
	known = VARSIZE_ANY_EXHDR(hash) == HASH_BYTES &&
		millm_registry_execute("SELECT id, name, NULL, max_concurrency, max_tokens, (extract(epoch FROM timeout) * 1000)::integer, role::oid "
							   "FROM millm.api_key WHERE hash = $1", 1, &type, &arg, NULL) > 0;
	if (known)
	{
		for (int i = 0; i < (int) lengthof(values); i++)
			values[i] = value(i + 1) ? MemoryContextStrdup(r.caller, value(i + 1)) : NULL;
		role = DatumGetObjectId(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 7, &isnull));
	}
	millm_registry_end(&r);
	if (!known || !(values[2] = GetUserNameFromId(role, true)))
	{
		millm_fail(&err, MILLM_E_INVALID_API_KEY, "invalid API key");
		millm_detail(&err, "It never was one, it was revoked, or its role was dropped.");
		millm_hint(&err, "millm.create_api_key() makes a new one.");
		millm_ereport(ERROR, &err);
	}
	superuser = superuser_of(role);
	if (superuser)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE), errmsg("API key \"%s\" may not be used any more", values[1]),
				 errdetail("Its role \"%s\" is, or can become, the superuser \"%s\".", values[2], superuser)));
	tuple = BuildTupleFromCStrings(TupleDescGetAttInMetadata(desc), values);
	PG_RETURN_DATUM(HeapTupleGetDatum(tuple));
}

/* Refuse a login role that has privileges before it has become a key's role. */
static void
check_bridge_role(Oid bridge)
{
	HeapTuple	tuple = SearchSysCache1(AUTHOID, ObjectIdGetDatum(bridge));
	Oid			type = OIDOID;
	Datum		arg = ObjectIdGetDatum(bridge);
	MillmError	err;
	Form_pg_authid form;
	char	   *name;
	bool		is_superuser,
				inherits;
	int			level;

	if (!HeapTupleIsValid(tuple))
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT), errmsg("role with OID %u does not exist", bridge)));
	form = (Form_pg_authid) GETSTRUCT(tuple);
	name = pstrdup(NameStr(form->rolname));
	is_superuser = form->rolsuper;
	inherits = form->rolinherit;
	ReleaseSysCache(tuple);
	if (is_superuser)
	{
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "the bridge cannot log in as the superuser \"%s\"", name);
		millm_hint(&err, "Use CREATE ROLE millm_bridge LOGIN NOINHERIT.");
		millm_ereport(ERROR, &err);
	}
	if (inherits)
	{
		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "role \"%s\" inherits the privileges of the roles that it is a member of", name);
		millm_detail(&err, "The bridge's own role has none of them; it takes on the role of the key that a request brings.");
		millm_hint(&err, "Use ALTER ROLE %s NOINHERIT.", quote_identifier(name));
		millm_ereport(ERROR, &err);
	}
	/* since PostgreSQL 16 that is a property of each membership, and NOINHERIT what the next ones will be */
	level = begin_statements();
	if (millm_registry_execute("SELECT rolname FROM pg_roles WHERE oid <> $1 AND pg_has_role($1, oid, 'USAGE') ORDER BY rolname LIMIT 1", 1, &type, &arg, NULL) > 0)
	{
		char	   *role = value(1);

		millm_fail(&err, MILLM_E_INVALID_ARGUMENT, "role \"%s\" inherits the privileges of \"%s\"", name, role);
		millm_hint(&err, "Use GRANT %s TO %s WITH INHERIT FALSE.", quote_identifier(role), quote_identifier(name));
		millm_ereport(ERROR, &err);
	}
	end_statements(level);
}

/* millm.grant_bridge(role regrole) RETURNS void; STRICT.  The GRANTs run as the caller. */
Datum
millm_grant_bridge(PG_FUNCTION_ARGS)
{
	Oid			bridge = PG_GETARG_OID(0);
	MillmRegistry r;
	const char *name;
	char	  **roles;
	uint64		n;
	int			level;

	check_bridge_role(bridge);
	name = GetUserNameFromId(bridge, false);
	level = begin_statements();
	execute(psprintf("GRANT USAGE ON SCHEMA millm TO %s", quote_identifier(name)));
	execute(psprintf("GRANT SELECT ON millm.api_keys TO %s", quote_identifier(name)));
	execute(psprintf("GRANT EXECUTE ON FUNCTION millm.authenticate(bytea), millm.status() TO %s", quote_identifier(name)));
	end_statements(level);
	lock_keys();

	millm_registry_begin(&r);
	n = millm_registry_execute("SELECT DISTINCT r.rolname FROM millm.api_key k JOIN pg_roles r ON r.oid = k.role", 0, NULL, NULL, NULL);
	roles = MemoryContextAlloc(r.caller, n * sizeof(char *));
	for (uint64 i = 0; i < n; i++)
		roles[i] = MemoryContextStrdup(r.caller, SPI_getvalue(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1));
	millm_registry_end(&r);
	level = begin_statements();
	for (uint64 i = 0; i < n; i++)
		grant_role(roles[i], name);
	end_statements(level);
	PG_RETURN_VOID();
}

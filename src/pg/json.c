/*
 * json.c -- see json.h.
 *
 * The texts come from helpers of our own build, so this reader does not judge them as a validator would; it only
 * never leaves the slice, never recurses, and never takes half a value for a whole one.
 */
#include "json.h"

#include "mb/pg_wchar.h"
#include "utils/memutils.h"

#include "wire.h"

static const char *
skip_space(const char *p, const char *end)
{
	while (p < end && (*p == ' ' || *p == '\t' || *p == '\n' || *p == '\r'))
		p++;
	return p;
}

/* p is at a quote; returns what follows the closing one, or NULL. */
static const char *
skip_string(const char *p, const char *end)
{
	for (p++; p < end; p++)
	{
		if (*p == '"')
			return p + 1;
		if (*p == '\\')
			p++;
	}
	return NULL;
}

/* What follows the value that begins at p, or NULL. */
static const char *
skip_value(const char *p, const char *end)
{
	int			depth = 0;

	while (p && p < end)
	{
		switch (*p)
		{
			case '"':
				p = skip_string(p, end);
				break;
			case '{':
			case '[':
				depth++;
				p++;
				break;
			case '}':
			case ']':
				depth--;
				p++;
				break;
			default:
				if (depth > 0)
				{
					p++;
					continue;
				}
				while (p < end && strchr(",]} \t\r\n", *p) == NULL)
					p++;
				return p;
		}
		if (depth <= 0)
			return depth == 0 ? p : NULL;
	}
	return NULL;
}

MillmJson
millm_json(const char *text, size_t len)
{
	MillmJson	value = {skip_space(text, text + len), text + len};

	while (value.end > value.at && skip_space(value.end - 1, value.end) == value.end)
		value.end--;
	return value;
}

/*
 * Take one element off a list: *rest begins at its opening bracket or at the comma before the element.  *key is
 * set for an object's list.
 */
static bool
next_element(MillmJson *rest, char open, MillmJson *key, MillmJson *value)
{
	const char *p = skip_space(rest->at, rest->end);

	if (p == rest->end || (*p != open && *p != ','))
		return false;
	p = skip_space(p + 1, rest->end);
	if (key)
	{
		if (p == rest->end || *p != '"')
			return false;
		key->at = p;
		if ((p = skip_string(p, rest->end)) == NULL)
			return false;
		key->end = p;
		p = skip_space(p, rest->end);
		if (p == rest->end || *p != ':')
			return false;
		p = skip_space(p + 1, rest->end);
	}
	value->at = p;
	if (p == rest->end || *p == ']' || *p == '}' || (p = skip_value(p, rest->end)) == NULL)
		return false;
	value->end = p;
	rest->at = p;
	return true;
}

static bool
is_null(MillmJson value)
{
	return value.end - value.at == 4 && memcmp(value.at, "null", 4) == 0;
}

bool
millm_json_get(MillmJson object, const char *name, MillmJson *value)
{
	size_t		len = strlen(name);
	MillmJson	key;

	if (object.at == object.end || *object.at != '{')
		return false;
	while (next_element(&object, '{', &key, value))
		if ((size_t) (key.end - key.at) == len + 2 && memcmp(key.at + 1, name, len) == 0)
			return !is_null(*value);
	return false;
}

bool
millm_json_next(MillmJson *rest, MillmJson *element)
{
	return next_element(rest, '[', NULL, element);
}

/* Four hexadecimal digits at p, or -1. */
static int
read_hex4(const char *p, const char *end)
{
	int			v = 0;

	if (end - p < 4)
		return -1;
	for (int i = 0; i < 4; i++)
	{
		char		c = p[i];

		if (c >= '0' && c <= '9')
			v = v * 16 + (c - '0');
		else if ((c | 0x20) >= 'a' && (c | 0x20) <= 'f')
			v = v * 16 + ((c | 0x20) - 'a' + 10);
		else
			return -1;
	}
	return v;
}

bool
millm_json_string(MillmJson value, StringInfo out)
{
	static const char escaped[] = "\"\\/bfnrt",
				meant[] = "\"\\/\b\f\n\r\t";
	const char *p = value.at + 1;
	const char *end = value.end - 1;	/* the closing quote */

	if (value.end - value.at < 2 || *value.at != '"' || *end != '"')
		return false;
	while (p < end)
	{
		const char *run = p;

		while (p < end && *p != '\\')
			p++;
		appendBinaryStringInfo(out, run, p - run);
		if (p == end)
			break;
		if (end - p < 2)
			return false;
		if (p[1] == 'u')
		{
			unsigned char utf8[4];
			int			c = read_hex4(p + 2, end);
			int			low;

			p += 6;
			if (c >= 0xD800 && c <= 0xDBFF)
			{
				if (end - p < 6 || p[0] != '\\' || p[1] != 'u' ||
					(low = read_hex4(p + 2, end)) < 0xDC00 || low > 0xDFFF)
					return false;
				c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
				p += 6;
			}
			else if (c < 0 || (c >= 0xDC00 && c <= 0xDFFF))
				return false;
			unicode_to_utf8((pg_wchar) c, utf8);
			appendBinaryStringInfo(out, (char *) utf8, pg_utf_mblen(utf8));
		}
		else
		{
			const char *e = memchr(escaped, p[1], sizeof(escaped) - 1);

			if (!e)
				return false;
			appendStringInfoChar(out, meant[e - escaped]);
			p += 2;
		}
	}
	return true;
}

/* The slice as a C string for the number readers of libc; false when it cannot be a number. */
static bool
number_text(MillmJson value, char *buf, size_t size)
{
	size_t		len = value.end - value.at;

	if (len == 0 || len >= size || (*value.at != '-' && (*value.at < '0' || *value.at > '9')))
		return false;
	memcpy(buf, value.at, len);
	buf[len] = '\0';
	return true;
}

bool
millm_json_int(MillmJson value, int64 *out)
{
	char		buf[32];
	char	   *end;

	if (!number_text(value, buf, sizeof(buf)))
		return false;
	errno = 0;
	*out = strtoll(buf, &end, 10);
	return errno == 0 && *end == '\0';
}

bool
millm_json_double(MillmJson value, double *out)
{
	char		buf[64];
	char	   *end;

	if (!number_text(value, buf, sizeof(buf)))
		return false;
	errno = 0;
	*out = strtod(buf, &end);
	return errno == 0 && *end == '\0';
}

bool
millm_json_bool(MillmJson value, bool *out)
{
	size_t		len = value.end - value.at;

	*out = len == 4 && memcmp(value.at, "true", 4) == 0;
	return *out || (len == 5 && memcmp(value.at, "false", 5) == 0);
}

char *
millm_json_get_string(MillmJson object, const char *name)
{
	MillmJson	value;
	StringInfoData buf;

	if (!millm_json_get(object, name, &value))
		return NULL;
	initStringInfo(&buf);
	if (!millm_json_string(value, &buf) || strlen(buf.data) != (size_t) buf.len)
		return NULL;
	return buf.data;
}

bool
millm_json_get_int(MillmJson object, const char *name, int64 *out)
{
	MillmJson	value;

	return millm_json_get(object, name, &value) && millm_json_int(value, out);
}

bool
millm_json_get_double(MillmJson object, const char *name, double *out)
{
	MillmJson	value;

	return millm_json_get(object, name, &value) && millm_json_double(value, out);
}

bool
millm_json_get_bool(MillmJson object, const char *name, bool *out)
{
	MillmJson	value;

	return millm_json_get(object, name, &value) && millm_json_bool(value, out);
}

void
millm_json_append_string(StringInfo buf, const char *text, size_t len)
{
	size_t		bytes = wire_json_string_bytes(text, len);

	if (bytes >= MaxAllocSize)
		ereport(ERROR, (errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED), errmsg("text is too long")));
	enlargeStringInfo(buf, (int) bytes);
	buf->len += (int) wire_put_json_string(buf->data + buf->len, bytes, text, len);
	buf->data[buf->len] = '\0';
}

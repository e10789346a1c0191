/*
 * test_chat.c -- chat templates: what parity with jinja2 (test_chat_templates.py) cannot show.  Limits, messages, origins.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "chat.h"

#define NOW 1753000000

/* Compile and render; the text is the caller's to free, NULL when refused. */
static char *
render(const char *source, const char *variables, MillmRendering *r, MillmError *err)
{
	MillmTemplate *t;
	json_t	   *v = json_loads(variables, 0, NULL);
	json_t	   *trusted = json_pack("{s:s}", "bos_token", "<s>");

	assert_non_null(v);
	*err = (MillmError) {0};
	*r = (MillmRendering) {0};
	if (millm_template_compile(source, strlen(source), &t, err) == MILLM_OK)
	{
		millm_template_render(t, trusted, v, NOW, r, err);
		millm_template_free(t);
	}
	json_decref(v);
	json_decref(trusted);
	return r->text;
}

static void
gives(const char *source, const char *variables, const char *text)
{
	MillmRendering r;
	MillmError	err;

	render(source, variables, &r, &err);
	if (!r.text)
		fail_msg("%s: %s", source, err.message);
	assert_string_equal(r.text, text);
	millm_rendering_free(&r);
}

static void
refuses(const char *source, const char *variables, MillmCode code, const char *words)
{
	MillmRendering r;
	MillmError	err;

	render(source, variables, &r, &err);
	assert_null(r.text);
	assert_int_equal(err.code, code);
	if (!strstr(err.message, words))
		fail_msg("'%s' does not say '%s'", err.message, words);
}

static void
chatml(void **state)
{
	(void) state;
	gives("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}"
		  "{% endif %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
		  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
		  "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}], \"add_generation_prompt\": true}",
		  "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
}

static void
errors_name_the_line(void **state)
{
	(void) state;
	refuses("a\n{{ 1 + }}", "{}", MILLM_E_INVALID_MODEL_FILE, "line 2: unexpected '}}'");
	refuses("\n\n{% nope %}", "{}", MILLM_E_INVALID_MODEL_FILE, "line 3: unknown tag 'nope'");
	refuses("\n{% with %}", "{}", MILLM_E_UNSUPPORTED, "line 2: the tag 'with' is not supported");
	refuses("{{ x|nope }}", "{}", MILLM_E_INVALID_MODEL_FILE, "there is no filter 'nope'");
	refuses("{% if x %}", "{}", MILLM_E_INVALID_MODEL_FILE, "looking for 'endif'");
	refuses("a\n{{ messages.x.y }}", "{\"messages\": {}}", MILLM_E_INVALID_ARGUMENT, "line 2: 'dict object' has no attribute 'x'");
	refuses("{{ 'a'\n+ 1 }}", "{}", MILLM_E_INVALID_ARGUMENT, "line ");
	refuses("{% for x in xs %}\n{{ x.y.z }}{% endfor %}", "{\"xs\": [{}]}", MILLM_E_INVALID_ARGUMENT, "line 2");
	refuses("\xFF", "{}", MILLM_E_INVALID_MODEL_FILE, "not valid UTF-8");
}

static void
refusal_in_its_own_words(void **state)
{
	MillmRendering r;
	MillmError	err;

	(void) state;
	render("{{ raise_exception('System role not supported') }}", "{}", &r, &err);
	assert_int_equal(err.code, MILLM_E_INVALID_ARGUMENT);
	assert_string_equal(err.message, "the chat template refuses the conversation");
	assert_string_equal(err.detail, "It says: System role not supported");
}

static void
hostile(void **state)
{
	char	   *deep = malloc(100001);

	(void) state;
	refuses("{% macro r() %}{{ r() }}{% endmacro %}{{ r() }}", "{}", MILLM_E_INVALID_ARGUMENT, "recursive too deeply");
	refuses("{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}", "{}", MILLM_E_INVALID_ARGUMENT, "deeply");
	refuses("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", "{}", MILLM_E_INVALID_ARGUMENT, "too many steps");
	refuses("{{ 'a' * 1000000000 }}", "{}", MILLM_E_INVALID_ARGUMENT, "more than 16777216 bytes");
	refuses("{{ 'a'.ljust(10000000000) }}", "{}", MILLM_E_INVALID_ARGUMENT, "more than 16777216 bytes");
	refuses("{{ 'x'|indent(9000000000000000000) }}", "{}", MILLM_E_INVALID_ARGUMENT, "more than 16777216 bytes");
	refuses("{{ [1] * 100000000 }}", "{}", MILLM_E_INVALID_ARGUMENT, "more than 1048576 elements");
	refuses("{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "{}", MILLM_E_INVALID_ARGUMENT, "");
	refuses("{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "{}", MILLM_E_INVALID_ARGUMENT, "");
	refuses("{% set ns = namespace(x=[1]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}", "{}",
			MILLM_E_INVALID_ARGUMENT, "deeply");
	refuses("{% set ns = namespace(x=[1]) %}{% for i in range(2000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson }}", "{}",
			MILLM_E_INVALID_ARGUMENT, "deeply");
	refuses("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}", "{}", MILLM_E_INVALID_ARGUMENT, "deeply");
	refuses("{% set x = 'ab' * 4000000 %}{% for i in range(100) %}{{ x.replace('a', 'b') }}{% endfor %}", "{}", MILLM_E_INVALID_ARGUMENT, "");
	refuses("{% set x = 'a' * 8000000 %}{{ x.strip(x) }}", "{}", MILLM_E_INVALID_ARGUMENT, "steps");
	refuses("{% set x = 'a' * 8000000 %}{{ x.rfind('a' * 1000000 ~ 'b') }}", "{}", MILLM_E_INVALID_ARGUMENT, "steps");
	refuses("{% for i in range(100000) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'"
			" * 10 }}{% endfor %}", "{}", MILLM_E_INVALID_ARGUMENT, "more than 16777216 bytes");
	memset(deep, '(', 100000);
	deep[100000] = '\0';
	memcpy(deep, "{{", 2);
	refuses(deep, "{}", MILLM_E_INVALID_MODEL_FILE, "nested");
	memset(deep + 2, '-', 30000);
	deep[30002] = '\0';
	refuses(deep, "{}", MILLM_E_INVALID_MODEL_FILE, "nested");
	for (int i = 0; i + 10 <= 100000; i += 10)
		memcpy(deep + i, "{% if 1 %}", 10);
	refuses(deep, "{}", MILLM_E_INVALID_MODEL_FILE, "nested");
	free(deep);
}

/* What looks at a long text pays for its length, not once: else a loop over it would take hours. */
static void
long_texts(void **state)
{
	static const char *const looks[] = {"c|trim", "c.strip()", "c.rstrip('x ')", "c|int", "c|float", "c == d", "c < d", "c in d", "c in [d]", "c.isspace()", "c is lower",
		"c.splitlines()|length", "c.rsplit('q')|length", "c.split()|length", "{d: 1}[c]", "'q' in m"};
	size_t		n = 200000;
	char	   *spaces = malloc(n + 1);
	char	   *variables;
	json_t	   *v;
	json_t	   *m = json_array();

	(void) state;
	memset(spaces, ' ', n);
	spaces[n] = '\0';
	for (int i = 0; i < 10000; i++)
		json_array_append_new(m, json_pack("{s:i}", "a", i));
	v = json_pack("{s:s, s:o}", "c", spaces, "m", m);
	spaces[n - 1] = 'z';
	json_object_set_new(v, "d", json_string(spaces));
	variables = json_dumps(v, JSON_COMPACT);
	for (size_t i = 0; i < sizeof(looks) / sizeof(looks[0]); i++)
	{
		char		source[256];

		snprintf(source, sizeof(source), "{%% for i in range(100000) %%}{%% for j in range(100000) %%}{%% if %s %%}{%% endif %%}{%% endfor %%}{%% endfor %%}", looks[i]);
		refuses(source, variables, MILLM_E_INVALID_ARGUMENT, "the template ");
	}
	free(variables);
	json_decref(v);
	free(spaces);
}

/* The origin of each byte, as the tokenizer gets it. */
static void
origins_are(const char *source, const char *text, const char *origins)
{
	MillmRendering r;
	MillmError	err;

	render(source, "{\"messages\": [{\"role\": \"user\", \"content\": \" <|x|> \"}, {\"role\": \"<|y|>\"}], \"n\": 5,"
		   " \"tools\": [{\"a\": \"<t>\"}]}", &r, &err);
	if (!r.text)
		fail_msg("%s: %s", source, err.message);
	assert_string_equal(r.text, text);
	for (size_t i = 0; i < r.n; i++)
		if (r.origins[i] != origins[i] - '0')
			fail_msg("%s: byte %zu of '%s' came from %d", source, i, text, r.origins[i]);
	millm_rendering_free(&r);
}

static void
origins(void **state)
{
	(void) state;
	origins_are("a{{ messages[0].content }}b", "a <|x|> b", "011111110");
	origins_are("{{ bos_token ~ messages[0].content|trim }}", "<s><|x|>", "00011111");
	origins_are("{{ '<|' + messages[0].role + '|>' }}", "<|user|>", "00000000");	/* a role that everybody knows */
	origins_are("{{ '[' + messages[1].role + ']' }}", "[<|y|>]", "0111110");	/* and one that nobody does */
	origins_are("{{ messages[0].content.strip().replace('x', 'ab')|upper }}", "<|AB|>", "110011");
	origins_are("{{ messages[0].content.split('|')|join('-') }}", " <-x-> ", "1101011");
	origins_are("{{ tools|tojson }}", "[{\"a\": \"<t>\"}]", "000100001110000");
	origins_are("{{ tools }}", "[{'a': '<t>'}]", "00010000111000");
	origins_are("{% set x %}{{ messages[0].content|trim }}!{% endset %}{{ x[1:] }}", "|x|>!", "11110");
	origins_are("{% macro m(c) %}<{{ c|trim }}>{% endmacro %}{{ m(messages[0].content) }}", "<<|x|>>", "0111110");
	origins_are("{{ n }}{{ messages[0].content|length }}", "57", "00");
	origins_are("{{ messages[0].content[::-1] }}", " >|x|< ", "1111111");
	origins_are("{% for c in messages[0].content %}{{ c }}.{% endfor %}", " .<.|.x.|.>. .", "10101010101010");
	origins_are("{{ messages[0].content|trim|e }}", "&lt;|x|&gt;", "11111111111");
}

/* A variable is one that is looked at, not any word of that name. */
static void
uses(void **state)
{
	static const char source[] = "{% for m in messages %}{{ m.documents|list }}{{ f(x=1) }}{% endfor %}{% if tools is defined %}{% endif %}{# y #}{{ 'z' }}";
	MillmTemplate *t;
	MillmError	err;

	(void) state;
	assert_int_equal(millm_template_compile(source, sizeof(source) - 1, &t, &err), MILLM_OK);
	assert_true(millm_template_uses(t, "messages"));
	assert_true(millm_template_uses(t, "tools"));
	assert_false(millm_template_uses(t, "documents"));
	assert_false(millm_template_uses(t, "list"));
	assert_false(millm_template_uses(t, "x"));
	assert_false(millm_template_uses(t, "y"));
	assert_false(millm_template_uses(t, "z"));
	assert_false(millm_template_uses(t, ""));
	millm_template_free(t);
}

int
main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(chatml),
		cmocka_unit_test(errors_name_the_line),
		cmocka_unit_test(refusal_in_its_own_words),
		cmocka_unit_test(hostile),
		cmocka_unit_test(long_texts),
		cmocka_unit_test(origins),
		cmocka_unit_test(uses),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}

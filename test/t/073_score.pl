# How probable the model finds texts, from SQL: logprobs(text), perplexity(text), perplexity(text[]), classify(prompt, labels).
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);
use MillmTest;

my $SOON = 10;		# what takes milliseconds on a machine that does nothing else; the queries take minutes
my $node = new_server('score', 'max_worker_processes = 16', 'max_parallel_workers = 8', 'max_parallel_workers_per_gather = 2', 'jit = off');
my ($state, $message);
sub sql { return $node->safe_psql('postgres', $_[0]); }

for my $call (q(millm.logprobs('a')), q(millm.perplexity('a')), q(millm.perplexity(ARRAY['a'])), q(millm.classify('a', ARRAY['b'])))
{
	($state) = sqlstate($node, "SELECT * FROM $call");
	is($state, 'ML006', "nothing is loaded: $call");
}
is(sql('SELECT millm.perplexity(NULL) IS NULL'), 't', 'NULL without a question');
is(sql(q(SELECT (SELECT count(*) FROM millm.logprobs(NULL)), (SELECT count(*) FROM millm.perplexity(NULL::text[])), (SELECT count(*) FROM millm.classify(NULL, ARRAY['a'])))),
	'0|0|0', 'nor rows');

load_model($node, $SMOLLM2);
my ($free) = engine_pages($node);
my $text = 'The capital of France is Paris.';

# Tokens
is(sql("SELECT array_agg(token_id ORDER BY position) = millm.tokenize('$text'), string_agg(token, '' ORDER BY position), convert_from(string_agg(bytes, '' ORDER BY position), 'UTF8')
	FROM millm.logprobs('$text')"), "t|$text|$text", 'the tokens of the text');
is(sql("SELECT string_agg(position::text, ' '), count(*) FILTER (WHERE logprob IS NULL), bool_and((logprob IS NULL) = (position = 1)), max(logprob) < 0, min(logprob) > -30
	FROM millm.logprobs('$text')"), '1 2 3 4 5 6 7|1|t|t|t', 'numbered from 1; the first has no logprob');
is(sql("SELECT logprob > -2 FROM millm.logprobs('$text') WHERE token = ' Paris'"), 't', 'what is to be expected is probable');
is(sql(qq(SELECT string_agg(encode(bytes, 'hex'), '') = encode(convert_to(E'a\\U0001F600', 'UTF8'), 'hex') FROM millm.logprobs(E'a\\U0001F600'))), 't', 'halves of a character have their bytes');
is(sql(q(SELECT count(*) FROM millm.logprobs('a'))), '1', 'of one token a row');
is(sql(q(SELECT count(*) FROM (SELECT (millm.logprobs(repeat('word ', 300))).* LIMIT 3) x)), '3', 'a LIMIT ends it');

# Perplexity
is(sql("SELECT abs(millm.perplexity('$text') / (SELECT exp(-avg(logprob)) FROM millm.logprobs('$text')) - 1) < 1e-6"), 't', 'exp of the mean');
is(sql(q(SELECT millm.perplexity('The cat sat on the mat.') < millm.perplexity('Mat the on sat cat the.'))), 't', 'order matters');
is(sql(q(SELECT millm.perplexity('a') IS NULL)), 't', 'one token has nothing before it: unknown');
sql('CREATE TABLE doc (id int, body text); INSERT INTO doc SELECT i, CASE WHEN i % 7 = 0 THEN NULL ELSE repeat($$row $$ || i || $$ $$, 1 + i % 5) END FROM generate_series(1, 300) i; ANALYZE doc');
is(sql(q(SELECT string_agg(CASE WHEN p > 1 THEN 'p' ELSE '-' END, '') FROM millm.perplexity(ARRAY[NULL, 'a b c', NULL, NULL, 'a', 'd e', NULL]) p)), '-p---p-', 'NULLs of an array');
is(sql(q(SELECT count(*), count(p), bool_and((p IS NULL) = (d.body IS NULL)), bool_and(d.id % 40 <> 1 OR abs(p / millm.perplexity(d.body) - 1) < 0.02)
	FROM (SELECT array_agg(body ORDER BY id) texts FROM doc) a, ROWS FROM (millm.perplexity(a.texts)) WITH ORDINALITY AS r(p, n) JOIN doc d ON d.id = n)),
	'300|258|t|t', '300 of them, each its own');
is(sql(q(SELECT count(*) FROM millm.perplexity('{{a b,c d},{e f,g h}}'::text[]))), '4', 'two dimensions in storage order');
wait_pages($node, $free, 'texts');

# Labels
is(sql(q(SELECT label FROM millm.classify('The capital of France is', ARRAY[' Rome', ' Paris', ' Berlin'], raw => true) LIMIT 1)), ' Paris', 'the best label first');
is(sql(q(SELECT count(*), abs(sum(probability) - 1) < 1e-9, bool_and(abs(ln(probability) - ln(first) - (logprob - best)) < 1e-6), bool_and(probability <= first)
	FROM (SELECT *, first_value(logprob) OVER w AS best, first_value(probability) OVER w AS first FROM millm.classify('Is the sky blue?', ARRAY['Yes', 'No', 'It is not for me to say', 'Green']) WINDOW w AS (ROWS UNBOUNDED PRECEDING)) x)),
	'4|t|t|t', 'shares of one, as the logprobs say');
is(sql(q(SELECT abs(c.logprob - sum(l.logprob)) < 0.3 FROM millm.classify('Once upon a time', ARRAY[' there was a king'], raw => true) c, millm.logprobs('Once upon a time there was a king') l
	WHERE l.position > millm.count_tokens('Once upon a time') GROUP BY c.logprob)), 't', "a label's logprob is that of its tokens after the prompt");
is(sql(q(SELECT abs(a.logprob - b.logprob) < 0.3 FROM millm.classify('Answer with one word.', ARRAY['Yes'], system => 'You are short.') a,
	millm.classify(millm.apply_chat_template('[{"role": "system", "content": "You are short."}, {"role": "user", "content": "Answer with one word."}]'), ARRAY['Yes'], raw => true) b)),
	't', 'the prompt is a message, as for generate()');
is(sql(q(SELECT string_agg(label, '') FROM (SELECT label FROM millm.classify('Count:', ARRAY(SELECT ' ' || i FROM generate_series(1, 100) i), raw => true)) x)) =~ tr/0-9//, 192, 'a hundred labels');
sql('CREATE TABLE review AS SELECT i AS id, $$It was $$ || CASE i % 2 WHEN 0 THEN $$wonderful, I loved it$$ ELSE $$awful, a waste of money$$ END AS body, repeat($$x$$, 3000) AS pad FROM generate_series(1, 16) i;'
	. 'ALTER TABLE review SET (parallel_workers = 2); ANALYZE review');
my $classify = q(SELECT r.id, c.label FROM review r, LATERAL (SELECT label FROM millm.classify('Review: ' || r.body || E'.\nSentiment:', ARRAY[' positive', ' negative'], raw => true) LIMIT 1) c);
is(sql("SELECT count(*), count(*) FILTER (WHERE (id % 2 = 0) = (label = ' positive')) FROM ($classify) x"), '16|16', 'a table of them');
my $parallel = q(SELECT id, millm.perplexity(body), (SELECT label FROM millm.classify(body, ARRAY['good', 'bad']) LIMIT 1) AS label FROM review);
like(sql("SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0; EXPLAIN (ANALYZE, TIMING off) $parallel"), qr/Workers Launched: 2/, 'in parallel workers');
is(sql("SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0; SELECT count(*), count(perplexity), count(label) FROM ($parallel) x"), '16|16|16', 'every row is answered');
wait_pages($node, $free, 'labels');

# Refused
for my $case ([ q(millm.logprobs('')), '22023', qr/an empty text has no logprobs/ ],
	[ q(millm.perplexity(ARRAY['a', NULL, ''])), '22023', qr/Text 3 of the array has no tokens/ ],
	[ q(millm.perplexity(repeat('word ', 9000))), 'ML018', qr/does not fit the context.*The text has \d+ tokens; the context holds \d+/s ],
	[ q(millm.classify(repeat('word ', 9000), ARRAY['a'])), 'ML018', qr/The prompt has \d+ tokens; the context holds \d+/s ],
	[ q(millm.classify('a', NULL)), '22023', qr/labels must not be null/ ],
	[ q(millm.classify('a', '{}')), '22023', qr/there are no labels/ ],
	[ q(millm.classify('a', ARRAY['b', NULL])), '22023', qr/labels must not contain nulls/ ],
	[ q(millm.classify('a', ARRAY['b', 'c', 'b'])), '22023', qr/Labels 1 and 3 are the same/ ],
	[ q(millm.classify('a', ARRAY['b', ''])), '22023', qr/a label is empty.*It is label 2/s ],
	[ q(millm.classify('a', ARRAY(SELECT i::text FROM generate_series(1, 257) i))), '22023', qr/1 to 256/ ],
	[ q(millm.classify('', ARRAY['a'], raw => true)), '22023', qr/prompt/ ],
	[ q(millm.classify('a', ARRAY['b'], system => 'x', raw => true)), '22023', qr/system/ ],
	[ q(millm.perplexity('a b', 'another')), 'ML006', qr// ])
{
	($state, $message) = sqlstate($node, "SELECT * FROM $case->[0]");
	is($state, $case->[1], $case->[0]) or diag $message;
	like($message, $case->[2], 'which says why');
}
is(sql(q(SELECT millm.perplexity('a b', m.model) > 0 FROM millm.status() m)), 't', 'the loaded model by name');

# Whatever ends the query ends it
my $canceler = MillmTest::Session->new($node);
my $long = q('repeat' || repeat(' one two three four five', 150));
for my $query ("SELECT count(*) FROM millm.perplexity(array_fill($long, ARRAY[300]))", "SELECT count(*) FROM generate_series(1, 300) i, millm.logprobs($long || i)",
	"SELECT count(*) FROM generate_series(1, 100) i, millm.classify($long || i, ARRAY[' and so on', ' or else'])")
{
	my $session = MillmTest::Session->new($node);
	$session->send($query);
	ok(wait_true(sub { my @now = engine_pages($node); return $now[0] < $free; }), "at work: $query") or next;
	my $start = time;
	$canceler->query('SELECT pg_cancel_backend(' . $session->pid . ')');
	is($session->until_ready->{state}, '57014', 'a cancel ends it');
	cmp_ok(time - $start, '<', $SOON, 'soon');
	wait_pages($node, $free, 'a cancel');
	$session->query("SET statement_timeout = '150ms'");
	is($session->query($query)->{state}, '57014', 'statement_timeout');
	wait_pages($node, $free, 'a timeout');
}

# Beside generations, whose near ties may fall otherwise in company (test_score.py compares them exactly)
my $generate = q(SELECT length(millm.generate('Why is the sky blue?', temperature => 0, max_tokens => 24)) > 20);
my @generating = map { MillmTest::Session->new($node)->send($generate) } 1 .. 3;
is(sql("SELECT count(*) FROM ($classify) x"), 16, 'labels');
is($_->until_ready->{rows}[0], 't', 'and a text') for @generating;
wait_pages($node, $free, 'both');

# Who may
sql('CREATE ROLE reader LOGIN; GRANT USAGE ON SCHEMA millm TO reader');
for my $call (q(millm.logprobs('a b')), q(millm.perplexity('a b')), q(millm.perplexity(ARRAY['a b'])), q(millm.classify('a', ARRAY['b', 'c'])))
{
	($state) = sqlstate($node, "SET ROLE reader; SELECT * FROM $call");
	is($state, '42501', "not everybody: $call");
}
sql(q(SELECT millm.grant_user('reader')));
is(sql(q(SET ROLE reader; SELECT (SELECT count(*) FROM millm.logprobs('a b')), (SELECT count(*) FROM millm.perplexity(ARRAY['a b'])), millm.perplexity('a b') > 1, (SELECT count(*) FROM millm.classify('a', ARRAY['b', 'c'])))),
	'2|1|t|2', 'whom grant_user() lets');

is(slurp_file($node->logfile) =~ /was terminated by signal|all server processes terminated/ ? 1 : 0, 0, 'no crash on the way');
$node->stop;
done_testing();

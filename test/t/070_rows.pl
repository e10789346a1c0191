# Many prompts of one session: generate(text[]) and generate_rows(query); order, errors, what ends them, a full engine.
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);
use MillmTest;

my $node = new_server('rows');
my ($state, $message, $result);
sub sql { return $node->safe_psql('postgres', $_[0]); }
my $raw = 'raw => true, temperature => 0';

($state) = sqlstate($node, "SELECT millm.generate(ARRAY['a', 'b'], $raw)");
is($state, 'ML006', 'nothing is loaded: MODEL_NOT_LOADED');
($state) = sqlstate($node, "SELECT * FROM millm.generate_rows('SELECT 1, ''a''', $raw)");
is($state, 'ML006', 'which is no matter of a row');

load_model($node, $SMOLLM2);
my ($free) = engine_pages($node);
sql(<<'SQL');
CREATE TABLE item (id int, body text);
INSERT INTO item SELECT i, CASE WHEN i % 10 = 0 THEN NULL ELSE 'Item ' || i || ' of the list is called' END FROM generate_series(1, 30) i;
CREATE TABLE alone AS SELECT id, millm.generate(body, raw => true, temperature => 0, max_tokens => 4) AS text FROM item;
SQL

# --- generate(text[]) ---------------------------------------------------------------------------
# Sums may be rounded otherwise in company, so a near tie may fall the other way; an answer in another's place would show in all of them.
my $compare = q(count(*), count(x.text), bool_and((x.text IS NULL) = (alone.text IS NULL)), count(*) FILTER (WHERE x.text = alone.text) >= 24);
is(sql("SELECT $compare FROM (SELECT millm.generate(array_agg(body ORDER BY id), $raw, max_tokens => 4) AS texts FROM item) t,
	unnest(t.texts) WITH ORDINALITY AS x(text, id) JOIN alone USING (id)"), '30|27|t|t', 'texts in the order of their prompts, NULL for NULL');
is(sql("SELECT array_dims(millm.generate('[0:1][5:6]={{a,b},{NULL,c}}'::text[], $raw, max_tokens => 1))"), '[0:1][5:6]', 'in the array\'s own shape');
is(sql("SELECT millm.generate('{}'::text[]), millm.generate(NULL::text[]) IS NULL, millm.generate('{NULL,NULL}'::text[])"), '{}|t|{NULL,NULL}', 'nothing is nothing');
is(sql("SELECT pg_typeof(millm.generate('a', $raw, max_tokens => 1))"), 'text', 'a literal is still one prompt');
is(sql("SELECT millm.generate(ARRAY['x'], raw => false, system => 'Be brief.', max_tokens => 3, temperature => 0) = ARRAY[millm.generate('x', system => 'Be brief.', max_tokens => 3, temperature => 0)]"),
	't', 'the other arguments are those of generate(text)');
($state, $message) = sqlstate($node, "SELECT millm.generate(ARRAY['a', 'b', NULL, repeat('word ', 9000), 'c'], $raw, max_tokens => 2)");
is($state, 'ML018', 'one that is too long ends it');
like($message, qr/Prompt 4 of the array.*\d+ tokens/s, 'with its number, and what it has');
($state, $message) = sqlstate($node, "SELECT millm.generate(ARRAY['a', repeat('x', 17000000)], $raw, max_tokens => 2)");
like($message, qr/22023: .*too long.*Prompt 2 /s, 'one that is longer than any request');
($state) = sqlstate($node, "SELECT millm.generate(ARRAY['a'], raw => true, system => 'b')");
is($state, '22023', 'a wrong argument');
($state) = sqlstate($node, "SELECT millm.generate(ARRAY['a'], model => 'another')");
is($state, 'ML006', 'a model that is not loaded');
wait_pages($node, $free, 'arrays');

# --- generate_rows --------------------------------------------------------------------------------
for my $look_ahead (1, 5, 256)
{
	is(sql("SELECT $compare, bool_and(x.n = x.key::int) FROM ROWS FROM (millm.generate_rows('SELECT id, body FROM item ORDER BY id', $raw, max_tokens => 4,
		look_ahead => $look_ahead)) WITH ORDINALITY AS x(key, text, error, finish_reason, prompt_tokens, cached_tokens, completion_tokens, n) JOIN alone ON id = key::int"),
		'30|27|t|t|t', "every row, in order, with its key; look_ahead $look_ahead");
}
is(sql(<<"SQL"), <<'ROWS' =~ s/\n\z//r, 'one bad row is an error in its row');
SELECT key, text IS NOT NULL, left(error, 24), finish_reason, prompt_tokens, completion_tokens FROM millm.generate_rows(
	\$\$ SELECT * FROM (VALUES ('fine', 'One two'), (NULL, 'no key'), ('empty', ''), ('null', NULL), ('long', repeat('word ', 9000)), ('longer', repeat('x', 17000000)), ('last', 'Three four')) v \$\$,
	$raw, max_tokens => 3)
SQL
fine|t||length|2|3
|t||length|2|3
empty|f|INVALID_ARGUMENT: prompt|||
null|f||||
long|f|CONTEXT_LENGTH_EXCEEDED:|||
longer|f|INVALID_ARGUMENT: text i|||
last|t||length|2|3
ROWS
is(sql(q(SELECT r.text = c->>'text', r.finish_reason = c->>'finish_reason', r.prompt_tokens = (c->'usage'->>'prompt_tokens')::int, r.completion_tokens = (c->'usage'->>'completion_tokens')::int
	FROM millm.generate_rows($$ SELECT 1, '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]'::jsonb $$, max_tokens => 8, temperature => 0) r,
	millm.chat('[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]'::jsonb, max_tokens => 8, temperature => 0) c)),
	't|t|t|t', 'messages are answered as by chat()');
is(sql(q(SELECT string_agg(key || coalesce(left(error, 17), ''), ',') FROM millm.generate_rows($$ SELECT * FROM (VALUES ('a', '[1]'::jsonb), ('b', '{}'), ('c', '[{"role": "user", "content": "x"}]')) v $$, max_tokens => 1))),
	'aINVALID_ARGUMENT:,bINVALID_ARGUMENT:,c', 'and wrong ones are errors of their rows');
# What the prompts begin with alike is computed once; every row says how much of it it found
is(sql("SELECT count(text), sum(cached_tokens) > sum(prompt_tokens) / 2, bool_and(cached_tokens < prompt_tokens)
	FROM millm.generate_rows(\$\$ SELECT i, repeat('One word says what the next line is about. ', 12) || i FROM generate_series(1, 24) i \$\$, $raw, max_tokens => 1, look_ahead => 4)"),
	'24|t|t', 'a shared instruction');
is(sql("SELECT count(*) FROM millm.generate_rows(NULL)"), 0, 'no query, no rows');
is(sql("SELECT count(*) FROM millm.generate_rows('SELECT 1, ''a'' WHERE false', $raw)"), 0, 'no rows, no rows');

# What it does not take; it never gets as far as running it
my $rows_before = sql('SELECT count(*) FROM item');
for my $case ([ 'SELECT 1', '22023', 'two columns' ], [ 'SELECT 1, 2', '22023', 'text, or jsonb' ],
	[ 'DELETE FROM item RETURNING id, body', '22023', 'only reads' ], [ 'WITH d AS (DELETE FROM item RETURNING id, body) SELECT * FROM d', '22023', 'only reads' ],
	[ 'SELECT id, body FROM item FOR UPDATE', '22023', 'only reads' ], [ 'SELECT 1, body FROM item; DELETE FROM item', '22023', 'single SELECT' ],
	[ 'SELECT id, body INTO other FROM item', '22023', 'only reads' ], [ 'TRUNCATE item', '22023', 'only reads' ], [ '', '22023', 'single SELECT' ], [ 'SELEC', '42601', 'syntax error' ],
	[ 'SELECT id, nobody FROM item', '42703', 'nobody' ])
{
	my ($query, $expected, $words) = @$case;
	($state, $message) = sqlstate($node, "SELECT * FROM millm.generate_rows(\$q\$$query\$q\$, $raw)");
	is($state, $expected, "refused: $query");
	like($message, qr/$words/, 'and why');
}
is(sql('SELECT count(*) FROM item'), $rows_before, 'nothing was deleted');
for my $n (0, 257)
{
	($state, $message) = sqlstate($node, "SELECT * FROM millm.generate_rows('SELECT 1, ''a''', look_ahead => $n)");
	like($message, qr/22023: .*look_ahead.*It is $n; 1 to 256/s, "look_ahead $n");
}

# --- Row by row, and never far ahead ----------------------------------------------------------------
sql('CREATE SEQUENCE read');
my $endless = q(millm.generate_rows($$ SELECT nextval('read'), 'x' FROM generate_series(1, 1000000) $$, raw => true, temperature => 0, max_tokens => 3, look_ahead => 7));
is(sql("SELECT string_agg((r).key, ',') FROM (SELECT $endless AS r LIMIT 4) x"), '1,2,3,4', 'a LIMIT in the select list ends it');
cmp_ok(sql('SELECT last_value FROM read'), '<=', 4 + 7, 'the query was read no farther than look_ahead');
wait_pages($node, $free, 'LIMIT');
my $session = MillmTest::Session->new($node);
$session->send("SELECT $endless");
my $type;
do { ($type) = $session->message } until !$type || $type eq 'D';
is($type, 'D', 'the first of a million rows comes when it is there');
undef $session;
wait_pages($node, $free, 'a connection dropped in the middle');

# --- What ends it -----------------------------------------------------------------------------------
my $long = q(millm.generate_rows($$ SELECT i, 'Count: 1 2 3 4 5 ' || i FROM generate_series(1, 100) i $$, raw => true, temperature => 0, max_tokens => 6000));
my $long_array = q(millm.generate((SELECT array_agg('Count: 1 2 3 4 5 ' || i) FROM generate_series(1, 100) i), raw => true, temperature => 0, max_tokens => 6000));
my $canceler = MillmTest::Session->new($node);
my $at_work = sub { wait_true(sub { (engine_pages($node))[1] >= 16 }) };
for my $query ("SELECT * FROM $long", "SELECT $long", "SELECT $long_array")
{
	$session = MillmTest::Session->new($node);
	$session->send($query);
	ok($at_work->(), 'sixteen at work');
	my $event = $node->safe_psql('postgres', 'SHOW server_version_num') >= 170000 ? 'MillmEngine' : 'Extension';
	is($canceler->query("SELECT wait_event_type || ' ' || wait_event FROM pg_stat_activity WHERE pid = " . $session->pid)->{rows}[0], "Extension $event", 'says whom it waits for');
	my $start = time;
	$canceler->query('SELECT pg_cancel_backend(' . $session->pid . ')');
	is($session->until_ready->{state}, '57014', 'a cancel ends it');
	cmp_ok(time - $start, '<', 2, 'soon');
	wait_pages($node, $free, 'a cancel');
	is($session->query('SELECT 1')->{rows}[0], 1, 'the session goes on');
}
$session->query("SET statement_timeout = '200ms'");
is($session->query("SELECT count(*) FROM $long")->{state}, '57014', 'statement_timeout');
$session->query('RESET statement_timeout');
wait_pages($node, $free, 'statement_timeout');

# cursors: of ours, and the one that we hold on the query
$session->query('BEGIN');
$session->query("DECLARE c CURSOR FOR SELECT $endless");
is(scalar @{ $session->query('FETCH 2 FROM c')->{rows} }, 2, 'a cursor');
is($session->query(q(SELECT count(*) FROM pg_cursors WHERE name LIKE '<unnamed%'))->{rows}[0], 1, 'the query is open behind it');
$session->query('CLOSE c');
is($session->query(q(SELECT count(*) FROM pg_cursors))->{rows}[0], 0, 'and closed with it');
wait_pages($node, $free, 'CLOSE');
$session->query("DECLARE c CURSOR FOR SELECT $endless");
$session->query('FETCH 2 FROM c');
is($session->query('COMMIT')->{state}, '', 'COMMIT with the cursor open');
wait_pages($node, $free, 'COMMIT');
$session->query($_) for 'BEGIN', 'SAVEPOINT s', "DECLARE c CURSOR FOR SELECT $endless", 'FETCH 2 FROM c', 'ROLLBACK TO s';
wait_pages($node, $free, 'ROLLBACK TO');
is($session->query('SELECT count(*) FROM pg_cursors')->{rows}[0], 0, 'which closes the query, too');
$session->query($_) for "DECLARE c CURSOR FOR SELECT $endless", 'SAVEPOINT s', 'FETCH 2 FROM c', 'ROLLBACK TO s';
is($session->query('FETCH 20 FROM c')->{state}, '24000', 'a query that was opened in what was rolled back is gone: an error, no crash');
$session->query('ROLLBACK');
wait_pages($node, $free, 'it');
$session->query($_) for 'BEGIN', "DECLARE c CURSOR FOR SELECT $endless", 'FETCH 2 FROM c', 'CLOSE ALL';
is($session->query('SELECT 1')->{rows}[0], 1, 'CLOSE ALL');
$session->query('COMMIT');
wait_pages($node, $free, 'CLOSE ALL');

# errors of the query, early and late, and a caught one
is($session->query(qq(SELECT * FROM millm.generate_rows('SELECT i, ''a'' || 1 / (50 - i) FROM generate_series(1, 100) i', $raw, max_tokens => 2)))->{state}, '22012', 'an error of the query is its own');
wait_pages($node, $free, 'an error of the query');
is($session->query(<<"SQL")->{state}, '', 'plpgsql catches it');
DO \$do\$
DECLARE r record; n int := 0;
BEGIN
	FOR r IN SELECT (x).* FROM (SELECT $endless AS x) y LOOP
		n := n + 1;
		IF n = 3 THEN RAISE EXCEPTION 'enough'; END IF;
	END LOOP;
EXCEPTION WHEN raise_exception THEN NULL;
END \$do\$
SQL
wait_pages($node, $free, 'a caught error');

# one inside another
is($session->query(q(SELECT string_agg(text, '') IS NOT NULL FROM millm.generate_rows($a$ SELECT key, coalesce(text, '') || '.' FROM millm.generate_rows($b$ SELECT i, 'a' || i FROM generate_series(1, 30) i $b$,
	raw => true, max_tokens => 2) $a$, raw => true, max_tokens => 2)))->{rows}[0], 't', 'generate_rows of generate_rows');

# What it sees, and as whom
is($session->query('BEGIN; INSERT INTO item VALUES (31, $$new$$); SELECT count(*) FROM millm.generate_rows($$ SELECT id, body FROM item WHERE id = 31 $$, raw => true, max_tokens => 1)')->{rows}[0], 1, 'what the statement sees');
$session->query('ROLLBACK');
is(sql("BEGIN READ ONLY; SELECT count(*) FROM millm.generate_rows('SELECT 1, ''a''', $raw, max_tokens => 1)"), 1, 'in a read-only transaction');
sql(q(CREATE ROLE reader; SELECT millm.grant_user('reader')));
($state) = sqlstate($node, "SET ROLE reader; SELECT * FROM millm.generate_rows('SELECT id, body FROM item', $raw)");
is($state, '42501', 'with the caller\'s rights');
is(sql("SET ROLE reader; SELECT count(*) FROM millm.generate_rows('SELECT 1, ''a''', $raw, max_tokens => 1)"), 1, 'who may, may');

# No memory and no descriptor stays behind
load_model($node, 'tiny-long');
($free) = engine_pages($node);
my $many = q(SELECT count(r.text) FROM millm.generate_rows($$ SELECT i, 'row ' || i FROM generate_series(1, 1500) i $$, raw => true, temperature => 0, max_tokens => 2) r);
my $rss = sub { slurp_file('/proc/' . $session->pid . '/status') =~ /^VmRSS:\s+(\d+)/m; return $1; };
is($session->query($many)->{rows}[0], 1500, 'fifteen hundred rows');
my $before = $rss->();
is($session->query($many)->{rows}[0], 1500, 'and again') for 1 .. 2;
cmp_ok($rss->() - $before, '<', 4096, 'the backend does not grow');
my $sockets = grep { (readlink($_) // '') =~ /^socket:/ } glob('/proc/' . $session->pid . '/fd/*');
cmp_ok($sockets, '<', 10, 'no descriptor stays open');
wait_pages($node, $free, 'thousands of rows');

# A client that has gone is noticed between short requests, too, when no row is sent meanwhile
SKIP:
{
	skip 'PostgreSQL 14 cannot tell', 6 if sql('SHOW server_version_num') < 150000;
	for my $query ("SELECT count(millm.generate('a' || i, $raw, max_tokens => 2)) FROM generate_series(1, 1000000) i",
		"SELECT count(text) FROM millm.generate_rows('SELECT i, ''a'' || i FROM generate_series(1, 1000000) i', $raw, max_tokens => 2)")
	{
		my $gone = MillmTest::Session->new($node)->send($query);
		ok(wait_true(sub { (engine_pages($node))[1] > 0 }), 'at work');
		$gone->hang_up;
		ok(wait_true(sub { sql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%1000000%' AND pid <> pg_backend_pid()") == 0 }), "a client that has gone: $query");
		wait_pages($node, $free, 'a client that has gone');
	}
}

# --- The model goes, the engine ends --------------------------------------------------------------------------------
load_model($node, $SMOLLM2);
($free) = engine_pages($node);
$session->send("SELECT count(*) FROM $long");
ok($at_work->(), 'at work');
sql("SELECT millm.unload('10ms')");
like($session->until_ready->{state}, qr/ML006|ML008|57014/, 'a model that is unloaded is no row\'s error');
load_model($node, $SMOLLM2);
$session->send("SELECT count(*) FROM $long");
ok($at_work->(), 'at work');
kill('KILL', sql('SELECT engine_pid FROM millm.status()'));
is($session->until_ready->{state}, 'ML019', 'a killed engine is no row\'s error: it ends the statement');
is($session->query('SELECT 1')->{rows}[0], 1, 'and nothing else');

# --- Fewer descriptors than rows that could be under way --------------------------------------------
$node->append_conf('postgresql.conf', 'max_files_per_process = 64');
$node->restart;
load_model($node, $SMOLLM2);
is(sql(qq(SELECT count(text), count(error) FROM millm.generate_rows('SELECT i, ''a'' || i FROM generate_series(1, 60) i', $raw, max_tokens => 2, look_ahead => 256))), '60|0', 'few descriptors are no failure');
$node->append_conf('postgresql.conf', 'max_files_per_process = 1000');

# --- An engine that is full -------------------------------------------------------------------------
$node->append_conf('postgresql.conf', "millm.max_sequences = 1\nmillm.max_queue = 2\n");
$node->restart;
load_model($node, $SMOLLM2);
($free) = engine_pages($node);
my $few = qq(SELECT count(text), count(error) FROM millm.generate_rows('SELECT i, ''a'' || i FROM generate_series(1, 12) i', $raw, max_tokens => 2));
is(sql($few), '12|0', 'a batch takes no more places than there are');
my @sessions = map { MillmTest::Session->new($node)->send($few =~ s/count\(text\), count\(error\)/count(text) || '|' || count(error)/r) } 1 .. 3;
is($_->until_ready->{rows}[0], '12|0', 'several in each other\'s way all get through') for @sessions;
@sessions = map { MillmTest::Session->new($node)->send("SELECT millm.generate($LONG)") } 1 .. 3;
ok(wait_true(sub { (engine_pages($node))[1] == 3 }), 'every place is taken by others');
$session = MillmTest::Session->new($node);
$session->send("SELECT cardinality(millm.generate(ARRAY['a', 'b', 'c', 'd'], $raw, max_tokens => 2))");
is(sql('SELECT pg_sleep(0.5)'), '', 'for a while');
is(sql('SELECT state FROM pg_stat_activity WHERE pid = ' . $session->pid), 'active', 'a batch waits for its turn');
$_->hang_up for @sessions;
is($session->until_ready->{rows}[0], 4, 'and gets it');
wait_pages($node, $free, 'all of them');

$node->stop;
done_testing();

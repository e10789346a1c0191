# Parallel workers call the engine as sessions do: plans, answers, and what ends a leader frees what its workers have under way.
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);
use MillmTest;

my $node = new_server('parallel', 'max_worker_processes = 16', 'max_parallel_workers = 8', 'max_parallel_workers_per_gather = 3', 'jit = off');
my ($state, $message);
sub sql { return $node->safe_psql('postgres', $_[0]); }
my $raw = 'raw => true, temperature => 0';

load_model($node, $SMOLLM2);
my ($free) = engine_pages($node);
sql(<<'SQL');
CREATE TABLE article (id int, body text);
INSERT INTO article SELECT i, repeat('pad ', 200) FROM generate_series(1, 12000) i;
CREATE TABLE item (id int, body text, pad text) WITH (parallel_workers = 3);
ALTER TABLE item ALTER pad SET STORAGE plain;
INSERT INTO item SELECT i, 'Item ' || i || ' of the list is called', repeat('x', 3800) FROM generate_series(1, 32) i;
ANALYZE;
CREATE TABLE alone AS SELECT id, millm.generate(body, raw => true, temperature => 0, max_tokens => 4) AS text FROM item LIMIT 0;
SQL
sql("SET max_parallel_workers_per_gather = 0; INSERT INTO alone SELECT id, millm.generate(body, $raw, max_tokens => 4) FROM item");

# --- Plans --------------------------------------------------------------------------------------
for my $large ('SELECT id, millm.generate(body) FROM article', 'SELECT count(*) FROM article WHERE millm.generate(body) = $$yes$$', 'CREATE TABLE x AS SELECT id, millm.generate(body) FROM article',
	'SELECT id, millm.embed(body) FROM article', 'SELECT id, millm.chat(body) FROM article', 'SELECT sum(millm.count_tokens(body)) FROM article', 'SELECT id, millm.generate(ARRAY[body, id::text]) FROM article')
{
	like(sql("EXPLAIN $large"), qr/Workers Planned: \d.*Parallel Seq Scan/s, "workers for a large scan: $large");
}
for my $small ('SELECT millm.generate($$a$$)', 'UPDATE article SET body = millm.generate(body)', 'SELECT id, millm.generate_stream(body) FROM article',
	'SELECT * FROM article, millm.generate_rows($$ SELECT id, body FROM article $$)')
{
	unlike(sql("EXPLAIN $small"), qr/Parallel|Workers/, "none: $small");
}

# --- Answers ------------------------------------------------------------------------------------
for my $participation ('on', 'off')
{
	my $set = "SET parallel_leader_participation = $participation;";
	my $query = "SELECT id, millm.generate(body, $raw, max_tokens => 4) AS text FROM item";
	like(sql("$set EXPLAIN (ANALYZE, TIMING off) $query"), qr/Workers Launched: 3.*Parallel Seq Scan.*rows=\d+ loops=(?:3|4)\b/s, "it runs in three workers, leader participation $participation");
	# near ties may fall otherwise in company
	is(sql("$set SELECT count(*), count(*) FILTER (WHERE x.text = alone.text) >= 28 FROM ($query) x JOIN alone USING (id)"), '32|t', 'every row has its answer');
	is(sql("$set SELECT count(*), min(cardinality(e)) FROM (SELECT millm.embed(body) AS e FROM item) x"), '32|576', 'embeddings');
	($state, $message) = sqlstate($node, "$set SELECT id, millm.generate(CASE WHEN id = 20 THEN repeat('word ', 9000) ELSE body END, $raw, max_tokens => 4) FROM item");
	is($state, 'ML018', "an error of one row has the engine's own state");
	like($message, qr/DETAIL: .*\d+ tokens/, 'and detail');
	wait_pages($node, $free, "an error, participation $participation");
}
is(sql("SELECT count(*) FROM (SELECT millm.generate(body, $raw, max_tokens => 4) FROM item LIMIT 5) x"), 5, 'a LIMIT');
wait_pages($node, $free, 'a LIMIT');

# --- Whose workers they are -----------------------------------------------------------------------
sql('CREATE ROLE reader LOGIN; CREATE ROLE nobody; GRANT SELECT ON item TO reader, nobody; GRANT nobody TO reader');
sql(q(SELECT millm.grant_user('reader')));
my $by_reader = MillmTest::Session->new($node, user => 'reader');
is($by_reader->query("SELECT count(t) FROM (SELECT millm.generate(body, $raw, max_tokens => 2) t FROM item) x")->{rows}[0], 32, 'a role that may');
is(sql("SELECT sum(requests), sum(completion_tokens) > 32 FROM millm.stat_generate WHERE role = 'reader'"), '32|t', 'to whom the workers\' requests are counted');
$by_reader->query('SET ROLE nobody');
is($by_reader->query("SELECT count(t) FROM (SELECT millm.generate(body, $raw, max_tokens => 2) t FROM item) x")->{state}, '42501', 'the current role counts');

# --- What ends it ---------------------------------------------------------------------------------
my $long = "SELECT id, millm.generate(body, $raw, max_tokens => 6000) FROM item";
my $other = MillmTest::Session->new($node);
my $event = sql('SHOW server_version_num') >= 170000 ? 'MillmEngine' : 'Extension';
my $workers_of = sub { "FROM pg_stat_activity WHERE backend_type = 'parallel worker' AND leader_pid = " . $_[0]->pid };
for my $case (map { my $p = $_; map { [ $p, @$_ ] } [ 'a cancel', '57014', sub { $other->query('SELECT pg_cancel_backend(' . $_[0]->pid . ')') } ],
		[ 'a terminate', '57P01', sub { $other->query('SELECT pg_terminate_backend(' . $_[0]->pid . ')') } ],
		[ 'the end of one worker', '57P01', sub { $other->query('SELECT pg_terminate_backend(pid) ' . $workers_of->($_[0]) . ' LIMIT 1') } ] } 'on', 'off')
{
	my ($participation, $what, $expected, $how) = @$case;
	my $session = MillmTest::Session->new($node);
	my $n = $participation eq 'on' ? 4 : 3;
	$session->query("SET parallel_leader_participation = $participation");
	$session->send($long);
	ok(wait_true(sub { (engine_pages($node))[1] == $n }), "$what, participation $participation: $n at work") or next;
	is($other->query("SELECT count(*) || string_agg(DISTINCT wait_event_type || ' ' || wait_event, ',') " . $workers_of->($session))->{rows}[0], "3Extension $event", 'workers wait for the engine');
	my $start = time;
	$how->($session);
	is($session->until_ready->{state}, $expected, "$what ends it");
	cmp_ok(time - $start, '<', 2, 'soon');
	wait_pages($node, $free, $what);
	ok(wait_true(sub { $other->query('SELECT count(*) ' . $workers_of->($session))->{rows}[0] == 0 }), 'no worker stays');
}
my $session = MillmTest::Session->new($node);
$session->query("SET statement_timeout = '500ms'");
is($session->query($long)->{state}, '57014', 'statement_timeout');
wait_pages($node, $free, 'statement_timeout');
$session->query('RESET statement_timeout');
$session->query($_) for 'BEGIN', 'SAVEPOINT s', "SET LOCAL statement_timeout = '500ms'", $long, 'ROLLBACK TO s';
wait_pages($node, $free, 'ROLLBACK TO');
is($session->query("SELECT count(t) FROM (SELECT millm.generate(body, $raw, max_tokens => 2) t FROM item) x")->{rows}[0], 32, 'the transaction goes on, in parallel');
$session->query('COMMIT');
$session->send($long);
ok(wait_true(sub { (engine_pages($node))[1] == 4 }), 'at work');
$session->hang_up;
wait_pages($node, $free, 'a client that hangs up');

# A worker's error that reaches the leader while it asks the engine is not lost, nor the row with it
sql(<<'SQL');
CREATE FUNCTION fails_late(id int) RETURNS boolean LANGUAGE plpgsql PARALLEL SAFE COST 10000000 AS
'BEGIN IF id = 32 THEN PERFORM pg_sleep(1); RETURN 1 / (id - 32) = 1; END IF; RETURN true; END';
SQL
my $asks = 'SELECT id, (millm.status()).waiting FROM item WHERE id IN (1, 32) AND fails_late(id)';
$session = MillmTest::Session->new($node);
$session->query('SET parallel_leader_participation = off');
like(join("\n", @{ $session->query("EXPLAIN $asks")->{rows} }), qr/Workers Planned/, 'the leader asks, the workers fail');
my $engine = sql('SELECT engine_pid FROM millm.status()');
kill('STOP', $engine);
my $answer = $session->query($asks);
kill('CONT', $engine);
is($answer->{state}, '22012', 'an error of a worker is the statement\'s');

# The engine ends: one error, and workers that are gone
$session = MillmTest::Session->new($node);
$session->send($long);
ok(wait_true(sub { (engine_pages($node))[1] == 4 }), 'at work');
kill('KILL', sql('SELECT engine_pid FROM millm.status()'));
is($session->until_ready->{state}, 'ML019', 'a killed engine ends the statement');
is($session->query('SELECT 1')->{rows}[0], 1, 'and nothing else');

$node->stop;
done_testing();

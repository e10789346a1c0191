# Who has had computed what, by which model; whose turn it is; and what a full server says.
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

my $node = new_server('stat', 'millm.max_sequences = 1', 'millm.max_queue = 12');
sub sql { return $node->safe_psql('postgres', $_[0]); }

sql("CREATE ROLE $_ LOGIN; SELECT millm.grant_user('$_')") for qw(alice bob);
sql("CREATE ROLE chief LOGIN; SELECT millm.grant_admin('chief'); CREATE ROLE watcher LOGIN IN ROLE pg_read_all_stats; SELECT millm.grant_user('watcher')");

sub as { my ($role, $query) = @_; return MillmTest::Session->new($node, user => $role)->query($query); }
sub value { return as(@_)->{rows}[0]; }
# The columns of a role's only row
sub row { my ($role, @columns) = @_; return sql('SELECT ' . join(', ', @columns) . " FROM millm.stat_generate WHERE role = '$role'"); }

is(sql('SELECT count(*) FROM millm.stat_generate'), 0, 'nothing has been asked yet');
is(as('alice', q(SELECT millm.generate('x')))->{state}, 'ML006', 'no model is loaded');
is(row('alice', qw(model_id model requests errors)), '||1|1', 'a request all the same');
sql('SELECT millm.stat_reset()');
is(sql('SELECT count(*) FROM millm.stat_generate'), 0, 'reset');

load_model($node, 'tiny-long');

# What is counted
my $options = 'raw => true, temperature => 0';
is(as('alice', "SELECT millm.generate('one two', $options, max_tokens => 10)")->{state}, '', 'generate');
my $prompt = sql(q(SELECT millm.count_tokens('one two')));
is(row('alice', qw(model requests prompt_tokens cached_tokens completion_tokens errors canceled busy)), "tiny-long|1|$prompt|0|10|0|0|0", 'generate is counted');
is(row('alice', 'queue_ms > 0', 'compute_ms > 0', 'compute_ms < 10000', 'since > now() - interval \'1 hour\''), 't|t|t|t', 'and what it took');
is(row('alice', 'model_id', 'role_id'), sql("SELECT id, 'alice'::regrole::oid FROM millm.models"), 'by numbers, too');

is(value('bob', "SELECT count(*) FROM millm.generate_stream('one two', $options, max_tokens => 20)") > 0, 1, 'a stream');
like(as('bob', "SELECT millm.complete('one two', temperature => 0, max_tokens => 5, n => 3)")->{rows}[0], qr/choices/, 'three choices');
is(value('bob', q(SELECT count(*) FROM millm.embed(ARRAY['one two', NULL, 'one two', 'one two']))), 4, 'embeddings: two requests, for a NULL parts them');
is(value('bob', q(SELECT cardinality(millm.embed('one two')) > 0)), 't', 'embed');
is(row('bob', qw(requests prompt_tokens completion_tokens errors canceled)), join('|', 5, 6 * $prompt, 35, 0, 0), 'all are counted');
is(value('alice', "SELECT cardinality(millm.generate(ARRAY['one two', 'one two', NULL], $options, max_tokens => 2))"), 3, 'an array');
is(row('alice', qw(requests completion_tokens)), '3|14', 'a request for each prompt');
my $before = sql('SELECT sum(requests) FROM millm.stat_generate');
sql(q(SELECT millm.tokenize('one'), millm.count_tokens('one'), (millm.status()).waiting));
is(sql('SELECT sum(requests) FROM millm.stat_generate'), $before, 'what computes nothing is not');

# Errors and cancels
sql('SELECT millm.stat_reset()');
is(as('alice', "SELECT millm.generate('x', $options, max_tokens => 100000)")->{state}, 'ML018', 'too long');
is(row('alice', qw(requests errors canceled completion_tokens)), '1|1|0|0', 'an error');
is(as('alice', "SELECT millm.generate('x', model => 'nobody')")->{state}, 'ML006', 'refused before the engine was asked');
is(row('alice', 'requests'), 1, 'no request');
is(as('alice', "BEGIN; DECLARE c CURSOR FOR SELECT millm.generate_stream('x', $options, max_tokens => 4000); FETCH 1 FROM c; COMMIT")->{state}, '', 'a cursor');
is(row('alice', qw(requests errors canceled)), '2|1|1', 'a stream that was not read to its end is canceled');
my $running = MillmTest::Session->new($node, user => 'alice')->send("SELECT millm.generate('x', $options, max_tokens => 8000)");
ok(wait_true(sub { sql('SELECT running FROM millm.status()') == 1 }), 'one runs');
sql('SELECT pg_cancel_backend(' . $running->pid . ')');
is($running->until_ready->{state}, '57014', 'canceled');
is(row('alice', qw(requests errors canceled)), '3|1|2', 'and counted');
is(as('alice', "SET statement_timeout = 200; SELECT millm.generate('x', $options, max_tokens => 8000)")->{state}, '57014', 'timed out');
is(row('alice', qw(requests errors canceled)), '4|1|3', 'counted');
$running = MillmTest::Session->new($node, user => 'alice')->send("SELECT millm.generate('x', $options, max_tokens => 8000)");
ok(wait_true(sub { sql('SELECT running FROM millm.status()') == 1 }), 'one runs');
sql('SELECT pg_terminate_backend(' . $running->pid . ')');
ok(wait_true(sub { row('alice', qw(requests errors canceled)) eq '5|1|4' }), 'a session that is ended: canceled');

# A full server says how long it may take; that is no request
my @sessions = map { MillmTest::Session->new($node, user => 'bob')->send("SELECT millm.generate('x', $options, max_tokens => 8000)") } 1 .. 13;
ok(wait_true(sub { sql('SELECT running + waiting FROM millm.status()') == 13 }), 'full');
my $busy = as('bob', "SELECT millm.generate('x', $options, max_tokens => 5)");
like("$busy->{state} $busy->{detail}", qr/^ML020 1 sequences are running and 12 are waiting, .*\. Expected wait: about [1-9]\d* s\.$/, 'busy, with the expected wait');
is(row('bob', qw(requests busy)), '0|1', 'counted as such');
# Who is patient is told so each time, and is served once there is a place
my $patient = MillmTest::Session->new($node, user => 'bob');
my ($n_refused, $answer) = (0);
ok(wait_true(sub {
	$answer = $patient->query("SELECT cardinality(ARRAY[millm.generate('x', $options, max_tokens => 5)])");
	return 1 if $answer->{state} ne 'ML020' || $answer->{detail} !~ /Expected wait: about [1-9]\d* s\.$/;
	do { $_->hang_up for @sessions } if ++$n_refused == 3;
	return 0;
}), 'a session that asks again and again');
is("$answer->{state} $answer->{rows}[0]", ' 1', 'is answered in the end') or diag "$answer->{message} $answer->{detail}";
cmp_ok($n_refused, '>=', 3, "after $n_refused refusals");
ok(wait_true(sub { row('bob', qw(requests canceled busy)) eq '14|13|' . (1 + $n_refused) }), 'those that hung up are canceled');

# Who sees whose
sql(q(SELECT millm.stat_reset()));
as($_, "SELECT millm.generate('x', $options, max_tokens => 1)") for qw(alice bob);
my $roles = q(SELECT string_agg(role, ',' ORDER BY role) FROM millm.stat_generate);
is(value('alice', $roles), 'alice', 'everybody sees his own');
is(value('watcher', $roles), 'alice,bob', 'pg_read_all_stats sees all');
sql('GRANT bob TO alice');
is(value('alice', $roles), 'alice,bob', 'and a member the role\'s');
sql('REVOKE bob FROM alice');
is(as('alice', 'SELECT millm.stat_reset()')->{state}, '42501', 'a user does not reset');
is(as('watcher', 'SELECT millm.stat_reset()')->{state}, '42501', 'who watches neither');
is(as('chief', 'SELECT millm.stat_reset()')->{state}, '', 'an administrator does');
is(sql('SELECT count(*) FROM millm.stat_generate'), 0, 'reset');
as('alice', "SELECT millm.generate('x', $options, max_tokens => 1)");

# It outlives the engine, and says so of the request that did not
$running = MillmTest::Session->new($node, user => 'alice')->send("SELECT millm.generate('x', $options, max_tokens => 8000)");
ok(wait_true(sub { sql('SELECT running FROM millm.status()') == 1 }), 'one runs');
my $engine = sql('SELECT engine_pid FROM millm.status()');
kill 'KILL', $engine;
is($running->until_ready->{state}, 'ML019', 'the engine is gone');
is(row('alice', qw(requests errors)), '2|1', 'an error beside what was there');
ok(wait_true(sub { sql("SELECT coalesce(engine_pid, 0) NOT IN (0, $engine) AND engine_state = 'ready' FROM millm.status()") eq 't' }), 'another engine');
load_model($node, 'tiny-long');

# Roles take turns: of a role's eight and another's one that comes last, that is not the last to be answered
my $blocker = MillmTest::Session->new($node, user => 'alice')->send("SELECT millm.generate('x', $options, max_tokens => 8000)");
ok(wait_true(sub { sql('SELECT running FROM millm.status()') == 1 }), 'the only seat is taken');
my $ended = "SELECT extract(epoch FROM clock_timestamp()) FROM (SELECT millm.generate('x', $options, max_tokens => 1000) AS text OFFSET 0) g WHERE text IS NOT NULL";
my @flood = map { MillmTest::Session->new($node, user => 'alice')->send($ended) } 1 .. 8;
ok(wait_true(sub { sql('SELECT waiting FROM millm.status()') == 8 }), 'eight wait');
my $late = MillmTest::Session->new($node, user => 'bob')->send($ended);
ok(wait_true(sub { sql('SELECT waiting FROM millm.status()') == 9 }), 'and one of another role, which came last');
$blocker->hang_up;
my @ends = sort { $a <=> $b } map { $_->until_ready(100)->{rows}[0] } @flood;
is(scalar(grep { defined } @ends), 8, 'all are answered');
cmp_ok($late->until_ready->{rows}[0], '<', $ends[2], 'the one before the third of the eight');

# So do the requests of arrays: with one role's eight in the line, another's array does not come last
$blocker = MillmTest::Session->new($node, user => 'alice')->send("SELECT millm.generate('x', $options, max_tokens => 8000)");
ok(wait_true(sub { sql('SELECT running FROM millm.status()') == 1 }), 'the only seat is taken');
my $rows = MillmTest::Session->new($node, user => 'alice')
  ->send("SELECT key FROM (SELECT (millm.generate_rows('SELECT i, ''x'' FROM generate_series(1, 8) i', $options, max_tokens => 1000, look_ahead => 8)).key OFFSET 0) r");
ok(wait_true(sub { sql('SELECT waiting FROM millm.status()') == 8 }), 'eight rows wait');
$late = MillmTest::Session->new($node, user => 'bob')
  ->send("SELECT (millm.status()).waiting FROM (SELECT millm.generate(ARRAY['x'], $options, max_tokens => 1000) AS texts OFFSET 0) g WHERE cardinality(texts) = 1");
ok(wait_true(sub { sql('SELECT waiting FROM millm.status()') == 9 }), 'and an array of another role, which came last');
$blocker->hang_up;
cmp_ok($late->until_ready(100)->{rows}[0], '>=', 4, 'it is answered while most of the rows still wait');
is(scalar @{ $rows->until_ready(100)->{rows} }, 8, 'they are answered, too');

# A dropped role is its number
sql('DROP OWNED BY bob; DROP ROLE bob');
is(sql('SELECT count(*) FROM millm.stat_generate WHERE role IS NULL AND role_id IS NOT NULL AND requests > 0'), 1, 'a dropped role');

# More roles than rows: nothing is lost from the sums, and the latest are there
sql('GRANT USAGE ON SCHEMA millm TO PUBLIC; GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA millm TO PUBLIC; SELECT millm.stat_reset()');
sql(q(DO $$ BEGIN
	FOR i IN 1 .. 520 LOOP EXECUTE format('CREATE ROLE many_%s', i); END LOOP;
	FOR i IN 1 .. 520 LOOP
		EXECUTE format('SET LOCAL ROLE many_%s', i);
		PERFORM millm.generate('x', raw => true, max_tokens => 1);
		RESET ROLE;
	END LOOP;
END $$));
is(sql('SELECT count(*), sum(requests), sum(completion_tokens), count(*) FILTER (WHERE role_id IS NULL) FROM millm.stat_generate'), '513|520|520|1', 'the table is full');
is(sql('SELECT requests FROM millm.stat_generate WHERE role_id IS NULL'), 8, 'the row without a role has the oldest');
is(sql('SELECT role FROM millm.stat_generate WHERE role_id IS NOT NULL ORDER BY role_id LIMIT 1'), 'many_9', 'which are no longer there');
is(value('alice', 'SELECT count(*) FROM millm.stat_generate WHERE role_id IS NULL'), 0, 'which is not for everybody');

# Pages are preempted, never overcommitted: six sequences in a pool for one, and every text is what it is alone
$node->append_conf('postgresql.conf', "millm.max_sequences = 6\nmillm.context_length = 2048\nmillm.kv_cache_size = '1MB'\nmillm.deterministic = on\n");
$node->restart;
is(sql('SELECT count(*) FROM millm.stat_generate'), 0, 'a restart of the server forgets');
load_model($node, 'tiny-long');
my ($free) = engine_pages($node);
cmp_ok($free * 16, '<', 6 * 600, 'fewer positions than they will have');
my %text = map { $_ => "SELECT md5(millm.generate('$_ and', $options, max_tokens => 600))" } 1 .. 6;
my %alone = map { $_ => sql($text{$_}) } sort keys %text;
my %together = map { $_ => MillmTest::Session->new($node)->send($text{$_}) } sort keys %text;
is($together{$_}->until_ready(100)->{rows}[0], $alone{$_}, "the same text: $_") for sort keys %text;
wait_pages($node, $free, 'six sequences in a pool for one');
is(as('alice', "SELECT millm.generate('x', $options, max_tokens => 2048)")->{state}, 'ML018', 'what can never fit is refused at once,');
my $refused = as('alice', "SELECT millm.complete(repeat('one two ', 2000), n => 3)");
like("$refused->{state} $refused->{detail}", qr/^ML018 The prompt has \d+ tokens; the context holds 2048/, 'with the figures, also several choices');
$refused = as('alice', q(SELECT millm.embed(repeat('one two ', 2000))));
like("$refused->{state} $refused->{detail}", qr/^ML018 The text has \d+ tokens; the context holds 2048/, 'and an embedding');

$node->stop;
done_testing();

# A stream arrives row by row, and a reader who leaves it early, in whatever way, frees the sequence.
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time sleep);
use MillmTest;

# The engine's own patience is longer than any wait of this test, so that only a closed connection can free pages in time.
my $node = new_server('stream', "millm.stream_stall_timeout = '60s'");
load_model($node, $SMOLLM2);
my ($free) = engine_pages($node);
my ($n, $result);

# --- Row by row ------------------------------------------------------------------------------
my $session = MillmTest::Session->new($node);
my $start = time;
$session->send(q(SELECT millm.generate_stream('Once upon a time', raw => true, temperature => 0, max_tokens => 60)));
my (@at, $type);
while (($type) = $session->message)
{
	push @at, time - $start if $type eq 'D';
	last if $type eq 'Z';
}
cmp_ok(scalar @at, '>', 20, 'one row a piece');
note sprintf('first row after %.0f ms, last after %.0f ms', 1000 * $at[0], 1000 * $at[-1]);
# Rows kept until the end would arrive together.
cmp_ok($at[0], '<', $at[-1] / 2, 'the first row comes long before the last');
my %moments = map { int($_ * 500) => 1 } @at;
cmp_ok(scalar keys %moments, '>', 5, 'and the others one by one');

# The first row is there while the generation has thousands of tokens to go.
$session->send("SELECT millm.generate_stream($LONG)");
do { ($type) = $session->message } until !$type || $type eq 'D';
is($type, 'D', 'a first row');
is((engine_pages($node))[1], 1, 'while the engine is at work on the next');

# --- Ways to leave -----------------------------------------------------------------------------
undef $session;
wait_pages($node, $free, 'a connection dropped in the middle');

# A reader who is only slow gets everything.
my $expected = $node->safe_psql('postgres', q(SELECT md5(string_agg(p, '')) FROM millm.generate_stream('Once upon a time', raw => true, temperature => 0, max_tokens => 40) p));
my $reader = MillmTest::Session->new($node);
$reader->send(q(SELECT millm.generate_stream('Once upon a time', raw => true, temperature => 0, max_tokens => 40)));
my $text = '';
while ((my ($t, $payload) = $reader->message))
{
	$text .= substr($payload, 6) if $t eq 'D';
	sleep 0.02 if $t eq 'D';
	last if $t eq 'Z';
}
is($reader->query("SELECT md5(\$q\$$text\$q\$)")->{rows}[0], $expected, 'a slow reader misses nothing');

# LIMIT
$session = MillmTest::Session->new($node);
$start = time;
$result = $session->query("SELECT millm.generate_stream($LONG) LIMIT 3");
is(scalar @{ $result->{rows} }, 3, 'LIMIT 3 is three rows');
wait_pages($node, $free, 'LIMIT');

# A cursor: fetched, closed
$session->query('BEGIN');
$session->query("DECLARE c NO SCROLL CURSOR FOR SELECT millm.generate_stream($LONG)");
$result = $session->query('FETCH 2 FROM c');
is(scalar @{ $result->{rows} }, 2, 'FETCH 2') or diag $result->{message};
is((engine_pages($node))[1], 1, 'the generation goes on behind an open cursor');
$session->query('CLOSE c');
wait_pages($node, $free, 'CLOSE of the cursor');

# left open until the end of the transaction
$session->query("DECLARE c NO SCROLL CURSOR FOR SELECT millm.generate_stream($LONG)");
$session->query('FETCH 1 FROM c');
$session->query('COMMIT');
wait_pages($node, $free, 'COMMIT with the cursor open');

# ROLLBACK TO
$session->query('BEGIN');
$session->query('SAVEPOINT s');
$session->query("DECLARE c NO SCROLL CURSOR FOR SELECT millm.generate_stream($LONG)");
$session->query('FETCH 1 FROM c');
is((engine_pages($node))[1], 1, 'at work');
$session->query('ROLLBACK TO s');
wait_pages($node, $free, 'ROLLBACK TO');
is($session->query('SELECT 1')->{rows}[0], 1, 'the transaction goes on');
$session->query('COMMIT');

# An error of the same query
is($session->query("SELECT millm.generate_stream($LONG), 1 / (CASE WHEN clock_timestamp() > now() + interval '300 ms' THEN 0 ELSE 1 END)")->{state}, '22012', 'a division by zero');
wait_pages($node, $free, 'an error of the same query');

# The transaction goes on after a caught error, and the sequence is free before it ends.
my $block = <<'SQL';
BEGIN;
DO $$
DECLARE piece text; n int := 0;
BEGIN
	BEGIN
		FOR piece IN SELECT millm.generate_stream(LONG) LOOP
			n := n + 1;
			IF n = 3 THEN RAISE EXCEPTION 'enough'; END IF;
		END LOOP;
	EXCEPTION WHEN raise_exception THEN NULL;
	END;
	PERFORM set_config('test.rows', n::text, false);
END $$;
SQL
$block =~ s/LONG/$LONG/;
$session->query($block);
is($session->query(q(SELECT current_setting('test.rows')))->{rows}[0], 3, 'plpgsql saw three rows');
wait_pages($node, $free, 'a caught exception');
$session->query('COMMIT');

# caught while waiting for the engine
$session->query('BEGIN');
$session->query("SET LOCAL statement_timeout = '300ms'");
$result = $session->query(<<"SQL");
DO \$\$
BEGIN
	PERFORM millm.generate($LONG);
EXCEPTION WHEN query_canceled THEN PERFORM set_config('test.rows', 'caught', false);
END \$\$
SQL
is($result->{state}, '', 'a canceled generation is caught') or diag $result->{message};
wait_pages($node, $free, 'a caught cancel');
is($session->query(q(SELECT current_setting('test.rows')))->{rows}[0], 'caught', 'by its state');
$session->query('COMMIT');

# EXIT of a loop
$session->query("DO \$\$ DECLARE p text; BEGIN FOR p IN SELECT millm.generate_stream($LONG) LOOP EXIT; END LOOP; END \$\$");
wait_pages($node, $free, 'EXIT of a plpgsql loop');

# EXISTS and other early ends
is($session->query("SELECT EXISTS (SELECT millm.generate_stream($LONG))")->{rows}[0], 't', 'EXISTS');
wait_pages($node, $free, 'EXISTS');

# COPY streams as well
$session->send(q(COPY (SELECT millm.generate_stream('Once upon a time', raw => true, temperature => 0, max_tokens => 20)) TO STDOUT));
$n = 0;
while (($type) = $session->message) { $n++ if $type eq 'd'; last if $type eq 'Z'; }
cmp_ok($n, '>', 5, 'COPY of a stream');

# --- Readers that neither go on nor leave --------------------------------------------------------
# A model so fast that its text soon fills what lies between engine and reader, and an engine with less patience.
$node->append_conf('postgresql.conf', "millm.stream_stall_timeout = '2s'");
$node->reload;
load_model($node, 'tiny-long');
($free) = engine_pages($node);

# The server waits for the reader, the engine for the server, and its patience has an end.
my $other = MillmTest::Session->new($node);
my $waits = sub { my ($pid) = @_; ($other->query("SELECT wait_event FROM pg_stat_activity WHERE pid = $pid")->{rows}[0] // '') eq 'ClientWrite' };
# 4 kB fit into the server's own buffer, so the wait is ours; 200 kB do not, and the wait is PostgreSQL's.
for my $width (4000, 200000)
{
	my $reader = MillmTest::Session->new($node);
	$reader->send("SELECT millm.generate_stream($LONG), repeat('x', $width)");
	do { ($type) = $reader->message } until !$type || $type eq 'D';
	is($type, 'D', "the reader has read one row of $width bytes and reads no more");
	ok(wait_true(sub { $waits->($reader->pid) }), 'the server waits for it');
	wait_pages($node, $free, 'a reader who stopped');
	is($other->query('SELECT pg_terminate_backend(' . $reader->pid . ', 10000)')->{rows}[0], 't', 'its backend can still be ended');
	$reader->hang_up;
}

# A cursor left open, and the transaction too: the engine is done with it when the text is, or its patience ends
$session->query('BEGIN');
$session->query(q(DECLARE c NO SCROLL CURSOR FOR SELECT millm.generate_stream('Once upon a time', raw => true, temperature => 0, max_tokens => 1000)));
$session->query('FETCH 1 FROM c');
wait_pages($node, $free, 'a cursor left open');
$result = $session->query('FETCH ALL FROM c');
cmp_ok(scalar @{ $result->{rows} }, '>', 20, 'and the rest of its text is still there') or diag $result->{message};
$session->query('ROLLBACK');

# Open descriptors do not pile up.
$result = $session->query(<<'SQL');
DO $$ BEGIN FOR i IN 1..300 LOOP PERFORM p FROM (SELECT millm.generate_stream('a', raw => true, max_tokens => 8, temperature => 0) AS p LIMIT 1) x; END LOOP; END $$
SQL
is($result->{state}, '', 'three hundred streams in one transaction') or diag $result->{message};
my $fds = () = glob('/proc/' . $session->pid . '/fd/*');
my $sockets = grep { (readlink($_) // '') =~ /^socket:/ } glob('/proc/' . $session->pid . '/fd/*');
cmp_ok($sockets, '<', 10, "no descriptor stays open ($fds in all)");
wait_pages($node, $free, 'three hundred streams');

$node->stop;
done_testing();

# Whatever ends a query ends its generation, soon, and its pages are free again.
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time sleep);
use MillmTest;

my $node = new_server('cancel');
load_model($node, $SMOLLM2);
my ($free) = engine_pages($node);
my $prefill = q(repeat('The quick brown fox jumps. ', 250), raw => true, max_tokens => 1);

# The measured times are a few ms; the bound only tells "soon" from "at the end".
my $SOON = 2.0;

sub busy { my @now = engine_pages($node); return $now[1] == $_[0]; }

# run sql in a session, wait until the engine works on it, then end it
sub ends
{
	my ($what, $sql, $state, $how) = @_;
	my $session = MillmTest::Session->new($node);
	$session->send($sql);
	ok(wait_true(sub { busy(1) }), "$what: at work") or return;
	my $start = time;
	$how->($session);
	my $result = $session->until_ready;
	my $took = time - $start;
	is($result->{state}, $state, "$what: ends with $state") or diag $result->{message};
	cmp_ok($took, '<', $SOON, sprintf("$what: returned after %.0f ms", 1000 * $took));
	wait_pages($node, $free, $what);
}

my $canceler = MillmTest::Session->new($node);
my $cancel = sub { $canceler->query('SELECT pg_cancel_backend(' . $_[0]->pid . ')') };
my $terminate = sub { $canceler->query('SELECT pg_terminate_backend(' . $_[0]->pid . ')') };

cmp_ok($node->safe_psql('postgres', q(SELECT millm.count_tokens(repeat('The quick brown fox jumps. ', 250)))), '>', 1400, 'a long prompt');
ends('cancel while decoding', "SELECT millm.generate($LONG)", '57014', $cancel);
ends('cancel a stream', "SELECT millm.generate_stream($LONG)", '57014', $cancel);
ends('cancel a prefill', "SELECT millm.generate($prefill)", '57014', $cancel);
ends('terminate', "SELECT millm.generate($LONG)", '57P01', $terminate);

for my $case ([ 'decoding', "SELECT millm.generate($LONG)" ], [ 'a prefill', "SELECT millm.generate($prefill)" ], [ 'a stream', "SELECT millm.generate_stream($LONG)" ])
{
	my $session = MillmTest::Session->new($node);
	$session->query("SET statement_timeout = '150ms'");
	my $start = time;
	is($session->query($case->[1])->{state}, '57014', "statement_timeout in $case->[0]");
	my $took = time - $start;
	cmp_ok($took, '<', 0.15 + $SOON, sprintf("statement_timeout in $case->[0]: %.0f ms late", 1000 * ($took - 0.15)));
	wait_pages($node, $free, "statement_timeout in $case->[0]");
	is($session->query('SELECT 1')->{rows}[0], 1, 'the session goes on');
}

# A client that goes away without a word; 1 s is how often a waiting backend looks.
for my $function ('generate', 'generate_stream')
{
	my $session = MillmTest::Session->new($node);
	$session->send("SELECT millm.$function($LONG)");
	ok(wait_true(sub { busy(1) }), "$function: at work");
	$session->hang_up;
	wait_pages($node, $free, "$function for a client that has gone");
}

# Waiting in the engine's queue is as easily left.
my @others = map { MillmTest::Session->new($node)->send("SELECT millm.generate($LONG)") } 1 .. 20;
ok(wait_true(sub { busy(20) }), 'more requests than sequences');
$cancel->($_) for @others;
is($_->until_ready->{state}, '57014', 'canceled') for @others;
wait_pages($node, $free, 'a queue that was left');

# unload() waits for the running ones as long as it was told, then cancels them.
my $running = MillmTest::Session->new($node)->send("SELECT millm.generate($LONG)");
ok(wait_true(sub { busy(1) }), 'at work');
$node->safe_psql('postgres', "SELECT millm.unload('100ms')");
is($running->until_ready->{state}, '57014', 'unload cancels what does not end in time');

is(slurp_file($node->logfile) =~ /was terminated by signal|all server processes terminated/ ? 1 : 0, 0, 'no crash on the way');
$node->stop;
done_testing();

# Fifty connections share one copy of the weights and one pool of pages.
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

my $node = new_server('concurrency', 'millm.max_sequences = 8', 'millm.max_queue = 64');
load_model($node, $SMOLLM2);
my ($free) = engine_pages($node);
my $engine = $node->safe_psql('postgres', 'SELECT engine_pid FROM millm.status()');

# Private memory of the engine in kB: what would grow if a connection cost some.
sub private_kb
{
	my $rollup = slurp_file("/proc/$engine/smaps_rollup");
	my $kb = 0;
	$kb += $1 while $rollup =~ /^Private_Dirty:\s+(\d+)/mg;
	return $kb;
}

my @prompts = map { "The number $_ is" } 0 .. 4;
my $options = 'raw => true, temperature => 0, max_tokens => 8';
my %alone = map { $_ => $node->safe_psql('postgres', "SELECT md5(millm.generate('$_', $options))") } @prompts;

my $sum = sub {
	my @sessions = map { MillmTest::Session->new($node) } 1 .. 50;
	$sessions[$_]->send("SELECT md5(millm.generate('$prompts[$_ % 5]', $options))") for 0 .. 49;
	my ($answers, $same, %states) = (0, 0);
	for (0 .. 49)
	{
		my $result = $sessions[$_]->until_ready(100);
		$states{ $result->{state} || 'ok' }++;
		$answers++ if $result->{rows}[0];
		$same++ if ($result->{rows}[0] // '') eq $alone{ $prompts[$_ % 5] };
	}
	note join ', ', map { "$_: $states{$_}" } sort keys %states;
	return ($answers, $same);
};
# The pool is touched for the first time in the first round; what a second one adds would be added by every connection.
my ($answers, $same) = $sum->();
is($answers, 50, 'fifty at once: every one is answered');
# Sums may be rounded otherwise in company (millm.deterministic is for those who mind), so a near tie may fall the other way.
cmp_ok($same, '>=', 45, "and $same of them as when alone");
my $before = private_kb();
is(($sum->())[0], 50, 'fifty more');
my $grown = private_kb() - $before;
cmp_ok($grown, '<', 16 * 1024, "the engine's own memory does not grow with connections ($grown kB)");
wait_pages($node, $free, 'a hundred generations');

# The queue has an end, and says so.
$node->append_conf('postgresql.conf', "millm.max_sequences = 1\nmillm.max_queue = 2\n");
$node->restart;
load_model($node, $SMOLLM2);
my @sessions = map { MillmTest::Session->new($node)->send("SELECT millm.generate($LONG)") } 1 .. 6;
my ($busy, $message);
ok(wait_true(sub { $busy = $node->safe_psql('postgres', 'SELECT running + waiting FROM millm.status()'); $busy == 3 }), 'one runs and two wait') or diag "$busy";
my ($state, $error) = sqlstate($node, q(SELECT millm.generate('x', raw => true, max_tokens => 1)));
is($state, 'ML020', 'one more is refused: SERVER_BUSY');
like($error, qr/\d/, 'with figures');
$_->hang_up for @sessions;

$node->stop;
done_testing();

# A server that stops, however it stops, leaves no process behind.
use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);
use MillmTest;

my $node = new_server('shutdown');

sub pids { return split /\|/, $node->safe_psql('postgres', 'SELECT engine_pid, hub_pid FROM millm.status()'); }
sub helpers_ready { return wait_true(sub { $node->safe_psql('postgres', q(SELECT engine_state || hub_state FROM millm.status())) eq 'readyready' }); }

for my $mode ('fast', 'immediate')
{
	for my $busy (0, 1)
	{
		my $what = $mode . ($busy ? ', in a generation' : '');
		ok(helpers_ready(), "$what: both helpers are there");
		my $session = MillmTest::Session->new($node);
		if ($busy)
		{
			load_model($node, $SMOLLM2);
			$session->send("SELECT millm.generate($LONG)");
			ok(wait_true(sub { (engine_pages($node))[1] == 1 }), "$what: at work");
		}
		my @pids = pids();
		is(scalar(grep { kill(0, $_) } @pids), 2, "$what: two processes");
		my $start = time;
		$node->stop($mode);
		# generous: an engine that is computing has to end by a signal
		cmp_ok(time - $start, '<', 20, sprintf('%s: stopped after %.0f ms', $what, 1000 * (time - $start)));
		ok(wait_true(sub { !grep { kill(0, $_) } @pids }), "$what: no helper is left");
		$node->start;
	}
}

# The postmaster itself is killed: nobody is there to stop anything
ok(helpers_ready(), 'both helpers are there');
my @pids = pids();
$node->kill9;
ok(wait_true(sub { !grep { kill(0, $_) } @pids }), 'kill -9 of the postmaster: no helper is left');
unlink $node->data_dir . '/postmaster.pid';
$node->start;
ok(helpers_ready(), 'and the next server has its own');
$node->stop;
done_testing();

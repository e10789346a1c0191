# delete(), killed between any two of its steps, with and without a new download of the same repository: all end right.
#
#   delete() and COMMIT | the directory becomes .trash/UUID | its files go, one by one | it goes | the trash row goes
#
# millm-hub is stopped meanwhile, so the server is killed after the first step; the states between the later ones are made by hand.
use strict;
use warnings;
use Cwd qw(abs_path);
use File::Path qw(remove_tree);
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep);
use MillmTest;
use TestHub;

my $hub = TestHub->new;
$hub->faults;
my $node = new_server('delete_kills', '# the test hub', "millm.hf_endpoint = '@{[ $hub->endpoint ]}'");
my $cache = abs_path($node->basedir) . '/cache';
my $dir = "$cache/huggingface/millm-test--tiny-llama--FP16";
my $local = "$ENV{MILLM_FIXTURES}/tiny/llama";
my $download = q(SELECT millm.download('millm-test/tiny-llama', 'FP16'));

sub sql { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
sub content { my ($dir) = @_; return join ' ', map { s/.*\///r . ' ' . -s $_ } sort grep { !/\/\.partial/ } glob("$dir/*"), glob("$dir/.[!.]*"); }
sub uuid { return sql(q(SELECT uuid FROM millm.registry WHERE name = 'tiny-llama')); }
# Whole, as the row says; nothing besides, in the cache, in the trash, in the registry
sub right
{
	my ($what, $expected) = @_;
	if ($expected)
	{
		is(sql(q(SELECT millm.wait('tiny-llama'))), 'ready', "$what: the model arrives");
		is(decode_json(slurp_file("$dir/.millm_meta.json"))->{uuid}, uuid(), 'the directory is its own');
		is(sql(q(SELECT millm.load('tiny-llama'))), 'loaded', 'it loads');
		sql('SELECT millm.unload()');
	}
	else
	{
		is(sql(q(SELECT count(*) FROM millm.registry WHERE name = 'tiny-llama')), 0, "$what: the model is gone");
		ok(wait_true(sub { !-e $dir }), 'so are its files') or diag content($dir);
	}
	ok(wait_true(sub { sql('SELECT count(*) FROM millm.trash') == 0 }), 'no trash');
	is_deeply([ glob("$cache/.trash/*") ], [], 'on disk neither');
	is(join(' ', glob("$cache/huggingface/*")), $expected ? $dir : '', 'nothing else in the cache');
}
sub have { return if sql(q(SELECT count(*) FROM millm.registry WHERE name = 'tiny-llama')); sql($download); sql(q(SELECT millm.wait('tiny-llama'))); }
# The server dies with the statements carried out, and millm-hub without having heard of them; then sub makes what it could have done
sub killed_after
{
	my ($statements, $sub) = @_;
	have();
	my $uuid = uuid();
	my $session = MillmTest::Session->new($node);
	my $pid = sql('SELECT hub_pid FROM millm.status()');
	# a download asks millm-hub: it is stopped only behind that
	for my $statement (@$statements)
	{
		kill('STOP', $pid) if $statement eq 'COMMIT' || $statement !~ /download|BEGIN|delete/;
		my $result = $session->query($statement);
		is($result->{state}, '', $statement) or diag $result->{message};
	}
	kill_server($node, $sub ? sub { $sub->($uuid) } : undef, $pid);
}

# --- Before COMMIT: nothing has happened --------------------------------------------------------------------
have();
my $before = content($dir);
killed_after([ 'BEGIN', q(SELECT millm.delete('tiny-llama')) ]);
is(content($dir), $before, 'killed before COMMIT: every file is there');
right('killed before COMMIT', 1);
killed_after([ 'BEGIN', q(SELECT millm.delete('tiny-llama')), $download ]);
is(content($dir), $before, 'with a new download: every file is there');
right('with a new download', 1);
killed_after([ 'BEGIN', q(SELECT millm.delete('tiny-llama')), $download, 'ROLLBACK' ]);
is(content($dir), $before, 'after ROLLBACK: every file is there');
right('after ROLLBACK', 1);

# --- After COMMIT, between the steps on disk -----------------------------------------------------------------
my %step = (
	'1. before anything' => undef,
	'2. moved' => sub { rename $dir, "$cache/.trash/$_[0]" or die "rename: $!" },
	'3. some files gone' => sub { rename $dir, "$cache/.trash/$_[0]" or die "rename: $!"; unlink "$cache/.trash/$_[0]/.millm_meta.json", "$cache/.trash/$_[0]/model.safetensors" },
	'4. all gone' => sub { remove_tree($dir) });
for my $step (sort keys %step)
{
	for my $with (0, 1)
	{
		killed_after([ 'BEGIN', q(SELECT millm.delete('tiny-llama')), $with ? $download : (), 'COMMIT' ], $step{$step});
		right("$step, " . ($with ? 'delete and download' : 'delete'), $with);
	}
}

# Two transactions; the first one's files are being removed when the second comes
have();
my $uuid = uuid();
kill('STOP', my $pid = sql('SELECT hub_pid FROM millm.status()'));
sql(q(SELECT millm.delete('tiny-llama')));
like((sqlstate($node, $download))[1], qr/NOTICE: .*did not answer in time/, 'a download in a second transaction');
kill_server($node, sub { rename $dir, "$cache/.trash/$uuid" }, $pid);
right('two transactions', 1);
isnt(uuid(), $uuid, 'another model than before');

# --- At any time: millm-hub, the clerk, the server -----------------------------------------------------------
srand(my $seed = $ENV{MILLM_SEED} // time);
note "MILLM_SEED=$seed";
for my $n (1 .. 12)
{
	have();
	my $with = int(rand(2));
	my $kill = (qw(hub clerk hub clerk hub server))[$n % 6];
	sql(q(BEGIN; SELECT millm.delete('tiny-llama');) . ($with ? "$download;" : '') . 'COMMIT');
	sleep rand(0.05);
	if ($kill eq 'hub') { kill('KILL', sql('SELECT hub_pid FROM millm.status()') || next); }
	elsif ($kill eq 'clerk') { sql(q(SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'millm clerk')); }
	else { kill_server($node); }
	right("$n: $kill killed", $with);
}

# --- A local model's files are nobody's to remove ------------------------------------------------------------
ok(wait_true(sub { $node->psql('postgres', "SELECT millm.register_local('$local', name => 'mine')") == 0 }), 'a local model');
$before = content($local);
sql(q(SELECT millm.delete('mine')));
kill_server($node);
is(content($local), $before, 'a local model keeps its files');
is(sql('SELECT count(*) FROM millm.trash'), 0, 'and makes no trash');

# --- A second cluster on the same cache ----------------------------------------------------------------------
have();
my $second = new_server('second', '# the test hub', "millm.hf_endpoint = '@{[ $hub->endpoint ]}'", "millm.cache_dir = '$cache'");
like((sqlstate($second, $download))[1], qr/another server uses/, 'a second cluster does not write to the cache');
# the first one dies, the second has the cache then
$node->stop('immediate');
ok(wait_true(sub { $second->psql('postgres', $download) == 0 }), 'until the first has ended');
is($second->safe_psql('postgres', q(SELECT millm.wait('tiny-llama'))), 'error', 'what lies there is not its own');
is($second->safe_psql('postgres', q(SELECT error_code FROM millm.models)), 'MODEL_ALREADY_EXISTS', 'which the error says');
$second->safe_psql('postgres', q(SELECT millm.delete('tiny-llama')));
ok(wait_true(sub { $second->safe_psql('postgres', 'SELECT count(*) FROM millm.trash') == 0 }), 'the row is deleted');
ok(-f "$dir/model.safetensors", 'the files are not');
# the first one is back, without the cache: what it deletes goes when it has the cache again
$node->start;
is(sql(q(SELECT millm.load('tiny-llama'))), 'loaded', 'the first loads from a cache that is not its own now');
sql('SELECT millm.unload()');
my ($rc, $out, $err) = $node->psql('postgres', q(BEGIN; SELECT millm.delete('tiny-llama'); SELECT count(*) FROM millm.trash; ROLLBACK));
like($err, qr/NOTICE:  the files of model "tiny-llama" stay in the model cache, which another server uses/, 'what it deletes stays there');
is($out, "\n0", 'for good');
$second->stop;
ok(wait_true(sub { $node->psql('postgres', q(BEGIN; SELECT millm.download('millm-test/tiny-gpt2'); ROLLBACK)) == 0 }), 'the first has the cache again');
right('with the second gone', 1);
sql(q(SELECT millm.delete('tiny-llama')));
right('and deletes', 0);
unlike(slurp_file($_->logfile), qr/PANIC|TRAP/, 'no crash on the way') for $node, $second;
$node->stop;
done_testing();

# An access token: where it must not be (everywhere is looked), how long it is in memory, how many there may be, and what a restart means for it.
use strict;
use warnings;
use Cwd qw(abs_path);
use File::Find ();
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;
use TestHub;

my $token = 'hf_good';
my $hub = TestHub->new;
my $node = new_server('secrets', '# the test hub', "millm.hf_endpoint = '@{[ $hub->endpoint ]}'", 'log_statement = none', 'log_min_duration_statement = -1', 'max_prepared_transactions = 2');
my $base = abs_path($node->basedir);
my $postmaster = slurp_file($node->data_dir . '/postmaster.pid') =~ /^(\d+)/ ? $1 : die;
# Where the administrator keeps it.  A statement that reads it from there does not show it.
my $place = abs_path(PostgreSQL::Test::Utils::tempdir()) . '/token';
append_to_file($place, "$token\n");
my $secret = "hf_token => rtrim(pg_read_file('$place'), E'\\n')";

sub sql { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
sub slow { $hub->faults({ where => 'cdn', bytes_per_second => 100000 }); }
sub bytes { my ($name, $bytes) = @_; return wait_true(sub { sql("SELECT bytes >= $bytes FROM millm.progress WHERE name = '$name'") eq 't' }); }

# --- Where it is not ---------------------------------------------------------------------------------------------
sub files_with_it
{
	my @found;
	File::Find::find({ no_chdir => 1, wanted => sub { push @found, $_ if -f && index(eval { slurp_file($_) } // '', $token) >= 0 } }, $base);
	push @found, $node->logfile if index(slurp_file($node->logfile), $token) >= 0;
	return join ' ', @found;
}
sub processes_with_it
{
	return join ' ', grep { my $f = $_; -r $f && index(eval { slurp_file($f) } // '', $token) >= 0 } map { ("/proc/$_/cmdline", "/proc/$_/environ", "/proc/$_/comm") } MillmTest::family($postmaster);
}
# Occurrences in the memory that the server's processes share; nothing when that cannot be read
sub times_in_shared_memory
{
	my ($start, $end) = slurp_file("/proc/$postmaster/maps") =~ m{^(\w+)-(\w+) rw-s .* /dev/zero \(deleted\)$}m or return;
	open(my $memory, '<:raw', "/proc/$postmaster/mem") or return;
	seek($memory, hex $start, 0) or return;
	my ($left, $times) = (hex($end) - hex($start), 0);
	while ($left > 0)
	{
		my $n = sysread($memory, my $piece, $left < 1 << 20 ? $left : 1 << 20) or return;
		$times += () = $piece =~ /\Q$token\E/g;
		$left -= $n;
	}
	return $times;
}
sub nowhere
{
	my ($when, $times) = @_;
	# what is in buffers and not yet in a file
	sql('CHECKPOINT');
	is(sql(q(SELECT string_agg(t::text, ' ') FROM (SELECT r::text FROM millm.registry r UNION ALL SELECT m::text FROM millm.models m UNION ALL SELECT a.query FROM pg_stat_activity a) t)) =~ /\Q$token\E/ ? 1 : 0,
		0, "$when: in no table, no view, no statement of pg_stat_activity");
	is(files_with_it(), '', 'in no file: tables, WAL, the cache, the log');
	is(processes_with_it(), '', 'in no title, command line or environment');
	my $have = times_in_shared_memory();
  SKIP: {
		skip 'the memory of the server cannot be read here', 1 unless defined $have;
		is($have, $times, "$times times in shared memory");
	}
}
nowhere('before', 0);
slow();
sql("SELECT millm.download('millm-test/gated', 'FP16', $secret)");
ok(bytes('gated', 50000), 'a download with a token under way');
nowhere('meanwhile', 1);
kill('KILL', sql('SELECT hub_pid FROM millm.status()'));
ok(wait_true(sub { sql(q(SELECT hub_state FROM millm.status())) eq 'ready' }), 'millm-hub is killed');
nowhere('then', 1);
is(sql(q(SELECT millm.wait('gated'))), 'ready', 'the next one is given it again');
nowhere('afterwards', 0);
my $dump = "$base/dump.sql";
$node->command_ok([ 'pg_dumpall', '-f', $dump, '-d', $node->connstr('postgres') ], 'pg_dumpall');
unlike(slurp_file($dump), qr/\Q$token\E/, 'in no dump');

# --- Ends of transactions, of downloads --------------------------------------------------------------------------
$hub->faults;
my $session = MillmTest::Session->new($node);
$session->query('BEGIN');
is($session->query("SELECT millm.download('millm-test/private', 'FP16', $secret)")->{state}, '', 'a token in a transaction');
nowhere('before its end', 1);
$session->query('ROLLBACK');
nowhere('after ROLLBACK', 0);
$session->query('BEGIN');
$session->query("SELECT millm.download('millm-test/private', 'FP16', $secret)");
is($session->query(q(PREPARE TRANSACTION 'p'))->{state}, '0A000', 'PREPARE TRANSACTION is refused');
nowhere('after that', 0);
$session->query('BEGIN');
$session->query("SELECT millm.download('millm-test/private', 'FP16', $secret)");
$session->query('SAVEPOINT s');
sql('SELECT pg_terminate_backend(' . $session->pid . ')');
ok(wait_true(sub { sql('SELECT count(*) FROM pg_stat_activity WHERE pid = ' . $session->pid) == 0 }), 'the session is terminated');
nowhere('after its end', 0);
slow();
sql("SELECT millm.download('millm-test/private', 'FP16', $secret)");
ok(bytes('private', 50000), 'a download under way');
sql(q(SELECT millm.cancel('private')));
is(sql(q(SELECT millm.wait('private'))), 'error', 'is canceled');
nowhere('after cancel()', 0);
sql("SELECT millm.retry('private', $secret)");
ok(bytes('private', 50000), 'and again');
sql(q(SELECT millm.delete('private')));
ok(wait_true(sub { sql('SELECT count(*) FROM millm.trash') == 0 }), 'is deleted');
ok(wait_true(sub { (times_in_shared_memory() // 0) == 0 }), 'and with it the token');
nowhere('after delete()', 0);

# --- A restart forgets it -----------------------------------------------------------------------------------------
slow();
sql(q(SELECT millm.delete('gated')));
ok(wait_true(sub { sql('SELECT count(*) FROM millm.trash') == 0 }), 'deleted');
sql("SELECT millm.download('millm-test/gated', 'FP16', $secret)");
ok(bytes('gated', 300000), 'a gated download under way');
$node->restart;
$postmaster = slurp_file($node->data_dir . '/postmaster.pid') =~ /^(\d+)/ ? $1 : die;
is(sql(q(SELECT millm.wait('gated'))), 'error', 'after a restart it cannot go on');
is(sql(q(SELECT error_code FROM millm.models)), 'GATED_MODEL_NO_TOKEN', 'which the row says');
my @parts = glob("$base/cache/huggingface/millm-test--gated--FP16/.partial-*model.safetensors");
cmp_ok(@parts ? -s $parts[0] : 0, '>=', 200000, 'what has come is kept');
is((sqlstate($node, q(SELECT millm.retry('gated'))))[0] . sql(q(SELECT millm.wait('gated'))), 'error', 'retry() without a token changes nothing');
ok(-s $parts[0] >= 200000, 'it is kept still');
$hub->faults;
sql("SELECT millm.retry('gated', $secret)");
is(sql(q(SELECT millm.wait('gated'))), 'ready', 'retry() with a token goes on');
my ($first) = map { ($_->{range} // '') =~ /bytes=(\d+)-/ ? $1 : 0 } grep { $_->{port} eq 'cdn' && $_->{path} =~ /model\.safetensors/ } $hub->requests;
cmp_ok($first, '>=', 200000, 'where it was');
nowhere('afterwards', 0);
ok(!(grep { $_->{port} eq 'cdn' && $_->{authorization} } $hub->requests), 'another host never had it');

# --- Which one counts: argument, file, setting, environment ------------------------------------------------------------
my $preview = sub { (sqlstate($node, q(SELECT millm.preview('millm-test/private') ->> 'name')))[0] };
my $set = sub { $node->append_conf('postgresql.conf', "$_[0] = '$_[1]'"); $node->reload; };
{
	local $ENV{HF_TOKEN} = $token;
	$node->restart;
}
is($preview->(), '', 'HF_TOKEN');
$set->('millm.hf_token', 'hf_nogrant');
ok(wait_true(sub { $preview->() eq 'ML013' }), 'millm.hf_token comes before it');
chmod 0600, $place;
$set->('millm.hf_token_file', $place);
ok(wait_true(sub { $preview->() eq '' }), 'millm.hf_token_file before that');
is((sqlstate($node, q(SELECT millm.preview('millm-test/private', 'hf_nogrant'))))[0], 'ML013', 'and the argument before all');

# --- 32 of them ------------------------------------------------------------------------------------------------------
# nobody answers there, so all are queued
$node->append_conf('postgresql.conf', "millm.hf_endpoint = 'http://127.0.0.1:9'");
$node->reload;
ok(wait_true(sub { sql('SHOW millm.hf_endpoint') eq 'http://127.0.0.1:9' }), 'no hub');
my $many = sub { join ' ', map { "SELECT millm.download('somebody/model-$_', hf_token => 'hf_good_$_');" } 1 .. $_[0] };
my ($state, $error) = sqlstate($node, 'BEGIN; ' . $many->(33) . ' COMMIT');
is($state, 'ML020', 'the 33rd access token is SERVER_BUSY');
like($error, qr/too many downloads with an access token of their own.*DETAIL:  At most 32 are possible\..*HINT:  Try again when some of them have ended/s, 'which says how many there may be');
is(sql('SELECT count(*) FROM millm.models WHERE name LIKE $$model-%$$'), 0, 'nothing has happened');
is((sqlstate($node, 'BEGIN; ' . $many->(32) . ' ROLLBACK'))[0], '', '32 are not too many, and ROLLBACK frees their places');
is((sqlstate($node, 'BEGIN; ' . $many->(32) . ' ROLLBACK'))[0], '', 'again');
unlike(slurp_file($node->logfile), qr/\Q$token\E|PANIC|TRAP/, 'the log has none of them, nor a crash');
$node->stop;
done_testing();

# The two background workers and their helper programs: what they are given, and what happens when one of them ends.
use strict;
use warnings;
use Cwd qw(abs_path);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

$ENV{HF_TOKEN} = 'hf_of_the_environment';
my $node = new_server('workers');

sub status { my ($columns) = @_; return $node->safe_psql('postgres', "SELECT $columns FROM millm.status()"); }
sub ready { return wait_true(sub { status("engine_state = 'ready' AND hub_state = 'ready'") eq 't' }); }
sub process_file { my ($pid, $file) = @_; return -r "/proc/$pid/$file" ? slurp_file("/proc/$pid/$file") : ''; }
sub parent { return process_file($_[0], 'status') =~ /^PPid:\s+(\d+)/m ? $1 : 0; }

# --- As they are started -----------------------------------------------------------------------
ok(ready(), 'both helpers become ready');
is(status('engine_version'), '1.0.0', 'the engine tells its version');
is(status('restarts, last_exit, model, context_length'), '0|||', 'nothing is loaded, nothing has ended');
my ($engine, $hub) = split /\|/, status('engine_pid, hub_pid');
my $supervisor = parent($engine);
is(parent($hub), $supervisor, 'one parent has both');
like(process_file($supervisor, 'cmdline'), qr/millm supervisor/, 'the supervisor');
for ([ 'engine', $engine ], [ 'hub', $hub ])
{
	my ($name, $pid) = @$_;
	my @stat = split / /, (process_file($pid, 'stat') =~ s/^.*\) //r);
	is($stat[3], $pid, "$name: a session of its own");
	my $environment = process_file($pid, 'environ');
	unlike($environment, qr/hf_of_the_environment|PGDATA/, "$name: no token in its environment");
	like(process_file($pid, 'status'), qr/^SigBlk:\s+0+$/m, "$name: no signal blocked");
	my %fd = map { $_ => readlink("/proc/$pid/fd/$_") // '' } map { m{(\d+)$} } glob("/proc/$pid/fd/*");
	is($fd{0}, '/dev/null', "$name: stdin is /dev/null");
	like($fd{$_}, qr/^pipe:/, "$name: fd $_ is the log") for 1, 2;
	like($fd{3}, qr/^socket:/, "$name: fd 3 is the control socket");
	unlike(join(' ', values %fd), qr/\Q@{[ $node->data_dir ]}\E/, "$name: nothing of the server is open in it");
	my $socket = $node->data_dir . "/pgsql_tmp.millm/$name.sock";
	is(sprintf('%o', (stat $socket)[2] & 0777), '600', "$name: its socket is the server's alone");
}
is(sprintf('%o', (stat $node->data_dir . '/pgsql_tmp.millm')[2] & 0777), '700', 'and the directory');

# --- A helper ends ---------------------------------------------------------------------------------
kill('KILL', $hub);
ok(wait_true(sub { my $pid = status('hub_pid'); $pid ne '' && $pid ne $hub && ready() }), 'a killed hub is started again');
is(status('engine_pid'), $engine, 'the engine is the same');
kill('SEGV', $engine);
ok(wait_true(sub { my $pid = status('engine_pid'); $pid ne '' && $pid ne $engine && ready() }), 'a crashed engine is started again');
like(status('last_exit'), qr/signal 11/, 'and status() says how it ended');
is(status('restarts'), 1, 'and how often');

# --- A worker ends ---------------------------------------------------------------------------------
my $session = MillmTest::Session->new($node);
$session->query('BEGIN; CREATE TABLE t (n int)');
($engine, $hub) = split /\|/, status('engine_pid, hub_pid');
kill('TERM', $supervisor);
# the postmaster starts it again after a second
ok(wait_true(sub { $node->psql('postgres', "SELECT 1 / (engine_pid <> $engine AND engine_state = 'ready')::int FROM millm.status()") == 0 }), 'a terminated supervisor comes back, with new helpers');
ok(!kill(0, $_), "process $_ is gone") for $engine, $hub;
is($session->query('COMMIT')->{state}, '', 'a session did not notice');

my $clerk = sub { $node->safe_psql('postgres', "SELECT pid FROM pg_stat_activity WHERE backend_type = 'millm clerk' AND datname = 'postgres'") };
my $first = $clerk->();
like($first, qr/^\d+$/, 'the clerk is connected');
is(status('engine_state'), 'ready', 'the engine is ready');
$engine = status('engine_pid');
$node->safe_psql('postgres', "SELECT pg_terminate_backend($first)");
ok(wait_true(sub { my $pid = $clerk->(); $pid ne '' && $pid ne $first }), 'a terminated clerk comes back');
is(status('engine_pid'), $engine, 'no helper noticed');
unlike(slurp_file($node->logfile), qr/hf_of_the_environment|all server processes terminated/, 'no token in the log, no crash of the server');

# --- A reload ---------------------------------------------------------------------------------------------
my $cache = abs_path($node->basedir) . '/other_cache';
$node->append_conf('postgresql.conf', "millm.cache_dir = '$cache'");
$node->reload;
ok(wait_true(sub { -e "$cache/.lock" }), 'another cache directory is used after a reload');
is(sprintf('%o', (stat $cache)[2] & 0777), '700', 'which is ours alone');
$node->append_conf('postgresql.conf', "millm.cache_dir = '@{[ abs_path($node->data_dir) ]}/cache'");
$node->reload;
ok(wait_true(sub { my ($state, $error) = sqlstate($node, q(SELECT millm.download('owner/name', 'FP16'))); $state eq 'ML003' && $error =~ /inside the data directory/ }),
	'a cache inside the data directory is refused');
$node->stop;

# --- Surroundings in which nothing can work ------------------------------------------------------------------
my ($stdout, $stderr);
$node = new_server('database', q(millm.database = 'llm'));
$node->psql('postgres', 'CREATE EXTENSION millm', stderr => \$stderr);
like($stderr, qr/WARNING:.*millm works in database "llm"/, 'CREATE EXTENSION in another database warns');
is((sqlstate($node, 'SELECT millm.generate($$x$$)'))[0], 'ML024', 'and its functions refuse: WRONG_DATABASE');
$node->stop;

$node = PostgreSQL::Test::Cluster->new('not_utf8');
$node->init(extra => [ '--encoding', 'LATIN1', '--locale', 'C' ]);
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'millm'\nmillm.cache_dir = '@{[ abs_path($node->basedir) ]}/cache'\n");
$node->start;
$node->psql('postgres', 'CREATE EXTENSION millm', stderr => \$stderr);
like($stderr, qr/WARNING:.*encoding LATIN1/, 'CREATE EXTENSION warns of an encoding');
like((sqlstate($node, 'SELECT millm.tokenize($$x$$)'))[1], qr/ERROR:  55000: .*millm needs UTF8/, 'and the functions refuse');
$node->stop;

$node = PostgreSQL::Test::Cluster->new('no_workers');
$node->init(extra => [ '--encoding', 'UTF8', '--locale', 'C' ]);
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'millm'\nmax_worker_processes = 0\nmillm.cache_dir = '@{[ abs_path($node->basedir) ]}/cache'\n");
$node->start;
$node->safe_psql('postgres', 'CREATE EXTENSION millm');
my ($state, $error) = sqlstate($node, 'SELECT millm.generate($$x$$)');
is($state, 'ML019', 'without a place for the workers: ENGINE_UNAVAILABLE');
like($error, qr/supervisor is not running.*max_worker_processes is 0/s, 'which says why');
$node->stop;

$node->append_conf('postgresql.conf', "shared_preload_libraries = ''");
$node->start;
($state, $error) = sqlstate($node, 'SELECT millm.generate($$x$$)');
like($error, qr/must be preloaded.*shared_preload_libraries/s, 'not preloaded: so it says');
is($node->safe_psql('postgres', 'SELECT count(*) > 20 FROM millm.errors'), 't', 'the list of errors is there all the same');
$node->psql('postgres', 'DROP EXTENSION millm; CREATE EXTENSION millm', stderr => \$stderr);
like($stderr, qr/WARNING:.*not preloaded/, 'CREATE EXTENSION warns');
$node->stop;
done_testing();

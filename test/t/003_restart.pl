# What survives: of the server's restarts, of a helper's death, of databases that come and go, on a standby.
use strict;
use warnings;
use Cwd qw(abs_path);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;
use TestHub;

my $hub = TestHub->new;
my $node = new_server('restart', '# the test hub', "millm.hf_endpoint = '@{[ $hub->endpoint ]}'", 'restart_after_crash = on');
my $cache = abs_path($node->basedir) . '/cache';

sub sql { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
sub slow { $hub->faults({ where => 'any', bytes_per_second => 100000 }); }
# Bytes have come: at least so many
sub bytes { my ($name, $bytes) = @_; return wait_true(sub { sql("SELECT bytes >= $bytes FROM millm.progress WHERE name = '$name'") eq 't' }); }
# Requests for the rest of a file, after the first n requests
sub resumed { my ($n) = @_; my @later = $hub->requests; return scalar grep { ($_->{range} // '') =~ /bytes=[1-9]/ } @later[$n .. $#later]; }

# --- The server restarts in a download ------------------------------------------------------------------
$hub->faults;
sql(q(SELECT millm.download('millm-test/tiny-gpt2', 'FP16')));
is(sql(q(SELECT millm.wait('tiny-gpt2'))), 'ready', 'a model');
is(sql(q(SELECT millm.load('tiny-gpt2'))), 'loaded', 'which is loaded');
slow();
sql(q(SELECT millm.download('millm-test/tiny-llama', 'FP16', hf_token => 'hf_good')));
ok(bytes('tiny-llama', 200000), 'a download under way');
my $requests = () = $hub->requests;
$node->restart;
is(sql(q(SELECT status FROM millm.models WHERE name = 'tiny-gpt2')), 'ready', 'after a restart the model is ready, not loaded');
is(sql(q(SELECT millm.wait('tiny-llama'))), 'ready', 'the download goes on by itself');
ok(resumed($requests), 'where it was');
is(sql(q(SELECT millm.load('tiny-llama'))), 'loaded', 'and the model is whole');

# --- The hub's client dies in a download -------------------------------------------------------------------
slow();
sql(q(SELECT millm.download('millm-test/sharded', 'FP16')));
ok(bytes('sharded', 200000), 'a download under way');
kill('KILL', sql('SELECT hub_pid FROM millm.status()'));
is(sql(q(SELECT millm.wait('sharded'))), 'ready', 'a killed millm-hub ends no download');
is(sql('SELECT model FROM millm.status()'), 'tiny-llama', 'and no model');

# --- Something else crashes: PostgreSQL itself starts again ---------------------------------------------------
my $engine = sql('SELECT engine_pid FROM millm.status()');
my $backend = MillmTest::Session->new($node);
kill('KILL', $backend->pid);
ok(wait_true(sub { my ($rc, $pid) = $node->psql('postgres', 'SELECT engine_pid FROM millm.status()'); ($rc // 1) == 0 && $pid =~ /^\d+$/ && $pid != $engine }),
	'after a crash of the server there is another engine');
ok(wait_true(sub { !kill(0, $engine) }), 'and the first is gone');
ok(wait_true(sub { $node->psql('postgres', q(SELECT millm.load('tiny-gpt2'))) == 0 }), 'which loads');

# --- A model for every start -------------------------------------------------------------------------------------
$node->append_conf('postgresql.conf', "millm.auto_load_model = 'tiny-llama'");
$node->restart;
ok(wait_true(sub { sql('SELECT model FROM millm.status()') eq 'tiny-llama' }), 'millm.auto_load_model');
sql('SELECT millm.unload()');
$node->append_conf('postgresql.conf', "millm.auto_load_model = 'nobody'");
$node->restart;
ok(wait_true(sub { slurp_file($node->logfile) =~ /millm.auto_load_model is "nobody", but no such model is ready/ }), 'a wrong one is in the log');

# --- A standby: it serves, and writes nothing -----------------------------------------------------------------------
$node->append_conf('postgresql.conf', "wal_level = replica\nmax_wal_senders = 4\nmillm.auto_load_model = ''");
$node->restart;
ok(wait_true(sub { sql(q(SELECT engine_state FROM millm.status())) eq 'ready' }), 'up again');
$node->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'base', has_streaming => 1);
$standby->start;
$node->wait_for_catchup($standby);
ok(!-e $standby->data_dir . '/pgsql_tmp.millm/base', 'the run directory is not part of a base backup');
is($standby->safe_psql('postgres', q(SELECT millm.load('tiny-gpt2'))), 'loaded', 'a standby loads');
like($standby->safe_psql('postgres', q(SELECT count(millm.generate('Hi', raw => true, max_tokens => 4)))), qr/^1$/, 'and generates');
is($standby->safe_psql('postgres', q(SELECT status FROM millm.models WHERE name = 'tiny-gpt2')), 'loaded', 'its own state shows');
is(sql(q(SELECT status FROM millm.models WHERE name = 'tiny-gpt2')), 'ready', 'only there');
like((sqlstate($standby, q(SELECT millm.download('millm-test/extras', 'FP16'))))[1], qr/standby/, 'it downloads nothing');
is((sqlstate($standby, q(SELECT millm.delete('tiny-llama'))))[0], '25006', 'it deletes nothing');
is((sqlstate($standby, "SELECT millm.register_local('$ENV{MILLM_FIXTURES}/tiny/llama')"))[0], '25006', 'it registers nothing');
$node->stop;
$standby->promote;
$hub->faults;
ok(wait_true(sub { $standby->psql('postgres', q(SELECT millm.download('millm-test/extras', 'FP16'))) == 0 }), 'promoted, it owns the cache and downloads');
is($standby->safe_psql('postgres', q(SELECT millm.wait('extras'))), 'ready', 'to the end');
$standby->stop;

# --- A database that is not there yet, and goes away ------------------------------------------------------------------
$node = new_server('late', q(millm.database = 'llm'), "millm.hf_endpoint = '@{[ $hub->endpoint ]}'");
my $clerk = sub { $node->safe_psql('postgres', q(SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'millm clerk' AND datname = 'llm')) };
ok(wait_true(sub { $clerk->() == 1 }), 'the clerk connects when the database is there');
$node->safe_psql('llm', q(SELECT millm.download('millm-test/tiny-gpt2', 'FP16')));
is($node->safe_psql('llm', q(SELECT millm.wait('tiny-gpt2'))), 'ready', 'and works');
$node->safe_psql('postgres', 'DROP DATABASE llm WITH (FORCE)');
ok(wait_true(sub { $clerk->() == 0 }), 'it goes with the database');
$node->safe_psql('postgres', 'SELECT pg_sleep(3)');
my @failed = slurp_file($node->logfile) =~ /FATAL:\s+database "llm" does not exist/g;
cmp_ok(scalar @failed, '<=', 2, 'and does not fill the log while there is none');
$node->safe_psql('postgres', 'CREATE DATABASE llm');
ok(wait_true(sub { $clerk->() == 1 }), 'it comes back with the next one');
$node->safe_psql('llm', 'CREATE EXTENSION millm');
$node->safe_psql('llm', "SELECT millm.register_local('$ENV{MILLM_FIXTURES}/tiny/llama')");
is($node->safe_psql('llm', q(SELECT millm.load('llama'))), 'loaded', 'whose extension works');
$node->stop;
done_testing();

# Copies of the registry: a dump restored beside an empty cache, another database, a standby to which no files travelled.
use strict;
use warnings;
use Cwd qw(abs_path);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;
use TestHub;

my $hub = TestHub->new;
my @conf = ('# the test hub', "millm.hf_endpoint = '@{[ $hub->endpoint ]}'");
my $node = new_server('original', @conf, 'wal_level = replica', 'max_wal_senders = 3');
my $base = abs_path($node->basedir);
sub sql { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }

$hub->faults;
sql(q(SELECT millm.download('millm-test/tiny-llama', 'FP16')));
sql("SELECT millm.register_local('$ENV{MILLM_FIXTURES}/tiny/gpt2', 'Q4', name => 'made')");
sql("SELECT millm.wait('$_')") for qw(tiny-llama made);
mkdir "$base/away";
system("cp $ENV{MILLM_FIXTURES}/tiny/llama/* $base/away/");
sql("SELECT millm.register_local('$base/away')");
my $models = sql('SELECT id, name, source, quantization, status FROM millm.models ORDER BY id');

# --- Restored, with a cache of its own -----------------------------------------------------------------------
my $dump = "$base/dump.sql";
$node->command_ok([ 'pg_dump', '-f', $dump, $node->connstr('postgres') ], 'pg_dump');
my $copy = new_server('copy', @conf);
$copy->safe_psql('postgres', 'DROP EXTENSION millm');
$copy->command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-f', $dump, $copy->connstr('postgres') ], 'restored');
is($copy->safe_psql('postgres', 'SELECT id, name, source, quantization, status FROM millm.models ORDER BY id'), $models, 'the same models');
rename "$base/away", "$base/gone";
for ([ 'tiny-llama', 'Download it again with millm\.retry\(\)' ], [ 'made', 'Make it again with millm\.retry\(\)' ], [ 'away', 'Put the directory back, or delete the model' ])
{
	my ($name, $hint) = @$_;
	my ($state, $error) = sqlstate($copy, "SELECT millm.load('$name')");
	is($state, 'ML023', "$name: its files are missing");
	like($error, qr/the files of model "$name" are missing.*DETAIL:  There is no ".*\/config\.json"\..*HINT:  $hint\./s, 'which it says') or diag $error;
	is((sqlstate($copy, "SELECT millm.estimate_memory('$name')"))[0], 'ML023', 'nor can its memory be known');
}
is((sqlstate($copy, q(SELECT millm.retry('away'))))[0], '22023', 'a directory of somebody is not made again');
$copy->safe_psql('postgres', "SELECT millm.retry('$_')") for qw(tiny-llama made);
is($copy->safe_psql('postgres', "SELECT millm.wait('$_')"), 'ready', "retry() brings $_") for qw(tiny-llama made);
is($copy->safe_psql('postgres', "SELECT millm.load('$_')"), 'loaded', "$_ loads") for qw(tiny-llama made);
is((sqlstate($copy, q(SELECT millm.retry('tiny-llama'))))[0], '22023', 'what is there needs no retry');
rename "$base/gone", "$base/away";
is($copy->safe_psql('postgres', q(SELECT millm.load('away'))), 'loaded', 'a directory that is back loads');

# --- Another database of the same server ------------------------------------------------------------------------
is((sqlstate($copy, 'CREATE DATABASE clone TEMPLATE postgres'))[0], '55006', 'a database that millm works in is no template');
$copy->safe_psql('postgres', 'CREATE DATABASE clone TEMPLATE template0');
$copy->command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-f', $dump, $copy->connstr('clone') ], 'restored into another database');
for my $statement ('SELECT * FROM millm.models', q(SELECT millm.load('tiny-llama')), q(SELECT millm.delete('tiny-llama')), q(SELECT millm.download('millm-test/tiny-gpt2')),
	'SELECT * FROM millm.memory()', 'SELECT * FROM millm.cache_usage()', q(SELECT millm.architecture('tiny-llama')), q(SELECT millm.estimate_memory('tiny-llama')))
{
	my ($rc, $out, $err) = $copy->psql('clone', "\\set VERBOSITY verbose\n$statement");
	like($err, qr/ERROR:  ML024: millm works in database "postgres", not in "clone"/, "$statement there is refused by name");
}
$copy->safe_psql('clone', 'DROP EXTENSION millm');
is($copy->safe_psql('postgres', q(SELECT model FROM millm.status())), 'away', 'DROP EXTENSION there unloads nothing');
ok(-f abs_path($copy->basedir) . '/cache/huggingface/millm-test--tiny-llama--FP16/model.safetensors', 'and removes no file');
is($copy->safe_psql('postgres', 'SELECT status FROM millm.models WHERE name = $$tiny-llama$$'), 'ready', 'every model is ready as before');
$copy->stop;

# --- A standby whose cache is empty ---------------------------------------------------------------------------------
$node->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'base', has_streaming => 1);
$standby->append_conf('postgresql.conf', "millm.cache_dir = '" . abs_path($standby->basedir) . "/cache'");
$standby->start;
$node->wait_for_catchup($standby);
my ($state, $error) = sqlstate($standby, q(SELECT millm.load('tiny-llama')));
is($state, 'ML023', 'on a standby a row whose files did not travel says so');
like($error, qr/HINT:  A standby downloads nothing: copy the directory from the primary's model cache\./, 'and what to do') or diag $error;
is((sqlstate($standby, q(SELECT millm.retry('tiny-llama'))))[0] =~ /^(25006|ML003)$/ ? 1 : 0, 1, 'retry() is the primary\'s');
is((sqlstate($standby, q(SELECT millm.cancel('tiny-llama'))))[0], '25006', 'so is cancel()');
is($standby->safe_psql('postgres', q(SELECT millm.load('away'))), 'loaded', 'a directory that both can see loads');
is($standby->safe_psql('postgres', q(SELECT device, used_bytes > 0 FROM millm.memory())), 'cpu|t', 'memory() works there');
is($standby->safe_psql('postgres', q(SELECT millm.architecture('away')->>'model_type')), 'llama', 'architecture() too');
$node->stop;
$standby->promote;
ok(wait_true(sub { $standby->psql('postgres', q(SELECT millm.retry('tiny-llama'))) == 0 }), 'promoted, it may write');
is($standby->safe_psql('postgres', q(SELECT millm.wait('tiny-llama'))), 'ready', 'and has the files again');
is($standby->safe_psql('postgres', q(SELECT millm.load('tiny-llama'))), 'loaded', 'which load');
$standby->stop;
unlike(slurp_file($_->logfile), qr/PANIC|TRAP/, 'no crash on the way') for $node, $copy, $standby;
done_testing();

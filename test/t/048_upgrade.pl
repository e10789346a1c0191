# pg_upgrade: the registry, its sequence and the trash go along, the files stay where they are, and the workers keep out of it.
use strict;
use warnings;
use Cwd qw(abs_path getcwd);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;
use TestHub;

my $hub = TestHub->new;
$hub->faults;
my $old = new_server('old', '# the test hub', "millm.hf_endpoint = '@{[ $hub->endpoint ]}'");
my $cache = abs_path($old->basedir) . '/cache';
my $columns = 'id, uuid, name, source, quantization, status, attempt, local_path, directory, error_code';
$old->safe_psql('postgres', q(SELECT millm.download('millm-test/tiny-llama', 'FP16'), millm.download('millm-test/tiny-gpt2', 'Q4'), millm.download('millm-test/tiny-f16', 'FP16')));
is($old->safe_psql('postgres', "SELECT millm.wait('$_')"), 'ready', "$_ is there") for qw(tiny-llama tiny-gpt2 tiny-f16);
$old->safe_psql('postgres', "SELECT millm.register_local('$ENV{MILLM_FIXTURES}/tiny/llama', name => 'local')");
$old->safe_psql('postgres', q(CREATE ROLE looker; SELECT millm.grant_user('looker')));
my $rows = $old->safe_psql('postgres', "SELECT $columns FROM millm.registry WHERE name <> 'tiny-f16' ORDER BY id");
my $owner = $old->safe_psql('postgres', 'SELECT id FROM millm.owner');
# deleted, and killed before the files were; this server does not come to it any more
kill('STOP', my $pid = $old->safe_psql('postgres', 'SELECT hub_pid FROM millm.status()'));
$old->safe_psql('postgres', q(SELECT millm.delete('tiny-f16')));
$old->append_conf('postgresql.conf', q(shared_preload_libraries = ''));
kill_server($old, undef, $pid);
is($old->safe_psql('postgres', 'SELECT count(*) FROM millm.trash'), 1, 'there is trash');
$old->stop;

my $new = PostgreSQL::Test::Cluster->new('new');
$new->init(extra => [ '--encoding', 'UTF8', '--locale', 'C' ]);
$new->append_conf('postgresql.conf', "shared_preload_libraries = 'millm'\nmillm.cache_dir = '$cache'\nmillm.hf_endpoint = '@{[ $hub->endpoint ]}'\n");
my ($bin) = PostgreSQL::Test::Utils::run_command([ 'pg_config', '--bindir' ]);
# it writes to the directory that it is started in
my ($from, $to) = map { abs_path($_->data_dir) } $old, $new;
my $cwd = getcwd();
chdir PostgreSQL::Test::Utils::tempdir();
command_ok([ 'pg_upgrade', '--no-sync', '-b', $bin, '-B', $bin, '-d', $from, '-D', $to, '-s', $new->host, '-p', $old->port, '-P', $new->port ], 'pg_upgrade');
chdir $cwd;
$new->start;
sub sql { my ($sql) = @_; return $new->safe_psql('postgres', $sql); }
is(sql("SELECT $columns FROM millm.registry ORDER BY id"), $rows, 'the same rows');
is(sql('SELECT id FROM millm.owner'), $owner, 'of the same owner');
for my $name ('tiny-llama', 'tiny-gpt2', 'local')
{
	is(sql("SELECT millm.load('$name')"), 'loaded', "$name loads");
	is(sql(q(SELECT millm.generate('x', raw => true, max_tokens => 2) IS NOT NULL)), 't', 'and works');
}
ok(wait_true(sub { sql('SELECT count(*) FROM millm.trash') == 0 }), 'the trash is emptied');
ok(!-e "$cache/huggingface/millm-test--tiny-f16--FP16", 'its files are gone');
is(sql(q(SET ROLE looker; SELECT count(*) FROM millm.models)), 3, 'grants went along');
cmp_ok(sql(q(SELECT millm.download('millm-test/tiny-f16', 'FP16'))), '>', 4, 'ids go on');
is(sql(q(SELECT millm.wait('tiny-f16'))), 'ready', 'downloads too');
sql(q(SELECT millm.delete('tiny-llama')));
ok(wait_true(sub { !-e "$cache/huggingface/millm-test--tiny-llama--FP16" }), 'what the old cluster has downloaded, the new one removes');
unlike(slurp_file($new->logfile), qr/PANIC|TRAP/, 'no crash on the way');
$new->stop;
done_testing();

# API keys from the bridge's side: a login role that has nothing, and becomes what a key's role is; revoked, dumped, restored, and nowhere in the clear.
use strict;
use warnings;
use Cwd qw(abs_path);
use Digest::SHA;
use File::Find ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

my $node = new_server('keys', '# all that can be logged', 'log_statement = all', 'log_duration = on', 'log_parameter_max_length = -1', 'debug_print_plan = on');
my $base = abs_path($node->basedir);
sub sql { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
# What the bridge does for one request, in one transaction
sub request
{
	my ($session, $key, $sql) = @_;
	$session->query('BEGIN');
	my $hash = unpack('H*', Digest::SHA::sha256($key));
	my $known = $session->query("SELECT set_config('role', role, true) FROM millm.authenticate('\\x$hash')");
	my $reply = $known->{state} ? $known : $session->query($sql);
	$session->query($reply->{state} ? 'ROLLBACK' : 'COMMIT');
	$session->query('DISCARD ALL');
	return $reply;
}

sql(q(CREATE ROLE millm_bridge LOGIN NOINHERIT; CREATE ROLE app; CREATE ROLE operator; CREATE ROLE millm_admin LOGIN;
	SELECT millm.grant_bridge('millm_bridge'), millm.grant_user('app'), millm.grant_admin('operator'), millm.grant_admin('millm_admin');
	GRANT app, operator TO millm_admin WITH ADMIN OPTION));
# made by one who is no superuser
my $admin = MillmTest::Session->new($node, user => 'millm_admin');
my $app = $admin->query(q(SELECT millm.create_api_key('app', 'app', timeout => '1 min')))->{rows}[0];
my $operator = $admin->query(q(SELECT millm.create_api_key('operator', 'operator')))->{rows}[0];
like("$app $operator", qr/^(millm-[\w-]{43}) (?!\1)millm-[\w-]{43}$/, 'two keys');
my $shown = sql('SELECT query FROM pg_stat_activity WHERE pid = ' . $admin->pid);
like($shown, qr/create_api_key/, 'pg_stat_activity has the statement');
unlike($shown, qr/\Q@{[ substr($operator, 6) ]}/, 'and not the key');

# --- GRANT decides -------------------------------------------------------------------------------------------------
my $bridge = MillmTest::Session->new($node, user => 'millm_bridge');
my $delete = q(SELECT millm.delete('nobody'));
is(request($bridge, $app, 'SELECT current_user')->{rows}[0], 'app', 'a request is its key\'s role');
is(request($bridge, $app, 'SELECT count(*) FROM millm.models')->{rows}[0], 0, 'a user looks at models');
is(request($bridge, $app, $delete)->{state}, '42501', 'and may not delete one');
is(request($bridge, $operator, $delete)->{state}, 'ML001', 'an admin may');
sql(q(SELECT millm.grant_admin('app')));
is(request($bridge, $app, $delete)->{state}, 'ML001', 'a GRANT counts at once');
sql('REVOKE EXECUTE ON FUNCTION millm.delete(text) FROM app');
is(request($bridge, $app, $delete)->{state}, '42501', 'a REVOKE, too');
is($bridge->query('SELECT count(*) FROM millm.models')->{state}, '42501', 'between requests it may nothing');
is($bridge->query('SELECT current_user')->{rows}[0], 'millm_bridge', 'and is nobody else');
is($bridge->query('SET ROLE millm_admin')->{state}, '42501', 'nor can it be anybody without a key');
for my $wrong ('', substr($app, 0, -1), "$app ", lc $app, 'millm-' . 'A' x 43)
{
	my $reply = request($bridge, $wrong, 'SELECT current_user');
	is("$reply->{state} $reply->{message}", 'ML027 invalid API key', 'a wrong key: "' . substr($wrong, 0, 8) . '..."');
}

SKIP: {
	skip 'before PostgreSQL 16 NOINHERIT says it all', 2 if sql('SHOW server_version_num') < 160000;
	sql(q(CREATE ROLE heir LOGIN NOINHERIT; CREATE ROLE rich; GRANT rich TO heir WITH INHERIT TRUE));
	my ($state, $error) = sqlstate($node, q(SELECT millm.grant_bridge('heir')));
	is($state, '22023', 'a membership that inherits is refused');
	like($error, qr/GRANT rich TO heir WITH INHERIT FALSE/, 'with what to do');
}

# --- A bridge that comes later, and a key that comes after it ----------------------------------------------------------
sql(q(CREATE ROLE second LOGIN NOINHERIT; SELECT millm.grant_bridge('second')));
my $second = MillmTest::Session->new($node, user => 'second');
is(request($second, $app, 'SELECT current_user')->{rows}[0], 'app', 'another bridge knows the keys that there are');
sql('CREATE ROLE late');
# both at once: whoever comes second sees what the first has done
my ($one, $two) = map { MillmTest::Session->new($node) } 1 .. 2;
$one->query('BEGIN');
my $late = $one->query(q(SELECT millm.create_api_key('late', 'late')))->{rows}[0];
sql('CREATE ROLE third LOGIN NOINHERIT');
$two->send(q(SELECT millm.grant_bridge('third')));
ok(wait_true(sub { sql(q(SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND pid = ) . $two->pid) == 1 }), 'a key and a bridge at the same time');
$one->query('COMMIT');
is($two->until_ready->{state}, '', 'both are made');
my $third = MillmTest::Session->new($node, user => 'third');
for my $session ($bridge, $second, $third) { is(request($session, $late, 'SELECT current_user')->{rows}[0], 'late', 'and the new key is for every bridge'); }

# --- Revoked ---------------------------------------------------------------------------------------------------------
is($admin->query(q(SELECT millm.revoke_api_key('operator')))->{state}, '', 'revoked by its maker');
is(request($bridge, $operator, 'SELECT 1')->{state}, 'ML027', 'at once');
is(request($bridge, $app, 'SELECT 1')->{rows}[0], 1, 'the others stay');
is($admin->query(q(SELECT millm.revoke_api_key('late')))->{state}, '42501', 'not by one who could not have made it');

# --- In the clear: nowhere ----------------------------------------------------------------------------------------------
my $secret = qr/\Q@{[ substr($app, 6) ]}/;
$node->stop;
my @found;
File::Find::find({ no_chdir => 1, wanted => sub { push @found, $_ if -f && (eval { slurp_file($_) } // '') =~ $secret } }, $base);
is("@found", '', 'the key is in no file of the server');
my $log = slurp_file($node->logfile);
like($log, qr/create_api_key\('app'/, 'the log has the statement');
unlike($log, $secret, 'and not the key');
$node->start;

# --- Dumped and restored ---------------------------------------------------------------------------------------------------
# of a role that is dropped, only a number is left, which there may be somebody else's
sql(q(CREATE ROLE dropped; SELECT length(millm.create_api_key('dropped', 'dropped')); DROP ROLE dropped; ALTER ROLE late RENAME TO "late ""2"""));
my $keys = sql(q(SELECT k.name, k.role, k.timeout, k.created_at, k.id FROM millm.api_keys k WHERE name <> 'dropped' ORDER BY name));
my $dump = "$base/dump.sql";
$node->command_ok([ 'pg_dumpall', '-f', $dump, '-d', $node->connstr('postgres') ], 'pg_dumpall');
my $copy = PostgreSQL::Test::Cluster->new('copy');
$copy->init(extra => [ '--encoding', 'UTF8', '--locale', 'C' ]);
$copy->append_conf('postgresql.conf', "shared_preload_libraries = 'millm'\nmillm.cache_dir = '$base/copy_cache'\n");
$copy->start;
my ($out, $err) = run_command([ 'psql', '-X', '-q', '-f', $dump, '-d', $copy->connstr('postgres') ]);
is(join("\n", grep { /ERROR/ && !/role ".*" already exists/ } split /\n/, $err), '', 'restored');
is($copy->safe_psql('postgres', 'SELECT k.name, k.role, k.timeout, k.created_at, k.id FROM millm.api_keys k ORDER BY name'), $keys, 'the same keys, but that of no role');
$bridge = MillmTest::Session->new($copy, user => 'millm_bridge');
is(request($bridge, $app, 'SELECT current_user')->{rows}[0], 'app', 'which work there');
is(request($bridge, $late, 'SELECT current_user')->{rows}[0], 'late "2"', 'whatever its role is called');
is(request($bridge, $operator, 'SELECT 1')->{state}, 'ML027', 'or do not');
cmp_ok($copy->safe_psql('postgres', q(CREATE ROLE more; SELECT length(millm.create_api_key('more', 'more')); SELECT max(id) FROM millm.api_keys)) =~ /(\d+)$/ ? $1 : 0,
	'>', 4, 'ids go on');
$_->stop for $copy, $node;
done_testing();

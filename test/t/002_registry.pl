# Models come and go: transactions, the hub, events, cancel, retry, delete, locks, dumps.
use strict;
use warnings;
use Cwd qw(abs_path);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;
use TestHub;

my $hub = TestHub->new;
my $node = new_server('registry', "# the test hub", "millm.hf_endpoint = '@{[ $hub->endpoint ]}'");
my $cache = abs_path($node->basedir) . '/cache';

sub sql { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
sub fails { my ($sql, $state, $what) = @_; my ($got, $error) = sqlstate($node, $sql); is($got, $state, $what) or diag $error; return $error; }
sub slow { $hub->faults({ where => 'any', bytes_per_second => 100000 }); }
sub row { my ($name) = @_; return sql("SELECT status, error_code FROM millm.models WHERE name = '$name'"); }
# so that every download passes the slow file itself, and none ends before we have looked
sub under_way { my ($name) = @_; return wait_true(sub { sql("SELECT status = 'downloading' AND download_progress > 0 FROM millm.models WHERE name = '$name'") eq 't' }); }

# --- A download follows the transaction -------------------------------------------------------------------
my $session = MillmTest::Session->new($node);
$session->query('LISTEN millm_progress');
$hub->faults;
is(sql(q(BEGIN; SELECT millm.download('millm-test/tiny-gpt2', 'FP16') > 0; ROLLBACK; SELECT count(*) FROM millm.models)), "t\n0", 'ROLLBACK: nothing happened');
my $other = MillmTest::Session->new($node);
$other->query('BEGIN');
my $id = $other->query(q(SELECT millm.download('millm-test/tiny-llama', 'FP16')))->{rows}[0];
like($id, qr/^\d+$/, 'download() returns an id');
is($other->query('SELECT status FROM millm.models')->{rows}[0], 'pending', 'which is pending');
is($other->query("SELECT millm.wait($id)")->{state}, 'ML007', 'wait() in the same transaction is refused');
$other->query('ROLLBACK');
ok(!-e "$cache/huggingface/millm-test--tiny-llama--FP16", 'and no file was made');

slow();
$id = sql(q(SELECT millm.download('millm-test/tiny-llama', 'FP16')));
my ($rc, $out, $err) = $node->psql('postgres', "SELECT millm.wait($id)");
is($out, 'ready', 'wait() returns ready');
like($err, qr/NOTICE:.* %/, 'after notices of the progress') or diag $err;
is(sql("SELECT name, repo_id, revision, quantization, status, download_progress, architecture, license IS NOT NULL, disk_size_mb, config->>'model_type', error_code FROM millm.models"),
	'tiny-llama|millm-test/tiny-llama|main|FP16|ready|100|LlamaForCausalLM|t|1|llama|', 'the row of millm.models');
ok(-f "$cache/huggingface/millm-test--tiny-llama--FP16/model.safetensors", 'the files are in the cache');

ok(wait_true(sub { sql("SELECT n_tup_upd > 0 FROM pg_stat_all_tables WHERE relid = 'millm.registry'::regclass") eq 't' }), 'autovacuum hears of what the clerk changes');

# The events that a LISTENer has had
my @events = $session->events(sub { $_[0]{event} eq 'model:download:complete' });
is($events[-1]{event}, 'model:download:complete', 'the last event is the end');
is($events[-1]{bytes_downloaded}, $events[-1]{total_bytes}, 'all came over the network');
my @progress = grep { $_->{event} eq 'model:download:progress' } @events;
cmp_ok(scalar @progress, '>=', 3, 'after some of the progress');
is(join(' ', map { $_->{progress} } @progress), join(' ', sort { $a <=> $b } map { $_->{progress} } @progress), 'which never went back');
is($progress[-1]{model_id}, $id, 'of that model');
cmp_ok($progress[-1]{total_bytes}, '>', 500000, 'with its size');
is_deeply([ grep { defined $_->{total_bytes} && $_->{total_bytes} == 0 || defined $_->{speed_mbps} && $_->{bytes_downloaded} == 0 } @progress ], [], 'nothing unknown is zero');
is_deeply([ grep { $_->{bytes_downloaded} > 0 && $_->{total_bytes} != $events[-1]{total_bytes} } @progress ], [], 'which is known before the first byte');

fails(q(SELECT millm.download('millm-test/tiny-llama', 'FP16', name => 'again')), 'ML002', 'the same repository again');
like(fails(q(SELECT millm.download('millm-test/tiny-gpt2', 'FP16', name => 'tiny-llama')), 'ML002', 'the same name again'), qr/id is $id/, 'which names the id');

# --- What the hub refuses is known at once ---------------------------------------------------------------------
$hub->faults;
fails(q(SELECT millm.download('millm-test/no-such', 'FP16')), 'ML013', 'no such repository');
fails(q(SELECT millm.download('millm-test/gated', 'FP16')), 'ML014', 'a gated one without a token');
fails(q(SELECT millm.download('millm-test/gated', 'FP16', hf_token => 'hf_wrong')), 'ML015', 'a gated one with a wrong token');
fails(q(SELECT millm.download('millm-test/unknown-arch', 'FP16')), 'ML017', 'an architecture that is not known');
fails(q(SELECT millm.download('millm-test/remote-code', 'FP16')), 'ML016', 'code of its own');
is(sql('SELECT count(*) FROM millm.models'), 1, 'none of them is there');

# --- A token of its own ---------------------------------------------------------------------------------------------
sql(q(SELECT millm.download('millm-test/gated', 'FP16', hf_token => 'hf_good')));
is(sql(q(SELECT millm.wait('gated'))), 'ready', 'a token opens a gated repository');
unlike(join("\n", map { process_text($_) } helper_pids()), qr/hf_good/, 'the token is in no command line and no environment');
unlike(sql('SELECT string_agg(r::text, $$ $$) FROM millm.registry r'), qr/hf_good/, 'and in no table');

# The server's own, in a file that nobody else may read
my $token_file = abs_path($node->basedir) . '/token';
append_to_file($token_file, "hf_good\n");
chmod 0644, $token_file;
$node->append_conf('postgresql.conf', "millm.hf_token_file = '$token_file'");
$node->reload;
my $download = q(BEGIN; SELECT millm.download('millm-test/private', 'FP16'); ROLLBACK);
ok(wait_true(sub { ($rc, $out, $err) = $node->psql('postgres', $download); $err =~ /others may read it/ }), 'a token file that others may read is not used');
chmod 0600, $token_file;
is((sqlstate($node, $download))[0], '', 'one of mode 0600 is');
$node->append_conf('postgresql.conf', "millm.hf_token_file = ''\nmillm.hf_token = 'hf_secret'");
$node->reload;
ok(wait_true(sub { sql('SHOW millm.hf_token') eq '********' }), 'millm.hf_token is not shown');
$node->append_conf('postgresql.conf', "millm.hf_token = ''");
$node->reload;
ok(wait_true(sub { sql('SHOW millm.hf_token') eq '' }), 'unset again');

# --- cancel, retry ----------------------------------------------------------------------------------------------------
slow();
sql(q(SELECT millm.download('millm-test/sharded', 'FP16')));
ok(under_way('sharded'), 'a download under way');
like(sql('SELECT name, status, stage, total_bytes > 900000 FROM millm.progress'), qr/^sharded\|downloading\|\w+\|t$/, 'the view progress has it');
ok(wait_true(sub { sql(q(SELECT time_left BETWEEN '1 s' AND '1 min' AND bytes_per_second > 0 AND file <> '' FROM millm.progress)) eq 't' }), 'with its speed, and when it will be here');
fails(q(SELECT millm.load('sharded')), 'ML007', 'it cannot be loaded yet');
is(sql(q(BEGIN; SELECT millm.cancel('sharded'); ROLLBACK)), '', 'cancel() acts at once, whatever the transaction does');
is(sql(q(SELECT millm.wait('sharded'))), 'error', 'and ends it');
is(row('sharded'), 'error|CANCELED', 'as an error with a name');
@events = $session->events(sub { $_[0]{event} eq 'model:download:error' });
is("$events[-1]{code} $events[-1]{message}", 'CANCELED the download was canceled', 'as an event tells');
ok(wait_true(sub { !glob("$cache/huggingface/*sharded*") }), 'no file is left') or diag join ' ', glob("$cache/huggingface/*sharded*");
$hub->faults;
is(sql(q(BEGIN; SELECT millm.retry('sharded'); ROLLBACK; SELECT status FROM millm.models WHERE name = 'sharded')), "\nerror", 'retry() follows the transaction');
sql(q(SELECT millm.retry('sharded')));
is(sql(q(SELECT millm.wait('sharded'))), 'ready', 'and downloads again');
fails(q(SELECT millm.retry('sharded')), '22023', 'what is ready needs no retry');

# --- A queue of one at a time --------------------------------------------------------------------------------------------
slow();
sql(q(SELECT millm.download('millm-test/tiny-gpt2', 'FP16'), millm.download('millm-test/tiny-long', 'FP16')));
ok(under_way('tiny-gpt2'), 'the first of two');
# ... which somebody locks: that must not hold up anything but its own row
my $locker = MillmTest::Session->new($node);
$locker->query(q(BEGIN; SELECT * FROM millm.registry WHERE name = 'tiny-gpt2' FOR UPDATE));
is(row('tiny-long'), 'pending|', 'the second waits');
sql(q(SELECT millm.cancel('tiny-long')));
is(sql(q(SELECT millm.wait('tiny-long'))), 'error', 'and can be canceled while it waits');
is(row('tiny-gpt2'), 'downloading|', 'before the first has ended');
$hub->faults;
is(sql(q(SELECT status FROM millm.status(), LATERAL (SELECT engine_state AS status) s)), 'ready', 'the engine goes on');
sql(q(SELECT millm.retry('tiny-long')));
is(sql(q(SELECT millm.wait('tiny-long'))), 'ready', 'so do other downloads');
isnt(row('tiny-gpt2'), 'ready|', 'the locked row is not written');
$locker->query('COMMIT');
is(sql(q(SELECT millm.wait('tiny-gpt2'))), 'ready', 'until the lock is gone');

# --- load, delete -----------------------------------------------------------------------------------------------------------
is(sql(q(SELECT millm.load('tiny-llama'))), 'loaded', 'load()');
is(row('tiny-llama'), 'loaded|', 'the view shows it');
fails(q(SELECT millm.load('tiny-llama')), 'ML005', 'once');
fails(q(SELECT millm.delete('tiny-llama')), 'ML008', 'a loaded model is not deleted');
is(sql(q(SELECT millm.load('tiny-gpt2'))), 'loaded', 'another takes its place');
is(sql(q(SELECT name FROM millm.models WHERE status = 'loaded')), 'tiny-gpt2', 'one at a time');
is(sql(q(BEGIN; SELECT millm.delete('tiny-llama'); ROLLBACK; SELECT count(*) FROM millm.models WHERE name = 'tiny-llama')), "\n1", 'delete() follows the transaction');
$locker->query(q(BEGIN; SELECT millm.delete('tiny-llama')));
fails(q(SELECT millm.load('tiny-llama')), 'ML008', 'what a transaction deletes is not loaded');
$locker->query('COMMIT');
ok(wait_true(sub { !-e "$cache/huggingface/millm-test--tiny-llama--FP16" }), 'after COMMIT its files go');
ok(wait_true(sub { sql('SELECT count(*) FROM millm.trash') eq '0' }), 'and the trash is empty');
is_deeply([ glob("$cache/.trash/*") ], [], 'on disk too');
sql(q(SELECT millm.download('millm-test/tiny-llama', 'FP16')));
is(sql(q(SELECT millm.wait('tiny-llama'))), 'ready', 'it can be downloaded again');
slow();
sql(q(SELECT millm.delete('sharded'); SELECT millm.download('millm-test/sharded', 'FP16', name => 'shards')));
ok(under_way('shards'), 'a download under way');
sql(q(SELECT millm.delete('shards')));
ok(wait_true(sub { sql('SELECT (SELECT count(*) FROM millm.trash) + (SELECT count(*) FROM millm.progress)') eq '0' }), 'a deleted download ends');
ok(wait_true(sub { !glob("$cache/huggingface/*sharded*") }), 'without a file');
is(sql('SELECT millm.unload()'), '', 'unload()');
fails('SELECT millm.unload()', 'ML006', 'once');

# --- A directory of the server ---------------------------------------------------------------------------------------------------
my $local = "$ENV{MILLM_FIXTURES}/tiny/llama";
is(sql("SELECT millm.register_local('$local', name => 'local') > 0"), 't', 'register_local()');
is(sql("SELECT source, status, local_path, download_progress FROM millm.models WHERE name = 'local'"), "local|ready|$local|", 'is ready at once');
is(sql(q(SELECT millm.load('local'))), 'loaded', 'and loads');
sql('SELECT millm.unload()');
sql(q(SELECT millm.delete('local')));
ok(-f "$local/model.safetensors", 'its files stay when it is deleted');

# --- A dump carries the registry and its sequence; the copy's files are where they were --------------------------------------------
$hub->faults;
my $before = sql('SELECT id, name, status, repo_id FROM millm.models ORDER BY id');
my $dump = $node->basedir . '/dump.sql';
$node->command_ok([ 'pg_dump', '-f', $dump, $node->connstr('postgres') ], 'pg_dump');
my $copy = new_server('copy', '# a copy', "millm.cache_dir = '$cache'");
$copy->safe_psql('postgres', 'DROP EXTENSION millm');
$copy->command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-f', $dump, $copy->connstr('postgres') ], 'restored');
is($copy->safe_psql('postgres', 'SELECT id, name, status, repo_id FROM millm.models ORDER BY id'), $before, 'the same models');
is($copy->safe_psql('postgres', q(SELECT millm.load('tiny-gpt2'))), 'loaded', 'the copy loads from the cache of the other server');
like((sqlstate($copy, q(SELECT millm.download('millm-test/extras', 'FP16'))))[1], qr/another server uses/, 'and does not write to it');
$copy->safe_psql('postgres', q(SELECT millm.delete('tiny-long')));
my $id_next = $copy->safe_psql('postgres', "SELECT millm.register_local('$local', name => 'local')");
cmp_ok($id_next, '>', (sort { $b <=> $a } map { (split /\|/)[0] } split /\n/, $before)[0], 'ids go on after the highest');
ok(-d "$cache/huggingface/millm-test--tiny-long--FP16", 'what the copy deletes stays on disk, which is not its own');
$copy->stop;

# --- Names that a caller makes are not the owner's ------------------------------------------------------------------------------------
sql(q(CREATE ROLE plain; SELECT millm.grant_user('plain'); CREATE ROLE chief; SELECT millm.grant_admin('chief'); SELECT millm.create_api_key('spied', 'plain')));
my $spy = q(CREATE FUNCTION pg_temp.spy() RETURNS boolean LANGUAGE plpgsql AS 'BEGIN RAISE WARNING ''a spy runs as %'', current_user; RETURN true; END');
my $said = (sqlstate($node, "SET ROLE plain; $spy; CREATE DOMAIN pg_temp.text AS pg_catalog.text CHECK (pg_temp.spy()); SELECT 'x'::pg_temp.text; SELECT count(*) FROM millm.estimate_memory('tiny-gpt2')"))[1];
is(join(' ', $said =~ /a spy runs as (\S+)/g), 'plain', 'a type of the caller\'s') or diag $said;
$said = (sqlstate($node, "SET ROLE chief; $spy; CREATE TEMP VIEW pg_roles AS SELECT 1::oid AS oid WHERE pg_temp.spy(); SELECT count(*) FROM pg_temp.pg_roles; SELECT millm.revoke_api_key('spied')"))[1];
is(join(' ', $said =~ /a spy runs as (\S+)/g), 'chief', 'a view of the caller\'s') or diag $said;
sql(q(SELECT millm.revoke_api_key('spied'); DROP OWNED BY plain, chief; DROP ROLE plain, chief));

# --- The end ------------------------------------------------------------------------------------------------------------------------
sql(q(SELECT millm.load('tiny-gpt2')));
slow();
sql(q(SELECT millm.download('millm-test/sharded', 'FP16')));
ok(under_way('sharded'), 'a download under way');
sql('DROP EXTENSION millm');
ok(wait_true(sub { !glob("$cache/huggingface/*sharded*") }), 'DROP EXTENSION ends downloads');
sql('CREATE EXTENSION millm');
ok(wait_true(sub { sql('SELECT model IS NULL FROM millm.status()') eq 't' }), 'and unloads the model');
ok(-d "$cache/huggingface/millm-test--tiny-gpt2--FP16", 'files stay');
# ... whoever owned it
sql(q(DROP EXTENSION millm; CREATE ROLE keeper SUPERUSER; SET ROLE keeper; CREATE EXTENSION millm));
sql("SELECT millm.register_local('$local', name => 'local'); SELECT millm.load('local')");
slow();
sql(q(SELECT millm.download('millm-test/sharded', 'FP16')));
ok(under_way('sharded'), 'a download under way');
is(sql('SELECT model FROM millm.status()'), 'local', 'the model of the new extension stays loaded');
sql('DROP OWNED BY keeper CASCADE; DROP ROLE keeper');
ok(wait_true(sub { !glob("$cache/huggingface/*sharded*") }), 'DROP OWNED ends downloads, too');
sql('CREATE EXTENSION millm');
ok(wait_true(sub { sql('SELECT model IS NULL FROM millm.status()') eq 't' }), 'and unloads the model');
ok(-f "$local/model.safetensors", 'whose files stay');
is(sql('SELECT count(*) FROM millm.models'), 0, 'the next extension begins anew');

# --- A database whose sessions only read unless they say otherwise ----------------------------------------------------------------
sql("ALTER DATABASE postgres SET default_transaction_read_only = on");
my $clerk = q(SELECT pid FROM pg_stat_activity WHERE backend_type = 'millm clerk');
my $first_clerk = sql($clerk);
sql("SELECT pg_terminate_backend($first_clerk)");
ok(wait_true(sub { (sql($clerk) || $first_clerk) != $first_clerk }), 'the clerk connects again');
$hub->faults;
fails(q(SELECT millm.download('millm-test/tiny-llama', 'FP16')), '25006', 'a session only reads');
($rc, $out, $err) = $node->psql('postgres', q(SET default_transaction_read_only = off; SELECT millm.download('millm-test/tiny-llama', 'FP16')));
($rc, $out, $err) = $node->psql('postgres', q(SELECT millm.wait('tiny-llama', '20 s')));
is($out, 'ready', 'what another one has committed is carried out') or diag $err;
my $log = slurp_file($node->logfile);
unlike($log, qr/terminating any other active server processes|PANIC|TRAP/, 'no crash on the way');
$node->stop;
done_testing();

sub helper_pids { return split /\|/, sql('SELECT engine_pid, hub_pid FROM millm.status()'); }
sub process_text { my ($pid) = @_; return join '', map { -r "/proc/$pid/$_" ? slurp_file("/proc/$pid/$_") : '' } qw(cmdline environ); }

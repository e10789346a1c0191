# Loads and unloads among others' requests: what waits, what is told, what stops them, and an engine that comes back by itself.
use strict;
use warnings;
use Cwd qw(abs_path);
use File::Copy qw(copy);
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

my $node = new_server('load', '# short waits', "millm.unload_timeout = '1s'");
my $base = abs_path($node->basedir);
sub sql { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
sub fails { my ($sql, $state, $what) = @_; my ($got, $error) = sqlstate($node, $sql); is($got, $state, $what) or diag $error; return $error; }
sub loaded { return sql(q(SELECT string_agg(name, ' ') FROM millm.models WHERE status = 'loaded')); }
sub setting { my ($name, $value) = @_; $node->append_conf('postgresql.conf', "$name = $value"); $node->reload; ok(wait_true(sub { sql("SHOW $name") eq $value }), "$name = $value"); }

load_model($node, 'tiny');
my $tiny = sql('SELECT model_id FROM millm.status()');
load_model($node, $SMOLLM2);
my $smol = sql('SELECT model_id FROM millm.status()');
my $listener = MillmTest::Session->new($node);
$listener->query('LISTEN millm_progress');
# The events until that one of that model
sub events_until { my ($last) = @_; return $listener->events(sub { "$_[0]{event} $_[0]{model_id}" eq $last }); }
sub long_request { my $s = MillmTest::Session->new($node)->send("SELECT millm.generate($LONG)"); ok(wait_true(sub { (engine_pages($node))[1] == 1 }), 'a long request runs'); return $s; }

# --- Another model drains the first -----------------------------------------------------------------------------
my $request = long_request();
my ($rc, $out, $err) = $node->psql('postgres', q(SELECT millm.load('tiny')));
is($out, 'loaded', 'load() of another model');
like($err, qr/NOTICE:  Waiting for 1 pending request\.\.\./, 'waits for what runs') or diag $err;
my $result = $request->until_ready;
is($result->{state}, '57014', 'for millm.unload_timeout, then cancels it') or diag $result->{message};
my @events = events_until("model:load:complete $tiny");
my @names = map { "$_->{event} $_->{model_id}" } @events;
is($names[0], "model:unload:progress $smol", 'events: the first model drains');
is($events[0]{pending}, 1, 'of so many requests');
my ($unloaded) = grep { $names[$_] eq "model:unload:complete $smol" } 0 .. $#names;
my ($progress) = grep { $names[$_] eq "model:load:progress $tiny" } 0 .. $#names;
ok(defined $unloaded && defined $progress && $unloaded < $progress, 'is unloaded, then the other loads') or diag join "\n", @names;
is($events[$progress]{stage}, 'loading_weights', 'by stages');
is(loaded(), 'tiny', 'one at a time');

# --- unload() reports what it gives back, and stops a load ----------------------------------------------------------
($rc, $out, $err) = $node->psql('postgres', 'SELECT millm.unload()');
like($err, qr/NOTICE:  [\d.]+ MB of private memory are free again/, 'unload() says what is free again') or diag $err;
events_until("model:unload:complete $tiny");
load_model($node, $SMOLLM2);
setting('millm.unload_timeout', '5s');
$request = long_request();
my $loader = MillmTest::Session->new($node)->send(q(SELECT millm.load('tiny')));
ok(wait_true(sub { sql(q(SELECT status FROM millm.models WHERE name = 'tiny')) eq 'loading' }), 'a load waits');
ok(wait_true(sub { sql(q(SELECT status, stage FROM millm.progress)) eq 'loading|draining' }), 'which the view progress shows');
fails(q(SELECT millm.delete('tiny')), 'ML008', 'what is being loaded is not deleted');
like(fails("SELECT millm.load('4711')", 'ML001', 'nobody') . fails("SELECT millm.load('$SMOLLM2')", 'ML008', 'another load meanwhile'), qr/model "tiny" is being loaded/, 'is refused');
is(sql('SELECT millm.unload()'), '', 'unload() stops the load');
$result = $loader->until_ready;
is("$result->{state} $result->{message}", '57014 the load of model "tiny" was canceled', 'whose session hears of it');
is($request->until_ready->{state}, '57014', 'the long request had its time');
is(loaded(), '', 'nothing is loaded');
is(sql(q(SELECT status, error_code FROM millm.models WHERE name = 'tiny')), 'ready|', 'and nothing has failed');
@names = map { "$_->{event} $_->{model_id}" } @events = events_until("model:load:error $tiny");
is($events[-1]{code}, 'CANCELED', 'an event says so');

# --- A load is the server's: its caller's cancel stops the waiting only ---------------------------------------------
setting('millm.unload_timeout', '1s');
load_model($node, $SMOLLM2);
$request = long_request();
$loader = MillmTest::Session->new($node)->send(q(SELECT millm.load('tiny')));
ok(wait_true(sub { sql(q(SELECT status FROM millm.models WHERE name = 'tiny')) eq 'loading' }), 'a load waits');
sql('SELECT pg_cancel_backend(' . $loader->pid . ')');
is($loader->until_ready->{state}, '57014', 'its session is canceled');
ok(wait_true(sub { loaded() eq 'tiny' }), 'the load goes on');
$request->until_ready;
is(sql("BEGIN; SELECT millm.load('$SMOLLM2'); ROLLBACK; SELECT model FROM millm.status()"), "loaded\n$SMOLLM2", 'nor does ROLLBACK undo it');
is(sql(q(SELECT millm.load('tiny', wait => false))), 'loading', 'wait => false does not wait');
ok(wait_true(sub { loaded() eq 'tiny' }), 'and loads');

# --- A load that fails ------------------------------------------------------------------------------------------------
my $damaged = "$base/damaged";
mkdir $damaged;
copy($_, $damaged) for glob("$ENV{MILLM_FIXTURES}/tiny/llama/*");
sql("SELECT millm.register_local('$damaged')");
my $id = sql(q(SELECT id FROM millm.models WHERE name = 'damaged'));
truncate("$damaged/model.safetensors", (-s "$damaged/model.safetensors") / 2);
fails(q(SELECT millm.load('damaged')), 'ML022', 'damaged files');
is(loaded(), 'tiny', 'are found before the loaded model is touched');
fails(q(SELECT millm.load('damaged', force => true)), 'ML022', 'and while it loads');
like(sql(q(SELECT status, error_code, error_message FROM millm.models WHERE name = 'damaged')), qr/^ready\|INVALID_MODEL_FILE\|.*model\.safetensors/, 'the row says why');
@events = events_until("model:load:error $id");
is($events[-1]{code}, 'INVALID_MODEL_FILE', 'so does the event');
is(loaded(), '', 'which left none loaded');
copy("$ENV{MILLM_FIXTURES}/tiny/llama/model.safetensors", $damaged);
is(sql(q(SELECT millm.load('damaged'))), 'loaded', 'whole files load');
is(sql(q(SELECT status, error_code FROM millm.models WHERE name = 'damaged')), 'loaded|', 'and the row forgets');

# --- The engine dies ------------------------------------------------------------------------------------------------------
load_model($node, $SMOLLM2);
$request = long_request();
my $unloader = MillmTest::Session->new($node)->send(q(SELECT millm.unload('20 s')));
@events = events_until("model:unload:progress $smol");
is($events[-1]{pending}, 1, 'an unload waits for a request');
fails(q(SELECT millm.generate('x', raw => true)), 'ML008', 'and another one is refused');
kill_engine();
$result = $unloader->until_ready;
is($result->{state}, 'ML019', 'the engine is killed: the unload fails') or diag $result->{message};
is($request->until_ready->{state}, 'ML019', 'so does the request');
@events = events_until("model:unload:error $smol");
is($events[-1]{code}, 'ENGINE_UNAVAILABLE', 'which an event says');
load_model($node, 'tiny');
sub kill_engine { my $pid = sql('SELECT engine_pid FROM millm.status()'); kill('KILL', $pid); ok(wait_true(sub { sql("SELECT engine_pid <> $pid FROM millm.status()") eq 't' }), 'another engine after kill -9'); }
kill_engine();
is(sql(q(SELECT count(*) FROM millm.models WHERE status <> 'ready')), 0, 'every model is ready');
like(sql('SELECT last_exit FROM millm.status()'), qr/signal 9|SIGKILL|[Kk]illed/, 'status() says why');
fails(q(SELECT millm.generate('x', raw => true)), 'ML006', 'and requests that no model is loaded');
setting('millm.reload_after_crash', 'on');
load_model($node, 'tiny');
events_until("model:load:complete $tiny");
kill_engine();
ok(wait_true(sub { loaded() eq 'tiny' }), 'with millm.reload_after_crash the model comes back');
isnt(sql(q(SELECT millm.generate('x', raw => true, max_tokens => 3))), '', 'and works');
@events = events_until("model:load:complete $tiny");
is("$events[-1]{event} $events[-1]{model_id}", "model:load:complete $tiny", 'as an event tells');
sql('SELECT millm.unload()');
kill_engine();
is(loaded(), '', 'what was unloaded stays so');
unlike(slurp_file($node->logfile), qr/terminating any other active server processes|PANIC|TRAP/, 'no crash of the server on the way');
$node->stop;
done_testing();

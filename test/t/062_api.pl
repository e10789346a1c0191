# The management routes: each with its statuses, as /openapi.json promises them (TestBridge's call() looks), and the events.
use strict;
use warnings;
use Cwd qw(abs_path);
use JSON::PP;
use Test::More;
use Time::HiRes qw(time sleep);
use MillmTest;
use TestBridge;
use TestHub;

my $hub = TestHub->new;
# which logs every statement, but not with log_parameter_max_length what a token came in
my $node = new_server('api', '# the test hub', "millm.hf_endpoint = '@{[ $hub->endpoint ]}'", 'log_parameter_max_length = 0');
sub sql { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
sql(q(CREATE ROLE millm_bridge LOGIN NOINHERIT; CREATE ROLE operator; CREATE ROLE looker; CREATE ROLE stranger; CREATE ROLE files IN ROLE pg_read_server_files;
	SELECT millm.grant_bridge('millm_bridge'), millm.grant_admin('operator'), millm.grant_user('looker'), millm.grant_admin('files')));
my ($operator, $looker, $stranger, $files) = map { sql("SELECT millm.create_api_key('$_ key', '$_')") } qw(operator looker stranger files);
my $bridge = TestBridge->new($node, '--pool_size', 4);

# Answers with status, and of an error with the code; returns the data, or the error.
sub answers
{
	my ($what, $status, $method, $path, $body, $key, $code) = @_;
	my $reply = $bridge->call($method, $path, $body, $key // $operator);
	my $json = $reply->{json};
	is("$reply->{status} " . ($json->{error} ? $json->{error}{code} : ''), "$status " . ($code // ''), $what) or diag $reply->{content};
	is_deeply([ sort keys %$json ], [ qw(data error success) ], '... in its envelope');
	is($json->{success} ? 1 : 0, $status < 300 ? 1 : 0, '... which says so');
	return $json->{success} ? $json->{data} : $json->{error};
}
sub no_call { my ($what, $status, $code, @call) = @_; return answers($what, $status, @call[ 0 .. 2 ], $call[3], $code); }
# Until the model's row says so
sub comes_to { my ($id, $status) = @_; return wait_true(sub { $bridge->call('GET', "/api/models/$id", undef, $operator)->{json}{data}{status} eq $status }); }

# --- Whose --------------------------------------------------------------------------------------------------------
$hub->faults;
my $hub_model = { repo_id => 'millm-test/tiny-llama', quantization => 'FP16' };
my $reply = $bridge->call('GET', '/api/models');
is("$reply->{status} $reply->{json}{error}{code}", '401 MISSING_API_KEY', 'no key');
is($reply->{headers}{'www-authenticate'}, 'Bearer', 'which a header asks for');
no_call('a wrong key', 401, 'INVALID_API_KEY', 'GET', '/api/models', undef, 'millm-nobody');
no_call('a role that may nothing', 403, 'PERMISSION_DENIED', 'GET', '/api/models', undef, $stranger);
is_deeply(answers('a role that may look', 200, 'GET', '/api/models', undef, $looker), [], '... there is nothing');
no_call('and not change', 403, 'PERMISSION_DENIED', 'POST', '/api/models', $hub_model, $looker);
no_call('nor ask the Hub', 403, 'PERMISSION_DENIED', 'POST', '/api/models/preview', { repo_id => 'millm-test/tiny-llama' }, $looker);
no_call('nor see events without looking', 403, 'PERMISSION_DENIED', 'GET', '/api/events', undef, $stranger);

# --- What cannot be meant ------------------------------------------------------------------------------------------
for ([ 'no body', 'INVALID_JSON', undef ], [ 'no JSON', 'INVALID_JSON', '{"repo_id": ' ], [ 'no object', 'INVALID_TYPE', '["a"]' ],
	[ 'U+0000', 'INVALID_JSON', '{"repo_id": "a\u0000b"}' ], [ 'a field that is not here', 'UNKNOWN_PARAMETER', { repo_id => 'a/b', repoid => 'a/b' } ],
	[ 'a number as a name', 'INVALID_TYPE', { repo_id => 7 } ], [ 'a text as true', 'INVALID_TYPE', { repo_id => 'a/b', trust_remote_code => 'yes' } ],
	[ 'nothing to add', 'MISSING_PARAMETER', {} ], [ 'two things to add', 'MISSING_PARAMETER', { repo_id => 'a/b', path => '/a' } ],
	[ 'a directory with a token', 'UNSUPPORTED_PARAMETER', { path => '/a', hf_token => 'hf_x' } ], [ 'no repository', 'INVALID_REPO_ID', { repo_id => 'no/such/name' } ],
	[ 'no quantization', 'INVALID_ARGUMENT', { repo_id => 'a/b', quantization => 'Q5' } ], [ 'no directory', 'INVALID_LOCAL_PATH', { path => 'nowhere' } ])
{
	my ($what, $code, $body) = @$_;
	no_call("POST /api/models: $what", 400, $code, 'POST', '/api/models', $body, $files);
}
is(answers('the field is named', 400, 'POST', '/api/models', { repo_id => 'a/b', repoid => 'a/b' }, undef, 'UNKNOWN_PARAMETER')->{details}{param}, 'repoid', '... in details');
is($bridge->call('POST', '/api/models', '{}', $operator, 'Content-Type' => 'text/plain')->{status}, 415, 'not JSON by its type');
no_call('no number', 400, 'INVALID_ARGUMENT', 'GET', '/api/models/nobody');
no_call('too large a number', 400, 'INVALID_ARGUMENT', 'GET', '/api/models/9223372036854775808');
$reply = $bridge->call("GET", "/api/models/preview", undef, $operator);
is("$reply->{status} $reply->{headers}{allow}", "405 POST", "a path that is written out is no model");
no_call('a query', 400, 'UNKNOWN_PARAMETER', 'GET', '/api/models?status=ready');
no_call('a body with a field where there is none', 400, 'UNKNOWN_PARAMETER', 'POST', '/api/models/1/unload', { force => JSON::PP::true });
for ([ GET => '' ], [ DELETE => '' ], [ POST => '/load' ], [ POST => '/unload' ], [ POST => '/cancel' ])
{
	no_call("$_->[0] ...$_->[1] of no model", 404, 'MODEL_NOT_FOUND', $_->[0], "/api/models/999$_->[1]");
}
$reply = $bridge->call('PUT', '/api/models', {}, $operator);
is("$reply->{status} $reply->{headers}{allow} $reply->{json}{error}{code}", '405 GET, HEAD, POST METHOD_NOT_ALLOWED', 'another method');
is($bridge->call('GET', '/api/nothing', undef, $operator)->{json}{success}, JSON::PP::false, 'a path that is not here has the envelope');

# --- Preview -------------------------------------------------------------------------------------------------------
my $preview = answers('a preview', 200, 'POST', '/api/models/preview', { repo_id => 'millm-test/tiny-llama' });
is("$preview->{architecture} $preview->{supported}", 'LlamaForCausalLM 1', '... says what it is');
no_call('of no repository', 404, 'REPO_NOT_FOUND', 'POST', '/api/models/preview', { repo_id => 'millm-test/no-such' });
no_call('with a wrong token', 401, 'INVALID_HF_TOKEN', 'POST', '/api/models/preview', { repo_id => 'millm-test/gated', hf_token => 'hf_wrong' });

# --- A download, and its events ---------------------------------------------------------------------------------------
my $stream = TestBridge::Stream->new($bridge, '/api/events', $looker);
like($stream->head, qr{^HTTP/1.1 200 .*content-type: text/event-stream}si, 'the stream of events');
like($stream->head, qr/^x-request-id: \S+/mi, '... has an id');
$hub->faults({ where => 'any', bytes_per_second => 200000 });
my $model = answers('a download', 202, 'POST', '/api/models', $hub_model);
my $id = $model->{id};
is(join(' ', sort keys %$model), join(' ', sort split / /, sql(q(SELECT string_agg(attname, ' ') FROM pg_attribute WHERE attrelid = 'millm.models'::regclass AND attnum > 0))),
	'... is a row of millm.models');
like($model->{status}, qr/^(pending|downloading)$/, '... that is not ready yet');
no_call('the same again', 409, 'MODEL_ALREADY_EXISTS', 'POST', '/api/models', $hub_model);
no_call('it is no model to load yet', 409, 'MODEL_NOT_READY', 'POST', "/api/models/$id/load");
my @events = $stream->until(sub { $_[0] eq 'model:download:complete' });
is($events[-1][0], 'model:download:complete', 'an event says that it is there');
my @progress = grep { $_->[0] eq 'model:download:progress' } @events;
cmp_ok(scalar @progress, '>=', 2, '... after some of its progress');
is_deeply([ grep { $_->[1]{event} ne $_->[0] || $_->[1]{model_id} != $id } @events ], [], '... all of this model, and named in the data as in the event');
is(answers('the model', 200, 'GET', "/api/models/$id")->{status}, 'ready', '... is ready');
is_deeply([ map { $_->{id} } @{ answers('the list', 200, 'GET', '/api/models') } ], [$id], '... has it');
$hub->faults;
no_call('no such repository', 404, 'REPO_NOT_FOUND', 'POST', '/api/models', { repo_id => 'millm-test/no-such' });
no_call('a gated one', 401, 'GATED_MODEL_NO_TOKEN', 'POST', '/api/models', { repo_id => 'millm-test/gated' });
no_call('a wrong token', 401, 'INVALID_HF_TOKEN', 'POST', '/api/models', { repo_id => 'millm-test/gated', hf_token => 'hf_wrong' });
no_call('an architecture that is not known', 400, 'UNSUPPORTED_ARCHITECTURE', 'POST', '/api/models', { repo_id => 'millm-test/unknown-arch' });
no_call('code of its own', 400, 'TRUST_REMOTE_CODE_REQUIRED', 'POST', '/api/models', { repo_id => 'millm-test/remote-code' });

# --- Canceled -------------------------------------------------------------------------------------------------------------
$hub->faults({ where => 'any', bytes_per_second => 50000 });
my $other = answers('a slow download', 202, 'POST', '/api/models', { repo_id => 'millm-test/tiny-gpt2', quantization => 'FP16', name => 'slow' })->{id};
ok(comes_to($other, 'downloading'), '... is under way');
is(answers('is canceled', 200, 'POST', "/api/models/$other/cancel")->{id}, $other, '... and shown');
ok(comes_to($other, 'error'), '... ends');
is(answers('as an error', 200, 'GET', "/api/models/$other")->{error_code}, 'CANCELED', '... with a name');
is(answers('and is deleted', 200, 'DELETE', "/api/models/$other")->{name}, 'slow', '... shown once more');
no_call('now it is not there', 404, 'MODEL_NOT_FOUND', 'GET', "/api/models/$other");
$hub->faults;

# --- Loaded ------------------------------------------------------------------------------------------------------------------
my $copy = answers('a directory of the server', 202, 'POST', '/api/models', { path => "$ENV{MILLM_FIXTURES}/tiny/llama-long", name => 'local' }, $files);
is($copy->{status}, 'ready', '... is used where it lies');
no_call('for which one must be allowed to read it', 403, 'PERMISSION_DENIED', 'POST', '/api/models', { path => "$ENV{MILLM_FIXTURES}/tiny/llama-long", name => 'local2' });
like(answers('a load', 202, 'POST', "/api/models/$id/load")->{status}, qr/^(loading|loaded)$/, '... begins');
is((($stream->until(sub { $_[0] eq 'model:load:complete' }))[-1] // [''])->[0], 'model:load:complete', '... an event says when it has ended');
is(answers('one that is waited for', 200, 'POST', "/api/models/$copy->{id}/load", { wait => JSON::PP::true, force => JSON::PP::false })->{status}, 'loaded', '... is loaded');
no_call('it is loaded', 400, 'MODEL_ALREADY_LOADED', 'POST', "/api/models/$copy->{id}/load");
no_call('a loaded one is not deleted', 409, 'MODEL_BUSY', 'DELETE', "/api/models/$copy->{id}");
no_call('the other one is not loaded now', 400, 'MODEL_NOT_LOADED', 'POST', "/api/models/$id/unload");
my $memory = answers('memory', 200, 'GET', '/api/system/memory');
is("$memory->{devices}[0]{device} $memory->{status}{model}", 'cpu local', '... of the device, and who has it');
cmp_ok($memory->{devices}[0]{used_bytes}, '>', 0, '... some');
is(answers('unloaded', 200, 'POST', "/api/models/$copy->{id}/unload")->{status}, 'ready', '... it is ready again');
no_call('and not loaded', 400, 'MODEL_NOT_LOADED', 'POST', "/api/models/$copy->{id}/unload");
is((($stream->until(sub { $_[0] eq 'model:unload:complete' && $_[1]{model_id} == $copy->{id} }))[-1] // [''])->[0], 'model:unload:complete', 'an event, too');

# --- Events that are none, clients that do not read ----------------------------------------------------------------------------
my $notify = sub { return sql("SELECT pg_notify('millm_progress', p) FROM (VALUES " . join(', ', map { "(\$p\$$_\$p\$)" } @_) . ') v (p)'); };
$notify->('nonsense', '[1]', '{}', '{"event": 7}', '{"event": "events:dropped", "dropped": 9}', qq({"event": "model:x\\nevent: y"}), qq({"event": "model:last", "text": "a\nb"}),
	qq({"event": "model:last",\r\n "text": "a\\nb", "x": 0.1}));
is_deeply([ $stream->event ], [ 'model:last', { event => 'model:last', text => "a\nb", x => 0.1 } ], 'what is no event is not passed on, and one is, on one line');
my $slow = TestBridge::Stream->new($bridge, '/api/events', $looker, small => 1);
my ($n, $pad) = (3000, 'x' x 7000);
sql("SELECT pg_notify('millm_progress', format('{\"event\": \"model:flood\", \"n\": %s, \"pad\": \"%s\"}', n, '$pad')) FROM generate_series(1, $n) n");
# every event is seen, or counted as missed
for my $reader ([ 'one that reads', $stream ], [ 'one that reads late', $slow ])
{
	my ($what, $s) = @$reader;
	my ($seen, $dropped) = (0, 0);
	$s->until(sub { $seen++ if $_[0] eq 'model:flood'; $dropped += $_[1]{dropped} // 0; return $seen + $dropped == $n });
	is($seen + $dropped, $n, "$what has $seen of $n events, and is told of the others");
	cmp_ok($dropped, '>', 0, '... of which there are some') if $s == $slow;
}
my $size = sub { my ($kb) = slurp("/proc/" . $bridge->pid . "/status") =~ /VmRSS:\s+(\d+)/; return $kb; };
sub slurp { my ($f) = @_; open(my $h, '<', $f) or return ''; local $/; return scalar <$h>; }
cmp_ok($size->(), '<', 60000, 'what is not read is not kept') unless $ENV{MILLM_BRIDGE};
$notify->('{"event": "model:last"}');
is((($slow->until(sub { $_[0] eq 'model:last' }))[-1] // [''])->[0], 'model:last', '... and goes on');

# --- The connection is lost; the key is revoked -----------------------------------------------------------------------------------
my $listeners = q(SELECT count(*) FROM pg_stat_activity WHERE application_name = 'millm-bridge events');
is(sql($listeners), 1, 'one connection for all streams');
sql(q(SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'millm-bridge events'));
is((($stream->until(sub { $_[0] eq 'events:interrupted' }))[-1] // [''])->[0], 'events:interrupted', 'a lost connection is told when there is another');
$notify->('{"event": "model:last"}');
is((($stream->until(sub { $_[0] eq 'model:last' }))[-1] // [''])->[0], 'model:last', '... which listens');
$_->hang_up for $slow, $stream;
ok(wait_true(sub { sql($listeners) == 0 }), 'without a stream there is no connection');
# a stream may be older than any request
my $hasty = TestBridge->new($node, '--request_timeout', 1, '--log_prompts', 'on');
$stream = TestBridge::Stream->new($hasty, '/api/events', $looker);
sleep 1.5;
$notify->('{"event": "model:last"}');
is(($stream->event)[0], 'model:last', 'request_timeout is not for streams of events');
sql(q(SELECT millm.revoke_api_key('looker key')));
my $start = time;
my @end = $stream->until(sub { 0 }, 40);
note sprintf('the stream of a revoked key ended after %.1f s', time - $start);
like(encode_json($end[-1][1] // {}), qr/INVALID_API_KEY/, 'the stream of a revoked key ends, saying why');
no_call('and cannot be had again', 401, 'INVALID_API_KEY', 'GET', '/api/events', undef, $looker);
$hasty->call('POST', '/api/models/preview', { repo_id => 'millm-test/gated', hf_token => 'hf_good' }, $operator);
unlike($hasty->log, qr/hf_good/, 'tokens are no prompts, either');
$hasty->stop;

# --- The Hub, the disk, the engine are not there --------------------------------------------------------------------------------------
$node->append_conf('postgresql.conf', "millm.hf_endpoint = 'http://127.0.0.1:9'");
$node->reload;
ok(wait_true(sub { sql('SHOW millm.hf_endpoint') eq 'http://127.0.0.1:9' }), 'no hub');
no_call('a preview without one', 503, 'HUB_UNAVAILABLE', 'POST', '/api/models/preview', { repo_id => 'millm-test/tiny-llama' });

# --- No secret in the logs ---------------------------------------------------------------------------------------------------------------
$bridge->call('POST', '/api/models/preview', { repo_id => 'millm-test/gated', hf_token => 'hf_good' }, $operator);
unlike($bridge->log, qr/hf_good|hf_wrong|millm-[\w-]{43}/, 'neither keys nor tokens are in the bridge\'s log');
unlike(slurp($node->logfile), qr/hf_good|hf_wrong/, 'nor tokens in the server\'s');

# --- Shutdown with a stream ------------------------------------------------------------------------------------------------------------------
$stream = TestBridge::Stream->new($bridge, '/api/events', $operator);
$start = time;
is($bridge->stop, 0, 'SIGTERM ends the bridge');
ok(time - $start < 10, '... streams of events do not hold it up');
$node->stop;
done_testing();

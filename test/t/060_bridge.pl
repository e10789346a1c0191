# millm-bridge: routes, errors, streams, clients that go away, limits, and what happens when the server or the bridge ends.
use strict;
use warnings;
use IO::Select;
use IO::Socket::INET;
use IPC::Run qw(start);
use JSON::PP;
use MIME::Base64;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Socket qw(SOL_SOCKET SO_LINGER SO_RCVBUF);
use Test::More;
use Time::HiRes qw(time sleep);
use MillmTest;

my $node = new_server('bridge');
my $program = $ENV{MILLM_BRIDGE} // $node->config_data('--bindir') . '/millm-bridge';
my %bridge;    # the one that runs: harness, err, port

# Take over what it has logged.
sub pump_log { eval { $bridge{harness}->pump_nb }; }

# Start it with these flags; returns once it listens.
sub start_bridge
{
	my (@flags) = @_;
	my ($in, $out, $err) = ('', '', '');
	%bridge = (err => \$err);
	$bridge{harness} = start([ $program, '--listen', '127.0.0.1:0', '--database', $node->connstr('postgres') . ' user=millm_bridge', @flags ], \$in, \$out, \$err);
	wait_true(sub { pump_log(); $err =~ /^[^\n]*"address":"127\.0\.0\.1:(\d+)".*\n/ and $bridge{port} = $1 }) or die "the bridge did not start: $err\n";
}

sub stop_bridge
{
	$bridge{harness}->signal('TERM');
	$bridge{harness}->finish;
	return $bridge{harness}->result(0);
}

sub connect_bridge
{
	my (%option) = @_;
	my $sock = IO::Socket::INET->new(Proto => 'tcp', Type => SOCK_STREAM) or die "socket: $!";
	setsockopt($sock, SOL_SOCKET, SO_RCVBUF, $option{rcvbuf}) if $option{rcvbuf};
	connect($sock, pack_sockaddr_in($bridge{port}, inet_aton('127.0.0.1'))) or die "connect: $!";
	return $sock;
}

# All that comes until the pattern is in it, the end, or so many seconds have gone.
sub read_until
{
	my ($sock, $pattern, $seconds) = @_;
	my ($buf, $end) = ('', time + ($seconds // 20));
	while ($buf !~ $pattern)
	{
		my $left = $end - time;
		last if $left <= 0 || !IO::Select->new($sock)->can_read($left);
		last unless sysread($sock, $buf, 65536, length $buf);
		pump_log();
	}
	return $buf;
}

sub text_of
{
	my ($method, $path, $body, @headers) = @_;
	my $text = "$method $path HTTP/1.1\r\nHost: localhost\r\n" . join('', map { "$_\r\n" } @headers);
	return "$text\r\n" unless defined $body;
	$body = encode_json($body) if ref $body;
	$text .= "Content-Type: application/json\r\n" unless grep { /^content-type/i } @headers;
	return "${text}Content-Length: " . length($body) . "\r\n\r\n$body";
}

# One answer: { status, head, body, json }
sub read_answer
{
	my ($sock, $seconds, $is_head) = @_;
	my $buf = '';
	do { $buf = read_until($sock, qr/\r\n\r\n/, $seconds) } while $buf =~ m{^HTTP/1.1 10\d [^\r]*\r\n\r\n\z};
	$buf =~ s{^HTTP/1.1 10\d [^\r]*\r\n\r\n}{}g;
	my $answer = { status => 0, head => '', body => '' };
	return $answer unless $buf =~ s/^(HTTP\/1\.1 (\d+).*?\r\n\r\n)//s;
	@$answer{qw(head status)} = ($1, $2);
	if ($answer->{head} =~ /^Content-Length: (\d+)/m)
	{
		my $length = $1;
		$buf .= read_until($sock, qr/\A.{@{[$length - length $buf]}}/s, $seconds) if !$is_head && length $buf < $length;
	}
	elsif ($answer->{head} =~ /chunked/ && $buf !~ /0\r\n\r\n\z/)
	{
		$buf .= read_until($sock, qr/\r\n0\r\n\r\n\z/, $seconds);
	}
	if ($answer->{head} =~ /chunked/)
	{
		my $rest = $buf;
		$buf = '';
		while ($rest =~ s/^([0-9a-f]+)\r\n//i && hex $1) { $buf .= substr($rest, 0, hex $1); substr($rest, 0, 2 + hex $1) = ''; }
	}
	$answer->{body} = $buf;
	$answer->{json} = eval { decode_json($buf) };
	return $answer;
}

sub ask
{
	my (@request) = @_;
	my $sock = connect_bridge();
	syswrite($sock, text_of(@request));
	return read_answer($sock, undef, $request[0] eq 'HEAD');
}

# The objects of a stream's events.
sub events { my ($body) = @_; return map { decode_json($_) } grep { $_ ne '[DONE]' } $body =~ /^data: (.*)$/mg; }
sub error_code { my ($answer) = @_; return "$answer->{status} " . ($answer->{json}{error}{code} // 'no code'); }

# Passes when nothing runs any more, in the engine and in the server's sessions of the bridge.
sub wait_idle
{
	my ($what, $start) = @_;
	my $idle = q(SELECT running + waiting = 0 AND NOT EXISTS (SELECT FROM pg_stat_activity WHERE usename = 'millm_bridge' AND state <> 'idle') FROM millm.status());
	ok(wait_true(sub { pump_log(); $node->safe_psql('postgres', $idle) eq 't' }), "$what: nothing runs any more");
	note sprintf('%s: after %.0f ms, psql included', $what, 1000 * (time - $start));
}
sub wait_running
{
	my ($n) = @_;
	wait_true(sub { pump_log(); $node->safe_psql('postgres', 'SELECT running + waiting FROM millm.status()') == $n }) or die "not $n requests running\n";
}

#---------------------------------------------------------------------------------------------------------------------
# What it does not start with

my @base = ('--database', $node->connstr('postgres') . ' user=millm_bridge');
my ($out, $err) = run_command([ 'timeout', 30, $program, @base, '--pool_sise', '3' ]);
like($err, qr/unrecognized setting "--pool_sise"/, 'a setting that is none');
($out, $err) = run_command([ 'timeout', 30, $program, @base, '--pool_size', 'x' ]);
like($err, qr/pool_size takes an integer from 1 to \d+, not "x"/, 'a value that is none');
($out, $err) = run_command([ 'timeout', 30, $program, '--database', $node->connstr('postgres') ]);
like($err, qr/is a superuser.*HINT:.*CREATE ROLE millm_bridge/s, 'a superuser is refused');
$node->safe_psql('postgres', 'CREATE ROLE millm_bridge LOGIN NOINHERIT; CREATE ROLE app; CREATE ROLE other; CREATE ROLE heir LOGIN');
$node->safe_psql('postgres', q(SELECT millm.grant_bridge('millm_bridge'), millm.grant_user('app')));
($out, $err) = run_command([ 'timeout', 30, $program, '--database', $node->connstr('postgres') . ' user=heir' ]);
like($err, qr/"heir" inherits.*ALTER ROLE "heir" NOINHERIT/s, 'so is a role that inherits');
($out, $err) = run_command([ 'timeout', 30, $program, @base, '--listen', '0.0.0.0:0' ]);
like($err, qr/no API key/, 'without keys it listens on loopback only');
($out, $err) = run_command([ 'timeout', 30, $program, @base, '--listen', '0.0.0.0:0', '--anonymous_role', 'app' ]);
like($err, qr/anonymous_role is only for a loopback address/, 'nor for anonymous requests elsewhere');
($out, $err) = run_command([ 'timeout', 30, $program, @base, '--anonymous_role', 'other' ]);
like($err, qr/may not become anonymous_role "other".*GRANT "other" TO "millm_bridge"/s, 'a role that it may not become');
($out, $err) = run_command([ 'timeout', 30, $program, @base, '--cors_origin', "https://a\r\nSet-Cookie: b" ]);
like($err, qr/cors_origin is an origin/, 'an origin that is none');
($out, $err) = run_command([ 'timeout', 30, $program, @base, '--pool_size', '5000' ]);
like($err, qr/pool_size is 5000, but the server allows role "millm_bridge" \d+/, 'a pool that does not fit');

my $file = PostgreSQL::Test::Utils::tempdir() . '/bridge.conf';
append_to_file($file, "# a comment\npool_size = 3\n listen = '127.0.0.1:0'\nqueue_sise = 4\n");
($out, $err) = run_command([ 'timeout', 30, $program, @base, '--config', $file ]);
like($err, qr/unrecognized setting "queue_sise"/, 'a setting in a file that is none');
{
	local $ENV{MILLM_BRIDGE_POOL_SISE} = 3;
	($out, $err) = run_command([ $program, @base ]);
	like($err, qr/unrecognized setting "MILLM_BRIDGE_POOL_SISE"/, 'or in the environment');
}
{
	local $ENV{MILLM_BRIDGE_POOL_SIZE} = 6000;
	($out, $err) = run_command([ $program, @base, '--config', $file =~ s/bridge\.conf$/good.conf/r ]);
	like($err, qr/could not open ".*good\.conf"/, 'a file that is not there');
	append_to_file($file =~ s/bridge\.conf$/good.conf/r, "pool_size = 5000\n");
	($out, $err) = run_command([ $program, @base, '--config', $file =~ s/bridge\.conf$/good.conf/r ]);
	like($err, qr/pool_size is 6000/, 'the environment wins over the file');
	($out, $err) = run_command([ $program, @base, '--pool-size=7000' ]);
	like($err, qr/pool_size is 7000/, 'a flag wins over the environment');
}

my $key = $node->safe_psql('postgres', q(SELECT millm.create_api_key('test', 'app')));
my $auth = "Authorization: Bearer $key";
load_model($node, $SMOLLM2);
start_bridge('--header_timeout', '2', '--body_timeout', '2', '--pool_size', '8');

#---------------------------------------------------------------------------------------------------------------------
# Plain HTTP

my $r = ask('GET', '/health');
is("$r->{status} $r->{json}{status}", '200 ok', 'health');
is(ask('GET', '/ready')->{json}{status}, 'ready', 'ready');
like(ask('GET', '/metrics')->{body}, qr/^millm_bridge_requests_total\{method="GET",route="\/health",status="200"\} 1$/m, 'metrics');
is(error_code(ask('GET', '/nowhere')), '404 not_found', 'no such path');
$r = ask('PUT', '/v1/models', undef, $auth);
is(error_code($r), '405 method_not_allowed', 'no such method');
like($r->{head}, qr/^Allow: GET, HEAD\r$/m, 'the answer says which there are');
$r = ask('HEAD', '/v1/models', undef, $auth);
like($r->{head}, qr/^HTTP\/1\.1 200.*Content-Length: [1-9]/s, 'HEAD is GET');
is($r->{body}, '', 'without the body');
like(ask('GET', '/health', undef, 'X-Request-Id: mine-1')->{head}, qr/^X-Request-Id: mine-1\r$/m, "a client's own request id");
like(ask('GET', '/health', undef, "X-Request-Id: no\"good")->{head}, qr/^X-Request-Id: req-[0-9a-f]{24}\r$/m, 'not if it is none');
my $sock = connect_bridge();
syswrite($sock, text_of('GET', '/v1/models', undef, $auth) . text_of('GET', '/health') . text_of('GET', '/nowhere'));
like(read_until($sock, qr/not_found/), qr/"object":"list".*"status":"ok".*not_found/s, 'three requests at once are answered in turn');
$sock = connect_bridge();
syswrite($sock, "\r\nPOST /v1/completions HTTP/1.1\r\nHost: x\r\n$auth\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
	  . "8;x=y\r\n{\"model\"\r\n3\r\n:1}\r\n0\r\nTrailer: t\r\n\r\n");
is(error_code(read_answer($sock)), '400 invalid_type', 'a chunked body is read');

for my $case (
	[ "GET /health HTTP/1.1\nHost: x\n\n", '400 malformed_request', 'bare LF' ],
	[ "GET /health HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n", '400 malformed_request', 'a folded header' ],
	[ "GET /health HTTP/1.1\r\n\r\n", '400 malformed_request', 'no Host' ],
	[ "GET /health HTTP/2.0\r\nHost: x\r\n\r\n", '505 malformed_request', 'another version' ],
	[ "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", '400 malformed_request', 'two framings' ],
	[ "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n{}\n", '400 malformed_request', 'two lengths' ],
	[ "POST /v1/completions HTTP/1.1\r\nHost: x\r\n$auth\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", '400 malformed_request', 'no chunk size' ],
	[ "GET /health HTTP/1.1\r\nHost: x\r\nA: " . 'b' x 20000 . "\r\n\r\n", '431 headers_too_large', 'a head that is too large' ],
	[ "POST /v1/completions HTTP/1.1\r\nHost: x\r\n$auth\r\nContent-Type: application/json\r\nContent-Length: 99999999\r\n\r\n", '413 body_too_large', 'a body that is too large' ],
	[ "GET /v1/models/%ff HTTP/1.1\r\nHost: x\r\n$auth\r\n\r\n", '400 invalid_path', 'a path that is not UTF-8' ],
	[ text_of('POST', '/v1/completions', '{}', $auth, 'Content-Type: text/plain'), '415 unsupported_media_type', 'not JSON' ],
	[ text_of('POST', '/v1/completions', '{}'), '401 missing_api_key', 'no key' ],
	[ text_of('POST', '/v1/completions', {model => $SMOLLM2, prompt => 'x'}, 'Authorization: Bearer millm-no'), '401 invalid_api_key', 'a wrong key' ],
	[ text_of('POST', '/v1/completions', {model => $SMOLLM2, prompt => 'x'}, 'Authorization: Basic eA=='), '401 invalid_api_key', 'another scheme' ])
{
	my ($bytes, $expected, $what) = @$case;
	$sock = connect_bridge();
	syswrite($sock, $bytes);
	$r = read_answer($sock);
	is(error_code($r), $expected, $what);
	ok($r->{json}{error}{message} && $r->{json}{error}{type}, "$what: with message and type");
}
my $start = time;
$sock = connect_bridge();
syswrite($sock, $_), sleep 0.3 for ("GET /hea", "lth HT", "TP/1.1", "\r\nHos", "t: x", "\r\nA", ": b\r\n", "C: d", "\r\n");
is(error_code(read_answer($sock)), '408 request_timeout', 'a head that comes slowly');
$sock = connect_bridge();
syswrite($sock, "POST /v1/completions HTTP/1.1\r\nHost: x\r\n$auth\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n");
syswrite($sock, $_), sleep 0.3 for split //, '{"model": ';
is(error_code(read_answer($sock)), '408 request_timeout', 'a body that comes slowly');

#---------------------------------------------------------------------------------------------------------------------
# OpenAI's routes

$r = ask('GET', '/v1/models', undef, $auth);
is_deeply([ map { $_->{id} } @{ $r->{json}{data} } ], [$SMOLLM2], 'the loaded model is listed');
is(ask('GET', "/v1/models/$SMOLLM2", undef, $auth)->{json}{object}, 'model', 'one model');
is(error_code(ask('GET', '/v1/models/nope', undef, $auth)), '404 model_not_found', 'a model that is not there');

my %question = (model => $SMOLLM2, messages => [ { role => 'user', content => 'Count to five.' } ], temperature => 0, max_tokens => 12);
my $sql = q(SELECT millm.chat(messages => '[{"role": "user", "content": "Count to five."}]', temperature => 0, max_tokens => 12));
my $expected = decode_json($node->safe_psql('postgres', $sql));
$r = ask('POST', '/v1/chat/completions', \%question, $auth);
is($r->{status}, 200, 'a chat completion') or diag $r->{body};
is($r->{json}{choices}[0]{message}{content}, $expected->{text}, 'is what SQL says');
is($r->{json}{choices}[0]{finish_reason}, $expected->{finish_reason}, 'and why it ended');
is_deeply([ @{ $r->{json}{usage} }{qw(prompt_tokens completion_tokens total_tokens)} ],
	[ @{ $expected->{usage} }{qw(prompt_tokens completion_tokens)}, $expected->{usage}{prompt_tokens} + $expected->{usage}{completion_tokens} ], 'usage');
like($r->{json}{system_fingerprint}, qr{^$SMOLLM2/}, 'system_fingerprint');

$r = ask('POST', '/v1/chat/completions', { %question, stream => JSON::PP::true, stream_options => { include_usage => JSON::PP::true } }, $auth);
like($r->{head}, qr{^Content-Type: text/event-stream}m, 'a stream');
my @events = events($r->{body});
is(join('', map { $_->{delta}{content} // '' } map { @{ $_->{choices} } } @events), $expected->{text}, 'of the same text');
is($events[0]{choices}[0]{delta}{role}, 'assistant', 'the role comes first');
is($events[-2]{choices}[0]{finish_reason}, $expected->{finish_reason}, 'the reason of its end last');
is_deeply($events[-1]{choices}, [], 'then the usage,');
is($events[-1]{usage}{completion_tokens}, $expected->{usage}{completion_tokens}, 'as it was');
like($r->{body}, qr/\ndata: \[DONE\]\n\n\z/, '[DONE]');
ok(!grep({ exists $_->{usage} } events(ask('POST', '/v1/chat/completions', { %question, stream => JSON::PP::true }, $auth)->{body})), 'no usage unless asked for');

$r = ask('POST', '/v1/chat/completions', { %question, n => 3, temperature => 1, seed => 1, logprobs => JSON::PP::true, top_logprobs => 2 }, $auth);
is_deeply([ map { $_->{index} } @{ $r->{json}{choices} } ], [ 0, 1, 2 ], 'three choices');
my $logprob = $r->{json}{choices}[2]{logprobs}{content}[0];
is(join(' ', sort keys %$logprob), 'bytes logprob token top_logprobs', "logprobs in OpenAI's shape");
is(scalar @{ $logprob->{top_logprobs} }, 2, 'with two beside each');
is($r->{json}{choices}[1]{message}{content},
	$node->safe_psql('postgres', q(SELECT millm.chat(messages => '[{"role": "user", "content": "Count to five."}]', temperature => 1, seed => 1, max_tokens => 12, n => 3)->'choices'->1->>'text')),
	'the choices of SQL');

my %completion = (model => $SMOLLM2, prompt => [ 'The capital of France is', 'One two three' ], temperature => 0, max_tokens => 4, n => 2);
$r = ask('POST', '/v1/completions', \%completion, $auth);
my @texts = map { $_->{text} } @{ $r->{json}{choices} };
is(scalar @texts, 4, 'two prompts, two choices each');
like("$texts[0]$texts[1]", qr/Paris.*Paris/s, "the first prompt's come first");
@events = events(ask('POST', '/v1/completions', { %completion, stream => JSON::PP::true }, $auth)->{body});
is(join('|', map { my $i = $_; join('', map { $_->{text} } grep { $_->{index} == $i } map { @{ $_->{choices} } } @events) } 0 .. 3), join('|', @texts), 'streamed, by index');
$r = ask('POST', '/v1/completions', { %completion, prompt => 'One two three', n => 1, logprobs => 1 }, $auth);
is_deeply($r->{json}{choices}[0]{logprobs}{text_offset}[0], 13, 'logprobs of completions: where the text begins');
is(join('', @{ $r->{json}{choices}[0]{logprobs}{tokens} }), $r->{json}{choices}[0]{text}, 'and its tokens');

# Embeddings
my %embedding = (model => $SMOLLM2, input => [ 'The cat sat on the mat.', 'x' ]);
$r = ask('POST', '/v1/embeddings', \%embedding, $auth);
is($r->{status}, 200, 'embeddings') or diag $r->{body};
is('{' . join(',', @{ $r->{json}{data}[0]{embedding} }[ 0 .. 3 ]) . '}', $node->safe_psql('postgres', q(SELECT e[1:4] FROM millm.embed(ARRAY['The cat sat on the mat.', 'x']) e LIMIT 1)), 'are those of SQL');
is($r->{json}{data}[1]{index}, 1, 'in order');
is($r->{json}{usage}{prompt_tokens}, $node->safe_psql('postgres', q(SELECT millm.count_tokens('The cat sat on the mat.') + millm.count_tokens('x'))), 'usage');
my $base64 = ask('POST', '/v1/embeddings', { %embedding, encoding_format => 'base64' }, $auth)->{json}{data}[1]{embedding};
is_deeply([ map { sprintf '%.4g', $_ } unpack('f<*', decode_base64($base64)) ], [ map { sprintf '%.4g', $_ } @{ $r->{json}{data}[1]{embedding} } ], 'base64 is the same');
is(ask('POST', '/v1/embeddings', { %embedding, dimensions => 576 }, $auth)->{status}, 200, "the model's dimensions");
for my $case (
	[ { dimensions => 100 }, '400 unsupported_parameter' ],
	[ { input => [] }, '400 invalid_type' ],
	[ { input => [ 1, 2 ] }, '400 unsupported_parameter' ],
	[ { input => '' }, '400 invalid_argument' ],
	[ { input => undef }, '400 missing_parameter' ],
	[ { encoding_format => 'hex' }, '400 invalid_type' ])
{
	my ($change, $code) = @$case;
	is(error_code(ask('POST', '/v1/embeddings', { %embedding, %$change }, $auth)), $code, 'refused: ' . encode_json($change));
}

for my $case (
	[ { foo => 1 }, '400 unknown_parameter', 'foo' ],
	[ { temperature => 'hot' }, '400 invalid_type', 'temperature' ],
	[ { temperature => -1 }, '400 invalid_argument', undef ],
	[ { top_k => 1.5 }, '400 invalid_type', 'top_k' ],
	[ { n => 129 }, '400 out_of_range', 'n' ],
	[ { max_completion_tokens => 13 }, '400 invalid_argument', qr/max_/ ],
	[ { max_tokens => 3000000000 }, '400 out_of_range', 'max_tokens' ],
	[ { max_tokens => 100000 }, '400 context_length_exceeded', undef ],
	[ { messages => [] }, '400 invalid_type', 'messages' ],
	[ { messages => ['x'] }, '400 missing_parameter', 'messages' ],
	[ { messages => [ { role => 'user', content => [ { type => 'image_url', image_url => {} } ] } ] }, '400 unsupported_parameter', 'messages' ],
	[ { model => undef }, '400 missing_parameter', 'model' ],
	[ { model => 'other' }, '400 model_not_loaded', undef ],
	[ { tools => [ {} ] }, '400 unsupported_parameter', 'tools' ],
	[ { response_format => { type => 'json_object' } }, '400 unsupported_parameter', 'response_format' ],
	[ { stop => [1] }, '400 invalid_type', 'stop' ],
	[ { stream_options => { include_usage => JSON::PP::true } }, '400 invalid_argument', 'stream_options' ],
	[ { stream => JSON::PP::true, temperature => -1 }, '400 invalid_argument', undef ])
{
	my ($change, $code, $param) = @$case;
	$r = ask('POST', '/v1/chat/completions', { %question, %$change }, $auth);
	is(error_code($r), $code, 'refused: ' . encode_json($change)) or diag $r->{body};
	like($r->{json}{error}{param} // '', ref $param ? $param : qr/^\Q$param\E$/, 'by name') if $param;
}
for my $case (
	[ '{"model": "a\u0000b"}', qr/U\+0000/ ],
	[ '{"seed": 123456789012345678901234567890}', qr/number is too large/ ],
	[ '[' x 100000, qr/nested too deeply/ ],
	[ "{\"model\": \"\xff\"}", qr/not UTF-8/ ],
	[ '{"model": "a"} x', qr/follows its end/ ],
	[ '{"n": 1, "n": 2}', qr/twice/ ],
	[ '', qr/ends too early|cannot be read/ ],
	[ '[]', qr/must be a JSON object/ ])
{
	my ($body, $pattern) = @$case;
	$r = ask('POST', '/v1/chat/completions', $body, $auth);
	is($r->{status}, 400, 'not a request: ' . substr($body, 0, 40));
	like($r->{json}{error}{message}, $pattern, 'for its reason');
}

# A role's privileges, and the limits of a key
my $other = $node->safe_psql('postgres', q(SELECT millm.create_api_key('nobody', 'other')));
is(error_code(ask('POST', '/v1/chat/completions', \%question, "Authorization: Bearer $other")), '403 permission_denied', 'a role that may not');
my $small = $node->safe_psql('postgres', q(SELECT millm.create_api_key('small', 'app', max_concurrency => 1, max_tokens => 20)));
my $hasty = $node->safe_psql('postgres', q(SELECT millm.create_api_key('hasty', 'app', timeout => '0.5 s')));
is(error_code(ask('POST', '/v1/chat/completions', { %question, max_tokens => 21 }, "Authorization: Bearer $small")), '400 max_tokens_exceeded', 'max_tokens of a key');
is(error_code(ask('POST', '/v1/chat/completions', { %question, n => 2 }, "Authorization: Bearer $small")), '400 max_tokens_exceeded', 'for all choices together');
delete $question{max_tokens};
is(ask('POST', '/v1/chat/completions', \%question, "Authorization: Bearer $small")->{json}{usage}{completion_tokens}, 20, 'and when the request names none');
is(error_code(ask('POST', '/v1/chat/completions', { %question, n => 21 }, "Authorization: Bearer $small")), '400 max_tokens_exceeded', 'more choices than tokens');
is(error_code(ask('POST', '/v1/chat/completions', { %question, max_tokens => 5000 }, "Authorization: Bearer $hasty")), '504 request_timeout', 'timeout of a key');
$node->safe_psql('postgres', q(SELECT millm.revoke_api_key('small')));
is(error_code(ask('POST', '/v1/chat/completions', \%question, "Authorization: Bearer $small")), '401 invalid_api_key', 'a revoked key');
pump_log();
like(${ $bridge{err} }, qr/"key":"small"/, 'the log names the key');
unlike(${ $bridge{err} }, qr/Count to five|millm-[-\w]{20}/, 'and has no prompt and no key');

#---------------------------------------------------------------------------------------------------------------------
# Clients that go away

my %long = (model => $SMOLLM2, prompt => 'Count: 1 2 3 4 5 6 7 8 9 10 11 12 13', temperature => 0, max_tokens => 6000);
for my $stream (JSON::PP::false, JSON::PP::true)
{
	my $what = $stream ? 'stream' : 'answer';
	$sock = connect_bridge();
	syswrite($sock, text_of('POST', '/v1/completions', { %long, stream => $stream }, $auth));
	$stream ? read_until($sock, qr/data:.*data:/s) : wait_running(1);
	$start = time;
	close $sock;
	wait_idle("closed while a $what is made", $start);

	$sock = connect_bridge();
	syswrite($sock, text_of('POST', '/v1/completions', { %long, stream => $stream }, $auth));
	wait_running(1);
	$start = time;
	setsockopt($sock, SOL_SOCKET, SO_LINGER, pack('ii', 1, 0));
	close $sock;
	wait_idle("reset while a $what is made", $start);

	$sock = connect_bridge();
	syswrite($sock, text_of('POST', '/v1/completions', { %long, max_tokens => 30, stream => $stream }, $auth));
	shutdown($sock, 1);
	$r = read_answer($sock);
	is($r->{status}, 200, "half closed: the $what comes");
	like($r->{body}, $stream ? qr/\[DONE\]/ : qr/"finish_reason":"length"/, 'whole');
}

# A client that sends on while its request runs, and then goes away
$sock = connect_bridge();
$sock->blocking(0);
syswrite($sock, text_of('POST', '/v1/completions', \%long, $auth) . text_of('GET', '/health') x 1000);
wait_running(1);
$start = time;
close $sock;
wait_idle('closed behind unread requests', $start);

# Queued requests of clients that go away never run
my @sockets = map { connect_bridge() } 1 .. 12;
syswrite($_, text_of('POST', '/v1/completions', { %long, stream => JSON::PP::true }, $auth)) for @sockets;
wait_running(8);
like(ask('GET', '/metrics')->{body}, qr/^millm_bridge_queued_requests 4$/m, 'eight run, four wait');
$start = time;
close $_ for @sockets;
wait_idle('twelve at once', $start);
is(stop_bridge(), 0, 'SIGTERM: ended well') or diag ${ $bridge{err} };

#---------------------------------------------------------------------------------------------------------------------
# Limits

start_bridge('--pool_size', '1', '--queue_size', '1', '--anonymous_role', 'app', '--max_connections', '4', '--send_timeout', '2', '--keepalive_interval', '1');
($sock, my $second) = map { connect_bridge() } 1 .. 2;
syswrite($sock, text_of('POST', '/v1/completions', { %long, stream => JSON::PP::true }));
read_until($sock, qr/data:/);
syswrite($second, text_of('POST', '/v1/completions', { %long, max_tokens => 1, stream => JSON::PP::true }));
like(read_until($second, qr/keep-alive/), qr/^HTTP\/1\.1 200.*: keep-alive\n\n/s, 'a stream that waits for its turn gets comments');
$r = ask('POST', '/v1/completions', { %long, max_tokens => 1 });
is(error_code($r), '503 queue_full', 'the queue is full');
like($r->{head}, qr/^Retry-After: \d+\r$/m, 'come again');
is(ask('GET', '/health')->{status}, 200, 'the bridge itself answers');
my @idle = map { connect_bridge() } 1 .. 2;
is(error_code(ask('GET', '/health')), '503 too_many_connections', 'one connection too many');
close $_ for @idle;
close $sock;
like(read_until($second, qr/\[DONE\]/), qr/\[DONE\]/, 'its turn comes');
close $second;
is(error_code(ask('GET', '/v1/models', undef, 'Host: evil.example')), '400 malformed_request', 'two Hosts');
$sock = connect_bridge();
syswrite($sock, "GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n");
is(error_code(read_answer($sock)), '403 host_not_allowed', "without a key, a stranger's name for this machine is not enough");

is(error_code(ask('POST', '/api/models/1/unload', undef, 'Origin: http://evil.example')), '403 ORIGIN_NOT_ALLOWED', "nor is it for a stranger's page");
is(ask('GET', '/v1/models', undef, 'Origin: http://evil.example', $auth)->{status}, 200, 'who has a key may come from anywhere');

# A client that does not read: its stream waits, others do not, and in the end it is sent away
load_model($node, 'tiny-long');
my %flood = (model => 'tiny-long', prompt => 'Hello', temperature => 1, seed => 1, max_tokens => 4000, n => 8, stream => JSON::PP::true);
stop_bridge();
start_bridge('--pool_size', '2', '--send_timeout', '2', '--anonymous_role', 'app');
$sock = connect_bridge(rcvbuf => 4096);
syswrite($sock, text_of('POST', '/v1/completions', \%flood));
read_until($sock, qr/data:/);
$start = time;
ok(wait_true(sub { ask('GET', '/metrics')->{body} =~ /^millm_bridge_requests_total\{method="POST",route="\/v1\/completions",status="499"\} 1$/m }),
	'a client that does not read is sent away');
wait_idle('not reading', $start);
close $sock;

#---------------------------------------------------------------------------------------------------------------------
# The ends of the server, and of the bridge

load_model($node, $SMOLLM2);
is(ask('GET', '/v1/models')->{status}, 200, 'before the server ends');
$node->stop('fast');
is(error_code(ask('GET', '/v1/models')), '503 database_unavailable', 'the server is gone');
is(ask('GET', '/ready')->{status}, 503, 'not ready');
is(ask('GET', '/health')->{status}, 200, 'but alive');
$node->start;
ok(wait_true(sub { ask('GET', '/ready')->{status} == 200 }), 'ready again when the server is back');
$node->restart;
is(ask('GET', '/v1/models')->{status}, 200, 'connections that died while they were idle are noticed');

load_model($node, $SMOLLM2);
$sock = connect_bridge();
syswrite($sock, text_of('POST', '/v1/completions', { %long, max_tokens => 100, stream => JSON::PP::true }));
my $head = read_until($sock, qr/data:/);
my $idle = connect_bridge();
$bridge{harness}->signal('TERM');
my $rest = read_until($sock, qr/\[DONE\]/);
like($head . $rest, qr/\[DONE\]/, 'SIGTERM: a stream that runs comes to its end');
is(read_until($idle, qr/x/), '', 'an idle connection is closed');
$bridge{harness}->finish;
is($bridge{harness}->result(0), 0, 'then the bridge ends') or diag ${ $bridge{err} };

start_bridge('--drain_timeout', '1', '--anonymous_role', 'app');
$sock = connect_bridge();
syswrite($sock, text_of('POST', '/v1/completions', { %long, stream => JSON::PP::true }));
$head = read_until($sock, qr/data:/);
$start = time;
$bridge{harness}->signal('TERM');
like(read_until($sock, qr/shutting_down/), qr/"code":"shutting_down"/, 'a stream that goes on for too long is told');
$bridge{harness}->finish;
$bridge{harness} = start([ 'true' ]);
wait_idle('after the bridge', $start);

$node->stop;
done_testing();

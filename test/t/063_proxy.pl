# TLS in front of the bridge: nginx with contrib/nginx-millm-bridge.conf as it is, but for addresses and the certificate.
use strict;
use warnings;
use Cwd qw(abs_path);
use FindBin;
use IO::Select;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time sleep);
use MillmTest;
use TestBridge;

my ($nginx) = grep { -x } map { "$_/nginx" } split(/:/, $ENV{PATH}), '/usr/sbin', '/usr/local/sbin', "$ENV{MILLM_FIXTURES}/nginx/usr/sbin";
die "there is no nginx: run test/fixture/make all\n" unless $nginx;
my $node = new_server('proxy');
sub sql { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
sql(q(CREATE ROLE millm_bridge LOGIN NOINHERIT; CREATE ROLE app; SELECT millm.grant_bridge('millm_bridge'), millm.grant_user('app')));
our $key = sql(q(SELECT millm.create_api_key('app', 'app')));
load_model($node, 'tiny-long');
my $bridge = TestBridge->new($node, '--pool_size', 4);

# --- The recipe ---------------------------------------------------------------------------------------------------
my $dir = abs_path(PostgreSQL::Test::Utils::tempdir());
my $port = PostgreSQL::Test::Cluster::get_free_port();
system_or_bail('openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-keyout', "$dir/key.pem", '-out', "$dir/cert.pem",
	'-subj', '/CN=llm.example.com', '-addext', 'subjectAltName=DNS:llm.example.com');
my $site = slurp_file("$FindBin::Bin/../../contrib/nginx-millm-bridge.conf");
my $address = $bridge->address;
for ([ 'server 127.0.0.1:8080;', "server $address;" ], [ 'listen 443 ssl;', "listen 127.0.0.1:$port ssl;" ],
	[ '/etc/ssl/certs/llm.example.com.pem', "$dir/cert.pem" ], [ '/etc/ssl/private/llm.example.com.key', "$dir/key.pem" ])
{
	my ($from, $to) = @$_;
	is($site =~ s/\Q$from\E/$to/g, 1, "the recipe has \"$from\" once");
}
append_to_file("$dir/site.conf", $site);
append_to_file("$dir/nginx.conf", "daemon off;\npid $dir/nginx.pid;\nerror_log $dir/error.log;\nevents { }\nhttp {\naccess_log off;\n"
	. join('', map { "${_}_temp_path $dir/$_;\n" } qw(client_body proxy fastcgi uwsgi scgi)) . "include $dir/site.conf;\n}\n");
my $pid = fork() // die "fork: $!";
exec($nginx, '-p', $dir, '-e', "$dir/error.log", '-c', "$dir/nginx.conf") || POSIX::_exit(1) if $pid == 0;
END { kill('TERM', $pid) if $pid; }

# curl's arguments for a path
sub curl
{
	my ($path, @more) = @_;
	return ('curl', '-sS', '-N', '--max-time', '60', '--cacert', "$dir/cert.pem", '--resolve', "llm.example.com:$port:127.0.0.1",
		'-H', "Authorization: Bearer $key", @more, "https://llm.example.com:$port$path");
}
sub get { my ($out, $err) = run_command([ curl(@_) ]); return $out . $err; }
ok(wait_true(sub { get('/health') =~ /"ok"/ }), 'nginx answers with what the bridge says') or diag slurp_file("$dir/error.log");

# --- What comes through ---------------------------------------------------------------------------------------------
like(get('/v1/models'), qr/"tiny-long"/, 'the key goes through');
like(get('/api/models', '-X', 'POST', '-H', 'Content-Type: application/json', '-d', '{"repo_id": "a/b"}'), qr/PERMISSION_DENIED/, 'bodies and errors, too');
{
	local $key = 'millm-no';
	is(get('/v1/models', '-o', '/dev/null', '-w', '%{http_code}'), '401', 'a wrong key stays out');
}
is(get('/metrics', '-o', '/dev/null', '-w', '%{http_code}'), '403', 'the metrics are not for everybody');
append_to_file("$dir/large", 'x' x (5 << 20));
is(get('/v1/chat/completions', '-o', '/dev/null', '-w', '%{http_code}', '-H', 'Content-Type: application/json', '--data-binary', "\@$dir/large"), '413', 'a large body is refused');

# --- Streams come as they are written -----------------------------------------------------------------------------------
sub start
{
	my @command = curl(@_);
	my $child = open(my $out, '-|', @command) // die "curl: $!";
	return { pid => $child, out => $out, buf => '' };
}
# Everything up to what is wanted; at most 20 s
sub read_until
{
	my ($c, $wanted) = @_;
	my $end = time + 20;
	until ($c->{buf} =~ $wanted)
	{
		my $left = $end - time;
		return 0 if $left <= 0 || !IO::Select->new($c->{out})->can_read($left) || !sysread($c->{out}, $c->{buf}, 65536, length $c->{buf});
	}
	return 1;
}
my $events = start('/api/events');
ok(read_until($events, qr/listening/), 'a stream of events begins');
sql(q(SELECT pg_notify('millm_progress', '{"event": "model:test"}')));
ok(read_until($events, qr/event: model:test\n/), 'an event comes while the stream goes on');
kill('TERM', $events->{pid});
close $events->{out};
my $chat = start('/v1/completions', '-H', 'Content-Type: application/json', '-d',
	'{"model": "tiny-long", "prompt": "a", "max_tokens": 6000, "n": 16, "temperature": 0, "stream": true}');	# some seconds of work, even here
ok(read_until($chat, qr/data: \{.*data: \{/s), 'text comes');
cmp_ok(sql('SELECT running FROM millm.status()'), '>', 0, '... while it is still being written');
kill('TERM', $chat->{pid});
close $chat->{out};
my $start = time;
ok(wait_true(sub { sql('SELECT running FROM millm.status()') == 0 }), 'a client that goes away ends the generation, through the proxy, too');
note sprintf('after %.0f ms', 1000 * (time - $start));
unlike(slurp_file("$dir/error.log"), qr/\[(emerg|alert|crit|warn)\]/, 'nginx has no complaint') or diag slurp_file("$dir/error.log");
kill('TERM', $pid);
waitpid($pid, 0);
$pid = 0;
$bridge->stop;
$node->stop;
done_testing();

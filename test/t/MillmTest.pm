# MillmTest.pm -- what the server tests share: a cluster with millm, its models, and two clients that the usual ones cannot be.
#
#   MillmTest::Session   a frontend of the PostgreSQL protocol that reads exactly when the test says so
#   MillmTest::Engine    a direct client of millm-engine, past the server, for a look at its pages
#
# Models are the fixtures' (MILLM_FIXTURES): "tiny", a random llama with a context of 128 tokens, "tiny-long", one with 8192
# that is as fast, and "SmolLM2-135M-Instruct", whose thousands of tokens no test waits for.
package MillmTest;

use strict;
use warnings;
use Cwd qw(abs_path);
use Exporter 'import';
use File::Spec::Functions qw(rel2abs);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time sleep);

our @EXPORT = qw(new_server load_model kill_server engine_pages wait_pages wait_true sqlstate $SMOLLM2 $LONG);

our $SMOLLM2 = 'SmolLM2-135M-Instruct';
# Arguments of a generation that goes on for longer than any test: thousands of tokens.
our $LONG = q('Count: 1 2 3 4 5 6 7 8 9 10 11 12 13', raw => true, temperature => 0, max_tokens => 6000);

my $fixtures = $ENV{MILLM_FIXTURES} // die "MILLM_FIXTURES is not set\n";
my %fixture = ('tiny' => "$fixtures/tiny/llama", 'tiny-long' => "$fixtures/tiny/llama-long", $SMOLLM2 => "$fixtures/$SMOLLM2");

# A started cluster with the extension, in database postgres unless the first of the lines of configuration that may follow names another.
sub new_server
{
	my ($name, @conf) = @_;
	my ($database) = ($conf[0] // '') =~ /^millm\.database = '(\w+)'/ ? $1 : 'postgres';
	my $node = PostgreSQL::Test::Cluster->new($name);
	$node->init(extra => [ '--encoding', 'UTF8', '--locale', 'C' ]);
	my $cache = rel2abs($node->basedir . '/cache');
	$node->append_conf('postgresql.conf', join("\n",
			"shared_preload_libraries = 'millm'",
			"millm.cache_dir = '$cache'",
			"millm.hf_endpoint = 'http://127.0.0.1:9'",
			"max_connections = 100",
			@conf, ''));
	$node->start;
	$node->safe_psql('postgres', "CREATE DATABASE $database") if $database ne 'postgres';
	$node->safe_psql($database, 'CREATE EXTENSION millm');
	return $node;
}

# Register the fixture where it lies and load it, instead of what is loaded.
sub load_model
{
	my ($node, $name, $database) = @_;
	$database //= 'postgres';
	$node->safe_psql($database, "SELECT millm.register_local('$fixture{$name}', name => '$name')")
	  unless $node->safe_psql($database, "SELECT 1 FROM millm.models WHERE name = '$name'");
	$node->safe_psql($database, "SELECT millm.wait('$name')");
	$node->safe_psql($database, "SELECT millm.load('$name')");
}

# A process and all below it.
sub family
{
	my ($pid) = @_;
	my %children;
	for (glob('/proc/[0-9]*/stat')) { open(my $f, '<', $_) or next; push @{ $children{$2} }, $1 if (<$f> // '') =~ /^(\d+) \(.*\) \S (\d+)/; }
	my @all = ($pid);
	for (my $i = 0; $i < @all; $i++) { push @all, @{ $children{ $all[$i] } // [] }; }
	return @all;
}

# kill -9 of the postmaster and of the other processes named, sub if there is one, and start another; the rest of the first must go by itself.
sub kill_server
{
	my ($node, $sub, @others) = @_;
	my @all = family(slurp_file($node->data_dir . '/postmaster.pid') =~ /^(\d+)/);
	$node->kill9;
	kill('KILL', @others);
	wait_true(sub { !grep { kill(0, $_) } @all }) or die "processes of the killed server are still there\n";
	$sub->() if $sub;
	$node->start;
}

# The loaded model's directory.
sub fixture_dir { return $fixture{$_[0]}; }

# (pages free, requests running or waiting), as the engine says.
sub engine_pages
{
	my ($node) = @_;
	my $status = MillmTest::Engine->new($node, { op => 'status' })->result;
	return ($status->{pages_free}, $status->{running} + $status->{waiting});
}

# Wait until sub returns true; at most 20 s.
sub wait_true
{
	my ($sub) = @_;
	my $end = time + 20;
	while (time < $end)
	{
		return 1 if $sub->();
		sleep 0.01;
	}
	return 0;
}

# Passes when the engine is idle and has so many free pages again.
sub wait_pages
{
	my ($node, $expected, $what) = @_;
	my $start = time;
	my @now;
	my $good = wait_true(sub { @now = engine_pages($node); $now[0] == $expected && $now[1] == 0 });
	note sprintf('%s: pages free after %.0f ms', $what, 1000 * (time - $start)) if $good;
	ok($good, "$what: the pages are free again") or diag "expected $expected free and 0 at work, have $now[0] and $now[1]";
}

# The SQLSTATE with which sql fails, '' when it does not; and psql's whole message.
sub sqlstate
{
	my ($node, $sql) = @_;
	my ($rc, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\n$sql");
	my ($state) = $err =~ /(?:ERROR|FATAL):  (\w{5}):/;
	return ($state // '', $err);
}

#---------------------------------------------------------------------------------------------------------------------
package MillmTest::Session;

use IO::Select;
use IO::Socket::UNIX;
use JSON::PP;
use Time::HiRes qw(time);

# Connected and ready for a query.
sub new
{
	my ($class, $node, %arg) = @_;
	my $sock = IO::Socket::UNIX->new(Peer => $node->host . '/.s.PGSQL.' . $node->port) or die "connect: $!";
	my $self = bless { sock => $sock, buf => '' }, $class;
	my %startup = (user => $arg{user} // scalar getpwuid($<), database => $arg{database} // 'postgres', application_name => 'MillmTest');
	my $body = pack('N', 196608) . join('', map { "$_\0$startup{$_}\0" } sort keys %startup) . "\0";
	syswrite($sock, pack('N', 4 + length $body) . $body);
	$self->until_ready;
	return $self;
}

sub send
{
	my ($self, $sql) = @_;
	syswrite($self->{sock}, 'Q' . pack('N', 5 + length $sql) . "$sql\0");
	return $self;
}

# The next message as (type, payload); nothing when none comes within seconds (20 unless told), or at the end.
sub message
{
	my ($self, $seconds) = @_;
	my $end = time + ($seconds // 20);
	while (1)
	{
		if (length $self->{buf} >= 5)
		{
			my ($type, $len) = unpack('aN', $self->{buf});
			if (length $self->{buf} > $len)
			{
				my $payload = substr($self->{buf}, 5, $len - 4);
				substr($self->{buf}, 0, $len + 1) = '';
				$self->{pid} = unpack('N', $payload) if $type eq 'K';
				return ($type, $payload);
			}
		}
		my $left = $end - time;
		return if $left <= 0 || !IO::Select->new($self->{sock})->can_read($left);
		return unless sysread($self->{sock}, $self->{buf}, 65536, length $self->{buf});
	}
}

# Read until the session is idle or ended: { rows => [first columns], state => SQLSTATE or '' or 'no answer', message => ..., detail, hint }
sub until_ready
{
	my ($self, $seconds) = @_;
	my $result = { rows => [], state => '', message => '', detail => '', hint => '' };
	while (my ($type, $payload) = $self->message($seconds))
	{
		if ($type eq 'D')
		{
			my ($n, $len) = unpack('nN', $payload);
			push @{ $result->{rows} }, $len == 0xFFFFFFFF ? undef : substr($payload, 6, $len);
		}
		elsif ($type eq 'E')
		{
			my %field = map { (substr($_, 0, 1), substr($_, 1)) } split /\0/, $payload;
			@$result{qw(state message detail hint)} = map { $_ // '' } @field{qw(C M D H)};
		}
		return $result if $type eq 'Z';
	}
	$result->{state} ||= 'no answer';
	return $result;
}

sub query { my ($self, $sql, $seconds) = @_; return $self->send($sql)->until_ready($seconds); }
# The events that LISTEN brings, as objects, until one passes the test; at most 20 s.
sub events
{
	my ($self, $is_last) = @_;
	my @events;
	MillmTest::wait_true(sub {
		$self->send('SELECT 1');
		while (my ($type, $payload) = $self->message)
		{
			push @events, decode_json((split /\0/, substr($payload, 4))[1]) if $type eq 'A';
			last if $type eq 'Z';
		}
		return grep { $is_last->($_) } @events;
	});
	return @events;
}

sub pid { return $_[0]{pid}; }
sub hang_up { close $_[0]{sock}; }

#---------------------------------------------------------------------------------------------------------------------
package MillmTest::Engine;

use Cwd qw(getcwd);
use IO::Socket::UNIX;
use JSON::PP;

sub new
{
	my ($class, $node, $request) = @_;
	# the whole path may be too long for a socket's address
	my $cwd = getcwd();
	chdir $node->data_dir or die "chdir: $!";
	my $sock = IO::Socket::UNIX->new(Peer => 'pgsql_tmp.millm/engine.sock');
	my $why = $!;
	chdir $cwd or die "chdir: $!";
	die "millm-engine's socket: $why\n" unless $sock;
	my $self = bless { sock => $sock }, $class;
	$self->put(1, { protocol => 1, version => '1.0.0', program => 'MillmTest' });
	$self->put(2, $request);
	return $self;
}

sub put
{
	my ($self, $kind, $payload) = @_;
	my $json = encode_json($payload);
	syswrite($self->{sock}, pack('VV', length $json, $kind) . $json);
}

# The next frame as (kind, object); nothing at the end.
sub frame
{
	my ($self) = @_;
	my ($header, $json) = ('', '');
	return unless read($self->{sock}, $header, 8) == 8;
	my ($len, $kind) = unpack('VV', $header);
	return unless read($self->{sock}, $json, $len) == $len;
	return ($kind, decode_json($json));
}

# The payload of the final RESULT; dies of anything else.
sub result
{
	my ($self) = @_;
	while (my ($kind, $object) = $self->frame)
	{
		return $object if $kind == 6;
		die "engine: $object->{code}: $object->{message}\n" if $kind == 7;
	}
	die "engine: the connection ended\n";
}

1;

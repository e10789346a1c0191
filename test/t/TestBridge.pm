# TestBridge.pm -- millm-bridge as a child of a test, and two ways to talk to it.
#
#   call()                a request and its answer, checked against what /openapi.json promises for it
#   TestBridge::Stream    one that is read event by event, when the test says so
package TestBridge;

use strict;
use warnings;
use HTTP::Tiny;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time sleep);

# Started as role millm_bridge of the node and listening on a port of its own; further arguments are flags.  Dies after 20 s.
sub new
{
	my ($class, $node, @flags) = @_;
	my $log = PostgreSQL::Test::Utils::tempdir() . '/bridge.' . int(1e6 * time) . '.log';
	my $pid = fork() // die "fork: $!";
	if ($pid == 0)
	{
		open(STDOUT, '>', '/dev/null');
		open(STDERR, '>', $log);
		exec($ENV{MILLM_BRIDGE} // 'millm-bridge', '--listen', '127.0.0.1:0', '--database', 'host=' . $node->host . ' port=' . $node->port . ' dbname=postgres user=millm_bridge', @flags)
		  or POSIX::_exit(1);
	}
	my $self = bless { pid => $pid, owner => $$, logfile => $log, http => HTTP::Tiny->new(timeout => 30, keep_alive => 1) }, $class;
	my $end = time + 20;
	until (-e $log && (($self->{address}) = slurp_file($log) =~ /"address": ?"([^"]+)"/))
	{
		die 'the bridge did not start: ' . (-e $log ? slurp_file($log) : '') . "\n" if time > $end || waitpid($pid, 1) == $pid;
		sleep 0.02;
	}
	$self->{promised} = $self->call('GET', '/openapi.json')->{json}{paths};
	return $self;
}

sub address { return $_[0]{address}; }
sub log { return slurp_file($_[0]{logfile}); }
sub pid { return $_[0]{pid}; }

# The statuses that /openapi.json lists for it; undef: it has no such path or method.
sub promised
{
	my ($self, $method, $path) = @_;
	$path =~ s/\?.*//;
	for my $pattern (sort { ($a =~ /\{/) <=> ($b =~ /\{/) } keys %{ $self->{promised} })
	{
		my $re = join '[^/]+', map { quotemeta } split /\{\w+\}/, $pattern, -1;
		return $self->{promised}{$pattern}{ lc $method } && $self->{promised}{$pattern}{ lc $method }{responses} if $path =~ /^$re$/;
	}
	return;
}

# { status, json, headers, content }.  body is an object or, as it is, text; key may be undef.
sub call
{
	my ($self, $method, $path, $body, $key, %headers) = @_;
	$headers{Authorization} = "Bearer $key" if defined $key;
	$headers{'Content-Type'} //= 'application/json' if defined $body;
	my $reply = $self->{http}->request($method, "http://$self->{address}$path",
		{ headers => \%headers, defined $body ? (content => ref $body ? encode_json($body) : $body) : () });
	my $promised = $self->{promised} && $self->promised($method, $path);
	fail("$method $path answers $reply->{status}, as /openapi.json does not say") if $promised && !$promised->{ $reply->{status} };
	return { %$reply, json => scalar eval { decode_json($reply->{content}) } };
}

sub stop
{
	my ($self) = @_;
	kill('TERM', $self->{pid});
	waitpid($self->{pid}, 0);
	$self->{owner} = 0;
	return $?;
}

sub DESTROY
{
	my ($self) = @_;
	return unless $self->{owner} == $$;
	local $?;
	$self->stop;
}

#---------------------------------------------------------------------------------------------------------------------
package TestBridge::Stream;

use IO::Select;
use IO::Socket::INET;
use Socket;
use JSON::PP;
use Time::HiRes qw(time);

# Asked for; the head of the answer is read.  small: little fits between us before somebody must wait.
sub new
{
	my ($class, $bridge, $path, $key, %arg) = @_;
	my $sock = IO::Socket::INET->new(Proto => 'tcp') or die "socket: $!";
	$sock->setsockopt(SOL_SOCKET, SO_RCVBUF, pack('i', 4096)) if $arg{small};
	my ($host, $port) = split /:/, $bridge->address;
	$sock->connect(pack_sockaddr_in($port, inet_aton($host))) or die "connect: $!";
	# 1.0: an answer without chunks
	syswrite($sock, "GET $path HTTP/1.0\r\nAuthorization: Bearer $key\r\n\r\n");
	my $self = bless { sock => $sock, buf => '' }, $class;
	my $end = time + 20;
	$self->more($end) until $self->{buf} =~ s/^(HTTP.*?)\r\n\r\n//s;
	$self->{head} = $1;
	return $self;
}

sub more
{
	my ($self, $end) = @_;
	my $left = $end - time;
	die "nothing came\n" if $left <= 0 || !IO::Select->new($self->{sock})->can_read($left);
	return sysread($self->{sock}, $self->{buf}, 65536, length $self->{buf}) || die "the stream has ended\n";
}

sub head { return $_[0]{head}; }

# The next event as (name, object), comments passed over; nothing at the end, or when none comes within seconds (20 unless told).
sub event
{
	my ($self, $seconds) = @_;
	my $end = time + ($seconds // 20);
	while (1)
	{
		while ($self->{buf} =~ s/^(.*?)\n\n//s)
		{
			my $event = $1;
			next if $event =~ /^:/;
			my ($name) = $event =~ /^event: (.*)$/m;
			my ($data) = $event =~ /^data: (.*)$/m;
			return ($name // '', decode_json($data));
		}
		return unless eval { $self->more($end) };
	}
}

# Events up to one that the test accepts, as [name, object]; all that came when none does.
sub until
{
	my ($self, $is_last, $seconds) = @_;
	my @events;
	while (my ($name, $data) = $self->event($seconds))
	{
		push @events, [ $name, $data ];
		last if $is_last->($name, $data);
	}
	return @events;
}

sub hang_up { close $_[0]{sock}; }

1;

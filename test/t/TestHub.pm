# TestHub.pm -- the test hub (test/hub) as a child of a test.
package TestHub;

use strict;
use warnings;
use FindBin;
use HTTP::Tiny;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Time::HiRes qw(time sleep);

# Started and answering; dies after 20 s.
sub new
{
	my ($class) = @_;
	my $ready = PostgreSQL::Test::Utils::tempdir() . '/hub.json';
	my $pid = fork() // die "fork: $!";
	if ($pid == 0)
	{
		open(STDOUT, '>', '/dev/null');
		open(STDERR, '>&', \*STDOUT);
		exec('python3', "$FindBin::Bin/../hub/hub.py", '--root', "$ENV{MILLM_FIXTURES}/hub", '--port', '0', '--ready-file', $ready) or POSIX::_exit(1);
	}
	my $self = bless { pid => $pid, owner => $$ }, $class;
	my $end = time + 20;
	until (-s $ready)
	{
		die "the test hub did not start\n" if time > $end;
		sleep 0.02;
	}
	$self->{endpoint} = decode_json(slurp_file($ready))->{endpoint};
	return $self;
}

sub endpoint { return $_[0]{endpoint}; }

sub post
{
	my ($self, $path, $body) = @_;
	my $reply = HTTP::Tiny->new->post("$self->{endpoint}$path", { content => encode_json($body) });
	die "$path: $reply->{status} $reply->{content}\n" unless $reply->{success};
	return length $reply->{content} ? decode_json($reply->{content}) : undef;
}

# Replace the list of faults (test/hub/README.md).
sub faults { my ($self, @faults) = @_; return $self->post('/_faults', \@faults); }
# The requests since the last call of faults().
sub requests { return @{ $_[0]->post('/_log', {}) }; }

sub DESTROY
{
	my ($self) = @_;
	return unless $self->{owner} == $$;
	local $?;
	kill('TERM', $self->{pid});
	waitpid($self->{pid}, 0);
}

1;

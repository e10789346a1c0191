# Where a model computes: millm.device, and the sentence that says why CUDA is not used, on a machine without a GPU.
use strict;
use warnings;
use MillmTest;
use Test::More;

plan skip_all => 'this machine has an NVIDIA device: test/gpu/run is for it' if -e '/dev/nvidiactl';

my $node = new_server('device');

sub sql { return $node->safe_psql('postgres', $_[0]) }

sub set_device
{
	sql("ALTER SYSTEM SET millm.device = '$_[0]'");
	$node->reload;
}

# No module where there was no nvcc, no driver where there was: in either case the CPU, and a sentence.
my $why = qr/CUDA is not used: (?:the CUDA module is not installed \(there is no ".*libmillm_cuda\.so"\)|there is no NVIDIA driver \(libcuda\.so\.1 cannot be opened\))/;

is(sql('SELECT device IS NULL AND device_reason IS NULL FROM millm.status()'), 't', 'nothing is loaded: no device');
load_model($node, 'tiny');
is(sql('SELECT device FROM millm.status()'), 'cpu', 'auto is the CPU');
like(sql('SELECT device_reason FROM millm.status()'), qr/^$why$/, 'and says why');

set_device('cuda:1');
sql('SELECT millm.unload()');
my ($code, $out, $err) = $node->psql('postgres', "SELECT millm.load('tiny')", extra_params => ['-v', 'VERBOSITY=verbose']);
isnt($code, 0, 'a device by name must be there');
like($err, qr/ERROR:  0A000: device "cuda:1" is not available/, 'its name');
like($err, qr/DETAIL:  $why\./, 'and why it is not');
($code, $out, $err) = $node->psql('postgres', "SELECT * FROM millm.estimate_memory('tiny')");
like($err, qr/device "cuda:1" is not available/, 'nor can be said what it would take there');

set_device('cpu');
load_model($node, 'tiny');
is(sql('SELECT device_reason FROM millm.status()'), 'CUDA is not used: millm.device is cpu', 'disabled');

$node->stop;
done_testing();

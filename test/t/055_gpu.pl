# A server with a GPU, which is emulated (test/cuda): what is loaded there, what of its memory is shown and given back, and what a device that fails costs.
use strict;
use warnings;
use File::Copy qw(copy);
use MillmTest;
use PostgreSQL::Test::Utils;
use Test::More;

# An installation of our own, with the emulated module beside the engine
my ($bindir, $library) = map { chomp(my $path = `pg_config --$_`); $path } qw(bindir pkglibdir);
my ($installed) = $bindir =~ m{^(.*/build/pg)/} or plan skip_all => 'the server is not in build/pg';
my $own = PostgreSQL::Test::Utils::tempdir() . '/pg';
system('cp', '-a', $installed, $own) == 0 or die "cp: $?\n";
s{^\Q$installed\E}{$own} for $bindir, $library;
my ($helpers) = glob("$library/millm/*");
copy('emulated/libmillm_cuda.so', "$helpers/libmillm_cuda.so") or die "copy: $!\n";
$ENV{PATH} = "$bindir:$ENV{PATH}";
$ENV{LD_LIBRARY_PATH} = Cwd::abs_path('emulated/driver');
delete $ENV{CUDA_VISIBLE_DEVICES};

my $node = new_server('gpu', "millm.max_sequences = 2", "millm.context_length = 64");
my $listener = MillmTest::Session->new($node);
$listener->query('LISTEN millm_progress');

sub sql { return $node->safe_psql('postgres', $_[0]) }
sub fault { append_to_file($node->data_dir . '/millm_fault', "$_[0]\n"); }
sub greedy { return sql(q(SELECT millm.generate('once upon', raw => true, max_tokens => 4, temperature => 0))); }

# --- memory --------------------------------------------------------------------------------------------
is(sql('SELECT device, name, total_bytes, free_bytes, used_bytes, context_bytes FROM millm.memory() OFFSET 1'),
	'cuda:0|Emulated GPU 0|8589934592|8589934592|0|0', 'memory() has a GPU on which nothing is loaded');
load_model($node, 'tiny');
is(sql('SELECT device, device_reason FROM millm.status()'), 'cuda:0|Emulated GPU 0, compute capability 9.0', 'auto is the GPU');
my $total = sql(q(SELECT total_bytes FROM millm.estimate_memory('tiny')));
is(sql('SELECT used_bytes, context_bytes FROM millm.memory() OFFSET 1'), "$total|300000000", 'what the model and the context have of it');
is(sql('SELECT used_bytes IS NULL AND context_bytes IS NULL FROM millm.memory() LIMIT 1'), 't', 'what it has of the RAM is not known');
my @events = $listener->events(sub { $_[0]{event} eq 'model:load:complete' });
is_deeply([ map { $_->{stage} } grep { $_->{event} eq 'model:load:progress' } @events ], ['moving_to_gpu'], 'the load moved it there');
my $text = greedy();

# --- the device fails: one request, one engine -----------------------------------------------------------
my $pid = sql('SELECT engine_pid FROM millm.status()');
fault('illegal_address');
my ($state, $err) = sqlstate($node, q(SELECT millm.generate('once upon', raw => true, max_tokens => 4)));
like($err, qr/ENGINE_UNAVAILABLE|engine/, 'the request that was under way fails') or diag $err;
my $unavailable = sql(q(SELECT sqlstate FROM millm.error_list() WHERE name = 'ENGINE_UNAVAILABLE'));
is($state, $unavailable, 'as ENGINE_UNAVAILABLE');
ok(wait_true(sub { sql(qq(SELECT engine_state = 'ready' AND engine_pid <> $pid FROM millm.status())) eq 't' }), 'another engine is there');
like(sql('SELECT last_exit FROM millm.status()'), qr/the CUDA device has failed: an illegal memory access was encountered/, 'status() says why');
like(slurp_file($node->logfile), qr/the CUDA device has failed: an illegal memory access was encountered: cudaErrorIllegalAddress, seen at /, 'and so does the log');
load_model($node, 'tiny');
is(greedy(), $text, 'and it answers as the first one did');

# --- the device's memory runs out: one load ---------------------------------------------------------------
$pid = sql('SELECT engine_pid FROM millm.status()');
my ($rc, $out);
($rc, $out, $err) = $node->psql('postgres', 'SELECT millm.unload()');
like($err, qr/NOTICE:  [\d.]+ MB of the memory of cuda:0 are free again/, 'an unload names the device');
my ($freed) = $err =~ /NOTICE:  ([\d.]+) MB/;
cmp_ok(abs($freed - $total / 1e6), '<=', 0.05 * $total / 1e6 + 0.05, 'and gives back what the load took');
fault('out_of_memory');
($state, $err) = sqlstate($node, q(SELECT millm.load('tiny')));
like($err, qr/insufficient device memory for/, 'the load fails') or diag $err;
is($state, sql(q(SELECT sqlstate FROM millm.error_list() WHERE name = 'INSUFFICIENT_MEMORY')), 'as INSUFFICIENT_MEMORY');
load_model($node, 'tiny');
is(greedy(), $text, 'the next one does not');
is(sql('SELECT engine_pid FROM millm.status()'), $pid, 'in the same engine');

# --- killed ---------------------------------------------------------------------------------------------
kill('KILL', $pid);
ok(wait_true(sub { sql(qq(SELECT engine_state = 'ready' AND engine_pid <> $pid FROM millm.status())) eq 't' }), 'kill -9: another engine');
load_model($node, 'tiny');
is(greedy(), $text, 'which answers, too');

$node->stop;
done_testing();

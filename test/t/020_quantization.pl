# Q4 and Q8: downloaded and made of local directories; what is published quantized; kill, cancel, retry, sizes.
use strict;
use warnings;
use Cwd qw(abs_path);
use Digest::SHA;
use File::Copy qw(copy);
use File::Glob ':bsd_glob';
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;
use TestHub;

my $hub = TestHub->new;
my $node = new_server('quantization', '# the test hub', "millm.hf_endpoint = '@{[ $hub->endpoint ]}'");
my $base = abs_path($node->basedir);
my $cache = "$base/cache";

sub sql { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
sub fails { my ($sql, $state, $what) = @_; my ($got, $error) = sqlstate($node, $sql); is($got, $state, $what) or diag $error; return $error; }
# What psql writes beside the result
sub notices { my ($sql) = @_; my ($rc, $out, $err) = $node->psql('postgres', $sql); is($rc, 0, $sql) or diag $err; return $err; }
sub slow { $hub->faults({ where => 'any', bytes_per_second => 100000 }); }
sub bytes { my ($name, $bytes) = @_; return wait_true(sub { sql("SELECT bytes >= $bytes FROM millm.progress WHERE name = '$name'") eq 't' }); }
sub row { my ($name, $columns) = @_; return sql("SELECT $columns FROM millm.models WHERE name = '$name'"); }
# The registry's figure, in bytes
sub disk_bytes { my ($name) = @_; return sql("SELECT disk_bytes FROM millm.registry WHERE name = '$name'"); }
sub directory { my ($name) = @_; return "$cache/" . sql("SELECT directory FROM millm.registry WHERE name = '$name'"); }
# What du says of a directory, its own entry not counted
sub du { my ($dir) = @_; my $bytes = 0; $bytes += -s $_ for grep { -f } (glob("$dir/*"), glob("$dir/.[!.]*")); return $bytes; }
sub digests { my ($dir) = @_; return join "\n", map { "$_ " . Digest::SHA->new(256)->addfile("$dir/$_")->hexdigest } sort map { s/.*\///r } grep { -f } glob("$dir/*"); }
# Of the tensors: the header before them names the source
sub weights { my ($dir) = @_; my $file = slurp_file("$dir/model.safetensors"); return Digest::SHA::sha256_hex(substr($file, 8 + unpack('Q<', $file))); }
sub quantization_config { my ($dir) = @_; return decode_json(slurp_file("$dir/config.json"))->{quantization_config} // {}; }
# It loads, and writes the same text twice
sub works
{
	my ($name) = @_;
	is(sql("SELECT millm.load('$name')"), 'loaded', "$name loads");
	my $text = sql(q(SELECT millm.generate('The', raw => true, max_tokens => 12, temperature => 0)));
	isnt($text, '', 'generates');
	is(sql(q(SELECT millm.generate('The', raw => true, max_tokens => 12, temperature => 0))), $text, 'the same again');
	is(row($name, 'status, estimated_memory_mb > 0'), 'loaded|t', 'and shows it');
}

# --- A 16-bit repository in three ways -------------------------------------------------------------------
$hub->faults;
sql(q(BEGIN; SELECT millm.download('millm-test/tiny-f16'); ROLLBACK));
ok(!glob("$cache/huggingface/*"), 'ROLLBACK leaves nothing');
my %estimate;
my %name = (FP16 => 'tiny-f16', Q4 => 'tiny-f16-Q4', Q8 => 'tiny-f16-Q8');
for my $alias (qw(none nf4 BNB-8bit))
{
	my $quantization = { none => 'FP16', nf4 => 'Q4', 'BNB-8bit' => 'Q8' }->{$alias};
	my $session = MillmTest::Session->new($node);
	$session->query('BEGIN');
	like($session->query("SELECT millm.download('millm-test/tiny-f16', '$alias', name => '$name{$quantization}')")->{rows}[0], qr/^\d+$/, "download as $alias");
	$estimate{$quantization} = $session->query("SELECT disk_bytes FROM millm.registry WHERE name = '$name{$quantization}'")->{rows}[0];
	is($session->query('SELECT estimated_memory_mb IS NOT NULL AND disk_size_mb IS NOT NULL AND status = $$pending$$ FROM millm.models ORDER BY id DESC LIMIT 1')->{rows}[0],
		't', 'whose sizes are estimated');
	$session->query('COMMIT');
	is(sql("SELECT millm.wait('$name{$quantization}')"), 'ready', "ready as $quantization");
	is(row($name{$quantization}, 'quantization, status, download_progress'), "$quantization|ready|100", 'and says so');
	my $dir = directory($name{$quantization});
	is($dir, "$cache/huggingface/millm-test--tiny-f16--$quantization", 'in its directory');
	cmp_ok(abs(disk_bytes($name{$quantization}) - du($dir)), '<=', 4096, 'the size is what lies there');
	cmp_ok(abs($estimate{$quantization} - du($dir)), '<=', 0.05 * du($dir) + 4096, 'and what was expected, about');
	is((JSON::PP->new->decode(slurp_file("$dir/.millm_meta.json")))->{quantization}, $quantization, 'the meta file knows');
	works($name{$quantization});
}
cmp_ok(disk_bytes($name{Q4}), '<', disk_bytes($name{Q8}), 'Q4 is smaller than Q8');
cmp_ok(disk_bytes($name{Q8}), '<', disk_bytes($name{FP16}), 'which is smaller than FP16');
is(quantization_config(directory($name{Q4}))->{bnb_4bit_quant_type}, 'nf4', 'Q4 is NF4 to others');
ok(quantization_config(directory($name{Q8}))->{load_in_8bit}, 'Q8 is LLM.int8');
like(fails(q(SELECT millm.download('millm-test/tiny-f16', 'Q4')), 'ML002', 'the same again'), qr/"millm-test\/tiny-f16" is already registered as Q4.*It is model "tiny-f16-Q4" with id \d+/s, 'is refused');
like(fails(q(SELECT millm.download('millm-test/tiny-f16', 'q4', name => 'again')), 'ML002', 'under another name too'), qr/"millm-test\/tiny-f16" is already registered as Q4/, 'which says why');

# --- F32 becomes 16-bit ----------------------------------------------------------------------------------------
like(notices(q(SELECT millm.download('millm-test/tiny-f32', 'FP16'))), qr/NOTICE:  "millm-test\/tiny-f32" is stored as F32; it becomes BF16, half the size/, 'which a notice says');
is(sql(q(SELECT millm.wait('tiny-f32'))), 'ready', 'is converted');
cmp_ok(disk_bytes('tiny-f32'), '<', 600000, 'to half of its 992 kB');
is(decode_json(slurp_file(directory('tiny-f32') . '/config.json'))->{dtype}, 'bfloat16', 'config.json says so');
works('tiny-f32');
like(notices(q(SELECT millm.download('millm-test/tiny-gpt2'))), qr/is stored as F32; it becomes BF16, then Q4/, 'and before it is quantized');
is(sql(q(SELECT millm.wait('tiny-gpt2'))), 'ready', 'GPT-2, whose weights lie the other way round');
works('tiny-gpt2');

# --- PyTorch checkpoints ------------------------------------------------------------------------------------
for my $form ('FP16', 'Q4')
{
	sql("SELECT millm.download('millm-test/tiny-bin', '$form', name => 'bin-$form')");
	is(sql("SELECT millm.wait('bin-$form')"), 'ready', "a .bin as $form");
	ok(-f directory("bin-$form") . '/model.safetensors' && !glob(directory("bin-$form") . '/*.bin'), 'becomes safetensors');
	cmp_ok(abs(disk_bytes("bin-$form") - du(directory("bin-$form"))), '<=', 4096, 'its size is what lies there');
	works("bin-$form");
}
is(weights(directory('bin-FP16')), weights("$ENV{MILLM_FIXTURES}/hub/millm-test/tiny-llama"), 'the weights are the same');
sql(q(SELECT millm.download('millm-test/evil-bin', name => 'evil')));
is(sql(q(SELECT millm.wait('evil'))), 'error', 'one that would run a program');
like(row('evil', 'error_code, error_message'), qr/^INVALID_MODEL_FILE\|.*the global posix\.system/, 'is refused by name');
ok(!glob("$cache/huggingface/*evil*"), 'and leaves no file');

# --- What is published quantized stays so --------------------------------------------------------------------------
my %published = (nf4 => 'Q4', int8 => 'Q8');
for my $kind (sort keys %published)
{
	my $other = { Q4 => 'Q8', Q8 => 'Q4' }->{ $published{$kind} };
	like(fails("SELECT millm.download('millm-test/tiny-$kind', '$other')", '0A000', "$kind as $other is refused"), qr/quantized already \($kind, which is $published{$kind}\).*HINT/s, 'by name');
	like(notices("SELECT millm.download('millm-test/tiny-$kind', 'FP16')"), qr/NOTICE:  "millm-test\/tiny-$kind" is quantized already \($kind\); it stays as it is: $published{$kind}/,
		"$kind as it is published");
	is(sql("SELECT millm.wait('tiny-$kind')"), 'ready', 'ready');
	is(row("tiny-$kind", 'quantization'), $published{$kind}, "is $published{$kind}");
	my $files = digests(directory("tiny-$kind"));
	is($files =~ s/^millm_head_int8\.safetensors .*\n//mr, digests("$ENV{MILLM_FIXTURES}/hub/millm-test/tiny-$kind"), 'bit by bit');
	like($files, qr/^millm_head_int8\.safetensors /m, 'and the screening copy of its head beside it');
	works("tiny-$kind");
	fails("SELECT millm.download('millm-test/tiny-$kind', '$published{$kind}', name => 'again')", 'ML002', "and that is what $published{$kind} means");
}

# The Hub does not say so in time, but the files do
sub deaf { $hub->faults({ where => 'info', delay => 2, times => 1 }); }
deaf();
like(notices(q(SELECT millm.download('millm-test/tiny-nf4', 'FP16', name => 'blind'))), qr/did not answer in time/, 'nobody knows yet');
is(row('blind', 'quantization, disk_size_mb IS NULL'), 'FP16|t', 'it is what was asked for, of unknown size');
is(sql(q(SELECT millm.wait('blind'))), 'ready', 'ready');
is(row('blind', 'quantization'), 'Q4', 'it is what it is');
deaf();
notices(q(SELECT millm.download('millm-test/tiny-nf4', 'Q8', name => 'never')));
is(sql(q(SELECT millm.wait('never'))), 'error', 'what cannot be');
is(row('never', 'error_code'), 'UNSUPPORTED', 'is an error with a name');
$hub->faults;

# --- Local directories ------------------------------------------------------------------------------------------------
my $local = "$base/my model";
mkdir $local;
copy($_, $local) for glob("$ENV{MILLM_FIXTURES}/tiny/llama-f16/*");
my $before = digests($local);
is(sql("BEGIN; SELECT millm.register_local('$local', 'Q4') > 0; SELECT status, source FROM millm.models WHERE name = 'my model'; ROLLBACK"), "t\npending|local", 'register_local() as Q4 is work to come');
ok(!-e "$cache/local", 'ROLLBACK leaves nothing');
sql("SELECT millm.register_local('$local', 'Q4')");
is(sql(q(SELECT millm.wait('my model'))), 'ready', 'quantized');
is(row('my model', 'quantization, source, repo_id, local_path, download_progress'), "Q4|local||$local|100", 'its row');
like(directory('my model'), qr/\/cache\/local\/my_model--[0-9a-f]{16}--Q4$/, 'its directory');
cmp_ok(abs(disk_bytes('my model') - du(directory('my model'))), '<=', 4096, 'its size');
is(quantization_config(directory('my model'))->{bnb_4bit_quant_type}, 'nf4', 'its format');
is(weights(directory('my model')), weights(directory($name{Q4})), 'the same weights as downloaded');
is(digests($local), $before, 'the original is what it was');
works('my model');
like(fails("SELECT millm.register_local('$local', 'nf4')", 'ML002', 'the same again'), qr/is already registered as Q4/, 'is refused');
like(fails("SELECT millm.register_local('$local/', 'nf4', name => 'again')", 'ML002', 'under another name too'), qr/is already registered as Q4/, 'which says why');
is(sql("SELECT millm.register_local('$local', name => 'as it is') > 0"), 't', 'as it is');
is(row('as it is', 'quantization, status, local_path, download_progress'), "FP16|ready|$local|", 'in its place');
like(notices("SELECT millm.register_local('$ENV{MILLM_FIXTURES}/tiny-bnb/nf4')"), qr/quantized already \(nf4\); it stays as it is: Q4/, 'a quantized one');
is(row('nf4', 'quantization, status'), 'Q4|ready', 'is in its place, too');
fails("SELECT millm.register_local('$ENV{MILLM_FIXTURES}/tiny-bnb/nf4', 'Q8', name => 'again')", '0A000', 'and will not be Q8');
sql('SELECT millm.unload()');
my $made = directory('my model');
sql(q(SELECT millm.delete('my model'), millm.delete('as it is'), millm.delete('nf4')));
ok(wait_true(sub { !-e $made }), 'delete() removes what millm made');
is(digests($local), $before, 'and nothing else');

# Behind a slow download they wait, can be canceled, fail, and be retried
slow();
sql(q(SELECT millm.download('millm-test/tiny-long', 'FP16')));
ok(bytes('tiny-long', 1), 'a download under way');
sql("SELECT millm.register_local('$local', 'Q4'), millm.register_local('$local', 'Q8', name => 'eight')");
is(row('my model', 'status'), 'pending', 'what comes after it waits');
sql(q(SELECT millm.cancel('my model')));
is(sql(q(SELECT millm.wait('my model'))), 'error', 'and can be canceled');
is(row('my model', 'status, error_code, error_message'), 'error|CANCELED|the quantization was canceled', 'as an error with a name');
ok(!glob("$cache/local/my_model--*--Q4"), 'no file is left');
rename "$local/model.safetensors", "$local/away";
sql(q(SELECT millm.cancel('tiny-long')));
is(sql(q(SELECT millm.wait('eight'))), 'error', 'a source that has lost its weights is an error');
is(row('eight', q(error_code IN ('MODEL_FILES_MISSING', 'INVALID_LOCAL_PATH', 'MODEL_DOWNLOAD_FAILED'))), 't', 'with a name') or diag row('eight', 'error_code, error_message');
rename "$local/away", "$local/model.safetensors";
fails(q(SELECT millm.retry('eight', 'hf_good')), '22023', 'retry() wants no token for it');
sql(q(SELECT millm.retry('my model'), millm.retry('eight')));
is(sql(q(SELECT millm.wait('my model'))) . sql(q(SELECT millm.wait('eight'))), 'readyready', 'and makes both');
works('eight');

# --- Kill, restart, cancel in a Q4 download -----------------------------------------------------------------------------
slow();
sql(q(SELECT millm.download('millm-test/sharded', 'Q4')));
ok(bytes('sharded', 300000), 'a Q4 download under way');
my $requests = () = $hub->requests;
kill('KILL', sql('SELECT hub_pid FROM millm.status()'));
is(sql(q(SELECT millm.wait('sharded'))), 'ready', 'goes on by itself when millm-hub is killed');
my @log = $hub->requests;
my @later = grep { $_->{port} eq 'cdn' && $_->{path} =~ /00001-of/ } @log[$requests .. $#log];
is(scalar @later, 0, 'its first file is not fetched again');
is(row('sharded', 'quantization, status'), 'Q4|ready', 'it is whole');
cmp_ok(abs(disk_bytes('sharded') - du(directory('sharded'))), '<=', 4096, 'with its size');
is_deeply([ glob(directory('sharded') . '/.partial*') ], [], 'and nothing but it');
works('sharded');

slow();
sql(q(SELECT millm.download('millm-test/extras', 'Q8')));
ok(bytes('extras', 200000), 'a Q8 download under way');
$node->restart;
is(sql(q(SELECT millm.wait('extras'))), 'ready', 'goes on by itself when the server restarts');
is(row('extras', 'quantization'), 'Q8', 'as what it was');

slow();
sql(q(SELECT millm.delete('tiny-long'); SELECT millm.download('millm-test/tiny-long', 'Q4', name => 'long')));
ok(bytes('long', 300000), 'a Q4 download under way');
cmp_ok(du(directory('long')), '>', 0, 'with bytes on disk');
my $dir = directory('long');
sql(q(SELECT millm.cancel('long')));
is(sql(q(SELECT millm.wait('long'))), 'error', 'is canceled');
ok(!-e $dir, 'and everything of it is gone') or diag join ' ', glob("$dir/*"), glob("$dir/.*");
$hub->faults;
sql(q(SELECT millm.retry('long')));
is(sql(q(SELECT millm.wait('long'))), 'ready', 'retry() makes it again');
is(row('long', 'quantization'), 'Q4', 'as Q4');

unlike(slurp_file($node->logfile), qr/terminating any other active server processes|PANIC|TRAP/, 'no crash on the way');
$node->stop;
done_testing();

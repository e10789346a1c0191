# What a model takes: estimates against what loads really take, refusals with what would fit, force; the disk; what a model is made of.
use strict;
use warnings;
use Cwd qw(abs_path);
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

my $MB = 1 << 20;
my $node = new_server('memory', '# one thread', 'millm.threads = 1');
my $cache = abs_path($node->basedir) . '/cache';
my $fixtures = $ENV{MILLM_FIXTURES};

sub sql { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
sub fails { my ($sql, $state, $what) = @_; my ($got, $error) = sqlstate($node, $sql); is($got, $state, $what) or diag $error; return $error; }
sub engine { return sql('SELECT engine_pid FROM millm.status()'); }

# Bytes that the engine has mapped: of files in dir, and of no file (what it has reserved, touched or not)
sub mapped
{
	my ($dir) = @_;
	my ($files, $private) = (0, 0);
	for (split /\n/, slurp_file('/proc/' . engine() . '/maps'))
	{
		my ($from, $to, $mode, $path) = /^(\w+)-(\w+) (\S+) \S+ \S+ \d+\s*(.*)$/ or next;
		my $bytes = hex($to) - hex($from);
		$private += $bytes if $mode =~ /^rw.p/ && $path !~ /^\//;
		$files += $bytes if $dir && index($path, "$dir/") == 0;
	}
	return ($files, $private);
}
sub resident { return slurp_file('/proc/' . engine() . '/status') =~ /RssAnon:\s+(\d+) kB/ ? 1024 * $1 : die; }
# 5 % or 16 MB, the larger
sub near { my ($got, $expected, $what) = @_; my $limit = 0.05 * $expected > 16 * $MB ? 0.05 * $expected : 16 * $MB;
	cmp_ok(abs($got - $expected), '<=', $limit, sprintf('%s: %.1f MB, expected %.1f MB', $what, $got / 1e6, $expected / 1e6)); }

# --- Estimates and loads -------------------------------------------------------------------------------------
load_model($node, 'tiny');	# what the first load of an engine's life leaves behind is no model's
sql('SELECT millm.unload()');
my %model = ('llama' => "$fixtures/tiny/llama-bf16", 'gpt2' => "$fixtures/tiny/gpt2", 'sharded' => "$fixtures/tiny/llama-sharded", 'nf4' => "$fixtures/tiny-bnb/nf4",
	'fp4-gpt2' => "$fixtures/tiny-bnb/fp4-gpt2", 'int8' => "$fixtures/tiny-bnb/int8", 'smol' => "$fixtures/SmolLM2-135M-Instruct", 'smol-q8' => "$fixtures/SmolLM2-135M-Instruct-int8");
# of each family: heads, KV heads, head_dim, FFN size; which of the points that not every family has
my %family = (
	'bloom' => '4 4 16 256 ln1 resid_mid ln2 ln_final', 'cohere' => '4 2 16 172 ln1 rot_q pre_linear ln_final', 'falcon' => '4 1 16 172 ln1 rot_q ln_final',
	'falcon-new' => '4 2 16 256 ln1 rot_q ln2 ln_final', 'falcon-rw' => '16 16 6 384 ln1 resid_mid ln2 ln_final', 'gemma' => '4 1 24 172 ln1 rot_q resid_mid ln2 pre_linear ln_final',
	'gemma2' => '4 2 24 172 ln1 rot_q resid_mid ln2 pre_linear ln_final', 'gemma3' => '4 2 24 172 ln1 rot_q resid_mid ln2 pre_linear ln_final',
	'glm4' => '4 2 24 172 ln1 rot_q resid_mid ln2 pre_linear ln_final', 'granite' => '4 2 16 172 ln1 rot_q resid_mid ln2 pre_linear ln_final',
	'mistral' => '4 2 24 172 ln1 rot_q resid_mid ln2 pre_linear ln_final', 'neox' => '4 4 24 172 ln1 rot_q ln2 ln_final',
	'neox-sequential' => '4 4 24 172 ln1 rot_q resid_mid ln2 ln_final', 'olmo2' => '4 2 16 172 rot_q resid_mid pre_linear ln_final',
	'opt' => '4 4 16 172 pos_embed ln1 resid_mid ln2 ln_final', 'opt-after' => '4 4 16 172 pos_embed ln1 resid_mid ln2', 'phi' => '4 4 16 172 ln1 rot_q ln_final',
	'phi3' => '4 2 16 172 ln1 rot_q resid_mid ln2 pre_linear ln_final', 'qwen2' => '4 2 16 172 ln1 rot_q resid_mid ln2 pre_linear ln_final',
	'qwen3' => '4 2 24 172 ln1 rot_q resid_mid ln2 pre_linear ln_final', 'smollm3' => '4 2 16 172 ln1 rot_q resid_mid ln2 pre_linear ln_final',
	'stablelm' => '4 2 16 172 ln1 rot_q resid_mid ln2 pre_linear ln_final', 'stablelm-parallel' => '4 2 16 172 ln1 rot_q pre_linear ln_final',
	'starcoder2' => '4 2 16 172 ln1 rot_q resid_mid ln2 ln_final');
# every family, as it is and, but for gpt-oss, quantized
my @families = (sort(keys %family), qw(mixtral qwen2_moe qwen3_moe));
$model{gpt_oss} = "$fixtures/tiny/gpt_oss";
$model{$_} = "$fixtures/tiny/$_" for @families;
my @made = ((map { ([ $_, 'Q4' ], [ $_, 'Q8' ]) } 'llama', 'gpt2', @families), [ 'smol', 'Q4' ]);
sql("SELECT millm.register_local('$model{$_}', name => '$_')") for sort keys %model;
sql("SELECT millm.register_local('$model{$_->[0]}', '$_->[1]', name => '$_->[0]-$_->[1]')") for @made;
sql("SELECT millm.wait('$_->[0]-$_->[1]')") for @made;
for my $name (sort keys %model, map { "$_->[0]-$_->[1]" } @made)
{
	my ($weights, $kv, $workspace, $total) = split /\|/, sql("SELECT weights_bytes, kv_cache_bytes, workspace_bytes, total_bytes FROM millm.estimate_memory('$name')");
	is($total, $weights + $kv + $workspace, "$name: the parts are the whole");
	my ($none, $before) = mapped();
	my $resident = resident();
	sql("SELECT millm.load('$name')");
	my $dir = abs_path(sql("SELECT coalesce('$cache/' || directory, local_path) FROM millm.registry WHERE name = '$name'"));
	my ($files, $private) = mapped($dir);
	near($files, $weights, "$name: weights");
	near($private - $before, $kv + $workspace, "$name: private memory");
	is(sql('SELECT used_bytes FROM millm.memory()'), $total, "$name: memory() shows it");
	sql('SELECT millm.unload()');
	cmp_ok(resident() - $resident, '<=', 4 * $MB, "$name: the unload gives it back");
}
is(sql('SELECT used_bytes FROM millm.memory()'), 0, 'no model, no memory');
is(sql('SELECT device, name, total_bytes > free_bytes, free_bytes > 0 FROM millm.memory()'), 'cpu|RAM|t|t', 'RAM');

# As if it were quantized otherwise: what it then really takes
for (@made)
{
	my ($name, $quantization) = @$_;
	my $made = sql("SELECT weights_bytes FROM millm.estimate_memory('$name-$quantization')");
	my ($guess, $saved) = split /\|/, sql("SELECT weights_bytes, saved_bytes FROM millm.estimate_memory('$name', '$quantization')");
	# F32 fixtures stay F32 here and become 16-bit there
	near($guess, $made, "$name as $quantization");
	is(sql("SELECT weights_bytes + saved_bytes FROM millm.estimate_memory('$name')") - $saved, $guess, 'saves what it says') if $name =~ /^(llama|smol)$/;
}
# which is registered in place, without the screening copy of the head that a download has
near(sql(q(SELECT weights_bytes FROM millm.estimate_memory('smol-Q4', 'none'))), sql(q(SELECT weights_bytes FROM millm.estimate_memory('smol'))) + 49152 * (576 + 8), 'and back');
is(sql(q(SELECT quantization, context_length, fits FROM millm.estimate_memory('smol', context_length => 1000))), 'FP16|1000|t', 'of any context length');
my ($long, $short) = map { sql("SELECT kv_cache_bytes FROM millm.estimate_memory('smol', context_length => $_)") } 2048, 1024;
cmp_ok($long, '>=', $short, 'which is what the KV cache depends on');
fails(q(SELECT millm.estimate_memory('smol', 'Q5')), '22023', 'no such quantization');
fails(q(SELECT millm.estimate_memory('smol', context_length => 0)), '22023', 'no context');
like(fails(q(SELECT millm.estimate_memory('smol', context_length => 100000)), '22023', 'more context than the model knows'), qr/It is 100000; the model knows 8192 positions/, 'which it says');
fails(q(SELECT millm.estimate_memory('nobody')), 'ML001', 'no model');

# --- What does not fit is refused before anything is touched -----------------------------------------------------
sub setting { my ($name, $value) = @_; $node->append_conf('postgresql.conf', "$name = $value"); $node->reload; ok(wait_true(sub { sql("SHOW $name") eq $value }), "$name = $value"); }
load_model($node, 'tiny');
my $ram = int(sql('SELECT total_bytes FROM millm.memory()') / $MB);
setting('millm.kv_cache_size', ($ram + 1024) . 'MB');
my $error = fails(q(SELECT millm.load('smol')), 'ML009', 'a KV cache larger than the machine');
like($error, qr/DETAIL:  It needs [\d.]+ MB \(weights 26\d\.\d MB, a KV cache for contexts of 8192 tokens [\d.]+ MB, workspace [\d.]+ MB\), only [\d.]+ MB are available\./, 'with figures') or diag $error;
like($error, qr/HINT:  A context length of \d+ would fit, with a KV cache no larger than that needs\./, 'and what would fit');
is(sql('SELECT model FROM millm.status()'), 'tiny', 'the loaded model is not touched');
is(sql(q(SELECT fits FROM millm.estimate_memory('smol'))), 'f', 'which could be known before');
# More than there is at all: force gets as far as the kernel, and leaves nothing behind
my $resident = resident();
like(fails(q(SELECT millm.load('smol', force => true)), 'ML009', 'force => true, and the kernel says no'), qr/DETAIL:  Need [\d.]+ MB: Cannot allocate memory/, 'which it says');
cmp_ok(resident() - $resident, '<=', 4 * $MB, 'the memory is back');
is(sql(q(SELECT status, error_code, error_message LIKE '%Cannot allocate memory%' FROM millm.models WHERE name = 'smol')), 'ready|INSUFFICIENT_MEMORY|t', 'the row says why');
is(sql('SELECT model IS NULL, engine_state FROM millm.status()'), 't|ready', 'the engine is well, without a model');
# More than is free, but nobody uses it
setting('millm.kv_cache_size', ($ram - 64) . 'MB');
my ($rc, $out, $err) = $node->psql('postgres', q(SELECT millm.load('smol', force => true)));
is(sql(q(SELECT status, error_code FROM millm.models WHERE name = 'smol')), 'loaded|', 'and the row is clean');
is($out, 'loaded', 'force => true tries it all the same');
like($err, qr/WARNING:  the load was forced: It needs [\d.]+ MB .*only [\d.]+ MB are available/, 'with a warning') or diag $err;
is(sql(q(SELECT millm.generate('The capital of France is', raw => true, temperature => 0, max_tokens => 8) LIKE '%Paris%')), 't', 'and it works while nobody needs that memory');
sql('SELECT millm.unload()');
setting('millm.kv_cache_size', '0');

# --- The disk ------------------------------------------------------------------------------------------------------
is(sql('SELECT count(*) FROM millm.cache_usage()'), 1 + @made, 'the whole and what was made in it');
my @first = split /\|/, sql('SELECT model_id IS NULL, directory, bytes, free_bytes > 0 FROM millm.cache_usage() LIMIT 1');
is("@first[0, 1, 3]", "t $cache t", 'first the cache');
cmp_ok(sql('SELECT sum(bytes) FROM millm.cache_usage() WHERE model_id IS NOT NULL'), '<=', $first[2], 'the models are in it');
is(sql(q(SELECT u.bytes = r.disk_bytes OR abs(u.bytes - r.disk_bytes) < 4096 FROM millm.cache_usage() u JOIN millm.registry r ON r.id = u.model_id WHERE r.name = 'smol-Q4')), 't', 'as large as the registry says');

# --- What it is made of --------------------------------------------------------------------------------------------
my $smol = decode_json(sql(q(SELECT millm.architecture('smol'))));
is("@$smol{qw(model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size max_position_embeddings torch_dtype)}",
	'llama 576 30 9 3 49152 8192 bfloat16', 'sizes');
ok((grep { $_ eq 'model.layers.{i}.hook_resid_post' } @{ $smol->{hook_points} }) && (grep { $_ eq 'model.layers.{i}.mlp.hook_pre_linear' } @{ $smol->{hook_points} }), 'hook points');
my $gpt2 = decode_json(sql(q(SELECT millm.architecture('gpt2-Q4'))));
is("$gpt2->{model_type} $gpt2->{quantization}", 'gpt2 nf4', 'of a quantized one');
is(join(' ', grep { /pos_embed|rot_q|pre_linear/ } @{ $gpt2->{hook_points} }), 'model.hook_pos_embed', 'as its family has them');
# its sizes and points
for my $name (sort keys %family)
{
	my $made_of = decode_json(sql("SELECT millm.architecture('$name')"));
	my @points = map { /(pos_embed|rot_q|resid_mid|pre_linear|ln1|ln2|ln_final)/ ? $1 : () } @{ $made_of->{hook_points} };
	is(join(' ', @$made_of{qw(num_attention_heads num_key_value_heads head_dim intermediate_size)}, @points), $family{$name}, "architecture of $name");
}
$node->stop;
done_testing();

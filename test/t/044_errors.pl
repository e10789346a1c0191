# Errors whose causes are rare: each is brought about as it would come about, with its SQLSTATE, detail and hint.  At the end: no error of
# errors.def is without such a test.
use strict;
use warnings;
use Cwd qw(abs_path getcwd);
use File::Copy qw(copy);
use POSIX ();
use IO::Socket::UNIX;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

my $node = new_server('errors');
my $base = abs_path($node->basedir);
sub sql { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
sub fails { my ($sql, $state, $like, $what) = @_; my ($got, $error) = sqlstate($node, $sql); is($got, $state, $what); like($error, $like, 'and what to do'); return $error; }
sub model { my ($name, $from) = @_; mkdir "$base/$name"; copy($_, "$base/$name") for glob("$ENV{MILLM_FIXTURES}/tiny/$from/*"); return "$base/$name"; }
sub spew { my ($file, $text) = @_; open(my $f, '>:raw', $file) or die "$file: $!"; print $f $text; close $f; }

# --- Files ------------------------------------------------------------------------------------------------------
my $dir = model('unreadable', 'llama');
sql("SELECT millm.register_local('$dir')");
chmod 0000, "$dir/tokenizer.json";
fails(q(SELECT millm.load('unreadable')), 'ML004', qr/could not open file ".*tokenizer\.json": Permission denied/, 'a file that the server may not read: MODEL_LOAD_FAILED');
chmod 0600, "$dir/tokenizer.json";
is(sql(q(SELECT millm.load('unreadable'))), 'loaded', 'one that it may read');

fails("SELECT millm.register_local('$base/nowhere')", 'ML012', qr/could not access ".*nowhere": No such file or directory/, 'no directory: INVALID_LOCAL_PATH');
fails(q(SELECT millm.download('not a repo')), 'ML011', qr/HINT:  Write it as on the Hub: owner\/name/, 'no repository id: INVALID_REPO_ID');
fails(q(SELECT millm.download('owner/name', hf_token => 'two words')), 'ML015', qr/hf_token has characters that no access token has/, 'no token: INVALID_HF_TOKEN');

# Half a terabyte of embedding, of which nothing is there but the size
$dir = model('vast', 'llama');
my $config = decode_json(slurp_file("$dir/config.json"));
my ($vocab, $hidden) = (4 << 20, 65536);
@$config{qw(vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim tie_word_embeddings)} = ($vocab, $hidden, 8, 1, 1, 1, 64, JSON::PP::true);
delete $config->{attention_bias};
spew("$dir/config.json", encode_json($config));
my ($at, %header) = (0);
for ([ 'embed_tokens', $vocab, $hidden ], [ 'norm', $hidden ], [ 'layers.0.input_layernorm', $hidden ], [ 'layers.0.post_attention_layernorm', $hidden ],
	(map { [ "layers.0.self_attn.${_}_proj", 64, $hidden ] } qw(q k v)), [ 'layers.0.self_attn.o_proj', $hidden, 64 ],
	(map { [ "layers.0.mlp.${_}_proj", 8, $hidden ] } qw(gate up)), [ 'layers.0.mlp.down_proj', $hidden, 8 ])
{
	my ($name, @shape) = @$_;
	my $bytes = 2;
	$bytes *= $_ for @shape;
	$header{"model.$name.weight"} = { dtype => 'BF16', shape => \@shape, data_offsets => [ $at, $at + $bytes ] };
	$at += $bytes;
}
my $json = encode_json(\%header);
spew("$dir/model.safetensors", pack('Q<', length $json) . $json);
SKIP:
{
	skip 'no sparse files of half a terabyte here', 2 unless truncate("$dir/model.safetensors", 8 + length($json) + $at);
	fails("SELECT millm.register_local('$dir', 'Q8')", 'ML010', qr/ERROR:.*insufficient disk space for.*DETAIL:  Need [\d.]+ GB in the model cache, only [\d.]+ GB available\..*HINT:  Free space or point millm\.cache_dir/s,
		'a model larger than the disk: INSUFFICIENT_DISK');
	unlink "$dir/model.safetensors";
}

# Weights that are no numbers
$dir = model('nan', 'llama-bf16');
my $weights = slurp_file("$dir/model.safetensors");
my $data = 8 + unpack('Q<', $weights);
substr($weights, $data, length($weights) - $data) = "\xFF" x (length($weights) - $data);
spew("$dir/model.safetensors", $weights);
sql("SELECT millm.register_local('$dir')");
is(sql(q(SELECT millm.load('nan'))), 'loaded', 'weights that are all NaN');
fails(q(SELECT millm.generate('x', raw => true, max_tokens => 2)), 'XX000', qr/ERROR:  XX000: .*(NaN|not finite|infinite)/, 'are found by the first step: INTERNAL');
is(sql(q(SELECT model FROM millm.status())), 'nan', 'which leaves the engine at work');
sql('SELECT millm.unload()');

# --- Helpers that are not ours: another build, or somebody who does not speak the protocol -------------------------
sub fake_hub
{
	my ($answer, $sub) = @_;
	my $cwd = getcwd();
	my $run = $node->data_dir . '/pgsql_tmp.millm';
	chdir $run or die "chdir: $!";
	rename 'hub.sock', 'hub.real' or die "rename: $!";
	my $listener = IO::Socket::UNIX->new(Local => 'hub.sock', Listen => 5) or die "listen: $!";
	my $pid = fork() // die "fork: $!";
	if ($pid == 0)
	{
		while (my $client = $listener->accept)
		{
			syswrite($client, $answer);
			sysread($client, my $request, 65536);
			sleep 1;
		}
		POSIX::_exit(0);
	}
	close $listener;
	chdir $cwd;
	$sub->();
	kill('KILL', $pid);
	waitpid($pid, 0);
	rename "$run/hub.real", "$run/hub.sock" or die "rename: $!";
}
my $inspect = "SELECT millm.register_local('$ENV{MILLM_FIXTURES}/tiny/gpt2')";
my $hello = encode_json({ protocol => 1, version => '0.9.9', program => 'millm-hub' });
fake_hub(pack('VV', length $hello, 1) . $hello, sub {
	fails($inspect, 'ML025', qr/0\.9\.9/, 'a helper of another build: VERSION_MISMATCH');
});
fake_hub(pack('VV', 3, 99) . 'abc', sub {
	fails($inspect, 'ML026', qr/ERROR:  ML026: /, 'one that says nonsense: PROTOCOL_VIOLATION');
});
like(sql($inspect), qr/^\d+$/, 'the real one is there again');

# --- Is there a test of each? ----------------------------------------------------------------------------------------
my $tests = join '', map { slurp_file($_) } glob('test/t/*.pl');
my @untested = grep { $tests !~ /['\b|](?:$_)\b/ } split /\n/, sql('SELECT sqlstate FROM millm.errors ORDER BY 1');
is("@untested", '', 'every SQLSTATE of millm.errors is raised in a test of test/t');
$node->stop;
done_testing();

# The Hub from SQL: preview, what is said of tokens, and that a token stays out of the server's log.
use strict;
use warnings;
use Cwd qw(abs_path);
use Digest::SHA;
use File::Copy qw(copy);
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);
use MillmTest;
use TestHub;

my $hub = TestHub->new;
my $node = new_server('hub', '# the test hub', "millm.hf_endpoint = '@{[ $hub->endpoint ]}'", 'log_statement = none');
my $smol = 'HuggingFaceTB/SmolLM2-135M-Instruct';

sub sql { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
sub fails
{
	my ($sql, $state, @says) = @_;
	my ($got, $error) = sqlstate($node, $sql);
	is($got, $state, $sql) or diag $error;
	like($error, $_, 'it says so') for @says;
}

# --- preview --------------------------------------------------------------------------------------------
$hub->faults;
my $p = decode_json(sql("SELECT millm.preview('$smol')"));
is_deeply([ @$p{qw(name params params_count architecture model_type hidden_size num_layers context_length license)} ],
	[ 'SmolLM2-135M-Instruct', '135M', 134515008, 'LlamaForCausalLM', 'llama', 576, 30, 8192, 'apache-2.0' ], 'preview');
is_deeply([ sort keys %{ $p->{estimated_sizes} } ], [qw(FP16 Q4 Q8)], 'with its sizes');
ok($p->{supported} && !$p->{is_gated} && !$p->{requires_trust_remote_code}, 'it can be run');
is(sql("SELECT count(*) FROM millm.models"), '0', 'and nothing was written');
ok(!grep({ $_->{port} eq 'cdn' } $hub->requests), 'nor any weight read');
is(sql("SELECT millm.preview('millm-test/unknown-arch') ->> 'supported'"), 'false', 'another cannot');
is(sql("SELECT millm.preview('millm-test/sharded', revision => 'refs/pr/1') ->> 'params_count'"), sql("SELECT millm.preview('millm-test/sharded') ->> 'params_count'"),
	'parameters of a revision that the Hub has not counted');
is(sql("SELECT millm.preview(NULL) IS NULL"), 't', 'NULL is NULL');
fails("SELECT millm.preview('millm-test/nope')", 'ML013', qr/DETAIL:  It does not exist, or it is private/, qr/HINT:  .*hf_token/);
fails("SELECT millm.preview('a//b')", 'ML011', qr/DETAIL:  In a repository id, it has at most one slash/);
fails("SELECT millm.preview('$smol', revision => 'nope')", 'ML013', qr/has no revision "nope"/);
fails("SELECT millm.preview('$smol', revision => '')", '22023');
fails("SELECT millm.preview('$smol', '')", 'ML015');

# canceled at once, and the hub's thread with it
$hub->faults({ where => 'info', delay => 20 });
fails("SET statement_timeout = '300ms'; SELECT millm.preview('$smol')", '57014') for 1 .. 9;
$hub->faults;
is(sql("SELECT millm.preview('$smol') ->> 'name'"), 'SmolLM2-135M-Instruct', 'the next one works');

# --- tokens ---------------------------------------------------------------------------------------------
$p = decode_json(sql("SELECT millm.preview('millm-test/gated')"));
ok($p->{is_gated} && !defined $p->{supported}, 'a gated repository shows what is public');
like($p->{hint}, qr{Ask for access at http.*/millm-test/gated, then give an access token}, 'and where to ask');
is(sql("SELECT millm.preview('millm-test/gated', 'hf_good') ->> 'supported'"), 'true', 'the rest is for those who may');
fails("SELECT millm.download('millm-test/gated')", 'ML014', qr/DETAIL:  No access token was given/, qr{HINT:  Ask for access at http.*/millm-test/gated, then give});
fails("SELECT millm.download('millm-test/gated', hf_token => 'hf_nogrant')", 'ML014', qr/DETAIL:  The access token is valid, but/, qr/not in the authorized list/);
fails("SELECT millm.download('millm-test/gated', hf_token => 'hf_pending')", 'ML014', qr/awaiting a review/);
fails("SELECT millm.download('millm-test/gated', hf_token => 'hf_wrong_but_secret')", 'ML015', qr/DETAIL:  It is invalid or has expired/, qr/HINT:  .*millm.hf_token_file/);
fails("SELECT millm.preview('$smol', 'hf_wrong_but_secret')", 'ML015');
fails("SELECT millm.download(NULL, hf_token => 'hf_wrong_but_secret')", '22023');
sql("SELECT millm.download('millm-test/gated', hf_token => 'hf_good')");
is(sql("SELECT millm.wait('gated')"), 'ready', 'with access it arrives');
fails("SELECT millm.retry('gated', 'hf_wrong_but_secret')", '22023');
unlike(slurp_file($node->logfile), qr/hf_wrong|hf_nogrant|hf_good/, 'no statement with a token is in the log');

# --- a hub that does not answer: download() does, within 2 s --------------------------------------------------
$hub->faults({ where => 'info', delay => 20 });
my @seconds;
for (1 .. 3)
{
	my $start = time;
	like((sqlstate($node, "BEGIN; SELECT millm.download('$smol', 'FP16'); ROLLBACK"))[1], qr/NOTICE: .*did not answer in time; the download is queued/, 'a deaf hub');
	push @seconds, time - $start;
}
note sprintf 'download() took %s s', join ', ', map { sprintf '%.2f', $_ } @seconds;
# the quickest: what else the machine does only adds
cmp_ok((sort { $a <=> $b } @seconds)[0], '<', 2, 'download() answers within 2 s, psql included');
$hub->faults;

# --- connections of a large file ----------------------------------------------------------------------------
sub weights { return grep { $_->{port} eq 'cdn' && $_->{path} =~ /model\.safetensors/ } $hub->requests; }
for my $n (1, 3)
{
	sql("ALTER SYSTEM SET millm.download_connections = $n");
	sql('SELECT pg_reload_conf()');
	$hub->faults;
	sql("SELECT millm.download('$smol', 'FP16')");
	is(sql("SELECT millm.wait('SmolLM2-135M-Instruct')"), 'ready', "over $n connections");
	cmp_ok(scalar(weights()), $n == 1 ? '==' : '>', $n, 'in as many requests as that takes');
	sql("SELECT millm.delete('SmolLM2-135M-Instruct')");
}
fails('ALTER SYSTEM SET millm.download_connections = 17', '22023');

# --- files that are here already ----------------------------------------------------------------------------
my $tiny = "$ENV{MILLM_FIXTURES}/hub/millm-test/tiny-llama";
my $hf = abs_path($node->basedir) . '/hf';
my $weights = Digest::SHA->new(256)->addfile("$tiny/model.safetensors")->hexdigest;
mkdir $_ for $hf, "$hf/models--millm-test--tiny-llama", "$hf/models--millm-test--tiny-llama/blobs";
copy("$tiny/model.safetensors", "$hf/models--millm-test--tiny-llama/blobs/$weights") or die;
sub arrives
{
	my ($what, $expected) = @_;
	$hub->faults;
	sql("SELECT millm.download('millm-test/tiny-llama', 'FP16')");
	is(sql("SELECT millm.wait('tiny-llama')"), 'ready', $what);
	is(scalar(weights()), $expected, $expected ? 'its weights come from the Hub' : 'its weights are not fetched');
	is(Digest::SHA->new(256)->addfile(sql("SELECT local_path FROM millm.models WHERE name = 'tiny-llama'") . '/model.safetensors')->hexdigest, $weights, 'and right');
}
sub gone
{
	my $dir = sql("SELECT local_path FROM millm.models WHERE name = 'tiny-llama'");
	sql("SELECT millm.delete('tiny-llama')");
	ok(wait_true(sub { !-e $dir }), 'deleted');
}
arrives('without such a cache', 1);
gone();
sql("ALTER SYSTEM SET millm.hf_cache_dir = '$hf'");
sql('SELECT pg_reload_conf()');
arrives("from the user's HuggingFace cache", 0);
ok($node->log_contains(qr/LOG: .*"model.safetensors" of "millm-test\/tiny-llama" is taken from "\Q$hf\E"/), 'the log says so');
gone();
ok(-e "$hf/models--millm-test--tiny-llama/blobs/$weights", 'what is deleted is not the user\'s');
sql("ALTER SYSTEM SET millm.hf_cache_dir = 'none'");
sql('SELECT pg_reload_conf()');
arrives('without it again', 1);
fails("ALTER SYSTEM SET millm.hf_cache_dir = 'here'", '22023', qr/must be absolute/);
# the extension forgets, the directory stays, a new registry in the same cluster takes it over
sql('DROP EXTENSION millm; CREATE EXTENSION millm');
arrives('a directory that the dropped extension has left', 0);
ok($node->log_contains(qr/LOG: .*was left behind by the model [0-9a-f-]{36}/), 'the log says so');
gone();

# --- who may --------------------------------------------------------------------------------------------
sql("CREATE ROLE looker LOGIN; CREATE ROLE manager LOGIN; SELECT millm.grant_user('looker'), millm.grant_admin('manager')");
fails("SET ROLE looker; SELECT millm.preview('$smol')", '42501');
is(sql("SET ROLE manager; SELECT millm.preview('$smol') ->> 'name'"), 'SmolLM2-135M-Instruct', 'an admin previews');

# --- a hub that keeps failing is left alone ---------------------------------------------------------------
is(sql('SELECT circuit_breaker FROM millm.status()'), 'closed', 'the breaker is closed');
$hub->faults({ where => 'info', status => 503 });
# preview makes up to three attempts
fails("SELECT millm.preview('$smol')", 'ML021') for 1 .. 2;
like(sql('SELECT circuit_breaker FROM millm.status()'), qr/^open until 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC$/, 'and then open');
$hub->faults;
fails("SELECT millm.preview('$smol')", 'ML021', qr/left alone for a while/, qr/DETAIL:  The next try is at 20.* UTC, in \d+ s\. The last failure: status 503/, qr/HINT:  .*millm.hf_endpoint/);
is(scalar($hub->requests), 0, 'the Hub is not asked');
like((sqlstate($node, "SELECT millm.download('$smol')"))[1], qr/NOTICE: .*did not answer in time; the download is queued/, 'a download is queued');
is(sql("SELECT status FROM millm.models WHERE name = 'SmolLM2-135M-Instruct'") =~ /^(pending|downloading)$/, 1, 'and waits');
sql("SELECT millm.cancel('SmolLM2-135M-Instruct')");
is(sql("SELECT millm.wait('SmolLM2-135M-Instruct')"), 'error', 'until it is canceled');
is(sql("SELECT error_code FROM millm.models WHERE name = 'SmolLM2-135M-Instruct'"), 'CANCELED', 'which does not wait for the Hub');
is(scalar($hub->requests), 0, 'that was not asked');
like(slurp_file($node->logfile), qr/WARNING: .*requests to \S+ have failed in a row \(status 503\)/, "the server's log says so");

$node->stop;
done_testing();

# millm.deterministic: an answer is the same alone and among 64, greedy or with a seed; without it, status() says so.
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

my $node = new_server('deterministic', 'millm.deterministic = on', 'millm.max_sequences = 64');
# 4-bit weights, whose matmuls take other forms in company
$node->safe_psql('postgres', "SELECT millm.register_local('$ENV{MILLM_FIXTURES}/tiny-bnb/nf4-wide', name => 'q4')");
load_model($node, 'q4');
is($node->safe_psql('postgres', 'SELECT deterministic FROM millm.status()'), 't', 'status() says that answers are');

# 64 questions of 1 to 75 tokens: texts, and every fourth an embedding
my @ask = map {
	my $prompt = "$_ " . 'the quick brown fox ' x ($_ % 9);
	my $how = $_ % 2 ? 'temperature => 0' : "temperature => 1, seed => $_";
	$_ % 4 == 3 ? "SELECT md5(millm.embed('$prompt')::text)" : "SELECT md5(millm.generate('$prompt', raw => true, max_tokens => @{[ 4 + $_ % 40 ]}, $how))";
} 0 .. 63;
my @alone = map { $node->safe_psql('postgres', $_) } @ask;
my @sessions = map { MillmTest::Session->new($node) } @ask;
for my $n (3, 16, 64)
{
	my @asked = map { (7 * $_ + $n) % 64 } 0 .. $n - 1;
	$sessions[$_]->send($ask[$_]) for @asked;
	my @other = grep { ($sessions[$_]->until_ready(100)->{rows}[0] // 'no answer') ne $alone[$_] } @asked;
	is(scalar @other, 0, "$n at a time: every answer is the one that was given alone") or diag "others: @other";
}

# A beginning that the prefix cache has, and one that is computed, after a load
my $complete = "SELECT r->'usage'->>'cached_tokens', r - 'usage' FROM millm.complete('" . 'a lazy dog jumps ' x 12 . "', max_tokens => 8, temperature => 0, seed => 1, logprobs => true, top_logprobs => 5) r";
$node->safe_psql('postgres', "SELECT millm.unload(); SELECT millm.load('q4')");
my ($n_missed, $missed) = split /\|/, $node->safe_psql('postgres', $complete), 2;
my ($n_hit, $hit) = split /\|/, $node->safe_psql('postgres', $complete), 2;
ok($n_missed == 0 && $n_hit > 0, 'a hit in the prefix cache, which had missed before') or diag "$n_missed, $n_hit";
is($hit, $missed, 'gives the same tokens with the same logprobs');

# It counts from the next load on.
$node->append_conf('postgresql.conf', 'millm.deterministic = off');
$node->reload;
is($node->safe_psql('postgres', 'SELECT deterministic FROM millm.status()'), 't', 'a model that is loaded stays as it is');
ok(wait_true(sub {
	$node->safe_psql('postgres', "SELECT millm.unload(); SELECT millm.load('q4')");
	$node->safe_psql('postgres', 'SELECT deterministic FROM millm.status()') eq 'f' }), 'loaded again it is not, and status() says so');

$node->stop;
done_testing();

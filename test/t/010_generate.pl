# generate() and its kin with real models: what they return, and what they refuse.
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

my $node = new_server('generate');
my ($state, $message);

($state) = sqlstate($node, q(SELECT millm.generate('x', raw => true)));
is($state, 'ML006', 'nothing is loaded: MODEL_NOT_LOADED');
($state) = sqlstate($node, q(SELECT millm.count_tokens('x')));
is($state, 'ML006', 'nothing is loaded: no tokenizer');

load_model($node, 'tiny');
my $greedy = q('Hello', raw => true, temperature => 0, max_tokens => 12);

# Texts and tokens
my $text = "na\x{c3}\x{af}ve \x{e6}\x{97}\x{a5}\x{e6}\x{9c}\x{ac} 123\n";
is($node->safe_psql('postgres', "SELECT millm.detokenize(millm.tokenize('$text', add_special => false)) = '$text'"), 't', 'tokenize and back');
is($node->safe_psql('postgres', "SELECT millm.count_tokens('$text') = cardinality(millm.tokenize('$text'))"), 't', 'count_tokens counts what tokenize lists');
is($node->safe_psql('postgres', "SELECT millm.tokenize('', add_special => false), millm.detokenize('{}') = ''"), '{}|t', 'nothing is nothing');
($state, $message) = sqlstate($node, "SELECT millm.detokenize('{1000000}')");
is($state, '22023', 'a token id outside the vocabulary is refused');
like($message, qr/1000000/, 'by its number');
($state) = sqlstate($node, "SELECT millm.detokenize('{-1}')");
is($state, '22023', 'so is a negative one');

# The same text three ways
my $whole = $node->safe_psql('postgres', "SELECT encode(convert_to(millm.generate($greedy), 'UTF8'), 'hex')");
isnt($whole, '', 'greedy text');
is($node->safe_psql('postgres', "SELECT encode(convert_to(millm.generate($greedy), 'UTF8'), 'hex')"), $whole, 'greedy text again is the same');
is($node->safe_psql('postgres', "SELECT encode(convert_to(string_agg(piece, ''), 'UTF8'), 'hex') FROM millm.generate_stream($greedy) AS piece"),
	$whole, 'the pieces of the stream are the whole');
cmp_ok($node->safe_psql('postgres', "SELECT count(*) FROM millm.generate_stream($greedy)"), '>', 1, 'and there are several');
my $helper = $node->config_data('--pkglibdir') . '/millm/1.0.0/millm-engine';
my ($out) = run_command([ $helper, 'generate', MillmTest::fixture_dir('tiny'), 'Hello', '--max-tokens', '12', '--temperature', '0' ]);
is(unpack('H*', $out), $whole =~ s/(?:0a)+\z//r, 'the command line gives the same text');

# Choosing
my $sampled = q('Hello', raw => true, temperature => 1.5, max_tokens => 24);
is($node->safe_psql('postgres', "SELECT millm.generate($sampled, seed => 7) = millm.generate($sampled, seed => 7)"), 't', 'a seed repeats the text');
is($node->safe_psql('postgres', "SELECT count(DISTINCT millm.generate($sampled, seed => i)) > 1 FROM generate_series(1, 4) i"), 't', 'other seeds give other texts');
is($node->safe_psql('postgres', "SELECT count(DISTINCT millm.generate($sampled)) > 1 FROM generate_series(1, 4)"), 't', 'no seed is a random one');
is($node->safe_psql('postgres', "SELECT millm.generate($sampled, top_k => 1) = millm.generate('Hello', raw => true, temperature => 0, max_tokens => 24)"), 't',
	'top_k => 1 is greedy');
is($node->safe_psql('postgres', "SELECT length(millm.generate('Hello', raw => true, temperature => 0, max_tokens => 1)) < length(millm.generate($greedy))"), 't',
	'max_tokens is obeyed');

# The model by name and by number
my $id = $node->safe_psql('postgres', q(SELECT id FROM millm.models WHERE name = 'tiny'));
is($node->safe_psql('postgres', "SELECT millm.generate($greedy, model => 'tiny') = millm.generate($greedy, model => '$id')"), 't', 'the loaded model by name and id');
($state, $message) = sqlstate($node, "SELECT millm.generate($greedy, model => 'other')");
is($state, 'ML006', 'another model is not loaded on the fly');
like($message, qr/"other" is not loaded.*"tiny"/s, 'and the message names both');

# No call at all
is($node->safe_psql('postgres', 'SELECT millm.generate(NULL) IS NULL, (SELECT count(*) FROM millm.generate_stream(NULL))'), 't|0', 'a NULL prompt');

# Refusals: by name, with figures, and the engine lives on
my @refusals = (
	[ q(temperature => -1), '22023', qr/temperature/ ],
	[ q(temperature => 'NaN'), '22023', qr/temperature/ ],
	[ q(temperature => 'Infinity'), '22023', qr/temperature/ ],
	[ q(top_p => 1.5), '22023', qr/top_p/ ],
	[ q(top_p => -0.1), '22023', qr/top_p/ ],
	[ q(top_k => -2), '22023', qr/top_k/ ],
	[ q(min_p => 2), '22023', qr/min_p/ ],
	[ q(repetition_penalty => 0), '22023', qr/repetition_penalty/ ],
	[ q(frequency_penalty => 1e300), '22023', qr/frequency_penalty/ ],
	[ q(presence_penalty => -1e300), '22023', qr/presence_penalty/ ],
	[ q(max_tokens => 0), '22023', qr/max_tokens/ ],
	[ q(max_tokens => -5), '22023', qr/max_tokens/ ],
	[ q(max_tokens => 2000000000), 'ML018', qr/2000000000/ ],
	[ q(stop => ARRAY[NULL]), '22023', qr/stop/ ],
	[ q(stop => ARRAY['']), '22023', qr/stop/ ],
	[ q(system => 'Be brief.'), '22023', qr/system/ ]);
for my $case (@refusals)
{
	my ($option, $expected, $pattern) = @$case;
	for my $function ('generate', 'generate_stream')
	{
		($state, $message) = sqlstate($node, "SELECT millm.$function('x', raw => true, $option)");
		is($state, $expected, "$function: $option is refused");
		like($message, $pattern, 'by name') if $function eq 'generate';
	}
}
($state) = sqlstate($node, q(SELECT millm.generate('x', system => 'Be brief.')));
is($state, '0A000', 'this model knows no system message');
($state, $message) = sqlstate($node, q(SELECT millm.generate(repeat('word ', 20000), raw => true)));
is($state, 'ML018', 'a prompt that does not fit is refused');
like($message, qr/\d{4,}.*\d{3,}/s, 'with both numbers');
($state) = sqlstate($node, q(SELECT millm.generate(repeat('x', 17000000), raw => true)));
is($state, '22023', 'a text longer than any request');
is($node->safe_psql('postgres', "SELECT encode(convert_to(millm.generate($greedy), 'UTF8'), 'hex')"), $whole, 'the engine is as it was');

# Privileges: none for PUBLIC, what grant_user() grants
$node->safe_psql('postgres', 'CREATE ROLE reader LOGIN');
my $reader = MillmTest::Session->new($node, user => 'reader');
is($reader->query("SELECT millm.generate($greedy)")->{state}, '42501', 'an ordinary role may not generate');
$node->safe_psql('postgres', "SELECT millm.grant_user('reader')");
my $granted = $reader->query("SELECT millm.generate($greedy)");
is($granted->{state}, '', 'unless granted') or diag $granted->{message};
is($reader->query("SELECT millm.count_tokens('x')")->{state}, '', 'tokens too');

# A real model
$node->safe_psql('postgres', 'SELECT millm.unload()');
load_model($node, $SMOLLM2);
my $france = q('The capital of France is', raw => true, temperature => 0, max_tokens => 16);
like($node->safe_psql('postgres', "SELECT millm.generate($france)"), qr/Paris/, 'the capital of France');
unlike($node->safe_psql('postgres', "SELECT millm.generate($france, stop => ARRAY['Paris', 'nowhere'])"), qr/Paris/, 'a stop sequence is not in the text');
is($node->safe_psql('postgres', "SELECT string_agg(p, '') = millm.generate($france, stop => ARRAY['Paris']) FROM millm.generate_stream($france, stop => ARRAY['Paris']) p"),
	't', 'nor does a stream let a part of it out');

$node->stop;
done_testing();

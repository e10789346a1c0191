# complete(), complete_stream() and what chat() has of them: n choices, and how they stream.
use strict;
use warnings;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

my $node = new_server('complete', 'millm.max_sequences = 4', 'millm.max_queue = 8', 'millm.deterministic = on');
my ($state, $message);
sub sql { return $node->safe_psql('postgres', $_[0]); }

($state) = sqlstate($node, q(SELECT millm.complete('x')));
is($state, 'ML006', 'nothing is loaded: MODEL_NOT_LOADED');
is(sql('SELECT fingerprint IS NULL FROM millm.status()'), 't', 'no fingerprint either');
is(sql('SELECT id IS NULL AND name IS NULL AND fingerprint IS NULL FROM millm.loaded_model()'), 't', 'no loaded model');

load_model($node, $SMOLLM2);
like(sql('SELECT fingerprint FROM millm.status()'), qr{^\Q$SMOLLM2\E/FP16/millm-1\.0\.0-\w+$}, 'the fingerprint of what answers');
is(sql('SELECT (l.id, l.name, l.fingerprint) = (s.model_id, s.model, s.fingerprint) FROM millm.loaded_model() l, millm.status() s'), 't', 'loaded_model() says the same');

# A raw prompt, answered as chat answers
my $options = 'max_tokens => 10, temperature => 0';
my $text = sql("SELECT millm.generate('The capital of France is', raw => true, $options)");
is(sql("SELECT millm.complete('The capital of France is', $options) - 'seed'"),
	encode({ text => $text, usage => { prompt_tokens => 5, completion_tokens => 10, cached_tokens => 0 }, finish_reason => 'length' }), 'complete: the text, how it ended, what it took');
is(sql("SELECT string_agg(c ->> 'text', '') || '|' || string_agg(c ->> 'finish_reason', '') FROM millm.complete_stream('The capital of France is', $options) c"),
	"$text|length", 'complete_stream has the pieces, and the end');
is(sql("SELECT millm.complete('<|im_end|>', max_tokens => 1) -> 'usage' ->> 'prompt_tokens'"), 1, 'special tokens are read');
is(sql("SELECT (millm.complete('<|im_end|>', max_tokens => 1, parse_special => false) -> 'usage' ->> 'prompt_tokens')::int > 1"), 't', 'unless they shall be text');

sub encode { return sql("SELECT " . quote(encode_json($_[0])) . '::jsonb'); }
sub quote { my ($s) = @_; $s =~ s/'/''/g; return "'$s'"; }

# Choices
my $drawn = 'max_tokens => 8, temperature => 1, seed => 7';
my $one = sql("SELECT millm.complete('Once upon a time', $drawn) ->> 'text'");
my $three = "millm.complete('Once upon a time', $drawn, n => 3)";
is(sql("SELECT $three -> 'choices' -> 0 ->> 'text'"), $one, 'choice 0 is what the call without n says');
is(sql("SELECT count(DISTINCT c ->> 'text'), string_agg(c ->> 'index', ' '), string_agg(c ->> 'finish_reason', ' ') FROM jsonb_array_elements($three -> 'choices') c"),
	'3|0 1 2|length length length', 'the others are others');
is(sql("SELECT $three - 'choices'"), '{"seed": 7, "usage": {"cached_tokens": 0, "prompt_tokens": 4, "completion_tokens": 24}}', 'the prompt counts once');
is(sql("SELECT millm.complete('Once upon a time', $drawn, n => 1) -> 'choices' = jsonb_build_array($three -> 'choices' -> 0)"), 't', 'n => 1 is an array of one');
is(sql("SELECT count(DISTINCT c ->> 'text') FROM jsonb_array_elements(millm.complete('Once upon a time', max_tokens => 8, temperature => 0, n => 4) -> 'choices') c"),
	1, 'greedy choices are alike');
is(sql("WITH r AS MATERIALIZED (SELECT * FROM millm.complete_stream('Once upon a time', $drawn, n => 3) WITH ORDINALITY AS s(r, o)),
	t AS (SELECT r -> 'index' AS i, string_agg(r ->> 'text', '' ORDER BY o) AS text, string_agg(r ->> 'finish_reason', '') AS reason FROM r WHERE r ? 'index' GROUP BY 1)
	SELECT jsonb_agg(jsonb_build_object('index', i, 'text', text, 'finish_reason', reason) ORDER BY i) = ($three -> 'choices'),
		(SELECT string_agg(r::text, '') FROM r WHERE NOT r ? 'index') FROM t"),
	't|{"seed": 7, "usage": {"cached_tokens": 0, "prompt_tokens": 4, "completion_tokens": 24}}', 'the stream says the same, choice by choice');
is(sql("SELECT jsonb_array_length(millm.chat('Hi', max_tokens => 3, n => 2) -> 'choices')"), 2, 'chat of a text has choices');
is(sql(q(SELECT jsonb_array_length(millm.chat(messages => '[{"role": "user", "content": "Hi"}]', max_tokens => 3, n => 2) -> 'choices'))), 2, 'and of messages');
is(sql(q(SELECT count(*) FROM millm.chat_stream('[{"role": "user", "content": "Hi"}]', max_tokens => 3, n => 2) c WHERE c ? 'finish_reason')), 2, 'and the stream');
is(sql("SELECT jsonb_array_length(millm.complete('x', max_tokens => 2, n => 12) -> 'choices')"), 12, 'more than run at once: they wait');

# Logprobs
my $asked = "millm.complete('The capital of France is', max_tokens => 6, temperature => 0, logprobs => true, top_logprobs => 2)";
my $entry = decode_json(sql("SELECT $asked -> 'logprobs' -> 0"));
is(join(' ', sort keys %$entry), 'bytes id logprob token top_logprobs', 'an entry');
is(join(' ', @{ $entry->{bytes} }), join(' ', unpack('C*', $entry->{token})), 'its bytes');
is(sql("SELECT ARRAY[$entry->{id}] = millm.tokenize('$entry->{token}', add_special => false)"), 't', 'its id');
is(scalar @{ $entry->{top_logprobs} }, 2, 'two alternatives');
is("$entry->{top_logprobs}[0]{id} $entry->{top_logprobs}[0]{logprob}", "$entry->{id} $entry->{logprob}", 'of which the greedy one is the first');
cmp_ok(exp($entry->{logprob}) + exp($entry->{top_logprobs}[1]{logprob}), '<', 1, 'they are logarithms of probabilities');
is(sql("SELECT string_agg(e ->> 'token', '') = r ->> 'text' FROM (SELECT $asked AS r) x, jsonb_array_elements(r -> 'logprobs') e GROUP BY r"), 't', 'a token, an entry');
is(sql("SELECT jsonb_agg(e ORDER BY o, k) = $asked -> 'logprobs' FROM millm.complete_stream('The capital of France is', max_tokens => 6, temperature => 0,
	logprobs => true, top_logprobs => 2) WITH ORDINALITY AS s(r, o), jsonb_array_elements(r -> 'logprobs') WITH ORDINALITY AS l(e, k)"), 't', 'the rows of the stream have the same');
is(sql(q(SELECT jsonb_array_length(millm.chat('Hi', max_tokens => 3, n => 2, logprobs => true) -> 'choices' -> 1 -> 'logprobs'))), 3, 'each choice of a chat has its own');
is(sql("SELECT $three ? 'logprobs' OR $three -> 'choices' -> 0 ? 'logprobs'"), 'f', 'none unless asked');

my $zero = decode_json(slurp_file(MillmTest::fixture_dir($SMOLLM2) . '/tokenizer.json'))->{model}{vocab}{"\x{100}"};
is(sql("SELECT millm.complete('x', max_tokens => 1, temperature => 0, logprobs => true, logit_bias => '{\"$zero\": 100}') -> 'logprobs' -> 0 ->> 'bytes'"), '[0]',
	'a zero byte, which jsonb cannot hold as text');

# A bias
is(sql("SELECT millm.complete('The capital of France is', max_tokens => 1, temperature => 0, logit_bias => '{\"$entry->{top_logprobs}[1]{id}\": 100}') ->> 'text'"),
	$entry->{top_logprobs}[1]{token}, 'logit_bias raises a token above the greedy one');
unlike(sql("SELECT millm.chat('Say Paris.', max_tokens => 20, logit_bias => '{\"$entry->{id}\": -100}', seed => 1) ->> 'text'"), qr/ Paris/, 'or keeps one out of a chat');

# Refusals, by name
my @refusals = (
	[ 'n => 0', '22023', qr/"n" is out of range.*1 to 128/s ],
	[ 'n => 129', '22023', qr/"n" is out of range/ ],
	[ 'n => 13', '22023', qr/n is out of range.*It is 13; 4 sequences may run and 8 wait/s ],
	[ 'n => 2, max_tokens => 1000000', 'ML018', qr/max_tokens/ ],
	[ 'top_logprobs => 2', '22023', qr/top_logprobs needs logprobs/ ],
	[ 'logprobs => true, top_logprobs => 21', '22023', qr/"top_logprobs" is out of range.*0 to 20/s ],
	[ q(logit_bias => '{"1": 101}'), '22023', qr/bias of logit_bias is out of range.*It is 101; it must be between -100 and 100/s ],
	[ q(logit_bias => '{"x": 1}'), '22023', qr/logit_bias must be an object of token ids and numbers.*"x"/s ],
	[ q(logit_bias => '{"49152": 1}'), '22023', qr/logit_bias has a token that the model does not know.*49152 is not below 49152/s ],
	[ q(logit_bias => (SELECT jsonb_object_agg(i, 1) FROM generate_series(1, 301) i)), '22023', qr/too many entries in logit_bias.*301.*300/s ],
);
foreach my $refusal (@refusals)
{
	my ($arguments, $expected, $pattern) = @$refusal;
	foreach my $function ('complete', 'complete_stream')
	{
		($state, $message) = sqlstate($node, "SELECT millm.$function('x', $arguments)");
		is($state, $expected, "$function: $arguments is refused");
		like($message, $pattern, 'by name');
	}
}

# Whatever ends the query ends all its choices
my ($free) = engine_pages($node);
my $canceler = MillmTest::Session->new($node);
foreach my $function ('complete', 'complete_stream')
{
	my $session = MillmTest::Session->new($node)->send("SELECT millm.$function('x', temperature => 1, max_tokens => 8000, n => 7)");
	ok(wait_true(sub { (engine_pages($node))[1] == 7 }), "at work: $function");
	my $busy = MillmTest::Session->new($node)->query("SELECT millm.complete('x', n => 6)");
	like("$busy->{state} $busy->{detail}", qr/^ML020 4 sequences are running and 3 are waiting, of at most 4 and 8; the request has 6\. Expected wait: about \d+ s\.$/,
		'no place for so many more');
	$canceler->query('SELECT pg_cancel_backend(' . $session->pid . ')');
	is($session->until_ready->{state}, '57014', 'canceled');
	wait_pages($node, $free, "$function with choices");
}

done_testing();

# Chat templates from SQL: generate() of a model that knows messages, chat(), chat_stream(), apply_chat_template().
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

my $node = new_server('chat');
my ($state, $message);
sub sql { return $node->safe_psql('postgres', $_[0]); }

($state) = sqlstate($node, q(SELECT millm.chat('[]')));
is($state, 'ML006', 'nothing is loaded: MODEL_NOT_LOADED');

# A model without a template is never given another's markers
load_model($node, 'tiny');
($state, $message) = sqlstate($node, q(SELECT millm.chat('[{"role": "user", "content": "Hi"}]')));
is($state, '0A000', 'no template, no chat');
like($message, qr/no chat template.*raw => true/s, 'and a hint');
($state) = sqlstate($node, q(SELECT millm.generate('x', system => 'y')));
is($state, '0A000', 'nor a system message');
is(sql(q(SELECT millm.generate('x', temperature => 0, max_tokens => 4) = millm.generate('x', raw => true, temperature => 0, max_tokens => 4))), 't',
	'it continues the text');
sql('SELECT millm.unload()');

load_model($node, $SMOLLM2);
my $hi = q('[{"role": "user", "content": "Why is the sky blue?"}]');
my $rendered = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
  . "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n";
is(sql("SELECT millm.apply_chat_template($hi) || '.'"), "${rendered}<|im_start|>assistant\n.", 'the text that the model continues');
is(sql("SELECT millm.apply_chat_template($hi, add_generation_prompt => false) || '.'"), "$rendered.", 'or without its turn');
is(sql(q(SELECT left(millm.apply_chat_template('[{"role": "system", "content": "x"}]'), 33))), "<|im_start|>system\nx<|im_end|>\n<|", 'a system message');

my $greedy = 'temperature => 0, max_tokens => 12';
my $answer = sql("SELECT millm.generate('Why is the sky blue?', $greedy)");
isnt($answer, '', 'generate answers');
is(sql("SELECT millm.chat($hi, $greedy) ->> 'text'"), $answer, 'chat says the same');
is(sql("SELECT millm.generate(millm.apply_chat_template($hi), raw => true, $greedy)"), $answer, 'and so does the rendered text, raw');
isnt(sql("SELECT millm.generate('Why is the sky blue?', raw => true, $greedy)"), $answer, 'the bare text does not');
isnt(sql("SELECT millm.generate('Why is the sky blue?', system => 'Answer in French.', $greedy)"), $answer, 'a system message matters');
is(sql("SELECT millm.chat($hi, $greedy) - 'text' - 'seed'"), '{"usage": {"prompt_tokens": 36, "completion_tokens": 12}, "finish_reason": "length"}',
	'how it ended and what it took');
is(sql("SELECT string_agg(c ->> 'text', '') || '|' || string_agg(c ->> 'finish_reason', '') FROM millm.chat_stream($hi, $greedy) c"), "$answer|length",
	'the stream has the pieces, and the end');

# What people write is text
is(sql(q(SELECT (millm.chat('[{"role": "user", "content": "<|im_end|>"}]', max_tokens => 1) -> 'usage' ->> 'prompt_tokens')::int
	- (millm.chat('[{"role": "user", "content": "a"}]', max_tokens => 1) -> 'usage' ->> 'prompt_tokens')::int) . ' + 1 = '
	. q(cardinality(millm.tokenize('<')) + millm.count_tokens('|im_end|>'))), 't', 'a marker in a message is letters');

# NULL, and refusals
is(sql('SELECT millm.chat(NULL) IS NULL, millm.apply_chat_template(NULL) IS NULL, (SELECT count(*) FROM millm.chat_stream(NULL))'), 't|t|0', 'NULL messages');
my @refusals = (
	[ q('{}'), '22023', qr/messages/ ],
	[ q('[1]'), '22023', qr/each message must be an object with a role.*Message 1 is no object/s ],
	[ q('[{"role": "user", "content": "x"}, {"content": "x"}]'), '22023', qr/Message 2 has no role/ ],
	[ q('[{"role": "user"}]'), '22023', qr/line 4: 'dict object' has no attribute 'content'/ ],
	[ qq($hi, tools => '{}'), '22023', qr/tools/ ],
	[ qq($hi, template_kwargs => '[]'), '22023', qr/template_kwargs/ ],
	[ qq($hi, chat_template => 'tool_use'), '22023', qr/no chat template "tool_use"/ ],
	[ qq($hi, model => 'other'), 'ML006', qr/"other" is not loaded/ ],
);
foreach my $refusal (@refusals)
{
	my ($arguments, $expected, $pattern) = @$refusal;
	foreach my $function ('chat', 'chat_stream', 'apply_chat_template')
	{
		($state, $message) = sqlstate($node, "SELECT millm.$function($arguments)");
		is($state, $expected, "$function: $arguments is refused");
		like($message, $pattern, 'by name');
	}
}
is(sql("SELECT millm.generate('Why is the sky blue?', $greedy)"), $answer, 'the engine is as it was');

done_testing();

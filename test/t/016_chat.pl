# Chat templates from SQL: generate() of a model that knows messages, chat(), chat_stream(), apply_chat_template().
use strict;
use warnings;
use File::Spec::Functions qw(rel2abs);
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

my $node = new_server('chat');
my ($state, $message);
sub sql { return $node->safe_psql('postgres', $_[0]); }

# A directory with the files of a fixture, some of them written anew.
sub variant
{
	my ($fixture, %files) = @_;
	my $dir = rel2abs(PostgreSQL::Test::Utils::tempdir);
	my $from = MillmTest::fixture_dir($fixture);
	opendir(my $entries, $from) or die "$from: $!";
	symlink("$from/$_", "$dir/$_") for grep { !/^\./ && !$files{$_} } readdir $entries;
	append_to_file("$dir/$_", $files{$_}) for keys %files;
	return $dir;
}

($state) = sqlstate($node, q(SELECT millm.chat('[]')));
is($state, 'ML006', 'nothing is loaded: MODEL_NOT_LOADED');

# A model without a template is never given another's markers
load_model($node, 'tiny');
($state, $message) = sqlstate($node, q(SELECT millm.chat('Hi')));
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
is(sql("SELECT millm.chat(messages => $hi, $greedy) ->> 'text'"), $answer, 'chat says the same');
is(sql("SELECT millm.generate(millm.apply_chat_template($hi), raw => true, $greedy)"), $answer, 'and so does the rendered text, raw');
isnt(sql("SELECT millm.generate('Why is the sky blue?', raw => true, $greedy)"), $answer, 'the bare text does not');
isnt(sql("SELECT millm.generate('Why is the sky blue?', system => 'Answer in French.', $greedy)"), $answer, 'a system message matters');
is(sql("SELECT millm.chat(messages => $hi, $greedy) - 'text' - 'seed'"), '{"usage": {"cached_tokens": 0, "prompt_tokens": 36, "completion_tokens": 12}, "finish_reason": "length"}',
	'how it ended and what it took');
is(sql("SELECT millm.chat('Why is the sky blue?', $greedy) ->> 'text'"), $answer, 'chat of a text is one message');
is(sql("SELECT string_agg(c ->> 'text', '') || '|' || string_agg(c ->> 'finish_reason', '') FROM millm.chat_stream($hi, $greedy) c"), "$answer|length",
	'the stream has the pieces, and the end');

# What people write is text
is(sql(q(SELECT (millm.chat('<|im_end|>', max_tokens => 1) -> 'usage' ->> 'prompt_tokens')::int
	- (millm.chat('a', max_tokens => 1) -> 'usage' ->> 'prompt_tokens')::int) . ' + 1 = '
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
	[ q('[{"role": "user", "content": 5}]'), '22023', qr/content of a message must be.*message 1 is a number/s ],
	[ q('[{"role": "user", "content": ["x"]}]'), '22023', qr/Part 1 of message 1 is no object/ ],
	[ q('[{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}]'), '0A000', qr/only text.*Part 2 of message 1 is of type "image"/s ],
	[ qq($hi, tools => '[{"type": "function"}]'), '0A000', qr/the chat template has no use for "tools"/ ],
	[ qq($hi, documents => '[{"title": "x"}]'), '0A000', qr/no use for "documents"/ ],
	[ qq($hi, template_kwargs => '{"enable_thinking": false}'), '0A000', qr/no use for "enable_thinking"/ ],
	[ qq($hi, model => 'other'), 'ML006', qr/"other" is not loaded/ ],
);
foreach my $refusal (@refusals)
{
	my ($arguments, $expected, $pattern) = @$refusal;
	foreach my $function ('chat', 'chat_stream', 'apply_chat_template')
	{
		($state, $message) = sqlstate($node, "SELECT millm.$function(messages => $arguments)");
		is($state, $expected, "$function: $arguments is refused");
		like($message, $pattern, 'by name');
	}
}
is(sql("SELECT millm.generate('Why is the sky blue?', $greedy)"), $answer, 'the engine is as it was');

# A raw prompt's markers are special tokens unless they shall be text; a conversation's never are
is(sql(q(SELECT array_to_string(millm.tokenize('<|im_end|>'), ' '))), 2, 'a special token');
is(sql(q(SELECT millm.detokenize(millm.tokenize('<|im_end|>', parse_special => false)))), '<|im_end|>', 'or its letters');
is(sql(q(SELECT 2 = ANY(millm.tokenize('<|im_end|>', parse_special => false)))), 'f', 'none of which is the token');
isnt(sql("SELECT millm.generate('<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n', raw => true, parse_special => false, $greedy)"),
	sql("SELECT millm.generate('<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n', raw => true, $greedy)"), 'the model sees the difference');
is(sql("SELECT millm.generate('Why is the sky blue?', parse_special => false, $greedy)"), $answer, 'what a conversation does anyway');
foreach my $function ('generate', 'generate_stream')
{
	($state, $message) = sqlstate($node, "SELECT millm.$function('x', parse_special => true)");
	is($state, '22023', "$function: special tokens of people are refused");
	like($message, qr/parse_special needs a raw prompt/, 'by name');
}

# A model's answer ends where its generation_config.json says that turns end
my $ended = sql(q(SELECT millm.chat('Hi', temperature => 0, max_tokens => 100)));
like($ended, qr/"finish_reason": "stop"/, 'an answer ends by itself');
unlike($ended, qr/<\|im_end\|>/, 'and its last token is no text');
my $copy = variant($SMOLLM2, 'generation_config.json' => '{"eos_token_id": [0, 5]}');
sql("SELECT millm.register_local('$copy', name => 'endless')");
sql(q(SELECT millm.wait('endless'), millm.load('endless')));
like(sql(q(SELECT millm.chat('Hi', temperature => 0, max_tokens => 100))), qr/"finish_reason": "length"/, 'another end of turn, and it goes on');

# Several templates, one that refuses, one that does not compile; no eos in reach
my $templates = variant('tiny-long', 'tokenizer_config.json' => '{"bos_token": "<s>", "eos_token": "</s>", "chat_template": [
	{"name": "default", "template": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ 1 if tools }}{{ x }}"},
	{"name": "tool_use", "template": "{{ bos_token }}T{{ tools | tojson }}"},
	{"name": "rag", "template": "{{ bos_token }}{% for d in documents %}({{ d.title }}){% endfor %}{{ messages[0].content }}"},
	{"name": "strict", "template": "{% if messages[0].role == \'system\' %}{{ raise_exception(\'System role not supported\') }}{% endif %}{{ messages[0].content }}"},
	{"name": "endless", "template": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"},
	{"name": "broken", "template": "\n{% if %}"}]}');
sql("SELECT millm.register_local('$templates', name => 'templates')");
sql(q(SELECT millm.wait('templates'), millm.load('templates')));
my $apply = q{SELECT millm.apply_chat_template('[{"role": "user", "content": "Hi"}]'};
is(sql("$apply)"), '<s>[user]Hi', 'the template named default');
is(sql("$apply, template_kwargs => '{\"x\": 5}')"), '<s>[user]Hi5', 'a variable of its own');
is(sql("$apply, tools => '[{\"b\": 1, \"a\": 2.0}]')"), '<s>T[{"b": 1, "a": 2.0}]', 'tool_use when there are tools, and they are as written');
is(sql("$apply, tools => '[{\"b\": 1}]', chat_template => 'default')"), '<s>[user]Hi1', 'unless another is named');
is(sql("$apply, documents => '[{\"title\": \"A\"}, {\"title\": \"B\"}]', chat_template => 'rag')"), '<s>(A)(B)Hi', 'documents');
is(sql(q(SELECT millm.chat('Hi', max_tokens => 1) -> 'usage' ->> 'prompt_tokens')),
	sql("SELECT 1 + cardinality(millm.tokenize('[user]Hi', add_special => false))"), 'one BOS, the template\'s');
my @of_templates = (
	[ q('x', chat_template => 'none'), '22023', qr/no chat template "none".*It has "default", "tool_use", "rag", "strict", "endless" and "broken"\./s ],
	[ q(messages => '[{"role": "system", "content": "x"}]', chat_template => 'strict'), '22023', qr/refuses the conversation.*It says: System role not supported/s ],
	[ q('x', chat_template => 'endless'), '22023', qr/line 1: the template takes too many steps/ ],
	[ q('x', chat_template => 'broken'), 'ML022', qr/line 2/ ],
	[ q('x', chat_template => 'rag'), '22023', qr/line 1: 'NoneType'/ ],
	[ q('x', documents => '["a"]'), '22023', qr/documents must be an array of objects/ ],
	[ q('x', template_kwargs => '{"messages": []}'), '22023', qr/template_kwargs must not have "messages"/ ],
	[ q('x', tools => '[]', template_kwargs => '{"tools": null}'), '22023', qr/template_kwargs must not have "tools"/ ],
);
foreach my $refusal (@of_templates)
{
	my ($arguments, $expected, $pattern) = @$refusal;
	($state, $message) = sqlstate($node, "SELECT millm.chat($arguments)");
	is($state, $expected, "chat($arguments) is refused");
	like($message, $pattern, 'by name');
}
($state, $message) = sqlstate($node, q(SELECT millm.generate('x', system => 'y', raw => true)));
is($state, '22023', 'a raw prompt has no system message');

# Whatever ends the query ends the chat
my ($free) = engine_pages($node);
my $canceler = MillmTest::Session->new($node);
foreach my $call ("SELECT millm.chat('Hi', temperature => 0, max_tokens => 8000)",
	q(SELECT millm.chat_stream('[{"role": "user", "content": "Hi"}]', temperature => 0, max_tokens => 8000)))
{
	my $session = MillmTest::Session->new($node)->send($call);
	ok(wait_true(sub { (engine_pages($node))[1] == 1 }), "at work: $call");
	$canceler->query('SELECT pg_cancel_backend(' . $session->pid . ')');
	is($session->until_ready->{state}, '57014', 'canceled');
	wait_pages($node, $free, 'a chat that was canceled');
}
my $rows = MillmTest::Session->new($node)->query(q(SELECT millm.chat_stream('[{"role": "user", "content": "Hi"}]', max_tokens => 8000) LIMIT 3));
is(scalar @{ $rows->{rows} }, 3, 'LIMIT takes three pieces');
wait_pages($node, $free, 'a stream that was left');

done_testing();

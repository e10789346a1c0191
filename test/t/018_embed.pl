# Embeddings from SQL: embed(text), embed(text[]); what ends them, who may, beside generations.
use strict;
use warnings;
use File::Spec::Functions qw(rel2abs);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);
use MillmTest;

my $SOON = 2.0;		# what takes milliseconds
my $node = new_server('embed');
my ($state, $message);
sub sql { return $node->safe_psql('postgres', $_[0]); }

($state) = sqlstate($node, q(SELECT millm.embed('Hello')));
is($state, 'ML006', 'nothing is loaded: MODEL_NOT_LOADED');
is(sql('SELECT millm.embed(NULL) IS NULL'), 't', 'NULL without a question');

load_model($node, $SMOLLM2);
my ($free) = engine_pages($node);

# What it is
is(sql(q(SELECT pg_typeof(e), array_ndims(e), array_lower(e, 1), cardinality(e) FROM millm.embed('Hello') e)), 'real[]|1|1|576', 'a real[] of the hidden size');
is(sql(q(SELECT abs(sqrt(sum(x::float8 ^ 2)) - 1) < 1e-6 FROM unnest(millm.embed('Hello')) x)), 't', 'of length 1');
sql(<<'SQL');
CREATE FUNCTION cosine(a real[], b real[]) RETURNS float8 LANGUAGE sql IMMUTABLE AS 'SELECT sum(x::float8 * y) FROM unnest(a, b) AS u(x, y)';
CREATE TABLE doc (id int, body text);
INSERT INTO doc SELECT i, CASE WHEN i % 7 = 0 THEN NULL ELSE repeat('row ' || i || ' ', 1 + i % 13) END FROM generate_series(1, 600) i;
SQL
is(sql(q(SELECT cosine(millm.embed('The cat sat on the mat.'), millm.embed('A cat is sitting on a mat.'))
	> cosine(millm.embed('The cat sat on the mat.'), millm.embed('INSERT INTO accounts VALUES (1, 100);')))), 't', 'what means the same is nearer');

# Arrays: a row for each, in order, more than one request's worth; NULL stays NULL
is(sql(q(SELECT count(*), count(e) FROM millm.embed('{}'::text[]) e)), '0|0', 'of nothing nothing');
is(sql(q(SELECT count(*) FROM millm.embed(NULL::text[]))), '0', 'nor of NULL');
is(sql(q(SELECT string_agg(coalesce(cardinality(e)::text, '-'), ' ') FROM millm.embed(ARRAY[NULL, 'a', NULL, NULL, 'b', NULL]) e)), '- 576 - - 576 -', 'NULLs');
is(sql(q(SELECT count(*), count(e), bool_and((e IS NULL) = (d.body IS NULL)), min(cosine(e, millm.embed(CASE WHEN d.id % 20 = 1 THEN d.body END))) > 0.9999
	FROM (SELECT array_agg(body ORDER BY id) texts FROM doc) a, ROWS FROM (millm.embed(a.texts)) WITH ORDINALITY AS r(e, n) JOIN doc d ON d.id = n)),
	'600|515|t|t', '600 of them, each its own');
is(sql(q(SELECT count(*) FROM (SELECT millm.embed(array_fill('a'::text, ARRAY[300]))) x)), '300', 'more than a request takes');
is(sql(q(SELECT count(*) FROM (SELECT millm.embed(ARRAY['a', 'b', 'c']) LIMIT 2) x)), '2', 'a LIMIT ends it');
is(sql(q(SELECT count(*) FROM millm.embed('{{a,b},{c,d}}'::text[]))), '4', 'two dimensions in storage order');
wait_pages($node, $free, 'all of them');
is(sql(q(SELECT string_agg(DISTINCT provolatile::text, ',') FROM pg_proc WHERE pronamespace = 'millm'::regnamespace AND proname = 'embed')), 's', 'STABLE');

# Refused
($state, $message) = sqlstate($node, q(SELECT millm.embed('')));
is($state, '22023', 'an empty text') or diag $message;
($state, $message) = sqlstate($node, q(SELECT millm.embed(ARRAY['a', 'b', NULL, 'c', ''])));
like($message, qr/Text 5 of the array has no tokens/, 'which one of an array');
($state, $message) = sqlstate($node, q(SELECT millm.embed(ARRAY[repeat('word ', 180000), repeat('x', 16000000)])));
like($message, qr/ML018: .*Text 1 of the array/s, 'which is not refused for the size of those beside it');
($state, $message) = sqlstate($node, q(SELECT millm.embed(repeat('word ', 9000))));
like($message, qr/does not fit the context.*The text has \d+ tokens; the context holds \d+/s, 'one that is too long, with both numbers');
($state) = sqlstate($node, q(SELECT millm.embed('a', 'another')));
is($state, 'ML006', 'a model that is not loaded');
is(sql(q(SELECT millm.embed('a', m.model) = millm.embed('a', m.model_id::text) FROM millm.status() m)), 't', 'the loaded one by name and by id');

# Whatever ends the query ends it
my $many = q(millm.embed(array_fill(repeat('one two three four five ', 150), ARRAY[300])));
my $canceler = MillmTest::Session->new($node);
for my $case ([ 'a cancel', '57014', sub { $canceler->query('SELECT pg_cancel_backend(' . $_[0]->pid . ')') } ],
	[ 'a terminate', '57P01', sub { $canceler->query('SELECT pg_terminate_backend(' . $_[0]->pid . ')') } ])
{
	my ($what, $expected, $how) = @$case;
	my $session = MillmTest::Session->new($node);
	$session->send("SELECT count(*) FROM $many");
	ok(wait_true(sub { my @now = engine_pages($node); return $now[0] < $free; }), "$what: at work") or next;
	my $start = time;
	$how->($session);
	is($session->until_ready->{state}, $expected, "$what: ends");
	cmp_ok(time - $start, '<', $SOON, "$what: soon");
	wait_pages($node, $free, $what);
}
my $session = MillmTest::Session->new($node);
$session->query("SET statement_timeout = '150ms'");
is($session->query("SELECT count(*) FROM $many")->{state}, '57014', 'statement_timeout');
$session->query('RESET statement_timeout');
$session->query($_) for 'BEGIN', 'SAVEPOINT a', "DECLARE c CURSOR FOR SELECT cardinality($many)";
is(join(',', @{ $session->query('FETCH 2 FROM c')->{rows} }), '576,576', 'a cursor');
$session->query('ROLLBACK TO a');
wait_pages($node, $free, 'a rolled back cursor');
$session->query('COMMIT');
is($session->query(q(SELECT cardinality(millm.embed('a'))))->{rows}[0], 576, 'the session goes on');

# Beside generations: both come right
my $generate = q(SELECT millm.generate('Why is the sky blue?', temperature => 0, max_tokens => 24));
my $text = sql($generate);
my @generating = map { MillmTest::Session->new($node)->send($generate) } 1 .. 3;
is(sql(q(WITH d AS MATERIALIZED (SELECT body, row_number() OVER (ORDER BY id) n FROM doc WHERE body IS NOT NULL AND id < 40)
	SELECT min(cosine(e, millm.embed(body))) > 0.9999 FROM (SELECT array_agg(body ORDER BY n) texts FROM d) a,
	ROWS FROM (millm.embed(a.texts)) WITH ORDINALITY AS r(e, n) JOIN d USING (n))), 't', 'the embeddings');
is($_->until_ready->{rows}[0], $text, 'and the text') for @generating;
wait_pages($node, $free, 'both');

# Who may
sql('CREATE ROLE reader LOGIN; GRANT USAGE ON SCHEMA millm TO reader');
($state) = sqlstate($node, q(SET ROLE reader; SELECT millm.embed('a')));
is($state, '42501', 'not everybody');
sql(q(SELECT millm.grant_user('reader')));
is(sql(q(SET ROLE reader; SELECT count(*) FROM millm.embed(ARRAY['a', 'b']))), '2', 'whom grant_user() lets');
is(sql(q(SET ROLE reader; SELECT cardinality(millm.embed('a')))), '576', 'both forms');

# What the model's own files say
sql('SELECT millm.unload()');
my $dir = rel2abs(PostgreSQL::Test::Utils::tempdir);
my $from = MillmTest::fixture_dir('tiny');
opendir(my $entries, $from) or die "$from: $!";
symlink("$from/$_", "$dir/$_") for grep { !/^\./ } readdir $entries;
append_to_file("$dir/modules.json", '[{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}, '
	  . '{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]');
mkdir "$dir/1_Pooling";
append_to_file("$dir/1_Pooling/config.json", '{"pooling_mode_mean_tokens": true}');
sql("SELECT millm.register_local('$dir', name => 'dense'); SELECT millm.load('dense')");
($state, $message) = sqlstate($node, q(SELECT millm.embed('a')));
is($state, '0A000', 'what they ask for and is not done is refused');
like($message, qr/sentence_transformers.models.Dense/, 'by name');
is(sql(q(SELECT length(millm.generate('x', max_tokens => 4)) > 0)), 't', 'text it generates');

is(slurp_file($node->logfile) =~ /was terminated by signal|all server processes terminated/ ? 1 : 0, 0, 'no crash on the way');
$node->stop;
done_testing();

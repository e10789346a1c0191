# Shared prefixes: what an instruction before each row costs, across sessions, loads and cancels; the texts are those of a cache that is off.
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

my $node = new_server('prefix', 'millm.deterministic = on', 'millm.max_sequences = 8');
sub sql { return $node->safe_psql('postgres', $_[0]); }

# Loaded anew, with the cache or without.
sub load_with
{
	my ($cache, $model) = @_;
	$node->append_conf('postgresql.conf', "millm.prefix_cache = $cache\n");
	$node->reload;
	wait_true(sub { sql('SHOW millm.prefix_cache') eq $cache });
	sql('SELECT millm.unload()') if sql('SELECT model IS NOT NULL FROM millm.status()') eq 't';
	load_model($node, $model);
	my $status = MillmTest::Engine->new($node, { op => 'status' })->result;
	is($status->{prefix_cache} ? 'on' : 'off', $cache, "the engine's cache is $cache");
	is($status->{pages_cached}, 0, 'and empty');
}

load_with('off', 'tiny-long');
# An instruction of 200 tokens, and a row's own 30, in which rows differ from the first token on.
sql(q(CREATE TABLE word AS SELECT chr(97 + i) AS w FROM generate_series(0, 25) i;
	CREATE FUNCTION padded(text, text, int) RETURNS text LANGUAGE sql AS $$ SELECT $1 || string_agg($2, '') FROM generate_series(1, $3) $$;
	CREATE TABLE instruction AS SELECT t FROM generate_series(1, 300) n, padded('', ' x', n) t WHERE millm.count_tokens(t) >= 200 ORDER BY n LIMIT 1;
	CREATE TABLE review AS SELECT id, padded(' ' || id || '.', ' y', 30) AS body FROM generate_series(1, 50) id;));
my $asked = q(SELECT id, millm.complete(t || body, temperature => 0, seed => 1, max_tokens => 4, logprobs => true) AS r FROM instruction, (SELECT * FROM review ORDER BY id) x);
my $n_shared = sql('SELECT millm.count_tokens(t) FROM instruction');
cmp_ok($n_shared, '>=', 200, "an instruction of $n_shared tokens");
sql("CREATE TABLE expected AS $asked");
is(sql(q(SELECT sum((r -> 'usage' ->> 'cached_tokens')::int) FROM expected)), 0, 'nothing is shared without the cache');

load_with('on', 'tiny-long');
my ($free) = engine_pages($node);
sql("CREATE TABLE got AS $asked");
# Whole pages of 16 tokens; the last one may hold the end of the instruction and the beginning of the row.
my $whole = int(($n_shared - 1) / 16) * 16;
is(sql("SELECT count(*) FILTER (WHERE (r -> 'usage' ->> 'cached_tokens')::int >= $whole), min(id) FILTER (WHERE r -> 'usage' ->> 'cached_tokens' = '0') FROM got"), '49|1',
	"all rows but the first find $whole of them");
my $same = q(SELECT bool_and(g.r #- '{usage,cached_tokens}' = e.r #- '{usage,cached_tokens}'), count(*) FROM %s g JOIN expected e USING (id));
is(sql(sprintf($same, 'got')), 't|50', 'the same texts and logprobs');
wait_pages($node, $free, 'fifty rows');
is(sql("SELECT kv_pages = $free AND kv_pages_free = $free AND kv_pages_cached > $whole / 16 FROM millm.status()"), 't', 'pages are kept, and count as free');

# Another session, later; many at once; one that is canceled in the middle of it
is(MillmTest::Session->new($node)->query("SELECT (millm.complete(t || ' z', max_tokens => 1) -> 'usage' ->> 'cached_tokens')::int >= $whole - 32 FROM instruction")->{rows}[0],
	't', 'another session finds it, too');
my @sessions = map { MillmTest::Session->new($node) } 1 .. 10;
$sessions[$_]->send("SELECT bool_and(millm.complete(t || body, temperature => 0, seed => 1, max_tokens => 4, logprobs => true) #- '{usage,cached_tokens}' = r #- '{usage,cached_tokens}')
	FROM instruction, expected JOIN review USING (id) WHERE id % 10 = $_") for 0 .. 9;
is(join('', map { $_->until_ready(100)->{rows}[0] // '-' } @sessions), 't' x 10, 'ten sessions at once');
$sessions[0]->send("SELECT millm.complete(t, max_tokens => 6000) FROM instruction");
wait_true(sub { (engine_pages($node))[1] == 1 });
sql("SELECT pg_cancel_backend(@{[ $sessions[0]->pid ]})");
is($sessions[0]->until_ready(100)->{state}, '57014', 'canceled');
wait_pages($node, $free, 'all that');
sql("CREATE TABLE again AS $asked");
is(sql(sprintf($same, 'again')), 't|50', 'and still the same texts');

# Choices: the prompt counts once, and so does what of it was cached
is(sql("SELECT (r -> 'usage' ->> 'cached_tokens')::int >= $whole - 32 AND (r -> 'usage' ->> 'cached_tokens')::int < $n_shared FROM instruction, millm.complete(t, max_tokens => 2, n => 5) r"),
	't', 'of five choices');

# What belongs to a load goes with it.
load_with('on', 'tiny-long');
is(sql(q(SELECT millm.complete(t || ' z', max_tokens => 1) -> 'usage' ->> 'cached_tokens' FROM instruction)), 0, 'nothing of the model before');

$node->stop;
done_testing();

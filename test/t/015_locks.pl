# Nothing that happens to the registry's tables or their database stops the engine.
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

my $node = new_server('locks', q(millm.database = 'llm'));
load_model($node, $SMOLLM2, 'llm');
my $engine = $node->safe_psql('llm', 'SELECT engine_pid FROM millm.status()');
my $short = q('The capital of France is', raw => true, temperature => 0, max_tokens => 16);

# --- Every row of every table of ours locked, and the tables too -------------------------------
my $running = MillmTest::Session->new($node, database => 'llm');
$running->send(q(SELECT millm.generate('Once upon a time', raw => true, temperature => 0, max_tokens => 100)));
ok(wait_true(sub { (engine_pages($node))[1] == 1 }), 'a generation at work');

my $locker = MillmTest::Session->new($node, database => 'llm');
my $tables = $locker->query(q(SELECT c.oid::regclass FROM pg_class c JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
	JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid WHERE e.extname = 'millm' AND c.relkind = 'r'))->{rows};
cmp_ok(scalar @$tables, '>=', 1, "our tables: @$tables");
$locker->query('BEGIN');
is($locker->query("SELECT * FROM $_ FOR UPDATE")->{state}, '', "rows of $_ locked") for @$tables;
is($locker->query("LOCK TABLE $_ IN ACCESS EXCLUSIVE MODE")->{state}, '', "$_ locked") for @$tables;

my $result = $running->until_ready;
is($result->{state}, '', 'the running generation ends as it should') or diag $result->{message};
my $other = MillmTest::Session->new($node, database => 'llm');
like($other->query("SELECT millm.generate($short)")->{rows}[0] // '', qr/Paris/, 'and a new one starts under the locks');
is($other->query('SELECT engine_pid FROM millm.status()')->{rows}[0], $engine, 'on the same engine');
$locker->query('ROLLBACK');

# --- The database itself ------------------------------------------------------------------------
# Its sessions end with it; who talks to the engine from elsewhere must not notice.
my $elsewhere = MillmTest::Engine->new($node, { op => 'generate', prompt => 'Once upon a time', raw => JSON::PP::true, temperature => 0, max_tokens => 150 });
$running->send("SELECT millm.generate($LONG)");
ok(wait_true(sub { (engine_pages($node))[1] == 2 }), 'two at work');
$node->safe_psql('postgres', 'DROP DATABASE llm WITH (FORCE)');
is($running->until_ready->{state}, '57P01', 'a session of the dropped database ends');
my $answer = $elsewhere->result;
is($answer->{usage}{completion_tokens}, 150, 'the other generation runs to its end');
is(MillmTest::Engine->new($node, { op => 'status' })->result->{pid}, $engine, 'the engine is the same');
is(MillmTest::Engine->new($node, { op => 'status' })->result->{state}, 'loaded', 'and keeps its model');

# --- and back ------------------------------------------------------------------------------------
$node->safe_psql('postgres', 'CREATE DATABASE llm');
$node->safe_psql('llm', 'CREATE EXTENSION millm');
my $text;
ok(wait_true(sub { $node->psql('llm', "SELECT millm.generate($short)", stdout => \$text) == 0 }), 'the new database serves');
like($text, qr/Paris/, 'with the model that stayed loaded');
unlike(slurp_file($node->logfile), qr/terminating any other active server processes/, 'no crash on the way');
$node->stop;
done_testing();

# Two sessions that want the same model: one gets it, the other a clear word at once, whatever becomes of the first.
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;
use TestHub;

my $hub = TestHub->new;
my $node = new_server('same_model', '# the test hub', "millm.hf_endpoint = '@{[ $hub->endpoint ]}'");
my ($one, $two) = map { MillmTest::Session->new($node) } 1 .. 2;

# The second session's answer while the first one's transaction is open
sub meanwhile
{
	my ($sql, $state, $what) = @_;
	my $result = $two->query($sql, 10);
	is($result->{state}, $state, $what) or diag "$result->{message} @{ $result->{rows} }";
	return $result;
}

$one->query('BEGIN');
my $id = $one->query(q(SELECT millm.download('millm-test/tiny-llama', 'FP16')))->{rows}[0];
my $busy = meanwhile(q(SELECT millm.download('millm-test/tiny-llama', 'FP16', name => 'mine')), 'ML008', 'the same files are being added');
is($busy->{message}, 'another session is changing "huggingface/millm-test--tiny-llama--FP16" right now', 'which it says');
is("$busy->{detail} $busy->{hint}", 'Its transaction has not ended yet. Try again when it has.', 'with what to do');
meanwhile(q(SELECT millm.download('millm-test/tiny-gpt2', 'FP16', name => 'tiny-llama')), 'ML008', 'a name of its own, which somebody is taking');
meanwhile(q(BEGIN; SELECT millm.download('millm-test/tiny-llama', 'Q4'); ROLLBACK), '', 'another quantization is another model');
$one->query('ROLLBACK');
meanwhile(q(SELECT millm.download('millm-test/tiny-llama', 'FP16')), '', 'after ROLLBACK it can be had');
is($two->query(q(SELECT millm.wait('tiny-llama')))->{rows}[0], 'ready', 'and arrives');
$id = $two->query(q(SELECT id FROM millm.models))->{rows}[0];
my $exists = $one->query(q(SELECT millm.download('millm-test/tiny-llama', 'FP16')));
is("$exists->{state} $exists->{detail}", "ML002 It is model \"tiny-llama\" with id $id.", 'once: the other learns which it is');

# The files of a model that is being deleted
$one->query("BEGIN; SELECT millm.delete($id)");
meanwhile(q(SELECT millm.download('millm-test/tiny-llama', 'FP16')), 'ML008', 'what is being deleted cannot be added');
meanwhile("SELECT millm.delete($id)", 'ML008', 'nor deleted twice');
$one->query(q(SELECT millm.download('millm-test/tiny-llama', 'FP16')));
is($one->query('COMMIT')->{state}, '', 'delete and download in one transaction');
is($two->query(q(SELECT millm.wait('tiny-llama')))->{rows}[0], 'ready', 'end with the model');
ok(-f $node->basedir . '/cache/huggingface/millm-test--tiny-llama--FP16/model.safetensors', 'and its files');
is($two->query('SELECT count(*) FROM millm.trash')->{rows}[0], 0, 'and no trash');

# A directory
my $local = "$ENV{MILLM_FIXTURES}/tiny/llama";
$one->query("BEGIN; SELECT millm.register_local('$local')");
meanwhile("SELECT millm.register_local('$local/', name => 'mine')", 'ML008', 'the same path');
$one->query('COMMIT');
is((sqlstate($node, "SELECT millm.register_local('$local', name => 'mine')"))[0], 'ML002', 'is one model');

# Two of one name: by id they work, the name lists them
is($two->query("SELECT millm.download('millm-test/tiny-llama', 'Q4') > $id")->{rows}[0], 't', 'Q4 beside FP16');
my $q4 = $two->query(q(SELECT id FROM millm.models WHERE quantization = 'Q4'))->{rows}[0];
is($two->query("SELECT millm.wait($q4)")->{rows}[0], 'ready', 'arrives');
$id = $two->query(q(SELECT id FROM millm.models WHERE quantization = 'FP16' AND name = 'tiny-llama'))->{rows}[0];
my $several = $two->query(q(SELECT millm.load('tiny-llama')));
is("$several->{state} $several->{detail}", "22023 They have the ids $id (millm-test/tiny-llama, FP16), $q4 (millm-test/tiny-llama, Q4).", 'their name says too little');
is($two->query("SELECT millm.load('$q4')")->{rows}[0], 'loaded', 'an id is enough');
is($two->query(q(SELECT quantization FROM millm.models WHERE status = 'loaded'))->{rows}[0], 'Q4', 'and means that one');
is($two->query("SELECT millm.load($id)")->{rows}[0], 'loaded', 'the other takes its place');
$node->stop;
done_testing();

# A compiled tokenizer lies beside a model in the cache, written by its owner at the first load; nowhere else.
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use File::Copy;
use File::Spec::Functions qw(rel2abs);
use MillmTest;
use TestHub;

my $hub = TestHub->new;
my $node = new_server('compiled_tokenizer', '# the test hub', "millm.hf_endpoint = '@{[ $hub->endpoint ]}'");
my $directory = $node->basedir . '/cache/huggingface/millm-test--tiny-llama--FP16';
my $image = "$directory/tokenizer.millm";
my $prompt = q('What is 2026?', raw => true, temperature => 0, max_tokens => 8);

sub sql { return $node->safe_psql('postgres', $_[0]); }

# 4 MB of white space are as good as 100,000 tokens: from there on a tokenizer is worth it
sub grow
{
	open(my $f, '>>', $_[0]) or die "$_[0]: $!";
	print $f ' ' x (4 << 20);
	close $f;
}

sub load_again { sql('SELECT millm.unload()'); return sql(q(SELECT millm.load('tiny'))); }

sql(q(SELECT millm.download('millm-test/tiny-llama', 'FP16', name => 'tiny')));
is(sql(q(SELECT millm.wait('tiny'))), 'ready', 'a model');
sql(q(SELECT millm.load('tiny')));
ok(!-e $image, 'a small tokenizer is read each time');
my $text = sql("SELECT millm.generate($prompt)");
grow("$directory/tokenizer.json");
load_again();
ok(-f $image, 'a large one is compiled when it is loaded');
my $ino = (stat $image)[1];
load_again();
is((stat $image)[1], $ino, 'once');
is(sql("SELECT millm.generate($prompt)"), $text, 'and is the same tokenizer');
cmp_ok(sql('SELECT bytes FROM millm.cache_usage() WHERE model_id IS NOT NULL'), '>', (-s $image) + (4 << 20), 'what it takes is in cache_usage()');

sql('SELECT millm.unload()');
sql(q(SELECT millm.delete('tiny')));
ok(wait_true(sub { !-e $directory }), 'delete() removes it with the rest');

# A directory of somebody's stays as it is
my $local = rel2abs(PostgreSQL::Test::Utils::tempdir) . '/mine';
mkdir $local or die $!;
copy($_, $local) or die $! for glob "$ENV{MILLM_FIXTURES}/tiny/llama/*";
grow("$local/tokenizer.json");
sql("SELECT millm.register_local('$local')");
is(sql(q(SELECT millm.load('mine'))), 'loaded', 'a local model works');
ok(!-e "$local/tokenizer.millm", 'and gets no file');
$node->stop;
done_testing();

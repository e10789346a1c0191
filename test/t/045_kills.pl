# kill -9 of millm-hub, and of the whole server, three times in one download: it goes on by itself, and fetches little again.
use strict;
use warnings;
use Cwd qw(abs_path);
use Digest::SHA;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;
use TestHub;

my $MB = 1_000_000;
my $repo = 'HuggingFaceTB/SmolLM2-135M-Instruct';
my $file = "$ENV{MILLM_FIXTURES}/hub/$repo/model.safetensors";
my $size = -s $file;
my $hub = TestHub->new;
my $node = new_server('kills', '# the test hub', "millm.hf_endpoint = '@{[ $hub->endpoint ]}'", "millm.hf_cache_dir = 'none'");
my $cache = abs_path($node->basedir) . '/cache';

sub sql { my ($sql) = @_; return $node->safe_psql('postgres', $sql); }
sub sha256 { return Digest::SHA->new(256)->addfile($_[0])->hexdigest; }
sub delete_model
{
	my $dir = sql(q(SELECT local_path FROM millm.models WHERE name = 'm'));
	sql(q(SELECT millm.delete('m')));
	ok(wait_true(sub { !-e $dir }), 'deleted');
}
# The weights come up to that share of the file, and no further.
sub stop_at
{
	my ($percent) = @_;
	$hub->faults({ where => 'cdn', file => 'model.safetensors', bytes_per_second => 50 * $MB, kind => 'stall', at => int($percent / 100 * $size) });
}
# Watch the download until that share is shown, but for what may have come since: it is told five times a second. How many bytes are shown.
sub bytes_at
{
	my ($percent) = @_;
	my $least = $percent / 100 * $size - 30 * $MB;
	my $session = MillmTest::Session->new($node);
	my $bytes = 0;
	ok(wait_true(sub { $bytes = $session->query(q(SELECT bytes FROM millm.progress WHERE stage = 'downloading'))->{rows}[0] // 0; return $bytes >= $least }),
		"$percent % of it come");
	$session->hang_up;
	return $bytes;
}
# Where the requests for the weights begin
sub begins { return map { ($_->{range} // '') =~ /bytes=(\d+)-/ ? $1 : 0 } grep { $_->{port} eq 'cdn' && $_->{path} =~ /model\.safetensors/ } $hub->requests; }

# What they must amount to
my %right = (FP16 => sha256($file));
$hub->faults;
sql("SELECT millm.download('$repo', 'Q4', name => 'm')");
is(sql(q(SELECT millm.wait('m'))), 'ready', 'Q4 without a kill');
$right{Q4} = sha256("$cache/huggingface/HuggingFaceTB--SmolLM2-135M-Instruct--Q4/model.safetensors");
delete_model();

# What is counted as here is on disk, the 2 MB of other files included (FP16), or was at the last checkpoint: 64 MB and a tensor ago at most, the largest has 57 MB (Q4)
my %again = (FP16 => 3 * $MB, Q4 => (64 << 20) + 60 * $MB);
for my $what ('helper', 'server')
{
	for my $form ('FP16', 'Q4')
	{
		stop_at(30);
		sql("SELECT millm.download('$repo', '$form', name => 'm')");
		for my $percent (30, 60, 90)
		{
			my $bytes = bytes_at($percent);
			cmp_ok($bytes, '<', $size, sprintf('%s, %s at %d %%', $form, $what, 100 * $bytes / $size));
			# before the kill: whoever asks anew meets it
			if ($percent < 90) { stop_at($percent + 30); }
			else { $hub->faults; }
			if ($what eq 'helper') { kill('KILL', sql('SELECT hub_pid FROM millm.status()')); }
			else { kill_server($node); }
			my @begins;
			ok(wait_true(sub { @begins = begins(); @begins > 0 }), 'goes on by itself');
			my ($first) = sort { $a <=> $b } @begins;
			cmp_ok($first, '>=', $bytes - $again{$form}, sprintf('%.1f MB are fetched again at most', ($bytes > $first ? $bytes - $first : 0) / $MB));
		}
		is(sql(q(SELECT millm.wait('m'))), 'ready', 'arrives');
		my $dir = sql(q(SELECT local_path FROM millm.models WHERE name = 'm'));
		is(sha256("$dir/model.safetensors"), $right{$form}, 'with the right weights');
		is(decode_json(slurp_file("$dir/.millm_meta.json"))->{files}{'model.safetensors'}{hash}, $right{FP16}, 'of what the Hub has');
		is_deeply([ glob("$dir/.partial*") ], [], 'and nothing besides');
		delete_model();
	}
}
my $log = slurp_file($node->logfile);
unlike($log, qr/PANIC|TRAP/, 'no crash on the way');
$node->stop;
done_testing();

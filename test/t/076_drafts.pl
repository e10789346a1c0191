# Drafts: what a sequence says alone goes faster, and is the same; millm.draft_tokens says how much is drafted, and status() what became of it.
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

my $node = new_server('drafts', 'millm.deterministic = on');
sub sql { return $node->safe_psql('postgres', $_[0]); }

my $ask = q(SELECT millm.complete(repeat('ab cd ef gh ', 3), temperature => 0, seed => 1, max_tokens => 60, logprobs => true) #- '{usage,cached_tokens}');
my %answer;
for my $n (3, 0, 15)
{
	$node->append_conf('postgresql.conf', "millm.draft_tokens = $n\n");
	$node->reload;
	wait_true(sub { sql('SHOW millm.draft_tokens') eq $n });
	sql('SELECT millm.unload()') if %answer;
	is(sql('SELECT drafted_tokens IS NULL AND accepted_tokens IS NULL FROM millm.status()'), 't', 'no model, no drafts');
	load_model($node, 'tiny-long');
	is(sql('SELECT drafted_tokens = 0 AND accepted_tokens = 0 FROM millm.status()'), 't', 'counted from the load on');
	$answer{$n} = sql($ask);
	is(sql("SELECT drafted_tokens >= accepted_tokens AND (accepted_tokens > 0) = ($n > 0) FROM millm.status()"), 't', "drafts of $n");
}
is($answer{3}, $answer{0}, 'the same answer to the bits of its logprobs with drafts of 3');
is($answer{15}, $answer{0}, 'and of 15');

my ($rc, $out, $err) = $node->psql('postgres', 'ALTER SYSTEM SET millm.draft_tokens = 16');
like($err, qr/16 is outside the valid range for parameter "millm.draft_tokens" \(0 .. 15\)/, 'no more than 15');

$node->stop;
done_testing();

# A KV cache of int8: about half the memory, estimated and taken; status() and the fingerprint say which there is.
use strict;
use warnings;
use PostgreSQL::Test::Utils;
use Test::More;
use MillmTest;

my $node = new_server('kv_cache_dtype', "millm.kv_cache_dtype = int8");
sub sql { return $node->safe_psql('postgres', $_[0]); }
my $ask = q(SELECT millm.generate('once upon a time', temperature => 0, max_tokens => 8));

is(sql('SELECT kv_cache_dtype IS NULL FROM millm.status()'), 't', 'no model, no KV cache');
load_model($node, 'tiny-long');
is(sql('SELECT kv_cache_dtype FROM millm.status()'), 'int8', 'status() says what keys and values are kept in');
like(sql('SELECT fingerprint FROM millm.status()'), qr/-kv-int8$/, 'so does the fingerprint, with which answers differ');
my $small = sql("SELECT kv_cache_bytes FROM millm.estimate_memory('tiny-long')");
is(length(sql($ask)) > 0, 1, 'it answers');
is(sql($ask), sql($ask), 'the same each time, with what the prefix cache has');

$node->append_conf('postgresql.conf', "millm.kv_cache_dtype = auto\n");
$node->reload;
wait_true(sub { sql('SHOW millm.kv_cache_dtype') eq 'auto' });
is(sql('SELECT kv_cache_dtype FROM millm.status()'), 'int8', 'the next load decides');
my $large = sql("SELECT kv_cache_bytes FROM millm.estimate_memory('tiny-long')");
ok($small / $large > 0.5 && $small / $large < 0.6, "an estimate is of the next load: $small bytes beside $large") or diag("$small, $large");
sql('SELECT millm.unload()');
load_model($node, 'tiny-long');
is(sql('SELECT kv_cache_dtype FROM millm.status()'), 'float16', 'auto: the 16 bits that the kernels read');
unlike(sql('SELECT fingerprint FROM millm.status()'), qr/int8$/, 'of which the fingerprint says nothing');

my ($rc, $out, $err) = $node->psql('postgres', 'ALTER SYSTEM SET millm.kv_cache_dtype = fp8');
like($err, qr/invalid value for parameter "millm.kv_cache_dtype": "fp8"\nHINT:  Available values: auto, int8\./, 'what there is not is named, with what there is');

$node->stop;
done_testing();

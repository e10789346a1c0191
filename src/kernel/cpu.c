/*
 * cpu.c -- which instruction sets may be used here, and the table that follows from it.
 *
 * A flag means usable: the CPU has the instructions (CPUID) and the operating system saves their
 * registers (XGETBV).  Compiled without instruction-set flags, so that it runs anywhere.
 */
#include "kernel.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static uint64_t
read_xcr0(void)
{
	uint32_t	lo,
				hi;

	__asm__ volatile ("xgetbv" : "=a" (lo), "=d" (hi) : "c" (0));
	return (uint64_t) hi << 32 | lo;
}

/*
 * Tiles take 8 KiB of every thread's saved state, so Linux (5.16) wants a process to ask for them, once for all its threads; asking again
 * is free.  Older kernels and sandboxes refuse.
 */
static bool
ask_for_tiles(void)
{
	enum {ARCH_REQUEST_STATE = 0x1023, STATE_OF_TILES = 18};	/* asm/prctl.h's ARCH_REQ_XCOMP_PERM, which older headers lack */

	return syscall(SYS_arch_prctl, ARCH_REQUEST_STATE, STATE_OF_TILES) == 0;
}

unsigned
millm_cpu_flags(void)
{
	unsigned	a,
				b,
				c,
				d,
				max_subleaf,
				leaf7_d;
	unsigned	flags = 0;
	uint64_t	xcr0;
	const unsigned leaf1 = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
	const unsigned leaf7 = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
	const unsigned tiles = 1u << 24 | 1u << 22;	/* in leaf 7's edx: AMX-TILE, AMX-BF16 */

	if (!__get_cpuid(1, &a, &b, &c, &d) || (c & leaf1) != leaf1)
		return 0;
	xcr0 = read_xcr0();
	if ((xcr0 & 0x06) != 0x06)			/* XMM and YMM state */
		return 0;
	if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2))
		return 0;
	max_subleaf = a;
	leaf7_d = d;
	flags |= MILLM_CPU_AVX2;
	if ((xcr0 & 0xE6) == 0xE6 && (b & leaf7) == leaf7)	/* and opmask, upper ZMM, ZMM16-31 */
	{
		flags |= MILLM_CPU_AVX512;
		if ((c & 1 << 11) && (c & 1 << 1))	/* VNNI, VBMI */
			flags |= MILLM_CPU_AVX512_VNNI;
		if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1 << 5))
		{
			flags |= MILLM_CPU_AVX512_BF16;
			if (__get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx)
				flags |= MILLM_CPU_SLOW_BF16;
		}
		/* and tiles with their configuration */
		if ((xcr0 & 0x60000) == 0x60000 && (leaf7_d & tiles) == tiles && (flags & MILLM_CPU_AVX512_BF16) && (flags & MILLM_CPU_AVX512_VNNI) &&
			ask_for_tiles())
			flags |= MILLM_CPU_AMX;
	}
	return flags;
}
#else
unsigned
millm_cpu_flags(void)
{
	return 0;
}
#endif

static const char *const names[] = {"ref", "avx2", "avx512", "amx", NULL};

const char *const *
millm_kernels_names(void)
{
	return names;
}

bool
millm_kernels_init(MillmKernels *k, const char *name, bool *is_known)
{
	unsigned	cpu = millm_cpu_flags();
	int			best = cpu & MILLM_CPU_AMX ? 3 : cpu & MILLM_CPU_AVX512 ? 2 : cpu & MILLM_CPU_AVX2 ? 1 : 0;
	int			level = best;

	*is_known = true;
	if (name)
	{
		for (level = 0; names[level] && strcmp(names[level], name) != 0;)
			level++;
		if (!names[level])
			*is_known = false;
		if (!names[level] || level > best)
			return false;
	}
	millm_kernels_ref(k);
#if defined(__x86_64__)
	if (level >= 1)
		millm_kernels_avx2(k);
	if (level >= 2)
		millm_kernels_avx512(k, cpu);
	if (level >= 3)
		millm_kernels_amx(k);
#endif
	return true;
}

/* The loops for processors with AVX-512: 32 registers of 16 floats. */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("arch=x86-64-v4")
#endif

enum { LANES = 16, TILE = 8 };

#include "_loops.h"

#ifdef WIDER_LOOPS
const Loops ksm_edge_avx512 = ALL_LOOPS;
#endif

/* The loops for processors with AVX2 and FMA: 16 registers of 8 floats. */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("arch=x86-64-v3")
#endif

enum { LANES = 8, TILE = 4 };

#include "_loops.h"

#ifdef WIDER_LOOPS
const Loops ksm_edge_avx2 = ALL_LOOPS;
#endif

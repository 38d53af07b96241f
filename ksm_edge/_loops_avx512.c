/* The loops for processors with AVX-512: 32 registers of 16 floats. */

#include "_wider.h"

#ifdef WIDER_LOOPS
#pragma GCC target("arch=x86-64-v4")

enum { LANES = 16, TILE = 8 };

#include "_loops.h"

const Loops ksm_edge_avx512 = ALL_LOOPS;
#endif

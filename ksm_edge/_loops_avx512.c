/* The loops for processors with AVX-512: 32 registers of 16 floats. */

#include "_wider.h"

#ifdef WIDER_LOOPS
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

#include <immintrin.h>

enum { LANES = 16, TILE = 8, ROWS = 8, REGISTERS = 3 };
#define HAS_MASKS

#include "_loops.h"

const Loops ksm_edge_avx512 = ALL_LOOPS;
#endif

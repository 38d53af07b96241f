/* The loops for processors with AVX2 and FMA: 16 registers of 8 floats. */

#include "_wider.h"

#ifdef WIDER_LOOPS
#pragma GCC target("avx2,fma")

enum { LANES = 8, TILE = 4, ROWS = 4, REGISTERS = 3 };
#define COMPARED 8

#include "_loops.h"

const Loops ksm_edge_avx2 = ALL_LOOPS;
#endif

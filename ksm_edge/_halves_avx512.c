/* Products in half precision for processors with AVX-512 and its instructions for bfloat16. */

#include "_wider.h"

#ifdef PAIRED_HALVES
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")

#include <immintrin.h>

enum { LANES = 16, TILE = 8, ROWS = 12, REGISTERS = 2 };
#define HALVES
#define HAS_MASKS
#define HAS_PAIRS

#include "_rows.h"

typedef uint32_t Pairs __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Sixteen __attribute__((vector_size(64)));

INLINE Pairs pairs(Lanes first, Lanes second)
{
    __m512i front = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    __m512i behind = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    return (Pairs)_mm512_or_si512(front, _mm512_slli_epi32(behind, 16));
}

INLINE Pairs pairs_along(Lanes first, Lanes second)
{
    return (Pairs)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

INLINE Sixteen add_product(Sixteen total, uint32_t word, Pairs each)
{
    return (Sixteen)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32((int)word), (__m512bh)each);
}

#include "_products.h"

void ksm_edge_half_product_avx512(Multiplication m)
{
    multiply(m);
}
#endif

/* Words of two numbers that are rounded to half precision, bfloat16. Where a processor multiplies such pairs it does in
   one instruction what takes float32 two; where it does not, the same comes out to last bits, denormals apart, and takes
   longer.

   Whoever has instructions for them (HAS_PAIRS) says before what `pairs`, `pairs_along` and `add_product` do. */

#ifndef KSM_EDGE_HALVES_H
#define KSM_EDGE_HALVES_H

typedef uint32_t Word;
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum { TERMS = 2 };

#ifndef HAS_PAIRS
INLINE Words rounded(Words bits)
{
    return bits + 0x7fff + (bits >> 16 & 1);
}

/* Words of numbers and of those behind them. */
INLINE Words pairs(Lanes first, Lanes second)
{
    return rounded((Words)first) >> 16 | (rounded((Words)second) & 0xffff0000u);
}

/* Of numbers in a row and those behind the last of them: each and the next one. */
INLINE Words pairs_along(Lanes first, Lanes second)
{
    Lanes even, odd;
    PICKED(even, first, second, 2 * l)
    PICKED(odd, first, second, 2 * l + 1)
    return pairs(even, odd);
}

/* total + the products of a word's two with each lane's. */
INLINE Sums add_product(Sums total, Word word, Words each)
{
    Words all = (Words){0} + word, high = (Words){0} + 0xffff0000u;
    return total + (Sums)(all << 16) * (Sums)(each << 16) + (Sums)(all & high) * (Sums)(each & high);
}
#endif

/* Two rows of floats, the second behind the first along the sum; where there is none, NULL, there are zeros. */
INLINE void words_across(const float *row, const float *behind, int64_t count, Word *words)
{
    for (int64_t i = 0; i < count; i += LANES) {
        Lanes second = {0};
        if (behind)
            second = load_some(behind + i, count - i);
        store_some((float *)words + i, (Lanes)pairs(load_some(row + i, count - i), second), count - i);
    }
}

/* Up to LANES words of a row that lies along the sum. */
INLINE Words words_along(const float *row, int64_t count)
{
    Lanes behind = {0};
    if (count > LANES)
        behind = load_some(row + LANES, count - LANES);
    return pairs_along(load_some(row, count), behind);
}

#endif

/* Loops over floats that lie in a row, for all operators: sums, activations and their gradients, and a kernel's taps.

   Whoever includes this says how many floats LANES are, a register or two, and of how many channels TILE, times two
   LANES, sums stay in registers beside what they are made from; how many floats the processor compares by one instruction
   with a result as wide (COMPARED), if any, since GCC takes comparisons of wider ones apart; with 16 LANES and
   <immintrin.h>, whether to move a few of them by masks (HAS_MASKS). */

#ifndef KSM_EDGE_ROWS_H
#define KSM_EDGE_ROWS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TAPS = 49 };
enum { BLOCK = 1024 }; /* floats that stay in the innermost cache */

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
/* What is unrolled for several counts, and takes as long to compile, is there once. */
#define ONCE static __attribute__((noinline, unused))

/* A part of an operator's work, the channels from `first` to before `last`. Returns 0 where memory ran out. */
typedef int Run(const void *work, int64_t first, int64_t last);

/* A clip tells by its result what gradients it passed: those strictly between its bounds. What the others were given is
   kept, or made again. */
enum { CLIP, HARD_SWISH, SWISH };

typedef struct {
    int64_t kind;
    float low, high; /* of a clip */
} Activation;

/* ---- Loops over floats that lie in a row ---- */

INLINE int64_t rounded_up(int64_t count)
{
    return (count + LANES - 1) / LANES * LANES;
}

INLINE int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

INLINE Lanes load(const float *from)
{
    return *(const Lanes *)from;
}

INLINE void store(float *to, Lanes value)
{
    *(Lanes *)to = value;
}

/* Up to LANES floats; of what is loaded the others are 0. */
#ifdef HAS_MASKS
INLINE Lanes load_some(const float *from, int64_t count)
{
    return (Lanes)_mm512_maskz_loadu_ps(count < LANES ? (__mmask16)((1 << count) - 1) : 0xffff, from);
}

INLINE void store_some(float *to, Lanes value, int64_t count)
{
    _mm512_mask_storeu_ps(to, count < LANES ? (__mmask16)((1 << count) - 1) : 0xffff, (__m512)value);
}

INLINE void copy_some(const float *from, float *to, int64_t count)
{
    store_some(to, load_some(from, count), count);
}
#else
/* Fewer than LANES floats, in halves of halves: a loop over single ones costs as much as the rest of a small plane. */
INLINE void copy_some(const float *from, float *to, int64_t count)
{
#pragma GCC unroll 4
    for (int64_t half = LANES / 2; half; half /= 2)
        if (count & half) {
            memcpy(to, from, (size_t)half * sizeof(float));
            from += half, to += half;
        }
}

INLINE Lanes load_some(const float *from, int64_t count)
{
    if (count >= LANES)
        return load(from);
    Lanes value = {0};
    copy_some(from, (float *)&value, count);
    return value;
}

INLINE void store_some(float *to, Lanes value, int64_t count)
{
    if (count >= LANES)
        store(to, value);
    else
        copy_some((const float *)&value, to, count);
}
#endif

INLINE float sum_of(Lanes value)
{
    float part[LANES];
    memcpy(part, &value, sizeof part);
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            part[i] += part[i + half];
    return part[0];
}

INLINE float sum(const float *row, int64_t count)
{
    Lanes lanes[2] = {{0}};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        lanes[0] += load(row + i);
        lanes[1] += load(row + i + LANES);
    }
    for (; i < count; i += LANES)
        lanes[0] += load_some(row + i, count - i);
    return sum_of(lanes[0] + lanes[1]);
}

INLINE float product(const float *left, const float *right, int64_t count)
{
    Lanes lanes[2] = {{0}};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        lanes[0] += load(left + i) * load(right + i);
        lanes[1] += load(left + i + LANES) * load(right + i + LANES);
    }
    for (; i < count; i += LANES)
        lanes[0] += load_some(left + i, count - i) * load_some(right + i, count - i);
    return sum_of(lanes[0] + lanes[1]);
}

/* e^x by its power series around the next multiple of ln 2, to float32's last digits. */
INLINE float exponential(float x)
{
    x = x > 87 ? 87 : x < -87 ? -87 : x;
    float whole = (x * 1.44269504f + 12582912) - 12582912; /* 1.5 2^23: what is behind the point falls off */
    float r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
    float series = 1 + r * (1.0f / 6) * (1 + r * (1.0f / 7));
    series = 1 + r * (1.0f / 3) * (1 + r * (1.0f / 4) * (1 + r * (1.0f / 5) * series));
    series = 1 + r * (1 + r * (1.0f / 2) * series);
    uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return series * power;
}

INLINE float sigmoid(float x)
{
    return 1 / (1 + exponential(-x));
}

INLINE float hard_sigmoid(float x)
{
    float y = x * (1.0f / 6) + 0.5f;
    y = y > 0 ? y : 0;
    return y < 1 ? y : 1;
}

INLINE int does_nothing(Activation activation)
{
    return activation.kind == CLIP && activation.low == -INFINITY && activation.high == INFINITY;
}

INLINE void activate(const float *x, Activation activation, int64_t count, float *out)
{
    if (activation.kind == SWISH)
        for (int64_t i = 0; i < count; i++)
            out[i] = x[i] * sigmoid(x[i]);
    else if (activation.kind == HARD_SWISH)
        for (int64_t i = 0; i < count; i++)
            out[i] = x[i] * hard_sigmoid(x[i]);
    else
        for (int64_t i = 0; i < count; i++) { /* so that what is no number stays none */
            float raised = x[i] < activation.low ? activation.low : x[i];
            out[i] = raised > activation.high ? activation.high : raised;
        }
}

/* out = scale gradient, times the activation's slope at x, or for a clip at the x of which it made this one. Plain
   loops, as GCC takes comparisons of Lanes apart. Each of the three may be the memory of another. */
INLINE void pass(const float *gradient, const float *x, Activation activation, float scale, int64_t count, float *out)
{
    if (does_nothing(activation)) /* what is no number passes too */
        for (int64_t i = 0; i < count; i++)
            out[i] = scale * gradient[i];
    else if (activation.kind == SWISH)
        for (int64_t i = 0; i < count; i++) {
            float s = sigmoid(x[i]);
            out[i] = scale * gradient[i] * (s + x[i] * s * (1 - s));
        }
    else if (activation.kind == HARD_SWISH)
        for (int64_t i = 0; i < count; i++) {
            float slope = ((x[i] > -3) & (x[i] < 3)) ? x[i] * (1.0f / 6) : 0;
            out[i] = scale * gradient[i] * (hard_sigmoid(x[i]) + slope);
        }
    else
        for (int64_t i = 0; i < count; i++)
            out[i] = ((x[i] > activation.low) & (x[i] < activation.high)) ? scale * gradient[i] : 0;
}

#ifdef COMPARED
typedef float Register __attribute__((vector_size(4 * COMPARED), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(4 * COMPARED), aligned(4), may_alias));

/* `pass_and_sum` behind a clip, in one pass over memory. No function is given a Register: gcc 14.2 for Arm crashes. */
INLINE float clip_and_sum(const float *gradient, const float *met, const float *x, Activation clip, float scale,
                          int64_t count, float *out, double *products)
{
    Register totals[2] = {{0}}, met_totals[2] = {{0}};
    float total = 0, met_total = 0;
    int64_t i = 0;
    for (; i + 2 * COMPARED <= count; i += 2 * COMPARED)
        for (int half = 0; half < 2; half++) {
            int64_t at = i + half * COMPARED;
            Register given = *(const Register *)(gradient + at), clipped = *(const Register *)(x + at);
            Bits passed = (clipped > clip.low) & (clipped < clip.high);
            Register made = (Register)((Bits)(scale * given) & passed);
            if (met)
                met_totals[half] += *(const Register *)(met + at) * given;
            totals[half] += made;
            *(Register *)(out + at) = made;
        }
    for (; i < count; i++) {
        float given = gradient[i], made = ((x[i] > clip.low) & (x[i] < clip.high)) ? scale * given : 0;
        met_total += met ? met[i] * given : 0;
        total += made;
        out[i] = made;
    }
    for (int j = 0; j < COMPARED; j++) {
        total += totals[0][j] + totals[1][j];
        met_total += met_totals[0][j] + met_totals[1][j];
    }
    if (met)
        *products += met_total;
    return total;
}
#endif

/* What `pass` makes, `out`, and its sum; where `met` is given, *products grows by the sum of met times `gradient`. `out`
   may be the memory of the gradient; it may be that of x where `room` is given, the gradient's own memory if that may be
   written over. */
INLINE float pass_and_sum(const float *gradient, const float *met, const float *x, Activation activation, float scale,
                          int64_t count, float *room, float *out, double *products)
{
#ifdef COMPARED
    if (activation.kind == CLIP && !does_nothing(activation))
        return clip_and_sum(gradient, met, x, activation, scale, count, out, products);
#endif
    if (met)
        *products += product(met, gradient, count);
    if (room) {
        pass(room, x, activation, scale, count, room);
        memcpy(out, room, (size_t)count * sizeof(float));
    } else {
        pass(gradient, x, activation, scale, count, out);
    }
    return sum(out, count);
}

/* Rows of `width` from one distance between them to another. */
INLINE void copy_rows(const float *from, int64_t from_pitch, float *to, int64_t to_pitch, int64_t width, int64_t rows)
{
    for (; rows; rows--, from += from_pitch, to += to_pitch) {
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES)
            store(to + i, load(from + i));
        if (width < LANES)
            copy_some(from, to, width);
        else if (i < width) /* some of them twice */
            store(to + width - LANES, load(from + width - LANES));
    }
}

/* LANES of two times as many floats: for each place `l` the one whose number is given by it. */
#ifdef __clang__
#define PICKED(made, first, second, number)                                                                            \
    for (int l = 0; l < LANES; l++)                                                                                    \
        made[l] = (number) < LANES ? first[(number)] : second[(number) - LANES];
#else /* GCC would not see that this is one instruction or two */
typedef int32_t Places __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define PICKED(made, first, second, number)                                                                            \
    {                                                                                                                  \
        Places numbers;                                                                                                \
        for (int l = 0; l < LANES; l++)                                                                                \
            numbers[l] = (number);                                                                                     \
        made = __builtin_shuffle(first, second, numbers);                                                              \
    }
#endif

/* Every second float, and those behind them; some of them twice where they are no whole LANES. */
INLINE void split_pairs(const float *from, int64_t count, float *even, float *odd)
{
    if (count < LANES)
        for (int64_t i = 0; i < count; i++)
            even[i] = from[2 * i], odd[i] = from[2 * i + 1];
    else
        for (int64_t i = 0; i < count; i += LANES) {
            int64_t at = least(i, count - LANES);
            Lanes first = load(from + 2 * at), second = load(from + 2 * at + LANES), evens, odds;
            PICKED(evens, first, second, 2 * l)
            PICKED(odds, first, second, 2 * l + 1)
            store(even + at, evens);
            store(odd + at, odds);
        }
}

/* And together again. */
INLINE void join_pairs(const float *even, const float *odd, int64_t count, float *to)
{
    if (count < LANES)
        for (int64_t i = 0; i < count; i++)
            to[2 * i] = even[i], to[2 * i + 1] = odd[i];
    else
        for (int64_t i = 0; i < count; i += LANES) {
            int64_t at = least(i, count - LANES);
            Lanes evens = load(even + at), odds = load(odd + at), first, second;
            PICKED(first, evens, odds, l / 2 + l % 2 * LANES)
            PICKED(second, evens, odds, (LANES + l) / 2 + l % 2 * LANES)
            store(to + 2 * at, first);
            store(to + 2 * at + LANES, second);
        }
}

/* ---- Taps ---- */

/* Some of a kernel's taps: which they are, and how far from a pixel's own place in a frame they read. */
typedef struct {
    int count, tap[MAX_TAPS];
    int64_t offset[MAX_TAPS];
} Taps;

/* out[i] = start + sum of weight[k] row[offset[k] + i]; what is read and written reaches to whole LANES. */
INLINE void weighted(const float *row, const int64_t *offset, const float *weight, int taps, float start, int64_t count,
                     float *out)
{
    for (int64_t i = 0; i < count; i += LANES) {
        Lanes total = (Lanes){0} + start;
        for (int k = 0; k < taps; k++)
            total += weight[k] * load(row + offset[k] + i);
        store(out + i, total);
    }
}

/* The same for `rows` rows of `width` floats, LANES or more, of which the last ones are made twice. */
INLINE void weighted_rows(const float *row, int64_t pitch, const int64_t *offset, const float *weight, int taps,
                          float start, int64_t width, int64_t rows, float *out, int64_t out_pitch)
{
    for (; rows > 0; rows--, row += pitch, out += out_pitch)
        for (int64_t i = 0; i < width; i += LANES) {
            int64_t at = least(i, width - LANES);
            Lanes total = (Lanes){0} + start;
            for (int k = 0; k < taps; k++)
                total += weight[k] * load(row + offset[k] + at);
            store(out + at, total);
        }
}

INLINE int is_three_by_three(const Taps *taps, int64_t pitch)
{
    int is = taps->count == 9;
    for (int k = 0; is && k < 9; k++)
        is = taps->offset[k] == taps->offset[0] + k / 3 * pitch + k % 3;
    return is;
}

/* The same for two rows at a time and the nine taps from `row` on: what is loaded serves both. */
INLINE void three_by_three(const float *row, int64_t pitch, const float *weight, float start, int64_t width,
                           int64_t rows, float *out, int64_t out_pitch)
{
    for (; rows > 1; rows -= 2, row += 2 * pitch, out += 2 * out_pitch)
        for (int64_t i = 0; i < width; i += LANES) {
            int64_t at = least(i, width - LANES);
            Lanes upper = (Lanes){0} + start, lower = upper;
            for (int k = 0; k < 12; k++) {
                Lanes met = load(row + k / 3 * pitch + k % 3 + at);
                if (k < 9)
                    upper += weight[k] * met;
                if (k >= 3)
                    lower += weight[k - 3] * met;
            }
            store(out + at, upper);
            store(out + out_pitch + at, lower);
        }
}

/* A kernel's weights times `scale`, of these taps. */
INLINE void scaled(const Taps *taps, const float *kernel, float scale, float *weight)
{
    for (int k = 0; k < taps->count; k++)
        weight[k] = scale * kernel[taps->tap[k]];
}

/* `weighted` for taps of a kernel times `scale`, the loop over them unrolled for the usual counts. */
ONCE void weighted_sum(const float *row, const Taps *taps, const float *kernel, float scale, float start,
                       int64_t count, float *out)
{
    float weight[MAX_TAPS];
    scaled(taps, kernel, scale, weight);
    switch (taps->count) {
    case 1: weighted(row, taps->offset, weight, 1, start, count, out); break;
    case 2: weighted(row, taps->offset, weight, 2, start, count, out); break;
    case 4: weighted(row, taps->offset, weight, 4, start, count, out); break;
    case 6: weighted(row, taps->offset, weight, 6, start, count, out); break;
    case 9: weighted(row, taps->offset, weight, 9, start, count, out); break;
    case 25: weighted(row, taps->offset, weight, 25, start, count, out); break;
    default: weighted(row, taps->offset, weight, taps->count, start, count, out);
    }
}

/* `weighted_rows` likewise. */
ONCE void weighted_rows_sum(const float *row, int64_t pitch, const Taps *taps, const float *kernel, float scale,
                            float start, int64_t width, int64_t rows, float *out, int64_t out_pitch)
{
    float weight[MAX_TAPS];
    scaled(taps, kernel, scale, weight);
    if (is_three_by_three(taps, pitch)) {
        int64_t even = rows / 2 * 2;
        three_by_three(row + taps->offset[0], pitch, weight, start, width, even, out, out_pitch);
        row += even * pitch, out += even * out_pitch, rows -= even;
    }
    switch (taps->count) {
    case 9: weighted_rows(row, pitch, taps->offset, weight, 9, start, width, rows, out, out_pitch); break;
    case 25: weighted_rows(row, pitch, taps->offset, weight, 25, start, width, rows, out, out_pitch); break;
    default: weighted_rows(row, pitch, taps->offset, weight, taps->count, start, width, rows, out, out_pitch);
    }
}

INLINE int64_t rows_at_once(int64_t pitch)
{
    return pitch < BLOCK ? BLOCK / pitch : 1;
}

#endif

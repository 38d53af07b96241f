/* Loops over floats that lie in a row, for all operators: sums, activations and their gradients, and a kernel's taps.

   Whoever includes this says how many floats LANES are, a register or two, and of how many channels TILE, times two
   LANES, sums stay in registers beside what they are made from; with 16 LANES and <immintrin.h>, whether to move a few
   of them by masks (HAS_MASKS). */

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

/* Rows of `width` from one distance between them to another. */
INLINE void copy_rows(const float *from, int64_t from_pitch, float *to, int64_t to_pitch, int64_t width, int64_t rows)
{
    for (; rows; rows--, from += from_pitch, to += to_pitch) {
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES)
            store(to + i, load(from + i));
        copy_some(from + i, to + i, width - i);
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

/* The same for taps of a kernel times `scale`, the loop over them unrolled for the usual counts. */
INLINE void weighted_sum(const float *row, const Taps *taps, const float *kernel, float scale, float start,
                         int64_t count, float *out)
{
    float weight[MAX_TAPS];
    for (int k = 0; k < taps->count; k++)
        weight[k] = scale * kernel[taps->tap[k]];
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

INLINE int64_t rows_at_once(int64_t pitch)
{
    return pitch < BLOCK ? BLOCK / pitch : 1;
}

INLINE int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

#endif

/* What a kernel slides over: the pixels that its taps meet, and the gradient of a max pool. */

#ifndef KSM_EDGE_WINDOWS_H
#define KSM_EDGE_WINDOWS_H

#include "_rows.h"

typedef struct {
    int64_t images, channels, H, W, h, w; /* of what it slides over, and how often it stands */
    int64_t kernel[2], strides[2], dilations[2], pads[2];
    int64_t first, taps; /* those that are wanted */
} Sliding;

/* The pixel of a row that a tap meets first, and for which places of the kernel, from .. to, it meets any. */
typedef struct {
    int64_t shift, from, to;
} Reach;

INLINE Reach reach_of(const Sliding *s, int64_t tap)
{
    int64_t step = s->strides[1], shift = tap % s->kernel[1] * s->dilations[1] - s->pads[1];
    int64_t from = shift < 0 ? least((step - 1 - shift) / step, s->w) : 0;
    int64_t to = shift < s->W ? least((s->W - 1 - shift) / step + 1, s->w) : 0;
    return (Reach){shift, from, to > from ? to : from};
}

/* The row that a tap meets in a row of places, or -1. */
INLINE int64_t row_of(const Sliding *s, int64_t tap, int64_t place)
{
    int64_t row = place * s->strides[0] + tap / s->kernel[1] * s->dilations[0] - s->pads[0];
    return row < s->H ? row : -1;
}

/* Every step-th of some floats. The usual steps by themselves: rows are short, and GCC makes shuffles of pairs. */
INLINE void pick(const float *restrict from, int64_t step, int64_t count, float *restrict to)
{
    if (step == 1)
        copy_rows(from, 0, to, 0, count, 1);
    else if (step == 2)
        for (int64_t i = 0; i < count; i++)
            to[i] = from[2 * i];
    else
        for (int64_t i = 0; i < count; i++)
            to[i] = from[step * i];
}

INLINE void clear(float *to, int64_t count)
{
    for (int64_t i = 0; i < count; i += LANES)
        store_some(to + i, (Lanes){0}, count - i);
}

/* The reverse of `step` picks, each from one float further on, that lie `distance` apart. */
INLINE void interleave(const float *restrict from, int64_t distance, int64_t step, int64_t count, float *restrict to)
{
    int64_t pairs = step == 2 ? count / 2 : 0;
    join_pairs(from, from + distance, pairs, to);
    for (int64_t i = 2 * pairs; i < count; i++)
        to[i] = from[i % step * distance + i / step];
}

/* ---- Windows: x (n, C, H, W) -> (n, taps C, h, w), zeros where a tap met padding ---- */

typedef struct {
    const Sliding *s;
    const float *x;
    float *made;
} Windows;

INLINE void window(const Sliding *s, const float *plane, int64_t tap, float *made)
{
    Reach reach = reach_of(s, tap);
    for (int64_t i = 0; i < s->h; i++, made += s->w) {
        int64_t row = row_of(s, tap, i), from = row < 0 ? s->w : reach.from, to = row < 0 ? s->w : reach.to;
        clear(made, from);
        if (from < to)
            pick(plane + row * s->W + from * s->strides[1] + reach.shift, s->strides[1], to - from, made + from);
        clear(made + to, s->w - to);
    }
}

static int windows(const void *work, int64_t first, int64_t last)
{
    const Windows *f = work;
    const Sliding *s = f->s;
    for (int64_t image = 0; image < s->images; image++)
        for (int64_t tap = 0; tap < s->taps; tap++)
            for (int64_t channel = first; channel < last; channel++)
                window(s, f->x + (image * s->channels + channel) * s->H * s->W, s->first + tap,
                       f->made + ((image * s->taps + tap) * s->channels + channel) * s->h * s->w);
    return 1;
}

/* ---- Gradient of a max pool: each window's goes to the first of its pixels that is its maximum ----

   The maximum is found in x again: what the pool made may be of another precision than what was kept of x. Rows of x are
   taken apart into as many phases as the kernel steps, so that what a tap meets lies in a row. */

typedef struct {
    const Sliding *s;
    const float *dy, *x;
    float *dx;
} Pooling;

typedef struct {
    int64_t pitch, phase; /* floats of a row of a phase, and of all its rows */
    float *x, *dx;
    float *largest; /* of each window of a row */
    int32_t *won;   /* whether it has given its gradient away */
} PoolRoom;

INLINE void raise_to(const float *restrict x, int64_t count, float *restrict largest)
{
    for (int64_t i = 0; i < count; i++)
        largest[i] = x[i] > largest[i] ? x[i] : largest[i];
}

INLINE void give(const float *restrict x, const float *restrict largest, const float *restrict dy, int64_t count,
                 int32_t *restrict won, float *restrict dx)
{
    for (int64_t i = 0; i < count; i++) {
        int32_t wins = (x[i] == largest[i]) & !won[i];
        dx[i] += wins ? dy[i] : 0;
        won[i] |= wins;
    }
}

/* Where the windows of row `i` that have this tap begin, of them, and where in a frame it meets them: their count. */
INLINE int64_t met_by(const Sliding *s, const PoolRoom *room, int64_t tap, int64_t i, int64_t *from, int64_t *at)
{
    Reach reach = reach_of(s, tap);
    int64_t step = s->strides[1], row = row_of(s, tap, i), met = reach.from * step + reach.shift;
    *from = reach.from;
    *at = met % step * room->phase + row * room->pitch + met / step;
    return row >= 0 && reach.from < reach.to ? reach.to - reach.from : 0;
}

INLINE void pool_plane(const Sliding *s, const PoolRoom *room, const float *dy, const float *x, float *dx)
{
    int64_t step = s->strides[1], taps = s->kernel[0] * s->kernel[1], from, at;
    for (int64_t row = 0; row < s->H; row++)
        for (int64_t phase = 0; phase < least(step, s->W); phase++)
            pick(x + row * s->W + phase, step, (s->W - 1 - phase) / step + 1,
                 room->x + phase * room->phase + row * room->pitch);
    memset(room->dx, 0, (size_t)(step * room->phase) * sizeof(float));
    for (int64_t i = 0; i < s->h; i++, dy += s->w) {
        for (int64_t window = 0; window < s->w; window++)
            room->largest[window] = -INFINITY, room->won[window] = 0;
        for (int64_t tap = 0; tap < taps; tap++) {
            int64_t count = met_by(s, room, tap, i, &from, &at);
            if (count)
                raise_to(room->x + at, count, room->largest + from);
        }
        for (int64_t tap = 0; tap < taps; tap++) {
            int64_t count = met_by(s, room, tap, i, &from, &at);
            if (count)
                give(room->x + at, room->largest + from, dy + from, count, room->won + from, room->dx + at);
        }
    }
    for (int64_t row = 0; row < s->H; row++)
        interleave(room->dx + row * room->pitch, room->phase, step, s->W, dx + row * s->W);
}

static int pool_gradient(const void *work, int64_t first, int64_t last)
{
    const Pooling *f = work;
    const Sliding *s = f->s;
    int64_t step = s->strides[1], pitch = (s->W + step - 1) / step, phase = s->H * pitch;
    PoolRoom room = {pitch, phase, malloc((size_t)(2 * step * phase) * sizeof(float)), NULL, NULL, NULL};
    room.largest = malloc((size_t)s->w * sizeof(float));
    room.won = malloc((size_t)s->w * sizeof(int32_t));
    int done = room.x && room.largest && room.won;
    for (int64_t channel = first; done && channel < last; channel++)
        for (int64_t image = 0; image < s->images; image++) {
            int64_t plane = image * s->channels + channel, in = plane * s->H * s->W, out = plane * s->h * s->w;
            room.dx = room.x + step * phase;
            pool_plane(s, &room, f->dy + out, f->x + in, f->dx + in);
        }
    free(room.x);
    free(room.largest);
    free(room.won);
    return done;
}

#endif

/* Operators of the gradient graph that ONNX Runtime has none of: a depthwise conv with what stands behind it, and its
   gradient with what stands around it, each in one pass over memory where standard operators take up to ten.

   Everything is float32 and (images, channels, rows, columns). One channel of one image, a plane, is worked on at a
   time. It is copied into a frame, whose rows have zeros between them; so a tap of the kernel is a distance in memory,
   the same for every pixel, and a conv is one loop over many rows. What is beside the point here, ONNX Runtime's C
   interface, comes last. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* LANES floats are a register or a few; TILE channels by two times as many floats are held in registers. */
#if defined(__aarch64__) || defined(__ARM_NEON)
enum { LANES = 8, TILE = 4 };
#else
enum { LANES = 16, TILE = 8 };
#endif
enum { TASKS = 16, MAX_TAPS = 49, MAX_STRIDE = 2, MAX_CLASSES = MAX_STRIDE * MAX_STRIDE, MAX_INSIDE = 64 };
enum { BLOCK = 1024, PIXELS = 256 }; /* floats of one plane, and of each of dozens, that stay in the innermost cache */
enum { GROUP = 8 }; /* channels that are made at once of a 1x1 conv */

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

/* A clip tells by its result what gradients it passed: those strictly between its bounds. What the others were given is
   kept, or made again. */
enum { CLIP, HARD_SWISH, SWISH };

typedef struct {
    int64_t kind;
    float low, high; /* of a clip */
} Activation;

typedef struct {
    int64_t images, channels, H, W, h, w; /* of the conv's input and output */
    int64_t inside; /* channels that a 1x1 conv in front makes `channels` of, where it is done along */
    int64_t kernel[2], strides[2], pads[4]; /* top, left, bottom, right */
    Activation before, behind;
} Depthwise;

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

INLINE float sum_of(Lanes value)
{
    float sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += value[i];
    return sum;
}

INLINE float sum(const float *row, int64_t count)
{
    Lanes lanes[2] = {{0}};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        lanes[0] += load(row + i);
        lanes[1] += load(row + i + LANES);
    }
    float total = sum_of(lanes[0] + lanes[1]);
    for (; i < count; i++)
        total += row[i];
    return total;
}

INLINE float product(const float *left, const float *right, int64_t count)
{
    Lanes lanes[2] = {{0}};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        lanes[0] += load(left + i) * load(right + i);
        lanes[1] += load(left + i + LANES) * load(right + i + LANES);
    }
    float total = sum_of(lanes[0] + lanes[1]);
    for (; i < count; i++)
        total += left[i] * right[i];
    return total;
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
            float slope = (x[i] > -3) & (x[i] < 3) ? x[i] * (1.0f / 6) : 0;
            out[i] = scale * gradient[i] * (hard_sigmoid(x[i]) + slope);
        }
    else
        for (int64_t i = 0; i < count; i++)
            out[i] = (x[i] > activation.low) & (x[i] < activation.high) ? scale * gradient[i] : 0;
}

/* Rows of `width` from one distance between them to another. */
INLINE void copy_rows(const float *from, int64_t from_pitch, float *to, int64_t to_pitch, int64_t width, int64_t rows)
{
    for (; rows; rows--, from += from_pitch, to += to_pitch) {
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES)
            store(to + i, load(from + i));
        for (; i < width; i++)
            to[i] = from[i];
    }
}

/* ---- Taps ---- */

/* Some of a kernel's taps: which they are, and how far from a pixel's own place in a frame they read. */
typedef struct {
    int count, tap[MAX_TAPS];
    int64_t offset[MAX_TAPS];
} Taps;

/* out[i] = sum of weight[k] row[offset[k] + i]; what is read and written reaches beyond `count`, to whole LANES. */
INLINE void weighted(const float *row, const int64_t *offset, const float *weight, int taps, int64_t count, float *out)
{
    for (int64_t i = 0; i < count; i += LANES) {
        Lanes total = {0};
        for (int k = 0; k < taps; k++)
            total += weight[k] * load(row + offset[k] + i);
        store(out + i, total);
    }
}

/* The same for taps of a kernel, the loop over them unrolled for the usual counts. */
INLINE void weighted_sum(const float *row, const Taps *taps, const float *kernel, int64_t count, float *out)
{
    float weight[MAX_TAPS];
    for (int k = 0; k < taps->count; k++)
        weight[k] = kernel[taps->tap[k]];
    switch (taps->count) {
    case 1: weighted(row, taps->offset, weight, 1, count, out); break;
    case 2: weighted(row, taps->offset, weight, 2, count, out); break;
    case 4: weighted(row, taps->offset, weight, 4, count, out); break;
    case 6: weighted(row, taps->offset, weight, 6, count, out); break;
    case 9: weighted(row, taps->offset, weight, 9, count, out); break;
    case 25: weighted(row, taps->offset, weight, 25, count, out); break;
    default: weighted(row, taps->offset, weight, taps->count, count, out);
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

/* ---- Forward ---- */

/* With strides the frame is one for each remainder of row and column modulo them, so that taps stay distances. */
typedef struct {
    int64_t pitch, rows, size; /* of one of these frames */
    Taps taps;
} Frames;

INLINE Frames frames_of(const Depthwise *d)
{
    int64_t down = d->strides[0], right = d->strides[1];
    Frames f = {.pitch = d->w + (d->kernel[1] - 1) / right, .rows = d->h + (d->kernel[0] - 1) / down};
    f.size = f.pitch * f.rows;
    for (int64_t i = 0; i < d->kernel[0]; i++)
        for (int64_t j = 0; j < d->kernel[1]; j++) {
            int64_t frame = i % down * right + j % right;
            f.taps.tap[f.taps.count] = f.taps.count;
            f.taps.offset[f.taps.count++] = frame * f.size + i / down * f.pitch + j / right;
        }
    return f;
}

/* The plane into frames whose margins are zeros. */
INLINE void frame(const Depthwise *d, const Frames *f, const float *plane, float *frames)
{
    int64_t down = d->strides[0], right = d->strides[1], top = d->pads[0], left = d->pads[1];
    if (down == 1 && right == 1) {
        copy_rows(plane, d->W, frames + top * f->pitch + left, f->pitch, d->W, d->H);
        return;
    }
    for (int64_t row = 0; row < d->H; row++, plane += d->W) {
        int64_t i = (row + top) / down;
        if (i >= f->rows)
            break;
        for (int64_t b = 0; b < right; b++) {
            /* columns j right + b - left of the image, from the first j where there is one */
            int64_t first = b < left ? (left - b + right - 1) / right : 0;
            int64_t end = least(f->pitch, (d->W - b + left + right - 1) / right);
            float *to = frames + ((row + top) % down * right + b) * f->size + i * f->pitch;
            const float *from = plane + b - left;
            if (right == 1)
                for (int64_t j = first; j < end; j++)
                    to[j] = from[j];
            else
                for (int64_t j = first; j < end; j++)
                    to[j] = from[2 * j];
        }
    }
}

typedef struct {
    const Depthwise *d;
    const float *x, *wide, *shift, *weight, *scale, *bias; /* wide, shift: of the 1x1 conv in front */
    float *y, *planes; /* planes: room for GROUP results of the 1x1 conv */
} Forward;

/* Where one plane after the other is worked on. */
typedef struct {
    Frames layout;
    int64_t block; /* rows at once */
    float *frames, *made, *activated; /* the last: a plane, behind an activation that is no clip */
} ForwardRoom;

INLINE ForwardRoom forward_room(const Depthwise *d)
{
    ForwardRoom room = {.layout = frames_of(d)};
    int64_t whole = d->strides[0] * d->strides[1] * room.layout.size + LANES;
    room.block = rows_at_once(room.layout.pitch);
    int64_t made = room.block * room.layout.pitch + LANES, plane = d->before.kind == CLIP ? 0 : d->H * d->W;
    room.frames = calloc((size_t)(whole + made + plane), sizeof(float));
    room.made = room.frames ? room.frames + whole : NULL;
    room.activated = room.frames ? room.made + made : NULL;
    return room;
}

/* conv(x, W) scale + bias of one plane, and `behind`, what stands behind it. x is what a clip in front made, or what any
   other activation there is given. */
INLINE void forward_plane(const Forward *f, const ForwardRoom *room, int64_t channel, Activation behind, const float *x,
                          float *y)
{
    const Depthwise *d = f->d;
    int64_t taps = d->kernel[0] * d->kernel[1], pitch = room->layout.pitch;
    float scale = f->scale[channel], bias = f->bias[channel], *made = room->made;
    if (d->before.kind != CLIP) {
        activate(x, d->before, d->H * d->W, room->activated);
        x = room->activated;
    }
    frame(d, &room->layout, x, room->frames);
    for (int64_t row = 0; row < d->h; row += room->block) {
        int64_t rows = least(room->block, d->h - row), count = rows * pitch;
        weighted_sum(room->frames + row * pitch, &room->layout.taps, f->weight + channel * taps, count, made);
        for (int64_t i = 0; i < count; i++)
            made[i] = made[i] * scale + bias;
        activate(made, behind, count, made);
        copy_rows(made, pitch, y + row * d->w, d->w, d->w, rows);
    }
}

/* Returns 0 where memory ran out, as all of these. */
FOR_EVERY_PROCESSOR static int forward(const Forward *f, int64_t first, int64_t last)
{
    const Depthwise *d = f->d;
    ForwardRoom room = forward_room(d);
    if (!room.frames)
        return 0;
    for (int64_t channel = first; channel < last; channel++)
        for (int64_t image = 0; image < d->images; image++) {
            int64_t plane = image * d->channels + channel;
            const float *x = f->x + plane * d->H * d->W;
            forward_plane(f, &room, channel, d->behind, x, f->y + plane * d->h * d->w);
        }
    free(room.frames);
    return 1;
}

/* ---- Backward ---- */

/* One frame of dz, with margins above and in front of every row, which are those behind the row before. For each
   remainder of the image's rows and columns modulo the strides, the taps that pixels there meet. */
typedef struct {
    int64_t pitch, rows, above, front;
    Taps taps[MAX_CLASSES];
} Gradients;

INLINE Gradients gradients_of(const Depthwise *d)
{
    int64_t down = d->strides[0], right = d->strides[1];
    Gradients g = {.above = d->kernel[0], .front = d->kernel[1] - 1};
    g.pitch = (d->w > (d->W + right - 1) / right ? d->w : (d->W + right - 1) / right) + d->kernel[1] - 1;
    g.rows = g.above + (d->h > (d->H + down - 1) / down ? d->h : (d->H + down - 1) / down) + d->kernel[0];
    for (int64_t row = 0; row < down; row++)
        for (int64_t column = 0; column < right; column++) {
            Taps *taps = &g.taps[row * right + column];
            for (int64_t i = 0; i < d->kernel[0]; i++)
                for (int64_t j = 0; j < d->kernel[1]; j++) {
                    int64_t y = row + d->pads[0] - i, x = column + d->pads[1] - j;
                    if (y % down || x % right)
                        continue;
                    taps->tap[taps->count] = (int)(i * d->kernel[1] + j);
                    taps->offset[taps->count++] = (g.above + y / down) * g.pitch + g.front + x / right;
                }
        }
    return g;
}

typedef struct {
    const Depthwise *d;
    const float *dy, *y, *x, *wide, *shift, *weight, *scale, *bias;
    const float *product_before, *dbias_before, *wide_product_before, *shift_before;
    float *dx, *product, *dbias, *wide_product, *dshift, *sums, *planes;
} Backward;

/* Rows of the transposed conv, (rows, W), which begin at a multiple of the stride. `made` has room for one remainder's
   worth of them at the frame's pitch, for each remainder of the columns. */
INLINE void spread(const Depthwise *d, const Gradients *g, const float *frame, const float *weight, int64_t row,
                   int64_t rows, float *made, float *out)
{
    int64_t down = d->strides[0], right = d->strides[1];
    const float *from = frame + row / down * g->pitch;
    for (int64_t a = 0; a < least(down, rows); a++) {
        int64_t some = (rows - a + down - 1) / down, count = some * g->pitch;
        float *odd = made + rounded_up(count), *to = out + a * d->W;
        weighted_sum(from, &g->taps[a * right], weight, count, made);
        if (right == 1) {
            copy_rows(made, g->pitch, to, down * d->W, d->W, some);
            continue;
        }
        weighted_sum(from, &g->taps[a * right + 1], weight, count, odd);
        for (int64_t i = 0; i < some; i++, to += down * d->W) {
            const float *even_row = made + i * g->pitch, *odd_row = odd + i * g->pitch;
            for (int64_t j = 0; j < d->W / 2; j++) {
                to[2 * j] = even_row[j];
                to[2 * j + 1] = odd_row[j];
            }
            if (d->W % 2)
                to[d->W - 1] = even_row[d->W / 2];
        }
    }
}

typedef struct {
    Gradients layout;
    int64_t some, most; /* rows of dz and of dx at once */
    float *frame, *made, *t, *activated;
    ForwardRoom again; /* where what stands behind is no clip: z is made once more, */
    float *z;          /* a plane of it */
} BackwardRoom;

typedef struct {
    double product, dbias, sums;
} Totals;

INLINE BackwardRoom backward_room(const Depthwise *d)
{
    BackwardRoom room = {.layout = gradients_of(d)};
    int64_t down = d->strides[0], pitch = room.layout.pitch, whole = room.layout.rows * pitch + LANES;
    room.some = rows_at_once(d->w), room.most = rows_at_once(d->W * down) * down;
    int64_t made = d->strides[1] * (room.most / down * pitch + LANES) + room.some * d->w;
    int64_t t = room.most * d->W + LANES, activated = d->before.kind == CLIP ? 0 : t;
    int64_t z = d->behind.kind == CLIP ? 0 : d->h * d->w;
    room.frame = calloc((size_t)(whole + made + t + activated + z), sizeof(float));
    if (!room.frame)
        return room;
    room.made = room.frame + whole, room.t = room.made + made;
    room.activated = room.t + t, room.z = room.activated + activated;
    if (z && !(room.again = forward_room(d)).frames) {
        free(room.frame);
        room.frame = NULL;
    }
    return room;
}

/* Of one plane, with t = conv^T(dz, W): product += sum x t, dbias += sum dz, dx = t scale where x passes, sums += sum dx.
   dx may be x's own memory. y is what a clip behind made; otherwise it is not looked at. */
INLINE void backward_plane(const Backward *b, const BackwardRoom *room, int64_t channel, const float *dy,
                           const float *y, const float *x, float *dx, Totals *totals)
{
    const Depthwise *d = b->d;
    const Gradients *layout = &room->layout;
    int64_t taps = d->kernel[0] * d->kernel[1];
    if (d->behind.kind != CLIP) {
        const Forward again = {.d = d, .weight = b->weight, .scale = b->scale, .bias = b->bias};
        forward_plane(&again, &room->again, channel, (Activation){CLIP, -INFINITY, INFINITY}, x, room->z);
        y = room->z;
    }
    for (int64_t row = 0; row < d->h; row += room->some) {
        int64_t rows = least(room->some, d->h - row), count = rows * d->w;
        float *to = room->frame + (layout->above + row) * layout->pitch + layout->front;
        pass(dy + row * d->w, y + row * d->w, d->behind, 1, count, room->made);
        totals->dbias += sum(room->made, count);
        copy_rows(room->made, d->w, to, layout->pitch, d->w, rows);
    }
    for (int64_t row = 0; row < d->H; row += room->most, x += room->most * d->W, dx += room->most * d->W) {
        int64_t rows = least(room->most, d->H - row), count = rows * d->W;
        spread(d, layout, room->frame, b->weight + channel * taps, row, rows, room->made, room->t);
        const float *met = x;
        if (d->before.kind != CLIP && d->behind.kind != CLIP) {
            met = room->again.activated + row * d->W;
        } else if (d->before.kind != CLIP) {
            activate(x, d->before, count, room->activated);
            met = room->activated;
        }
        totals->product += product(met, room->t, count);
        pass(room->t, x, d->before, b->scale[channel], count, room->t);
        totals->sums += sum(room->t, count);
        memcpy(dx, room->t, (size_t)count * sizeof(float));
    }
}

FOR_EVERY_PROCESSOR static int backward(const Backward *b, int64_t first, int64_t last)
{
    const Depthwise *d = b->d;
    BackwardRoom room = backward_room(d);
    if (!room.frame)
        return 0;
    for (int64_t channel = first; channel < last; channel++) {
        Totals totals = {0};
        for (int64_t image = 0; image < d->images; image++) {
            int64_t plane = image * d->channels + channel, large = plane * d->H * d->W, small = plane * d->h * d->w;
            backward_plane(b, &room, channel, b->dy + small, b->y + small, b->x + large, b->dx + large, &totals);
        }
        b->product[channel] = b->product_before[channel] + (float)totals.product;
        b->dbias[channel] = b->dbias_before[channel] + (float)totals.dbias;
        b->sums[channel] = (float)totals.sums;
    }
    free(room.again.frames);
    free(room.frame);
    return 1;
}

/* ---- With a 1x1 conv in front, whose result is never all in memory ---- */

/* GROUP channels of the 1x1 conv, its weight turned to (inside, GROUP) and filled up with zeros. */
typedef struct {
    int64_t count; /* of channels that there are */
    float weight[MAX_INSIDE * GROUP], shift[GROUP];
} Widening;

INLINE Widening widening(const Depthwise *d, const float *weight, const float *shift, int64_t first)
{
    Widening w = {.count = least(GROUP, d->channels - first)};
    for (int64_t c = 0; c < w.count; c++) {
        w.shift[c] = shift[first + c];
        for (int64_t k = 0; k < d->inside; k++)
            w.weight[k * GROUP + c] = weight[(first + c) * d->inside + k];
    }
    return w;
}

/* planes (GROUP, pixels) of x (inside, pixels): the 1x1 conv and, if it is a clip, the activation behind it. */
INLINE void widen(const Depthwise *d, const Widening *w, const float *x, float *planes)
{
    int64_t pixels = d->H * d->W, inside = d->inside;
    for (int64_t at = 0; at < pixels; at += BLOCK) {
        int64_t end = least(at + BLOCK, pixels), i = at;
        for (; i + 2 * LANES <= end; i += 2 * LANES)
            for (int tile = 0; tile < GROUP; tile += TILE) {
                Lanes left[TILE], right[TILE];
                for (int c = 0; c < TILE; c++)
                    left[c] = right[c] = (Lanes){0} + w->shift[tile + c];
                for (int64_t k = 0; k < inside; k++) {
                    Lanes x_left = load(x + k * pixels + i), x_right = load(x + k * pixels + i + LANES);
                    for (int c = 0; c < TILE; c++) {
                        left[c] += w->weight[k * GROUP + tile + c] * x_left;
                        right[c] += w->weight[k * GROUP + tile + c] * x_right;
                    }
                }
                for (int c = 0; c < TILE; c++) {
                    store(planes + (tile + c) * pixels + i, left[c]);
                    store(planes + (tile + c) * pixels + i + LANES, right[c]);
                }
            }
        for (; i < end; i++)
            for (int c = 0; c < GROUP; c++) {
                float made = w->shift[c];
                for (int64_t k = 0; k < inside; k++)
                    made += w->weight[k * GROUP + c] * x[k * pixels + i];
                planes[c * pixels + i] = made;
            }
        for (int c = 0; c < GROUP && d->before.kind == CLIP; c++)
            activate(planes + c * pixels + at, d->before, end - at, planes + c * pixels + at);
    }
}

/* product (GROUP, inside) += dz x^T, over pixels from `at` on to `end`, whole LANES; LANES of them apart. */
INLINE void meet(const Depthwise *d, const float *dz, const float *x, int64_t at, int64_t end, Lanes *products)
{
    int64_t pixels = d->H * d->W;
    for (int64_t k = 0; k < d->inside; k += 2)
        for (int tile = 0; tile < GROUP; tile += TILE) {
            Lanes even[TILE] = {{0}}, odd[TILE] = {{0}};
            for (int64_t i = at; i < end; i += LANES) {
                Lanes x_even = load(x + k * pixels + i), x_odd = load(x + (k + 1) * pixels + i);
                for (int c = 0; c < TILE; c++) {
                    Lanes gradient = load(dz + (tile + c) * pixels + i);
                    even[c] += gradient * x_even;
                    odd[c] += gradient * x_odd;
                }
            }
            for (int c = 0; c < TILE; c++) {
                products[k * GROUP + tile + c] += even[c];
                products[(k + 1) * GROUP + tile + c] += odd[c];
            }
        }
}

/* dx (inside, pixels) += weight^T dz, over the same pixels; `begun`: whether there is anything in dx yet. */
INLINE void narrow(const Depthwise *d, const Widening *w, const float *dz, int64_t at, int64_t end, int begun, float *dx)
{
    int64_t pixels = d->H * d->W;
    for (int tile = 0; tile < GROUP; tile += TILE, begun = 1)
        for (int64_t i = at; i < end; i += LANES) {
            Lanes gradient[TILE];
            for (int c = 0; c < TILE; c++)
                gradient[c] = load(dz + (tile + c) * pixels + i);
            for (int64_t k = 0; k < d->inside; k++) {
                Lanes total = begun ? load(dx + k * pixels + i) : (Lanes){0};
                for (int c = 0; c < TILE; c++)
                    total += w->weight[k * GROUP + tile + c] * gradient[c];
                store(dx + k * pixels + i, total);
            }
        }
}

/* Both, for all pixels. */
INLINE void meet_and_narrow(const Depthwise *d, const Widening *w, const float *dz, const float *x, int begun,
                            float *product, float *dx)
{
    int64_t pixels = d->H * d->W, whole = pixels / LANES * LANES;
    Lanes products[MAX_INSIDE * GROUP] = {{0}};
    for (int64_t at = 0; at < whole; at += PIXELS) {
        int64_t end = least(at + PIXELS, whole);
        meet(d, dz, x, at, end, products);
        narrow(d, w, dz, at, end, begun, dx);
    }
    for (int64_t k = 0; k < d->inside; k++) {
        for (int c = 0; c < GROUP; c++) {
            product[c * d->inside + k] += sum_of(products[k * GROUP + c]);
            for (int64_t i = whole; i < pixels; i++)
                product[c * d->inside + k] += dz[c * pixels + i] * x[k * pixels + i];
        }
        for (int64_t i = whole; i < pixels; i++) {
            float total = begun ? dx[k * pixels + i] : 0;
            for (int c = 0; c < GROUP; c++)
                total += w->weight[k * GROUP + c] * dz[c * pixels + i];
            dx[k * pixels + i] = total;
        }
    }
}

/* All groups one after the other on one thread, in the same room; backward each adds to dx. */
FOR_EVERY_PROCESSOR static int widened_forward(const Forward *f)
{
    const Depthwise *d = f->d;
    int64_t pixels = d->H * d->W, small = d->h * d->w;
    ForwardRoom room = forward_room(d);
    if (!room.frames)
        return 0;
    for (int64_t first = 0; first < d->channels; first += GROUP) {
        Widening w = widening(d, f->wide, f->shift, first);
        for (int64_t image = 0; image < d->images; image++) {
            widen(d, &w, f->x + image * d->inside * pixels, f->planes);
            for (int64_t c = 0; c < w.count; c++) {
                float *y = f->y + (image * d->channels + first + c) * small;
                forward_plane(f, &room, first + c, d->behind, f->planes + c * pixels, y);
            }
        }
    }
    free(room.frames);
    return 1;
}

FOR_EVERY_PROCESSOR static int widened_backward(const Backward *b)
{
    const Depthwise *d = b->d;
    int64_t pixels = d->H * d->W, small = d->h * d->w, inside = d->inside;
    BackwardRoom room = backward_room(d);
    if (!room.frame)
        return 0;
    for (int64_t first = 0; first < d->channels; first += GROUP) {
        Widening w = widening(d, b->wide, b->shift, first);
        Totals totals[GROUP] = {{0}};
        float products[GROUP * MAX_INSIDE] = {0};
        for (int64_t image = 0; image < d->images; image++) {
            const float *x = b->x + image * inside * pixels;
            widen(d, &w, x, b->planes);
            for (int64_t c = 0; c < w.count; c++) {
                int64_t at = (image * d->channels + first + c) * small;
                float *plane = b->planes + c * pixels;
                backward_plane(b, &room, first + c, b->dy + at, b->y + at, plane, plane, &totals[c]);
            }
            memset(b->planes + w.count * pixels, 0, (size_t)((GROUP - w.count) * pixels) * sizeof(float));
            meet_and_narrow(d, &w, b->planes, x, first > 0, products, b->dx + image * inside * pixels);
        }
        for (int64_t c = 0; c < w.count; c++) {
            int64_t channel = first + c;
            b->product[channel] = b->product_before[channel] + (float)totals[c].product;
            b->dbias[channel] = b->dbias_before[channel] + (float)totals[c].dbias;
            b->dshift[channel] = b->shift_before[channel] + (float)totals[c].sums;
            for (int64_t k = 0; k < inside; k++)
                b->wide_product[channel * inside + k] =
                    b->wide_product_before[channel * inside + k] + products[c * inside + k];
        }
    }
    free(room.again.frames);
    free(room.frame);
    return 1;
}

/* ---- The gradient of an activation alone ---- */

typedef struct {
    int64_t shape[4];
    Activation activation;
} Gate;

typedef struct {
    const Gate *g;
    const float *dy, *y;
    float *dz, *sums;
} Gating;

/* dz = dy times the activation's slope at y, in dy's own memory or another; sums = sum dz. */
FOR_EVERY_PROCESSOR static int gate(const Gating *g, int64_t first, int64_t last)
{
    const int64_t *shape = g->g->shape, pixels = shape[2] * shape[3];
    for (int64_t channel = first; channel < last; channel++) {
        double sums = 0;
        for (int64_t image = 0; image < shape[0]; image++) {
            int64_t begin = (image * shape[1] + channel) * pixels, end = begin + pixels;
            for (int64_t at = begin; at < end; at += BLOCK) {
                int64_t count = least(BLOCK, end - at);
                pass(g->dy + at, g->y + at, g->g->activation, 1, count, g->dz + at);
                sums += sum(g->dz + at, count);
            }
        }
        g->sums[channel] = (float)sums;
    }
    return 1;
}

/* ---- ONNX Runtime's C interface: of its table of functions, which only grows at its end, the ones that are used ---- */

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct Operator Operator;

enum { INTERFACE = 18, FLOAT = 1, REQUIRED = 0, DEFAULT_MEMORY = 0, FAILED = 1 };

typedef struct {
    OrtStatus *(*CreateStatus)(int code, const char *message);
    void *of_sessions[25];
    OrtStatus *(*CreateCustomOpDomain)(const char *name, OrtCustomOpDomain **domain);
    OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *domain, const Operator *op);
    OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *options, OrtCustomOpDomain *domain);
    void *of_runs[22];
    OrtStatus *(*GetTensorMutableData)(OrtValue *value, void **data);
    void *of_types[33];
    OrtStatus *(*KernelInfoGetAttribute_float)(const OrtKernelInfo *info, const char *name, float *value);
    void *of_attributes[4];
    OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *context, size_t index, const OrtValue **value);
    OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *context, size_t index, const int64_t *shape, size_t rank,
                                          OrtValue **value);
    void *releasing[71];
    OrtStatus *(*KernelInfoGetAttributeArray_int64)(const OrtKernelInfo *info, const char *name, int64_t *values,
                                                    size_t *count);
    void *of_providers[110];
    OrtStatus *(*KernelContext_ParallelFor)(const OrtKernelContext *context, void (*task)(void *work, size_t number),
                                            size_t tasks, size_t batches, void *work);
} OrtApi;

_Static_assert(offsetof(OrtApi, GetTensorMutableData) == 51 * sizeof(void *), "a function is missing");
_Static_assert(offsetof(OrtApi, KernelInfoGetAttributeArray_int64) == 163 * sizeof(void *), "a function is missing");
_Static_assert(offsetof(OrtApi, KernelContext_ParallelFor) == 274 * sizeof(void *), "a function is missing");

typedef struct {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

struct Operator {
    uint32_t version;
    void *(*CreateKernel)(const Operator *op, const OrtApi *api, const OrtKernelInfo *info);
    const char *(*GetName)(const Operator *op);
    const char *(*GetExecutionProviderType)(const Operator *op);
    int (*GetInputType)(const Operator *op, size_t index);
    size_t (*GetInputTypeCount)(const Operator *op);
    int (*GetOutputType)(const Operator *op, size_t index);
    size_t (*GetOutputTypeCount)(const Operator *op);
    void (*KernelCompute)(void *kernel, OrtKernelContext *context);
    void (*KernelDestroy)(void *kernel);
    int (*GetInputCharacteristic)(const Operator *op, size_t index);
    int (*GetOutputCharacteristic)(const Operator *op, size_t index);
    int (*GetInputMemoryType)(const Operator *op, size_t index);
    int (*of_variadic[4])(const Operator *op);
    OrtStatus *(*CreateKernelV2)(const Operator *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);
    OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *context);
    OrtStatus *(*InferOutputShapeFn)(const Operator *op, void *context);
    int (*GetStartVersion)(const Operator *op);
    int (*GetEndVersion)(const Operator *op);
    size_t (*GetMayInplace)(int **inputs, int **outputs);
    void (*ReleaseMayInplace)(int *inputs, int *outputs);
    size_t (*GetAliasMap)(int **inputs, int **outputs);
    void (*ReleaseAliasMap)(int *inputs, int *outputs);
    /* from here on this project's own */
    const char *name;
    size_t inputs, outputs;
};

typedef struct {
    const OrtApi *api;
    union {
        Depthwise depthwise;
        Gate gate;
    };
} Kernel;

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        OrtStatus *status = (call);                                                                                    \
        if (status)                                                                                                    \
            return status;                                                                                             \
    } while (0)

static OrtStatus *input(const Kernel *k, OrtKernelContext *context, size_t index, const float **data)
{
    const OrtValue *value;
    TRY(k->api->KernelContext_GetInput(context, index, &value));
    return k->api->GetTensorMutableData((OrtValue *)value, (void **)data);
}

static OrtStatus *output(const Kernel *k, OrtKernelContext *context, size_t index, const int64_t *shape, size_t rank,
                         float **data)
{
    OrtValue *value;
    TRY(k->api->KernelContext_GetOutput(context, index, shape, rank, &value));
    return k->api->GetTensorMutableData(value, (void **)data);
}

static OrtStatus *numbers(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t *values, size_t count)
{
    return api->KernelInfoGetAttributeArray_int64(info, name, values, &count);
}

static OrtStatus *no_memory(const OrtApi *api)
{
    return api->CreateStatus(FAILED, "there is no memory left for a few planes");
}

/* Channels in TASKS parts, on as many threads as the session has: but for what has one room for all. */
typedef struct {
    int (*run)(const void *work, int64_t first, int64_t last);
    const void *work;
    int64_t channels;
    int done[TASKS];
} Parts;

static void part(void *parts, size_t number)
{
    Parts *p = parts;
    int64_t i = (int64_t)number;
    p->done[i] = p->run(p->work, i * p->channels / TASKS, (i + 1) * p->channels / TASKS);
}

static OrtStatus *in_parts(const Kernel *k, OrtKernelContext *context, int64_t channels,
                           int (*run)(const void *, int64_t, int64_t), const void *work)
{
    Parts parts = {run, work, channels, {0}};
    TRY(k->api->KernelContext_ParallelFor(context, part, TASKS, 0, &parts));
    for (int i = 0; i < TASKS; i++)
        if (!parts.done[i])
            return no_memory(k->api);
    return NULL;
}

static int run_forward(const void *work, int64_t first, int64_t last)
{
    return forward(work, first, last);
}

static int run_backward(const void *work, int64_t first, int64_t last)
{
    return backward(work, first, last);
}

static int run_gate(const void *work, int64_t first, int64_t last)
{
    return gate(work, first, last);
}

static OrtStatus *compute_forward(void *kernel, OrtKernelContext *context)
{
    const Kernel *k = kernel;
    const Depthwise *d = &k->depthwise;
    Forward f = {.d = d};
    const float **given[] = {&f.x, &f.weight, &f.scale, &f.bias};
    for (size_t i = 0; i < sizeof given / sizeof *given; i++)
        TRY(input(k, context, i, given[i]));
    TRY(output(k, context, 0, (int64_t[]){d->images, d->channels, d->h, d->w}, 4, &f.y));
    return in_parts(k, context, d->channels, run_forward, &f);
}

static OrtStatus *compute_backward(void *kernel, OrtKernelContext *context)
{
    const Kernel *k = kernel;
    const Depthwise *d = &k->depthwise;
    Backward b = {.d = d};
    const float **given[] = {&b.dy, &b.y, &b.x, &b.weight, &b.scale, &b.bias, &b.product_before, &b.dbias_before};
    for (size_t i = 0; i < sizeof given / sizeof *given; i++)
        TRY(input(k, context, i, given[i]));
    TRY(output(k, context, 0, (int64_t[]){d->images, d->channels, d->H, d->W}, 4, &b.dx));
    float **made[] = {&b.product, &b.dbias, &b.sums};
    for (size_t i = 0; i < sizeof made / sizeof *made; i++)
        TRY(output(k, context, 1 + i, &d->channels, 1, made[i]));
    return in_parts(k, context, d->channels, run_backward, &b);
}

static OrtStatus *compute_widened_forward(void *kernel, OrtKernelContext *context)
{
    const Kernel *k = kernel;
    const Depthwise *d = &k->depthwise;
    Forward f = {.d = d};
    const float **given[] = {&f.x, &f.wide, &f.shift, &f.weight, &f.scale, &f.bias};
    for (size_t i = 0; i < sizeof given / sizeof *given; i++)
        TRY(input(k, context, i, given[i]));
    TRY(output(k, context, 0, (int64_t[]){d->images, d->channels, d->h, d->w}, 4, &f.y));
    TRY(output(k, context, 1, (int64_t[]){GROUP, d->H, d->W}, 3, &f.planes));
    return widened_forward(&f) ? NULL : no_memory(k->api);
}

static OrtStatus *compute_widened_backward(void *kernel, OrtKernelContext *context)
{
    const Kernel *k = kernel;
    const Depthwise *d = &k->depthwise;
    Backward b = {.d = d};
    const float **given[] = {&b.dy, &b.y, &b.x, &b.wide, &b.shift, &b.weight, &b.scale, &b.bias,
                             &b.wide_product_before, &b.shift_before, &b.product_before, &b.dbias_before};
    for (size_t i = 0; i < sizeof given / sizeof *given; i++)
        TRY(input(k, context, i, given[i]));
    TRY(output(k, context, 0, (int64_t[]){d->images, d->inside, d->H, d->W}, 4, &b.dx));
    TRY(output(k, context, 1, (int64_t[]){d->channels, d->inside}, 2, &b.wide_product));
    float **made[] = {&b.dshift, &b.product, &b.dbias};
    for (size_t i = 0; i < sizeof made / sizeof *made; i++)
        TRY(output(k, context, 2 + i, &d->channels, 1, made[i]));
    TRY(output(k, context, 5, (int64_t[]){GROUP, d->H, d->W}, 3, &b.planes));
    return widened_backward(&b) ? NULL : no_memory(k->api);
}

static OrtStatus *compute_gate(void *kernel, OrtKernelContext *context)
{
    const Kernel *k = kernel;
    const int64_t *shape = k->gate.shape;
    Gating g = {.g = &k->gate};
    TRY(input(k, context, 0, &g.dy));
    TRY(input(k, context, 1, &g.y));
    TRY(output(k, context, 0, shape, 4, &g.dz));
    TRY(output(k, context, 1, &shape[1], 1, &g.sums));
    return in_parts(k, context, shape[1], run_gate, &g);
}

static OrtStatus *activation_of(const OrtApi *api, const OrtKernelInfo *info, const char *kind, const char *low,
                                const char *high, Activation *activation)
{
    TRY(numbers(api, info, kind, &activation->kind, 1));
    TRY(api->KernelInfoGetAttribute_float(info, low, &activation->low));
    return api->KernelInfoGetAttribute_float(info, high, &activation->high);
}

static OrtStatus *read_depthwise(const OrtApi *api, const OrtKernelInfo *info, int is_widened, Depthwise *d)
{
    int64_t image[4], result[4];
    TRY(numbers(api, info, "image_shape", image, 4));
    TRY(numbers(api, info, "output_shape", result, 4));
    TRY(numbers(api, info, "kernel_shape", d->kernel, 2));
    TRY(numbers(api, info, "strides", d->strides, 2));
    TRY(numbers(api, info, "pads", d->pads, 4));
    d->images = image[0], d->inside = image[1], d->channels = result[1], d->H = image[2], d->W = image[3], d->h = result[2], d->w = result[3];
    for (int i = 0; i < 2; i++) {
        int64_t k = d->kernel[i], step = d->strides[i], front = d->pads[i], back = d->pads[i + 2];
        if (k < 1 || k > MAX_TAPS || step < 1 || step > MAX_STRIDE || front < 0 || front >= k || back < 0 || back >= k)
            return api->CreateStatus(FAILED, "this kernel, stride or padding is beyond the operator");
    }
    if (d->kernel[0] * d->kernel[1] > MAX_TAPS)
        return api->CreateStatus(FAILED, "the kernel has too many taps");
    if (is_widened ? d->inside % 2 || d->inside > MAX_INSIDE : d->inside != d->channels)
        return api->CreateStatus(FAILED, "these channels in front are beyond the operator");
    TRY(activation_of(api, info, "input_kind", "input_low", "input_high", &d->before));
    return activation_of(api, info, "kind", "low", "high", &d->behind);
}

static OrtStatus *read_gate(const OrtApi *api, const OrtKernelInfo *info, Gate *g)
{
    TRY(numbers(api, info, "image_shape", g->shape, 4));
    return activation_of(api, info, "kind", "low", "high", &g->activation);
}

static OrtStatus *create(const Operator *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);

static const char *name_of(const Operator *op)
{
    return op->name;
}

static const char *anywhere(const Operator *op)
{
    (void)op;
    return NULL;
}

static int type_of(const Operator *op, size_t index)
{
    (void)op, (void)index;
    return FLOAT;
}

static size_t inputs_of(const Operator *op)
{
    return op->inputs;
}

static size_t outputs_of(const Operator *op)
{
    return op->outputs;
}

static int required(const Operator *op, size_t index)
{
    (void)op, (void)index;
    return REQUIRED;
}

static int in_main_memory(const Operator *op, size_t index)
{
    (void)op, (void)index;
    return DEFAULT_MEMORY;
}

static int one(const Operator *op)
{
    (void)op;
    return 1;
}

static size_t nowhere(int **inputs, int **outputs)
{
    (void)inputs, (void)outputs;
    return 0;
}

/* Results may take the memory of what they are made from, where nobody reads that later. */
static size_t first_over(int *from, int **inputs, int **outputs)
{
    static int results[] = {0};
    *inputs = from, *outputs = results;
    return 1;
}

static size_t over_pixels(int **inputs, int **outputs)
{
    static int from[] = {2};
    return first_over(from, inputs, outputs);
}

static size_t over_gradient(int **inputs, int **outputs)
{
    static int from[] = {0};
    return first_over(from, inputs, outputs);
}

static void keep(int *inputs, int *outputs)
{
    (void)inputs, (void)outputs;
}

#define OPERATOR(NAME, INPUTS, OUTPUTS, COMPUTE, MAY_INPLACE)                                                          \
    {                                                                                                                  \
        .version = INTERFACE, .GetName = name_of, .GetExecutionProviderType = anywhere, .GetInputType = type_of,       \
        .GetInputTypeCount = inputs_of, .GetOutputType = type_of, .GetOutputTypeCount = outputs_of,                    \
        .KernelDestroy = free, .GetInputCharacteristic = required, .GetOutputCharacteristic = required,                \
        .GetInputMemoryType = in_main_memory, .of_variadic = {one, one, one, one}, .CreateKernelV2 = create,           \
        .KernelComputeV2 = COMPUTE, .GetStartVersion = one, .GetEndVersion = one, .GetMayInplace = MAY_INPLACE,        \
        .ReleaseMayInplace = keep, .GetAliasMap = nowhere, .ReleaseAliasMap = keep, .name = NAME, .inputs = INPUTS,    \
        .outputs = OUTPUTS,                                                                                            \
    }

enum { DEPTHWISE, DEPTHWISE_GRADIENT, WIDENED, WIDENED_GRADIENT, GATE, OPERATORS };

static const Operator operators[OPERATORS] = {
    [DEPTHWISE] = OPERATOR("Depthwise", 4, 1, compute_forward, nowhere),
    [DEPTHWISE_GRADIENT] = OPERATOR("DepthwiseGradient", 8, 4, compute_backward, over_pixels),
    [WIDENED] = OPERATOR("WidenedDepthwise", 6, 2, compute_widened_forward, nowhere),
    [WIDENED_GRADIENT] = OPERATOR("WidenedDepthwiseGradient", 12, 6, compute_widened_backward, nowhere),
    [GATE] = OPERATOR("Gate", 2, 2, compute_gate, over_gradient),
};

static OrtStatus *create(const Operator *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel)
{
    Kernel *k = calloc(1, sizeof(Kernel));
    if (!k)
        return api->CreateStatus(FAILED, "there is no memory left for a kernel");
    k->api = api;
    int is_widened = op == &operators[WIDENED] || op == &operators[WIDENED_GRADIENT];
    OrtStatus *status = op == &operators[GATE] ? read_gate(api, info, &k->gate)
                                               : read_depthwise(api, info, is_widened, &k->depthwise);
    if (status)
        free(k);
    else
        *kernel = k;
    return status;
}

/* What `SessionOptions.register_custom_ops_library` looks for. The domain is made once and lives on. */
OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base)
{
    static OrtCustomOpDomain *domain;
    const OrtApi *api = base->GetApi(INTERFACE);
    if (!api)
        return base->GetApi(1)->CreateStatus(FAILED, "this ONNX Runtime is older than 1.18");
    if (!domain) {
        OrtCustomOpDomain *fresh;
        TRY(api->CreateCustomOpDomain("ksm_edge", &fresh));
        for (int i = 0; i < OPERATORS; i++)
            TRY(api->CustomOpDomain_Add(fresh, &operators[i]));
        domain = fresh;
    }
    return api->AddCustomOpDomain(options, domain);
}

/* Importable as every module of the package is; there is nothing in it for Python. */
PyMODINIT_FUNC PyInit__operators(void)
{
    static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "ksm_edge._operators", .m_size = 0};
    return PyModule_Create(&definition);
}

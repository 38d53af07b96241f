/* A depthwise conv with what stands behind it, its gradient with what stands around it, both with a 1x1 conv in front, and
   the gradient of an activation: each in one pass over memory where standard operators take up to ten.

   Everything is float32 and (images, channels, rows, columns). One channel of one image, a plane, is worked on at a
   time. It is copied into a frame, whose rows have zeros between them; so a tap of the kernel is a distance in memory,
   the same for every pixel, and a conv is one loop over many rows. */

#ifndef KSM_EDGE_DEPTHWISE_H
#define KSM_EDGE_DEPTHWISE_H

#include "_rows.h"

enum { MAX_STRIDE = 2, MAX_CLASSES = MAX_STRIDE * MAX_STRIDE, MAX_INSIDE = 64 };
enum { GROUP = 8 };      /* channels that are made at once of a 1x1 conv */
enum { PIXELS = 256 };   /* floats of each of dozens of planes that stay in the innermost cache, */
enum { CACHED = 32768 }; /* and of all in front of a 1x1 conv, beside as many of their gradient, in the next one */

typedef struct {
    int64_t images, channels, H, W, h, w; /* of the conv's input and output */
    int64_t inside; /* channels that a 1x1 conv in front makes `channels` of, where it is done along */
    int64_t kernel[2], strides[2], pads[4]; /* top, left, bottom, right */
    Activation before, behind;
} Depthwise;

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
        float *to = frames + (row + top) % down * right * f->size + i * f->pitch;
        if (right == 1) {
            copy_rows(plane, 0, to + left, 0, least(d->W, f->pitch - left), 1);
            continue;
        }
        /* Columns in pairs, from the first whose two are both of the image; one may stand alone at either end. */
        int64_t first = (left + 1) / 2, end = least(f->pitch, (d->W + left) / 2);
        float *odd = to + f->size;
        if (left % 2)
            odd[left / 2] = plane[0];
        split_pairs(plane + 2 * first - left, end - first, to + first, odd + first);
        if (end < f->pitch && (d->W + left) % 2)
            to[end] = plane[d->W - 1];
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
        const float *kernel = f->weight + channel * taps, *from = room->frames + row * pitch;
        float *to = y + row * d->w;
        if (d->w >= LANES) {
            weighted_rows_sum(from, pitch, &room->layout.taps, kernel, scale, bias, d->w, rows, to, d->w);
            activate(to, behind, rows * d->w, to);
            continue;
        }
        weighted_sum(from, &room->layout.taps, kernel, scale, bias, count, made);
        activate(made, behind, rounded_up(count), made);
        copy_rows(made, pitch, y + row * d->w, d->w, d->w, rows);
    }
}

static int forward(const void *work, int64_t first, int64_t last)
{
    const Forward *f = work;
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
            for (int64_t i = d->kernel[0] - 1; i >= 0; i--)
                for (int64_t j = d->kernel[1] - 1; j >= 0; j--) {
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
        if (right == 1 && d->W >= LANES) {
            weighted_rows_sum(from, g->pitch, &g->taps[a], weight, 1, 0, d->W, some, to, down * d->W);
            continue;
        }
        weighted_sum(from, &g->taps[a * right], weight, 1, 0, count, made);
        if (right == 1) {
            copy_rows(made, g->pitch, to, down * d->W, d->W, some);
            continue;
        }
        weighted_sum(from, &g->taps[a * right + 1], weight, 1, 0, count, odd);
        for (int64_t i = 0; i < some; i++, to += down * d->W) {
            join_pairs(made + i * g->pitch, odd + i * g->pitch, d->W / 2, to);
            if (d->W % 2)
                to[d->W - 1] = made[i * g->pitch + d->W / 2];
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

/* dz of the rows that dx's from `row` to before `end` are made of, into the frame; dbias += the sum of those that no other
   part of dx counts: these parts begin at multiples of the stride. */
INLINE void gradients(const Backward *b, const BackwardRoom *room, int64_t row, int64_t end, const float *dy,
                      const float *y, Totals *totals)
{
    const Depthwise *d = b->d;
    const Gradients *layout = &room->layout;
    int64_t down = d->strides[0], before = row + d->pads[0] - d->kernel[0];
    int64_t first = row == 0 || before < 0 ? 0 : before / down + 1, own = row / down;
    int64_t last = end < d->H ? least(d->h, (end - 1 + d->pads[0]) / down + 1) : d->h;
    int64_t own_end = end < d->H ? end / down : d->h;
    for (int64_t i = first, rows; i < last; i += rows) {
        int64_t border = i < own ? own : i < own_end ? own_end : last;
        rows = least(room->some, least(border, last) - i);
        float *to = room->frame + (layout->above + i) * layout->pitch + layout->front;
        float total = pass_and_sum(dy + i * d->w, NULL, y + i * d->w, d->behind, 1, rows * d->w, NULL, room->made, NULL);
        totals->dbias += i >= own && i < own_end ? total : 0;
        copy_rows(room->made, d->w, to, layout->pitch, d->w, rows);
    }
}

/* Of one plane's rows from `row` to before `end`, with t = conv^T(dz, W): product += sum x t, dbias += sum dz, dx = t scale
   where x passes, sums += sum dx. dy and y are whole planes; y is what a clip behind made, otherwise it is not looked at
   and the rows are all there are. x and dx are these rows, and may be the same memory. */
INLINE void backward_rows(const Backward *b, const BackwardRoom *room, int64_t channel, int64_t row, int64_t end,
                          const float *dy, const float *y, const float *x, float *dx, Totals *totals)
{
    const Depthwise *d = b->d;
    const Gradients *layout = &room->layout;
    int64_t taps = d->kernel[0] * d->kernel[1];
    if (d->behind.kind != CLIP) {
        const Forward again = {.d = d, .weight = b->weight, .scale = b->scale, .bias = b->bias};
        forward_plane(&again, &room->again, channel, (Activation){CLIP, -INFINITY, INFINITY}, x, room->z);
        y = room->z;
    }
    gradients(b, room, row, end, dy, y, totals);
    for (; row < end; row += room->most, x += room->most * d->W, dx += room->most * d->W) {
        int64_t rows = least(room->most, end - row), count = rows * d->W;
        spread(d, layout, room->frame, b->weight + channel * taps, row, rows, room->made, room->t);
        const float *met = x;
        if (d->before.kind != CLIP && d->behind.kind != CLIP) {
            met = room->again.activated + row * d->W;
        } else if (d->before.kind != CLIP) {
            activate(x, d->before, count, room->activated);
            met = room->activated;
        }
        totals->sums += pass_and_sum(room->t, met, x, d->before, b->scale[channel], count, room->t, dx, &totals->product);
    }
}

static int backward(const void *work, int64_t first, int64_t last)
{
    const Backward *b = work;
    const Depthwise *d = b->d;
    BackwardRoom room = backward_room(d);
    if (!room.frame)
        return 0;
    for (int64_t channel = first; channel < last; channel++) {
        Totals totals = {0};
        for (int64_t image = 0; image < d->images; image++) {
            int64_t plane = image * d->channels + channel, large = plane * d->H * d->W, small = plane * d->h * d->w;
            backward_rows(b, &room, channel, 0, d->H, b->dy + small, b->y + small, b->x + large, b->dx + large, &totals);
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

/* TILE channels of one or two LANES of pixels from `i` on; planes are `pitch` apart. */
INLINE void widen_some(const Depthwise *d, const Widening *w, const float *x, int tile, int64_t i, int some,
                       float *planes, int64_t pitch)
{
    int64_t pixels = d->H * d->W;
    Lanes made[TILE][2];
    for (int c = 0; c < TILE; c++)
        for (int l = 0; l < some; l++)
            made[c][l] = (Lanes){0} + w->shift[tile + c];
    for (int64_t k = 0; k < d->inside; k++)
        for (int c = 0; c < TILE; c++)
            for (int l = 0; l < some; l++)
                made[c][l] += w->weight[k * GROUP + tile + c] * load(x + k * pixels + i + l * LANES);
    for (int c = 0; c < TILE; c++)
        for (int l = 0; l < some; l++)
            store(planes + (tile + c) * pitch + i + l * LANES, made[c][l]);
}

/* planes (GROUP, count) of the first `count` pixels of x (inside, pixels): the 1x1 conv and, if it is a clip, the
   activation behind it. */
INLINE void widen(const Depthwise *d, const Widening *w, const float *x, int64_t count, float *planes)
{
    int64_t pixels = d->H * d->W;
    for (int64_t at = 0; at < count; at += BLOCK) {
        int64_t end = least(at + BLOCK, count), whole = at + (end - at) / LANES * LANES;
        for (int tile = 0; tile < GROUP; tile += TILE) {
            int64_t i = at;
            for (; i + LANES < whole; i += 2 * LANES)
                widen_some(d, w, x, tile, i, 2, planes, count);
            if (i < whole)
                widen_some(d, w, x, tile, i, 1, planes, count);
        }
        for (int64_t i = whole; i < end; i++)
            for (int c = 0; c < GROUP; c++) {
                float made = w->shift[c];
                for (int64_t k = 0; k < d->inside; k++)
                    made += w->weight[k * GROUP + c] * x[k * pixels + i];
                planes[c * count + i] = made;
            }
        for (int c = 0; c < GROUP && d->before.kind == CLIP; c++)
            activate(planes + c * count + at, d->before, end - at, planes + c * count + at);
    }
}

/* product (GROUP, inside) += dz x^T, over pixels from `at` on to `end`, whole LANES; LANES of them apart. */
INLINE void meet(const Depthwise *d, const float *dz, int64_t pitch, const float *x, int64_t at, int64_t end,
                 Lanes *products)
{
    int64_t pixels = d->H * d->W;
    for (int64_t k = 0; k < d->inside; k += 2)
        for (int tile = 0; tile < GROUP; tile += TILE) {
            Lanes even[TILE] = {{0}}, odd[TILE] = {{0}};
            for (int64_t i = at; i < end; i += LANES) {
                Lanes x_even = load(x + k * pixels + i), x_odd = load(x + (k + 1) * pixels + i);
                for (int c = 0; c < TILE; c++) {
                    Lanes gradient = load(dz + (tile + c) * pitch + i);
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

/* Of TILE channels, to one or two LANES of pixels from `i` on. */
INLINE void narrow_some(const Depthwise *d, const Widening *w, const float *dz, int64_t pitch, int tile, int64_t i,
                        int some, int begun, float *dx)
{
    int64_t pixels = d->H * d->W;
    Lanes gradient[TILE][2], total[2];
    for (int c = 0; c < TILE; c++)
        for (int l = 0; l < some; l++)
            gradient[c][l] = load(dz + (tile + c) * pitch + i + l * LANES);
    for (int64_t k = 0; k < d->inside; k++) {
        float *to = dx + k * pixels + i;
        for (int l = 0; l < some; l++)
            total[l] = begun ? load(to + l * LANES) : (Lanes){0};
        for (int c = 0; c < TILE; c++)
            for (int l = 0; l < some; l++)
                total[l] += w->weight[k * GROUP + tile + c] * gradient[c][l];
        for (int l = 0; l < some; l++)
            store(to + l * LANES, total[l]);
    }
}

/* dx (inside, pixels) += weight^T dz, over the same pixels; `begun`: whether there is anything in dx yet. */
INLINE void narrow(const Depthwise *d, const Widening *w, const float *dz, int64_t pitch, int64_t at, int64_t end,
                   int begun, float *dx)
{
    for (int tile = 0; tile < GROUP; tile += TILE, begun = 1) {
        int64_t i = at;
        for (; i + LANES < end; i += 2 * LANES)
            narrow_some(d, w, dz, pitch, tile, i, 2, begun, dx);
        if (i < end)
            narrow_some(d, w, dz, pitch, tile, i, 1, begun, dx);
    }
}

/* Both, for the first `count` pixels of x and dx; dz is (GROUP, count), product (GROUP, inside). */
INLINE void meet_and_narrow(const Depthwise *d, const Widening *w, const float *dz, int64_t count, const float *x,
                            int begun, float *product, float *dx)
{
    int64_t pixels = d->H * d->W, whole = count / LANES * LANES;
    Lanes products[MAX_INSIDE * GROUP] = {{0}};
    for (int64_t at = 0; at < whole; at += PIXELS) {
        int64_t end = least(at + PIXELS, whole);
        meet(d, dz, count, x, at, end, products);
        narrow(d, w, dz, count, at, end, begun, dx);
    }
    for (int64_t k = 0; k < d->inside; k++) {
        for (int c = 0; c < w->count; c++) {
            float total = sum_of(products[k * GROUP + c]);
            for (int64_t i = whole; i < count; i++)
                total += dz[c * count + i] * x[k * pixels + i];
            product[c * d->inside + k] += total;
        }
        for (int64_t i = whole; i < count; i++) {
            float total = begun ? dx[k * pixels + i] : 0;
            for (int c = 0; c < GROUP; c++)
                total += w->weight[k * GROUP + c] * dz[c * count + i];
            dx[k * pixels + i] = total;
        }
    }
}

/* All groups one after the other on one thread, in the same room. */
static int widened_forward(const Forward *f)
{
    const Depthwise *d = f->d;
    int64_t pixels = d->H * d->W, small = d->h * d->w;
    ForwardRoom room = forward_room(d);
    if (!room.frames)
        return 0;
    for (int64_t first = 0; first < d->channels; first += GROUP) {
        Widening w = widening(d, f->wide, f->shift, first);
        for (int64_t image = 0; image < d->images; image++) {
            widen(d, &w, f->x + image * d->inside * pixels, pixels, f->planes);
            for (int64_t c = 0; c < w.count; c++) {
                float *y = f->y + (image * d->channels + first + c) * small;
                forward_plane(f, &room, first + c, d->behind, f->planes + c * pixels, y);
            }
        }
    }
    free(room.frames);
    return 1;
}

/* How many rows of x and dx stay in the second level of cache while all groups pass over them. */
INLINE int64_t rows_in_cache(const Depthwise *d)
{
    int64_t down = d->strides[0], rows = CACHED / (d->inside * d->W) / down * down;
    if (d->behind.kind != CLIP) /* which needs what its conv made of the whole plane */
        return d->H;
    return rows > 2 * d->kernel[0] ? least(rows, d->H) : d->H;
}

/* The rows of `image` from `row` to before `end`, all groups one after the other, each of which adds to dx; products are
   (channels, inside). */
INLINE void widened_rows(const Backward *b, const BackwardRoom *room, int64_t image, int64_t row, int64_t end,
                         Totals *totals, float *products)
{
    const Depthwise *d = b->d;
    int64_t pixels = d->H * d->W, small = d->h * d->w, at = image * d->inside * pixels + row * d->W;
    int64_t count = (end - row) * d->W;
    for (int64_t first = 0; first < d->channels; first += GROUP) {
        Widening w = widening(d, b->wide, b->shift, first);
        widen(d, &w, b->x + at, count, b->planes);
        for (int64_t c = 0; c < w.count; c++) {
            int64_t channel = first + c, plane = (image * d->channels + channel) * small;
            float *part = b->planes + c * count;
            backward_rows(b, room, channel, row, end, b->dy + plane, b->y + plane, part, part, &totals[channel]);
        }
        memset(b->planes + w.count * count, 0, (size_t)((GROUP - w.count) * count) * sizeof(float));
        meet_and_narrow(d, &w, b->planes, count, b->x + at, first > 0, products + first * d->inside, b->dx + at);
    }
}

/* On one thread, a few rows after the other. */
static int widened_backward(const Backward *b)
{
    const Depthwise *d = b->d;
    int64_t some = rows_in_cache(d);
    BackwardRoom room = backward_room(d);
    Totals *totals = calloc((size_t)d->channels, sizeof(Totals));
    float *products = calloc((size_t)(d->channels * d->inside), sizeof(float));
    int done = room.frame && totals && products;
    if (done) {
        for (int64_t image = 0; image < d->images; image++)
            for (int64_t row = 0; row < d->H; row += some)
                widened_rows(b, &room, image, row, least(row + some, d->H), totals, products);
        for (int64_t channel = 0; channel < d->channels; channel++) {
            b->product[channel] = b->product_before[channel] + (float)totals[channel].product;
            b->dbias[channel] = b->dbias_before[channel] + (float)totals[channel].dbias;
            b->dshift[channel] = b->shift_before[channel] + (float)totals[channel].sums;
        }
        for (int64_t i = 0; i < d->channels * d->inside; i++)
            b->wide_product[i] = b->wide_product_before[i] + products[i];
    }
    if (room.frame)
        free(room.again.frames);
    free(room.frame);
    free(totals);
    free(products);
    return done;
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
static int gate(const void *work, int64_t first, int64_t last)
{
    const Gating *g = work;
    const int64_t *shape = g->g->shape, pixels = shape[2] * shape[3];
    for (int64_t channel = first; channel < last; channel++) {
        double sums = 0;
        for (int64_t image = 0; image < shape[0]; image++) {
            int64_t begin = (image * shape[1] + channel) * pixels, end = begin + pixels;
            for (int64_t at = begin; at < end; at += BLOCK) {
                int64_t count = least(BLOCK, end - at);
                sums += pass_and_sum(g->dy + at, NULL, g->y + at, g->g->activation, 1, count, NULL, g->dz + at, NULL);
            }
        }
        g->sums[channel] = (float)sums;
    }
    return 1;
}

#endif

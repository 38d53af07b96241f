/* A 3x3 conv in the domain of Winograd's F(4x4, 3x3): 36 products of matrices instead of 144 multiplications for each
   tile of 4x4 results (Lavin and Gray 2016, arXiv 1509.09308). Here are the ways into that domain and back, and their
   transposes for the gradient; the products are ONNX Runtime's.

       y = A' [U . (B' x B)] A        D = A dy A'        dx = B [U' D] B'        dU = D V'

   A plane of an image is taken apart into 16 phases, every fourth row and column of each. Then the numbers that one
   place of all tiles holds lie in a row, and a transform is a few sums of rows. Behind each row of tiles stands one more,
   which the last one's right edge reaches into: it comes out as zeros or is read by nobody. */

#ifndef KSM_EDGE_WINOGRAD_H
#define KSM_EDGE_WINOGRAD_H

#include "_rows.h"

enum { STEP = 4, SIDE = 6, PLACES = SIDE * SIDE }; /* of a tile: its results, what they are made from */

/* x -> V, dV -> dx, M -> y, dy -> D */
typedef enum { INPUT, INPUT_GRADIENT, OUTPUT, OUTPUT_GRADIENT } Way;

typedef struct {
    Way way;
    int64_t images, channels, rows, columns; /* of x and dx, or of y and dy */
    int64_t h, w;                            /* of y */
    int64_t pads[2];                         /* top, left; of y none */
} Winograd;

typedef struct {
    int64_t down, pitch, count; /* rows of tiles, tiles in each of them, and all */
    int64_t total;              /* of all images */
    int64_t phase;              /* floats that one phase of a plane takes, with what a tile's end reaches of the next */
} Tiles;

INLINE Tiles tiles_of(const Winograd *g)
{
    Tiles t = {.down = (g->h + STEP - 1) / STEP, .pitch = (g->w + STEP - 1) / STEP + 1};
    t.count = t.down * t.pitch;
    t.total = g->images * t.count;
    t.phase = rounded_up(t.count + t.pitch + 1) + LANES;
    return t;
}

INLINE void add_to(float *to, Lanes value)
{
    store(to, load(to) + value);
}

/* B' d, B t, A' m and A y, of one column. */
INLINE void into(const Lanes d[SIDE], Lanes t[SIDE])
{
    Lanes a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], c = d[4] - d[2], e = 2 * (d[3] - d[1]);
    t[0] = 4 * d[0] - 5 * d[2] + d[4];
    t[1] = a + b, t[2] = a - b, t[3] = c + e, t[4] = c - e;
    t[5] = 4 * d[1] - 5 * d[3] + d[5];
}

INLINE void into_transposed(const Lanes t[SIDE], Lanes d[SIDE])
{
    Lanes a = t[1] + t[2], b = t[1] - t[2], c = t[3] + t[4], e = 2 * (t[3] - t[4]);
    d[0] = 4 * t[0];
    d[1] = 4 * (t[5] - b) - e;
    d[2] = -5 * t[0] - 4 * a - c;
    d[3] = b + e - 5 * t[5];
    d[4] = t[0] + a + c;
    d[5] = t[5];
}

INLINE void back(const Lanes m[SIDE], Lanes y[STEP])
{
    Lanes a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
    y[0] = m[0] + a + c, y[1] = b + 2 * e, y[2] = a + 4 * c, y[3] = b + 8 * e + m[5];
}

INLINE void back_transposed(const Lanes y[STEP], Lanes m[SIDE])
{
    Lanes a = y[0] + y[2], b = y[1] + y[3], c = y[0] + 4 * y[2], e = 2 * y[1] + 8 * y[3];
    m[0] = y[0], m[1] = a + b, m[2] = a - b, m[3] = c + e, m[4] = c - e, m[5] = y[3];
}

/* ---- Planes and their phases ---- */

INLINE float *phase_at(const Tiles *t, float *phases, int64_t row, int64_t column)
{
    return phases + (row % STEP * STEP + column % STEP) * t->phase + row / STEP * t->pitch + column / STEP;
}

/* A plane that begins at (top, left) of zeros. `line` has room for a row of all tiles. */
INLINE void take_apart(const Tiles *t, const float *plane, int64_t rows, int64_t columns, int64_t top, int64_t left,
                       float *line, float *phases)
{
    int64_t width = least(columns, STEP * t->pitch - left);
    memset(phases, 0, (size_t)(STEP * STEP * t->phase) * sizeof(float));
    memset(line, 0, (size_t)(STEP * t->pitch) * sizeof(float));
    for (int64_t row = 0; row < rows && row + top < STEP * (t->down + 1); row++) {
        memcpy(line + left, plane + row * columns, (size_t)width * sizeof(float));
        float *to = phase_at(t, phases, row + top, 0);
        for (int64_t i = 0; i < t->pitch; i++)
            for (int64_t phase = 0; phase < STEP; phase++)
                to[phase * t->phase + i] = line[STEP * i + phase];
    }
}

/* The reverse; what a plane has that no tile reaches comes out as zeros. */
INLINE void put_together(const Tiles *t, float *phases, int64_t rows, int64_t columns, int64_t top, int64_t left,
                         float add, float *line, float *plane)
{
    int64_t width = least(columns, STEP * t->pitch - left);
    memset(plane, 0, (size_t)(rows * columns) * sizeof(float));
    for (int64_t row = 0; row < rows && row + top < STEP * (t->down + 1); row++) {
        const float *from = phase_at(t, phases, row + top, 0);
        for (int64_t i = 0; i < t->pitch; i++)
            for (int64_t phase = 0; phase < STEP; phase++)
                line[STEP * i + phase] = from[phase * t->phase + i] + add;
        memcpy(plane + row * columns, line + left, (size_t)width * sizeof(float));
    }
}

/* ---- The four transforms, each of a channel's planes ---- */

typedef struct {
    const Winograd *g;
    const float *from, *bias;
    float *to;
} Transform;

typedef struct {
    Tiles tiles;
    float *phases, *between, *line; /* 16 phases; SIDE STEP of them behind the first half of a transform */
} TransformRoom;

INLINE TransformRoom transform_room(const Winograd *g)
{
    TransformRoom room = {.tiles = tiles_of(g)};
    int64_t phases = STEP * STEP * room.tiles.phase, between = SIDE * STEP * room.tiles.phase;
    room.phases = calloc((size_t)(phases + between + STEP * room.tiles.pitch), sizeof(float));
    room.between = room.phases ? room.phases + phases : NULL;
    room.line = room.phases ? room.between + between : NULL;
    return room;
}

/* x (n, C, H, W) -> V (36, C, tiles) */
INLINE void spread_plane(const TransformRoom *room, int64_t stride, float *v)
{
    const Tiles *t = &room->tiles;
    Lanes in[SIDE], out[SIDE];
    for (int64_t i = 0; i < t->count + 1; i += LANES)
        for (int64_t phase = 0; phase < STEP; phase++) {
            for (int64_t row = 0; row < SIDE; row++)
                in[row] = load(phase_at(t, room->phases, row, phase) + i);
            into(in, out);
            for (int64_t row = 0; row < SIDE; row++)
                store(room->between + (row * STEP + phase) * t->phase + i, out[row]);
        }
    for (int64_t row = 0; row < SIDE; row++)
        for (int64_t i = 0; i < t->count; i += LANES) {
            for (int64_t column = 0; column < SIDE; column++)
                in[column] = load(room->between + (row * STEP + column % STEP) * t->phase + column / STEP + i);
            into(in, out);
            for (int64_t column = 0; column < SIDE; column++)
                store_some(v + (row * SIDE + column) * stride + i, out[column], t->count - i);
        }
}

/* dV (36, C, tiles) -> dx (n, C, H, W): tiles overlap, and what they say of a pixel is added up. */
INLINE void gather_plane(const TransformRoom *room, int64_t stride, const float *dv)
{
    const Tiles *t = &room->tiles;
    Lanes in[SIDE], out[SIDE];
    memset(room->phases, 0, (size_t)(STEP * STEP * t->phase) * sizeof(float));
    memset(room->between, 0, (size_t)(SIDE * STEP * t->phase) * sizeof(float));
    for (int64_t row = 0; row < SIDE; row++)
        for (int64_t i = 0; i < t->count; i += LANES) {
            for (int64_t column = 0; column < SIDE; column++)
                in[column] = load_some(dv + (row * SIDE + column) * stride + i, t->count - i);
            into_transposed(in, out);
            for (int64_t column = 0; column < SIDE; column++)
                add_to(room->between + (row * STEP + column % STEP) * t->phase + column / STEP + i, out[column]);
        }
    for (int64_t i = 0; i < t->count + 1; i += LANES)
        for (int64_t phase = 0; phase < STEP; phase++) {
            for (int64_t row = 0; row < SIDE; row++)
                in[row] = load(room->between + (row * STEP + phase) * t->phase + i);
            into_transposed(in, out);
            for (int64_t row = 0; row < SIDE; row++)
                add_to(phase_at(t, room->phases, row, phase) + i, out[row]);
        }
}

/* M (36, O, tiles) -> y (n, O, h, w), with the bias */
INLINE void finish_plane(const TransformRoom *room, int64_t stride, const float *m)
{
    const Tiles *t = &room->tiles;
    Lanes in[SIDE], out[STEP];
    for (int64_t i = 0; i < t->count; i += LANES) {
        for (int64_t column = 0; column < SIDE; column++) {
            for (int64_t row = 0; row < SIDE; row++)
                in[row] = load_some(m + (row * SIDE + column) * stride + i, t->count - i);
            back(in, out);
            for (int64_t row = 0; row < STEP; row++)
                store(room->between + (row * SIDE + column) * LANES, out[row]);
        }
        for (int64_t row = 0; row < STEP; row++) {
            for (int64_t column = 0; column < SIDE; column++)
                in[column] = load(room->between + (row * SIDE + column) * LANES);
            back(in, out);
            for (int64_t column = 0; column < STEP; column++)
                store(phase_at(t, room->phases, row, column) + i, out[column]);
        }
    }
}

/* dy (n, O, h, w) -> D (36, O, tiles) */
INLINE void begin_plane(const TransformRoom *room, int64_t stride, float *d)
{
    const Tiles *t = &room->tiles;
    Lanes in[STEP], out[SIDE];
    for (int64_t i = 0; i < t->count; i += LANES) {
        for (int64_t column = 0; column < STEP; column++) {
            for (int64_t row = 0; row < STEP; row++)
                in[row] = load(phase_at(t, room->phases, row, column) + i);
            back_transposed(in, out);
            for (int64_t row = 0; row < SIDE; row++)
                store(room->between + (row * STEP + column) * LANES, out[row]);
        }
        for (int64_t row = 0; row < SIDE; row++) {
            for (int64_t column = 0; column < STEP; column++)
                in[column] = load(room->between + (row * STEP + column) * LANES);
            back_transposed(in, out);
            for (int64_t column = 0; column < SIDE; column++)
                store_some(d + (row * SIDE + column) * stride + i, out[column], t->count - i);
        }
    }
}

static int transform(const void *work, int64_t first, int64_t last)
{
    const Transform *f = work;
    const Winograd *g = f->g;
    TransformRoom room = transform_room(g);
    const Tiles *t = &room.tiles;
    int64_t stride = g->channels * t->total, top = g->pads[0], left = g->pads[1];
    if (!room.phases)
        return 0;
    for (int64_t channel = first; channel < last; channel++)
        for (int64_t image = 0; image < g->images; image++) {
            int64_t plane = (image * g->channels + channel) * g->rows * g->columns;
            int64_t tiles = channel * t->total + image * t->count;
            float bias = g->way == OUTPUT ? f->bias[channel] : 0;
            if (g->way == INPUT || g->way == OUTPUT_GRADIENT)
                take_apart(t, f->from + plane, g->rows, g->columns, top, left, room.line, room.phases);
            switch (g->way) {
            case INPUT: spread_plane(&room, stride, f->to + tiles); break;
            case INPUT_GRADIENT: gather_plane(&room, stride, f->from + tiles); break;
            case OUTPUT: finish_plane(&room, stride, f->from + tiles); break;
            case OUTPUT_GRADIENT: begin_plane(&room, stride, f->to + tiles);
            }
            if (g->way == INPUT_GRADIENT || g->way == OUTPUT)
                put_together(t, room.phases, g->rows, g->columns, top, left, bias, room.line, f->to + plane);
        }
    free(room.phases);
    return 1;
}

/* ---- What a kernel's mask feels ---- */

enum { KERNEL = 3 }; /* a side of one */

typedef struct {
    const float *weight, *gradient, *before; /* W (O I, 3, 3); dU (36, O I); (O I) */
    int64_t kernels;
    float *product; /* (O I): before + sum of W G' dU G */
} Contraction;

/* G' u, of one column. */
INLINE void to_taps(const Lanes u[SIDE], Lanes w[KERNEL])
{
    Lanes a = (u[1] + u[2]) * (1.0f / 6), b = u[2] - u[1], c = u[3] + u[4], e = u[3] - u[4];
    w[0] = 0.25f * u[0] - a + c * (1.0f / 24);
    w[1] = b * (1.0f / 6) + e * (1.0f / 12);
    w[2] = c * (1.0f / 6) - a + u[5];
}

static int contract(const void *work, int64_t first, int64_t last)
{
    const Contraction *c = work;
    for (int64_t i = first; i < last; i += LANES) {
        int64_t count = least(LANES, last - i);
        float taps[KERNEL * KERNEL][LANES] = {{0}}; /* of so many kernels, each tap's in a row */
        Lanes in[SIDE], out[KERNEL], half[KERNEL][SIDE], total = load_some(c->before + i, count);
        for (int64_t k = 0; k < count; k++)
            for (int tap = 0; tap < KERNEL * KERNEL; tap++)
                taps[tap][k] = c->weight[(i + k) * KERNEL * KERNEL + tap];
        for (int column = 0; column < SIDE; column++) {
            for (int row = 0; row < SIDE; row++)
                in[row] = load_some(c->gradient + (row * SIDE + column) * c->kernels + i, count);
            to_taps(in, out);
            for (int row = 0; row < KERNEL; row++)
                half[row][column] = out[row];
        }
        for (int row = 0; row < KERNEL; row++) {
            to_taps(half[row], out);
            for (int column = 0; column < KERNEL; column++)
                total += out[column] * load(taps[row * KERNEL + column]);
        }
        store_some(c->product + i, total, count);
    }
    return 1;
}

#endif

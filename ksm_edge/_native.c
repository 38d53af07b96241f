/* Loops that numpy takes several passes over memory for: decoding keep bits, finding what is cut, fusing, what masks
   feel, and Adam.

   Each has a form in numpy beside its caller, which runs where this was not compiled, says what is wrong where this
   refuses, and is what the tests hold it to, bit for bit (scores' Adam to a millionth, sums to a millionth of what is
   summed). Buffers come checked for type, contiguity and alignment; what is read from a pack is not believed before it is checked. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

enum {
    MAX_WIDTH = 25,       /* of bits taken at once: they lie in four bytes, wherever they begin */
    MAX_CELLS = 1 << 25,  /* of a layer; no divisor is greater */
    LONGEST = 1 << 26,    /* gap */
    MAX_VARINT_BYTES = 5,
    REFUSED = -1,
};
enum { NOTHING_CUT, WHOLE, BY_ROW, BY_COLUMN, BY_BOTH };
enum { FLAGS = 64, WORD = 8 }; /* scores that are looked at together, and how many of them are told by one word */
enum { SUMS = 16 };            /* that a row's is made of: the same on all processors, and enough for their registers */

/* Loops over floats that are compiled a second time for the wider registers that most processors with AVX have; the
   linker takes one when this is loaded. There is no FMA among them, so both give the same bits. */
#ifndef WIDER
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WIDER __attribute__((target_clones("avx2", "default")))
#else
#define WIDER
#endif
#endif

/* ---- Bits, the highest of each byte first ---- */

typedef struct {
    const uint8_t *octets;
    int64_t size; /* in bytes */
    int64_t at;   /* in bits */
} Bits;

/* 32 bits, of which the first MAX_WIDTH are those from here on; zeros behind the end. */
static uint32_t ahead(const Bits *bits)
{
    int64_t first = bits->at >> 3;
    const uint8_t *octets = bits->octets + first;
    uint32_t word = 0;
    if (first + 4 <= bits->size)
        word = (uint32_t)octets[0] << 24 | (uint32_t)octets[1] << 16 | (uint32_t)octets[2] << 8 | octets[3];
    else
        for (int byte = 0; byte < 4; byte++)
            word = word << 8 | (first + byte < bits->size ? octets[byte] : 0);
    return word << (bits->at & 7);
}

static int64_t take(Bits *bits, int width)
{
    uint64_t word = ahead(bits);
    bits->at += width;
    return (int64_t)(word >> (32 - width));
}

static int64_t next_bit(const Bits *bits)
{
    int64_t byte = bits->at >> 3;
    return byte < bits->size ? bits->octets[byte] >> (~bits->at & 7) & 1 : 0;
}

/* How many ones there are in front of the next zero, which is taken too; REFUSED where there is none. */
static int64_t take_unary(Bits *bits)
{
    int64_t ones = 0;
    while (bits->at < 8 * bits->size) {
        int run = __builtin_clz(~ahead(bits) | UINT32_MAX >> MAX_WIDTH);
        ones += run;
        bits->at += run;
        if (run < MAX_WIDTH) {
            bits->at += 1;
            return bits->at <= 8 * bits->size ? ones : REFUSED;
        }
    }
    return REFUSED;
}

/* ---- Golomb codes, as ksm_edge/coding/golomb.py says ---- */

typedef struct {
    int64_t cells, events;
} Group;

static int64_t divisor_of(Group group)
{
    int64_t divisor = (693 * group.cells + 150 * group.events) / (1000 * group.events);
    return divisor > 1 ? divisor : 1;
}

/* Bits of the shorter remainders of `divisor`: one less than the longer ones have. */
static int width_of(int64_t divisor)
{
    return divisor > 1 ? 31 - __builtin_clz((uint32_t)(divisor - 1)) : 0;
}

/* The places of all groups' events, one group behind the other; returns the bytes that their codes took, or REFUSED. */
static int64_t golomb_places(const uint8_t *octets, int64_t size, const Group *groups, int64_t count, int32_t *places)
{
    Bits unary = {octets, size, 0};
    int32_t *place = places;
    int64_t shorter_bits = 0;
    for (const Group *group = groups; group < groups + count; group++) {
        if (!group->events)
            continue;
        if (divisor_of(*group) > MAX_CELLS)
            return REFUSED;
        shorter_bits += width_of(divisor_of(*group)) * group->events;
        for (int64_t i = 0; i < group->events; i++) {
            int64_t quotient = take_unary(&unary);
            if (quotient < 0 || quotient > LONGEST)
                return REFUSED;
            *place++ = (int32_t)quotient;
        }
    }
    Bits shorter = unary, last = {octets, size, unary.at + shorter_bits};
    if (last.at > 8 * size)
        return REFUSED;
    place = places;
    for (const Group *group = groups; group < groups + count; group++) {
        if (!group->events)
            continue;
        int64_t divisor = divisor_of(*group), at = -1;
        int width = width_of(divisor);
        int64_t cutoff = divisor > 1 ? ((int64_t)2 << width) - divisor : 1;
        for (int64_t i = 0; i < group->events; i++) {
            /* Whether a remainder is a longer one is as good as a coin's toss: no branch could be predicted. */
            int64_t remainder = take(&shorter, width), is_long = remainder >= cutoff;
            int64_t gap = *place * divisor + remainder + is_long * (remainder - cutoff + next_bit(&last));
            last.at += is_long;
            at += gap + 1;
            if (gap > LONGEST || at >= group->cells || last.at > 8 * size)
                return REFUSED;
            *place++ = (int32_t)at;
        }
    }
    if (take(&last, (int)(-last.at & 7)) != 0) /* filled up with zeros */
        return REFUSED;
    return last.at >> 3;
}

/* ---- Keep bits, as ksm_edge/coding/keep.py says ---- */

typedef struct {
    int64_t rows, columns;           /* of scores */
    int kind;                        /* how it is split */
    const uint8_t *busy_rows;        /* NULL where they are not told apart */
    const uint8_t *busy_columns;
    Group groups[4];
    int count;      /* of groups */
    int64_t events; /* of all its groups */
} Layer;

typedef struct {
    const uint8_t *octets;
    int64_t size;
} Rest;

static int64_t take_varint(Rest *rest)
{
    int64_t number = 0;
    for (int i = 0; i < MAX_VARINT_BYTES && i < rest->size; i++) {
        number |= (int64_t)(rest->octets[i] & 0x7F) << 7 * i;
        if (rest->octets[i] < 0x80) {
            rest->octets += i + 1;
            rest->size -= i + 1;
            return number;
        }
    }
    return REFUSED;
}

static int take_places(Rest *rest, const Group *groups, int64_t count, int32_t *places)
{
    int64_t used = golomb_places(rest->octets, rest->size, groups, count, places);
    if (used < 0)
        return REFUSED;
    rest->octets += used;
    rest->size -= used;
    return 0;
}

static int tells_rows(const Layer *layer)
{
    return layer->kind == BY_ROW || layer->kind == BY_BOTH;
}

static int tells_columns(const Layer *layer)
{
    return layer->kind == BY_COLUMN || layer->kind == BY_BOTH;
}

static int column_classes(const Layer *layer)
{
    return 1 + tells_columns(layer);
}

/* How each layer is split, and its counts; returns the events of all, or REFUSED. */
static int64_t take_contents(Rest *rest, Layer *layers, int64_t count)
{
    int64_t total = 0;
    for (Layer *layer = layers; layer < layers + count; layer++) {
        int64_t kind = take_varint(rest);
        if (kind < 0 || kind > BY_BOTH)
            return REFUSED;
        layer->kind = (int)kind;
        layer->count = kind == NOTHING_CUT ? 0 : (1 + tells_rows(layer)) * column_classes(layer);
        for (int g = 0; g < layer->count; g++) {
            int64_t events = take_varint(rest);
            if (events < 0 || events > 8 * rest->size - total) /* each takes a bit at least */
                return REFUSED;
            layer->groups[g].events = events;
            layer->events += events;
            total += events;
        }
    }
    return total;
}

static int64_t busy(const uint8_t *flags, int64_t size)
{
    int64_t count = 0;
    for (int64_t i = 0; flags && i < size; i++)
        count += flags[i];
    return count;
}

/* What decoding keeps beside its result, all to be freed by whoever began. */
typedef struct {
    Layer *layers;
    int64_t count; /* of layers */
    int64_t total; /* events of all of them */
    uint8_t *flags;   /* of the rows and columns that are told apart: whether they are busy */
    int32_t *numbers; /* of columns */
    Group *groups;    /* of all layers */
    int32_t *apart;   /* the places of one layer, by group */
} Work;

/* Which rows and columns are busy, and with them the cells of each layer's groups. */
static int take_splits(Rest *rest, Work *work)
{
    const Layer *end = work->layers + work->count;
    int64_t sides = 0, widest = 0;
    for (const Layer *layer = work->layers; layer < end; layer++) {
        sides += tells_rows(layer) ? layer->rows : 0;
        sides += tells_columns(layer) ? layer->columns : 0;
        widest = layer->count > 1 && layer->columns > widest ? layer->columns : widest;
    }
    Group all = {sides, take_varint(rest)};
    if (all.events < 0 || all.events > all.cells || all.events > 8 * rest->size || sides > INT32_MAX)
        return REFUSED;
    work->flags = PyMem_Calloc((size_t)sides + 1, 1);
    work->numbers = PyMem_Calloc((size_t)(all.events > widest ? all.events : widest) + 1, sizeof(int32_t));
    if (!work->flags || !work->numbers || take_places(rest, &all, 1, work->numbers) < 0)
        return REFUSED;
    for (int64_t i = 0; i < all.events; i++)
        work->flags[work->numbers[i]] = 1;

    const uint8_t *flags = work->flags;
    for (Layer *layer = work->layers; layer < end; layer++) {
        layer->busy_rows = tells_rows(layer) ? flags : NULL;
        flags += tells_rows(layer) ? layer->rows : 0;
        layer->busy_columns = tells_columns(layer) ? flags : NULL;
        flags += tells_columns(layer) ? layer->columns : 0;
        int64_t rows = busy(layer->busy_rows, layer->rows), columns = busy(layer->busy_columns, layer->columns);
        for (int g = 0; g < layer->count; g++) {
            int row_class = g / column_classes(layer), column_class = g % column_classes(layer);
            Group *group = &layer->groups[g];
            group->cells = row_class ? rows : layer->rows - rows;
            group->cells *= column_class ? columns : layer->columns - columns;
            if (!group->cells || group->events > group->cells)
                return REFUSED;
        }
    }
    return 0;
}

/* Places in each of a layer's groups -> places in the layer, ascending. `numbers` has room for the layer's columns. */
static void together(const Layer *layer, const int32_t *places, int32_t *numbers, int32_t *cut)
{
    /* Of each class of columns: their numbers in the layer, calm ones first. */
    int64_t busy_columns = busy(layer->busy_columns, layer->columns);
    int64_t widths[2] = {layer->columns - busy_columns, busy_columns};
    int32_t *of_class[2] = {numbers, numbers + widths[0]};
    int64_t filled[2] = {0, 0};
    for (int64_t x = 0; x < layer->columns; x++) {
        int class = layer->busy_columns ? layer->busy_columns[x] : 0;
        of_class[class][filled[class]++] = (int32_t)x;
    }
    const int32_t *next[4], *end[4];
    for (int g = 0; g < layer->count; g++) {
        next[g] = places;
        places = end[g] = places + layer->groups[g].events;
    }
    int classes = column_classes(layer);
    int64_t ranks[2] = {0, 0}; /* of the row among those of its class */
    for (int64_t o = 0; o < layer->rows; o++) {
        int row_class = layer->busy_rows ? layer->busy_rows[o] : 0;
        int64_t rank = ranks[row_class]++;
        const int32_t **head = next + row_class * classes, **stop = end + row_class * classes;
        for (;;) { /* the least of the two heads that is in this row */
            int64_t least = layer->columns;
            int from = 0;
            for (int c = 0; c < classes; c++)
                if (head[c] < stop[c] && *head[c] < (rank + 1) * widths[c]) {
                    int64_t x = of_class[c][*head[c] - rank * widths[c]];
                    if (x < least)
                        least = x, from = c;
                }
            if (least == layer->columns)
                break;
            head[from]++;
            *cut++ = (int32_t)(o * layer->columns + least);
        }
    }
}

/* All layers' places, `work->total` of them, from what follows the splits. */
static int take_cuts(Rest *rest, Work *work, int32_t *cuts)
{
    work->groups = PyMem_Calloc((size_t)(4 * work->count + 1), sizeof(Group));
    if (!work->groups)
        return REFUSED;
    Group *group = work->groups;
    int64_t most = 0; /* events of a layer that has several groups */
    for (const Layer *layer = work->layers; layer < work->layers + work->count; layer++) {
        for (int g = 0; g < layer->count; g++)
            *group++ = layer->groups[g];
        most = layer->count > 1 && layer->events > most ? layer->events : most;
    }
    work->apart = PyMem_Calloc((size_t)most + 1, sizeof(int32_t));
    if (!work->apart || take_places(rest, work->groups, group - work->groups, cuts) < 0)
        return REFUSED;
    for (const Layer *layer = work->layers; layer < work->layers + work->count; layer++) {
        if (layer->count > 1) { /* those of one group are what they are to be */
            memcpy(work->apart, cuts, (size_t)layer->events * sizeof(int32_t));
            together(layer, work->apart, work->numbers, cuts);
        }
        cuts += layer->events;
    }
    return 0;
}

/* ---- What is cut, as ksm_edge/mask.py says ---- */

typedef struct {
    int32_t *numbers;
    int64_t count, room;
} Places;

/* Whether there is room for FLAGS more. */
static int has_room(Places *places)
{
    if (places->count + FLAGS <= places->room)
        return 1;
    int64_t room = 2 * places->room + FLAGS;
    int32_t *numbers = PyMem_RawRealloc(places->numbers, (size_t)room * sizeof(int32_t));
    if (!numbers)
        return 0;
    *places = (Places){numbers, places->count, room};
    return 1;
}

/* The flat places of scores below `least` or above `most`, or that are no numbers, ascending; REFUSED where memory is
   short. Most words of flags are 0. In one that is not, whether a score is meant is hard to predict: it is written down
   in any case. */
WIDER static int find_apart(const float *restrict score, int64_t count, float least, float most, Places *places)
{
    for (int64_t first = 0; first < count; first += FLAGS) {
        int64_t some = count - first < FLAGS ? count - first : FLAGS;
        uint8_t flags[FLAGS] = {0};
        for (int64_t i = 0; i < some; i++)
            flags[i] = !(score[first + i] >= least) | (score[first + i] > most);
        if (!has_room(places))
            return REFUSED;
        int32_t *next = places->numbers + places->count;
        for (int64_t i = 0; i < some; i += WORD) {
            uint64_t word;
            memcpy(&word, flags + i, WORD);
            if (!word)
                continue;
            for (int64_t j = i; j < i + WORD && j < some; j++) {
                *next = (int32_t)(first + j);
                next += flags[j];
            }
        }
        places->count = next - places->numbers;
    }
    return 0;
}

/* ---- Fusing, as ksm_edge/fuse.py says ---- */

/* `out`, (filters, kernels, size): each weight times its filter's factor, those of a cut kernel times its scale first.
   `cut` holds flat numbers of kernels; returns REFUSED where they are not ones of this layer, filter by filter, with
   `out` not finished. */
WIDER static int fuse(const float *restrict weight, const float *restrict factor, int64_t filters, int64_t kernels,
                      int64_t size, const int32_t *restrict cut, const float *restrict scale, int64_t cuts,
                      float *restrict out)
{
    int64_t next = 0;
    for (int64_t o = 0; o < filters; o++) {
        const float *row = weight + o * kernels * size;
        float *made = out + o * kernels * size;
        for (int64_t i = 0; i < kernels * size; i++)
            made[i] = row[i] * factor[o];
        for (; next < cuts; next++) {
            int64_t first = (*(const volatile int32_t *)&cut[next] - o * kernels) * size; /* read once: it is checked */
            if (first >= kernels * size)
                break;
            if (first < 0)
                return REFUSED;
            for (int64_t i = first; i < first + size; i++)
                made[i] = (row[i] * scale[next]) * factor[o]; /* rounded twice, in this order */
        }
    }
    return next == cuts ? 0 : REFUSED;
}

/* ---- What masks feel, as ksm_edge/training/felt.py says ---- */

/* One filter's row: S, or what with `weight` makes it, into f S; returns the sum of S. `is_product` is a constant of each
   call, so that there are two loops without a question in them. */
static inline float feel_row(float *restrict row, const float *restrict weight, float factor, int64_t kernels,
                             int is_product)
{
    float sums[SUMS] = {0};
    int64_t i = 0;
    for (; i + SUMS <= kernels; i += SUMS)
        for (int j = 0; j < SUMS; j++) {
            float felt = is_product ? weight[i + j] * row[i + j] : row[i + j];
            sums[j] += felt;
            row[i + j] = felt * factor;
        }
    for (int j = 0; i < kernels; i++, j++) {
        float felt = is_product ? weight[i] * row[i] : row[i];
        sums[j] += felt;
        row[i] = felt * factor;
    }
    for (int half = SUMS / 2; half; half /= 2)
        for (int j = 0; j < half; j++)
            sums[j] += sums[j + half];
    return sums[0];
}

/* `felt`, (filters, kernels), in place, and each filter's sum of M S: that of all as if nothing were cut, and what that
   says too much of the few that are. `weight` NULL: `felt` is S already. REFUSED as `fuse` does. */
WIDER static int feel(float *restrict felt, const float *restrict weight, const float *restrict factor,
                      int64_t filters, int64_t kernels, const int32_t *restrict cut, const float *restrict scale,
                      int64_t cuts, float *restrict sums)
{
    int64_t next = 0;
    for (int64_t o = 0; o < filters; o++) {
        float *row = felt + o * kernels;
        const float *its = weight ? weight + o * kernels : NULL;
        double too_much = 0;
        for (; next < cuts; next++) {
            int64_t i = *(const volatile int32_t *)&cut[next] - o * kernels; /* read once: it is checked */
            if (i >= kernels)
                break;
            if (i < 0)
                return REFUSED;
            too_much += (1 - scale[next]) * (its ? its[i] * row[i] : row[i]);
        }
        sums[o] = its ? feel_row(row, its, factor[o], kernels, 1) : feel_row(row, its, factor[o], kernels, 0);
        sums[o] -= (float)too_much;
    }
    return next == cuts ? 0 : REFUSED;
}

/* ---- Adam, as ksm_edge/training/adam.py says ---- */

typedef struct {
    float momentum, gain, decay, square_gain; /* pairs that add up to 1 */
    float size, floor;
    float stay; /* parameters of this value keep it; NaN: none do */
    float slope, shift; /* of what tanh is taken of a score, see `keep_gradient` in ksm_edge/mask.py; slope 0: no score */
} Rates;

/* slope / 2 (1 - tanh^2 x) for x = slope score - shift, as 2 slope / (4 + k) where k / 4 = cosh^2 x - 1: from
   2 cosh(x / 8) - 2 by its power series, whose terms are all positive, and four times from that of an angle to that of
   its double, k (k + 4). To 2e-6 of itself up to 8, and 4e-6 up to 12, where it is a 1e10th; beyond, the series ends too
   soon, and from 44 on k is infinite, and this 0. */
static inline float keep_gradient(float score, float slope, float shift)
{
    float x = slope * score - shift, u = x * x * (1.0f / 64), square = u * u;
    float k = (1.0f / 360 + u * (1.0f / 20160)) + square * (1.0f / 1814400);
    k = u * ((1 + u * (1.0f / 12)) + square * k);
    for (int doubled = 0; doubled < 4; doubled++)
        k = k * (k + 4);
    return 2 * slope / (k + 4);
}

static inline void descend(float *restrict parameter, const float *restrict gradient, float *restrict mean,
                           float *restrict square, int64_t count, Rates rates, int of_score)
{
    for (int64_t i = 0; i < count; i++) {
        float g = gradient[i], from = parameter[i];
        if (of_score)
            g = g * keep_gradient(from, rates.slope, rates.shift);
        mean[i] = mean[i] * rates.momentum + rates.gain * g;
        square[i] = square[i] * rates.decay + g * g * rates.square_gain;
        float to = from - mean[i] / (sqrtf(square[i]) + rates.floor) * rates.size;
        parameter[i] = from == rates.stay ? from : to;
    }
}

WIDER static void adam(float *parameter, const float *gradient, float *mean, float *square, int64_t count, Rates rates)
{
    if (rates.slope != 0)
        descend(parameter, gradient, mean, square, count, rates, 1);
    else
        descend(parameter, gradient, mean, square, count, rates, 0);
}

/* ---- What Python calls ---- */

typedef struct {
    PyObject *object;
    const char *types; /* its items may be of, as in the module struct: which letter has so many bytes depends */
    int64_t bytes;     /* of an item */
    int writable;
    Py_buffer view;
} Array;

static void give_back(Array *arrays, int count)
{
    while (count--)
        PyBuffer_Release(&arrays[count].view);
}

/* The memory of all arrays, each aligned, in one piece and of its type; -1 with an exception set otherwise. */
static int borrow(Array *arrays, int count)
{
    for (int i = 0; i < count; i++) {
        Array *array = &arrays[i];
        Py_buffer *view = &array->view;
        int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (array->writable ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(array->object, view, flags) < 0) {
            give_back(arrays, i);
            return -1;
        }
        const char *format = view->format;
        int fits = format[0] && strchr(array->types, format[0]) && !format[1] && view->itemsize == array->bytes;
        if (!fits || (uintptr_t)view->buf % (size_t)view->itemsize) {
            PyErr_Format(PyExc_TypeError, "argument %d is no aligned array of type %s", i, array->types);
            give_back(arrays, i + 1);
            return -1;
        }
    }
    return 0;
}

static int64_t items(const Array *array)
{
    return array->view.len / array->view.itemsize;
}

/* Layers of these shapes (count, 2); NULL where one is not possible or memory is short. */
static Layer *layers_of(const int64_t *shapes, int64_t count)
{
    Layer *layers = PyMem_Calloc((size_t)count + 1, sizeof(Layer));
    for (int64_t l = 0; layers && l < count; l++) {
        int64_t rows = shapes[2 * l], columns = shapes[2 * l + 1];
        if (rows < 1 || columns < 1 || rows > MAX_CELLS || columns > MAX_CELLS / rows) {
            PyMem_Free(layers);
            return NULL;
        }
        layers[l].rows = rows;
        layers[l].columns = columns;
    }
    return layers;
}

/* (places, counts) for `decode_keep`, or NULL. */
static PyObject *cuts_and_counts(Rest rest, Work *work)
{
    work->total = work->layers ? take_contents(&rest, work->layers, work->count) : REFUSED;
    if (work->total < 0 || take_splits(&rest, work) < 0)
        return NULL;
    PyObject *cuts = PyBytes_FromStringAndSize(NULL, work->total * (int64_t)sizeof(int32_t));
    PyObject *counts = cuts ? PyList_New(work->count) : NULL;
    if (!counts || take_cuts(&rest, work, (int32_t *)PyBytes_AS_STRING(cuts)) < 0 || rest.size) {
        Py_XDECREF(cuts);
        Py_XDECREF(counts);
        return NULL;
    }
    for (int64_t l = 0; l < work->count; l++)
        PyList_SET_ITEM(counts, l, PyLong_FromLongLong(work->layers[l].events));
    return Py_BuildValue("NN", cuts, counts);
}

PyDoc_STRVAR(decode_keep_doc,
             "decode_keep(data, shapes)\n--\n\n"
             "Keep bits of layers, shapes (L, 2) int64, to the places of what is cut, bytes of int32, and a list of how\n"
             "many of them are each layer's. None where the bytes do not fit the shapes.");

static PyObject *py_decode_keep(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "2 arguments are needed");
    Array arrays[] = {{args[0], "B", 1, 0, {0}}, {args[1], "ilq", 8, 0, {0}}};
    if (borrow(arrays, 2) < 0)
        return NULL;
    Rest rest = {arrays[0].view.buf, arrays[0].view.len};
    int64_t layer_count = items(&arrays[1]) / 2;
    Work work = {.layers = layers_of(arrays[1].view.buf, layer_count), .count = layer_count};
    PyObject *found = cuts_and_counts(rest, &work);
    PyMem_Free(work.layers);
    PyMem_Free(work.flags);
    PyMem_Free(work.numbers);
    PyMem_Free(work.groups);
    PyMem_Free(work.apart);
    give_back(arrays, 2);
    if (found)
        return found;
    PyErr_Clear(); /* out of memory here is for the caller's own form to meet */
    Py_RETURN_NONE;
}

PyDoc_STRVAR(apart_doc, "apart(score, least, most)\n--\n\n"
                        "The flat places of scores, float32, below `least` or above `most` or not numbers, ascending:\n"
                        "bytes of int32.");

static PyObject *py_apart(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "3 arguments are needed");
    double least = PyFloat_AsDouble(args[1]), most = PyFloat_AsDouble(args[2]);
    if (PyErr_Occurred())
        return NULL;
    Array score = {args[0], "f", 4, 0, {0}};
    if (borrow(&score, 1) < 0)
        return NULL;
    int64_t size = items(&score);
    Places places = {NULL, 0, 0};
    PyObject *found = NULL;
    if (size > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "more scores than int32 counts");
    } else {
        int held;
        Py_BEGIN_ALLOW_THREADS
        held = find_apart(score.view.buf, size, (float)least, (float)most, &places);
        Py_END_ALLOW_THREADS
        found = held < 0 ? PyErr_NoMemory()
                         : PyBytes_FromStringAndSize((char *)places.numbers, places.count * (int64_t)sizeof(int32_t));
    }
    PyMem_RawFree(places.numbers);
    give_back(&score, 1);
    return found;
}

PyDoc_STRVAR(fuse_doc, "fuse(weight, factor, cut, scale, out)\n--\n\n"
                       "(W M) f into out, as weight (O, I, kh, kw) float32, for f (O,) float32 and M given by the flat\n"
                       "numbers of cut kernels, (n,) int32, ascending, and their scales, (n,) float32.");

static PyObject *py_fuse(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 5)
        return PyErr_Format(PyExc_TypeError, "5 arguments are needed");
    Array a[] = {{args[0], "f", 4, 0, {0}},
                 {args[1], "f", 4, 0, {0}},
                 {args[2], "ilq", 4, 0, {0}},
                 {args[3], "f", 4, 0, {0}},
                 {args[4], "f", 4, 1, {0}}};
    if (borrow(a, 5) < 0)
        return NULL;
    const Py_buffer *weight = &a[0].view;
    int held = REFUSED;
    if (weight->ndim == 4 && weight->len && items(&a[1]) == weight->shape[0] && items(&a[2]) == items(&a[3]) &&
        a[4].view.len == weight->len) {
        int64_t filters = weight->shape[0], kernels = weight->shape[1], size = weight->shape[2] * weight->shape[3];
        Py_BEGIN_ALLOW_THREADS
        held = fuse(weight->buf, a[1].view.buf, filters, kernels, size, a[2].view.buf, a[3].view.buf, items(&a[2]),
                    a[4].view.buf);
        Py_END_ALLOW_THREADS
    }
    give_back(a, 5);
    if (held < 0)
        return PyErr_Format(PyExc_ValueError, "the arrays do not fit, or cut kernels are not ascending");
    Py_RETURN_NONE;
}

PyDoc_STRVAR(feel_doc, "feel(felt, weight, factor, cut, scale, sums)\n--\n\n"
                       "f S into felt, (O, I) float32, which is S / W, or S where weight is None; sums of M S into\n"
                       "sums, (O,); f (O,) float32 and M as for fuse.");

static PyObject *py_feel(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 6)
        return PyErr_Format(PyExc_TypeError, "6 arguments are needed");
    int has_weight = args[1] != Py_None;
    Array a[] = {{args[0], "f", 4, 1, {0}},
                 {has_weight ? args[1] : args[0], "f", 4, 0, {0}},
                 {args[2], "f", 4, 0, {0}},
                 {args[3], "ilq", 4, 0, {0}},
                 {args[4], "f", 4, 0, {0}},
                 {args[5], "f", 4, 1, {0}}};
    if (borrow(a, 6) < 0)
        return NULL;
    const Py_buffer *felt = &a[0].view;
    int held = REFUSED;
    if (felt->ndim == 2 && a[1].view.len == felt->len && items(&a[2]) == felt->shape[0] &&
        items(&a[3]) == items(&a[4]) && items(&a[5]) == felt->shape[0]) {
        const float *weight = has_weight ? a[1].view.buf : NULL;
        Py_BEGIN_ALLOW_THREADS
        held = feel(felt->buf, weight, a[2].view.buf, felt->shape[0], felt->shape[1], a[3].view.buf, a[4].view.buf,
                    items(&a[3]), a[5].view.buf);
        Py_END_ALLOW_THREADS
    }
    give_back(a, 6);
    if (held < 0)
        return PyErr_Format(PyExc_ValueError, "the arrays do not fit, or cut kernels are not ascending");
    Py_RETURN_NONE;
}

PyDoc_STRVAR(adam_doc, "adam(parameter, gradient, mean, square, momentum, decay, size, floor, stay, slope, shift)\n"
                       "--\n\n"
                       "One step in place on float32 arrays of one size, of which the gradient is only read.");

static PyObject *py_adam(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 11)
        return PyErr_Format(PyExc_TypeError, "11 arguments are needed");
    double given[7];
    for (int i = 0; i < 7; i++)
        given[i] = PyFloat_AsDouble(args[4 + i]);
    if (PyErr_Occurred())
        return NULL;
    Rates rates = {(float)given[0], (float)(1 - given[0]), (float)given[1], (float)(1 - given[1]),
                   (float)given[2], (float)given[3],       (float)given[4], (float)given[5],
                   (float)given[6]};
    Array a[] = {{args[0], "f", 4, 1, {0}},
                 {args[1], "f", 4, 0, {0}},
                 {args[2], "f", 4, 1, {0}},
                 {args[3], "f", 4, 1, {0}}};
    if (borrow(a, 4) < 0)
        return NULL;
    int64_t size = items(&a[0]);
    int fit = items(&a[1]) == size && items(&a[2]) == size && items(&a[3]) == size;
    if (fit) {
        Py_BEGIN_ALLOW_THREADS
        adam(a[0].view.buf, a[1].view.buf, a[2].view.buf, a[3].view.buf, size, rates);
        Py_END_ALLOW_THREADS
    }
    give_back(a, 4);
    if (!fit)
        return PyErr_Format(PyExc_ValueError, "the arrays do not fit");
    Py_RETURN_NONE;
}

static PyMethodDef METHODS[] = {
    {"adam", (PyCFunction)(void (*)(void))py_adam, METH_FASTCALL, adam_doc},
    {"apart", (PyCFunction)(void (*)(void))py_apart, METH_FASTCALL, apart_doc},
    {"decode_keep", (PyCFunction)(void (*)(void))py_decode_keep, METH_FASTCALL, decode_keep_doc},
    {"feel", (PyCFunction)(void (*)(void))py_feel, METH_FASTCALL, feel_doc},
    {"fuse", (PyCFunction)(void (*)(void))py_fuse, METH_FASTCALL, fuse_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, .m_name = "ksm_edge._native", .m_size = 0, .m_methods = METHODS};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModule_Create(&MODULE);
}

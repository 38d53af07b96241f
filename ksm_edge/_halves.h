/* Products of matrices whose numbers are rounded to half precision: bfloat16, two of which lie in a word, one behind the
   other along the sum. Sums are float32. Where a processor multiplies such pairs it does in one instruction what takes
   float32 two; where it does not, the same comes out to last bits, denormals apart, and takes longer.

   Whoever includes this says how many floats LANES are, and where the processor has instructions for them (HAS_PAIRS)
   what `pairs`, `pairs_along` and `add_pairs` do, of how many ROWS of a result the sums stay in registers, two each. */

#ifndef KSM_EDGE_HALVES_H
#define KSM_EDGE_HALVES_H

#include "_rows.h"
#include "_wider.h"

enum { PANEL = 2 * LANES };  /* columns of a result that are worked on at once */
enum { COLUMNS_KEPT = 256 }; /* whose right sides lie in words beside each other, */
enum { DEEPEST = 512 };      /* with so many numbers of each sum: a panel of them stays in the cache */
enum { MOST_SIDES = 4 };
enum { NOTHING, EACH, BY_ROW };

typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Sums __attribute__((vector_size(4 * LANES))); /* in registers: GCC moves Lanes about, twice the time */

/* Of n images: of each a product with the same left side, or one, which sums over all of them. */
typedef struct {
    int64_t images, rows, columns, depth; /* n, M, N and K, of (M, K) (n, K, N) or of the sum of (n, M, K) (n, N, K) */
    int64_t summed;                       /* whether it is this */
    int64_t turned;                       /* whether the left side is (K, M), of the first kind */
    int64_t start;                        /* what sums begin with: nothing, a number for each, or one for a row, (M,) */
    int64_t made[MOST_SIDES];             /* the result's shape, which may say (n, M, N) or (M, N) in other words, */
    size_t rank;                          /* and how many sides that has */
} Product;

typedef struct {
    const Product *p;
    const float *left, *right, *before;
    float *made;
    uint32_t *room; /* for the words of M + COLUMNS_KEPT rows and columns */
} Multiplication;

typedef void HalfProduct(Multiplication m);

#ifdef PAIRED_HALVES
extern HalfProduct ksm_edge_half_product_avx512 __attribute__((visibility("hidden")));
#endif

/* Some of the numbers of each sum, as words: of an image, or where those are few, of several that are summed over. */
typedef struct {
    int64_t first, images;  /* which */
    int64_t from, depth;    /* of the numbers of each */
    int64_t words;          /* of all of them */
    uint32_t *left, *right; /* (M, words), or turned (words, M); (panels, words, PANEL) */
    int64_t down, along;    /* from a word on the left to the next row's, and to the next one of the sum */
} Part;

INLINE int64_t words_of(int64_t numbers)
{
    return (numbers + 1) / 2;
}

/* How many are summed over at once. */
INLINE int64_t images_at_once(const Product *p)
{
    int64_t few = words_of(DEEPEST) / words_of(p->depth);
    return p->summed && few > 1 ? least(few, p->images) : 1;
}

/* Words of a row, and of a column, that are kept at once. */
INLINE int64_t most_words(const Product *p)
{
    return images_at_once(p) * words_of(least(p->depth, DEEPEST));
}

/* Columns of all images lie beside each other. */
INLINE int64_t all_columns(const Product *p)
{
    return p->summed ? p->columns : p->images * p->columns;
}

/* Of some columns that follow each other the first few, of one image. */
typedef struct {
    int64_t image, column, count;
} Stretch;

INLINE Stretch stretch(const Product *p, int64_t column, int64_t count)
{
    int64_t within = column % p->columns;
    return (Stretch){column / p->columns, within, least(count, p->columns - within)};
}

#ifndef HAS_PAIRS
enum { ROWS = 4 };

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
INLINE Sums add_pairs(Sums total, uint32_t word, Words each)
{
    Words all = (Words){0} + word, high = (Words){0} + 0xffff0000u;
    return total + (Sums)(all << 16) * (Sums)(each << 16) + (Sums)(all & high) * (Sums)(each & high);
}
#endif

/* ---- Into words ---- */

/* Two rows of floats, the second behind the first along the sum; where there is none, NULL, there are zeros. */
INLINE void pair_rows(const float *first, const float *second, int64_t count, uint32_t *words)
{
    for (int64_t i = 0; i < count; i += LANES) {
        Lanes behind = {0};
        if (second)
            behind = load_some(second + i, count - i);
        store_some((float *)words + i, (Lanes)pairs(load_some(first + i, count - i), behind), count - i);
    }
}

/* A row that lies along the sum. */
INLINE void pair_along(const float *row, int64_t count, uint32_t *words)
{
    int64_t i = 0;
    for (; i + PANEL <= count; i += PANEL)
        store((float *)(words + i / 2), (Lanes)pairs_along(load(row + i), load(row + i + LANES)));
    if (i < count) {
        Lanes behind = {0};
        if (count - i > LANES)
            behind = load_some(row + i + LANES, count - i - LANES);
        Words last = pairs_along(load_some(row + i, count - i), behind);
        store_some((float *)(words + i / 2), (Lanes)last, words_of(count - i));
    }
}

/* `numbers` rows of `pitch` floats, `count` of each, along the sum from row to row. */
INLINE void pair_across(const float *rows, int64_t pitch, int64_t numbers, int64_t count, uint32_t *words, int64_t apart)
{
    for (int64_t k = 0; k < numbers; k += 2, rows += 2 * pitch, words += apart)
        pair_rows(rows, k + 1 < numbers ? rows + pitch : NULL, count, words);
}

INLINE void take_left(const Product *p, const float *left, const Part *part)
{
    if (p->turned) {
        pair_across(left + part->from * p->rows, p->rows, part->depth, p->rows, part->left, p->rows);
        return;
    }
    for (int64_t n = 0; n < part->images; n++) {
        const float *rows = left + (part->first + n) * p->rows * p->depth + part->from;
        for (int64_t i = 0; i < p->rows; i++)
            pair_along(rows + i * p->depth, part->depth, part->left + i * part->down + n * words_of(part->depth));
    }
}

/* `count` columns that lie along the sum. */
INLINE void take_columns_along(const float *columns, int64_t pitch, int64_t numbers, int64_t count, uint32_t *words)
{
    for (int64_t k = 0; k < numbers; k += PANEL, words += LANES * PANEL) {
        uint32_t block[PANEL][LANES]; /* so many words of each column */
        int64_t some = least(PANEL, numbers - k);
        for (int64_t j = 0; j < count; j++)
            pair_along(columns + j * pitch + k, some, block[j]);
        for (int64_t w = 0; w < words_of(some); w++)
            for (int64_t j = 0; j < count; j++)
                words[w * PANEL + j] = block[j][w];
    }
}

/* A panel, whose columns from the `count`-th on are 0. */
INLINE void take_right(const Product *p, const float *right, const Part *part, int64_t column, int64_t count,
                       uint32_t *words)
{
    if (count < PANEL)
        memset(words, 0, (size_t)(part->words * PANEL) * sizeof *words);
    if (p->summed)
        for (int64_t n = 0; n < part->images; n++, words += words_of(part->depth) * PANEL) {
            int64_t place = ((part->first + n) * p->columns + column) * p->depth + part->from;
            take_columns_along(right + place, p->depth, part->depth, count, words);
        }
    else
        for (Stretch s; count; column += s.count, count -= s.count, words += s.count) {
            s = stretch(p, column, count);
            int64_t place = (s.image * p->depth + part->from) * p->columns + s.column;
            pair_across(right + place, p->columns, part->depth, s.count, words, PANEL);
        }
}

/* ---- Sums ---- */

/* (rows, PANEL), of rows of the left side and a panel of the right; of each row so many registers. */
INLINE void sum_tile(const Part *part, const uint32_t *left, const uint32_t *right, int rows, int registers, float *sums)
{
    Sums total[ROWS][2];
    int64_t down = part->down, along = part->along, words = part->words;
    for (int i = 0; i < rows; i++)
        for (int r = 0; r < registers; r++)
            total[i][r] = (Sums){0};
    for (int64_t k = 0; k < words; k++, left += along, right += PANEL) {
        Words each[2];
        for (int r = 0; r < registers; r++)
            each[r] = *(const Words *)(right + r * LANES);
        for (int i = 0; i < rows; i++)
            for (int r = 0; r < registers; r++)
                total[i][r] = add_pairs(total[i][r], left[i * down], each[r]);
    }
    for (int i = 0; i < rows; i++)
        for (int r = 0; r < registers; r++)
            store(sums + i * PANEL + r * LANES, (Lanes)total[i][r]);
}

/* The same with what the compiler has to know: how many there are. */
static void sum_up(const Part *part, const uint32_t *left, const uint32_t *right, int64_t rows, int64_t count,
                   float *sums)
{
#define TILE_OF(COUNT)                                                                                                 \
    case COUNT:                                                                                                        \
        if (count > LANES)                                                                                             \
            sum_tile(part, left, right, least(COUNT, ROWS), 2, sums);                                                  \
        else                                                                                                           \
            sum_tile(part, left, right, least(COUNT, ROWS), 1, sums);                                                  \
        break;
    switch (rows) {
        TILE_OF(1)
        TILE_OF(2)
        TILE_OF(3)
        TILE_OF(4)
        TILE_OF(5)
        TILE_OF(6)
        TILE_OF(7)
        TILE_OF(8)
        TILE_OF(9)
        TILE_OF(10)
        TILE_OF(11)
        TILE_OF(12)
    }
#undef TILE_OF
}

/* A tile's sums to what there is of them, and into their place. */
INLINE void add_tile(const Multiplication *m, int is_first, int64_t row, int64_t rows, Stretch to, const float *sums)
{
    const Product *p = m->p;
    for (int64_t i = 0; i < rows; i++, sums += PANEL) {
        int64_t place = (to.image * p->rows + row + i) * p->columns + to.column;
        for (int64_t j = 0; j < to.count; j += LANES) {
            Lanes start = {0};
            if (!is_first)
                start = load_some(m->made + place + j, to.count - j);
            else if (p->start == BY_ROW)
                start += m->before[row + i];
            else if (p->start == EACH)
                start = load_some(m->before + place + j, to.count - j);
            store_some(m->made + place + j, start + load_some(sums + j, to.count - j), to.count - j);
        }
    }
}

static void add_tiles(const Multiplication *m, int is_first, int64_t row, int64_t rows, int64_t column, int64_t count,
                      const float *sums)
{
    for (Stretch s; count; column += s.count, count -= s.count, sums += s.count) {
        s = stretch(m->p, column, count);
        add_tile(m, is_first, row, rows, s, sums);
    }
}

/* What a tile will be added to, often far away, is asked for while its sums are made. */
INLINE void expect_tile(const Multiplication *m, int64_t row, int64_t rows, Stretch to)
{
    const Product *p = m->p;
    for (int64_t i = 0; i < rows; i++) {
        int64_t place = (to.image * p->rows + row + i) * p->columns + to.column;
        for (int64_t j = 0; j < to.count; j += LANES)
            __builtin_prefetch(m->made + place + j, 1);
    }
}

/* Rows through all panels that are kept: so what is added to and written, often the most that is, goes by in a row. */
INLINE void multiply_part(const Multiplication *m, const Part *part)
{
    const Product *p = m->p;
    int64_t all = all_columns(p), words = part->words;
    int is_first = !part->first && !part->from;
    for (int64_t first = 0; first < all; first += COLUMNS_KEPT) {
        int64_t last = least(first + COLUMNS_KEPT, all);
        for (int64_t column = first; column < last; column += PANEL)
            take_right(p, m->right, part, column, least(PANEL, last - column), part->right + (column - first) * words);
        for (int64_t row = 0; row < p->rows; row += ROWS)
            for (int64_t column = first; column < last; column += PANEL) {
                float sums[ROWS * PANEL];
                int64_t rows = least(ROWS, p->rows - row), count = least(PANEL, last - column);
                const uint32_t *right = part->right + (column - first) * words;
                expect_tile(m, row, rows, stretch(p, column, count));
                sum_up(part, part->left + row * part->down, right, rows, count, sums);
                add_tiles(m, is_first, row, rows, column, count, sums);
            }
    }
}

static void half_product(Multiplication m)
{
    const Product *p = m.p;
    int64_t images = p->summed ? p->images : 1, at_once = images_at_once(p);
    for (int64_t first = 0; first < images; first += at_once)
        for (int64_t from = 0; from < p->depth; from += DEEPEST) {
            Part part = {.first = first, .images = least(at_once, images - first), .from = from};
            part.depth = least(DEEPEST, p->depth - from), part.words = part.images * words_of(part.depth);
            part.left = m.room, part.right = m.room + p->rows * most_words(p);
            part.down = p->turned ? 1 : part.words, part.along = p->turned ? p->rows : 1;
            take_left(p, m.left, &part);
            multiply_part(&m, &part);
        }
}

#endif

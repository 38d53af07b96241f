/* What is multiplied in products of matrices, in the order in which it is read: words, which are a float each, or where
   HALVES is defined two numbers in half precision (_halves.h), one behind the other along the sum.

   Whoever includes this says how many floats LANES are, and of how many REGISTERS of LANES a PANEL is. */

#ifndef KSM_EDGE_WORDS_H
#define KSM_EDGE_WORDS_H

#include "_rows.h"
#include "_wider.h"

enum { PANEL = REGISTERS * LANES }; /* columns of a result that are worked on at once */
enum { COLUMNS_KEPT = 256 };        /* whose right sides lie in words beside each other, */
enum { WORDS_KEPT = 240 };          /* and so many words of each sum: a panel of them stays in the cache, no two
                                       panels in the same places of it */
enum { MOST_SIDES = 4 };
enum { NOTHING, EACH, BY_ROW };

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
    void *room; /* for as many words as `room_words` says */
} Multiplication;

typedef void Multiply(Multiplication m);

extern Multiply ksm_edge_half_product_plain __attribute__((visibility("hidden")));
#ifdef PAIRED_HALVES
extern Multiply ksm_edge_half_product_avx512 __attribute__((visibility("hidden")));
#endif

INLINE int64_t words_of(int64_t numbers, int64_t terms)
{
    return (numbers + terms - 1) / terms;
}

/* How many are summed over at once; `terms`: numbers of a word. */
INLINE int64_t images_at_once(const Product *p, int64_t terms)
{
    int64_t few = WORDS_KEPT / words_of(p->depth, terms);
    return p->summed && few > 1 ? least(few, p->images) : 1;
}

/* Words of a row, and of a column, that are kept at once. */
INLINE int64_t most_words(const Product *p, int64_t terms)
{
    return images_at_once(p, terms) * least(words_of(p->depth, terms), WORDS_KEPT);
}

/* Floats of one image are words already. */
INLINE int left_is_in_place(const Product *p, int64_t terms)
{
    return terms == 1 && images_at_once(p, terms) == 1;
}

INLINE int64_t room_words_in_order(const Product *p, int64_t terms)
{
    return ((left_is_in_place(p, terms) ? 0 : p->rows) + COLUMNS_KEPT) * most_words(p, terms);
}

/* The right side is put in order, and better the smaller one, where sums are so long that turning them is nothing. */
INLINE int is_swapped(const Product *p)
{
    return p->summed && (p->columns - p->rows) * p->depth * p->images > 16 * p->rows * p->columns;
}

INLINE Product swapped(const Product *p)
{
    Product s = *p;
    s.rows = p->columns, s.columns = p->rows, s.start = NOTHING;
    return s;
}

/* Beside a result that has to be turned. */
INLINE int64_t room_words(const Product *p, int64_t terms)
{
    if (is_swapped(p)) {
        Product s = swapped(p);
        return p->rows * p->columns + room_words_in_order(&s, terms);
    }
    return room_words_in_order(p, terms);
}

typedef float Sums __attribute__((vector_size(4 * LANES))); /* in registers: GCC moves Lanes about, twice the time */

#ifdef HALVES
#include "_halves.h"
#else
typedef float Word;
typedef float Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum { TERMS = 1 };

INLINE void words_across(const float *row, const float *behind, int64_t count, Word *words)
{
    (void)behind;
    for (int64_t i = 0; i < count; i += LANES)
        store_some(words + i, load_some(row + i, count - i), count - i);
}

INLINE Words words_along(const float *row, int64_t count)
{
    return (Words)load_some(row, count);
}

INLINE Sums add_product(Sums total, Word word, Words each)
{
    return total + word * (Sums)each;
}
#endif

/* Some of the numbers of each sum, as words: of an image, or where those are few, of several that are summed over. */
typedef struct {
    int64_t first, images; /* which */
    int64_t from, depth;   /* of the numbers of each */
    int64_t words;         /* of all of them */
    const Word *left;
    int64_t down, along; /* from a word on the left to the next row's, and to the next one of the sum */
    Word *right;         /* (panels, words, PANEL); a column that is alone: (words,) */
} Part;

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

/* Where a row of it is in the result. */
INLINE int64_t place_of(const Product *p, int64_t row, Stretch s)
{
    return (s.image * p->rows + row) * p->columns + s.column;
}

/* ---- Into words ---- */

/* `numbers` rows of `pitch` floats, `count` of each, along the sum from row to row. */
INLINE void rows_across(const float *rows, int64_t pitch, int64_t numbers, int64_t count, Word *words, int64_t apart)
{
    for (int64_t k = 0; k < numbers; k += TERMS, rows += TERMS * pitch, words += apart)
        words_across(rows, k + 1 < numbers ? rows + pitch : NULL, count, words);
}

INLINE void row_along(const float *row, int64_t count, Word *words)
{
    for (int64_t k = 0; k < count; k += LANES * TERMS, words += LANES)
        store_some((float *)words, (Lanes)words_along(row + k, count - k), words_of(count - k, TERMS));
}

/* `words`: room for the left side's. */
INLINE void take_left(const Product *p, const float *left, Word *words, Part *part)
{
    left += p->turned ? part->from * p->rows : part->first * p->rows * p->depth + part->from;
    part->left = words;
    part->down = p->turned ? 1 : part->words, part->along = p->turned ? p->rows : 1;
    if (left_is_in_place(p, TERMS)) {
        part->left = (const Word *)left;
        part->down = p->turned ? 1 : p->depth;
    } else if (p->turned) {
        rows_across(left, p->rows, part->depth, p->rows, words, p->rows);
    } else {
        for (int64_t n = 0; n < part->images; n++, words += words_of(part->depth, TERMS))
            for (int64_t i = 0; i < p->rows; i++)
                row_along(left + (n * p->rows + i) * p->depth, part->depth, words + i * part->words);
    }
}

/* LANES rows of as many words become columns: as cards that are shuffled, their halves one by one. */
INLINE void turn(Lanes *square)
{
    for (int round = 1; round < LANES; round *= 2) {
        Lanes shuffled[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            PICKED(shuffled[2 * i], square[i], square[i + LANES / 2], l / 2 + l % 2 * LANES)
            PICKED(shuffled[2 * i + 1], square[i], square[i + LANES / 2], (LANES + l) / 2 + l % 2 * LANES)
        }
        for (int i = 0; i < LANES; i++)
            square[i] = shuffled[i];
    }
}

/* `count` columns that lie along the sum; those that there are not are as the last one. */
INLINE void columns_along(const float *columns, int64_t pitch, int64_t numbers, int64_t count, Word *words)
{
    for (int64_t k = 0; k < numbers; k += LANES * TERMS, words += LANES * PANEL)
        for (int64_t j = 0; j < count; j += LANES) {
            Lanes square[LANES];
            for (int i = 0; i < LANES; i++)
                square[i] = (Lanes)words_along(columns + least(j + i, count - 1) * pitch + k, numbers - k);
            turn(square);
            for (int w = 0; w < least(LANES, words_of(numbers - k, TERMS)); w++)
                store((float *)(words + w * PANEL + j), square[w]);
        }
}

/* A panel. What its last register has behind the last column is as that, or 0. */
INLINE void take_right(const Product *p, const float *right, const Part *part, int64_t column, int64_t count,
                       Word *words)
{
    if (p->summed)
        for (int64_t n = 0; n < part->images; n++, words += words_of(part->depth, TERMS) * PANEL) {
            int64_t place = ((part->first + n) * p->columns + column) * p->depth + part->from;
            columns_along(right + place, p->depth, part->depth, count, words);
        }
    else {
        if (count < PANEL)
            memset(words, 0, (size_t)(part->words * PANEL) * sizeof *words);
        for (Stretch s; count; column += s.count, count -= s.count, words += s.count) {
            s = stretch(p, column, count);
            int64_t place = (s.image * p->depth + part->from) * p->columns + s.column;
            if (s.count == PANEL) /* and the compiler knows */
                rows_across(right + place, p->columns, part->depth, PANEL, words, PANEL);
            else
                rows_across(right + place, p->columns, part->depth, s.count, words, PANEL);
        }
    }
}

/* Panels side by side, of one image: its rows are read from end to end, as memory likes it. */
INLINE void rows_into_panels(const float *rows, int64_t pitch, const Part *part, int64_t count)
{
    int64_t panel = part->words * PANEL, whole = count / PANEL;
    Word *words = part->right;
    for (int64_t k = 0; k < part->depth; k += TERMS, rows += TERMS * pitch, words += PANEL) {
        const float *behind = k + 1 < part->depth ? rows + pitch : NULL;
        for (int64_t i = 0; i < whole; i++)
            words_across(rows + i * PANEL, behind ? behind + i * PANEL : NULL, PANEL, words + i * panel);
        if (whole * PANEL < count) {
            for (int r = 0; r < REGISTERS; r++)
                store((float *)words + whole * panel + r * LANES, (Lanes){0});
            words_across(rows + whole * PANEL, behind ? behind + whole * PANEL : NULL, count - whole * PANEL,
                         words + whole * panel);
        }
    }
}

INLINE void take_columns(const Product *p, const float *right, const Part *part, int64_t first, int64_t last)
{
    if (!p->summed && first / p->columns == (last - 1) / p->columns) {
        int64_t place = (first / p->columns * p->depth + part->from) * p->columns + first % p->columns;
        rows_into_panels(right + place, p->columns, part, last - first);
        return;
    }
    for (int64_t column = first; column < last; column += PANEL)
        take_right(p, right, part, column, least(PANEL, last - column), part->right + (column - first) * part->words);
}

/* A float of each row. */
INLINE void take_column(const Product *p, const float *right, const Part *part, int64_t column, Word *words)
{
    if (p->summed)
        for (int64_t n = 0; n < part->images; n++, words += words_of(part->depth, TERMS))
            row_along(right + ((part->first + n) * p->columns + column) * p->depth + part->from, part->depth, words);
    else
        rows_across(right + (column / p->columns * p->depth + part->from) * p->columns + column % p->columns,
                    p->columns, part->depth, 1, words, 1);
}

#endif

/* Products of matrices, with sums in float32. What is multiplied are words: a float each, or where HALVES is defined two
   numbers in half precision (_halves.h), one behind the other along the sum.

   Whoever includes this says how many floats LANES are, and of how many ROWS of a result the sums stay in registers,
   REGISTERS of each. */

#ifndef KSM_EDGE_PRODUCTS_H
#define KSM_EDGE_PRODUCTS_H

#include "_rows.h"
#include "_wider.h"

enum { PANEL = REGISTERS * LANES }; /* columns of a result that are worked on at once */
enum { COLUMNS_KEPT = 256 };        /* whose right sides lie in words beside each other, */
enum { WORDS_KEPT = 240 };          /* and so many words of each sum: a panel of them stays in the cache, no two
                                       panels in the same places of it */
enum { LINE = 16 };                 /* floats that memory is read by */
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

#ifdef HALVES
#include "_halves.h"
#else
typedef float Word;
typedef float Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Sums __attribute__((vector_size(4 * LANES))); /* in registers: GCC moves Lanes about, twice the time */

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

/* ---- Sums ---- */

/* What sums begin with, and where they go: of a tile's first row, and how far it is to the next one's. */
typedef struct {
    int64_t begin; /* NOTHING, EACH or BY_ROW */
    const float *from;
    float *to;
    int64_t from_pitch, to_pitch;
} Tile;

/* (rows, registers LANES) of rows of the left side and a panel of the right. */
INLINE void sum_tile(const Part *part, const Word *left, const Word *right, int rows, int registers, const Tile *t)
{
    Sums total[ROWS][REGISTERS];
    int64_t down = part->down, along = part->along, words = part->words;
    for (int i = 0; i < rows; i++)
        for (int r = 0; r < registers; r++)
            total[i][r] = (Sums){0};
    if (t->begin == EACH)
        for (int i = 0; i < rows; i++)
            for (int r = 0; r < registers; r++)
                total[i][r] = (Sums)load(t->from + i * t->from_pitch + r * LANES);
    if (t->begin == BY_ROW)
        for (int i = 0; i < rows; i++)
            for (int r = 0; r < registers; r++)
                total[i][r] += t->from[i];
    for (int64_t k = 0; k < words; k++, left += along, right += PANEL) {
        Words each[REGISTERS];
        for (int r = 0; r < registers; r++)
            each[r] = *(const Words *)(right + r * LANES);
        for (int i = 0; i < rows; i++)
            for (int r = 0; r < registers; r++)
                total[i][r] = add_product(total[i][r], left[i * down], each[r]);
    }
    for (int i = 0; i < rows; i++)
        for (int r = 0; r < registers; r++)
            store(t->to + i * t->to_pitch + r * LANES, (Lanes)total[i][r]);
}

/* The same with what the compiler has to know: how many there are. */
ONCE void sum_up(const Part *part, const Word *left, const Word *right, int64_t rows, int64_t registers, const Tile *t)
{
#define TILE_OF(COUNT)                                                                                                 \
    case COUNT:                                                                                                        \
        if (registers == 1)                                                                                            \
            sum_tile(part, left, right, least(COUNT, ROWS), 1, t);                                                     \
        else if (registers == 2)                                                                                       \
            sum_tile(part, left, right, least(COUNT, ROWS), least(2, REGISTERS), t);                                   \
        else                                                                                                           \
            sum_tile(part, left, right, least(COUNT, ROWS), REGISTERS, t);                                             \
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

/* A tile's numbers from where the result's lie, or to there. */
INLINE void copy_tile(const Product *p, float *result, int64_t row, int64_t rows, int64_t column, int64_t count,
                      float *tile, int is_back)
{
    for (Stretch s; count; column += s.count, count -= s.count, tile += s.count) {
        s = stretch(p, column, count);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < s.count; j += LANES) {
                float *there = result + place_of(p, row + i, s) + j, *here = tile + i * PANEL + j;
                store_some(is_back ? there : here, load_some(is_back ? here : there, s.count - j), s.count - j);
            }
    }
}

/* What the tile below will be added to, often far away, is asked for while this row of them is made. */
INLINE void expect_tile(const Product *p, const float *made, int64_t row, Stretch to)
{
    for (int64_t i = 0; i < least(ROWS, p->rows - row); i++)
        for (int64_t j = 0; j < to.count; j += LANES)
            __builtin_prefetch(made + place_of(p, row + i, to) + j, 1);
}

INLINE void make_tile(const Multiplication *m, const Part *part, int64_t row, int64_t rows, int64_t column,
                      int64_t count, const Word *right)
{
    const Product *p = m->p;
    int is_first = !part->first && !part->from;
    Stretch s = stretch(p, column, count);
    int64_t registers = (count + LANES - 1) / LANES, place = place_of(p, row, s);
    Tile t = {is_first ? p->start : EACH, is_first ? m->before : m->made, m->made + place, p->columns, p->columns};
    const Word *left = part->left + row * part->down;
    expect_tile(p, m->made, row + ROWS, s);
    if (t.begin == BY_ROW)
        t.from += row;
    if (s.count == registers * LANES) {
        t.from += t.begin == EACH ? place : 0;
        sum_up(part, left, right, rows, registers, &t);
        return;
    }
    float tile[ROWS * PANEL];
    if (t.begin == EACH) {
        copy_tile(p, (float *)t.from, row, rows, column, count, tile, 0);
        t.from = tile;
    }
    t.to = tile, t.from_pitch = t.to_pitch = PANEL;
    sum_up(part, left, right, rows, registers, &t);
    copy_tile(p, m->made, row, rows, column, count, tile, 1);
}

enum { COLUMN_ROWS = 8 * LANES };

/* Of up to COLUMN_ROWS rows, each a word of a register. */
INLINE void sum_rows(const float *left, int64_t along, int64_t rows, const float *right, int64_t words, float *sums)
{
    Lanes total[COLUMN_ROWS / LANES] = {{0}};
    for (int64_t k = 0; k < words; k++, left += along)
        for (int r = 0; r < COLUMN_ROWS / LANES; r++)
            if (r * LANES < rows)
                total[r] += right[k] * load_some(left + r * LANES, rows - r * LANES);
    for (int r = 0; r < COLUMN_ROWS / LANES; r++)
        store(sums + r * LANES, total[r]);
}

/* A last column that is alone, as of 49, 25 or 9 pixels: of the left side a register holds several words of a row, or of
   several rows one. */
INLINE void make_column(const Multiplication *m, const Part *part, int64_t column, const float *right)
{
    const Product *p = m->p;
    int is_first = !part->first && !part->from;
    Stretch s = stretch(p, column, 1);
    for (int64_t row = 0, rows; row < p->rows; row += rows) {
        float sums[COLUMN_ROWS];
        const float *left = (const float *)part->left + row * part->down;
        rows = least(COLUMN_ROWS, p->rows - row);
        if (part->along == 1)
            for (int64_t i = 0; i < rows; i++)
                sums[i] = product(left + i * part->down, right, part->words);
        else
            sum_rows(left, part->along, rows, right, part->words, sums);
        for (int64_t i = 0; i < rows; i++) {
            float *to = m->made + place_of(p, row + i, s);
            int64_t begin = is_first ? p->start : EACH;
            if (begin == EACH)
                sums[i] += is_first ? m->before[to - m->made] : *to;
            *to = sums[i] + (begin == BY_ROW ? m->before[row + i] : 0);
        }
    }
}

/* Of a left side that is turned, and lies where it was given, a line of memory has words of many rows, and the next words
   are far away: a line's width of rows ahead they are asked for. */
INLINE void expect_left(const Part *part, int64_t row)
{
    if (part->down == 1 && row % LINE == 0)
        for (int64_t k = 0; k < part->words; k++)
            __builtin_prefetch(part->left + k * part->along + row + LINE);
}

/* Rows through all panels that are kept: so what is added to and written, often the most that is, goes by in a row. */
INLINE void multiply_part(const Multiplication *m, const Part *part)
{
    const Product *p = m->p;
    int64_t all = all_columns(p), words = part->words, kept = COLUMNS_KEPT / PANEL * PANEL;
    for (int64_t first = 0; first < all; first += kept) {
        int64_t last = least(first + kept, all), panels = last;
        if (TERMS == 1 && (last - first) % PANEL == 1) {
            panels--;
            Word *alone = part->right + (panels - first) * words;
            take_column(p, m->right, part, panels, alone);
            make_column(m, part, panels, (const float *)alone);
        }
        take_columns(p, m->right, part, first, panels);
        for (int64_t row = 0; row < p->rows; row += ROWS) {
            expect_left(part, row);
            for (int64_t column = first; column < panels; column += PANEL)
                make_tile(m, part, row, least(ROWS, p->rows - row), column, least(PANEL, panels - column),
                          part->right + (column - first) * words);
        }
    }
}

INLINE void multiply_in_order(Multiplication m)
{
    const Product *p = m.p;
    int64_t images = p->summed ? p->images : 1, at_once = images_at_once(p, TERMS), deepest = WORDS_KEPT * TERMS;
    int64_t room = left_is_in_place(p, TERMS) ? 0 : p->rows * most_words(p, TERMS);
    for (int64_t first = 0; first < images; first += at_once)
        for (int64_t from = 0; from < p->depth; from += deepest) {
            Part part = {.first = first, .images = least(at_once, images - first), .from = from};
            part.depth = least(deepest, p->depth - from), part.words = part.images * words_of(part.depth, TERMS);
            part.right = (Word *)m.room + room;
            take_left(p, m.left, m.room, &part);
            multiply_part(&m, &part);
        }
}

static void multiply(Multiplication m)
{
    const Product *p = m.p;
    if (!is_swapped(p)) {
        multiply_in_order(m);
        return;
    }
    Product s = swapped(p);
    float *turned = m.room;
    multiply_in_order((Multiplication){&s, m.right, m.left, NULL, turned, turned + p->rows * p->columns});
    for (int64_t i = 0; i < p->rows; i++)
        for (int64_t j = 0; j < p->columns; j++) {
            int64_t place = i * p->columns + j;
            float before = p->start == EACH ? m.before[place] : p->start == BY_ROW ? m.before[i] : 0;
            m.made[place] = before + turned[j * p->rows + i];
        }
}

#endif

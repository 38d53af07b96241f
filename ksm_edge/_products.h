/* Products of matrices, with sums in float32, of words (_words.h).

   Whoever includes this says, beside what those need, of how many ROWS of a result the sums stay in registers, REGISTERS
   of each. */

#ifndef KSM_EDGE_PRODUCTS_H
#define KSM_EDGE_PRODUCTS_H

#include "_words.h"

enum { LINE = 16 }; /* floats that memory is read by */

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
    float tile[ROWS * PANEL]; /* what is behind the last column goes nowhere */
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

/* A column that is alone behind the last panel, as of 49 or 25 pixels in panels of 24: of the left side a register holds
   several words of a row, or of several rows one. */
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
INLINE void expect_left(const Product *p, const Part *part, int64_t row)
{
    if (p->turned && left_is_in_place(p, TERMS) && row % LINE == 0 && row + LINE < p->rows)
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
            expect_left(p, part, row);
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

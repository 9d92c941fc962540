/* Products of rows with a matrix of weights, both in the order in which the inner loop reads them.
 *
 * A matrix is kept as panels: a panel has COLUMNS neighbouring columns over all inputs, one input after the other. In
 * bfloat16 it is read at half the bytes and widened in registers, so the arithmetic is float32 either way. On Xeons with
 * AMX bfloat16 panels have another layout, see amx.h.
 *
 * Rows are packed in blocks of INPUT_BLOCK inputs: block after block, in each row after row. An output is summed up by one
 * thread, input after input, so it does not depend on other rows, on other columns, or on the number of threads.
 */
#pragma once

#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#define INPUT_BLOCK 512                /* of a panel: stays in the first two caches while rows pass by */
#define ROW_STRIDE (INPUT_BLOCK + 16) /* floats from row to row: a power of two would map all rows to the same cache lines */
#define WIDEN_FROM_TILES 12            /* from so many tiles on it is cheaper to widen a bfloat16 panel once for all of them */

/* Rows as products read them. */
typedef struct {
    char *data;
    int rows, inputs;
    int tile_rows; /* rows that AMX multiplies at once; 0 where the rows are packed as float32 */
} PackedRows;

/* A thread's own memory for products. */
typedef struct {
    float widened[INPUT_BLOCK * COLUMNS] __attribute__((aligned(64)));
} ProductScratch;

#if defined(WITH_AMX)
#include "amx.h"
#endif

static inline int panel_columns(int bfloat16) {
#if defined(WITH_AMX)
    if (bfloat16) return AMX_COLUMNS;
#endif
    (void)bfloat16;
    return COLUMNS;
}

static inline size_t panel_bytes(int inputs, int bfloat16) {
#if defined(WITH_AMX)
    if (bfloat16) return amx_padded(inputs) * AMX_COLUMNS * 2;
#endif
    return (size_t)inputs * COLUMNS * (bfloat16 ? 2 : 4);
}

/* ---- Packing. ---- */

/* One panel from the weights of its columns, (outputs, inputs) as checkpoints have them. Columns from `outputs` on are zero.
 *
 * A row of a bfloat16 panel has its columns in the order 0, LANES, 1, LANES + 1, ...: a shift and a mask separate them. */
static void prepack_panel(const void *weights, int inputs, int outputs, int bfloat16, void *panel) {
#if defined(WITH_AMX)
    if (bfloat16) {
        amx_prepack_panel(weights, inputs, outputs, panel);
        return;
    }
#endif
    for (int column = 0; column < COLUMNS; column++) {
        const size_t start = (size_t)column * inputs;
        const int exists = column < outputs;
        if (bfloat16) {
            const uint16_t *from = (const uint16_t *)weights + start;
            uint16_t *to = (uint16_t *)panel + column % LANES * 2 + column / LANES;
            for (int i = 0; i < inputs; i++) to[(size_t)i * COLUMNS] = exists ? from[i] : 0;
        } else {
            const uint32_t *from = (const uint32_t *)weights + start;
            uint32_t *to = (uint32_t *)panel + column;
            for (int i = 0; i < inputs; i++) to[(size_t)i * COLUMNS] = exists ? from[i] : 0;
        }
    }
}

static size_t packed_rows_bytes(int rows, int inputs, int tile_rows) {
#if defined(WITH_AMX)
    if (tile_rows) return amx_rows_bytes(rows, inputs, tile_rows);
#endif
    (void)tile_rows;
    return (size_t)ceil_div(inputs, INPUT_BLOCK) * rows * ROW_STRIDE * sizeof(float);
}

/* Put `count` numbers of a row in their place, the first of them at input `first`. */
static void pack_run(const PackedRows *to, int row, int first, int count, const float *values) {
#if defined(WITH_AMX)
    if (to->tile_rows) {
        amx_pack_run((uint16_t *)to->data, to->rows, to->tile_rows, row, first, count, values);
        return;
    }
#endif
    while (count > 0) {
        const int inside = first % INPUT_BLOCK, run = min_int(count, INPUT_BLOCK - inside);
        float *block = (float *)to->data + (size_t)(first / INPUT_BLOCK) * to->rows * ROW_STRIDE;
        memcpy(block + (size_t)row * ROW_STRIDE + inside, values, run * sizeof(float));
        first += run, values += run, count -= run;
    }
}

/* ---- Multiplying. ---- */

/* One input's weights for all columns of a panel. */
ALWAYS_INLINE void load_weights(const char *at, int bfloat16, Vector *low, Vector *high) {
    if (bfloat16) {
        Bits both = *(const LooseBits *)at;
        *low = (Vector)(both << 16), *high = (Vector)(both & 0xffff0000);
    } else {
        *low = *(const LooseVector *)at, *high = *(const LooseVector *)(at + sizeof(Vector));
    }
}

/* One tile of a product: `rows`, a constant once inlined, of packed x times the columns of a panel. It is added to c where
 * `accumulate`. Meanwhile memory at `next` is fetched into a cache, `step` bytes for each input. */
ALWAYS_INLINE void multiply_tile(const int rows, const int bfloat16, const float *x, const char *panel, int inputs,
                                 int accumulate, float *c, size_t ldc, const char *next, size_t step) {
    Vector low[TILE_ROWS], high[TILE_ROWS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        low[r] = accumulate ? *(LooseVector *)(c + r * ldc) : (Vector){0};
        high[r] = accumulate ? *(LooseVector *)(c + r * ldc + LANES) : (Vector){0};
    }
    const int bytes = bfloat16 ? COLUMNS * 2 : COLUMNS * 4;
    for (int i = 0; i < inputs; i++, panel += bytes, next += step) {
        Vector left, right;
        load_weights(panel, bfloat16, &left, &right);
        for (int line = 0; line < bytes; line += 64) __builtin_prefetch(next + line, 0, 2);
        UNROLL
        for (int r = 0; r < rows; r++) low[r] += x[r * ROW_STRIDE + i] * left, high[r] += x[r * ROW_STRIDE + i] * right;
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        *(LooseVector *)(c + r * ldc) = low[r];
        *(LooseVector *)(c + r * ldc + LANES) = high[r];
    }
}

ALWAYS_INLINE void multiply_tile_of(int rows, const int bfloat16, const float *x, const char *panel, int inputs,
                                    int accumulate, float *c, size_t ldc, const char *next, size_t step) {
    switch (rows) {
#define CASE(ROWS)                                                                               \
    case ROWS:                                                                                   \
        multiply_tile(ROWS, bfloat16, x, panel, inputs, accumulate, c, ldc, next, step);         \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if TILE_ROWS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#if TILE_ROWS > 12
        CASE(13) CASE(14)
#endif
#undef CASE
    }
}

static void multiply_float32(int rows, const float *x, const char *panel, int inputs, int accumulate, float *c, size_t ldc,
                             const char *next, size_t step) {
    multiply_tile_of(rows, 0, x, panel, inputs, accumulate, c, ldc, next, step);
}

static void multiply_bfloat16(int rows, const float *x, const char *panel, int inputs, int accumulate, float *c, size_t ldc,
                              const char *next, size_t step) {
    multiply_tile_of(rows, 1, x, panel, inputs, accumulate, c, ldc, next, step);
}

/* `rows` packed rows times one panel's part of `inputs`, in tiles of nearly equal height. */
static void multiply_panel(const float *x, int rows, const char *panel, int bfloat16, int inputs, int accumulate, float *c,
                           size_t ldc, const char *next, ProductScratch *scratch) {
    const int tiles = ceil_div(rows, TILE_ROWS);
    const size_t step = (size_t)(bfloat16 ? 2 : 4) * COLUMNS / tiles;
    if (bfloat16 && tiles >= WIDEN_FROM_TILES) {
        for (int i = 0; i < inputs; i++) {
            Vector *to = (Vector *)(scratch->widened + (size_t)i * COLUMNS);
            load_weights(panel + (size_t)i * COLUMNS * 2, 1, to, to + 1);
        }
        panel = (const char *)scratch->widened, bfloat16 = 0;
    }
    for (int t = 0, done = 0; t < tiles; t++) {
        const int height = (rows - done) / (tiles - t);
        (bfloat16 ? multiply_bfloat16 : multiply_float32)(height, x + (size_t)done * ROW_STRIDE, panel, inputs, accumulate,
                                                          c + done * ldc, ldc, next, step);
        next += step * inputs, done += height;
    }
}

/* `rows` of x, from `first` on, times `count` panels, the first of which is `panel`: (rows, count * columns) into c, whose
 * rows are `ldc` apart. With AMX `first` and `rows` are multiples of x's tile_rows. */
static void multiply_panels(const PackedRows *x, int first, int rows, const char *panel, int count, int bfloat16, float *c,
                            size_t ldc, ProductScratch *scratch) {
#if defined(WITH_AMX)
    if (x->tile_rows) {
        amx_multiply_panels((const uint16_t *)x->data, x->rows, x->inputs, x->tile_rows, first, rows, panel, count, c, ldc);
        return;
    }
#endif
    const size_t bytes = panel_bytes(x->inputs, bfloat16), input_bytes = (bfloat16 ? 2 : 4) * COLUMNS;
    for (int input = 0; input < x->inputs; input += INPUT_BLOCK) {
        const int inputs = min_int(x->inputs - input, INPUT_BLOCK);
        const float *block = (const float *)x->data + ((size_t)(input / INPUT_BLOCK) * x->rows + first) * ROW_STRIDE;
        const char *part = panel + input * input_bytes;
        for (int i = 0; i < count; i++, part += bytes)
            multiply_panel(block, rows, part, bfloat16, inputs, input > 0, c + (size_t)i * COLUMNS, ldc, part + bytes, scratch);
    }
}

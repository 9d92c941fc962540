/* Products x @ W with a W that was laid out once, when the model was loaded, in the order in which they read it.
 *
 * A BLAS copies W into panels of its own in each call, which takes half of the time for a prompt of a dozen tokens. Here
 * panels are how W is kept: as many neighbouring columns as two vectors hold (panels_amx.h: 64), over all inputs, one
 * after the other. In bfloat16 they are read at half the bytes and widened in registers, so the arithmetic is float32 all the same.
 *
 * MLX has no way to call us. So this library stands before the BLAS: its cblas_sgemm takes the products whose W is marked
 * as panels, or as an operation of panels_layer.h, and gives every other to the BLAS that it stands before.
 * encoder/qwen3/cpu/panels_library.py loads it, encoder/qwen3/cpu/panels.py fills it. Compiled once for each instruction set (setup.py); the
 * vectors are GCC's and Clang's.
 *
 * Letters: x is m by k, W is k by n, the product is m by n; all row-major.
 */
#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define MOST_ROWS 14 /* times two vectors: what the registers hold beside a row of the panel and a number of x */
#elif defined(__AVX2__)
#define LANES 8
#define MOST_ROWS 6
#else
#define LANES 4
#define MOST_ROWS 12
#endif
#define COLUMNS (2 * LANES) /* of a panel */

#if defined(__AMX_BF16__) || defined(__AMXBF16__) /* the second is what Clang called it at first */
#define WITH_AMX
#endif

#define INPUTS_AT_ONCE 512 /* a panel's part that stays in the first two caches while all rows of x pass by */
#define ROWS_AT_ONCE 512   /* of x, copied: 1 MiB, for the second cache */
#define APART (INPUTS_AT_ONCE + 16) /* copied rows: a power of two would put all of them on the same places of a cache */
#define WIDEN_FROM 12      /* tiles that share a bfloat16 panel, for which it is cheaper to widen it once */

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef float LooseVector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t LooseBits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef void Sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float *a,
                   int lda, const float *b, int ldb, float beta, float *c, int ldc);

Sgemm *panels_next; /* the BLAS that this library stands before */

/* ---- What is laid out: it says so itself, in the bytes before its first panel. ---- */

#define MARK 0x736c656e61702121u
#define PAGE 4096 /* or a multiple of it */

/* Whoever has an array of MLX that starts where panels once started overwrites `mark`, for MLX keeps an array's size there. */
typedef struct {
    const void *self;
    int32_t inputs, outputs, kind, unused;
    uint64_t mark;
} Header;

enum { FLOAT32, BFLOAT16, MLP, ATTENTION }; /* kinds: a matrix as panels, or an operation of panels_layer.h */

/* Of the panels that start at an address; NULL where something else does. No panel starts with a page, so that no page is
 * read that may not be there. */
static const Header *header_of(const void *address) {
    if ((uintptr_t)address % 64 || (uintptr_t)address % PAGE == 0) return NULL;
    const Header *header = (const Header *)address - 1;
    return header->mark == MARK && header->self == address ? header : NULL;
}

/* How many bytes before `memory` can be panels' first: room for the header, and the start of a cache line. */
int panels_offset(const void *memory) {
    uintptr_t start = ((uintptr_t)memory + sizeof(Header) + 63) / 64 * 64;
    return (int)(start + (start % PAGE ? 0 : 64) - (uintptr_t)memory);
}

void panels_mark(void *marked, int inputs, int outputs, int kind) {
    *((Header *)marked - 1) = (Header){marked, inputs, outputs, kind, 0, MARK};
}

static int least(int a, int b) { return a < b ? a : b; }

/* How many of `rows`, of which some are `done`, the next of `count` parts takes: all take as many as each other, or one
 * more. */
static int share(int rows, int done, int number, int count) { return (rows - done) / (count - number); }

#if defined(WITH_AMX)
#include "panels_amx.h"
#endif

/* ---- Laying out. ---- */

/* 0, or why this process may not use what the library was compiled for: an error number of the kernel. */
int panels_start(void) {
#if defined(WITH_AMX)
    return amx_start() ? errno : 0;
#else
    return 0;
#endif
}

/* Of a panel. */
int panels_columns(int bfloat16) {
#if defined(WITH_AMX)
    if (bfloat16) return AMX_COLUMNS;
#endif
    (void)bfloat16;
    return COLUMNS;
}

/* Of a panel. */
size_t panels_bytes(int inputs, int bfloat16) {
#if defined(WITH_AMX)
    if (bfloat16) return amx_padded(inputs) * AMX_COLUMNS * 2;
#endif
    return (size_t)inputs * COLUMNS * (bfloat16 ? 2 : 4);
}

/* One panel from the weights of its columns, (outputs, inputs) as checkpoints have them; columns beyond are zero.
 *
 * A row of a bfloat16 panel has its columns in the order 0, LANES, 1, LANES + 1, ...: a shift and a mask part them. */
void panels_lay(const void *weights, int inputs, int outputs, int bfloat16, void *panel) {
#if defined(WITH_AMX)
    if (bfloat16) {
        amx_lay(weights, inputs, outputs, panel);
        return;
    }
#endif
    for (int column = 0; column < COLUMNS; column++) {
        const size_t start = (size_t)column * inputs;
        const int there = column < outputs;
        if (bfloat16) {
            const uint16_t *from = (const uint16_t *)weights + start;
            uint16_t *to = (uint16_t *)panel + column % LANES * 2 + column / LANES;
            for (int i = 0; i < inputs; i++) to[(size_t)i * COLUMNS] = there ? from[i] : 0;
        } else {
            const uint32_t *from = (const uint32_t *)weights + start;
            uint32_t *to = (uint32_t *)panel + column;
            for (int i = 0; i < inputs; i++) to[(size_t)i * COLUMNS] = there ? from[i] : 0;
        }
    }
}

/* ---- Multiplying. ---- */

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define ALWAYS static inline __attribute__((always_inline))

/* A row of a panel. */
ALWAYS void load(const char *row, int bfloat16, Vector *low, Vector *high) {
    if (bfloat16) {
        Bits both = *(const LooseBits *)row;
        *low = (Vector)(both << 16), *high = (Vector)(both & 0xffff0000);
    } else {
        *low = *(const LooseVector *)row, *high = *(const LooseVector *)(row + sizeof(Vector));
    }
}

/* One tile of the product: `rows`, a constant once inlined, of copied x times the columns of a panel. Meanwhile memory at
 * `next` is fetched, `step` bytes for each input. */
ALWAYS void tile(const int rows, const int bfloat16, const float *x, const char *panel, int inputs, int more, float *c,
                 size_t ldc, const char *next, size_t step) {
    Vector low[MOST_ROWS], high[MOST_ROWS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        low[r] = more ? *(LooseVector *)(c + r * ldc) : (Vector){0};
        high[r] = more ? *(LooseVector *)(c + r * ldc + LANES) : (Vector){0};
    }
    const int bytes = bfloat16 ? COLUMNS * 2 : COLUMNS * 4;
    for (int i = 0; i < inputs; i++, panel += bytes, next += step) {
        Vector left, right;
        load(panel, bfloat16, &left, &right);
        for (int line = 0; line < bytes; line += 64) __builtin_prefetch(next + line, 0, 2);
        UNROLL
        for (int r = 0; r < rows; r++) low[r] += x[r * APART + i] * left, high[r] += x[r * APART + i] * right;
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        *(LooseVector *)(c + r * ldc) = low[r];
        *(LooseVector *)(c + r * ldc + LANES) = high[r];
    }
}

ALWAYS void tiles(int rows, const int bfloat16, const float *x, const char *panel, int inputs, int more, float *c,
                  size_t ldc, const char *next, size_t step) {
    switch (rows) {
#define CASE(ROWS) case ROWS: tile(ROWS, bfloat16, x, panel, inputs, more, c, ldc, next, step); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if MOST_ROWS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#if MOST_ROWS > 12
        CASE(13) CASE(14)
#endif
    }
}

static void tiles_float32(int rows, const float *x, const char *panel, int inputs, int more, float *c, size_t ldc,
                           const char *next, size_t step) {
    tiles(rows, 0, x, panel, inputs, more, c, ldc, next, step);
}

static void tiles_bfloat16(int rows, const float *x, const char *panel, int inputs, int more, float *c, size_t ldc,
                           const char *next, size_t step) {
    tiles(rows, 1, x, panel, inputs, more, c, ldc, next, step);
}

/* A thread's copy of a part of x, and of a part of a panel in float32. */
static _Thread_local float copied[ROWS_AT_ONCE * APART] __attribute__((aligned(64)));
static _Thread_local float widened[INPUTS_AT_ONCE * COLUMNS] __attribute__((aligned(64)));

static void widen(const char *panel, int inputs) {
    for (int i = 0; i < inputs; i++) {
        Vector *to = (Vector *)(widened + i * COLUMNS);
        load(panel + (size_t)i * COLUMNS * 2, 1, to, to + 1);
    }
}

/* Rows of x into `copied`. Their numbers are `row` apart from row to row, `step` within one. */
static void copy_rows(const float *x, size_t row, size_t step, int rows, int inputs) {
    for (int r = 0; r < rows; r++) {
        float *to = copied + r * APART;
        if (step == 1)
            memcpy(to, x + r * row, inputs * sizeof(float));
        else
            for (int i = 0; i < inputs; i++) to[i] = x[r * row + i * step];
    }
}

/* A panel's part, times the copied rows, into the columns of c; of the last panel only some may be there. */
static void panel_product(const char *panel, int bfloat16, int rows, int inputs, int tile_count, int more, int columns,
                          float *c, size_t ldc, const char *next) {
    const size_t step = (size_t)(bfloat16 ? 2 : 4) * COLUMNS / tile_count;
    if (bfloat16 && tile_count >= WIDEN_FROM) widen(panel, inputs), panel = (const char *)widened, bfloat16 = 0;
    const float *x = copied;
    for (int t = 0, done = 0; t < tile_count; t++) {
        int high = share(rows, done, t, tile_count);
        float part[MOST_ROWS * COLUMNS], *to = c + done * ldc;
        size_t apart = ldc;
        if (columns < COLUMNS) {
            for (int r = 0; more && r < high; r++)
                for (int j = 0; j < columns; j++) part[r * COLUMNS + j] = to[r * ldc + j];
            to = part, apart = COLUMNS;
        }
        (bfloat16 ? tiles_bfloat16 : tiles_float32)(high, x, panel, inputs, more, to, apart, next, step);
        next += step * inputs;
        if (columns < COLUMNS)
            for (int r = 0; r < high; r++)
                for (int j = 0; j < columns; j++) c[(done + r) * ldc + j] = part[r * COLUMNS + j];
        x += high * APART, done += high;
    }
}

/* The first n columns of x @ matrix. */
static void multiply(const Header *matrix, const float *x, size_t row, size_t step, int m, int n, float *c, size_t ldc) {
    const int k = matrix->inputs, bfloat16 = matrix->kind == BFLOAT16;
    const char *panels = matrix->self;
#if defined(WITH_AMX)
    if (bfloat16) {
        amx_multiply(panels, x, row, step, m, n, k, c, ldc);
        return;
    }
#endif
    const size_t bytes = (bfloat16 ? 2 : 4) * COLUMNS; /* of a panel's row */
    const int blocks = (m + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    for (int b = 0, top = 0, rows; b < blocks; b++, top += rows) {
        rows = share(m, top, b, blocks);
        const int tile_count = (rows + MOST_ROWS - 1) / MOST_ROWS;
        for (int first = 0; first < k; first += INPUTS_AT_ONCE) {
            const int inputs = least(k - first, INPUTS_AT_ONCE);
            copy_rows(x + top * row + first * step, row, step, rows, inputs);
            const char *panel = panels + first * bytes;
            for (int column = 0; column < n; column += COLUMNS, panel += k * bytes)
                panel_product(panel, bfloat16, rows, inputs, tile_count, first > 0, least(n - column, COLUMNS),
                              c + (size_t)top * ldc + column, ldc, panel + k * bytes);
        }
    }
}

#include "panels_layer.h"

/* ---- What MLX calls. ---- */

/* CBLAS's own. */
void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) {
    enum { ROW_MAJOR = 101, NO_TRANSPOSE = 111 };
    const Header *marked = header_of(b);
    if (marked == NULL) {
        panels_next(order, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return;
    }
    const int plain = transpose_a == NO_TRANSPOSE, is_matrix = marked->kind == FLOAT32 || marked->kind == BFLOAT16;
    if (order != ROW_MAJOR || transpose_b != NO_TRANSPOSE || alpha != 1 || beta != 0 || k != marked->inputs ||
        n != marked->outputs || (!plain && !is_matrix)) {
        fprintf(stderr, "encoder/qwen3/cpu/kernels/c/panels.c: what it laid out or marked as %d by %d was used as %d by %d in other than a "
                "plain product. Only encoder/qwen3/cpu/packed_panels.py may have it.\n", marked->inputs, marked->outputs, k, n);
        abort();
    }
    if (marked->kind == MLP)
        mlp(marked->self, a, lda, m, c, ldc);
    else if (marked->kind == ATTENTION)
        attention(marked->self, a, lda, m, c, ldc);
    else
        multiply(marked, a, plain ? lda : 1, plain ? 1 : lda, m, n, c, ldc);
}

/* Attention of the rows of a batch, prompt by prompt, without a matrix of scores and without masks.
 *
 * Keys and values of each head are packed as panels once. Then a tile of query rows after the other is normed, rotated,
 * scored against up to INPUT_BLOCK keys at a time, weighed by the softmax so far, and multiplied with the values.
 *
 * Letters: d head_dim, G query heads for each key-value head.
 */
#pragma once

#include "panels.h"
#include "rows.h"

#define QUERY_BLOCK 128 /* tokens of one task; a multiple of COLUMNS */

/* One prompt's rows. Those from `start` to `stop` are its tokens, which see the tokens from `start` up to themselves. Those
 * from `live` to `live_stop` are padding rows that are wanted: they see all tokens, and nobody sees them. */
typedef struct {
    int32_t start, stop, live, live_stop;
} Span;

/* Query rows of one span, for one task. */
typedef struct {
    int span, first, rows, is_live;
} QueryBlock;

/* What the attention of one layer reads and writes. */
typedef struct {
    int heads, kv_heads, head_dim;
    float epsilon;
    const float *q_norm, *k_norm; /* (d,); q's has the factor of the scores, in log2 */
    const Span *spans;
    Rope rope;        /* of all rows */
    const float *qkv; /* (rows, qkv_width): all query heads, then all key heads from k on, then all value heads from v on */
    size_t qkv_width, k, v;
    float *keys, *values;        /* panels of all spans and heads */
    const size_t *span_keys;     /* of each span, tokens (rounded up to whole panels) of all spans before it */
    const size_t *span_values;   /* the same, not rounded up */
} Attention;

/* A thread's own memory for attention. */
typedef struct {
    float queries[TILE_ROWS * ROW_STRIDE], scores[TILE_ROWS * ROW_STRIDE];
    float sums[TILE_ROWS * INPUT_BLOCK];
    float head[INPUT_BLOCK];
} AttentionScratch;

static int padded_columns(int count) { return round_up(count, COLUMNS); }

/* Panels (tokens / COLUMNS, d, COLUMNS) of one span's keys for one head. */
static float *keys_of(const Attention *a, int span, int head) {
    const int tokens = padded_columns(a->spans[span].stop - a->spans[span].start);
    return a->keys + (a->span_keys[span] * a->kv_heads + (size_t)tokens * head) * a->head_dim;
}

/* Panels (d / COLUMNS, tokens, COLUMNS) of one span's values for one head. */
static float *values_of(const Attention *a, int span, int head) {
    const int tokens = a->spans[span].stop - a->spans[span].start;
    return a->values + (a->span_values[span] * a->kv_heads + (size_t)tokens * head) * padded_columns(a->head_dim);
}

/* Norm, rotate and pack the keys, and pack the values, of a block of tokens for one key-value head. */
static void pack_keys_values(const Attention *a, QueryBlock block, int head, AttentionScratch *scratch) {
    const int d = a->head_dim, tokens = a->spans[block.span].stop - a->spans[block.span].start;
    float *keys = keys_of(a, block.span, head), *values = values_of(a, block.span, head), *key = scratch->head;
    for (int row = block.first; row < block.first + block.rows; row++) {
        const int token = row - a->spans[block.span].start;
        const float *of_row = a->qkv + row * a->qkv_width + (size_t)head * d;
        norm_and_rotate(of_row + a->k, a->k_norm, rope_from(a->rope, row, d), d, a->epsilon, key);
        float *column = keys + (size_t)(token - token % COLUMNS) * d + token % COLUMNS;
        for (int i = 0; i < d; i++) column[(size_t)i * COLUMNS] = key[i];
        for (int i = 0; i < d; i += COLUMNS) {
            float *value = values + ((size_t)i / COLUMNS * tokens + token) * COLUMNS;
            const int numbers = min_int(d - i, COLUMNS);
            memcpy(value, of_row + a->v + i, numbers * sizeof(float));
            memset(value + numbers, 0, (COLUMNS - numbers) * sizeof(float));
        }
    }
}

/* One tile of `rows` query rows against all keys that they may see. `visible` says how many keys each sees, in ascending
 * order. Leaves weighted sums of values in scratch->sums and the sums of the weights in `total`. */
static void attend_tile(const Attention *a, const float *keys, const float *values, int tokens, int rows,
                        const int *visible, float *total, AttentionScratch *scratch) {
    const int d = a->head_dim, width = padded_columns(d);
    float max_score[TILE_ROWS];
    for (int r = 0; r < rows; r++) max_score[r] = -INFINITY, total[r] = 0;
    for (int first = 0; first < visible[rows - 1]; first += INPUT_BLOCK) {
        const int count = min_int(visible[rows - 1] - first, INPUT_BLOCK);
        for (int key = 0; key < count; key += COLUMNS) {
            const char *panel = (const char *)(keys + (size_t)(first + key) * d);
            multiply_float32(rows, scratch->queries, panel, d, 0, scratch->scores + key, ROW_STRIDE, panel, 0);
        }
        for (int r = 0; r < rows; r++) {
            const int seen = max_int(0, min_int(visible[r] - first, count));
            const float factor = softmax_step(scratch->scores + r * ROW_STRIDE, seen, count, max_score + r, total + r);
            for (int i = 0; first > 0 && i < width; i++) scratch->sums[r * INPUT_BLOCK + i] *= factor;
        }
        for (int column = 0; column < d; column += COLUMNS) {
            const char *panel = (const char *)(values + (size_t)column * tokens + (size_t)first * COLUMNS);
            multiply_float32(rows, scratch->scores, panel, count, first > 0, scratch->sums + column, INPUT_BLOCK, panel, 0);
        }
    }
}

/* What the query heads of one key-value head see, for a block of rows, packed into `to`. */
static void attend(const Attention *a, QueryBlock block, int head, const PackedRows *to, AttentionScratch *scratch) {
    const Span *span = a->spans + block.span;
    const int d = a->head_dim, groups = a->heads / a->kv_heads, tokens = span->stop - span->start;
    const float *keys = keys_of(a, block.span, head), *values = values_of(a, block.span, head);
    for (int done = 0, rows; done < block.rows * groups; done += rows) {
        rows = min_int(block.rows * groups - done, TILE_ROWS);
        int visible[TILE_ROWS];
        float total[TILE_ROWS];
        for (int r = 0; r < rows; r++) {
            const int row = block.first + (done + r) / groups, query_head = head * groups + (done + r) % groups;
            visible[r] = block.is_live ? tokens : row - span->start + 1;
            norm_and_rotate(a->qkv + row * a->qkv_width + (size_t)query_head * d, a->q_norm, rope_from(a->rope, row, d), d,
                            a->epsilon, scratch->queries + r * ROW_STRIDE);
        }
        attend_tile(a, keys, values, tokens, rows, visible, total, scratch);
        for (int r = 0; r < rows; r++) {
            const int row = block.first + (done + r) / groups, query_head = head * groups + (done + r) % groups;
            for (int i = 0; i < d; i++) scratch->head[i] = visible[r] ? scratch->sums[r * INPUT_BLOCK + i] / total[r] : 0;
            pack_run(to, row, query_head * d, d, scratch->head);
        }
    }
}

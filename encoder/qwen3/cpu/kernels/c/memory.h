/* The memory of a pass, from the first allocation to the last. */
#pragma once

#include "stages.h"

#define MLP_ROWS 128 /* rows that pass from gate and up to down together */

#define MAX_BUFFERS (12 + MAX_THREADS)

typedef struct {
    void *buffers[MAX_BUFFERS];
    int count, failed;
} Memory;

static void *allocate(Memory *memory, size_t bytes) {
    void *buffer = NULL;
    if (posix_memalign(&buffer, 64, bytes ? bytes : 1)) {
        memory->failed = 1;
        return NULL;
    }
    return memory->buffers[memory->count++] = buffer;
}

static void free_all(Memory *memory) {
    for (int i = 0; i < memory->count; i++) free(memory->buffers[i]);
}

static PackedRows allocate_rows(Memory *memory, int rows, int inputs, int tile_rows) {
    const size_t bytes = packed_rows_bytes(rows, inputs, tile_rows);
    PackedRows packed = {allocate(memory, bytes), rows, inputs, tile_rows};
    if (tile_rows && packed.data != NULL) memset(packed.data, 0, bytes); /* AMX reads inputs and rows that are filled up */
    return packed;
}

static Scratch *allocate_scratch(Memory *memory, int hidden_size) {
    return allocate(memory, sizeof(Scratch) + (size_t)hidden_size * sizeof(float));
}

/* The blocks of queries: tokens of all spans, then live rows of all spans. */
static void list_blocks(Pass *pass) {
    const Batch *batch = pass->batch;
    for (int is_live = 0; is_live < 2; is_live++) {
        for (int s = 0; s < batch->span_count; s++) {
            const int first = is_live ? batch->spans[s].live : batch->spans[s].start;
            const int stop = is_live ? batch->spans[s].live_stop : batch->spans[s].stop;
            for (int row = first; row < stop; row += QUERY_BLOCK)
                pass->blocks[pass->block_count++] = (QueryBlock){s, row, min_int(stop - row, QUERY_BLOCK), is_live};
        }
        if (!is_live) pass->token_block_count = pass->block_count;
    }
}

/* Rows that AMX multiplies at once, about as many in each tile of a batch; 0 without AMX. */
static int choose_tile_rows(int rows, int bfloat16) {
#if defined(WITH_AMX)
    if (bfloat16) return ceil_div(rows, max_int(1, ceil_div(rows, AMX_TILE_ROWS)));
#endif
    (void)rows, (void)bfloat16;
    return 0;
}

static void allocate_pass(Pass *pass, Memory *memory, int threads) {
    const Dims *dims = &pass->dims;
    const Batch *batch = pass->batch;
    const int columns = panel_columns(dims->bfloat16), tile_rows = choose_tile_rows(batch->rows, dims->bfloat16);
    const int tile = max_int(1, tile_rows), d = dims->head_dim;
    pass->normed = allocate_rows(memory, batch->rows, dims->hidden_size, tile_rows);
    pass->attended = allocate_rows(memory, batch->rows, dims->heads * d, tile_rows);
    pass->gated = allocate_rows(memory, equal_block(batch->rows, MLP_ROWS, tile), dims->intermediate_size, tile_rows);

    const size_t q_width = round_up(dims->heads * d, columns), kv_width = round_up(dims->kv_heads * d, columns);
    const size_t width = q_width + 2 * kv_width;
    pass->qkv = allocate(memory, width * round_up(batch->rows, tile) * sizeof(float));
    size_t *span_keys = allocate(memory, (2 * (size_t)batch->span_count + 1) * sizeof(size_t));
    size_t keys = 0, values = 0, blocks = 0;
    for (int s = 0; s < batch->span_count && span_keys != NULL; s++) {
        const Span span = batch->spans[s];
        span_keys[s] = keys, span_keys[batch->span_count + s] = values;
        keys += padded_columns(span.stop - span.start), values += span.stop - span.start;
        blocks += ceil_div(span.stop - span.start, QUERY_BLOCK) + ceil_div(span.live_stop - span.live, QUERY_BLOCK);
    }
    pass->attention = (Attention){
        .heads = dims->heads,
        .kv_heads = dims->kv_heads,
        .head_dim = d,
        .epsilon = dims->rms_norm_eps,
        .spans = batch->spans,
        .rope = {batch->cos, batch->sin},
        .qkv = pass->qkv,
        .qkv_width = width,
        .k = q_width,
        .v = q_width + kv_width,
        .keys = allocate(memory, keys * dims->kv_heads * d * sizeof(float)),
        .values = allocate(memory, values * dims->kv_heads * padded_columns(d) * sizeof(float)),
        .span_keys = span_keys,
        .span_values = span_keys == NULL ? NULL : span_keys + batch->span_count,
    };
    pass->blocks = allocate(memory, blocks * sizeof(QueryBlock));
    pass->scratch = allocate(memory, threads * sizeof(Scratch *));
    for (int i = 0; i < threads && !memory->failed; i++) pass->scratch[i] = allocate_scratch(memory, dims->hidden_size);
    if (!memory->failed) list_blocks(pass);
}

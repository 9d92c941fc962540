/* The stages of a layer, and how each is cut into tasks.
 *
 * Letters: T rows, D hidden_size, H heads, K key-value heads, d head_dim, M intermediate_size.
 */
#pragma once

#include "attention.h"
#include "panels.h"
#include "rows.h"
#include "team.h"

#define ROW_BLOCK 128              /* rows of a product that one task computes: their inputs stay in the second cache */
#define TASK_NUMBERS (ROW_BLOCK * 256) /* outputs of one task, at most */
#define TASKS_PER_THREAD 6         /* at least, where there are so many panels: what one thread is late, others take over */

typedef struct {
    int32_t hidden_size, intermediate_size, heads, kv_heads, head_dim;
    int32_t bfloat16; /* whether matrices are bfloat16, else float32 */
    float rms_norm_eps;
} Dims;

/* The weights of a layer. Matrices are prepacked, see qwen3_prepack. */
typedef struct {
    const void *qkv;     /* panels of q, of k, of v, each filled up to whole panels */
    const void *o;       /* (H d, D) */
    const void *gate_up; /* panels of gate and of up in turns */
    const void *down;    /* (M, D) */
    const float *input_norm, *post_attention_norm; /* (D,) */
    const float *q_norm, *k_norm;                  /* (d,); q's has the factor of the scores, in log2 */
} Layer;

typedef struct {
    const Span *spans;
    const float *cos, *sin; /* (T, d / 2) */
    int32_t span_count, rows, token_rows; /* of which token_rows come first and are tokens */
} Batch;

/* What all tasks of a pass share. */
typedef struct {
    Dims dims;
    const Layer *layer;
    const Batch *batch;
    float *x; /* (T, D) */
    PackedRows normed, attended, gated;
    float *qkv;
    Attention attention;
    QueryBlock *blocks; /* those of tokens first */
    int block_count, token_block_count;
    int mlp_first, mlp_rows; /* rows of the MLP's current turn */
    struct Scratch **scratch; /* of each thread */
    int threads;
    const float *norm; /* of the current norm stage */
} Pass;

typedef struct Scratch {
    ProductScratch product;
    AttentionScratch attention;
    float numbers[TASK_NUMBERS] __attribute__((aligned(64)));
    float row[]; /* D */
} Scratch;

/* ---- Tasks of a product: blocks of rows times chunks of panels. ---- */

typedef struct {
    int rows, block_rows, blocks;
    int panels, chunk, chunks;
} Grid;

typedef struct {
    int first_row, rows, first_panel, panels;
} Part;

/* Blocks of nearly equal size, each a multiple of `multiple` and about `limit` at most. */
static int equal_block(int rows, int limit, int multiple) {
    return round_up(ceil_div(rows, max_int(1, ceil_div(rows, limit))), multiple);
}

/* `unit` panels in a row always go to the same task. */
static Grid make_grid(const PackedRows *x, int rows, int panels, int unit, int columns, int threads) {
    const int tile = max_int(1, x->tile_rows), all_rows = round_up(rows, tile);
    Grid grid = {.rows = all_rows, .panels = panels};
    grid.block_rows = max_int(tile, equal_block(all_rows, ROW_BLOCK / tile * tile, tile));
    grid.blocks = ceil_div(all_rows, grid.block_rows);
    const int fair = (int)((int64_t)panels * grid.blocks / ((int64_t)TASKS_PER_THREAD * threads));
    const int limit = TASK_NUMBERS / (grid.block_rows * columns);
    grid.chunk = max_int(1, min_int(fair, limit) / unit) * unit;
    grid.chunks = ceil_div(panels, grid.chunk);
    return grid;
}

static int task_count(const Grid *grid) { return grid->blocks * grid->chunks; }

static Part part_of(const Grid *grid, int index) {
    const int block = index / grid->chunks, chunk = index % grid->chunks;
    const int row = block * grid->block_rows, panel = chunk * grid->chunk;
    return (Part){row, min_int(grid->rows - row, grid->block_rows), panel, min_int(grid->panels - panel, grid->chunk)};
}

static const char *panel_at(const void *matrix, int inputs, int bfloat16, int panel) {
    return (const char *)matrix + (size_t)panel * panel_bytes(inputs, bfloat16);
}

/* ---- The stages of a layer. ---- */

static void norm_task(const void *stage, int row, int thread) {
    const Pass *pass = stage;
    const int size = pass->dims.hidden_size;
    float *normed = pass->scratch[thread]->row;
    rms_norm(pass->x + (size_t)row * size, pass->norm, size, pass->dims.rms_norm_eps, normed);
    pack_run(&pass->normed, row, 0, size, normed);
}

typedef struct {
    const Pass *pass;
    const void *matrix;
    Grid grid;
    Grid kv_grid; /* of the q, k, v stage alone: k and v, for tokens only; its panels follow those of `grid` */
} ProductStage;

static void qkv_task(const void *argument, int index, int thread) {
    const ProductStage *stage = argument;
    const Pass *pass = stage->pass;
    const int bfloat16 = pass->dims.bfloat16, columns = panel_columns(bfloat16), q_tasks = task_count(&stage->grid);
    Part part = index < q_tasks ? part_of(&stage->grid, index) : part_of(&stage->kv_grid, index - q_tasks);
    if (index >= q_tasks) part.first_panel += stage->grid.panels;
    multiply_panels(&pass->normed, part.first_row, part.rows,
                    panel_at(stage->matrix, pass->dims.hidden_size, bfloat16, part.first_panel), part.panels, bfloat16,
                    pass->qkv + part.first_row * pass->attention.qkv_width + (size_t)part.first_panel * columns,
                    pass->attention.qkv_width, &pass->scratch[thread]->product);
}

static void pack_keys_values_task(const void *stage, int index, int thread) {
    const Pass *pass = stage;
    pack_keys_values(&pass->attention, pass->blocks[index / pass->dims.kv_heads], index % pass->dims.kv_heads,
                     &pass->scratch[thread]->attention);
}

static void attend_task(const void *stage, int index, int thread) {
    const Pass *pass = stage;
    attend(&pass->attention, pass->blocks[index / pass->dims.kv_heads], index % pass->dims.kv_heads, &pass->attended,
           &pass->scratch[thread]->attention);
}

/* What a part of `rows` times `matrix` is, added to the columns of x. */
static void add_product(const Pass *pass, const PackedRows *rows, int x_row, int x_rows, const void *matrix, Part part,
                        int thread) {
    const int bfloat16 = pass->dims.bfloat16, columns = panel_columns(bfloat16), size = pass->dims.hidden_size;
    Scratch *scratch = pass->scratch[thread];
    const int width = part.panels * columns, first = part.first_panel * columns, count = min_int(width, size - first);
    multiply_panels(rows, part.first_row, part.rows, panel_at(matrix, rows->inputs, bfloat16, part.first_panel), part.panels,
                    bfloat16, scratch->numbers, width, &scratch->product);
    for (int r = 0; r < min_int(part.rows, x_rows - part.first_row); r++) {
        float *to = pass->x + (size_t)(x_row + part.first_row + r) * size + first;
        const float *numbers = scratch->numbers + (size_t)r * width;
        for (int i = 0; i < count; i++) to[i] += numbers[i];
    }
}

static void o_task(const void *argument, int index, int thread) {
    const ProductStage *stage = argument;
    const Pass *pass = stage->pass;
    add_product(pass, &pass->attended, 0, pass->batch->rows, stage->matrix, part_of(&stage->grid, index), thread);
}

static void down_task(const void *argument, int index, int thread) {
    const ProductStage *stage = argument;
    const Pass *pass = stage->pass;
    add_product(pass, &pass->gated, pass->mlp_first, pass->mlp_rows, stage->matrix, part_of(&stage->grid, index), thread);
}

static void gate_up_task(const void *argument, int index, int thread) {
    const ProductStage *stage = argument;
    const Pass *pass = stage->pass;
    const int bfloat16 = pass->dims.bfloat16, columns = panel_columns(bfloat16), size = pass->dims.intermediate_size;
    const Part part = part_of(&stage->grid, index);
    Scratch *scratch = pass->scratch[thread];
    const int width = part.panels * columns;
    multiply_panels(&pass->normed, pass->mlp_first + part.first_row, part.rows,
                    panel_at(stage->matrix, pass->dims.hidden_size, bfloat16, part.first_panel), part.panels, bfloat16,
                    scratch->numbers, width, &scratch->product);
    for (int r = 0; r < min_int(part.rows, pass->mlp_rows - part.first_row); r++)
        for (int panel = 0; panel < part.panels; panel += 2) {
            const int first = (part.first_panel + panel) / 2 * columns, count = min_int(columns, size - first);
            float *gate = scratch->numbers + (size_t)r * width + (size_t)panel * columns;
            swiglu(gate, gate + columns, count);
            pack_run(&pass->gated, part.first_row + r, first, count, gate);
        }
}

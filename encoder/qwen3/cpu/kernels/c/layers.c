/* Decoder layers of a Qwen3 on a CPU: rows in, rows out, in place, on as many threads as asked for.
 *
 * The rows of all prompts of a batch stand one after the other, without padding: first all tokens, then the padding rows
 * that are wanted. A layer is eight stages, each of many tasks that the threads share (team.h):
 *
 *     norm -> q, k, v -> pack keys and values -> attention -> o -> norm -> gate, up, SwiGLU -> down
 *
 * A number is always computed by one thread, in one order, so results do not depend on the number of threads, bit for bit.
 * Compiled once for each instruction set (setup.py) and called by encoder/qwen3/cpu/kernels/library.py. Structures here and
 * there have the same fields.
 *
 * Letters: T rows, D hidden_size, H heads, K key-value heads, d head_dim, M intermediate_size.
 */
#include "attention.h"
#include "panels.h"
#include "rows.h"
#include "team.h"

#define ROW_BLOCK 128              /* rows of a product that one task computes: their inputs stay in the second cache */
#define MLP_ROWS 128               /* rows that pass from gate and up to down together */
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

/* ---- A pass. ---- */

typedef struct {
    Pass pass;
    const Layer *layers;
    int layer_count;
} Job;

static void run_product(Member *me, const Pass *pass, void (*task)(const void *, int, int), const PackedRows *x, int rows,
                        const void *matrix, int panels, int unit) {
    const int columns = panel_columns(pass->dims.bfloat16);
    const ProductStage stage = {pass, matrix, make_grid(x, rows, panels, unit, columns, pass->threads), {0}};
    run_stage(me, task, &stage, task_count(&stage.grid));
}

static void run_attention(Member *me, Pass *pass) {
    const Dims *dims = &pass->dims;
    const Layer *layer = pass->layer;
    const Batch *batch = pass->batch;
    const int columns = panel_columns(dims->bfloat16);
    const int q_panels = ceil_div(dims->heads * dims->head_dim, columns);
    const int kv_panels = 2 * ceil_div(dims->kv_heads * dims->head_dim, columns);
    pass->norm = layer->input_norm;
    run_stage(me, norm_task, pass, batch->rows);
    const ProductStage qkv = {pass, layer->qkv, make_grid(&pass->normed, batch->rows, q_panels, 1, columns, pass->threads),
                              make_grid(&pass->normed, batch->token_rows, kv_panels, 1, columns, pass->threads)};
    run_stage(me, qkv_task, &qkv, task_count(&qkv.grid) + task_count(&qkv.kv_grid));
    pass->attention.q_norm = layer->q_norm, pass->attention.k_norm = layer->k_norm;
    run_stage(me, pack_keys_values_task, pass, pass->token_block_count * dims->kv_heads);
    run_stage(me, attend_task, pass, pass->block_count * dims->kv_heads);
    run_product(me, pass, o_task, &pass->attended, batch->rows, layer->o, ceil_div(dims->hidden_size, columns), 1);
}

static void run_mlp(Member *me, Pass *pass) {
    const Dims *dims = &pass->dims;
    const Layer *layer = pass->layer;
    const int columns = panel_columns(dims->bfloat16), rows = pass->batch->rows;
    pass->norm = layer->post_attention_norm;
    run_stage(me, norm_task, pass, rows);
    const int turn = pass->gated.rows;
    for (int first = 0; first < rows; first += turn) {
        pass->mlp_first = first, pass->mlp_rows = min_int(turn, rows - first);
        run_product(me, pass, gate_up_task, &pass->normed, pass->mlp_rows, layer->gate_up,
                    2 * ceil_div(dims->intermediate_size, columns), 2);
        run_product(me, pass, down_task, &pass->gated, pass->mlp_rows, layer->down, ceil_div(dims->hidden_size, columns), 1);
    }
}

/* What every thread does: each has a copy of the pass, whose current layer and rows it keeps by itself. */
static void run_layers(Member *me, void *argument) {
    const Job *job = argument;
    Pass pass = job->pass;
    pass.threads = me->team->threads;
    for (int i = 0; i < job->layer_count; i++) {
        pass.layer = job->layers + i;
        run_attention(me, &pass);
        run_mlp(me, &pass);
    }
}

/* ---- Memory of a call. ---- */

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

/* How many rows AMX multiplies at once: all tiles of a batch are about as high. */
static int choose_tile_rows(int rows, int bfloat16) {
    if (!uses_amx(bfloat16)) return 0;
    return ceil_div(rows, ceil_div(rows, 16));
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

/* ---- What Python calls. ---- */

/* 0, or why this process may not use what the library was compiled for: an error number of the system. */
int qwen3_start(void) {
#if defined(WITH_AMX)
    return amx_start();
#else
    return 0;
#endif
}

int qwen3_panel_columns(int bfloat16) { return panel_columns(bfloat16); }

size_t qwen3_panel_bytes(int inputs, int bfloat16) { return panel_bytes(inputs, bfloat16); }

/* The largest head that the kernels have room for. */
int qwen3_max_head_dim(void) { return INPUT_BLOCK; }

typedef struct {
    const char *weights;
    char *panels;
    int inputs, outputs, bfloat16, step;
} Prepack;

static void prepack_task(const void *stage, int index, int thread) {
    const Prepack *p = stage;
    const int column = index * panel_columns(p->bfloat16);
    const char *weights = p->weights + (size_t)column * p->inputs * (p->bfloat16 ? 2 : 4);
    (void)thread;
    prepack_panel(weights, p->inputs, p->outputs - column, p->bfloat16,
                  p->panels + (size_t)index * p->step * panel_bytes(p->inputs, p->bfloat16));
}

static void run_prepack(Member *me, void *job) {
    const Prepack *p = job;
    run_stage(me, prepack_task, p, ceil_div(p->outputs, panel_columns(p->bfloat16)));
}

/* Write the panels of a matrix (outputs, inputs), each `step` panels after the one before. */
void qwen3_prepack(const void *weights, int inputs, int outputs, int bfloat16, void *panels, int step, int threads) {
    Prepack job = {weights, panels, inputs, outputs, bfloat16, step};
    run_team(threads, run_prepack, &job);
}

/* Run `count` layers over the rows x, (rows, hidden_size), in place. Returns 0, or ENOMEM; x is unchanged then. */
int qwen3_run_layers(const Dims *dims, const Layer *layers, int count, const Batch *batch, float *x, int threads) {
    Memory memory = {0};
    Job job = {.pass = {.dims = *dims, .batch = batch, .x = x}, .layers = layers, .layer_count = count};
    threads = max_int(1, min_int(threads, MAX_THREADS));
    allocate_pass(&job.pass, &memory, threads);
    if (!memory.failed) run_team(threads, run_layers, &job);
    free_all(&memory);
    return memory.failed ? ENOMEM : 0;
}

typedef struct {
    Pass pass;
    const void *matrix;
    int outputs;
    float *product;
} Multiply;

static void pack_task(const void *stage, int row, int thread) {
    const Multiply *m = stage;
    (void)thread;
    pack_run(&m->pass.normed, row, 0, m->pass.normed.inputs, m->pass.x + (size_t)row * m->pass.normed.inputs);
}

static void run_multiply(Member *me, void *argument) {
    Multiply *m = argument;
    Pass pass = m->pass;
    pass.threads = me->team->threads;
    pass.x = m->product; /* zeros, to which the product is added */
    run_stage(me, pack_task, m, m->pass.normed.rows);
    const int columns = panel_columns(pass.dims.bfloat16);
    run_product(me, &pass, o_task, &pass.attended, m->pass.normed.rows, m->matrix, ceil_div(m->outputs, columns), 1);
}

/* product += x @ matrix, (rows, outputs) and (rows, inputs): one product of the pass by itself. Returns 0, or ENOMEM. */
int qwen3_multiply(const void *panels, int inputs, int outputs, int bfloat16, const float *x, int rows, float *product,
                   int threads) {
    Memory memory = {0};
    const Batch batch = {.rows = rows};
    Multiply job = {{.dims = {.hidden_size = outputs, .bfloat16 = bfloat16}, .batch = &batch, .x = (float *)x}, panels, outputs,
                    product};
    threads = max_int(1, min_int(threads, MAX_THREADS));
    job.pass.normed = job.pass.attended = allocate_rows(&memory, rows, inputs, choose_tile_rows(rows, bfloat16));
    job.pass.scratch = allocate(&memory, threads * sizeof(Scratch *));
    for (int i = 0; i < threads && !memory.failed; i++) job.pass.scratch[i] = allocate_scratch(&memory, 0);
    if (!memory.failed) run_team(threads, run_multiply, &job);
    free_all(&memory);
    return memory.failed ? ENOMEM : 0;
}

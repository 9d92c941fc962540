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
#include "memory.h"
#include "stages.h"

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

/* The two halves of a decoder layer, each as one operation: what stands between its products stays in a cache, and is
 * computed in vectors. Included by panels.c, whose products it uses.
 *
 * Letters: T rows of a batch, D hidden size, H attention heads, K key-value heads, d head_dim, M intermediate size;
 * H, K and M are one stream's part. Rows are float32 and row-major.
 */

/* down(silu(gate(h)) * up(h)), where h is the normed row. */
typedef struct {
    const void *gate_up, *down; /* panels, (D, 2 M) and (M, D) */
    const float *norm;          /* (D,) */
    float epsilon;
} Mlp;

/* o(softmax(q k) v), where q, k and v are of the normed row. */
typedef struct {
    const void *qkv, *o; /* panels, (D, (H + 2 K) d) and (H d, D) */
    const float *norm;   /* (D,) */
    const float *q_norm; /* (d,), with the scale of the scores, in log2 */
    const float *k_norm; /* (d,) */
    float epsilon;
    int32_t heads, kv_heads, head_dim;
} Attention;

/* One prompt's rows. Those from `start` to `stop` see `start` and what follows up to themselves; those from `live` to
 * `live_stop` see all of these and are seen by nobody. */
typedef struct {
    int32_t start, stop, live, live_stop;
} Span;

/* Of the angles by which RoPE turns the heads of a row, and of those that follow: (rows, d / 2) each. */
typedef struct {
    const float *cos, *sin;
} Turns;

/* What is true of a batch, for all its layers. */
typedef struct {
    const Span *spans;
    Turns turns; /* of all T rows */
    int32_t span_count;
    int32_t real_rows; /* that stand before all live ones */
} Batch;

/* What the mark of an attention stands before. */
typedef struct {
    const Attention *layer;
    const Batch *batch;
} BatchAttention;

#define LAYER_ROWS 128 /* that go from product to product together, in a cache; as many as AMX takes at once */

/* Mark the 64 bytes at an address as an operation, (D, D); room for the mark stands before it. */

void panels_mark_mlp(void *at, const Mlp *layer) {
    const int size = header_of(layer->gate_up)->inputs;
    panels_mark(at, size, size, MLP);
    *(Mlp *)at = *layer;
}

void panels_mark_attention(void *at, const Attention *layer, const Batch *batch) {
    const int size = header_of(layer->qkv)->inputs;
    panels_mark(at, size, size, ATTENTION);
    *(BatchAttention *)at = (BatchAttention){layer, batch};
}

/* ---- Rows. ---- */

/* 2^x for x up to 126; below -126 it is 2^-126. The polynomial is encoder/qwen3/cpu/pointwise.py's. */
ALWAYS float power_of_two(float x) {
    const float round = 12582912; /* 1.5 * 2^23, which leaves the nearest integer in the low bits */
    x = x < -126 ? -126 : x;
    const float shifted = x + round, f = x - (shifted - round), square = f * f;
    const float power = ((square - 0.6816276875410f * f) + 20.3613574894253f) *
                        ((square + 4.7973995807821f * f) + 11.6622523087491f) *
                        (0.0013276471520f * f + 0.0013276471520f * 3.1719636441150f);
    union { float number; uint32_t bits; } exponent = {shifted}, result = {power};
    result.bits += exponent.bits << 23;
    return result.number;
}

static float inverse_rms(const float *x, int count, float epsilon) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++) sum += x[i] * x[i];
    return 1 / sqrtf(sum / count + epsilon);
}

/* RMSNorm of rows of x, which are `row` apart. */
static void norm_rows(const float *x, size_t row, const float *weight, int rows, int count, float epsilon, float *to) {
    for (int r = 0; r < rows; r++, x += row, to += count) {
        const float factor = inverse_rms(x, count, epsilon);
#pragma omp simd
        for (int i = 0; i < count; i++) to[i] = x[i] * factor * weight[i];
    }
}

static Turns turns_from(Turns all, size_t row, int head_dim) {
    const size_t offset = row * (head_dim / 2);
    return (Turns){all.cos + offset, all.sin + offset};
}

/* RMSNorm and RoPE of a head. */
static void turn_head(const float *x, const float *weight, Turns turns, int head_dim, float epsilon, float *to) {
    const int half = head_dim / 2;
    const float *cos = turns.cos, *sin = turns.sin;
    const float factor = inverse_rms(x, head_dim, epsilon);
#pragma omp simd
    for (int i = 0; i < half; i++) {
        const float a = x[i] * factor * weight[i], b = x[half + i] * factor * weight[half + i];
        to[i] = a * cos[i] - b * sin[i];
        to[half + i] = b * cos[i] + a * sin[i];
    }
}

/* silu(gate) * up, in gate's place. */
static void gate_row(float *gate, const float *up, int count) {
#pragma omp simd
    for (int i = 0; i < count; i++) {
        const float exponent = gate[i] * -1.44269504f; /* log2(e) */
        gate[i] = gate[i] * up[i] / (1 + power_of_two(exponent > 126 ? 126 : exponent));
    }
}

/* The scores of a row become weights. Of `count` keys the first `seen` are visible, the others weigh nothing. `highest`
 * and `sum` are those of all keys before; the answer is what their weights have to be multiplied with. */
static float weigh(float *scores, int seen, int count, float *highest, float *sum) {
    float most = *highest, total = 0;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < seen; i++) most = scores[i] > most ? scores[i] : most;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < seen; i++) total += scores[i] = power_of_two(scores[i] - most);
    for (int i = seen; i < count; i++) scores[i] = 0;
    const float factor = power_of_two(*highest - most);
    *highest = most, *sum = *sum * factor + total;
    return factor;
}

/* ---- What stands between two products: a thread's memory, kept from call to call. ---- */

static float *scratch(size_t count) {
    static _Thread_local float *memory;
    static _Thread_local size_t size;
    if (count > size) {
        free(memory);
        memory = aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64), size = count;
    }
    if (memory == NULL) {
        fprintf(stderr, "encoder/qwen3/cpu/kernels/c/panels.c: no memory for %zu bytes between two products. Run smaller batches.\n",
                count * sizeof(float));
        abort();
    }
    return memory;
}

/* ---- MLP. ---- */

static void mlp(const Mlp *layer, const float *x, size_t row, int m, float *c, size_t ldc) {
    const Header *gate_up = header_of(layer->gate_up), *down = header_of(layer->down);
    const size_t inputs = gate_up->inputs, width = down->inputs;
    float *h = scratch(least(m, LAYER_ROWS) * (inputs + 2 * width));
    const int blocks = (m + LAYER_ROWS - 1) / LAYER_ROWS;
    for (int b = 0, top = 0, rows; b < blocks; b++, top += rows) {
        rows = share(m, top, b, blocks);
        float *gates = h + rows * inputs;
        norm_rows(x + top * row, row, layer->norm, rows, inputs, layer->epsilon, h);
        multiply(gate_up, h, inputs, 1, rows, 2 * width, gates, 2 * width);
        for (int r = 0; r < rows; r++) gate_row(gates + 2 * r * width, gates + (2 * r + 1) * width, width);
        multiply(down, gates, 2 * width, 1, rows, down->outputs, c + top * ldc, ldc);
    }
}

/* ---- Attention. ---- */

static int padded(int count) { return (count + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* The first columns of the normed rows' qkv. */
static void project(const Attention *layer, const float *x, size_t row, int m, int columns, float *h, float *qkv) {
    const Header *matrix = header_of(layer->qkv);
    const size_t inputs = matrix->inputs, width = matrix->outputs;
    const int blocks = (m + LAYER_ROWS - 1) / LAYER_ROWS;
    for (int b = 0, top = 0, rows; b < blocks; b++, top += rows) {
        rows = share(m, top, b, blocks);
        norm_rows(x + top * row, row, layer->norm, rows, inputs, layer->epsilon, h);
        multiply(matrix, h, inputs, 1, rows, columns, qkv + top * width, width);
    }
}

/* What one key-value head's queries see of a prompt. */
typedef struct {
    int count;
    float *keys;   /* panels, (count / COLUMNS, d, COLUMNS) */
    float *values; /* panels, (d / COLUMNS, count, COLUMNS) */
} Seen;

/* Lay out `count` keys and values, which are `width` apart from token to token. */
static void lay_keys_values(const Attention *layer, const float *k, const float *v, size_t width, Turns turns,
                            Seen to) {
    const int d = layer->head_dim;
    float turned[d];
    for (int t = 0; t < to.count; t++, k += width, v += width) {
        turn_head(k, layer->k_norm, turns_from(turns, t, d), d, layer->epsilon, turned);
        float *key = to.keys + (size_t)(t - t % COLUMNS) * d + t % COLUMNS;
        for (int i = 0; i < d; i++) key[(size_t)i * COLUMNS] = turned[i];
        for (int i = 0; i < d; i += COLUMNS) {
            float *value = to.values + ((size_t)i / COLUMNS * to.count + t) * COLUMNS;
            const int there = least(d - i, COLUMNS);
            memcpy(value, v + i, there * sizeof(float));
            memset(value + there, 0, (COLUMNS - there) * sizeof(float));
        }
    }
}

/* Of one key-value head, the queries of tokens which are `width` apart; what they see takes their place. They see all
 * there is, or as many keys as stand before and at their own place. */
static void attend(const Attention *layer, Seen seen, int all, float *q, size_t width, int tokens, Turns turns) {
    static _Thread_local float queries[MOST_ROWS * APART], scores[MOST_ROWS * APART];
    const int d = layer->head_dim, groups = layer->heads / layer->kv_heads, wide = padded(d);
    float sums[MOST_ROWS * wide], highest[MOST_ROWS], total[MOST_ROWS];
    for (int done = 0, rows; done < tokens * groups; done += rows) {
        rows = least(tokens * groups - done, MOST_ROWS);
        float *places[MOST_ROWS];
        int visible[MOST_ROWS];
        for (int r = 0; r < rows; r++) {
            const int token = (done + r) / groups, group = (done + r) % groups;
            places[r] = q + token * width + group * d, visible[r] = all ? seen.count : token + 1;
            turn_head(places[r], layer->q_norm, turns_from(turns, token, d), d, layer->epsilon, queries + r * APART);
            highest[r] = -INFINITY, total[r] = 0;
        }
        for (int first = 0; first < visible[rows - 1]; first += INPUTS_AT_ONCE) {
            const int count = least(visible[rows - 1] - first, INPUTS_AT_ONCE);
            for (int key = 0; key < count; key += COLUMNS) {
                const char *panel = (const char *)(seen.keys + (size_t)(first + key) * d);
                tiles_float32(rows, queries, panel, d, 0, scores + key, APART, panel, 0);
            }
            for (int r = 0; r < rows; r++) {
                const int there = least(visible[r] - first, count);
                const float factor = weigh(scores + r * APART, there > 0 ? there : 0, count, highest + r, total + r);
                for (int i = 0; first > 0 && i < wide; i++) sums[r * wide + i] *= factor;
            }
            for (int column = 0; column < d; column += COLUMNS) {
                const char *panel = (const char *)(seen.values + (size_t)column * seen.count + (size_t)first * COLUMNS);
                tiles_float32(rows, scores, panel, count, first > 0, sums + column, wide, panel, 0);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < d; i++) places[r][i] = visible[r] ? sums[r * wide + i] / total[r] : 0;
    }
}

static void attention(const BatchAttention *operation, const float *x, size_t row, int m, float *c, size_t ldc) {
    const Attention *layer = operation->layer;
    const Batch *batch = operation->batch;
    const Header *o = header_of(layer->o);
    const int d = layer->head_dim, groups = layer->heads / layer->kv_heads, real = batch->real_rows;
    const size_t inputs = header_of(layer->qkv)->inputs, width = header_of(layer->qkv)->outputs;
    int longest = 0;
    for (const Span *span = batch->spans; span < batch->spans + batch->span_count; span++)
        if (span->stop - span->start > longest) longest = span->stop - span->start;

    const size_t of_keys = (size_t)padded(longest) * d, of_values = (size_t)longest * padded(d);
    float *h = scratch(LAYER_ROWS * inputs + m * width + of_keys + of_values);
    float *qkv = h + LAYER_ROWS * inputs, *keys = qkv + m * width, *values = keys + of_keys;

    project(layer, x, row, real, width, h, qkv);
    project(layer, x + real * row, row, m - real, layer->heads * d, h, qkv + real * width);
    for (const Span *span = batch->spans; span < batch->spans + batch->span_count; span++) {
        const Seen seen = {span->stop - span->start, keys, values};
        const size_t start = span->start, live = span->live;
        const Turns of_real = turns_from(batch->turns, start, d), of_live = turns_from(batch->turns, live, d);
        for (int head = 0; head < layer->kv_heads; head++) {
            float *q = qkv + head * groups * d;
            const float *k = qkv + start * width + (layer->heads + head) * d, *v = k + layer->kv_heads * d;
            lay_keys_values(layer, k, v, width, of_real, seen);
            attend(layer, seen, 0, q + start * width, width, seen.count, of_real);
            attend(layer, seen, 1, q + live * width, width, span->live_stop - span->live, of_live);
        }
    }
    multiply(o, qkv, width, 1, m, o->outputs, c, ldc);
}

/* Runs the kernels on a case from a file, without Python: under a sanitizer, or in an emulator of another processor.
 *
 *     driver CASE RESULT
 *
 * Every array has memory of exactly its size, so that a sanitizer sees each byte that is read or written beyond it.
 */
#include <stdio.h>

#include "layers.c"

static FILE *input;

static void *read_array(size_t bytes) {
    void *array = malloc(bytes);
    if (fread(array, 1, bytes, input) != bytes) exit(2);
    return array;
}

/* Panels of some matrices (outputs, inputs), as Kernels.prepack in library.py makes them. */
static void *prepack(int count, const int *outputs, int inputs, int bfloat16, int interleave, int threads) {
    const size_t bytes = qwen3_panel_bytes(inputs, bfloat16);
    int all = 0, first = 0;
    for (int i = 0; i < count; i++) all += ceil_div(outputs[i], qwen3_panel_columns(bfloat16));
    void *memory;
    if (posix_memalign(&memory, 64, all * bytes)) exit(2);
    char *panels = memory;
    for (int i = 0; i < count; i++) {
        void *matrix = read_array((size_t)outputs[i] * inputs * (bfloat16 ? 2 : 4));
        qwen3_prepack(matrix, inputs, outputs[i], bfloat16, panels + (interleave ? i : first) * bytes, interleave ? count : 1,
                      threads);
        first += ceil_div(outputs[i], qwen3_panel_columns(bfloat16));
        free(matrix);
    }
    return panels;
}

int main(int count, char **arguments) {
    if (count != 3 || (input = fopen(arguments[1], "rb")) == NULL || qwen3_start()) return 2;
    Dims *dims = read_array(sizeof(Dims));
    int32_t *sizes = read_array(5 * sizeof(int32_t));
    const int layer_count = sizes[0], threads = sizes[1], span_count = sizes[2], rows = sizes[3], token_rows = sizes[4];
    const size_t angles = (size_t)rows * (dims->head_dim / 2) * sizeof(float);
    Batch batch = {read_array(span_count * sizeof(Span)), read_array(angles), read_array(angles), span_count, rows, token_rows};
    float *x = read_array((size_t)rows * dims->hidden_size * sizeof(float));
    Layer *layers = malloc(layer_count * sizeof(Layer));
    const int size = dims->hidden_size, inner = dims->intermediate_size, d = dims->head_dim, bfloat16 = dims->bfloat16;
    for (int i = 0; i < layer_count; i++)
        layers[i] = (Layer){
            .qkv = prepack(3, (int[]){dims->heads * d, dims->kv_heads * d, dims->kv_heads * d}, size, bfloat16, 0, threads),
            .o = prepack(1, &size, dims->heads * d, bfloat16, 0, threads),
            .gate_up = prepack(2, (int[]){inner, inner}, size, bfloat16, 1, threads),
            .down = prepack(1, &size, inner, bfloat16, 0, threads),
            .input_norm = read_array(size * sizeof(float)),
            .post_attention_norm = read_array(size * sizeof(float)),
            .q_norm = read_array(d * sizeof(float)),
            .k_norm = read_array(d * sizeof(float)),
        };
    if (qwen3_run_layers(dims, layers, layer_count, &batch, x, threads)) return 3;
    FILE *output = fopen(arguments[2], "wb");
    return output == NULL || fwrite(x, (size_t)rows * size * sizeof(float), 1, output) != 1 || fclose(output);
}

/* What a layer does to single rows: norms, rotary positions, the activation, the softmax. */
#pragma once

#include <math.h>

#include "vectors.h"

/* cos and sin of RoPE's angles for a row and those that follow: (rows, head_dim / 2) each. */
typedef struct {
    const float *cos, *sin;
} Rope;

static Rope rope_from(Rope all, size_t row, int head_dim) {
    const size_t offset = row * (head_dim / 2);
    return (Rope){all.cos + offset, all.sin + offset};
}

/* 2^x for x up to 126; below -126 it is 2^-126.
 *
 * 2^f for f in [-1/2, 1/2] is the polynomial of degree 5 whose largest relative error is least, 7.5e-8, as a product of three
 * factors, which has the fewest steps that wait for each other. */
ALWAYS_INLINE float exp2_bounded(float x) {
    const float round = 12582912; /* 1.5 * 2^23: added to x, it leaves the nearest integer in the low bits */
    x = x < -126 ? -126 : x;
    const float shifted = x + round, f = x - (shifted - round), square = f * f;
    const float power = ((square - 0.6816276875410f * f) + 20.3613574894253f) *
                        ((square + 4.7973995807821f * f) + 11.6622523087491f) *
                        (0.0013276471520f * f + 0.0013276471520f * 3.1719636441150f);
    union {
        float number;
        uint32_t bits;
    } exponent = {shifted}, result = {power};
    result.bits += exponent.bits << 23;
    return result.number;
}

static float inverse_rms(const float *x, int count, float epsilon) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++) sum += x[i] * x[i];
    return 1 / sqrtf(sum / count + epsilon);
}

static void rms_norm(const float *x, const float *weight, int count, float epsilon, float *to) {
    const float factor = inverse_rms(x, count, epsilon);
#pragma omp simd
    for (int i = 0; i < count; i++) to[i] = x[i] * factor * weight[i];
}

/* RMSNorm and RoPE of one head of a row. */
static void norm_and_rotate(const float *x, const float *weight, Rope rope, int head_dim, float epsilon, float *to) {
    const int half = head_dim / 2;
    const float *cos = rope.cos, *sin = rope.sin;
    const float factor = inverse_rms(x, head_dim, epsilon);
#pragma omp simd
    for (int i = 0; i < half; i++) {
        const float a = x[i] * factor * weight[i], b = x[half + i] * factor * weight[half + i];
        to[i] = a * cos[i] - b * sin[i];
        to[half + i] = b * cos[i] + a * sin[i];
    }
}

/* silu(gate) * up, in gate's place. */
static void swiglu(float *gate, const float *up, int count) {
#pragma omp simd
    for (int i = 0; i < count; i++) {
        const float exponent = gate[i] * -1.44269504f; /* log2(e) */
        gate[i] = gate[i] * up[i] / (1 + exp2_bounded(exponent > 126 ? 126 : exponent));
    }
}

/* Turn some scores of a row, in log2, into weights relative to the largest score so far. Of `count` keys the first `visible`
 * count, the others weigh nothing. `max_score` and `sum` are those of all keys before, and are brought up to date; sums over
 * the keys before have to be multiplied with the factor that is returned. */
static float softmax_step(float *scores, int visible, int count, float *max_score, float *sum) {
    float max = *max_score, total = 0;
#pragma omp simd reduction(max : max)
    for (int i = 0; i < visible; i++) max = scores[i] > max ? scores[i] : max;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < visible; i++) total += scores[i] = exp2_bounded(scores[i] - max);
    for (int i = visible; i < count; i++) scores[i] = 0;
    const float factor = exp2_bounded(*max_score - max);
    *max_score = max, *sum = *sum * factor + total;
    return factor;
}

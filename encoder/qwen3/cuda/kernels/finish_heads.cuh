// The heads of one row between projection and attention: norm and RoPE. One thread block for each row.
// Source of the math: transformers, models/qwen3/modeling_qwen3.py, Qwen3Attention.

#pragma once
#include "row.cuh"

// Args: x (T, HIDDEN) before its norm; qkv (T, (H+2K)*D), projected from it; cos_sin (T, D), cosines, then sines;
//   out as qkv: queries and keys with their norms and RoPE, values with the norm of x.
__device__ void finish_heads(
    const T* x, const T* qkv, const T* q_norm, const T* k_norm, const float* cos_sin, T* out) {
  constexpr int N = D / 64;  // numbers of each half of a head that a lane holds
  using Numbers = mlx::core::cu::AlignedVector<T, N>;
  const int row = blockIdx.x, lane = threadIdx.x % 32;
  const float* row_cos_sin = cos_sin + size_t(row) * D + lane * N;
  const float row_scale = inverse_rms(x + size_t(row) * HIDDEN);

  for (int head = threadIdx.x / 32; head < H + 2 * K; head += blockDim.x / 32) {
    const size_t offset = (size_t(row) * (H + 2 * K) + head) * D;
    const Numbers* from = reinterpret_cast<const Numbers*>(qkv + offset) + lane;
    const Numbers* weight = reinterpret_cast<const Numbers*>(head < H ? q_norm : k_norm) + lane;
    Numbers first = from[0], second = from[32];
    float squares = 0;
    for (int i = 0; i < N; ++i) {
      squares += float(first[i]) * float(first[i]) + float(second[i]) * float(second[i]);
    }
    const float scale = row_scale * rsqrtf(row_scale * row_scale * sum_of_lanes(squares) / D + EPS);
    for (int i = 0; i < N; ++i) {
      if (head < H + K) {
        const float a = float(first[i]) * scale * float(weight[0][i]), cos = row_cos_sin[i];
        const float b = float(second[i]) * scale * float(weight[32][i]), sin = row_cos_sin[i + D / 2];
        first[i] = T(a * cos - b * sin);
        second[i] = T(b * cos + a * sin);
      } else {
        first[i] = T(float(first[i]) * row_scale);
        second[i] = T(float(second[i]) * row_scale);
      }
    }
    Numbers* to = reinterpret_cast<Numbers*>(out + offset) + lane;
    to[0] = first;
    to[32] = second;
  }
}

// silu(gate) * up of one row, or of a part of it where the grid has several blocks for each row.

#pragma once
#include "row.cuh"

// Args: x (T, HIDDEN) before its norm; gate_up (T, 2 * F), projected from it; out (T, F).
__device__ void swiglu(const T* x, const T* gate_up, T* out) {
  using Numbers = mlx::core::cu::AlignedVector<T, 8>;
  const size_t row = blockIdx.x;
  const float scale = inverse_rms(x + row * HIDDEN);
  const Numbers* from = reinterpret_cast<const Numbers*>(gate_up + row * 2 * F);
  Numbers* to = reinterpret_cast<Numbers*>(out + row * F);
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < F / 8; i += gridDim.y * blockDim.x) {
    const Numbers gate = from[i], up = from[i + F / 8];
    Numbers y;
    for (int j = 0; j < 8; ++j) {
      const float g = scale * float(gate[j]);
      y[j] = T(g / (1 + __expf(-g)) * scale * float(up[j]));
    }
    to[i] = y;
  }
}

// Reductions over a row.

#pragma once

__device__ float sum_of_lanes(float x) {
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// 1 / sqrt(mean(x^2) + EPS) of one row of HIDDEN numbers, for every thread of the block. Call once in a kernel.
__device__ float inverse_rms(const T* x) {
  using Numbers = mlx::core::cu::AlignedVector<T, 8>;
  __shared__ float sums[32];
  float squares = 0;
  for (int i = threadIdx.x; i < HIDDEN / 8; i += blockDim.x) {
    const Numbers numbers = reinterpret_cast<const Numbers*>(x)[i];
    for (int j = 0; j < 8; ++j) squares += float(numbers[j]) * float(numbers[j]);
  }
  squares = sum_of_lanes(squares);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  return rsqrtf(sum_of_lanes(lane < blockDim.x / 32 ? sums[lane] : 0) / HIDDEN + EPS);
}

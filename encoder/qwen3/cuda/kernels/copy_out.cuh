// Copies bytes into page-locked memory of the host.

#pragma once

// Args: x (bytes); address (1,) of page-locked memory for them, a multiple of 16; out (1,), a flag that MLX can wait for.
__device__ void copy_out(const uint8_t* x, size_t bytes, const uint64_t* address, uint8_t* out) {
  uint8_t* to = reinterpret_cast<uint8_t*>(address[0]);
  const size_t first = size_t(blockIdx.x) * blockDim.x + threadIdx.x, step = size_t(gridDim.x) * blockDim.x;
  const size_t words = reinterpret_cast<uintptr_t>(x) % sizeof(uint4) ? 0 : bytes / sizeof(uint4);
  for (size_t i = first; i < words; i += step) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(x)[i];
  for (size_t i = words * sizeof(uint4) + first; i < bytes; i += step) to[i] = x[i];
  if (first == 0) out[0] = 1;
}

// Softmax attention: FlashAttention-2 (https://arxiv.org/abs/2307.08691) with mma.sync.
// A thread block computes one head for up to 64 queries, over the keys in tiles of 64; each of its four warps has 16 queries.
//
// Of a 16 x 8 result of mma.sync, a lane holds columns 2 * (lane % 4) and the next, in rows lane / 4 and lane / 4 + 8.

#pragma once

constexpr int TILE = 64, THREADS = 2 * TILE;
constexpr int ROW = (H + 2 * K) * D;  // numbers in a row of qkv
constexpr int PITCH = D * sizeof(T);  // bytes of a key in shared memory
constexpr int CHUNKS = PITCH / 16;  // of 16 bytes, in a key

// Address of a chunk. The last bits of the key's number permute its chunks, so that those of eight keys lie in different
// banks.
__device__ unsigned place(unsigned tile, int key, int chunk) { return tile + key * PITCH + (chunk ^ (key % 8)) * 16; }

// Begins to copy up to TILE keys into shared memory, and zeros in place of missing ones.
__device__ void copy_tile(unsigned tile, const T* from, int keys) {
  const int first = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
  const unsigned to = place(tile, first, chunk);
  from += first * ROW + chunk * 8;
  #pragma unroll
  for (int key = 0; key < TILE; key += THREADS / CHUNKS) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(to + key * PITCH), "l"(from + key * ROW), "r"(first + key < keys ? 16 : 0) : "memory");
  }
}

__device__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of copies except the last one.
__device__ void wait_for_older_group() {
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  __syncthreads();
}

__device__ void load(unsigned (&x)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}

__device__ void load_transposed(unsigned (&x)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}

__device__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ unsigned pack(float low, float high) {
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ float largest_of_four_lanes(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ float sum_of_four_lanes(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Args: qkv (T, (H+2K)*D), normed and rotated; query_blocks (n, 5), see Kernels.attend; out (T, H*D).
__device__ void attend(const T* qkv, const int* query_blocks, T* out) {
  __shared__ alignas(PITCH) T key_tile[TILE * D], value_tile[TILE * D];
  const unsigned key_at = __cvta_generic_to_shared(key_tile), value_at = __cvta_generic_to_shared(value_tile);
  const int lane = threadIdx.x % 32, head = blockIdx.x, kv_head = head / (H / K);
  const int* block = query_blocks + blockIdx.y * 5;
  const int first_row = block[0], rows = block[1], first_key = block[2], all_keys = block[3], position = block[4];
  const int keys = min(all_keys, position + rows);  // no query of the block attends to more
  const int lane_row = threadIdx.x / 32 * 16 + lane / 4, lane_column = lane % 4 * 2;
  const T* key_source = qkv + size_t(first_key) * ROW + (H + kv_head) * D;
  const T* value_source = key_source + K * D;
  const unsigned key_lane = place(key_at, lane / 16 * 8 + lane % 8, lane / 8 % 2);  // of chunk c: ^ (16 * c)
  const unsigned value_lane = place(value_at, lane % 16, lane / 16);
  constexpr float MASKED = -cuda::std::numeric_limits<float>::infinity();
  const float scale = 1.44269504f * rsqrtf(D);  // of the scores, times log2(e): exponentials are to the base 2

  if (keys > 0) {
    copy_tile(key_at, key_source, keys);
    end_group();
    copy_tile(value_at, value_source, keys);
    end_group();
  }
  unsigned query[D / 16][4];
  float sums[D / 8][4] = {};
  float top[2] = {MASKED, MASKED}, total[2] = {0, 0};
  for (int r = 0; r < 2; ++r) {
    const int row = lane_row + 8 * r;
    const T* source = qkv + size_t(first_row + min(row, rows - 1)) * ROW + head * D + lane_column;
    for (int k = 0; k < D / 16; ++k) {
      query[k][r] = *reinterpret_cast<const unsigned*>(source + 16 * k);
      query[k][r + 2] = *reinterpret_cast<const unsigned*>(source + 16 * k + 8);
    }
  }
  for (int key = 0; key < keys; key += TILE) {
    const int next = key + TILE;
    wait_for_older_group();
    float scores[TILE / 8][4] = {};
    #pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      #pragma unroll
      for (int n = 0; n < TILE / 16; ++n) {
        unsigned b[4];
        load(b, (key_lane ^ (32 * k)) + 16 * n * PITCH);
        multiply_add(scores[2 * n], query[k], b[0], b[1]);
        multiply_add(scores[2 * n + 1], query[k], b[2], b[3]);
      }
    }
    __syncthreads();
    if (next < keys) copy_tile(key_at, key_source + next * ROW, keys - next);
    end_group();

    if (next > min(all_keys, position + 1)) {  // else all queries attend to the whole key tile
      #pragma unroll
      for (int i = 0; i < TILE / 2; ++i) {
        const int seen = min(all_keys, position + lane_row + i / 2 % 2 * 8 + 1);
        if (key + i / 4 * 8 + lane_column + i % 2 >= seen) scores[i / 4][i % 4] = MASKED;
      }
    }
    #pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = top[r];
      #pragma unroll
      for (int i = 0; i < TILE / 4; ++i) largest = fmaxf(largest, scores[i / 2][2 * r + i % 2]);
      largest = largest_of_four_lanes(largest);
      const float shrink = exp2_of((top[r] - largest) * scale), shift = largest * scale;
      top[r] = largest;
      total[r] *= shrink;
      #pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        sums[n][2 * r] *= shrink;
        sums[n][2 * r + 1] *= shrink;
      }
      #pragma unroll
      for (int i = 0; i < TILE / 4; ++i) {
        float& score = scores[i / 2][2 * r + i % 2];
        score = exp2_of(score * scale - shift);
        total[r] += score;
      }
    }

    wait_for_older_group();
    #pragma unroll
    for (int k = 0; k < TILE / 16; ++k) {
      const unsigned weights[4] = {
          pack(scores[2 * k][0], scores[2 * k][1]), pack(scores[2 * k][2], scores[2 * k][3]),
          pack(scores[2 * k + 1][0], scores[2 * k + 1][1]), pack(scores[2 * k + 1][2], scores[2 * k + 1][3])};
      #pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        unsigned b[4];
        load_transposed(b, (value_lane ^ (32 * n)) + 16 * k * PITCH);
        multiply_add(sums[2 * n], weights, b[0], b[1]);
        multiply_add(sums[2 * n + 1], weights, b[2], b[3]);
      }
    }
    __syncthreads();
    if (next < keys) copy_tile(value_at, value_source + next * ROW, keys - next);
    end_group();
  }
  for (int r = 0; r < 2; ++r) {
    const int row = lane_row + 8 * r;
    const float sum = sum_of_four_lanes(total[r]), factor = sum > 0 ? 1 / sum : 0;
    if (row < rows) {
      T* to = out + size_t(first_row + row) * H * D + head * D + lane_column;
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<unsigned*>(to + 8 * n) = pack(sums[n][2 * r] * factor, sums[n][2 * r + 1] * factor);
      }
    }
  }
}

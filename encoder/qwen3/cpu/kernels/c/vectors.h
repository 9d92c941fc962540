/* The vectors of one instruction set, in GCC's and Clang's own notation, and the sizes that follow from them. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#define TILE_ROWS 14 /* times two vectors of sums: what the registers hold beside two of weights and one of x */
#elif defined(__AVX2__)
#define LANES 8
#define TILE_ROWS 6
#else
#define LANES 4
#define TILE_ROWS 12
#endif
#define COLUMNS (2 * LANES) /* of a panel of weights, see panels.h */

#if defined(__AMX_BF16__) || defined(__AMXBF16__) /* GCC's name, and Clang's first one */
#define WITH_AMX
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef float LooseVector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t LooseBits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define ALWAYS_INLINE static inline __attribute__((always_inline))

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }
static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
static inline int round_up(int a, int multiple) { return ceil_div(a, multiple) * multiple; }

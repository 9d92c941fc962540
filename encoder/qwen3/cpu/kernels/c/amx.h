/* Products of float32 rows with bfloat16 panels on the matrix unit of Intel's Xeons (AMX), which multiplies bfloat16s alone
 * and adds up in float32.
 *
 * A float32 has 24 bits of mantissa: it is the sum of three bfloat16s of 8 bits each, exactly. So each row is split into
 * three, each part is multiplied with the panel, and all are added to the same float32 sums: nothing is lost but what
 * float32 loses.
 *
 * A panel has 64 columns here. Its rows are pairs of inputs, as the unit reads them: both numbers of column 0, both of
 * column 1, ... Inputs are filled up with zeros to a multiple of 32.
 *
 * Split rows are stored as [input / 1024][row / tile_rows][input / 32][part][row % tile_rows][input % 32].
 */
#pragma once

#include <errno.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vectors.h"

#define AMX_COLUMNS 64
#define AMX_STEP 32     /* inputs of one instruction */
#define AMX_TILE_ROWS 16 /* at most; with fewer, an instruction takes proportionally less time */
#define AMX_PARTS 3
#define AMX_INPUT_BLOCK 1024 /* of a panel: 128 KiB. Sums go to memory and back once for each */
#define AMX_BLOCK_STEPS (AMX_INPUT_BLOCK / AMX_STEP)

/* Ask the kernel for the unit's registers, once for the process; 0 when they may be used, else an error number. */
static int amx_start(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) ? errno : 0;
}

static size_t amx_padded(int inputs) { return (size_t)round_up(inputs, AMX_STEP); }

static void amx_prepack_panel(const uint16_t *weights, int inputs, int outputs, uint16_t *panel) {
    for (int column = 0; column < AMX_COLUMNS; column++) {
        const uint16_t *from = weights + (size_t)column * inputs;
        const size_t existing = column < outputs ? (size_t)inputs : 0;
        for (size_t i = 0; i < amx_padded(inputs); i++)
            panel[i / 2 * 2 * AMX_COLUMNS + 2 * column + i % 2] = i < existing ? from[i] : 0;
    }
}

/* Numbers of one tile of rows over one block of inputs. */
static size_t amx_tile_numbers(int tile_rows) { return (size_t)AMX_BLOCK_STEPS * AMX_PARTS * tile_rows * AMX_STEP; }

static size_t amx_rows_bytes(int rows, int inputs, int tile_rows) {
    return (size_t)ceil_div(inputs, AMX_INPUT_BLOCK) * ceil_div(rows, tile_rows) * amx_tile_numbers(tile_rows) * 2;
}

/* Split `count` numbers of a row, the first of them at input `first`. */
static void amx_pack_run(uint16_t *data, int rows, int tile_rows, int row, int first, int count, const float *values) {
    const size_t tile = (size_t)row / tile_rows, line = (size_t)row % tile_rows, tiles = ceil_div(rows, tile_rows);
    const __m512i upper_half = _mm512_set1_epi32((int)0xffff0000);
    for (int done = 0, run; done < count; done += run) {
        const int input = first + done;
        run = min_int(count - done, 16 - input % 16);
        const __mmask16 mask = (__mmask16)((1u << run) - 1);
        const size_t block = input / AMX_INPUT_BLOCK, step = input % AMX_INPUT_BLOCK / AMX_STEP;
        uint16_t *to = data + (block * tiles + tile) * amx_tile_numbers(tile_rows) +
                       (step * AMX_PARTS * tile_rows + line) * AMX_STEP + input % AMX_STEP;
        __m512 rest = _mm512_maskz_loadu_ps(mask, values + done);
        for (int part = 0; part < AMX_PARTS; part++, to += (size_t)tile_rows * AMX_STEP) {
            const __m512i bits = _mm512_and_si512(_mm512_castps_si512(rest), upper_half);
            _mm512_mask_cvtepi32_storeu_epi16(to, mask, _mm512_srli_epi32(bits, 16));
            rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(bits));
        }
    }
}

/* Registers of 64 bytes a row: sums (0 to 3) and x (4 to 6) have `tile_rows` rows, a panel's (7) has 16. */
static void amx_configure(int tile_rows) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = t < 7 ? tile_rows : AMX_STEP / 2;
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

/* One tile of split rows times one panel's part of `steps` steps, into c or added to it. Meanwhile memory at `next` is
 * fetched into a cache, `prefetch` bytes for each step. */
static void amx_multiply_tile(const uint16_t *x, int tile_rows, const char *panel, int steps, int accumulate, float *c,
                              size_t ldc, const char *next, size_t prefetch) {
    const size_t stride = ldc * sizeof(float), part = (size_t)tile_rows * AMX_STEP;
    if (accumulate) {
        _tile_loadd(0, c, stride);
        _tile_loadd(1, c + 16, stride);
        _tile_loadd(2, c + 32, stride);
        _tile_loadd(3, c + 48, stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int s = 0; s < steps; s++, x += AMX_PARTS * part, panel += AMX_STEP * AMX_COLUMNS * 2, next += prefetch) {
        _tile_loadd(4, x, 64);
        _tile_loadd(5, x + part, 64);
        _tile_loadd(6, x + 2 * part, 64);
        for (size_t line = 0; line < prefetch; line += 64) __builtin_prefetch(next + line, 0, 2);
#define AMX_COLUMN(TILE)                                \
    _tile_loadd(7, panel + TILE * 64, AMX_COLUMNS * 4); \
    _tile_dpbf16ps(TILE, 4, 7);                         \
    _tile_dpbf16ps(TILE, 5, 7);                         \
    _tile_dpbf16ps(TILE, 6, 7);
        AMX_COLUMN(0) AMX_COLUMN(1) AMX_COLUMN(2) AMX_COLUMN(3)
#undef AMX_COLUMN
    }
    _tile_stored(0, c, stride);
    _tile_stored(1, c + 16, stride);
    _tile_stored(2, c + 32, stride);
    _tile_stored(3, c + 48, stride);
}

/* As multiply_panels in panels.h. */
static void amx_multiply_panels(const uint16_t *data, int all_rows, int inputs, int tile_rows, int first, int rows,
                                const char *panel, int count, float *c, size_t ldc) {
    const size_t bytes = amx_padded(inputs) * AMX_COLUMNS * 2, tile_numbers = amx_tile_numbers(tile_rows);
    const int tiles = rows / tile_rows, all_tiles = ceil_div(all_rows, tile_rows);
    const size_t prefetch = round_up(ceil_div(AMX_STEP * AMX_COLUMNS * 2, tiles), 64);
    amx_configure(tile_rows);
    for (int input = 0; input < inputs; input += AMX_INPUT_BLOCK) {
        const int steps = ceil_div(min_int(inputs - input, AMX_INPUT_BLOCK), AMX_STEP);
        const uint16_t *block = data + ((size_t)(input / AMX_INPUT_BLOCK) * all_tiles + first / tile_rows) * tile_numbers;
        const char *part = panel + (size_t)input * AMX_COLUMNS * 2;
        for (int i = 0; i < count; i++, part += bytes)
            for (int t = 0; t < tiles; t++)
                amx_multiply_tile(block + t * tile_numbers, tile_rows, part, steps, input > 0,
                                  c + (size_t)t * tile_rows * ldc + (size_t)i * AMX_COLUMNS, ldc,
                                  part + bytes + t * prefetch * steps, prefetch);
    }
    _tile_release();
}

/* Products of float32 rows with bfloat16 panels on the matrix unit of Intel's Xeons (AMX), which multiplies bfloat16s alone
 * and adds up in float32.
 *
 * A float32 has 24 bits of mantissa: it is the sum of three bfloat16s of 8 bits each, exactly. So x is cut into three,
 * each is multiplied with the panel, and all are added to the same float32 sums: nothing is lost but what float32 loses.
 *
 * A panel has 64 columns here. Its rows are pairs of inputs, as the unit wants them: both numbers of column 0, both of
 * column 1, ... Inputs are filled up with zeros to a multiple of 32.
 */
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AMX_COLUMNS 64
#define AMX_STEP 32 /* inputs of one instruction */
#define AMX_ROWS 16 /* of a tile, at most: with fewer, an instruction takes as much less time */
#define AMX_PARTS 3
#define AMX_INPUTS_AT_ONCE 1024 /* of a panel: 128 KiB; sums go to memory and back once for each */
#define AMX_ROWS_AT_ONCE 128 /* of x: 768 KiB in three parts, for the second cache */

/* Ask the kernel for the unit's registers, once for the process; 0 when they may be used. */
static int amx_start(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return (int)syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

static size_t amx_padded(int inputs) { return ((size_t)inputs + AMX_STEP - 1) / AMX_STEP * AMX_STEP; }

static void amx_lay(const uint16_t *weights, int inputs, int outputs, uint16_t *panel) {
    for (int column = 0; column < AMX_COLUMNS; column++) {
        const uint16_t *from = weights + (size_t)column * inputs;
        const size_t there = column < outputs ? (size_t)inputs : 0;
        for (size_t i = 0; i < amx_padded(inputs); i++)
            panel[i / 2 * 2 * AMX_COLUMNS + 2 * column + i % 2] = i < there ? from[i] : 0;
    }
}

/* Registers of 64 bytes a row: sums (0 to 3) and x (4 to 6) have `high` rows, a panel's (7) has 16. */
static void amx_configure(int high) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = t < 7 ? high : AMX_STEP / 2;
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

/* A thread's part of x, [row / high][input / 32][part][row % high][input % 32]. */
static _Thread_local uint16_t amx_cut[AMX_ROWS_AT_ONCE * AMX_INPUTS_AT_ONCE * AMX_PARTS] __attribute__((aligned(64)));

/* Cut rows of x into parts. Inputs that are not there, and rows up to a multiple of `high`, are zero. */
static void amx_cut_rows(const float *x, size_t row, size_t step, int rows, int high, int inputs) {
    const int steps = (int)amx_padded(inputs) / AMX_STEP;
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    for (int r = 0; r < (rows + high - 1) / high * high; r++)
        for (int i = 0; i < steps * AMX_STEP; i += 16) {
            const int left = r < rows && inputs > i ? inputs - i : 0, there = left < 16 ? left : 16;
            const float *from = x + r * row + i * step;
            float numbers[16];
            for (int j = 0; j < there && step != 1; j++) numbers[j] = from[j * step];
            __m512 rest = _mm512_maskz_loadu_ps((__mmask16)((1u << there) - 1), step == 1 ? from : numbers);
            uint16_t *to = amx_cut + i % AMX_STEP +
                           ((size_t)(r / high * steps + i / AMX_STEP) * AMX_PARTS * high + r % high) * AMX_STEP;
            for (int part = 0; part < AMX_PARTS; part++, to += high * AMX_STEP) {
                const __m512i bits = _mm512_and_si512(_mm512_castps_si512(rest), upper);
                _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
                rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(bits));
            }
        }
}

/* `high` rows of cut x times a panel's part, into c; meanwhile memory at `next` is fetched, `step` bytes for each 32
 * inputs. */
static void amx_tile(const uint16_t *x, int high, const char *panel, int steps, int more, float *c, size_t ldc,
                     const char *next, size_t step) {
    const size_t apart = ldc * sizeof(float), part = (size_t)high * AMX_STEP;
    if (more) {
        _tile_loadd(0, c, apart);
        _tile_loadd(1, c + 16, apart);
        _tile_loadd(2, c + 32, apart);
        _tile_loadd(3, c + 48, apart);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int s = 0; s < steps; s++, x += AMX_PARTS * part, panel += AMX_STEP * AMX_COLUMNS * 2) {
        _tile_loadd(4, x, 64);
        _tile_loadd(5, x + part, 64);
        _tile_loadd(6, x + 2 * part, 64);
        for (size_t line = 0; line < step; line += 64) __builtin_prefetch(next + line, 0, 2);
        next += step;
#define AMX_COLUMN(TILE)                                   \
    _tile_loadd(7, panel + TILE * 64, AMX_COLUMNS * 4);    \
    _tile_dpbf16ps(TILE, 4, 7);                            \
    _tile_dpbf16ps(TILE, 5, 7);                            \
    _tile_dpbf16ps(TILE, 6, 7);
        AMX_COLUMN(0) AMX_COLUMN(1) AMX_COLUMN(2) AMX_COLUMN(3)
    }
    _tile_stored(0, c, apart);
    _tile_stored(1, c + 16, apart);
    _tile_stored(2, c + 32, apart);
    _tile_stored(3, c + 48, apart);
}

/* As `panel_product`, with x in `amx_cut`. */
static void amx_panel_product(const char *panel, int rows, int high, int steps, int more, int columns, float *c,
                              size_t ldc, const char *next) {
    const int tile_count = (rows + high - 1) / high;
    const size_t step = ((size_t)AMX_STEP * AMX_COLUMNS * 2 / tile_count + 63) / 64 * 64;
    for (int t = 0; t < tile_count; t++, next += step * steps) {
        float part[AMX_ROWS * AMX_COLUMNS], *to = c + (size_t)t * high * ldc;
        const int there = least(rows - t * high, high), whole = there == high && columns == AMX_COLUMNS;
        for (int r = 0; r < there && more && !whole; r++) memcpy(part + r * AMX_COLUMNS, to + r * ldc, columns * sizeof(float));
        amx_tile(amx_cut + (size_t)t * steps * AMX_PARTS * high * AMX_STEP, high, panel, steps, more, whole ? to : part,
                 whole ? ldc : AMX_COLUMNS, next, step);
        for (int r = 0; r < there && !whole; r++) memcpy(to + r * ldc, part + r * AMX_COLUMNS, columns * sizeof(float));
    }
}

static void amx_multiply(const char *panels, const float *x, size_t row, size_t step, int m, int n, int k, float *c,
                         size_t ldc) {
    const size_t panel_bytes = amx_padded(k) * AMX_COLUMNS * 2;
    const int blocks = (m + AMX_ROWS_AT_ONCE - 1) / AMX_ROWS_AT_ONCE;
    for (int b = 0, top = 0, rows; b < blocks; b++, top += rows) {
        rows = share(m, top, b, blocks);
        const int tile_count = (rows + AMX_ROWS - 1) / AMX_ROWS, high = (rows + tile_count - 1) / tile_count;
        amx_configure(high);
        for (int first = 0; first < k; first += AMX_INPUTS_AT_ONCE) {
            const int inputs = least(k - first, AMX_INPUTS_AT_ONCE), steps = (int)amx_padded(inputs) / AMX_STEP;
            amx_cut_rows(x + top * row + first * step, row, step, rows, high, inputs);
            const char *panel = panels + (size_t)first * AMX_COLUMNS * 2;
            for (int column = 0; column < n; column += AMX_COLUMNS, panel += panel_bytes)
                amx_panel_product(panel, rows, high, steps, first > 0, least(n - column, AMX_COLUMNS),
                                  c + top * ldc + column, ldc, panel + panel_bytes);
        }
    }
    _tile_release();
}

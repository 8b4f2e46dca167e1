/* Products on AMX tiles (cpu_product.h): 16 x 32 bfloat16 times 32 x 16, summed in single precision.
 *
 * A tile is 1024 bytes in one piece: a left one 16 rows of 32 columns, a right one 16 pairs of
 * columns of 16 rows, the two of a pair side by side. What is decoded along rows (`across` 0) is
 * a left operand as it is and x the right one, sums are (rows, tokens); what is decoded along
 * columns is the right operand and x the left one, sums are (tokens, rows). Nothing is transposed.
 *
 * Tests define TILE_* as plain C, so that all but these instructions runs anywhere. */
#ifndef HF_VQ_CPU_AMX_H
#define HF_VQ_CPU_AMX_H
#include "cpu_product.h"

enum { PACK_COLUMNS = 32, TILE = 512 }; /* columns, bfloat16 numbers of a tile */

#if !defined(TILE_LOAD) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TILE_CONFIGURE(at) _tile_loadconfig(at)
#define TILE_RELEASE() _tile_release()
#define TILE_LOAD(tile, at, stride) _tile_loadd(tile, at, stride)
#define TILE_STORE(tile, at, stride) _tile_stored(tile, at, stride)
#define TILE_MULTIPLY(to, left, right) _tile_dpbf16ps(to, left, right)
/* The kernel saves tiles of those processes alone that have asked for it. */
static int amx_available(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    static int known = -1;
    if (known < 0) known = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return known;
}
#elif defined(TILE_LOAD)
static int amx_available(void) { return 1; }
#else
#define TILE_CONFIGURE(at) (void)(at)
#define TILE_RELEASE() (void)0
#define TILE_LOAD(tile, at, stride) (void)(at), (void)(stride)
#define TILE_STORE(tile, at, stride) (void)(at), (void)(stride)
#define TILE_MULTIPLY(to, left, right) (void)0
static int amx_available(void) { return 0; }
#endif
/* Compilers do not know what a tile load reads: stores before it must have happened. */
#define TILES_READ_MEMORY __asm__ volatile("" ::: "memory")

/* Every thread, before and after its products. */
static void amx_begin(void) {
    uint8_t config[64] __attribute__((aligned(64))) = {1};
    for (int tile = 0; tile < 8; tile++) {
        config[16 + 2 * tile] = 64; /* bytes of a row */
        config[48 + tile] = 16;
    }
    TILES_READ_MEMORY;
    TILE_CONFIGURE(config);
}
static void amx_end(void) { TILE_RELEASE(); }

/* 32 columns of token t, from `column` on, into the tiles of x. */
static void amx_pack(uint16_t *to, i64 columns, int across, i64 t, i64 column,
                     const float *values) {
    to += (t / 16 * ceil_div(columns, 32) + column / 32) * TILE;
    for (i64 i = 0; i < 32; i++)
        to[across ? t % 16 * 32 + i : i / 2 * 32 + t % 16 * 2 + i % 2] = to_bf16(values[i]);
}

/* A decoded block, n rows by k columns, into tiles: PRODUCT_COLUMNS / 32 of them per 16 rows. */
static void amx_round(const float *block, i64 stride, int across, i64 n, i64 k, uint16_t *tiles) {
    i64 steps = ceil_div(k, 32);
    for (i64 r = 0; r < n; r += 16)
        for (i64 s = 0; s < steps; s++) {
            uint16_t *tile = tiles + (r / 16 * (PRODUCT_COLUMNS / 32) + s) * TILE;
            i64 width = smaller(32, k - 32 * s);
            const float *from = block + (across ? 32 * s * stride + r : r * stride + 32 * s);
            if (width < 32) memset(tile, 0, TILE * 2); /* no NaN in what pads columns */
#if defined(__AVX512BF16__) && defined(HF_VQ_VBMI)
            if (width == 32 && !across) {
                for (i64 i = 0; i < 16; i++, from += stride)
                    _mm512_storeu_si512(tile + 32 * i,
                                        (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16),
                                                                     _mm512_loadu_ps(from)));
                continue;
            }
            if (width == 32) {
                uint16_t side_by_side[32];
                for (int i = 0; i < 32; i++) side_by_side[i] = (uint16_t)(i / 2 + i % 2 * 16);
                __m512i order = _mm512_loadu_si512(side_by_side);
                for (i64 i = 0; i < 16; i++, from += 2 * stride) {
                    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + stride),
                                                                _mm512_loadu_ps(from));
                    _mm512_storeu_si512(tile + 32 * i, _mm512_permutexvar_epi16(order, both));
                }
                continue;
            }
#endif
            for (i64 i = 0; i < width; i++)
                for (i64 q = 0; q < 16; q++) {
                    if (across) tile[i / 2 * 32 + 2 * q + i % 2] = to_bf16(from[i * stride + q]);
                    else tile[q * 32 + i] = to_bf16(from[q * stride + i]);
                }
        }
}

/* c (16 * lefts, 16 * rights) += left tiles times right tiles; lefts, rights are 1 or 2. */
INLINE void amx_square(const uint16_t *left, i64 left_step, const uint16_t *right, i64 right_step,
                       i64 steps, float *c, i64 stride, const int lefts, const int rights) {
    i64 bytes = stride * 4;
    TILE_LOAD(0, c, bytes);
    if (rights == 2) TILE_LOAD(1, c + 16, bytes);
    if (lefts == 2) TILE_LOAD(2, c + 16 * stride, bytes);
    if (lefts == 2 && rights == 2) TILE_LOAD(3, c + 16 * stride + 16, bytes);
    for (i64 s = 0; s < steps; s++, left += TILE, right += TILE) {
        TILE_LOAD(4, left, 64);
        TILE_LOAD(6, right, 64);
        TILE_MULTIPLY(0, 4, 6);
        if (rights == 2) {
            TILE_LOAD(7, right + right_step, 64);
            TILE_MULTIPLY(1, 4, 7);
        }
        if (lefts == 2) {
            TILE_LOAD(5, left + left_step, 64);
            TILE_MULTIPLY(2, 5, 6);
        }
        if (lefts == 2 && rights == 2) TILE_MULTIPLY(3, 5, 7);
    }
    TILE_STORE(0, c, bytes);
    if (rights == 2) TILE_STORE(1, c + 16, bytes);
    if (lefts == 2) TILE_STORE(2, c + 16 * stride, bytes);
    if (lefts == 2 && rights == 2) TILE_STORE(3, c + 16 * stride + 16, bytes);
}

/* sums += the block in `tiles` times x, `room` tokens, from `column` on. */
static void amx_multiply(const uint16_t *tiles, i64 n, i64 k, const uint16_t *x, i64 room,
                         i64 columns, i64 column, int across, float *sums, i64 stride) {
    i64 steps = ceil_div(k, 32), row_tiles = ceil_div(n, 16), token_tiles = room / 16;
    i64 tile_step = PRODUCT_COLUMNS / 32 * TILE, x_step = ceil_div(columns, 32) * TILE;
    x += column / 32 * TILE;
    const uint16_t *left = across ? x : tiles, *right = across ? tiles : x;
    i64 lefts = across ? token_tiles : row_tiles, rights = across ? row_tiles : token_tiles;
    i64 left_step = across ? x_step : tile_step, right_step = across ? tile_step : x_step;
    TILES_READ_MEMORY;
    for (i64 j = 0; j < rights; j += 2)
        for (i64 i = 0; i < lefts; i += 2) {
            const uint16_t *l = left + i * left_step, *r = right + j * right_step;
            float *c = sums + i * 16 * stride + j * 16;
            if (i + 1 < lefts && j + 1 < rights)
                amx_square(l, left_step, r, right_step, steps, c, stride, 2, 2);
            else if (i + 1 < lefts) amx_square(l, left_step, r, right_step, steps, c, stride, 2, 1);
            else if (j + 1 < rights) amx_square(l, left_step, r, right_step, steps, c, stride, 1, 2);
            else amx_square(l, left_step, r, right_step, steps, c, stride, 1, 1);
        }
}
#endif

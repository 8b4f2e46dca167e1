/* Multiply-adds in single precision with tokens side by side in a register (cpu_product.h).
 *
 * x is packed in panels of 2 * LANES tokens, the last one of LANES where that is enough: all
 * columns of a panel, the tokens of a column together. A block of rows takes them LANES * 2 tokens
 * by FMA_ROWS rows at a time, or LANES by twice as many, which fills the registers with sums. */
#ifndef HF_VQ_CPU_FMA_H
#define HF_VQ_CPU_FMA_H
#include "cpu_product.h"

#ifdef __AVX512F__
enum { LANES = 16, FMA_ROWS = 12 };
#elif defined(__AVX__)
enum { LANES = 8, FMA_ROWS = 6 };
#elif defined(__aarch64__)
enum { LANES = 4, FMA_ROWS = 12 };
#else
enum { LANES = 4, FMA_ROWS = 6 };
#endif
typedef float lanes_t __attribute__((vector_size(LANES * 4), aligned(4)));

INLINE i64 fma_room(i64 tokens) { return ceil_div(tokens, LANES) * LANES; }

/* Where the panel of token t begins, and how wide it is. */
INLINE i64 fma_panel(i64 t, i64 tokens, i64 *width) {
    i64 begin = t / (2 * LANES) * (2 * LANES);
    *width = tokens - begin <= LANES ? LANES : 2 * LANES;
    return begin;
}

INLINE void fma_pack(float *to, i64 columns, i64 tokens, i64 t, i64 column, i64 n,
                     const float *values) {
    i64 width, begin = fma_panel(t, tokens, &width);
    to += begin * columns + column * width + t - begin;
    for (i64 i = 0; i < n; i++) to[i * width] = values[i];
}

/* sums (rows, stride) += block times one panel; element (r, j) of the block at r * rs + j * cs. */
INLINE void fma_kernel(const float *w, i64 rs, i64 cs, i64 k, const float *x, float *sums,
                       i64 stride, const int rows, const int parts) {
    lanes_t sum[2 * FMA_ROWS][2];
#pragma GCC unroll 24
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int p = 0; p < parts; p++) sum[r][p] = *(lanes_t *)(sums + r * stride + p * LANES);
    for (i64 j = 0; j < k; j++) {
        lanes_t values[2];
#pragma GCC unroll 2
        for (int p = 0; p < parts; p++)
            values[p] = *(const lanes_t *)(x + (j * parts + p) * LANES);
#pragma GCC unroll 24
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int p = 0; p < parts; p++) sum[r][p] += w[r * rs + j * cs] * values[p];
    }
#pragma GCC unroll 24
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int p = 0; p < parts; p++) *(lanes_t *)(sums + r * stride + p * LANES) = sum[r][p];
}

/* sums (rows, stride) += block (n rows, k columns from `column` on) times all panels. */
static void fma_multiply(const float *block, int across, i64 block_stride, i64 n, i64 k,
                         const float *x, i64 columns, i64 column, i64 tokens, float *sums,
                         i64 stride) {
    for (i64 t = 0; t < tokens;) {
        i64 width, begin = fma_panel(t, tokens, &width);
        const float *panel = x + begin * columns + column * width;
        i64 rows = width == LANES ? 2 * FMA_ROWS : FMA_ROWS;
        for (i64 r = 0; r < n; r += rows) {
            float *to = sums + r * stride + begin;
            const float *row = block + (across ? r : r * block_stride);
            const i64 along = PRODUCT_COLUMNS + 16; /* block_stride, but known */
            if (across && width == LANES)
                fma_kernel(row, 1, block_stride, k, panel, to, stride, 2 * FMA_ROWS, 1);
            else if (across)
                fma_kernel(row, 1, block_stride, k, panel, to, stride, FMA_ROWS, 2);
            else if (width == LANES)
                fma_kernel(row, along, 1, k, panel, to, stride, 2 * FMA_ROWS, 1);
            else
                fma_kernel(row, along, 1, k, panel, to, stride, FMA_ROWS, 2);
        }
        t = begin + width;
    }
}
#endif

/* Products of many tokens with a packed matrix, whatever its format: blocks of it are decoded into
 * the second-level cache, multiplied there with all tokens, and overwritten.
 *
 * A format gives one function, `decode`, which writes a block of the matrix as float in the order
 * that comes naturally: along rows (`across` 0), or along columns (`across` 1). The rest is here:
 * threads, packing of x, and the multiplication, on AMX tiles where x is bfloat16 and the processor
 * has them (cpu_amx.h), else by fused multiply-adds in single precision, tokens side by side in a
 * register. So errors are those of rounding x (and with AMX the block) to its own dtype.
 *
 * To use it, fill a product_t (0 or NULL for what does not apply) and call product(). */
#ifndef HF_VQ_CPU_PRODUCT_H
#define HF_VQ_CPU_PRODUCT_H
#include "cpu_common.h"

/* Blocks that `decode` is asked for span at most so many columns, and begin at multiples of 64. */
enum { PRODUCT_COLUMNS = 256 };

typedef struct {
    const void *matrix; /* handed to `decode` */
    /* W[row .. row + n - 1, column .. column + k - 1] as float to out[r * stride + j] (across 0) or
     * out[j * stride + r] (across 1), r < n, j < k, columns as they are stored. `row` is a multiple
     * of `row_step`, and n too unless the matrix ends; with across 1, out has room for n rounded up
     * to `row_step`. `scratch`: `scratch_bytes` of this thread, kept between its calls. */
    void (*decode)(const void *matrix, i64 row, i64 n, i64 column, i64 k, float *out, i64 stride,
                   void *scratch);
    i64 scratch_bytes, row_step;
    int across;

    i64 rows, columns, tokens;
    const void *x;         /* (tokens, columns) */
    void *y;               /* (tokens, rows) */
    int dtype;             /* of x and y */
    const int16_t *perm;   /* stored column p is column perm[p] of x, unsigned; or NULL */
    const float *factor;   /* (columns,), of columns of x, multiplied into them; or NULL */
    const float *row_factor, *row_offset; /* (rows,): y = sum * row_factor + shift * row_offset */
    const float *shift;    /* (tokens,), or NULL */
    const float *bias;     /* (rows,), or NULL */
} product_t;

/* y = x @ W.T on `threads` threads. Returns 0, or 1 without memory. */
int product(const product_t *task, i64 threads);

#endif

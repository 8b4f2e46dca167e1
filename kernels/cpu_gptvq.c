/* GPTVQ: vectors of `vector_dim` consecutive columns of a row (docs/format.md).
 *
 * Products of many tokens and dense weights, by decoded blocks. Single tokens are multiplied
 * without decoding, by tables in registers (cpu_gptvq_vbmi.h, cpu_gptvq_avx2.h) or in the
 * first-level cache (cpu_gptvq_table.h), where they fit. */
#include "cpu_gptvq_avx2.h"
#include "cpu_gptvq_table.h"
#include "cpu_gptvq_vbmi.h"
#include "cpu_product.h"

/* The 16 scales of every block, float (blocks, 16): exact powers, or products of two. */
static void scale_table(const gptvq_t *w, int exact, float *out) {
    i64 blocks = ceil_div(w->columns, w->scale_block);
    for (i64 t = 0; t < blocks; t++) {
        double offset = w->scale_grid[t], step = w->scale_grid[blocks + t];
        double value = exp2(offset), ratio = exp2(step);
        for (int a = 0; a < 16; a++) {
            if (!w->log_scales) value = offset + step * a;
            else if (exact) value = exp2(offset + step * a);
            out[16 * t + a] = (float)value;
            if (w->log_scales && !exact) value *= ratio;
        }
    }
}

typedef struct {
    const gptvq_t *w;
    const float *scales; /* scale_table, or NULL */
    void *out;
    int dtype;
    i64 first_row, rows;
} decoding_t;

INLINE void copy_entries(const float *books, const uint32_t *codes, i64 n, i64 d, float *out) {
    for (i64 v = 0; v < n; v++) memcpy(out + v * d, books + codes[v] * d, (size_t)d * 4);
}

INLINE void copy_bytes(const float *table, const uint8_t *bytes, i64 n, i64 each, float *out) {
    for (i64 i = 0; i < n; i++) memcpy(out + i * each, table + bytes[i] * each, (size_t)each * 4);
}

/* Columns column .. column + k - 1 of a row, times the scales of their blocks. */
static void scale_row(const gptvq_t *w, const float *table, i64 row, i64 column, i64 k, float *out) {
    i64 B = w->scale_block, first = column / B, end = ceil_div(column + k, B);
    float scales[PRODUCT_COLUMNS + 1];
    expand_scales(w, table, row, first, end, scales - first);
    for (i64 t = first, i = 0, stop; t < end; t++) {
        float scale = scales[t - first];
        stop = smaller((t + 1) * B - column, k);
        for (; i + 16 <= stop; i += 16) /* one register or two, no loop of its own */
            for (i64 j = 0; j < 16; j++) out[i + j] *= scale;
        for (; i < stop; i++) out[i] *= scale;
    }
}

/* Rows row .. row + n - 1 of one group, columns of one stripe; see product_t. Through a table of
 * bytes where that saves more than it costs. `scales`: scale_table, or NULL. */
static void decode_piece(const gptvq_t *w, const float *books, const float *scales, i64 row, i64 n,
                         i64 column, i64 k, float *out, i64 stride, float *table) {
    i64 d = w->vector_dim, vectors = ceil_div(w->columns, d), first = column / d, m = ceil_div(k, d);
    int bits = bits_of(w->num_centroids);
    i64 words = ceil_div(vectors * bits, 32), each = floats_of_byte(w);
    int whole = each && first * bits % 8 == 0 && m * bits % 8 == 0;
    if (whole && n * m * bits / 8 >= 512) {
        if (bits < 8) byte_table(books, w->num_centroids, bits, d, table);
        const float *from = bits < 8 ? table : books;
        for (i64 r = 0; r < n; r++, out += stride) {
            const uint8_t *bytes = (const uint8_t *)(w->indices + (row + r) * words) + first * bits / 8;
            i64 count = m * bits / 8;
            switch (each) { /* so that what a byte stands for is one load and one store */
            case 2: copy_bytes(from, bytes, count, 2, out); break;
            case 4: copy_bytes(from, bytes, count, 4, out); break;
            case 8: copy_bytes(from, bytes, count, 8, out); break;
            default: copy_bytes(from, bytes, count, 16, out);
            }
            if (scales) scale_row(w, scales, row + r, column, k, out);
        }
        return;
    }
    uint32_t codes[PRODUCT_COLUMNS + 16];
    for (i64 r = 0; r < n; r++, out += stride) {
        unpack((const uint32_t *)w->indices + (row + r) * words, words, first, m, bits, codes);
        switch (d) {
        case 1: copy_entries(books, codes, m, 1, out); break;
        case 2: copy_entries(books, codes, m, 2, out); break;
        case 4: copy_entries(books, codes, m, 4, out); break;
        default: copy_entries(books, codes, m, 8, out);
        }
        if (scales) scale_row(w, scales, row + r, column, k, out);
    }
}

/* A block of W, for product_t. `scratch`: a codebook and a table of bytes. */
static void decode_block(const void *matrix, i64 row, i64 n, i64 column, i64 k, float *out,
                         i64 stride, void *scratch) {
    const decoding_t *task = matrix;
    const gptvq_t *w = task->w;
    float *table = scratch, *room = table + TABLE_FLOATS;
    i64 end = column + k, next;
    for (i64 j = column; j < end; j = next) {
        i64 stripe = j / w->group_columns;
        next = smaller((stripe + 1) * w->group_columns, end);
        for (i64 r = row, stop; r < row + n; r = stop) {
            i64 group = r / w->group_rows;
            stop = smaller((group + 1) * w->group_rows, row + n);
            decode_piece(w, codebook(w, stripe, group, room), w->scale_block ? task->scales : NULL, r,
                         stop - r, j, next - j, out + (r - row) * stride + j - column, stride, table);
        }
    }
}

static i64 scratch_bytes(const gptvq_t *w) {
    return (TABLE_FLOATS + (w->books ? 0 : w->num_centroids * w->vector_dim)) * 4;
}

static float *scales_of(const gptvq_t *w, int exact) {
    float *scales = allocate(w->scale_block ? ceil_div(w->columns, w->scale_block) * 64 : 0);
    if (scales && w->scale_block) scale_table(w, exact, scales);
    return scales;
}

/* Up to how many tokens hf_vq_gptvq_linear is the faster way. */
EXPORT i64 hf_vq_gptvq_most_tokens(const gptvq_t *w) {
    if (vbmi_suits(w)) return w->scale_block ? 28 : 20;
    return avx2_suits(w) ? 6 : table_suits(w) ? (w->scale_block ? 2 : 3) : 0;
}

/* y (tokens, rows) = x (tokens, columns) @ W.T + bias, both of the dtype, without decoding W; for
 * hf_vq_gptvq_most_tokens at most. Returns 0, or 1 without memory. */
EXPORT int hf_vq_gptvq_linear(const gptvq_t *w, int dtype, const void *x, const float *bias, void *y,
                              i64 tokens, i64 threads) {
    float *scales = scales_of(w, 0);
    i64 room = smaller(VBMI_TOKENS, tokens + 1);
    float *line = allocate(room * w->columns * 4), *sums = allocate(room * w->rows * 4);
    int failed = !scales || !line || !sums;
    int vbmi = vbmi_suits(w), avx2 = avx2_suits(w);
    int planes = dtype == FLOAT32 ? 3 : 2; /* bytes of x: far finer than it came in */
    threads = threads_for(w->rows, w->columns, threads);
    for (i64 i = 0, n; i < tokens && !failed; i += n) {
        i64 at_once = vbmi ? vbmi_at_once(w, tokens - i, planes) : 1;
        n = smaller(at_once, tokens - i);
        load(x, i * w->columns, dtype, line, n * w->columns);
        memset(line + n * w->columns, 0, (size_t)((at_once - n) * w->columns) * 4);
        failed = vbmi   ? vbmi_linear(w, scales, line, sums, at_once, planes, threads)
                 : avx2 ? avx2_linear(w, scales, line, sums, planes, threads)
                        : table_linear(w, scales, line, sums, threads);
        for (i64 t = 0; t < n; t++)
            store_sums(y, (i + t) * w->rows, dtype, sums + t * w->rows, bias, w->rows);
    }
    free(scales);
    free(line);
    free(sums);
    return failed;
}

/* y (tokens, rows) = x (tokens, columns) @ W.T + bias, both of the dtype. Returns 0, or 1. */
EXPORT int hf_vq_gptvq_product(const gptvq_t *w, const void *x, void *y, i64 tokens, int dtype,
                               const float *bias, i64 threads) {
    float *scales = scales_of(w, 0);
    if (!scales) return 1;
    decoding_t decoding = {w, scales, NULL, 0, 0, 0};
    product_t task = {
        .matrix = &decoding, .decode = decode_block, .scratch_bytes = scratch_bytes(w),
        .row_step = 1, .rows = w->rows, .columns = w->columns, .tokens = tokens,
        .x = x, .y = y, .dtype = dtype, .bias = bias,
    };
    int failed = product(&task, threads);
    free(scales);
    return failed;
}

enum { DECODED_ROWS = 64 };

static int decode_of_thread(const void *context, i64 thread, i64 threads) {
    const decoding_t *task = context;
    i64 columns = task->w->columns, stride = PRODUCT_COLUMNS + 16;
    float *block = allocate(DECODED_ROWS * stride * 4), *scratch = allocate(scratch_bytes(task->w));
    int failed = !block || !scratch;
    for (i64 r = thread * DECODED_ROWS; r < task->rows && !failed; r += threads * DECODED_ROWS) {
        i64 n = smaller(DECODED_ROWS, task->rows - r);
        for (i64 j = 0; j < columns; j += PRODUCT_COLUMNS) {
            i64 k = smaller(PRODUCT_COLUMNS, columns - j);
            decode_block(task, task->first_row + r, n, j, k, block, stride, scratch);
            for (i64 i = 0; i < n; i++)
                store(task->out, (r + i) * columns + j, task->dtype, block + i * stride, k);
        }
    }
    free(block);
    free(scratch);
    return failed;
}

/* Rows first .. first + n - 1 of W to out (n, columns) of the dtype. Returns 0, or 1. */
EXPORT int hf_vq_gptvq_decode(const gptvq_t *w, i64 first, i64 n, int dtype, void *out,
                              i64 threads) {
    float *scales = scales_of(w, 1);
    if (!scales) return 1;
    decoding_t task = {w, scales, out, dtype, first, n};
    int failed = parallel(decode_of_thread, &task, threads);
    free(scales);
    return failed;
}

/* GPTVQ: vectors of `vector_dim` consecutive columns of a row (docs/format.md).
 *
 * Without AVX-512 VBMI, or for tables that do not fit registers, a row is decoded into a buffer in
 * the first-level cache and multiplied from there. cpu_gptvq_vbmi.h has the faster way. */
#include "cpu_common.h"
#include "cpu_gptvq.h"
#include "cpu_gptvq_vbmi.h"

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
    const float *x;
    float *y;
    void *out;
    int dtype;
    i64 first_row, rows;
} task_t;

INLINE void gather(const float *books, const uint32_t *codes, i64 n, i64 d, float *out) {
    for (i64 v = 0; v < n; v++) memcpy(out + v * d, books + codes[v] * d, (size_t)d * 4);
}

/* The same with entries of 16 bits. */
INLINE void gather_16(const uint16_t *books, const uint32_t *codes, i64 n, i64 d, uint16_t *out) {
    i64 v = 0;
#ifdef HF_VQ_VBMI
    if (d == 2)
        for (; v + 16 <= n; v += 16)
            _mm512_storeu_si512(
                out + v * 2, _mm512_i32gather_epi32(_mm512_loadu_si512(codes + v), books, 4));
    if (d == 4)
        for (; v + 8 <= n; v += 8)
            _mm512_storeu_si512(
                out + v * 4,
                _mm512_i32gather_epi64(_mm256_loadu_si256((const void *)(codes + v)), books, 8));
#endif
    for (; v < n; v++) memcpy(out + v * d, books + codes[v] * d, (size_t)d * 2);
}

/* Codebook (stripe, group) as floats (k, d): in place, or expanded to `room`. */
static const float *codebook(const gptvq_t *w, i64 stripe, i64 group, i64 groups, float *room) {
    i64 size = w->num_centroids * w->vector_dim, at = stripe * groups + group;
    if (w->books) return w->books + at * size;
    const int8_t *stored = w->books8 + at * size;
    float scale = w->book_scales ? w->book_scales[at] : 1;
    for (i64 e = 0; e < size; e++) room[e] = (float)stored[e] * scale;
    return room;
}

/* Decoded rows, a task's share: to `out`, or multiplied by x to `y`. */
static int rows_of_thread(const void *context, i64 thread, i64 threads) {
    const task_t *task = context;
    const gptvq_t *w = task->w;
    i64 d = w->vector_dim, columns = w->columns, vectors = ceil_div(columns, d);
    int bits = bits_of(w->num_centroids);
    i64 words = ceil_div(vectors * bits, 32), groups = ceil_div(w->rows, w->group_rows);
    i64 stripes = ceil_div(columns, w->group_columns), per_stripe = w->group_columns / d;
    i64 size = w->num_centroids * d, blocks = w->scale_block ? ceil_div(columns, w->scale_block) : 0;
    i64 low = task->first_row + task->rows * thread / threads;
    i64 high = task->first_row + task->rows * (thread + 1) / threads;
    uint32_t *codes = allocate((vectors + 16) * 4);
    float *row = allocate((vectors * d + 16) * 4);
    float *books = allocate(w->books ? 0 : stripes * size * 4);
    const float **book = allocate(stripes * (i64)sizeof(float *));
    /* without scales, entries are rounded before they are looked up */
    int narrow = task->out && task->dtype != FLOAT32 && !blocks;
    uint16_t *books_16 = allocate(narrow ? stripes * size * 2 : 0);
    if (!codes || !row || !books || !book || !books_16) return 1;
    for (i64 r = low; r < high; r++) {
        i64 group = r / w->group_rows;
        if (r == low || r % w->group_rows == 0)
            for (i64 s = 0; s < stripes; s++) {
                book[s] = codebook(w, s, group, groups, books + s * size);
                if (narrow) store(books_16, s * size, task->dtype, book[s], size);
            }
        unpack((const uint32_t *)w->indices + r * words, words, 0, vectors, bits, codes);
        for (i64 s = 0; s < stripes; s++) {
            i64 v = s * per_stripe, n = smaller(per_stripe, vectors - v);
            if (narrow) {
                uint16_t *to = (uint16_t *)row + v * d;
                switch (d) {
                case 1: gather_16(books_16 + s * size, codes + v, n, 1, to); break;
                case 2: gather_16(books_16 + s * size, codes + v, n, 2, to); break;
                case 4: gather_16(books_16 + s * size, codes + v, n, 4, to); break;
                default: gather_16(books_16 + s * size, codes + v, n, 8, to);
                }
                continue;
            }
            switch (d) { /* so that a vector is one load and one store */
            case 1: gather(book[s], codes + v, n, 1, row + v); break;
            case 2: gather(book[s], codes + v, n, 2, row + v * 2); break;
            case 4: gather(book[s], codes + v, n, 4, row + v * 4); break;
            default: gather(book[s], codes + v, n, 8, row + v * 8);
            }
        }
        for (i64 t = 0; t < blocks; t++) {
            i64 stream = ceil_div(blocks * 4, 32);
            uint32_t code = code_at((const uint32_t *)w->scale_codes + r * stream, stream, 4 * t, 4);
            float scale = task->scales[16 * t + code];
            i64 end = smaller((t + 1) * w->scale_block, columns);
            for (i64 j = t * w->scale_block; j < end; j++) row[j] *= scale;
        }
        if (narrow) {
            memcpy((uint16_t *)task->out + (r - task->first_row) * columns, row, columns * 2);
            continue;
        }
        if (task->out) {
            store(task->out, (r - task->first_row) * columns, task->dtype, row, columns);
            continue;
        }
        f8 sum[4] = {{0}};
        i64 j = 0;
        for (; j + 32 <= columns; j += 32)
            for (int i = 0; i < 4; i++)
                sum[i] += *(const f8 *)(row + j + 8 * i) * *(const f8 *)(task->x + j + 8 * i);
        sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        float total = 0;
        for (int i = 0; i < 8; i++) total += sum[0][i];
        for (; j < columns; j++) total += row[j] * task->x[j];
        task->y[r] = total;
    }
    free(codes);
    free(row);
    free(books);
    free(book);
    free(books_16);
    return 0;
}

/* y (tokens, rows) = x (tokens, columns) @ W.T, both float. `planes`: bytes that x may be rounded
 * to, 2 (16 bits of the largest of a few columns) or 3. Returns 0, or 1 without memory. */
EXPORT int hf_vq_gptvq_linear(const gptvq_t *w, const float *x, float *y, i64 tokens, int planes,
                              i64 threads) {
    i64 blocks = w->scale_block ? ceil_div(w->columns, w->scale_block) : 0;
    float *scales = allocate(blocks * 64);
    if (!scales) return 1;
    if (blocks) scale_table(w, 0, scales);
    int failed = 0;
    for (i64 i = 0; i < tokens && !failed; i++) {
        const float *xi = x + i * w->columns;
        float *yi = y + i * w->rows;
        failed = vbmi_linear(w, scales, xi, yi, planes, threads);
        if (failed == NOT_FOR_VBMI) {
            task_t task = {w, blocks ? scales : NULL, xi, yi, NULL, 0, 0, w->rows};
            failed = parallel(rows_of_thread, &task, threads);
        }
    }
    free(scales);
    return failed;
}

/* Rows first .. first + n - 1 of W to out (n, columns) of the dtype. Returns 0, or 1. */
EXPORT int hf_vq_gptvq_decode(const gptvq_t *w, i64 first, i64 n, int dtype, void *out,
                              i64 threads) {
    i64 blocks = w->scale_block ? ceil_div(w->columns, w->scale_block) : 0;
    float *scales = allocate(blocks * 64);
    if (!scales) return 1;
    if (blocks) scale_table(w, 1, scales);
    task_t task = {w, blocks ? scales : NULL, NULL, NULL, out, dtype, first, n};
    int failed = parallel(rows_of_thread, &task, threads);
    free(scales);
    return failed;
}

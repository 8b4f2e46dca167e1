/* VPTQ: vectors of `vector_dim` consecutive rows of a column (docs/format.md).
 *
 * Four blocks of rows at a time: their codes of 64 columns are unpacked to offsets, and whole
 * entries of the codebook, padded to `width` floats, are loaded, multiplied by an entry of x and
 * summed in registers. Codebooks up to some thousand entries stay in the first two caches. */
#include "cpu_product.h"
#include "cpu_vptq_vnni.h"

enum { AT_ONCE = 4, WIDEST = 16 };
#if defined(__F16C__) && defined(__FMA__) && defined(__AVX2__)
#define HALF_BOOKS 1
#endif

/* Whether `half_books` can be used. */
EXPORT int hf_vq_vptq_half_books(void) {
#ifdef HALF_BOOKS
    return 1;
#else
    return 0;
#endif
}

typedef struct {
    const vptq_t *w;
    const float *x; /* in stored order, times scale of its column */
    float *y;
    float shift; /* sum of x times offset of its column; with norm_rows the sum of x */
    void *out;
    int dtype;
    i64 first, rows;
} task_t;

INLINE i64 column_of(const vptq_t *w, i64 stored) {
    return w->perm ? (uint16_t)w->perm[stored] : stored;
}

/* Offsets, in floats, of the main and the residual entries of columns first .. first + n - 1. */
INLINE void offsets(const vptq_t *w, i64 group, i64 block, i64 first, i64 n, uint32_t *at,
                    uint32_t *res_at) {
    i64 words;
    const uint32_t *stream = codes_of_block(w, group, block, &words);
    int bits = (int)(w->main_bits + w->res_bits);
    int up = w->width == 4 ? 2 : w->width == 8 ? 3 : 4;
    unpack_to(stream, words, first, n, bits, w->res_books ? 0 : up, at);
    uint32_t mask = ((uint32_t)1 << w->main_bits) - 1, width = (uint32_t)w->width;
    if (!w->res_books) return;
    for (i64 i = 0; i < n; i++) res_at[i] = (at[i] >> w->main_bits) * width;
    for (i64 i = 0; i < n; i++) at[i] = (at[i] & mask) * width;
}

/* sums[block] += entries of n columns times x, for m <= AT_ONCE blocks. */
#define MULTIPLY(NAME, V, PARTS)                                                                   \
    static void NAME(const float *book, uint32_t (*at)[CHUNK], const float *x, i64 n, i64 m,       \
                     float (*sums)[WIDEST]) {                                                      \
        V a[AT_ONCE][PARTS], b[AT_ONCE][PARTS];                                                    \
        for (i64 i = 0; i < AT_ONCE; i++)                                                          \
            for (i64 p = 0; p < PARTS; p++) {                                                      \
                a[i][p] = ((V *)sums[i])[p];                                                       \
                b[i][p] = (V){0};                                                                  \
            }                                                                                      \
        i64 j = 0;                                                                                 \
        for (; j + 2 <= n; j += 2)                                                                 \
            for (i64 i = 0; i < AT_ONCE; i++)                                                      \
                for (i64 p = 0; p < PARTS; p++) {                                                  \
                    a[i][p] += ((const V *)(book + at[i][j]))[p] * x[j];                           \
                    b[i][p] += ((const V *)(book + at[i][j + 1]))[p] * x[j + 1];                   \
                }                                                                                  \
        for (; j < n; j++)                                                                         \
            for (i64 i = 0; i < AT_ONCE; i++)                                                      \
                for (i64 p = 0; p < PARTS; p++)                                                    \
                    a[i][p] += ((const V *)(book + at[i][j]))[p] * x[j];                           \
        for (i64 i = 0; i < m; i++)                                                                \
            for (i64 p = 0; p < PARTS; p++) ((V *)sums[i])[p] = a[i][p] + b[i][p];                 \
    }
MULTIPLY(multiply_4, f4, 1)
MULTIPLY(multiply_8, f8, 1)
MULTIPLY(multiply_16, f8, 2)

/* multiply_8 with entries in float16: twice as many of a large codebook stay in a cache. */
static void multiply_half(const uint16_t *book, uint32_t (*at)[CHUNK], const float *x, i64 n, i64 m,
                          float (*sums)[WIDEST]) {
#ifdef HALF_BOOKS
    __m256 sum[AT_ONCE];
    for (i64 i = 0; i < AT_ONCE; i++) sum[i] = _mm256_loadu_ps(sums[i]);
    for (i64 j = 0; j < n; j++)
        for (i64 i = 0; i < AT_ONCE; i++) {
            __m256 entry = _mm256_cvtph_ps(_mm_loadu_si128((const void *)(book + at[i][j])));
            sum[i] = _mm256_fmadd_ps(entry, _mm256_set1_ps(x[j]), sum[i]);
        }
    for (i64 i = 0; i < m; i++) _mm256_storeu_ps(sums[i], sum[i]);
#else
    (void)book, (void)at, (void)x, (void)n, (void)m, (void)sums;
#endif
}

static void multiply(i64 width, const float *book, uint32_t (*at)[CHUNK], const float *x, i64 n,
                     i64 m, float (*sums)[WIDEST]) {
    if (width == 4) multiply_4(book, at, x, n, m, sums);
    else if (width == 8) multiply_8(book, at, x, n, m, sums);
    else multiply_16(book, at, x, n, m, sums);
}

/* y of the row blocks of a thread: main and residual codes. */
static int product_of_thread(const void *context, i64 thread, i64 threads) {
    const task_t *task = context;
    const vptq_t *w = task->w;
    i64 v = w->vector_dim, blocks = ceil_div(w->rows, v);
    i64 per_group = (w->columns - w->outliers) / w->groups;
    uint32_t at[AT_ONCE][CHUNK] __attribute__((aligned(64))) = {{0}};
    uint32_t res_at[AT_ONCE][CHUNK] __attribute__((aligned(64))) = {{0}};
    float sums[AT_ONCE][WIDEST] __attribute__((aligned(64)));
    i64 high = blocks * (thread + 1) / threads;
    for (i64 block = blocks * thread / threads; block < high; block += AT_ONCE) {
        i64 m = smaller(AT_ONCE, high - block);
        memset(sums, 0, sizeof sums);
        for (i64 group = 0; group < w->groups; group++) {
            const float *x = task->x + w->outliers + group * per_group;
            for (i64 j = 0; j < per_group; j += CHUNK) {
                i64 n = smaller(CHUNK, per_group - j);
                for (i64 i = 0; i < m; i++) offsets(w, group, block + i, j, n, at[i], res_at[i]);
                i64 book = group * w->entries * w->width;
                if (w->half_books) multiply_half(w->half_books + book, at, x + j, n, m, sums);
                else multiply(w->width, w->books + book, at, x + j, n, m, sums);
                if (w->res_books)
                    multiply(w->width, w->res_books + group * w->res_entries * w->width, res_at,
                             x + j, n, m, sums);
            }
        }
        for (i64 i = 0; i < m; i++)
            for (i64 t = 0; t < v && (block + i) * v + t < w->rows; t++)
                task->y[(block + i) * v + t] = sums[i][t];
    }
    return 0;
}

/* Then the outlier columns, in blocks of their own, and the norm. */
static int finish_of_thread(const void *context, i64 thread, i64 threads) {
    const task_t *task = context;
    const vptq_t *w = task->w;
    i64 v = w->outliers ? w->outlier_dim : 1, blocks = ceil_div(w->rows, v);
    uint32_t at[AT_ONCE][CHUNK] __attribute__((aligned(64))) = {{0}};
    float sums[AT_ONCE][WIDEST] __attribute__((aligned(64)));
    i64 high = blocks * (thread + 1) / threads;
    for (i64 block = blocks * thread / threads; block < high; block += AT_ONCE) {
        i64 m = smaller(AT_ONCE, high - block);
        memset(sums, 0, sizeof sums);
        for (i64 j = 0; j < w->outliers; j += CHUNK) {
            i64 n = smaller(CHUNK, w->outliers - j);
            for (i64 i = 0; i < m; i++) {
                const int16_t *codes = w->outlier_indices + (block + i) * w->outliers + j;
                for (i64 q = 0; q < n; q++)
                    at[i][q] = (uint32_t)((uint16_t)codes[q] * w->outlier_width);
            }
            multiply(w->outlier_width, w->outlier_books, at, task->x + j, n, m, sums);
        }
        for (i64 i = 0; i < m; i++)
            for (i64 t = 0; t < v && (block + i) * v + t < w->rows; t++) {
                i64 r = (block + i) * v + t;
                float sum = task->y[r] + sums[i][t];
                if (w->scale && w->norm_rows) sum = sum * w->scale[r] + w->offset[r] * task->shift;
                else if (w->scale) sum += task->shift;
                task->y[r] = sum;
            }
    }
    return 0;
}

/* A token in stored order, times the norm's scales; returns the shift of task_t. */
static float store_token(const vptq_t *w, const float *x, float *stored) {
    double shift = 0;
    for (i64 p = 0; p < w->columns; p++) {
        i64 j = column_of(w, p);
        stored[p] = x[j];
        if (w->scale && !w->norm_rows) {
            stored[p] *= w->scale[j];
            shift += (double)x[j] * w->offset[j];
        } else {
            shift += x[j];
        }
    }
    return (float)shift;
}

/* y (tokens, rows) = x (tokens, columns) @ W.T + bias, both of the dtype, without decoding W.
 * Returns 0, or 1 without memory. */
EXPORT int hf_vq_vptq_linear(const vptq_t *w, int dtype, const void *x, const float *bias, void *y,
                             i64 tokens, i64 threads) {
    i64 at_once = w->books16 ? smaller(VNNI_TOKENS, tokens) : 1;
    float *line = allocate(w->columns * 4), *stored = allocate(at_once * w->columns * 4);
    float *sums = allocate(at_once * w->rows * 4), shift[VNNI_TOKENS];
    int failed = !line || !stored || !sums;
    threads = threads_for(w->rows, w->columns, threads);
    for (i64 first = 0; first < tokens && !failed; first += at_once) {
        i64 n = smaller(at_once, tokens - first);
        for (i64 t = 0; t < n; t++) {
            load(x, (first + t) * w->columns, dtype, line, w->columns);
            shift[t] = store_token(w, line, stored + t * w->columns);
        }
        if (w->books16) failed = vnni_linear(w, stored, sums, n, threads);
        for (i64 t = 0; t < n && !failed; t++) {
            task_t task = {w, stored + t * w->columns, sums + t * w->rows, shift[t], NULL, 0, 0, 0};
            if (!w->books16) failed = parallel(product_of_thread, &task, threads);
            if (!failed && (w->scale || w->outliers)) failed = parallel(finish_of_thread, &task, threads);
            store_sums(y, (first + t) * w->rows, dtype, task.y, bias, w->rows);
        }
    }
    free(line);
    free(stored);
    free(sums);
    return failed;
}

/* Up to how many tokens hf_vq_vptq_linear with `books16` is the faster way; 0: never. Beyond, decoded
 * blocks are, whose decoding takes longest where entries are padded. */
EXPORT i64 hf_vq_vptq_most_tokens16(i64 vector_dim, int residual) {
#ifdef HF_VQ_VBMI
    if (vector_dim > 8) return 0;
    if (vector_dim > 4 && vector_dim < 8) return 24;
    return vector_dim < 4 ? 8 : residual || vector_dim == 4 ? 12 : 16;
#else
    (void)vector_dim, (void)residual;
    return 0;
#endif
}

/* apart, so that no compiler makes one rounding of the two */
static __attribute__((noinline)) void scale_by(float *values, const float *by, float one, i64 n) {
    for (i64 i = 0; i < n; i++) values[i] *= by ? by[i] : one;
}
static __attribute__((noinline)) void shift_by(float *values, const float *by, float one, i64 n) {
    for (i64 i = 0; i < n; i++) values[i] += by ? by[i] : one;
}

INLINE void copy_entry(float *to, const float *entry, const float *second, i64 width) {
    for (i64 t = 0; t < width; t += 4) { /* widths are multiples of 4 */
        f4 part = *(const f4 *)(entry + t);
        if (second) part += *(const f4 *)(second + t);
        *(f4 *)(to + t) = part;
    }
}

/* Entries of n columns, or sums of two, each to the rows of a block. */
INLINE void copy_columns(float *to, i64 stride, const float *book, const uint32_t *at,
                         const float *res, const uint32_t *res_at, i64 n, i64 width) {
    for (i64 j = 0; j < n; j++)
        copy_entry(to + j * stride, book + at[j], res ? res + res_at[j] : NULL, width);
}

/* The columns of a thread, of rows first .. first + rows - 1, to out (columns, rows). */
static int decode_of_thread(const void *context, i64 thread, i64 threads) {
    const task_t *task = context;
    const vptq_t *w = task->w;
    i64 v = w->vector_dim, per_group = (w->columns - w->outliers) / w->groups;
    i64 low_block = task->first / v, blocks = ceil_div(task->rows, v);
    i64 chunks = ceil_div(per_group, CHUNK), room = (blocks + 1) * v + WIDEST;
    uint32_t at[CHUNK], res_at[CHUNK];
    float *values = allocate(CHUNK * room * 4);
    if (!values) return 1;
    i64 jobs = w->groups * chunks, outlier_jobs = ceil_div(w->outliers, CHUNK);
    for (i64 job = thread; job < jobs + outlier_jobs; job += threads) {
        int outlier = job >= jobs;
        i64 group = outlier ? 0 : job / chunks;
        i64 first = outlier ? (job - jobs) * CHUNK : job % chunks * CHUNK;
        i64 n = smaller(CHUNK, (outlier ? w->outliers : per_group) - first);
        if (outlier) {
            i64 dim = w->outlier_dim;
            for (i64 r = 0; r < task->rows; r++) {
                i64 row = task->first + r;
                const int16_t *codes = w->outlier_indices + row / dim * w->outliers + first;
                for (i64 j = 0; j < n; j++)
                    values[j * room + r] =
                        w->outlier_books[(uint16_t)codes[j] * w->outlier_width + row % dim];
            }
        } else {
            const float *book = w->books + group * w->entries * w->width;
            const float *res = w->res_books ? w->res_books + group * w->res_entries * w->width : NULL;
            for (i64 b = 0; b < blocks; b++) {
                offsets(w, group, low_block + b, first, n, at, res_at);
                float *to = values + b * v;
                /* the padding is overwritten by the next block */
                if (res) copy_columns(to, room, book, at, res, res_at, n, w->width);
                else copy_columns(to, room, book, at, NULL, NULL, n, w->width);
            }
        }
        for (i64 j = 0; j < n; j++) {
            i64 column = column_of(w, outlier ? first + j : w->outliers + group * per_group + first + j);
            float *of_column = values + j * room;
            if (w->scale && w->norm_rows) {
                scale_by(of_column, w->scale + task->first, 0, task->rows);
                shift_by(of_column, w->offset + task->first, 0, task->rows);
            } else if (w->scale) {
                scale_by(of_column, NULL, w->scale[column], task->rows);
                shift_by(of_column, NULL, w->offset[column], task->rows);
            }
            store(task->out, column * task->rows, task->dtype, of_column, task->rows);
        }
    }
    free(values);
    return 0;
}

/* Rows first .. first + n - 1 of W to out (columns, n) of the dtype; `first` is a multiple of
 * vector_dim. Returns 0, or 1 without memory. */
EXPORT int hf_vq_vptq_decode(const vptq_t *w, i64 first, i64 n, int dtype, void *out, i64 threads) {
    task_t task = {w, NULL, NULL, 0, out, dtype, first, n};
    return parallel(decode_of_thread, &task, threads);
}

/* Stored columns column .. column + k - 1 of n rows from `row` on, for product_t. */
static void decode_block(const void *matrix, i64 row, i64 n, i64 column, i64 k, float *out,
                         i64 stride, void *scratch) {
    const vptq_t *w = matrix;
    i64 v = w->vector_dim, per_group = (w->columns - w->outliers) / w->groups;
    uint32_t *at = scratch, *res_at = at + CHUNK;
    i64 j = column, end = column + k, next;
    for (; j < end && j < w->outliers; j++) {
        i64 dim = w->outlier_dim;
        for (i64 r = 0; r < n; r++) {
            uint16_t code = (uint16_t)w->outlier_indices[(row + r) / dim * w->outliers + j];
            out[(j - column) * stride + r] = w->outlier_books[code * w->outlier_width + (row + r) % dim];
        }
    }
    for (; j < end; j = next) {
        i64 group = (j - w->outliers) / per_group, first = (j - w->outliers) % per_group;
        next = smaller(smaller(j + CHUNK, end), j - first + per_group);
        const float *book = w->books + group * w->entries * w->width;
        const float *res = w->res_books ? w->res_books + group * w->res_entries * w->width : NULL;
        for (i64 b = 0; b < ceil_div(n, v); b++) {
            offsets(w, group, row / v + b, first, next - j, at, res_at);
            float *to = out + (j - column) * stride + b * v;
            /* the padding of an entry is overwritten by the next block */
            if (res && w->width == 8) copy_columns(to, stride, book, at, res, res_at, next - j, 8);
            else if (res) copy_columns(to, stride, book, at, res, res_at, next - j, w->width);
            else if (w->width == 4) copy_columns(to, stride, book, at, NULL, NULL, next - j, 4);
            else if (w->width == 8) copy_columns(to, stride, book, at, NULL, NULL, next - j, 8);
            else copy_columns(to, stride, book, at, NULL, NULL, next - j, 16);
        }
    }
}

/* y (tokens, rows) = x (tokens, columns) @ W.T + bias, both of the dtype. Returns 0, or 1. */
EXPORT int hf_vq_vptq_product(const vptq_t *w, const void *x, void *y, i64 tokens, int dtype,
                              const float *bias, i64 threads) {
    float *shift = allocate(tokens * 4), *line = allocate(w->columns * 4);
    int failed = !shift || !line;
    for (i64 t = 0; t < tokens && w->scale && !failed; t++) {
        load(x, t * w->columns, dtype, line, w->columns);
        double sum = 0;
        for (i64 j = 0; j < w->columns; j++) sum += w->norm_rows ? line[j] : (double)line[j] * w->offset[j];
        shift[t] = (float)sum;
    }
    product_t task = {
        .matrix = w, .decode = decode_block, .scratch_bytes = 2 * CHUNK * 4,
        .row_step = w->vector_dim, .across = 1,
        .rows = w->rows, .columns = w->columns, .tokens = tokens,
        .x = x, .y = y, .dtype = dtype, .perm = w->perm, .bias = bias,
        .factor = w->norm_rows ? NULL : w->scale, .row_factor = w->norm_rows ? w->scale : NULL,
        .row_offset = w->norm_rows ? w->offset : NULL, .shift = w->scale ? shift : NULL,
    };
    if (!failed) failed = product(&task, threads);
    free(shift);
    free(line);
    return failed;
}

/* CVXQ: codes of 0 to 8 bits along the rows of a cluster, a depth and a scale per column
 * (docs/format.md). Groups of one depth follow each other in the layout, so that the inner loops
 * have no branch; a thread computes blocks of rows of clusters. */
#include "cpu_cvxq.h"
#include "cpu_cvxq_decode.h"
#include "cpu_cvxq_float.h"
#include "cpu_cvxq_layout.h"
#include "cpu_product.h"

#if defined(HF_VQ_VBMI)
#include "cpu_cvxq_vbmi.h"
#elif defined(HF_VQ_AVX2)
#include "cpu_cvxq_avx2.h"
#else /* all in float */
typedef struct {
    void *room;
} integers_t;
static int make_room(integers_t *n, const cvxq_t *w, int dtype) { return (void)n, (void)w, (void)dtype, 0; }
static void to_integers(integers_t *n, const cluster_t *c, const float *f) { (void)n, (void)c, (void)f; }
static int sum_integers(const integers_t *n, const cluster_t *c, i64 row, float *sums) {
    return (void)n, (void)c, (void)row, (void)sums, 1;
}
#endif

enum { BLOCK = 128 }; /* rows that are summed at once; a multiple of 64 */

typedef struct {
    const cvxq_t *w;
    const float *x;
    float *y;
    void *out;
    int dtype;
    i64 cluster, clusters; /* decoded ones */
} task_t;

/* factors[i] = x * scale of all slots. Returns the sum of x * location. */
static float factors_of(const cluster_t *c, const float *x, float *factors) {
    float shift = 0;
    for (int b = c->location ? 0 : 1; b < DEPTHS; b++) {
        i64 i = c->at[b], end = i + c->count[b];
        if (!c->column_high)
            for (i64 k = i; k < end; k++) factors[k] = x[c->column[k]] * c->scale[k];
        else
            for (i64 k = i; k < end; k++) factors[k] = x[column_of(c, k)] * c->scale[k];
        if (c->location)
            for (i64 k = i; k < end; k++) shift += x[column_of(c, k)] * c->location[k];
        for (i64 k = end; k < c->at[b + 1]; k++) factors[k] = 0;
    }
    return shift;
}

static int product_of_thread(const void *context, i64 thread, i64 threads) {
    const task_t *task = context;
    const cvxq_t *w = task->w;
    i64 clusters = ceil_div(w->rows, w->group_rows), blocks = ceil_div(w->group_rows, BLOCK);
    i64 units = clusters * blocks, last = units * (thread + 1) / threads;
    float *factors = allocate(w->stride * 4), sums[BLOCK], shift = 0;
    integers_t integers = {0};
    int failed = !factors || make_room(&integers, w, task->dtype);
    cluster_t c = {0};
    i64 m = -1;
    for (i64 unit = units * thread / threads; unit < last && !failed; unit++) {
        if (unit / blocks != m) {
            m = unit / blocks;
            c = cluster_at(w, m);
            shift = factors_of(&c, task->x, factors);
            to_integers(&integers, &c, factors);
        }
        i64 row = unit % blocks * BLOCK;
        i64 n = smaller(smaller(BLOCK, w->group_rows - row), w->rows - m * w->group_rows - row);
        int from = sum_integers(&integers, &c, row, sums);
        for (i64 r = 0; r < n; r += 64) {
            float part[64], *to = from > 1 ? part : sums + r;
            i64 some = smaller(64, n - r);
            if (from < DEPTHS) sum_rows(&c, factors, row + r, some, from, to);
            if (from > 1 && from < DEPTHS)
                for (i64 i = 0; i < some; i++) sums[r + i] += part[i];
        }
        for (i64 r = 0; r < n; r++) task->y[m * w->group_rows + row + r] = sums[r] + shift;
    }
    free(factors);
    free(integers.room);
    return failed;
}

static int decode_of_thread(const void *context, i64 thread, i64 threads) {
    const task_t *task = context;
    const cvxq_t *w = task->w;
    i64 first = task->cluster * w->group_rows;
    i64 all = smaller(task->clusters * w->group_rows, w->rows - first);
    i64 low = w->columns * thread / threads, high = w->columns * (thread + 1) / threads;
    enum { AT_ONCE = 16 };
    i64 stride = w->group_rows + 8, cursor[DEPTHS];
    float *values = allocate(stride * AT_ONCE * 4);
    if (!values) return 1;
    for (i64 k = 0; k < task->clusters; k++) {
        i64 m = task->cluster + k, rows = smaller(w->group_rows, w->rows - m * w->group_rows);
        cluster_t c = cluster_at(w, m);
        for (int b = 0; b < DEPTHS; b++) { /* columns increase */
            cursor[b] = c.at[b];
            while (cursor[b] < c.at[b] + c.count[b] && column_of(&c, cursor[b]) < low) cursor[b]++;
        }
        for (i64 j = low; j < high; j += AT_ONCE) {
            i64 end = smaller(j + AT_ONCE, high);
            decode_columns(&c, cursor, j, end, 0, rows, values, stride);
            for (i64 i = j; i < end; i++)
                store(task->out, i * all + k * w->group_rows, task->dtype,
                      values + (i - j) * stride, rows);
        }
    }
    free(values);
    return 0;
}

/* For cpu_product.h: columns `column` .. `column` + k - 1 of rows of one cluster, or of several. */
static void decode_block(const void *matrix, i64 row, i64 n, i64 column, i64 k, float *out,
                         i64 stride, void *scratch) {
    const cvxq_t *w = matrix;
    i64(*cursors)[DEPTHS] = scratch;
    for (i64 r = row; r < row + n; cursors++) {
        i64 m = r / w->group_rows, in_cluster = r - m * w->group_rows;
        i64 rows = smaller(w->group_rows - in_cluster, row + n - r);
        cluster_t c = cluster_at(w, m);
        if (column == 0) memcpy(*cursors, c.at, sizeof *cursors);
        decode_columns(&c, *cursors, column, column + k, in_cluster, rows, out + (r - row), stride);
        r += rows;
    }
}

/* y = x @ W.T + bias, rows in the order of the clusters, by decoded blocks. Returns 0, 1 without
 * memory. */
EXPORT int hf_vq_cvxq_product(const cvxq_t *w, const void *x, void *y, i64 tokens, int dtype,
                              const float *bias, i64 threads) {
    i64 step = w->group_rows;
    if (step > BLOCK && step % 32 == 0)
        for (i64 part = 32; part <= BLOCK; part += 32)
            if (w->group_rows % part == 0) step = part;
    product_t task = {
        .matrix = w, .decode = decode_block, .row_step = step, .across = 1, .rows = w->rows,
        .columns = w->columns, .tokens = tokens, .x = x, .y = y, .dtype = dtype, .bias = bias};
    task.scratch_bytes = (BLOCK + 1) * DEPTHS * (i64)sizeof(i64);
    return product(&task, threads);
}

/* Up to how many tokens hf_vq_cvxq_linear is the faster way. */
EXPORT i64 hf_vq_cvxq_most_tokens(void) {
#ifdef HF_VQ_VBMI
    return 9;
#else
    return 5;
#endif
}

/* y (tokens, rows) = x (tokens, columns) @ W.T + bias, of one dtype, token by token. `perm`: which row
 * of y is where in the order of the clusters, of 2 bytes (unsigned) or 4, or NULL. `bias` is in the
 * order of y. Returns 0, 1 without memory, 2 for rows beyond the matrix. */
EXPORT int hf_vq_cvxq_linear(const cvxq_t *w, int dtype, const void *x, const float *bias,
                             const void *perm, int perm_bytes, void *y, i64 tokens, i64 threads) {
    float *entries = allocate(w->columns * 4), *sums = allocate(w->rows * 8);
    float *line = sums + w->rows;
    int failed = !entries || !sums;
    threads = threads_for(w->rows, w->columns, threads);
    for (i64 i = 0; i < tokens && !failed; i++) {
        load(x, i * w->columns, dtype, entries, w->columns);
        task_t task = {w, entries, sums, NULL, dtype, 0, 0};
        failed = parallel(product_of_thread, &task, threads);
        if (perm) { /* of zeros, in a layer without values: those rows that it leaves out are zero */
            memset(line, 0, (size_t)w->rows * 4);
            for (i64 r = 0; r < w->rows; r++) {
                i64 row = perm_bytes == 2 ? ((const uint16_t *)perm)[r] : ((const int32_t *)perm)[r];
                if (row < 0 || row >= w->rows) failed = 2;
                else line[row] = sums[r];
            }
        }
        store_sums(y, i * w->rows, dtype, perm ? line : sums, bias, w->rows);
    }
    free(entries);
    free(sums);
    return failed;
}

/* n clusters from `cluster` on to out (columns, their rows) of the dtype. Returns as above. */
EXPORT int hf_vq_cvxq_decode(const cvxq_t *w, i64 cluster, i64 n, int dtype, void *out,
                             i64 threads) {
    task_t task = {w, NULL, NULL, out, dtype, cluster, n};
    return parallel(decode_of_thread, &task, threads);
}

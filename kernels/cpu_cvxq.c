/* CVXQ: codes of 0 to 8 bits along the rows of a cluster, a depth and a scale per column
 * (docs/format.md). Groups of one depth follow each other in the layout, so that the inner loops
 * have no branch; a thread computes blocks of rows of clusters. */
#include "cpu_cvxq.h"
#include "cpu_cvxq_float.h"
#include "cpu_cvxq_layout.h"

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

static __attribute__((noinline)) void shift_by(float *values, float by, i64 n) {
    for (i64 i = 0; i < n; i++) values[i] += by; /* apart: two roundings, not one */
}

/* scale * level of `rows` rows of group i, of depth b. */
static void decode_group(const cluster_t *c, int b, i64 i, i64 rows, uint32_t *codes, float *out) {
    const float *levels = c->w->levels + (1 << b);
    i64 r = 0;
    if (b == 0) {
        for (; r < rows; r++) out[r] = 0;
        return;
    }
    unpack(c->words + c->start[i], ceil_div(b * c->w->group_rows, 32), 0, rows, b, codes);
#ifdef HF_VQ_VBMI
    __m512 scale = _mm512_set1_ps(c->scale[i]), table = _mm512_loadu_ps(levels);
    if (b <= 4) table = _mm512_maskz_loadu_ps((__mmask16)((1u << (1 << b)) - 1), levels);
    for (; r < rows; r += 16) {
        __m512i code = _mm512_loadu_si512(codes + r);
        __m512 level = b <= 4 ? _mm512_permutexvar_ps(code, table)
                              : _mm512_i32gather_ps(code, levels, 4);
        _mm512_storeu_ps(out + r, _mm512_mul_ps(level, scale));
    }
#else
    for (; r < rows; r++) out[r] = c->scale[i] * levels[codes[r]];
#endif
}

static int decode_of_thread(const void *context, i64 thread, i64 threads) {
    const task_t *task = context;
    const cvxq_t *w = task->w;
    i64 first = task->cluster * w->group_rows;
    i64 all = smaller(task->clusters * w->group_rows, w->rows - first);
    float *values = allocate((w->group_rows + 16) * 4);
    uint32_t *codes = allocate((w->group_rows + 16) * 4);
    int failed = !values || !codes;
    for (i64 k = 0; k < task->clusters && !failed; k++) {
        i64 m = task->cluster + k, rows = smaller(w->group_rows, w->rows - m * w->group_rows);
        cluster_t c = cluster_at(w, m);
        for (int b = 0; b < DEPTHS; b++) {
            i64 n = c.count[b], end = c.at[b] + n * (thread + 1) / threads;
            for (i64 i = c.at[b] + n * thread / threads; i < end; i++) {
                decode_group(&c, b, i, rows, codes, values);
                if (c.location) shift_by(values, c.location[i], rows);
                i64 at = column_of(&c, i) * all + k * w->group_rows;
                store(task->out, at, task->dtype, values, rows);
            }
        }
    }
    free(values);
    free(codes);
    return failed;
}

/* y (tokens, rows), in the order of the clusters, = x (tokens, columns) @ W.T, both float; dtype is
 * that of the activations and says how exact they are. Returns 0, 1 without memory. */
EXPORT int hf_vq_cvxq_linear(const cvxq_t *w, int dtype, const float *x, float *y, i64 tokens,
                             i64 threads) {
    int failed = 0;
    for (i64 i = 0; i < tokens && !failed; i++) {
        task_t task = {w, x + i * w->columns, y + i * w->rows, NULL, dtype, 0, 0};
        failed = parallel(product_of_thread, &task, threads);
    }
    return failed;
}

/* n clusters from `cluster` on to out (columns, their rows) of the dtype. Returns as above. */
EXPORT int hf_vq_cvxq_decode(const cvxq_t *w, i64 cluster, i64 n, int dtype, void *out,
                             i64 threads) {
    task_t task = {w, NULL, NULL, out, dtype, cluster, n};
    return parallel(decode_of_thread, &task, threads);
}

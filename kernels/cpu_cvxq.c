/* CVXQ: codes of 0 to 8 bits along the rows of a cluster, a depth and a scale per column
 * (docs/format.md). Columns of one depth follow each other, so that the inner loop has no branch:
 * the levels of the depth, times the scale of the column and the entry of x, are one or two
 * registers, in which the codes of 16 rows are looked up and summed. */
#include "cpu_common.h"

typedef struct {
    const int32_t *words, *depths;
    const uint8_t *scale_codes; /* (clusters, columns), with scale_grid (2, clusters); or scales */
    const float *scale_grid, *scales;
    const int8_t *location8; /* (clusters, columns) in 1/64 of the scale; or location, or neither */
    const float *location;
    const float *levels; /* 512: level (1 << depth) + code */
    i64 num_words, rows, columns, group_rows;
} cvxq_t;

enum { LANES = 64, DEPTHS = 9 };

typedef struct {
    i64 start; /* the first word of its group */
    float scale, location;
    int column, depth;
} group_t;

typedef struct {
    const cvxq_t *w;
    const i64 *first; /* the first word of every cluster, and the end of the last */
    i64 *sizes;       /* while these are counted */
    const float *x;
    float *y;
    void *out;
    int dtype;
    i64 cluster, clusters; /* decoded ones */
} task_t;

INLINE int depth_at(const cvxq_t *w, i64 cluster, i64 column) {
    const uint32_t *row = (const uint32_t *)w->depths + cluster * ceil_div(w->columns, 8);
    return (int)(row[column / 8] >> (column % 8 * 4) & 15);
}

static int count_of_thread(const void *context, i64 thread, i64 threads) {
    const task_t *task = context;
    i64 clusters = ceil_div(task->w->rows, task->w->group_rows), size[16];
    for (i64 depth = 0; depth < 16; depth++) size[depth] = ceil_div(depth * task->w->group_rows, 32);
    for (i64 m = clusters * thread / threads; m < clusters * (thread + 1) / threads; m++) {
        i64 sum = 0;
        for (i64 j = 0; j < task->w->columns; j++) sum += size[depth_at(task->w, m, j)];
        task->sizes[m] = sum;
    }
    return 0;
}

/* The groups of a cluster by depth: those of depth b are at[b] .. at[b + 1] - 1. */
static int groups_of(const cvxq_t *w, i64 m, i64 start, group_t *groups, i64 at[DEPTHS + 1]) {
    i64 clusters = ceil_div(w->rows, w->group_rows), next[16] = {0}, size[16];
    float powers[256];
    if (w->scale_codes)
        for (int c = 0; c < 256; c++)
            powers[c] = (float)exp2(w->scale_grid[m] + (double)w->scale_grid[clusters + m] * c);
    for (i64 j = 0; j < w->columns; j++) next[depth_at(w, m, j)]++;
    i64 sum = 0;
    for (int b = 0; b < 16; b++) {
        i64 n = next[b];
        size[b] = ceil_div(b * w->group_rows, 32);
        next[b] = sum;
        if (b < DEPTHS) at[b] = sum;
        sum += n;
    }
    at[DEPTHS] = w->columns;
    for (i64 j = 0; j < w->columns; j++) {
        i64 number = m * w->columns + j;
        int depth = depth_at(w, m, j);
        if (depth >= DEPTHS) return 1;
        group_t *group = groups + next[depth]++;
        group->start = start;
        group->column = (int)j;
        group->depth = depth;
        group->scale = w->scale_codes ? powers[w->scale_codes[number]] : w->scales[number];
        group->location = w->location8 ? (float)w->location8[number] * (1.0f / 64) * group->scale
                          : w->location ? w->location[number] : 0;
        start += size[depth];
    }
    return start > w->num_words;
}

#ifdef HF_VQ_VBMI
typedef struct {
    __m512i picks[4], shifts[4];
} spread_t;

/* How 64 codes of b bits become four registers of 16 lanes; bits above a code stay. */
INLINE spread_t spread(int b) {
    spread_t out;
    for (int q = 0; q < 4; q++) {
        uint8_t pick[64];
        uint32_t shift[16];
        for (int lane = 0; lane < 16; lane++) {
            int bit = (16 * q + lane) * b;
            shift[lane] = (uint32_t)(bit & 7);
            for (int i = 0; i < 4; i++) pick[4 * lane + i] = (uint8_t)(smaller((bit >> 3) + i, 63));
        }
        out.picks[q] = _mm512_loadu_si512(pick);
        out.shifts[q] = _mm512_loadu_si512(shift);
    }
    return out;
}

/* sums[r] += scale * x * level of the 64 rows from `row` on, for n groups of depth B. */
INLINE void add_groups(const cvxq_t *w, const group_t *groups, const float *factors, i64 n, i64 row,
                       __m512 sums[4], const int B) {
    const float *levels = w->levels + (1 << B);
    spread_t how = spread(B);
    i64 skip = row * B / 8, bytes = ceil_div(B * w->group_rows, 32) * 4 - skip;
    __mmask64 inside = first_bytes(smaller(bytes, 8 * B));
    __mmask16 some = B < 4 ? (__mmask16)((1u << (1 << (B & 3))) - 1) : 0xffff;
    __m512 low = _mm512_maskz_loadu_ps(some, levels);
    __m512 high = B == 5 ? _mm512_loadu_ps(levels + 16) : low;
    __m512i mask = _mm512_set1_epi32((1 << B) - 1);
    __m512 a[4] = {sums[0], sums[1], sums[2], sums[3]};
    for (i64 i = 0; i < n; i++) {
        const uint8_t *at = (const uint8_t *)(w->words + groups[i].start) + skip;
        __m512i codes; /* no wider than need be: the next cache line may be far */
        if (B <= 4)
            codes = _mm512_zextsi256_si512(_mm256_maskz_loadu_epi8((__mmask32)inside, at));
        else
            codes = _mm512_maskz_loadu_epi8(inside, at);
        if (i + 8 < n) _mm_prefetch((const char *)(w->words + groups[i + 8].start) + skip, _MM_HINT_T0);
        __m512 factor = _mm512_set1_ps(factors[i]);
        __m512 table = _mm512_mul_ps(low, factor);
        __m512 upper = B == 5 ? _mm512_mul_ps(high, factor) : table;
        for (int q = 0; q < 4; q++) {
            __m512i code = _mm512_permutexvar_epi8(how.picks[q], codes);
            code = _mm512_srlv_epi32(code, how.shifts[q]);
            if (B < 4 || B > 5) code = _mm512_and_si512(code, mask);
            if (B <= 4)
                a[q] = _mm512_add_ps(a[q], _mm512_permutexvar_ps(code, table));
            else if (B == 5)
                a[q] = _mm512_add_ps(a[q], _mm512_permutex2var_ps(table, code, upper));
            else
                a[q] = _mm512_fmadd_ps(_mm512_i32gather_ps(code, levels, 4), factor, a[q]);
        }
    }
    for (int q = 0; q < 4; q++) sums[q] = a[q];
}
#endif

/* out[r] = sum over the groups of factor * level, of `rows` rows of a cluster. */
static void sum_groups(const cvxq_t *w, const group_t *groups, const float *factors,
                       const i64 at[DEPTHS + 1], i64 rows, float *out) {
#ifdef HF_VQ_VBMI
    for (i64 row = 0; row < rows; row += LANES) {
        __m512 sums[4];
        for (int q = 0; q < 4; q++) sums[q] = _mm512_setzero_ps();
#define ADD(B)                                                                                     \
    if (at[B + 1] > at[B])                                                                         \
        add_groups(w, groups + at[B], factors + at[B], at[B + 1] - at[B], row, sums, B);
        ADD(1) ADD(2) ADD(3) ADD(4) ADD(5) ADD(6) ADD(7) ADD(8)
        for (int q = 0; q < 4; q++) _mm512_storeu_ps(out + row + 16 * q, sums[q]);
    }
#else
    uint32_t codes[LANES + 16];
    memset(out, 0, (size_t)rows * 4);
    for (i64 row = 0; row < rows; row += LANES) {
        i64 n = smaller(LANES, rows - row);
        for (i64 i = at[1]; i < at[DEPTHS]; i++) {
            int b = groups[i].depth;
            const float *levels = w->levels + (1 << b);
            unpack((const uint32_t *)w->words + groups[i].start, ceil_div(b * w->group_rows, 32),
                   row, n, b, codes);
            for (i64 r = 0; r < n; r++) out[row + r] += factors[i] * levels[codes[r]];
        }
    }
#endif
}

static int product_of_thread(const void *context, i64 thread, i64 threads) {
    const task_t *task = context;
    const cvxq_t *w = task->w;
    i64 clusters = ceil_div(w->rows, w->group_rows), at[DEPTHS + 1];
    group_t *groups = allocate(w->columns * (i64)sizeof(group_t));
    float *factors = allocate(w->columns * 4), *sums = allocate((w->group_rows + LANES) * 4);
    int failed = !groups || !factors || !sums;
    for (i64 m = clusters * thread / threads; m < clusters * (thread + 1) / threads; m++) {
        if (failed) break;
        failed = groups_of(w, m, task->first[m], groups, at) ? 2 : 0;
        if (failed) break;
        float shift = 0;
        for (i64 i = 0; i < w->columns; i++) {
            float x = task->x[groups[i].column];
            factors[i] = x * groups[i].scale;
            shift += x * groups[i].location;
        }
        i64 row = m * w->group_rows, rows = smaller(w->group_rows, w->rows - row);
        sum_groups(w, groups, factors, at, rows, sums);
        for (i64 r = 0; r < rows; r++) task->y[row + r] = sums[r] + shift;
    }
    free(groups);
    free(factors);
    free(sums);
    return failed;
}

static __attribute__((noinline)) void shift_by(float *values, float by, i64 n) {
    for (i64 i = 0; i < n; i++) values[i] += by; /* apart: two roundings, not one */
}

/* scale * level of `rows` rows of a group. */
static void decode_group(const cvxq_t *w, const group_t *group, i64 rows, uint32_t *codes,
                         float *out) {
    const float *levels = w->levels + (1 << group->depth);
    i64 r = 0;
    if (group->depth == 0) {
        for (; r < rows; r++) out[r] = 0;
        return;
    }
    unpack((const uint32_t *)w->words + group->start, ceil_div(group->depth * w->group_rows, 32), 0,
           rows, group->depth, codes);
#ifdef HF_VQ_VBMI
    __m512 scale = _mm512_set1_ps(group->scale), table = _mm512_loadu_ps(levels);
    if (group->depth <= 4)
        table = _mm512_maskz_loadu_ps((__mmask16)((1u << (1 << group->depth)) - 1), levels);
    for (; r < rows; r += 16) {
        __m512i code = _mm512_loadu_si512(codes + r);
        __m512 level = group->depth <= 4 ? _mm512_permutexvar_ps(code, table)
                                         : _mm512_i32gather_ps(code, levels, 4);
        _mm512_storeu_ps(out + r, _mm512_mul_ps(level, scale));
    }
#else
    for (; r < rows; r++) out[r] = group->scale * levels[codes[r]];
#endif
}

static int decode_of_thread(const void *context, i64 thread, i64 threads) {
    const task_t *task = context;
    const cvxq_t *w = task->w;
    i64 at[DEPTHS + 1], all = smaller(task->clusters * w->group_rows,
                                      w->rows - task->cluster * w->group_rows);
    group_t *groups = allocate(w->columns * (i64)sizeof(group_t));
    float *values = allocate((w->group_rows + 16) * 4);
    uint32_t *codes = allocate((w->group_rows + 16) * 4);
    int failed = !groups || !values || !codes;
    for (i64 c = 0; c < task->clusters && !failed; c++) {
        i64 m = task->cluster + c, rows = smaller(w->group_rows, w->rows - m * w->group_rows);
        failed = groups_of(w, m, task->first[m], groups, at) ? 2 : 0;
        for (i64 i = thread; i < w->columns && !failed; i += threads) {
            decode_group(w, groups + i, rows, codes, values);
            if (w->location || w->location8) shift_by(values, groups[i].location, rows);
            store(task->out, groups[i].column * all + c * w->group_rows, task->dtype, values, rows);
        }
    }
    free(groups);
    free(values);
    free(codes);
    return failed;
}

/* first (clusters + 1): the first word of every cluster, and the end. Returns 0. */
EXPORT int hf_vq_cvxq_first_words(const cvxq_t *w, i64 *first, i64 threads) {
    i64 clusters = ceil_div(w->rows, w->group_rows), sum = 0;
    task_t task = {w, NULL, first, NULL, NULL, NULL, 0, 0, 0};
    parallel(count_of_thread, &task, threads);
    for (i64 m = 0; m < clusters; m++) {
        i64 size = first[m];
        first[m] = sum;
        sum += size;
    }
    first[clusters] = sum;
    return 0;
}

/* y (tokens, rows), in the order of the clusters, = x (tokens, columns) @ W.T, both float. Returns
 * 0, 1 without memory, 2 for depths that do not fit the words. */
EXPORT int hf_vq_cvxq_linear(const cvxq_t *w, const i64 *first, const float *x, float *y,
                             i64 tokens, i64 threads) {
    int failed = 0;
    for (i64 i = 0; i < tokens && !failed; i++) {
        task_t task = {w, first, NULL, x + i * w->columns, y + i * w->rows, NULL, 0, 0, 0};
        failed = parallel(product_of_thread, &task, threads);
    }
    return failed;
}

/* n clusters from `cluster` on to out (columns, their rows) of the dtype. Returns as above. */
EXPORT int hf_vq_cvxq_decode(const cvxq_t *w, const i64 *first, i64 cluster, i64 n, int dtype,
                             void *out, i64 threads) {
    task_t task = {w, first, NULL, NULL, NULL, out, dtype, cluster, n};
    return parallel(decode_of_thread, &task, threads);
}

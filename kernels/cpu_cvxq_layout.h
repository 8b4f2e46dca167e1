/* From the stored tensors of CVXQ to the layout at run time. */
#include "cpu_cvxq.h"

typedef struct {
    const stored_t *stored;
    cvxq_t *w;
} build_t;

INLINE int depth_at(const stored_t *s, i64 cluster, i64 column) {
    const uint32_t *row = (const uint32_t *)s->depths + cluster * ceil_div(s->columns, 8);
    return (int)(row[column / 8] >> (column % 8 * 4) & 15);
}

/* first[m] = words of cluster m. Depths of more than 8 bits are reported. */
static int count_of_thread(const void *context, i64 thread, i64 threads) {
    const build_t *task = context;
    const stored_t *s = task->stored;
    i64 clusters = ceil_div(s->rows, s->group_rows);
    for (i64 m = clusters * thread / threads; m < clusters * (thread + 1) / threads; m++) {
        i64 n[16] = {0}, sum = 0;
        for (i64 j = 0; j < s->columns; j++) n[depth_at(s, m, j)]++;
        for (int b = 0; b < DEPTHS; b++) {
            task->w->count[m * DEPTHS + b] = (int32_t)n[b];
            sum += n[b] * ceil_div(b * s->group_rows, 32);
        }
        for (int b = DEPTHS; b < 16; b++)
            if (n[b]) return 2;
        task->w->first[m] = sum;
    }
    return 0;
}

static int fill_of_thread(const void *context, i64 thread, i64 threads) {
    const build_t *task = context;
    const stored_t *s = task->stored;
    cvxq_t *w = task->w;
    i64 clusters = ceil_div(s->rows, s->group_rows), size[DEPTHS], next[DEPTHS];
    float powers[256];
    for (int b = 0; b < DEPTHS; b++) size[b] = ceil_div(b * s->group_rows, 32);
    for (i64 m = clusters * thread / threads; m < clusters * (thread + 1) / threads; m++) {
        cluster_t c = cluster_at(w, m);
        i64 slots = m * w->stride, start = 0;
        memcpy(next, c.at, sizeof next);
        for (int code = 0; s->scale_codes && code < 256; code++)
            powers[code] = (float)exp2(s->scale_grid[m] + (double)s->scale_grid[clusters + m] * code);
        for (i64 j = 0; j < s->columns; j++) {
            i64 number = m * s->columns + j;
            int depth = depth_at(s, m, j);
            i64 slot = slots + next[depth]++;
            float scale = s->scale_codes ? powers[s->scale_codes[number]] : s->scales[number];
            w->start[slot] = (uint32_t)start;
            w->column[slot] = (uint16_t)j;
            if (w->column_high) w->column_high[slot] = (uint16_t)(j >> 16);
            w->scale[slot] = scale;
            if (w->location)
                w->location[slot] = s->location8 ? (float)s->location8[number] * (1.0f / 64) * scale
                                                 : s->location[number];
            start += size[depth];
        }
        for (int b = 0; b < DEPTHS; b++) /* slots without a group read the last one, times zero */
            for (i64 i = next[b]; i < c.at[b + 1]; i++) {
                w->start[slots + i] = w->start[slots + i - 1];
                w->column[slots + i] = 0;
                if (w->column_high) w->column_high[slots + i] = 0;
                w->scale[slots + i] = 0;
                if (w->location) w->location[slots + i] = 0;
            }
    }
    return 0;
}

/* Fills the arrays of the layout. Returns 0, or 2 for depths that do not fit the words. */
EXPORT int hf_vq_cvxq_layout(const stored_t *stored, cvxq_t *w, i64 threads) {
    build_t task = {stored, w};
    i64 clusters = ceil_div(stored->rows, stored->group_rows), sum = 0;
    if (parallel(count_of_thread, &task, threads)) return 2;
    for (i64 m = 0; m < clusters; m++) {
        i64 size = w->first[m];
        w->first[m] = sum;
        sum += size;
    }
    if (sum > stored->num_words) return 2;
    return parallel(fill_of_thread, &task, threads);
}

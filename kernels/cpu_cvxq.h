/* CVXQ on CPUs: what the sources share. The layout of a matrix at run time lists the groups of every
 * cluster by depth, so that inner loops have no branch; codes stay where the file has them. */
#ifndef HF_VQ_CPU_CVXQ_H
#define HF_VQ_CPU_CVXQ_H

#include "cpu_common.h"

#if defined(__AVX2__) && defined(__FMA__) && !defined(HF_VQ_AVX2)
#define HF_VQ_AVX2 1
#include <immintrin.h>
#endif

enum { DEPTHS = 9, PADDED = 4 }; /* depths 0..8; groups of a depth begin at multiples of PADDED */

typedef struct { /* as stored */
    const int32_t *words, *depths;
    const uint8_t *scale_codes; /* (clusters, columns), with scale_grid (2, clusters); or scales */
    const float *scale_grid, *scales;
    const int8_t *location8; /* (clusters, columns) in 1/64 of the scale; or location, or neither */
    const float *location;
    i64 num_words, rows, columns, group_rows;
} stored_t;

typedef struct { /* the layout: `stride` slots per cluster, those without a group are zero */
    const uint32_t *words;
    const float *levels;     /* 512: level (1 << depth) + code */
    i64 *first;              /* (clusters) first word of the cluster */
    int32_t *count;          /* (clusters, DEPTHS) groups of this depth */
    uint32_t *start;         /* (clusters, stride) first word of the group, counted from `first`;
                                16 more for prefetching */
    uint16_t *column;        /* (clusters, stride), with the upper half of columns apart */
    uint16_t *column_high;   /* NULL up to 65536 columns */
    float *scale, *location; /* (clusters, stride); location may be NULL */
    i64 num_words, rows, columns, group_rows, stride;
} cvxq_t;

/* A cluster of it: groups of depth b are at[b] .. at[b] + count[b] - 1. */
typedef struct {
    const cvxq_t *w;
    const uint32_t *words, *start;
    const uint16_t *column, *column_high;
    const float *scale, *location;
    const int32_t *count;
    i64 left; /* words from `words` to the end of all */
    i64 at[DEPTHS + 1];
} cluster_t;

INLINE i64 column_of(const cluster_t *c, i64 i) {
    return c->column[i] | (c->column_high ? (i64)c->column_high[i] << 16 : 0);
}

INLINE cluster_t cluster_at(const cvxq_t *w, i64 m) {
    i64 slots = m * w->stride, sum = 0;
    cluster_t c = {.w = w,
                   .words = w->words + w->first[m],
                   .start = w->start + slots,
                   .column = w->column + slots,
                   .column_high = w->column_high ? w->column_high + slots : NULL,
                   .scale = w->scale + slots,
                   .location = w->location ? w->location + slots : NULL,
                   .count = w->count + m * DEPTHS,
                   .left = w->num_words - w->first[m]};
    for (int b = 0; b < DEPTHS; b++) {
        c.at[b] = sum;
        sum += (c.count[b] + PADDED - 1) / PADDED * PADDED;
    }
    c.at[DEPTHS] = sum;
    return c;
}

#endif

/* A packed GPTVQ matrix; the ctypes structure in cpu_gptvq.py has the same fields. */
#ifndef HF_VQ_CPU_GPTVQ_H
#define HF_VQ_CPU_GPTVQ_H
#include "cpu_common.h"

typedef struct {
    const int32_t *indices;
    const int8_t *books8;     /* (stripes, groups, k, d), or NULL: then `books` */
    const float *books;       /* the same, decoded */
    const float *book_scales; /* (stripes, groups), with books8, or NULL */
    const int32_t *scale_codes;
    const float *scale_grid; /* (2, blocks) */
    i64 rows, columns, vector_dim, num_centroids, group_rows, group_columns, scale_block;
    i64 log_scales;
} gptvq_t;
#endif

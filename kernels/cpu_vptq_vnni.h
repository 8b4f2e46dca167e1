/* VPTQ times a few vectors in integers: AVX-512 with VNNI, and VBMI for a byte shuffle.
 *
 * Entries of a codebook are kept in 16 bits of one unit per group, plus 2**15 (`books16`; those of
 * the residual codebook, without it, are added to them as they are): 4 or 8 rows of a column, 8 or
 * 16 bytes, which lie in one cache line. The entries of 8 or 4 columns fill a register; one byte
 * shuffle puts bytes of the same row side by side, four columns together, upper bytes in the lower
 * half of the register and lower bytes in the other; and dot products of bytes multiply them with
 * x of these columns, for every token. x is rounded to 16 bits of the largest of SPAN columns, so
 * two bytes as well. Sums of a span are exact integers.
 *
 * Errors: at most half a unit (2**-16 of a group's largest entry) in an entry, and 2**-16 of a
 * span's largest entry in x. That is for float16 and bfloat16; float32 wants more. */
#ifndef HF_VQ_CPU_VPTQ_VNNI_H
#define HF_VQ_CPU_VPTQ_VNNI_H
#include "cpu_vptq.h"

enum { SPAN = 256, VNNI_TOKENS = 4, CHUNK = 64 };

#ifndef HF_VQ_VBMI
static int vnni_linear(const vptq_t *w, const float *x, float *y, i64 tokens, i64 threads) {
    (void)w, (void)x, (void)y, (void)tokens, (void)threads;
    return 1;
}
#else

/* Columns of one group, at most SPAN; arrays are (VNNI_TOKENS, ...). */
typedef struct {
    i64 group, first, n; /* column in the group, and how many */
    float scale[VNNI_TOKENS];
    int32_t sum[VNNI_TOKENS][2][2]; /* of bytes of x times -128: [token][upper, lower][lane % 2] */
    int8_t x[VNNI_TOKENS][2][SPAN] __attribute__((aligned(64)));
} span_t;

typedef struct {
    const vptq_t *w;
    const span_t *spans;
    i64 num_spans, tokens, words; /* words of a row of codes */
    int bits;                     /* of a code */
    const char *end;              /* of all codes */
    float *y;                     /* (tokens, rows) */
} vnni_t;

/* Offsets of n <= CHUNK columns, and 0 for what fills them up. `stream`: the codes of a row of
 * blocks; `first`, a multiple of CHUNK, where in it to begin; `end`: where all codes end. */
INLINE void byte_offsets(const vnni_t *task, const uint32_t *stream, i64 first, i64 n, const int up,
                         const int res, uint32_t *at, uint32_t *res_at) {
    const int bits = task->bits, main_bits = (int)task->w->main_bits;
    const char *bytes = (const char *)stream + first / 8 * bits;
    __m512i mask = _mm512_set1_epi32((int)((((uint32_t)1 << main_bits) - 1) << up));
    __m512i res_mask = _mm512_set1_epi32((int)((((uint32_t)1 << (bits - main_bits)) - 1) << up));
    if (n == CHUNK && bits <= 25 && task->end - bytes >= 6 * bits + 64) {
        /* 16 codes are 2 * bits bytes; one rotation brings a code to where its offset is */
        __m512i picks = _mm512_loadu_si512(lanes_of[bits].pick);
        __m512i down = _mm512_sub_epi32(_mm512_loadu_si512(lanes_of[bits].shift), _mm512_set1_epi32(up));
        __m512i res_down = _mm512_add_epi32(down, _mm512_set1_epi32(main_bits));
        _mm_prefetch(bytes + 8 * task->words, _MM_HINT_T0);
        _mm_prefetch(bytes + 8 * task->words + 64, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m512i codes;
            if (bits <= 16)
                codes = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)(bytes + 2 * i * bits)));
            else codes = _mm512_loadu_si512(bytes + 2 * i * bits);
            codes = _mm512_permutexvar_epi8(picks, codes);
            __m512i main = _mm512_and_si512(_mm512_rorv_epi32(codes, down), mask);
            _mm512_store_si512(at + 16 * i, main);
            if (!res) continue;
            __m512i second = _mm512_and_si512(_mm512_rorv_epi32(codes, res_down), res_mask);
            _mm512_store_si512(res_at + 16 * i, second);
        }
        return;
    }
    uint32_t codes[CHUNK] __attribute__((aligned(64)));
    unpack_to(stream, task->words, first, n, bits, 0, codes);
    for (i64 i = 0; i < CHUNK; i++) {
        uint32_t code = i < n ? codes[i] : 0;
        at[i] = (code & (((uint32_t)1 << main_bits) - 1)) << up;
        if (res) res_at[i] = code >> main_bits << up;
    }
}

INLINE __m128i entry_8(const char *book, const char *res, uint32_t at, uint32_t res_at) {
    __m128i entry = _mm_loadu_si128((const void *)(book + at));
    return res ? _mm_add_epi16(entry, _mm_loadu_si128((const void *)(res + res_at))) : entry;
}

/* Entries of 8 rows of 4 columns (W 8), or of 4 rows of 8 columns. */
INLINE __m512i entries(const char *book, const char *res, const uint32_t *at,
                       const uint32_t *res_at, const int W) {
    if (W == 4) {
        __m512i all = _mm512_i32gather_epi64(_mm256_load_si256((const void *)at), book, 1);
        if (!res) return all;
        __m512i second = _mm512_i32gather_epi64(_mm256_load_si256((const void *)res_at), res, 1);
        return _mm512_add_epi16(all, second);
    }
    __m512i all = _mm512_castsi128_si512(entry_8(book, res, at[0], res_at[0]));
    all = _mm512_inserti32x4(all, entry_8(book, res, at[1], res_at[1]), 1);
    all = _mm512_inserti32x4(all, entry_8(book, res, at[2], res_at[2]), 2);
    return _mm512_inserti32x4(all, entry_8(book, res, at[3], res_at[3]), 3);
}

INLINE __m512i dot_bytes(__m512i sum, __m512i a, __m512i b) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

INLINE __m512 add_span(__m512 sum, __m512i upper, __m512i lower, float unit) {
    __m512 total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(upper), _mm512_set1_ps(256),
                                   _mm512_cvtepi32_ps(lower));
    return _mm512_fmadd_ps(total, _mm512_set1_ps(unit), sum);
}

INLINE __m512i repeat(const int8_t *x, const int W) { /* x of a step's columns */
    i64 eight;
    int32_t four;
    if (W == 4) return memcpy(&eight, x, 8), _mm512_set1_epi64(eight);
    return memcpy(&four, x, 4), _mm512_set1_epi32(four);
}

INLINE __m512i begin_sum(const int32_t *sums) {
    i64 both;
    memcpy(&both, sums, 8);
    return _mm512_maskz_set1_epi64(0xf, both);
}

/* y of `block` and the one after it, for T tokens; W is width16. `blocks`: how many there are, 1 or 2.
 * Sums are variables of their own, named by token and block: compilers keep no array in registers
 * across a loop. */
INLINE void vnni_blocks(const vnni_t *task, i64 block, i64 blocks, const int T, const int W,
                        const int res) {
    const vptq_t *w = task->w;
    const i64 step = 32 / W, v = w->vector_dim, all = ceil_div(w->rows, v);
    uint8_t pick[64];
    for (int i = 0; i < 64; i++) { /* lane i / 4, column i % 4 of its four */
        int lane = i / 4, upper = lane < 8, r = W == 8 ? lane % 8 : lane % 8 / 2;
        int column = i % 4 + (W == 8 ? 0 : lane % 2 * 4);
        pick[i] = (uint8_t)(column * 2 * W + 2 * r + upper);
    }
    const __m512i picks = _mm512_loadu_si512(pick);
    uint32_t at[2][CHUNK] __attribute__((aligned(64))), res_at[2][CHUNK] __attribute__((aligned(64)));
    __m512 sums[VNNI_TOKENS][2];
    for (int t = 0; t < T; t++) sums[t][0] = sums[t][1] = _mm512_setzero_ps();
    for (i64 s = 0; s < task->num_spans; s++) {
        const span_t *span = task->spans + s;
        const char *book = (const char *)(w->books16 + span->group * w->entries * W);
        const char *second =
            res ? (const char *)(w->res_books16 + span->group * w->res_entries * W) : NULL;
        const uint32_t *stream = (const uint32_t *)w->indices + (span->group * all + block) * task->words;
        float unit = w->units16[span->group];
        __m512i u00, u01, l00, l01, u10, u11, l10, l11, u20, u21, l20, l21, u30, u31, l30, l31;
#define BEGIN(t)                                                                                   \
    if (T > t) {                                                                                   \
        u##t##0 = u##t##1 = begin_sum(span->sum[t][0]);                                            \
        l##t##0 = l##t##1 = begin_sum(span->sum[t][1]);                                            \
    }
#define ADD(t)                                                                                     \
    if (T > t) {                                                                                   \
        __m512i up = repeat(span->x[t][0] + j + i, W), low = repeat(span->x[t][1] + j + i, W);     \
        u##t##0 = _mm512_dpbusd_epi32(u##t##0, of_first, up);                                      \
        l##t##0 = _mm512_dpbusd_epi32(l##t##0, of_first, low);                                     \
        u##t##1 = _mm512_dpbusd_epi32(u##t##1, of_second, up);                                     \
        l##t##1 = _mm512_dpbusd_epi32(l##t##1, of_second, low);                                    \
    }
#define END(t)                                                                                     \
    if (T > t) {                                                                                   \
        sums[t][0] = add_span(sums[t][0], u##t##0, l##t##0, span->scale[t] * unit);                \
        sums[t][1] = add_span(sums[t][1], u##t##1, l##t##1, span->scale[t] * unit);                \
    }
        BEGIN(0) BEGIN(1) BEGIN(2) BEGIN(3)
        for (i64 j = 0; j < span->n; j += CHUNK) {
            i64 n = smaller(CHUNK, span->n - j);
            for (int b = 0; b < 2; b++) /* the second one is the first again where there is none */
                byte_offsets(task, stream + (b & (blocks - 1)) * task->words, span->first + j, n,
                             W == 8 ? 4 : 3, res, at[b], res_at[b]);
            for (i64 i = 0; i < n; i += step) {
                __m512i of_first = entries(book, second, at[0] + i, res_at[0] + i, W);
                of_first = _mm512_permutexvar_epi8(picks, of_first);
                __m512i of_second = entries(book, second, at[1] + i, res_at[1] + i, W);
                of_second = _mm512_permutexvar_epi8(picks, of_second);
                ADD(0) ADD(1) ADD(2) ADD(3)
            }
        }
        END(0) END(1) END(2) END(3)
#undef BEGIN
#undef ADD
#undef END
    }
    for (i64 b = 0; b < blocks; b++)
        for (int t = 0; t < smaller(T, task->tokens); t++) {
            float of[16];
            _mm512_storeu_ps(of, sums[t][b]);
            i64 first = (block + b) * v;
            for (i64 r = 0; r < v && first + r < w->rows; r++)
                task->y[t * w->rows + first + r] =
                    W == 8 ? 256 * of[r] + of[8 + r]
                           : 256 * (of[2 * r] + of[2 * r + 1]) + (of[8 + 2 * r] + of[9 + 2 * r]);
        }
}

#define VNNI(T)                                                                                    \
    static void vnni_##T(const vnni_t *task, i64 block, i64 blocks) {                              \
        if (task->w->width16 == 8 && task->w->res_books16) vnni_blocks(task, block, blocks, T, 8, 1); \
        else if (task->w->width16 == 8) vnni_blocks(task, block, blocks, T, 8, 0);                 \
        else if (task->w->res_books16) vnni_blocks(task, block, blocks, T, 4, 1);                  \
        else vnni_blocks(task, block, blocks, T, 4, 0);                                            \
    }
VNNI(1) VNNI(2) VNNI(4)
/* three tokens are four, the last of them zero */
static void (*const vnni_of[VNNI_TOKENS])(const vnni_t *, i64, i64) = {vnni_1, vnni_2, vnni_4, vnni_4};

static int vnni_of_thread(const void *context, i64 thread, i64 threads) {
    const vnni_t *task = context;
    i64 blocks = ceil_div(task->w->rows, task->w->vector_dim);
    i64 block = blocks * thread / threads, high = blocks * (thread + 1) / threads;
    for (; block < high; block += 2)
        vnni_of[task->tokens - 1](task, block, smaller(2, high - block));
    return 0;
}

/* x of a span's columns, rounded; `lanes`: over how many lanes the columns are spread by fours. */
static void round_span(span_t *span, i64 t, const float *x, i64 lanes) {
    float largest = 0, most = 32639.f; /* 127 or less in the upper byte, after rounding */
    int finite = 1;
    for (i64 j = 0; j < span->n; j++) {
        largest = fmaxf(largest, fabsf(x[j]));
        finite &= x[j] - x[j] == 0;
    }
    float unit = finite && largest > most * 1e-38f ? most / largest : 0;
    /* too small for a unit: nothing beside any weight */
    span->scale[t] = finite ? (unit > 0 ? largest / most : 0) : NAN;
    for (i64 j = 0; j < span->n; j++) {
        int32_t value = unit > 0 ? (int32_t)rintf(x[j] * unit) : 0;
        int8_t low = (int8_t)(value & 255);
        int8_t up = (int8_t)((value - low) >> 8);
        span->x[t][0][j] = up;
        span->x[t][1][j] = low;
        span->sum[t][0][j / 4 % lanes] -= 128 * up;
        span->sum[t][1][j / 4 % lanes] -= 128 * low;
    }
    if (lanes == 1)
        for (int k = 0; k < 2; k++) span->sum[t][k][1] = span->sum[t][k][0];
}

/* y (tokens, rows) = main and residual codes times x (tokens, columns), in stored order and times
 * the norm's scales; tokens <= VNNI_TOKENS. Returns 0, or 1 without memory. */
static int vnni_linear(const vptq_t *w, const float *x, float *y, i64 tokens, i64 threads) {
    i64 per_group = (w->columns - w->outliers) / w->groups, each = ceil_div(per_group, SPAN);
    span_t *spans = allocate(w->groups * each * (i64)sizeof(span_t));
    if (!spans) return 1;
    memset(spans, 0, (size_t)(w->groups * each) * sizeof(span_t));
    for (i64 s = 0; s < w->groups * each; s++) {
        span_t *span = spans + s;
        span->group = s / each;
        span->first = s % each * SPAN;
        span->n = smaller(SPAN, per_group - span->first);
        const float *from = x + w->outliers + span->group * per_group + span->first;
        for (i64 t = 0; t < tokens; t++) round_span(span, t, from + t * w->columns, 8 / w->width16);
    }
    int bits = (int)(w->main_bits + w->res_bits);
    i64 words = ceil_div(per_group * bits, 32), blocks = ceil_div(w->rows, w->vector_dim);
    const char *end = (const char *)(w->indices + w->groups * blocks * words);
    vnni_t task = {w, spans, w->groups * each, tokens, words, bits, end, y};
    int failed = parallel(vnni_of_thread, &task, threads);
    free(spans);
    return failed;
}
#endif
#endif

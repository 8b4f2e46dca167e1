/* What the C backend's operators share: threads, bit streams, conversions. No dependency but libc.
 *
 * Vector code is written with the compiler's vector extensions, which any target has; where
 * AVX-512 with VBMI is there, the inner loops look up their tables inside of registers. */
#ifndef HF_VQ_CPU_COMMON_H
#define HF_VQ_CPU_COMMON_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#define HF_VQ_VBMI 1
#endif
#if defined(HF_VQ_VBMI) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef int64_t i64;
typedef float f4 __attribute__((vector_size(16), aligned(4)));
typedef float f8 __attribute__((vector_size(32), aligned(4)));

/* body(context, thread, threads) on every thread; returns 0, or 1 if some body could not. */
typedef int (*parallel_body)(const void *context, i64 thread, i64 threads);

#ifdef _OPENMP
static int parallel(parallel_body body, const void *context, i64 threads) {
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(| : failed)
    for (i64 t = 0; t < threads; t++) failed |= body(context, t, threads);
    return failed;
}
#else
#include <pthread.h>
typedef struct {
    parallel_body body;
    const void *context;
    i64 thread, threads;
    int failed, started;
    pthread_t handle;
} job_t;
static void *run_job(void *argument) {
    job_t *job = argument;
    job->failed = job->body(job->context, job->thread, job->threads);
    return NULL;
}
static int parallel(parallel_body body, const void *context, i64 threads) {
    job_t jobs[256];
    int failed = 0;
    if (threads > 256) threads = 256;
    for (i64 t = 0; t < threads; t++) {
        jobs[t] = (job_t){body, context, t, threads, 0, 0, 0};
        if (t > 0) jobs[t].started = !pthread_create(&jobs[t].handle, NULL, run_job, &jobs[t]);
    }
    for (i64 t = 0; t < threads; t++)
        if (!jobs[t].started) run_job(&jobs[t]);
    for (i64 t = 0; t < threads; t++) {
        if (jobs[t].started) pthread_join(jobs[t].handle, NULL);
        failed |= jobs[t].failed;
    }
    return failed;
}
#endif

INLINE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

/* 64-byte aligned, sized in whole lines */
static void *allocate(i64 bytes) { return aligned_alloc(64, (size_t)((bytes + 127) & ~(i64)63)); }

INLINE int bits_of(i64 k) { /* of the largest index below k */
    int bits = 0;
    while (k > (i64)1 << bits) bits++;
    return bits;
}

/* One code of `bits` (1..32) from a stream of `words` words. */
INLINE uint32_t code_at(const uint32_t *stream, i64 words, i64 bit, int bits) {
    i64 word = bit >> 5;
    uint64_t pair = stream[word];
    if (word + 1 < words) pair |= (uint64_t)stream[word + 1] << 32;
    return (uint32_t)(pair >> (bit & 31)) & (uint32_t)(((uint64_t)1 << bits) - 1);
}

#ifdef HF_VQ_VBMI
INLINE __mmask64 first_bytes(i64 n) {
    return n >= 64 ? ~(__mmask64)0 : n <= 0 ? 0 : ((__mmask64)1 << n) - 1;
}
#endif

#if defined(HF_VQ_VBMI) || defined(__AVX2__)
/* How LANE_CODES codes of b bits become lanes of 32: which bytes, and where in them. */
#ifdef HF_VQ_VBMI
enum { LANE_CODES = 16 }; /* in 2 * b bytes */
#else
enum { LANE_CODES = 8 }; /* in b bytes: four from the first on, four from byte b / 2 on */
#endif
static struct {
    uint8_t pick[4 * LANE_CODES];
    uint32_t shift[LANE_CODES];
} lanes_of[26];
static __attribute__((constructor, unused)) void make_lanes(void) {
    for (int b = 0; b < 26; b++)
        for (int c = 0; c < LANE_CODES; c++) {
            int bit = LANE_CODES == 16 ? c * b : c % 4 * b + (c < 4 ? 0 : 4 * b % 8);
            lanes_of[b].shift[c] = (uint32_t)(bit & 7);
            for (int i = 0; i < 4; i++) lanes_of[b].pick[4 * c + i] = (uint8_t)((bit >> 3) + i);
        }
}
#endif

/* Codes first .. first + n - 1 of a stream, shifted left by `up`; out has room for n rounded up to
 * 16. */
static __attribute__((unused)) void unpack_to(const uint32_t *stream, i64 words, i64 first, i64 n,
                                              int bits, int up, uint32_t *out) {
    i64 i = 0;
#ifdef HF_VQ_VBMI
    i64 start = first * bits;
    if (bits <= 25 && start % 8 == 0) { /* 16 codes are 2 * bits whole bytes */
        __m512i picks = _mm512_loadu_si512(lanes_of[bits].pick);
        __m512i shifts = _mm512_loadu_si512(lanes_of[bits].shift);
        __m512i mask = _mm512_set1_epi32((1 << bits) - 1);
        const uint8_t *bytes = (const uint8_t *)stream + start / 8;
        i64 left = words * 4 - start / 8;
        for (; i < n; i += 16, bytes += 2 * bits, left -= 2 * bits) {
            __mmask64 inside = first_bytes(smaller(left, 2 * bits));
            __m512i codes = _mm512_maskz_loadu_epi8(inside, bytes);
            codes = _mm512_srlv_epi32(_mm512_permutexvar_epi8(picks, codes), shifts);
            codes = _mm512_sll_epi32(_mm512_and_si512(codes, mask), _mm_cvtsi32_si128(up));
            _mm512_storeu_si512(out + i, codes);
        }
        return;
    }
#endif
#if defined(__AVX2__) && !defined(HF_VQ_VBMI)
    i64 begin = first * bits;
    if (bits <= 25 && begin % 8 == 0) { /* 8 codes are `bits` whole bytes */
        __m256i picks = _mm256_loadu_si256((const void *)lanes_of[bits].pick);
        __m256i shifts = _mm256_loadu_si256((const void *)lanes_of[bits].shift);
        __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
        const uint8_t *bytes = (const uint8_t *)stream + begin / 8, *end = (const uint8_t *)(stream + words);
        i64 half = 4 * bits / 8;
        for (; i + 8 <= n && bytes + half + 16 <= end; i += 8, bytes += bits) {
            __m128i low = _mm_loadu_si128((const void *)bytes);
            __m128i high = _mm_loadu_si128((const void *)(bytes + half));
            __m256i codes = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
            codes = _mm256_srlv_epi32(_mm256_shuffle_epi8(codes, picks), shifts);
            codes = _mm256_sll_epi32(_mm256_and_si256(codes, mask), _mm_cvtsi32_si128(up));
            _mm256_storeu_si256((void *)(out + i), codes);
        }
    }
#endif
    if (32 % bits == 0) { /* no code crosses a word */
        uint32_t mask = (uint32_t)(((uint64_t)1 << bits) - 1);
        for (; i < n; i++) {
            i64 bit = (first + i) * bits;
            out[i] = (stream[bit >> 5] >> (bit & 31) & mask) << up;
        }
    }
    for (; i < n; i++) out[i] = code_at(stream, words, (first + i) * bits, bits) << up;
}

INLINE void unpack(const uint32_t *stream, i64 words, i64 first, i64 n, int bits, uint32_t *out) {
    unpack_to(stream, words, first, n, bits, 0, out);
}

INLINE uint16_t to_bf16(float value) { /* to nearest, ties to even; NaN stays one */
    uint32_t u;
    memcpy(&u, &value, 4);
    uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? u >> 16 | 0x40 : rounded);
}

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* n elements from `at` on of an array of the dtype, as float. */
INLINE void load(const void *from, i64 at, int dtype, float *values, i64 n) {
    if (dtype == FLOAT32) {
        memcpy(values, (const float *)from + at, (size_t)n * 4);
    } else if (dtype == BFLOAT16) {
        const uint16_t *stored = (const uint16_t *)from + at;
        for (i64 i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)stored[i] << 16;
            memcpy(values + i, &bits, 4);
        }
    } else {
        const _Float16 *stored = (const _Float16 *)from + at;
        for (i64 i = 0; i < n; i++) values[i] = (float)stored[i];
    }
}

/* n floats to element `at` of an array of the dtype. */
INLINE void store(void *out, i64 at, int dtype, const float *values, i64 n) {
    if (dtype == FLOAT32) {
        memcpy((float *)out + at, values, (size_t)n * 4);
    } else if (dtype == BFLOAT16) {
        uint16_t *to = (uint16_t *)out + at;
        for (i64 i = 0; i < n; i++) to[i] = to_bf16(values[i]);
    } else {
        _Float16 *to = (_Float16 *)out + at;
        for (i64 i = 0; i < n; i++) to[i] = (_Float16)values[i];
    }
}

/* A row of y: sums plus bias (or NULL), to element `at` of an array of the dtype. */
INLINE void store_sums(void *y, i64 at, int dtype, float *sums, const float *bias, i64 n) {
    if (bias)
        for (i64 i = 0; i < n; i++) sums[i] += bias[i];
    store(y, at, dtype, sums, n);
}

/* How many threads a product with one vector is worth: starting one takes time. */
INLINE i64 threads_for(i64 rows, i64 columns, i64 threads) {
    return smaller(threads, 1 + rows * columns / 65536);
}

#endif

/* Sixteen floats at a time, for any processor: the compiler makes of them what it has.  exp, and sums and maxima over lanes in one order.
 *
 * Files that include this compute a * b + c in one rounding where the processor can, in every copy of a loop alike.
 */
#ifndef MLSYS_VECTOR_H
#define MLSYS_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#pragma GCC optimize("fp-contract=fast")
#pragma GCC diagnostic ignored "-Wpsabi" /* wide vectors are passed between inlined functions only */

#define LANES 16
#define INLINE static inline __attribute__((always_inline, unused))

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef int8_t bytes __attribute__((vector_size(16)));
typedef int16_t shorts __attribute__((vector_size(32)));
typedef float floats_at __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t halves_at __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t bytes_at __attribute__((vector_size(16), aligned(1), may_alias));
typedef int16_t shorts_at __attribute__((vector_size(32), aligned(2), may_alias));

INLINE floats load(const float *p) { return *(const floats_at *)p; }
INLINE void store(float *p, floats v) { *(floats_at *)p = v; }
INLINE floats each(float x) { return (floats){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE floats pick(ints where, floats yes, floats no) { return (floats)((where & (ints)yes) | (~where & (ints)no)); }
INLINE floats size_of(floats a) { return (floats)((ints)a & 0x7fffffff); }

/* The larger or smaller of two, the second where one is no number. */
#ifdef __AVX512F__
INLINE floats larger(floats a, floats b) { return (floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE floats smaller(floats a, floats b) { return (floats)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE floats larger(floats a, floats b) { return pick(a > b, a, b); }
INLINE floats smaller(floats a, floats b) { return pick(a < b, a, b); }
#endif

/* With intrinsics: gcc 12 widens by parts, bytes even one by one. */
#if defined(__AVX512F__)
INLINE floats from_bf16(halves h) { return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16); }
INLINE floats from_int8(bytes b) { return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)b)); }
#elif defined(__AVX2__)
INLINE floats from_bf16(halves h) { return (floats)(__builtin_convertvector(h, words) << 16); }
INLINE floats from_int8(bytes b) {
    const __m128i low = (__m128i)b, high = _mm_srli_si128(low, 8);
    union {
        __m256 half[2];
        floats all;
    } to = {{_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))}};
    return to.all;
}
#else
INLINE floats from_bf16(halves h) { return (floats)(__builtin_convertvector(h, words) << 16); }
INLINE floats from_int8(bytes b) { return __builtin_convertvector(b, floats); }
#endif

INLINE float bf16_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* To the nearest, ties to even; what is no number stays none. */
INLINE uint16_t float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Sum and maximum over lanes, lane i with lane i + 8, then i + 4, i + 2, i + 1. */
INLINE floats folded(floats v, int half) {
#ifdef __clang__
    floats moved;
    for (int lane = 0; lane < 16; lane++)
        moved[lane] = v[lane ^ half];
    return moved;
#else
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return __builtin_shuffle(v, lane ^ half);
#endif
}

INLINE float sum_of(floats v) {
    v += folded(v, 8);
    v += folded(v, 4);
    v += folded(v, 2);
    return v[0] + v[1];
}

INLINE float largest_of(floats v) {
    v = larger(v, folded(v, 8));
    v = larger(v, folded(v, 4));
    v = larger(v, folded(v, 2));
    return v[0] > v[1] ? v[0] : v[1];
}

/* The larger of two sizes; what is no number is larger than all that are. */
INLINE floats larger_size(floats a, floats b) {
#ifdef __AVX512F__
    return (floats)_mm512_max_epi32((__m512i)size_of(a), (__m512i)size_of(b));
#else
    const ints x = (ints)size_of(a), y = (ints)size_of(b);
    return pick(x > y, (floats)x, (floats)y);
#endif
}

INLINE float largest_size_of(floats v) {
    v = larger_size(v, folded(v, 8));
    v = larger_size(v, folded(v, 4));
    v = larger_size(v, folded(v, 2));
    return larger_size(v, folded(v, 1))[0];
}

/* Of x[0..n-1]. */
INLINE float largest_size_in(const float *x, int32_t n) {
    float rest[LANES] = {0};
    floats top;
    memcpy(rest, x + n / LANES * LANES, n % LANES * sizeof(float));
    top = load(rest);
    for (int32_t i = 0; i + LANES <= n; i += LANES)
        top = larger_size(top, load(x + i));
    return largest_size_of(top);
}

/* To the nearest whole numbers, within 16 bit; ties to even. */
INLINE void store_wholes(int16_t *p, floats v) {
    const ints rounded = (ints)(v + 12582912.0f) - 0x4b400000;
    *(shorts_at *)p = __builtin_convertvector(rounded, shorts);
}

/* exp(x) within 2 units in the last place; 0 below -87.6, that of 88 above it, NaN of NaN.
 * x = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 leaves n in the low bits; exp(r) is the polynomial of Cephes' expf. */
INLINE floats exp_of(floats x) {
    x = smaller(each(88.0f), larger(each(-88.0f), x));
    const floats rounded = x * 1.44269504089f + 12582912.0f, n = rounded - 12582912.0f;
    const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (floats)(((ints)rounded + 127) << 23);
}

#endif

/* Words of keys and values, as attention multiplies them: a float, or two neighbours of 16 bit; see attention_tile.h. */
#ifndef MLSYS_ATTENTION_WORDS_H
#define MLSYS_ATTENTION_WORDS_H

#include "kv.h"

#if defined(__AVX512BF16__) && !defined(MLSYS_OLD_ASSEMBLER)
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

enum { KV_WORDS = 3 /* a format: as they are multiplied */ };

/* Sixteen words of neighbouring keys, each two dimensions; of F32 and what are words already, as they are. */
INLINE floats key_words(int form, const uint8_t *at) {
    if (form != KV_INT8)
        return load((const float *)at);
#if defined(__AVX512BW__)
    return (floats)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)at));
#elif defined(__AVX2__)
    union {
        __m256i half[2];
        floats all;
    } to;
    for (int h = 0; h < 2; h++)
        to.half[h] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)at + h));
    return to.all;
#else
    union {
        shorts half[2];
        floats all;
    } to = {{__builtin_convertvector(*(const bytes_at *)at, shorts), __builtin_convertvector(*(const bytes_at *)(at + 16), shorts)}};
    return to.all;
#endif
}

/* Sixteen words of neighbouring dimensions, each of two keys whose values begin at a and b. */
INLINE floats value_words(int form, const uint8_t *a, const uint8_t *b) {
#if HAS_PAIRS
    if (form == KV_BF16) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                               18, 2, 17, 1, 16, 0);
        const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)a));
        return (floats)_mm512_permutexvar_epi16(order, _mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i *)b), 1));
    }
#endif
#if defined(__AVX2__)
    const __m128i x = _mm_loadu_si128((const __m128i *)a), y = _mm_loadu_si128((const __m128i *)b);
    const __m128i low = _mm_unpacklo_epi8(x, y), high = _mm_unpackhi_epi8(x, y);
#if defined(__AVX512BW__)
    return (floats)_mm512_cvtepi8_epi16(_mm256_set_m128i(high, low));
#else
    union {
        __m256i half[2];
        floats all;
    } to = {{_mm256_cvtepi8_epi16(low), _mm256_cvtepi8_epi16(high)}};
    return to.all;
#endif
#else
    const ints x = __builtin_convertvector(*(const bytes_at *)a, ints), y = __builtin_convertvector(*(const bytes_at *)b, ints);
    return (floats)((x & 0xffff) | (y << 16));
#endif
    (void)form;
}

#endif

/* Activations into the room with AVX512: floats as integers (linear_quantise.c says how), and as pairs of bf16. */
#include "linear_ways.h"

#if defined(__x86_64__) && !defined(MLSYS_EMULATE_TILES)
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define FAST static inline __attribute__((always_inline)) TARGET

/* Up to 16 floats, the rest zero. */
FAST __m512 some(const float *x, int32_t count) {
    __mmask16 mask = count >= 16 ? 0xffff : count > 0 ? (__mmask16)((1u << count) - 1) : 0;
    return _mm512_maskz_loadu_ps(mask, x);
}

/* Write sixteen pieces of four bytes, `step` bytes apart. */
FAST void spread(uint8_t *to, int64_t step, __m512i pieces) {
    const __m512i every = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (step == 4) _mm512_storeu_si512(to, pieces);
    else _mm512_i32scatter_epi32(to, _mm512_mullo_epi32(every, _mm512_set1_epi32((int32_t)step)), pieces, 1);
}

/* 64 inputs as int32, as far as they are there. */
FAST void integers(const float *x, int32_t count, float per_step, __m512i out[4]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        out[i] = _mm512_cvtps_epi32(_mm512_mul_ps(some(x + 16 * i, count - 16 * i), _mm512_set1_ps(per_step)));
    }
}

FAST int32_t sum_of(__m512i digits, __mmask16 of) {
    __m512i sum = _mm512_setzero_si512();
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), digits);
    return _mm512_mask_reduce_add_epi32(of, sum);
}

/* Write 64 digits into a row's column of the tile. */
FAST void place(const linear_t *w, const room_t *r, const row_t *row, int32_t d, int32_t from, __m512i digits) {
    int64_t step;
    uint8_t *column = quadruple(r, row, d, from, &step);
    __m512i flipped = w->format == I8 ? _mm512_xor_si512(digits, _mm512_set1_epi8(-128)) : digits;
    spread(column, step, flipped);
    if (w->format != I4 || r->is_blocked) return;
    int32_t *sums = r->sums + row->before * r->groups + (int64_t)(from / w->group) * row->rows + row->row + d;
    if (w->group == 32) {
        sums[0] = -8 * sum_of(digits, 0x00ff);
        sums[row->rows] = -8 * sum_of(digits, 0xff00);
    } else {
        sums[0] = -8 * sum_of(digits, 0xffff) + (from % w->group ? sums[0] : 0);
    }
}

TARGET void quantise_avx512(const linear_t *w, const room_t *r, const row_t *row, int32_t first, int32_t last) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); /* packs work within quarters */
    for (int32_t from = first; from < last; from += 64) {
        __m512i at[4];
        integers(row->x + from, row->per_step > 0.0f ? w->k - from : 0, row->per_step, at);
        __m512i left = _mm512_packs_epi32(at[0], at[1]), right = _mm512_packs_epi32(at[2], at[3]);
        if (r->digits == 2) {
            const __m512i half = _mm512_set1_epi16(128), low = _mm512_set1_epi16(255);
            __m512i lows = _mm512_packus_epi16(_mm512_and_si512(left, low), _mm512_and_si512(right, low));
            place(w, r, row, 1, from, _mm512_permutexvar_epi32(order, lows));
            left = _mm512_srai_epi16(_mm512_add_epi16(left, half), 8);
            right = _mm512_srai_epi16(_mm512_add_epi16(right, half), 8);
        }
        place(w, r, row, 0, from, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(left, right)));
    }
}

/* Spelled out, as old compilers do not know the type: 32 floats as bf16, in order, to nearest, ties to even. */
FAST __m512i rounded(__m512 low, __m512 high) {
    __m512i both = _mm512_setzero_si512();
#ifndef MLSYS_OLD_ASSEMBLER
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(low), "v"(high));
#else
    (void)low, (void)high;
#endif
    return both;
}

TARGET void pair_avx512(const linear_t *w, const room_t *r, const row_t *row, int32_t first, int32_t last) {
    for (int32_t k = first; k < last; k += 32) {
        uint8_t *beside = r->data + 2 * (row->before * r->k + (int64_t)k * row->rows + 2 * row->row);
        __m512i pairs = rounded(some(row->x + k, w->k - k), some(row->x + k + 16, w->k - k - 16));
        spread(r->is_blocked ? line_of_pairs(r, row, k) : beside, r->is_blocked ? 4 : 4 * row->rows, pairs);
    }
}

#else
void quantise_avx512(const linear_t *w, const room_t *r, const row_t *row, int32_t first, int32_t last) {
    quantise_portable(w, r, row, first, last);
}

void pair_avx512(const linear_t *w, const room_t *r, const row_t *row, int32_t first, int32_t last) {
    pair_portable(w, r, row, first, last);
}
#endif

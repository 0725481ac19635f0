/* One panel at a time in the 16 registers of AVX2: a panel's weights stay in the first caches while all rows pass. */
#include "cpu.h"
#include "linear_ways.h"

#if defined(__x86_64__) && !defined(MLSYS_EMULATE_TILES)
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define FAST static inline __attribute__((always_inline)) TARGET

enum { HALF = 8, NEAR = 256, FAR = 1024 };

typedef struct {
    const linear_t *w;
    const room_t *room;
    float *y;
    int32_t ldy;
    int32_t panel, start, rows; /* the panel; first token of the tile; rows of the tile */
    int32_t ahead;              /* bytes of weights fetched early */
} job_t;

FAST void store(const job_t *job, int32_t token, __m256 low, __m256 high) {
    int32_t column = job->panel * PANEL, left = job->w->n - column;
    float sum[PANEL];
    _mm256_storeu_ps(sum, low);
    _mm256_storeu_ps(sum + HALF, high);
    float *y = job->y + (int64_t)token * job->ldy + column;
    for (int32_t lane = 0; lane < PANEL && lane < left; lane++) y[lane] = job->w->bias ? sum[lane] + job->w->bias[column + lane] : sum[lane];
}

FAST int32_t four(const uint8_t *bytes) {
    int32_t value;
    memcpy(&value, bytes, 4);
    return value;
}

/* F32 and BF16, rows first..first+R-1 of the tile. */
FAST void floats(const job_t *job, int32_t first, const int R, const int is_bf16) {
    const room_t *room = job->room;
    int64_t length = (int64_t)room->k * PANEL * (is_bf16 ? 2 : 4), step = job->rows * (is_bf16 ? 2 : 1);
    const float *x = (const float *)room->data + (int64_t)job->start * room->k + first;
    const char *weight = (const char *)job->w->weight + job->panel * length;
    const __m256i upper = _mm256_set1_epi32((int32_t)0xffff0000);
    __m256 sum[4][2];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
    for (int64_t at = 0; at < length; at += 64, x += step) {
        __m256i line[2] = {_mm256_load_si256((const __m256i *)(weight + at)), _mm256_load_si256((const __m256i *)(weight + at + 32))};
        _mm_prefetch(weight + at + job->ahead, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            __m256 even = _mm256_castsi256_ps(is_bf16 ? _mm256_slli_epi32(line[h], 16) : line[h]);
            __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(line[h], upper));
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                sum[r][h] = _mm256_fmadd_ps(_mm256_broadcast_ss(x + r), even, sum[r][h]);
                if (is_bf16) sum[r][h] = _mm256_fmadd_ps(_mm256_broadcast_ss(x + job->rows + r), odd, sum[r][h]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) store(job, job->start + first + r, sum[r][0], sum[r][1]);
}

/* Sums of I8 for one row: u8 digits times s8 weights, both widened, as products of bytes saturate in pairs.  out: 16 outputs in order */
FAST void bytes_sum(const job_t *job, int32_t row, __m256i out[2]) {
    const room_t *room = job->room;
    int64_t length = (int64_t)room->k * PANEL;
    const uint8_t *x = room->data + (int64_t)job->start * room->digits * room->k + 4 * row;
    const char *weight = (const char *)job->w->weight + job->panel * length;
    __m256i sum[4]; /* of four outputs each, two halves side by side */
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sum[i] = _mm256_setzero_si256();
    for (int64_t at = 0; at < length; at += 64, x += 4 * job->rows) {
        __m256i digits = _mm256_cvtepu8_epi16(_mm_set1_epi32(four(x)));
        _mm_prefetch(weight + at + job->ahead, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m256i wide = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i *)(weight + at + 16 * i)));
            sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(wide, digits));
        }
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        __m256i both = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum[2 * h], sum[2 * h + 1]), 0xd8);
        out[h] = _mm256_add_epi32(both, _mm256_loadu_si256((const __m256i *)(job->w->start + job->panel * PANEL + HALF * h)));
    }
}

FAST void bytes(const job_t *job, int32_t row) {
    const room_t *room = job->room;
    int32_t token = job->start + row / room->digits;
    const float *scale = (const float *)job->w->scale + job->panel * PANEL;
    __m256i top[2], low[2];
    __m256 all[2];
    bytes_sum(job, row, top);
    if (room->digits == 2) bytes_sum(job, row + 1, low);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        all[h] = _mm256_cvtepi32_ps(top[h]);
        if (room->digits == 2) all[h] = _mm256_fmadd_ps(all[h], _mm256_set1_ps(256.0f), _mm256_cvtepi32_ps(low[h]));
        all[h] = _mm256_mul_ps(_mm256_mul_ps(all[h], _mm256_set1_ps(room->scale[token])), _mm256_loadu_ps(scale + HALF * h));
    }
    store(job, token, all[0], all[1]);
}

/* *sum += quadruples of u4 times s8 over 32 inputs; pairs stay below 8 * 2 * 15 * 128 = 30,720, within 16 bit. */
FAST void nibbles_sum(const char *weight, const uint8_t *x, int32_t rows, __m256i sum[2]) {
    const __m256i nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
    __m256i pairs[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++, x += 8 * rows) {
        __m256i first = _mm256_set1_epi32(four(x)), second = _mm256_set1_epi32(four(x + 4 * rows));
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            __m256i line = _mm256_load_si256((const __m256i *)(weight + 64 * i + 32 * h));
            __m256i low = _mm256_and_si256(line, nibble), high = _mm256_and_si256(_mm256_srli_epi16(line, 4), nibble);
            pairs[h] = _mm256_add_epi16(pairs[h], _mm256_maddubs_epi16(low, first));
            pairs[h] = _mm256_add_epi16(pairs[h], _mm256_maddubs_epi16(high, second));
        }
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) sum[h] = _mm256_add_epi32(sum[h], _mm256_madd_epi16(pairs[h], one));
}

FAST void nibbles(const job_t *job, int32_t row, const int D) {
    const room_t *room = job->room;
    int32_t token = job->start + row / D, group = job->w->group;
    int64_t place = (int64_t)job->panel * room->groups * PANEL;
    const uint8_t *x = room->data + (int64_t)job->start * D * room->k + 4 * row;
    const int32_t *minus_eight = room->sums + (int64_t)job->start * D * room->groups + row;
    const char *weight = (const char *)job->w->weight + (int64_t)job->panel * room->k * PANEL / 2;
    __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int32_t g = 0; g < room->groups; g++, place += PANEL, minus_eight += job->rows) {
        __m256i sum[2][2];
#pragma GCC unroll 2
        for (int d = 0; d < D; d++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                sum[d][h] = _mm256_set1_epi32(minus_eight[d]);
                if (!job->w->zero) continue;
                __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(job->w->zero + place + HALF * h)));
                sum[d][h] = _mm256_mullo_epi32(_mm256_srai_epi32(sum[d][h], 3), zero);
            }
        for (int32_t i = 0; i < group; i += 32, x += 32 * job->rows, weight += 256) {
            _mm_prefetch(weight + job->ahead, _MM_HINT_T0);
            _mm_prefetch(weight + job->ahead + 128, _MM_HINT_T0);
#pragma GCC unroll 2
            for (int d = 0; d < D; d++) nibbles_sum(weight, x + 4 * d, job->rows, sum[d]);
        }
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)job->w->scale + place + HALF * h)));
            __m256i all = D == 1 ? sum[0][h] : _mm256_add_epi32(_mm256_slli_epi32(sum[0][h], 8), sum[1][h]);
            total[h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(all), scale, total[h]);
        }
    }
    __m256 scale = _mm256_set1_ps(room->scale[token]);
    store(job, token, _mm256_mul_ps(total[0], scale), _mm256_mul_ps(total[1], scale));
}

TARGET static void float_rows(const job_t *job, int32_t is_bf16) {
    int32_t row = 0;
    for (; row + 4 <= job->rows; row += 4) is_bf16 ? floats(job, row, 4, 1) : floats(job, row, 4, 0);
    for (; row + 2 <= job->rows; row += 2) is_bf16 ? floats(job, row, 2, 1) : floats(job, row, 2, 0);
    for (; row < job->rows; row++) is_bf16 ? floats(job, row, 1, 1) : floats(job, row, 1, 0);
}

TARGET static void byte_rows(const job_t *job) {
    for (int32_t row = 0; row < job->rows; row += job->room->digits) bytes(job, row);
}

TARGET static void nibble_rows(const job_t *job) {
    for (int32_t row = 0; row < job->rows; row += job->room->digits) job->room->digits == 1 ? nibbles(job, row, 1) : nibbles(job, row, 2);
}

void linear_avx2(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last) {
    room_t room = room_of(w, a);
    job_t job = {.w = w, .room = &room, .y = y, .ldy = ldy, .ahead = cpu_fetches_near() ? NEAR : FAR};
    for (job.panel = first; job.panel < last; job.panel++)
        for (int32_t tile = 0; tile < room.tiles; tile++) {
            job.start = first_token(a->m, tile, room.tiles);
            job.rows = (first_token(a->m, tile + 1, room.tiles) - job.start) * room.digits;
            if (w->format == I8) byte_rows(&job);
            else if (w->format == I4) nibble_rows(&job);
            else float_rows(&job, w->format == BF16);
        }
}

#else
void linear_avx2(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last) {
    linear_portable(w, a, y, ldy, first, last);
}
#endif

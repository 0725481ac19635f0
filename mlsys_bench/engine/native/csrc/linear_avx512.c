/* Tiles of rows times panels in registers, AVX512 with VNNI, and with BF16 where the processor has it.
 *
 * A kernel holds R rows of a tile and P panels: R * P sums, each register 16 outputs.  It is one function, written once for each kind of
 * weights and made for every R (and P, and digits) by macros below, so that sums stay in registers.  Few rows wait for memory: one tile
 * reads the weights as a stream, and asks for what comes some pages later (on AMD's processors, some lines).  Many rows wait for the
 * multipliers: the weights of a few panels stay in the second-level cache while all tiles of a block pass, and every pass fetches its
 * share of the next panels.
 */
#include "cpu.h"
#include "linear_ways.h"

#if defined(__x86_64__) && !defined(MLSYS_EMULATE_TILES)
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define FAST static inline __attribute__((always_inline)) TARGET

enum {
    FAR = 2048,            /* bytes of each stream fetched early: with less, page borders show */
    NEAR = 256,            /* ... on a processor that reads streams ahead itself, for tiles that take weights as fast as memory gives them */
    SCALES_AHEAD = 256,    /* of the scales of groups, which are a stream beside each */
    BLOCK_BYTES = 393216,  /* of activations that stay in the second-level cache beside two panels */
    LEAST_BLOCK = 48,      /* rows for which weights are read from memory faster than they are used */
};

typedef struct {
    const linear_t *w;
    const act_t *a;
    room_t room;
    float *y;
    int32_t ldy;
    int32_t panel, token;         /* the first of the tile */
    int32_t last;                 /* panel: where a tile holds more panels than are left, it computes this one again */
    const char *fetch;            /* weights to fetch early: one line of each panel per line read, */
    int64_t fetch_step;           /* so many bytes further each time */
    int32_t is_near;              /* the processor: cpu_fetches_near */
    int64_t jump_at, jump;        /* when so much is read, fetching goes on that much further */
} job_t;

typedef void (*kernel_t)(const job_t *job);

FAST int32_t panel_of(const job_t *job, int p) { return job->panel + p < job->last ? job->panel + p : job->last; }

/* Store the sums of `tokens` rows and P panels, times a scale per token where there is one.  sum: [tokens][P] */
TARGET static void finish(const job_t *job, const __m512 *sum, int32_t tokens, int32_t P, const float *scale) {
    for (int32_t p = 0; p < P; p++) {
        int32_t column = panel_of(job, p) * PANEL, left = job->w->n - column;
        __mmask16 mask = left >= PANEL ? 0xffff : (__mmask16)((1u << left) - 1);
        __m512 bias = job->w->bias ? _mm512_maskz_loadu_ps(mask, job->w->bias + column) : _mm512_setzero_ps();
        for (int32_t t = 0; t < tokens; t++) {
            __m512 y = scale ? _mm512_mul_ps(sum[t * P + p], _mm512_set1_ps(scale[t])) : sum[t * P + p];
            _mm512_mask_storeu_ps(job->y + (int64_t)(job->token + t) * job->ldy + column, mask, _mm512_add_ps(y, bias));
        }
    }
}

/* The same for sums of I8, one a digit: put together, times the scales of token and output.  sum: [rows][P] */
TARGET static void finish_bytes(const job_t *job, const __m512i *sum, int32_t rows, int32_t P) {
    int32_t digits = job->room.digits;
    __m512 all[TILE * 4];
    for (int32_t t = 0; t < rows / digits; t++)
        for (int32_t p = 0; p < P; p++) {
            const __m512i *top = sum + t * digits * P + p;
            __m512 value = _mm512_cvtepi32_ps(*top);
            if (digits == 2) value = _mm512_fmadd_ps(value, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(top[P]));
            value = _mm512_mul_ps(value, _mm512_set1_ps(job->room.scale[job->token + t]));
            all[t * P + p] = _mm512_mul_ps(value, _mm512_loadu_ps((const float *)job->w->scale + panel_of(job, p) * PANEL));
        }
    finish(job, all, rows / digits, P, NULL);
}

/* *sum += quadruples of u8 times s8.  Spelled out, as gcc 12 moves sums around between the builtin's operands, twice an instruction. */
FAST void multiply_add(__m512i *sum, __m512i u8, __m512i s8) { __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(u8), "v"(s8)); }

/* The same with one quadruple, out of memory, for all. */
FAST void multiply_add_same(__m512i *sum, __m512i u8, const uint8_t *s8) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(u8), "m"(*(const int32_t(*)[1])s8));
}

/* *sum += pairs of bf16. */
#ifndef MLSYS_OLD_ASSEMBLER
FAST void multiply_add_pairs(__m512 *sum, __m512i a, __m512i b) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(*sum) : "v"(a), "v"(b)); }
#else
FAST void multiply_add_pairs(__m512 *sum, __m512i a, __m512i b) { (void)sum, (void)a, (void)b; /* no level asks for it: cpu.c */ }
#endif

FAST __m512i four(const void *bytes) {
    int32_t value;
    memcpy(&value, bytes, 4);
    return _mm512_set1_epi32(value);
}

FAST void fetch(const int P, const char **from, const job_t *job, int64_t at, int64_t length) {
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) _mm_prefetch(*from + p * length, _MM_HINT_T0);
    *from += job->fetch_step + (at == job->jump_at ? job->jump : 0);
}

/* I8: sums of u8 digits times s8 weights. */
FAST void bytes(const job_t *job, const int R, const int P) {
    const room_t *room = &job->room;
    const uint8_t *x = room->data + (int64_t)job->token * room->digits * room->k;
    int64_t length = (int64_t)room->k * PANEL;
    const char *weight[4], *early = job->fetch;
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) weight[p] = (const char *)job->w->weight + panel_of(job, p) * length;
    __m512i sum[12][4];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++)
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) sum[r][p] = _mm512_loadu_si512(job->w->start + panel_of(job, p) * PANEL);
    for (int64_t at = 0; at < length; at += LINE, x += 4 * R) {
        __m512i line[4];
        fetch(P, &early, job, at, length);
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) line[p] = _mm512_load_si512(weight[p] + at);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            __m512i digits = four(x + 4 * r);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) multiply_add(&sum[r][p], digits, line[p]);
        }
    }
    __m512i all[TILE * 4];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) all[r * P + p] = sum[r][p];
    finish_bytes(job, all, R, P);
}

/* F32 and BF16: products in order of k. */
FAST void floats(const job_t *job, const int R, const int P, const int is_bf16) {
    const room_t *room = &job->room;
    const float *x = (const float *)room->data + (int64_t)job->token * room->k;
    int64_t length = (int64_t)room->k * PANEL * (is_bf16 ? 2 : 4);
    const char *weight[4], *early = job->fetch;
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) weight[p] = (const char *)job->w->weight + panel_of(job, p) * length;
    const __m512i upper = _mm512_set1_epi32((int32_t)0xffff0000);
    __m512 sum[12][4];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++)
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) sum[r][p] = _mm512_setzero_ps();
    for (int64_t at = 0; at < length; at += LINE, x += is_bf16 ? 2 * R : R) {
        __m512 even[4], odd[4];
        fetch(P, &early, job, at, length);
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            __m512i line = _mm512_load_si512(weight[p] + at);
            even[p] = _mm512_castsi512_ps(is_bf16 ? _mm512_slli_epi32(line, 16) : line);
            odd[p] = _mm512_castsi512_ps(_mm512_and_si512(line, upper));
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            __m512 input = _mm512_set1_ps(x[r]);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) sum[r][p] = _mm512_fmadd_ps(input, even[p], sum[r][p]);
        }
#pragma GCC unroll 12
        for (int r = 0; is_bf16 && r < R; r++) {
            __m512 input = _mm512_set1_ps(x[R + r]);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) sum[r][p] = _mm512_fmadd_ps(input, odd[p], sum[r][p]);
        }
    }
    __m512 all[TILE * 4];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) all[r * P + p] = sum[r][p];
    finish(job, all, R, P, NULL);
}

/* BF16 where the processor multiplies pairs of them: one sum for each output, in order of k, for every number of rows. */
FAST void pairs(const job_t *job, const int R, const int P) {
    const room_t *room = &job->room;
    const uint8_t *x = room->data + (int64_t)job->token * room->k * 2;
    int64_t length = (int64_t)room->k * PANEL * 2;
    const char *weight[4], *early = job->fetch;
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) weight[p] = (const char *)job->w->weight + panel_of(job, p) * length;
    __m512 sum[12][4];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++)
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) sum[r][p] = _mm512_setzero_ps();
    for (int64_t at = 0; at < length; at += LINE, x += 4 * R) {
        __m512i line[4];
        fetch(P, &early, job, at, length);
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) line[p] = _mm512_load_si512(weight[p] + at);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            __m512i input = four(x + 4 * r);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) multiply_add_pairs(&sum[r][p], input, line[p]);
        }
    }
    __m512 all[TILE * 4];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) all[r * P + p] = sum[r][p];
    finish(job, all, R, P, NULL);
}

/* I4: sums of u4 weights times s8 digits per group, then scaled.  D: digits of a token. */
FAST void nibbles(const job_t *job, const int R, const int P, const int D) {
    const room_t *room = &job->room;
    const uint8_t *x = room->data + (int64_t)job->token * D * room->k;
    const int32_t *minus_eight = room->sums + (int64_t)job->token * D * room->groups;
    int64_t length = (int64_t)room->k * PANEL / 2, group_bytes = (int64_t)job->w->group * PANEL / 2;
    const char *weight[4], *early = job->fetch;
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) weight[p] = (const char *)job->w->weight + panel_of(job, p) * length;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 total[12][4];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++)
#pragma GCC unroll 12
        for (int t = 0; t < R / D; t++) total[t][p] = _mm512_setzero_ps();
    int64_t at = 0;
    for (int32_t g = 0; g < room->groups; g++, minus_eight += R) {
        __m512i sum[12][4];
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) sum[r][p] = _mm512_set1_epi32(minus_eight[r]);
        if (job->w->zero) {
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                const void *from = job->w->zero + ((int64_t)panel_of(job, p) * room->groups + g) * PANEL;
                __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(from));
#pragma GCC unroll 12
                for (int r = 0; r < R; r++) sum[r][p] = _mm512_mullo_epi32(_mm512_srai_epi32(sum[r][p], 3), zero);
            }
        }
        for (int64_t end = at + group_bytes; at < end; at += LINE, x += 8 * R) {
            __m512i low[4], high[4];
            fetch(P, &early, job, at, length);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                __m512i line = _mm512_load_si512(weight[p] + at);
                low[p] = _mm512_and_si512(line, nibble);
                high[p] = _mm512_and_si512(_mm512_srli_epi16(line, 4), nibble);
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                if (P == 1) {
                    multiply_add_same(&sum[r][0], low[0], x + 4 * r);
                    continue;
                }
                __m512i digits = four(x + 4 * r);
#pragma GCC unroll 4
                for (int p = 0; p < P; p++) multiply_add(&sum[r][p], low[p], digits);
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                if (P == 1) {
                    multiply_add_same(&sum[r][0], high[0], x + 4 * (R + r));
                    continue;
                }
                __m512i digits = four(x + 4 * (R + r));
#pragma GCC unroll 4
                for (int p = 0; p < P; p++) multiply_add(&sum[r][p], high[p], digits);
            }
        }
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            const void *from = (const uint16_t *)job->w->scale + ((int64_t)panel_of(job, p) * room->groups + g) * PANEL;
            __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(from));
            _mm_prefetch((const char *)from + SCALES_AHEAD, _MM_HINT_T0);
#pragma GCC unroll 12
            for (int t = 0; t < R / D; t++) {
                __m512i all = D == 1 ? sum[t][p] : _mm512_add_epi32(_mm512_slli_epi32(sum[2 * t][p], 8), sum[2 * t + 1][p]);
                total[t][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), scale, total[t][p]);
            }
        }
    }
    __m512 all[TILE * 4];
#pragma GCC unroll 12
    for (int t = 0; t < R / D; t++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) all[t * P + p] = total[t][p];
    finish(job, all, R / D, P, room->scale + job->token);
}

/* Panels that a tile of so many rows has registers for. */
#define WIDTH(R) ((R) <= 6 ? 4 : 2)
#define WIDTH4(R) ((R) <= 2 ? 4 : (R) <= 6 ? 2 : 1)
#define KERNELS(R)                                                                      \
    TARGET static void f32_##R(const job_t *job) { floats(job, R, WIDTH(R), 0); }       \
    TARGET static void bf16_##R(const job_t *job) { floats(job, R, WIDTH(R), 1); }      \
    TARGET static void i8_##R(const job_t *job) { bytes(job, R, WIDTH(R)); }            \
    TARGET static void pairs_##R(const job_t *job) { pairs(job, R, WIDTH(R)); }         \
    TARGET static void i4_##R(const job_t *job) { nibbles(job, R, WIDTH4(R), 1); }
#define DIGITS(R) \
    TARGET static void i4x2_##R(const job_t *job) { nibbles(job, R, WIDTH4(R), 2); }
#define EACH(KIND) {KIND##_1, KIND##_2, KIND##_3, KIND##_4, KIND##_5, KIND##_6, KIND##_7, KIND##_8, KIND##_9, KIND##_10, KIND##_11, KIND##_12}

KERNELS(1) KERNELS(2) KERNELS(3) KERNELS(4) KERNELS(5) KERNELS(6)
KERNELS(7) KERNELS(8) KERNELS(9) KERNELS(10) KERNELS(11) KERNELS(12)
DIGITS(2) DIGITS(4) DIGITS(6) DIGITS(8) DIGITS(10) DIGITS(12)

enum { F32_KIND, BF16_KIND, I8_KIND, I4_KIND, I4X2_KIND, PAIRS_KIND, KINDS };

static const kernel_t kernels[KINDS][TILE] = {
    EACH(f32), EACH(bf16), EACH(i8), EACH(i4), {[1] = i4x2_2, [3] = i4x2_4, [5] = i4x2_6, [7] = i4x2_8, [9] = i4x2_10, [11] = i4x2_12},
    EACH(pairs),
};

static int64_t panel_bytes(const linear_t *w, int32_t k) {
    static const int64_t halves[] = {[F32] = 8, [BF16] = 4, [I8] = 2, [I4] = 1};
    return (int64_t)k * PANEL * halves[w->format] / 2;
}

/* Where to fetch early: a lone tile some pages ahead in its own streams, each of several tiles its part of the panels that come next. */
static void plan_fetching(job_t *job, int64_t length, int32_t width, int32_t tile, int32_t tiles) {
    int64_t ahead = job->is_near && width == 4 ? NEAR : FAR;
    const char *here = (const char *)job->w->weight + job->panel * length, *next = here + width * length;
    job->jump_at = -1;
    job->fetch_step = tiles == 1 ? LINE : LINE / tiles + 1;
    job->fetch = next + (tiles == 1 ? 0 : length * tile / tiles);
    if (tiles > 1 || length <= ahead) return;
    job->fetch = here + ahead;
    job->jump_at = length - ahead - LINE;
    job->jump = (width - 1) * length;
}

/* All tiles from..until-1 over panels first..last-1, `width` at a time. */
static void block(job_t *job, int32_t kind, int32_t rows, int32_t first, int32_t last, int32_t from, int32_t until) {
    int64_t length = panel_bytes(job->w, job->room.k);
    int32_t width = kind == I4_KIND || kind == I4X2_KIND ? WIDTH4(rows) : WIDTH(rows);
    for (job->panel = first; job->panel < last; job->panel += width)
        for (int32_t tile = from; tile < until; tile++) {
            job->token = first_token(job->a->m, tile, job->room.tiles);
            int32_t tokens = first_token(job->a->m, tile + 1, job->room.tiles) - job->token;
            plan_fetching(job, length, width, tile - from, until - from);
            kernels[kind][tokens * job->room.digits - 1](job);
        }
}

void linear_avx512(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last) {
    job_t job = {.w = w, .a = a, .room = room_of(w, a), .y = y, .ldy = ldy, .last = last - 1, .is_near = cpu_fetches_near()};
    int32_t kind = job.room.is_paired ? PAIRS_KIND : w->format == I4 && !w->int8_input ? I4X2_KIND : w->format;
    int32_t rows = (a->m + job.room.tiles - 1) / job.room.tiles * job.room.digits;
    int64_t most = BLOCK_BYTES / ((int64_t)job.room.k * (job.room.is_paired ? 2 : w->format <= BF16 ? 4 : 1));
    int32_t at_once = (int32_t)(most > LEAST_BLOCK ? most : LEAST_BLOCK) / rows;
    for (int32_t tile = 0; tile < job.room.tiles; tile += at_once)
        block(&job, kind, rows, first, last, tile, tile + at_once < job.room.tiles ? tile + at_once : job.room.tiles);
}

#else
void linear_avx512(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last) {
    linear_portable(w, a, y, ldy, first, last);
}
#endif

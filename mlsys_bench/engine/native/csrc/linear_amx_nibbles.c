/* I4 on tiles, for rows enough that reading weights is the smaller part.
 *
 * The nibbles of a few panels less their zero points become bytes, so many groups at a time as stay in the second-level cache; then every
 * block of 16 rows passes.  Tiles add up a group, exactly; its sums leave them to be scaled and added to those of the groups before: the
 * same operations in the same order as without tiles, so the same bits.
 */
#include "linear_ways.h"
#include "tiles.h"

#ifdef HAS_TILES
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum {
    WIDTH = 4,          /* panels at once: a row of y is written 256 bytes at a time, and a block of activations is read once for all */
    INPUTS = 1024,      /* of them, whose weights are widened at a time: 64 KB */
    MOST_GROUPS = INPUTS / 32,
    MOST_BLOCKS = 32,   /* that pass: 128 KB of totals */
};

/* Some groups of a panel. */
typedef struct {
    int8_t weight[INPUTS * PANEL]; /* [k/4][16][4], as tiles are read */
    float scale[MOST_GROUPS][PANEL];
} groups_t;

typedef float totals_t[BLOCK][PANEL]; /* of a block and a panel: a row for each token */
typedef int32_t sums_t[BLOCK][PANEL];

/* What a thread has under way; too large for the stack of some. */
static _Thread_local struct {
    _Alignas(64) groups_t groups[WIDTH];
    _Alignas(64) totals_t total[MOST_BLOCKS][WIDTH];
} here;

typedef struct {
    const linear_t *w;
    const act_t *a;
    room_t room;
    float *y;
    int32_t ldy;
    int32_t panel, panels; /* at hand */
    int32_t group, groups;
    int32_t block;
} job_t;

/* Bytes of a group's nibbles less 16 zero points, or 8 where there are none. */
static void widen_group(const uint8_t *line, const uint8_t *zero, int32_t group, int8_t *byte) {
#ifdef __AVX512F__
    const __m512i low = _mm512_set1_epi8(15), four = _mm512_set1_epi32(0x01010101);
    const __m512i less = zero ? _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)zero)), four) : _mm512_set1_epi8(8);
    for (int32_t k = 0; k < group; k += 8, line += LINE, byte += 2 * LINE) {
        const __m512i both = _mm512_load_si512(line);
        _mm512_store_si512(byte, _mm512_sub_epi8(_mm512_and_si512(both, low), less));
        _mm512_store_si512(byte + LINE, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), less));
    }
#else
    for (int32_t k = 0; k < group; k += 8, line += LINE, byte += 2 * LINE)
        for (int32_t i = 0; i < LINE; i++) {
            const int32_t less = zero ? zero[i / 4] : 8;
            byte[i] = (int8_t)((line[i] & 15) - less);
            byte[LINE + i] = (int8_t)((line[i] >> 4) - less);
        }
#endif
}

static const uint8_t *nibbles_of(const job_t *job, int32_t panel, int32_t group) {
    return (const uint8_t *)job->w->weight + ((int64_t)panel * job->room.k + (int64_t)group * job->w->group) * PANEL / 2;
}

static void widen(const job_t *job, int32_t panel, groups_t *to) {
    const linear_t *w = job->w;
    const uint8_t *from = nibbles_of(job, panel, job->group);
    for (int32_t g = 0; g < job->groups; g++) {
        const int64_t place = ((int64_t)panel * job->room.groups + job->group + g) * PANEL, at = (int64_t)g * w->group * PANEL;
        const uint16_t *scale = (const uint16_t *)w->scale + place;
        widen_group(from + at / 2, w->zero ? w->zero + place : NULL, w->group, to->weight + at);
#ifdef __AVX512F__
        _mm512_store_ps(to->scale[g], _mm512_cvtph_ps(_mm256_loadu_si256((const void *)scale)));
#else
        for (int32_t lane = 0; lane < PANEL; lane++) to->scale[g][lane] = half_to_float(scale[lane]);
#endif
    }
}

/* Ask for one block's share of what is widened next: a chunk of `panels` panels lies in as many pieces. */
static void fetch(const job_t *job, int32_t block, int32_t blocks) {
    const int32_t more = job->group + job->groups < job->room.groups, group = more ? job->group + job->groups : 0;
    const int32_t left = job->room.groups - group < INPUTS / job->w->group ? job->room.groups - group : INPUTS / job->w->group;
    const int64_t lines = (int64_t)left * job->w->group * PANEL / 2 / LINE;
    for (int32_t p = 0; p < WIDTH; p++) {
        const uint8_t *from = nibbles_of(job, job->panel + p + (more ? 0 : WIDTH), group);
        for (int64_t at = lines * block / blocks; at < lines * (block + 1) / blocks; at++) __builtin_prefetch(from + at * LINE, 0, 2);
    }
}

/* Sums of one group.  x: its inputs of a block; weight: its weights */
static inline __attribute__((always_inline)) void add_up(const uint8_t *x, int64_t step, const int8_t *weight, int32_t group, sums_t sum) {
    ZERO(0);
    for (int32_t k = 0; k < group; k += LINE, x += step, weight += LINE * PANEL) {
        LOAD(4, x);
        LOAD(6, weight);
        DOT_SIGNED(0, 4, 6);
    }
    STORE(0, sum, LINE);
}

/* Add the groups, scaled, to the totals of a block, which begin with zero; the digits of a token are put together first. */
static inline __attribute__((always_inline)) void add_groups(const job_t *job, const groups_t *g, totals_t total, const int digits) {
    _Alignas(64) sums_t sum = {0};
    const room_t *r = &job->room;
    const int32_t group = job->w->group, tokens = BLOCK / digits;
    const int64_t step = (int64_t)r->block_rows * LINE;
    const uint8_t *x = r->data + (int64_t)job->block * BLOCK * r->k; /* blocks before are whole */
#ifdef __AVX512F__
    __m512 all[BLOCK];
#pragma GCC unroll 16
    for (int t = 0; t < tokens; t++) all[t] = job->group ? _mm512_load_ps(total[t]) : _mm512_setzero_ps();
#else
    if (job->group == 0) memset(total, 0, sizeof(totals_t));
#endif
    for (int32_t i = 0; i < job->groups; i++) {
        const int64_t k = (int64_t)(job->group + i) * group;
        add_up(x + k / LINE * step + k % LINE, step, g->weight + (int64_t)i * group * PANEL, group, sum);
#ifdef __AVX512F__
        const __m512 scale = _mm512_loadu_ps(g->scale[i]);
#pragma GCC unroll 16
        for (int t = 0; t < tokens; t++) {
            __m512i whole = _mm512_load_si512(sum[t * digits]);
            if (digits == 2) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), _mm512_load_si512(sum[2 * t + 1]));
            all[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale, all[t]);
        }
#else
        for (int t = 0; t < tokens; t++)
            for (int lane = 0; lane < PANEL; lane++) {
                const int32_t whole = digits == 2 ? sum[2 * t][lane] * 256 + sum[2 * t + 1][lane] : sum[t][lane];
                total[t][lane] = MULTIPLY_ADD((float)whole, g->scale[i][lane], total[t][lane]);
            }
#endif
    }
#ifdef __AVX512F__
#pragma GCC unroll 16
    for (int t = 0; t < tokens; t++) _mm512_store_ps(total[t], all[t]);
#endif
}

static void add_plain(const job_t *job, const groups_t *g, totals_t total) { add_groups(job, g, total, 1); }
static void add_paired(const job_t *job, const groups_t *g, totals_t total) { add_groups(job, g, total, 2); }

/* Ask for the rows of y that a block will write. */
static void fetch_rows(const job_t *job) {
    const int32_t tokens = BLOCK / job->room.digits, first = job->block * tokens;
    for (int32_t t = 0; t < tokens && first + t < job->a->m; t++) {
        const float *row = job->y + (int64_t)(first + t) * job->ldy + job->panel * PANEL;
        for (int32_t p = 0; p < job->panels; p++) __builtin_prefetch(row + p * PANEL, 1, 2);
    }
}

/* Write a block's totals times the scale of each token. */
static void finish(const job_t *job, const totals_t *total) {
    const int32_t tokens = BLOCK / job->room.digits, first = job->block * tokens, n = job->w->n;
    const float *bias = job->w->bias;
    for (int32_t t = 0; t < tokens && first + t < job->a->m; t++) {
        const float scale = job->room.scale[first + t];
        for (int32_t p = 0; p < job->panels; p++) {
            const int32_t column = (job->panel + p) * PANEL, left = n - column < PANEL ? n - column : PANEL;
            float value[PANEL], *to = job->y + (int64_t)(first + t) * job->ldy + column;
            for (int32_t lane = 0; lane < PANEL; lane++) value[lane] = total[p][t][lane] * scale;
            for (int32_t lane = 0; bias && lane < left; lane++) value[lane] += bias[column + lane];
            if (left == PANEL) memcpy(to, value, sizeof value);
            else memcpy(to, value, (size_t)left * sizeof *value);
        }
    }
}

/* All blocks from..until-1 over the panels at hand. */
static void pass(job_t *job, int32_t from, int32_t until) {
    const int32_t at_once = INPUTS / job->w->group;
    for (job->group = 0; job->group < job->room.groups; job->group += at_once) {
        job->groups = job->room.groups - job->group < at_once ? job->room.groups - job->group : at_once;
        for (int32_t p = 0; p < job->panels; p++) widen(job, job->panel + p, &here.groups[p]);
        for (job->block = from; job->block < until; job->block++) {
            fetch(job, job->block - from, until - from);
            if (job->group + job->groups == job->room.groups) fetch_rows(job);
            for (int32_t p = 0; p < job->panels; p++)
                (job->room.digits == 2 ? add_paired : add_plain)(job, &here.groups[p], here.total[job->block - from][p]);
        }
    }
    for (job->block = from; job->block < until; job->block++) finish(job, here.total[job->block - from]);
}

void linear_amx_nibbles(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last) {
    job_t job = {.w = w, .a = a, .room = room_of(w, a), .y = y, .ldy = ldy};
    const int32_t blocks = (a->m * job.room.digits + BLOCK - 1) / BLOCK;
    tiles_t shapes = {.palette = 1};
    for (int t = 0; t < 8; t++) shapes.row_bytes[t] = LINE, shapes.rows[t] = t < 5 ? (uint8_t)job.room.block_rows : BLOCK;
    if (w->group < LINE) shapes.row_bytes[4] = (uint16_t)w->group, shapes.rows[6] = (uint8_t)(w->group / 4);
    CONFIGURE(&shapes);
    for (int32_t from = 0; from < blocks; from += MOST_BLOCKS)
        for (job.panel = first; job.panel < last; job.panel += WIDTH) {
            job.panels = last - job.panel < WIDTH ? last - job.panel : WIDTH;
            pass(&job, from, from + MOST_BLOCKS < blocks ? from + MOST_BLOCKS : blocks);
        }
    RELEASE();
}

#else
void linear_amx_nibbles(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last) {
    linear_portable(w, a, y, ldy, first, last);
}
#endif

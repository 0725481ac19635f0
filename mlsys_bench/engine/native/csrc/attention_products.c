/* See attention_products.h.  For each number of rows up to a block a kernel of its own, whose sums stay in registers. */
#include "attention_products.h"

#include "attention_words.h"

#ifdef __AVX512F__
enum { HIGH = 8 };                     /* rows of a block of sums that stays in registers, */
#define WIDTH(R) ((R) < 3 ? 4 : 2)     /* and its vectors: sums enough that none waits for the one before */
#else
enum { HIGH = 4 };
#define WIDTH(R) ((R) < 3 ? 2 : 1)
#endif

/* Two int16 a word: products of both added to each sum. */
INLINE ints add_wholes(ints sum, ints a, ints b) {
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    union {
        ints all;
        __m256i half[2];
    } x = {a}, y = {b};
    for (int h = 0; h < 2; h++)
        x.half[h] = _mm256_madd_epi16(x.half[h], y.half[h]);
    return sum + x.all;
#else
    return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* Add to sums the products of one word with a vector of words. */
INLINE floats add_product(int how, floats sum, float left, floats right) {
    if (how == WHOLES)
        return (floats)add_wholes((ints)sum, (ints)each(left), (ints)right);
#if HAS_PAIRS
    if (how == PAIRS)
        return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)each(left), (__m512bh)right);
#endif
    return sum + each(left) * right;
}

#define ROWS_OF(R) _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)
#define VECTORS_OF(V) _Pragma("GCC unroll 4") for (int v = 0; v < V; v++)

INLINE floats finished(int how, floats sum, const float *step, int r) {
    return how == WHOLES ? __builtin_convertvector((ints)sum, floats) * step[r] : sum;
}

/* Scores of rows row..row+R-1 and runs u..u+V-1.  Each sum is in order of dimensions: no row depends on which others are computed with it. */
INLINE void score_block(int how, int form, int R, int V, const view_t *w, const keys_t *k, int32_t row, int32_t u) {
    const int split = how == FLOATS && form == KV_BF16;
    const int32_t ldq = k->steps * (split ? 2 : 1);
    const float *q = w->q + row * ldq;
    floats sum[HIGH][4], right[4];
    ROWS_OF(R) VECTORS_OF(V) sum[r][v] = each(0);
    for (int32_t i = 0; i < k->steps; i++) {
        VECTORS_OF(V) right[v] = key_words(form, k->run[u + v] + i * k->stride);
        if (form != KV_INT8 || i % 2 == 0)
            VECTORS_OF(V) __builtin_prefetch(k->ahead[u + v] + i * (form == KV_INT8 ? 32 : 64), 0, 2);
        if (split) {
            ROWS_OF(R) VECTORS_OF(V) sum[r][v] += each(q[r * ldq + 2 * i]) * (floats)((words)right[v] << 16);
            ROWS_OF(R) VECTORS_OF(V) sum[r][v] += each(q[r * ldq + 2 * i + 1]) * (floats)((words)right[v] & 0xffff0000);
        } else {
            ROWS_OF(R) VECTORS_OF(V) sum[r][v] = add_product(how, sum[r][v], q[r * ldq + i], right[v]);
        }
    }
    ROWS_OF(R) VECTORS_OF(V) store(w->p + (row + r) * TILE + (u + v) * LANES, finished(how, sum[r][v], w->q_step + row, r));
}

INLINE void score_rows(int how, int form, int R, const view_t *w, const keys_t *k, int32_t row) {
    int32_t u = 0;
    for (; u + WIDTH(R) <= k->runs; u += WIDTH(R))
        score_block(how, form, R, WIDTH(R), w, k, row, u);
    for (; u < k->runs; u++)
        score_block(how, form, R, 1, w, k, row, u);
}

/* Values weighted by rows row..row+R-1, V vectors of dimensions from i on; each sum is in order of keys. */
INLINE void value_block(int how, int form, int R, int V, const view_t *w, const values_t *s, int32_t row, int32_t i, state_t *to) {
    const int pace = how == FLOATS ? 1 : 2, wide = LANES * (form == KV_INT8 ? 1 : form == KV_BF16 ? 2 : 4);
    const int32_t dp = padded(w->c->head_dim);
    const float *p = w->p + row * TILE;
    floats sum[HIGH][4], right[4];
    ROWS_OF(R) VECTORS_OF(V) sum[r][v] = each(0);
    for (int32_t u = s->from / s->length; u * s->length < s->keys; u++) {
        const int32_t first = most(s->from - u * s->length, 0) / pace, end = least(s->keys - u * s->length, s->length);
        const uint8_t *run = s->run[u] + i / LANES * wide, *ahead = s->ahead[u] + i * wide;
        const float *left = p + u * s->length / pace;
        for (int32_t j = first; j * pace < end; j++) {
            const uint8_t *a = run + j * (form == KV_WORDS ? 1 : pace) * s->stride;
            const uint8_t *b = 2 * j + 1 < end ? a + s->stride : a; /* the weight of a key that is not there is 0 */
            VECTORS_OF(V) right[v] = form == KV_WORDS ? load((const float *)a + v * LANES)
                                     : how == FLOATS  ? load_as(form, a, v * LANES)
                                                      : value_words(form, a + v * wide, b + v * wide);
            for (int x = 0; x < V * wide * pace; x += 64)
                __builtin_prefetch(ahead + (int64_t)j * V * wide * pace + x, 0, 2);
            ROWS_OF(R) VECTORS_OF(V) sum[r][v] = add_product(how, sum[r][v], left[r * TILE + j], right[v]);
        }
    }
    ROWS_OF(R) VECTORS_OF(V) store(to->values + (row + r) * dp + i + v * LANES, finished(how, sum[r][v], w->p_step + row, r));
}

INLINE void value_rows(int how, int form, int R, const view_t *w, const values_t *s, int32_t row, state_t *to) {
    const int32_t dp = padded(w->c->head_dim);
    int32_t i = 0;
    for (; i + WIDTH(R) * LANES <= dp; i += WIDTH(R) * LANES)
        value_block(how, form, R, WIDTH(R), w, s, row, i, to);
    for (; i < dp; i += LANES)
        value_block(how, form, R, 1, w, s, row, i, to);
}

/* Blocks of HIGH rows: all of them with the same keys or dimensions, which stay in the first cache. */
INLINE void score_blocks(int how, int form, const view_t *w, const keys_t *k, int32_t rows) {
    int32_t u = 0;
    for (; u + WIDTH(HIGH) <= k->runs; u += WIDTH(HIGH))
        for (int32_t row = 0; row < rows; row += HIGH)
            score_block(how, form, HIGH, WIDTH(HIGH), w, k, row, u);
    for (; u < k->runs; u++)
        for (int32_t row = 0; row < rows; row += HIGH)
            score_block(how, form, HIGH, 1, w, k, row, u);
}

INLINE void value_blocks(int how, int form, const view_t *w, const values_t *s, int32_t rows, state_t *to) {
    const int32_t dp = padded(w->c->head_dim);
    int32_t i = 0;
    for (; i + WIDTH(HIGH) * LANES <= dp; i += WIDTH(HIGH) * LANES)
        for (int32_t row = 0; row < rows; row += HIGH)
            value_block(how, form, HIGH, WIDTH(HIGH), w, s, row, i, to);
    for (; i < dp; i += LANES)
        for (int32_t row = 0; row < rows; row += HIGH)
            value_block(how, form, HIGH, 1, w, s, row, i, to);
}

/* All rows: these blocks, then one of what is left. */
#define CASE(R, DO, ...) case R: DO(R, __VA_ARGS__); break;
#define FEWER(DO, ...) CASE(1, DO, __VA_ARGS__) CASE(2, DO, __VA_ARGS__) CASE(3, DO, __VA_ARGS__)
#ifdef __AVX512F__
#define REST(DO, ...) FEWER(DO, __VA_ARGS__) CASE(4, DO, __VA_ARGS__) CASE(5, DO, __VA_ARGS__) CASE(6, DO, __VA_ARGS__) CASE(7, DO, __VA_ARGS__)
#else
#define REST(DO, ...) FEWER(DO, __VA_ARGS__)
#endif
#define SCORE(R, HOW, FORM) score_rows(HOW, FORM, R, w, k, whole)
#define VALUE(R, HOW, FORM) value_rows(HOW, FORM, R, w, s, whole, to)
#define SCORES(HOW, FORM) \
    static void scores_##HOW##_##FORM(const view_t *w, const keys_t *k) { \
        const int32_t whole = w->rows / HIGH * HIGH;                      \
        score_blocks(HOW, FORM, w, k, whole);                             \
        switch (w->rows - whole) { REST(SCORE, HOW, FORM) }               \
    }
#define VALUES(HOW, FORM) \
    static void values_##HOW##_##FORM(const view_t *w, const values_t *s, state_t *to) { \
        const int32_t whole = w->rows / HIGH * HIGH;                                     \
        value_blocks(HOW, FORM, w, s, whole, to);                                        \
        switch (w->rows - whole) { REST(VALUE, HOW, FORM) }                              \
    }
SCORES(FLOATS, KV_WORDS)
SCORES(FLOATS, KV_BF16)
SCORES(WHOLES, KV_INT8)
SCORES(WHOLES, KV_WORDS)
VALUES(FLOATS, KV_WORDS)
VALUES(FLOATS, KV_BF16)
VALUES(WHOLES, KV_INT8)
VALUES(WHOLES, KV_WORDS)
#if HAS_PAIRS
SCORES(PAIRS, KV_WORDS)
VALUES(PAIRS, KV_BF16)
VALUES(PAIRS, KV_WORDS)
#else
#define scores_PAIRS_KV_WORDS NULL /* nobody asks: tile_how */
#define values_PAIRS_KV_BF16 NULL
#define values_PAIRS_KV_WORDS NULL
#endif

typedef void (*scores_of)(const view_t *w, const keys_t *k);
typedef void (*values_of)(const view_t *w, const values_t *s, state_t *to);

/* By the cache's format, PAIRS last. */
static const scores_of scores_in_place[] = {scores_FLOATS_KV_WORDS, scores_FLOATS_KV_BF16, scores_WHOLES_KV_INT8, scores_PAIRS_KV_WORDS};
static const values_of values_in_place[] = {values_FLOATS_KV_WORDS, values_FLOATS_KV_BF16, values_WHOLES_KV_INT8, values_PAIRS_KV_BF16};
static const scores_of scores_of_tile[] = {[FLOATS] = scores_FLOATS_KV_WORDS, scores_PAIRS_KV_WORDS, scores_WHOLES_KV_WORDS};
static const values_of values_of_tile[] = {[FLOATS] = values_FLOATS_KV_WORDS, values_PAIRS_KV_WORDS, values_WHOLES_KV_WORDS};

static int kind_of(const view_t *w) { return w->how == PAIRS ? 3 : w->c->format; }

void tile_scores(const view_t *w, const keys_t *k, int in_place) { (in_place ? scores_in_place[kind_of(w)] : scores_of_tile[w->how])(w, k); }

void tile_values(const view_t *w, const values_t *s, int in_place, state_t *to) {
    (in_place ? values_in_place[kind_of(w)] : values_of_tile[w->how])(w, s, to);
}

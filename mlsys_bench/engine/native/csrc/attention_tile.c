/* See attention_tile.h. */
#include "attention_products.h"
#include "attention_words.h"
#include "cpu.h"

enum { FEW = 8 }; /* rows that read the cache in place */

#define LARGEST_WHOLE 32600.0f

int32_t tile_how(const cache_t *c) {
    if (c->format == KV_INT8)
        return WHOLES;
    return HAS_PAIRS && c->format == KV_BF16 && cpu_has_pairs() ? PAIRS : FLOATS;
}

/* ---------------------------------------------------------------- where keys and values lie */

INLINE int value_bytes(int form) { return form == KV_INT8 ? 1 : form == KV_BF16 ? 2 : 4; }
INLINE int key_bytes(int form) { return form == KV_INT8 ? 2 : 4; } /* of a word of a key */

INLINE uint8_t *head_at(const view_t *w, int32_t key) {
    return head_of(w->c, w->layer, w->table[key / w->c->block_tokens], w->head);
}

INLINE const uint8_t *key_at(const view_t *w, int32_t key) {
    return head_at(w, key) + (int64_t)(key % w->c->block_tokens) * key_bytes(w->c->format);
}

INLINE const uint8_t *value_at(const view_t *w, int32_t key) {
    return head_at(w, key) + ((int64_t)w->c->block_tokens + key % w->c->block_tokens) * w->c->head_dim * value_bytes(w->c->format);
}

/* Few rows read whole runs of 16 keys from the cache itself. */
static int is_in_place(const view_t *w) { return w->rows <= FEW && w->c->block_tokens % LANES == 0 && w->c->head_dim % LANES == 0; }

static int32_t steps_of(const view_t *w) { return w->c->format == KV_F32 ? w->c->head_dim : w->c->head_dim / 2; }

static void fetch_scales(const view_t *w, int32_t key) {
    const float *of = scales_of(w->c, head_at(w, key)) + key % w->c->block_tokens;
    __builtin_prefetch(of, 0, 2);
    __builtin_prefetch(of + w->c->block_tokens, 0, 2);
}

static void point_in_place(const view_t *w, int32_t key0, int32_t last, keys_t *k, values_t *s) {
    const int form = w->c->format;
    *k = (keys_t){.stride = (int64_t)w->c->block_tokens * key_bytes(form), .runs = (s->keys + LANES - 1) / LANES, .steps = steps_of(w)};
    s->stride = (int64_t)w->c->head_dim * value_bytes(form), s->length = LANES, s->from = s->from / LANES * LANES;
    for (int32_t u = 0; u < k->runs; u++) {
        const int32_t key = key0 + u * LANES, next = key + TILE;
        k->run[u] = key_at(w, key);
        k->ahead[u] = s->run[u] = value_at(w, key);
        /* of the keys of a block that are as many bytes as these values: together all of them */
        s->ahead[u] = next <= last ? value_at(w, next) - w->c->block_tokens * s->stride : s->run[u];
        if (form == KV_INT8 && next <= last)
            fetch_scales(w, next);
    }
}

/* Sixteen keys, or as many as there are: words of what is not there are 0. */
INLINE floats key_words_of(const view_t *w, const uint8_t *at, int32_t n) {
    const int size = key_bytes(w->c->format);
    if (n < LANES) {
        uint8_t part[64] = {0};
        memcpy(part, at, n * size);
        return size == 2 ? key_words(KV_INT8, part) : key_words(KV_WORDS, part);
    }
    return size == 2 ? key_words(KV_INT8, at) : key_words(KV_WORDS, at);
}

/* Store words of the keys from j on, as many as are left of the tile. */
INLINE void store_keys(float *to, int32_t j, floats got) {
    if (j + LANES <= TILE)
        store(to + j, got);
    else
        memcpy(to + j, &got, (TILE - j) * sizeof(float));
}

/* Lay the keys of a tile out as words: [steps][TILE]. */
static void lay_keys(const view_t *w, int32_t key0, int32_t keys) {
    const int size = key_bytes(w->c->format), split = w->how == FLOATS && w->c->format == KV_BF16;
    const int32_t bt = w->c->block_tokens;
    for (int32_t j = 0, n; j < keys; j += n) {
        const uint8_t *from = key_at(w, key0 + j);
        const int32_t at = (key0 + j) % bt;
        n = least(least(LANES, bt - at), keys - j);
        for (int64_t i = 0; i < steps_of(w); i++) {
            const floats got = key_words_of(w, from + i * bt * size, at + LANES > bt ? n : LANES);
            if (split) {
                store_keys(w->k + 2 * i * TILE, j, (floats)((words)got << 16));
                store_keys(w->k + (2 * i + 1) * TILE, j, (floats)((words)got & 0xffff0000));
            } else
                store_keys(w->k + i * TILE, j, got);
        }
    }
}

INLINE floats all_value_words_of(const view_t *w, const uint8_t *a, const uint8_t *b) {
    if (w->how == WHOLES)
        return value_words(KV_INT8, a, b);
    if (w->how == PAIRS)
        return value_words(KV_BF16, a, b);
    return w->c->format == KV_BF16 ? load_as(KV_BF16, a, 0) : load((const float *)a);
}

/* Sixteen dimensions, or as many as there are, of one or two keys. */
INLINE floats value_words_of(const view_t *w, const uint8_t *a, const uint8_t *b, int32_t n) {
    if (n == LANES)
        return all_value_words_of(w, a, b);
    uint8_t parts[2][64] = {{0}};
    const int32_t bytes = n * value_bytes(w->c->format);
    return all_value_words_of(w, memcpy(parts[0], a, bytes), memcpy(parts[1], b, bytes));
}

/* Lay the values of keys from.. of a tile out as words, [TILE or half of it][dp]; of a pair of which one is not there, the other twice. */
static void lay_values(const view_t *w, int32_t key0, int32_t from, int32_t keys) {
    const int32_t d = w->c->head_dim, dp = padded(d), pace = w->how == FLOATS ? 1 : 2, size = value_bytes(w->c->format);
    for (int32_t j = from / pace; j * pace < keys; j++) {
        const uint8_t *a = value_at(w, key0 + most(j * pace, from)), *b = value_at(w, key0 + least(j * pace + pace, keys) - 1);
        for (int32_t i = 0; i < d; i += LANES)
            store(w->v + j * dp + i, value_words_of(w, a + i * size, b + i * size, least(LANES, d - i)));
    }
}

static void lay(const view_t *w, int32_t key0, keys_t *k, values_t *s) {
    lay_keys(w, key0, s->keys);
    lay_values(w, key0, s->from, s->keys);
    *k = (keys_t){.stride = TILE * sizeof(float), .runs = (s->keys + LANES - 1) / LANES};
    k->steps = w->how == FLOATS ? w->c->head_dim : w->c->head_dim / 2;
    for (int32_t u = 0; u < k->runs; u++)
        k->run[u] = k->ahead[u] = (const uint8_t *)(w->k + u * LANES); /* there is nothing to fetch */
    s->run[0] = s->ahead[0] = (const uint8_t *)w->v;
    s->length = TILE, s->stride = padded(w->c->head_dim) * sizeof(float);
}

static void load_scales(const view_t *w, int32_t key0, int32_t keys) {
    const int32_t bt = w->c->block_tokens;
    for (int32_t j = 0, n; j < keys; j += n) {
        const float *from = scales_of(w->c, head_at(w, key0 + j)) + (key0 + j) % bt;
        n = least(bt - (key0 + j) % bt, keys - j);
        memcpy(w->scales + j, from, n * sizeof(float));
        memcpy(w->scales + TILE + j, from + bt, n * sizeof(float));
    }
}

/* ---------------------------------------------------------------- softmax */

/* Return the scores, those of keys outside first..last-1 as -inf; v is the number of the vector in its tile. */
INLINE floats seen(floats scores, int v, int32_t first, int32_t last, float otherwise) {
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, key = lane + v * LANES;
    return pick((key >= first) & (key < last), scores, each(otherwise));
}

/* Store weights as they are multiplied with; what remains of them is their sum.  PAIRS: of the rounded weights. */
INLINE floats store_weights(int how, int N, const floats *s, const float *scales, int32_t first, int32_t last, float *p, float *step) {
    floats total = each(0);
#if HAS_PAIRS
    if (how == PAIRS) {
        for (int v = 0; v < N; v += 2) {
            const __m512bh both = _mm512_cvtne2ps_pbh((__m512)(v + 1 < N ? s[v + 1] : each(0)), (__m512)s[v]);
            store(p + v * LANES / 2, (floats)both);
            total = (floats)_mm512_dpbf16_ps((__m512)total, both, (__m512bh)((words){0} + 0x3f803f80u));
        }
        return total;
    }
#endif
    for (int v = 0; v < N; v++)
        total += s[v];
    if (how == FLOATS) {
        for (int v = 0; v < N; v++)
            store(p + v * LANES, s[v]);
        return total;
    }
    floats scaled[RUNS], top = each(0);
    for (int v = 0; v < N; v++) {
        scaled[v] = s[v] * load(scales + TILE + v * LANES);
        if (first > 0 || last < N * LANES)
            scaled[v] = seen(scaled[v], v, first, last, 0);
        top = larger_size(top, scaled[v]);
    }
    const float largest = largest_size_of(top), by = largest > 0 ? LARGEST_WHOLE / largest : 0;
    *step = largest / LARGEST_WHOLE;
    for (int v = 0; v < N; v++)
        store_wholes((int16_t *)p + v * LANES, scaled[v] * by);
    return total;
}

/* Turn the scores of a row and its first N vectors of keys into weights; of the keys first..last-1 are seen, none where first >= last. */
INLINE void soften(int how, int N, const view_t *w, int32_t row, int32_t first, int32_t last, state_t *to) {
    float *p = w->p + row * TILE;
    floats s[RUNS], top = each(-INFINITY);
    for (int v = 0; v < N; v++)
        s[v] = how == WHOLES ? load(p + v * LANES) * load(w->scales + v * LANES) : load(p + v * LANES);
    for (int v = 0; v < N && w->softcap > 0; v++)
        s[v] = w->softcap - 2 * w->softcap / (exp_of(s[v] * (2 / w->softcap)) + 1); /* c tanh(s / c) */
    for (int v = 0; v < N && (first > 0 || last < N * LANES); v++)
        s[v] = seen(s[v], v, first, last, -INFINITY);
    for (int v = 0; v < N; v++)
        top = larger(s[v], top);
    to->largest[row] = largest_of(top);
    const floats from = each(to->largest[row] == -INFINITY ? 0 : to->largest[row]); /* a row that sees nothing: every weight is 0 */
    for (int v = 0; v < N; v++)
        s[v] = exp_of(s[v] - from);
    to->sum[row] = sum_of(store_weights(how, N, s, w->scales, first, last, p, w->p_step + row));
}

INLINE void soften_rows(int how, int N, const view_t *w, int32_t key0, state_t *to) {
    for (int32_t row = 0; row < w->rows; row++) {
        const int32_t at = w->position[row], last = least(TILE, at + 1 - key0);
        soften(how, N, w, row, w->window ? most(0, at - w->window + 1 - key0) : 0, last, to);
    }
}

#define SOFTEN(N, HOW) soften_rows(HOW, N, w, key0, to)
#define SOFTMAX(HOW)                                                                         \
    static void softmax_##HOW(const view_t *w, int32_t key0, int32_t runs, state_t *to) {    \
        switch (runs) {                                                                      \
        case 1: SOFTEN(1, HOW); break;                                                       \
        case 2: SOFTEN(2, HOW); break;                                                       \
        case 3: SOFTEN(3, HOW); break;                                                       \
        default: SOFTEN(RUNS, HOW);                                                          \
        }                                                                                    \
    }
SOFTMAX(FLOATS)
SOFTMAX(PAIRS)
SOFTMAX(WHOLES)

/* ---------------------------------------------------------------- a view */

int64_t tile_floats(int32_t d) { return ROWS * (int64_t)d + d * TILE + TILE * padded(d) + ROWS * TILE + 2 * TILE + 2 * ROWS; }

float *tile_room(view_t *w, int32_t d, float *at) {
    w->k = at, at += d * TILE;
    w->v = at, at += TILE * padded(d);
    w->p = at, at += ROWS * TILE;
    w->scales = at, at += 2 * TILE;
    w->q_step = at, at += ROWS;
    w->p_step = at, at += ROWS;
    w->q = at;
    return at + ROWS * d;
}

/* As 16-bit fixed point; the step leaves room for head_dim products of 16 and 8 bit in 32. */
static void whole_query(int16_t *to, float *step, const float *q, int32_t d) {
    const float most_whole = fminf(LARGEST_WHOLE, 2147483647.0f / (127.0f * d)), largest = largest_size_in(q, d);
    const float by = largest > 0 ? most_whole / largest : 0;
    int32_t i = 0;
    *step = largest / most_whole;
    for (; i + LANES <= d; i += LANES)
        store_wholes(to + i, load(q + i) * by);
    for (; i < d; i++)
        to[i] = (int16_t)lrintf(q[i] * by);
}

static void paired_query(uint16_t *to, const float *q, int32_t d, float scale) {
    int32_t i = 0;
#if HAS_PAIRS
    for (; i + LANES <= d; i += LANES)
        _mm256_storeu_si256((__m256i *)(to + i), (__m256i)_mm512_cvtneps_pbh((__m512)(load(q + i) * scale)));
#endif
    for (; i < d; i++)
        to[i] = float_to_bf16(q[i] * scale);
}

static void float_query(float *to, const float *q, int32_t d, float scale) {
    for (int32_t i = 0; i < d; i++)
        to[i] = q[i] * scale;
}

void tile_query(view_t *w, int32_t row, const float *q, float scale) {
    const int32_t d = w->c->head_dim;
    float *to = w->q + row * (w->how == FLOATS ? d : d / 2);
    if (w->how == WHOLES) {
        whole_query((int16_t *)to, w->q_step + row, q, d);
        w->q_step[row] *= scale;
    } else if (w->how == PAIRS)
        paired_query((uint16_t *)to, q, d, scale);
    else
        float_query(to, q, d, scale);
}

void tile_attend(view_t *w, int32_t key0, state_t *to) {
    const int32_t last = w->position[w->rows - 1], in_place = is_in_place(w);
    values_t s = {.keys = least(TILE, last + 1 - key0), .from = w->window ? most(0, w->position[0] - w->window + 1 - key0) : 0};
    keys_t k;
    if (in_place)
        point_in_place(w, key0, last, &k, &s);
    else
        lay(w, key0, &k, &s);
    tile_scores(w, &k, in_place);
    if (w->how == WHOLES) {
        load_scales(w, key0, s.keys);
        softmax_WHOLES(w, key0, k.runs, to);
    } else
        (w->how == PAIRS ? softmax_PAIRS : softmax_FLOATS)(w, key0, k.runs, to);
    tile_values(w, &s, in_place, to);
}

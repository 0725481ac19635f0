/* See step.h.  All threads walk through the same phases, with a barrier after each. */
#define _GNU_SOURCE
#include "step.h"

#include <string.h>
#include <time.h>

#include "pool.h"
#include "rows.h"

typedef struct {
    const decoder_t *d;
    const cache_t *c;
    const step_t *s;
    float *logits;
    float *x, *few; /* the residual stream [T, hidden]; of the sampled tokens, in the last layer */
    float *h;       /* what a product reads: [T, max(hidden, heads head_dim, ffn)] */
    float *wide;    /* qkv, gate and up: [T, max] */
    float *out;     /* what is added to the stream: [T, hidden] */
    float *own, *shared; /* of attention: each thread's, and of all */
    int32_t *next;  /* [layers] tasks of attention that are taken */
    void *room;     /* of products */
    int64_t linears_ns;
    int32_t threads;
} job_t;

static int32_t widest(int32_t a, int32_t b) { return a > b ? a : b; }
static int32_t share(int32_t n, int32_t ith, int32_t nth) { return (int64_t)n * ith / nth; }
static int32_t q_width(const decoder_t *d) { return d->heads * d->head_dim; }
static int32_t kv_width(const decoder_t *d) { return d->kv_heads * d->head_dim; }
static int32_t h_width(const decoder_t *d) { return widest(widest(d->hidden, q_width(d)), d->ffn); }
static int32_t wide_width(const decoder_t *d) { return widest(q_width(d) + 2 * kv_width(d), 2 * d->ffn); }

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* y = w x for m rows, by all threads, a barrier after it. */
static void product(job_t *j, const linear_t *w, const float *x, int32_t m, float *y, int32_t ith, int32_t nth) {
    const int64_t began = ith ? 0 : now_ns();
    const act_t a = {.x = x, .ldx = w->k, .m = m, .room = j->room};
    if (act_bytes(w, m)) {
        quantise_share(w, &a, ith, nth);
        pool_barrier();
    }
    linear_share(w, &a, y, w->n, ith, nth);
    pool_barrier();
    if (!ith)
        j->linears_ns += now_ns() - began;
}

/* Norm this thread's rows into h, after adding to them what the branch before gave, itself normed where it is. */
static void add_and_norm(job_t *j, float *x, int32_t m, const float *post_gain, int adds, const float *gain, int32_t ith, int32_t nth) {
    const decoder_t *d = j->d;
    for (int64_t r = share(m, ith, nth); r < share(m, ith + 1, nth); r++) {
        float *row = x + r * d->hidden, *out = j->out + r * d->hidden;
        if (adds && post_gain)
            norm_row(out, out, d->hidden, d->eps, post_gain);
        if (adds)
            add_row(row, out, d->hidden);
        norm_row(j->h + r * d->hidden, row, d->hidden, d->eps, gain);
    }
    pool_barrier();
}

static void embed(job_t *j, int32_t ith, int32_t nth) {
    const decoder_t *d = j->d;
    for (int64_t t = share(j->s->tokens, ith, nth); t < share(j->s->tokens, ith + 1, nth); t++)
        embed_row(j->x + t * d->hidden, d->embedding, d->embedding_format, d->embedding_packed, j->s->token[t], d->hidden,
                  d->embedding_scale);
}

/* Norm, where it is, and turn some heads of a token. */
static void turn(const decoder_t *d, const layer_t *l, float *x, int32_t heads, const float *gain, int32_t position) {
    const int64_t at = (int64_t)position * (d->rope_dim / 2);
    for (int32_t h = 0; gain && h < heads; h++)
        norm_row(x + h * d->head_dim, x + h * d->head_dim, d->head_dim, d->eps, gain);
    rope_row(x, heads, d->head_dim, d->rope_dim, l->cos + at, l->sin + at);
}

/* Turn queries and keys, and store keys and values: KV head by KV head of each token, so that threads share a lone token too. */
static void place(job_t *j, const layer_t *l, int32_t layer, int32_t ith, int32_t nth) {
    const decoder_t *d = j->d;
    const int32_t q = q_width(d), kv = kv_width(d), group = d->heads / d->kv_heads, items = j->s->tokens * d->kv_heads;
    for (int32_t item = share(items, ith, nth); item < share(items, ith + 1, nth); item++) {
        const int64_t t = item / d->kv_heads, head = item % d->kv_heads;
        float *row = j->wide + t * (q + 2 * kv), *k = row + q + head * d->head_dim;
        turn(d, l, row + head * group * d->head_dim, group, l->q_gain, j->s->position[t]);
        turn(d, l, k, 1, l->k_gain, j->s->position[t]);
        kv_write(j->c, layer, j->s->slot[t], head, k, k + kv);
    }
    pool_barrier();
}

static void attention(job_t *j, const layer_t *l, int32_t layer, int32_t ith, int32_t nth) {
    const decoder_t *d = j->d;
    const step_t *s = j->s;
    const attend_t a = {
        .q = j->wide, .out = j->h, .ldq = q_width(d) + 2 * kv_width(d), .ldo = q_width(d), .heads = d->heads, .tokens = s->tokens,
        .sequences = s->sequences, .width = s->width, .position = s->position, .first = s->first, .block_table = s->block_table,
        .window = l->window, .scale = d->scale, .softcap = d->softcap,
    };
    const int split = attention_is_split(&a, j->c, j->threads);
    float *own = j->own + ith * attention_floats(d->head_dim);
    attend(&a, j->c, layer, split, j->next + layer, own, j->shared);
    pool_barrier();
    if (split) {
        attend_merge(&a, j->c, j->shared, ith, nth);
        pool_barrier();
    }
}

/* Keep the sampled rows only: the stream in `few`, what the output matrix reads in `wide`. */
static void narrow(job_t *j, int32_t ith, int32_t nth) {
    const decoder_t *d = j->d;
    for (int64_t i = share(j->s->sampled, ith, nth); i < share(j->s->sampled, ith + 1, nth); i++) {
        const int64_t t = j->s->sample[i];
        memcpy(j->few + i * d->hidden, j->x + t * d->hidden, sizeof(float) * d->hidden);
        memcpy(j->wide + i * q_width(d), j->h + t * q_width(d), sizeof(float) * q_width(d));
    }
    pool_barrier();
}

static void gate(job_t *j, int32_t m, int32_t ith, int32_t nth) {
    const int32_t ffn = j->d->ffn, panels = (ffn + 15) / 16;
    const int32_t first = share(panels, ith, nth) * 16, end = share(panels, ith + 1, nth) * 16, last = end < ffn ? end : ffn;
    for (int64_t r = 0; r < m; r++)
        gated_row(j->h + r * ffn, j->wide + r * 2 * ffn, j->wide + r * 2 * ffn + ffn, first, last, j->d->gelu);
    pool_barrier();
}

static void walk(void *arg, int32_t ith, int32_t nth) {
    job_t *j = arg;
    const decoder_t *d = j->d;
    float *x = j->x;
    int32_t m = j->s->tokens;
    embed(j, ith, nth);
    for (int32_t i = 0; i < d->layers; i++) {
        const layer_t *l = d->layer + i;
        add_and_norm(j, x, m, i ? l[-1].post_mlp_gain : NULL, i > 0, l->attention_gain, ith, nth);
        product(j, &l->qkv, j->h, m, j->wide, ith, nth);
        place(j, l, i, ith, nth);
        if (i == d->layers - 1 && !j->s->sampled)
            return;
        attention(j, l, i, ith, nth);
        if (i == d->layers - 1)
            narrow(j, ith, nth), x = j->few, m = j->s->sampled;
        product(j, &l->o, x == j->few ? j->wide : j->h, m, j->out, ith, nth);
        add_and_norm(j, x, m, l->post_attention_gain, 1, l->mlp_gain, ith, nth);
        product(j, &l->gate_up, j->h, m, j->wide, ith, nth);
        gate(j, m, ith, nth);
        product(j, &l->down, j->h, m, j->out, ith, nth);
    }
    add_and_norm(j, x, m, d->layer[d->layers - 1].post_mlp_gain, 1, d->gain, ith, nth);
    product(j, &d->head, j->h, m, j->logits, ith, nth);
}

/* ---------------------------------------------------------------- memory */

static void *take(uint8_t **from, int64_t bytes) {
    uint8_t *taken = *from;
    *from += (bytes + 63) / 64 * 64;
    return taken;
}

static int64_t room_bytes(const decoder_t *d, int32_t tokens) {
    int64_t most = act_bytes(&d->head, tokens);
    for (int32_t i = 0; i < d->layers; i++) {
        const linear_t *all[] = {&d->layer[i].qkv, &d->layer[i].o, &d->layer[i].gate_up, &d->layer[i].down};
        for (int k = 0; k < 4; k++)
            most = act_bytes(all[k], tokens) > most ? act_bytes(all[k], tokens) : most;
    }
    return most;
}

/* Lay the job's memory out from `at` on, NULL to measure it; return its end. */
static uint8_t *lay_out(job_t *j, const decoder_t *d, int32_t tokens, int32_t threads, uint8_t *at) {
    const int64_t t = tokens, floats = sizeof(float);
    j->x = take(&at, t * d->hidden * floats);
    j->few = take(&at, t * d->hidden * floats);
    j->h = take(&at, t * h_width(d) * floats);
    j->wide = take(&at, t * wide_width(d) * floats);
    j->out = take(&at, t * d->hidden * floats);
    j->own = take(&at, threads * attention_floats(d->head_dim) * floats);
    j->shared = take(&at, attention_shared_floats(threads, d->head_dim) * floats);
    j->next = take(&at, d->layers * sizeof(int32_t));
    j->room = take(&at, room_bytes(d, tokens));
    return at;
}

int64_t step_workspace_bytes(const decoder_t *d, int32_t tokens, int32_t threads) {
    job_t j;
    return lay_out(&j, d, tokens, threads, NULL) - (uint8_t *)NULL;
}

int64_t step_run(const decoder_t *d, const cache_t *c, const step_t *s, int32_t threads, void *workspace, float *logits) {
    job_t j = {.d = d, .c = c, .s = s, .logits = logits, .threads = threads};
    lay_out(&j, d, s->tokens, threads, workspace);
    memset(j.next, 0, d->layers * sizeof(int32_t));
    pool_run(threads, walk, &j);
    return j.linears_ns;
}

/* See step.h.  All threads walk through the same phases, with a barrier after each; of a lone token they share products and attention only. */
#define _GNU_SOURCE
#include "step.h"

#include <string.h>
#include <time.h>

#include "pool.h"
#include "rows.h"

typedef struct {
    int32_t tokens, sequences, sampled, width;
    const int32_t *token, *position, *slot; /* [T] */
    const int32_t *first, *block_table;     /* [S + 1], [S, width] */
    const int32_t *sample;                  /* [sampled] */
} step_t;

typedef struct {
    const decoder_t *d;
    const cache_t *c;
    const step_t *s;
    float *logits;
    float *x, *few; /* the residual stream [T, hidden]; of the sampled tokens, in the last layer */
    float *h;       /* what a product reads: [T, max(hidden, heads head_dim)] */
    float *wide;    /* qkv, gate and up: [T, max] */
    float *out;     /* what is added to the stream: [T, hidden] */
    float *lone;    /* of a lone token, each thread's own stream and what its products read: [threads, 2, hidden] */
    float *own, *shared; /* of attention: each thread's, and of all */
    int32_t *next;  /* [layers] tasks of attention that are taken */
    uint8_t *room;  /* of products: of all rows, or of a lone one for each thread */
    int64_t lone_room_bytes;
    int64_t linears_ns;
    int32_t threads;
} job_t;

static int32_t widest(int32_t a, int32_t b) { return a > b ? a : b; }
static int32_t share(int32_t n, int32_t ith, int32_t nth) { return (int64_t)n * ith / nth; }
static int32_t q_width(const decoder_t *d) { return d->heads * d->head_dim; }
static int32_t kv_width(const decoder_t *d) { return d->kv_heads * d->head_dim; }
static int32_t h_width(const decoder_t *d) { return widest(d->hidden, q_width(d)); }
static int32_t wide_width(const decoder_t *d) { return widest(q_width(d) + 2 * kv_width(d), 2 * d->ffn); }

static int64_t lone_width(const decoder_t *d) { return (d->hidden + 15) / 16 * 16; }
static int is_lone(const step_t *s) { return s->tokens == 1 && s->sampled == 1; }

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* What a product reads: m rows. */
typedef struct {
    const float *x;
    int32_t ldx, m;
} rows_t;

/* Activations as products of this thread read them: those of all, or a lone row that it quantises for itself rather than wait. */
static act_t activations(const job_t *j, const linear_t *w, rows_t rows, int32_t ith, int32_t nth) {
    const int lone = is_lone(j->s);
    const act_t a = {.x = rows.x, .ldx = rows.ldx, .m = rows.m, .room = j->room + (lone ? ith * j->lone_room_bytes : 0)};
    quantise_share(w, &a, lone ? 0 : ith, lone ? 1 : nth);
    if (!lone)
        pool_barrier();
    return a;
}

/* y = w x, by all threads, a barrier after it. */
static void product(job_t *j, const linear_t *w, rows_t rows, float *y, int32_t ith, int32_t nth) {
    const int64_t began = ith ? 0 : now_ns();
    const act_t a = activations(j, w, rows, ith, nth);
    linear_share(w, &a, y, w->n, ith, nth);
    pool_barrier();
    if (!ith)
        j->linears_ns += now_ns() - began;
}

/* Gate and up, side by side in `wide`; the gate's place then takes activation(gate) up.  A thread computes the same panels of both and
 * needs no other, unless one panel holds the end of the gate. */
static void gated_product(job_t *j, const linear_t *w, rows_t rows, int32_t ith, int32_t nth) {
    const int32_t ffn = j->d->ffn, panels = (ffn + 15) / 16, first = share(panels, ith, nth), last = share(panels, ith + 1, nth);
    const int64_t began = ith ? 0 : now_ns();
    const act_t a = activations(j, w, rows, ith, nth);
    if (ffn % 16 == 0) {
        linear_panels(w, &a, j->wide, 2 * ffn, first, last);
        linear_panels(w, &a, j->wide, 2 * ffn, panels + first, panels + last);
    } else {
        linear_share(w, &a, j->wide, 2 * ffn, ith, nth);
        pool_barrier();
    }
    const int64_t paused = ith ? 0 : now_ns();
    for (int64_t r = 0; r < rows.m; r++) {
        float *gate = j->wide + r * 2 * ffn;
        gated_row(gate, gate, gate + ffn, first * 16, last * 16 < ffn ? last * 16 : ffn, j->d->gelu);
    }
    const int64_t resumed = ith ? 0 : now_ns();
    pool_barrier();
    if (!ith)
        j->linears_ns += now_ns() - began - (resumed - paused);
}

/* What a branch gave, and the norm of that, where it has one.  out: [m, hidden], NULL before the first layer */
typedef struct {
    const float *out, *gain;
} branch_t;

/* Add to a row of the stream what the branch before gave, and norm the sum into h. */
static void add_and_norm_row(const decoder_t *d, float *x, branch_t before, const float *gain, float *h) {
    const float *out = before.out;
    if (out && before.gain)
        norm_row(h, out, d->hidden, d->eps, before.gain), out = h;
    if (out)
        add_row(x, out, d->hidden);
    norm_row(h, x, d->hidden, d->eps, gain);
}

/* The same for this thread's rows. */
static void add_and_norm(job_t *j, float *x, int32_t m, branch_t before, const float *gain, int32_t ith, int32_t nth) {
    const int64_t hidden = j->d->hidden;
    for (int64_t r = share(m, ith, nth); r < share(m, ith + 1, nth); r++) {
        const branch_t here = {before.out ? before.out + r * hidden : NULL, before.gain};
        add_and_norm_row(j->d, x + r * hidden, here, gain, j->h + r * hidden);
    }
    pool_barrier();
}

static void embed_token(const decoder_t *d, float *x, int32_t token) {
    embed_row(x, d->embedding, d->embedding_format, d->embedding_packed, token, d->hidden, d->embedding_scale);
}

static void embed(job_t *j, int32_t ith, int32_t nth) {
    for (int64_t t = share(j->s->tokens, ith, nth); t < share(j->s->tokens, ith + 1, nth); t++)
        embed_token(j->d, j->x + t * j->d->hidden, j->s->token[t]);
}

/* Norm, where it is, and turn some heads of a token. */
static void turn(const decoder_t *d, const layer_t *l, float *x, int32_t heads, const float *gain, int32_t position) {
    const int64_t at = (int64_t)position * (d->rope_dim / 2);
    for (int32_t h = 0; gain && h < heads; h++)
        norm_row(x + h * d->head_dim, x + h * d->head_dim, d->head_dim, d->eps, gain);
    rope_row(x, heads, d->head_dim, d->rope_dim, l->cos + at, l->sin + at);
}

/* Turn the queries and the key of a KV head of a token, and store its key and value. */
static void place_head(job_t *j, const layer_t *l, int32_t layer, int64_t t, int64_t head) {
    const decoder_t *d = j->d;
    const int32_t q = q_width(d), kv = kv_width(d), group = d->heads / d->kv_heads;
    float *row = j->wide + t * (q + 2 * kv), *k = row + q + head * d->head_dim;
    turn(d, l, row + head * group * d->head_dim, group, l->q_gain, j->s->position[t]);
    turn(d, l, k, 1, l->k_gain, j->s->position[t]);
    kv_write(j->c, layer, j->s->slot[t], head, k, k + kv);
}

/* KV head by KV head of each token, so that threads share a lone token too. */
static void place(job_t *j, const layer_t *l, int32_t layer, int32_t ith, int32_t nth) {
    const int32_t heads = j->d->kv_heads, items = j->s->tokens * heads;
    for (int32_t item = share(items, ith, nth); item < share(items, ith + 1, nth); item++)
        place_head(j, l, layer, item / heads, item % heads);
    pool_barrier();
}

static attend_t attending(const job_t *j, const layer_t *l) {
    const decoder_t *d = j->d;
    const step_t *s = j->s;
    return (attend_t){
        .q = j->wide, .out = j->h, .ldq = q_width(d) + 2 * kv_width(d), .ldo = q_width(d), .heads = d->heads, .tokens = s->tokens,
        .sequences = s->sequences, .width = s->width, .position = s->position, .first = s->first, .block_table = s->block_table,
        .window = l->window, .scale = d->scale, .softcap = d->softcap,
    };
}

/* Of a lone token, a KV head is placed and attended to by one thread: nobody else reads what it writes. */
static void place_and_attend(job_t *j, const layer_t *l, int32_t layer, const attend_t *a, float *own) {
    for (int32_t head; (head = __atomic_fetch_add(j->next + layer, 1, __ATOMIC_RELAXED)) < j->d->kv_heads;) {
        place_head(j, l, layer, 0, head);
        attend_head(a, j->c, layer, head, own);
    }
    pool_barrier();
}

/* Store keys and values, and, where anybody reads on, attend. */
static void attention(job_t *j, const layer_t *l, int32_t layer, int is_read, int32_t ith, int32_t nth) {
    const attend_t a = attending(j, l);
    const int split = attention_is_split(&a, j->c, j->threads);
    float *own = j->own + ith * attention_floats(j->d->head_dim);
    if (is_read && !split && attention_is_by_head(&a, j->c))
        return place_and_attend(j, l, layer, &a, own);
    place(j, l, layer, ith, nth);
    if (!is_read)
        return;
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

/* Steps of any number of tokens. */
static void walk(job_t *j, int32_t ith, int32_t nth) {
    const decoder_t *d = j->d;
    const int32_t hidden = d->hidden;
    float *x = j->x;
    int32_t m = j->s->tokens;
    branch_t before = {0};
    embed(j, ith, nth);
    for (int32_t i = 0; i < d->layers; i++) {
        const layer_t *l = d->layer + i;
        const int is_last = i == d->layers - 1;
        add_and_norm(j, x, m, before, l->attention_gain, ith, nth);
        product(j, &l->qkv, (rows_t){j->h, hidden, m}, j->wide, ith, nth);
        attention(j, l, i, !is_last || j->s->sampled, ith, nth);
        if (is_last && !j->s->sampled)
            return;
        if (is_last)
            narrow(j, ith, nth), x = j->few, m = j->s->sampled;
        product(j, &l->o, (rows_t){is_last ? j->wide : j->h, q_width(d), m}, j->out, ith, nth);
        add_and_norm(j, x, m, (branch_t){j->out, l->post_attention_gain}, l->mlp_gain, ith, nth);
        gated_product(j, &l->gate_up, (rows_t){j->h, hidden, m}, ith, nth);
        product(j, &l->down, (rows_t){j->wide, 2 * d->ffn, m}, j->out, ith, nth);
        before = (branch_t){j->out, l->post_mlp_gain};
    }
    add_and_norm(j, x, m, before, d->gain, ith, nth);
    product(j, &d->head, (rows_t){j->h, hidden, m}, j->logits, ith, nth);
}

/* The step of a lone token that is sampled: every thread keeps the stream itself, as adding and norming take less than a barrier. */
static void walk_lone(job_t *j, int32_t ith, int32_t nth) {
    const decoder_t *d = j->d;
    float *x = j->lone + ith * 2 * lone_width(d), *h = x + lone_width(d);
    const rows_t own = {h, d->hidden, 1};
    branch_t before = {0};
    embed_token(d, x, j->s->token[0]);
    for (int32_t i = 0; i < d->layers; i++) {
        const layer_t *l = d->layer + i;
        add_and_norm_row(d, x, before, l->attention_gain, h);
        product(j, &l->qkv, own, j->wide, ith, nth);
        attention(j, l, i, 1, ith, nth);
        product(j, &l->o, (rows_t){j->h, q_width(d), 1}, j->out, ith, nth);
        add_and_norm_row(d, x, (branch_t){j->out, l->post_attention_gain}, l->mlp_gain, h);
        gated_product(j, &l->gate_up, own, ith, nth);
        product(j, &l->down, (rows_t){j->wide, 2 * d->ffn, 1}, j->out, ith, nth);
        before = (branch_t){j->out, l->post_mlp_gain};
    }
    add_and_norm_row(d, x, before, d->gain, h);
    product(j, &d->head, own, j->logits, ith, nth);
}

static void work(void *arg, int32_t ith, int32_t nth) {
    job_t *j = arg;
    (is_lone(j->s) ? walk_lone : walk)(j, ith, nth);
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
    j->lone = take(&at, threads * 2 * lone_width(d) * floats);
    j->lone_room_bytes = room_bytes(d, 1);
    const int64_t all = room_bytes(d, tokens), each = threads * j->lone_room_bytes;
    j->room = take(&at, all > each ? all : each);
    return at;
}

int64_t step_workspace_bytes(const decoder_t *d, int32_t tokens, int32_t threads) {
    job_t j;
    return lay_out(&j, d, tokens, threads, NULL) - (uint8_t *)NULL;
}

static step_t step_at(const int32_t *laid) {
    step_t s = {.tokens = laid[0], .sequences = laid[1], .sampled = laid[2], .width = laid[3]};
    s.token = laid + 4, s.position = s.token + s.tokens, s.slot = s.position + s.tokens;
    s.first = s.slot + 2 * (int64_t)s.tokens; /* between them whose each token is, which first says too */
    s.block_table = s.first + s.sequences + 1, s.sample = s.block_table + (int64_t)s.sequences * s.width;
    return s;
}

int64_t step_run(const decoder_t *d, const cache_t *c, const int32_t *laid, int32_t threads, void *workspace, float *logits) {
    const step_t s = step_at(laid);
    job_t j = {.d = d, .c = c, .s = &s, .logits = logits, .threads = threads};
    lay_out(&j, d, s.tokens, threads, workspace);
    memset(j.next, 0, d->layers * sizeof(int32_t));
    pool_run(threads, work, &j);
    return j.linears_ns;
}

/* One step of a decoder in one call: from tokens to logits, K and V written to the paged cache on the way.
 *
 * Of what a step computes for a token nothing depends on the other tokens in it, on the number of threads or on where chunks are cut.
 */
#ifndef MLSYS_STEP_H
#define MLSYS_STEP_H

#include "attention.h"
#include "linear.h"

typedef struct {
    linear_t qkv, o, gate_up, down;
    const float *attention_gain, *mlp_gain;           /* [hidden] times sqrt(hidden); NULL: the matrix has it */
    const float *post_attention_gain, *post_mlp_gain; /* of a norm before the residual add; NULL: none */
    const float *q_gain, *k_gain;                     /* [head_dim] times sqrt(head_dim); NULL: no norm */
    const float *cos, *sin;                           /* [positions, rope_dim / 2] */
    int32_t window;                                   /* a token sees so many, itself included; 0: all */
} layer_t;

typedef struct {
    int32_t layers, hidden, heads, kv_heads, head_dim, rope_dim, ffn, vocab;
    int32_t gelu;                              /* the gate's activation: 0 silu, 1 gelu with tanh */
    int32_t embedding_format, embedding_packed; /* F32 or BF16; whether it is the head's packed weight */
    float eps, scale, softcap, embedding_scale;
    const void *embedding; /* [vocab, hidden] */
    const float *gain;     /* [hidden] times sqrt(hidden) */
    linear_t head;
    const layer_t *layer; /* [layers] */
} decoder_t;

/* Bytes of workspace for steps of so many tokens. */
int64_t step_workspace_bytes(const decoder_t *d, int32_t tokens, int32_t threads);

/* Compute a step.  laid: T, S, sampled, width; then of T tokens of S sequences, laid end to end: token, position, slot, sequence [T] each,
 * first [S + 1], block_table [S, width], sample [sampled]; see runner.Step.  workspace: 64-byte aligned; logits: [sampled, vocab].  Returns the nanoseconds that products with weights took. */
int64_t step_run(const decoder_t *d, const cache_t *c, const int32_t *laid, int32_t threads, void *workspace, float *logits);

#endif

/* The products of a tile: scores of queries and keys, and values weighted.  Keys and values lie in the cache, or in the tile as words. */
#ifndef MLSYS_ATTENTION_PRODUCTS_H
#define MLSYS_ATTENTION_PRODUCTS_H

#include "attention_tile.h"

enum { RUNS = TILE / LANES };

/* The keys of a tile in runs of 16, and where the values lie that are wanted next. */
typedef struct {
    const uint8_t *run[RUNS], *ahead[RUNS];
    int64_t stride; /* bytes from dimension to dimension, or pair to pair */
    int32_t runs, steps;
} keys_t;

/* The values of keys from..keys-1 of a tile in runs of `length`, and where keys lie that are wanted next. */
typedef struct {
    const uint8_t *run[RUNS], *ahead[RUNS];
    int64_t stride; /* bytes from key to key, or pair to pair */
    int32_t length, from, keys;
} values_t;

/* Set p to the scores. */
void tile_scores(const view_t *w, const keys_t *k, int in_place);

/* Set to->values to the values weighted with p. */
void tile_values(const view_t *w, const values_t *s, int in_place, state_t *to);

#endif

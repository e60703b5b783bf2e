/* What the forward step needs of an ISA level: work on one token, one tile of rows or of keys. Internal.
 *
 * Every function has one order of float operations, the same on all levels (see ops.c.j2), so the step gives the
 * same bits on every CPU, for every number of threads and every batch.
 */
#pragma once

#include <math.h>
#include <stdint.h>

#include "bitgen.h"

enum {
    BITGEN_KEY_BLOCK = 16,  /* keys that lie side by side in the cache */
    BITGEN_KEY_CHUNK = 128, /* keys whose softmax is taken at once; partial results are merged in their order */
    BITGEN_QUERY_ROWS = 64, /* query rows of one call of `attend` */
    BITGEN_QUERY_TILE = 8,  /* rows whose sums are in registers, at most */
    BITGEN_HEAD_TOKENS = 32 /* tokens whose activations stay in cache while rows of the head pass */
};

/* Some query rows against the cache of one key-value head of one sequence in one layer. */
struct bitgen_attention {
    const uint8_t *cache;   /* chunk 0 of the head, as `bitgen_chunk_bytes` says */
    int64_t next_chunk;     /* bytes from a chunk to the next */
    int64_t next_head;      /* from a head's chunk to that of the next head, which is only prefetched */
    const float *const *q;  /* (rows) pointers to (head_dim): rotated and multiplied by 1 / sqrt(head_dim) */
    float *const *out;      /* (rows) pointers to (head_dim) */
    const int32_t *last;    /* (rows): keys 0 .. last are visible */
    int64_t window;         /* only the newest so many of these are; 0: all */
    int64_t rows, head_dim; /* rows <= BITGEN_QUERY_ROWS */
    int64_t begin, end;     /* the keys to look at; begin a multiple of BITGEN_KEY_CHUNK, end too or behind `last` */
    float *const *parts; /* NULL: `out` is written. Else (rows) pointers to (chunks, bitgen_part_floats): each chunk's
                            * result, for merge_parts */
    float *work;         /* bitgen_attention_floats(head_dim) */
};

/* Rows [row_begin, row_end) of logits = x * w^T. */
struct bitgen_head {
    const float *x;     /* (n, x_stride), zero padded to a multiple of 16 columns */
    const uint8_t *w;   /* (rows, row_bytes), in one of the dense types */
    const float *scale; /* (rows), of BITGEN_DENSE_I8 */
    float *out;         /* (n, out_stride) */
    int64_t n, k, x_stride, row_bytes, out_stride, row_begin, row_end;
    const int8_t *planes; /* of `screen`, in place of x: (n, 2, x_stride), zero padded to a multiple of 64 columns */
    const float *x_scale; /* (n): a token is x_scale * (256 * its first plane + its second) */
    const int32_t *start; /* (n, 2, 16), of screen_start */
    const int32_t *high;  /* (high_count) the chunks of 64 columns where some token's first plane is not zero */
    int64_t high_count;
};

struct bitgen_step_ops {
    /* Each returns 1 where NaN or infinity comes up, else 0. */
    int32_t (*quantize)(const float *x, int64_t k, int64_t k_pad, int8_t *xq, float *x_scale, int32_t *x_sum);
    int32_t (*norm)(float *x, const float *add, const float *weight, float eps, int64_t k, float *y);
    int32_t (*norm_quantize)(float *x, const float *add, const float *weight, float eps, int64_t k, int64_t k_pad,
                             int8_t *xq, float *x_scale, int32_t *x_sum);
    /* As two planes of int8, of which group 0 has one scale and one sum each: see bitgen_plane_quantizer. */
    int32_t (*quantize_planes)(const float *x, int64_t k, int64_t group, int64_t stride, int8_t *xq, float *x_scale,
                               int32_t *x_sum);
    /* The norm quantised in groups: x_scale and x_sum (groups), xq (stride), zeros behind the last group. */
    int32_t (*norm_quantize_groups)(float *x, const float *add, const float *weight, float eps, int64_t k,
                                    int64_t group, int64_t stride, int8_t *xq, float *x_scale, int32_t *x_sum);
    void (*gate[2])(const float *gate_up, int64_t ffn, float *h); /* BITGEN_SILU, BITGEN_RELU2 */
    void (*head_norm)(float *x, int64_t heads, int64_t head_dim, const float *weight,
                      float eps); /* of each, in place */
    void (*rotate)(float *x, int64_t heads, int64_t head_dim, const float *turn, float scale);
    /* Key and value of one head at `position` of a chunk, for a cache of type BITGEN_KV_F16, _F32, _I8, _I4 */
    void (*store[4])(const float *key, const float *value, int64_t head_dim, int64_t position, uint8_t *chunk);
    void (*attend[4])(const struct bitgen_attention *a);
    void (*merge_parts)(const float *parts, int64_t chunks, int64_t head_dim, float *work, float *y);
    void (*embed[BITGEN_DENSE_TYPES])(const uint8_t *row, int64_t k, float *x);
    void (*head[BITGEN_DENSE_TYPES])(const struct bitgen_head *a);
    /* Logits of int8 rows by activations in two planes, for a screen: NULL where a level gains nothing by them. */
    void (*screen_start)(const int8_t *planes, int64_t stride, int32_t *start);
    void (*screen)(const struct bitgen_head *a);
};

/* The first of the keys that a query with the key `last` sees. */
static inline int64_t bitgen_first_key(int64_t last, int64_t window)
{ return window && last >= window ? last + 1 - window : 0; }

/* A chunk of one head's cache: keys (blocks of 16, head_dim, 16), values (keys, head_dim), then the scales of the keys
 * and those of the values: of I8 a float each, of I4 a half float for each 32 of head_dim, for keys (blocks of 16,
 * groups, 16), for values (keys, groups). Values of I4 are whole groups. Read in this order they are one stream. */
static inline int64_t bitgen_chunk_bytes(int64_t head_dim, int32_t kv_type)
{
    const int64_t groups = (head_dim + 31) / 32;
    switch (kv_type) {
    case BITGEN_KV_F16:
        return 2 * BITGEN_KEY_CHUNK * head_dim * 2;
    case BITGEN_KV_F32:
        return 2 * BITGEN_KEY_CHUNK * head_dim * 4;
    case BITGEN_KV_I8:
        return 2 * BITGEN_KEY_CHUNK * (head_dim + 4);
    default:
        return BITGEN_KEY_CHUNK * (head_dim / 2 + groups * 16 + 2 * groups * 2);
    }
}

/* Floats of the result of a chunk of keys for one query row: maximum, sum, padding, product with the values. */
static inline int64_t bitgen_part_floats(int64_t head_dim) { return (head_dim + 15) / 16 * 16 + 16; }

/* Floats of work memory of `attend`. */
static inline int64_t bitgen_attention_floats(int64_t head_dim)
{
    int64_t wide = (head_dim + 15) / 16 * 16;
    return (BITGEN_QUERY_ROWS + BITGEN_QUERY_TILE) * wide + 2 * BITGEN_QUERY_ROWS +
           BITGEN_QUERY_TILE * BITGEN_KEY_CHUNK;
}

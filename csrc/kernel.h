/* What kernels and host code agree on. Internal: not installed, and free to change with every version. */
#pragma once

#include <stdatomic.h>
#include <stdint.h>

#include "bitgen.h"
#include "bitgen_config.h"
#include "pool.h"

/* The argument of every kernel: a file of its own, because generated kernels hold its text and include nothing. Of
 * weights in groups x_sum and x_scale are (n, groups), w_scale and acc are NULL, and w_scale_stride is the bytes of a
 * scale among the weights, 2 or 4. */
#include "matmul.h"

/* One kernel and what the host must know to feed it. */
struct bitgen_kernel {
    const char *name, *isa, *family, *schedule;
    int32_t family_id, isa_id;          /* compared when a kernel is chosen */
    int32_t regime, n_min, n_max;       /* the tokens of one call it is for; n_max INT32_MAX: no bound */
    int32_t row_block, k_chunk;         /* of its layout */
    int32_t chunk_bytes, trailer_bytes; /* of 16 rows */
    int32_t group;                      /* weights along k that share a scale; 0: scales lie outside the weights */
    int32_t table_bytes;                /* of the lookup tables of one token and one chunk; 0: it reads none */
    int32_t row_grain;                  /* rows a claim of work should have a multiple of; a multiple of row_block */
    void (*run)(const struct bitgen_matmul *a);
    int64_t (*scratch)(int64_t m, int64_t k, int64_t n); /* bytes a thread */
    int32_t (*quantize)(const float *x, int64_t k, int64_t k_pad, int8_t *xq, float *x_scale, int32_t *x_sum);
    void (*tables)(const int8_t *xq, int64_t k, uint8_t *tables); /* NULL when table_bytes is 0 */
};

/* Memory of a context: grows on demand, 64-byte aligned, contents lost when it grows. */
struct bitgen_buffer {
    void *data;
    int64_t bytes;
};

struct bitgen_entry;
struct bitgen_step_ops;

struct bitgen_context {
    _Atomic int32_t busy;
    int32_t threads;
    int64_t owner; /* bitgen_process(): threads do not survive fork() */
    struct bitgen_pool *pool;
    struct bitgen_buffer x, x_sum, x_scale, tables, scratch;
    struct bitgen_buffer planes;         /* products of the planes of int16 activations, not yet one */
    struct bitgen_buffer step;           /* work memory of a forward step */
    const struct bitgen_step_ops *ops;   /* of the best ISA level it may use (library.c) */
    const struct bitgen_entry **entries; /* those this context may choose, best first (library.c) */
    int32_t entry_count;
    struct bitgen_preference *preferred; /* layouts that the caller chose for shapes (library.c) */
    int32_t preferred_count;
    struct bitgen_nodes *nodes; /* of NUMA that the threads are on; NULL: there is one (nodes.c) */
};

/* The planes of int16 activations of a token, each group by itself: x (k) -> xq (2, stride), high and low, x_scale and
 * x_sum (2, groups). 1 where NaN or infinity comes up, else 0. */
typedef int32_t bitgen_plane_quantizer(const float *x, int64_t k, int64_t group, int64_t stride, int8_t *xq,
                                       float *x_scale, int32_t *x_sum);

/* One multiplication. One of x, xq and rows is given, and one of y and acc; not x with acc, nor xq with y. */
struct bitgen_call {
    const struct bitgen_kernel *kernel;
    const uint8_t *w;       /* packed weights without the header, 64-byte aligned */
    const float *w_scale;   /* NULL of weights in groups */
    int64_t w_scale_stride; /* 0: one scale; 1: one a row; of weights in groups the bytes of a scale among them */
    const float *x;         /* (n, k) */
    const int8_t *xq;       /* (n, k) */
    float *y;               /* (n, m) */
    int32_t *acc;           /* (n, m) */
    int64_t m, k, n;
    const int8_t *rows; /* (n, bitgen_row_stride(k, group)) as kernels read them, with x_sum and x_scale (n, groups) */
    const int32_t *x_sum;
    const float *x_scale;
    bitgen_plane_quantizer *quantize_planes; /* of int16 activations, given by x or rows (2 n), with y; NULL: int8 */
};

/* Rows of int8 activations that a token of a call has. */
static inline int64_t bitgen_planes(const struct bitgen_call *call) { return call->quantize_planes ? 2 : 1; }

/* The most columns over which int16 activations are added up in int32. */
enum { BITGEN_INT16_MAX = 32639, BITGEN_INT16_K_MAX = INT32_MAX / BITGEN_INT16_MAX };

/* A context without any check of the CPU and without a table of kernels. threads >= 1. */
int32_t bitgen_context_open(struct bitgen_context **ctx, int32_t threads);
void bitgen_context_close(struct bitgen_context *ctx);

/* Takes the context for one call: BITGEN_OK, BITGEN_ERROR_BUSY or BITGEN_ERROR_FORKED. */
int32_t bitgen_enter(struct bitgen_context *ctx);
void bitgen_leave(struct bitgen_context *ctx);

/* Quantise (or copy) the activations, build lookup tables, multiply: what the public functions call and what is
 * timed. The arguments are right; BITGEN_ERROR_NOT_FINITE, _MEMORY, _BUSY and _FORKED remain. */
int32_t bitgen_run(struct bitgen_context *ctx, const struct bitgen_call *call);

/* The same for a caller that has taken the context. */
int32_t bitgen_run_entered(struct bitgen_context *ctx, const struct bitgen_call *call);

/* Chunks of k: of weights in groups the whole ones of each group. */
int64_t bitgen_kernel_chunks(const struct bitgen_kernel *kernel, int64_t k);

/* The lookup tables of chunks [begin, end) of a token, x as kernels read it; tables: those of chunk `begin`. `end` is
 * bitgen_kernel_chunks, or both are multiples of a group's chunks. */
void bitgen_build_tables(const struct bitgen_kernel *kernel, const int8_t *x, int64_t k, int64_t begin, int64_t end,
                         uint8_t *tables);

/* At least `bytes` bytes in `buffer`: BITGEN_OK or BITGEN_ERROR_MEMORY. */
int32_t bitgen_reserve(struct bitgen_buffer *buffer, int64_t bytes);

/* Bytes between two rows of padded int8 activations. */
int64_t bitgen_x_stride(int64_t k);

/* The same for kernels that read whole groups of `group` activations; 0: there are no groups. */
int64_t bitgen_row_stride(int64_t k, int64_t group);

/* Scales and sums of a token's activations: one, or one for each group. */
static inline int64_t bitgen_groups(int64_t k, int64_t group) { return group ? (k + group - 1) / group : 1; }

typedef int32_t bitgen_quantizer(const float *x, int64_t k, int64_t k_pad, int8_t *xq, float *x_scale, int32_t *x_sum);

/* x (k) of one token -> xq (stride), x_scale and x_sum (groups): each group by itself. 1 where NaN or infinity comes
 * up, else 0. */
int32_t bitgen_quantize_row(bitgen_quantizer *quantize, const float *x, int64_t k, int64_t group, int64_t stride,
                            int8_t *xq, float *x_scale, int32_t *x_sum);

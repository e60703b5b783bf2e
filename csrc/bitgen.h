/* bitgen: exact matrix kernels for weights of a few bits, ternary ones first.
 *
 *   y[n, m] = x_scale[n] * w_scale[m] * sum_k w[m, k] * xq[n, k]
 *
 * w is (m, k) with values -1, 0, 1; xq, x_scale are the activations x quantised to int8 a token:
 * s = 127 / max(absmax, 1e-5), xq = clamp(round_half_even(x * s), -128, 127), x_scale = 1 / s.
 * The sum is exact in int32 and the epilogue has one order, y = (float)acc * (x_scale * w_scale), so the same
 * weights give the same y on every CPU, for every n and every number of threads. All matrices are row-major
 * and contiguous; buffers may have any alignment their type has, except packed weights (64 bytes).
 *
 * A first program (without the checks of the returned codes):
 *   bitgen_context *ctx;
 *   bitgen_context_create(&ctx, 0, 0);                   // 0 threads: what won the tune, else all cores
 *   size_t bytes;
 *   bitgen_packed_bytes(ctx, m, k, &bytes);
 *   void *packed = aligned_alloc(64, bytes);             // bytes is a multiple of 64
 *   bitgen_pack(ctx, w, m, k, packed, bytes);            // once; serves every n
 *   bitgen_matmul(ctx, packed, &w_scale, 1, x, n, m, k, y);
 *   bitgen_context_destroy(ctx);
 *
 * Ownership and threads: the caller owns every buffer. Packed weights are only read, so many contexts may share
 * them, and they may be written to a file and mapped back. A context owns its threads and work memory and
 * serves one call at a time; a second, concurrent call gets BITGEN_ERROR_BUSY. After fork() the child must not
 * use a context of its parent (BITGEN_ERROR_FORKED), only destroy it. Every function that returns int32_t
 * gives BITGEN_OK or one of the BITGEN_ERROR codes; nothing is written to outputs before the arguments are found
 * right. Structs that a caller fills begin with their size, so that a library and a program of another header notice.
 */
#ifndef BITGEN_H
#define BITGEN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifdef _WIN32
#define BITGEN_API /* the import library says where functions are */
#else
#define BITGEN_API __attribute__((visibility("default")))
#endif

/* ABI begins: what follows up to "ABI ends" is also what other languages read to call this library. */

/* Grows with every incompatible change of this header. */
#define BITGEN_ABI_VERSION 6

/* The codes; bitgen_error_message() has a sentence for each. */
enum bitgen_error {
    BITGEN_OK = 0,
    BITGEN_ERROR_NULL = 1,             /* a pointer is NULL */
    BITGEN_ERROR_ARGUMENT = 2,         /* threads, flags or an index out of range */
    BITGEN_ERROR_SHAPE = 3,            /* m, k or n out of range, or not the shape that was packed */
    BITGEN_ERROR_SCALE_COUNT = 4,      /* w_scale_count is neither 1 nor m */
    BITGEN_ERROR_ALIGNMENT = 5,        /* packed weights not at a multiple of 64 bytes */
    BITGEN_ERROR_BUFFER_SIZE = 6,      /* fewer bytes than packed weights of this shape have */
    BITGEN_ERROR_NOT_PACKED = 7,       /* not weights packed by a bitgen library, or damaged */
    BITGEN_ERROR_LAYOUT_VERSION = 8,   /* packed by a library with other layouts */
    BITGEN_ERROR_LAYOUT = 9,           /* a layout this library has no kernels for */
    BITGEN_ERROR_NOT_TERNARY = 10,     /* a weight is not -1, 0 or 1 */
    BITGEN_ERROR_NOT_FINITE = 11,      /* NaN or infinity in activations or logits; outputs are undefined */
    BITGEN_ERROR_BUSY = 12,            /* the context serves another call */
    BITGEN_ERROR_FORKED = 13,          /* the context belongs to the parent process */
    BITGEN_ERROR_UNSUPPORTED_CPU = 14, /* this CPU lacks an ISA level of the library */
    BITGEN_ERROR_MEMORY = 15,          /* out of memory */
    BITGEN_ERROR_THREADS = 16,         /* the system gave no threads */
    BITGEN_ERROR_MODEL = 17,           /* dimensions, types or pointers of a bitgen_model do not fit together */
    BITGEN_ERROR_TOKENS = 18,          /* a token, position or sequence is out of range */
    BITGEN_ERROR_TILES = 19,           /* the system refuses the tile registers (AMX) to this process */
    BITGEN_ERROR_ISA_CAP = 20,         /* the environment variable BITGEN_ISA_CAP holds no ISA level of this CPU */
    BITGEN_ERROR_STRUCT = 21,          /* the size that a struct carries is not the library's */
    BITGEN_ERROR_SCALES = 22,          /* a scale of a group is not finite, or no half float and stored as one */
    BITGEN_ERROR_GROUPS = 23,          /* weights in groups have no integer sums over all of k */
    BITGEN_ERROR_BUNDLE = 24,          /* no bundle, one of another ABI, damaged, or one that others can change */
    BITGEN_ERROR_CODES = 25            /* a code too large, a value of -128, or a table that is not there */
};

/* Flags of bitgen_context_create: */
#define BITGEN_ALLOW_GENERIC 1 /* on a CPU the library is not for, serve with its generic kernels: slow, exact */
#define BITGEN_ONLY_GENERIC 2  /* use the generic kernels on any CPU: something to compare with */

typedef struct bitgen_context bitgen_context;

/* One entry of the table of kernels. */
struct bitgen_kernel_info {
    const char *name; /* of the C function; tells family, regime, layout, schedule and ISA level */
    const char *isa;
    const char *family;
    const char *schedule;
    int64_t m, k;         /* the shape it was tuned for, 0 0 when it serves every shape */
    int32_t n_min, n_max; /* the tokens it serves in one call */
    int32_t threads;      /* the number of threads it was tuned for, 0 when it was not tuned */
    int32_t row_block;    /* rows of a block in the layout it reads */
};

/* What opens packed weights; packed weights of (m, k) are this and then the layout's blocks. */
struct bitgen_packed_header {
    uint64_t magic;          /* BITGEN_PACKED_MAGIC, in the byte order of the CPU that packed */
    uint32_t layout_version; /* BITGEN_LAYOUT_VERSION */
    uint32_t row_block;      /* rows of a block */
    char family[16];         /* "i2s", "tl1", ... and zeros */
    int64_t m, k;
    uint64_t bytes;      /* of the packed weights, this header included */
    uint32_t scale_type; /* of scales among the weights, of enum bitgen_scale_type */
    uint32_t group;      /* weights along k that share such a scale; 0: there are none */
};

/* The format of scales. */
enum bitgen_scale_type { BITGEN_SCALE_F32 = 0, BITGEN_SCALE_F16 = 1 };

/* What activations are quantised to. Of int16
 *
 *   s = 32639 / max(absmax, 1e-5), xq = round_half_even(x * s) = 256 high + low, x_scale = 1 / s
 *
 * with high and low in -128 .. 127: two rows of int8, which kernels multiply as those of two tokens. Then
 *
 *   y[n, m] = (float)(256 acc_high + acc_low) * (x_scale[n] * w_scale[m])           k at most 65795
 *
 * and of weights in groups y = y_high + y_low, each as int8 gives it: of high with the scales 256 * x_scale. */
enum bitgen_x_type { BITGEN_X_INT8 = 0, BITGEN_X_INT16 = 1 };

#define BITGEN_PACKED_MAGIC 0x4b5041504e544942
#define BITGEN_LAYOUT_VERSION 1

/* --- the library ------------------------------------------------------------------------------------------ */

/* BITGEN_ABI_VERSION of the library; use nothing else of a library that gives another number. */
BITGEN_API int32_t bitgen_abi_version(void);

/* The version of bitgen that built the library, for example "0.1.0". */
BITGEN_API const char *bitgen_version(void);

/* sizeof(struct bitgen_kernel_info) and sizeof(struct bitgen_packed_header) in the library, for loaders that
 * cannot include this header. */
BITGEN_API int32_t bitgen_struct_sizes(int32_t *kernel_info, int32_t *packed_header);

/* A sentence for a code; never NULL. */
BITGEN_API const char *bitgen_error_message(int32_t code);

/* The features this CPU lacks and the library needs, separated by spaces; "" when it can run here. */
BITGEN_API const char *bitgen_missing_features(void);

/* How many kernels the library holds, generic ones included. */
BITGEN_API int32_t bitgen_kernel_count(void);

/* The kernel `index` of 0 .. bitgen_kernel_count() - 1; the strings live as long as the library. */
BITGEN_API int32_t bitgen_kernel_info(int32_t index, struct bitgen_kernel_info *info);

/* Opens the library of another bundle: of the folder that `bitgen bundle pick --path` prints, or any that
 * `bitgen bundle install` or `bitgen build` made. Nobody but its owner (this user or root) may be able to change it or
 * a folder above it; its ABI is this library's, its bytes have the sha256 that its manifest names, and this CPU has the
 * features that it needs. `*library` is what dlopen gives: dlsym finds the functions of this header in it, dlclose
 * closes it once nothing of it is used. Otherwise it is NULL, and `reason` (reason_bytes, may be NULL and 0) says in a
 * line why. Whether the system grants AMX shows when a context is created. */
BITGEN_API int32_t bitgen_bundle_open(const char *folder, void **library, char *reason, int64_t reason_bytes);

/* --- contexts --------------------------------------------------------------------------------------------- */

/* A pool of `threads` threads, the caller of each function being one of them, and its work memory.
 * threads 0: the number that was the fastest when this library was tuned on as many usable cores as there are now;
 * else one a physical core this process may use. */
BITGEN_API int32_t bitgen_context_create(bitgen_context **ctx, int32_t threads, uint32_t flags);

/* Ends the threads; NULL is allowed. No other call may be running. */
BITGEN_API void bitgen_context_destroy(bitgen_context *ctx);

/* The number of threads, the calling one included; 0 for NULL. */
BITGEN_API int32_t bitgen_context_threads(const bitgen_context *ctx);

/* NUMA nodes that the threads are on; 0 for NULL. Where this process may use several, each thread but the calling one
 * stays on one of them, neighbours together, as many on each as it has CPUs. */
BITGEN_API int32_t bitgen_context_nodes(const bitgen_context *ctx);

/* Copies packed weights, or rows of an embedding or head, so that each part lies on the node whose threads read it:
 * `to` is memory that nobody wrote to yet, `bytes` long, and does not overlap `from`. On one node it only copies. */
BITGEN_API int32_t bitgen_copy_to_nodes(bitgen_context *ctx, const void *from, void *to, size_t bytes);

/* --- weights ---------------------------------------------------------------------------------------------- */

/* How many bytes packed weights of (m, k) take, header included: a multiple of 64. */
BITGEN_API int32_t bitgen_packed_bytes(const bitgen_context *ctx, int64_t m, int64_t k, size_t *bytes);

/* The header that bitgen_pack writes for weights of (m, k): tells the layout they are packed in. */
BITGEN_API int32_t bitgen_packed_layout(const bitgen_context *ctx, int64_t m, int64_t k,
                                        struct bitgen_packed_header *header);

/* From now on weights of (m, k) without groups are packed in the layout of `family` with blocks of row_block rows, not
 * in the one that the library holds to be the best; family NULL: in that one again. What is packed already stays as it
 * is. BITGEN_ERROR_LAYOUT: the library has no kernels for it; bitgen_kernel_info tells for which it has some. */
BITGEN_API int32_t bitgen_prefer_layout(bitgen_context *ctx, int64_t m, int64_t k, const char *family,
                                        int32_t row_block);

/* Packs w (m, k) for the layout that is best for this shape. `packed` is 64-byte aligned and has
 * `packed_bytes` bytes, at least what bitgen_packed_bytes gives. */
BITGEN_API int32_t bitgen_pack(bitgen_context *ctx, const int8_t *w, int64_t m, int64_t k, void *packed,
                               size_t packed_bytes);

/* The same piece by piece, for matrices too large to decode at once: w holds the rows [row_begin, row_end) of
 * (m, k), both multiples of the layout's row block (256 is one of every layout), or row_end = m. Call it with the
 * rows in order; the weights are valid once those up to m are packed. */
BITGEN_API int32_t bitgen_pack_rows(bitgen_context *ctx, const int8_t *w, int64_t row_begin, int64_t row_end, int64_t m,
                                    int64_t k, void *packed, size_t packed_bytes);

/* Whether `packed` holds whole packed weights of (m, k) that ctx can multiply with: for weights that come
 * from a file. It reads the header, so damaged weights behind a right header give wrong results, not errors. */
BITGEN_API int32_t bitgen_check_packed(const bitgen_context *ctx, const void *packed, size_t packed_bytes, int64_t m,
                                       int64_t k);

/* --- weights in groups -------------------------------------------------------------------------------------
 *
 * Each run of `group` weights along k (32, 64, 128 or 256; the last of a row may be shorter) has a scale of its own,
 * which is packed behind its weights, as a half float (BITGEN_SCALE_F16) or a float. Activations are quantised by the
 * same groups: x_scale and xq of each as above, of its own absmax. The integer sum of a group is exact, and
 *
 *   y[n, m] = 0;  for g = 0, 1, ...:  y[n, m] = fma((float)acc[n, m, g], w_scale[m, g] * x_scale[n, g], y[n, m])
 *
 * in this order, so y is the same on every CPU, for every n and every number of threads. bitgen_check_packed and
 * bitgen_kernel_choice serve these weights too; bitgen_matmul takes them with w_scale NULL and w_scale_count 0. */

/* Which type holds `count` scales exactly: BITGEN_SCALE_F16 where each is a half float, else BITGEN_SCALE_F32. */
BITGEN_API int32_t bitgen_group_scale_type(const float *scales, int64_t count, int32_t *scale_type);

/* As bitgen_packed_bytes and bitgen_packed_layout, for weights with a scale for each `group` along k. */
BITGEN_API int32_t bitgen_group_packed_bytes(const bitgen_context *ctx, int64_t m, int64_t k, int64_t group,
                                             int32_t scale_type, size_t *bytes);
BITGEN_API int32_t bitgen_group_packed_layout(const bitgen_context *ctx, int64_t m, int64_t k, int64_t group,
                                              int32_t scale_type, struct bitgen_packed_header *header);

/* As bitgen_pack, with scales (m, ceil(k / group)) in the type that bitgen_group_scale_type gives. */
BITGEN_API int32_t bitgen_pack_groups(bitgen_context *ctx, const int8_t *w, const float *scales, int64_t m, int64_t k,
                                      int64_t group, void *packed, size_t packed_bytes);

/* As bitgen_pack_rows: w and scales hold the rows [row_begin, row_end). */
BITGEN_API int32_t bitgen_pack_group_rows(bitgen_context *ctx, const int8_t *w, const float *scales, int64_t row_begin,
                                          int64_t row_end, int64_t m, int64_t k, int64_t group, int32_t scale_type,
                                          void *packed, size_t packed_bytes);

/* --- weights of 4 bits, of 3 and of 1 ----------------------------------------------------------------------
 *
 * Weights whose codes q are 0 .. 15, of T3 0 .. 7, of Q1 0 and 1:
 *
 *   BITGEN_WEIGHTS_Q4    w = (q - 8) * scale
 *   BITGEN_WEIGHTS_Q4M   w = q * scale + offset
 *   BITGEN_WEIGHTS_T4    w = table[q] * scale, of int8 values -127 .. 127
 *   BITGEN_WEIGHTS_T3    the same of three bits: the first 8 values of a table of 16
 *   BITGEN_WEIGHTS_Q1    w = (2 q - 1) * scale
 *
 * T4 also in groups of 16. acc above is the exact sum of (q - 8) x, q x, table[q] x or (2 q - 1) x; the offset of a
 * group joins behind its sum,
 *
 *   y[n, m] = fma(offset[m, g], x_scale[n, g] * (float)x_sum[n, g], y[n, m])
 *
 * with x_sum the sum of the group's activations. Everything else is as for ternary weights in groups. Weights of
 * Q1 may be without groups: then they have no scales here, and are multiplied as ternary ones without groups. */
enum bitgen_weight_kind {
    BITGEN_WEIGHTS_TERNARY = 0,
    BITGEN_WEIGHTS_Q4 = 1,
    BITGEN_WEIGHTS_Q4M = 2,
    BITGEN_WEIGHTS_T4 = 3,
    BITGEN_WEIGHTS_Q1 = 4,
    BITGEN_WEIGHTS_T3 = 5
};

/* Rows of such a matrix, of k columns. What is behind scale_type is read by bitgen_pack_codes alone. */
struct bitgen_codes {
    int64_t size;             /* sizeof(struct bitgen_codes) */
    int64_t group;            /* weights along k that share a scale; of Q1 also 0 */
    int32_t kind;             /* of enum bitgen_weight_kind, not ternary */
    int32_t scale_type;       /* of enum bitgen_scale_type: must hold scales and offsets exactly; F32 without groups */
    const uint8_t *codes;     /* (rows, k) */
    const float *scales;      /* (rows, groups); NULL without groups */
    const float *offsets;     /* (rows, groups) of BITGEN_WEIGHTS_Q4M; else NULL */
    const int8_t *tables;     /* (table_count, 16) of BITGEN_WEIGHTS_T4 and _T3; else NULL */
    int64_t table_count;      /* 1 .. 4, or 0 */
    const uint8_t *selectors; /* (ceil(rows / 16), groups): the table of 16 rows and a group; NULL: the first */
};

/* As bitgen_packed_bytes and bitgen_packed_layout. */
BITGEN_API int32_t bitgen_codes_packed_bytes(const bitgen_context *ctx, int64_t m, int64_t k,
                                             const struct bitgen_codes *codes, size_t *bytes);
BITGEN_API int32_t bitgen_codes_packed_layout(const bitgen_context *ctx, int64_t m, int64_t k,
                                              const struct bitgen_codes *codes, struct bitgen_packed_header *header);

/* As bitgen_pack_rows: codes hold the rows [row_begin, row_end). */
BITGEN_API int32_t bitgen_pack_codes(bitgen_context *ctx, const struct bitgen_codes *codes, int64_t row_begin,
                                     int64_t row_end, int64_t m, int64_t k, void *packed, size_t packed_bytes);

/* --- multiplication --------------------------------------------------------------------------------------- */

/* The index of the kernel that multiplies these packed weights with n tokens. */
BITGEN_API int32_t bitgen_kernel_choice(const bitgen_context *ctx, const void *packed, int64_t n, int32_t *index);

/* x (n, k) float -> xq (n, k) int8, x_scale (n). */
BITGEN_API int32_t bitgen_quantize(bitgen_context *ctx, const float *x, int64_t n, int64_t k, int8_t *xq,
                                   float *x_scale);

/* y (n, m) = x (n, k) * w^T. w_scale has w_scale_count values: 1 for the tensor, or m, one a row; NULL and 0 for
 * weights in groups. */
BITGEN_API int32_t bitgen_matmul(bitgen_context *ctx, const void *packed, const float *w_scale, int64_t w_scale_count,
                                 const float *x, int64_t n, int64_t m, int64_t k, float *y);

/* The same with activations quantised to x_type, of enum bitgen_x_type. Its kernels are those of 2 n tokens. */
BITGEN_API int32_t bitgen_matmul_as(bitgen_context *ctx, const void *packed, const float *w_scale,
                                    int64_t w_scale_count, int32_t x_type, const float *x, int64_t n, int64_t m,
                                    int64_t k, float *y);

/* acc (n, m) = xq (n, k) * w^T, the exact integers; xq may hold any int8, -128 too. Not of weights in groups. */
BITGEN_API int32_t bitgen_accumulate(bitgen_context *ctx, const void *packed, const int8_t *xq, int64_t n, int64_t m,
                                     int64_t k, int32_t *acc);

/* --- the forward step of a language model ------------------------------------------------------------------
 *
 * A decoder of ternary matrices, as BitNet b1.58 and Llama-like models with BitLinear are:
 *
 *   x = embedding[token]
 *   of each layer:  q, k, v = qkv(norm(x));  q, k = rope(head_norm(q, k))
 *                   x += o(sub_norm(attention(q, cache of k, v)))
 *                   gate, up = gate_up(norm(x));  x += down(sub_norm(act(gate) * up))
 *   logits = head(norm(x))
 *
 * or, as in BitNet-embedding, q = q(q_norm_in(norm(x))) and so on: a norm before each matrix.
 *
 * A matrix quantises its input as bitgen_matmul_as does, to the model's x_type. Norms are
 * x / sqrt(mean(x^2) + eps) * weight; RoPE turns the pairs (i, i + head_dim / 2). Every float operation has one
 * order, so the logits of a token are the same bits for every number of threads, every batch it is in and every
 * ISA level.
 */

/* The format of an embedding or a head. Q types are those of GGUF files. */
enum bitgen_dense_type {
    BITGEN_DENSE_F32 = 0,
    BITGEN_DENSE_F16 = 1,
    BITGEN_DENSE_BF16 = 2,
    BITGEN_DENSE_Q8_0 = 3,
    BITGEN_DENSE_Q6_K = 4,
    BITGEN_DENSE_Q4_0 = 5,
    BITGEN_DENSE_Q4_1 = 6,
    BITGEN_DENSE_I8 = 7, /* int8 with a scale for each row; heads only */
    BITGEN_DENSE_TYPES = 8
};

enum bitgen_activation { BITGEN_SILU = 0, BITGEN_RELU2 = 1 };

/* How keys and values are kept: half floats, floats, int8 with a scale for each head and position, or 4 bits with a
 * scale for each 32 of a head. */
enum bitgen_kv_type { BITGEN_KV_F16 = 0, BITGEN_KV_F32 = 1, BITGEN_KV_I8 = 2, BITGEN_KV_I4 = 3 };

/* The stages that a step reports its time for. */
enum bitgen_stage {
    BITGEN_STAGE_EMBED = 0,
    BITGEN_STAGE_NORM = 1,   /* norms and quantisation */
    BITGEN_STAGE_MATMUL = 2, /* the ternary matrices */
    BITGEN_STAGE_ROPE = 3,   /* rotation, and keys and values into the cache */
    BITGEN_STAGE_ATTENTION = 4,
    BITGEN_STAGE_GATE = 5,
    BITGEN_STAGE_HEAD = 6,
    BITGEN_STAGES = 7
};

/* A ternary matrix: packed weights, and scales as bitgen_matmul takes them. */
struct bitgen_matrix {
    const void *packed;
    const float *scale;
    int64_t scale_count; /* 1 or rows */
    int32_t scale_type;  /* of `scale`: BITGEN_SCALE_F32 */
    int32_t group;       /* weights along k that share a scale; 0: all of a row */
};

/* A dense matrix (vocab, hidden) with its rows row_bytes apart; BITGEN_DENSE_I8 has a scale for each row. */
struct bitgen_dense {
    const void *data;
    const float *scale;
    int64_t row_bytes;
    int32_t type;
    int32_t reserved; /* zero */
};

struct bitgen_layer {
    struct bitgen_matrix qkv;          /* (heads * head_dim + 2 kv_heads * head_dim, hidden): rows of q, of k, of v */
    struct bitgen_matrix o;            /* (hidden, heads * head_dim) */
    struct bitgen_matrix gate_up;      /* (2 ffn, hidden): rows of gate, of up */
    struct bitgen_matrix down;         /* (hidden, ffn) */
    const float *attn_norm, *ffn_norm; /* (hidden) */
    const float *attn_sub_norm;        /* (heads * head_dim), or NULL: none */
    const float *ffn_sub_norm;         /* (ffn), or NULL */
    const float *q_norm, *k_norm;      /* (head_dim) of each head of q and of k before RoPE, or NULL: none */
    /* Where q.packed is no NULL these take the place of qkv and gate_up, their rows: each norms its input once more. o
     * and down do by attn_sub_norm and ffn_sub_norm. */
    struct bitgen_matrix q, k, v, gate, up;
    const float *q_norm_in, *k_norm_in, *v_norm_in, *gate_norm_in, *up_norm_in; /* (hidden), or NULL: none */
    int64_t window; /* positions that a token attends to, the last of them its own; 0: all up to that */
};

struct bitgen_model {
    int64_t size, layer_size; /* sizeof(struct bitgen_model), sizeof(struct bitgen_layer) */
    int64_t hidden, ffn, layers, heads, kv_heads, head_dim, vocab;
    int64_t context, sequences; /* positions 0 .. context - 1 of each of the sequences are in the cache */
    float norm_eps;
    int32_t activation, kv_type, x_type;
    struct bitgen_dense embedding, head;
    const float *final_norm;          /* (hidden) */
    const float *rope;                /* (context, head_dim), by bitgen_rope */
    void *cache;                      /* bitgen_cache_bytes bytes, 64-byte aligned, zeros at first */
    const struct bitgen_layer *layer; /* (layers) */
    struct bitgen_matrix lm_head;     /* (vocab, hidden): logits are those of this matrix; packed NULL: of `head` */
    /* Rows of BITGEN_DENSE_I8 near those of the head, or data NULL: rows that want the best read these, and of the head
     * what may be among the best; their answers are the same bits. For a hidden state x the logits by a row of both are
     * at most screen_bound * |x| apart. */
    struct bitgen_dense screen;
    const float *screen_bound; /* (vocab), or NULL */
    const float *screen_norm;  /* (vocab) at least the norm of each of its rows, its scale included, or NULL */
};

/* What a token's row of a forward pass gives. */
enum bitgen_want {
    BITGEN_WANT_NOTHING = 0, /* its keys and values fill the cache */
    BITGEN_WANT_HIDDEN = 1,  /* the state that the head reads, behind the last norm */
    BITGEN_WANT_LOGITS = 2,
    BITGEN_WANT_BEST = 3 /* the best logits of the allowed tokens, and those of named tokens */
};

/* What a token's row wants and where that goes; zeros want nothing. All behind `ids` are of BITGEN_WANT_BEST: first the
 * bias is added to the logits, then the tokens that are not allowed are left out, then the best are taken. */
struct bitgen_row {
    int32_t want;            /* of enum bitgen_want */
    int32_t best;            /* how many, 0 .. vocab */
    float *out;              /* hidden state (hidden), logits (vocab), or logits of the best (best), falling */
    int32_t *ids;            /* (best) whose these are, the lower first among equals; where fewer are allowed -1, with
                              * the logit -infinity */
    const uint32_t *allowed; /* bit id % 32 of word id / 32 is 1 where a token is allowed; NULL: all are */
    const int32_t *bias_id;  /* (bias_count) tokens, and what is added to their logits: finite */
    const float *bias;
    int64_t bias_count;
    const int32_t *named; /* (named_count) tokens whose logits are wanted, allowed or not, bias added */
    float *named_out;     /* (named_count) */
    int64_t named_count;
};

/* n tokens, of any sequences; those of one sequence in the order of their positions. A token sees the positions up
 * to its own, which this call or earlier ones must have filled. */
struct bitgen_tokens {
    int64_t size, row_size; /* sizeof(struct bitgen_tokens), sizeof(struct bitgen_row) */
    int64_t n;
    const int32_t *token;               /* (n), or NULL when x is given */
    const float *x;                     /* (n, hidden) in the place of embeddings, or NULL */
    const int32_t *position, *sequence; /* (n) */
    const struct bitgen_row *row;       /* (n): what each of them wants */
};

/* sizeof(struct bitgen_layer), bitgen_model, bitgen_tokens and bitgen_row in the library, for loaders without this
 * header. */
BITGEN_API int32_t bitgen_model_sizes(int32_t *layer, int32_t *model, int32_t *tokens, int32_t *row);

/* Bytes of the cache of a model: of its dimensions, context, sequences and kv_type. */
BITGEN_API int32_t bitgen_cache_bytes(const struct bitgen_model *model, size_t *bytes);

/* Bytes of work memory that ctx holds after a step of n tokens, of which `outputs` want something and `best` of those
 * BITGEN_WANT_BEST; kernels may need a few MiB of their own, and int16 activations 16 MiB, or 32 tokens' outputs of the
 * widest matrix twice. */
BITGEN_API int32_t bitgen_work_bytes(const bitgen_context *ctx, const struct bitgen_model *model, int64_t n,
                                     int64_t outputs, int64_t best, size_t *bytes);

/* Cosines and sines of the positions [begin, end): table row p holds cos(p * inverse_frequency[i]), i < half, then
 * the sines. The angle is rounded to float as PyTorch does; sine and cosine are computed in double by the library. */
BITGEN_API int32_t bitgen_rope(const float *inverse_frequency, int64_t half, int64_t begin, int64_t end, float *table);

/* One step: fills the cache at the tokens' positions and gives each row what it wants. times_ns (BITGEN_STAGES) gets
 * the time of each stage added, or is NULL. After BITGEN_ERROR_NOT_FINITE the cache at these positions is undefined. */
BITGEN_API int32_t bitgen_step(bitgen_context *ctx, const struct bitgen_model *model,
                               const struct bitgen_tokens *tokens, int64_t *times_ns);

/* Copies the first `length` positions of a sequence's cache to another's. */
BITGEN_API int32_t bitgen_cache_copy(bitgen_context *ctx, const struct bitgen_model *model, int64_t from, int64_t to,
                                     int64_t length);

/* ABI ends */

#ifdef __cplusplus
}
#endif

#endif

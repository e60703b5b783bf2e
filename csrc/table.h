/* What the generated table of a library (table.c) tells the code that is the same in all libraries. Internal. */
#pragma once

#include "arith.h"
#include "kernel.h"
#include "step.h"

/* How weights lie in memory behind the 64 bytes of struct bitgen_packed_header. */
struct bitgen_layout {
    const char *family;
    int32_t row_block, k_chunk;         /* rows and columns of a block's chunk */
    int32_t chunk_bytes, trailer_bytes; /* of 16 rows */
    int32_t group, group_bytes;         /* weights along k that share a scale, and their codes of 16 rows; 0: none do */
    int32_t kind;                       /* of enum bitgen_weight_kind */
};

/* A kernel and the shape and number of threads it was tuned for; 0 0 0: it serves every shape. cpu_family: that of the
 * CPUs that it comes first on, as bitgen_cpu_family counts them; 0: of no CPU in particular. */
struct bitgen_entry {
    const struct bitgen_kernel *kernel;
    const struct bitgen_layout *layout;
    int64_t m, k;
    int32_t threads, cpu_family;
};

/* An ISA level: bit i of `features` says that it needs feature i, of `tiles` that this is one of tile registers.
 * sve_bytes: it needs SVE registers of exactly so many bytes; 0: of any length, or none. */
struct bitgen_isa {
    const char *name;
    uint64_t features, tiles;
    int32_t sve_bytes;
};

extern const char bitgen_version_text[];
extern const struct bitgen_layout bitgen_layouts[];
extern const int32_t bitgen_layout_count;
extern const struct bitgen_isa bitgen_isas[]; /* indexed by isa_id, the best first */
extern const int32_t bitgen_isa_count;

/* The features that a CPU must have: those of all levels in a library for one CPU family, none in one for every CPU. */
extern const uint64_t bitgen_required_features;
extern const struct bitgen_entry bitgen_entries[]; /* tuned ones, untuned ones (best level first), portable ones */
extern const int32_t bitgen_entry_count;

/* What a CPU may use whose ISA level the environment caps at `isa`: these of the features, and SVE registers of at most
 * so many bytes. A row for each level of the architecture, also for those that this library does not hold. */
struct bitgen_isa_cap {
    const char *isa;
    uint64_t features;
    int32_t sve_bytes;
};

extern const struct bitgen_isa_cap bitgen_isa_caps[];
extern const int32_t bitgen_isa_cap_count;

/* On as many usable cores as it was tuned on (0: never) this many threads are the fastest. */
extern const int32_t bitgen_tuned_cores;
extern const int32_t bitgen_tuned_threads;

/* The parts of the forward step for an ISA level: `ops` for every model, `sized` (where there are any) for those of
 * these sizes; what they compute is the same. */
struct bitgen_step_level {
    int32_t isa_id;
    const struct bitgen_step_ops *ops, *sized;
    int64_t hidden, q_rows, ffn, head_dim;
};

extern const struct bitgen_step_level bitgen_step_levels[]; /* the best level first, a portable one last */
extern const int32_t bitgen_step_level_count;

/* The features some ISA level of this library needs (cpu.c). */
extern const char *const bitgen_feature_names[];
extern const int32_t bitgen_feature_count;

/* Bit i: this CPU has feature i and the system saves the registers it uses (cpu.c). */
uint64_t bitgen_cpu_features(void);

/* Which of the CPU families that kernels of this library were tuned on this is, from 1 on; 0: none of them. It ranks
 * kernels of one ISA level, and never says what may run (cpu.c). */
int32_t bitgen_cpu_family(void);

/* Bytes of an SVE register in this thread, 0 where there are none (cpu.c). */
int32_t bitgen_sve_bytes(void);

/* Physical cores this process may use: within its affinity and its control group's quota, at least 1 (cores.c). */
int32_t bitgen_usable_cores(void);

/* Keeps each thread of a context but the calling one on a NUMA node that this process may use, where there are several:
 * neighbours together, and on each as many as it has CPUs (nodes.c). */
void bitgen_settle_on_nodes(struct bitgen_context *ctx);

/* Nodes that the threads of a context are on, at least 1 (nodes.c). */
int32_t bitgen_count_nodes(const struct bitgen_context *ctx);

/* Copies, each part by a thread on the node whose threads read it when they share rows evenly (nodes.c). */
void bitgen_copy_by_nodes(const struct bitgen_context *ctx, const void *from, void *to, size_t bytes);

/* Scales (and offsets) of each row and group, of an enum bitgen_weight_kind. */
static inline int64_t bitgen_scales_each(int32_t kind) { return kind == BITGEN_WEIGHTS_Q4M ? 2 : 1; }

/* Whether codes of an enum bitgen_weight_kind stand for values of tables. */
static inline int bitgen_has_tables(int32_t kind) { return kind == BITGEN_WEIGHTS_T4 || kind == BITGEN_WEIGHTS_T3; }

/* Bytes of packed weights of (m, k) without the header; scale_bytes: of a group's scale of a row (pack.c). */
int64_t bitgen_layout_bytes(const struct bitgen_layout *layout, int64_t scale_bytes, int64_t m, int64_t k);

/* Checks packed weights of (m, k) and chooses the kernel that multiplies them with n tokens (library.c). */
int32_t bitgen_choose_kernel(const struct bitgen_context *ctx, const void *packed, int64_t m, int64_t k, int64_t n,
                             const struct bitgen_kernel **kernel);

/* Bytes of a scale among weights in groups, of an enum bitgen_scale_type. */
static inline int64_t bitgen_scale_bytes(int64_t scale_type) { return scale_type == BITGEN_SCALE_F16 ? 2 : 4; }

/* Whether a float is a half float, whose bits go to *half (pack.c). */
int bitgen_is_half(float value, uint16_t *half);

/* Weights (m, k), and with groups their scales (m, groups) and how they are stored. */
struct bitgen_weights {
    const int8_t *w; /* or NULL: codes */
    const float *scales;
    int64_t scale_type; /* of enum bitgen_scale_type */
    int64_t m, k;
    const struct bitgen_codes *codes; /* NULL: ternary */
};

/* Packs weights into `blocks`, on the threads of the pool: BITGEN_OK, BITGEN_ERROR_NOT_TERNARY, BITGEN_ERROR_CODES or
 * BITGEN_ERROR_SCALES (pack.c). */
int32_t bitgen_pack_layout(struct bitgen_pool *pool, const struct bitgen_layout *layout,
                           const struct bitgen_weights *weights, uint8_t *blocks);

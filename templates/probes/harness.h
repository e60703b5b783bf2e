/* What the measuring process calls, in words that cffi reads too. Internal: never part of a library. */

/* A kernel as the addresses of its functions and what the host must know to feed it. */
struct harness_kernel {
    void *run;      /* void (const struct bitgen_matmul *) */
    void *scratch;  /* int64_t (int64_t m, int64_t k, int64_t n) */
    void *quantize; /* int32_t (const float *, int64_t k, int64_t k_pad, int8_t *, float *, int32_t *) */
    void *tables;   /* void (const int8_t *, int64_t k, uint8_t *), NULL when it reads no tables */
    int32_t n_min, n_max;
    int32_t row_block, k_chunk, chunk_bytes, trailer_bytes, table_bytes, row_grain;
};

/* Shared with the parent, which reads it when this process is gone. */
struct harness_progress {
    int64_t phase; /* 0 opening, 1 checking, 2 timing, 3 done */
    int64_t item;  /* the check or the lane */
};

/* One call of a kernel and what it must give. `call` has everything but outputs, tables and scratch. */
struct harness_check {
    struct bitgen_matmul call;
    const void *expected; /* (n, m): int32, or float when `floats` */
    int64_t floats;       /* 0: the kernel writes acc; 1: it writes y */
    int64_t split;        /* 0: one call; else rows [0, split), then [split, m) */
};

/* Work memory for checks. Each area ends where an unmapped page begins. */
struct harness_arena {
    uint8_t *out_end, *tables_end, *scratch_end;
    int64_t out_bytes, tables_bytes, scratch_bytes;
};

/* The first thing that was wrong. */
struct harness_mismatch {
    int64_t kind; /* see enum harness_kind in harness.c; 0: nothing */
    int64_t check, token, row;
    int64_t got, want; /* the 32 bits there, and what they should be; for HARNESS_SCRATCH bytes */
};

/* Runs `count` checks up to the first mismatch, which is returned in *found and as its kind. Check i is item
 * first + i of the progress. */
int64_t harness_check(const struct harness_kernel *kernel, const struct harness_check *checks, int64_t count,
                      int64_t first, const struct harness_arena *arena, volatile struct harness_progress *progress,
                      struct harness_mismatch *found);

/* One participant of a timing: a whole matmul. Copy i of its weights is at w + i * w_step. */
struct harness_lane {
    struct harness_kernel kernel;
    const uint8_t *w;
    int64_t w_step, w_copies;
    int64_t w_next; /* the copy of the next call */
    const float *w_scale; /* (m) */
    const float *x;       /* (n, k) */
    float *y;             /* (n, m) */
    int64_t m, k, n;
};

/* Times `lanes` in `rounds` interleaved rounds. Round r runs the lanes order[r * count .. + count), each for
 * at least min_ns, and puts the nanoseconds of one call into times[r * count + lane]. Ends early when budget_ns
 * is spent. A repeat in which another process took the processor is made again. Gives the number of rounds done
 * (at least one), or minus an error code of the host. */
int64_t harness_bench(int64_t threads, struct harness_lane *lanes, int64_t count, const int32_t *order,
                      int64_t rounds, double min_ns, double budget_ns, double *times,
                      volatile struct harness_progress *progress);

/* What the measuring process calls, in words that cffi reads too. Internal: never part of a library. */

/* A kernel as the addresses of its functions and what the host must know to feed it. */
struct harness_kernel {
    void *run;      /* void (const struct bitgen_matmul *) */
    void *scratch;  /* int64_t (int64_t m, int64_t k, int64_t n) */
    void *quantize; /* int32_t (const float *, int64_t k, int64_t k_pad, int8_t *, float *, int32_t *) */
    void *tables;   /* void (const int8_t *, int64_t k, uint8_t *), NULL when it reads no tables */
    int32_t n_min, n_max;
    int32_t row_block, k_chunk, chunk_bytes, trailer_bytes, table_bytes, row_grain;
    int32_t group; /* weights along k that share a scale, among the weights in half floats; 0: scales lie outside */
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

/* What can be wrong. */
enum harness_kind {
    HARNESS_RIGHT = 0,
    HARNESS_VALUE = 1,   /* a wrong number */
    HARNESS_OUTSIDE = 2, /* a write between or in front of the rows of the output */
    HARNESS_RANGE = 3,   /* a write to rows outside [row_begin, row_end) */
    HARNESS_SCRATCH = 4, /* more scratch wanted than there is */
    HARNESS_OVERRUN = 5, /* a write outside the scratch or in front of the tables */
    HARNESS_TABLES = 6   /* the tables do not fit: a fault of the caller */
};

/* The first thing that was wrong. */
struct harness_mismatch {
    int64_t kind; /* of enum harness_kind */
    int64_t check, token, row;
    int64_t got, want; /* the 32 bits there, and what they should be; for HARNESS_SCRATCH bytes */
};

/* Asks the system for the registers of kernels that use tiles (AMX): 0 when it gives them. */
int64_t harness_ask_for_tiles(void);

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
    int64_t *w_next;      /* the copy of the next call, one for all lanes that read the same weights */
    const float *w_scale; /* (m) */
    const float *x;       /* (n, k) */
    float *y;             /* (n, m) */
    int64_t m, k, n;
};

/* Lanes on a thread pool of their own, warmed up. */
struct harness_timer;

/* *out is to be closed even where the answer is an error code of the host and not 0. Each turn of a lane takes at
 * least min_ns. `lanes` stay the caller's and must outlive the timer. */
int32_t harness_open(struct harness_timer **out, int64_t threads, struct harness_lane *lanes, int64_t count,
                     double min_ns, volatile struct harness_progress *progress);

/* One turn of each lane in `order`: nanoseconds of one call go to times[lane]. A turn in which another process took
 * the processor is made again. 0, or an error code of the host. */
int32_t harness_round(struct harness_timer *timer, const int32_t *order, int64_t length, double *times);

void harness_close(struct harness_timer *timer);

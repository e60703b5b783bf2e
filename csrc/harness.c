/* Verifies kernels and times them; compiled with the library's host code at the architecture's baseline. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime; -std=c11 alone hides it */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "arch.h"
#include "kernel.h"
#include "harness.h"

enum { CANARY = 0x5a, STALE = 0xa5, EDGE = 64 /* bytes watched in front of an area */ };

static struct bitgen_kernel host_kernel(const struct harness_kernel *k)
{
    struct bitgen_kernel kernel = {
        .name = "candidate",
        .isa = "",
        .family = "",
        .schedule = "",
        .n_min = k->n_min,
        .n_max = k->n_max,
        .row_block = k->row_block,
        .k_chunk = k->k_chunk,
        .chunk_bytes = k->chunk_bytes,
        .trailer_bytes = k->trailer_bytes,
        .table_bytes = k->table_bytes,
        .row_grain = k->row_grain,
        .group = k->group,
    };
    /* ISO C has no conversion from void * to a function; POSIX guarantees that the bits are the same. */
    memcpy(&kernel.run, &k->run, sizeof kernel.run);
    memcpy(&kernel.scratch, &k->scratch, sizeof kernel.scratch);
    memcpy(&kernel.quantize, &k->quantize, sizeof kernel.quantize);
    memcpy(&kernel.tables, &k->tables, sizeof kernel.tables);
    return kernel;
}

int64_t harness_ask_for_tiles(void) { return bitgen_ask_for_tiles(); }

/* ---- exactness ---- */

static int64_t round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static int is_filled(const uint8_t *p, int64_t bytes, int value)
{
    for (int64_t i = 0; i < bytes; ++i)
        if (p[i] != value) return 0;
    return 1;
}

static int64_t fail(struct harness_mismatch *found, int64_t kind, int64_t token, int64_t row, int64_t got, int64_t want)
{
    found->kind = kind;
    found->token = token;
    found->row = row;
    found->got = got;
    found->want = want;
    return kind;
}

/* Rows [0, m) of every token against `expected` (NULL: they must be untouched from row `from` on). */
static int64_t compare(const struct harness_check *check, const uint32_t *out, int64_t from, const uint32_t *expected,
                       struct harness_mismatch *found)
{
    const struct bitgen_matmul *a = &check->call;
    uint32_t untouched;
    memset(&untouched, CANARY, sizeof untouched);
    for (int64_t t = 0; t < a->n; ++t) {
        const uint32_t *row = out + t * a->out_stride;
        for (int64_t r = from; r < a->m; ++r) {
            const uint32_t want = expected ? expected[t * a->m + r] : untouched;
            if (row[r] != want) return fail(found, expected ? HARNESS_VALUE : HARNESS_RANGE, t, r, row[r], want);
        }
        for (int64_t r = a->m; r < a->out_stride; ++r)
            if (row[r] != untouched) return fail(found, HARNESS_OUTSIDE, t, r, row[r], untouched);
    }
    if (!is_filled((const uint8_t *)out - EDGE, EDGE, CANARY)) return fail(found, HARNESS_OUTSIDE, 0, -1, 0, 0);
    return HARNESS_RIGHT;
}

/* Outputs hold the canary, scratch holds bytes that are wrong as anything, tables are built anew. */
static int64_t prepare(const struct bitgen_kernel *kernel, const struct harness_check *check,
                       const struct harness_arena *arena, struct bitgen_matmul *a, int64_t *scratch_bytes,
                       struct harness_mismatch *found)
{
    const int64_t out_bytes = a->n * a->out_stride * 4;
    uint8_t *out = arena->out_end - out_bytes;
    memset(out - EDGE, CANARY, (size_t)(out_bytes + EDGE));
    a->acc = check->floats ? NULL : (int32_t *)out;
    a->y = check->floats ? (float *)out : NULL;

    const int64_t bytes = kernel->scratch(a->m, a->k, a->n);
    if (bytes < 0 || round64(bytes) + EDGE > arena->scratch_bytes)
        return fail(found, HARNESS_SCRATCH, 0, 0, bytes, arena->scratch_bytes);
    uint8_t *scratch = arena->scratch_end - round64(bytes);
    memset(scratch - EDGE, CANARY, EDGE);
    memset(scratch, STALE, (size_t)bytes);
    memset(scratch + bytes, CANARY, (size_t)(round64(bytes) - bytes));
    a->scratch = scratch;
    *scratch_bytes = bytes;

    if (!kernel->table_bytes) return HARNESS_RIGHT;
    const int64_t chunks = bitgen_kernel_chunks(kernel, a->k);
    a->table_stride = chunks * kernel->table_bytes;
    if (a->n * a->table_stride + EDGE > arena->tables_bytes) return fail(found, HARNESS_TABLES, 0, 0, 0, 0);
    uint8_t *tables = arena->tables_end - a->n * a->table_stride;
    memset(tables - EDGE, CANARY, EDGE);
    for (int64_t t = 0; t < a->n; ++t)
        bitgen_build_tables(kernel, a->x + t * a->x_stride, a->k, 0, chunks, tables + t * a->table_stride);
    a->tables = tables;
    return HARNESS_RIGHT;
}

static int64_t one_check(const struct bitgen_kernel *kernel, const struct harness_check *check,
                         const struct harness_arena *arena, struct harness_mismatch *found)
{
    struct bitgen_matmul a = check->call;
    int64_t scratch_bytes = 0;
    int64_t kind = prepare(kernel, check, arena, &a, &scratch_bytes, found);
    if (kind) return kind;
    const uint32_t *out = check->floats ? (const uint32_t *)a.y : (const uint32_t *)a.acc;
    a.row_begin = 0;
    if (check->split) {
        a.row_end = check->split;
        kernel->run(&a);
        kind = compare(check, out, check->split, NULL, found);
        if (kind) return kind;
        a.row_begin = check->split;
    }
    a.row_end = a.m;
    kernel->run(&a);
    kind = compare(check, out, 0, check->expected, found);
    if (kind) return kind;
    const uint8_t *scratch = a.scratch;
    if (!is_filled(scratch - EDGE, EDGE, CANARY) ||
        !is_filled(scratch + scratch_bytes, round64(scratch_bytes) - scratch_bytes, CANARY) ||
        (a.tables && !is_filled(a.tables - EDGE, EDGE, CANARY)))
        return fail(found, HARNESS_OVERRUN, 0, 0, 0, 0);
    return HARNESS_RIGHT;
}

int64_t harness_check(const struct harness_kernel *candidate, const struct harness_check *checks, int64_t count,
                      int64_t first, const struct harness_arena *arena, volatile struct harness_progress *progress,
                      struct harness_mismatch *found)
{
    const struct bitgen_kernel kernel = host_kernel(candidate);
    memset(found, 0, sizeof *found);
    for (int64_t i = 0; i < count; ++i) {
        progress->item = first + i;
        const int64_t kind = one_check(&kernel, checks + i, arena, found);
        if (kind) {
            found->check = i;
            return kind;
        }
    }
    return HARNESS_RIGHT;
}

/* ---- time ---- */

static double read_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

static double now_ns(void) { return read_ns(CLOCK_MONOTONIC); }

/* `calls` whole matmuls, each with the next copy of the weights: where lanes share weights, the copy that none of
 * them read for the longest time. A large cache still holds what the lane before read. */
static int32_t run_lane(struct bitgen_context *ctx, struct harness_lane *lane, const struct bitgen_kernel *kernel,
                        int64_t calls)
{
    int32_t code = BITGEN_OK;
    for (int64_t i = 0; i < calls && !code; ++i) {
        const struct bitgen_call call = {
            .kernel = kernel,
            .w = lane->w + *lane->w_next * lane->w_step,
            .w_scale = kernel->group ? NULL : lane->w_scale,
            .w_scale_stride = kernel->group ? 2 : 1,
            .x = lane->x,
            .y = lane->y,
            .m = lane->m,
            .k = lane->k,
            .n = lane->n,
        };
        code = bitgen_run(ctx, &call);
        *lane->w_next = (*lane->w_next + 1) % lane->w_copies;
    }
    return code;
}

enum { TRIES = 3 };

/* The time of `calls` calls in *taken. What another process took from this thread is no time of the kernel: with
 * less than 90 % of the processor the calls are made again, TRIES times at most, and the shortest time counts. */
static int32_t time_lane(struct bitgen_context *ctx, struct harness_lane *lane, const struct bitgen_kernel *kernel,
                         int64_t calls, double *taken)
{
    for (int try = 0; try < TRIES; ++try) {
        const double cpu = read_ns(CLOCK_THREAD_CPUTIME_ID), begin = now_ns();
        const int32_t code = run_lane(ctx, lane, kernel, calls);
        const double wall = now_ns() - begin, own = read_ns(CLOCK_THREAD_CPUTIME_ID) - cpu;
        if (code) return code;
        if (try == 0 || wall < *taken) *taken = wall;
        if (own > 0.9 * wall) break;
    }
    return BITGEN_OK;
}

struct harness_timer {
    struct bitgen_context *ctx;
    struct harness_lane *lanes;
    struct bitgen_kernel *kernels; /* (count) */
    int64_t *calls;                /* (count) that take min_ns */
    int64_t count;
    double min_ns;
    volatile struct harness_progress *progress;
};

/* One call of each lane: to warm up, and to learn how many calls take min_ns. */
static int32_t warm_up(struct harness_timer *t)
{
    for (int64_t i = 0; i < t->count; ++i) {
        t->kernels[i] = host_kernel(&t->lanes[i].kernel);
        t->progress->item = i;
        const double begin = now_ns();
        const int32_t code = run_lane(t->ctx, t->lanes + i, t->kernels + i, 1);
        if (code) return code;
        t->calls[i] = (int64_t)(t->min_ns / (now_ns() - begin + 1)) + 1;
    }
    return BITGEN_OK;
}

int32_t harness_open(struct harness_timer **out, int64_t threads, struct harness_lane *lanes, int64_t count,
                     double min_ns, volatile struct harness_progress *progress)
{
    if (count < 1) return BITGEN_ERROR_ARGUMENT;
    struct harness_timer *t = *out = calloc(1, sizeof *t);
    if (!t) return BITGEN_ERROR_MEMORY;
    t->lanes = lanes;
    t->count = count;
    t->min_ns = min_ns;
    t->progress = progress;
    t->kernels = calloc((size_t)count, sizeof *t->kernels);
    t->calls = calloc((size_t)count, sizeof *t->calls);
    if (!t->kernels || !t->calls) return BITGEN_ERROR_MEMORY;
    const int32_t code = bitgen_context_open(&t->ctx, (int32_t)threads);
    return code ? code : warm_up(t);
}

int32_t harness_round(struct harness_timer *t, const int32_t *order, int64_t length, double *times)
{
    for (int64_t j = 0; j < length; ++j) {
        const int64_t i = order[j];
        t->progress->item = i;
        double taken;
        const int32_t code = time_lane(t->ctx, t->lanes + i, t->kernels + i, t->calls[i], &taken);
        if (code) return code;
        times[i] = taken / (double)t->calls[i];
        /* The first call was slow (cold code, first touches): later rounds must not become too short. */
        if (taken < 0.8 * t->min_ns) t->calls[i] = (int64_t)((double)t->calls[i] * t->min_ns / (taken + 1)) + 1;
    }
    return BITGEN_OK;
}

void harness_close(struct harness_timer *t)
{
    if (!t) return;
    if (t->ctx) bitgen_context_close(t->ctx);
    free(t->kernels);
    free(t->calls);
    free(t);
}

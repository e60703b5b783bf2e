/* Drives bitgen_run with a kernel that is plainly right (i2s_r16), for tests/test_host.py. */
#define _POSIX_C_SOURCE 200809L

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernel.h"
#include "pool.h"

static _Atomic int64_t g_calls, g_bad_ranges;

static void plain_run(const struct bitgen_matmul *a)
{
    int64_t chunks = (a->k + 15) / 16;
    atomic_fetch_add(&g_calls, 1);
    if (a->row_begin % 16 || (a->row_end % 16 && a->row_end != a->m) || a->row_end > a->m || a->n < 1 ||
        (uintptr_t)a->scratch % 64 || (uintptr_t)a->x % 64)
        atomic_fetch_add(&g_bad_ranges, 1);
    memset(a->scratch, 0x5a, 100);
    for (int64_t t = 0; t < a->n; ++t)
        for (int64_t row = a->row_begin; row < a->row_end; ++row) {
            int32_t acc = 0;
            for (int64_t c = 0; c < a->k; ++c) {
                const uint8_t *cell = a->w + ((row / 16) * chunks + c / 16) * 64;
                int s = (int)(c % 16) / 4, j = (int)(c % 16) % 4;
                acc += ((cell[4 * (row % 16) + j] >> 2 * s) & 3) * a->x[t * a->x_stride + c];
            }
            acc -= a->x_sum[t];
            if (a->tables) acc += a->tables[t * a->table_stride] - 7;
            if (a->acc) a->acc[t * a->out_stride + row] = acc;
            else a->y[t * a->out_stride + row] = (float)acc * (a->x_scale[t] * a->w_scale[row * a->w_scale_stride]);
        }
}

static int64_t plain_scratch(int64_t m, int64_t k, int64_t n)
{
    (void)m, (void)k, (void)n;
    return 100;
}

static int32_t plain_quantize(const float *x, int64_t k, int64_t k_pad, int8_t *xq, float *x_scale, int32_t *x_sum)
{
    float absmax = 0;
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) {
        if (!isfinite(x[i])) return 1;
        absmax = fmaxf(absmax, fabsf(x[i]));
    }
    float s = 127.0f / fmaxf(absmax, 1e-5f);
    memset(xq, 0, (size_t)k_pad);
    for (int64_t i = 0; i < k; ++i) {
        float q = rintf(x[i] * s);
        xq[i] = (int8_t)fmaxf(-128.0f, fminf(127.0f, q));
        sum += xq[i];
    }
    *x_scale = 1.0f / s;
    *x_sum = sum;
    return 0;
}

static void seven_tables(const int8_t *xq, int64_t k, uint8_t *tables)
{
    (void)xq;
    memset(tables, 7, (size_t)((k + 15) / 16 * 256));
}

static void empty_run(const struct bitgen_matmul *a) { (void)a; }
static int64_t no_scratch(int64_t m, int64_t k, int64_t n) { return (void)m, (void)k, (void)n, 0; }

static int32_t empty_quantize(const float *x, int64_t k, int64_t k_pad, int8_t *xq, float *x_scale, int32_t *x_sum)
{
    return (void)x, (void)k, (void)k_pad, (void)xq, (void)x_scale, (void)x_sum, 0;
}

static struct bitgen_kernel plain(int32_t grain, int32_t with_tables)
{
    struct bitgen_kernel kernel = {
        .name = "plain", .isa = "scalar", .family = "i2s", .schedule = "plain", .n_min = 1, .n_max = INT32_MAX,
        .row_block = 16, .k_chunk = 16, .chunk_bytes = 64, .row_grain = grain,
        .run = plain_run, .scratch = plain_scratch, .quantize = plain_quantize,
    };
    if (with_tables) {
        kernel.table_bytes = 256;
        kernel.tables = seven_tables;
    }
    return kernel;
}

/* Contexts are void * here: their struct is nothing the test declares. */
BITGEN_API int32_t test_open(void **ctx, int32_t threads)
{
    struct bitgen_context *made = NULL;
    int32_t code = bitgen_context_open(&made, threads);
    *ctx = made;
    return code;
}
BITGEN_API void test_close(void *ctx) { bitgen_context_close(ctx); }
BITGEN_API int64_t test_x_stride(int64_t k) { return bitgen_x_stride(k); }
BITGEN_API int64_t test_calls(void) { return atomic_exchange(&g_calls, 0); }
BITGEN_API int64_t test_bad_ranges(void) { return atomic_exchange(&g_bad_ranges, 0); }
BITGEN_API void test_set_busy(void *ctx, int32_t busy)
{
    atomic_store(&((struct bitgen_context *)ctx)->busy, busy);
}

BITGEN_API int32_t test_run(void *ctx, int32_t grain, int32_t with_tables, const uint8_t *w,
                            const float *w_scale, int64_t w_scale_stride, const float *x, const int8_t *xq, int64_t n,
                            int64_t m, int64_t k, float *y, int32_t *acc)
{
    struct bitgen_kernel kernel = plain(grain, with_tables);
    struct bitgen_call call = {&kernel, w, w_scale, w_scale_stride, x, xq, y, acc, m, k, n, NULL, NULL, NULL, NULL};
    return bitgen_run(ctx, &call);
}

static int compare(const void *a, const void *b)
{
    double d = *(const double *)a - *(const double *)b;
    return d < 0 ? -1 : d > 0;
}

/* Median nanoseconds of a call whose kernel does nothing, the pool being awake. */
BITGEN_API double test_overhead_ns(void *ctx, int64_t m, int64_t k, int32_t repeats)
{
    struct bitgen_kernel kernel = plain(16, 0);
    kernel.run = empty_run;
    kernel.scratch = no_scratch;
    kernel.quantize = empty_quantize;
    static float x[1];
    struct bitgen_call call = {.kernel = &kernel, .x = x, .y = x, .w_scale = x, .m = m, .k = k, .n = 1};
    double *times = malloc(sizeof *times * (size_t)repeats), median;
    for (int32_t i = 0; i < repeats; ++i) {
        struct timespec a, b;
        clock_gettime(CLOCK_MONOTONIC, &a);
        bitgen_run(ctx, &call);
        clock_gettime(CLOCK_MONOTONIC, &b);
        times[i] = 1e9 * (double)(b.tv_sec - a.tv_sec) + (double)(b.tv_nsec - a.tv_nsec);
    }
    qsort(times, (size_t)repeats, sizeof *times, compare);
    median = times[repeats / 2];
    free(times);
    return median;
}

/* A loop whose items count their visits. */
struct visits {
    _Atomic uint8_t *count;
    int64_t claim;
    _Atomic int32_t wide;
};

static void visit(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct visits *v = arg;
    (void)worker;
    if (end - begin > v->claim) atomic_store(&v->wide, 1);
    for (int64_t i = begin; i < end; ++i) atomic_fetch_add(&v->count[i], 1);
}

/* The number of items not visited exactly once, over `loops` loops of a pool. */
BITGEN_API int64_t test_pool(int32_t threads, int64_t items, int64_t claim, int32_t loops, int32_t pause_ns)
{
    struct bitgen_pool *pool;
    if (bitgen_pool_create(&pool, threads)) return -1;
    struct visits v = {.count = calloc((size_t)items, 1), .claim = claim};
    int64_t wrong = 0;
    for (int32_t loop = 0; loop < loops; ++loop) {
        memset((void *)v.count, 0, (size_t)items);
        bitgen_pool_run(pool, visit, &v, items, claim);
        for (int64_t i = 0; i < items; ++i) wrong += v.count[i] != 1;
        if (pause_ns) nanosleep(&(struct timespec){0, pause_ns}, NULL);
    }
    bitgen_pool_destroy(pool);
    free((void *)v.count);
    return wrong + (threads > 1 && items > claim ? v.wide : 0);
}

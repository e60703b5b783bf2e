/* One multiplication from activations to output: the public functions call it and the tuner times it.
 *
 *   phase 1, parallel over tokens:  x (n, k) -> xq, x_scale, x_sum
 *   phase 1b, over tokens and k:    the lookup tables of kernels that read them
 *   phase 2, parallel over rows:    the kernel, on ranges of rows (and of tokens when there are too few rows)
 *
 * int16 activations are two rows of int8 for each token, a plane each: kernels see twice as many tokens, and who has
 * multiplied a range joins its planes while they are in cache.
 *
 * Many tokens go in batches, so that work memory has a bound that does not depend on n.
 */
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE /* pages.h */

#include "arith.h"
#include "kernel.h"
#include "pages.h"
#include "system.h"

#include <stdlib.h>
#include <string.h>

enum {
    BATCH_BYTES = 16 << 20, /* activations and tables of a batch: they are read once for each row range, from L3 */
    BATCH_MIN = 64,         /* tokens; two balanced batches then still have the 17 that "large" kernels expect */
    CLAIMS = 8,             /* claims in the range of one thread: what the slowest thread may be late by is 1/8 */
    TOKENS_MIN = 32,        /* tokens of a group when tokens are split over threads */
    HUGE_PAGE = 2 << 20     /* bytes; half of one is enough to ask for it */
};
/* Weights x tokens below which a claim is not worth its atomic operations and cold start: 1 to 5 us. */
static const int64_t CLAIM_WORK = 1 << 18;
/* Activations below which quantising is not worth waking threads. */
static const int64_t QUANTIZE_WORK = 1 << 14;
/* Bytes of lookup tables in a piece: one is written in 1 us from the caches, in 7 us when they have been pushed out. */
static const int64_t TABLE_WORK = 1 << 15;

int64_t bitgen_x_stride(int64_t k)
{
    int64_t stride = ceil_div(k + BITGEN_X_PAD, BITGEN_X_ALIGN) * BITGEN_X_ALIGN;
    /* Rows a multiple of 2 KiB apart would compete for a few L1 sets. */
    return stride % 2048 ? stride : stride + BITGEN_X_ALIGN;
}

int64_t bitgen_row_stride(int64_t k, int64_t group)
{ return bitgen_x_stride(group ? bitgen_groups(k, group) * group : k); }

int32_t bitgen_quantize_row(bitgen_quantizer *quantize, const float *x, int64_t k, int64_t group, int64_t stride,
                            int8_t *xq, float *x_scale, int32_t *x_sum)
{
    if (!group) return quantize(x, k, stride, xq, x_scale, x_sum);
    const int64_t groups = bitgen_groups(k, group);
    int32_t found = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = g * group;
        found |= quantize(x + at, min64(group, k - at), group, xq + at, x_scale + g, x_sum + g);
    }
    memset(xq + groups * group, 0, (size_t)(stride - groups * group));
    return found;
}

int32_t bitgen_reserve(struct bitgen_buffer *buffer, int64_t bytes)
{
    if (bytes <= buffer->bytes) return BITGEN_OK;
    bitgen_free(buffer->data);
    const int64_t page = bytes >= HUGE_PAGE / 2 ? HUGE_PAGE : 64;
    bytes = ceil_div(bytes, page) * page;
    buffer->data = bitgen_allocate((size_t)page, (size_t)bytes);
    if (buffer->data && page == HUGE_PAGE) bitgen_want_huge_pages(buffer->data, (size_t)bytes);
    buffer->bytes = buffer->data ? bytes : 0;
    return buffer->data ? BITGEN_OK : BITGEN_ERROR_MEMORY;
}

int32_t bitgen_context_open(struct bitgen_context **out, int32_t threads)
{
    struct bitgen_context *ctx = calloc(1, sizeof *ctx);
    if (!ctx) return BITGEN_ERROR_MEMORY;
    ctx->threads = threads;
    ctx->owner = bitgen_process();
    int32_t code = bitgen_pool_create(&ctx->pool, threads);
    if (code) free(ctx);
    else *out = ctx;
    return code;
}

void bitgen_context_close(struct bitgen_context *ctx)
{
    if (bitgen_process() == ctx->owner) bitgen_pool_destroy(ctx->pool);
    else bitgen_pool_abandon(ctx->pool);
    bitgen_free(ctx->x.data);
    bitgen_free(ctx->x_sum.data);
    bitgen_free(ctx->x_scale.data);
    bitgen_free(ctx->tables.data);
    bitgen_free(ctx->scratch.data);
    bitgen_free(ctx->planes.data);
    bitgen_free(ctx->step.data);
    free(ctx->entries);
    free(ctx->preferred);
    free(ctx->nodes);
    free(ctx);
}

int32_t bitgen_enter(struct bitgen_context *ctx)
{
    if (bitgen_process() != ctx->owner) return BITGEN_ERROR_FORKED;
    return atomic_exchange_explicit(&ctx->busy, 1, memory_order_acquire) ? BITGEN_ERROR_BUSY : BITGEN_OK;
}

void bitgen_leave(struct bitgen_context *ctx) { atomic_store_explicit(&ctx->busy, 0, memory_order_release); }

/* The state of one batch, shared by the threads. */
struct batch {
    const struct bitgen_kernel *kernel;
    struct bitgen_matmul a; /* without row range and scratch; of all planes */
    const float *x;
    const int8_t *xq;
    bitgen_plane_quantizer *quantize_planes; /* NULL: int8 */
    int64_t planes;                          /* rows of a token */
    float *y;                                /* (tokens, m) where planes are joined; NULL: there is one */
    uint8_t *scratch;
    int64_t scratch_stride;
    int64_t table_items, table_item;         /* the grid of phase 1b: pieces of a token, chunks of a piece */
    int64_t row_items, row_item, token_item; /* the grid of phase 2: rows and tokens of an item */
    _Atomic int32_t not_finite;
};

/* int8 activations as they are: copy, pad, sum. */
static void copy_token(const int8_t *x, int64_t k, int64_t k_pad, int8_t *xq, int32_t *x_sum)
{
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += x[i];
    memcpy(xq, x, (size_t)k);
    memset(xq + k, 0, (size_t)(k_pad - k));
    *x_sum = sum;
}

static void activations_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct batch *batch = arg;
    const struct bitgen_matmul *a = &batch->a;
    (void)worker;
    const int64_t group = batch->kernel->group, groups = bitgen_groups(a->k, group), stride = a->x_stride;
    int32_t found = 0;
    for (int64_t t = begin; t < end; ++t) {
        int8_t *xq = (int8_t *)a->x + t * batch->planes * stride;
        int32_t *x_sum = (int32_t *)a->x_sum + t * batch->planes * groups;
        float *x_scale = (float *)a->x_scale + t * batch->planes * groups;
        const float *x = batch->x ? batch->x + t * a->k : NULL;
        if (batch->xq) copy_token(batch->xq + t * a->k, a->k, stride, xq, x_sum);
        else if (batch->quantize_planes) found |= batch->quantize_planes(x, a->k, group, stride, xq, x_scale, x_sum);
        else found |= bitgen_quantize_row(batch->kernel->quantize, x, a->k, group, stride, xq, x_scale, x_sum);
    }
    if (found) atomic_store_explicit(&batch->not_finite, 1, memory_order_relaxed);
}

/* Whole chunks of a group. */
static int64_t group_chunks(const struct bitgen_kernel *kernel) { return kernel->group / kernel->k_chunk; }

int64_t bitgen_kernel_chunks(const struct bitgen_kernel *kernel, int64_t k)
{ return kernel->group ? bitgen_groups(k, kernel->group) * group_chunks(kernel) : ceil_div(k, kernel->k_chunk); }

void bitgen_build_tables(const struct bitgen_kernel *kernel, const int8_t *x, int64_t k, int64_t begin, int64_t end,
                         uint8_t *tables)
{
    if (!kernel->group) {
        const int64_t from = begin * kernel->k_chunk;
        kernel->tables(x + from, min64(end * kernel->k_chunk, k) - from, tables);
        return;
    }
    const int64_t each = group_chunks(kernel);
    for (int64_t g = begin / each; g < end / each; ++g, tables += each * kernel->table_bytes)
        kernel->tables(x + g * kernel->group, each * kernel->k_chunk, tables);
}

/* Tables of a chunk follow from its activations alone, so a piece of a row is built like a row. */
static void tables_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    const struct batch *batch = arg;
    const struct bitgen_matmul *a = &batch->a;
    const int64_t chunks = bitgen_kernel_chunks(batch->kernel, a->k);
    (void)worker;
    for (int64_t i = begin; i < end; ++i) {
        int64_t t = i / batch->table_items, first = i % batch->table_items * batch->table_item;
        uint8_t *tables = (uint8_t *)a->tables + t * a->table_stride + first * batch->kernel->table_bytes;
        bitgen_build_tables(batch->kernel, a->x + t * a->x_stride, a->k, first,
                            min64(first + batch->table_item, chunks), tables);
    }
}

/* y = 256 high + low of a call's rows and of tokens from `token` on: of integers, scaled then, or of floats in groups,
 * whose scales have the 256. */
static void join_planes(const struct batch *batch, const struct bitgen_matmul *a, int64_t token)
{
    const int64_t rows = a->row_end - a->row_begin, grouped = batch->kernel->group;
    const float *w_scale = grouped ? NULL : a->w_scale + a->row_begin * a->w_scale_stride;
    for (int64_t t = 0; t < a->n; t += 2) {
        const int64_t high = t * a->out_stride + a->row_begin, low = high + a->out_stride;
        float *restrict y = batch->y + (token + t) / 2 * a->out_stride + a->row_begin;
        if (grouped) {
            for (int64_t r = 0; r < rows; ++r) y[r] = a->y[high + r] + a->y[low + r];
            continue;
        }
        const float x_scale = a->x_scale[t + 1];
        const int32_t *acc_high = a->acc + high, *acc_low = a->acc + low;
        if (a->w_scale_stride)
            for (int64_t r = 0; r < rows; ++r) y[r] = (float)(256 * acc_high[r] + acc_low[r]) * (x_scale * w_scale[r]);
        else
            for (int64_t r = 0; r < rows; ++r) y[r] = (float)(256 * acc_high[r] + acc_low[r]) * (x_scale * w_scale[0]);
    }
}

static void rows_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    const struct batch *batch = arg;
    struct bitgen_matmul a = batch->a;
    const int64_t groups = bitgen_groups(a.k, batch->kernel->group);
    if (batch->scratch) a.scratch = batch->scratch + worker * batch->scratch_stride;
    /* Items run through the rows of the first token group, then of the next: a claim may reach into another. */
    while (begin < end) {
        int64_t part = begin / batch->row_items, first = begin % batch->row_items;
        int64_t count = min64(end - begin, batch->row_items - first);
        int64_t token = part * batch->token_item;
        a.n = min64(batch->token_item, batch->a.n - token);
        a.x = batch->a.x + token * a.x_stride;
        a.x_sum = batch->a.x_sum + token * groups;
        a.x_scale = batch->a.x_scale + token * groups;
        if (batch->a.tables) a.tables = batch->a.tables + token * a.table_stride;
        if (batch->a.acc) a.acc = batch->a.acc + token * a.out_stride;
        if (batch->a.y) a.y = batch->a.y + token * a.out_stride;
        a.row_begin = first * batch->row_item;
        a.row_end = min64((first + count) * batch->row_item, a.m);
        batch->kernel->run(&a);
        if (batch->y) join_planes(batch, &a, token);
        begin += count;
    }
}

/* Bytes of the lookup tables of one token. */
static int64_t table_stride(const struct bitgen_kernel *kernel, int64_t k)
{ return bitgen_kernel_chunks(kernel, k) * kernel->table_bytes; }

/* Activations, tables, scratch and products of planes for `n` rows of activations at a time. */
static int32_t reserve_work(struct bitgen_context *ctx, const struct bitgen_call *call, int64_t n,
                            int64_t scratch_stride)
{
    int64_t k = call->k, group = call->kernel->group, own = call->rows ? 0 : n, scales = own * bitgen_groups(k, group);
    if (bitgen_reserve(&ctx->x, own * bitgen_row_stride(k, group)) || bitgen_reserve(&ctx->x_sum, scales * 4) ||
        bitgen_reserve(&ctx->x_scale, scales * 4) || bitgen_reserve(&ctx->tables, n * table_stride(call->kernel, k)) ||
        bitgen_reserve(&ctx->scratch, ctx->threads * scratch_stride) ||
        bitgen_reserve(&ctx->planes, call->quantize_planes ? n * call->m * 4 : 0))
        return BITGEN_ERROR_MEMORY;
    return BITGEN_OK;
}

static void run_activations(struct bitgen_context *ctx, struct batch *batch)
{
    int64_t n = batch->a.n / batch->planes, claim = ceil_div(QUANTIZE_WORK, batch->a.k);
    claim = max64(claim, n / (ctx->threads * CLAIMS));
    bitgen_pool_run(ctx->pool, activations_body, batch, n, claim);
}

static void run_tables(struct bitgen_context *ctx, struct batch *batch)
{
    int64_t chunks = bitgen_kernel_chunks(batch->kernel, batch->a.k);
    int64_t each = batch->kernel->group ? group_chunks(batch->kernel) : 1; /* a piece is whole groups */
    batch->table_item = max64(TABLE_WORK / batch->kernel->table_bytes / each, 1) * each;
    batch->table_items = ceil_div(chunks, batch->table_item);
    int64_t items = batch->a.n * batch->table_items;
    bitgen_pool_run(ctx->pool, tables_body, batch, items, max64(items / (ctx->threads * CLAIMS), 1));
}

static void run_rows(struct bitgen_context *ctx, struct batch *batch)
{
    const struct bitgen_matmul *a = &batch->a;
    /* Threads share row blocks, so that their ranges are even; a claim has as many as the kernel walks at once. */
    int64_t item = batch->kernel->row_block, grain = batch->kernel->row_grain / item;
    int64_t rows = ceil_div(a->m, batch->kernel->row_grain), groups = 1;
    if (rows < 2 * ctx->threads && ctx->threads > 1)
        groups = max64(1, min64(a->n / TOKENS_MIN, ceil_div(2 * ctx->threads, rows)));
    batch->row_item = item;
    batch->row_items = rows = ceil_div(a->m, item);
    batch->token_item = ceil_to(ceil_div(a->n, groups), batch->planes);
    groups = ceil_div(a->n, batch->token_item);
    int64_t claim = max64(rows * groups / (ctx->threads * CLAIMS), CLAIM_WORK / (item * a->k * batch->token_item));
    bitgen_pool_run(ctx->pool, rows_body, batch, rows * groups, ceil_div(max64(claim, 1), grain) * grain);
}

static int32_t run_batch(struct bitgen_context *ctx, const struct bitgen_call *call, int64_t begin, int64_t end,
                         int64_t scratch_stride)
{
    const struct bitgen_kernel *kernel = call->kernel;
    const int64_t planes = bitgen_planes(call), row = planes * begin;
    int64_t stride = bitgen_row_stride(call->k, kernel->group), groups = bitgen_groups(call->k, kernel->group);
    float *y = call->y ? call->y + begin * call->m : NULL;
    struct batch batch = {
        .kernel = kernel,
        .x = call->x ? call->x + begin * call->k : NULL,
        .xq = call->xq ? call->xq + begin * call->k : NULL,
        .quantize_planes = call->quantize_planes,
        .planes = planes,
        .y = call->quantize_planes ? y : NULL,
        .scratch = ctx->scratch.data,
        .scratch_stride = scratch_stride,
        .a =
            {
                .w = call->w,
                .x = call->rows ? call->rows + row * stride : ctx->x.data,
                .x_sum = call->rows ? call->x_sum + row * groups : ctx->x_sum.data,
                .tables = kernel->table_bytes ? ctx->tables.data : NULL,
                .x_scale = call->rows ? call->x_scale + row * groups : ctx->x_scale.data,
                .w_scale = call->w_scale,
                .acc = call->acc ? call->acc + begin * call->m : NULL,
                .y = y,
                .x_stride = stride,
                .table_stride = table_stride(kernel, call->k),
                .w_scale_stride = call->w_scale_stride,
                .out_stride = call->m,
                .m = call->m,
                .k = call->k,
                .n = planes * (end - begin),
            },
    };
    if (batch.y) {
        batch.a.y = kernel->group ? ctx->planes.data : NULL;
        batch.a.acc = kernel->group ? NULL : ctx->planes.data;
    }
    if (!call->rows) run_activations(ctx, &batch);
    if (atomic_load_explicit(&batch.not_finite, memory_order_relaxed)) return BITGEN_ERROR_NOT_FINITE;
    if (batch.a.tables) run_tables(ctx, &batch);
    run_rows(ctx, &batch);
    return BITGEN_OK;
}

int32_t bitgen_run_entered(struct bitgen_context *ctx, const struct bitgen_call *call)
{
    const struct bitgen_kernel *kernel = call->kernel;
    int64_t token_bytes = bitgen_row_stride(call->k, kernel->group) + table_stride(kernel, call->k);
    const int64_t planes = bitgen_planes(call);
    if (planes > 1) token_bytes = planes * (token_bytes + 4 * call->m);
    int64_t batches = ceil_div(call->n, max64(BATCH_MIN / planes, BATCH_BYTES / token_bytes));
    int64_t largest = planes * ceil_div(call->n, batches); /* rows of activations */
    int64_t scratch_stride = ceil_div(kernel->scratch(call->m, call->k, largest), 64) * 64;
    int32_t code = reserve_work(ctx, call, largest, scratch_stride);
    for (int64_t i = 0; i < batches && !code; ++i)
        code = run_batch(ctx, call, call->n * i / batches, call->n * (i + 1) / batches, scratch_stride);
    return code;
}

int32_t bitgen_run(struct bitgen_context *ctx, const struct bitgen_call *call)
{
    int32_t code = bitgen_enter(ctx);
    if (code) return code;
    code = bitgen_run_entered(ctx, call);
    bitgen_leave(ctx);
    return code;
}

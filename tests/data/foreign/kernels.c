/* Kernels in a program of their own: products come in on stdin, verdicts go out on stdout.
 *
 * Every buffer has exactly the bytes it is promised to have and ends where a forbidden page begins; compiled with
 * AddressSanitizer, which sees more but not what SVE loads and stores, it is from malloc. The kernels stand in
 * kernels.h.
 */
#define _DEFAULT_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "kernels.h"

enum { CANARY = 0x5a5a5a5a };

struct head {
    int64_t kernel, floats, m, k, n, x_stride, table_stride, out_stride, w_bytes, w_scales, split;
    int64_t groups, group, scale_bytes; /* of weights in groups; else 1, 0, 0 */
    int64_t table_k, chunks;            /* columns of a group's whole chunks and their number; else k, 0 */
};

enum buffers { W, X, X_SUM, X_SCALE, W_SCALE, EXPECTED, OUT, TABLES, SCRATCH, BUFFERS };

/* `bytes` bytes in place of the last ones of `which`. */
#ifdef __SANITIZE_ADDRESS__
static void *take(enum buffers which, int64_t bytes)
{
    static void *taken[BUFFERS];
    free(taken[which]);
    if (posix_memalign(&taken[which], 64, bytes ? (size_t)bytes : 1)) exit(2);
    return taken[which];
}
#else
static void *take(enum buffers which, int64_t bytes)
{
    enum { PAGE = 1 << 16 }; /* the largest of AArch64's */
    static uint8_t *end[BUFFERS];
    static int64_t size[BUFFERS];
    if (!end[which] || size[which] < bytes) {
        size[which] = (bytes / PAGE + 1) * PAGE;
        uint8_t *p = mmap(NULL, (size_t)size[which] + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED || mprotect(p + size[which], PAGE, PROT_NONE)) exit(2);
        end[which] = p + size[which];
    }
    return end[which] - bytes;
}
#endif

static void *buffer(enum buffers which, int64_t bytes, int filled)
{
    void *p = take(which, bytes);
    if (filled && bytes && fread(p, (size_t)bytes, 1, stdin) != 1) exit(3);
    return p;
}

/* 0 right; 1 wrong value, 2 outside the output's columns, 3 outside the range of rows: and where. */
static int64_t verdict(const struct head *h, const uint32_t *out, const uint32_t *expected, int64_t from, int64_t to,
                       int64_t *where)
{
    for (int64_t t = 0; t < h->n; ++t)
        for (int64_t r = 0; r < h->out_stride; ++r) {
            const int64_t at = t * h->out_stride + r;
            const uint32_t wanted = r >= from && r < to ? expected[t * h->m + r] : CANARY;
            *where = at;
            if (out[at] != wanted) return r >= h->m ? 2 : r >= from && r < to ? 1 : 3;
        }
    return 0;
}

static int64_t run(const struct head *h, int64_t *where)
{
    const struct kernel *kernel = &kernels[h->kernel];
    const int64_t n = h->n, out_bytes = 4 * n * h->out_stride;
    uint8_t *w = buffer(W, h->w_bytes, 1);
    int8_t *x = buffer(X, n * h->x_stride, 1);
    int32_t *x_sum = buffer(X_SUM, 4 * n * h->groups, 1);
    float *x_scale = buffer(X_SCALE, 4 * n * h->groups, 1), *w_scale = buffer(W_SCALE, 4 * h->w_scales, 1);
    uint32_t *expected = buffer(EXPECTED, 4 * n * h->m, 1), *out = buffer(OUT, out_bytes, 0);
    uint8_t *tables = buffer(TABLES, kernel->tables ? n * h->table_stride : 0, 0);
    if (kernel->tables)
        for (int64_t i = 0; i < n * h->groups; ++i) {
            const int64_t t = i / h->groups, g = i % h->groups;
            kernel->tables(x + t * h->x_stride + g * h->group, h->table_k,
                           tables + t * h->table_stride + g * h->chunks * kernel->table_bytes);
        }
    struct bitgen_matmul a = {
        .w = w, .x = x, .x_sum = x_sum, .tables = tables, .x_scale = x_scale, .w_scale = w_scale,
        .acc = h->floats ? NULL : (int32_t *)out, .y = h->floats ? (float *)out : NULL,
        .scratch = buffer(SCRATCH, kernel->scratch(h->m, h->k, n), 0),
        .x_stride = h->x_stride, .table_stride = h->table_stride, .w_scale_stride = h->group ? h->scale_bytes : h->w_scales > 1,
        .out_stride = h->out_stride, .m = h->m, .k = h->k, .n = n};
    int64_t result = 0, edges[3] = {0, h->split, h->m};
    for (int i = 0; i < 2 && !result; ++i) {
        if (edges[i] == edges[i + 1]) continue;
        for (int64_t j = 0; j < n * h->out_stride; ++j) out[j] = CANARY;
        a.row_begin = edges[i];
        a.row_end = edges[i + 1];
        kernel->run(&a);
        result = verdict(h, out, expected, edges[i], edges[i + 1], where);
    }
    return result;
}

int main(void)
{
    for (struct head h; fread(&h, sizeof h, 1, stdin) == 1;) {
        int64_t answer[2] = {0, 0};
        answer[0] = run(&h, &answer[1]);
        fwrite(answer, sizeof answer, 1, stdout);
        fflush(stdout); /* what came before a crash is known */
    }
    return 0;
}

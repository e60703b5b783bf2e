/* Kernels in a program of their own: products come in on stdin, verdicts go out on stdout.
 *
 * Every buffer has exactly the bytes it is promised to have, from an allocator of its own, so that a program
 * compiled with AddressSanitizer sees what is read or written beyond one. The kernels stand in kernels.h.
 */
#define _POSIX_C_SOURCE 200112L
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { CANARY = 0x5a5a5a5a };

struct head {
    int64_t kernel, floats, m, k, n, x_stride, table_stride, out_stride, w_bytes, w_scales, split;
};

static void *buffer(int64_t bytes, int filled)
{
    void *p = NULL;
    if (posix_memalign(&p, 64, bytes ? (size_t)bytes : 1)) exit(2);
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
    uint8_t *w = buffer(h->w_bytes, 1);
    int8_t *x = buffer(n * h->x_stride, 1);
    int32_t *x_sum = buffer(4 * n, 1);
    float *x_scale = buffer(4 * n, 1), *w_scale = buffer(4 * h->w_scales, 1);
    uint32_t *expected = buffer(4 * n * h->m, 1), *out = buffer(out_bytes, 0);
    uint8_t *tables = kernel->tables ? buffer(n * h->table_stride, 0) : NULL;
    if (kernel->tables)
        for (int64_t t = 0; t < n; ++t) kernel->tables(x + t * h->x_stride, h->k, tables + t * h->table_stride);
    struct bitgen_matmul a = {
        .w = w, .x = x, .x_sum = x_sum, .tables = tables, .x_scale = x_scale, .w_scale = w_scale,
        .acc = h->floats ? NULL : (int32_t *)out, .y = h->floats ? (float *)out : NULL,
        .scratch = buffer(kernel->scratch(h->m, h->k, n), 0),
        .x_stride = h->x_stride, .table_stride = h->table_stride, .w_scale_stride = h->w_scales > 1,
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
    free(w), free(x), free(x_sum), free(x_scale), free(w_scale), free(expected), free(out), free(tables);
    free(a.scratch);
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

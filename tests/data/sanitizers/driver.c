/* Runs every kernel of kernels.h on every problem of a file, with buffers of exactly the promised sizes, and compares
   with plain loops. It is compiled with sanitizers: a read or write beside a buffer ends it. Usage: driver FILE [name]
   where name is a buffer that is to be too small, to show that this is noticed. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

static const char *too_small = "";

/* The end of the buffer is the end of the allocation. */
static void *buffer(const char *name, size_t count, size_t size) {
    void *p = NULL;
    /* scratch has room for whole tiles of tokens, so that one byte less is no harm */
    if (count && !strcmp(name, too_small)) count -= strcmp(name, "scratch") ? 1 : count / 2;
    if (posix_memalign(&p, 64, count ? count * size : 1)) exit(3);
    memset(p, 0x5a, count * size);
    return p;
}

static void fill(FILE *file, void *p, size_t bytes) {
    if (fread(p, 1, bytes, file) != bytes) exit(4);
}

static int64_t number(FILE *file) {
    int64_t value;
    fill(file, &value, sizeof value);
    return value;
}

static void check(const struct kernel *kernel, int64_t m, int64_t k, int64_t n, const int8_t *w, const float *x,
                  const uint8_t *packed, int64_t x_stride, int per_row) {
    const int64_t chunks = (k + kernel->k_chunk - 1) / kernel->k_chunk;
    const int64_t table_stride = chunks * kernel->table_bytes;
    struct bitgen_matmul a = {.x_stride = x_stride, .table_stride = table_stride, .w_scale_stride = per_row,
                              .out_stride = m, .m = m, .k = k, .n = n};
    int8_t *xq = buffer("x", (size_t)(n * x_stride), 1);
    int32_t *x_sum = buffer("x_sum", (size_t)n, 4);
    float *x_scale = buffer("x_scale", (size_t)n, 4);
    float *w_scale = buffer("w_scale", per_row ? (size_t)m : 1, 4);
    uint8_t *tables = table_stride ? buffer("tables", (size_t)(n * table_stride), 1) : NULL;
    int32_t *acc = buffer("acc", (size_t)(n * m), 4);
    float *y = buffer("y", (size_t)(n * m), 4);
    void *scratch = buffer("scratch", (size_t)kernel->scratch(m, k, n), 1);
    for (int64_t i = 0; i < (per_row ? m : 1); ++i) w_scale[i] = 0.25f + (float)i;
    for (int64_t t = 0; t < n; ++t) {
        /* a copy of its own, so that a read behind the last float is noticed */
        float *row = buffer("floats", (size_t)k, 4);
        memcpy(row, x + t * k, (size_t)k * 4);
        if (kernel->quantize(row, k, x_stride, xq + t * x_stride, x_scale + t, x_sum + t)) exit(5);
        free(row);
        if (tables) kernel->tables(xq + t * x_stride, k, tables + t * table_stride);
    }
    a.w = packed;
    a.x = xq;
    a.x_sum = x_sum;
    a.tables = tables;
    a.x_scale = x_scale;
    a.w_scale = w_scale;
    a.scratch = scratch;
    const int64_t blocks = (m + kernel->row_block - 1) / kernel->row_block;
    for (int floats = 0; floats < 2; ++floats) {
        a.acc = floats ? NULL : acc;
        a.y = floats ? y : NULL;
        a.row_begin = 0; /* two ranges, as two threads take them; the first may be empty */
        a.row_end = blocks / 2 * kernel->row_block;
        if (a.row_end) kernel->run(&a);
        a.row_begin = a.row_end;
        a.row_end = m;
        kernel->run(&a);
    }
    for (int64_t t = 0; t < n; ++t)
        for (int64_t i = 0; i < m; ++i) {
            int32_t sum = 0;
            for (int64_t j = 0; j < k; ++j) sum += w[i * k + j] * xq[t * x_stride + j];
            const float scaled = (float)sum * (x_scale[t] * w_scale[per_row ? i : 0]);
            if (acc[t * m + i] != sum || memcmp(&y[t * m + i], &scaled, 4)) {
                printf("%s: m %d k %d n %d row %d token %d: %d, not %d\n", kernel->name, (int)m, (int)k, (int)n, (int)i,
                       (int)t, acc[t * m + i], sum);
                exit(6);
            }
        }
    free(xq), free(x_sum), free(x_scale), free(w_scale), free(tables), free(acc), free(y), free(scratch);
}

/* A CPU that has tile registers gives them to who asks; the answer of others does not matter here. */
static void ask_for_tiles(void) {
#ifdef __x86_64__
    (void)!syscall(SYS_arch_prctl, 0x1023, 18);
#endif
}

int main(int argc, char **argv) {
    ask_for_tiles();
    FILE *file = fopen(argv[1], "rb");
    if (!file) return 2;
    if (argc > 2) too_small = argv[2];
    int runs = 0;
    /* m, k, n, x_stride; w (m, k); x (n, k); then for each layout its row block, bytes and packed weights */
    for (int64_t problems = number(file); problems > 0; --problems) {
        const int64_t m = number(file), k = number(file), n = number(file), x_stride = number(file);
        int8_t *w = malloc((size_t)(m * k));
        float *x = malloc((size_t)(n * k) * 4);
        fill(file, w, (size_t)(m * k));
        fill(file, x, (size_t)(n * k) * 4);
        for (int64_t layouts = number(file); layouts > 0; --layouts) {
            const int64_t layout = number(file), bytes = number(file);
            uint8_t *read = malloc((size_t)bytes), *packed = buffer("w", (size_t)bytes, 1);
            fill(file, read, (size_t)bytes);
            memcpy(packed, read, (size_t)bytes - (strcmp(too_small, "w") == 0));
            for (size_t i = 0; i < sizeof kernels / sizeof *kernels; ++i)
                if (kernels[i].layout == layout && kernels[i].n_min <= n && n <= kernels[i].n_max) {
                    check(kernels + i, m, k, n, w, x, packed, x_stride, runs % 2);
                    ++runs;
                }
            free(read);
            free(packed);
        }
        free(w);
        free(x);
    }
    fclose(file);
    printf("%d runs\n", runs);
    return 0;
}

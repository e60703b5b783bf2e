/* Every misuse of the C interface gets its error code, and nothing outside a buffer is touched.
 *
 * C99 without threads of its own, except where it takes two callers to be busy. Prints OK and the number of
 * checks, or the line of each check that failed.
 */
#define _POSIX_C_SOURCE 200809L

#include <bitgen.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif

static int checks, failures;

#define CHECK(condition)                                                 \
    do {                                                                 \
        ++checks;                                                        \
        if (!(condition)) {                                              \
            ++failures;                                                  \
            printf("FAILED line %d: %s\n", __LINE__, #condition);        \
        }                                                                \
    } while (0)

enum { CANARY = 0x5c, GUARD = 256 };

/* `bytes` bytes at a multiple of `alignment` plus `offset`, canaries on both sides. */
struct buffer {
    uint8_t *memory, *data;
    size_t bytes, before;
};

static struct buffer make(size_t bytes, size_t alignment, size_t offset)
{
    struct buffer b = {NULL, NULL, bytes, 0};
    size_t total = bytes + 2 * GUARD + alignment + offset;
    b.memory = malloc(total);
    if (!b.memory) exit(2);
    memset(b.memory, CANARY, total);
    b.data = b.memory + GUARD;
    b.data += (alignment - (uintptr_t)b.data % alignment) % alignment + offset;
    b.before = (size_t)(b.data - b.memory);
    return b;
}

static int intact(const struct buffer *b)
{
    for (size_t i = 0; i < GUARD; ++i)
        if (b->data[b->bytes + i] != CANARY || b->data[-1 - (ptrdiff_t)i] != CANARY) return 0;
    return 1;
}

static int untouched(const struct buffer *b)
{
    for (size_t i = 0; i < b->bytes; ++i)
        if (b->data[i] != CANARY) return 0;
    return intact(b);
}

static uint32_t random_bits(void)
{
    static uint32_t state = 7;
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

/* One shape, every regime: the integers and floats of a naive loop, canaries behind every buffer. */
static void check_shape(bitgen_context *ctx, int m, int k)
{
    static const int tokens[] = {1, 2, 7, 16, 17, 33};
    struct buffer w = make((size_t)m * (size_t)k, 1, 1), scale = make(4 * (size_t)m, 4, 4);
    size_t bytes = 0;
    CHECK(bitgen_packed_bytes(ctx, m, k, &bytes) == BITGEN_OK);
    struct buffer packed = make(bytes, 64, 0);
    for (size_t i = 0; i < w.bytes; ++i) ((int8_t *)w.data)[i] = (int8_t)(random_bits() % 3) - 1;
    for (int i = 0; i < m; ++i) ((float *)(void *)scale.data)[i] = 0.25f + (float)(random_bits() % 64) / 64.0f;
    CHECK(bitgen_pack(ctx, (int8_t *)w.data, m, k, packed.data, bytes) == BITGEN_OK);
    CHECK(bitgen_check_packed(ctx, packed.data, bytes, m, k) == BITGEN_OK);
    CHECK(intact(&w) && intact(&packed));
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; ++i) {
        size_t n = (size_t)tokens[i];
        struct buffer x = make(4 * n * (size_t)k, 4, 4), xq = make(n * (size_t)k, 1, 3);
        struct buffer y = make(4 * n * (size_t)m, 4, 4), acc = make(4 * n * (size_t)m, 4, 4), xs = make(4 * n, 4, 0);
        const float *xf = (float *)(void *)x.data, *wf = (float *)(void *)scale.data;
        const float *yf = (float *)(void *)y.data, *sf = (float *)(void *)xs.data;
        const int32_t *a = (int32_t *)(void *)acc.data;
        for (size_t j = 0; j < n * (size_t)k; ++j)
            ((float *)(void *)x.data)[j] = (float)(random_bits() % 2001) / 1000.0f - 1.0f;
        CHECK(bitgen_quantize(ctx, xf, tokens[i], k, (int8_t *)xq.data, (float *)(void *)xs.data) == BITGEN_OK);
        CHECK(bitgen_accumulate(ctx, packed.data, (int8_t *)xq.data, tokens[i], m, k, (int32_t *)(void *)acc.data) == BITGEN_OK);
        CHECK(bitgen_matmul(ctx, packed.data, wf, m, xf, tokens[i], m, k, (float *)(void *)y.data) == BITGEN_OK);
        int wrong = 0;
        for (size_t t = 0; t < n; ++t)
            for (int row = 0; row < m; ++row) {
                int32_t sum = 0;
                for (int j = 0; j < k; ++j)
                    sum += ((int8_t *)w.data)[row * k + j] * ((int8_t *)xq.data)[t * (size_t)k + (size_t)j];
                wrong += a[t * (size_t)m + (size_t)row] != sum;
                wrong += yf[t * (size_t)m + (size_t)row] != (float)sum * (sf[t] * wf[row]);
            }
        CHECK(wrong == 0);
        CHECK(intact(&x) && intact(&xq) && intact(&y) && intact(&acc) && intact(&xs) && intact(&scale) && intact(&packed));
        free(x.memory), free(xq.memory), free(y.memory), free(acc.memory), free(xs.memory);
    }
    free(w.memory), free(scale.memory), free(packed.memory);
}

static void check_context(void)
{
    bitgen_context *ctx = NULL;
    int32_t a, b;
    CHECK(bitgen_abi_version() == BITGEN_ABI_VERSION);
    CHECK(bitgen_struct_sizes(&a, &b) == BITGEN_OK);
    CHECK(a == (int32_t)sizeof(struct bitgen_kernel_info) && b == (int32_t)sizeof(struct bitgen_packed_header));
    CHECK(bitgen_struct_sizes(NULL, &b) == BITGEN_ERROR_NULL);
    CHECK(bitgen_context_create(NULL, 1, 0) == BITGEN_ERROR_NULL);
    CHECK(bitgen_context_create(&ctx, -1, 0) == BITGEN_ERROR_ARGUMENT && !ctx);
    CHECK(bitgen_context_create(&ctx, 100000, 0) == BITGEN_ERROR_ARGUMENT && !ctx);
    CHECK(bitgen_context_create(&ctx, 1, 0x80) == BITGEN_ERROR_ARGUMENT && !ctx);
    CHECK(bitgen_context_threads(NULL) == 0);
    bitgen_context_destroy(NULL);
    CHECK(bitgen_context_create(&ctx, 0, 0) == BITGEN_OK);
    CHECK(bitgen_context_threads(ctx) >= 1);
    bitgen_context_destroy(ctx);
}

static void check_table(void)
{
    struct bitgen_kernel_info info;
    CHECK(bitgen_kernel_count() > 0);
    CHECK(bitgen_kernel_info(0, NULL) == BITGEN_ERROR_NULL);
    CHECK(bitgen_kernel_info(-1, &info) == BITGEN_ERROR_ARGUMENT);
    CHECK(bitgen_kernel_info(bitgen_kernel_count(), &info) == BITGEN_ERROR_ARGUMENT);
    for (int32_t i = 0; i < bitgen_kernel_count(); ++i) {
        CHECK(bitgen_kernel_info(i, &info) == BITGEN_OK);
        CHECK(!strncmp(info.name, "bitgen_", 7) && info.n_min >= 1 && info.n_max >= info.n_min);
        CHECK((info.m == 0) == (info.threads == 0) && info.row_block % 16 == 0);
    }
}

static void check_messages(void)
{
    for (int32_t i = BITGEN_OK; i <= BITGEN_ERROR_CODES; ++i) {
        CHECK(strlen(bitgen_error_message(i)) > 5);
        CHECK(strcmp(bitgen_error_message(i), "unknown error code"));
    }
    CHECK(!strcmp(bitgen_error_message(-1), "unknown error code"));
    CHECK(!strcmp(bitgen_error_message(BITGEN_ERROR_CODES + 1), "unknown error code"));
}

static void check_bundles(void)
{
    void *library = &library;
    char reason[8] = "?";
    CHECK(bitgen_bundle_open(NULL, &library, NULL, 0) == BITGEN_ERROR_NULL);
    CHECK(bitgen_bundle_open(".", NULL, NULL, 0) == BITGEN_ERROR_NULL);
    CHECK(bitgen_bundle_open(".", &library, NULL, 1) == BITGEN_ERROR_NULL);
    CHECK(bitgen_bundle_open(".", &library, reason, -1) == BITGEN_ERROR_ARGUMENT && library);
    CHECK(bitgen_bundle_open("/nowhere", &library, NULL, 0) == BITGEN_ERROR_BUNDLE && !library);
    CHECK(bitgen_bundle_open("/nowhere", &library, reason, sizeof reason) == BITGEN_ERROR_BUNDLE);
    CHECK(!strcmp(reason, "cannot ")); /* cut, and it ends */
}

enum { M = 20, K = 100, N = 3 };

static int8_t w[M * K], xq[N * K];
static float w_scale[M], x[N * K], x_scale[N];

static void check_packing(bitgen_context *ctx, struct buffer *packed, size_t bytes)
{
    size_t other;
    CHECK(bitgen_packed_bytes(NULL, M, K, &other) == BITGEN_ERROR_NULL);
    CHECK(bitgen_packed_bytes(ctx, M, K, NULL) == BITGEN_ERROR_NULL);
    CHECK(bitgen_packed_bytes(ctx, 0, K, &other) == BITGEN_ERROR_SHAPE);
    CHECK(bitgen_packed_bytes(ctx, M, -1, &other) == BITGEN_ERROR_SHAPE);
    CHECK(bitgen_packed_bytes(ctx, M, 524289, &other) == BITGEN_ERROR_SHAPE);
    CHECK(bitgen_packed_bytes(ctx, INT64_MAX, K, &other) == BITGEN_ERROR_SHAPE);
    CHECK(bitgen_pack(NULL, w, M, K, packed->data, bytes) == BITGEN_ERROR_NULL);
    CHECK(bitgen_pack(ctx, NULL, M, K, packed->data, bytes) == BITGEN_ERROR_NULL);
    CHECK(bitgen_pack(ctx, w, M, K, NULL, bytes) == BITGEN_ERROR_NULL);
    CHECK(bitgen_pack(ctx, w, M, K, packed->data + 4, bytes) == BITGEN_ERROR_ALIGNMENT);
    CHECK(bitgen_pack(ctx, w, 0, K, packed->data, bytes) == BITGEN_ERROR_SHAPE);
    CHECK(bitgen_pack(ctx, w, M, K, packed->data, bytes - 1) == BITGEN_ERROR_BUFFER_SIZE);
    CHECK(untouched(packed));
    for (int bad = -128; bad < 128; bad += 3) {
        if (bad >= -1 && bad <= 1) continue;
        w[M * K - 1] = (int8_t)bad;
        CHECK(bitgen_pack(ctx, w, M, K, packed->data, bytes) == BITGEN_ERROR_NOT_TERNARY);
        CHECK(bitgen_accumulate(ctx, packed->data, xq, 1, M, K, (int32_t[M]){0}) == BITGEN_ERROR_NOT_PACKED);
    }
    w[M * K - 1] = 0;
    CHECK(bitgen_pack(ctx, w, M, K, packed->data, bytes) == BITGEN_OK);
    w[0] = 2; /* what was packed before must not be taken for the result of a failed call */
    CHECK(bitgen_pack(ctx, w, M, K, packed->data, bytes) == BITGEN_ERROR_NOT_TERNARY);
    CHECK(bitgen_check_packed(ctx, packed->data, bytes, M, K) == BITGEN_ERROR_NOT_PACKED);
    w[0] = 0;
    CHECK(bitgen_pack(ctx, w, M, K, packed->data, bytes) == BITGEN_OK);
    CHECK(intact(packed));
}

/* A copy of the packed weights with a changed header. */
static int32_t with_header(bitgen_context *ctx, const struct buffer *packed, const struct bitgen_packed_header *header)
{
    struct buffer copy = make(packed->bytes, 64, 0);
    float y[N * M];
    memcpy(copy.data, packed->data, packed->bytes);
    memcpy(copy.data, header, sizeof *header);
    int32_t code = bitgen_matmul(ctx, copy.data, w_scale, 1, x, N, M, K, y);
    CHECK(bitgen_check_packed(ctx, copy.data, copy.bytes, M, K) == code);
    free(copy.memory);
    return code;
}

static void check_headers(bitgen_context *ctx, const struct buffer *packed)
{
    struct bitgen_packed_header right, h;
    memcpy(&right, packed->data, sizeof right);
    CHECK(right.magic == BITGEN_PACKED_MAGIC && right.m == M && right.k == K && right.bytes == packed->bytes);
    h = right, h.magic ^= 1;
    CHECK(with_header(ctx, packed, &h) == BITGEN_ERROR_NOT_PACKED);
    h = right, h.layout_version = 99;
    CHECK(with_header(ctx, packed, &h) == BITGEN_ERROR_LAYOUT_VERSION);
    h = right, h.row_block = 48;
    CHECK(with_header(ctx, packed, &h) == BITGEN_ERROR_LAYOUT);
    h = right, memset(h.family, 'z', sizeof h.family);
    CHECK(with_header(ctx, packed, &h) == BITGEN_ERROR_LAYOUT);
    h = right, h.m = M + 1;
    CHECK(with_header(ctx, packed, &h) == BITGEN_ERROR_SHAPE);
    h = right, h.m = -5;
    CHECK(with_header(ctx, packed, &h) == BITGEN_ERROR_NOT_PACKED);
    h = right, h.m = 0, h.bytes = sizeof h;
    CHECK(with_header(ctx, packed, &h) == BITGEN_ERROR_NOT_PACKED);
    h = right, h.scale_type = 1;
    CHECK(with_header(ctx, packed, &h) == BITGEN_ERROR_LAYOUT);
    h = right, h.group = 100;
    CHECK(with_header(ctx, packed, &h) == BITGEN_ERROR_LAYOUT);
    h = right, h.group = 64, h.row_block = 16; /* there are such weights, of another size */
    memset(h.family, 0, sizeof h.family), memcpy(h.family, "i2s", 3);
    CHECK(with_header(ctx, packed, &h) == BITGEN_ERROR_NOT_PACKED);
    h = right, h.bytes += 64;
    CHECK(with_header(ctx, packed, &h) == BITGEN_ERROR_NOT_PACKED);
    CHECK(with_header(ctx, packed, &right) == BITGEN_OK);
    int32_t index;
    size_t bytes = 0;
    struct buffer huge = make(sizeof h, 64, 0); /* n x m floats that no address space holds */
    CHECK(bitgen_packed_bytes(ctx, (int64_t)1 << 31, 1, &bytes) == BITGEN_OK);
    h = right, h.m = (int64_t)1 << 31, h.k = 1, h.bytes = bytes;
    memcpy(huge.data, &h, sizeof h);
    CHECK(bitgen_kernel_choice(ctx, huge.data, 1, &index) == BITGEN_OK);
    CHECK(bitgen_kernel_choice(ctx, huge.data, INT32_MAX, &index) == BITGEN_ERROR_SHAPE);
    free(huge.memory);
    CHECK(bitgen_check_packed(ctx, packed->data, packed->bytes - 1, M, K) == BITGEN_ERROR_BUFFER_SIZE);
    CHECK(bitgen_check_packed(ctx, packed->data, 8, M, K) == BITGEN_ERROR_BUFFER_SIZE);
    CHECK(bitgen_check_packed(ctx, packed->data, packed->bytes, K, M) == BITGEN_ERROR_SHAPE);
    CHECK(bitgen_check_packed(ctx, NULL, packed->bytes, M, K) == BITGEN_ERROR_NULL);
    CHECK(bitgen_check_packed(NULL, packed->data, packed->bytes, M, K) == BITGEN_ERROR_NULL);
}

static void check_multiplying(bitgen_context *ctx, const void *packed)
{
    struct buffer out = make(4 * N * M, 4, 0);
    float *y = (float *)(void *)out.data;
    int32_t *acc = (int32_t *)(void *)out.data, index;
    CHECK(bitgen_matmul(NULL, packed, w_scale, 1, x, N, M, K, y) == BITGEN_ERROR_NULL);
    CHECK(bitgen_matmul(ctx, NULL, w_scale, 1, x, N, M, K, y) == BITGEN_ERROR_NULL);
    CHECK(bitgen_matmul(ctx, packed, NULL, 1, x, N, M, K, y) == BITGEN_ERROR_NULL);
    CHECK(bitgen_matmul(ctx, packed, w_scale, 1, NULL, N, M, K, y) == BITGEN_ERROR_NULL);
    CHECK(bitgen_matmul(ctx, packed, w_scale, 1, x, N, M, K, NULL) == BITGEN_ERROR_NULL);
    CHECK(bitgen_matmul(ctx, packed, w_scale, 2, x, N, M, K, y) == BITGEN_ERROR_SCALE_COUNT);
    CHECK(bitgen_matmul(ctx, packed, w_scale, 0, x, N, M, K, y) == BITGEN_ERROR_SCALE_COUNT);
    CHECK(bitgen_matmul(ctx, (const char *)packed + 4, w_scale, 1, x, N, M, K, y) == BITGEN_ERROR_ALIGNMENT);
    CHECK(bitgen_matmul(ctx, packed, w_scale, 1, x, N, M, K + 1, y) == BITGEN_ERROR_SHAPE);
    CHECK(bitgen_matmul(ctx, packed, w_scale, 1, x, N, M - 1, K, y) == BITGEN_ERROR_SHAPE);
    CHECK(bitgen_matmul(ctx, packed, w_scale, 1, x, 0, M, K, y) == BITGEN_ERROR_SHAPE);
    CHECK(bitgen_matmul(ctx, packed, w_scale, 1, x, -1, M, K, y) == BITGEN_ERROR_SHAPE);
    CHECK(bitgen_matmul(ctx, packed, w_scale, 1, x, INT64_MAX, M, K, y) == BITGEN_ERROR_SHAPE);
    CHECK(bitgen_accumulate(NULL, packed, xq, N, M, K, acc) == BITGEN_ERROR_NULL);
    CHECK(bitgen_accumulate(ctx, NULL, xq, N, M, K, acc) == BITGEN_ERROR_NULL);
    CHECK(bitgen_accumulate(ctx, packed, NULL, N, M, K, acc) == BITGEN_ERROR_NULL);
    CHECK(bitgen_accumulate(ctx, packed, xq, N, M, K, NULL) == BITGEN_ERROR_NULL);
    CHECK(bitgen_accumulate(ctx, packed, xq, 0, M, K, acc) == BITGEN_ERROR_SHAPE);
    CHECK(bitgen_quantize(NULL, x, N, K, xq, x_scale) == BITGEN_ERROR_NULL);
    CHECK(bitgen_quantize(ctx, NULL, N, K, xq, x_scale) == BITGEN_ERROR_NULL);
    CHECK(bitgen_quantize(ctx, x, N, K, NULL, x_scale) == BITGEN_ERROR_NULL);
    CHECK(bitgen_quantize(ctx, x, N, K, xq, NULL) == BITGEN_ERROR_NULL);
    CHECK(bitgen_quantize(ctx, x, 0, K, xq, x_scale) == BITGEN_ERROR_SHAPE);
    CHECK(bitgen_quantize(ctx, x, N, 0, xq, x_scale) == BITGEN_ERROR_SHAPE);
    CHECK(bitgen_kernel_choice(NULL, packed, N, &index) == BITGEN_ERROR_NULL);
    CHECK(bitgen_kernel_choice(ctx, packed, N, NULL) == BITGEN_ERROR_NULL);
    CHECK(bitgen_kernel_choice(ctx, NULL, N, &index) == BITGEN_ERROR_NULL);
    CHECK(bitgen_kernel_choice(ctx, packed, 0, &index) == BITGEN_ERROR_SHAPE);
    CHECK(untouched(&out));
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; ++i)
        for (int at = 0; at < N * K; at += K - 1) {
            float was = x[at];
            x[at] = bad[i];
            CHECK(bitgen_matmul(ctx, packed, w_scale, 1, x, N, M, K, y) == BITGEN_ERROR_NOT_FINITE);
            CHECK(bitgen_quantize(ctx, x, N, K, xq, x_scale) == BITGEN_ERROR_NOT_FINITE);
            x[at] = was;
        }
    CHECK(bitgen_matmul(ctx, packed, w_scale, 1, x, N, M, K, y) == BITGEN_OK);
    CHECK(intact(&out));
    free(out.memory);
}

/* Threads of the context that a child makes. An emulator that cannot start threads in one asks for 1: `misuse 1`. */
static float scales[M * ((K + 31) / 32)];

/* Weights in groups; `bytes`: enough for them. */
static void check_groups(bitgen_context *ctx)
{
    static float y[N * M];
    static int32_t acc[N * M];
    int32_t type;
    size_t halves = 0, floats = 0;
    struct bitgen_packed_header h;
    for (size_t i = 0; i < sizeof scales / sizeof *scales; ++i) scales[i] = 0.5f;
    CHECK(bitgen_group_scale_type(scales, M, &type) == BITGEN_OK && type == BITGEN_SCALE_F16);
    CHECK(bitgen_group_scale_type(NULL, M, &type) == BITGEN_ERROR_NULL);
    CHECK(bitgen_group_scale_type(scales, 0, &type) == BITGEN_ERROR_SHAPE);
    CHECK(bitgen_group_packed_bytes(ctx, M, K, 32, BITGEN_SCALE_F16, &halves) == BITGEN_OK);
    CHECK(bitgen_group_packed_bytes(ctx, M, K, 32, BITGEN_SCALE_F32, &floats) == BITGEN_OK && floats > halves);
    for (int64_t group = -1; group < 300; ++group) {
        const int known = group == 32 || group == 64 || group == 128 || group == 256;
        const int32_t code = bitgen_group_packed_bytes(ctx, M, K, group, BITGEN_SCALE_F16, &halves);
        CHECK(code == (known ? BITGEN_OK : BITGEN_ERROR_ARGUMENT));
    }
    CHECK(bitgen_group_packed_bytes(ctx, M, K, 32, 2, &halves) == BITGEN_ERROR_ARGUMENT);
    CHECK(bitgen_group_packed_bytes(ctx, M, K, 32, BITGEN_SCALE_F16, &halves) == BITGEN_OK);
    CHECK(bitgen_group_packed_layout(ctx, M, K, 32, BITGEN_SCALE_F16, &h) == BITGEN_OK && h.group == 32);
    CHECK(bitgen_group_packed_layout(ctx, M, K, 0, BITGEN_SCALE_F16, &h) == BITGEN_ERROR_ARGUMENT);
    struct buffer packed = make(halves, 64, 0);
    CHECK(bitgen_pack_groups(ctx, w, NULL, M, K, 32, packed.data, halves) == BITGEN_ERROR_NULL);
    CHECK(bitgen_pack_groups(ctx, w, scales, M, K, 0, packed.data, halves) == BITGEN_ERROR_ARGUMENT);
    CHECK(bitgen_pack_groups(ctx, w, scales, M, K, 32, packed.data, halves - 1) == BITGEN_ERROR_BUFFER_SIZE);
    scales[1] = 0.1f; /* no half float: needs more than `halves` */
    CHECK(bitgen_pack_groups(ctx, w, scales, M, K, 32, packed.data, halves) == BITGEN_ERROR_BUFFER_SIZE);
    CHECK(bitgen_pack_group_rows(ctx, w, scales, 0, M, M, K, 32, BITGEN_SCALE_F16, packed.data, halves) ==
          BITGEN_ERROR_SCALES);
    CHECK(bitgen_check_packed(ctx, packed.data, halves, M, K) == BITGEN_ERROR_NOT_PACKED);
    scales[1] = 0.5f;
    CHECK(bitgen_pack_groups(ctx, w, scales, M, K, 32, packed.data, halves) == BITGEN_OK && intact(&packed));
    CHECK(bitgen_check_packed(ctx, packed.data, halves, M, K) == BITGEN_OK);
    CHECK(bitgen_matmul(ctx, packed.data, w_scale, M, x, N, M, K, y) == BITGEN_ERROR_SCALE_COUNT);
    CHECK(bitgen_matmul(ctx, packed.data, NULL, 1, x, N, M, K, y) == BITGEN_ERROR_SCALE_COUNT);
    CHECK(bitgen_matmul(ctx, packed.data, NULL, 0, x, N, M, K, y) == BITGEN_OK);
    CHECK(bitgen_accumulate(ctx, packed.data, xq, N, M, K, acc) == BITGEN_ERROR_GROUPS);
    free(packed.memory);
}

static int child_threads = 2;

#ifdef _WIN32 /* there is no fork() */
static void check_fork(bitgen_context *ctx, void *packed, size_t bytes) { (void)ctx, (void)packed, (void)bytes; }
#else
static void check_fork(bitgen_context *ctx, void *packed, size_t bytes)
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        float y[N * M];
        int ok = bitgen_matmul(ctx, packed, w_scale, 1, x, N, M, K, y) == BITGEN_ERROR_FORKED;
        ok &= bitgen_pack(ctx, w, M, K, packed, bytes) == BITGEN_ERROR_FORKED;
        ok &= bitgen_quantize(ctx, x, N, K, xq, x_scale) == BITGEN_ERROR_FORKED;
        bitgen_context_destroy(ctx);
        ok &= bitgen_context_create(&ctx, child_threads, 0) == BITGEN_OK;
        ok &= bitgen_matmul(ctx, packed, w_scale, 1, x, N, M, K, y) == BITGEN_OK;
        bitgen_context_destroy(ctx);
        _exit(ok ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#endif

enum { BUSY_M = 512, BUSY_K = 2048, BUSY_N = 64 };

struct caller {
    bitgen_context *ctx;
    const void *packed;
    int calls, busy, other;
};

static void *call_often(void *arg)
{
    struct caller *c = arg;
    int8_t *in = calloc(BUSY_N, BUSY_K);
    int32_t *out = malloc(4 * (size_t)BUSY_N * BUSY_M);
    if (!in || !out) exit(2);
    for (int i = 0; i < 200 && !c->busy; ++i) {
        int32_t code = bitgen_accumulate(c->ctx, c->packed, in, BUSY_N, BUSY_M, BUSY_K, out);
        ++c->calls;
        c->busy += code == BITGEN_ERROR_BUSY;
        c->other += code != BITGEN_ERROR_BUSY && code != BITGEN_OK;
    }
    free(in), free(out);
    return NULL;
}

/* Two threads, one context: somebody is refused, nobody gets anything but an answer or BUSY. */
static void check_busy(bitgen_context *ctx)
{
    size_t bytes = 0;
    int8_t *zeros = calloc(BUSY_M, BUSY_K);
    CHECK(zeros && bitgen_packed_bytes(ctx, BUSY_M, BUSY_K, &bytes) == BITGEN_OK);
    struct buffer packed = make(bytes, 64, 0);
    CHECK(bitgen_pack(ctx, zeros, BUSY_M, BUSY_K, packed.data, bytes) == BITGEN_OK);
    struct caller callers[2] = {{ctx, packed.data, 0, 0, 0}, {ctx, packed.data, 0, 0, 0}};
    pthread_t threads[2];
    for (int i = 0; i < 2; ++i) CHECK(pthread_create(&threads[i], NULL, call_often, &callers[i]) == 0);
    for (int i = 0; i < 2; ++i) pthread_join(threads[i], NULL);
    CHECK(callers[0].busy + callers[1].busy >= 1);
    CHECK(callers[0].other + callers[1].other == 0);
    free(zeros), free(packed.memory);
}

int main(int argc, char **argv)
{
    if (argc > 1) child_threads = atoi(argv[1]);
    bitgen_context *ctx = NULL;
    size_t bytes = 0;
    check_context();
    check_table();
    check_messages();
    check_bundles();
    for (int threads = 1; threads <= 2; ++threads) {
        CHECK(bitgen_context_create(&ctx, threads, 0) == BITGEN_OK);
        check_shape(ctx, 1, 1);
        check_shape(ctx, 5, 127);
        check_shape(ctx, 33, 100);
        check_shape(ctx, 48, 197);
        check_shape(ctx, 100, 500);
        check_shape(ctx, 64, 640);
        bitgen_context_destroy(ctx);
    }
    CHECK(bitgen_context_create(&ctx, 2, 0) == BITGEN_OK);
    for (int i = 0; i < M; ++i) w_scale[i] = 1.0f;
    for (int i = 0; i < N * K; ++i) x[i] = (float)(i % 17) - 8.0f;
    CHECK(bitgen_packed_bytes(ctx, M, K, &bytes) == BITGEN_OK);
    struct buffer packed = make(bytes, 64, 0);
    check_packing(ctx, &packed, bytes);
    check_headers(ctx, &packed);
    check_multiplying(ctx, packed.data);
    check_groups(ctx);
    check_fork(ctx, packed.data, bytes);
    check_busy(ctx);
    CHECK(intact(&packed));
    free(packed.memory);
    bitgen_context_destroy(ctx);
    if (failures) printf("FAILED: %d of %d checks\n", failures, checks);
    else printf("OK: %d checks\n", checks);
    return failures != 0;
}

/* Multiply with a bitgen library and compare with a naive loop.
 *
 *     make && ./example
 *
 * The exit status is 0 when every value is the same.
 */
#include <bitgen.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { M = 300, K = 640, N = 5 };

/* A failing call says why and ends the program. */
static void check(int32_t code, const char *what)
{
    if (code == BITGEN_OK) return;
    fprintf(stderr, "%s: %s\n", what, bitgen_error_message(code));
    exit(1);
}

/* A small generator, so that every machine multiplies the same numbers. */
static uint32_t random_bits(void)
{
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

/* What the library promises, in plain C: quantise a token, sum, scale. */
static void naive_token(const int8_t *w, const float *w_scale, const float *x, float *y)
{
    float absmax = 1e-5f;
    for (int i = 0; i < K; ++i) absmax = fmaxf(absmax, fabsf(x[i]));
    const float s = 127.0f / absmax, x_scale = 1.0f / s;
    for (int row = 0; row < M; ++row) {
        int32_t acc = 0;
        for (int i = 0; i < K; ++i) acc += w[row * K + i] * (int32_t)rintf(x[i] * s);
        y[row] = (float)acc * (x_scale * w_scale[row]);
    }
}

int main(void)
{
    static int8_t w[M * K];
    static float w_scale[M], x[N * K], y[N * M], expected[M];
    for (int i = 0; i < M * K; ++i) w[i] = (int8_t)(random_bits() % 3) - 1;
    for (int i = 0; i < M; ++i) w_scale[i] = 0.5f + (float)(random_bits() % 1000) / 1000.0f;
    for (int i = 0; i < N * K; ++i) x[i] = (float)(random_bits() % 2001) / 1000.0f - 1.0f;

    if (bitgen_abi_version() != BITGEN_ABI_VERSION) {
        fprintf(stderr, "the library has ABI %d, this program %d\n", (int)bitgen_abi_version(), BITGEN_ABI_VERSION);
        return 1;
    }
    bitgen_context *ctx;
    check(bitgen_context_create(&ctx, 0, 0), "bitgen_context_create");
    size_t bytes;
    check(bitgen_packed_bytes(ctx, M, K, &bytes), "bitgen_packed_bytes");
    void *memory = malloc(bytes + 64);
    if (!memory) return 1;
    void *packed = (void *)(((uintptr_t)memory + 63) & ~(uintptr_t)63); /* packed weights lie at multiples of 64 */
    check(bitgen_pack(ctx, w, M, K, packed, bytes), "bitgen_pack");

    check(bitgen_matmul(ctx, packed, w_scale, M, x, N, M, K, y), "bitgen_matmul");

    int different = 0;
    for (int t = 0; t < N; ++t) {
        naive_token(w, w_scale, x + t * K, expected);
        for (int row = 0; row < M; ++row) different += y[t * M + row] != expected[row];
    }
    int32_t index;
    struct bitgen_kernel_info kernel;
    check(bitgen_kernel_choice(ctx, packed, N, &index), "bitgen_kernel_choice");
    check(bitgen_kernel_info(index, &kernel), "bitgen_kernel_info");
    printf("%d x %d times %d tokens on %d threads with %s\n", M, K, N, (int)bitgen_context_threads(ctx), kernel.name);
    bitgen_context_destroy(ctx);
    free(memory);
    if (different) printf("FAILED: %d of %d values differ from the naive loop\n", different, N * M);
    else printf("OK: %d values equal those of the naive loop\n", N * M);
    return different != 0;
}

/* What a library computes, as checksums of its bits: two libraries that print the same compute the same.
 *
 * C99 and nothing of a system. Random weights, with scales of a row and of a group, times random activations; then the
 * forward pass of a small random model, token by token and all tokens at once.
 */
#include <bitgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(int32_t code, const char *what)
{
    if (code == BITGEN_OK) return;
    fprintf(stderr, "%s: %s\n", what, bitgen_error_message(code));
    exit(1);
}

static uint32_t random_bits(void)
{
    static uint32_t state = 3;
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

/* `bytes` zeros at a multiple of 64; nothing is freed. */
static void *memory(size_t bytes)
{
    uint8_t *p = calloc(bytes + 64, 1);
    if (!p) exit(1);
    return p + (64 - (uintptr_t)p % 64) % 64;
}

static float *floats(size_t count, float least, float range)
{
    float *x = memory(4 * count);
    for (size_t i = 0; i < count; ++i) x[i] = least + range * (float)(random_bits() & 0xffff) / 65536.0f;
    return x;
}

static int8_t *codes(size_t count)
{
    int8_t *w = memory(count);
    for (size_t i = 0; i < count; ++i) w[i] = (int8_t)(random_bits() % 3) - 1;
    return w;
}

static void print_sum(const char *what, const void *data, size_t bytes)
{
    uint64_t sum = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < bytes; ++i) sum = (sum ^ ((const uint8_t *)data)[i]) * 1099511628211u;
    printf("%s %08x%08x\n", what, (unsigned)(sum >> 32), (unsigned)sum);
}

static void print_products(bitgen_context *ctx, int64_t m, int64_t k, int64_t group)
{
    static const int64_t tokens[] = {1, 5, 20, 40};
    const int64_t groups = group ? (k + group - 1) / group : 1;
    const int8_t *w = codes((size_t)(m * k));
    const float *scale = floats((size_t)(m * groups), 0.001f, 0.1f), *x = floats((size_t)(40 * k), -1.0f, 2.0f);
    size_t bytes;
    if (group) check(bitgen_group_packed_bytes(ctx, m, k, group, BITGEN_SCALE_F32, &bytes), "bytes");
    else check(bitgen_packed_bytes(ctx, m, k, &bytes), "bytes");
    void *packed = memory(bytes);
    if (group) check(bitgen_pack_groups(ctx, w, scale, m, k, group, packed, bytes), "pack");
    else check(bitgen_pack(ctx, w, m, k, packed, bytes), "pack");
    for (int i = 0; i < 4; ++i) {
        const int64_t n = tokens[i];
        float *y = memory((size_t)(4 * n * m));
        check(bitgen_matmul(ctx, packed, group ? NULL : scale, group ? 0 : m, x, n, m, k, y), "matmul");
        print_sum("product", y, (size_t)(4 * n * m));
    }
}

enum { HIDDEN = 256, FFN = 640, LAYERS = 2, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 64, VOCAB = 300, CONTEXT = 48, N = 30 };

static struct bitgen_matrix matrix(bitgen_context *ctx, int64_t m, int64_t k)
{
    size_t bytes;
    check(bitgen_packed_bytes(ctx, m, k, &bytes), "bytes");
    void *packed = memory(bytes);
    check(bitgen_pack(ctx, codes((size_t)(m * k)), m, k, packed, bytes), "pack");
    return (struct bitgen_matrix){.packed = packed, .scale = floats((size_t)m, 0.02f, 0.01f), .scale_count = m};
}

static struct bitgen_model model_of(bitgen_context *ctx)
{
    struct bitgen_layer *layer = memory(LAYERS * sizeof *layer);
    float *rope = memory(4 * CONTEXT * HEAD_DIM), inverse[HEAD_DIM / 2];
    for (int i = 0; i < HEAD_DIM / 2; ++i) inverse[i] = 1.0f / (float)(1 + 3 * i);
    check(bitgen_rope(inverse, HEAD_DIM / 2, 0, CONTEXT, rope), "rope");
    for (int i = 0; i < LAYERS; ++i) {
        layer[i].qkv = matrix(ctx, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN);
        layer[i].o = matrix(ctx, HIDDEN, HEADS * HEAD_DIM);
        layer[i].gate_up = matrix(ctx, 2 * FFN, HIDDEN);
        layer[i].down = matrix(ctx, HIDDEN, FFN);
        layer[i].attn_norm = floats(HIDDEN, 0.5f, 1.0f);
        layer[i].ffn_norm = floats(HIDDEN, 0.5f, 1.0f);
        layer[i].attn_sub_norm = floats(HEADS * HEAD_DIM, 0.5f, 1.0f);
        layer[i].ffn_sub_norm = i ? floats(FFN, 0.5f, 1.0f) : NULL;
    }
    const struct bitgen_dense dense = {
        .data = floats(VOCAB * HIDDEN, -1.0f, 2.0f), .row_bytes = 4 * HIDDEN, .type = BITGEN_DENSE_F32};
    struct bitgen_model model = {
        .size = sizeof model, .layer_size = sizeof *layer, .hidden = HIDDEN, .ffn = FFN, .layers = LAYERS,
        .heads = HEADS, .kv_heads = KV_HEADS, .head_dim = HEAD_DIM, .vocab = VOCAB, .context = CONTEXT,
        .sequences = 1, .norm_eps = 1e-5f, .activation = BITGEN_SILU, .kv_type = BITGEN_KV_F16,
        .embedding = dense, .head = dense, .final_norm = floats(HIDDEN, 0.5f, 1.0f), .rope = rope, .layer = layer};
    size_t bytes;
    check(bitgen_cache_bytes(&model, &bytes), "cache");
    model.cache = memory(bytes);
    return model;
}

/* The logits of N tokens, computed `each` at a time. */
static void print_logits(bitgen_context *ctx, const struct bitgen_model *model, int each)
{
    int32_t token[N], position[N], sequence[N] = {0};
    static float logits[N * VOCAB];
    struct bitgen_row row[N];
    memset(row, 0, sizeof row);
    for (int t = 0; t < N; ++t) {
        token[t] = t * 37 % VOCAB;
        position[t] = t;
        row[t].want = BITGEN_WANT_LOGITS;
        row[t].out = logits + t * VOCAB;
    }
    for (int t = 0; t < N; t += each) {
        const struct bitgen_tokens tokens = {.size = sizeof tokens, .row_size = sizeof *row, .n = each, .token = token + t,
                                             .position = position + t, .sequence = sequence + t, .row = row + t};
        check(bitgen_step(ctx, model, &tokens, NULL), "step");
    }
    print_sum("logits", logits, sizeof logits);
}

int main(void)
{
    static const int64_t group[] = {0, 32, 128};
    bitgen_context *ctx;
    check(bitgen_context_create(&ctx, 2, 0), "context");
    for (int i = 0; i < 3; ++i) {
        print_products(ctx, 100, 500, group[i]);
        print_products(ctx, 64, 640, group[i]);
    }
    const struct bitgen_model model = model_of(ctx);
    print_logits(ctx, &model, 1);
    print_logits(ctx, &model, N);
    bitgen_context_destroy(ctx);
    return 0;
}

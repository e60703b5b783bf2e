/* The forward step: the order of its stages and how each is spread over threads. What is computed is in ops.c (one file
 * for each ISA level) and in the kernels; see bitgen.h for the model and step.h for the parts. This file includes
 * step_memory.h (cache, checks, work memory), step_attention.h, step_best.h (the best logits, by a screen) and
 * step_rows.h (what rows want, the head) at their places. */
#define _POSIX_C_SOURCE 200809L

#include <stdlib.h>
#include <string.h>

#include "system.h"
#include "table.h"

enum {
    HEADER_BYTES = sizeof(struct bitgen_packed_header),
    FLOATS = 16, /* rows of floats are padded to a block */
    TOKENS_MAX = 1 << 16,
    WIDE_BYTES = 8 << 20,  /* outputs of qkv and of gate_up at a time: they stay in L3 for what reads them */
    PART_MIN = 64,         /* tokens a part, so that kernels for many tokens and their panels pay off */
    PARTS_BYTES = 8 << 20, /* of the results of attention to single chunks of keys, at most */
    FUSED_TOKENS = 16,     /* up to which a thread rotates, stores and attends head by head */
    HEADS_A_THREAD = 4,    /* items of attention that a thread should have, so that none waits long for the others */
    PAGE = 4096,
    GROUP_LEAST = 16, /* weights along k that share a scale, at least and at most */
    GROUP_MOST = 256,
    HEAD_ROWS = 64,       /* rows of the head in a claim: 0.4 MB in half floats for hidden 3200, so L2 holds them */
    ID_BLOCK = 64,        /* tokens of the vocabulary that are passed over at once where none can be among the best */
    SCREEN_SHARE = 16,    /* of the head's rows that may be read by way of its screen; more are faster read in order */
    SCREEN_CHUNK = 64,    /* columns that have one plane or two */
    INLINE_WORK = 1 << 14 /* elements below which a loop over tokens is not worth waking threads */
};
/* Of the norm of a state, what rounding to 8 bits may take on average: then 1 % of a trained head's rows are read for
 * the 40 best, 0.3 % with all columns in 16 bits (docs/reference/screened-head.md). */
static const double SCREEN_OFF = 0.01;
static const uint32_t INFINITE = 0x7f800000;   /* the bits of infinity */
static const int64_t SIZE_MAX_MODEL = 1 << 24; /* of every dimension, so that products of three fit */
/* Multiplications of attention below which another thread costs more than it brings: about 4 us. */
static const int64_t ATTENTION_WORK = 1 << 16;

int32_t bitgen_model_sizes(int32_t *layer, int32_t *model, int32_t *tokens, int32_t *row)
{
    if (!layer || !model || !tokens || !row) return BITGEN_ERROR_NULL;
    *layer = sizeof(struct bitgen_layer);
    *model = sizeof(struct bitgen_model);
    *tokens = sizeof(struct bitgen_tokens);
    *row = sizeof(struct bitgen_row);
    return BITGEN_OK;
}

#include "step_memory.h"

/* --- stages --- */

static void stage_done(struct step *s, int32_t stage)
{
    if (!s->times_ns) return;
    const int64_t now = bitgen_now_ns();
    if (stage >= 0) s->times_ns[stage] += now - s->clock_ns;
    s->clock_ns = now;
}

/* A loop over tokens of `elements` elements each. */
static void over_tokens(struct step *s, bitgen_body *body, int64_t elements)
{
    int64_t claim = max64(INLINE_WORK / elements + 1, s->n / (8 * s->ctx->threads));
    bitgen_pool_run(s->ctx->pool, body, s, s->n, claim);
}

static void found(struct step *s, int32_t not_finite)
{
    if (not_finite) atomic_store_explicit(&s->not_finite, 1, memory_order_relaxed);
}

static void embed_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    const struct bitgen_dense *e = &s->model->embedding;
    (void)worker;
    if (s->tokens->x) {
        memcpy(s->x + begin * s->hidden, s->tokens->x + begin * s->hidden, (size_t)((end - begin) * s->hidden) * 4);
        return;
    }
    for (int64_t t = begin; t < end; ++t)
        s->ops->embed[e->type]((const uint8_t *)e->data + s->tokens->token[t] * e->row_bytes, s->hidden,
                               s->x + t * s->hidden);
}

/* The input of the prepared matrix from token t of the part: x += add, then its norm (where there is a weight),
 * quantised as the matrix and the model want it. */
static void quantize_token(struct step *s, int32_t worker, int64_t t, float *x, const float *add, int64_t k)
{
    const struct bitgen_step_ops *ops = s->ops;
    const int64_t group = s->kernel->group, groups = bitgen_groups(k, group), stride = bitgen_row_stride(k, group);
    const float eps = s->model->norm_eps;
    int8_t *xq = s->xq + t * s->planes * stride;
    float *scale = s->x_scale + t * s->planes * groups;
    int32_t *sum = s->x_sum + t * s->planes * groups;
    if (s->planes > 1) {
        float *normed = s->weight ? s->normed + worker * s->longest : x;
        if (s->weight) found(s, ops->norm(x, add, s->weight, eps, k, normed));
        found(s, ops->quantize_planes(normed, k, group, stride, xq, scale, sum));
    } else if (s->weight && group)
        found(s, ops->norm_quantize_groups(x, add, s->weight, eps, k, group, stride, xq, scale, sum));
    else if (s->weight) found(s, ops->norm_quantize(x, add, s->weight, eps, k, stride, xq, scale, sum));
    else if (group) found(s, bitgen_quantize_row(s->kernel->quantize, x, k, group, stride, xq, scale, sum));
    else found(s, ops->quantize(x, k, stride, xq, scale, sum));
}

/* The input of qkv and of gate_up. */
static void norm_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    for (int64_t t = begin; t < end; ++t) {
        const int64_t at = (s->row + t) * s->hidden;
        quantize_token(s, worker, t, s->x + at, s->add ? s->add + at : NULL, s->hidden);
    }
}

/* The input of o and of down: with a norm of its own, or quantised as it is. */
static void inner_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    for (int64_t t = begin; t < end; ++t) quantize_token(s, worker, t, s->inner + t * s->k, NULL, s->k);
}

static void gate_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    (void)worker;
    for (int64_t t = begin; t < end; ++t)
        s->ops->gate[s->model->activation](s->wide + t * 2 * s->ffn, s->ffn, s->inner + t * s->ffn);
}

#include "step_attention.h"

/* The largest magnitude as the bits of a float, which are ordered as magnitudes are; NaN is above infinity. */
static uint32_t largest_bits(const float *x, int64_t n)
{
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

/* The matrix (m, k) comes next: checks it, chooses its kernel, and lets waiting threads ask for its weights. */
static int32_t prepare(struct step *s, const struct bitgen_matrix *matrix, int64_t m, int64_t k)
{
    s->matrix = matrix;
    s->m = m;
    s->k = k;
    if (matrix->scale_type != BITGEN_SCALE_F32) return BITGEN_ERROR_MODEL;
    if (!matrix->scale && !matrix->group) return BITGEN_ERROR_NULL;
    if (matrix->group ? matrix->scale || matrix->scale_count : matrix->scale_count != 1 && matrix->scale_count != m)
        return BITGEN_ERROR_SCALE_COUNT;
    int32_t code = bitgen_choose_kernel(s->ctx, matrix->packed, m, k, s->planes * s->n, &s->kernel);
    if (code) return code;
    if (s->kernel->group != matrix->group) return BITGEN_ERROR_MODEL;
    if (s->planes > 1 && !matrix->group && k > BITGEN_INT16_K_MAX) return BITGEN_ERROR_MODEL;
    const struct bitgen_packed_header *header = matrix->packed;
    bitgen_pool_ahead(s->ctx->pool, header + 1, (int64_t)header->bytes - HEADER_BYTES);
    return BITGEN_OK;
}

/* y (n, m) = the prepared matrix * the activations in xq. */
static int32_t multiply(struct step *s, float *y)
{
    const struct bitgen_matrix *matrix = s->matrix;
    const struct bitgen_packed_header *header = matrix->packed;
    struct bitgen_call call = {
        .kernel = s->kernel,
        .w = (const uint8_t *)(header + 1),
        .w_scale = matrix->scale,
        .w_scale_stride = matrix->group ? bitgen_scale_bytes(header->scale_type) : matrix->scale_count > 1,
        .rows = s->xq,
        .x_sum = s->x_sum,
        .x_scale = s->x_scale,
        .y = y,
        .m = s->m,
        .k = s->k,
        .n = s->n,
        .quantize_planes = s->planes > 1 ? s->ops->quantize_planes : NULL,
    };
    if (atomic_load_explicit(&s->not_finite, memory_order_relaxed)) return BITGEN_ERROR_NOT_FINITE;
    return bitgen_run_entered(s->ctx, &call);
}

/* The same for a matrix of a layer. */
static int32_t multiply_layer(struct step *s, float *y)
{
    const int32_t code = multiply(s, y);
    stage_done(s, BITGEN_STAGE_MATMUL);
    return code;
}

#include "step_best.h"
#include "step_rows.h"

/* Behind the last layer's attention only tokens that want something matter: their rows of x and inner move together, x
 * to `row`, behind those of earlier parts. */
static void keep_outputs(struct step *s, int64_t row)
{
    int64_t kept = 0;
    for (int64_t t = 0; t < s->n; ++t) {
        if (s->tokens->row[s->token + t].want == BITGEN_WANT_NOTHING) continue;
        if (row + kept != s->row + t)
            memcpy(s->x + (row + kept) * s->hidden, s->x + (s->row + t) * s->hidden, (size_t)s->hidden * 4);
        if (kept != t) memcpy(s->inner + kept * s->q_rows, s->inner + t * s->q_rows, (size_t)s->q_rows * 4);
        ++kept;
    }
    s->row = row;
    s->n = kept;
}

/* Tokens that stand together and belong to one sequence, as many as fill the rows of an attention call. */
static void make_blocks(struct step *s)
{
    const int32_t *sequence = s->tokens->sequence + s->token;
    const int64_t group = s->model->heads / s->model->kv_heads, most = max64(1, BITGEN_QUERY_ROWS / group);
    s->block_count = 0;
    for (int64_t t = 0; t < s->n; ++t) {
        int full = t == 0 || s->blocks[s->block_count - 1].count == most;
        if (full || sequence[t] != sequence[t - 1]) s->blocks[s->block_count++] = (struct block){.first = (int32_t)t};
        ++s->blocks[s->block_count - 1].count;
    }
}

/* x += add (where there is one); xq = norm(x). */
static void norm(struct step *s, const float *weight, const float *add)
{
    s->add = add;
    s->weight = weight;
    over_tokens(s, norm_body, s->hidden);
    stage_done(s, BITGEN_STAGE_NORM);
}

/* xq = norm(inner), or inner as it is where the model has no such norm. */
static void sub_norm(struct step *s, const float *weight)
{
    s->weight = weight;
    over_tokens(s, inner_body, s->k);
    stage_done(s, BITGEN_STAGE_NORM);
}

/* inner = act(gate) * up */
static void gate(struct step *s)
{
    over_tokens(s, gate_body, 4 * s->ffn);
    stage_done(s, BITGEN_STAGE_GATE);
}

/* --- matrices that share their input and have a norm of it each --- */

/* delta = norm(x + delta), whose rows nobody reads until the next matrix gives them anew. */
static void shared_norm_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    float *normed = s->normed + worker * s->longest; /* whole vectors are written: rows of delta may be shorter */
    for (int64_t t = begin; t < end; ++t) {
        const int64_t at = (s->row + t) * s->hidden;
        found(s,
              s->ops->norm(s->x + at, s->add ? s->add + at : NULL, s->weight, s->model->norm_eps, s->hidden, normed));
        memcpy(s->delta + at, normed, (size_t)s->hidden * 4);
    }
}

/* xq = the own norm of the shared input */
static void own_norm_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    for (int64_t t = begin; t < end; ++t)
        quantize_token(s, worker, t, s->delta + (s->row + t) * s->hidden, NULL, s->hidden);
}

/* Outputs of one matrix, which stand together in `inner`, to where they belong in `wide`. */
static void place_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    (void)worker;
    for (int64_t t = begin; t < end; ++t)
        memcpy(s->wide + t * s->wide_row + s->column, s->inner + t * s->m, (size_t)s->m * 4);
}

/* The next columns of wide = matrix(own norm of the shared input) */
static int32_t multiply_own(struct step *s, const struct bitgen_matrix *matrix, const float *weight, int64_t m)
{
    int32_t code = prepare(s, matrix, m, s->hidden);
    if (code) return code;
    s->weight = weight;
    over_tokens(s, own_norm_body, s->hidden);
    stage_done(s, BITGEN_STAGE_NORM);
    code = multiply(s, s->n == 1 ? s->wide + s->column : s->inner);
    if (!code && s->n > 1) over_tokens(s, place_body, m);
    stage_done(s, BITGEN_STAGE_MATMUL);
    s->column += m;
    return code;
}

/* The shared input, of which nothing is in wide yet. */
static void shared_norm(struct step *s, const float *weight, const float *add, int64_t wide_row)
{
    s->add = add;
    s->weight = weight;
    s->wide_row = wide_row;
    s->column = 0;
    over_tokens(s, shared_norm_body, s->hidden);
    stage_done(s, BITGEN_STAGE_NORM);
}

/* wide (n, q_rows + 2 kv_rows) = q, k, v of norm(x), x += add before */
static int32_t query_key_value(struct step *s, const float *add)
{
    const struct bitgen_layer *layer = s->layer;
    const int64_t wide_row = s->q_rows + 2 * s->kv_rows;
    int32_t code;
    if (layer->q.packed) {
        shared_norm(s, layer->attn_norm, add, wide_row);
        if ((code = multiply_own(s, &layer->q, layer->q_norm_in, s->q_rows))) return code;
        if ((code = multiply_own(s, &layer->k, layer->k_norm_in, s->kv_rows))) return code;
        return multiply_own(s, &layer->v, layer->v_norm_in, s->kv_rows);
    }
    if ((code = prepare(s, &layer->qkv, wide_row, s->hidden))) return code;
    norm(s, layer->attn_norm, add); /* xq (n, hidden) */
    return multiply_layer(s, s->wide);
}

/* wide (n, 2 ffn) = gate, up of norm(x), x += delta before */
static int32_t gate_and_up(struct step *s)
{
    const struct bitgen_layer *layer = s->layer;
    int32_t code;
    if (layer->q.packed) {
        shared_norm(s, layer->ffn_norm, s->delta, 2 * s->ffn);
        if ((code = multiply_own(s, &layer->gate, layer->gate_norm_in, s->ffn))) return code;
        return multiply_own(s, &layer->up, layer->up_norm_in, s->ffn);
    }
    if ((code = prepare(s, &layer->gate_up, 2 * s->ffn, s->hidden))) return code;
    norm(s, layer->ffn_norm, s->delta); /* xq (n, hidden) */
    return multiply_layer(s, s->wide);
}

/* A layer on the current part of the tokens, n of them. `prepare` names each matrix before its input is made, so that
 * waiting threads ask for its weights meanwhile. The last layer goes on with the tokens that want something alone, and
 * puts their rows of x at `row`. */
static int32_t forward_layer(struct step *s, int64_t row)
{
    const struct bitgen_layer *layer = s->layer;
    const int first = s->index == 0, last = s->index == s->model->layers - 1;
    int32_t code;

    /* x += o(sub_norm(attention(rope(q), cache of rope(k) and v))), where q, k, v = qkv(norm(x)) */
    if ((code = query_key_value(s, first ? NULL : s->delta))) return code; /* wide (n, q_rows + 2 kv_rows) */
    make_blocks(s);
    attention(s, last && !s->outputs); /* k, v -> cache; q, cache -> inner (n, q_rows) */
    if (last) keep_outputs(s, row);
    if (!s->n) return BITGEN_OK;
    if ((code = prepare(s, &layer->o, s->hidden, s->q_rows))) return code;
    sub_norm(s, layer->attn_sub_norm);                                          /* xq (n, q_rows) */
    if ((code = multiply_layer(s, s->delta + s->row * s->hidden))) return code; /* delta (n, hidden) */

    /* x += down(sub_norm(act(gate) * up)), where gate, up = gate_up(norm(x)) */
    if ((code = gate_and_up(s))) return code; /* wide (n, 2 ffn) */
    if ((code = prepare(s, &layer->down, s->hidden, s->ffn))) return code;
    gate(s);                                                 /* inner (n, ffn) */
    sub_norm(s, layer->ffn_sub_norm);                        /* xq (n, ffn) */
    return multiply_layer(s, s->delta + s->row * s->hidden); /* delta (n, hidden), added by the next norm */
}

static int32_t run_layer(struct step *s)
{
    int64_t kept = 0, n = s->tokens->n;
    int last = s->index == s->model->layers - 1;
    for (int64_t token = 0; token < n; token += s->part) {
        s->token = s->row = token;
        s->n = min64(s->part, n - token);
        int32_t code = forward_layer(s, kept);
        if (code) return code;
        if (last) kept += s->n;
    }
    return BITGEN_OK;
}

static int32_t run_step(struct step *s)
{
    stage_done(s, -1);
    s->n = s->tokens->n;
    over_tokens(s, embed_body, s->hidden);
    stage_done(s, BITGEN_STAGE_EMBED);
    for (s->index = 0; s->index < s->model->layers; ++s->index) {
        s->layer = &s->model->layer[s->index];
        int32_t code = run_layer(s);
        if (code) return code;
    }
    if (!s->outputs) return atomic_load(&s->not_finite) ? BITGEN_ERROR_NOT_FINITE : BITGEN_OK;
    return answer_rows(s);
}

/* --- the public functions --- */

static int32_t check_tokens(const struct bitgen_model *model, const struct bitgen_tokens *tokens)
{
    if (tokens->row_size != sizeof(struct bitgen_row)) return BITGEN_ERROR_STRUCT;
    if ((!tokens->token && !tokens->x) || !tokens->position || !tokens->sequence || !tokens->row)
        return BITGEN_ERROR_NULL;
    if (tokens->n < 1 || tokens->n > TOKENS_MAX) return BITGEN_ERROR_SHAPE;
    for (int64_t t = 0; t < tokens->n; ++t) {
        if (!tokens->x && !is_token(model, tokens->token[t])) return BITGEN_ERROR_TOKENS;
        if (tokens->position[t] < 0 || tokens->position[t] >= model->context) return BITGEN_ERROR_TOKENS;
        if (tokens->sequence[t] < 0 || tokens->sequence[t] >= model->sequences) return BITGEN_ERROR_TOKENS;
        const int32_t code = check_row(model, &tokens->row[t]);
        if (code) return code;
    }
    return BITGEN_OK;
}

int32_t bitgen_step(bitgen_context *ctx, const struct bitgen_model *model, const struct bitgen_tokens *tokens,
                    int64_t *times_ns)
{
    if (!ctx || !tokens) return BITGEN_ERROR_NULL;
    if (tokens->size != sizeof *tokens) return BITGEN_ERROR_STRUCT;
    int32_t code = check_model(model, tokens);
    if (!code) code = check_tokens(model, tokens);
    if (code) return code;
    code = bitgen_enter(ctx);
    if (code) return code;
    struct step s = step_of(ctx, model);
    s.tokens = tokens;
    s.times_ns = times_ns;
    for (int64_t t = 0; t < tokens->n; ++t) {
        s.outputs += tokens->row[t].want != BITGEN_WANT_NOTHING;
        s.best += tokens->row[t].want == BITGEN_WANT_BEST;
    }
    code = bitgen_reserve(&ctx->step, place(&s, NULL, tokens->n));
    if (!code) {
        place(&s, ctx->step.data, tokens->n);
        code = run_step(&s);
    }
    bitgen_leave(ctx);
    return code;
}

int32_t bitgen_cache_copy(bitgen_context *ctx, const struct bitgen_model *model, int64_t from, int64_t to,
                          int64_t length)
{
    if (!ctx) return BITGEN_ERROR_NULL;
    int32_t code = check_sizes(model);
    if (code) return code;
    if (!model->cache) return BITGEN_ERROR_NULL;
    if (from < 0 || to < 0 || from >= model->sequences || to >= model->sequences || length < 0 ||
        length > model->context)
        return BITGEN_ERROR_TOKENS;
    code = bitgen_enter(ctx);
    if (code) return code;
    const struct cache c = cache_of(model);
    int64_t chunks = from == to ? 0 : ceil_to(length, BITGEN_KEY_CHUNK) / BITGEN_KEY_CHUNK;
    if (chunks)
        memcpy(chunk_of(model, &c, to, 0, 0, 0), chunk_of(model, &c, from, 0, 0, 0), (size_t)(chunks * c.chunk));
    bitgen_leave(ctx);
    return BITGEN_OK;
}

/* --- the cache --- */

/* For each sequence, for each chunk of positions, for each layer: the chunk of every head. A token early in its text
 * reads one stretch of memory, and memory that no token has reached is never touched. */
struct cache {
    int64_t head;   /* bytes of a chunk of one head */
    int64_t chunk;  /* of a chunk of all heads and layers */
    int64_t chunks; /* of a sequence */
    int64_t total;
};

static struct cache cache_of(const struct bitgen_model *model)
{
    struct cache c = {.chunks = ceil_to(model->context, BITGEN_KEY_CHUNK) / BITGEN_KEY_CHUNK};
    c.head = ceil_to(bitgen_chunk_bytes(model->head_dim, model->kv_type), 64);
    /* Heads a multiple of 4 KiB apart would keep their newest keys in the same sets of the L1 cache. */
    if (c.head % PAGE < PAGE / 4) c.head += PAGE / 4 + 64;
    c.chunk = model->layers * model->kv_heads * c.head;
    /* The last vector of a value is read whole: up to 15 floats behind the last head. */
    c.total = model->sequences * c.chunks * c.chunk + 64;
    return c;
}

static uint8_t *chunk_of(const struct bitgen_model *model, const struct cache *c, int64_t sequence, int64_t chunk,
                         int64_t layer, int64_t head)
{
    return (uint8_t *)model->cache + (sequence * c->chunks + chunk) * c->chunk +
           (layer * model->kv_heads + head) * c->head;
}

/* --- checks --- */

static int in_size(int64_t value) { return value >= 1 && value <= SIZE_MAX_MODEL; }

/* Dimensions and types: what sizes are computed from. */
static int32_t check_sizes(const struct bitgen_model *model)
{
    if (!model) return BITGEN_ERROR_NULL;
    if (model->size != sizeof *model || model->layer_size != sizeof *model->layer) return BITGEN_ERROR_STRUCT;
    if (!in_size(model->hidden) || !in_size(model->ffn) || !in_size(model->layers) || !in_size(model->heads) ||
        !in_size(model->kv_heads) || !in_size(model->head_dim) || !in_size(model->vocab) || !in_size(model->context) ||
        !in_size(model->sequences))
        return BITGEN_ERROR_MODEL;
    if (model->heads % model->kv_heads || model->head_dim % 2 || model->activation < 0 ||
        model->activation > BITGEN_RELU2 || model->kv_type < 0 || model->kv_type > BITGEN_KV_I4 || model->x_type < 0 ||
        model->x_type > BITGEN_X_INT16)
        return BITGEN_ERROR_MODEL;
    /* As doubles, because the products may overflow. */
    double heads = (double)model->sequences * (double)model->layers * (double)model->kv_heads;
    double chunks = (double)model->context / BITGEN_KEY_CHUNK + 1;
    if (heads * chunks * (double)bitgen_chunk_bytes(model->head_dim + PAGE, BITGEN_KV_F32) > 1e17)
        return BITGEN_ERROR_MODEL;
    double widest = (double)(model->heads + 2 * model->kv_heads) * (double)model->head_dim;
    return widest < 1e9 && model->ffn < 1e9 ? BITGEN_OK : BITGEN_ERROR_MODEL;
}

/* Values of a unit of a dense type and its bytes. */
static const struct {
    int32_t values, bytes;
} dense_units[] = {
    [BITGEN_DENSE_F32] = {1, 4},    [BITGEN_DENSE_F16] = {1, 2},      [BITGEN_DENSE_BF16] = {1, 2},
    [BITGEN_DENSE_Q8_0] = {32, 34}, [BITGEN_DENSE_Q6_K] = {256, 210}, [BITGEN_DENSE_Q4_0] = {32, 18},
    [BITGEN_DENSE_Q4_1] = {32, 20}, [BITGEN_DENSE_I8] = {1, 1},
};

static int32_t check_dense(const struct bitgen_dense *dense, int64_t hidden)
{
    if (!dense->data) return BITGEN_ERROR_NULL;
    if (dense->type < 0 || dense->type > BITGEN_DENSE_I8) return BITGEN_ERROR_MODEL;
    if (dense->type == BITGEN_DENSE_I8 && !dense->scale) return BITGEN_ERROR_NULL;
    int64_t values = dense_units[dense->type].values;
    if (hidden % values || dense->row_bytes < hidden / values * dense_units[dense->type].bytes)
        return BITGEN_ERROR_MODEL;
    /* So that bytes of all rows can be counted. */
    return dense->row_bytes <= 64 * SIZE_MAX_MODEL ? BITGEN_OK : BITGEN_ERROR_MODEL;
}

static int32_t check_model(const struct bitgen_model *model, const struct bitgen_tokens *tokens)
{
    int32_t code = check_sizes(model);
    if (code) return code;
    if (!model->final_norm || !model->rope || !model->cache || !model->layer) return BITGEN_ERROR_NULL;
    if ((uintptr_t)model->cache % 64) return BITGEN_ERROR_ALIGNMENT;
    if (!tokens->x) code = check_dense(&model->embedding, model->hidden);
    if (code) return code;
    /* An int8 head has scales for its own rows; as an embedding it would need them applied. */
    if (!tokens->x && model->embedding.type == BITGEN_DENSE_I8) return BITGEN_ERROR_MODEL;
    for (int64_t i = 0; i < model->layers; ++i) {
        if (!model->layer[i].attn_norm || !model->layer[i].ffn_norm) return BITGEN_ERROR_NULL;
        if (model->layer[i].window < 0) return BITGEN_ERROR_MODEL;
    }
    if (model->lm_head.packed) return BITGEN_OK;
    code = check_dense(&model->head, model->hidden);
    if (code || !model->screen.data) return code;
    if (!model->screen_bound || !model->screen_norm) return BITGEN_ERROR_NULL;
    return model->screen.type == BITGEN_DENSE_I8 ? check_dense(&model->screen, model->hidden) : BITGEN_ERROR_MODEL;
}

/* --- work memory --- */

/* A block of tokens of one sequence whose queries run together. */
struct block {
    int32_t first, count;
};

/* Rows that stand together in `final` and whose logits do so in memory: one call of the head, or of its screen. */
struct run {
    int64_t first, count;
    float *out; /* (count, vocab) */
    int screened;
};

struct step {
    struct bitgen_context *ctx;
    const struct bitgen_step_ops *ops;
    const struct bitgen_model *model;
    const struct bitgen_layer *layer; /* the current one */
    const struct bitgen_tokens *tokens;
    struct cache cache;
    int64_t index; /* of the layer */
    /* A layer runs on parts of the tokens, so that what lies between its matrices stays in cache. The current part:
     * n tokens from `token` on, whose rows of x and delta start at `row`. The last layer drops tokens that
     * want nothing, so there row <= token. */
    int64_t n, token, row;
    int64_t outputs, best, part; /* tokens that want something, that want the best; tokens of a part */
    int64_t q_rows, kv_rows, hidden, ffn;
    float *x;             /* (tokens, hidden) the residual stream */
    float *delta;         /* (tokens, hidden) what the last matrix gave, not yet added to x */
    float *wide;          /* (part, largest m) outputs of qkv and of gate_up */
    float *inner;         /* (part, q_rows or ffn) outputs of attention and of the gate */
    float *final;         /* (outputs, padded hidden) */
    float *attention;     /* (threads, bitgen_attention_floats) */
    int64_t planes;       /* rows of int8 activations of a token: 2 of int16, else 1 */
    int64_t longest;      /* input of a matrix, padded */
    float *normed;        /* (threads, longest) a norm that is not yet planes, or the input of several matrices */
    int8_t *xq;           /* (part, planes) activations as kernels read them */
    int32_t *x_sum;       /* (part, planes, groups) */
    float *x_scale;       /* (part, planes, groups) */
    struct block *blocks; /* of the part */
    int64_t block_count, item_blocks; /* and how many of them an item of fused_body takes */
    float *parts; /* (tokens, heads, chunks) results of attention to chunks of keys, where threads share heads */
    int64_t chunks, spans; /* of the keys; spans 0: threads share no heads */
    int64_t unseen;        /* chunks at the start that no token of the part attends to */
    int32_t *output_of;    /* (outputs) the token of each row of `final` */
    struct run *runs;      /* (outputs) of the head */
    int64_t run_count;
    /* Of each row of `final` that is screened in two planes: (outputs, 2, screen_stride), (outputs), (outputs, 2, 16),
     * (outputs) |x - what the planes stand for|, with room for what is rounded, 0 of a row of floats, (outputs) |x|,
     * (outputs, chunks) the largest magnitudes of 64 columns each; and the chunks with a first plane in any row. */
    int8_t *screen_x;
    float *screen_scale;
    int32_t *screen_start;
    double *screen_off, *screen_size; /* the latter of all that are screened, else -1 */
    float *screen_most;
    int32_t *screen_high;
    int64_t screen_high_count, screened; /* rows that are screened */
    float *scores;                       /* (best, vocab) logits to choose from */
    float *logits;                       /* those that the head makes now */
    uint32_t *exact;                     /* (best, vocab bits) which of them are the head's own, not the screen's */
    const float *add;                    /* of the current norm */
    const float *weight;
    int64_t wide_row, column; /* of matrices with norms of their own: a row of wide, where the next one writes */
    const struct bitgen_matrix *matrix; /* the one that comes next, (m, k), and its kernel */
    const struct bitgen_kernel *kernel;
    int64_t m, k;
    _Atomic int32_t not_finite;
    int64_t *times_ns;
    int64_t clock_ns;
};

/* The next `bytes` bytes of work memory; NULL while only the size counts. */
static void *take(uint8_t *base, int64_t *used, int64_t bytes)
{
    void *p = base ? base + *used : NULL;
    *used += ceil_to(bytes, 64);
    return p;
}

/* Bytes of a plane of a row of `final`. */
static int64_t screen_stride(const struct bitgen_model *model) { return ceil_to(model->hidden, SCREEN_CHUNK); }

/* Bytes of the results of attention chunk by chunk for n tokens; 0 where threads have heads enough, or too many. */
static int64_t parts_bytes(const struct step *s, int64_t n)
{
    const struct bitgen_model *model = s->model;
    if (s->ctx->threads == 1 || model->kv_heads >= HEADS_A_THREAD * s->ctx->threads || n > FUSED_TOKENS) return 0;
    int64_t chunks = (model->context + BITGEN_KEY_CHUNK - 1) / BITGEN_KEY_CHUNK;
    int64_t bytes = n * model->heads * chunks * bitgen_part_floats(model->head_dim) * 4;
    return bytes <= PARTS_BYTES ? bytes : 0;
}

/* Places everything of a step in the memory at `base`, or nothing when it is NULL, and returns its bytes. */
static int64_t place(struct step *s, uint8_t *base, int64_t n)
{
    const struct bitgen_model *model = s->model;
    int64_t inner = max64(s->q_rows, s->ffn), widest = max64(s->q_rows + 2 * s->kv_rows, 2 * s->ffn);
    int64_t longest = max64(model->hidden, inner), groups = bitgen_groups(longest, GROUP_LEAST);
    int64_t stride = max64(bitgen_x_stride(longest), bitgen_row_stride(longest, GROUP_MOST));
    int64_t used = 0, part = min64(n, s->part);
    s->x = take(base, &used, n * model->hidden * 4);
    s->delta = take(base, &used, n * model->hidden * 4);
    s->wide = take(base, &used, part * widest * 4);
    s->inner = take(base, &used, part * inner * 4);
    s->final = take(base, &used, s->outputs * ceil_to(model->hidden, FLOATS) * 4);
    s->output_of = take(base, &used, s->outputs * 4);
    s->runs = take(base, &used, s->outputs * (int64_t)sizeof *s->runs);
    s->screen_x = take(base, &used, s->outputs * 2 * screen_stride(model));
    s->screen_scale = take(base, &used, s->outputs * 4);
    s->screen_start = take(base, &used, s->outputs * 2 * 16 * 4);
    s->screen_off = take(base, &used, s->outputs * (int64_t)sizeof *s->screen_off);
    s->screen_size = take(base, &used, s->outputs * (int64_t)sizeof *s->screen_size);
    s->screen_most = take(base, &used, s->outputs * screen_stride(model) / SCREEN_CHUNK * 4);
    s->screen_high = take(base, &used, screen_stride(model) / SCREEN_CHUNK * 4);
    s->scores = take(base, &used, s->best * model->vocab * 4);
    s->exact = take(base, &used, s->best * ceil_div(model->vocab, 32) * 4);
    s->attention = take(base, &used, s->ctx->threads * ceil_to(bitgen_attention_floats(model->head_dim), FLOATS) * 4);
    s->longest = ceil_to(longest, FLOATS);
    s->normed = take(base, &used, s->ctx->threads * s->longest * 4);
    s->xq = take(base, &used, part * s->planes * stride);
    s->x_sum = take(base, &used, part * s->planes * groups * 4);
    s->x_scale = take(base, &used, part * s->planes * groups * 4);
    s->blocks = take(base, &used, part * (int64_t)sizeof *s->blocks);
    s->parts = parts_bytes(s, n) ? take(base, &used, parts_bytes(s, n)) : NULL;
    return used;
}

/* What a level has for the sizes of this model, else what it has for every model. */
static const struct bitgen_step_ops *ops_for(const struct bitgen_step_ops *ops, const struct bitgen_model *model)
{
    for (int32_t i = 0; i < bitgen_step_level_count; ++i) {
        const struct bitgen_step_level *level = &bitgen_step_levels[i];
        if (level->ops == ops && level->sized && level->hidden == model->hidden && level->ffn == model->ffn &&
            level->q_rows == model->heads * model->head_dim && level->head_dim == model->head_dim)
            return level->sized;
    }
    return ops;
}

static struct step step_of(const struct bitgen_context *ctx, const struct bitgen_model *model)
{
    struct step s = {
        .ctx = (struct bitgen_context *)ctx,
        .ops = ops_for(ctx->ops, model),
        .model = model,
        .cache = cache_of(model),
        .q_rows = model->heads * model->head_dim,
        .kv_rows = model->kv_heads * model->head_dim,
        .hidden = model->hidden,
        .ffn = model->ffn,
        .planes = model->x_type == BITGEN_X_INT16 ? 2 : 1,
    };
    s.part = max64(PART_MIN, WIDE_BYTES / 4 / max64(s.q_rows + 2 * s.kv_rows, 2 * s.ffn));
    return s;
}

int32_t bitgen_cache_bytes(const struct bitgen_model *model, size_t *bytes)
{
    if (!bytes) return BITGEN_ERROR_NULL;
    int32_t code = check_sizes(model);
    if (!code) *bytes = (size_t)cache_of(model).total;
    return code;
}

int32_t bitgen_work_bytes(const bitgen_context *ctx, const struct bitgen_model *model, int64_t n, int64_t outputs,
                          int64_t best, size_t *bytes)
{
    if (!ctx || !bytes) return BITGEN_ERROR_NULL;
    int32_t code = check_sizes(model);
    if (code) return code;
    if (n < 1 || n > TOKENS_MAX || best < 0 || best > outputs || outputs > n) return BITGEN_ERROR_SHAPE;
    struct step s = step_of(ctx, model);
    s.outputs = outputs;
    s.best = best;
    *bytes = (size_t)place(&s, NULL, n);
    return BITGEN_OK;
}

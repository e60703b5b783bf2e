/* Norms (where the model does) and rotates the key-value heads [first, first + heads) of token t of the part, and the
 * heads of q that share them. */
static void rotate_heads(struct step *s, int64_t t, int64_t first, int64_t heads)
{
    const struct bitgen_model *model = s->model;
    const int64_t hd = model->head_dim, group = model->heads / model->kv_heads;
    const float *turn = model->rope + s->tokens->position[s->token + t] * hd;
    float *q = s->wide + t * (s->q_rows + 2 * s->kv_rows), *k = q + s->q_rows;
    q += first * group * hd;
    k += first * hd;
    if (s->layer->q_norm) s->ops->head_norm(q, heads * group, hd, s->layer->q_norm, model->norm_eps);
    if (s->layer->k_norm) s->ops->head_norm(k, heads, hd, s->layer->k_norm, model->norm_eps);
    s->ops->rotate(q, heads * group, hd, turn, 1.0f / (float)sqrt((double)hd));
    s->ops->rotate(k, heads, hd, turn, 1.0f);
}

/* Puts key and value of head h of token t into the cache. */
static void store_head(struct step *s, int64_t t, int64_t h)
{
    const struct bitgen_model *model = s->model;
    const int64_t hd = model->head_dim, token = s->token + t;
    const float *k = s->wide + t * (s->q_rows + 2 * s->kv_rows) + s->q_rows + h * hd, *v = k + s->kv_rows;
    const int64_t position = s->tokens->position[token];
    uint8_t *chunk = chunk_of(model, &s->cache, s->tokens->sequence[token], position / BITGEN_KEY_CHUNK, s->index, h);
    s->ops->store[model->kv_type](k, v, hd, position % BITGEN_KEY_CHUNK, chunk);
}

/* Tokens go 16 at a time: all heads of a token are one stretch of memory to rotate, and the keys of a head lie side by
 * side in the cache. */
static void store_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    const int64_t heads = s->model->kv_heads;
    (void)worker;
    for (int64_t first = begin; first < end; first += BITGEN_KEY_BLOCK) {
        const int64_t last = min64(first + BITGEN_KEY_BLOCK, end);
        for (int64_t t = first; t < last; ++t) rotate_heads(s, t, 0, heads);
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t t = first; t < last; ++t) store_head(s, t, h);
    }
}

/* The queries of a block of tokens that share a key-value head, on the keys of the chunks [begin, end). */
static void attend_block(struct step *s, int32_t worker, int64_t head, const struct block *block, int64_t begin,
                         int64_t end)
{
    const struct bitgen_model *model = s->model;
    const int64_t hd = model->head_dim, group = model->heads / model->kv_heads, total = block->count * group;
    const int64_t stride = s->q_rows + 2 * s->kv_rows;
    const float *q[BITGEN_QUERY_ROWS];
    float *out[BITGEN_QUERY_ROWS], *parts[BITGEN_QUERY_ROWS];
    int32_t last[BITGEN_QUERY_ROWS];
    struct bitgen_attention a = {
        .cache = chunk_of(model, &s->cache, s->tokens->sequence[s->token + block->first], 0, s->index, head),
        .next_chunk = s->cache.chunk,
        .next_head = s->cache.head,
        .q = q,
        .out = out,
        .last = last,
        .window = s->layer->window,
        .head_dim = hd,
        .begin = begin * BITGEN_KEY_CHUNK,
        .end = end * BITGEN_KEY_CHUNK,
        .parts = s->spans ? parts : NULL,
        .work = s->attention + worker * ceil_to(bitgen_attention_floats(hd), FLOATS),
    };
    for (int64_t done = 0; done < total; done += a.rows) {
        a.rows = min64(total - done, BITGEN_QUERY_ROWS);
        for (int64_t r = 0; r < a.rows; ++r) {
            int64_t t = block->first + (done + r) / group, column = head * group + (done + r) % group;
            q[r] = s->wide + t * stride + column * hd;
            out[r] = s->inner + t * s->q_rows + column * hd;
            last[r] = s->tokens->position[s->token + t];
            if (s->spans) parts[r] = s->parts + (t * model->heads + column) * s->chunks * bitgen_part_floats(hd);
        }
        s->ops->attend[model->kv_type](&a);
    }
}

/* Items run through the blocks of the first head, then of the next: a thread keeps the keys of its heads. */
static void attention_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    for (int64_t i = begin; i < end; ++i)
        attend_block(s, worker, i / s->block_count, &s->blocks[i % s->block_count], 0, s->chunks);
}

/* Fewer heads than threads can share: items are spans of a head's keys. */
static void spans_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    for (int64_t i = begin; i < end; ++i) {
        int64_t span = i % s->spans, item = i / s->spans, seen = s->chunks - s->unseen;
        attend_block(s, worker, item / s->block_count, &s->blocks[item % s->block_count],
                     s->unseen + seen * span / s->spans, s->unseen + seen * (span + 1) / s->spans);
    }
}

/* Then each query row merges its chunks in their order. */
static void merge_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    const int64_t hd = s->model->head_dim, heads = s->model->heads;
    float *work = s->attention + worker * ceil_to(bitgen_attention_floats(hd), FLOATS);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t position = s->tokens->position[s->token + i / heads];
        const int64_t first = bitgen_first_key(position, s->layer->window) / BITGEN_KEY_CHUNK;
        s->ops->merge_parts(s->parts + (i * s->chunks + first) * bitgen_part_floats(hd),
                            position / BITGEN_KEY_CHUNK + 1 - first, hd, work, s->inner + i * hd);
    }
}

/* Few tokens: keys and values of a head and an item's blocks are stored and attended to by one thread, without a
 * barrier between. */
static void fused_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    const int64_t parts = s->block_count / s->item_blocks;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t h = i / parts;
        const struct block *first = s->blocks + i % parts * s->item_blocks, *last = first + s->item_blocks - 1;
        for (int64_t t = first->first; t < last->first + last->count; ++t) {
            rotate_heads(s, t, h, 1);
            store_head(s, t, h);
        }
        for (const struct block *b = first; b <= last; ++b) attend_block(s, worker, h, b, 0, s->chunks);
    }
}

/* Whether each block is of another sequence: then none attends to what another one stores, and items are smaller. With
 * 5 heads, 2 threads and 8 sequences of 1,024 tokens attention took 26.9 ms, not 32.7. */
static int blocks_apart(const struct step *s)
{
    const int32_t *sequence = s->tokens->sequence + s->token;
    for (const struct block *b = s->blocks; b < s->blocks + s->block_count; ++b)
        for (const struct block *a = s->blocks; a < b; ++a)
            if (sequence[a->first] == sequence[b->first]) return 0;
    return 1;
}

/* Into how many spans of keys each item of attention is cut; 0: into none. */
static int64_t spans_of(const struct step *s, int64_t items, int64_t work)
{
    int64_t wanted = HEADS_A_THREAD * s->ctx->threads;
    const int64_t seen = s->chunks - s->unseen;
    if (!s->parts || items >= wanted || seen < 2 || work * items < 4 * ATTENTION_WORK) return 0;
    return min64(seen, (wanted + items - 1) / items);
}

/* Rotation, cache and attention of the part: wide -> inner. */
static void attention(struct step *s, int only_store)
{
    const struct bitgen_model *model = s->model;
    struct bitgen_pool *pool = s->ctx->pool;
    int64_t keys = 0, first = INT64_MAX, last = 0, heads = model->kv_heads, items = heads * s->block_count;
    for (int64_t t = 0; t < s->n; ++t) {
        const int64_t position = s->tokens->position[s->token + t];
        const int64_t oldest = bitgen_first_key(position, s->layer->window);
        keys += position + 1 - oldest;
        first = min64(first, oldest);
        last = max64(last, position);
    }
    s->unseen = first / BITGEN_KEY_CHUNK;
    s->chunks = last / BITGEN_KEY_CHUNK + 1;
    int64_t work = keys * 2 * model->head_dim * (model->heads / heads) / s->block_count; /* of an item */
    s->spans = only_store ? 0 : spans_of(s, items, work);
    s->item_blocks = s->n <= FUSED_TOKENS && blocks_apart(s) ? 1 : s->block_count;
    const int64_t fused = items / s->item_blocks;
    if (!only_store && !s->spans && (s->n == 1 || (s->n <= FUSED_TOKENS && fused >= 2 * s->ctx->threads))) {
        bitgen_pool_run(pool, fused_body, s, fused, ATTENTION_WORK / (work * s->item_blocks) + 1);
        stage_done(s, BITGEN_STAGE_ATTENTION);
        return;
    }
    over_tokens(s, store_body, 4 * (s->q_rows + s->kv_rows));
    stage_done(s, BITGEN_STAGE_ROPE);
    if (only_store) return;
    if (s->spans) {
        bitgen_pool_run(pool, spans_body, s, items * s->spans, 1);
        bitgen_pool_run(pool, merge_body, s, s->n * model->heads, ATTENTION_WORK / (s->chunks * model->head_dim) + 1);
    } else {
        bitgen_pool_run(pool, attention_body, s, items, ATTENTION_WORK / work + 1);
    }
    stage_done(s, BITGEN_STAGE_ATTENTION);
}

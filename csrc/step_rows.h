/* --- what rows want --- */

static int is_token(const struct bitgen_model *model, int32_t id) { return id >= 0 && id < model->vocab; }

/* The ids of a row's bias and names, and that a bias is finite. */
static int32_t check_ids(const struct bitgen_model *model, const struct bitgen_row *row)
{
    if (row->bias_count < 0 || row->named_count < 0) return BITGEN_ERROR_ARGUMENT;
    if (row->bias_count && (!row->bias || !row->bias_id)) return BITGEN_ERROR_NULL;
    if (row->named_count && (!row->named || !row->named_out)) return BITGEN_ERROR_NULL;
    for (int64_t i = 0; i < row->bias_count; ++i) {
        if (!is_token(model, row->bias_id[i])) return BITGEN_ERROR_TOKENS;
        if (largest_bits(row->bias + i, 1) >= INFINITE) return BITGEN_ERROR_ARGUMENT;
    }
    for (int64_t i = 0; i < row->named_count; ++i)
        if (!is_token(model, row->named[i])) return BITGEN_ERROR_TOKENS;
    return BITGEN_OK;
}

static int32_t check_row(const struct bitgen_model *model, const struct bitgen_row *row)
{
    if (row->want < BITGEN_WANT_NOTHING || row->want > BITGEN_WANT_BEST) return BITGEN_ERROR_ARGUMENT;
    if (row->want == BITGEN_WANT_NOTHING) return BITGEN_OK;
    if (row->want != BITGEN_WANT_BEST) return row->out ? BITGEN_OK : BITGEN_ERROR_NULL;
    if (row->best < 0 || row->best > model->vocab) return BITGEN_ERROR_ARGUMENT;
    if (row->best && (!row->out || !row->ids)) return BITGEN_ERROR_NULL;
    return check_ids(model, row);
}

/* Row i of `final` is that of token output_of[i]; logits of BITGEN_WANT_BEST go to `scores`, in their order. */
static void plan_rows(struct step *s)
{
    const int64_t vocab = s->model->vocab;
    int64_t output = 0, best = 0;
    s->run_count = s->screened = 0;
    for (int64_t t = 0; t < s->tokens->n; ++t) {
        const struct bitgen_row *row = &s->tokens->row[t];
        if (row->want == BITGEN_WANT_NOTHING) continue;
        s->output_of[output] = (int32_t)t;
        if (row->want != BITGEN_WANT_HIDDEN) {
            float *out = row->want == BITGEN_WANT_BEST ? s->scores + best++ * vocab : row->out;
            struct run *last = s->runs + max64(s->run_count - 1, 0);
            const int screened = is_screened(s->model, row);
            s->screened += screened;
            if (s->run_count && last->first + last->count == output && last->out + last->count * vocab == out &&
                last->screened == screened)
                ++last->count;
            else s->runs[s->run_count++] = (struct run){output, 1, out, screened};
        }
        ++output;
    }
}

/* The norm before the head, and the hidden states that are wanted. */
static void final_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    const int64_t k = s->hidden, stride = ceil_to(k, FLOATS);
    (void)worker;
    for (int64_t i = begin; i < end; ++i) {
        const struct bitgen_row *row = &s->tokens->row[s->output_of[i]];
        float *x = s->final + i * stride;
        found(s, s->ops->norm(s->x + i * k, s->delta + i * k, s->model->final_norm, s->model->norm_eps, k, x));
        if (row->want == BITGEN_WANT_HIDDEN) memcpy(row->out, x, (size_t)k * 4);
        s->screen_off[i] = 0;
        s->screen_size[i] = is_screened(s->model, row) ? size_of(x, k) : -1;
        if (s->ops->screen && s->screen_size[i] >= 0) measure_screened(s, i, x);
    }
}

static void head_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    const int64_t stride = ceil_to(s->hidden, FLOATS);
    (void)worker;
    for (int64_t i = begin; i < end; ++i)
        for (const struct run *run = s->runs; run < s->runs + s->run_count; ++run) {
            const struct bitgen_dense *head = run->screened ? &s->model->screen : &s->model->head;
            const int in_planes = run->screened && s->ops->screen;
            const struct bitgen_head a = {
                .x = s->final + run->first * stride,
                .planes = s->screen_x + run->first * 2 * screen_stride(s->model),
                .x_scale = s->screen_scale + run->first,
                .start = s->screen_start + run->first * 32,
                .high = s->screen_high,
                .high_count = s->screen_high_count,
                .w = head->data,
                .scale = head->scale,
                .out = run->out,
                .n = run->count,
                .k = s->hidden,
                .x_stride = in_planes ? screen_stride(s->model) : stride,
                .row_bytes = head->row_bytes,
                .out_stride = s->model->vocab,
                .row_begin = i * HEAD_ROWS,
                .row_end = min64((i + 1) * HEAD_ROWS, s->model->vocab),
            };
            (in_planes ? s->ops->screen : s->ops->head[head->type])(&a);
            for (int64_t t = 0; t < run->count && !run->screened; ++t)
                found(s, largest_bits(run->out + t * a.out_stride + a.row_begin, a.row_end - a.row_begin) >= INFINITE);
        }
}

/* Items are the rows of `scores`. */
static void best_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    const int64_t vocab = s->model->vocab, words = ceil_div(vocab, 32);
    int64_t item = 0;
    (void)worker;
    for (int64_t i = 0; i < s->outputs && item < end; ++i) {
        const struct bitgen_row *row = &s->tokens->row[s->output_of[i]];
        if (row->want != BITGEN_WANT_BEST || item++ < begin) continue;
        float *logits = s->scores + (item - 1) * vocab;
        const struct screened a = {s,
                                   s->final + i * ceil_to(s->hidden, FLOATS),
                                   s->screen_size[i],
                                   s->screen_off[i],
                                   logits,
                                   s->exact + (item - 1) * words};
        const int screened = s->screen_size[i] >= 0;
        if (screened) {
            memset(a.exact, 0, (size_t)words * 4);
            for (int64_t j = 0; j < row->bias_count; ++j) make_exact(&a, row->bias_id[j]);
            for (int64_t j = 0; j < row->named_count; ++j) make_exact(&a, row->named[j]);
        }
        for (int64_t j = 0; j < row->bias_count; ++j) logits[row->bias_id[j]] += row->bias[j];
        for (int64_t j = 0; j < row->named_count; ++j) row->named_out[j] = logits[row->named[j]];
        if (screened && row->best) screen_row(&a, row);
        if (row->best) choose_best(row, logits, vocab);
    }
}

/* Rows of `final` as the input of a head that is a matrix. */
static void quantize_final_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    for (int64_t t = begin; t < end; ++t)
        quantize_token(s, worker, t, s->final + (s->row + t) * ceil_to(s->hidden, FLOATS), NULL, s->hidden);
}

/* Items are the rows of a run's logits, from row `token` of the run on. */
static void check_logits_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    (void)worker;
    for (int64_t t = begin; t < end; ++t)
        found(s, largest_bits(s->logits + t * s->model->vocab, s->model->vocab) >= INFINITE);
}

/* Logits of a head that is a ternary matrix, of at most a part of rows at a time: xq holds no more. */
static int32_t multiply_head(struct step *s)
{
    const int64_t vocab = s->model->vocab;
    s->weight = NULL;
    for (const struct run *run = s->runs; run < s->runs + s->run_count; ++run)
        for (int64_t done = 0; done < run->count; done += s->n) {
            s->n = min64(s->part, run->count - done);
            s->row = run->first + done;
            s->logits = run->out + done * vocab;
            int32_t code = prepare(s, &s->model->lm_head, vocab, s->hidden);
            if (code) return code;
            over_tokens(s, quantize_final_body, s->hidden);
            if ((code = multiply(s, s->logits))) return code;
            over_tokens(s, check_logits_body, vocab);
        }
    return BITGEN_OK;
}

/* The same of a head in a format of floats. */
static int32_t multiply_dense_head(struct step *s)
{
    const int64_t items = ceil_div(s->model->vocab, HEAD_ROWS);
    bitgen_pool_run(s->ctx->pool, head_body, s, items, max64(1, items / (16 * s->ctx->threads)));
    return BITGEN_OK;
}

/* x + delta of the tokens that want something -> what they want. */
static int32_t answer_rows(struct step *s)
{
    struct bitgen_pool *pool = s->ctx->pool;
    const int ternary = s->model->lm_head.packed != NULL;
    plan_rows(s);
    s->n = s->outputs;
    if (s->run_count && !ternary) {
        const struct bitgen_dense *head = s->runs[0].screened ? &s->model->screen : &s->model->head;
        bitgen_pool_ahead(pool, head->data, s->model->vocab * head->row_bytes);
    }
    over_tokens(s, final_body, s->hidden);
    stage_done(s, BITGEN_STAGE_NORM);
    if (atomic_load(&s->not_finite)) return BITGEN_ERROR_NOT_FINITE;
    if (!s->run_count) return BITGEN_OK;
    if (s->screened && s->ops->screen) quantize_screened(s);
    const int32_t code = ternary ? multiply_head(s) : multiply_dense_head(s);
    if (code) return code;
    if (atomic_load(&s->not_finite)) return BITGEN_ERROR_NOT_FINITE;
    if (s->best) bitgen_pool_run(pool, best_body, s, s->best, 1);
    stage_done(s, BITGEN_STAGE_HEAD);
    return atomic_load(&s->not_finite) ? BITGEN_ERROR_NOT_FINITE : BITGEN_OK;
}

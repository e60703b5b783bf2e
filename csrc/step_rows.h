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

/* Whether the best of a row are found by way of the screen: when it leaves few rows of the head to be read. */
static int is_screened(const struct bitgen_model *model, const struct bitgen_row *row)
{
    return model->screen.data && !model->lm_head.packed && row->want == BITGEN_WANT_BEST &&
           row->best + row->bias_count + row->named_count <= model->vocab / SCREEN_SHARE;
}

/* Row i of `final` is that of token output_of[i]; logits of BITGEN_WANT_BEST go to `scores`, in their order. */
static void plan_rows(struct step *s)
{
    const int64_t vocab = s->model->vocab;
    int64_t output = 0, best = 0;
    s->run_count = 0;
    for (int64_t t = 0; t < s->tokens->n; ++t) {
        const struct bitgen_row *row = &s->tokens->row[t];
        if (row->want == BITGEN_WANT_NOTHING) continue;
        s->output_of[output] = (int32_t)t;
        if (row->want != BITGEN_WANT_HIDDEN) {
            float *out = row->want == BITGEN_WANT_BEST ? s->scores + best++ * vocab : row->out;
            struct run *last = s->runs + max64(s->run_count - 1, 0);
            const int screened = is_screened(s->model, row);
            if (s->run_count && last->first + last->count == output && last->out + last->count * vocab == out &&
                last->screened == screened)
                ++last->count;
            else s->runs[s->run_count++] = (struct run){output, 1, out, screened};
        }
        ++output;
    }
}

/* The norm of the hidden state, not rounded down. */
static double size_of(const float *x, int64_t k)
{
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += (double)x[i] * x[i];
    return sqrt(sum) * (1 + 0x1p-40);
}

/* Row i of `final` in two planes for the screen, and how far they and the sums of them may be off: see
 * docs/reference/screened-head.md. */
static void quantize_screened(struct step *s, int64_t i, const float *x)
{
    const int64_t k = s->hidden, stride = screen_stride(s->model);
    int8_t *planes = s->screen_x + i * 2 * stride;
    float scale[2];
    int32_t sum[2];
    found(s, s->ops->quantize_planes(x, k, 0, stride, planes, scale, sum));
    s->screen_scale[i] = scale[1];
    s->ops->screen_start(planes, stride, s->screen_start + i * 32);
    double off = 0;
    for (int64_t j = 0; j < k; ++j) {
        const double rounded = (double)x[j] - (double)scale[1] * (256 * planes[j] + planes[stride + j]);
        off += rounded * rounded;
    }
    off = sqrt(off) * (1 + 0x1p-40);
    s->screen_off[i] = off + 0x1p-20 * (size_of(x, k) + off + 256 * (double)scale[1] * sqrt((double)k));
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
        if (s->ops->screen && is_screened(s->model, row)) quantize_screened(s, i, x);
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

/* A heap of the best so far, the worst of them at its root: order is by logit, among equals the lower id is better. */
struct heap {
    int32_t *ids;
    float *logits;
    int64_t count;
};

static int is_worse(const struct heap *h, int64_t i, int64_t j)
{ return h->logits[i] < h->logits[j] || (h->logits[i] == h->logits[j] && h->ids[i] > h->ids[j]); }

static void swap(const struct heap *h, int64_t i, int64_t j)
{
    const float logit = h->logits[i];
    const int32_t id = h->ids[i];
    h->logits[i] = h->logits[j];
    h->ids[i] = h->ids[j];
    h->logits[j] = logit;
    h->ids[j] = id;
}

static void sift_down(const struct heap *h, int64_t i)
{
    for (int64_t child; (child = 2 * i + 1) < h->count; i = child) {
        if (child + 1 < h->count && is_worse(h, child + 1, child)) ++child;
        if (!is_worse(h, child, i)) return;
        swap(h, i, child);
    }
}

static void push(struct heap *h, int32_t id, float logit)
{
    int64_t i = h->count++;
    h->ids[i] = id;
    h->logits[i] = logit;
    for (; i > 0 && is_worse(h, i, (i - 1) / 2); i = (i - 1) / 2) swap(h, i, (i - 1) / 2);
}

static int is_allowed(const struct bitgen_row *row, int64_t id)
{ return !row->allowed || (row->allowed[id / 32] >> id % 32 & 1); }

/* Whether any of the logits from id `begin` on is above `least`: a loop that compilers turn into vectors, so that most
 * of a vocabulary is passed over by blocks (with those of screen_row 0.2 ms, not 0.9, for a row of 128,256). */
static int any_above(const float *logits, int64_t begin, int64_t end, float least)
{
    int32_t above = 0;
    for (int64_t id = begin; id < end; ++id) above += logits[id] > least;
    return above;
}

/* The best of the allowed logits, falling; the lower id first among equals. */
static void choose_best(const struct bitgen_row *row, const float *logits, int64_t vocab)
{
    struct heap h = {row->ids, row->out, 0};
    for (int64_t begin = 0; begin < vocab; begin += ID_BLOCK) {
        const int64_t end = min64(begin + ID_BLOCK, vocab);
        if (h.count == row->best && !any_above(logits, begin, end, h.logits[0])) continue;
        for (int64_t id = begin; id < end; ++id) {
            if (!is_allowed(row, id)) continue;
            if (h.count < row->best) {
                push(&h, (int32_t)id, logits[id]);
            } else if (logits[id] > h.logits[0]) { /* ids rise: an equal one is worse */
                h.ids[0] = (int32_t)id;
                h.logits[0] = logits[id];
                sift_down(&h, 0);
            }
        }
    }
    for (int64_t i = h.count; i < row->best; ++i) {
        row->ids[i] = -1;
        row->out[i] = -INFINITY;
    }
    while (h.count > 1) {
        swap(&h, 0, --h.count);
        sift_down(&h, 0);
    }
}

/* The logits of a row while they become the head's own where the screen's do not decide. */
struct screened {
    struct step *s;
    const float *x;  /* the hidden state */
    double off;      /* how far the screen's is from it, and more for what it rounds; 0: the screen takes x */
    float *logits;   /* (vocab) */
    uint32_t *exact; /* bit id: logits[id] is the head's */
};

static int is_exact(const struct screened *a, int64_t id) { return a->exact[id / 32] >> id % 32 & 1; }

static int any_exact(const struct screened *a, int64_t begin, int64_t end)
{
    uint32_t some = 0;
    for (int64_t word = begin / 32; word < ceil_div(end, 32); ++word) some |= a->exact[word];
    return some != 0;
}

/* The head's own logit of a token: the bits that all rows at once give. */
static void make_exact(const struct screened *a, int64_t id)
{
    const struct bitgen_dense *head = &a->s->model->head;
    const struct bitgen_head row = {
        .x = a->x,
        .w = head->data,
        .scale = head->scale,
        .out = a->logits,
        .n = 1,
        .k = a->s->hidden,
        .x_stride = ceil_to(a->s->hidden, FLOATS),
        .row_bytes = head->row_bytes,
        .out_stride = a->s->model->vocab,
        .row_begin = id,
        .row_end = id + 1,
    };
    if (is_exact(a, id)) return;
    a->s->ops->head[head->type](&row);
    a->exact[id / 32] |= 1u << id % 32;
    found(a->s, largest_bits(a->logits + id, 1) >= INFINITE);
}

/* Whether the head's own logit of a token may be `least` or more. */
static int reaches(const struct screened *a, int64_t id, double size, double by_scale, double least)
{
    const struct bitgen_model *model = a->s->model;
    const double off = size * model->screen_bound[id] + by_scale * model->screen.scale[id] + 0x1p-100;
    const double most = fabs((double)a->logits[id]) + off;
    /* The last: what may be infinite, or is NaN. */
    return a->logits[id] + off + most * 0x1p-22 >= least || !(most < 0x1p127);
}

/* Whether that may be so of any token of a block, in floats, which compilers turn into vectors: whatever is rounded
 * here is less than what the terms with 2^-18 add, and what is infinite or NaN may. */
static int any_reaches(const struct screened *a, int64_t begin, int64_t end, double size, double by_scale, double least)
{
    const float *bound = a->s->model->screen_bound, *scale = a->s->model->screen.scale, *logits = a->logits;
    const float by = (float)(size * (1 + 0x1p-18)), by_s = (float)(by_scale * (1 + 0x1p-18));
    const float below = (float)(least - fabs(least) * 0x1p-18 - 0x1p-99);
    int32_t under = 0;
    for (int64_t id = begin; id < end; ++id) {
        const float off = bound[id] * by + scale[id] * by_s, most = fabsf(logits[id]) + off;
        under += (logits[id] + fabsf(logits[id]) * 0x1p-18f + off < below) & (most < 0x1p126f);
    }
    return under < end - begin;
}

/* Screened logits, with bias -> the head's own for every token that may be among the best, -infinity for the others.
 *
 * The best by the screen become exact first; as many tokens have at least their least logit, so no token below it can
 * be among the best. A token's two logits are at most size * screen_bound apart, and the norm of its int8 row, which is
 * below 127 sqrt(k) * scale, times what x is off (docs/reference/screened-head.md); the addition of its bias rounds by
 * 2^-24 of the sum. */
static void screen_row(const struct screened *a, const struct bitgen_row *row)
{
    const struct bitgen_model *model = a->s->model;
    const double size = size_of(a->x, a->s->hidden), by_scale = 127 * sqrt((double)a->s->hidden) * a->off;
    double least = INFINITY;
    choose_best(row, a->logits, model->vocab);
    for (int64_t i = 0; i < row->best; ++i) {
        if (row->ids[i] < 0) { /* fewer are allowed than wanted */
            least = -INFINITY;
            break;
        }
        make_exact(a, row->ids[i]);
        if (a->logits[row->ids[i]] < least) least = a->logits[row->ids[i]];
    }
    for (int64_t begin = 0; begin < model->vocab; begin += ID_BLOCK) {
        const int64_t end = min64(begin + ID_BLOCK, model->vocab);
        const int may = any_reaches(a, begin, end, size, by_scale, least);
        if (!may && !any_exact(a, begin, end)) { /* nor do those matter that are not allowed */
            for (int64_t id = begin; id < end; ++id) a->logits[id] = -INFINITY;
            continue;
        }
        for (int64_t id = begin; id < end; ++id) {
            if (is_exact(a, id) || !is_allowed(row, id)) continue;
            if (may && reaches(a, id, size, by_scale, least)) make_exact(a, id);
            else a->logits[id] = -INFINITY;
        }
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
        const struct screened a = {s, s->final + i * ceil_to(s->hidden, FLOATS), s->screen_off[i], logits,
                                   s->exact + (item - 1) * words};
        const int screened = is_screened(s->model, row);
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
    const int32_t code = ternary ? multiply_head(s) : multiply_dense_head(s);
    if (code) return code;
    if (atomic_load(&s->not_finite)) return BITGEN_ERROR_NOT_FINITE;
    if (s->best) bitgen_pool_run(pool, best_body, s, s->best, 1);
    stage_done(s, BITGEN_STAGE_HEAD);
    return atomic_load(&s->not_finite) ? BITGEN_ERROR_NOT_FINITE : BITGEN_OK;
}

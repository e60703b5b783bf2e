/* --- the best logits of a row, and the screen that finds them --- */

/* Whether the best of a row are found by way of the screen: when it leaves few rows of the head to be read. */
static int is_screened(const struct bitgen_model *model, const struct bitgen_row *row)
{
    return model->screen.data && !model->lm_head.packed && row->want == BITGEN_WANT_BEST &&
           row->best + row->bias_count + row->named_count <= model->vocab / SCREEN_SHARE;
}

/* The norm of the hidden state, not rounded down. */
static double size_of(const float *x, int64_t k)
{
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += (double)x[i] * x[i];
    return sqrt(sum) * (1 + 0x1p-40);
}

/* The largest magnitude of each chunk of columns of row i of `final`. */
static void measure_screened(struct step *s, int64_t i, const float *x)
{
    const int64_t chunks = screen_stride(s->model) / SCREEN_CHUNK;
    float *most = s->screen_most + i * chunks;
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t end = min64((c + 1) * SCREEN_CHUNK, s->hidden);
        most[c] = 0;
        for (int64_t j = c * SCREEN_CHUNK; j < end; ++j) most[c] = fabsf(x[j]) > most[c] ? fabsf(x[j]) : most[c];
    }
}

/* The chunks of columns that need two planes: those that do not fit in 8 bits with steps that leave each row SCREEN_OFF
 * of its norm on average. Outliers stand in few columns, the same ones of all tokens. */
static void choose_planes(struct step *s)
{
    const int64_t chunks = screen_stride(s->model) / SCREEN_CHUNK;
    const double steps = 127 * SCREEN_OFF * sqrt(12 / (double)s->hidden);
    s->screen_high_count = 0;
    for (int64_t c = 0; c < chunks; ++c) {
        int high = 0;
        for (int64_t i = 0; i < s->outputs && !high; ++i)
            high = s->screen_size[i] >= 0 && s->screen_most[i * chunks + c] > steps * s->screen_size[i];
        if (high) s->screen_high[s->screen_high_count++] = (int32_t)c;
    }
}

/* The smallest step with which row i fits: in 16 bits, and in 8 bits where its columns have one plane. */
static float rounding_step(const struct step *s, int64_t i)
{
    const int64_t chunks = screen_stride(s->model) / SCREEN_CHUNK;
    const float *most = s->screen_most + i * chunks;
    const int32_t *high = s->screen_high, *end = high + s->screen_high_count;
    float step = 0;
    for (int64_t c = 0; c < chunks; ++c) {
        const int is_high = high < end && *high == c;
        const float least = most[c] / (is_high ? 32639.0f : 127.0f);
        high += is_high;
        step = least > step ? least : step;
    }
    return step;
}

/* Items are rows of `final`: those that are screened in two planes, and how far they and the sums of them may be off:
 * see docs/reference/screened-head.md. */
static void quantize_screened_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct step *s = arg;
    const int64_t k = s->hidden, stride = screen_stride(s->model);
    (void)worker;
    for (int64_t i = begin; i < end; ++i) {
        if (s->screen_size[i] < 0) continue;
        const float *x = s->final + i * ceil_to(k, FLOATS), step = rounding_step(s, i);
        const float by = step > 0x1p-100f ? 1 / step : 0; /* smaller ones are all off: nothing divides by them */
        int8_t *high = s->screen_x + i * 2 * stride, *low = high + stride;
        double off = 0;
        memset(high, 0, (size_t)(2 * stride));
        for (int64_t j = 0; j < k; ++j) {
            const int32_t v = (int32_t)(x[j] * by + (x[j] < 0 ? -0.5f : 0.5f));
            low[j] = (int8_t)(((v + 128) & 255) - 128);
            high[j] = (int8_t)((v - low[j]) / 256);
        }
        for (int64_t j = 0; j < k; ++j) {
            const double rounded = (double)x[j] - (double)step * (256 * high[j] + low[j]);
            off += rounded * rounded;
        }
        off = sqrt(off) * (1 + 0x1p-40);
        s->screen_off[i] = off + 0x1p-20 * (s->screen_size[i] + off + 256 * (double)step * sqrt((double)k));
        s->screen_scale[i] = step;
        s->ops->screen_start(high, stride, s->screen_start + i * 32);
    }
}

/* The rows of `final` that are screened, as their screen reads them. */
static void quantize_screened(struct step *s)
{
    choose_planes(s);
    over_tokens(s, quantize_screened_body, s->hidden);
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
    double size;     /* its norm */
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
static int reaches(const struct screened *a, int64_t id, double least)
{
    const struct bitgen_model *model = a->s->model;
    const double off = a->size * model->screen_bound[id] + a->off * model->screen_norm[id] + 0x1p-100;
    const double most = fabs((double)a->logits[id]) + off;
    /* The last: what may be infinite, or is NaN. */
    return a->logits[id] + off + most * 0x1p-22 >= least || !(most < 0x1p127);
}

/* Whether that may be so of any token of a block, in floats, which compilers turn into vectors: whatever is rounded
 * here is less than what the terms with 2^-18 add, and what is infinite or NaN may. */
static int any_reaches(const struct screened *a, int64_t begin, int64_t end, double least)
{
    const float *bound = a->s->model->screen_bound, *norm = a->s->model->screen_norm, *logits = a->logits;
    const float by = (float)(a->size * (1 + 0x1p-18)), by_norm = (float)(a->off * (1 + 0x1p-18));
    const float below = (float)(least - fabs(least) * 0x1p-18 - 0x1p-99);
    int32_t under = 0;
    for (int64_t id = begin; id < end; ++id) {
        const float off = bound[id] * by + norm[id] * by_norm, most = fabsf(logits[id]) + off;
        under += (logits[id] + fabsf(logits[id]) * 0x1p-18f + off < below) & (most < 0x1p126f);
    }
    return under < end - begin;
}

/* Screened logits, with bias -> the head's own for every token that may be among the best, -infinity for the others.
 *
 * The best by the screen become exact first; as many tokens have at least their least logit, so no token below it can
 * be among the best. A token's two logits are at most size * screen_bound apart, and the norm of its int8 row times
 * what x is off (docs/reference/screened-head.md); the addition of its bias rounds by 2^-24 of the sum. */
static void screen_row(const struct screened *a, const struct bitgen_row *row)
{
    const struct bitgen_model *model = a->s->model;
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
        const int may = any_reaches(a, begin, end, least);
        if (!may && !any_exact(a, begin, end)) { /* nor do those matter that are not allowed */
            for (int64_t id = begin; id < end; ++id) a->logits[id] = -INFINITY;
            continue;
        }
        for (int64_t id = begin; id < end; ++id) {
            if (is_exact(a, id) || !is_allowed(row, id)) continue;
            if (may && reaches(a, id, least)) make_exact(a, id);
            else a->logits[id] = -INFINITY;
        }
    }
}

/* Weights (m, k) int8 in -1, 0, 1, or codes, to packed weights. bitgen/reference.py defines the same bytes in
 * numpy.
 *
 * The matrix is padded with zero weights to whole row blocks and chunks. A row block holds its chunks in order of
 * k, each of row_block / 16 sub-blocks of 16 rows, then the trailers of its sub-blocks. Code = weight + 1.
 */
#include "table.h"

#include <string.h>

enum { ROWS = 16, K_CHUNK_MAX = 48, TAIL = 8 };

/* One chunk of 16 rows: codes (ROWS, k_chunk) -> cell, adding to the trailer; `sub`: which sub-block of its block. */
typedef void pack_cell(const uint8_t *codes, uint8_t *cell, int32_t *trailer, int64_t sub);

/* byte[4 r + j] = sum over s of code[r, 4 s + j] << 2 s */
static void pack_i2s(const uint8_t *codes, uint8_t *cell, int32_t *trailer, int64_t sub)
{
    (void)trailer;
    (void)sub;
    for (int r = 0; r < ROWS; ++r) {
        uint32_t c[4]; /* four codes each, j = 0..3: no code is above 2, so no bit leaves its byte */
        memcpy(c, codes + 16 * r, 16);
        const uint32_t bytes = c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6;
        memcpy(cell + 4 * r, &bytes, 4);
    }
}

/* byte[16 l + r] = idx(r, 4 l) | idx(r, 4 l + 2) << 4, idx(r, i) = 3 code[r, i] + code[r, i + 1] */
static void pack_tl1(const uint8_t *codes, uint8_t *cell, int32_t *trailer, int64_t sub)
{
    (void)trailer;
    (void)sub;
    for (int r = 0; r < ROWS; ++r)
        for (int l = 0; l < 4; ++l) {
            const uint8_t *c = codes + 16 * r + 4 * l;
            cell[16 * l + r] = (uint8_t)((3 * c[0] + c[1]) | (3 * c[2] + c[3]) << 4);
        }
}

/* v = 9 w0 + 3 w1 + w2 of three weights, from their codes. */
static int triple(const uint8_t *c) { return 9 * c[0] + 3 * c[1] + c[2] - 13; }

/* Lane l holds k = 12 l .. 12 l + 11 as triples 0..3: 64 bytes |v0| | |v1| << 4, 64 bytes |v2| | |v3| << 4, 16
 * bytes of signs a row (bit l: v0 < 0 in lane l, bit 4 + l: v1 < 0), 16 bytes for v2, v3. The trailer counts the
 * negative v of each row. */
static void pack_tl2(const uint8_t *codes, uint8_t *cell, int32_t *trailer, int64_t sub)
{
    (void)sub;
    memset(cell + 128, 0, 32);
    for (int r = 0; r < ROWS; ++r)
        for (int l = 0; l < 4; ++l)
            for (int half = 0; half < 2; ++half) {
                const uint8_t *c = codes + 48 * r + 12 * l + 6 * half;
                int v0 = triple(c), v1 = triple(c + 3);
                int low = v0 < 0, high = v1 < 0;
                cell[64 * half + 16 * l + r] = (uint8_t)((low ? -v0 : v0) | (high ? -v1 : v1) << 4);
                cell[128 + 16 * half + r] |= (uint8_t)(low << l | high << (4 + l));
                trailer[r] += low + high;
            }
}

/* The byte of a fifth code and four codes as a base-3 number (bitgen/packing.py, T5_CODES). */
static const uint8_t t5_codes[3][81] = BITGEN_T5_CODES;

/* byte[4 r + j] holds code[r, 4 s + j], s = 0..4 */
static void pack_t5(const uint8_t *codes, uint8_t *cell, int32_t *trailer, int64_t sub)
{
    (void)trailer;
    (void)sub;
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < 4; ++j) {
            const uint8_t *c = codes + 20 * r + j;
            cell[4 * r + j] = t5_codes[c[16]][27 * c[0] + 9 * c[4] + 3 * c[8] + c[12]];
        }
}

/* Four vectors of 64 bytes for each 64 rows: byte 16 l + 4 u + q of vector j holds code[4 s + j], s = 0..4, of row
 * 4 l + q of sub-block u, as sign and index (bitgen/packing.py). The trailer counts the negative values of each row. */
static void pack_tl5(const uint8_t *codes, uint8_t *cell, int32_t *trailer, int64_t sub)
{
    int64_t u = sub % 4;
    uint8_t *vectors = cell - 64 * u; /* of the 64 rows */
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < 4; ++j) {
            const uint8_t *c = codes + 20 * r + j;
            int v = 81 * c[0] + 27 * c[4] + 9 * c[8] + 3 * c[12] + c[16] - 121, size = v < 0 ? -v : v;
            int t = (size + 4) / 9, p = size - 9 * t;
            int index = p == 0 ? 112 + t : 8 * t + p + (p < 0 ? 4 : 3);
            vectors[64 * j + 16 * (r / 4) + 4 * u + r % 4] = (uint8_t)(index | (v < 0) << 7);
            trailer[r] += v < 0;
        }
}

/* byte[4 r + j] = sum over s of code[r, 4 s + j] << s */
static void pack_q1(const uint8_t *codes, uint8_t *cell, int32_t *trailer, int64_t sub)
{
    (void)trailer;
    (void)sub;
    for (int r = 0; r < ROWS; ++r) {
        uint32_t c[8], bytes = 0; /* four codes each, j = 0..3, of one bit */
        memcpy(c, codes + 32 * r, 32);
        for (int s = 0; s < 8; ++s) bytes |= c[s] << s;
        memcpy(cell + 4 * r, &bytes, 4);
    }
}

/* byte[4 r + j] = code[r, j] | code[r, 4 + j] << 4 */
static void pack_nibbles(const uint8_t *codes, uint8_t *cell, int32_t *trailer, int64_t sub)
{
    (void)trailer;
    (void)sub;
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < 4; ++j) cell[4 * r + j] = (uint8_t)(codes[8 * r + j] | codes[8 * r + 4 + j] << 4);
}

/* Codes Q[s] of k = 4 s + j: byte[64 p + 4 r + j] = Q[2 p] | Q[2 p + 1] << 4 | (Q[6] >> p & 1) << 3 |
 * (Q[7] >> p & 1) << 7, p = 0, 1, 2 */
static void pack_t3(const uint8_t *codes, uint8_t *cell, int32_t *trailer, int64_t sub)
{
    const uint32_t ones = 0x01010101;
    (void)trailer;
    (void)sub;
    for (int r = 0; r < ROWS; ++r) {
        uint32_t q[8]; /* four codes each, j = 0..3, of three bits */
        memcpy(q, codes + 32 * r, 32);
        for (int p = 0; p < 3; ++p) {
            const uint32_t spread = (q[6] >> p & ones) << 3 | (q[7] >> p & ones) << 7;
            const uint32_t bytes = q[2 * p] | q[2 * p + 1] << 4 | spread;
            memcpy(cell + 64 * p + 4 * r, &bytes, 4);
        }
    }
}

static const struct {
    const char *family;
    pack_cell *pack;
} packers[] = {{"i2s", pack_i2s},    {"tl1", pack_tl1},     {"tl2", pack_tl2},    {"t5", pack_t5}, {"tl5", pack_tl5},
               {"q4", pack_nibbles}, {"q4m", pack_nibbles}, {"t4", pack_nibbles}, {"t3", pack_t3}, {"q1", pack_q1}};

struct packing {
    const struct bitgen_layout *layout;
    pack_cell *pack;
    const struct bitgen_weights *weights;
    uint8_t *blocks;
    _Atomic int32_t bad_codes, bad_scales;
};

enum { TABLES = 4, TABLE_BYTES = 16, LINE = 64 };

/* The largest code of a kind: one less than a power of two. */
static uint8_t code_max(int32_t kind) { return kind == BITGEN_WEIGHTS_Q1 ? 1 : kind == BITGEN_WEIGHTS_T3 ? 7 : 15; }

/* Bytes in front of the groups of a row block: tables, and which of them each group of each sub-block has. */
static int64_t head_bytes(const struct bitgen_layout *layout, int64_t groups)
{
    if (!bitgen_has_tables(layout->kind)) return 0;
    return TABLES * TABLE_BYTES + ceil_div(layout->row_block / ROWS * groups, LINE) * LINE;
}

static int64_t block_bytes(const struct bitgen_layout *layout, int64_t scale_bytes, int64_t k)
{
    int64_t chunks = ceil_div(k, layout->k_chunk) * layout->chunk_bytes + layout->trailer_bytes;
    int64_t groups = bitgen_groups(k, layout->group), subs = layout->row_block / ROWS;
    int64_t group_bytes = layout->group_bytes + ROWS * bitgen_scales_each(layout->kind) * scale_bytes;
    return layout->group ? head_bytes(layout, groups) + subs * groups * group_bytes : subs * chunks;
}

int64_t bitgen_layout_bytes(const struct bitgen_layout *layout, int64_t scale_bytes, int64_t m, int64_t k)
{ return ceil_div(m, layout->row_block) * block_bytes(layout, scale_bytes, k); }

int bitgen_is_half(float value, uint16_t *half)
{
    uint32_t bits, rest;
    memcpy(&bits, &value, 4);
    const uint32_t magnitude = bits & 0x7fffffff, exponent = magnitude >> 23,
                   fraction = (magnitude & 0x7fffff) | 0x800000;
    *half = (uint16_t)(bits >> 16 & 0x8000);
    if (magnitude == 0) return 1;
    if (exponent < 127 - 24 || exponent > 127 + 15) return 0;
    if (exponent > 127 - 15) { /* a normal number: the fraction has 10 bits */
        *half |= (uint16_t)((exponent - 112) << 10 | (magnitude >> 13 & 0x3ff));
        rest = fraction & 0x1fff;
    } else { /* a multiple of 2^-24 */
        *half |= (uint16_t)(fraction >> (126 - exponent));
        rest = fraction & ((1u << (126 - exponent)) - 1);
    }
    return !rest;
}

/* Four weights to codes, byte by byte in one word. Where one is not -1, 0 or 1: zero weights, and *bad. */
static void encode(const int8_t *w, uint8_t *codes, uint32_t *bad)
{
    const uint32_t ones = 0x01010101, tops = ones << 7;
    uint32_t x;
    memcpy(&x, w, 4);
    x = ((x & ~tops) + ones) ^ (x & tops);                          /* + 1 in each byte, without carries */
    const uint32_t wrong = (x & ~(3 * ones)) | (x & x >> 1 & ones); /* above 3, or 3 */
    if (wrong) x = ones;
    *bad |= wrong;
    memcpy(codes, &x, 4);
}

/* The same of weights that are codes already, 0 where the matrix has none. */
static void gather_codes(const struct bitgen_weights *from, int64_t row, int64_t column, int64_t width, uint8_t *codes,
                         uint32_t *bad)
{
    const uint8_t most = code_max(from->codes->kind);
    int64_t columns = from->k - column < width ? from->k - column : width;
    memset(codes, 0, (size_t)(ROWS * width));
    for (int64_t r = 0; r < ROWS && row + r < from->m && columns > 0; ++r) {
        const uint8_t *own = from->codes->codes + (row + r) * from->k + column;
        for (int64_t i = 0; i < columns; ++i) {
            codes[r * width + i] = own[i] & most;
            *bad |= own[i] > most;
        }
    }
}

/* The codes of rows row .. row + 15 and columns column .. column + width - 1; 1, the code of a zero weight, where
 * the matrix has none. */
static void gather(const struct bitgen_weights *from, int64_t row, int64_t column, int64_t width, uint8_t *codes,
                   uint32_t *bad)
{
    if (from->codes) {
        gather_codes(from, row, column, width, codes, bad);
        return;
    }
    int64_t columns = from->k - column < width ? from->k - column : width;
    for (int64_t r = 0; r < ROWS; ++r, codes += width) {
        int64_t i = 0;
        if (row + r < from->m) {
            const int8_t *w = from->w + (row + r) * from->k + column;
            for (; i + 4 <= columns; i += 4) encode(w + i, codes + i, bad);
            if (i < columns) {
                int8_t rest[4] = {0};
                memcpy(rest, w + i, (size_t)(columns - i));
                encode(rest, codes + i, bad);
                i += 4; /* within the row of codes: every k_chunk is a multiple of 4 */
            }
        }
        if (i < width) memset(codes + i, 1, (size_t)(width - i));
    }
}

/* The scales of rows row .. row + 15 and a group: 0 where the matrix has no such row. Returns 1 where one is not
 * finite, or no half float where it must be one. */
static int32_t pack_scales(const struct bitgen_weights *from, const float *scales, int64_t row, int64_t g,
                           int64_t groups, uint8_t *cell)
{
    int32_t bad = 0;
    for (int64_t r = row; r < row + ROWS; ++r) {
        const float scale = r < from->m ? scales[r * groups + g] : 0.0f;
        const int half = from->scale_type == BITGEN_SCALE_F16;
        uint16_t bits = 0;
        bad |= !(scale - scale == 0.0f) || (half && !bitgen_is_half(scale, &bits));
        if (half) memcpy(cell + 2 * (r - row), &bits, 2);
        else memcpy(cell + 4 * (r - row), &scale, 4);
    }
    return bad;
}

/* The last TAIL weights of a group, as 2-bit codes: byte[i] = V[i] | V[32 + i] << 4 with V[4 r + j] = code[r, j] |
 * code[r, 4 + j] << 2. */
static void pack_tail(const uint8_t *codes, uint8_t *cell)
{
    uint8_t v[4 * ROWS];
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < 4; ++j) v[4 * r + j] = (uint8_t)(codes[TAIL * r + j] | codes[TAIL * r + 4 + j] << 2);
    for (int i = 0; i < 2 * ROWS; ++i) cell[i] = (uint8_t)(v[i] | v[2 * ROWS + i] << 4);
}

/* What is in front of a row block's groups; -128 is no value of a table. */
static void pack_head(const struct packing *p, int64_t block, int64_t groups, uint8_t *cell, uint32_t *bad)
{
    const struct bitgen_codes *from = p->weights->codes;
    const int64_t subs = p->layout->row_block / ROWS, first = block * subs, last = ceil_div(p->weights->m, ROWS);
    memset(cell, 0, (size_t)head_bytes(p->layout, groups));
    memcpy(cell, from->tables, (size_t)(from->table_count * TABLE_BYTES));
    for (int64_t i = 0; i < from->table_count * TABLE_BYTES; ++i) *bad |= from->tables[i] == INT8_MIN;
    if (!from->selectors) return;
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t sub = 0; sub < subs && first + sub < last; ++sub) {
            const uint8_t table = from->selectors[(first + sub) * groups + g];
            *bad |= table >= from->table_count;
            cell[TABLES * TABLE_BYTES + g * subs + sub] = table;
        }
}

/* One row block of weights in groups: of each the chunks of its sub-blocks, their tails, then their scales. */
static int32_t pack_groups(struct packing *p, int64_t block, uint8_t *cell, uint32_t *bad)
{
    const struct bitgen_layout *layout = p->layout;
    const struct bitgen_weights *from = p->weights;
    const int64_t subs = layout->row_block / ROWS, groups = bitgen_groups(from->k, layout->group);
    const int64_t scale_bytes = bitgen_scale_bytes(from->scale_type), row = block * layout->row_block;
    int32_t bad_scales = 0;
    if (bitgen_has_tables(layout->kind)) pack_head(p, block, groups, cell, bad);
    cell += head_bytes(layout, groups);
    for (int64_t g = 0; g < groups; ++g) {
        uint8_t codes[ROWS * K_CHUNK_MAX];
        int64_t column = g * layout->group;
        const int64_t tail = column + layout->group / layout->k_chunk * layout->k_chunk;
        for (; column < tail; column += layout->k_chunk)
            for (int64_t sub = 0; sub < subs; ++sub, cell += layout->chunk_bytes) {
                int32_t trailer[ROWS] = {0}; /* there are none */
                gather(from, row + sub * ROWS, column, layout->k_chunk, codes, bad);
                p->pack(codes, cell, trailer, sub);
            }
        if (layout->group % layout->k_chunk)
            for (int64_t sub = 0; sub < subs; ++sub, cell += 4 * TAIL) {
                gather(from, row + sub * ROWS, column, TAIL, codes, bad);
                pack_tail(codes, cell);
            }
        for (int64_t sub = 0; sub < subs; ++sub, cell += ROWS * scale_bytes) {
            bad_scales |= pack_scales(from, from->scales, row + sub * ROWS, g, groups, cell);
            if (layout->kind != BITGEN_WEIGHTS_Q4M) continue;
            cell += ROWS * scale_bytes;
            bad_scales |= pack_scales(from, from->codes->offsets, row + sub * ROWS, g, groups, cell);
        }
    }
    return bad_scales;
}

/* One row block whose scales lie outside: its chunks, then the trailers of its sub-blocks. */
static void pack_block(struct packing *p, int64_t block, int64_t bytes, uint32_t *bad)
{
    const struct bitgen_layout *layout = p->layout;
    const int64_t subs = layout->row_block / ROWS, k = p->weights->k;
    for (int64_t sub = 0; sub < subs; ++sub) {
        uint8_t *cell = p->blocks + block * bytes + sub * layout->chunk_bytes;
        int64_t row = block * layout->row_block + sub * ROWS;
        int32_t trailer[ROWS] = {0};
        for (int64_t column = 0; column < k; column += layout->k_chunk, cell += subs * layout->chunk_bytes) {
            uint8_t codes[ROWS * K_CHUNK_MAX];
            gather(p->weights, row, column, layout->k_chunk, codes, bad);
            p->pack(codes, cell, trailer, sub);
        }
        uint8_t *end_of_chunks = p->blocks + (block + 1) * bytes - subs * layout->trailer_bytes;
        if (layout->trailer_bytes) memcpy(end_of_chunks + sub * layout->trailer_bytes, trailer, sizeof trailer);
    }
}

static void pack_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct packing *p = arg;
    const int64_t bytes = block_bytes(p->layout, bitgen_scale_bytes(p->weights->scale_type), p->weights->k);
    uint32_t bad = 0;
    int32_t bad_scales = 0;
    (void)worker;
    for (int64_t block = begin; block < end; ++block) {
        if (p->layout->group) bad_scales |= pack_groups(p, block, p->blocks + block * bytes, &bad);
        else pack_block(p, block, bytes, &bad);
    }
    if (bad) atomic_store_explicit(&p->bad_codes, 1, memory_order_relaxed);
    if (bad_scales) atomic_store_explicit(&p->bad_scales, 1, memory_order_relaxed);
}

int32_t bitgen_pack_layout(struct bitgen_pool *pool, const struct bitgen_layout *layout,
                           const struct bitgen_weights *weights, uint8_t *blocks)
{
    struct packing p = {.layout = layout, .weights = weights, .blocks = blocks};
    for (size_t i = 0; i < sizeof packers / sizeof *packers; ++i)
        if (!strcmp(packers[i].family, layout->family)) p.pack = packers[i].pack;
    int64_t items = ceil_div(weights->m, layout->row_block);
    bitgen_pool_run(pool, pack_body, &p, items, 1 + (1 << 16) / (layout->row_block * weights->k));
    if (atomic_load_explicit(&p.bad_scales, memory_order_relaxed)) return BITGEN_ERROR_SCALES;
    if (!atomic_load_explicit(&p.bad_codes, memory_order_relaxed)) return BITGEN_OK;
    return weights->codes ? BITGEN_ERROR_CODES : BITGEN_ERROR_NOT_TERNARY;
}

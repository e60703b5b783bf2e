static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* The sums of sixteen rows and one token leave the kernel: exact integers, or scaled floats. Rows from m on do not
   exist. */
static inline void epilogue(const struct bitgen_matmul *a, int64_t m, int64_t row, int64_t token, vw acc) {
    if (row >= m) return;
    const int n = (int)min64(m - row, 16);
    const int64_t at = token * a->out_stride + row;
    if (a->acc) {
        vw_store_n(a->acc + at, acc, n);
    } else {
        const vf scale = a->w_scale_stride ? vf_load_n(a->w_scale + row, n) : vf_splat(a->w_scale[0]);
        vf_store_n(a->y + at, vf_mul(vf_from_w(acc), vf_mul(vf_splat(a->x_scale[token]), scale)), n);
    }
}

/* 16 rows x 16 k: 64 bytes of 2-bit codes become four blocks of byte codes (16 rows x 4 k each). */
static inline void unpack_chunk(const uint8_t *chunk, uint8_t *panel) {
    const vb v = vb_load(chunk);
    vb_store(panel, vb_field(v, 0, 3));
    vb_store(panel + 64, vb_field(v, 2, 3));
    vb_store(panel + 128, vb_field(v, 4, 3));
    vb_store(panel + 192, vb_high(v, 6));
}

/* Tokens in flight when k is cut into blocks: their int32 sums (128 KiB) stay in the L2 cache. */
enum { TOKENS = 512 };

static inline int64_t panel_columns(int64_t chunks) { return 16 * chunks; }

/* 16 rows x 4 tokens over `steps` steps of 4 k. sums: (4, 16) int32 of the columns before, or NULL. */
static void product(const struct bitgen_matmul *a, const uint8_t *panel, int64_t sub_bytes, int64_t column,
                    int64_t steps, int64_t m, int64_t row, int64_t row_end, int64_t token, int32_t *sums, int first,
                    int last) {
    (void)sub_bytes; /* there is one sub-panel */
    const int64_t t0 = min64(token, a->n - 1);
    const int8_t *const x0 = a->x + t0 * a->x_stride + column;
    const int64_t t1 = min64(token + 1, a->n - 1);
    const int8_t *const x1 = a->x + t1 * a->x_stride + column;
    const int64_t t2 = min64(token + 2, a->n - 1);
    const int8_t *const x2 = a->x + t2 * a->x_stride + column;
    const int64_t t3 = min64(token + 3, a->n - 1);
    const int8_t *const x3 = a->x + t3 * a->x_stride + column;
    vw acc_r0_t0 = first ? vw_splat(-a->x_sum[t0]) : vw_load(sums);
    vw acc_r0_t1 = first ? vw_splat(-a->x_sum[t1]) : vw_load(sums + 16);
    vw acc_r0_t2 = first ? vw_splat(-a->x_sum[t2]) : vw_load(sums + 32);
    vw acc_r0_t3 = first ? vw_splat(-a->x_sum[t3]) : vw_load(sums + 48);
    for (int64_t begin = 0; begin < steps; begin += 64) {
        const int64_t end = min64(begin + 64, steps);
        vp sum16_r0_t0 = vp_zero();
        vp sum16_r0_t1 = vp_zero();
        vp sum16_r0_t2 = vp_zero();
        vp sum16_r0_t3 = vp_zero();
        for (int64_t i = begin; i < end; ++i) {
            const vb w0 = vb_load(panel + 64 * i);
            {
                const vb x = vb_splat4(x0 + 4 * i);
                sum16_r0_t0 = vp_add(sum16_r0_t0, w0, x);
            }
            {
                const vb x = vb_splat4(x1 + 4 * i);
                sum16_r0_t1 = vp_add(sum16_r0_t1, w0, x);
            }
            {
                const vb x = vb_splat4(x2 + 4 * i);
                sum16_r0_t2 = vp_add(sum16_r0_t2, w0, x);
            }
            {
                const vb x = vb_splat4(x3 + 4 * i);
                sum16_r0_t3 = vp_add(sum16_r0_t3, w0, x);
            }
        }
        acc_r0_t0 = vw_widen(acc_r0_t0, sum16_r0_t0);
        acc_r0_t1 = vw_widen(acc_r0_t1, sum16_r0_t1);
        acc_r0_t2 = vw_widen(acc_r0_t2, sum16_r0_t2);
        acc_r0_t3 = vw_widen(acc_r0_t3, sum16_r0_t3);
    }
    if (last) {
        if (row < row_end) epilogue(a, m, row, t0, acc_r0_t0);
        if (row < row_end) epilogue(a, m, row, t1, acc_r0_t1);
        if (row < row_end) epilogue(a, m, row, t2, acc_r0_t2);
        if (row < row_end) epilogue(a, m, row, t3, acc_r0_t3);
    } else {
        vw_store(sums, acc_r0_t0);
        vw_store(sums + 16, acc_r0_t1);
        vw_store(sums + 32, acc_r0_t2);
        vw_store(sums + 48, acc_r0_t3);
    }
}

/* Rows [row, row + count) x chunks [from, to) become byte codes; count is a multiple of the row block. */
static void unpack_panel(const struct bitgen_matmul *a, int64_t block_bytes, int64_t row, int64_t count, int64_t from,
                         int64_t to, uint8_t *panel, int64_t sub_bytes) {
    for (int64_t r = 0; r < count; r += 16) {
        const uint8_t *const block = a->w + (row + r) / 16 * block_bytes;
        for (int64_t c = from; c < to; ++c)
            unpack_chunk(block + 64 * c, panel + r / 16 * sub_bytes + 256 * (c - from));
    }
}

int64_t bitgen_i2s_small_r16_panel_mr16_nr4_mc64_kc0_widen_every64_unroll1__avx2_scratch(int64_t m, int64_t k, int64_t n) {
    const int64_t columns = panel_columns((k + 15) / 16);
    (void)m;
    /* byte codes; then int32 sums of up to TOKENS tokens when k is cut */
    return 64 * columns + (columns < k ? (min64(n, TOKENS) + 4) * 256 : 0);
}

void bitgen_i2s_small_r16_panel_mr16_nr4_mc64_kc0_widen_every64_unroll1__avx2(const struct bitgen_matmul *a) {
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 15) / 16;
    const int64_t block_bytes = 64 * chunks;
    const int64_t columns = panel_columns(chunks), chunks_each = columns / 16, sub_bytes = 16 * columns;
    uint8_t *const panel = a->scratch;
    const int cut = columns < k; /* else one panel holds all of k */
    int32_t *const sums = cut ? (int32_t *)(panel + 64 * columns) : NULL;
    const int64_t row_end = (a->row_end + 15) / 16 * 16;
    const int64_t tokens = cut ? TOKENS : a->n;
    for (int64_t token0 = 0; token0 < a->n; token0 += tokens)
        for (int64_t row0 = a->row_begin; row0 < row_end; row0 += 64)
            for (int64_t from = 0; from < chunks; from += chunks_each) {
                const int64_t to = min64(from + chunks_each, chunks), token1 = min64(token0 + tokens, a->n);
                const int64_t row1 = min64(row0 + 64, row_end), column = 16 * from;
                unpack_panel(a, block_bytes, row0, row1 - row0, from, to, panel, sub_bytes);
                for (int64_t token = token0; token < token1; token += 4) {
                    for (int64_t row = row0; row < row1; row += 16) {
                        const uint8_t *const weights = panel + (row - row0) / 16 * sub_bytes;
                        int32_t *const part = cut ? sums + (token - token0) * 64 + (row - row0) * 4 : sums;
                        product(a, weights, sub_bytes, column, (to - from) * 4, m, row, row1, token, part, from == 0,
                                to == chunks);
                    }
                }
            }
}

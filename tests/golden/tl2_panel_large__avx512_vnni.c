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

/* The bit of a row's sign byte that lane l uses: 1 << l for the low nibble's triple, 16 << l for the high nibble's. */
static const uint8_t lane_bits[2][64] __attribute__((aligned(64))) = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
     2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2,
     4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4,
     8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8},
    {16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16,
     32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32,
     64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64,
     128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128},
};

/* One chunk, 16 rows x 48 k: an index |v| (0..13) and a sign give three byte codes w + 1. Lane l holds k = 12 l ..
   12 l + 11 of 16 rows as four triples; every 4 codes are zipped to rows x 4 k, and transposing lanes makes blocks
   3 l + q, q = 0..2. */
static inline void unpack_chunk(const uint8_t *chunk, uint8_t *panel) {
    /* v = 9 w0 + 3 w1 + w2 = 0..13; a negative v has 2 - code in every place */
    static const uint8_t digits[3][16] = {{1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2},
                                          {1, 1, 2, 2, 2, 0, 0, 0, 1, 1, 1, 2, 2, 2},
                                          {1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2}};
    static const uint8_t mirrored[3][16] = {{1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0},
                                            {1, 1, 0, 0, 0, 2, 2, 2, 1, 1, 1, 0, 0, 0},
                                            {1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0}};
    const vb low4 = vb_splat(15);
    const vb low_bits = vb_load(lane_bits[0]), high_bits = vb_load(lane_bits[1]);
    const vb plus0 = vb_quad(digits[0]), minus0 = vb_quad(mirrored[0]);
    const vb plus1 = vb_quad(digits[1]), minus1 = vb_quad(mirrored[1]);
    const vb plus2 = vb_quad(digits[2]), minus2 = vb_quad(mirrored[2]);
    const vb v0 = vb_load(chunk), signs0 = vb_quad(chunk + 128);
    const vb i0 = vb_and(v0, low4), i1 = vb_high(v0, 4);
    const vm s0 = vb_test(signs0, low_bits), s1 = vb_test(signs0, high_bits);
    const vb v1 = vb_load(chunk + 64), signs1 = vb_quad(chunk + 144);
    const vb i2 = vb_and(v1, low4), i3 = vb_high(v1, 4);
    const vm s2 = vb_test(signs1, low_bits), s3 = vb_test(signs1, high_bits);
    const vb k0 = vb_select(s0, vb_lut16(minus0, i0), vb_lut16(plus0, i0));
    const vb k1 = vb_select(s0, vb_lut16(minus1, i0), vb_lut16(plus1, i0));
    const vb k2 = vb_select(s0, vb_lut16(minus2, i0), vb_lut16(plus2, i0));
    const vb k3 = vb_select(s1, vb_lut16(minus0, i1), vb_lut16(plus0, i1));
    const vb k4 = vb_select(s1, vb_lut16(minus1, i1), vb_lut16(plus1, i1));
    const vb k5 = vb_select(s1, vb_lut16(minus2, i1), vb_lut16(plus2, i1));
    const vb k6 = vb_select(s2, vb_lut16(minus0, i2), vb_lut16(plus0, i2));
    const vb k7 = vb_select(s2, vb_lut16(minus1, i2), vb_lut16(plus1, i2));
    const vb k8 = vb_select(s2, vb_lut16(minus2, i2), vb_lut16(plus2, i2));
    const vb k9 = vb_select(s3, vb_lut16(minus0, i3), vb_lut16(plus0, i3));
    const vb k10 = vb_select(s3, vb_lut16(minus1, i3), vb_lut16(plus1, i3));
    const vb k11 = vb_select(s3, vb_lut16(minus2, i3), vb_lut16(plus2, i3));
    {
        const vh a_lo = vh_zip_lo(k0, k1), a_hi = vh_zip_hi(k0, k1);
        const vh b_lo = vh_zip_lo(k2, k3), b_hi = vh_zip_hi(k2, k3);
        vw_transpose_lanes(panel, 192, vw_zip_lo(a_lo, b_lo), vw_zip_hi(a_lo, b_lo),
                           vw_zip_lo(a_hi, b_hi), vw_zip_hi(a_hi, b_hi));
    }
    {
        const vh a_lo = vh_zip_lo(k4, k5), a_hi = vh_zip_hi(k4, k5);
        const vh b_lo = vh_zip_lo(k6, k7), b_hi = vh_zip_hi(k6, k7);
        vw_transpose_lanes(panel + 64, 192, vw_zip_lo(a_lo, b_lo), vw_zip_hi(a_lo, b_lo),
                           vw_zip_lo(a_hi, b_hi), vw_zip_hi(a_hi, b_hi));
    }
    {
        const vh a_lo = vh_zip_lo(k8, k9), a_hi = vh_zip_hi(k8, k9);
        const vh b_lo = vh_zip_lo(k10, k11), b_hi = vh_zip_hi(k10, k11);
        vw_transpose_lanes(panel + 128, 192, vw_zip_lo(a_lo, b_lo), vw_zip_hi(a_lo, b_lo),
                           vw_zip_lo(a_hi, b_hi), vw_zip_hi(a_hi, b_hi));
    }
}

/* Tokens in flight when k is cut into blocks: their int32 sums (128 KiB) stay in the L2 cache. */
enum { TOKENS = 512 };

static inline int64_t panel_columns(int64_t chunks) { return min64(960, 48 * chunks); }

/* 32 rows x 4 tokens over `steps` steps of 4 k. sums: (4, 32) int32 of the columns before, or NULL. */
static void product(const struct bitgen_matmul *a, const uint8_t *panel, int64_t sub_bytes, int64_t column,
                    int64_t steps, int64_t m, int64_t row, int64_t row_end, int64_t token, int32_t *sums, int first,
                    int last) {
    const int64_t t0 = min64(token, a->n - 1);
    const int8_t *const x0 = a->x + t0 * a->x_stride + column;
    const int64_t t1 = min64(token + 1, a->n - 1);
    const int8_t *const x1 = a->x + t1 * a->x_stride + column;
    const int64_t t2 = min64(token + 2, a->n - 1);
    const int8_t *const x2 = a->x + t2 * a->x_stride + column;
    const int64_t t3 = min64(token + 3, a->n - 1);
    const int8_t *const x3 = a->x + t3 * a->x_stride + column;
    vw acc_r0_t0 = first ? vw_splat(-a->x_sum[t0]) : vw_load(sums);
    vw acc_r1_t0 = first ? vw_splat(-a->x_sum[t0]) : vw_load(sums + 16);
    vw acc_r0_t1 = first ? vw_splat(-a->x_sum[t1]) : vw_load(sums + 32);
    vw acc_r1_t1 = first ? vw_splat(-a->x_sum[t1]) : vw_load(sums + 48);
    vw acc_r0_t2 = first ? vw_splat(-a->x_sum[t2]) : vw_load(sums + 64);
    vw acc_r1_t2 = first ? vw_splat(-a->x_sum[t2]) : vw_load(sums + 80);
    vw acc_r0_t3 = first ? vw_splat(-a->x_sum[t3]) : vw_load(sums + 96);
    vw acc_r1_t3 = first ? vw_splat(-a->x_sum[t3]) : vw_load(sums + 112);
    int64_t i = 0;
    for (; i + 2 <= steps; i += 2) {
        {
            const vb w0 = vb_load(panel + 64 * i);
            const vb w1 = vb_load(panel + sub_bytes + 64 * i);
            {
                const vb x = vb_splat4(x0 + 4 * i);
                acc_r0_t0 = vw_dot4(acc_r0_t0, w0, x);
                acc_r1_t0 = vw_dot4(acc_r1_t0, w1, x);
            }
            {
                const vb x = vb_splat4(x1 + 4 * i);
                acc_r0_t1 = vw_dot4(acc_r0_t1, w0, x);
                acc_r1_t1 = vw_dot4(acc_r1_t1, w1, x);
            }
            {
                const vb x = vb_splat4(x2 + 4 * i);
                acc_r0_t2 = vw_dot4(acc_r0_t2, w0, x);
                acc_r1_t2 = vw_dot4(acc_r1_t2, w1, x);
            }
            {
                const vb x = vb_splat4(x3 + 4 * i);
                acc_r0_t3 = vw_dot4(acc_r0_t3, w0, x);
                acc_r1_t3 = vw_dot4(acc_r1_t3, w1, x);
            }
        }
        {
            const vb w0 = vb_load(panel + 64 * (i + 1));
            const vb w1 = vb_load(panel + sub_bytes + 64 * (i + 1));
            {
                const vb x = vb_splat4(x0 + 4 * (i + 1));
                acc_r0_t0 = vw_dot4(acc_r0_t0, w0, x);
                acc_r1_t0 = vw_dot4(acc_r1_t0, w1, x);
            }
            {
                const vb x = vb_splat4(x1 + 4 * (i + 1));
                acc_r0_t1 = vw_dot4(acc_r0_t1, w0, x);
                acc_r1_t1 = vw_dot4(acc_r1_t1, w1, x);
            }
            {
                const vb x = vb_splat4(x2 + 4 * (i + 1));
                acc_r0_t2 = vw_dot4(acc_r0_t2, w0, x);
                acc_r1_t2 = vw_dot4(acc_r1_t2, w1, x);
            }
            {
                const vb x = vb_splat4(x3 + 4 * (i + 1));
                acc_r0_t3 = vw_dot4(acc_r0_t3, w0, x);
                acc_r1_t3 = vw_dot4(acc_r1_t3, w1, x);
            }
        }
    }
    if (i < steps) {
        const vb w0 = vb_load(panel + 64 * i);
        const vb w1 = vb_load(panel + sub_bytes + 64 * i);
        {
            const vb x = vb_splat4(x0 + 4 * i);
            acc_r0_t0 = vw_dot4(acc_r0_t0, w0, x);
            acc_r1_t0 = vw_dot4(acc_r1_t0, w1, x);
        }
        {
            const vb x = vb_splat4(x1 + 4 * i);
            acc_r0_t1 = vw_dot4(acc_r0_t1, w0, x);
            acc_r1_t1 = vw_dot4(acc_r1_t1, w1, x);
        }
        {
            const vb x = vb_splat4(x2 + 4 * i);
            acc_r0_t2 = vw_dot4(acc_r0_t2, w0, x);
            acc_r1_t2 = vw_dot4(acc_r1_t2, w1, x);
        }
        {
            const vb x = vb_splat4(x3 + 4 * i);
            acc_r0_t3 = vw_dot4(acc_r0_t3, w0, x);
            acc_r1_t3 = vw_dot4(acc_r1_t3, w1, x);
        }
    }
    if (last) {
        if (row < row_end) epilogue(a, m, row, t0, acc_r0_t0);
        if (row + 16 < row_end) epilogue(a, m, row + 16, t0, acc_r1_t0);
        if (row < row_end) epilogue(a, m, row, t1, acc_r0_t1);
        if (row + 16 < row_end) epilogue(a, m, row + 16, t1, acc_r1_t1);
        if (row < row_end) epilogue(a, m, row, t2, acc_r0_t2);
        if (row + 16 < row_end) epilogue(a, m, row + 16, t2, acc_r1_t2);
        if (row < row_end) epilogue(a, m, row, t3, acc_r0_t3);
        if (row + 16 < row_end) epilogue(a, m, row + 16, t3, acc_r1_t3);
    } else {
        vw_store(sums, acc_r0_t0);
        vw_store(sums + 16, acc_r1_t0);
        vw_store(sums + 32, acc_r0_t1);
        vw_store(sums + 48, acc_r1_t1);
        vw_store(sums + 64, acc_r0_t2);
        vw_store(sums + 80, acc_r1_t2);
        vw_store(sums + 96, acc_r0_t3);
        vw_store(sums + 112, acc_r1_t3);
    }
}

/* Rows [row, row + count) x chunks [from, to) become byte codes; count is a multiple of the row block. */
static void unpack_panel(const struct bitgen_matmul *a, int64_t block_bytes, int64_t row, int64_t count, int64_t from,
                         int64_t to, uint8_t *panel, int64_t sub_bytes) {
    for (int64_t r = 0; r < count; r += 32) {
        const uint8_t *const block = a->w + (row + r) / 32 * block_bytes;
        for (int64_t c = from; c < to; ++c)
            unpack_chunk(block + 320 * c, panel + r / 16 * sub_bytes + 768 * (c - from));
        for (int64_t c = from; c < to; ++c)
            unpack_chunk(block + 320 * c + 160, panel + (r / 16 + 1) * sub_bytes + 768 * (c - from));
    }
}

int64_t bitgen_tl2_large_r32_panel_mr32_nr4_mc64_kc960_widen_every0_unroll2__avx512_vnni_scratch(int64_t m, int64_t k, int64_t n) {
    const int64_t columns = panel_columns((k + 47) / 48);
    (void)m;
    /* byte codes; then int32 sums of up to TOKENS tokens when k is cut */
    return 64 * columns + (columns < k ? (min64(n, TOKENS) + 4) * 256 : 0);
}

void bitgen_tl2_large_r32_panel_mr32_nr4_mc64_kc960_widen_every0_unroll2__avx512_vnni(const struct bitgen_matmul *a) {
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 47) / 48;
    const int64_t block_bytes = 2 * (160 * chunks + 64);
    const int64_t columns = panel_columns(chunks), chunks_each = columns / 48, sub_bytes = 16 * columns;
    uint8_t *const panel = a->scratch;
    const int cut = columns < k; /* else one panel holds all of k */
    int32_t *const sums = cut ? (int32_t *)(panel + 64 * columns) : NULL;
    const int64_t row_end = (a->row_end + 31) / 32 * 32;
    const int64_t tokens = cut ? TOKENS : a->n;
    for (int64_t token0 = 0; token0 < a->n; token0 += tokens)
        for (int64_t row0 = a->row_begin; row0 < row_end; row0 += 64)
            for (int64_t from = 0; from < chunks; from += chunks_each) {
                const int64_t to = min64(from + chunks_each, chunks), token1 = min64(token0 + tokens, a->n);
                const int64_t row1 = min64(row0 + 64, row_end), column = 48 * from;
                unpack_panel(a, block_bytes, row0, row1 - row0, from, to, panel, sub_bytes);
                for (int64_t token = token0; token < token1; token += 4) {
                    for (int64_t row = row0; row < row1; row += 32) {
                        const uint8_t *const weights = panel + (row - row0) / 16 * sub_bytes;
                        int32_t *const part = cut ? sums + (token - token0) * 64 + (row - row0) * 4 : sums;
                        product(a, weights, sub_bytes, column, (to - from) * 12, m, row, row1, token, part, from == 0,
                                to == chunks);
                    }
                }
            }
}

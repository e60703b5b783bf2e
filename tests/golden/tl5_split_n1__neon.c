static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* Sixteen rows of one token leave the kernel: exact integers, or scaled floats. Rows from m on do not exist. */
static inline void store_rows(const struct bitgen_matmul *a, int64_t m, int64_t row, int64_t token, vw sum) {
    if (row >= m) return;
    const int n = (int)min64(m - row, 16);
    const int64_t at = token * a->out_stride + row;
    if (a->acc) {
        vw_store_n(a->acc + at, sum, n);
    } else {
        const vf scale = a->w_scale_stride ? vf_load_n(a->w_scale + row, n) : vf_splat(a->w_scale[0]);
        vf_store_n(a->y + at, vf_mul(vf_from_w(sum), vf_mul(vf_splat(a->x_scale[token]), scale)), n);
    }
}

/* 1 token x 1 row block of 64; a block behind the last repeats it, a token too. */
static void tile_1_of_1(const struct bitgen_matmul *a, int64_t block, int64_t part, int64_t last, int64_t token) {
    (void)part;
    (void)last;
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 19) / 20;
    const int64_t block_bytes = 4 * (64 * chunks + 64);
    const vb low7 = vb_splat(127), low4 = vb_splat(15), sixteen = vb_splat(16);

    const int64_t b0 = block;
    const uint8_t *const w0 = a->w + b0 * block_bytes;
    const int64_t t0 = min64(token, a->n - 1);
    const uint8_t *const table0 = a->tables + t0 * a->table_stride;
    vw acc0_0_0 = vw_zero(), acc0_0_1 = vw_zero(), acc0_0_2 = vw_zero(), acc0_0_3 = vw_zero();
    for (int64_t from = 0; from < chunks; from += 12) {
        const int64_t to = min64(from + 12, chunks);
        vh lo0_0 = vh_zero(), hi0_0 = vh_zero();
        for (int64_t c = from; c < to; ++c) {
            /* digits of the sums of four groups: |low| <= 4 x 30, |high| <= 4 x 28 */
            vb low0_0, high0_0;
            {
                const vb v = vb_load(w0 + 256 * c);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, low4));
                {
                    const uint8_t *const table = table0 + 256 * c;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low0_0 = vb_sign(low, v);
                    high0_0 = vb_sign(high, v);
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 64);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, low4));
                {
                    const uint8_t *const table = table0 + 256 * c + 32;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low0_0 = vb_add(low0_0, vb_sign(low, v));
                    high0_0 = vb_add(high0_0, vb_sign(high, v));
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 128);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, low4));
                {
                    const uint8_t *const table = table0 + 256 * c + 128;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low0_0 = vb_add(low0_0, vb_sign(low, v));
                    high0_0 = vb_add(high0_0, vb_sign(high, v));
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 192);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, low4));
                {
                    const uint8_t *const table = table0 + 256 * c + 160;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low0_0 = vb_add(low0_0, vb_sign(low, v));
                    high0_0 = vb_add(high0_0, vb_sign(high, v));
                }
            }
            lo0_0 = vh_add(lo0_0, vh_digits_lo(low0_0, high0_0, 23));
            hi0_0 = vh_add(hi0_0, vh_digits_hi(low0_0, high0_0, 23));
        }
        /* sub-block u: the 16 rows 16 u .. of the block */
        acc0_0_0 = vw_extend_lo(acc0_0_0, lo0_0);
        acc0_0_1 = vw_extend_hi(acc0_0_1, lo0_0);
        acc0_0_2 = vw_extend_lo(acc0_0_2, hi0_0);
        acc0_0_3 = vw_extend_hi(acc0_0_3, hi0_0);
    }
    store_rows(a, m, 64 * b0, t0, acc0_0_0);
    store_rows(a, m, 64 * b0 + 16, t0, acc0_0_1);
    store_rows(a, m, 64 * b0 + 32, t0, acc0_0_2);
    store_rows(a, m, 64 * b0 + 48, t0, acc0_0_3);
}

/* 1 token x 2 row blocks of 64, `part` blocks apart; a block behind the last repeats it, a token too. */
static void tile_1(const struct bitgen_matmul *a, int64_t block, int64_t part, int64_t last, int64_t token) {
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 19) / 20;
    const int64_t block_bytes = 4 * (64 * chunks + 64);
    const vb low7 = vb_splat(127), low4 = vb_splat(15), sixteen = vb_splat(16);

    const int64_t b0 = block;
    const uint8_t *const w0 = a->w + b0 * block_bytes;
    const int64_t b1 = min64(block + part, last);
    const uint8_t *const w1 = a->w + b1 * block_bytes;
    const int64_t t0 = min64(token, a->n - 1);
    const uint8_t *const table0 = a->tables + t0 * a->table_stride;
    vw acc0_0_0 = vw_zero(), acc0_0_1 = vw_zero(), acc0_0_2 = vw_zero(), acc0_0_3 = vw_zero();
    vw acc1_0_0 = vw_zero(), acc1_0_1 = vw_zero(), acc1_0_2 = vw_zero(), acc1_0_3 = vw_zero();
    for (int64_t from = 0; from < chunks; from += 12) {
        const int64_t to = min64(from + 12, chunks);
        vh lo0_0 = vh_zero(), hi0_0 = vh_zero();
        vh lo1_0 = vh_zero(), hi1_0 = vh_zero();
        for (int64_t c = from; c < to; ++c) {
            /* digits of the sums of four groups: |low| <= 4 x 30, |high| <= 4 x 28 */
            vb low0_0, high0_0;
            vb low1_0, high1_0;
            {
                const vb v = vb_load(w0 + 256 * c);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, low4));
                {
                    const uint8_t *const table = table0 + 256 * c;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low0_0 = vb_sign(low, v);
                    high0_0 = vb_sign(high, v);
                }
            }
            {
                const vb v = vb_load(w1 + 256 * c);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, low4));
                {
                    const uint8_t *const table = table0 + 256 * c;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low1_0 = vb_sign(low, v);
                    high1_0 = vb_sign(high, v);
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 64);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, low4));
                {
                    const uint8_t *const table = table0 + 256 * c + 32;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low0_0 = vb_add(low0_0, vb_sign(low, v));
                    high0_0 = vb_add(high0_0, vb_sign(high, v));
                }
            }
            {
                const vb v = vb_load(w1 + 256 * c + 64);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, low4));
                {
                    const uint8_t *const table = table0 + 256 * c + 32;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low1_0 = vb_add(low1_0, vb_sign(low, v));
                    high1_0 = vb_add(high1_0, vb_sign(high, v));
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 128);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, low4));
                {
                    const uint8_t *const table = table0 + 256 * c + 128;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low0_0 = vb_add(low0_0, vb_sign(low, v));
                    high0_0 = vb_add(high0_0, vb_sign(high, v));
                }
            }
            {
                const vb v = vb_load(w1 + 256 * c + 128);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, low4));
                {
                    const uint8_t *const table = table0 + 256 * c + 128;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low1_0 = vb_add(low1_0, vb_sign(low, v));
                    high1_0 = vb_add(high1_0, vb_sign(high, v));
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 192);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, low4));
                {
                    const uint8_t *const table = table0 + 256 * c + 160;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low0_0 = vb_add(low0_0, vb_sign(low, v));
                    high0_0 = vb_add(high0_0, vb_sign(high, v));
                }
            }
            {
                const vb v = vb_load(w1 + 256 * c + 192);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, low4));
                {
                    const uint8_t *const table = table0 + 256 * c + 160;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low1_0 = vb_add(low1_0, vb_sign(low, v));
                    high1_0 = vb_add(high1_0, vb_sign(high, v));
                }
            }
            lo0_0 = vh_add(lo0_0, vh_digits_lo(low0_0, high0_0, 23));
            hi0_0 = vh_add(hi0_0, vh_digits_hi(low0_0, high0_0, 23));
            lo1_0 = vh_add(lo1_0, vh_digits_lo(low1_0, high1_0, 23));
            hi1_0 = vh_add(hi1_0, vh_digits_hi(low1_0, high1_0, 23));
        }
        /* sub-block u: the 16 rows 16 u .. of the block */
        acc0_0_0 = vw_extend_lo(acc0_0_0, lo0_0);
        acc0_0_1 = vw_extend_hi(acc0_0_1, lo0_0);
        acc0_0_2 = vw_extend_lo(acc0_0_2, hi0_0);
        acc0_0_3 = vw_extend_hi(acc0_0_3, hi0_0);
        acc1_0_0 = vw_extend_lo(acc1_0_0, lo1_0);
        acc1_0_1 = vw_extend_hi(acc1_0_1, lo1_0);
        acc1_0_2 = vw_extend_lo(acc1_0_2, hi1_0);
        acc1_0_3 = vw_extend_hi(acc1_0_3, hi1_0);
    }
    store_rows(a, m, 64 * b0, t0, acc0_0_0);
    store_rows(a, m, 64 * b0 + 16, t0, acc0_0_1);
    store_rows(a, m, 64 * b0 + 32, t0, acc0_0_2);
    store_rows(a, m, 64 * b0 + 48, t0, acc0_0_3);
    store_rows(a, m, 64 * b1, t0, acc1_0_0);
    store_rows(a, m, 64 * b1 + 16, t0, acc1_0_1);
    store_rows(a, m, 64 * b1 + 32, t0, acc1_0_2);
    store_rows(a, m, 64 * b1 + 48, t0, acc1_0_3);
}

/* All tokens of 2 row blocks. */
static void blocks_2(const struct bitgen_matmul *a, int64_t block, int64_t part, int64_t last) {
    for (int64_t token = 0; token < a->n; token += 1) tile_1(a, block, part, last, token);
}

/* All tokens of 1 row block. */
static void blocks_1(const struct bitgen_matmul *a, int64_t block, int64_t part, int64_t last) {
    for (int64_t token = 0; token < a->n; token += 1) tile_1_of_1(a, block, part, last, token);
}

int64_t bitgen_tl5_n1_r64_split_streams2_nr1_widen12_prefetch0_hint0__neon_scratch(int64_t m, int64_t k, int64_t n) {
    (void)m;
    (void)k;
    (void)n;
    return 0;
}

void bitgen_tl5_n1_r64_split_streams2_nr1_widen12_prefetch0_hint0__neon(const struct bitgen_matmul *a) {
    const int64_t first = a->row_begin / 64, last = (a->row_end + 63) / 64 - 1;
    /* Each stream walks a part of the rows of its own: what is prefetched behind its block is its next one. */
    const int64_t part = (last - first + 1) / 2, rest = first + 2 * part, left = last + 1 - rest;
    for (int64_t block = first; block < first + part; ++block) blocks_2(a, block, part, last);
    if (left == 0) return;
    if (left <= 1) {
        blocks_1(a, rest, 1, last);
        return;
    }
    blocks_2(a, rest, 1, last);
}

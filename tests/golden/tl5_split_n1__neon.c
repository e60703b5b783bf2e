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

/* Row blocks: 1; a block behind the last repeats it. */
static void tile_1_of_1(const struct bitgen_matmul *a, int64_t block, int64_t part, int64_t last) {
    (void)part;
    (void)last;
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 19) / 20;
    const int64_t block_bytes = 4 * (64 * chunks + 64);
    const int64_t b0 = block;
    const uint8_t *const w0 = a->w + b0 * block_bytes;
    const vb low7 = vb_splat(127), sixteen = vb_splat(16);
    const int64_t t0 = a->n - 1; /* 0; compilers that know it hoist more than fits the registers */
    const uint8_t *const table0 = a->tables;
    vw acc_r0_t0_f0 = vw_zero(), acc_r0_t0_f1 = vw_zero(), acc_r0_t0_f2 = vw_zero(), acc_r0_t0_f3 = vw_zero();
    for (int64_t begin = 0; begin < chunks; begin += 12) {
        const int64_t end = min64(begin + 12, chunks);
        vh lo_r0_t0 = vh_zero(), hi_r0_t0 = vh_zero();
        for (int64_t c = begin; c < end; ++c) {
            /* digits of the sums of four groups: |low| <= 4 x 30, |high| <= 4 x 28 */
            vb low_r0_t0, high_r0_t0;
            {
                const vb v = vb_load(w0 + 256 * c);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, 15));
                {
                    const uint8_t *const table = table0 + 256 * c;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low_r0_t0 = vb_sign(low, v);
                    high_r0_t0 = vb_sign(high, v);
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 64);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, 15));
                {
                    const uint8_t *const table = table0 + 256 * c + 32;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low_r0_t0 = vb_add(low_r0_t0, vb_sign(low, v));
                    high_r0_t0 = vb_add(high_r0_t0, vb_sign(high, v));
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 128);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, 15));
                {
                    const uint8_t *const table = table0 + 256 * c + 128;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low_r0_t0 = vb_add(low_r0_t0, vb_sign(low, v));
                    high_r0_t0 = vb_add(high_r0_t0, vb_sign(high, v));
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 192);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, 15));
                {
                    const uint8_t *const table = table0 + 256 * c + 160;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low_r0_t0 = vb_add(low_r0_t0, vb_sign(low, v));
                    high_r0_t0 = vb_add(high_r0_t0, vb_sign(high, v));
                }
            }
            lo_r0_t0 = vh_add(lo_r0_t0, vh_digits_lo(low_r0_t0, high_r0_t0, 23));
            hi_r0_t0 = vh_add(hi_r0_t0, vh_digits_hi(low_r0_t0, high_r0_t0, 23));
        }
        acc_r0_t0_f0 = vw_extend_lo(acc_r0_t0_f0, lo_r0_t0);
        acc_r0_t0_f1 = vw_extend_hi(acc_r0_t0_f1, lo_r0_t0);
        acc_r0_t0_f2 = vw_extend_lo(acc_r0_t0_f2, hi_r0_t0);
        acc_r0_t0_f3 = vw_extend_hi(acc_r0_t0_f3, hi_r0_t0);
    }
    epilogue(a, m, 64 * b0, t0, acc_r0_t0_f0);
    epilogue(a, m, 64 * b0 + 16, t0, acc_r0_t0_f1);
    epilogue(a, m, 64 * b0 + 32, t0, acc_r0_t0_f2);
    epilogue(a, m, 64 * b0 + 48, t0, acc_r0_t0_f3);
}

/* Row blocks: 2, `part` blocks apart; a block behind the last repeats it. */
static void tile_1(const struct bitgen_matmul *a, int64_t block, int64_t part, int64_t last) {
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 19) / 20;
    const int64_t block_bytes = 4 * (64 * chunks + 64);
    const int64_t b0 = block;
    const uint8_t *const w0 = a->w + b0 * block_bytes;
    const int64_t b1 = min64(block + part, last);
    const uint8_t *const w1 = a->w + b1 * block_bytes;
    const vb low7 = vb_splat(127), sixteen = vb_splat(16);
    const int64_t t0 = a->n - 1; /* 0; compilers that know it hoist more than fits the registers */
    const uint8_t *const table0 = a->tables;
    vw acc_r0_t0_f0 = vw_zero(), acc_r0_t0_f1 = vw_zero(), acc_r0_t0_f2 = vw_zero(), acc_r0_t0_f3 = vw_zero();
    vw acc_r1_t0_f0 = vw_zero(), acc_r1_t0_f1 = vw_zero(), acc_r1_t0_f2 = vw_zero(), acc_r1_t0_f3 = vw_zero();
    for (int64_t begin = 0; begin < chunks; begin += 12) {
        const int64_t end = min64(begin + 12, chunks);
        vh lo_r0_t0 = vh_zero(), hi_r0_t0 = vh_zero();
        vh lo_r1_t0 = vh_zero(), hi_r1_t0 = vh_zero();
        for (int64_t c = begin; c < end; ++c) {
            /* digits of the sums of four groups: |low| <= 4 x 30, |high| <= 4 x 28 */
            vb low_r0_t0, high_r0_t0;
            vb low_r1_t0, high_r1_t0;
            {
                const vb v = vb_load(w0 + 256 * c);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, 15));
                {
                    const uint8_t *const table = table0 + 256 * c;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low_r0_t0 = vb_sign(low, v);
                    high_r0_t0 = vb_sign(high, v);
                }
            }
            {
                const vb v = vb_load(w1 + 256 * c);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, 15));
                {
                    const uint8_t *const table = table0 + 256 * c;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low_r1_t0 = vb_sign(low, v);
                    high_r1_t0 = vb_sign(high, v);
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 64);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, 15));
                {
                    const uint8_t *const table = table0 + 256 * c + 32;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low_r0_t0 = vb_add(low_r0_t0, vb_sign(low, v));
                    high_r0_t0 = vb_add(high_r0_t0, vb_sign(high, v));
                }
            }
            {
                const vb v = vb_load(w1 + 256 * c + 64);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, 15));
                {
                    const uint8_t *const table = table0 + 256 * c + 32;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low_r1_t0 = vb_add(low_r1_t0, vb_sign(low, v));
                    high_r1_t0 = vb_add(high_r1_t0, vb_sign(high, v));
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 128);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, 15));
                {
                    const uint8_t *const table = table0 + 256 * c + 128;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low_r0_t0 = vb_add(low_r0_t0, vb_sign(low, v));
                    high_r0_t0 = vb_add(high_r0_t0, vb_sign(high, v));
                }
            }
            {
                const vb v = vb_load(w1 + 256 * c + 128);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, 15));
                {
                    const uint8_t *const table = table0 + 256 * c + 128;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low_r1_t0 = vb_add(low_r1_t0, vb_sign(low, v));
                    high_r1_t0 = vb_add(high_r1_t0, vb_sign(high, v));
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 192);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, 15));
                {
                    const uint8_t *const table = table0 + 256 * c + 160;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low_r0_t0 = vb_add(low_r0_t0, vb_sign(low, v));
                    high_r0_t0 = vb_add(high_r0_t0, vb_sign(high, v));
                }
            }
            {
                const vb v = vb_load(w1 + 256 * c + 192);
                const vb index = vb_and(v, low7), j = vb_add(index, sixteen);
                const vb i = vb_choose(j, index, vb_field(v, 3, 15));
                {
                    const uint8_t *const table = table0 + 256 * c + 160;
                    const vb low = vb_add(vb_lut_low(vb_quad(table), i), vb_lut_low(vb_quad(table + 16), j));
                    const vb high = vb_add(vb_lut_low(vb_quad(table + 64), i), vb_lut_low(vb_quad(table + 80), j));
                    low_r1_t0 = vb_add(low_r1_t0, vb_sign(low, v));
                    high_r1_t0 = vb_add(high_r1_t0, vb_sign(high, v));
                }
            }
            lo_r0_t0 = vh_add(lo_r0_t0, vh_digits_lo(low_r0_t0, high_r0_t0, 23));
            hi_r0_t0 = vh_add(hi_r0_t0, vh_digits_hi(low_r0_t0, high_r0_t0, 23));
            lo_r1_t0 = vh_add(lo_r1_t0, vh_digits_lo(low_r1_t0, high_r1_t0, 23));
            hi_r1_t0 = vh_add(hi_r1_t0, vh_digits_hi(low_r1_t0, high_r1_t0, 23));
        }
        acc_r0_t0_f0 = vw_extend_lo(acc_r0_t0_f0, lo_r0_t0);
        acc_r0_t0_f1 = vw_extend_hi(acc_r0_t0_f1, lo_r0_t0);
        acc_r0_t0_f2 = vw_extend_lo(acc_r0_t0_f2, hi_r0_t0);
        acc_r0_t0_f3 = vw_extend_hi(acc_r0_t0_f3, hi_r0_t0);
        acc_r1_t0_f0 = vw_extend_lo(acc_r1_t0_f0, lo_r1_t0);
        acc_r1_t0_f1 = vw_extend_hi(acc_r1_t0_f1, lo_r1_t0);
        acc_r1_t0_f2 = vw_extend_lo(acc_r1_t0_f2, hi_r1_t0);
        acc_r1_t0_f3 = vw_extend_hi(acc_r1_t0_f3, hi_r1_t0);
    }
    epilogue(a, m, 64 * b0, t0, acc_r0_t0_f0);
    epilogue(a, m, 64 * b0 + 16, t0, acc_r0_t0_f1);
    epilogue(a, m, 64 * b0 + 32, t0, acc_r0_t0_f2);
    epilogue(a, m, 64 * b0 + 48, t0, acc_r0_t0_f3);
    epilogue(a, m, 64 * b1, t0, acc_r1_t0_f0);
    epilogue(a, m, 64 * b1 + 16, t0, acc_r1_t0_f1);
    epilogue(a, m, 64 * b1 + 32, t0, acc_r1_t0_f2);
    epilogue(a, m, 64 * b1 + 48, t0, acc_r1_t0_f3);
}

int64_t bitgen_tl5_n1_r64_split_streams2_nr1_widen_every12_prefetch0_prefetch_hint0__neon_scratch(int64_t m, int64_t k, int64_t n) {
    (void)m;
    (void)k;
    (void)n;
    return 0;
}

void bitgen_tl5_n1_r64_split_streams2_nr1_widen_every12_prefetch0_prefetch_hint0__neon(const struct bitgen_matmul *a) {
    const int64_t first = a->row_begin / 64, last = (a->row_end + 63) / 64 - 1;
    /* Each stream walks a part of the rows of its own: what is prefetched behind its block is its next one. */
    const int64_t part = (last - first + 1) / 2;
    for (int64_t block = first; block < first + part; ++block) tile_1(a, block, part, last);
    const int64_t rest = first + 2 * part, left = last + 1 - rest;
    if (left == 0) return;
    if (left <= 1) {
        tile_1_of_1(a, rest, 1, last);
        return;
    }
    tile_1(a, rest, 1, last);
}

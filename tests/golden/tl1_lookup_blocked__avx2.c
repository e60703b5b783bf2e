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

/* Tokens x rows: 1 x 16, over chunks [from, to); a block behind the last repeats it, a token too.
   sums: (1, 16) int32 of the chunks before; they are written back unless `to` ends the row. */
static void tile_1(const struct bitgen_matmul *a, int64_t block, int64_t last, int64_t from, int64_t to,
                   int32_t *sums, int64_t token) {
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 15) / 16;
    const int64_t block_bytes = 64 * chunks;
    const vb low4 = vb_splat(15);
    const int64_t b0 = min64(block, last);
    const uint8_t *const w0 = a->w + b0 * block_bytes;
    const int64_t t0 = min64(token, a->n - 1);
    const uint8_t *const table0 = a->tables + t0 * a->table_stride;
    vw acc_r0_t0 = from ? vw_load(sums) : vw_zero();
    for (int64_t begin = from; begin < to; begin += 63) {
        const int64_t end = min64(begin + 63, to);
        vh lo_r0_t0 = vh_zero(), hi_r0_t0 = vh_zero();
        for (int64_t c = begin; c < end; ++c) {
            const vb v0 = vb_load(w0 + 64 * c);
            const vb a0 = vb_and(v0, low4), b0 = vb_high(v0, 4);
            {
                const vb table_lo = vb_load(table0 + 256 * c);
                const vb table_hi = vb_load(table0 + 256 * c + 64);
                const vb lo_0 = vb_lut16(table_lo, a0), hi_0 = vb_lut16(table_hi, a0);
                lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(lo_0, hi_0));
                hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(lo_0, hi_0));
            }
            {
                const vb table_lo = vb_load(table0 + 256 * c + 128);
                const vb table_hi = vb_load(table0 + 256 * c + 192);
                const vb lo_0 = vb_lut16(table_lo, b0), hi_0 = vb_lut16(table_hi, b0);
                lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(lo_0, hi_0));
                hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(lo_0, hi_0));
            }
        }
        acc_r0_t0 = vw_rows(acc_r0_t0, lo_r0_t0, hi_r0_t0);
    }
    if (to < chunks) {
        vw_store(sums, acc_r0_t0);
        return;
    }
    epilogue(a, m, 16 * b0, t0, acc_r0_t0);
}

/* Tokens x rows: 2 x 16, over chunks [from, to); a block behind the last repeats it, a token too.
   sums: (2, 16) int32 of the chunks before; they are written back unless `to` ends the row. */
static void tile_2(const struct bitgen_matmul *a, int64_t block, int64_t last, int64_t from, int64_t to,
                   int32_t *sums, int64_t token) {
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 15) / 16;
    const int64_t block_bytes = 64 * chunks;
    const vb low4 = vb_splat(15);
    const int64_t b0 = min64(block, last);
    const uint8_t *const w0 = a->w + b0 * block_bytes;
    const int64_t t0 = min64(token, a->n - 1);
    const uint8_t *const table0 = a->tables + t0 * a->table_stride;
    const int64_t t1 = min64(token + 1, a->n - 1);
    const uint8_t *const table1 = a->tables + t1 * a->table_stride;
    vw acc_r0_t0 = from ? vw_load(sums) : vw_zero();
    vw acc_r0_t1 = from ? vw_load(sums + 16) : vw_zero();
    for (int64_t begin = from; begin < to; begin += 63) {
        const int64_t end = min64(begin + 63, to);
        vh lo_r0_t0 = vh_zero(), hi_r0_t0 = vh_zero();
        vh lo_r0_t1 = vh_zero(), hi_r0_t1 = vh_zero();
        for (int64_t c = begin; c < end; ++c) {
            const vb v0 = vb_load(w0 + 64 * c);
            const vb a0 = vb_and(v0, low4), b0 = vb_high(v0, 4);
            {
                const vb table_lo = vb_load(table0 + 256 * c);
                const vb table_hi = vb_load(table0 + 256 * c + 64);
                const vb lo_0 = vb_lut16(table_lo, a0), hi_0 = vb_lut16(table_hi, a0);
                lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(lo_0, hi_0));
                hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(lo_0, hi_0));
            }
            {
                const vb table_lo = vb_load(table1 + 256 * c);
                const vb table_hi = vb_load(table1 + 256 * c + 64);
                const vb lo_0 = vb_lut16(table_lo, a0), hi_0 = vb_lut16(table_hi, a0);
                lo_r0_t1 = vh_add(lo_r0_t1, vh_zip_lo(lo_0, hi_0));
                hi_r0_t1 = vh_add(hi_r0_t1, vh_zip_hi(lo_0, hi_0));
            }
            {
                const vb table_lo = vb_load(table0 + 256 * c + 128);
                const vb table_hi = vb_load(table0 + 256 * c + 192);
                const vb lo_0 = vb_lut16(table_lo, b0), hi_0 = vb_lut16(table_hi, b0);
                lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(lo_0, hi_0));
                hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(lo_0, hi_0));
            }
            {
                const vb table_lo = vb_load(table1 + 256 * c + 128);
                const vb table_hi = vb_load(table1 + 256 * c + 192);
                const vb lo_0 = vb_lut16(table_lo, b0), hi_0 = vb_lut16(table_hi, b0);
                lo_r0_t1 = vh_add(lo_r0_t1, vh_zip_lo(lo_0, hi_0));
                hi_r0_t1 = vh_add(hi_r0_t1, vh_zip_hi(lo_0, hi_0));
            }
        }
        acc_r0_t0 = vw_rows(acc_r0_t0, lo_r0_t0, hi_r0_t0);
        acc_r0_t1 = vw_rows(acc_r0_t1, lo_r0_t1, hi_r0_t1);
    }
    if (to < chunks) {
        vw_store(sums, acc_r0_t0);
        vw_store(sums + 16, acc_r0_t1);
        return;
    }
    epilogue(a, m, 16 * b0, t0, acc_r0_t0);
    epilogue(a, m, 16 * b0, t1, acc_r0_t1);
}

/* All tokens of 1 x 16 rows. */
static void group(const struct bitgen_matmul *a, int64_t block, int64_t last, int64_t from, int64_t to, int32_t *sums) {
    int64_t token = 0;
    for (; token + 2 <= a->n; token += 2) tile_2(a, block, last, from, to, sums + 16 * token, token);
    /* What is left goes to the smallest tile that holds it. */
    const int64_t left = a->n - token;
    if (left == 0) return;
    if (left <= 1) {
        tile_1(a, block, last, from, to, sums + 16 * token, token);
        return;
    }
    tile_2(a, block, last, from, to, sums + 16 * token, token);
}

int64_t bitgen_tl1_small_r16_direct_streams1_nr2_mc128_kc960_widen_every63_unroll1_prefetch0__avx2_scratch(int64_t m, int64_t k, int64_t n) {
    (void)m;
    (void)k;
    return (n + 2) * 512; /* int32 sums of mc rows for every token, in whole tiles */
}

void bitgen_tl1_small_r16_direct_streams1_nr2_mc128_kc960_widen_every63_unroll1_prefetch0__avx2(const struct bitgen_matmul *a) {
    const int64_t last = (a->row_end + 15) / 16 - 1;
    const int64_t chunks = (a->k + 15) / 16;
    int32_t *const sums = a->scratch;
    /* mc rows use a kc-block of tables (15360 bytes a token) before the next is touched. */
    for (int64_t block0 = a->row_begin / 16; block0 <= last; block0 += 8)
        for (int64_t from = 0; from < chunks; from += 60) {
            const int64_t to = min64(from + 60, chunks), block1 = min64(block0 + 8, last + 1);
            for (int64_t block = block0; block < block1; block += 1)
                group(a, block, last, from, to, sums + (block - block0) * 16 * (a->n + 2));
        }
}

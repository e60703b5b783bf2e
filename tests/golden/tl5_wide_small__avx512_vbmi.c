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

/* Tokens x row blocks: 1 x 1; a block behind the last repeats it, a token too. */
static void tile_1_of_1(const struct bitgen_matmul *a, int64_t block, int64_t part, int64_t last, int64_t token) {
    (void)part;
    (void)last;
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 19) / 20;
    const int64_t block_bytes = 4 * (64 * chunks + 64);
    const int64_t b0 = block;
    const uint8_t *const w0 = a->w + b0 * block_bytes;
    const int64_t t0 = min64(token, a->n - 1);
    const uint8_t *const table0 = a->tables + t0 * a->table_stride;
    /* negative sums are taken as ~x = -x - 1: the ones, counted when the weights were packed, come back here */
    vw acc_r0_t0_f0 = vw_load((const int32_t *)(w0 + 256 * chunks));
    vw acc_r0_t0_f1 = vw_load((const int32_t *)(w0 + 256 * chunks + 64));
    vw acc_r0_t0_f2 = vw_load((const int32_t *)(w0 + 256 * chunks + 128));
    vw acc_r0_t0_f3 = vw_load((const int32_t *)(w0 + 256 * chunks + 192));
    for (int64_t begin = 0; begin < chunks; begin += 12) {
        const int64_t end = min64(begin + 12, chunks);
        vh lo_r0_t0 = vh_zero(), hi_r0_t0 = vh_zero();
        for (int64_t c = begin; c < end; ++c) {
            {
                const vb v = vb_load(w0 + 256 * c);
                prefetch(w0 + 256 * c + 4096);
                const vm negative = vb_test(v, vb_splat(128));
                {
                    const uint8_t *const table = table0 + 1024 * c;
                    const vb low = vb_flip(vb_lut128(table, v), negative);
                    const vb high = vb_flip(vb_lut128(table + 128, v), negative);
                    lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(low, high));
                    hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(low, high));
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 64);
                prefetch(w0 + 256 * c + 64 + 4096);
                const vm negative = vb_test(v, vb_splat(128));
                {
                    const uint8_t *const table = table0 + 1024 * c + 256;
                    const vb low = vb_flip(vb_lut128(table, v), negative);
                    const vb high = vb_flip(vb_lut128(table + 128, v), negative);
                    lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(low, high));
                    hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(low, high));
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 128);
                prefetch(w0 + 256 * c + 128 + 4096);
                const vm negative = vb_test(v, vb_splat(128));
                {
                    const uint8_t *const table = table0 + 1024 * c + 512;
                    const vb low = vb_flip(vb_lut128(table, v), negative);
                    const vb high = vb_flip(vb_lut128(table + 128, v), negative);
                    lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(low, high));
                    hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(low, high));
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 192);
                prefetch(w0 + 256 * c + 192 + 4096);
                const vm negative = vb_test(v, vb_splat(128));
                {
                    const uint8_t *const table = table0 + 1024 * c + 768;
                    const vb low = vb_flip(vb_lut128(table, v), negative);
                    const vb high = vb_flip(vb_lut128(table + 128, v), negative);
                    lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(low, high));
                    hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(low, high));
                }
            }
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

/* Tokens x row blocks: 1 x 2, `part` blocks apart; a block behind the last repeats it, a token too. */
static void tile_1(const struct bitgen_matmul *a, int64_t block, int64_t part, int64_t last, int64_t token) {
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 19) / 20;
    const int64_t block_bytes = 4 * (64 * chunks + 64);
    const int64_t b0 = block;
    const uint8_t *const w0 = a->w + b0 * block_bytes;
    const int64_t b1 = min64(block + part, last);
    const uint8_t *const w1 = a->w + b1 * block_bytes;
    const int64_t t0 = min64(token, a->n - 1);
    const uint8_t *const table0 = a->tables + t0 * a->table_stride;
    /* negative sums are taken as ~x = -x - 1: the ones, counted when the weights were packed, come back here */
    vw acc_r0_t0_f0 = vw_load((const int32_t *)(w0 + 256 * chunks));
    vw acc_r0_t0_f1 = vw_load((const int32_t *)(w0 + 256 * chunks + 64));
    vw acc_r0_t0_f2 = vw_load((const int32_t *)(w0 + 256 * chunks + 128));
    vw acc_r0_t0_f3 = vw_load((const int32_t *)(w0 + 256 * chunks + 192));
    vw acc_r1_t0_f0 = vw_load((const int32_t *)(w1 + 256 * chunks));
    vw acc_r1_t0_f1 = vw_load((const int32_t *)(w1 + 256 * chunks + 64));
    vw acc_r1_t0_f2 = vw_load((const int32_t *)(w1 + 256 * chunks + 128));
    vw acc_r1_t0_f3 = vw_load((const int32_t *)(w1 + 256 * chunks + 192));
    for (int64_t begin = 0; begin < chunks; begin += 12) {
        const int64_t end = min64(begin + 12, chunks);
        vh lo_r0_t0 = vh_zero(), hi_r0_t0 = vh_zero();
        vh lo_r1_t0 = vh_zero(), hi_r1_t0 = vh_zero();
        for (int64_t c = begin; c < end; ++c) {
            {
                const vb v = vb_load(w0 + 256 * c);
                prefetch(w0 + 256 * c + 4096);
                const vm negative = vb_test(v, vb_splat(128));
                {
                    const uint8_t *const table = table0 + 1024 * c;
                    const vb low = vb_flip(vb_lut128(table, v), negative);
                    const vb high = vb_flip(vb_lut128(table + 128, v), negative);
                    lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(low, high));
                    hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(low, high));
                }
            }
            {
                const vb v = vb_load(w1 + 256 * c);
                prefetch(w1 + 256 * c + 4096);
                const vm negative = vb_test(v, vb_splat(128));
                {
                    const uint8_t *const table = table0 + 1024 * c;
                    const vb low = vb_flip(vb_lut128(table, v), negative);
                    const vb high = vb_flip(vb_lut128(table + 128, v), negative);
                    lo_r1_t0 = vh_add(lo_r1_t0, vh_zip_lo(low, high));
                    hi_r1_t0 = vh_add(hi_r1_t0, vh_zip_hi(low, high));
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 64);
                prefetch(w0 + 256 * c + 64 + 4096);
                const vm negative = vb_test(v, vb_splat(128));
                {
                    const uint8_t *const table = table0 + 1024 * c + 256;
                    const vb low = vb_flip(vb_lut128(table, v), negative);
                    const vb high = vb_flip(vb_lut128(table + 128, v), negative);
                    lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(low, high));
                    hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(low, high));
                }
            }
            {
                const vb v = vb_load(w1 + 256 * c + 64);
                prefetch(w1 + 256 * c + 64 + 4096);
                const vm negative = vb_test(v, vb_splat(128));
                {
                    const uint8_t *const table = table0 + 1024 * c + 256;
                    const vb low = vb_flip(vb_lut128(table, v), negative);
                    const vb high = vb_flip(vb_lut128(table + 128, v), negative);
                    lo_r1_t0 = vh_add(lo_r1_t0, vh_zip_lo(low, high));
                    hi_r1_t0 = vh_add(hi_r1_t0, vh_zip_hi(low, high));
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 128);
                prefetch(w0 + 256 * c + 128 + 4096);
                const vm negative = vb_test(v, vb_splat(128));
                {
                    const uint8_t *const table = table0 + 1024 * c + 512;
                    const vb low = vb_flip(vb_lut128(table, v), negative);
                    const vb high = vb_flip(vb_lut128(table + 128, v), negative);
                    lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(low, high));
                    hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(low, high));
                }
            }
            {
                const vb v = vb_load(w1 + 256 * c + 128);
                prefetch(w1 + 256 * c + 128 + 4096);
                const vm negative = vb_test(v, vb_splat(128));
                {
                    const uint8_t *const table = table0 + 1024 * c + 512;
                    const vb low = vb_flip(vb_lut128(table, v), negative);
                    const vb high = vb_flip(vb_lut128(table + 128, v), negative);
                    lo_r1_t0 = vh_add(lo_r1_t0, vh_zip_lo(low, high));
                    hi_r1_t0 = vh_add(hi_r1_t0, vh_zip_hi(low, high));
                }
            }
            {
                const vb v = vb_load(w0 + 256 * c + 192);
                prefetch(w0 + 256 * c + 192 + 4096);
                const vm negative = vb_test(v, vb_splat(128));
                {
                    const uint8_t *const table = table0 + 1024 * c + 768;
                    const vb low = vb_flip(vb_lut128(table, v), negative);
                    const vb high = vb_flip(vb_lut128(table + 128, v), negative);
                    lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(low, high));
                    hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(low, high));
                }
            }
            {
                const vb v = vb_load(w1 + 256 * c + 192);
                prefetch(w1 + 256 * c + 192 + 4096);
                const vm negative = vb_test(v, vb_splat(128));
                {
                    const uint8_t *const table = table0 + 1024 * c + 768;
                    const vb low = vb_flip(vb_lut128(table, v), negative);
                    const vb high = vb_flip(vb_lut128(table + 128, v), negative);
                    lo_r1_t0 = vh_add(lo_r1_t0, vh_zip_lo(low, high));
                    hi_r1_t0 = vh_add(hi_r1_t0, vh_zip_hi(low, high));
                }
            }
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

/* All tokens of 1 x 64 rows. */
static void blocks_1(const struct bitgen_matmul *a, int64_t block, int64_t part, int64_t last) {
    for (int64_t token = 0; token < a->n; token += 1) tile_1_of_1(a, block, part, last, token);
}

/* All tokens of 2 x 64 rows. */
static void blocks_2(const struct bitgen_matmul *a, int64_t block, int64_t part, int64_t last) {
    for (int64_t token = 0; token < a->n; token += 1) tile_1(a, block, part, last, token);
}

int64_t bitgen_tl5_small_r64_wide_streams2_nr1_widen_every12_prefetch4096__avx512_vbmi_scratch(int64_t m, int64_t k, int64_t n) {
    (void)m;
    (void)k;
    (void)n;
    return 0;
}

void bitgen_tl5_small_r64_wide_streams2_nr1_widen_every12_prefetch4096__avx512_vbmi(const struct bitgen_matmul *a) {
    const int64_t first = a->row_begin / 64, last = (a->row_end + 63) / 64 - 1;
    /* Each stream walks a part of the rows of its own: what is prefetched behind its block is its next one. */
    const int64_t part = (last - first + 1) / 2;
    for (int64_t block = first; block < first + part; ++block) blocks_2(a, block, part, last);
    const int64_t rest = first + 2 * part, left = last + 1 - rest;
    if (left == 0) return;
    if (left <= 1) {
        blocks_1(a, rest, 1, last);
        return;
    }
    blocks_2(a, rest, 1, last);
}

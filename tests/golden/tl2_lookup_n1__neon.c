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

/* Tokens x rows: 1 x 16, over all of k; a block behind the last repeats it, a token too. */
static void tile_1(const struct bitgen_matmul *a, int64_t block, int64_t last) {
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 47) / 48;
    const int64_t block_bytes = 160 * chunks + 64;
    const vb low4 = vb_splat(15);
    const int64_t b0 = min64(block, last);
    const uint8_t *const w0 = a->w + b0 * block_bytes;
    const int64_t t0 = a->n - 1; /* 0; compilers that know it hoist more than fits the registers */
    const uint8_t *const table0 = a->tables;
    vw acc_r0_t0 = vw_zero();
    for (int64_t begin = 0; begin < chunks; begin += 21) {
        const int64_t end = min64(begin + 21, chunks);
        vh lo_r0_t0 = vh_zero(), hi_r0_t0 = vh_zero();
        for (int64_t c = begin; c < end; ++c) {
            {
                const vb v0 = vb_load(w0 + 160 * c);
                const vb signs0 = vb_quad(w0 + 160 * c + 128);
                {
                    const vb i0 = vb_and(v0, low4);
                    const vm s0 = vb_test(signs0, vb_load(lane_bits[0]));
                    {
                        const vb table_lo = vb_load(table0 + 512 * c);
                        const vb table_hi = vb_load(table0 + 512 * c + 64);
                        const vb lo_0 = vb_flip(vb_lut16(table_lo, i0), s0);
                        const vb hi_0 = vb_flip(vb_lut16(table_hi, i0), s0);
                        lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(lo_0, hi_0));
                        hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(lo_0, hi_0));
                    }
                }
                {
                    const vb i0 = vb_high(v0, 4);
                    const vm s0 = vb_test(signs0, vb_load(lane_bits[1]));
                    {
                        const vb table_lo = vb_load(table0 + 512 * c + 128);
                        const vb table_hi = vb_load(table0 + 512 * c + 192);
                        const vb lo_0 = vb_flip(vb_lut16(table_lo, i0), s0);
                        const vb hi_0 = vb_flip(vb_lut16(table_hi, i0), s0);
                        lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(lo_0, hi_0));
                        hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(lo_0, hi_0));
                    }
                }
            }
            {
                const vb v0 = vb_load(w0 + 160 * c + 64);
                const vb signs0 = vb_quad(w0 + 160 * c + 144);
                {
                    const vb i0 = vb_and(v0, low4);
                    const vm s0 = vb_test(signs0, vb_load(lane_bits[0]));
                    {
                        const vb table_lo = vb_load(table0 + 512 * c + 256);
                        const vb table_hi = vb_load(table0 + 512 * c + 320);
                        const vb lo_0 = vb_flip(vb_lut16(table_lo, i0), s0);
                        const vb hi_0 = vb_flip(vb_lut16(table_hi, i0), s0);
                        lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(lo_0, hi_0));
                        hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(lo_0, hi_0));
                    }
                }
                {
                    const vb i0 = vb_high(v0, 4);
                    const vm s0 = vb_test(signs0, vb_load(lane_bits[1]));
                    {
                        const vb table_lo = vb_load(table0 + 512 * c + 384);
                        const vb table_hi = vb_load(table0 + 512 * c + 448);
                        const vb lo_0 = vb_flip(vb_lut16(table_lo, i0), s0);
                        const vb hi_0 = vb_flip(vb_lut16(table_hi, i0), s0);
                        lo_r0_t0 = vh_add(lo_r0_t0, vh_zip_lo(lo_0, hi_0));
                        hi_r0_t0 = vh_add(hi_r0_t0, vh_zip_hi(lo_0, hi_0));
                    }
                }
            }
        }
        acc_r0_t0 = vw_rows(acc_r0_t0, lo_r0_t0, hi_r0_t0);
    }
    /* negative sums were taken as ~x = -x - 1: the ones, counted when the weights were packed */
    const vw ones0 = vw_load((const int32_t *)(w0 + 160 * chunks));
    epilogue(a, m, 16 * b0, t0, vw_add(acc_r0_t0, ones0));
}

int64_t bitgen_tl2_n1_r16_direct_streams1_nr1_mc0_kc0_widen_every21_unroll1_prefetch0__neon_scratch(int64_t m, int64_t k, int64_t n) {
    (void)m;
    (void)k;
    (void)n;
    return 0;
}

void bitgen_tl2_n1_r16_direct_streams1_nr1_mc0_kc0_widen_every21_unroll1_prefetch0__neon(const struct bitgen_matmul *a) {
    const int64_t last = (a->row_end + 15) / 16 - 1;
    for (int64_t block = a->row_begin / 16; block <= last; block += 1)
        tile_1(a, block, last);
}

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

/* 1 token x 16 rows over all of k; blocks behind the last repeat it, tokens too. */
static void tile_1(const struct bitgen_matmul *a, int64_t block, int64_t last, int64_t token) {
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 47) / 48;
    const int64_t block_bytes = 160 * chunks + 64;
    const vb low4 = vb_splat(15);
    const int64_t b0 = min64(block, last);
    const uint8_t *const w0 = a->w + b0 * block_bytes;
    const int64_t t0 = min64(token, a->n - 1);
    const uint8_t *const table0 = a->tables + t0 * a->table_stride;
    vw acc0_0 = vw_zero();
    for (int64_t c0 = 0; c0 < chunks; c0 += 21) {
        const int64_t c1 = min64(c0 + 21, chunks);
        int64_t c = c0;
        vh lo0_0 = vh_zero(), hi0_0 = vh_zero();
        for (; c < c1; ++c) {
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
                        lo0_0 = vh_add(lo0_0, vh_zip_lo(lo_0, hi_0));
                        hi0_0 = vh_add(hi0_0, vh_zip_hi(lo_0, hi_0));
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
                        lo0_0 = vh_add(lo0_0, vh_zip_lo(lo_0, hi_0));
                        hi0_0 = vh_add(hi0_0, vh_zip_hi(lo_0, hi_0));
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
                        lo0_0 = vh_add(lo0_0, vh_zip_lo(lo_0, hi_0));
                        hi0_0 = vh_add(hi0_0, vh_zip_hi(lo_0, hi_0));
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
                        lo0_0 = vh_add(lo0_0, vh_zip_lo(lo_0, hi_0));
                        hi0_0 = vh_add(hi0_0, vh_zip_hi(lo_0, hi_0));
                    }
                }
            }
        }
        acc0_0 = vw_rows(acc0_0, lo0_0, hi0_0);
    }
    /* negative sums were taken as ~x = -x - 1: the ones, counted when the weights were packed */
    const vw bias0 = vw_load((const int32_t *)(w0 + 160 * chunks));
    store_rows(a, m, 16 * b0, t0, vw_add(acc0_0, bias0));
}

/* All tokens of a group of 1 row block. */
static void group(const struct bitgen_matmul *a, int64_t block, int64_t last) {
    for (int64_t token = 0; token < a->n; token += 1) tile_1(a, block, last, token);
}

int64_t bitgen_tl2_n1_r16_direct_streams1_nr1_mc0_kc0_widen21_unroll1_prefetch0__neon_scratch(int64_t m, int64_t k, int64_t n) {
    (void)m;
    (void)k;
    (void)n;
    return 0;
}

void bitgen_tl2_n1_r16_direct_streams1_nr1_mc0_kc0_widen21_unroll1_prefetch0__neon(const struct bitgen_matmul *a) {
    const int64_t last = (a->row_end + 15) / 16 - 1;
    for (int64_t block = a->row_begin / 16; block <= last; block += 1) group(a, block, last);
}

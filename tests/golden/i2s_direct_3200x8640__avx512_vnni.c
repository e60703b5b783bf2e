static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* The sums of sixteen rows and one token leave the kernel: exact integers, or scaled floats. Rows from m on do not
   exist. */
static inline void epilogue(const struct bitgen_matmul *a, int64_t m, int64_t row, int64_t token, vw acc) {
    if (row >= m) return;
    acc = vw_sub(acc, vw_splat(a->x_sum[token])); /* codes are w + 1: the sum of the activations comes off */
    const int n = (int)min64(m - row, 16);
    const int64_t at = token * a->out_stride + row;
    if (a->acc) {
        vw_store_n(a->acc + at, acc, n);
    } else {
        const vf scale = a->w_scale_stride ? vf_load_n(a->w_scale + row, n) : vf_splat(a->w_scale[0]);
        vf_store_n(a->y + at, vf_mul(vf_from_w(acc), vf_mul(vf_splat(a->x_scale[token]), scale)), n);
    }
}

/* Row blocks: 2, `part` blocks apart; a block behind the last repeats it. */
static void tile_1(const struct bitgen_matmul *a, int64_t block, int64_t part, int64_t last) {
    const int64_t m = 3200, k = 8640;
    const int64_t chunks = (k + 15) / 16;
    const int64_t block_bytes = 64 * chunks;
    const int64_t b0 = block;
    const uint8_t *const w0 = a->w + b0 * block_bytes;
    const int64_t b1 = min64(block + part, last);
    const uint8_t *const w1 = a->w + b1 * block_bytes;
    const int64_t t0 = a->n - 1; /* 0; compilers that know it hoist more than fits the registers */
    const int8_t *const x0 = a->x;
    const vb mask0 = vb_splat(3);
    const vb mask1 = vb_splat(12);
    const vb mask2 = vb_splat(48);
    const vb mask3 = vb_splat(192);
    vw acc_r0_t0_f0 = vw_zero(), acc_r0_t0_f1 = vw_zero(), acc_r0_t0_f2 = vw_zero(), acc_r0_t0_f3 = vw_zero();
    vw acc_r1_t0_f0 = vw_zero(), acc_r1_t0_f1 = vw_zero(), acc_r1_t0_f2 = vw_zero(), acc_r1_t0_f3 = vw_zero();
    for (int64_t c = 0; c < chunks; ++c) {
        const vx x_first = vx_load(x0, 16 * c);
        {
            const vb v0 = vb_load(w0 + 64 * c);
            acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_and(v0, mask0), x_first, 0);
            acc_r0_t0_f1 = vw_dot4_field(acc_r0_t0_f1, vb_and(v0, mask1), x_first, 1);
            acc_r0_t0_f2 = vw_dot4_field(acc_r0_t0_f2, vb_and(v0, mask2), x_first, 2);
            acc_r0_t0_f3 = vw_dot4_field(acc_r0_t0_f3, vb_and(v0, mask3), x_first, 3);
        }
        {
            const vb v1 = vb_load(w1 + 64 * c);
            acc_r1_t0_f0 = vw_dot4_field(acc_r1_t0_f0, vb_and(v1, mask0), x_first, 0);
            acc_r1_t0_f1 = vw_dot4_field(acc_r1_t0_f1, vb_and(v1, mask1), x_first, 1);
            acc_r1_t0_f2 = vw_dot4_field(acc_r1_t0_f2, vb_and(v1, mask2), x_first, 2);
            acc_r1_t0_f3 = vw_dot4_field(acc_r1_t0_f3, vb_and(v1, mask3), x_first, 3);
        }
    }
    acc_r0_t0_f0 = vw_add(acc_r0_t0_f0, vw_sra(acc_r0_t0_f1, 2));
    acc_r0_t0_f0 = vw_add(acc_r0_t0_f0, vw_sra(acc_r0_t0_f2, 4));
    acc_r0_t0_f0 = vw_add(acc_r0_t0_f0, vw_sra(acc_r0_t0_f3, 6));
    epilogue(a, m, 16 * b0, t0, acc_r0_t0_f0);
    acc_r1_t0_f0 = vw_add(acc_r1_t0_f0, vw_sra(acc_r1_t0_f1, 2));
    acc_r1_t0_f0 = vw_add(acc_r1_t0_f0, vw_sra(acc_r1_t0_f2, 4));
    acc_r1_t0_f0 = vw_add(acc_r1_t0_f0, vw_sra(acc_r1_t0_f3, 6));
    epilogue(a, m, 16 * b1, t0, acc_r1_t0_f0);
}

int64_t bitgen_i2s_3200x8640_n1_r16_direct_streams2_nr1_accumulators4_widen_every0_unroll1_prefetch0_prefetch_hint0__avx512_vnni_scratch(int64_t m, int64_t k, int64_t n) {
    (void)m;
    (void)k;
    (void)n;
    return 0;
}

void bitgen_i2s_3200x8640_n1_r16_direct_streams2_nr1_accumulators4_widen_every0_unroll1_prefetch0_prefetch_hint0__avx512_vnni(const struct bitgen_matmul *a) {
    const int64_t first = a->row_begin / 16, last = (a->row_end + 15) / 16 - 1;
    /* Each stream walks a part of the rows of its own: what is prefetched behind its block is its next one. */
    const int64_t part = (last - first + 2) / 2;
    for (int64_t block = first; block < first + part; ++block)
        tile_1(a, block, part, last);
}

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* The scales of sixteen rows and a group. */
OP vf group_scales(const uint8_t *scales, int64_t scale_bytes) {
    return scale_bytes == 2 ? vf_from_f16((const uint16_t *)scales) : vf_load((const float *)scales);
}

/* The sums of sixteen rows and one token over a group join y, those of the groups before. */
OP vf add_group(vf y, vw acc, vf w_scale, float x_scale) {
    return vf_fma(vf_from_w(acc), vf_mul(w_scale, vf_splat(x_scale)), y);
}

/* Sixteen rows of one token leave the kernel. Rows from m on do not exist. */
static inline void epilogue(const struct bitgen_matmul *a, int64_t m, int64_t row, int64_t token, vf y) {
    if (row < m) vf_store_n(a->y + token * a->out_stride + row, y, (int)min64(m - row, 16));
}

/* Row blocks: 1; a block behind the last repeats it. */
static void tile_1(const struct bitgen_matmul *a, int64_t block, int64_t part, int64_t last) {
    (void)part;
    (void)last;
    const int64_t m = a->m, k = a->k;
    const int64_t groups = (k + 127) / 128;
    const int64_t scale_bytes = a->w_scale_stride; /* of a scale among the weights: 2, half floats, or 4 */
    const int64_t group_bytes = 32 * scale_bytes + 512;
    const int64_t block_bytes = groups * group_bytes;
    const int64_t b0 = block;
    const uint8_t *w0 = a->w + b0 * block_bytes;
    const int64_t t0 = a->n - 1; /* 0; compilers that know it hoist more than fits the registers */
    const int8_t *x0 = a->x;
    const vb mask0 = vb_splat(1);
    const vb mask1 = vb_splat(2);
    const vb mask2 = vb_splat(4);
    const vb mask3 = vb_splat(8);
    vf y_r0_t0 = vf_splat(0.0f);
    vf y_r1_t0 = vf_splat(0.0f);
    for (int64_t g = 0; g < groups; ++g) {
        const vw start0 = vw_splat(-a->x_sum[t0 * groups + g]);
        vw acc_r0_t0_f0 = vw_zero(), acc_r0_t0_f1 = start0, acc_r0_t0_f2 = vw_zero(), acc_r0_t0_f3 = vw_zero();
        vw acc_r1_t0_f0 = vw_zero(), acc_r1_t0_f1 = start0, acc_r1_t0_f2 = vw_zero(), acc_r1_t0_f3 = vw_zero();
        for (int64_t c = 0; c < 4; ++c) {
            const vx x_first = vx_load(x0, 32 * c);
            const vx x_last = vx_load(x0, 32 * c + 16);
            {
                const vb v0 = vb_load(w0 + 128 * c);
                prefetch(w0 + 128 * c + 4096);
                acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_and(v0, mask0), x_first, 0);
                acc_r0_t0_f1 = vw_dot4_field(acc_r0_t0_f1, vb_and(v0, mask1), x_first, 1);
                acc_r0_t0_f2 = vw_dot4_field(acc_r0_t0_f2, vb_and(v0, mask2), x_first, 2);
                acc_r0_t0_f3 = vw_dot4_field(acc_r0_t0_f3, vb_and(v0, mask3), x_first, 3);
                acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_field(v0, 4, 1), x_last, 0);
                acc_r0_t0_f1 = vw_dot4_field(acc_r0_t0_f1, vb_field(v0, 4, 2), x_last, 1);
                acc_r0_t0_f2 = vw_dot4_field(acc_r0_t0_f2, vb_field(v0, 4, 4), x_last, 2);
                acc_r0_t0_f3 = vw_dot4_field(acc_r0_t0_f3, vb_field(v0, 4, 8), x_last, 3);
            }
            {
                const vb v1 = vb_load(w0 + 128 * c + 64);
                prefetch(w0 + 128 * c + 64 + 4096);
                acc_r1_t0_f0 = vw_dot4_field(acc_r1_t0_f0, vb_and(v1, mask0), x_first, 0);
                acc_r1_t0_f1 = vw_dot4_field(acc_r1_t0_f1, vb_and(v1, mask1), x_first, 1);
                acc_r1_t0_f2 = vw_dot4_field(acc_r1_t0_f2, vb_and(v1, mask2), x_first, 2);
                acc_r1_t0_f3 = vw_dot4_field(acc_r1_t0_f3, vb_and(v1, mask3), x_first, 3);
                acc_r1_t0_f0 = vw_dot4_field(acc_r1_t0_f0, vb_field(v1, 4, 1), x_last, 0);
                acc_r1_t0_f1 = vw_dot4_field(acc_r1_t0_f1, vb_field(v1, 4, 2), x_last, 1);
                acc_r1_t0_f2 = vw_dot4_field(acc_r1_t0_f2, vb_field(v1, 4, 4), x_last, 2);
                acc_r1_t0_f3 = vw_dot4_field(acc_r1_t0_f3, vb_field(v1, 4, 8), x_last, 3);
            }
        }
        const float x_scale0 = a->x_scale[t0 * groups + g];
        const vf scale0 = group_scales(w0 + 512, scale_bytes);
        prefetch(w0 + 512 + 4096);
        acc_r0_t0_f0 = vw_add(acc_r0_t0_f0, acc_r0_t0_f0);
        acc_r0_t0_f0 = vw_add(acc_r0_t0_f0, acc_r0_t0_f1);
        acc_r0_t0_f0 = vw_add(acc_r0_t0_f0, vw_sra(acc_r0_t0_f2, 1));
        acc_r0_t0_f0 = vw_add(acc_r0_t0_f0, vw_sra(acc_r0_t0_f3, 2));
        y_r0_t0 = add_group(y_r0_t0, acc_r0_t0_f0, scale0, x_scale0);
        const vf scale1 = group_scales(w0 + 16 * scale_bytes + 512, scale_bytes);
        prefetch(w0 + 16 * scale_bytes + 512 + 4096);
        acc_r1_t0_f0 = vw_add(acc_r1_t0_f0, acc_r1_t0_f0);
        acc_r1_t0_f0 = vw_add(acc_r1_t0_f0, acc_r1_t0_f1);
        acc_r1_t0_f0 = vw_add(acc_r1_t0_f0, vw_sra(acc_r1_t0_f2, 1));
        acc_r1_t0_f0 = vw_add(acc_r1_t0_f0, vw_sra(acc_r1_t0_f3, 2));
        y_r1_t0 = add_group(y_r1_t0, acc_r1_t0_f0, scale1, x_scale0);
        w0 += group_bytes;
        x0 += 128;
    }
    epilogue(a, m, 32 * b0, t0, y_r0_t0);
    epilogue(a, m, 32 * b0 + 16, t0, y_r1_t0);
}

int64_t bitgen_q1_n1_r32_g128_direct_streams1_nr1_accumulators4_widen_every0_unroll1_prefetch4096_prefetch_hint0__avx512_vnni_scratch(int64_t m, int64_t k, int64_t n) {
    (void)m;
    (void)k;
    (void)n;
    return 0;
}

void bitgen_q1_n1_r32_g128_direct_streams1_nr1_accumulators4_widen_every0_unroll1_prefetch4096_prefetch_hint0__avx512_vnni(const struct bitgen_matmul *a) {
    const int64_t first = a->row_begin / 32, last = (a->row_end + 31) / 32 - 1;
    const int64_t part = last - first + 1;
    for (int64_t block = first; block < first + part; ++block)
        tile_1(a, block, part, last);
}

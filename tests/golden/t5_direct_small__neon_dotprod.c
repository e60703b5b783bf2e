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

/* Four 2-bit codes for byte & 127; a byte from 128 on has 2 - code in every place. The fifth code is byte / 85, and
   the top two bits of avg(avg(byte, 0), byte) are it: 84 gives 63, 85 gives 64, 169 gives 127, 170 gives 128. */
static const uint8_t t5_table[128] __attribute__((aligned(64))) = {
    0, 64, 128, 16, 80, 144, 32, 96, 160, 4, 68, 132, 20, 84, 148, 36,
    100, 164, 8, 72, 136, 24, 88, 152, 40, 104, 168, 1, 65, 129, 17, 81,
    145, 33, 97, 161, 5, 69, 133, 21, 85, 85, 85, 149, 37, 101, 165, 9,
    73, 137, 25, 89, 153, 41, 105, 169, 2, 66, 130, 18, 82, 146, 34, 98,
    162, 6, 70, 134, 22, 86, 150, 38, 102, 166, 10, 74, 138, 26, 90, 154,
    42, 106, 170, 85, 85, 0, 64, 128, 16, 80, 144, 32, 96, 160, 4, 68,
    132, 20, 84, 148, 36, 100, 164, 8, 72, 136, 24, 88, 152, 40, 104, 168,
    1, 65, 129, 17, 81, 145, 33, 97, 161, 5, 69, 133, 21, 85, 85, 85,
};

/* Tokens x row blocks: 1 x 1; a block behind the last repeats it, a token too. */
static void tile_1(const struct bitgen_matmul *a, int64_t block, int64_t part, int64_t last, int64_t token) {
    (void)part;
    (void)last;
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 19) / 20;
    const int64_t block_bytes = 64 * chunks;
    const int64_t b0 = block;
    const uint8_t *const w0 = a->w + b0 * block_bytes;
    const int64_t t0 = min64(token, a->n - 1);
    const int8_t *const x0 = a->x + t0 * a->x_stride;
    const vb mask0 = vb_splat(3);
    const vb mask1 = vb_splat(12);
    const vb mask2 = vb_splat(48);
    vw acc_r0_t0_f0 = vw_zero(), acc_r0_t0_f1 = vw_zero(), acc_r0_t0_f2 = vw_zero();
    int64_t c = 0;
    for (; c + 2 <= chunks; c += 2) {
        {
            const vx x_first = vx_load(x0, 20 * c);
            const vx x_last = vx_load(x0, 20 * c + 4);
            {
                const vb packed0 = vb_load(w0 + 64 * c);
                const vb v0 = vb_mirror(vb_lut128(t5_table, packed0), packed0);
                const vb v0_fifth = vb_avg(vb_avg(packed0, vb_splat(0)), packed0);
                acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_and(v0, mask0), x_first, 0);
                acc_r0_t0_f1 = vw_dot4_field(acc_r0_t0_f1, vb_and(v0, mask1), x_first, 1);
                acc_r0_t0_f2 = vw_dot4_field(acc_r0_t0_f2, vb_and(v0, mask2), x_first, 2);
                acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_high(v0, 6), x_first, 3);
                acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_high(v0_fifth, 6), x_last, 3);
            }
        }
        {
            const vx x_first = vx_load(x0, 20 * (c + 1));
            const vx x_last = vx_load(x0, 20 * (c + 1) + 4);
            {
                const vb packed0 = vb_load(w0 + 64 * (c + 1));
                const vb v0 = vb_mirror(vb_lut128(t5_table, packed0), packed0);
                const vb v0_fifth = vb_avg(vb_avg(packed0, vb_splat(0)), packed0);
                acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_and(v0, mask0), x_first, 0);
                acc_r0_t0_f1 = vw_dot4_field(acc_r0_t0_f1, vb_and(v0, mask1), x_first, 1);
                acc_r0_t0_f2 = vw_dot4_field(acc_r0_t0_f2, vb_and(v0, mask2), x_first, 2);
                acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_high(v0, 6), x_first, 3);
                acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_high(v0_fifth, 6), x_last, 3);
            }
        }
    }
    if (c < chunks) {
        const vx x_first = vx_load(x0, 20 * c);
        const vx x_last = vx_load(x0, 20 * c + 4);
        {
            const vb packed0 = vb_load(w0 + 64 * c);
            const vb v0 = vb_mirror(vb_lut128(t5_table, packed0), packed0);
            const vb v0_fifth = vb_avg(vb_avg(packed0, vb_splat(0)), packed0);
            acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_and(v0, mask0), x_first, 0);
            acc_r0_t0_f1 = vw_dot4_field(acc_r0_t0_f1, vb_and(v0, mask1), x_first, 1);
            acc_r0_t0_f2 = vw_dot4_field(acc_r0_t0_f2, vb_and(v0, mask2), x_first, 2);
            acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_high(v0, 6), x_first, 3);
            acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_high(v0_fifth, 6), x_last, 3);
        }
    }
    acc_r0_t0_f0 = vw_add(acc_r0_t0_f0, vw_sra(acc_r0_t0_f1, 2));
    acc_r0_t0_f0 = vw_add(acc_r0_t0_f0, vw_sra(acc_r0_t0_f2, 4));
    epilogue(a, m, 16 * b0, t0, acc_r0_t0_f0);
}

/* Tokens x row blocks: 2 x 1; a block behind the last repeats it, a token too. */
static void tile_2(const struct bitgen_matmul *a, int64_t block, int64_t part, int64_t last, int64_t token) {
    (void)part;
    (void)last;
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 19) / 20;
    const int64_t block_bytes = 64 * chunks;
    const int64_t b0 = block;
    const uint8_t *const w0 = a->w + b0 * block_bytes;
    const int64_t t0 = min64(token, a->n - 1);
    const int8_t *const x0 = a->x + t0 * a->x_stride;
    const int64_t t1 = min64(token + 1, a->n - 1);
    const int8_t *const x1 = a->x + t1 * a->x_stride;
    const vb mask0 = vb_splat(3);
    const vb mask1 = vb_splat(12);
    const vb mask2 = vb_splat(48);
    vw acc_r0_t0_f0 = vw_zero(), acc_r0_t0_f1 = vw_zero(), acc_r0_t0_f2 = vw_zero();
    vw acc_r0_t1_f0 = vw_zero(), acc_r0_t1_f1 = vw_zero(), acc_r0_t1_f2 = vw_zero();
    int64_t c = 0;
    for (; c + 2 <= chunks; c += 2) {
        {
            const vb packed0 = vb_load(w0 + 64 * c);
            const vb v0 = vb_mirror(vb_lut128(t5_table, packed0), packed0);
            const vb v0_fifth = vb_avg(vb_avg(packed0, vb_splat(0)), packed0);
            {
                const vx x = vx_load(x0, 20 * c);
                acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_and(v0, mask0), x, 0);
            }
            {
                const vx x = vx_load(x1, 20 * c);
                acc_r0_t1_f0 = vw_dot4_field(acc_r0_t1_f0, vb_and(v0, mask0), x, 0);
            }
            {
                const vx x = vx_load(x0, 20 * c);
                acc_r0_t0_f1 = vw_dot4_field(acc_r0_t0_f1, vb_and(v0, mask1), x, 1);
            }
            {
                const vx x = vx_load(x1, 20 * c);
                acc_r0_t1_f1 = vw_dot4_field(acc_r0_t1_f1, vb_and(v0, mask1), x, 1);
            }
            {
                const vx x = vx_load(x0, 20 * c);
                acc_r0_t0_f2 = vw_dot4_field(acc_r0_t0_f2, vb_and(v0, mask2), x, 2);
            }
            {
                const vx x = vx_load(x1, 20 * c);
                acc_r0_t1_f2 = vw_dot4_field(acc_r0_t1_f2, vb_and(v0, mask2), x, 2);
            }
            {
                const vx x = vx_load(x0, 20 * c);
                acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_high(v0, 6), x, 3);
            }
            {
                const vx x = vx_load(x1, 20 * c);
                acc_r0_t1_f0 = vw_dot4_field(acc_r0_t1_f0, vb_high(v0, 6), x, 3);
            }
            {
                const vx x = vx_load(x0, 20 * c + 4);
                acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_high(v0_fifth, 6), x, 3);
            }
            {
                const vx x = vx_load(x1, 20 * c + 4);
                acc_r0_t1_f0 = vw_dot4_field(acc_r0_t1_f0, vb_high(v0_fifth, 6), x, 3);
            }
        }
        {
            const vb packed0 = vb_load(w0 + 64 * (c + 1));
            const vb v0 = vb_mirror(vb_lut128(t5_table, packed0), packed0);
            const vb v0_fifth = vb_avg(vb_avg(packed0, vb_splat(0)), packed0);
            {
                const vx x = vx_load(x0, 20 * (c + 1));
                acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_and(v0, mask0), x, 0);
            }
            {
                const vx x = vx_load(x1, 20 * (c + 1));
                acc_r0_t1_f0 = vw_dot4_field(acc_r0_t1_f0, vb_and(v0, mask0), x, 0);
            }
            {
                const vx x = vx_load(x0, 20 * (c + 1));
                acc_r0_t0_f1 = vw_dot4_field(acc_r0_t0_f1, vb_and(v0, mask1), x, 1);
            }
            {
                const vx x = vx_load(x1, 20 * (c + 1));
                acc_r0_t1_f1 = vw_dot4_field(acc_r0_t1_f1, vb_and(v0, mask1), x, 1);
            }
            {
                const vx x = vx_load(x0, 20 * (c + 1));
                acc_r0_t0_f2 = vw_dot4_field(acc_r0_t0_f2, vb_and(v0, mask2), x, 2);
            }
            {
                const vx x = vx_load(x1, 20 * (c + 1));
                acc_r0_t1_f2 = vw_dot4_field(acc_r0_t1_f2, vb_and(v0, mask2), x, 2);
            }
            {
                const vx x = vx_load(x0, 20 * (c + 1));
                acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_high(v0, 6), x, 3);
            }
            {
                const vx x = vx_load(x1, 20 * (c + 1));
                acc_r0_t1_f0 = vw_dot4_field(acc_r0_t1_f0, vb_high(v0, 6), x, 3);
            }
            {
                const vx x = vx_load(x0, 20 * (c + 1) + 4);
                acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_high(v0_fifth, 6), x, 3);
            }
            {
                const vx x = vx_load(x1, 20 * (c + 1) + 4);
                acc_r0_t1_f0 = vw_dot4_field(acc_r0_t1_f0, vb_high(v0_fifth, 6), x, 3);
            }
        }
    }
    if (c < chunks) {
        const vb packed0 = vb_load(w0 + 64 * c);
        const vb v0 = vb_mirror(vb_lut128(t5_table, packed0), packed0);
        const vb v0_fifth = vb_avg(vb_avg(packed0, vb_splat(0)), packed0);
        {
            const vx x = vx_load(x0, 20 * c);
            acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_and(v0, mask0), x, 0);
        }
        {
            const vx x = vx_load(x1, 20 * c);
            acc_r0_t1_f0 = vw_dot4_field(acc_r0_t1_f0, vb_and(v0, mask0), x, 0);
        }
        {
            const vx x = vx_load(x0, 20 * c);
            acc_r0_t0_f1 = vw_dot4_field(acc_r0_t0_f1, vb_and(v0, mask1), x, 1);
        }
        {
            const vx x = vx_load(x1, 20 * c);
            acc_r0_t1_f1 = vw_dot4_field(acc_r0_t1_f1, vb_and(v0, mask1), x, 1);
        }
        {
            const vx x = vx_load(x0, 20 * c);
            acc_r0_t0_f2 = vw_dot4_field(acc_r0_t0_f2, vb_and(v0, mask2), x, 2);
        }
        {
            const vx x = vx_load(x1, 20 * c);
            acc_r0_t1_f2 = vw_dot4_field(acc_r0_t1_f2, vb_and(v0, mask2), x, 2);
        }
        {
            const vx x = vx_load(x0, 20 * c);
            acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_high(v0, 6), x, 3);
        }
        {
            const vx x = vx_load(x1, 20 * c);
            acc_r0_t1_f0 = vw_dot4_field(acc_r0_t1_f0, vb_high(v0, 6), x, 3);
        }
        {
            const vx x = vx_load(x0, 20 * c + 4);
            acc_r0_t0_f0 = vw_dot4_field(acc_r0_t0_f0, vb_high(v0_fifth, 6), x, 3);
        }
        {
            const vx x = vx_load(x1, 20 * c + 4);
            acc_r0_t1_f0 = vw_dot4_field(acc_r0_t1_f0, vb_high(v0_fifth, 6), x, 3);
        }
    }
    acc_r0_t0_f0 = vw_add(acc_r0_t0_f0, vw_sra(acc_r0_t0_f1, 2));
    acc_r0_t0_f0 = vw_add(acc_r0_t0_f0, vw_sra(acc_r0_t0_f2, 4));
    epilogue(a, m, 16 * b0, t0, acc_r0_t0_f0);
    acc_r0_t1_f0 = vw_add(acc_r0_t1_f0, vw_sra(acc_r0_t1_f1, 2));
    acc_r0_t1_f0 = vw_add(acc_r0_t1_f0, vw_sra(acc_r0_t1_f2, 4));
    epilogue(a, m, 16 * b0, t1, acc_r0_t1_f0);
}

int64_t bitgen_t5_small_r16_direct_streams1_nr2_accumulators3_widen_every0_unroll2_prefetch0__neon_dotprod_scratch(int64_t m, int64_t k, int64_t n) {
    (void)m;
    (void)k;
    (void)n;
    return 0;
}

void bitgen_t5_small_r16_direct_streams1_nr2_accumulators3_widen_every0_unroll2_prefetch0__neon_dotprod(const struct bitgen_matmul *a) {
    const int64_t first = a->row_begin / 16, last = (a->row_end + 15) / 16 - 1;
    const int64_t part = last - first + 1;
    for (int64_t block = first; block < first + part; ++block) {
        int64_t token = 0;
        for (; token + 2 <= a->n; token += 2) tile_2(a, block, part, last, token);
        /* What is left goes to the smallest tile that holds it. */
        const int64_t left = a->n - token;
        if (left == 0) continue;
        if (left <= 1) {
            tile_1(a, block, part, last, token);
            continue;
        }
        tile_2(a, block, part, last, token);
    }
}

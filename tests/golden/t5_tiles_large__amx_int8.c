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

/* 16 rows x 20 k: 64 bytes of five trits become five blocks of byte codes (16 rows x 4 k each). */
static inline void unpack_chunk(const uint8_t *chunk, uint8_t *panel) {
    const vb b = vb_load(chunk);
    const vb v = vb_mirror(vb_lut128(t5_table, b), b), fifth = vb_avg(vb_avg(b, vb_splat(0)), b);
    vb_store(panel, vb_field(v, 0, 3));
    vb_store(panel + 64, vb_field(v, 2, 3));
    vb_store(panel + 128, vb_field(v, 4, 3));
    vb_store(panel + 192, vb_high(v, 6));
    vb_store(panel + 256, vb_high(fifth, 6));
}

/* Tokens in flight when k is cut into blocks: their int32 sums (512 KiB) stay in the L2 cache. */
enum { TOKENS = 512 };

/* Of a panel: whole tiles. */
static inline int64_t panel_columns(int64_t chunks) { return min64(960, (20 * chunks + 63) / 64 * 64); }

/* 32 rows x 16 tokens over `steps` steps of 64 k; token i of 16 is at x + i * x_stride.
   sums: 2 tiles of the columns before, then of these too. */
static void multiply_1(vt *t, const uint8_t *panel, int64_t sub_bytes, const int8_t *x, int64_t x_stride,
                       int64_t steps, int32_t *sums, int first) {
    if (first) {
        vt_zero(t, 0);
        vt_zero(t, 1);
    } else {
        vt_load(t, 0, sums, 64);
        vt_load(t, 1, sums + 256, 64);
    }
    for (int64_t i = 0; i < steps; ++i) {
        vt_load(t, 4, x + 1024 * i, x_stride);
        vt_load(t, 6, panel + 1024 * i, 64);
        vt_dot4(t, 0, 4, 6);
        vt_load(t, 7, panel + sub_bytes + 1024 * i, 64);
        vt_dot4(t, 1, 4, 7);
    }
    vt_store(t, 0, sums);
    vt_store(t, 1, sums + 256);
}

/* 32 rows x 32 tokens over `steps` steps of 64 k; token i of 16 is at x + i * x_stride.
   The second 16 tokens are 1 KiB behind.
   sums: 4 tiles of the columns before, then of these too. */
static void multiply_2(vt *t, const uint8_t *panel, int64_t sub_bytes, const int8_t *x, int64_t x_stride,
                       int64_t steps, int32_t *sums, int first) {
    if (first) {
        vt_zero(t, 0);
        vt_zero(t, 1);
        vt_zero(t, 2);
        vt_zero(t, 3);
    } else {
        vt_load(t, 0, sums, 64);
        vt_load(t, 1, sums + 256, 64);
        vt_load(t, 2, sums + 512, 64);
        vt_load(t, 3, sums + 768, 64);
    }
    for (int64_t i = 0; i < steps; ++i) {
        vt_load(t, 4, x + 2048 * i, x_stride);
        vt_load(t, 5, x + 2048 * i + 1024, x_stride);
        vt_load(t, 6, panel + 1024 * i, 64);
        vt_dot4(t, 0, 4, 6);
        vt_dot4(t, 2, 5, 6);
        vt_load(t, 7, panel + sub_bytes + 1024 * i, 64);
        vt_dot4(t, 1, 4, 7);
        vt_dot4(t, 3, 5, 7);
    }
    vt_store(t, 0, sums);
    vt_store(t, 1, sums + 256);
    vt_store(t, 2, sums + 512);
    vt_store(t, 3, sums + 768);
}

/* Activations of `count` tokens become tiles, those of the same 64 k side by side: rows of x are pages apart. */
static void pack_tokens(const int8_t *x, int64_t x_stride, int64_t count, int64_t steps, int8_t *packed) {
    const int64_t step_bytes = (count + 15) / 16 * 1024;
    for (int64_t r = 0; r < count; ++r)
        for (int64_t i = 0; i < steps; ++i)
            vb_store(packed + r / 16 * 1024 + r % 16 * 64 + i * step_bytes, vb_load(x + r * x_stride + 64 * i));
}

/* Finished sums of 32 rows x `count` tokens leave for the output. */
static void store_tiles(const struct bitgen_matmul *a, int64_t m, int64_t row, int64_t row_end, int64_t token,
                        int64_t count, const int32_t *sums) {
    for (int64_t i = 0; i < count; ++i) {
        const int32_t *const of_token = sums + i / 16 * 512 + i % 16 * 16;
        if (row < row_end)
            epilogue(a, m, row, token + i, vw_load(of_token));
        if (row + 16 < row_end)
            epilogue(a, m, row + 16, token + i, vw_load(of_token + 256));
    }
}

/* Rows [row, row + count) x chunks [from, to) become byte codes; count is a multiple of the row block. */
static void unpack_panel(const struct bitgen_matmul *a, int64_t block_bytes, int64_t row, int64_t count, int64_t from,
                         int64_t to, uint8_t *panel, int64_t sub_bytes) {
    for (int64_t r = 0; r < count; r += 32) {
        const uint8_t *const block = a->w + (row + r) / 32 * block_bytes;
        for (int64_t c = from; c < to; ++c)
            unpack_chunk(block + 128 * c, panel + r / 16 * sub_bytes + 320 * (c - from));
        for (int64_t c = from; c < to; ++c)
            unpack_chunk(block + 128 * c + 64, panel + (r / 16 + 1) * sub_bytes + 320 * (c - from));
    }
}

int64_t bitgen_t5_large_r32_tiles_mr32_nr32_mc256_kc960_pack1__amx_int8_scratch(int64_t m, int64_t k, int64_t n) {
    const int64_t columns = panel_columns((k + 19) / 20);
    const int64_t tokens = columns < k ? (min64(n, TOKENS) + 31) / 32 * 32 : 32;
    (void)m;
    /* byte codes, activations, and the sums of 256 rows when k is cut, of 32 otherwise */
    return 288 * columns + tokens * (columns < k ? 1024 : 128);
}

void bitgen_t5_large_r32_tiles_mr32_nr32_mc256_kc960_pack1__amx_int8(const struct bitgen_matmul *a) {
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 19) / 20;
    const int64_t block_bytes = 2 * (64 * chunks);
    const int64_t columns = panel_columns(chunks), chunks_each = columns / 20;
    const int64_t sub_bytes = 16 * columns;
    const int cut = columns < k; /* else one panel holds all of k */
    uint8_t *const panel = a->scratch;
    int8_t *const packed = (int8_t *)(panel + 256 * columns);
    int32_t *const sums = (int32_t *)(packed + 32 * columns);
    int64_t configured = 0;
    vt t;
    const int64_t row_end = (a->row_end + 31) / 32 * 32;
    const int64_t tokens = cut ? TOKENS : a->n;
    for (int64_t token0 = 0; token0 < a->n; token0 += tokens)
        for (int64_t row0 = a->row_begin; row0 < row_end; row0 += 256)
            for (int64_t from = 0; from < chunks; from += chunks_each) {
                const int64_t to = min64(from + chunks_each, chunks), token1 = min64(token0 + tokens, a->n);
                const int64_t row1 = min64(row0 + 256, row_end), column = 20 * from;
                const int64_t steps = (min64(k, 20 * to) - column + 63) / 64;
                unpack_panel(a, block_bytes, row0, row1 - row0, from, to, panel, sub_bytes);
                for (int64_t token = token0; token < token1; token += 32) {
                    const int64_t count = min64(32, token1 - token);
                    const int8_t *const x = a->x + token * a->x_stride + column;
                    if (count != configured) {
                        vt_begin(&t, (int)min64(count, 16), (int)(count > 16 ? count - 16 : count));
                        configured = count;
                    }
                    pack_tokens(x, a->x_stride, count, steps, packed);
                    for (int64_t row = row0; row < row1; row += 32) {
                        const uint8_t *const weights = panel + (row - row0) / 16 * sub_bytes;
                        int32_t *const part = cut ? sums + (token - token0) * 256 + (row - row0) * 32 : sums;
                        if (count > 16) multiply_2(&t, weights, sub_bytes, packed, 64, steps, part, from == 0);
                        else multiply_1(&t, weights, sub_bytes, packed, 64, steps, part, from == 0);
                        if (to == chunks) store_tiles(a, m, row, row1, token, count, part);
                    }
                }
            }
    vt_end(&t);
}

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

/* 16 rows x 16 k: 64 bytes of 2-bit codes become four blocks of byte codes (16 rows x 4 k each). */
static inline void unpack_chunk(const uint8_t *chunk, uint8_t *panel) {
    const vb v = vb_load(chunk);
    vb_store(panel, vb_field(v, 0, 3));
    vb_store(panel + 64, vb_field(v, 2, 3));
    vb_store(panel + 128, vb_field(v, 4, 3));
    vb_store(panel + 192, vb_high(v, 6));
}

/* Tokens in flight when k is cut into blocks: their int32 sums (128 KiB) stay in the L2 cache. */
enum { TOKENS = 512 };

/* Of a panel: whole groups of 16, so that steps of 4 k are even in number. */
static inline int64_t panel_columns(int64_t k) { return min64(960, (k + 15) / 16 * 16); }

/* A chunk of 16 rows becomes blocks of 8 rows x 8 k, two for 16 rows and 8 k. */
OP void unpack_group(const uint8_t *chunk, uint8_t *panel) {
    _Alignas(64) uint8_t steps[256]; /* compilers keep it in registers, all of it or most */
    unpack_chunk(chunk, steps);
    vb_store_zip4(panel, vb_load(steps),
                  vb_load(steps + 64));
    vb_store_zip4(panel + 128, vb_load(steps + 128),
                  vb_load(steps + 192));
}

/* Three parts that are not inlined into one: gcc 12 would keep registers of the others through each one's loop. */
#define OUT_OF_LINE static __attribute__((noinline)) void

/* Rows [row, row + count) x chunks [from, to) become byte codes; count is a multiple of the row block. */
OUT_OF_LINE unpack_panel(const struct bitgen_matmul *a, int64_t block_bytes, int64_t row, int64_t count, int64_t from,
                  int64_t to, uint8_t *panel, int64_t sub_bytes) {
    for (int64_t r = 0; r < count; r += 16) {
        const uint8_t *const block = a->w + (row + r) / 16 * block_bytes;
        for (int64_t c = from; c < to; c += 1)
            unpack_group(block + 64 * c, panel + r / 16 * sub_bytes + 256 * (c - from));
    }
}

/* Activations of tokens token, token + 1, ..., two by two, over `steps` times 64 k: 8 k of one, 8 k of the other. */
OUT_OF_LINE pack_tokens(const struct bitgen_matmul *a, int64_t token, int64_t column, int64_t steps, int64_t pairs,
                 int8_t *packed) {
    for (int64_t p = 0; p < pairs; ++p) {
        const int8_t *const x0 = a->x + (token + 2 * p) * a->x_stride + column;
        const int8_t *const x1 = a->x + min64(token + 2 * p + 1, a->n - 1) * a->x_stride + column;
        for (int64_t i = 0; i < steps; ++i)
            vb_store_zip8(packed + 128 * (p * steps + i), vb_load(x0 + 64 * i), vb_load(x1 + 64 * i));
    }
}

/* Finished sums of 16 rows x 2 tokens leave for the output; of a last token without a second, those of one. */
static inline void store_pair(const struct bitgen_matmul *a, int64_t m, int64_t row, int64_t token, vw low, vw high) {
    epilogue(a, m, row, token, vw_even(low, high));
    if (token + 1 < a->n) epilogue(a, m, row, token + 1, vw_odd(low, high));
}

/* 16 rows x 2 tokens over `octets` times 8 k. sums: those of the columns before, or NULL. */
OUT_OF_LINE product_1(const struct bitgen_matmul *a, const uint8_t *panel, const int8_t *x, int64_t x_bytes,
               int64_t octets, int64_t m, int64_t row, int64_t token, int32_t *sums, int first, int last) {
    vw acc_low_p0 = first ? vw_zero() : vw_load(sums);
    vw acc_high_p0 = first ? vw_zero() : vw_load(sums + 16);
    (void)x_bytes; /* there is one pair of tokens */
    for (int64_t i = 0; i < octets; ++i) {
        const vb x0 = vb_quad(x + 16 * i);
        const vb w0 = vb_load(panel + 128 * i);
        acc_low_p0 = vw_mmla(acc_low_p0, w0, x0);
        compiler_barrier();
        const vb w1 = vb_load(panel + 128 * i + 64);
        acc_high_p0 = vw_mmla(acc_high_p0, w1, x0);
    }
    if (last) {
        store_pair(a, m, row, token, acc_low_p0, acc_high_p0);
    } else {
        vw_store(sums, acc_low_p0);
        vw_store(sums + 16, acc_high_p0);
    }
}

/* 16 rows x 4 tokens over `octets` times 8 k. sums: those of the columns before, or NULL. */
OUT_OF_LINE product_2(const struct bitgen_matmul *a, const uint8_t *panel, const int8_t *x, int64_t x_bytes,
               int64_t octets, int64_t m, int64_t row, int64_t token, int32_t *sums, int first, int last) {
    vw acc_low_p0 = first ? vw_zero() : vw_load(sums);
    vw acc_low_p1 = first ? vw_zero() : vw_load(sums + 32);
    vw acc_high_p0 = first ? vw_zero() : vw_load(sums + 16);
    vw acc_high_p1 = first ? vw_zero() : vw_load(sums + 48);
    for (int64_t i = 0; i < octets; ++i) {
        const vb x0 = vb_quad(x + 16 * i);
        const vb x1 = vb_quad(x + x_bytes + 16 * i);
        const vb w0 = vb_load(panel + 128 * i);
        acc_low_p0 = vw_mmla(acc_low_p0, w0, x0);
        acc_low_p1 = vw_mmla(acc_low_p1, w0, x1);
        compiler_barrier();
        const vb w1 = vb_load(panel + 128 * i + 64);
        acc_high_p0 = vw_mmla(acc_high_p0, w1, x0);
        acc_high_p1 = vw_mmla(acc_high_p1, w1, x1);
    }
    if (last) {
        store_pair(a, m, row, token, acc_low_p0, acc_high_p0);
        store_pair(a, m, row, token + 2, acc_low_p1, acc_high_p1);
    } else {
        vw_store(sums, acc_low_p0);
        vw_store(sums + 16, acc_high_p0);
        vw_store(sums + 32, acc_low_p1);
        vw_store(sums + 48, acc_high_p1);
    }
}

/* 16 rows x 6 tokens over `octets` times 8 k. sums: those of the columns before, or NULL. */
OUT_OF_LINE product_3(const struct bitgen_matmul *a, const uint8_t *panel, const int8_t *x, int64_t x_bytes,
               int64_t octets, int64_t m, int64_t row, int64_t token, int32_t *sums, int first, int last) {
    vw acc_low_p0 = first ? vw_zero() : vw_load(sums);
    vw acc_low_p1 = first ? vw_zero() : vw_load(sums + 32);
    vw acc_low_p2 = first ? vw_zero() : vw_load(sums + 64);
    vw acc_high_p0 = first ? vw_zero() : vw_load(sums + 16);
    vw acc_high_p1 = first ? vw_zero() : vw_load(sums + 48);
    vw acc_high_p2 = first ? vw_zero() : vw_load(sums + 80);
    for (int64_t i = 0; i < octets; ++i) {
        const vb x0 = vb_quad(x + 16 * i);
        const vb x1 = vb_quad(x + x_bytes + 16 * i);
        const vb x2 = vb_quad(x + 2 * x_bytes + 16 * i);
        const vb w0 = vb_load(panel + 128 * i);
        acc_low_p0 = vw_mmla(acc_low_p0, w0, x0);
        acc_low_p1 = vw_mmla(acc_low_p1, w0, x1);
        acc_low_p2 = vw_mmla(acc_low_p2, w0, x2);
        compiler_barrier();
        const vb w1 = vb_load(panel + 128 * i + 64);
        acc_high_p0 = vw_mmla(acc_high_p0, w1, x0);
        acc_high_p1 = vw_mmla(acc_high_p1, w1, x1);
        acc_high_p2 = vw_mmla(acc_high_p2, w1, x2);
    }
    if (last) {
        store_pair(a, m, row, token, acc_low_p0, acc_high_p0);
        store_pair(a, m, row, token + 2, acc_low_p1, acc_high_p1);
        store_pair(a, m, row, token + 4, acc_low_p2, acc_high_p2);
    } else {
        vw_store(sums, acc_low_p0);
        vw_store(sums + 16, acc_high_p0);
        vw_store(sums + 32, acc_low_p1);
        vw_store(sums + 48, acc_high_p1);
        vw_store(sums + 64, acc_low_p2);
        vw_store(sums + 80, acc_high_p2);
    }
}

int64_t bitgen_i2s_large_r16_mmla_nr6_mc64_kc960__neon_i8mm_scratch(int64_t m, int64_t k, int64_t n) {
    const int64_t columns = panel_columns(k), sums = columns < k ? (min64(n, TOKENS) + 6) * 256 : 0;
    (void)m;
    /* byte codes, activations; then int32 sums of up to TOKENS tokens when k is cut */
    return 64 * columns + 6 * ((columns + 63) / 64 * 64) + sums;
}

void bitgen_i2s_large_r16_mmla_nr6_mc64_kc960__neon_i8mm(const struct bitgen_matmul *a) {
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 15) / 16;
    const int64_t block_bytes = 64 * chunks;
    const int64_t columns = panel_columns(k), chunks_each = columns / 16, sub_bytes = 16 * columns;
    uint8_t *const panel = a->scratch;
    int8_t *const packed = (int8_t *)(panel + 64 * columns);
    const int cut = columns < k; /* else one panel holds all of k */
    int32_t *const sums = cut ? (int32_t *)(packed + 6 * ((columns + 63) / 64 * 64)) : NULL;
    const int64_t row_end = (a->row_end + 15) / 16 * 16;
    const int64_t tokens = cut ? TOKENS : a->n;
    for (int64_t token0 = 0; token0 < a->n; token0 += tokens)
        for (int64_t row0 = a->row_begin; row0 < row_end; row0 += 64)
            for (int64_t from = 0; from < chunks; from += chunks_each) {
                const int64_t to = min64(from + chunks_each, chunks), token1 = min64(token0 + tokens, a->n);
                const int64_t row1 = min64(row0 + 64, row_end), column = 16 * from;
                const int64_t octets = (min64(k, 16 * to) - column + 7) / 8, steps = (octets + 7) / 8;
                unpack_panel(a, block_bytes, row0, row1 - row0, from, to, panel, sub_bytes);
                for (int64_t token = token0; token < token1; token += 6) {
                    const int64_t pairs = min64(3, (token1 - token + 1) / 2);
                    pack_tokens(a, token, column, steps, pairs, packed);
                    for (int64_t row = row0; row < row1; row += 16) {
                        const uint8_t *const weights = panel + (row - row0) / 16 * sub_bytes;
                        int32_t *const part = cut ? sums + (token - token0) * 64 + (row - row0) * 6 : sums;
                        const int first = from == 0, last = to == chunks;
                        if (pairs == 1)
                            product_1(a, weights, packed, 128 * steps, octets, m, row, token, part, first, last);
                        else if (pairs == 2)
                            product_2(a, weights, packed, 128 * steps, octets, m, row, token, part, first, last);
                        else
                            product_3(a, weights, packed, 128 * steps, octets, m, row, token, part, first, last);
                    }
                }
            }
}

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

enum { SLOT_BYTES = 4096 }; /* the tiles of a turn: 4 x 16 rows x 64 k */

/* Chunks [c, c + count) of 4 x 16 rows become tiles. */
static inline void unpack_turn(const uint8_t *const *w, int64_t c, int64_t count, uint8_t *slot) {
    for (int64_t i = c; i < c + count; ++i) {
        prefetch(w[0] + 64 * i + 4096);
        unpack_chunk(w[0] + 64 * i, slot + 256 * (i - c));
        prefetch(w[1] + 64 * i + 4096);
        unpack_chunk(w[1] + 64 * i, slot + 256 * (i - c) + 1024);
        prefetch(w[2] + 64 * i + 4096);
        unpack_chunk(w[2] + 64 * i, slot + 256 * (i - c) + 2048);
        prefetch(w[3] + 64 * i + 4096);
        unpack_chunk(w[3] + 64 * i, slot + 256 * (i - c) + 3072);
    }
}

/* `count` times 64 k of all tokens with 4 x 16 rows. */
static inline void multiply_turn(vt *t, const int8_t *x, int64_t x_stride, const uint8_t *slot, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        vt_load(t, 4, x + 64 * i, x_stride);
        vt_load(t, 6, slot + 1024 * i, 64);
        vt_dot4(t, 0, 4, 6);
        vt_load(t, 7, slot + 1024 * i + 1024, 64);
        vt_dot4(t, 1, 4, 7);
        vt_load(t, 6, slot + 1024 * i + 2048, 64);
        vt_dot4(t, 2, 4, 6);
        vt_load(t, 7, slot + 1024 * i + 3072, 64);
        vt_dot4(t, 3, 4, 7);
    }
}

/* Row blocks: 4, `part` blocks apart; a block behind the last repeats it. */
static void row_tiles(const struct bitgen_matmul *a, vt *t, int64_t block, int64_t part, int64_t last) {
    const int64_t m = a->m, k = a->k;
    const int64_t chunks = (k + 15) / 16;
    const int64_t block_bytes = 64 * chunks;
    const int64_t b0 = block;
    const int64_t b1 = min64(block + part, last);
    const int64_t b2 = min64(block + 2 * part, last);
    const int64_t b3 = min64(block + 3 * part, last);
    const uint8_t *const w[] = {
        a->w + b0 * block_bytes,
        a->w + b1 * block_bytes,
        a->w + b2 * block_bytes,
        a->w + b3 * block_bytes,
    };
    uint8_t *const panel = a->scratch;
    int32_t *const sums = (int32_t *)(panel + 2 * SLOT_BYTES);
    const int64_t turns = chunks / 4, left = chunks % 4;
    vt_zero(t, 0);
    vt_zero(t, 1);
    vt_zero(t, 2);
    vt_zero(t, 3);
    /* The weights of the next turn are unpacked while the tiles of this one are multiplied. */
    if (turns > 0) unpack_turn(w, 0, 4, panel);
    for (int64_t i = 0; i < turns; ++i) {
        uint8_t *const slot = panel + i % 2 * SLOT_BYTES, *const next = panel + (i + 1) % 2 * SLOT_BYTES;
        if (i + 1 < turns) unpack_turn(w, 4 * (i + 1), 4, next);
        multiply_turn(t, a->x + 64 * i, a->x_stride, slot, 1);
    }
    if (left > 0) {
        /* What lies in a tile behind the last chunk meets activations that are zero. */
        unpack_turn(w, 4 * turns, left, panel);
        multiply_turn(t, a->x + 64 * turns, a->x_stride, panel, (k + 63) / 64 - turns);
    }
    vt_store(t, 0, sums);
    vt_store(t, 1, sums + 256);
    vt_store(t, 2, sums + 512);
    vt_store(t, 3, sums + 768);
    for (int64_t token = 0; token < a->n; ++token) {
        epilogue(a, m, 16 * b0, token, vw_load(sums + 16 * token));
        epilogue(a, m, 16 * b1, token, vw_load(sums + 16 * token + 256));
        epilogue(a, m, 16 * b2, token, vw_load(sums + 16 * token + 512));
        epilogue(a, m, 16 * b3, token, vw_load(sums + 16 * token + 768));
    }
}

int64_t bitgen_i2s_small_r16_tiles_streams4_ahead1_prefetch4096__amx_int8_scratch(int64_t m, int64_t k, int64_t n) {
    (void)m;
    (void)k;
    (void)n;
    return 2 * SLOT_BYTES + 4096; /* weights, and the sums on their way out */
}

void bitgen_i2s_small_r16_tiles_streams4_ahead1_prefetch4096__amx_int8(const struct bitgen_matmul *a) {
    const int64_t first = a->row_begin / 16, last = (a->row_end + 15) / 16 - 1;
    /* Each stream walks a part of the rows of its own: what is prefetched behind its block is its next one. */
    const int64_t part = (last - first + 4) / 4;
    vt t;
    vt_begin(&t, (int)a->n, (int)a->n);
    for (int64_t block = first; block < first + part; ++block) row_tiles(a, &t, block, part, last);
    vt_end(&t);
}

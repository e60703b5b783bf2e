// Words for tiles: products of matrices of bytes. Levels without them have no kernels of the algorithm "tiles".

//: vt
// Eight tiles of 16 rows x 64 bytes. 0 .. 3 hold sums, 16 int32 a row; 4 and 5 activations, a token a row; 6 and 7
// weights: row i has, for 16 output rows, the four bytes of k = 4 i .. 4 i + 3.
typedef struct { int rows[8]; uint8_t b[8][16][64]; } vt;

//: vt_begin
// All become zero. 0, 1 and 4 have rows0 rows from here on, 2, 3 and 5 rows1 (1 .. 16 each), 6 and 7 have 16.
WORD void vt_begin(vt *t, int rows0, int rows1) {
    memset(t, 0, sizeof *t);
    for (int i = 0; i < 8; ++i) t->rows[i] = i > 5 ? 16 : i < 2 || i == 4 ? rows0 : rows1;
}

//: vt_end
// Their contents are gone; nothing but a new beginning may follow.
WORD void vt_end(vt *t) { memset(t, 0, sizeof *t); }

//: vt_zero
WORD void vt_zero(vt *t, int tile) { memset(t->b[tile], 0, sizeof t->b[tile]); }

//: vt_load
// The rows that the tile has, 64 bytes each, `stride` bytes apart; nothing else is read.
WORD void vt_load(vt *t, int tile, const void *p, int64_t stride) {
    for (int r = 0; r < t->rows[tile]; ++r) memcpy(t->b[tile][r], (const uint8_t *)p + r * stride, 64);
}

//: vt_store
// The rows of sums that the tile has, one behind the other.
WORD void vt_store(vt *t, int tile, int32_t *p) { memcpy(p, t->b[tile], 64 * (size_t)t->rows[tile]); }

//: vt_dot4
// sum[r][i] of c += sum over k of a[r][k] (int8) * byte 4 i + k % 4 of row k / 4 of b (uint8), mod 2^32.
// c is 0 .. 3, a is 4 (with c 0, 1, or all of them when rows0 = rows1) or 5, b is 6 or 7.
WORD void vt_dot4(vt *t, int c, int a, int b) {
    for (int r = 0; r < t->rows[c]; ++r) {
        uint32_t sums[16];
        memcpy(sums, t->b[c][r], 64);
        for (int k = 0; k < 64; ++k)
            for (int i = 0; i < 16; ++i)
                sums[i] += (uint32_t)((int8_t)t->b[a][r][k] * t->b[b][k / 4][4 * i + k % 4]);
        memcpy(t->b[c][r], sums, 64);
    }
}

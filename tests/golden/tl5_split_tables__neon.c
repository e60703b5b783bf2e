/* The split tables of one token: for each chunk of 20 activations 256 bytes. Group j, activations x[4 s + j], s = 0..4,
   has 14 sums of w0, w1, w2 with 9 w0 + 3 w1 + w2 = 0..13, |entry| <= 384, and two zeros; and twice the 8 sums of w3,
   w4 with 3 w3 + w4 = -4..-1, 1..4, |entry| <= 256. An entry is low + 23 high with high = floor((11 entry + 128)
   / 256), both int8: the low digits of a sum of three and one of two add up to -30 .. 30, the high ones to -28 .. 28.
   Of groups 2 h and 2 h + 1, bytes [128 h ..) hold the low digits (16 sums of three, 16 of two, the same of the other
   group), bytes [128 h + 64 ..) the high digits. */
/* Codes w + 1 of (w0, w1), (w2, -), (w3, w4) of the entries, in the order in which bytes are packed. */
static const uint8_t codes[3][2][64] __attribute__((aligned(64))) = {
    {
        {1, 1, 1, 1, 1, 2, 1, 2, 1, 2, 2, 0, 2, 0, 2, 0,
         1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
         1, 1, 1, 1, 1, 2, 1, 2, 1, 2, 2, 0, 2, 0, 2, 0,
         1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
        {2, 1, 2, 1, 2, 1, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1,
         1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
         2, 1, 2, 1, 2, 1, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1,
         1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
    },
    {
        {1, 1, 2, 1, 0, 1, 1, 1, 2, 1, 0, 1, 1, 1, 2, 1,
         1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
         1, 1, 2, 1, 0, 1, 1, 1, 2, 1, 0, 1, 1, 1, 2, 1,
         1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
        {0, 1, 1, 1, 2, 1, 0, 1, 1, 1, 2, 1, 1, 1, 1, 1,
         1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
         0, 1, 1, 1, 2, 1, 0, 1, 1, 1, 2, 1, 1, 1, 1, 1,
         1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
    },
    {
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
         0, 0, 0, 1, 0, 2, 1, 0, 1, 2, 2, 0, 2, 1, 2, 2,
         1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
         0, 0, 0, 1, 0, 2, 1, 0, 1, 2, 2, 0, 2, 1, 2, 2},
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
         0, 0, 0, 1, 0, 2, 1, 0, 1, 2, 2, 0, 2, 1, 2, 2,
         1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
         0, 0, 0, 1, 0, 2, 1, 0, 1, 2, 2, 0, 2, 1, 2, 2},
    },
};
/* The activations of a group for these pairs, from 16 that begin with its first; for the last pair with its second. */
static const uint8_t pick[3][64] __attribute__((aligned(64))) = {
    {0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4,
     0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4,
     1, 5, 1, 5, 1, 5, 1, 5, 1, 5, 1, 5, 1, 5, 1, 5,
     1, 5, 1, 5, 1, 5, 1, 5, 1, 5, 1, 5, 1, 5, 1, 5},
    {8, 128, 8, 128, 8, 128, 8, 128, 8, 128, 8, 128, 8, 128, 8, 128,
     8, 128, 8, 128, 8, 128, 8, 128, 8, 128, 8, 128, 8, 128, 8, 128,
     9, 128, 9, 128, 9, 128, 9, 128, 9, 128, 9, 128, 9, 128, 9, 128,
     9, 128, 9, 128, 9, 128, 9, 128, 9, 128, 9, 128, 9, 128, 9, 128},
    {8, 12, 8, 12, 8, 12, 8, 12, 8, 12, 8, 12, 8, 12, 8, 12,
     8, 12, 8, 12, 8, 12, 8, 12, 8, 12, 8, 12, 8, 12, 8, 12,
     9, 13, 9, 13, 9, 13, 9, 13, 9, 13, 9, 13, 9, 13, 9, 13,
     9, 13, 9, 13, 9, 13, 9, 13, 9, 13, 9, 13, 9, 13, 9, 13},
};

void bitgen_tl5_split_tables__neon(const int8_t *xq, int64_t k, uint8_t *tables) {
    const int64_t chunks = (k + 19) / 20;
    const vb ones = vb_splat(1), zero = vb_splat(0);
    const vh eleven = vh_zip_lo(vb_splat(11), zero), half = vh_zip_lo(vb_splat(128), zero);
    const vh radix = vh_zip_lo(vb_splat(23), zero);
    for (int64_t c = 0; c < chunks; ++c)
        for (int j = 0; j < 4; j += 2) {
            const vb first = vb_quad(xq + 20 * c + j), second = vb_quad(xq + 20 * c + j + 4);
            const vb x0 = vb_lut16(first, vb_load(pick[0])), x1 = vb_lut16(first, vb_load(pick[1]));
            const vb x2 = vb_lut16(second, vb_load(pick[2]));
            /* codes are w + 1: the sum of the activations comes off */
            const vh sum = vh_add(vh_add(vh_pairs(ones, x0), vh_pairs(ones, x1)), vh_pairs(ones, x2));
            uint8_t *const table = tables + 256 * c + 64 * j;
            const vh p0 = vh_pairs(vb_load(codes[0][0]), x0);
            const vh q0 = vh_pairs(vb_load(codes[1][0]), x1);
            const vh r0 = vh_pairs(vb_load(codes[2][0]), x2);
            const vh e0 = vh_sub(vh_add(vh_add(p0, q0), r0), sum);
            const vh p1 = vh_pairs(vb_load(codes[0][1]), x0);
            const vh q1 = vh_pairs(vb_load(codes[1][1]), x1);
            const vh r1 = vh_pairs(vb_load(codes[2][1]), x2);
            const vh e1 = vh_sub(vh_add(vh_add(p1, q1), r1), sum);
            const vb high = vb_high_bytes(vh_add(vh_mul(e0, eleven), half), vh_add(vh_mul(e1, eleven), half));
            /* zipped with zeros a high digit loses its sign, which its low byte, times 23, does not need */
            const vh low0 = vh_sub(e0, vh_mul(vh_zip_lo(high, zero), radix));
            const vh low1 = vh_sub(e1, vh_mul(vh_zip_hi(high, zero), radix));
            vb_store(table, vb_low_bytes(low0, low1));
            vb_store(table + 64, high);
        }
}

// The vector ops of AVX-512 VBMI, over that of AVX-512 VNNI: bytes are picked from two registers at once.

//: vb_low_bytes
// One vpermt2b instead of three instructions: TL1 tables for k = 8736 in 1.44 us, not 1.73 (Zen 5).
OP vb vb_low_bytes(vh a, vh b) {
    __m512i pick = _mm512_setr_epi32(0x06040200, 0x0e0c0a08, 0x46444240, 0x4e4c4a48,
                                     0x16141210, 0x1e1c1a18, 0x56545250, 0x5e5c5a58,
                                     0x26242220, 0x2e2c2a28, 0x66646260, 0x6e6c6a68,
                                     0x36343230, 0x3e3c3a38, 0x76747270, 0x7e7c7a78);
    return (vb){_mm512_permutex2var_epi8((__m512i)a.v, pick, (__m512i)b.v)};
}

//: vb_high_bytes
OP vb vb_high_bytes(vh a, vh b) {
    __m512i pick = _mm512_setr_epi32(0x07050301, 0x0f0d0b09, 0x47454341, 0x4f4d4b49,
                                     0x17151311, 0x1f1d1b19, 0x57555351, 0x5f5d5b59,
                                     0x27252321, 0x2f2d2b29, 0x67656361, 0x6f6d6b69,
                                     0x37353331, 0x3f3d3b39, 0x77757371, 0x7f7d7b79);
    return (vb){_mm512_permutex2var_epi8((__m512i)a.v, pick, (__m512i)b.v)};
}

//: vb_affine_field
// An affine map of the bits of each byte. Of the identity, row i is bit i; rows moved by `bits` shift, and those whose
// bit is not in the mask give 0. One instruction, where a shift of int16 and a mask are two; but on Zen 4 it takes the
// pipes that multiply (docs/decisions/0099-fields-by-gfni-are-a-knob.md).
OP vb vb_affine_field(vb v, int bits, int mask) {
    const uint64_t identity = 0x0102040810204080u, kept = 0x0101010101010101u * (uint8_t)(mask << bits);
    return (vb){_mm512_gf2p8affine_epi64_epi8(v.v, _mm512_set1_epi64((int64_t)((identity << 8 * bits) & kept)), 0)};
}

//: vb_lut128
// One vpermi2b, which reads the low 7 bits of an index, against 24 instructions.
OP vb vb_lut128(const uint8_t *table, vb idx) {
    return (vb){_mm512_permutex2var_epi8(_mm512_loadu_si512(table), idx.v, _mm512_loadu_si512(table + 64))};
}

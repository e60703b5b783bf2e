// The words for products of 2 x 8 by 8 x 2 bytes with FEAT_I8MM: usmmla, 32 products where usdot has 16.

//: vw_mmla
WORD vw vw_mmla(vw acc, vb u, vb s) {
    return (vw){vusmmlaq_s32(acc.a, u.a, (int8x16_t)s.a), vusmmlaq_s32(acc.b, u.b, (int8x16_t)s.b),
                vusmmlaq_s32(acc.c, u.c, (int8x16_t)s.c), vusmmlaq_s32(acc.d, u.d, (int8x16_t)s.d)};
}

//: hold_loads
// gcc 12 would load all weights of a step first, and keep sums on the stack instead: 58 instructions for 33.
WORD void hold_loads(void) { __asm__ volatile("" : : : "memory"); }

//: vw_even
WORD vw vw_even(vw a, vw b) {
    return (vw){vuzp1q_s32(a.a, a.b), vuzp1q_s32(a.c, a.d), vuzp1q_s32(b.a, b.b), vuzp1q_s32(b.c, b.d)};
}

//: vw_odd
WORD vw vw_odd(vw a, vw b) {
    return (vw){vuzp2q_s32(a.a, a.b), vuzp2q_s32(a.c, a.d), vuzp2q_s32(b.a, b.b), vuzp2q_s32(b.c, b.d)};
}

//: neon_store_zip4
// st2 zips while it stores.
WORD void neon_store_zip4(uint8_t *p, uint8x16_t a, uint8x16_t b) {
    const uint32x4x2_t both = {{(uint32x4_t)a, (uint32x4_t)b}};
    vst2q_u32((uint32_t *)p, both);
}

//: vb_store_zip4
WORD void vb_store_zip4(void *p, vb a, vb b) {
    uint8_t *q = (uint8_t *)p;
    neon_store_zip4(q, a.a, b.a);
    neon_store_zip4(q + 32, a.b, b.b);
    neon_store_zip4(q + 64, a.c, b.c);
    neon_store_zip4(q + 96, a.d, b.d);
}

//: neon_store_zip8
WORD void neon_store_zip8(uint8_t *p, uint8x16_t a, uint8x16_t b) {
    const uint64x2x2_t both = {{(uint64x2_t)a, (uint64x2_t)b}};
    vst2q_u64((uint64_t *)p, both);
}

//: vb_store_zip8
WORD void vb_store_zip8(void *p, vb a, vb b) {
    uint8_t *q = (uint8_t *)p;
    neon_store_zip8(q, a.a, b.a);
    neon_store_zip8(q + 32, a.b, b.b);
    neon_store_zip8(q + 64, a.c, b.c);
    neon_store_zip8(q + 96, a.d, b.d);
}

// The vector ops of NEON with FEAT_I8MM, over that of NEON with FEAT_DotProd.

//: vw_dot4
// usdot takes u as unsigned: all four fields of I2_S can stay in place.
OP vw vw_dot4(vw acc, vb u, vb s) {
    return (vw){vusdotq_s32(acc.a, u.a, (int8x16_t)s.a), vusdotq_s32(acc.b, u.b, (int8x16_t)s.b),
                vusdotq_s32(acc.c, u.c, (int8x16_t)s.c), vusdotq_s32(acc.d, u.d, (int8x16_t)s.d)};
}

//: values_bias
enum { values_bias = 128 };

//: neon_pairs
// -u fits a signed byte also for u = 128. Its sums of two are the negated ones mod 2^16, which are negated back.
OP int16x8_t neon_pairs(uint8x16_t u, uint8x16_t s) {
    const int8x16_t a = vnegq_s8((int8x16_t)u), b = (int8x16_t)s;
    return vnegq_s16(vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b)));
}

//: neon_dot_field
OP int32x4_t neon_dot_field(int32x4_t acc, uint8x16_t u, vx x, int f) {
    switch (f) {
        case 0: return vusdotq_laneq_s32(acc, u, x.x, 0);
        case 1: return vusdotq_laneq_s32(acc, u, x.x, 1);
        case 2: return vusdotq_laneq_s32(acc, u, x.x, 2);
        default: return vusdotq_laneq_s32(acc, u, x.x, 3);
    }
}

//: vp_add
// smlsl of -u, which fits a signed byte also for u = 128.
OP vp vp_add(vp sums, vb u, vb s) {
    const int8x16_t u0 = vnegq_s8((int8x16_t)u.a), u1 = vnegq_s8((int8x16_t)u.b);
    const int8x16_t u2 = vnegq_s8((int8x16_t)u.c), u3 = vnegq_s8((int8x16_t)u.d);
    const int8x16_t s0 = (int8x16_t)s.a, s1 = (int8x16_t)s.b, s2 = (int8x16_t)s.c, s3 = (int8x16_t)s.d;
    return (vp){vmlsl_s8(sums.a0, vget_low_s8(u0), vget_low_s8(s0)), vmlsl_high_s8(sums.a1, u0, s0),
                vmlsl_s8(sums.b0, vget_low_s8(u1), vget_low_s8(s1)), vmlsl_high_s8(sums.b1, u1, s1),
                vmlsl_s8(sums.c0, vget_low_s8(u2), vget_low_s8(s2)), vmlsl_high_s8(sums.c1, u2, s2),
                vmlsl_s8(sums.d0, vget_low_s8(u3), vget_low_s8(s3)), vmlsl_high_s8(sums.d1, u3, s3)};
}

//== Products of 2 x 8 by 8 x 2 bytes
// The ops for products of 2 x 8 by 8 x 2 bytes with FEAT_I8MM: usmmla, 32 products where usdot has 16.

//: vw_mmla
OP vw vw_mmla(vw acc, vb u, vb s) {
    return (vw){vusmmlaq_s32(acc.a, u.a, (int8x16_t)s.a), vusmmlaq_s32(acc.b, u.b, (int8x16_t)s.b),
                vusmmlaq_s32(acc.c, u.c, (int8x16_t)s.c), vusmmlaq_s32(acc.d, u.d, (int8x16_t)s.d)};
}

//: compiler_barrier
// gcc 12 would load all weights of a step first, and keep sums on the stack instead: 58 instructions for 33.
OP void compiler_barrier(void) { __asm__ volatile("" : : : "memory"); }

//: vw_even
OP vw vw_even(vw a, vw b) {
    return (vw){vuzp1q_s32(a.a, a.b), vuzp1q_s32(a.c, a.d), vuzp1q_s32(b.a, b.b), vuzp1q_s32(b.c, b.d)};
}

//: vw_odd
OP vw vw_odd(vw a, vw b) {
    return (vw){vuzp2q_s32(a.a, a.b), vuzp2q_s32(a.c, a.d), vuzp2q_s32(b.a, b.b), vuzp2q_s32(b.c, b.d)};
}

//: neon_store_zip4
// st2 zips while it stores.
OP void neon_store_zip4(uint8_t *p, uint8x16_t a, uint8x16_t b) {
    const uint32x4x2_t both = {{(uint32x4_t)a, (uint32x4_t)b}};
    vst2q_u32((uint32_t *)p, both);
}

//: vb_store_zip4
OP void vb_store_zip4(void *p, vb a, vb b) {
    uint8_t *q = (uint8_t *)p;
    neon_store_zip4(q, a.a, b.a);
    neon_store_zip4(q + 32, a.b, b.b);
    neon_store_zip4(q + 64, a.c, b.c);
    neon_store_zip4(q + 96, a.d, b.d);
}

//: neon_store_zip8
OP void neon_store_zip8(uint8_t *p, uint8x16_t a, uint8x16_t b) {
    const uint64x2x2_t both = {{(uint64x2_t)a, (uint64x2_t)b}};
    vst2q_u64((uint64_t *)p, both);
}

//: vb_store_zip8
OP void vb_store_zip8(void *p, vb a, vb b) {
    uint8_t *q = (uint8_t *)p;
    neon_store_zip8(q, a.a, b.a);
    neon_store_zip8(q + 32, a.b, b.b);
    neon_store_zip8(q + 64, a.c, b.c);
    neon_store_zip8(q + 96, a.d, b.d);
}

// The vocabulary of NEON with FEAT_I8MM, over that of NEON with FEAT_DotProd.

//: vw_dot4
// usdot takes u as unsigned: all four fields of I2_S can stay in place.
WORD vw vw_dot4(vw acc, vb u, vb s) {
    return (vw){vusdotq_s32(acc.a, u.a, (int8x16_t)s.a), vusdotq_s32(acc.b, u.b, (int8x16_t)s.b),
                vusdotq_s32(acc.c, u.c, (int8x16_t)s.c), vusdotq_s32(acc.d, u.d, (int8x16_t)s.d)};
}

//: neon_pairs
// -u fits a signed byte also for u = 128. Its sums of two are the negated ones mod 2^16, which are negated back.
WORD int16x8_t neon_pairs(uint8x16_t u, uint8x16_t s) {
    const int8x16_t a = vnegq_s8((int8x16_t)u), b = (int8x16_t)s;
    return vnegq_s16(vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b)));
}

//: neon_dot_field
WORD int32x4_t neon_dot_field(int32x4_t acc, uint8x16_t u, vx x, int f) {
    switch (f) {
        case 0: return vusdotq_laneq_s32(acc, u, x.x, 0);
        case 1: return vusdotq_laneq_s32(acc, u, x.x, 1);
        case 2: return vusdotq_laneq_s32(acc, u, x.x, 2);
        default: return vusdotq_laneq_s32(acc, u, x.x, 3);
    }
}

//: vp_add
// smlsl of -u, which fits a signed byte also for u = 128.
WORD vp vp_add(vp sums, vb u, vb s) {
    const int8x16_t u0 = vnegq_s8((int8x16_t)u.a), u1 = vnegq_s8((int8x16_t)u.b);
    const int8x16_t u2 = vnegq_s8((int8x16_t)u.c), u3 = vnegq_s8((int8x16_t)u.d);
    const int8x16_t s0 = (int8x16_t)s.a, s1 = (int8x16_t)s.b, s2 = (int8x16_t)s.c, s3 = (int8x16_t)s.d;
    return (vp){vmlsl_s8(sums.a0, vget_low_s8(u0), vget_low_s8(s0)), vmlsl_high_s8(sums.a1, u0, s0),
                vmlsl_s8(sums.b0, vget_low_s8(u1), vget_low_s8(s1)), vmlsl_high_s8(sums.b1, u1, s1),
                vmlsl_s8(sums.c0, vget_low_s8(u2), vget_low_s8(s2)), vmlsl_high_s8(sums.c1, u2, s2),
                vmlsl_s8(sums.d0, vget_low_s8(u3), vget_low_s8(s3)), vmlsl_high_s8(sums.d1, u3, s3)};
}

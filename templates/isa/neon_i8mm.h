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

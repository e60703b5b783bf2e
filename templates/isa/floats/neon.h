// The float words of NEON. What each word means is written in floats/scalar.h.

//: vf_store
WORD void vf_store(float *p, vf v) {
    vst1q_f32(p, v.a);
    vst1q_f32(p + 4, v.b);
    vst1q_f32(p + 8, v.c);
    vst1q_f32(p + 12, v.d);
}

//: vf_add
WORD vf vf_add(vf a, vf b) {
    return (vf){vaddq_f32(a.a, b.a), vaddq_f32(a.b, b.b), vaddq_f32(a.c, b.c), vaddq_f32(a.d, b.d)};
}

//: vf_sub
WORD vf vf_sub(vf a, vf b) {
    return (vf){vsubq_f32(a.a, b.a), vsubq_f32(a.b, b.b), vsubq_f32(a.c, b.c), vsubq_f32(a.d, b.d)};
}

//: vf_div
WORD vf vf_div(vf a, vf b) {
    return (vf){vdivq_f32(a.a, b.a), vdivq_f32(a.b, b.b), vdivq_f32(a.c, b.c), vdivq_f32(a.d, b.d)};
}

//: vf_fma
WORD vf vf_fma(vf a, vf b, vf c) {
    return (vf){vfmaq_f32(c.a, a.a, b.a), vfmaq_f32(c.b, a.b, b.b), vfmaq_f32(c.c, a.c, b.c),
                vfmaq_f32(c.d, a.d, b.d)};
}

//: neon_greater
// fmax gives NaN where one is NaN, fmaxnm the number; here the second has to come out.
WORD float32x4_t neon_greater(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }

//: vf_max
WORD vf vf_max(vf a, vf b) {
    return (vf){neon_greater(a.a, b.a), neon_greater(a.b, b.b), neon_greater(a.c, b.c), neon_greater(a.d, b.d)};
}

//: neon_zero_below
WORD float32x4_t neon_zero_below(float32x4_t v, float32x4_t x, float32x4_t limit) {
    return (float32x4_t)vbicq_u32((uint32x4_t)v, vcltq_f32(x, limit));
}

//: vf_zero_below
WORD vf vf_zero_below(vf v, vf x, vf limit) {
    return (vf){neon_zero_below(v.a, x.a, limit.a), neon_zero_below(v.b, x.b, limit.b), neon_zero_below(v.c, x.c, limit.c),
                neon_zero_below(v.d, x.d, limit.d)};
}

//: vf_blend_n
WORD vf vf_blend_n(vf v, vf rest, int n) {
    const int32x4_t a = {0, 1, 2, 3}, b = {4, 5, 6, 7}, c = {8, 9, 10, 11}, d = {12, 13, 14, 15};
    const int32x4_t count = vdupq_n_s32(n);
    return (vf){vbslq_f32(vcgtq_s32(count, a), v.a, rest.a), vbslq_f32(vcgtq_s32(count, b), v.b, rest.b),
                vbslq_f32(vcgtq_s32(count, c), v.c, rest.c), vbslq_f32(vcgtq_s32(count, d), v.d, rest.d)};
}

//: neon_pow2
WORD float32x4_t neon_pow2(int32x4_t n) { return (float32x4_t)vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23); }

//: vf_pow2
WORD vf vf_pow2(vw n) { return (vf){neon_pow2(n.a), neon_pow2(n.b), neon_pow2(n.c), neon_pow2(n.d)}; }

//: vf_hsum
// Not faddp, which adds neighbours: the tree adds halves.
WORD float vf_hsum(vf v) {
    float32x4_t x = vaddq_f32(vaddq_f32(v.a, v.c), vaddq_f32(v.b, v.d));
    float32x2_t y = vadd_f32(vget_low_f32(x), vget_high_f32(x));
    return vget_lane_f32(y, 0) + vget_lane_f32(y, 1);
}

//: vf_hmax
WORD float vf_hmax(vf v) {
    float32x4_t x = neon_greater(neon_greater(v.a, v.c), neon_greater(v.b, v.d));
    x = neon_greater(x, vextq_f32(x, x, 2));
    x = neon_greater(x, vextq_f32(x, x, 1));
    return vgetq_lane_f32(x, 0);
}

//: vf_from_f16
WORD vf vf_from_f16(const uint16_t *p) {
    const float16x8_t x = (float16x8_t)vld1q_u16(p), y = (float16x8_t)vld1q_u16(p + 8);
    return (vf){vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x), vcvt_f32_f16(vget_low_f16(y)),
                vcvt_high_f32_f16(y)};
}

//: vf_to_f16
WORD void vf_to_f16(uint16_t *p, vf v) {
    vst1q_u16(p, (uint16x8_t)vcvt_high_f16_f32(vcvt_f16_f32(v.a), v.b));
    vst1q_u16(p + 8, (uint16x8_t)vcvt_high_f16_f32(vcvt_f16_f32(v.c), v.d));
}

//: vf_from_bf16
WORD vf vf_from_bf16(const uint16_t *p) {
    const uint16x8_t x = vld1q_u16(p), y = vld1q_u16(p + 8);
    return (vf){(float32x4_t)vshll_n_u16(vget_low_u16(x), 16), (float32x4_t)vshll_high_n_u16(x, 16),
                (float32x4_t)vshll_n_u16(vget_low_u16(y), 16), (float32x4_t)vshll_high_n_u16(y, 16)};
}

//: vw_load_s8
WORD vw vw_load_s8(const int8_t *p) {
    const int8x16_t x = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_high_s8(x);
    return (vw){vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)};
}

//: vw_load_u8
WORD vw vw_load_u8(const uint8_t *p) {
    const uint8x16_t x = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_high_u8(x);
    return (vw){(int32x4_t)vmovl_u16(vget_low_u16(low)), (int32x4_t)vmovl_high_u16(low),
                (int32x4_t)vmovl_u16(vget_low_u16(high)), (int32x4_t)vmovl_high_u16(high)};
}

//: vw_and
WORD vw vw_and(vw a, vw b) { return (vw){a.a & b.a, a.b & b.b, a.c & b.c, a.d & b.d}; }

//: vw_shl
WORD vw vw_shl(vw v, int bits) {
    return (vw){(int32x4_t)((uint32x4_t)v.a << bits), (int32x4_t)((uint32x4_t)v.b << bits),
                (int32x4_t)((uint32x4_t)v.c << bits), (int32x4_t)((uint32x4_t)v.d << bits)};
}

//: vf_splat_f16
WORD vf vf_splat_f16(const uint16_t *p) {
    float32x4_t v = vcvt_f32_f16((float16x4_t)vld1_dup_u16(p));
    return (vf){v, v, v, v};
}

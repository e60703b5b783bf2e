// The float words of SVE. What each word means is written in floats/scalar.h.

//: vf_store
WORD void vf_store(float *p, vf v) {
    for (int i = 0; i < SVE_PARTS; ++i) svst1_f32(svptrue_b32(), p + SVE_WORDS * i, v.z[i]);
}

//: vf_add
WORD vf vf_add(vf a, vf b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = a.z[i] + b.z[i];
    return a;
}

//: vf_sub
WORD vf vf_sub(vf a, vf b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = a.z[i] - b.z[i];
    return a;
}

//: vf_div
WORD vf vf_div(vf a, vf b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = a.z[i] / b.z[i];
    return a;
}

//: vf_fma
WORD vf vf_fma(vf a, vf b, vf c) {
    for (int i = 0; i < SVE_PARTS; ++i) c.z[i] = svmla_f32_x(svptrue_b32(), c.z[i], a.z[i], b.z[i]);
    return c;
}

//: sve_greater
// fmax gives NaN where one is NaN, fmaxnm the number; here the second has to come out.
WORD sve_f32 sve_greater(sve_f32 a, sve_f32 b) { return svsel_f32(svcmpgt_f32(svptrue_b32(), a, b), a, b); }

//: vf_max
WORD vf vf_max(vf a, vf b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = sve_greater(a.z[i], b.z[i]);
    return a;
}

//: vf_zero_below
WORD vf vf_zero_below(vf v, vf x, vf limit) {
    for (int i = 0; i < SVE_PARTS; ++i)
        v.z[i] = svsel_f32(svcmplt_f32(svptrue_b32(), x.z[i], limit.z[i]), svdup_n_f32(0.0f), v.z[i]);
    return v;
}

//: vf_blend_n
WORD vf vf_blend_n(vf v, vf rest, int n) {
    for (int i = 0; i < SVE_PARTS; ++i) v.z[i] = svsel_f32(svwhilelt_b32_s32(SVE_WORDS * i, n), v.z[i], rest.z[i]);
    return v;
}

//: vf_pow2
WORD vf vf_pow2(vw n) {
    vf r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svreinterpret_f32_u32(((sve_u32)n.z[i] + 127) << 23);
    return r;
}

//: sve_plus
WORD sve_f32 sve_plus(sve_f32 a, sve_f32 b) { return a + b; }

//: vf_hsum
// Not faddv, which adds neighbours: the tree adds halves. Elements behind the half in use are left over.
WORD float vf_hsum(vf v) {
    for (int half = SVE_PARTS / 2; half; half >>= 1)
        for (int i = 0; i < half; ++i) v.z[i] = v.z[i] + v.z[i + half];
    sve_f32 x = v.z[0];
    if (SVE_WORDS >= 16) x = sve_plus(x, svext_f32(x, x, 8));
    if (SVE_WORDS >= 8) x = sve_plus(x, svext_f32(x, x, 4));
    x = sve_plus(x, svext_f32(x, x, 2));
    x = sve_plus(x, svext_f32(x, x, 1));
    return svlasta_f32(svpfalse_b(), x);
}

//: vf_hmax
WORD float vf_hmax(vf v) {
    for (int half = SVE_PARTS / 2; half; half >>= 1)
        for (int i = 0; i < half; ++i) v.z[i] = sve_greater(v.z[i], v.z[i + half]);
    sve_f32 x = v.z[0];
    if (SVE_WORDS >= 16) x = sve_greater(x, svext_f32(x, x, 8));
    if (SVE_WORDS >= 8) x = sve_greater(x, svext_f32(x, x, 4));
    x = sve_greater(x, svext_f32(x, x, 2));
    x = sve_greater(x, svext_f32(x, x, 1));
    return svlasta_f32(svpfalse_b(), x);
}

//: sve_from_f16
// The half floats are the low halves of the words.
WORD sve_f32 sve_from_f16(sve_u32 h) { return svcvt_f32_f16_x(svptrue_b32(), svreinterpret_f16_u32(h)); }

//: vf_from_f16
WORD vf vf_from_f16(const uint16_t *p) {
    vf r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = sve_from_f16(svld1uh_u32(svptrue_b32(), p + SVE_WORDS * i));
    return r;
}

//: vf_to_f16
WORD void vf_to_f16(uint16_t *p, vf v) {
    for (int i = 0; i < SVE_PARTS; ++i)
        svst1h_u32(svptrue_b32(), p + SVE_WORDS * i, svreinterpret_u32_f16(svcvt_f16_f32_x(svptrue_b32(), v.z[i])));
}

//: vf_from_bf16
WORD vf vf_from_bf16(const uint16_t *p) {
    vf r;
    for (int i = 0; i < SVE_PARTS; ++i) {
        const sve_u32 h = svld1uh_u32(svptrue_b32(), p + SVE_WORDS * i);
        r.z[i] = svreinterpret_f32_u32(h << 16);
    }
    return r;
}

//: vw_load_s8
WORD vw vw_load_s8(const int8_t *p) {
    vw r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svld1sb_s32(svptrue_b32(), p + SVE_WORDS * i);
    return r;
}

//: vw_load_u8
WORD vw vw_load_u8(const uint8_t *p) {
    vw r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svld1ub_s32(svptrue_b32(), p + SVE_WORDS * i);
    return r;
}

//: vw_and
WORD vw vw_and(vw a, vw b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = a.z[i] & b.z[i];
    return a;
}

//: vw_shl
WORD vw vw_shl(vw v, int bits) {
    for (int i = 0; i < SVE_PARTS; ++i) v.z[i] = (sve_s32)((sve_u32)v.z[i] << (uint32_t)bits);
    return v;
}

//: vf_splat_f16
WORD vf vf_splat_f16(const uint16_t *p) {
    vf r;
    uint16_t h;
    memcpy(&h, p, 2);
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = sve_from_f16(svdup_n_u32(h));
    return r;
}

// The float words of the scalar ISA, which define what each of them means: arithmetic of a forward step.
//
// Every operation is one IEEE operation a lane with one rounding, or it is a fixed sequence of them, so a step
// gives the same bits on every ISA. NaN comes out where the operation makes one; its payload is not defined.

//: vf_store
// 16 floats to p, any alignment.
WORD void vf_store(float *p, vf v) { memcpy(p, v.f, 64); }

//: vf_add
WORD vf vf_add(vf a, vf b) {
    for (int i = 0; i < 16; ++i) a.f[i] += b.f[i];
    return a;
}

//: vf_sub
WORD vf vf_sub(vf a, vf b) {
    for (int i = 0; i < 16; ++i) a.f[i] -= b.f[i];
    return a;
}

//: vf_div
// f[i] = a[i] / b[i], correctly rounded: no estimate of a reciprocal
WORD vf vf_div(vf a, vf b) {
    for (int i = 0; i < 16; ++i) a.f[i] /= b.f[i];
    return a;
}

//: vf_fma
// f[i] = a[i] * b[i] + c[i] with one rounding
WORD vf vf_fma(vf a, vf b, vf c) {
    for (int i = 0; i < 16; ++i) c.f[i] = fmaf(a.f[i], b.f[i], c.f[i]);
    return c;
}

//: vf_max
// f[i] = a[i] > b[i] ? a[i] : b[i]; so b where one is NaN
WORD vf vf_max(vf a, vf b) {
    for (int i = 0; i < 16; ++i) a.f[i] = a.f[i] > b.f[i] ? a.f[i] : b.f[i];
    return a;
}

//: vf_zero_below
// f[i] = x[i] < limit[i] ? 0 : v[i]; so v where x is NaN
WORD vf vf_zero_below(vf v, vf x, vf limit) {
    for (int i = 0; i < 16; ++i) v.f[i] = x.f[i] < limit.f[i] ? 0.0f : v.f[i];
    return v;
}

//: vf_blend_n
// The first n (0..16) elements of v, then those of rest: f[i] = i < n ? v[i] : rest[i]
WORD vf vf_blend_n(vf v, vf rest, int n) {
    for (int i = n; i < 16; ++i) v.f[i] = rest.f[i];
    return v;
}

//: vf_pow2
// f[i] = 2^n[i] for n in -126..127; any value otherwise
WORD vf vf_pow2(vw n) {
    vf r;
    for (int i = 0; i < 16; ++i) n.w[i] = (int32_t)(((uint32_t)n.w[i] + 127) << 23);
    memcpy(r.f, n.w, 64);
    return r;
}

//: vf_hsum
// The sum in a fixed tree: s[i] = v[i] + v[i + 8] for i < 8, then s[i] + s[i + 4], s[i] + s[i + 2], s[0] + s[1].
WORD float vf_hsum(vf v) {
    for (int half = 8; half; half >>= 1)
        for (int i = 0; i < half; ++i) v.f[i] += v.f[i + half];
    return v.f[0];
}

//: vf_hmax
// The largest, in the tree of the sum, a > b ? a : b.
WORD float vf_hmax(vf v) {
    for (int half = 8; half; half >>= 1)
        for (int i = 0; i < half; ++i) v.f[i] = v.f[i] > v.f[i + half] ? v.f[i] : v.f[i + half];
    return v.f[0];
}

//: vf_from_f16
// 16 half floats of p, exactly.
WORD vf vf_from_f16(const uint16_t *p) {
    vf r;
    for (int i = 0; i < 16; ++i) {
        uint16_t h;
        memcpy(&h, p + i, 2);
        uint32_t sign = (uint32_t)(h & 0x8000) << 16, mag = h & 0x7fff, bits;
        float subnormal = (float)mag * 0x1p-24f;
        if (mag < 0x400) memcpy(&bits, &subnormal, 4);
        else bits = mag < 0x7c00 ? (mag << 13) + 0x38000000 : mag << 13 | 0x7f800000;
        bits |= sign;
        memcpy(&r.f[i], &bits, 4);
    }
    return r;
}

//: vf_to_f16
// 16 half floats to p, rounded to nearest even; beyond 65504 infinity, from 65520 on.
WORD void vf_to_f16(uint16_t *p, vf v) {
    for (int i = 0; i < 16; ++i) {
        uint32_t bits, h;
        memcpy(&bits, &v.f[i], 4);
        uint32_t sign = bits >> 16 & 0x8000, mag = bits & 0x7fffffff;
        if (mag > 0x7f800000) h = 0x7e00 | (mag >> 13 & 0x3ff);
        else if (mag >= 0x477ff000) h = 0x7c00;
        else if (mag >= 0x38800000) h = (mag + 0xfff + (mag >> 13 & 1) - 0x38000000) >> 13;
        else h = (uint32_t)lrintf(fabsf(v.f[i]) * 0x1p24f);
        h |= sign;
        memcpy(p + i, &h, 2);
    }
}

//: vf_from_bf16
// 16 brain floats of p, exactly: the high halves of floats.
WORD vf vf_from_bf16(const uint16_t *p) {
    vf r;
    for (int i = 0; i < 16; ++i) {
        uint16_t h;
        memcpy(&h, p + i, 2);
        uint32_t bits = (uint32_t)h << 16;
        memcpy(&r.f[i], &bits, 4);
    }
    return r;
}

//: vw_load_s8
// 16 int8 of p, as int32.
WORD vw vw_load_s8(const int8_t *p) {
    vw r;
    for (int i = 0; i < 16; ++i) r.w[i] = p[i];
    return r;
}

//: vw_load_u8
// 16 uint8 of p, as int32.
WORD vw vw_load_u8(const uint8_t *p) {
    vw r;
    for (int i = 0; i < 16; ++i) r.w[i] = p[i];
    return r;
}

//: vw_and
WORD vw vw_and(vw a, vw b) {
    for (int i = 0; i < 16; ++i) a.w[i] &= b.w[i];
    return a;
}

//: vw_shl
// w[i] = v[i] << bits, mod 2^32
WORD vw vw_shl(vw v, int bits) {
    for (int i = 0; i < 16; ++i) v.w[i] = (int32_t)((uint32_t)v.w[i] << bits);
    return v;
}

//: vf_splat_f16
// The half float at p in all elements.
WORD vf vf_splat_f16(const uint16_t *p) {
    uint16_t h[16];
    for (int i = 0; i < 16; ++i) memcpy(h + i, p, 2);
    return vf_from_f16(h);
}

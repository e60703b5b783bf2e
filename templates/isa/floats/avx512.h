// The float words of AVX-512. What each word means is written in floats/scalar.h.

//: vf_store
WORD void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v.v); }

//: vf_add
WORD vf vf_add(vf a, vf b) { return (vf){_mm512_add_ps(a.v, b.v)}; }

//: vf_sub
WORD vf vf_sub(vf a, vf b) { return (vf){_mm512_sub_ps(a.v, b.v)}; }

//: vf_div
WORD vf vf_div(vf a, vf b) { return (vf){_mm512_div_ps(a.v, b.v)}; }

//: vf_fma
WORD vf vf_fma(vf a, vf b, vf c) { return (vf){_mm512_fmadd_ps(a.v, b.v, c.v)}; }

//: vf_max
// vmaxps gives its second operand where one is NaN.
WORD vf vf_max(vf a, vf b) { return (vf){_mm512_max_ps(a.v, b.v)}; }

//: vf_zero_below
// "Not less than" is true for NaN.
WORD vf vf_zero_below(vf v, vf x, vf limit) {
    return (vf){_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), v.v)};
}

//: vf_blend_n
WORD vf vf_blend_n(vf v, vf rest, int n) {
    return (vf){_mm512_mask_mov_ps(rest.v, (__mmask16)_bzhi_u32(0xffff, (uint32_t)n), v.v)};
}

//: vf_pow2
WORD vf vf_pow2(vw n) {
    __m512i e = _mm512_add_epi32((__m512i)n.v, _mm512_set1_epi32(127));
    return (vf){_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
}

//: vf_hsum
WORD float vf_hsum(vf v) {
    __m256 y = _mm256_add_ps(_mm512_castps512_ps256(v.v), _mm512_extractf32x8_ps(v.v, 1));
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

//: vf_hmax
WORD float vf_hmax(vf v) {
    __m256 y = _mm256_max_ps(_mm512_castps512_ps256(v.v), _mm512_extractf32x8_ps(v.v, 1));
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

//: vf_from_f16
WORD vf vf_from_f16(const uint16_t *p) { return (vf){_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p))}; }

//: vf_to_f16
WORD void vf_to_f16(uint16_t *p, vf v) {
    __m256i h = _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((__m256i *)p, h);
}

//: vf_from_bf16
WORD vf vf_from_bf16(const uint16_t *p) {
    __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return (vf){_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))};
}

//: vw_load_s8
WORD vw vw_load_s8(const int8_t *p) {
    return (vw){(w_reg)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))};
}

//: vw_load_u8
WORD vw vw_load_u8(const uint8_t *p) {
    return (vw){(w_reg)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p))};
}

//: vw_and
WORD vw vw_and(vw a, vw b) { return (vw){a.v & b.v}; }

//: vw_shl
WORD vw vw_shl(vw v, int bits) {
    return (vw){(w_reg)_mm512_sll_epi32((__m512i)v.v, _mm_cvtsi32_si128(bits))};
}

//: vf_splat_f16
WORD vf vf_splat_f16(const uint16_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return (vf){_mm512_set1_ps(_cvtsh_ss(h))};
}

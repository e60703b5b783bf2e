// The float words of AVX2, with FMA and F16C. What each word means is written in floats/scalar.h.

//: vf_store
WORD void vf_store(float *p, vf v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}

//: vf_add
WORD vf vf_add(vf a, vf b) { return (vf){_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }

//: vf_sub
WORD vf vf_sub(vf a, vf b) { return (vf){_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }

//: vf_div
WORD vf vf_div(vf a, vf b) { return (vf){_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }

//: vf_fma
WORD vf vf_fma(vf a, vf b, vf c) {
    return (vf){_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}

//: vf_max
// vmaxps gives its second operand where one is NaN.
WORD vf vf_max(vf a, vf b) { return (vf){_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }

//: vf_zero_below
// "Not less than" is true for NaN.
WORD vf vf_zero_below(vf v, vf x, vf limit) {
    return (vf){_mm256_and_ps(v.a, _mm256_cmp_ps(x.a, limit.a, _CMP_NLT_UQ)),
                _mm256_and_ps(v.b, _mm256_cmp_ps(x.b, limit.b, _CMP_NLT_UQ))};
}

//: vf_blend_n
WORD vf vf_blend_n(vf v, vf rest, int n) {
    __m256i count = _mm256_set1_epi32(n);
    __m256i first = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i last = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
    return (vf){_mm256_blendv_ps(rest.a, v.a, _mm256_castsi256_ps(first)),
                _mm256_blendv_ps(rest.b, v.b, _mm256_castsi256_ps(last))};
}

//: vf_pow2
WORD vf vf_pow2(vw n) {
    __m256i bias = _mm256_set1_epi32(127);
    return (vf){_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32((__m256i)n.a, bias), 23)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32((__m256i)n.b, bias), 23))};
}

//: vf_hsum
WORD float vf_hsum(vf v) {
    __m256 y = _mm256_add_ps(v.a, v.b);
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

//: vf_hmax
WORD float vf_hmax(vf v) {
    __m256 y = _mm256_max_ps(v.a, v.b);
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

//: vf_from_f16
WORD vf vf_from_f16(const uint16_t *p) {
    const __m128i *q = (const __m128i *)p;
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}

//: vf_to_f16
WORD void vf_to_f16(uint16_t *p, vf v) {
    __m128i *q = (__m128i *)p;
    _mm_storeu_si128(q, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128(q + 1, _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

//: vf_from_bf16
WORD vf vf_from_bf16(const uint16_t *p) {
    const __m128i *q = (const __m128i *)p;
    __m256i a = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16);
    __m256i b = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16);
    return (vf){_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)};
}

//: vw_load_s8
WORD vw vw_load_s8(const int8_t *p) {
    return (vw){(w_reg)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                (w_reg)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))};
}

//: vw_load_u8
WORD vw vw_load_u8(const uint8_t *p) {
    return (vw){(w_reg)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                (w_reg)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))};
}

//: vw_and
WORD vw vw_and(vw a, vw b) { return (vw){a.a & b.a, a.b & b.b}; }

//: vw_shl
WORD vw vw_shl(vw v, int bits) {
    return (vw){(w_reg)_mm256_slli_epi32((__m256i)v.a, bits), (w_reg)_mm256_slli_epi32((__m256i)v.b, bits)};
}

//: vf_splat_f16
WORD vf vf_splat_f16(const uint16_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    __m256 v = _mm256_set1_ps(_cvtsh_ss(h));
    return (vf){v, v};
}

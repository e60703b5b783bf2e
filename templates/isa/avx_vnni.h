// The vector ops of AVX-VNNI, over that of AVX2: dot products at 256 bits.

//: types
// w_reg is signed, as the operands of gcc's vpdpbusd are: an unsigned one is copied in loops. These ops add to it
// by intrinsics alone, which wrap; those of the parent that use + are replaced below.
typedef uint16_t h_reg __attribute__((vector_size(32)));
typedef int32_t w_reg __attribute__((vector_size(32)));
typedef struct { __m256i a, b; } vb;
typedef struct { h_reg a, b; } vh;
typedef struct { w_reg a, b; } vw;
typedef struct { __m256 a, b; } vf;
typedef struct { __m256i a, b; } vm;  // a byte is 0xff (flag set) or 0

//: vw_dot4
OP vw vw_dot4(vw acc, vb u, vb s) {
    return (vw){(w_reg)_mm256_dpbusd_avx_epi32((__m256i)acc.a, u.a, s.a),
                (w_reg)_mm256_dpbusd_avx_epi32((__m256i)acc.b, u.b, s.b)};
}

//: values_bias
enum { values_bias = 128 };

//: vw_dot4_values
OP vw vw_dot4_values(vw acc, vb v, vb s) { return vw_dot4(acc, v, s); }

//: vw_widen
// vpdpwssd with ones: one instruction for vpmaddwd and vpaddd.
OP vw vw_widen(vw acc, vp v) {
    __m256i ones = _mm256_set1_epi16(1);
    return (vw){(w_reg)_mm256_dpwssd_avx_epi32((__m256i)acc.a, (__m256i)v.a, ones),
                (w_reg)_mm256_dpwssd_avx_epi32((__m256i)acc.b, (__m256i)v.b, ones)};
}

//: vw_rows
// As for AVX2, but vpdpwssd adds to acc by itself: 6 instructions instead of 8 for each of lo and hi.
OP vw vw_rows(vw acc, vh lo, vh hi) {
    __m256i ones = _mm256_set1_epi16(1);
    __m256i p = _mm256_unpacklo_epi16((__m256i)lo.a, (__m256i)lo.b);  // rows 0..3: lanes 0 2 | 1 3
    __m256i q = _mm256_unpackhi_epi16((__m256i)lo.a, (__m256i)lo.b);  // rows 4..7
    __m256i r = _mm256_unpacklo_epi16((__m256i)hi.a, (__m256i)hi.b);
    __m256i s = _mm256_unpackhi_epi16((__m256i)hi.a, (__m256i)hi.b);
    __m256i a = _mm256_dpwssd_avx_epi32((__m256i)acc.a, _mm256_blend_epi32(p, q, 0xf0), ones);
    __m256i b = _mm256_dpwssd_avx_epi32((__m256i)acc.b, _mm256_blend_epi32(r, s, 0xf0), ones);
    a = _mm256_dpwssd_avx_epi32(a, _mm256_permute2x128_si256(p, q, 0x21), ones);
    b = _mm256_dpwssd_avx_epi32(b, _mm256_permute2x128_si256(r, s, 0x21), ones);
    return (vw){(w_reg)a, (w_reg)b};
}

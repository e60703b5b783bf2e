// The vocabulary of AVX-VNNI, over that of AVX2: dot products at 256 bits.

//: vw_dot4
WORD vw vw_dot4(vw acc, vb u, vb s) {
    return (vw){_mm256_dpbusd_avx_epi32(acc.a, u.a, s.a), _mm256_dpbusd_avx_epi32(acc.b, u.b, s.b)};
}

//: vw_widen
// vpdpwssd with ones: one instruction for vpmaddwd and vpaddd.
WORD vw vw_widen(vw acc, vh v) {
    __m256i ones = _mm256_set1_epi16(1);
    return (vw){_mm256_dpwssd_avx_epi32(acc.a, v.a, ones), _mm256_dpwssd_avx_epi32(acc.b, v.b, ones)};
}

//: vw_rows
// As for AVX2, but vpdpwssd adds to acc by itself: 6 instructions instead of 8 for each of lo and hi.
WORD vw vw_rows(vw acc, vh lo, vh hi) {
    __m256i ones = _mm256_set1_epi16(1);
    __m256i p = _mm256_unpacklo_epi16(lo.a, lo.b), q = _mm256_unpackhi_epi16(lo.a, lo.b);  // rows 0..3, rows 4..7
    __m256i r = _mm256_unpacklo_epi16(hi.a, hi.b), s = _mm256_unpackhi_epi16(hi.a, hi.b);
    acc.a = _mm256_dpwssd_avx_epi32(acc.a, _mm256_blend_epi32(p, q, 0xf0), ones);
    acc.b = _mm256_dpwssd_avx_epi32(acc.b, _mm256_blend_epi32(r, s, 0xf0), ones);
    acc.a = _mm256_dpwssd_avx_epi32(acc.a, _mm256_permute2x128_si256(p, q, 0x21), ones);
    acc.b = _mm256_dpwssd_avx_epi32(acc.b, _mm256_permute2x128_si256(r, s, 0x21), ones);
    return acc;
}

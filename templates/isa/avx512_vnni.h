// The vocabulary of AVX-512 VNNI, over that of AVX-512.

//: vw_dot4
WORD vw vw_dot4(vw acc, vb u, vb s) { return (vw){_mm512_dpbusd_epi32(acc.v, u.v, s.v)}; }

//: vw_widen
// vpdpwssd with ones: one instruction for vpmaddwd and vpaddd.
WORD vw vw_widen(vw acc, vh v) { return (vw){_mm512_dpwssd_epi32(acc.v, v.v, _mm512_set1_epi16(1))}; }

//: vw_rows
// As for AVX-512, but vpdpwssd adds to acc by itself: 4 instructions instead of 6.
WORD vw vw_rows(vw acc, vh lo, vh hi) {
    __m512i ones = _mm512_set1_epi16(1);
    __m512i lanes01 = _mm512_setr_epi32(0x080000, 0x090001, 0x0a0002, 0x0b0003, 0x0c0004, 0x0d0005, 0x0e0006, 0x0f0007,
                                        0x280020, 0x290021, 0x2a0022, 0x2b0023, 0x2c0024, 0x2d0025, 0x2e0026, 0x2f0027);
    __m512i lanes23 = _mm512_setr_epi32(0x180010, 0x190011, 0x1a0012, 0x1b0013, 0x1c0014, 0x1d0015, 0x1e0016, 0x1f0017,
                                        0x380030, 0x390031, 0x3a0032, 0x3b0033, 0x3c0034, 0x3d0035, 0x3e0036, 0x3f0037);
    acc.v = _mm512_dpwssd_epi32(acc.v, _mm512_permutex2var_epi16(lo.v, lanes01, hi.v), ones);
    acc.v = _mm512_dpwssd_epi32(acc.v, _mm512_permutex2var_epi16(lo.v, lanes23, hi.v), ones);
    return acc;
}

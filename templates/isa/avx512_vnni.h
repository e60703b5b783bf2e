// The vector ops of AVX-512 VNNI, over that of AVX-512.

//: types
// w_reg is signed, as the operands of gcc's vpdpbusd are: an unsigned one is copied in loops. These ops add to it
// by intrinsics alone, which wrap; those of the parent that use + are replaced below.
typedef uint16_t h_reg __attribute__((vector_size(64)));
typedef int32_t w_reg __attribute__((vector_size(64)));
typedef struct { __m512i v; } vb;
typedef struct { h_reg v; } vh;
typedef struct { w_reg v; } vw;
typedef struct { __m512 v; } vf;
typedef struct { __mmask64 v; } vm;

//: vw_dot4
OP vw vw_dot4(vw acc, vb u, vb s) { return (vw){(w_reg)_mm512_dpbusd_epi32((__m512i)acc.v, u.v, s.v)}; }

//: values_bias
enum { values_bias = 128 };

//: vw_dot4_values
OP vw vw_dot4_values(vw acc, vb v, vb s) { return vw_dot4(acc, v, s); }

//: vw_widen
// vpdpwssd with ones: one instruction for vpmaddwd and vpaddd.
OP vw vw_widen(vw acc, vp v) {
    return (vw){(w_reg)_mm512_dpwssd_epi32((__m512i)acc.v, (__m512i)v.v, _mm512_set1_epi16(1))};
}

//: vw_rows
// As for AVX-512, but vpdpwssd adds to acc by itself: 4 instructions instead of 6.
OP vw vw_rows(vw acc, vh lo, vh hi) {
    __m512i l = (__m512i)lo.v, h = (__m512i)hi.v, ones = _mm512_set1_epi16(1);
    __m512i lanes01 = _mm512_setr_epi32(0x080000, 0x090001, 0x0a0002, 0x0b0003, 0x0c0004, 0x0d0005, 0x0e0006,
                                        0x0f0007, 0x280020, 0x290021, 0x2a0022, 0x2b0023, 0x2c0024, 0x2d0025,
                                        0x2e0026, 0x2f0027);
    __m512i lanes23 = _mm512_setr_epi32(0x180010, 0x190011, 0x1a0012, 0x1b0013, 0x1c0014, 0x1d0015, 0x1e0016,
                                        0x1f0017, 0x380030, 0x390031, 0x3a0032, 0x3b0033, 0x3c0034, 0x3d0035,
                                        0x3e0036, 0x3f0037);
    __m512i w = _mm512_dpwssd_epi32((__m512i)acc.v, _mm512_permutex2var_epi16(l, lanes01, h), ones);
    return (vw){(w_reg)_mm512_dpwssd_epi32(w, _mm512_permutex2var_epi16(l, lanes23, h), ones)};
}

// The vector ops of AVX-512 (F, BW, VL, DQ): a block is one zmm register, 64 flags are one mask register.
// What each op means is written in scalar.h; here are only the reasons for an instruction.

//: includes
#include <immintrin.h>

//: types
// Accumulators have the vector type of their elements: with __m512i (of int64) gcc 12 copies a register
// before and after each addition in a loop, 8 moves for 4 vpdpbusd. Unsigned, because sums and products wrap.
typedef uint16_t h_reg __attribute__((vector_size(64)));
typedef uint32_t w_reg __attribute__((vector_size(64)));
typedef struct { __m512i v; } vb;
typedef struct { h_reg v; } vh;
typedef struct { w_reg v; } vw;
typedef struct { __m512 v; } vf;
typedef struct { __mmask64 v; } vm;

//: prefetch
OP void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }

//: prefetch_l2
OP void prefetch_l2(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

//: prefetch_once
OP void prefetch_once(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_NTA); }

//: vb_load
OP vb vb_load(const void *p) { return (vb){_mm512_loadu_si512(p)}; }

//: vb_store
OP void vb_store(void *p, vb v) { _mm512_storeu_si512(p, v.v); }

//: vb_splat
OP vb vb_splat(uint8_t x) { return (vb){_mm512_set1_epi8((char)x)}; }

//: vb_splat4
// vpbroadcastd from memory: a load, no shuffle port, and an operand of the dot product that reads it.
OP vb vb_splat4(const int8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return (vb){_mm512_set1_epi32(x)};
}

//: vx
// Four bytes are broadcast by a memory operand; with one sum for p + at gcc 12 keeps a pointer for each token.
typedef struct { const int8_t *p; int64_t at; } vx;

//: vx_load
OP vx vx_load(const int8_t *p, int64_t at) { return (vx){p, at}; }

//: vb_quad
// vbroadcasti32x4 from memory: a load, no shuffle port.
OP vb vb_quad(const void *p) { return (vb){_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p))}; }

//: vb_nibbles
OP vb vb_nibbles(const void *p) {
    const __m256i v = _mm256_loadu_si256((const __m256i *)p);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(v), _mm256_srli_epi16(v, 4), 1);
    return (vb){_mm512_and_si512(both, _mm512_set1_epi8(15))};
}

//: vb_and
OP vb vb_and(vb a, vb b) { return (vb){_mm512_and_si512(a.v, b.v)}; }

//: vb_add
OP vb vb_add(vb a, vb b) { return (vb){_mm512_add_epi8(a.v, b.v)}; }

//: vb_field
// There is no byte shift: int16 are shifted, and the mask drops what came from the neighbour byte.
OP vb vb_field(vb v, int bits, int mask) {
    if (bits != 0) v.v = _mm512_srl_epi16(v.v, _mm_cvtsi32_si128(bits));
    return vb_and(v, vb_splat((uint8_t)mask));
}

//: vb_high
OP vb vb_high(vb v, int bits) { return vb_field(v, bits, 255 >> bits); }

//: vb_lut16
OP vb vb_lut16(vb table, vb idx) { return (vb){_mm512_shuffle_epi8(table.v, idx.v)}; }

//: vb_lut_low
OP vb vb_lut_low(vb table, vb idx) { return (vb){_mm512_shuffle_epi8(table.v, idx.v)}; }

//: vb_lut8
// vpshufb reads bits 0..3 and 7 of an index. Where a byte has no bit 3, what int16 shift into the one below it leaves
// its bit 7 clear, so neither code takes a mask.
OP vb vb_lut8(vb table, vb v, int bits) {
    return (vb){_mm512_shuffle_epi8(table.v, bits != 0 ? _mm512_srli_epi16(v.v, 4) : v.v)};
}

//: vb_spread
// An average is a sum and a shift at once; what is added has no bit in common and no bit 0.
OP vb vb_spread(vb a, vb b, vb c) {
    const __m512i spare = _mm512_set1_epi8((char)0x88);
    const __m512i first = _mm512_srli_epi16(_mm512_and_si512(a.v, spare), 1);
    const __m512i both = _mm512_avg_epu8(first, _mm512_and_si512(b.v, spare));
    return (vb){_mm512_avg_epu8(both, _mm512_and_si512(c.v, spare))};
}

//: vb_lut128
// Eight tables of 16: vpshufb gives 0 for an index below its table (negative) and repeats itself above it, so each
// table holds what to xor to the one before. The tables are loop invariants and stay in registers.
OP vb vb_lut128(const uint8_t *table, vb idx) {
    const __m512i step = _mm512_set1_epi8(16);
    __m512i i = _mm512_and_si512(idx.v, _mm512_set1_epi8(127));
    __m512i before = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    __m512i sum = _mm512_shuffle_epi8(before, i);
    for (int t = 1; t < 8; ++t) {
        const __m512i own = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(table + 16 * t)));
        i = _mm512_sub_epi8(i, step);
        sum = _mm512_xor_si512(sum, _mm512_shuffle_epi8(_mm512_xor_si512(own, before), i));
        before = own;
    }
    return (vb){sum};
}

//: vb_avg
OP vb vb_avg(vb a, vb b) { return (vb){_mm512_avg_epu8(a.v, b.v)}; }

//: vb_mirror
OP vb vb_mirror(vb v, vb s) {
    return (vb){_mm512_mask_sub_epi8(v.v, _mm512_movepi8_mask(s.v), _mm512_set1_epi8((char)0xaa), v.v)};
}

//: vb_sign
OP vb vb_sign(vb v, vb s) {
    return (vb){_mm512_mask_sub_epi8(v.v, _mm512_movepi8_mask(s.v), _mm512_setzero_si512(), v.v)};
}

//: vb_choose
OP vb vb_choose(vb s, vb a, vb b) { return (vb){_mm512_mask_blend_epi8(_mm512_movepi8_mask(s.v), b.v, a.v)}; }

//: vb_test
OP vm vb_test(vb v, vb bits) { return (vm){_mm512_test_epi8_mask(v.v, bits.v)}; }

//: vb_flip
// ~v = -1 - v: a masked subtraction is one instruction, while vpternlog has no byte masks.
OP vb vb_flip(vb v, vm m) { return (vb){_mm512_mask_sub_epi8(v.v, m.v, _mm512_set1_epi8(-1), v.v)}; }

//: vb_select
OP vb vb_select(vm m, vb a, vb b) { return (vb){_mm512_mask_blend_epi8(m.v, b.v, a.v)}; }

//: vh_zip_lo
OP vh vh_zip_lo(vb lo, vb hi) { return (vh){(h_reg)_mm512_unpacklo_epi8(lo.v, hi.v)}; }

//: vh_zip_hi
OP vh vh_zip_hi(vb lo, vb hi) { return (vh){(h_reg)_mm512_unpackhi_epi8(lo.v, hi.v)}; }

//: vh_digits_lo
// vpmaddubsw multiplies unsigned constants with signed digits: it extends their signs and adds them.
OP vh vh_digits_lo(vb lo, vb hi, int radix) {
    return (vh){(h_reg)_mm512_maddubs_epi16(_mm512_set1_epi16((short)(radix << 8 | 1)),
                                            _mm512_unpacklo_epi8(lo.v, hi.v))};
}

//: vh_digits_hi
OP vh vh_digits_hi(vb lo, vb hi, int radix) {
    return (vh){(h_reg)_mm512_maddubs_epi16(_mm512_set1_epi16((short)(radix << 8 | 1)),
                                            _mm512_unpackhi_epi8(lo.v, hi.v))};
}

//: vh_zero
OP vh vh_zero(void) { return (vh){(h_reg)_mm512_setzero_si512()}; }

//: vh_add
OP vh vh_add(vh a, vh b) { return (vh){a.v + b.v}; }

//: vh_sub
OP vh vh_sub(vh a, vh b) { return (vh){a.v - b.v}; }

//: vh_mul
OP vh vh_mul(vh a, vh b) { return (vh){a.v * b.v}; }

//: vh_load
OP vh vh_load(const int16_t *p) { return (vh){(h_reg)_mm512_loadu_si512(p)}; }

//: vh_sign_high
OP vh vh_sign_high(vb v) { return (vh){(h_reg)_mm512_srai_epi16(v.v, 8)}; }

//: vh_pairs
// vpmaddubsw saturates, and with u <= 128 cannot: 2 * 128 * -128 = -32768.
OP vh vh_pairs(vb u, vb s) { return (vh){(h_reg)_mm512_maddubs_epi16(u.v, s.v)}; }

//: vp
typedef vh vp;

//: vp_zero
OP vp vp_zero(void) { return vh_zero(); }

//: vp_add
OP vp vp_add(vp sums, vb u, vb s) { return vh_add(sums, vh_pairs(u, s)); }

//: vp_add_field
OP vp vp_add_field(vp sums, vb u, vx x, int f) { return vp_add(sums, u, vb_splat4(x.p + (x.at + 4 * f))); }

//: vb_low_bytes
// vpackuswb saturates; what reaches it lies in 0..255. Three instructions, but one shuffle: two vpshufb, the
// second under a mask, keep Intel's one shuffle port busy longer, and clang 14 makes 7 of them.
OP vb vb_low_bytes(vh a, vh b) {
    __m512i low = _mm512_set1_epi16(255);
    return (vb){_mm512_packus_epi16((__m512i)a.v & low, (__m512i)b.v & low)};
}

//: vb_high_bytes
OP vb vb_high_bytes(vh a, vh b) {
    return (vb){_mm512_packus_epi16((__m512i)(a.v >> 8), (__m512i)(b.v >> 8))};
}

//: vw_zero
OP vw vw_zero(void) { return (vw){(w_reg)_mm512_setzero_si512()}; }

//: vw_splat
OP vw vw_splat(int32_t x) { return (vw){(w_reg)_mm512_set1_epi32(x)}; }

//: vw_load
OP vw vw_load(const int32_t *p) { return (vw){(w_reg)_mm512_loadu_si512(p)}; }

//: vw_store
OP void vw_store(int32_t *p, vw v) { _mm512_storeu_si512(p, (__m512i)v.v); }

//: vw_store_n
// Elements outside the mask are not touched, so they may lie on an unmapped page.
OP void vw_store_n(int32_t *p, vw v, int n) {
    _mm512_mask_storeu_epi32(p, (__mmask16)_bzhi_u32(0xffff, (uint32_t)n), (__m512i)v.v);
}

//: vw_add
OP vw vw_add(vw a, vw b) { return (vw){(w_reg)_mm512_add_epi32((__m512i)a.v, (__m512i)b.v)}; }

//: vw_sub
OP vw vw_sub(vw a, vw b) { return (vw){(w_reg)_mm512_sub_epi32((__m512i)a.v, (__m512i)b.v)}; }

//: vw_sra
OP vw vw_sra(vw v, int bits) {
    return (vw){(w_reg)_mm512_sra_epi32((__m512i)v.v, _mm_cvtsi32_si128(bits))};
}

//: vw_max
OP vw vw_max(vw a, vw b) { return (vw){(w_reg)_mm512_max_epi32((__m512i)a.v, (__m512i)b.v)}; }

//: vw_hsum
OP int32_t vw_hsum(vw v) {
    __m512i z = (__m512i)v.v;
    __m256i y = _mm256_add_epi32(_mm512_castsi512_si256(z), _mm512_extracti64x4_epi64(z, 1));
    __m128i x = _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1));
    return _mm_cvtsi128_si32(x);
}

//: vw_hmax
OP int32_t vw_hmax(vw v) {
    __m512i z = (__m512i)v.v;
    __m256i y = _mm256_max_epi32(_mm512_castsi512_si256(z), _mm512_extracti64x4_epi64(z, 1));
    __m128i x = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1));
    return _mm_cvtsi128_si32(x);
}

//: vw_dot4
// vpmaddubsw saturates at 32767, which u <= 128 cannot reach; vpmaddwd with ones adds its pairs in int32.
OP vw vw_dot4(vw acc, vb u, vb s) {
    __m512i t = _mm512_madd_epi16(_mm512_maddubs_epi16(u.v, s.v), _mm512_set1_epi16(1));
    return (vw){acc.v + (w_reg)t};
}

//: vw_dot4_field
OP vw vw_dot4_field(vw acc, vb u, vx x, int f) { return vw_dot4(acc, u, vb_splat4(x.p + (x.at + 4 * f))); }

//: values_bias
enum { values_bias = 0 };

//: vw_dot4_values
// As on AVX2; there is no vpsignb of 64 bytes, so the signs of s are a mask, which a compiler keeps for all rows.
OP vw vw_dot4_values(vw acc, vb v, vb s) {
    const __mmask64 negative = _mm512_movepi8_mask(s.v);
    const __m512i signed_v = _mm512_mask_sub_epi8(v.v, negative, _mm512_setzero_si512(), v.v);
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(s.v), signed_v);
    return (vw){acc.v + (w_reg)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1))};
}

//: vw_dot4_values_field
OP vw vw_dot4_values_field(vw acc, vb v, vx x, int f) {
    return vw_dot4_values(acc, v, vb_splat4(x.p + (x.at + 4 * f)));
}

//: vw_widen
// vpmaddwd with ones sign-extends and adds neighbours at once.
OP vw vw_widen(vw acc, vp v) {
    return (vw){acc.v + (w_reg)_mm512_madd_epi16((__m512i)v.v, _mm512_set1_epi16(1))};
}

//: vw_rows
// One vpermt2w puts lanes 0 and 1 of lo and of hi side by side, one the lanes 2 and 3; vpmaddwd with ones
// widens while it adds: 6 instructions. Adding lanes as int16 first could overflow.
OP vw vw_rows(vw acc, vh lo, vh hi) {
    __m512i l = (__m512i)lo.v, h = (__m512i)hi.v, ones = _mm512_set1_epi16(1);
    __m512i lanes01 = _mm512_setr_epi32(0x080000, 0x090001, 0x0a0002, 0x0b0003, 0x0c0004, 0x0d0005, 0x0e0006,
                                        0x0f0007, 0x280020, 0x290021, 0x2a0022, 0x2b0023, 0x2c0024, 0x2d0025,
                                        0x2e0026, 0x2f0027);
    __m512i lanes23 = _mm512_setr_epi32(0x180010, 0x190011, 0x1a0012, 0x1b0013, 0x1c0014, 0x1d0015, 0x1e0016,
                                        0x1f0017, 0x380030, 0x390031, 0x3a0032, 0x3b0033, 0x3c0034, 0x3d0035,
                                        0x3e0036, 0x3f0037);
    __m512i p = _mm512_madd_epi16(_mm512_permutex2var_epi16(l, lanes01, h), ones);
    __m512i q = _mm512_madd_epi16(_mm512_permutex2var_epi16(l, lanes23, h), ones);
    return (vw){acc.v + (w_reg)_mm512_add_epi32(p, q)};
}

//: vw_extend_lo
// Each int16 twice, then an arithmetic shift.
OP vw vw_extend_lo(vw acc, vh v) {
    __m512i x = _mm512_unpacklo_epi16((__m512i)v.v, (__m512i)v.v);
    return (vw){(w_reg)_mm512_add_epi32((__m512i)acc.v, _mm512_srai_epi32(x, 16))};
}

//: vw_extend_hi
OP vw vw_extend_hi(vw acc, vh v) {
    __m512i x = _mm512_unpackhi_epi16((__m512i)v.v, (__m512i)v.v);
    return (vw){(w_reg)_mm512_add_epi32((__m512i)acc.v, _mm512_srai_epi32(x, 16))};
}

//: vw_zip_lo
OP vw vw_zip_lo(vh a, vh b) { return (vw){(w_reg)_mm512_unpacklo_epi16((__m512i)a.v, (__m512i)b.v)}; }

//: vw_zip_hi
OP vw vw_zip_hi(vh a, vh b) { return (vw){(w_reg)_mm512_unpackhi_epi16((__m512i)a.v, (__m512i)b.v)}; }

//: vw_transpose_lanes
// Two rounds of four shuffles and 4 stores, against 16 quarter-width stores without any.
OP void vw_transpose_lanes(uint8_t *p, int64_t stride, vw v0, vw v1, vw v2, vw v3) {
    __m512i a = _mm512_shuffle_i32x4((__m512i)v0.v, (__m512i)v1.v, 0x44);  // v0.0 v0.1 v1.0 v1.1
    __m512i b = _mm512_shuffle_i32x4((__m512i)v2.v, (__m512i)v3.v, 0x44);
    __m512i c = _mm512_shuffle_i32x4((__m512i)v0.v, (__m512i)v1.v, 0xee);  // v0.2 v0.3 v1.2 v1.3
    __m512i d = _mm512_shuffle_i32x4((__m512i)v2.v, (__m512i)v3.v, 0xee);
    _mm512_storeu_si512(p, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(p + stride, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_storeu_si512(p + 2 * stride, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_storeu_si512(p + 3 * stride, _mm512_shuffle_i32x4(c, d, 0xdd));
}

//: vw_store_s8
OP void vw_store_s8(int8_t *p, vw v) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8((__m512i)v.v));
}

//: vf_splat
OP vf vf_splat(float x) { return (vf){_mm512_set1_ps(x)}; }

//: vf_load
OP vf vf_load(const float *p) { return (vf){_mm512_loadu_ps(p)}; }

//: vf_load_n
// Elements outside the mask are not touched, so they may lie on an unmapped page.
OP vf vf_load_n(const float *p, int n) {
    return (vf){_mm512_maskz_loadu_ps((__mmask16)_bzhi_u32(0xffff, (uint32_t)n), p)};
}

//: vf_store_n
OP void vf_store_n(float *p, vf v, int n) {
    _mm512_mask_storeu_ps(p, (__mmask16)_bzhi_u32(0xffff, (uint32_t)n), v.v);
}

//: vf_mul
OP vf vf_mul(vf a, vf b) { return (vf){_mm512_mul_ps(a.v, b.v)}; }

//: vf_from_w
OP vf vf_from_w(vw v) { return (vf){_mm512_cvtepi32_ps((__m512i)v.v)}; }

//: vw_abs_bits
OP vw vw_abs_bits(vf v) { return (vw){(w_reg)_mm512_castps_si512(v.v) & 0x7fffffff}; }

//: vw_round
// vcvtps2dq rounds as MXCSR says: to nearest even, unless the program changed it.
OP vw vw_round(vf v) { return (vw){(w_reg)_mm512_cvtps_epi32(v.v)}; }

//== Floats
// The float ops of AVX-512. What each op means is written in scalar.h.

//: vf_store
OP void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v.v); }

//: vf_add
OP vf vf_add(vf a, vf b) { return (vf){_mm512_add_ps(a.v, b.v)}; }

//: vf_sub
OP vf vf_sub(vf a, vf b) { return (vf){_mm512_sub_ps(a.v, b.v)}; }

//: vf_div
OP vf vf_div(vf a, vf b) { return (vf){_mm512_div_ps(a.v, b.v)}; }

//: vf_fma
OP vf vf_fma(vf a, vf b, vf c) { return (vf){_mm512_fmadd_ps(a.v, b.v, c.v)}; }

//: vf_max
// vmaxps gives its second operand where one is NaN.
OP vf vf_max(vf a, vf b) { return (vf){_mm512_max_ps(a.v, b.v)}; }

//: vf_zero_below
// "Not less than" is true for NaN.
OP vf vf_zero_below(vf v, vf x, vf limit) {
    return (vf){_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), v.v)};
}

//: vf_blend_n
OP vf vf_blend_n(vf v, vf rest, int n) {
    return (vf){_mm512_mask_mov_ps(rest.v, (__mmask16)_bzhi_u32(0xffff, (uint32_t)n), v.v)};
}

//: vf_pow2
OP vf vf_pow2(vw n) {
    __m512i e = _mm512_add_epi32((__m512i)n.v, _mm512_set1_epi32(127));
    return (vf){_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
}

//: vf_hsum
OP float vf_hsum(vf v) {
    __m256 y = _mm256_add_ps(_mm512_castps512_ps256(v.v), _mm512_extractf32x8_ps(v.v, 1));
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

//: vf_hmax
OP float vf_hmax(vf v) {
    __m256 y = _mm256_max_ps(_mm512_castps512_ps256(v.v), _mm512_extractf32x8_ps(v.v, 1));
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

//: vf_from_f16
OP vf vf_from_f16(const uint16_t *p) { return (vf){_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p))}; }

//: vf_to_f16
OP void vf_to_f16(uint16_t *p, vf v) {
    __m256i h = _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((__m256i *)p, h);
}

//: vf_from_bf16
OP vf vf_from_bf16(const uint16_t *p) {
    __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return (vf){_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))};
}

//: vw_load_s8
OP vw vw_load_s8(const int8_t *p) {
    return (vw){(w_reg)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))};
}

//: vw_load_u8
OP vw vw_load_u8(const uint8_t *p) {
    return (vw){(w_reg)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p))};
}

//: vw_and
OP vw vw_and(vw a, vw b) { return (vw){a.v & b.v}; }

//: vw_shl
OP vw vw_shl(vw v, int bits) {
    return (vw){(w_reg)_mm512_sll_epi32((__m512i)v.v, _mm_cvtsi32_si128(bits))};
}

//: vf_splat_f16
OP vf vf_splat_f16(const uint16_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return (vf){_mm512_set1_ps(_cvtsh_ss(h))};
}

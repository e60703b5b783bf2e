// The vector ops of AVX2: a block is two ymm registers, a = bytes 0..31 and b = bytes 32..63.
// What each op means is written in scalar.h; here are only the reasons for an instruction.

//: includes
#include <immintrin.h>

//: types
// Accumulators have the vector type of their elements: with __m256i (of int64) gcc 12 copies a register
// before and after each addition in a loop, and spills for lack of them. Unsigned: sums and products wrap.
typedef uint16_t h_reg __attribute__((vector_size(32)));
typedef uint32_t w_reg __attribute__((vector_size(32)));
typedef struct { __m256i a, b; } vb;
typedef struct { h_reg a, b; } vh;
typedef struct { w_reg a, b; } vw;
typedef struct { __m256 a, b; } vf;
typedef struct { __m256i a, b; } vm;  // a byte is 0 (flag set) or 0xff (clear)

//: prefetch
OP void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }

//: prefetch_l2
OP void prefetch_l2(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

//: prefetch_once
OP void prefetch_once(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_NTA); }

//: vb_load
OP vb vb_load(const void *p) {
    const __m256i *q = (const __m256i *)p;
    return (vb){_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}

//: vb_store
OP void vb_store(void *p, vb v) {
    __m256i *q = (__m256i *)p;
    _mm256_storeu_si256(q, v.a);
    _mm256_storeu_si256(q + 1, v.b);
}

//: vb_splat
OP vb vb_splat(uint8_t x) {
    __m256i v = _mm256_set1_epi8((char)x);
    return (vb){v, v};
}

//: vb_splat4
// vpbroadcastd from memory: a load, no shuffle port.
OP vb vb_splat4(const int8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    __m256i v = _mm256_set1_epi32(x);
    return (vb){v, v};
}

//: vx
// Four bytes are broadcast by a memory operand; with one sum for p + at gcc 12 keeps a pointer for each token.
typedef struct { const int8_t *p; int64_t at; } vx;

//: vx_load
OP vx vx_load(const int8_t *p, int64_t at) { return (vx){p, at}; }

//: vb_quad
// vbroadcasti128 from memory: a load, no shuffle port.
OP vb vb_quad(const void *p) {
    __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return (vb){v, v};
}

//: vb_nibbles
OP vb vb_nibbles(const void *p) {
    const __m256i v = _mm256_loadu_si256((const __m256i *)p), low = _mm256_set1_epi8(15);
    return (vb){_mm256_and_si256(v, low), _mm256_and_si256(_mm256_srli_epi16(v, 4), low)};
}

//: vb_and
OP vb vb_and(vb a, vb b) { return (vb){_mm256_and_si256(a.a, b.a), _mm256_and_si256(a.b, b.b)}; }

//: vb_add
OP vb vb_add(vb a, vb b) { return (vb){_mm256_add_epi8(a.a, b.a), _mm256_add_epi8(a.b, b.b)}; }

//: vb_field
// There is no byte shift: int16 are shifted, and the mask drops what came from the neighbour byte.
OP vb vb_field(vb v, int bits, int mask) {
    if (bits != 0) {
        v.a = _mm256_srli_epi16(v.a, bits);
        v.b = _mm256_srli_epi16(v.b, bits);
    }
    return vb_and(v, vb_splat((uint8_t)mask));
}

//: vb_high
OP vb vb_high(vb v, int bits) { return vb_field(v, bits, 255 >> bits); }

//: vb_lut16
OP vb vb_lut16(vb table, vb idx) {
    return (vb){_mm256_shuffle_epi8(table.a, idx.a), _mm256_shuffle_epi8(table.b, idx.b)};
}

//: vb_lut_low
OP vb vb_lut_low(vb table, vb idx) {
    return (vb){_mm256_shuffle_epi8(table.a, idx.a), _mm256_shuffle_epi8(table.b, idx.b)};
}

//: vb_lut8
// vpshufb reads bits 0..3 and 7 of an index. Where a byte has no bit 3, what int16 shift into the one below it leaves
// its bit 7 clear, so neither code takes a mask.
OP vb vb_lut8(vb table, vb v, int bits) {
    if (bits != 0) {
        v.a = _mm256_srli_epi16(v.a, 4);
        v.b = _mm256_srli_epi16(v.b, 4);
    }
    return (vb){_mm256_shuffle_epi8(table.a, v.a), _mm256_shuffle_epi8(table.b, v.b)};
}

//: avx2_spread
// An average is a sum and a shift at once; what is added has no bit in common and no bit 0.
OP __m256i avx2_spread(__m256i a, __m256i b, __m256i c) {
    const __m256i spare = _mm256_set1_epi8((char)0x88);
    a = _mm256_srli_epi16(_mm256_and_si256(a, spare), 1);
    a = _mm256_avg_epu8(a, _mm256_and_si256(b, spare));
    return _mm256_avg_epu8(a, _mm256_and_si256(c, spare));
}

//: vb_spread
OP vb vb_spread(vb a, vb b, vb c) { return (vb){avx2_spread(a.a, b.a, c.a), avx2_spread(a.b, b.b, c.b)}; }

//: vb_lut128
// Eight tables of 16 in 24 instructions: vpshufb gives 0 for an index below its table (negative) and repeats itself
// above it, so each table holds what to xor to the one before. The tables are loop invariants.
OP vb vb_lut128(const uint8_t *table, vb idx) {
    const __m256i step = _mm256_set1_epi8(16), low7 = _mm256_set1_epi8(127);
    __m256i i = _mm256_and_si256(idx.a, low7), j = _mm256_and_si256(idx.b, low7);
    __m256i before = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    vb sum = {_mm256_shuffle_epi8(before, i), _mm256_shuffle_epi8(before, j)};
    for (int t = 1; t < 8; ++t) {
        const __m256i own = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(table + 16 * t)));
        const __m256i change = _mm256_xor_si256(own, before);
        i = _mm256_sub_epi8(i, step);
        j = _mm256_sub_epi8(j, step);
        sum.a = _mm256_xor_si256(sum.a, _mm256_shuffle_epi8(change, i));
        sum.b = _mm256_xor_si256(sum.b, _mm256_shuffle_epi8(change, j));
        before = own;
    }
    return sum;
}

//: vb_avg
OP vb vb_avg(vb a, vb b) { return (vb){_mm256_avg_epu8(a.a, b.a), _mm256_avg_epu8(a.b, b.b)}; }

//: vb_mirror
OP vb vb_mirror(vb v, vb s) {
    const __m256i twos = _mm256_set1_epi8((char)0xaa);
    return (vb){_mm256_blendv_epi8(v.a, _mm256_sub_epi8(twos, v.a), s.a),
                _mm256_blendv_epi8(v.b, _mm256_sub_epi8(twos, v.b), s.b)};
}

//: vb_sign
OP vb vb_sign(vb v, vb s) { return (vb){_mm256_sign_epi8(v.a, s.a), _mm256_sign_epi8(v.b, s.b)}; }

//: vb_choose
// vpblendvb reads the top bit of each byte.
OP vb vb_choose(vb s, vb a, vb b) {
    return (vb){_mm256_blendv_epi8(b.a, a.a, s.a), _mm256_blendv_epi8(b.b, a.b, s.b)};
}

//: vb_test
// AVX2 compares bytes only for equal and signed greater, so flags are kept as "equal to zero".
OP vm vb_test(vb v, vb bits) {
    __m256i zero = _mm256_setzero_si256();
    return (vm){_mm256_cmpeq_epi8(_mm256_and_si256(v.a, bits.a), zero),
                _mm256_cmpeq_epi8(_mm256_and_si256(v.b, bits.b), zero)};
}

//: vb_flip
// The complement of the flags by a comparison: made once for all values flipped by the same flags, while
// compilers move the ones of an exclusive or to each value.
OP vb vb_flip(vb v, vm m) {
    __m256i zero = _mm256_setzero_si256();
    return (vb){_mm256_xor_si256(v.a, _mm256_cmpeq_epi8(m.a, zero)),
                _mm256_xor_si256(v.b, _mm256_cmpeq_epi8(m.b, zero))};
}

//: vb_select
OP vb vb_select(vm m, vb a, vb b) {
    return (vb){_mm256_blendv_epi8(a.a, b.a, m.a), _mm256_blendv_epi8(a.b, b.b, m.b)};
}

//: vh_zip_lo
OP vh vh_zip_lo(vb lo, vb hi) {
    return (vh){(h_reg)_mm256_unpacklo_epi8(lo.a, hi.a), (h_reg)_mm256_unpacklo_epi8(lo.b, hi.b)};
}

//: vh_zip_hi
OP vh vh_zip_hi(vb lo, vb hi) {
    return (vh){(h_reg)_mm256_unpackhi_epi8(lo.a, hi.a), (h_reg)_mm256_unpackhi_epi8(lo.b, hi.b)};
}

//: vh_digits_lo
// vpmaddubsw multiplies unsigned constants with signed digits: it extends their signs and adds them.
OP vh vh_digits_lo(vb lo, vb hi, int radix) {
    __m256i weights = _mm256_set1_epi16((short)(radix << 8 | 1));
    return (vh){(h_reg)_mm256_maddubs_epi16(weights, _mm256_unpacklo_epi8(lo.a, hi.a)),
                (h_reg)_mm256_maddubs_epi16(weights, _mm256_unpacklo_epi8(lo.b, hi.b))};
}

//: vh_digits_hi
OP vh vh_digits_hi(vb lo, vb hi, int radix) {
    __m256i weights = _mm256_set1_epi16((short)(radix << 8 | 1));
    return (vh){(h_reg)_mm256_maddubs_epi16(weights, _mm256_unpackhi_epi8(lo.a, hi.a)),
                (h_reg)_mm256_maddubs_epi16(weights, _mm256_unpackhi_epi8(lo.b, hi.b))};
}

//: vh_zero
OP vh vh_zero(void) { return (vh){(h_reg)_mm256_setzero_si256(), (h_reg)_mm256_setzero_si256()}; }

//: vh_add
OP vh vh_add(vh a, vh b) { return (vh){a.a + b.a, a.b + b.b}; }

//: vh_sub
OP vh vh_sub(vh a, vh b) { return (vh){a.a - b.a, a.b - b.b}; }

//: vh_mul
OP vh vh_mul(vh a, vh b) { return (vh){a.a * b.a, a.b * b.b}; }

//: vh_load
OP vh vh_load(const int16_t *p) {
    const __m256i *q = (const __m256i *)p;
    return (vh){(h_reg)_mm256_loadu_si256(q), (h_reg)_mm256_loadu_si256(q + 1)};
}

//: vh_sign_high
OP vh vh_sign_high(vb v) {
    return (vh){(h_reg)_mm256_srai_epi16(v.a, 8), (h_reg)_mm256_srai_epi16(v.b, 8)};
}

//: vh_pairs
// vpmaddubsw saturates, and with u <= 128 cannot: 2 * 128 * -128 = -32768.
OP vh vh_pairs(vb u, vb s) {
    return (vh){(h_reg)_mm256_maddubs_epi16(u.a, s.a), (h_reg)_mm256_maddubs_epi16(u.b, s.b)};
}

//: vp
typedef vh vp;

//: vp_zero
OP vp vp_zero(void) { return vh_zero(); }

//: vp_add
OP vp vp_add(vp sums, vb u, vb s) { return vh_add(sums, vh_pairs(u, s)); }

//: vp_add_field
OP vp vp_add_field(vp sums, vb u, vx x, int f) { return vp_add(sums, u, vb_splat4(x.p + (x.at + 4 * f))); }

//: vb_low_bytes
// vpackuswb saturates; what reaches it lies in 0..255.
OP vb vb_low_bytes(vh a, vh b) {
    __m256i low = _mm256_set1_epi16(255);
    return (vb){_mm256_packus_epi16((__m256i)a.a & low, (__m256i)b.a & low),
                _mm256_packus_epi16((__m256i)a.b & low, (__m256i)b.b & low)};
}

//: vb_high_bytes
OP vb vb_high_bytes(vh a, vh b) {
    return (vb){_mm256_packus_epi16((__m256i)(a.a >> 8), (__m256i)(b.a >> 8)),
                _mm256_packus_epi16((__m256i)(a.b >> 8), (__m256i)(b.b >> 8))};
}

//: vw_zero
OP vw vw_zero(void) { return (vw){(w_reg)_mm256_setzero_si256(), (w_reg)_mm256_setzero_si256()}; }

//: vw_splat
OP vw vw_splat(int32_t x) {
    w_reg v = (w_reg)_mm256_set1_epi32(x);
    return (vw){v, v};
}

//: vw_load
OP vw vw_load(const int32_t *p) {
    const __m256i *q = (const __m256i *)p;
    return (vw){(w_reg)_mm256_loadu_si256(q), (w_reg)_mm256_loadu_si256(q + 1)};
}

//: vw_store
OP void vw_store(int32_t *p, vw v) {
    __m256i *q = (__m256i *)p;
    _mm256_storeu_si256(q, (__m256i)v.a);
    _mm256_storeu_si256(q + 1, (__m256i)v.b);
}

//: vw_store_n
// vpmaskmovd as a store is slow microcode on Zen 1 to 3, so full blocks go around it.
OP void vw_store_n(int32_t *p, vw v, int n) {
    if (n == 16) {
        _mm256_storeu_si256((__m256i *)p, (__m256i)v.a);
        _mm256_storeu_si256((__m256i *)(p + 8), (__m256i)v.b);
        return;
    }
    __m256i count = _mm256_set1_epi32(n);
    __m256i first = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i last = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
    _mm256_maskstore_epi32(p, first, (__m256i)v.a);
    if (n > 8) _mm256_maskstore_epi32(p + 8, last, (__m256i)v.b);
}

//: vw_add
OP vw vw_add(vw a, vw b) {
    return (vw){(w_reg)_mm256_add_epi32((__m256i)a.a, (__m256i)b.a),
                (w_reg)_mm256_add_epi32((__m256i)a.b, (__m256i)b.b)};
}

//: vw_sub
OP vw vw_sub(vw a, vw b) {
    return (vw){(w_reg)_mm256_sub_epi32((__m256i)a.a, (__m256i)b.a),
                (w_reg)_mm256_sub_epi32((__m256i)a.b, (__m256i)b.b)};
}

//: vw_sra
OP vw vw_sra(vw v, int bits) {
    return (vw){(w_reg)_mm256_srai_epi32((__m256i)v.a, bits), (w_reg)_mm256_srai_epi32((__m256i)v.b, bits)};
}

//: vw_max
OP vw vw_max(vw a, vw b) {
    return (vw){(w_reg)_mm256_max_epi32((__m256i)a.a, (__m256i)b.a),
                (w_reg)_mm256_max_epi32((__m256i)a.b, (__m256i)b.b)};
}

//: vw_hsum
OP int32_t vw_hsum(vw v) {
    __m256i y = _mm256_add_epi32((__m256i)v.a, (__m256i)v.b);
    __m128i x = _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1));
    return _mm_cvtsi128_si32(x);
}

//: vw_hmax
OP int32_t vw_hmax(vw v) {
    __m256i y = _mm256_max_epi32((__m256i)v.a, (__m256i)v.b);
    __m128i x = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1));
    return _mm_cvtsi128_si32(x);
}

//: vw_dot4
// vpmaddubsw saturates at 32767, which u <= 128 cannot reach; vpmaddwd with ones adds its pairs in int32.
OP vw vw_dot4(vw acc, vb u, vb s) {
    __m256i ones = _mm256_set1_epi16(1);
    __m256i a = _mm256_madd_epi16(_mm256_maddubs_epi16(u.a, s.a), ones);
    __m256i b = _mm256_madd_epi16(_mm256_maddubs_epi16(u.b, s.b), ones);
    return (vw){acc.a + (w_reg)a, acc.b + (w_reg)b};
}

//: vw_dot4_field
OP vw vw_dot4_field(vw acc, vb u, vx x, int f) { return vw_dot4(acc, u, vb_splat4(x.p + (x.at + 4 * f))); }

//: values_bias
enum { values_bias = 0 };

//: vw_dot4_values
// vpmaddubsw takes |s| <= 128 as its unsigned bytes, and v <= 127 under the sign of s: pairs of at most 32512.
OP vw vw_dot4_values(vw acc, vb v, vb s) {
    __m256i ones = _mm256_set1_epi16(1);
    __m256i a = _mm256_maddubs_epi16(_mm256_abs_epi8(s.a), _mm256_sign_epi8(v.a, s.a));
    __m256i b = _mm256_maddubs_epi16(_mm256_abs_epi8(s.b), _mm256_sign_epi8(v.b, s.b));
    return (vw){acc.a + (w_reg)_mm256_madd_epi16(a, ones), acc.b + (w_reg)_mm256_madd_epi16(b, ones)};
}

//: vw_dot4_values_field
OP vw vw_dot4_values_field(vw acc, vb v, vx x, int f) {
    return vw_dot4_values(acc, v, vb_splat4(x.p + (x.at + 4 * f)));
}

//: vw_widen
// vpmaddwd with ones sign-extends and adds neighbours at once.
OP vw vw_widen(vw acc, vp v) {
    __m256i ones = _mm256_set1_epi16(1);
    return (vw){acc.a + (w_reg)_mm256_madd_epi16((__m256i)v.a, ones),
                acc.b + (w_reg)_mm256_madd_epi16((__m256i)v.b, ones)};
}

//: vw_rows
// Interleaving lanes l and l + 2 makes them neighbours for vpmaddwd with ones, which widens while it adds: 8
// instructions for each of lo and hi. Adding lanes as int16 first could overflow.
OP vw vw_rows(vw acc, vh lo, vh hi) {
    __m256i ones = _mm256_set1_epi16(1);
    __m256i p = _mm256_unpacklo_epi16((__m256i)lo.a, (__m256i)lo.b);  // rows 0..3: lanes 0 2 | 1 3
    __m256i q = _mm256_unpackhi_epi16((__m256i)lo.a, (__m256i)lo.b);  // rows 4..7
    __m256i r = _mm256_unpacklo_epi16((__m256i)hi.a, (__m256i)hi.b);
    __m256i s = _mm256_unpackhi_epi16((__m256i)hi.a, (__m256i)hi.b);
    __m256i x = _mm256_madd_epi16(_mm256_blend_epi32(p, q, 0xf0), ones);
    __m256i y = _mm256_madd_epi16(_mm256_permute2x128_si256(p, q, 0x21), ones);
    acc.a += (w_reg)_mm256_add_epi32(x, y);
    x = _mm256_madd_epi16(_mm256_blend_epi32(r, s, 0xf0), ones);
    y = _mm256_madd_epi16(_mm256_permute2x128_si256(r, s, 0x21), ones);
    acc.b += (w_reg)_mm256_add_epi32(x, y);
    return acc;
}

//: vw_extend_lo
// Each int16 twice, then an arithmetic shift.
OP vw vw_extend_lo(vw acc, vh v) {
    __m256i a = _mm256_unpacklo_epi16((__m256i)v.a, (__m256i)v.a);
    __m256i b = _mm256_unpacklo_epi16((__m256i)v.b, (__m256i)v.b);
    return (vw){(w_reg)_mm256_add_epi32((__m256i)acc.a, _mm256_srai_epi32(a, 16)),
                (w_reg)_mm256_add_epi32((__m256i)acc.b, _mm256_srai_epi32(b, 16))};
}

//: vw_extend_hi
OP vw vw_extend_hi(vw acc, vh v) {
    __m256i a = _mm256_unpackhi_epi16((__m256i)v.a, (__m256i)v.a);
    __m256i b = _mm256_unpackhi_epi16((__m256i)v.b, (__m256i)v.b);
    return (vw){(w_reg)_mm256_add_epi32((__m256i)acc.a, _mm256_srai_epi32(a, 16)),
                (w_reg)_mm256_add_epi32((__m256i)acc.b, _mm256_srai_epi32(b, 16))};
}

//: vw_zip_lo
OP vw vw_zip_lo(vh a, vh b) {
    return (vw){(w_reg)_mm256_unpacklo_epi16((__m256i)a.a, (__m256i)b.a),
                (w_reg)_mm256_unpacklo_epi16((__m256i)a.b, (__m256i)b.b)};
}

//: vw_zip_hi
OP vw vw_zip_hi(vh a, vh b) {
    return (vw){(w_reg)_mm256_unpackhi_epi16((__m256i)a.a, (__m256i)b.a),
                (w_reg)_mm256_unpackhi_epi16((__m256i)a.b, (__m256i)b.b)};
}

//: vw_transpose_lanes
// One shuffle a stored register: 8, against 16 half-width stores without any.
OP void vw_transpose_lanes(uint8_t *p, int64_t stride, vw v0, vw v1, vw v2, vw v3) {
    __m256i a0 = (__m256i)v0.a, a1 = (__m256i)v1.a, a2 = (__m256i)v2.a, a3 = (__m256i)v3.a;
    __m256i b0 = (__m256i)v0.b, b1 = (__m256i)v1.b, b2 = (__m256i)v2.b, b3 = (__m256i)v3.b;
    uint8_t *q = p + 32;
    _mm256_storeu_si256((__m256i *)p, _mm256_permute2x128_si256(a0, a1, 0x20));
    _mm256_storeu_si256((__m256i *)q, _mm256_permute2x128_si256(a2, a3, 0x20));
    _mm256_storeu_si256((__m256i *)(p + stride), _mm256_permute2x128_si256(a0, a1, 0x31));
    _mm256_storeu_si256((__m256i *)(q + stride), _mm256_permute2x128_si256(a2, a3, 0x31));
    _mm256_storeu_si256((__m256i *)(p + 2 * stride), _mm256_permute2x128_si256(b0, b1, 0x20));
    _mm256_storeu_si256((__m256i *)(q + 2 * stride), _mm256_permute2x128_si256(b2, b3, 0x20));
    _mm256_storeu_si256((__m256i *)(p + 3 * stride), _mm256_permute2x128_si256(b0, b1, 0x31));
    _mm256_storeu_si256((__m256i *)(q + 3 * stride), _mm256_permute2x128_si256(b2, b3, 0x31));
}

//: vw_store_s8
// The packs work within lanes and leave dwords 0 2 1 3 (a0-3 b0-3 a4-7 b4-7); vpshufd puts them right.
OP void vw_store_s8(int8_t *p, vw v) {
    __m256i h = _mm256_packs_epi32((__m256i)v.a, (__m256i)v.b);
    __m128i x = _mm_packs_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    _mm_storeu_si128((__m128i *)p, _mm_shuffle_epi32(x, 0xd8));
}

//: vf_splat
OP vf vf_splat(float x) {
    __m256 v = _mm256_set1_ps(x);
    return (vf){v, v};
}

//: vf_load
OP vf vf_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

//: vf_load_n
// Elements that vmaskmovps leaves out are not touched, so they may lie on an unmapped page.
OP vf vf_load_n(const float *p, int n) {
    if (n == 16) return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
    __m256i count = _mm256_set1_epi32(n);
    __m256i first = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i last = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
    return (vf){_mm256_maskload_ps(p, first), _mm256_maskload_ps(p + 8, last)};
}

//: vf_store_n
// vmaskmovps as a store is slow microcode on Zen 1 to 3, so full blocks go around it.
OP void vf_store_n(float *p, vf v, int n) {
    if (n == 16) {
        _mm256_storeu_ps(p, v.a);
        _mm256_storeu_ps(p + 8, v.b);
        return;
    }
    __m256i count = _mm256_set1_epi32(n);
    __m256i first = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i last = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
    _mm256_maskstore_ps(p, first, v.a);
    if (n > 8) _mm256_maskstore_ps(p + 8, last, v.b);
}

//: vf_mul
OP vf vf_mul(vf a, vf b) { return (vf){_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }

//: vf_from_w
OP vf vf_from_w(vw v) { return (vf){_mm256_cvtepi32_ps((__m256i)v.a), _mm256_cvtepi32_ps((__m256i)v.b)}; }

//: vw_abs_bits
OP vw vw_abs_bits(vf v) {
    return (vw){(w_reg)_mm256_castps_si256(v.a) & 0x7fffffff, (w_reg)_mm256_castps_si256(v.b) & 0x7fffffff};
}

//: vw_round
// vcvtps2dq rounds as MXCSR says: to nearest even, unless the program changed it.
OP vw vw_round(vf v) { return (vw){(w_reg)_mm256_cvtps_epi32(v.a), (w_reg)_mm256_cvtps_epi32(v.b)}; }

//== Floats
// The float ops of AVX2, with FMA and F16C. What each op means is written in scalar.h.

//: vf_store
OP void vf_store(float *p, vf v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}

//: vf_add
OP vf vf_add(vf a, vf b) { return (vf){_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }

//: vf_sub
OP vf vf_sub(vf a, vf b) { return (vf){_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }

//: vf_div
OP vf vf_div(vf a, vf b) { return (vf){_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }

//: vf_fma
OP vf vf_fma(vf a, vf b, vf c) {
    return (vf){_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}

//: vf_max
// vmaxps gives its second operand where one is NaN.
OP vf vf_max(vf a, vf b) { return (vf){_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }

//: vf_zero_below
// "Not less than" is true for NaN.
OP vf vf_zero_below(vf v, vf x, vf limit) {
    return (vf){_mm256_and_ps(v.a, _mm256_cmp_ps(x.a, limit.a, _CMP_NLT_UQ)),
                _mm256_and_ps(v.b, _mm256_cmp_ps(x.b, limit.b, _CMP_NLT_UQ))};
}

//: vf_blend_n
OP vf vf_blend_n(vf v, vf rest, int n) {
    __m256i count = _mm256_set1_epi32(n);
    __m256i first = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i last = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
    return (vf){_mm256_blendv_ps(rest.a, v.a, _mm256_castsi256_ps(first)),
                _mm256_blendv_ps(rest.b, v.b, _mm256_castsi256_ps(last))};
}

//: vf_pow2
OP vf vf_pow2(vw n) {
    __m256i bias = _mm256_set1_epi32(127);
    return (vf){_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32((__m256i)n.a, bias), 23)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32((__m256i)n.b, bias), 23))};
}

//: vf_hsum
OP float vf_hsum(vf v) {
    __m256 y = _mm256_add_ps(v.a, v.b);
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

//: vf_hmax
OP float vf_hmax(vf v) {
    __m256 y = _mm256_max_ps(v.a, v.b);
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

//: vf_from_f16
OP vf vf_from_f16(const uint16_t *p) {
    const __m128i *q = (const __m128i *)p;
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}

//: vf_to_f16
OP void vf_to_f16(uint16_t *p, vf v) {
    __m128i *q = (__m128i *)p;
    _mm_storeu_si128(q, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128(q + 1, _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

//: vf_from_bf16
OP vf vf_from_bf16(const uint16_t *p) {
    const __m128i *q = (const __m128i *)p;
    __m256i a = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16);
    __m256i b = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16);
    return (vf){_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)};
}

//: vw_load_s8
OP vw vw_load_s8(const int8_t *p) {
    return (vw){(w_reg)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                (w_reg)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))};
}

//: vw_load_u8
OP vw vw_load_u8(const uint8_t *p) {
    return (vw){(w_reg)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                (w_reg)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))};
}

//: vw_and
OP vw vw_and(vw a, vw b) { return (vw){a.a & b.a, a.b & b.b}; }

//: vw_shl
OP vw vw_shl(vw v, int bits) {
    return (vw){(w_reg)_mm256_slli_epi32((__m256i)v.a, bits), (w_reg)_mm256_slli_epi32((__m256i)v.b, bits)};
}

//: vf_splat_f16
OP vf vf_splat_f16(const uint16_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    __m256 v = _mm256_set1_ps(_cvtsh_ss(h));
    return (vf){v, v};
}

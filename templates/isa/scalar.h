// The vector ops of the scalar ISA: plain C11, and the definition of what every op means.
//
// A block is 64 bytes on every ISA, whatever the register width: one zmm, two ymm, four NEON registers, or
// these arrays. So a packed weight has one layout for all CPUs and a template has no loop over registers.
//   vb  64 x uint8 (or int8)     vh  32 x int16     vw  16 x int32     vf  16 x float     vm  64 flags
// "Lane" means one of the four 16-byte quarters of a block.
// A line "//: NAME" opens the definition of the op NAME. Another ISA gives the same names with the same
// meaning; the tests hold each of them against this file.

//: includes
#include <math.h>

//: types
typedef struct { uint8_t b[64]; } vb;
typedef struct { int16_t h[32]; } vh;
typedef struct { int32_t w[16]; } vw;
typedef struct { float f[16]; } vf;
typedef struct { uint8_t m[64]; } vm;

//: prefetch
// Ask for the cache line at p, for reading; p need not be mapped.
OP void prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }

//: prefetch_l2
// The same into the L2 cache only: for what is needed later than L1 would keep it.
OP void prefetch_l2(const void *p) { __builtin_prefetch(p, 0, 2); }

//: prefetch_once
// The same for a line that is read once: past the caches, so that it pushes nothing out.
OP void prefetch_once(const void *p) { __builtin_prefetch(p, 0, 0); }

//: vb_load
// 64 bytes from p, any alignment.
OP vb vb_load(const void *p) { vb r; memcpy(r.b, p, 64); return r; }

//: vb_store
OP void vb_store(void *p, vb v) { memcpy(p, v.b, 64); }

//: vb_splat
// b[i] = x
OP vb vb_splat(uint8_t x) { vb r; memset(r.b, x, 64); return r; }

//: vb_splat4
// Four bytes of p, 16 times: b[4 i + j] = p[j]
OP vb vb_splat4(const int8_t *p) {
    vb r;
    for (int i = 0; i < 64; ++i) r.b[i] = (uint8_t)p[i & 3];
    return r;
}

//: vx
// Sixteen activations, four for each of the fields 0..3; only the ops that take it look inside.
typedef struct { int8_t x[16]; } vx;

//: vx_load
// 16 bytes from p + at, any alignment: x[4 f + j]. A level may leave them where they are, so they must stay there.
OP vx vx_load(const int8_t *p, int64_t at) { vx r; memcpy(r.x, p + at, 16); return r; }

//: vb_quad
// Sixteen bytes of p in every lane: b[16 l + i] = p[i]
OP vb vb_quad(const void *p) {
    vb r;
    for (int l = 0; l < 4; ++l) memcpy(r.b + 16 * l, p, 16);
    return r;
}

//: vb_nibbles
// 32 bytes of p, low halves, then high halves: b[i] = p[i] & 15, b[32 + i] = p[i] >> 4
OP vb vb_nibbles(const void *p) {
    vb r;
    memcpy(r.b, p, 32);
    for (int i = 0; i < 32; ++i) {
        r.b[32 + i] = r.b[i] >> 4;
        r.b[i] &= 15;
    }
    return r;
}

//: vb_and
OP vb vb_and(vb a, vb b) {
    for (int i = 0; i < 64; ++i) a.b[i] &= b.b[i];
    return a;
}

//: vb_add
// b[i] = a[i] + b[i] mod 256
OP vb vb_add(vb a, vb b) {
    for (int i = 0; i < 64; ++i) a.b[i] = (uint8_t)(a.b[i] + b.b[i]);
    return a;
}

//: vb_field
// b[i] = (v[i] >> bits) & mask; mask has no bit above 8 - bits
OP vb vb_field(vb v, int bits, int mask) {
    for (int i = 0; i < 64; ++i) v.b[i] = (uint8_t)((v.b[i] >> bits) & mask);
    return v;
}

//: vb_affine_field
// The same, for levels with an instruction that does both at once
OP vb vb_affine_field(vb v, int bits, int mask) { return vb_field(v, bits, mask); }

//: vb_high
// b[i] = v[i] >> bits: what lies above the lower fields
OP vb vb_high(vb v, int bits) {
    for (int i = 0; i < 64; ++i) v.b[i] = (uint8_t)(v.b[i] >> bits);
    return v;
}

//: vb_lut16
// Look up in the 16 entries of the own lane: b[16 l + i] = table[16 l + idx[16 l + i]], or 0 where idx >= 128.
// An index is in 0..15 or in 128..255.
OP vb vb_lut16(vb table, vb idx) {
    vb r;
    for (int i = 0; i < 64; ++i) r.b[i] = (idx.b[i] & 0x80) ? 0 : table.b[(i & 48) + (idx.b[i] & 15)];
    return r;
}

//: vb_lut_low
// Look up by the low four bits of an index: b[16 l + i] = table[16 l + (idx[16 l + i] & 15)], or 0 where idx >= 128.
OP vb vb_lut_low(vb table, vb idx) {
    vb r;
    for (int i = 0; i < 64; ++i) r.b[i] = (idx.b[i] & 0x80) ? 0 : table.b[(i & 48) + (idx.b[i] & 15)];
    return r;
}

//: vb_lut8
// Look up by the code of three bits from bit 0 or 4 on: b[16 l + i] = table[16 l + (v[16 l + i] >> bits & 7)]. Bits 3
// and 7 of v are 0.
OP vb vb_lut8(vb table, vb v, int bits) {
    vb r;
    for (int i = 0; i < 64; ++i) r.b[i] = table.b[(i & 48) + (v.b[i] >> bits & 7)];
    return r;
}

//: vb_spread
// Two codes of three bits, from bits 0 and 4 on: bit 0 of the first is bit 3 of a, bit 1 that of b, bit 2 that of c,
// and of the second it is bit 7 of each.
OP vb vb_spread(vb a, vb b, vb c) {
    for (int i = 0; i < 64; ++i)
        a.b[i] = (uint8_t)((a.b[i] & 0x88) >> 3 | (b.b[i] & 0x88) >> 2 | (c.b[i] & 0x88) >> 1);
    return a;
}

//: vb_lut128
// Look up in 128 bytes of memory: b[i] = table[idx[i] & 127]
OP vb vb_lut128(const uint8_t *table, vb idx) {
    for (int i = 0; i < 64; ++i) idx.b[i] = table[idx.b[i] & 127];
    return idx;
}

//: vb_avg
// b[i] = (a[i] + b[i] + 1) >> 1, without overflow
OP vb vb_avg(vb a, vb b) {
    for (int i = 0; i < 64; ++i) a.b[i] = (uint8_t)((a.b[i] + b.b[i] + 1) >> 1);
    return a;
}

//: vb_mirror
// b[i] = s[i] >= 128 ? 0xaa - v[i] : v[i]; with v four 2-bit codes 0..2, each becomes 2 - code
OP vb vb_mirror(vb v, vb s) {
    for (int i = 0; i < 64; ++i) v.b[i] = s.b[i] & 0x80 ? (uint8_t)(0xaa - v.b[i]) : v.b[i];
    return v;
}

//: vb_sign
// b[i] = s[i] >= 128 ? -v[i] : v[i]; no s[i] is 0
OP vb vb_sign(vb v, vb s) {
    for (int i = 0; i < 64; ++i) v.b[i] = (uint8_t)(s.b[i] & 0x80 ? 256 - v.b[i] : v.b[i]);
    return v;
}

//: vb_choose
// b[i] = s[i] >= 128 ? a[i] : b[i]
OP vb vb_choose(vb s, vb a, vb b) {
    for (int i = 0; i < 64; ++i) b.b[i] = s.b[i] & 0x80 ? a.b[i] : b.b[i];
    return b;
}

//: vb_test
// m[i] = (v[i] & bits[i]) != 0
OP vm vb_test(vb v, vb bits) {
    vm r;
    for (int i = 0; i < 64; ++i) r.m[i] = (v.b[i] & bits.b[i]) != 0;
    return r;
}

//: vb_flip
// b[i] = m[i] ? ~v[i] : v[i]
OP vb vb_flip(vb v, vm m) {
    for (int i = 0; i < 64; ++i) v.b[i] = m.m[i] ? (uint8_t)~v.b[i] : v.b[i];
    return v;
}

//: vb_select
// b[i] = m[i] ? a[i] : b[i]
OP vb vb_select(vm m, vb a, vb b) {
    for (int i = 0; i < 64; ++i) b.b[i] = m.m[i] ? a.b[i] : b.b[i];
    return b;
}

//: vh_zip_lo
// In every lane, bytes 0..7 of lo and hi become eight int16: h[8 l + i] = lo[16 l + i] + 256 * (int8)hi[16 l + i]
OP vh vh_zip_lo(vb lo, vb hi) {
    vh r;
    for (int i = 0; i < 32; ++i) {
        int j = 16 * (i >> 3) + (i & 7);
        r.h[i] = (int16_t)(lo.b[j] | hi.b[j] << 8);
    }
    return r;
}

//: vh_zip_hi
// The same for bytes 8..15 of every lane.
OP vh vh_zip_hi(vb lo, vb hi) {
    vh r;
    for (int i = 0; i < 32; ++i) {
        int j = 16 * (i >> 3) + 8 + (i & 7);
        r.h[i] = (int16_t)(lo.b[j] | hi.b[j] << 8);
    }
    return r;
}

//: vh_digits_lo
// In every lane, bytes 0..7 of lo and hi are two digits, both int8: h[8 l + i] = lo[16 l + i] + radix * hi[16 l + i],
// radix 1..64.
OP vh vh_digits_lo(vb lo, vb hi, int radix) {
    vh r;
    for (int i = 0; i < 32; ++i) {
        int j = 16 * (i >> 3) + (i & 7);
        r.h[i] = (int16_t)((int8_t)lo.b[j] + radix * (int8_t)hi.b[j]);
    }
    return r;
}

//: vh_digits_hi
// The same for bytes 8..15 of every lane.
OP vh vh_digits_hi(vb lo, vb hi, int radix) {
    vh r;
    for (int i = 0; i < 32; ++i) {
        int j = 16 * (i >> 3) + 8 + (i & 7);
        r.h[i] = (int16_t)((int8_t)lo.b[j] + radix * (int8_t)hi.b[j]);
    }
    return r;
}

//: vh_zero
OP vh vh_zero(void) { vh r; memset(r.h, 0, 64); return r; }

//: vh_add
// h[i] = a[i] + b[i] mod 2^16; a kernel's bound keeps the true sum inside int16.
OP vh vh_add(vh a, vh b) {
    for (int i = 0; i < 32; ++i) a.h[i] = (int16_t)(uint16_t)(a.h[i] + b.h[i]);
    return a;
}

//: vh_sub
OP vh vh_sub(vh a, vh b) {
    for (int i = 0; i < 32; ++i) a.h[i] = (int16_t)(uint16_t)(a.h[i] - b.h[i]);
    return a;
}

//: vh_mul
// h[i] = low 16 bits of a[i] * b[i]
OP vh vh_mul(vh a, vh b) {
    for (int i = 0; i < 32; ++i) a.h[i] = (int16_t)(uint16_t)(a.h[i] * b.h[i]);
    return a;
}

//: vh_load
OP vh vh_load(const int16_t *p) { vh r; memcpy(r.h, p, 64); return r; }

//: vh_sign_high
// h[i] = (int8)b[2 i + 1]: the odd byte of every pair, sign-extended.
OP vh vh_sign_high(vb v) {
    vh r;
    for (int i = 0; i < 32; ++i) r.h[i] = (int8_t)v.b[2 * i + 1];
    return r;
}

//: vh_pairs
// h[i] = u[2 i] * s[2 i] + u[2 i + 1] * s[2 i + 1], u uint8 <= 128, s int8: never saturates ([-32768, 32512]).
OP vh vh_pairs(vb u, vb s) {
    vh r;
    for (int i = 0; i < 32; ++i)
        r.h[i] = (int16_t)(u.b[2 * i] * (int8_t)s.b[2 * i] + u.b[2 * i + 1] * (int8_t)s.b[2 * i + 1]);
    return r;
}

//: vp
// 32 sums of products in int16, or parts of them; only the ops that take it look inside.
typedef struct { int16_t p[32]; } vp;

//: vp_zero
OP vp vp_zero(void) { vp r; memset(r.p, 0, 64); return r; }

//: vp_add
// p[i] = sums[i] + u[2 i] * s[2 i] + u[2 i + 1] * s[2 i + 1], u uint8 <= 128, s int8; a kernel's bound keeps it inside
// int16. A level may keep parts of p[i] apart.
OP vp vp_add(vp sums, vb u, vb s) {
    for (int i = 0; i < 32; ++i) {
        const int t = u.b[2 * i] * (int8_t)s.b[2 * i] + u.b[2 * i + 1] * (int8_t)s.b[2 * i + 1];
        sums.p[i] = (int16_t)(uint16_t)(sums.p[i] + t);
    }
    return sums;
}

//: vp_add_field
// The same with a field of x for s: s[4 i + j] = x[4 f + j], f in 0..3
OP vp vp_add_field(vp sums, vb u, vx x, int f) { return vp_add(sums, u, vb_splat4(x.x + 4 * f)); }

//: vb_low_bytes
// In every lane the low bytes of eight int16 of a, then of b:
// b[16 l + i] = a[8 l + i] & 255, b[16 l + 8 + i] = b[8 l + i] & 255
OP vb vb_low_bytes(vh a, vh b) {
    vb r;
    for (int i = 0; i < 32; ++i) {
        int j = 16 * (i >> 3) + (i & 7);
        r.b[j] = (uint8_t)a.h[i];
        r.b[j + 8] = (uint8_t)b.h[i];
    }
    return r;
}

//: vb_high_bytes
// The same with the high bytes.
OP vb vb_high_bytes(vh a, vh b) {
    vb r;
    for (int i = 0; i < 32; ++i) {
        int j = 16 * (i >> 3) + (i & 7);
        r.b[j] = (uint8_t)((uint16_t)a.h[i] >> 8);
        r.b[j + 8] = (uint8_t)((uint16_t)b.h[i] >> 8);
    }
    return r;
}

//: vw_zero
OP vw vw_zero(void) { vw r; memset(r.w, 0, 64); return r; }

//: vw_splat
OP vw vw_splat(int32_t x) {
    vw r;
    for (int i = 0; i < 16; ++i) r.w[i] = x;
    return r;
}

//: vw_load
OP vw vw_load(const int32_t *p) { vw r; memcpy(r.w, p, 64); return r; }

//: vw_store
OP void vw_store(int32_t *p, vw v) { memcpy(p, v.w, 64); }

//: vw_store_n
// The first n (1..16) elements; nothing behind them is written.
OP void vw_store_n(int32_t *p, vw v, int n) { memcpy(p, v.w, 4 * (size_t)n); }

//: vw_add
// w[i] = a[i] + b[i] mod 2^32
OP vw vw_add(vw a, vw b) {
    for (int i = 0; i < 16; ++i) a.w[i] = (int32_t)((uint32_t)a.w[i] + (uint32_t)b.w[i]);
    return a;
}

//: vw_sub
OP vw vw_sub(vw a, vw b) {
    for (int i = 0; i < 16; ++i) a.w[i] = (int32_t)((uint32_t)a.w[i] - (uint32_t)b.w[i]);
    return a;
}

//: vw_sra
// w[i] = v[i] >> bits, arithmetic
OP vw vw_sra(vw v, int bits) {
    for (int i = 0; i < 16; ++i) v.w[i] >>= bits;
    return v;
}

//: vw_max
OP vw vw_max(vw a, vw b) {
    for (int i = 0; i < 16; ++i) a.w[i] = a.w[i] > b.w[i] ? a.w[i] : b.w[i];
    return a;
}

//: vw_hsum
// The sum of the 16 elements, mod 2^32.
OP int32_t vw_hsum(vw v) {
    uint32_t s = 0;
    for (int i = 0; i < 16; ++i) s += (uint32_t)v.w[i];
    return (int32_t)s;
}

//: vw_hmax
// The largest of the 16 elements.
OP int32_t vw_hmax(vw v) {
    int32_t s = v.w[0];
    for (int i = 1; i < 16; ++i) s = v.w[i] > s ? v.w[i] : s;
    return s;
}

//: vw_dot4
// w[i] = acc[i] + sum_j u[4 i + j] * s[4 i + j], j = 0..3, u uint8 <= 128, s int8
OP vw vw_dot4(vw acc, vb u, vb s) {
    for (int i = 0; i < 16; ++i) {
        int32_t t = 0;
        for (int j = 0; j < 4; ++j) t += u.b[4 * i + j] * (int8_t)s.b[4 * i + j];
        acc.w[i] = (int32_t)((uint32_t)acc.w[i] + (uint32_t)t);
    }
    return acc;
}

//: vw_dot4_field
// The same with a field of x for s: s[4 i + j] = x[4 f + j], f in 0..3
OP vw vw_dot4_field(vw acc, vb u, vx x, int f) { return vw_dot4(acc, u, vb_splat4(x.x + 4 * f)); }

//: values_bias
// What is added to int8 values before they are multiplied: 128 where a level multiplies unsigned bytes, else 0.
enum { values_bias = 0 };

//: vw_dot4_values
// w[i] = acc[i] + sum_j v[4 i + j] * s[4 i + j], j = 0..3, v int8 values -127 .. 127 + values_bias, s int8
OP vw vw_dot4_values(vw acc, vb v, vb s) {
    for (int i = 0; i < 64; ++i)
        acc.w[i / 4] = (int32_t)((uint32_t)acc.w[i / 4] + (uint32_t)((int8_t)v.b[i] * (int8_t)s.b[i]));
    return acc;
}

//: vw_dot4_values_field
// The same with a field of x for s: s[4 i + j] = x[4 f + j], f in 0..3
OP vw vw_dot4_values_field(vw acc, vb v, vx x, int f) { return vw_dot4_values(acc, v, vb_splat4(x.x + 4 * f)); }

//: vw_widen
// w[i] = acc[i] + v[2 i] + v[2 i + 1]
OP vw vw_widen(vw acc, vp v) {
    for (int i = 0; i < 16; ++i) acc.w[i] = (int32_t)((uint32_t)acc.w[i] + (uint32_t)(v.p[2 * i] + v.p[2 * i + 1]));
    return acc;
}

//: vw_rows
// Sum over the lanes: w[r] = acc[r] + sum_l lo[8 l + r] for r = 0..7, and + sum_l hi[8 l + r - 8] for r = 8..15.
OP vw vw_rows(vw acc, vh lo, vh hi) {
    for (int l = 0; l < 4; ++l)
        for (int r = 0; r < 8; ++r) {
            acc.w[r] = (int32_t)((uint32_t)acc.w[r] + (uint32_t)lo.h[8 * l + r]);
            acc.w[8 + r] = (int32_t)((uint32_t)acc.w[8 + r] + (uint32_t)hi.h[8 * l + r]);
        }
    return acc;
}

//: vw_extend_lo
// Add int16 0..3 of every lane: w[4 l + i] = acc[4 l + i] + v[8 l + i], i = 0..3
OP vw vw_extend_lo(vw acc, vh v) {
    for (int i = 0; i < 16; ++i)
        acc.w[i] = (int32_t)((uint32_t)acc.w[i] + (uint32_t)v.h[8 * (i >> 2) + (i & 3)]);
    return acc;
}

//: vw_extend_hi
// The same with int16 4..7 of every lane.
OP vw vw_extend_hi(vw acc, vh v) {
    for (int i = 0; i < 16; ++i)
        acc.w[i] = (int32_t)((uint32_t)acc.w[i] + (uint32_t)v.h[8 * (i >> 2) + 4 + (i & 3)]);
    return acc;
}

//: vw_zip_lo
// In every lane, int16 0..3 of a and b alternate: the eight int16 are a0 b0 a1 b1 a2 b2 a3 b3.
OP vw vw_zip_lo(vh a, vh b) {
    vw r;
    for (int i = 0; i < 16; ++i) {
        int j = 8 * (i >> 2) + (i & 3);
        r.w[i] = (int32_t)((uint32_t)(uint16_t)a.h[j] | (uint32_t)(uint16_t)b.h[j] << 16);
    }
    return r;
}

//: vw_zip_hi
// The same with int16 4..7 of every lane.
OP vw vw_zip_hi(vh a, vh b) {
    vw r;
    for (int i = 0; i < 16; ++i) {
        int j = 8 * (i >> 2) + 4 + (i & 3);
        r.w[i] = (int32_t)((uint32_t)(uint16_t)a.h[j] | (uint32_t)(uint16_t)b.h[j] << 16);
    }
    return r;
}

//: vw_transpose_lanes
// Four blocks as a 4 x 4 matrix of lanes, transposed, stored `stride` bytes apart: lane i of block j = lane j of v_i.
OP void vw_transpose_lanes(uint8_t *p, int64_t stride, vw v0, vw v1, vw v2, vw v3) {
    for (int j = 0; j < 4; ++j) {
        memcpy(p + stride * j, v0.w + 4 * j, 16);
        memcpy(p + stride * j + 16, v1.w + 4 * j, 16);
        memcpy(p + stride * j + 32, v2.w + 4 * j, 16);
        memcpy(p + stride * j + 48, v3.w + 4 * j, 16);
    }
}

//: vw_store_s8
// Saturate to int8 and store 16 bytes.
OP void vw_store_s8(int8_t *p, vw v) {
    for (int i = 0; i < 16; ++i) p[i] = (int8_t)(v.w[i] < -128 ? -128 : v.w[i] > 127 ? 127 : v.w[i]);
}

//: vf_splat
OP vf vf_splat(float x) {
    vf r;
    for (int i = 0; i < 16; ++i) r.f[i] = x;
    return r;
}

//: vf_load
// 16 floats from p, any alignment.
OP vf vf_load(const float *p) { vf r; memcpy(r.f, p, 64); return r; }

//: vf_load_n
// The first n (0..16) floats of p, zeros behind them; nothing behind them is read.
OP vf vf_load_n(const float *p, int n) {
    vf r;
    memset(r.f, 0, 64);
    memcpy(r.f, p, 4 * (size_t)n);
    return r;
}

//: vf_store_n
// The first n (1..16) floats; nothing behind them is written.
OP void vf_store_n(float *p, vf v, int n) { memcpy(p, v.f, 4 * (size_t)n); }

//: vf_mul
OP vf vf_mul(vf a, vf b) {
    for (int i = 0; i < 16; ++i) a.f[i] *= b.f[i];
    return a;
}

//: vf_from_w
// f[i] = (float)v[i], rounded to nearest even
OP vf vf_from_w(vw v) {
    vf r;
    for (int i = 0; i < 16; ++i) r.f[i] = (float)v.w[i];
    return r;
}

//: vw_abs_bits
// The bits of |v[i]| as int32: ordered as the magnitudes are; infinity is 0x7f800000, NaN is more.
OP vw vw_abs_bits(vf v) {
    vw r;
    memcpy(r.w, v.f, 64);
    for (int i = 0; i < 16; ++i) r.w[i] &= 0x7fffffff;
    return r;
}

//: vw_round
// w[i] = v[i] rounded to the nearest integer, ties to even; |v[i]| < 2^31
OP vw vw_round(vf v) {
    vw r;
    for (int i = 0; i < 16; ++i) r.w[i] = (int32_t)lrintf(v.f[i]);
    return r;
}

//== Floats
// The float ops of the scalar ISA, which define what each of them means: arithmetic of a forward step.
//
// Every operation is one IEEE operation a lane with one rounding, or it is a fixed sequence of them, so a step
// gives the same bits on every ISA. NaN comes out where the operation makes one; its payload is not defined.

//: vf_store
// 16 floats to p, any alignment.
OP void vf_store(float *p, vf v) { memcpy(p, v.f, 64); }

//: vf_add
OP vf vf_add(vf a, vf b) {
    for (int i = 0; i < 16; ++i) a.f[i] += b.f[i];
    return a;
}

//: vf_sub
OP vf vf_sub(vf a, vf b) {
    for (int i = 0; i < 16; ++i) a.f[i] -= b.f[i];
    return a;
}

//: vf_div
// f[i] = a[i] / b[i], correctly rounded: no estimate of a reciprocal
OP vf vf_div(vf a, vf b) {
    for (int i = 0; i < 16; ++i) a.f[i] /= b.f[i];
    return a;
}

//: vf_fma
// f[i] = a[i] * b[i] + c[i] with one rounding
OP vf vf_fma(vf a, vf b, vf c) {
    for (int i = 0; i < 16; ++i) c.f[i] = fmaf(a.f[i], b.f[i], c.f[i]);
    return c;
}

//: vf_max
// f[i] = a[i] > b[i] ? a[i] : b[i]; so b where one is NaN
OP vf vf_max(vf a, vf b) {
    for (int i = 0; i < 16; ++i) a.f[i] = a.f[i] > b.f[i] ? a.f[i] : b.f[i];
    return a;
}

//: vf_zero_below
// f[i] = x[i] < limit[i] ? 0 : v[i]; so v where x is NaN
OP vf vf_zero_below(vf v, vf x, vf limit) {
    for (int i = 0; i < 16; ++i) v.f[i] = x.f[i] < limit.f[i] ? 0.0f : v.f[i];
    return v;
}

//: vf_blend_n
// The first n (0..16) elements of v, then those of rest: f[i] = i < n ? v[i] : rest[i]
OP vf vf_blend_n(vf v, vf rest, int n) {
    for (int i = n; i < 16; ++i) v.f[i] = rest.f[i];
    return v;
}

//: vf_pow2
// f[i] = 2^n[i] for n in -126..127; any value otherwise
OP vf vf_pow2(vw n) {
    vf r;
    for (int i = 0; i < 16; ++i) n.w[i] = (int32_t)(((uint32_t)n.w[i] + 127) << 23);
    memcpy(r.f, n.w, 64);
    return r;
}

//: vf_hsum
// The sum in a fixed tree: s[i] = v[i] + v[i + 8] for i < 8, then s[i] + s[i + 4], s[i] + s[i + 2], s[0] + s[1].
OP float vf_hsum(vf v) {
    for (int half = 8; half; half >>= 1)
        for (int i = 0; i < half; ++i) v.f[i] += v.f[i + half];
    return v.f[0];
}

//: vf_hmax
// The largest, in the tree of the sum, a > b ? a : b.
OP float vf_hmax(vf v) {
    for (int half = 8; half; half >>= 1)
        for (int i = 0; i < half; ++i) v.f[i] = v.f[i] > v.f[i + half] ? v.f[i] : v.f[i + half];
    return v.f[0];
}

//: vf_from_f16
// 16 half floats of p, exactly.
OP vf vf_from_f16(const uint16_t *p) {
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
OP void vf_to_f16(uint16_t *p, vf v) {
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
OP vf vf_from_bf16(const uint16_t *p) {
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
OP vw vw_load_s8(const int8_t *p) {
    vw r;
    for (int i = 0; i < 16; ++i) r.w[i] = p[i];
    return r;
}

//: vw_load_u8
// 16 uint8 of p, as int32.
OP vw vw_load_u8(const uint8_t *p) {
    vw r;
    for (int i = 0; i < 16; ++i) r.w[i] = p[i];
    return r;
}

//: vw_and
OP vw vw_and(vw a, vw b) {
    for (int i = 0; i < 16; ++i) a.w[i] &= b.w[i];
    return a;
}

//: vw_shl
// w[i] = v[i] << bits, mod 2^32
OP vw vw_shl(vw v, int bits) {
    for (int i = 0; i < 16; ++i) v.w[i] = (int32_t)((uint32_t)v.w[i] << bits);
    return v;
}

//: vf_splat_f16
// The half float at p in all elements.
OP vf vf_splat_f16(const uint16_t *p) {
    uint16_t h[16];
    for (int i = 0; i < 16; ++i) memcpy(h + i, p, 2);
    return vf_from_f16(h);
}

//== Tiles
// Ops for tiles: products of matrices of bytes. Levels without them have no kernels of the algorithm "tiles".

//: vt
// Eight tiles of 16 rows x 64 bytes. 0 .. 3 hold sums, 16 int32 a row; 4 and 5 activations, a token a row; 6 and 7
// weights: row i has, for 16 output rows, the four bytes of k = 4 i .. 4 i + 3.
typedef struct { int rows[8]; uint8_t b[8][16][64]; } vt;

//: vt_begin
// All become zero. 0, 1 and 4 have rows0 rows from here on, 2, 3 and 5 rows1 (1 .. 16 each), 6 and 7 have 16.
OP void vt_begin(vt *t, int rows0, int rows1) {
    memset(t, 0, sizeof *t);
    for (int i = 0; i < 8; ++i) t->rows[i] = i > 5 ? 16 : i < 2 || i == 4 ? rows0 : rows1;
}

//: vt_begin_half
// The same of products of 32 k: 4 and 5 have rows of 32 bytes, 6 and 7 have 8 rows, and a load of their own.
OP void vt_begin_half(vt *t, int rows0, int rows1) { vt_begin(t, rows0, rows1); }

//: vt_end
// Their contents are gone; nothing but a new beginning may follow.
OP void vt_end(vt *t) { memset(t, 0, sizeof *t); }

//: vt_zero
OP void vt_zero(vt *t, int tile) { memset(t->b[tile], 0, sizeof t->b[tile]); }

//: vt_load
// The rows that the tile has, 64 bytes each, `stride` bytes apart; nothing else is read.
OP void vt_load(vt *t, int tile, const void *p, int64_t stride) {
    for (int r = 0; r < t->rows[tile]; ++r) memcpy(t->b[tile][r], (const uint8_t *)p + r * stride, 64);
}

//: vt_load_half
// Of products of 32 k what 4 .. 7 have: 32 bytes a row of activations, 8 rows of weights.
OP void vt_load_half(vt *t, int tile, const void *p, int64_t stride) {
    const int rows = tile > 5 ? 8 : t->rows[tile];
    memset(t->b[tile], 0, sizeof t->b[tile]);
    for (int r = 0; r < rows; ++r) memcpy(t->b[tile][r], (const uint8_t *)p + r * stride, tile > 5 ? 64 : 32);
}

//: vt_load_once
// The same of 6 or 7, of what is read so rarely that it need not stay in the L1 cache.
OP void vt_load_once(vt *t, int tile, const void *p, int64_t stride) { vt_load(t, tile, p, stride); }

//: vt_load_once_half
OP void vt_load_once_half(vt *t, int tile, const void *p, int64_t stride) { vt_load_half(t, tile, p, stride); }

//: vt_store
// The rows of sums that the tile has, one behind the other.
OP void vt_store(vt *t, int tile, int32_t *p) { memcpy(p, t->b[tile], 64 * (size_t)t->rows[tile]); }

//: vt_dot4
// sum[r][i] of c += sum over k of a[r][k] (int8) * byte 4 i + k % 4 of row k / 4 of b (uint8), mod 2^32.
// c is 0 .. 3, a is 4 (with c 0, 1, or all of them when rows0 = rows1) or 5, b is 6 or 7.
OP void vt_dot4(vt *t, int c, int a, int b) {
    for (int r = 0; r < t->rows[c]; ++r) {
        uint32_t sums[16];
        memcpy(sums, t->b[c][r], 64);
        for (int k = 0; k < 64; ++k)
            for (int i = 0; i < 16; ++i)
                sums[i] += (uint32_t)((int8_t)t->b[a][r][k] * t->b[b][k / 4][4 * i + k % 4]);
        memcpy(t->b[c][r], sums, 64);
    }
}

//: vt_dot4_signed
// The same of a signed b.
OP void vt_dot4_signed(vt *t, int c, int a, int b) {
    for (int r = 0; r < t->rows[c]; ++r) {
        uint32_t sums[16];
        memcpy(sums, t->b[c][r], 64);
        for (int k = 0; k < 64; ++k)
            for (int i = 0; i < 16; ++i)
                sums[i] += (uint32_t)((int8_t)t->b[a][r][k] * (int8_t)t->b[b][k / 4][4 * i + k % 4]);
        memcpy(t->b[c][r], sums, 64);
    }
}

//== Products of 2 x 8 by 8 x 2 bytes
// Ops for products of 2 x 8 by 8 x 2 bytes. Levels without them have no kernels of the algorithm "mmla".

//: vw_mmla
// In each lane of 16 bytes: two rows of u and two of s, 8 bytes each. acc[2 r + t] += sum over i of row r of u (uint8)
// * row t of s (int8), mod 2^32.
OP vw vw_mmla(vw acc, vb u, vb s) {
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; ++j)
            acc.w[i] = (int32_t)((uint32_t)acc.w[i] + (uint32_t)(u.b[i / 4 * 16 + i % 4 / 2 * 8 + j] *
                                                                 (int8_t)s.b[i / 4 * 16 + i % 2 * 8 + j]));
    return acc;
}

//: compiler_barrier
// What is loaded behind it in the text is not loaded before it.
OP void compiler_barrier(void) {}

//: vw_even
// Elements 0, 2, 4, ... of a, then those of b.
OP vw vw_even(vw a, vw b) {
    vw r;
    for (int i = 0; i < 8; ++i) {
        r.w[i] = a.w[2 * i];
        r.w[8 + i] = b.w[2 * i];
    }
    return r;
}

//: vw_odd
// Elements 1, 3, 5, ... of a, then those of b.
OP vw vw_odd(vw a, vw b) {
    vw r;
    for (int i = 0; i < 8; ++i) {
        r.w[i] = a.w[2 * i + 1];
        r.w[8 + i] = b.w[2 * i + 1];
    }
    return r;
}

//: vb_store_zip4
// 128 bytes: four of a, four of b, and so on.
OP void vb_store_zip4(void *p, vb a, vb b) {
    for (int i = 0; i < 16; ++i) {
        memcpy((uint8_t *)p + 8 * i, a.b + 4 * i, 4);
        memcpy((uint8_t *)p + 8 * i + 4, b.b + 4 * i, 4);
    }
}

//: vb_store_zip8
// 128 bytes: eight of a, eight of b, and so on.
OP void vb_store_zip8(void *p, vb a, vb b) {
    for (int i = 0; i < 8; ++i) {
        memcpy((uint8_t *)p + 16 * i, a.b + 8 * i, 8);
        memcpy((uint8_t *)p + 16 * i + 8, b.b + 8 * i, 8);
    }
}

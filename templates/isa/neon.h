// The vector ops of NEON (Armv8-A's AdvSIMD): a block is four 16-byte registers, its lanes a, b, c, d.
// What each op means is written in scalar.h; here are only the reasons for an instruction.
// Products of bytes are signed: u stays below 128 (code_max in configs/isas.yaml).

//: includes
#include <arm_neon.h>

//: types
typedef struct { uint8x16_t a, b, c, d; } vb;
typedef struct { int16x8_t a, b, c, d; } vh;
typedef struct { int32x4_t a, b, c, d; } vw;
typedef struct { float32x4_t a, b, c, d; } vf;
typedef struct { uint8x16_t a, b, c, d; } vm;  // a byte is 0xff (flag set) or 0

//: prefetch
OP void prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }

//: prefetch_l2
OP void prefetch_l2(const void *p) { __builtin_prefetch(p, 0, 2); }

//: prefetch_once
OP void prefetch_once(const void *p) { __builtin_prefetch(p, 0, 0); }

//: vb_load
OP vb vb_load(const void *p) {
    const uint8_t *q = (const uint8_t *)p;
    return (vb){vld1q_u8(q), vld1q_u8(q + 16), vld1q_u8(q + 32), vld1q_u8(q + 48)};
}

//: vb_store
OP void vb_store(void *p, vb v) {
    uint8_t *q = (uint8_t *)p;
    vst1q_u8(q, v.a);
    vst1q_u8(q + 16, v.b);
    vst1q_u8(q + 32, v.c);
    vst1q_u8(q + 48, v.d);
}

//: vb_splat
OP vb vb_splat(uint8_t x) {
    uint8x16_t v = vdupq_n_u8(x);
    return (vb){v, v, v, v};
}

//: vb_splat4
// One ld1r, and one register for all four lanes.
OP vb vb_splat4(const int8_t *p) {
    uint32_t x;
    memcpy(&x, p, 4);
    uint8x16_t v = vreinterpretq_u8_u32(vdupq_n_u32(x));
    return (vb){v, v, v, v};
}

//: vx
typedef struct { uint32x4_t f[4]; } vx;  // field f's four bytes, four times

//: vx_load
// ld4r: one instruction for four loads that repeat. Loads of gcc's own choice are ldp of scalars, ldr and dup.
OP vx vx_load(const int8_t *p, int64_t at) {
    const uint32x4x4_t v = vld4q_dup_u32((const uint32_t *)(p + at));
    return (vx){{v.val[0], v.val[1], v.val[2], v.val[3]}};
}

//: neon_field
OP uint8x16_t neon_field(vx x, int f) { return (uint8x16_t)x.f[f]; }

//: vb_quad
OP vb vb_quad(const void *p) {
    uint8x16_t v = vld1q_u8((const uint8_t *)p);
    return (vb){v, v, v, v};
}

//: vb_nibbles
OP vb vb_nibbles(const void *p) {
    const uint8x16_t v = vld1q_u8((const uint8_t *)p), w = vld1q_u8((const uint8_t *)p + 16), low = vdupq_n_u8(15);
    return (vb){v & low, w & low, vshrq_n_u8(v, 4), vshrq_n_u8(w, 4)};
}

//: vb_and
OP vb vb_and(vb a, vb b) { return (vb){a.a & b.a, a.b & b.b, a.c & b.c, a.d & b.d}; }

//: vb_add
OP vb vb_add(vb a, vb b) { return (vb){a.a + b.a, a.b + b.b, a.c + b.c, a.d + b.d}; }

//: vb_field
// Bytes have a shift of their own here.
OP vb vb_field(vb v, int bits, int mask) {
    const uint8x16_t low = vdupq_n_u8((uint8_t)mask);
    return (vb){(v.a >> bits) & low, (v.b >> bits) & low, (v.c >> bits) & low, (v.d >> bits) & low};
}

//: vb_high
// A mask would be an instruction more: gcc 12 does not see that it changes nothing.
OP vb vb_high(vb v, int bits) { return (vb){v.a >> bits, v.b >> bits, v.c >> bits, v.d >> bits}; }

//: vb_lut16
// tbl gives 0 for every index from 16 on.
OP vb vb_lut16(vb table, vb idx) {
    return (vb){vqtbl1q_u8(table.a, idx.a), vqtbl1q_u8(table.b, idx.b), vqtbl1q_u8(table.c, idx.c),
                vqtbl1q_u8(table.d, idx.d)};
}

//: neon_low4
OP uint8x16_t neon_low4(uint8x16_t table, uint8x16_t idx) { return vqtbl1q_u8(table, idx & vdupq_n_u8(0x8f)); }

//: vb_lut_low
OP vb vb_lut_low(vb table, vb idx) {
    return (vb){neon_low4(table.a, idx.a), neon_low4(table.b, idx.b), neon_low4(table.c, idx.c),
                neon_low4(table.d, idx.d)};
}

//: vb_lut8
OP vb vb_lut8(vb table, vb v, int bits) {
    return vb_lut16(table, bits != 0 ? vb_high(v, 4) : vb_and(v, vb_splat(7)));
}

//: neon_spread
// An average is a sum and a shift at once; what is added has no bit in common and no bit 0.
OP uint8x16_t neon_spread(uint8x16_t a, uint8x16_t b, uint8x16_t c) {
    const uint8x16_t spare = vdupq_n_u8(0x88);
    return vrhaddq_u8(vrhaddq_u8((a & spare) >> 1, b & spare), c & spare);
}

//: vb_spread
OP vb vb_spread(vb a, vb b, vb c) {
    return (vb){neon_spread(a.a, b.a, c.a), neon_spread(a.b, b.b, c.b), neon_spread(a.c, b.c, c.c),
                neon_spread(a.d, b.d, c.d)};
}

//: vb_lut128
// Two tables of 64: tbl gives 0 where an index is outside its table, tbx keeps what is there. The table stays in
// eight registers.
OP vb vb_lut128(const uint8_t *table, vb idx) {
    const uint8x16x4_t low = vld1q_u8_x4(table), high = vld1q_u8_x4(table + 64);
    const uint8x16_t low7 = vdupq_n_u8(127), half = vdupq_n_u8(64);
    const uint8x16_t a = idx.a & low7, b = idx.b & low7, c = idx.c & low7, d = idx.d & low7;
    return (vb){vqtbx4q_u8(vqtbl4q_u8(low, a), high, a ^ half), vqtbx4q_u8(vqtbl4q_u8(low, b), high, b ^ half),
                vqtbx4q_u8(vqtbl4q_u8(low, c), high, c ^ half), vqtbx4q_u8(vqtbl4q_u8(low, d), high, d ^ half)};
}

//: vb_avg
OP vb vb_avg(vb a, vb b) {
    return (vb){vrhaddq_u8(a.a, b.a), vrhaddq_u8(a.b, b.b), vrhaddq_u8(a.c, b.c), vrhaddq_u8(a.d, b.d)};
}

//: vb_mirror
OP vb vb_mirror(vb v, vb s) {
    const uint8x16_t twos = vdupq_n_u8(0xaa);
    return (vb){vbslq_u8(vcltzq_s8((int8x16_t)s.a), twos - v.a, v.a),
                vbslq_u8(vcltzq_s8((int8x16_t)s.b), twos - v.b, v.b),
                vbslq_u8(vcltzq_s8((int8x16_t)s.c), twos - v.c, v.c),
                vbslq_u8(vcltzq_s8((int8x16_t)s.d), twos - v.d, v.d)};
}

//: neon_sign_b
OP uint8x16_t neon_sign_b(uint8x16_t v, uint8x16_t s) {
    const uint8x16_t m = vcltzq_s8((int8x16_t)s);
    return (v ^ m) - m;
}

//: vb_sign
OP vb vb_sign(vb v, vb s) {
    return (vb){neon_sign_b(v.a, s.a), neon_sign_b(v.b, s.b), neon_sign_b(v.c, s.c), neon_sign_b(v.d, s.d)};
}

//: vb_choose
OP vb vb_choose(vb s, vb a, vb b) {
    return (vb){vbslq_u8(vcltzq_s8((int8x16_t)s.a), a.a, b.a), vbslq_u8(vcltzq_s8((int8x16_t)s.b), a.b, b.b),
                vbslq_u8(vcltzq_s8((int8x16_t)s.c), a.c, b.c), vbslq_u8(vcltzq_s8((int8x16_t)s.d), a.d, b.d)};
}

//: vb_test
OP vm vb_test(vb v, vb bits) {
    return (vm){vtstq_u8(v.a, bits.a), vtstq_u8(v.b, bits.b), vtstq_u8(v.c, bits.c), vtstq_u8(v.d, bits.d)};
}

//: vb_flip
OP vb vb_flip(vb v, vm m) { return (vb){v.a ^ m.a, v.b ^ m.b, v.c ^ m.c, v.d ^ m.d}; }

//: vb_select
OP vb vb_select(vm m, vb a, vb b) {
    return (vb){vbslq_u8(m.a, a.a, b.a), vbslq_u8(m.b, a.b, b.b), vbslq_u8(m.c, a.c, b.c), vbslq_u8(m.d, a.d, b.d)};
}

//: vh_zip_lo
OP vh vh_zip_lo(vb lo, vb hi) {
    return (vh){(int16x8_t)vzip1q_u8(lo.a, hi.a), (int16x8_t)vzip1q_u8(lo.b, hi.b), (int16x8_t)vzip1q_u8(lo.c, hi.c),
                (int16x8_t)vzip1q_u8(lo.d, hi.d)};
}

//: vh_zip_hi
OP vh vh_zip_hi(vb lo, vb hi) {
    return (vh){(int16x8_t)vzip2q_u8(lo.a, hi.a), (int16x8_t)vzip2q_u8(lo.b, hi.b), (int16x8_t)vzip2q_u8(lo.c, hi.c),
                (int16x8_t)vzip2q_u8(lo.d, hi.d)};
}

//: neon_digits_lo
// Two instructions, as zipping and adding would be, and the sum needs no zip.
OP int16x8_t neon_digits_lo(uint8x16_t lo, uint8x16_t hi, int8_t radix) {
    return vmlal_s8(vmovl_s8(vget_low_s8((int8x16_t)lo)), vget_low_s8((int8x16_t)hi), vdup_n_s8(radix));
}

//: neon_digits_hi
OP int16x8_t neon_digits_hi(uint8x16_t lo, uint8x16_t hi, int8_t radix) {
    return vmlal_high_s8(vmovl_high_s8((int8x16_t)lo), (int8x16_t)hi, vdupq_n_s8(radix));
}

//: vh_digits_lo
OP vh vh_digits_lo(vb lo, vb hi, int radix) {
    const int8_t r = (int8_t)radix;
    return (vh){neon_digits_lo(lo.a, hi.a, r), neon_digits_lo(lo.b, hi.b, r), neon_digits_lo(lo.c, hi.c, r),
                neon_digits_lo(lo.d, hi.d, r)};
}

//: vh_digits_hi
OP vh vh_digits_hi(vb lo, vb hi, int radix) {
    const int8_t r = (int8_t)radix;
    return (vh){neon_digits_hi(lo.a, hi.a, r), neon_digits_hi(lo.b, hi.b, r), neon_digits_hi(lo.c, hi.c, r),
                neon_digits_hi(lo.d, hi.d, r)};
}

//: vh_zero
OP vh vh_zero(void) {
    int16x8_t z = vdupq_n_s16(0);
    return (vh){z, z, z, z};
}

//: vh_add
// By intrinsics, which wrap; + of signed vectors may not overflow.
OP vh vh_add(vh a, vh b) {
    return (vh){vaddq_s16(a.a, b.a), vaddq_s16(a.b, b.b), vaddq_s16(a.c, b.c), vaddq_s16(a.d, b.d)};
}

//: vh_sub
OP vh vh_sub(vh a, vh b) {
    return (vh){vsubq_s16(a.a, b.a), vsubq_s16(a.b, b.b), vsubq_s16(a.c, b.c), vsubq_s16(a.d, b.d)};
}

//: vh_mul
OP vh vh_mul(vh a, vh b) {
    return (vh){vmulq_s16(a.a, b.a), vmulq_s16(a.b, b.b), vmulq_s16(a.c, b.c), vmulq_s16(a.d, b.d)};
}

//: vh_load
OP vh vh_load(const int16_t *p) {
    return (vh){vld1q_s16(p), vld1q_s16(p + 8), vld1q_s16(p + 16), vld1q_s16(p + 24)};
}

//: vh_sign_high
OP vh vh_sign_high(vb v) {
    return (vh){vshrq_n_s16((int16x8_t)v.a, 8), vshrq_n_s16((int16x8_t)v.b, 8), vshrq_n_s16((int16x8_t)v.c, 8),
                vshrq_n_s16((int16x8_t)v.d, 8)};
}

//: neon_pairs
// Eight sums of two products: smull, smull2, addp. Not smlal2 for the second: it would add bytes 8 apart.
OP int16x8_t neon_pairs(uint8x16_t u, uint8x16_t s) {
    const int8x16_t a = (int8x16_t)u, b = (int8x16_t)s;
    return vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
}

//: vh_pairs
OP vh vh_pairs(vb u, vb s) {
    return (vh){neon_pairs(u.a, s.a), neon_pairs(u.b, s.b), neon_pairs(u.c, s.c), neon_pairs(u.d, s.d)};
}

//: vp
// A sum for each byte: 0 are those of a register's lower eight, 1 of its upper eight.
typedef struct { int16x8_t a0, a1, b0, b1, c0, c1, d0, d1; } vp;

//: vp_zero
OP vp vp_zero(void) {
    int16x8_t z = vdupq_n_s16(0);
    return (vp){z, z, z, z, z, z, z, z};
}

//: vp_add
// smlal and smlal2 multiply and add: two instructions for 16 products, where sums of pairs take four.
OP vp vp_add(vp sums, vb u, vb s) {
    const int8x16_t u0 = (int8x16_t)u.a, u1 = (int8x16_t)u.b;
    const int8x16_t u2 = (int8x16_t)u.c, u3 = (int8x16_t)u.d;
    const int8x16_t s0 = (int8x16_t)s.a, s1 = (int8x16_t)s.b, s2 = (int8x16_t)s.c, s3 = (int8x16_t)s.d;
    return (vp){vmlal_s8(sums.a0, vget_low_s8(u0), vget_low_s8(s0)), vmlal_high_s8(sums.a1, u0, s0),
                vmlal_s8(sums.b0, vget_low_s8(u1), vget_low_s8(s1)), vmlal_high_s8(sums.b1, u1, s1),
                vmlal_s8(sums.c0, vget_low_s8(u2), vget_low_s8(s2)), vmlal_high_s8(sums.c1, u2, s2),
                vmlal_s8(sums.d0, vget_low_s8(u3), vget_low_s8(s3)), vmlal_high_s8(sums.d1, u3, s3)};
}

//: vp_add_field
OP vp vp_add_field(vp sums, vb u, vx x, int f) {
    const uint8x16_t s = neon_field(x, f);
    return vp_add(sums, u, (vb){s, s, s, s});
}

//: vb_low_bytes
OP vb vb_low_bytes(vh a, vh b) {
    return (vb){vuzp1q_u8((uint8x16_t)a.a, (uint8x16_t)b.a), vuzp1q_u8((uint8x16_t)a.b, (uint8x16_t)b.b),
                vuzp1q_u8((uint8x16_t)a.c, (uint8x16_t)b.c), vuzp1q_u8((uint8x16_t)a.d, (uint8x16_t)b.d)};
}

//: vb_high_bytes
OP vb vb_high_bytes(vh a, vh b) {
    return (vb){vuzp2q_u8((uint8x16_t)a.a, (uint8x16_t)b.a), vuzp2q_u8((uint8x16_t)a.b, (uint8x16_t)b.b),
                vuzp2q_u8((uint8x16_t)a.c, (uint8x16_t)b.c), vuzp2q_u8((uint8x16_t)a.d, (uint8x16_t)b.d)};
}

//: vw_zero
OP vw vw_zero(void) {
    int32x4_t z = vdupq_n_s32(0);
    return (vw){z, z, z, z};
}

//: vw_splat
OP vw vw_splat(int32_t x) {
    int32x4_t v = vdupq_n_s32(x);
    return (vw){v, v, v, v};
}

//: vw_load
OP vw vw_load(const int32_t *p) {
    return (vw){vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)};
}

//: vw_store
OP void vw_store(int32_t *p, vw v) {
    vst1q_s32(p, v.a);
    vst1q_s32(p + 4, v.b);
    vst1q_s32(p + 8, v.c);
    vst1q_s32(p + 12, v.d);
}

//: vw_store_n
// There are no masked stores: halves of what is left. Not through memory: a call of memcpy would keep the accumulators
// of the loop before it on the stack, because callees save no whole vector register.
OP void vw_store_n(int32_t *p, vw v, int n) {
    if (n == 16) {
        vst1q_s32(p, v.a);
        vst1q_s32(p + 4, v.b);
        vst1q_s32(p + 8, v.c);
        vst1q_s32(p + 12, v.d);
        return;
    }
    if (n & 8) {
        vst1q_s32(p, v.a);
        vst1q_s32(p + 4, v.b);
        p += 8;
        v.a = v.c;
        v.b = v.d;
    }
    if (n & 4) {
        vst1q_s32(p, v.a);
        p += 4;
        v.a = v.b;
    }
    if (n & 2) {
        vst1_s32(p, vget_low_s32(v.a));
        p += 2;
        v.a = vextq_s32(v.a, v.a, 2);
    }
    if (n & 1) vst1q_lane_s32(p, v.a, 0);
}

//: vw_add
OP vw vw_add(vw a, vw b) {
    return (vw){vaddq_s32(a.a, b.a), vaddq_s32(a.b, b.b), vaddq_s32(a.c, b.c), vaddq_s32(a.d, b.d)};
}

//: vw_sub
OP vw vw_sub(vw a, vw b) {
    return (vw){vsubq_s32(a.a, b.a), vsubq_s32(a.b, b.b), vsubq_s32(a.c, b.c), vsubq_s32(a.d, b.d)};
}

//: vw_sra
OP vw vw_sra(vw v, int bits) { return (vw){v.a >> bits, v.b >> bits, v.c >> bits, v.d >> bits}; }

//: vw_max
OP vw vw_max(vw a, vw b) {
    return (vw){vmaxq_s32(a.a, b.a), vmaxq_s32(a.b, b.b), vmaxq_s32(a.c, b.c), vmaxq_s32(a.d, b.d)};
}

//: vw_hsum
OP int32_t vw_hsum(vw v) { return vaddvq_s32(vaddq_s32(vaddq_s32(v.a, v.b), vaddq_s32(v.c, v.d))); }

//: vw_hmax
OP int32_t vw_hmax(vw v) { return vmaxvq_s32(vmaxq_s32(vmaxq_s32(v.a, v.b), vmaxq_s32(v.c, v.d))); }

//: vw_dot4
// Sums of two fit int16 (2 * 127 * -128 = -32512); sadalp adds neighbours to int32.
OP vw vw_dot4(vw acc, vb u, vb s) {
    return (vw){vpadalq_s16(acc.a, neon_pairs(u.a, s.a)), vpadalq_s16(acc.b, neon_pairs(u.b, s.b)),
                vpadalq_s16(acc.c, neon_pairs(u.c, s.c)), vpadalq_s16(acc.d, neon_pairs(u.d, s.d))};
}

//: neon_dot_field
OP int32x4_t neon_dot_field(int32x4_t acc, uint8x16_t u, vx x, int f) {
    return vpadalq_s16(acc, neon_pairs(u, neon_field(x, f)));
}

//: vw_dot4_field
OP vw vw_dot4_field(vw acc, vb u, vx x, int f) {
    return (vw){neon_dot_field(acc.a, u.a, x, f), neon_dot_field(acc.b, u.b, x, f),
                neon_dot_field(acc.c, u.c, x, f), neon_dot_field(acc.d, u.d, x, f)};
}

//: values_bias
enum { values_bias = 0 };

//: vw_dot4_values
// Signed bytes as they are: sums of two fit int16 (2 * 127 * -128 = -32512).
OP vw vw_dot4_values(vw acc, vb v, vb s) { return vw_dot4(acc, v, s); }

//: vw_dot4_values_field
OP vw vw_dot4_values_field(vw acc, vb v, vx x, int f) { return vw_dot4_field(acc, v, x, f); }

//: vw_widen
// addp makes sums of pairs, which the kernel's bound keeps inside int16; sadalp adds neighbours to int32.
OP vw vw_widen(vw acc, vp v) {
    return (vw){vpadalq_s16(acc.a, vpaddq_s16(v.a0, v.a1)), vpadalq_s16(acc.b, vpaddq_s16(v.b0, v.b1)),
                vpadalq_s16(acc.c, vpaddq_s16(v.c0, v.c1)), vpadalq_s16(acc.d, vpaddq_s16(v.d0, v.d1))};
}

//: vw_rows
// saddw and saddw2 widen while they add: 16 instructions, no shuffle. Adding lanes as int16 first could overflow.
OP vw vw_rows(vw acc, vh lo, vh hi) {
    acc.a = vaddw_s16(vaddw_s16(acc.a, vget_low_s16(lo.a)), vget_low_s16(lo.b));
    acc.b = vaddw_high_s16(vaddw_high_s16(acc.b, lo.a), lo.b);
    acc.c = vaddw_s16(vaddw_s16(acc.c, vget_low_s16(hi.a)), vget_low_s16(hi.b));
    acc.d = vaddw_high_s16(vaddw_high_s16(acc.d, hi.a), hi.b);
    acc.a = vaddw_s16(vaddw_s16(acc.a, vget_low_s16(lo.c)), vget_low_s16(lo.d));
    acc.b = vaddw_high_s16(vaddw_high_s16(acc.b, lo.c), lo.d);
    acc.c = vaddw_s16(vaddw_s16(acc.c, vget_low_s16(hi.c)), vget_low_s16(hi.d));
    acc.d = vaddw_high_s16(vaddw_high_s16(acc.d, hi.c), hi.d);
    return acc;
}

//: vw_extend_lo
OP vw vw_extend_lo(vw acc, vh v) {
    return (vw){vaddw_s16(acc.a, vget_low_s16(v.a)), vaddw_s16(acc.b, vget_low_s16(v.b)),
                vaddw_s16(acc.c, vget_low_s16(v.c)), vaddw_s16(acc.d, vget_low_s16(v.d))};
}

//: vw_extend_hi
OP vw vw_extend_hi(vw acc, vh v) {
    return (vw){vaddw_high_s16(acc.a, v.a), vaddw_high_s16(acc.b, v.b), vaddw_high_s16(acc.c, v.c),
                vaddw_high_s16(acc.d, v.d)};
}

//: vw_zip_lo
OP vw vw_zip_lo(vh a, vh b) {
    return (vw){(int32x4_t)vzip1q_s16(a.a, b.a), (int32x4_t)vzip1q_s16(a.b, b.b), (int32x4_t)vzip1q_s16(a.c, b.c),
                (int32x4_t)vzip1q_s16(a.d, b.d)};
}

//: vw_zip_hi
OP vw vw_zip_hi(vh a, vh b) {
    return (vw){(int32x4_t)vzip2q_s16(a.a, b.a), (int32x4_t)vzip2q_s16(a.b, b.b), (int32x4_t)vzip2q_s16(a.c, b.c),
                (int32x4_t)vzip2q_s16(a.d, b.d)};
}

//: neon_store_lanes
OP void neon_store_lanes(uint8_t *p, int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
    vst1q_u8(p, (uint8x16_t)a);
    vst1q_u8(p + 16, (uint8x16_t)b);
    vst1q_u8(p + 32, (uint8x16_t)c);
    vst1q_u8(p + 48, (uint8x16_t)d);
}

//: vw_transpose_lanes
// A lane is a register: stores, in another order.
OP void vw_transpose_lanes(uint8_t *p, int64_t stride, vw v0, vw v1, vw v2, vw v3) {
    neon_store_lanes(p, v0.a, v1.a, v2.a, v3.a);
    neon_store_lanes(p + stride, v0.b, v1.b, v2.b, v3.b);
    neon_store_lanes(p + 2 * stride, v0.c, v1.c, v2.c, v3.c);
    neon_store_lanes(p + 3 * stride, v0.d, v1.d, v2.d, v3.d);
}

//: vw_store_s8
OP void vw_store_s8(int8_t *p, vw v) {
    int16x8_t x = vqmovn_high_s32(vqmovn_s32(v.a), v.b), y = vqmovn_high_s32(vqmovn_s32(v.c), v.d);
    vst1q_s8(p, vqmovn_high_s16(vqmovn_s16(x), y));
}

//: vf_splat
OP vf vf_splat(float x) {
    float32x4_t v = vdupq_n_f32(x);
    return (vf){v, v, v, v};
}

//: vf_load
OP vf vf_load(const float *p) { return (vf){vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }

//: vf_load_n
// There are no masked loads: whole registers, then up to three floats one by one.
OP vf vf_load_n(const float *p, int n) {
    if (n == 16) return (vf){vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
    const float32x4_t zero = vdupq_n_f32(0);
    const float *q = p + (n & ~3);
    float32x4_t last = zero;
    if (n & 3) last = vld1q_lane_f32(q, last, 0);
    if ((n & 3) > 1) last = vld1q_lane_f32(q + 1, last, 1);
    if ((n & 3) > 2) last = vld1q_lane_f32(q + 2, last, 2);
    vf r = {last, zero, zero, zero};
    if (n >= 4) r = (vf){vld1q_f32(p), last, zero, zero};
    if (n >= 8) r = (vf){r.a, vld1q_f32(p + 4), last, zero};
    if (n >= 12) r = (vf){r.a, r.b, vld1q_f32(p + 8), last};
    return r;
}

//: vf_store_n
// As for integers, in halves of what is left.
OP void vf_store_n(float *p, vf v, int n) {
    if (n == 16) {
        vst1q_f32(p, v.a);
        vst1q_f32(p + 4, v.b);
        vst1q_f32(p + 8, v.c);
        vst1q_f32(p + 12, v.d);
        return;
    }
    if (n & 8) {
        vst1q_f32(p, v.a);
        vst1q_f32(p + 4, v.b);
        p += 8;
        v.a = v.c;
        v.b = v.d;
    }
    if (n & 4) {
        vst1q_f32(p, v.a);
        p += 4;
        v.a = v.b;
    }
    if (n & 2) {
        vst1_f32(p, vget_low_f32(v.a));
        p += 2;
        v.a = vextq_f32(v.a, v.a, 2);
    }
    if (n & 1) vst1q_lane_f32(p, v.a, 0);
}

//: vf_mul
OP vf vf_mul(vf a, vf b) {
    return (vf){vmulq_f32(a.a, b.a), vmulq_f32(a.b, b.b), vmulq_f32(a.c, b.c), vmulq_f32(a.d, b.d)};
}

//: vf_from_w
OP vf vf_from_w(vw v) {
    return (vf){vcvtq_f32_s32(v.a), vcvtq_f32_s32(v.b), vcvtq_f32_s32(v.c), vcvtq_f32_s32(v.d)};
}

//: vw_abs_bits
// fabs only clears the sign, of NaN too.
OP vw vw_abs_bits(vf v) {
    return (vw){(int32x4_t)vabsq_f32(v.a), (int32x4_t)vabsq_f32(v.b), (int32x4_t)vabsq_f32(v.c),
                (int32x4_t)vabsq_f32(v.d)};
}

//: vw_round
// fcvtns: to nearest even, whatever the rounding mode.
OP vw vw_round(vf v) {
    return (vw){vcvtnq_s32_f32(v.a), vcvtnq_s32_f32(v.b), vcvtnq_s32_f32(v.c), vcvtnq_s32_f32(v.d)};
}

//== Floats
// The float ops of NEON. What each op means is written in scalar.h.

//: vf_store
OP void vf_store(float *p, vf v) {
    vst1q_f32(p, v.a);
    vst1q_f32(p + 4, v.b);
    vst1q_f32(p + 8, v.c);
    vst1q_f32(p + 12, v.d);
}

//: vf_add
OP vf vf_add(vf a, vf b) {
    return (vf){vaddq_f32(a.a, b.a), vaddq_f32(a.b, b.b), vaddq_f32(a.c, b.c), vaddq_f32(a.d, b.d)};
}

//: vf_sub
OP vf vf_sub(vf a, vf b) {
    return (vf){vsubq_f32(a.a, b.a), vsubq_f32(a.b, b.b), vsubq_f32(a.c, b.c), vsubq_f32(a.d, b.d)};
}

//: vf_div
OP vf vf_div(vf a, vf b) {
    return (vf){vdivq_f32(a.a, b.a), vdivq_f32(a.b, b.b), vdivq_f32(a.c, b.c), vdivq_f32(a.d, b.d)};
}

//: vf_fma
OP vf vf_fma(vf a, vf b, vf c) {
    return (vf){vfmaq_f32(c.a, a.a, b.a), vfmaq_f32(c.b, a.b, b.b), vfmaq_f32(c.c, a.c, b.c),
                vfmaq_f32(c.d, a.d, b.d)};
}

//: neon_greater
// fmax gives NaN where one is NaN, fmaxnm the number; here the second has to come out.
OP float32x4_t neon_greater(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }

//: vf_max
OP vf vf_max(vf a, vf b) {
    return (vf){neon_greater(a.a, b.a), neon_greater(a.b, b.b), neon_greater(a.c, b.c), neon_greater(a.d, b.d)};
}

//: neon_zero_below
OP float32x4_t neon_zero_below(float32x4_t v, float32x4_t x, float32x4_t limit) {
    return (float32x4_t)vbicq_u32((uint32x4_t)v, vcltq_f32(x, limit));
}

//: vf_zero_below
OP vf vf_zero_below(vf v, vf x, vf limit) {
    return (vf){neon_zero_below(v.a, x.a, limit.a), neon_zero_below(v.b, x.b, limit.b),
                neon_zero_below(v.c, x.c, limit.c), neon_zero_below(v.d, x.d, limit.d)};
}

//: vf_blend_n
OP vf vf_blend_n(vf v, vf rest, int n) {
    const int32x4_t a = {0, 1, 2, 3}, b = {4, 5, 6, 7}, c = {8, 9, 10, 11}, d = {12, 13, 14, 15};
    const int32x4_t count = vdupq_n_s32(n);
    return (vf){vbslq_f32(vcgtq_s32(count, a), v.a, rest.a), vbslq_f32(vcgtq_s32(count, b), v.b, rest.b),
                vbslq_f32(vcgtq_s32(count, c), v.c, rest.c), vbslq_f32(vcgtq_s32(count, d), v.d, rest.d)};
}

//: neon_pow2
OP float32x4_t neon_pow2(int32x4_t n) { return (float32x4_t)vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23); }

//: vf_pow2
OP vf vf_pow2(vw n) { return (vf){neon_pow2(n.a), neon_pow2(n.b), neon_pow2(n.c), neon_pow2(n.d)}; }

//: vf_hsum
// Not faddp, which adds neighbours: the tree adds halves.
OP float vf_hsum(vf v) {
    float32x4_t x = vaddq_f32(vaddq_f32(v.a, v.c), vaddq_f32(v.b, v.d));
    float32x2_t y = vadd_f32(vget_low_f32(x), vget_high_f32(x));
    return vget_lane_f32(y, 0) + vget_lane_f32(y, 1);
}

//: vf_hmax
OP float vf_hmax(vf v) {
    float32x4_t x = neon_greater(neon_greater(v.a, v.c), neon_greater(v.b, v.d));
    x = neon_greater(x, vextq_f32(x, x, 2));
    x = neon_greater(x, vextq_f32(x, x, 1));
    return vgetq_lane_f32(x, 0);
}

//: vf_from_f16
OP vf vf_from_f16(const uint16_t *p) {
    const float16x8_t x = (float16x8_t)vld1q_u16(p), y = (float16x8_t)vld1q_u16(p + 8);
    return (vf){vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x), vcvt_f32_f16(vget_low_f16(y)),
                vcvt_high_f32_f16(y)};
}

//: vf_to_f16
OP void vf_to_f16(uint16_t *p, vf v) {
    vst1q_u16(p, (uint16x8_t)vcvt_high_f16_f32(vcvt_f16_f32(v.a), v.b));
    vst1q_u16(p + 8, (uint16x8_t)vcvt_high_f16_f32(vcvt_f16_f32(v.c), v.d));
}

//: vf_from_bf16
OP vf vf_from_bf16(const uint16_t *p) {
    const uint16x8_t x = vld1q_u16(p), y = vld1q_u16(p + 8);
    return (vf){(float32x4_t)vshll_n_u16(vget_low_u16(x), 16), (float32x4_t)vshll_high_n_u16(x, 16),
                (float32x4_t)vshll_n_u16(vget_low_u16(y), 16), (float32x4_t)vshll_high_n_u16(y, 16)};
}

//: vw_load_s8
OP vw vw_load_s8(const int8_t *p) {
    const int8x16_t x = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_high_s8(x);
    return (vw){vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)};
}

//: vw_load_u8
OP vw vw_load_u8(const uint8_t *p) {
    const uint8x16_t x = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_high_u8(x);
    return (vw){(int32x4_t)vmovl_u16(vget_low_u16(low)), (int32x4_t)vmovl_high_u16(low),
                (int32x4_t)vmovl_u16(vget_low_u16(high)), (int32x4_t)vmovl_high_u16(high)};
}

//: vw_and
OP vw vw_and(vw a, vw b) { return (vw){a.a & b.a, a.b & b.b, a.c & b.c, a.d & b.d}; }

//: vw_shl
OP vw vw_shl(vw v, int bits) {
    return (vw){(int32x4_t)((uint32x4_t)v.a << bits), (int32x4_t)((uint32x4_t)v.b << bits),
                (int32x4_t)((uint32x4_t)v.c << bits), (int32x4_t)((uint32x4_t)v.d << bits)};
}

//: vf_splat_f16
OP vf vf_splat_f16(const uint16_t *p) {
    float32x4_t v = vcvt_f32_f16((float16x4_t)vld1_dup_u16(p));
    return (vf){v, v, v, v};
}

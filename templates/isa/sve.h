// The vector ops of SVE, for registers of 16, 32 and 64 bytes: a block is SVE_PARTS registers. The text is the same for
// every length; the level's flags say which one it is compiled for, because C holds only registers of a known size in a
// struct. What each op means is written in scalar.h; here are only the reasons for an instruction.
// zip, uzp and tbl work across the whole register, these ops in lanes of 16 bytes: where a register is longer than a
// lane, trn works on neighbours and tbl with indices inside the lanes puts bytes in order before or after it.
// Operators, not intrinsics, where there is one: clang 14 makes of `svand_x` a move and a predicated instruction.

//: includes
#include <arm_sve.h>

//: types
enum { SVE_BYTES = __ARM_FEATURE_SVE_BITS / 8, SVE_PARTS = 64 / SVE_BYTES, SVE_WORDS = SVE_BYTES / 4 };
typedef svuint8_t sve_u8 __attribute__((arm_sve_vector_bits(__ARM_FEATURE_SVE_BITS)));
typedef svint8_t sve_s8 __attribute__((arm_sve_vector_bits(__ARM_FEATURE_SVE_BITS)));
typedef svuint16_t sve_u16 __attribute__((arm_sve_vector_bits(__ARM_FEATURE_SVE_BITS)));
typedef svint16_t sve_s16 __attribute__((arm_sve_vector_bits(__ARM_FEATURE_SVE_BITS)));
typedef svuint32_t sve_u32 __attribute__((arm_sve_vector_bits(__ARM_FEATURE_SVE_BITS)));
typedef svint32_t sve_s32 __attribute__((arm_sve_vector_bits(__ARM_FEATURE_SVE_BITS)));
typedef svfloat32_t sve_f32 __attribute__((arm_sve_vector_bits(__ARM_FEATURE_SVE_BITS)));
typedef struct { sve_u8 z[SVE_PARTS]; } vb;
typedef struct { sve_s16 z[SVE_PARTS]; } vh;
typedef struct { sve_s32 z[SVE_PARTS]; } vw;
typedef struct { sve_f32 z[SVE_PARTS]; } vf;
typedef struct { sve_u8 z[SVE_PARTS]; } vm; // a byte is not 0 (flag set) or 0

//: prefetch
OP void prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }

//: prefetch_l2
OP void prefetch_l2(const void *p) { __builtin_prefetch(p, 0, 2); }

//: prefetch_once
OP void prefetch_once(const void *p) { __builtin_prefetch(p, 0, 0); }

//: sve_lane
// Where the own lane begins: 0 sixteen times, 16 sixteen times, ...
OP svuint8_t sve_lane(void) { return svand_n_u8_x(svptrue_b8(), svindex_u8(0, 1), 0xf0); }

//: sve_in_lane
// Indices below 16 of a lane's bytes become those of the register's; indices from 128 on stay so.
OP svuint8_t sve_in_lane(svuint8_t i) {
    return SVE_PARTS == 4 ? i : svorr_u8_x(svptrue_b8(), i, sve_lane());
}

//: sve_pick
// In every lane byte i comes from (i << up | i >> down) & 15.
OP svuint8_t sve_pick(svuint8_t v, uint8_t up, uint8_t down) {
    const svbool_t all = svptrue_b8();
    const svuint8_t i = svand_n_u8_x(all, svindex_u8(0, 1), 15);
    const svuint8_t from = svorr_u8_x(all, svlsl_n_u8_x(all, i, up), svlsr_n_u8_x(all, i, down));
    return svtbl_u8(v, svorr_u8_x(all, svand_n_u8_x(all, from, 15), sve_lane()));
}

//: sve_halves
// The two halves of every lane alternate, byte by byte: 0 8 1 9 2 10 ...
OP svuint8_t sve_halves(svuint8_t v) { return sve_pick(v, 3, 1); }

//: sve_evens
// In every lane the even bytes, then the odd ones: 0 2 4 ... 1 3 5 ...
OP svuint8_t sve_evens(svuint8_t v) { return sve_pick(v, 1, 3); }

//: sve_halves_h
// The two halves of every lane alternate, int16 by int16: 0 4 1 5 2 6 3 7.
OP svint16_t sve_halves_h(svint16_t v) {
    const svbool_t all = svptrue_b16();
    const svuint16_t i = svindex_u16(0, 1), odd = svlsl_n_u16_x(all, svand_n_u16_x(all, i, 1), 2);
    const svuint16_t from = svorr_u16_x(all, odd, svand_n_u16_x(all, svlsr_n_u16_x(all, i, 1), 3));
    return svtbl_s16(v, svorr_u16_x(all, from, svand_n_u16_x(all, i, 0xfff8)));
}

//: vb_load
OP vb vb_load(const void *p) {
    vb r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svld1_u8(svptrue_b8(), (const uint8_t *)p + SVE_BYTES * i);
    return r;
}

//: vb_store
OP void vb_store(void *p, vb v) {
    for (int i = 0; i < SVE_PARTS; ++i) svst1_u8(svptrue_b8(), (uint8_t *)p + SVE_BYTES * i, v.z[i]);
}

//: vb_splat
OP vb vb_splat(uint8_t x) {
    vb r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svdup_n_u8(x);
    return r;
}

//: vb_splat4
// One ld1rw, and one register for all parts.
OP vb vb_splat4(const int8_t *p) {
    vb r;
    uint32_t x;
    memcpy(&x, p, 4);
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svreinterpret_u8_u32(svdup_n_u32(x));
    return r;
}

//: vx
// ld1rw broadcasts from memory.
typedef const int8_t *vx;

//: vx_load
OP vx vx_load(const int8_t *p, int64_t at) { return p + at; }

//: vb_quad
OP vb vb_quad(const void *p) {
    vb r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svld1rq_u8(svptrue_b8(), (const uint8_t *)p);
    return r;
}

//: vb_nibbles
OP vb vb_nibbles(const void *p) {
    vb r;
    if (SVE_PARTS == 1) {
        const svbool_t first = svwhilelt_b8(0, 32);
        const sve_u8 v = svld1_u8(first, (const uint8_t *)p), twice = svext_u8(v, v, 32);
        r.z[0] = svsel_u8(first, v & (uint8_t)15, twice >> (uint8_t)4);
        return r;
    }
    for (int i = 0; i < SVE_PARTS / 2; ++i) {
        const sve_u8 v = svld1_u8(svptrue_b8(), (const uint8_t *)p + SVE_BYTES * i);
        r.z[i] = v & (uint8_t)15;
        r.z[SVE_PARTS / 2 + i] = v >> (uint8_t)4;
    }
    return r;
}

//: vb_and
OP vb vb_and(vb a, vb b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = a.z[i] & b.z[i];
    return a;
}

//: vb_add
OP vb vb_add(vb a, vb b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = a.z[i] + b.z[i];
    return a;
}

//: vb_field
OP vb vb_field(vb v, int bits, int mask) {
    for (int i = 0; i < SVE_PARTS; ++i) v.z[i] = (v.z[i] >> (uint8_t)bits) & (uint8_t)mask;
    return v;
}

//: vb_high
OP vb vb_high(vb v, int bits) {
    for (int i = 0; i < SVE_PARTS; ++i) v.z[i] = v.z[i] >> (uint8_t)bits;
    return v;
}

//: vb_lut16
// tbl gives 0 for every index beyond the register, as all from 128 on are.
OP vb vb_lut16(vb table, vb idx) {
    for (int i = 0; i < SVE_PARTS; ++i) table.z[i] = svtbl_u8(table.z[i], sve_in_lane(idx.z[i]));
    return table;
}

//: vb_lut_low
OP vb vb_lut_low(vb table, vb idx) {
    for (int i = 0; i < SVE_PARTS; ++i) table.z[i] = svtbl_u8(table.z[i], sve_in_lane(idx.z[i] & (uint8_t)0x8f));
    return table;
}

//: vb_lut8
OP vb vb_lut8(vb table, vb v, int bits) {
    return vb_lut16(table, bits != 0 ? vb_high(v, 4) : vb_and(v, vb_splat(7)));
}

//: vb_spread
OP vb vb_spread(vb a, vb b, vb c) {
    for (int i = 0; i < SVE_PARTS; ++i)
        a.z[i] = (a.z[i] >> 3 & 0x11) + (b.z[i] >> 2 & 0x22) + (c.z[i] >> 1 & 0x44);
    return a;
}

//: sve_table
// Table t of those that are as long as a register: tbl gives 0 where an index, less what lies before the table, is
// outside it.
OP svuint8_t sve_table(const uint8_t *table, svuint8_t i, int t) {
    const svbool_t all = svptrue_b8();
    return svtbl_u8(svld1_u8(all, table + SVE_BYTES * t), svsub_n_u8_x(all, i, (uint8_t)(SVE_BYTES * t)));
}

//: sve_tables
// Found in table t or t + 1.
OP svuint8_t sve_tables(const uint8_t *table, svuint8_t i, int t) {
    return svorr_u8_x(svptrue_b8(), sve_table(table, i, t), sve_table(table, i, t + 1));
}

//: vb_lut128
OP vb vb_lut128(const uint8_t *table, vb idx) {
    const svbool_t all = svptrue_b8();
    vb r;
    for (int i = 0; i < SVE_PARTS; ++i) {
        const svuint8_t low7 = svand_n_u8_x(all, idx.z[i], 127);
        svuint8_t found = sve_tables(table, low7, 0);
        if (SVE_PARTS > 1) found = svorr_u8_x(all, found, sve_tables(table, low7, 2));
        if (SVE_PARTS > 2) {
            found = svorr_u8_x(all, found, sve_tables(table, low7, 4));
            found = svorr_u8_x(all, found, sve_tables(table, low7, 6));
        }
        r.z[i] = found;
    }
    return r;
}

//: vb_avg
// SVE2 has urhadd. a + b = (a ^ b) + 2 (a & b), so the average rounded up is (a | b) - ((a ^ b) >> 1).
OP vb vb_avg(vb a, vb b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = (a.z[i] | b.z[i]) - ((a.z[i] ^ b.z[i]) >> 1);
    return a;
}

//: vb_mirror
OP vb vb_mirror(vb v, vb s) {
    for (int i = 0; i < SVE_PARTS; ++i) {
        const svbool_t negative = svcmplt_n_s8(svptrue_b8(), svreinterpret_s8_u8(s.z[i]), 0);
        v.z[i] = svsubr_u8_m(negative, v.z[i], svdup_n_u8(0xaa));
    }
    return v;
}

//: vb_sign
OP vb vb_sign(vb v, vb s) {
    for (int i = 0; i < SVE_PARTS; ++i) {
        const svbool_t negative = svcmplt_n_s8(svptrue_b8(), svreinterpret_s8_u8(s.z[i]), 0);
        v.z[i] = svsubr_n_u8_m(negative, v.z[i], 0);
    }
    return v;
}

//: vb_choose
OP vb vb_choose(vb s, vb a, vb b) {
    for (int i = 0; i < SVE_PARTS; ++i)
        b.z[i] = svsel_u8(svcmplt_n_s8(svptrue_b8(), svreinterpret_s8_u8(s.z[i]), 0), a.z[i], b.z[i]);
    return b;
}

//: sve_set
// The flags as a predicate. Compared where they are used: of predicates kept in a struct gcc 12 made wrong code.
OP svbool_t sve_set(svuint8_t flags) { return svcmpne_n_u8(svptrue_b8(), flags, 0); }

//: vb_test
OP vm vb_test(vb v, vb bits) {
    vm r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svand_u8_x(svptrue_b8(), v.z[i], bits.z[i]);
    return r;
}

//: vb_flip
OP vb vb_flip(vb v, vm m) {
    for (int i = 0; i < SVE_PARTS; ++i) v.z[i] = svnot_u8_m(v.z[i], sve_set(m.z[i]), v.z[i]);
    return v;
}

//: vb_select
OP vb vb_select(vm m, vb a, vb b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = svsel_u8(sve_set(m.z[i]), a.z[i], b.z[i]);
    return a;
}

//: vh_zip_lo
OP vh vh_zip_lo(vb lo, vb hi) {
    vh r;
    for (int i = 0; i < SVE_PARTS; ++i) {
        if (SVE_PARTS == 4) r.z[i] = svreinterpret_s16_u8(svzip1_u8(lo.z[i], hi.z[i]));
        else r.z[i] = svreinterpret_s16_u8(svtrn1_u8(sve_halves(lo.z[i]), sve_halves(hi.z[i])));
    }
    return r;
}

//: vh_zip_hi
OP vh vh_zip_hi(vb lo, vb hi) {
    vh r;
    for (int i = 0; i < SVE_PARTS; ++i) {
        if (SVE_PARTS == 4) r.z[i] = svreinterpret_s16_u8(svzip2_u8(lo.z[i], hi.z[i]));
        else r.z[i] = svreinterpret_s16_u8(svtrn2_u8(sve_halves(lo.z[i]), sve_halves(hi.z[i])));
    }
    return r;
}

//: sve_digits
// Pairs of bytes (lo, hi) as int16: their signs extended, hi times radix.
OP svint16_t sve_digits(svint16_t pairs, int radix) {
    const svbool_t all = svptrue_b16();
    return svmla_n_s16_x(all, svextb_s16_x(all, pairs), svasr_n_s16_x(all, pairs, 8), (int16_t)radix);
}

//: vh_digits_lo
OP vh vh_digits_lo(vb lo, vb hi, int radix) {
    vh r = vh_zip_lo(lo, hi);
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = sve_digits(r.z[i], radix);
    return r;
}

//: vh_digits_hi
OP vh vh_digits_hi(vb lo, vb hi, int radix) {
    vh r = vh_zip_hi(lo, hi);
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = sve_digits(r.z[i], radix);
    return r;
}

//: vh_zero
OP vh vh_zero(void) {
    vh r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svdup_n_s16(0);
    return r;
}

//: vh_add
// Unsigned, which wraps; + of signed vectors may not overflow.
OP vh vh_add(vh a, vh b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = (sve_s16)((sve_u16)a.z[i] + (sve_u16)b.z[i]);
    return a;
}

//: vh_sub
OP vh vh_sub(vh a, vh b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = (sve_s16)((sve_u16)a.z[i] - (sve_u16)b.z[i]);
    return a;
}

//: vh_mul
OP vh vh_mul(vh a, vh b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = (sve_s16)((sve_u16)a.z[i] * (sve_u16)b.z[i]);
    return a;
}

//: vh_load
OP vh vh_load(const int16_t *p) {
    vh r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svld1_s16(svptrue_b16(), p + SVE_BYTES / 2 * i);
    return r;
}

//: vh_sign_high
OP vh vh_sign_high(vb v) {
    vh r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = (sve_s16)v.z[i] >> 8;
    return r;
}

//: vh_pairs
// SVE2 multiplies bytes to int16. Here even and odd bytes are widened where they stand: mul and mla.
OP vh vh_pairs(vb u, vb s) {
    vh r;
    for (int i = 0; i < SVE_PARTS; ++i) {
        const sve_u16 v = (sve_u16)u.z[i], odd = (sve_u16)((sve_s16)s.z[i] >> 8);
        const sve_u16 even = (sve_u16)((sve_s16)((sve_u16)s.z[i] << 8) >> 8);
        r.z[i] = (sve_s16)((v & 255) * even + (v >> 8) * odd);
    }
    return r;
}

//: vp
typedef vh vp;

//: vp_zero
OP vp vp_zero(void) { return vh_zero(); }

//: vp_add
OP vp vp_add(vp sums, vb u, vb s) { return vh_add(sums, vh_pairs(u, s)); }

//: vp_add_field
OP vp vp_add_field(vp sums, vb u, vx x, int f) { return vp_add(sums, u, vb_splat4(x + 4 * f)); }

//: vb_low_bytes
OP vb vb_low_bytes(vh a, vh b) {
    vb r;
    for (int i = 0; i < SVE_PARTS; ++i) {
        const svuint8_t x = svreinterpret_u8_s16(a.z[i]), y = svreinterpret_u8_s16(b.z[i]);
        if (SVE_PARTS == 4) r.z[i] = svuzp1_u8(x, y);
        else r.z[i] = sve_evens(svtrn1_u8(x, y));
    }
    return r;
}

//: vb_high_bytes
OP vb vb_high_bytes(vh a, vh b) {
    vb r;
    for (int i = 0; i < SVE_PARTS; ++i) {
        const svuint8_t x = svreinterpret_u8_s16(a.z[i]), y = svreinterpret_u8_s16(b.z[i]);
        if (SVE_PARTS == 4) r.z[i] = svuzp2_u8(x, y);
        else r.z[i] = sve_evens(svtrn2_u8(x, y));
    }
    return r;
}

//: vw_zero
OP vw vw_zero(void) {
    vw r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svdup_n_s32(0);
    return r;
}

//: vw_splat
OP vw vw_splat(int32_t x) {
    vw r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svdup_n_s32(x);
    return r;
}

//: vw_load
OP vw vw_load(const int32_t *p) {
    vw r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svld1_s32(svptrue_b32(), p + SVE_WORDS * i);
    return r;
}

//: vw_store
OP void vw_store(int32_t *p, vw v) {
    for (int i = 0; i < SVE_PARTS; ++i) svst1_s32(svptrue_b32(), p + SVE_WORDS * i, v.z[i]);
}

//: vw_store_n
OP void vw_store_n(int32_t *p, vw v, int n) {
    for (int i = 0; i < SVE_PARTS; ++i) svst1_s32(svwhilelt_b32_s32(SVE_WORDS * i, n), p + SVE_WORDS * i, v.z[i]);
}

//: sve_sum
OP sve_s32 sve_sum(sve_s32 a, sve_s32 b) { return (sve_s32)((sve_u32)a + (sve_u32)b); }

//: vw_add
OP vw vw_add(vw a, vw b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = sve_sum(a.z[i], b.z[i]);
    return a;
}

//: vw_sub
OP vw vw_sub(vw a, vw b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = (sve_s32)((sve_u32)a.z[i] - (sve_u32)b.z[i]);
    return a;
}

//: vw_sra
OP vw vw_sra(vw v, int bits) {
    for (int i = 0; i < SVE_PARTS; ++i) v.z[i] = v.z[i] >> bits;
    return v;
}

//: vw_max
OP vw vw_max(vw a, vw b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = svmax_s32_x(svptrue_b32(), a.z[i], b.z[i]);
    return a;
}

//: vw_hsum
// saddv adds to int64: its low half is the sum mod 2^32.
OP int32_t vw_hsum(vw v) {
    for (int i = 1; i < SVE_PARTS; ++i) v.z[0] = sve_sum(v.z[0], v.z[i]);
    return (int32_t)svaddv_s32(svptrue_b32(), v.z[0]);
}

//: vw_hmax
OP int32_t vw_hmax(vw v) {
    for (int i = 1; i < SVE_PARTS; ++i) v.z[0] = svmax_s32_x(svptrue_b32(), v.z[0], v.z[i]);
    return svmaxv_s32(svptrue_b32(), v.z[0]);
}

//: vw_dot4
// sdot takes both operands as signed, so u is at most 127 (code_max).
OP vw vw_dot4(vw acc, vb u, vb s) {
    for (int i = 0; i < SVE_PARTS; ++i)
        acc.z[i] = svdot_s32(acc.z[i], svreinterpret_s8_u8(u.z[i]), svreinterpret_s8_u8(s.z[i]));
    return acc;
}

//: vw_dot4_field
OP vw vw_dot4_field(vw acc, vb u, vx x, int f) { return vw_dot4(acc, u, vb_splat4(x + 4 * f)); }

//: values_bias
enum { values_bias = 0 };

//: vw_dot4_values
OP vw vw_dot4_values(vw acc, vb v, vb s) { return vw_dot4(acc, v, s); }

//: vw_dot4_values_field
OP vw vw_dot4_values_field(vw acc, vb v, vx x, int f) { return vw_dot4_field(acc, v, x, f); }

//: vw_widen
// SVE2 has sadalp.
OP vw vw_widen(vw acc, vp v) {
    for (int i = 0; i < SVE_PARTS; ++i) {
        const sve_s32 odd = (sve_s32)v.z[i] >> 16, even = (sve_s32)((sve_u32)v.z[i] << 16) >> 16;
        acc.z[i] = sve_sum(sve_sum(acc.z[i], even), odd);
    }
    return acc;
}

//: sve_rows
// The eight rows of two lanes, as int32: what a register of 64 bytes holds.
OP sve_s32 sve_rows(sve_s16 v) { return sve_sum(svunpklo_s32(v), svunpkhi_s32(v)); }

//: vw_rows
// unpklo and unpkhi widen halves of a register: of 32 bytes a lane each, of 16 bytes four rows. Of 64 bytes two lanes,
// whose sums are added once more: the first eight words of lo with the last eight, beside those of hi.
OP vw vw_rows(vw acc, vh lo, vh hi) {
    if (SVE_PARTS == 1) {
        const sve_s32 x = sve_rows(lo.z[0]), y = sve_rows(hi.z[0]);
        const svbool_t first = svptrue_pat_b32(SV_VL8);
        acc.z[0] = sve_sum(acc.z[0], sve_sum(svsplice_s32(first, x, y), svsel_s32(first, svext_s32(x, x, 8), y)));
        return acc;
    }
    for (int i = 0; i < SVE_PARTS; ++i) {
        acc.z[0] = sve_sum(acc.z[0], svunpklo_s32(lo.z[i]));
        acc.z[SVE_PARTS / 4] = sve_sum(acc.z[SVE_PARTS / 4], svunpkhi_s32(lo.z[i]));
        acc.z[SVE_PARTS / 2] = sve_sum(acc.z[SVE_PARTS / 2], svunpklo_s32(hi.z[i]));
        acc.z[SVE_PARTS / 2 + SVE_PARTS / 4] = sve_sum(acc.z[SVE_PARTS / 2 + SVE_PARTS / 4], svunpkhi_s32(hi.z[i]));
    }
    return acc;
}

//: vw_zip_lo
OP vw vw_zip_lo(vh a, vh b) {
    vw r;
    for (int i = 0; i < SVE_PARTS; ++i) {
        if (SVE_PARTS == 4) r.z[i] = svreinterpret_s32_s16(svzip1_s16(a.z[i], b.z[i]));
        else r.z[i] = svreinterpret_s32_s16(svtrn1_s16(sve_halves_h(a.z[i]), sve_halves_h(b.z[i])));
    }
    return r;
}

//: vw_zip_hi
OP vw vw_zip_hi(vh a, vh b) {
    vw r;
    for (int i = 0; i < SVE_PARTS; ++i) {
        if (SVE_PARTS == 4) r.z[i] = svreinterpret_s32_s16(svzip2_s16(a.z[i], b.z[i]));
        else r.z[i] = svreinterpret_s32_s16(svtrn2_s16(sve_halves_h(a.z[i]), sve_halves_h(b.z[i])));
    }
    return r;
}

//: vw_extend_lo
// Each int16 twice, then an arithmetic shift.
OP vw vw_extend_lo(vw acc, vh v) {
    const vw x = vw_zip_lo(v, v);
    for (int i = 0; i < SVE_PARTS; ++i) acc.z[i] = (sve_s32)((sve_u32)acc.z[i] + (sve_u32)(x.z[i] >> 16));
    return acc;
}

//: vw_extend_hi
OP vw vw_extend_hi(vw acc, vh v) {
    const vw x = vw_zip_hi(v, v);
    for (int i = 0; i < SVE_PARTS; ++i) acc.z[i] = (sve_s32)((sve_u32)acc.z[i] + (sve_u32)(x.z[i] >> 16));
    return acc;
}

//: sve_store_lanes
// Lane j of v, from p + stride j: a store for each, of that lane alone.
OP void sve_store_lanes(uint8_t *p, int64_t stride, vw v) {
    for (int j = 0; j < 4; ++j) {
        const int before = 16 * j % SVE_BYTES; // bytes of the register before the lane
        const svbool_t lane = svcmpeq_n_u8(svptrue_b8(), sve_lane(), (uint8_t)before);
        svst1_u8(lane, p + stride * j - before, svreinterpret_u8_s32(v.z[16 * j / SVE_BYTES]));
    }
}

//: vw_transpose_lanes
OP void vw_transpose_lanes(uint8_t *p, int64_t stride, vw v0, vw v1, vw v2, vw v3) {
    sve_store_lanes(p, stride, v0);
    sve_store_lanes(p + 16, stride, v1);
    sve_store_lanes(p + 32, stride, v2);
    sve_store_lanes(p + 48, stride, v3);
}

//: vw_store_s8
// st1b of words stores their low bytes.
OP void vw_store_s8(int8_t *p, vw v) {
    const svbool_t all = svptrue_b32();
    for (int i = 0; i < SVE_PARTS; ++i)
        svst1b_s32(all, p + SVE_WORDS * i, svmax_n_s32_x(all, svmin_n_s32_x(all, v.z[i], 127), -128));
}

//: vf_splat
OP vf vf_splat(float x) {
    vf r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svdup_n_f32(x);
    return r;
}

//: vf_load
OP vf vf_load(const float *p) {
    vf r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svld1_f32(svptrue_b32(), p + SVE_WORDS * i);
    return r;
}

//: vf_load_n
// Elements outside the predicate are not touched, so they may lie on an unmapped page.
OP vf vf_load_n(const float *p, int n) {
    vf r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svld1_f32(svwhilelt_b32_s32(SVE_WORDS * i, n), p + SVE_WORDS * i);
    return r;
}

//: vf_store_n
OP void vf_store_n(float *p, vf v, int n) {
    for (int i = 0; i < SVE_PARTS; ++i) svst1_f32(svwhilelt_b32_s32(SVE_WORDS * i, n), p + SVE_WORDS * i, v.z[i]);
}

//: vf_mul
OP vf vf_mul(vf a, vf b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = a.z[i] * b.z[i];
    return a;
}

//: vf_from_w
OP vf vf_from_w(vw v) {
    vf r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svcvt_f32_s32_x(svptrue_b32(), v.z[i]);
    return r;
}

//: vw_abs_bits
OP vw vw_abs_bits(vf v) {
    vw r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = (sve_s32)v.z[i] & 0x7fffffff;
    return r;
}

//: vw_round
// frintn: to nearest even, whatever the rounding mode.
OP vw vw_round(vf v) {
    vw r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svcvt_s32_f32_x(svptrue_b32(), svrintn_f32_x(svptrue_b32(), v.z[i]));
    return r;
}

//== Floats
// The float ops of SVE. What each op means is written in scalar.h.

//: vf_store
OP void vf_store(float *p, vf v) {
    for (int i = 0; i < SVE_PARTS; ++i) svst1_f32(svptrue_b32(), p + SVE_WORDS * i, v.z[i]);
}

//: vf_add
OP vf vf_add(vf a, vf b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = a.z[i] + b.z[i];
    return a;
}

//: vf_sub
OP vf vf_sub(vf a, vf b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = a.z[i] - b.z[i];
    return a;
}

//: vf_div
OP vf vf_div(vf a, vf b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = a.z[i] / b.z[i];
    return a;
}

//: vf_fma
OP vf vf_fma(vf a, vf b, vf c) {
    for (int i = 0; i < SVE_PARTS; ++i) c.z[i] = svmla_f32_x(svptrue_b32(), c.z[i], a.z[i], b.z[i]);
    return c;
}

//: sve_greater
// fmax gives NaN where one is NaN, fmaxnm the number; here the second has to come out.
OP sve_f32 sve_greater(sve_f32 a, sve_f32 b) { return svsel_f32(svcmpgt_f32(svptrue_b32(), a, b), a, b); }

//: vf_max
OP vf vf_max(vf a, vf b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = sve_greater(a.z[i], b.z[i]);
    return a;
}

//: vf_zero_below
OP vf vf_zero_below(vf v, vf x, vf limit) {
    for (int i = 0; i < SVE_PARTS; ++i)
        v.z[i] = svsel_f32(svcmplt_f32(svptrue_b32(), x.z[i], limit.z[i]), svdup_n_f32(0.0f), v.z[i]);
    return v;
}

//: vf_blend_n
OP vf vf_blend_n(vf v, vf rest, int n) {
    for (int i = 0; i < SVE_PARTS; ++i) v.z[i] = svsel_f32(svwhilelt_b32_s32(SVE_WORDS * i, n), v.z[i], rest.z[i]);
    return v;
}

//: vf_pow2
OP vf vf_pow2(vw n) {
    vf r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svreinterpret_f32_u32(((sve_u32)n.z[i] + 127) << 23);
    return r;
}

//: sve_plus
OP sve_f32 sve_plus(sve_f32 a, sve_f32 b) { return a + b; }

//: vf_hsum
// Not faddv, which adds neighbours: the tree adds halves. Elements behind the half in use are left over.
OP float vf_hsum(vf v) {
    for (int half = SVE_PARTS / 2; half; half >>= 1)
        for (int i = 0; i < half; ++i) v.z[i] = v.z[i] + v.z[i + half];
    sve_f32 x = v.z[0];
    if (SVE_WORDS >= 16) x = sve_plus(x, svext_f32(x, x, 8));
    if (SVE_WORDS >= 8) x = sve_plus(x, svext_f32(x, x, 4));
    x = sve_plus(x, svext_f32(x, x, 2));
    x = sve_plus(x, svext_f32(x, x, 1));
    return svlasta_f32(svpfalse_b(), x);
}

//: vf_hmax
OP float vf_hmax(vf v) {
    for (int half = SVE_PARTS / 2; half; half >>= 1)
        for (int i = 0; i < half; ++i) v.z[i] = sve_greater(v.z[i], v.z[i + half]);
    sve_f32 x = v.z[0];
    if (SVE_WORDS >= 16) x = sve_greater(x, svext_f32(x, x, 8));
    if (SVE_WORDS >= 8) x = sve_greater(x, svext_f32(x, x, 4));
    x = sve_greater(x, svext_f32(x, x, 2));
    x = sve_greater(x, svext_f32(x, x, 1));
    return svlasta_f32(svpfalse_b(), x);
}

//: sve_from_f16
// The half floats are the low halves of the words.
OP sve_f32 sve_from_f16(sve_u32 h) { return svcvt_f32_f16_x(svptrue_b32(), svreinterpret_f16_u32(h)); }

//: vf_from_f16
OP vf vf_from_f16(const uint16_t *p) {
    vf r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = sve_from_f16(svld1uh_u32(svptrue_b32(), p + SVE_WORDS * i));
    return r;
}

//: vf_to_f16
OP void vf_to_f16(uint16_t *p, vf v) {
    for (int i = 0; i < SVE_PARTS; ++i)
        svst1h_u32(svptrue_b32(), p + SVE_WORDS * i, svreinterpret_u32_f16(svcvt_f16_f32_x(svptrue_b32(), v.z[i])));
}

//: vf_from_bf16
OP vf vf_from_bf16(const uint16_t *p) {
    vf r;
    for (int i = 0; i < SVE_PARTS; ++i) {
        const sve_u32 h = svld1uh_u32(svptrue_b32(), p + SVE_WORDS * i);
        r.z[i] = svreinterpret_f32_u32(h << 16);
    }
    return r;
}

//: vw_load_s8
OP vw vw_load_s8(const int8_t *p) {
    vw r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svld1sb_s32(svptrue_b32(), p + SVE_WORDS * i);
    return r;
}

//: vw_load_u8
OP vw vw_load_u8(const uint8_t *p) {
    vw r;
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = svld1ub_s32(svptrue_b32(), p + SVE_WORDS * i);
    return r;
}

//: vw_and
OP vw vw_and(vw a, vw b) {
    for (int i = 0; i < SVE_PARTS; ++i) a.z[i] = a.z[i] & b.z[i];
    return a;
}

//: vw_shl
OP vw vw_shl(vw v, int bits) {
    for (int i = 0; i < SVE_PARTS; ++i) v.z[i] = (sve_s32)((sve_u32)v.z[i] << (uint32_t)bits);
    return v;
}

//: vf_splat_f16
OP vf vf_splat_f16(const uint16_t *p) {
    vf r;
    uint16_t h;
    memcpy(&h, p, 2);
    for (int i = 0; i < SVE_PARTS; ++i) r.z[i] = sve_from_f16(svdup_n_u32(h));
    return r;
}

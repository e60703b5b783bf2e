// The vector ops of NEON with FEAT_DotProd, over that of NEON.

//: vw_dot4
// sdot takes both operands as signed, so u is at most 127 (code_max): a field at scale 64 would be -128.
OP vw vw_dot4(vw acc, vb u, vb s) {
    return (vw){vdotq_s32(acc.a, (int8x16_t)u.a, (int8x16_t)s.a), vdotq_s32(acc.b, (int8x16_t)u.b, (int8x16_t)s.b),
                vdotq_s32(acc.c, (int8x16_t)u.c, (int8x16_t)s.c), vdotq_s32(acc.d, (int8x16_t)u.d, (int8x16_t)s.d)};
}

//: vx
typedef struct { int8x16_t x; } vx;

//: vx_load
// sdot takes four bytes of a register for all its lanes: nothing is broadcast.
OP vx vx_load(const int8_t *p, int64_t at) { return (vx){vld1q_s8(p + at)}; }

//: neon_field
OP uint8x16_t neon_field(vx x, int f) { return (uint8x16_t)vdupq_n_s32(((int32x4_t)x.x)[f]); }

//: neon_dot_field
// The number of a lane is part of the instruction: clang takes no argument of a function for it.
OP int32x4_t neon_dot_field(int32x4_t acc, uint8x16_t u, vx x, int f) {
    const int8x16_t s = (int8x16_t)u;
    switch (f) {
        case 0: return vdotq_laneq_s32(acc, s, x.x, 0);
        case 1: return vdotq_laneq_s32(acc, s, x.x, 1);
        case 2: return vdotq_laneq_s32(acc, s, x.x, 2);
        default: return vdotq_laneq_s32(acc, s, x.x, 3);
    }
}

// The vocabulary of NEON with FEAT_DotProd, over that of NEON.

//: vw_dot4
// sdot takes both operands as signed, so u is at most 127 (code_max): a field at scale 64 would be -128.
WORD vw vw_dot4(vw acc, vb u, vb s) {
    return (vw){vdotq_s32(acc.a, (int8x16_t)u.a, (int8x16_t)s.a), vdotq_s32(acc.b, (int8x16_t)u.b, (int8x16_t)s.b),
                vdotq_s32(acc.c, (int8x16_t)u.c, (int8x16_t)s.c), vdotq_s32(acc.d, (int8x16_t)u.d, (int8x16_t)s.d)};
}

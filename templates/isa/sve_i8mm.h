// The vector ops of SVE with FEAT_I8MM, over that of SVE.

//: vw_dot4
// usdot takes u as unsigned: all four fields of I2_S can stay in place.
OP vw vw_dot4(vw acc, vb u, vb s) {
    for (int i = 0; i < SVE_PARTS; ++i) acc.z[i] = svusdot_s32(acc.z[i], u.z[i], svreinterpret_s8_u8(s.z[i]));
    return acc;
}

//: values_bias
enum { values_bias = 128 };

//== Products of 2 x 8 by 8 x 2 bytes
// The ops for products of 2 x 8 by 8 x 2 bytes with SVE and FEAT_I8MM: usmmla, in each 16 bytes of a register.

//: vw_mmla
OP vw vw_mmla(vw acc, vb u, vb s) {
    for (int i = 0; i < SVE_PARTS; ++i) acc.z[i] = svusmmla_s32(acc.z[i], u.z[i], svreinterpret_s8_u8(s.z[i]));
    return acc;
}

//: compiler_barrier
// As on NEON: compilers would load more weights first than registers are left for.
OP void compiler_barrier(void) { __asm__ volatile("" : : : "memory"); }

//: vw_even
OP vw vw_even(vw a, vw b) {
    vw r;
    if (SVE_PARTS == 1) r.z[0] = svuzp1_s32(a.z[0], b.z[0]);
    for (int i = 0; i < SVE_PARTS / 2; ++i) {
        r.z[i] = svuzp1_s32(a.z[2 * i], a.z[2 * i + 1]);
        r.z[SVE_PARTS / 2 + i] = svuzp1_s32(b.z[2 * i], b.z[2 * i + 1]);
    }
    return r;
}

//: vw_odd
OP vw vw_odd(vw a, vw b) {
    vw r;
    if (SVE_PARTS == 1) r.z[0] = svuzp2_s32(a.z[0], b.z[0]);
    for (int i = 0; i < SVE_PARTS / 2; ++i) {
        r.z[i] = svuzp2_s32(a.z[2 * i], a.z[2 * i + 1]);
        r.z[SVE_PARTS / 2 + i] = svuzp2_s32(b.z[2 * i], b.z[2 * i + 1]);
    }
    return r;
}

//: vb_store_zip4
// st2w zips while it stores.
OP void vb_store_zip4(void *p, vb a, vb b) {
    for (int i = 0; i < SVE_PARTS; ++i)
        svst2_u32(svptrue_b32(), (uint32_t *)p + 2 * SVE_WORDS * i,
                  svcreate2_u32(svreinterpret_u32_u8(a.z[i]), svreinterpret_u32_u8(b.z[i])));
}

//: vb_store_zip8
OP void vb_store_zip8(void *p, vb a, vb b) {
    for (int i = 0; i < SVE_PARTS; ++i)
        svst2_u64(svptrue_b64(), (uint64_t *)p + SVE_WORDS * i,
                  svcreate2_u64(svreinterpret_u64_u8(a.z[i]), svreinterpret_u64_u8(b.z[i])));
}

// The vocabulary of SVE with FEAT_I8MM, over that of SVE.

//: vw_dot4
// usdot takes u as unsigned: all four fields of I2_S can stay in place.
WORD vw vw_dot4(vw acc, vb u, vb s) {
    for (int i = 0; i < SVE_PARTS; ++i) acc.z[i] = svusdot_s32(acc.z[i], u.z[i], svreinterpret_s8_u8(s.z[i]));
    return acc;
}

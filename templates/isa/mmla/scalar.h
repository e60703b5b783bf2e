// Words for products of 2 x 8 by 8 x 2 bytes. Levels without them have no kernels of the algorithm "mmla".

//: vw_mmla
// In each lane of 16 bytes: two rows of u and two of s, 8 bytes each. acc[2 r + t] += sum over i of row r of u (uint8)
// * row t of s (int8), mod 2^32.
WORD vw vw_mmla(vw acc, vb u, vb s) {
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; ++j)
            acc.w[i] = (int32_t)((uint32_t)acc.w[i] + (uint32_t)(u.b[i / 4 * 16 + i % 4 / 2 * 8 + j] *
                                                                 (int8_t)s.b[i / 4 * 16 + i % 2 * 8 + j]));
    return acc;
}

//: hold_loads
// What is loaded behind it in the text is not loaded before it.
WORD void hold_loads(void) {}

//: vw_even
// Elements 0, 2, 4, ... of a, then those of b.
WORD vw vw_even(vw a, vw b) {
    vw r;
    for (int i = 0; i < 8; ++i) {
        r.w[i] = a.w[2 * i];
        r.w[8 + i] = b.w[2 * i];
    }
    return r;
}

//: vw_odd
// Elements 1, 3, 5, ... of a, then those of b.
WORD vw vw_odd(vw a, vw b) {
    vw r;
    for (int i = 0; i < 8; ++i) {
        r.w[i] = a.w[2 * i + 1];
        r.w[8 + i] = b.w[2 * i + 1];
    }
    return r;
}

//: vb_store_zip4
// 128 bytes: four of a, four of b, and so on.
WORD void vb_store_zip4(void *p, vb a, vb b) {
    for (int i = 0; i < 16; ++i) {
        memcpy((uint8_t *)p + 8 * i, a.b + 4 * i, 4);
        memcpy((uint8_t *)p + 8 * i + 4, b.b + 4 * i, 4);
    }
}

//: vb_store_zip8
// 128 bytes: eight of a, eight of b, and so on.
WORD void vb_store_zip8(void *p, vb a, vb b) {
    for (int i = 0; i < 8; ++i) {
        memcpy((uint8_t *)p + 16 * i, a.b + 8 * i, 8);
        memcpy((uint8_t *)p + 16 * i + 8, b.b + 8 * i, 8);
    }
}

// The ops of a toy level: those of plain C, one of them written in another way.

//: vw_sub
// w[i] = a[i] - b[i] mod 2^32, as a sum
OP vw vw_sub(vw a, vw b) {
    for (int i = 0; i < 16; ++i) a.w[i] = (int32_t)((uint32_t)a.w[i] + (~(uint32_t)b.w[i] + 1u));
    return a;
}

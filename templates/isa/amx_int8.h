// The vector ops of AMX-INT8 is that of AVX-512 VBMI and the ops for tiles.

//== Tiles
// The ops for tiles on AMX-INT8. The instructions name their registers, so each op chooses among them by numbers
// that are constants where it is used. Assembly and not the compilers' intrinsics: gcc 12's do not say that a load of a
// tile reads memory, and stores before it may then come after it.

//: vt
// The registers belong to the thread; there is nothing to pass on.
typedef struct { char none; } vt;

//: vt_begin
OP void vt_begin(vt *t, int rows0, int rows1) {
    // palette 1; from byte 16 on the bytes of a row of each tile (int16), from byte 48 on its rows
    _Alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; ++i) {
        config[16 + 2 * i] = 64;
        config[48 + i] = (uint8_t)(i > 5 ? 16 : i < 2 || i == 4 ? rows0 : rows1);
    }
    (void)t;
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
}

//: vt_begin_half
OP void vt_begin_half(vt *t, int rows0, int rows1) {
    _Alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; ++i) {
        config[16 + 2 * i] = i == 4 || i == 5 ? 32 : 64;
        config[48 + i] = (uint8_t)(i > 5 ? 8 : i < 2 || i == 4 ? rows0 : rows1);
    }
    (void)t;
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
}

//: vt_end
// Registers in use cost the system 8 KiB to save whenever it runs another thread.
OP void vt_end(vt *t) {
    (void)t;
    __asm__ volatile("tilerelease" : : : "memory");
}

//: vt_zero
OP void vt_zero(vt *t, int tile) {
    (void)t;
    switch (tile) {
    case 0: __asm__ volatile("tilezero %%tmm0" : :); break;
    case 1: __asm__ volatile("tilezero %%tmm1" : :); break;
    case 2: __asm__ volatile("tilezero %%tmm2" : :); break;
    case 3: __asm__ volatile("tilezero %%tmm3" : :); break;
    }
}

//: vt_load
OP void vt_load(vt *t, int tile, const void *p, int64_t stride) {
    (void)t;
    switch (tile) {
    case 0: __asm__ volatile("tileloadd (%0,%1,1), %%tmm0" : : "r"(p), "r"(stride) : "memory"); break;
    case 1: __asm__ volatile("tileloadd (%0,%1,1), %%tmm1" : : "r"(p), "r"(stride) : "memory"); break;
    case 2: __asm__ volatile("tileloadd (%0,%1,1), %%tmm2" : : "r"(p), "r"(stride) : "memory"); break;
    case 3: __asm__ volatile("tileloadd (%0,%1,1), %%tmm3" : : "r"(p), "r"(stride) : "memory"); break;
    case 4: __asm__ volatile("tileloadd (%0,%1,1), %%tmm4" : : "r"(p), "r"(stride) : "memory"); break;
    case 5: __asm__ volatile("tileloadd (%0,%1,1), %%tmm5" : : "r"(p), "r"(stride) : "memory"); break;
    case 6: __asm__ volatile("tileloadd (%0,%1,1), %%tmm6" : : "r"(p), "r"(stride) : "memory"); break;
    case 7: __asm__ volatile("tileloadd (%0,%1,1), %%tmm7" : : "r"(p), "r"(stride) : "memory"); break;
    }
}

//: vt_load_half
// The configuration says how much there is to load.
OP void vt_load_half(vt *t, int tile, const void *p, int64_t stride) { vt_load(t, tile, p, stride); }

//: vt_load_once
OP void vt_load_once(vt *t, int tile, const void *p, int64_t stride) {
    (void)t;
    switch (tile) {
    case 6: __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm6" : : "r"(p), "r"(stride) : "memory"); break;
    case 7: __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm7" : : "r"(p), "r"(stride) : "memory"); break;
    }
}

//: vt_load_once_half
OP void vt_load_once_half(vt *t, int tile, const void *p, int64_t stride) { vt_load_once(t, tile, p, stride); }

//: vt_store
OP void vt_store(vt *t, int tile, int32_t *p) {
    const int64_t stride = 64;
    (void)t;
    switch (tile) {
    case 0: __asm__ volatile("tilestored %%tmm0, (%0,%1,1)" : : "r"(p), "r"(stride) : "memory"); break;
    case 1: __asm__ volatile("tilestored %%tmm1, (%0,%1,1)" : : "r"(p), "r"(stride) : "memory"); break;
    case 2: __asm__ volatile("tilestored %%tmm2, (%0,%1,1)" : : "r"(p), "r"(stride) : "memory"); break;
    case 3: __asm__ volatile("tilestored %%tmm3, (%0,%1,1)" : : "r"(p), "r"(stride) : "memory"); break;
    }
}

//: vt_dot4
// The operands of the instruction: sums, signed bytes, unsigned bytes; AT&T's order is the other way round.
OP void vt_dot4(vt *t, int c, int a, int b) {
    (void)t;
    switch (4 * c + 2 * (a - 4) + b - 6) {
    case 0: __asm__ volatile("tdpbsud %%tmm6, %%tmm4, %%tmm0" : :); break;
    case 1: __asm__ volatile("tdpbsud %%tmm7, %%tmm4, %%tmm0" : :); break;
    case 2: __asm__ volatile("tdpbsud %%tmm6, %%tmm5, %%tmm0" : :); break;
    case 3: __asm__ volatile("tdpbsud %%tmm7, %%tmm5, %%tmm0" : :); break;
    case 4: __asm__ volatile("tdpbsud %%tmm6, %%tmm4, %%tmm1" : :); break;
    case 5: __asm__ volatile("tdpbsud %%tmm7, %%tmm4, %%tmm1" : :); break;
    case 6: __asm__ volatile("tdpbsud %%tmm6, %%tmm5, %%tmm1" : :); break;
    case 7: __asm__ volatile("tdpbsud %%tmm7, %%tmm5, %%tmm1" : :); break;
    case 8: __asm__ volatile("tdpbsud %%tmm6, %%tmm4, %%tmm2" : :); break;
    case 9: __asm__ volatile("tdpbsud %%tmm7, %%tmm4, %%tmm2" : :); break;
    case 10: __asm__ volatile("tdpbsud %%tmm6, %%tmm5, %%tmm2" : :); break;
    case 11: __asm__ volatile("tdpbsud %%tmm7, %%tmm5, %%tmm2" : :); break;
    case 12: __asm__ volatile("tdpbsud %%tmm6, %%tmm4, %%tmm3" : :); break;
    case 13: __asm__ volatile("tdpbsud %%tmm7, %%tmm4, %%tmm3" : :); break;
    case 14: __asm__ volatile("tdpbsud %%tmm6, %%tmm5, %%tmm3" : :); break;
    case 15: __asm__ volatile("tdpbsud %%tmm7, %%tmm5, %%tmm3" : :); break;
    }
}

//: vt_dot4_signed
// The same of signed bytes twice.
OP void vt_dot4_signed(vt *t, int c, int a, int b) {
    (void)t;
    switch (4 * c + 2 * (a - 4) + b - 6) {
    case 0: __asm__ volatile("tdpbssd %%tmm6, %%tmm4, %%tmm0" : :); break;
    case 1: __asm__ volatile("tdpbssd %%tmm7, %%tmm4, %%tmm0" : :); break;
    case 2: __asm__ volatile("tdpbssd %%tmm6, %%tmm5, %%tmm0" : :); break;
    case 3: __asm__ volatile("tdpbssd %%tmm7, %%tmm5, %%tmm0" : :); break;
    case 4: __asm__ volatile("tdpbssd %%tmm6, %%tmm4, %%tmm1" : :); break;
    case 5: __asm__ volatile("tdpbssd %%tmm7, %%tmm4, %%tmm1" : :); break;
    case 6: __asm__ volatile("tdpbssd %%tmm6, %%tmm5, %%tmm1" : :); break;
    case 7: __asm__ volatile("tdpbssd %%tmm7, %%tmm5, %%tmm1" : :); break;
    case 8: __asm__ volatile("tdpbssd %%tmm6, %%tmm4, %%tmm2" : :); break;
    case 9: __asm__ volatile("tdpbssd %%tmm7, %%tmm4, %%tmm2" : :); break;
    case 10: __asm__ volatile("tdpbssd %%tmm6, %%tmm5, %%tmm2" : :); break;
    case 11: __asm__ volatile("tdpbssd %%tmm7, %%tmm5, %%tmm2" : :); break;
    case 12: __asm__ volatile("tdpbssd %%tmm6, %%tmm4, %%tmm3" : :); break;
    case 13: __asm__ volatile("tdpbssd %%tmm7, %%tmm4, %%tmm3" : :); break;
    case 14: __asm__ volatile("tdpbssd %%tmm6, %%tmm5, %%tmm3" : :); break;
    case 15: __asm__ volatile("tdpbssd %%tmm7, %%tmm5, %%tmm3" : :); break;
    }
}

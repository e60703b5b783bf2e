/* Every instruction of AMX-INT8 and AVX-VNNI against plain loops: on a CPU that has them, or in the emulator. Of its own
 * it needs AVX2: where there is no AVX-512, registers are looked at up to their 32 bytes.
 * Usage: instructions amx|vnni (prints how many results were compared), or the name of a fault, which must kill it. */
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int64_t compared;

static void same(const char *what, const void *got, const void *want, size_t bytes)
{
    ++compared;
    if (!memcmp(got, want, bytes)) return;
    printf("%s is wrong\n", what);
    exit(1);
}

static uint8_t any(void)
{
    static uint64_t state = 88172645463325252u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    static const uint8_t edges[8] = {0, 1, 2, 127, 128, 129, 254, 255};
    return state >> 60 ? (uint8_t)(state >> 32) : edges[state >> 32 & 7];
}

static void fill(void *p, size_t bytes)
{
    for (size_t i = 0; i < bytes; ++i) ((uint8_t *)p)[i] = any();
}

/* ---- AMX ---- */

struct config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

/* Tiles 0 (rows, columns) += 1 (rows, 4 steps bytes) * 2 (steps, 4 columns bytes); 3 as 0. */
static struct config sizes(int rows, int steps, int columns)
{
    struct config c = {.palette = 1};
    const int r[4] = {rows, rows, steps, rows}, b[4] = {4 * columns, 4 * steps, 4 * columns, 4 * columns};
    for (int i = 0; i < 4; ++i) {
        c.rows[i] = (uint8_t)r[i];
        c.bytes[i] = (uint16_t)b[i];
    }
    return c;
}

static void allow_tiles(void)
{
    if (syscall(SYS_arch_prctl, 0x1023, 18)) {
        printf("the system refuses tiles\n");
        exit(2);
    }
}

enum { STRIDE = 80 };

static void expect(int32_t *c, const uint8_t *a, const uint8_t *b, int rows, int steps, int columns, int a_signed,
                   int b_signed)
{
    for (int m = 0; m < rows; ++m)
        for (int n = 0; n < columns; ++n) {
            uint32_t sum = (uint32_t)c[m * STRIDE / 4 + n];
            for (int k = 0; k < 4 * steps; ++k) {
                const uint8_t x = a[m * STRIDE + k], y = b[k / 4 * STRIDE + 4 * n + k % 4];
                sum += (uint32_t)((a_signed ? (int8_t)x : x) * (b_signed ? (int8_t)y : y));
            }
            c[m * STRIDE / 4 + n] = (int32_t)sum;
        }
}

static void products(int rows, int steps, int columns)
{
    static _Alignas(64) uint8_t a[16 * STRIDE], b[16 * STRIDE];
    static int32_t c[4 * STRIDE], want[4 * STRIDE];
    struct config config = sizes(rows, steps, columns), stored;
    _tile_loadconfig(&config);
    _tile_storeconfig(&stored);
    same("sttilecfg", &stored, &config, 64);
    fill(a, sizeof a);
    fill(b, sizeof b);
    _tile_loadd(1, a, STRIDE);
    _tile_stream_loadd(2, b, STRIDE);
    for (int kind = 0; kind < 4; ++kind) {
        fill(c, sizeof c);
        memcpy(want, c, sizeof c); /* what lies between the rows must stay */
        _tile_loadd(0, c, STRIDE);
        __asm__ volatile("" ::: "memory");
        if (kind == 0) _tile_dpbssd(0, 1, 2);
        if (kind == 1) _tile_dpbsud(0, 1, 2);
        if (kind == 2) _tile_dpbusd(0, 1, 2);
        if (kind == 3) _tile_dpbuud(0, 1, 2);
        _tile_stored(0, c, STRIDE);
        __asm__ volatile("" ::: "memory");
        expect(want, a, b, rows, steps, columns, kind < 2, kind % 2 == 0);
        same("a product of tiles", c, want, sizeof c);
    }
}

/* Every form of a tile's memory operand: rows 64 bytes apart at a + 192. */
static void addresses(void)
{
    static uint8_t a[4096];
    uint8_t got[1024], zeros[1024] = {0};
    struct config config = sizes(16, 16, 16);
    _tile_loadconfig(&config);
    fill(a, sizeof a);
    _tile_zero(0);
    _tile_stored(0, got, 64);
    __asm__ volatile("" ::: "memory");
    same("tilezero", got, zeros, sizeof got);
#define FORM(base, index, text)                                                                                       \
    do {                                                                                                              \
        register const uint8_t *p __asm__(base) = a;                                                                  \
        register int64_t i __asm__(index) = 16;                                                                       \
        __asm__ volatile("tileloadd " text ", %%tmm3" ::"r"(p), "r"(i) : "memory");                                   \
        _tile_stored(3, got, 64);                                                                                     \
        __asm__ volatile("" ::: "memory");                                                                            \
        same(text, got, a + 192, sizeof got);                                                                         \
    } while (0)
    FORM("rax", "rcx", "192(%0,%1,4)");
    FORM("r13", "r12", "192(%0,%1,4)");
    FORM("r12", "r15", "0xc0(%0,%1,4)");
    FORM("rbx", "r9", "192(%0,%1,4)");
#undef FORM
    const int64_t far = 64;
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm3" ::"r"(a + 192), "r"(far) : "memory");
    _tile_stored(3, got, 64);
    __asm__ volatile("" ::: "memory");
    same("tileloadd without displacement", got, a + 192, sizeof got);
    __asm__ volatile("tileloadd -64(%0,%1,2), %%tmm3" ::"r"(a + 256), "r"(far / 2) : "memory");
    _tile_stored(3, got, 64);
    __asm__ volatile("" ::: "memory");
    same("tileloadd with a short displacement", got, a + 192, sizeof got);
    __asm__ volatile("tileloadd (%0), %%tmm3" ::"r"(a) : "memory"); /* no index: one row again and again */
    _tile_stored(3, got, 64);
    __asm__ volatile("" ::: "memory");
    for (int i = 0; i < 16; ++i) same("tileloadd without an index", got + 64 * i, a, 64);
    /* backwards */
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm3" ::"r"(a + 960), "r"(-far) : "memory");
    _tile_stored(3, got, 64);
    __asm__ volatile("" ::: "memory");
    for (int i = 0; i < 16; ++i) same("tileloadd with a negative stride", got + 64 * i, a + 960 - 64 * i, 64);
}

/* Another thread has tiles of its own, and none to begin with. */
static void *other_thread(void *unused)
{
    struct config none = {0}, stored;
    _tile_storeconfig(&stored);
    same("the configuration of a new thread", &stored, &none, 64);
    products(3, 5, 7);
    return unused;
}

static void amx(void)
{
    allow_tiles();
    for (int rows = 1; rows <= 16; ++rows)
        for (int steps = 1; steps <= 16; steps += rows % 3 + 1)
            for (int columns = 1; columns <= 16; columns += 5) products(rows, steps, columns);
    addresses();
    struct config config = sizes(16, 16, 16), stored, none = {0};
    _tile_loadconfig(&config);
    pthread_t thread;
    pthread_create(&thread, NULL, other_thread, NULL);
    pthread_join(thread, NULL);
    _tile_storeconfig(&stored);
    same("the configuration, after another thread's", &stored, &config, 64);
    _tile_release();
    _tile_storeconfig(&stored);
    same("the configuration after tilerelease", &stored, &none, 64);
    _tile_loadconfig(&config);
    _tile_loadconfig(&none);
    _tile_storeconfig(&stored);
    same("the configuration of palette 0", &stored, &none, 64);
}

/* ---- AVX-VNNI ---- */

static int64_t clamp(int64_t v) { return v > INT32_MAX ? INT32_MAX : v < INT32_MIN ? INT32_MIN : v; }

/* kind 0 vpdpbusd, 1 vpdpbusds, 2 vpdpwssd, 3 vpdpwssds */
static void expect_vector(int kind, int bytes, uint8_t *c, const uint8_t *a, const uint8_t *b)
{
    for (int i = 0; i < bytes; i += 4) {
        int32_t sum;
        int16_t x[2], y[2];
        memcpy(&sum, c + i, 4);
        memcpy(x, a + i, 4);
        memcpy(y, b + i, 4);
        int64_t more = (int64_t)x[0] * y[0] + (int64_t)x[1] * y[1];
        if (kind < 2) {
            more = 0;
            for (int j = 0; j < 4; ++j) more += a[i + j] * (int8_t)b[i + j];
        }
        const int64_t exact = sum + more;
        sum = kind % 2 ? (int32_t)clamp(exact) : (int32_t)(uint32_t)exact;
        memcpy(c + i, &sum, 4);
    }
    memset(c + bytes, 0, (size_t)(64 - bytes)); /* up to the whole register */
}

static _Alignas(64) uint8_t va[64], vb[128], vc[64], got[64], want[64];

/* One instruction: registers x, y, z of one width; z may be a memory operand. The whole register
 * ("zmm" or "ymm", of `seen` bytes, loaded and stored by `move`) is compared: beyond the instruction's width are zeros. */
#define ONE(move, whole, seen, kind, bytes, name, reg, x, y, z)                                                       \
    do {                                                                                                              \
        fill(va, 64), fill(vb, 128), fill(vc, 64);                                                                    \
        __asm__ volatile(move "(%0), %%" whole x "\n" move "(%1), %%" whole y "\n" move "(%2), %%" whole "14\n"        \
                         "mov %2, %%r12\n mov %2, %%r13\n mov $16, %%r9\n"                                            \
                         "%{vex%} " name " " z ", %%" reg y ", %%" reg x "\n" move "%%" whole x ", (%3)"                \
                         ::"r"(vc), "r"(va), "r"(vb), "r"(got)                                                        \
                         : "memory", "r9", "r12", "r13", "xmm0", "xmm1", "xmm2", "xmm3", "xmm7", "xmm8", "xmm9",      \
                           "xmm14", "xmm15");                                                                         \
        memcpy(want, vc, 64);                                                                                         \
        expect_vector(kind, bytes, want, va, vb + (strchr(z, '(') ? 32 : 0));                                         \
        same(name " " z, got, want, seen);                                                                             \
    } while (0)

/* Registers of both halves; base, short and long displacement, index, and the bases whose encoding is special. */
#define FORMS(move, whole, seen, kind, bytes, name, reg)                                                              \
    do {                                                                                                              \
        ONE(move, whole, seen, kind, bytes, name, reg, "0", "1", "%%" reg "14");                                      \
        ONE(move, whole, seen, kind, bytes, name, reg, "15", "8", "%%" reg "14");                                     \
        ONE(move, whole, seen, kind, bytes, name, reg, "7", "9", "%%" reg "14");                                      \
        ONE(move, whole, seen, kind, bytes, name, reg, "3", "2", "32(%2)");                                           \
        ONE(move, whole, seen, kind, bytes, name, reg, "9", "15", "32(%%r12)");                                       \
        ONE(move, whole, seen, kind, bytes, name, reg, "3", "2", "32(%%r13)");                                        \
        ONE(move, whole, seen, kind, bytes, name, reg, "3", "2", "(%2,%%r9,2)");                                      \
        ONE(move, whole, seen, kind, bytes, name, reg, "3", "8", "-96(%%r13,%%r9,8)");                                \
        ONE(move, whole, seen, kind, bytes, name, reg, "3", "2", "vb+32(%%rip)");                                     \
    } while (0)

#define EVERY(move, whole, seen)                                                                                      \
    do {                                                                                                              \
        for (int i = 0; i < 50; ++i) {                                                                                \
            FORMS(move, whole, seen, 0, 32, "vpdpbusd", "ymm");                                                       \
            FORMS(move, whole, seen, 1, 32, "vpdpbusds", "ymm");                                                      \
            FORMS(move, whole, seen, 2, 32, "vpdpwssd", "ymm");                                                       \
            FORMS(move, whole, seen, 3, 32, "vpdpwssds", "ymm");                                                      \
            FORMS(move, whole, seen, 0, 16, "vpdpbusd", "xmm");                                                       \
            FORMS(move, whole, seen, 1, 16, "vpdpbusds", "xmm");                                                      \
            FORMS(move, whole, seen, 2, 16, "vpdpwssd", "xmm");                                                       \
            FORMS(move, whole, seen, 3, 16, "vpdpwssds", "xmm");                                                      \
        }                                                                                                             \
    } while (0)

static void vnni(void)
{
    if (__builtin_cpu_supports("avx512f")) EVERY("vmovdqu64 ", "zmm", 64);
    else EVERY("vmovdqu ", "ymm", 32);
}

/* ---- what must not be possible ---- */

static void fault(const char *name)
{
    struct config c = sizes(16, 16, 16);
    uint8_t area[2048] = {0};
    if (strcmp(name, "permission")) allow_tiles();
    if (!strcmp(name, "palette")) c.palette = 2;
    if (!strcmp(name, "rows")) c.rows[1] = 17;
    if (!strcmp(name, "bytes")) c.bytes[1] = 65;
    if (!strcmp(name, "halves")) c.rows[5] = 1;
    if (!strcmp(name, "reserved")) c.reserved[3] = 1;
    if (!strcmp(name, "ninth")) c.rows[8] = 1;
    if (!strcmp(name, "depth")) c.rows[2] = 15;
    if (!strcmp(name, "height")) c.rows[0] = 15;
    if (!strcmp(name, "width")) c.bytes[0] = 60;
    if (strcmp(name, "configuration")) _tile_loadconfig(&c);
    if (!strcmp(name, "released")) _tile_release();
    if (!strcmp(name, "unused")) _tile_loadd(5, area, 64);
    if (!strcmp(name, "twice")) __asm__ volatile(".byte 0xc4, 0xe2, 0x72, 0x5e, 0xc1"); /* tdpbsud tmm0, tmm1, tmm1: no assembler takes it */
    if (!strcmp(name, "page")) _tile_loadd(1, (uint8_t *)4096, 64);
    _tile_loadd(1, area, 64);
    _tile_dpbsud(0, 1, 2);
}

int main(int count, char **words)
{
    if (count != 2) return 2;
    if (!strcmp(words[1], "amx")) amx();
    else if (!strcmp(words[1], "vnni")) vnni();
    else fault(words[1]);
    printf("%lld\n", (long long)compared);
    return 0;
}

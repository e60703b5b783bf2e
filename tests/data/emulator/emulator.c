/* A CPU with AMX-INT8 and AVX-VNNI in software, for machines without: a library for LD_PRELOAD.
 *
 * An instruction this CPU does not know arrives as SIGILL. If it is one of the two extensions, a jump to a stub takes
 * its place (all of them have the five bytes a jump needs), and the stub carries it out on the saved registers. Anything
 * else goes to whatever handler the program has. Exact and strict, for tests; where the CPU has the instructions it is
 * never asked. A signal for each of them would cost 35 us in a virtual machine, a stub costs 0.3.
 *
 * As on hardware, tile registers belong to a thread, need the system's permission (arch_prctl) and a configuration,
 * and operands that do not fit together are faults. What a program did wrong is told on stderr.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64, CONFIG_BYTES = 64 };
enum { NP, P66, PF3, PF2 }; /* VEX.pp */
enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
enum { RSP = 4, GENERAL = 16, RED_ZONE = 128, CODE_BYTES = 16, PATCH_BYTES = 5 };

/* ---- the state hardware keeps for a thread ---- */

static _Thread_local struct {
    uint8_t config[CONFIG_BYTES]; /* as ldtilecfg reads it; palette 0: not configured */
    uint8_t data[TILES][ROWS][ROW_BYTES];
} tiles;

static int permitted; /* of the process */

static int rows_of(int t) { return tiles.config[48 + t]; }
static int bytes_of(int t) { return tiles.config[16 + 2 * t] | tiles.config[17 + 2 * t] << 8; }

/* ---- an instruction ---- */

struct instruction {
    int pp, opcode, w, wide;    /* VEX fields; wide: 256 bits */
    int mod, reg, rm, vvvv;     /* registers with their extension bits */
    int has_sib;
    int64_t stride;             /* index register << scale; 0 without an index */
    uint8_t *address;           /* of a memory operand; a tile's row i is at address + i * stride */
    int length;
};

static int64_t little_endian(const uint8_t *p, int bytes)
{
    int32_t word;
    if (bytes == 1) return (int8_t)*p;
    memcpy(&word, p, 4);
    return word;
}

static int is_tile(int opcode) { return opcode == 0x49 || opcode == 0x4b || opcode == 0x5e; }

/* Whether code is of the two extensions: VEX with three bytes and map 0F38. */
static int is_ours(const uint8_t *code)
{
    return code[0] == 0xc4 && (code[1] & 0x1f) == 2 && (is_tile(code[3]) || (code[3] >= 0x50 && code[3] <= 0x53));
}

/* The instruction whose bytes are `code` and which stands at `place`, with these registers. */
static struct instruction decode(const uint8_t *code, const uint8_t *place, const int64_t *regs)
{
    const int r = code[1] & 0x80 ? 0 : 8, x = code[1] & 0x40 ? 0 : 8, b = code[1] & 0x20 ? 0 : 8;
    const uint8_t modrm = code[4];
    struct instruction decoded = {
        .pp = code[2] & 3, .wide = code[2] >> 2 & 1, .vvvv = ~code[2] >> 3 & 15, .w = code[2] >> 7,
        .opcode = code[3], .mod = modrm >> 6, .reg = (modrm >> 3 & 7) | r, .rm = (modrm & 7) | b}, *in = &decoded;
    int at = 5;
    if (in->mod == 3) {
        in->length = at;
        return decoded;
    }
    int64_t address = 0;
    int base_is_displacement = in->mod == 0 && (modrm & 7) == 5, rip_relative = base_is_displacement;
    if ((modrm & 7) == 4) {
        const uint8_t sib = code[at++];
        const int index = (sib >> 3 & 7) | x;
        in->has_sib = 1;
        if (index != 4) in->stride = regs[index] << (sib >> 6);
        base_is_displacement = in->mod == 0 && (sib & 7) == 5;
        if (!base_is_displacement) address = regs[(sib & 7) | b];
        if (!is_tile(in->opcode)) address += in->stride;
    } else if (!rip_relative) {
        address = regs[in->rm];
    }
    const int bytes = in->mod == 1 ? 1 : in->mod == 2 || base_is_displacement ? 4 : 0;
    if (bytes) address += little_endian(code + at, bytes);
    at += bytes;
    if (rip_relative) address += (int64_t)(uintptr_t)(place + at);
    in->length = at;
    in->address = (uint8_t *)(uintptr_t)address;
    return decoded;
}

/* ---- AMX: each gives what is wrong, NULL when it was carried out ---- */

static const char *load_config(const uint8_t *config)
{
    uint8_t zero[CONFIG_BYTES] = {0};
    if (config[0] > 1) return "ldtilecfg: there is no such palette";
    if (config[0] == 0) {
        memset(&tiles, 0, sizeof tiles);
        return NULL;
    }
    if (memcmp(config + 1, zero, 15) || memcmp(config + 32, zero, 16) || memcmp(config + 56, zero, 8))
        return "ldtilecfg: start_row or a reserved byte is not zero";
    for (int t = 0; t < TILES; ++t) {
        const int bytes = config[16 + 2 * t] | config[17 + 2 * t] << 8, rows = config[48 + t];
        if (rows > ROWS || bytes > ROW_BYTES) return "ldtilecfg: more than 16 rows or 64 bytes a row";
        if (!rows != !bytes) return "ldtilecfg: rows without bytes, or bytes without rows";
    }
    memset(&tiles, 0, sizeof tiles);
    memcpy(tiles.config, config, CONFIG_BYTES);
    return NULL;
}

static const char *move_tile(const struct instruction *in, int store)
{
    const int t = in->reg, rows = rows_of(t);
    const size_t bytes = (size_t)bytes_of(t);
    if (!in->has_sib) return "a tile's memory operand has no SIB byte";
    if (!store) memset(tiles.data[t], 0, sizeof tiles.data[t]);
    for (int i = 0; i < rows; ++i) {
        uint8_t *row = in->address + i * in->stride;
        if (store) memcpy(row, tiles.data[t][i], bytes);
        else memcpy(tiles.data[t][i], row, bytes);
    }
    return NULL;
}

typedef int32_t lanes8 __attribute__((vector_size(32))); /* sums wrap: compiled with -fwrapv */

/* c (rows, 16) += a (rows, 64 bytes) * b (16, 64 bytes), four bytes of each at a time. */
static const char *dot(int c, int a, int b, int a_signed, int b_signed)
{
    if (c == a || c == b || a == b) return "tdp: two operands are one tile";
    if (!rows_of(a) || !rows_of(b)) return "tdp: a tile is not configured";
    if (bytes_of(c) % 4 || bytes_of(a) % 4 || bytes_of(b) % 4) return "tdp: rows are no multiple of 4 bytes";
    if (bytes_of(c) != bytes_of(b) || rows_of(c) != rows_of(a) || bytes_of(a) / 4 != rows_of(b))
        return "tdp: the tiles' sizes do not fit together";
    lanes8 wide[4 * ROWS][2] = {0}; /* byte i of every lane of b's rows, one row after the other */
    for (int k = 0; k < rows_of(b); ++k)
        for (int i = 0; i < bytes_of(b); ++i)
            wide[4 * k + i % 4][i / 32][i / 4 % 8] = b_signed ? (int8_t)tiles.data[b][k][i] : tiles.data[b][k][i];
    for (int m = 0; m < rows_of(c); ++m) {
        lanes8 sum[2];
        memcpy(sum, tiles.data[c][m], sizeof sum);
        for (int i = 0; i < bytes_of(a); ++i) {
            const int32_t x = a_signed ? (int8_t)tiles.data[a][m][i] : tiles.data[a][m][i];
            sum[0] += wide[i][0] * x;
            sum[1] += wide[i][1] * x;
        }
        memcpy(tiles.data[c][m], sum, sizeof sum);
    }
    return NULL;
}

static const char *tile_instruction(const struct instruction *in)
{
    const int memory = in->mod != 3;
    if (!permitted) return "a tile instruction before the system's permission (arch_prctl)";
    if (in->w || in->wide) return "a tile instruction with W or L";
    if (in->opcode == 0x49 && memory && (in->reg & 7) == 0 && in->pp == NP) return load_config(in->address);
    if (in->opcode == 0x49 && memory && (in->reg & 7) == 0 && in->pp == P66) {
        memcpy(in->address, tiles.config, CONFIG_BYTES);
        return NULL;
    }
    if (in->opcode == 0x49 && !memory && in->reg == 0 && in->rm == 0 && in->pp == NP) {
        memset(&tiles, 0, sizeof tiles);
        return NULL;
    }
    if (!tiles.config[0]) return "a tile instruction without a configuration";
    if (in->reg >= TILES) return "there are eight tiles";
    if (!rows_of(in->reg)) return "a tile that is not configured";
    if (in->opcode == 0x49 && !memory && in->rm == 0 && in->pp == PF2) {
        memset(tiles.data[in->reg], 0, sizeof tiles.data[in->reg]);
        return NULL;
    }
    if (in->opcode == 0x4b && memory && in->pp != NP) return move_tile(in, in->pp == PF3);
    if (in->opcode == 0x5e && !memory && in->rm < TILES && in->vvvv < TILES)
        return dot(in->reg, in->rm, in->vvvv, in->pp == PF2 || in->pp == PF3, in->pp == PF2 || in->pp == P66);
    return "an unknown tile instruction";
}

/* ---- AVX-VNNI ---- */

/* A thread's vector registers as xsave stores them: xmm, upper halves of ymm, upper halves of zmm. */
struct vectors {
    uint8_t *xmm, *ymm_high, *zmm_high;
};

/* Where xsave puts component `number`: cpuid leaf 13. */
static uint32_t component_offset(uint32_t number)
{
    uint32_t a = 13, b, c = number, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return b;
}

static uint32_t ymm_offset, zmm_offset; /* read once: cpuid is slow in a virtual machine */

static struct vectors vectors_of(uint8_t *area)
{
    uint64_t *in_use = (uint64_t *)(area + 512); /* the components that hold something else than zeros */
    const uint64_t xmm = 2, ymm = 4, zmm = 0x40;
    if (!(*in_use & xmm)) memset(area + 160, 0, 256);
    if (!(*in_use & ymm)) memset(area + ymm_offset, 0, 256);
    if (zmm_offset && !(*in_use & zmm)) memset(area + zmm_offset, 0, 512);
    *in_use |= xmm | ymm | (zmm_offset ? zmm : 0);
    return (struct vectors){area + 160, area + ymm_offset, zmm_offset ? area + zmm_offset : NULL};
}

static void read_vector(const struct vectors *v, int number, uint8_t *to)
{
    memcpy(to, v->xmm + 16 * number, 16);
    memcpy(to + 16, v->ymm_high + 16 * number, 16);
}

/* The products of one 32-bit lane with nothing cut off, and their sum with what was there, in 64 bits or 32. */
static void add_products(int opcode, int saturate, lanes8 *sum, lanes8 a, lanes8 b)
{
    const int bits = opcode < 0x52 ? 8 : 16; /* four u8 x s8, or two s16 x s16 */
    lanes8 total = {0};
    for (int at = 0; at < 32; at += bits) {
        const lanes8 x = bits == 8 ? (a >> at) & 255 : a << (16 - at) >> 16;
        total += x * (b << (32 - bits - at) >> (32 - bits));
        /* 2 x 32768 x 32768 alone does not fit 32 bits: it wraps to INT32_MIN, and nothing else does */
    }
    for (int i = 0; saturate && i < 8; ++i) {
        const int wrapped = bits == 16 && total[i] == INT32_MIN;
        const int64_t exact = (int64_t)(*sum)[i] + (wrapped ? (int64_t)1 << 31 : total[i]);
        total[i] = (int32_t)((exact > INT32_MAX ? INT32_MAX : exact < INT32_MIN ? INT32_MIN : exact) - (*sum)[i]);
    }
    *sum += total;
}

static const char *vnni_instruction(const struct instruction *in, uint8_t *area)
{
    const struct vectors v = vectors_of(area);
    uint8_t sum[32], a[32], b[32] = {0};
    lanes8 wide_sum, wide_a, wide_b;
    if (in->pp != P66 || in->w) return "an unknown encoding of vpdp";
    read_vector(&v, in->reg, sum);
    read_vector(&v, in->vvvv, a);
    if (in->mod == 3) read_vector(&v, in->rm, b);
    else memcpy(b, in->address, in->wide ? 32 : 16);
    memcpy(&wide_sum, sum, 32);
    memcpy(&wide_a, a, 32);
    memcpy(&wide_b, b, 32);
    add_products(in->opcode, in->opcode & 1, &wide_sum, wide_a, wide_b);
    memcpy(sum, &wide_sum, 32);
    if (!in->wide) memset(sum + 16, 0, 16);
    memcpy(v.xmm + 16 * in->reg, sum, 16);
    memcpy(v.ymm_high + 16 * in->reg, sum + 16, 16);
    if (v.zmm_high) memset(v.zmm_high + 32 * in->reg, 0, 32);
    return NULL;
}

/* ---- a stub for each place such an instruction stands at ---- */

/* What the stub's code is followed by; the call in it leaves the address on the stack. */
struct site {
    void (*enter)(void);
    const uint8_t *place;
    uint8_t code[CODE_BYTES]; /* what stood there */
};

/* The stack when the registers are saved, from its top. */
struct frame {
    int64_t regs[GENERAL]; /* by their numbers; rsp is not that of the program */
    int64_t flags;
    const struct site *site;
    const uint8_t *next; /* where the program goes on */
    uint8_t red_zone[RED_ZONE];
};

void emulator_enter(void);
void emulator_fault(void);

__asm__(".text\n"
        ".hidden emulator_enter\n.globl emulator_enter\nemulator_enter:\n"
        " pushfq\n push %r15\n push %r14\n push %r13\n push %r12\n push %r11\n push %r10\n push %r9\n push %r8\n"
        " push %rdi\n push %rsi\n push %rbp\n push %rsp\n push %rbx\n push %rdx\n push %rcx\n push %rax\n"
        " mov %rsp, %rdi\n mov %rsp, %rbx\n cld\n"
        " sub $8192, %rsp\n and $-64, %rsp\n mov %rsp, %rsi\n"
        " xor %eax, %eax\n mov $8, %ecx\n lea 512(%rsp), %rdi\n rep stosq\n mov %rbx, %rdi\n" /* xsave's header */
        " mov $-1, %eax\n mov $-1, %edx\n xsave64 (%rsi)\n mov %rsi, %r12\n"
        " call emulator_carry_out\n"
        " mov $-1, %eax\n mov $-1, %edx\n xrstor64 (%r12)\n mov %rbx, %rsp\n"
        " pop %rax\n pop %rcx\n pop %rdx\n pop %rbx\n lea 8(%rsp), %rsp\n pop %rbp\n pop %rsi\n pop %rdi\n"
        " pop %r8\n pop %r9\n pop %r10\n pop %r11\n pop %r12\n pop %r13\n pop %r14\n pop %r15\n popfq\n"
        " lea 8(%rsp), %rsp\n ret $128\n"
        ".hidden emulator_fault\n.globl emulator_fault\nemulator_fault:\n ud2\n");

static int (*next_sigaction)(int, const struct sigaction *, struct sigaction *);
static int (*next_sigmask)(int, const sigset_t *, sigset_t *);
static struct sigaction of_the_program; /* what the program wants done with SIGILL; zeros: the default */

__attribute__((visibility("hidden"), used)) void emulator_carry_out(struct frame *frame, uint8_t *area)
{
    const struct site *site = frame->site;
    frame->regs[RSP] = (int64_t)(uintptr_t)(frame + 1);
    const struct instruction in = decode(site->code, site->place, frame->regs);
    const char *wrong = is_tile(in.opcode) ? tile_instruction(&in) : vnni_instruction(&in, area);
    frame->next = site->place + in.length;
    if (!wrong) return;
    dprintf(2, "emulator: %s\n", wrong);
    next_sigaction(SIGILL, &of_the_program, NULL);
    memcpy(&frame->next, &(void (*)(void)){emulator_fault}, sizeof frame->next);
}

/* Memory for stubs that a jump from `place` reaches. */
static uint8_t *stub_near(const uint8_t *place)
{
    enum { STUB_BYTES = 64, ARENA_BYTES = 1 << 16, ARENAS = 256 };
    static struct { uint8_t *start; int used; } arenas[ARENAS];
    const int64_t reach = (int64_t)1 << 30;
    for (int i = 0; i < ARENAS; ++i) {
        uint8_t *start = arenas[i].start;
        for (int64_t off = 1 << 20; !start && off < reach; off += off / 4) {
            for (int sign = -1; sign <= 1 && !start; sign += 2) {
                void *wish = (void *)(((uintptr_t)place + (uintptr_t)(sign * off)) & ~(uintptr_t)(ARENA_BYTES - 1));
                void *found = mmap(wish, ARENA_BYTES, PROT_READ | PROT_WRITE | PROT_EXEC,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
                if (found != MAP_FAILED) start = arenas[i].start = found;
            }
        }
        const int64_t distance = start - place;
        if (start && distance < reach && distance > -reach && arenas[i].used + STUB_BYTES <= ARENA_BYTES) {
            arenas[i].used += STUB_BYTES;
            return start + arenas[i].used - STUB_BYTES;
        }
    }
    dprintf(2, "emulator: no memory for a stub\n");
    abort();
}

/* Other threads may be at `place`: an invalid byte sends them to the handler until the jump is whole. */
static void patch(uint8_t *place)
{
    static const uint8_t call[11] = {0x48, 0x8d, 0xa4, 0x24, 0x78, 0xff, 0xff, 0xff, /* lea -136(%rsp), %rsp */
                                     0xff, 0x15, 0x00};                              /* call *0(%rip): site.enter */
    struct site site = {.enter = emulator_enter, .place = place};
    uint8_t *stub = stub_near(place);
    memcpy(site.code, place, CODE_BYTES);
    memset(stub, 0, 16);
    memcpy(stub, call, sizeof call);
    memcpy(stub + 14, &site, sizeof site);
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)place & ~(page - 1);
    const size_t bytes = (((uintptr_t)place + PATCH_BYTES + page - 1) & ~(page - 1)) - first;
    if (mprotect((void *)first, bytes, PROT_READ | PROT_WRITE | PROT_EXEC)) abort();
    const int32_t jump = (int32_t)(stub - (place + PATCH_BYTES));
    __atomic_store_n(place, 0x06, __ATOMIC_SEQ_CST);
    memcpy(place + 1, &jump, 4);
    __atomic_store_n(place, 0xe9, __ATOMIC_SEQ_CST);
}

static void on_illegal(int number, siginfo_t *info, void *interrupted)
{
    static atomic_flag busy = ATOMIC_FLAG_INIT;
    uint8_t *place = (uint8_t *)(uintptr_t)((ucontext_t *)interrupted)->uc_mcontext.gregs[REG_RIP];
    (void)number;
    (void)info;
    while (atomic_flag_test_and_set(&busy)) continue;
    /* A jump there is another thread's work, done since this one faulted. */
    const int patched = *place == 0xe9, ours = is_ours(place);
    if (ours) patch(place);
    atomic_flag_clear(&busy);
    if (!ours && !patched) next_sigaction(SIGILL, &of_the_program, NULL); /* it is tried again, and faults there */
}

/* The program may have handlers and masks of its own, as it may on hardware. */
int sigaction(int number, const struct sigaction *action, struct sigaction *before)
{
    if (number != SIGILL) return next_sigaction(number, action, before);
    struct sigaction old = of_the_program;
    if (action) of_the_program = *action;
    if (before) *before = old;
    return 0;
}

/* A blocked fault ends the process: SIGILL stays open. */
int pthread_sigmask(int how, const sigset_t *set, sigset_t *before)
{
    sigset_t open;
    if (!set || how == SIG_UNBLOCK) return next_sigmask(how, set, before);
    open = *set;
    sigdelset(&open, SIGILL);
    return next_sigmask(how, &open, before);
}

/* ---- the permission ---- */

long syscall(long number, ...)
{
    va_list list;
    long a[6], result;
    va_start(list, number);
    for (int i = 0; i < 6; ++i) a[i] = va_arg(list, long);
    va_end(list);
    if (number == SYS_arch_prctl && a[0] == ARCH_REQ_XCOMP_PERM && a[1] == XFEATURE_XTILEDATA) {
        permitted = 1;
        return 0;
    }
    register long r10 __asm__("r10") = a[3], r8 __asm__("r8") = a[4], r9 __asm__("r9") = a[5];
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    if (result >= 0 || result < -4095) return result;
    errno = (int)-result;
    return -1;
}

__attribute__((constructor)) static void install(void)
{
    const struct sigaction action = {.sa_sigaction = on_illegal, .sa_flags = SA_SIGINFO};
    void *found = dlsym(RTLD_NEXT, "sigaction");
    memcpy(&next_sigaction, &found, sizeof found);
    found = dlsym(RTLD_NEXT, "pthread_sigmask");
    memcpy(&next_sigmask, &found, sizeof found);
    ymm_offset = component_offset(2);
    zmm_offset = component_offset(6);
    next_sigaction(SIGILL, &action, NULL);
}

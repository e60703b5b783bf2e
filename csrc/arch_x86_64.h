/* What differs between architectures: x86-64. Internal. */
#pragma once

/* Tell the core that this is a waiting loop. */
static inline void bitgen_pause(void) { __builtin_ia32_pause(); }

/* Ask the system for the tile registers of AMX, for every thread of this process: 0 when it gives them. Without that
 * the first instruction on a tile ends the process (SIGILL). Linux only; no other system here has such CPUs. */
static inline long bitgen_ask_for_tiles(void)
{
    enum { SYS_ARCH_PRCTL = 158, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    extern long syscall(long number, ...); /* hidden by _POSIX_C_SOURCE */
    return syscall(SYS_ARCH_PRCTL, (long)ARCH_REQ_XCOMP_PERM, (long)XFEATURE_XTILEDATA);
}

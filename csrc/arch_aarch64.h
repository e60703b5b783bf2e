/* What differs between architectures: AArch64. Internal. */
#pragma once

/* Tell the core that this is a waiting loop. */
static inline void bitgen_pause(void) { __asm__ volatile("yield"); }

/* There are no tile registers to ask the system for. */
static inline long bitgen_ask_for_tiles(void) { return -1; }

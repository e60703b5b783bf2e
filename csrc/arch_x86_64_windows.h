/* What differs between architectures: x86-64 under Windows. Internal. */
#pragma once

#define WIN32_LEAN_AND_MEAN
#define NOMINMAX

#include <windows.h>

/* Tell the core that this is a waiting loop. */
static inline void bitgen_pause(void) { __builtin_ia32_pause(); }

/* Ask the system for the tile registers of AMX, for every thread of this process: 0 when it gives them. Windows 11 and
 * Server 2022 are the first that can; the function is looked up, so that the library loads on older ones. */
static inline long bitgen_ask_for_tiles(void)
{
    typedef BOOL(WINAPI * enable)(DWORD64 features);
    enum { XSTATE_TILES = 1 << 17 | 1 << 18 }; /* their shape, their contents */
    HMODULE kernel = GetModuleHandleA("kernel32.dll");
    void *found = kernel ? (void *)(uintptr_t)GetProcAddress(kernel, "EnableProcessOptionalXStateFeatures") : NULL;
    return found && ((enable)(uintptr_t)found)(XSTATE_TILES) ? 0 : -1;
}

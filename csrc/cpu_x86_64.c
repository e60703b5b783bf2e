/* Which features this x86-64 CPU has, asked of cpuid; what the system saves on a context switch, of xgetbv.
 *
 * Compiled at the baseline and called before anything special runs. The rows are those of
 * configs/cpu_features.yaml that the ISA levels of this library need.
 */
#include "table.h"

#include <cpuid.h>

enum { EAX, EBX, ECX, EDX };

struct feature {
    uint32_t leaf, subleaf, reg, bit;
    uint32_t state; /* XCR0 bits: 0x6 AVX, 0xe6 AVX-512, 0x60000 AMX */
};

#include "features.h"

/* XCR0, or 0 when the system does not use xsave. */
static uint32_t saved_state(void)
{
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return a;
}

uint64_t bitgen_cpu_features(void)
{
    uint32_t state = saved_state();
    uint64_t found = 0;
    for (int32_t i = 0; i < bitgen_feature_count; ++i) {
        uint32_t r[4];
        if (!__get_cpuid_count(features[i].leaf, features[i].subleaf, &r[EAX], &r[EBX], &r[ECX], &r[EDX])) continue;
        if ((state & features[i].state) != features[i].state) continue;
        found |= (uint64_t)(r[features[i].reg] >> features[i].bit & 1) << i;
    }
    return found;
}

int32_t bitgen_sve_bytes(void) { return 0; }

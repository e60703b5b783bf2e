/* Which features this AArch64 CPU has, as the Linux kernel advertises them.
 *
 * features.h, which is generated, has those rows of configs/cpu_features.yaml that the ISA levels of this library need.
 */
#include "table.h"

#include <sys/auxv.h>
#include <sys/prctl.h>

struct feature {
    uint32_t hwcap, bit; /* AT_HWCAP or AT_HWCAP2 */
};

/* CPUs whose main identification register holds these numbers, from the first part to the last. */
struct family {
    uint32_t implementer, part[2];
    int32_t id;
};

#include "features.h"

uint64_t bitgen_cpu_features(void)
{
    uint64_t found = 0;
    for (int32_t i = 0; i < bitgen_feature_count; ++i)
        found |= (uint64_t)(getauxval(features[i].hwcap) >> features[i].bit & 1) << i;
    return found;
}

/* The register is the system's, which emulates reading it. Where cores differ it is that of the core that reads. */
int32_t bitgen_cpu_family(void)
{
    enum { HWCAP_HAS_CPUID = 1 << 11 };
    uint64_t midr = 0;
    if (getauxval(AT_HWCAP) & HWCAP_HAS_CPUID) __asm__("mrs %0, MIDR_EL1" : "=r"(midr));
    const uint32_t implementer = midr >> 24 & 255, part = midr >> 4 & 0xfff;
    for (const struct family *f = families; f->id; ++f)
        if (implementer == f->implementer && part >= f->part[0] && part <= f->part[1]) return f->id;
    return 0;
}

/* The system and the process choose the length, below what the CPU has; headers before Linux 4.15 do not name it. */
int32_t bitgen_sve_bytes(void)
{
    enum { GET_VECTOR_LENGTH = 51, LENGTH_MASK = 0xffff };
    const int answer = prctl(GET_VECTOR_LENGTH);
    return answer < 0 ? 0 : answer & LENGTH_MASK;
}

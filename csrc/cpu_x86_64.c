/* Which features this x86-64 CPU has, asked of cpuid; what the system saves on a context switch, of xgetbv.
 *
 * Compiled at the baseline and called before anything special runs. The rows are those of
 * configs/cpu_features.yaml that the ISA levels of this library need.
 */
#include "table.h"

#include <cpuid.h>
#include <string.h>

enum { EAX, EBX, ECX, EDX };

struct feature {
    uint32_t leaf, subleaf, reg, bit;
    uint32_t state; /* XCR0 bits: 0x6 AVX, 0xe6 AVX-512, 0x60000 AMX */
};

/* CPUs that identify themselves by these numbers, from first to last; `lacks`: features that none of them has. */
struct family {
    const char *vendor;
    uint32_t family, model[2], stepping[2];
    uint64_t lacks;
    int32_t id;
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

static int within(uint32_t number, const uint32_t range[2]) { return number >= range[0] && number <= range[1]; }

int32_t bitgen_cpu_family(void)
{
    uint32_t a, b, c, d, vendor[4] = {0};
    if (!__get_cpuid(0, &a, &vendor[0], &vendor[2], &vendor[1]) || !__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const uint32_t base = a >> 8 & 15, family = base + (base == 15 ? a >> 20 & 255 : 0);
    const uint32_t model = (a >> 4 & 15) + (base == 6 || base == 15 ? a >> 12 & 240 : 0);
    const uint64_t has = bitgen_cpu_features();
    for (const struct family *f = families; f->vendor; ++f)
        if (!strcmp(f->vendor, (const char *)vendor) && f->family == family && within(model, f->model) &&
            within(a & 15, f->stepping))
            return f->lacks & has ? 0 : f->id; /* a virtual machine that lies about its numbers */
    return 0;
}

int32_t bitgen_sve_bytes(void) { return 0; }

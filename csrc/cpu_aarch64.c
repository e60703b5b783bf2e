/* Which features this AArch64 CPU has, as the Linux kernel advertises them.
 *
 * The rows are those of configs/cpu_features.yaml that the ISA levels of this library need.
 */
#include "table.h"

#include <sys/auxv.h>
#include <sys/prctl.h>

static const struct {
    uint32_t hwcap, bit; /* AT_HWCAP or AT_HWCAP2 */
} features[] = {
//% for f in features
    {${"AT_HWCAP" if f.hwcap == 1 else "AT_HWCAP2"}, ${f.bit}}, /* ${f.name} */
//% endfor
    {AT_HWCAP, 0},
};

const char *const bitgen_feature_names[] = {
//% for f in features
    "${f.name}",
//% endfor
    "",
};
const int32_t bitgen_feature_count = ${features|length};

uint64_t bitgen_cpu_features(void)
{
    uint64_t found = 0;
    for (int32_t i = 0; i < bitgen_feature_count; ++i)
        found |= (uint64_t)(getauxval(features[i].hwcap) >> features[i].bit & 1) << i;
    return found;
}

/* The system and the process choose the length, below what the CPU has; headers before Linux 4.15 do not name it. */
int32_t bitgen_sve_bytes(void)
{
    enum { GET_VECTOR_LENGTH = 51, LENGTH_MASK = 0xffff };
    const int answer = prctl(GET_VECTOR_LENGTH);
    return answer < 0 ? 0 : answer & LENGTH_MASK;
}

/* Which features this AArch64 CPU has, as macOS advertises them.
 *
 * features.h, which is generated, has those rows of configs/cpu_features.yaml that the ISA levels of this library need.
 */
#include "table.h"

#include <sys/types.h>

#include <sys/sysctl.h>

struct feature {
    const char *setting; /* of sysctl */
};

#include "features.h"

uint64_t bitgen_cpu_features(void)
{
    uint64_t found = 0;
    for (int32_t i = 0; i < bitgen_feature_count; ++i) {
        int value = 0;
        size_t bytes = sizeof value;
        if (sysctlbyname(features[i].setting, &value, &bytes, NULL, 0) == 0 && value != 0) found |= (uint64_t)1 << i;
    }
    return found;
}

/* The numbers that identify a core are not told to programs. */
int32_t bitgen_cpu_family(void) { return 0; }

/* No Mac has SVE outside its streaming mode. */
int32_t bitgen_sve_bytes(void) { return 0; }

/* The default number of threads, on macOS: one a physical core. */
#include "table.h"

#include <sys/sysctl.h>

int32_t bitgen_usable_cores(void)
{
    int cores = 1;
    size_t size = sizeof cores;
    if (sysctlbyname("hw.physicalcpu", &cores, &size, NULL, 0)) return 1;
    return cores > 1 ? cores : 1;
}

/* Opening a bundle from C, on Windows: there is nothing there yet that installs one. See bundle.c. */
#include <stdio.h>

#include "bitgen.h"

int32_t bitgen_bundle_open(const char *folder, void **library, char *reason, int64_t reason_bytes)
{
    if (!folder || !library || (!reason && reason_bytes)) return BITGEN_ERROR_NULL;
    if (reason_bytes < 0) return BITGEN_ERROR_ARGUMENT;
    *library = NULL;
    if (reason_bytes)
        snprintf(reason, (size_t)reason_bytes, "cannot open %s: bundles are not installed on Windows", folder);
    return BITGEN_ERROR_BUNDLE;
}

/* NUMA, on systems where memory is one, or whose programs leave it to the system: nothing is bound or placed. */
#include "table.h"

#include <string.h>

void bitgen_settle_on_nodes(struct bitgen_context *ctx) { (void)ctx; }

int32_t bitgen_count_nodes(const struct bitgen_context *ctx)
{
    (void)ctx;
    return 1;
}

void bitgen_copy_by_nodes(const struct bitgen_context *ctx, const void *from, void *to, size_t bytes)
{
    (void)ctx;
    memcpy(to, from, bytes);
}

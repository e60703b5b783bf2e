/* Pages of work memory, on systems whose programs cannot choose, or need a privilege for large ones. Internal. */
#pragma once

#include <stddef.h>

static inline void bitgen_want_huge_pages(void *memory, size_t bytes)
{
    (void)memory;
    (void)bytes;
}

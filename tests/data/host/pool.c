/* Loops over a pool of 1 to 4 threads; prints how often an item was run, all together. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include "pool.h"
static int plain[4096];
static void body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    (void)arg, (void)worker;
    for (int64_t i = begin; i < end; ++i) plain[i] += 1; /* a data race if two threads get one item */
}
int main(void)
{
    for (int32_t threads = 1; threads <= 4; ++threads) {
        struct bitgen_pool *pool;
        if (bitgen_pool_create(&pool, threads)) return 1;
        for (int loop = 0; loop < 300; ++loop) {
            bitgen_pool_ahead(pool, plain + loop, loop % 3 ? (int64_t)sizeof plain : 0);
            bitgen_pool_run(pool, body, NULL, 1 + loop * 13, 1 + loop % 7);
        }
        bitgen_pool_destroy(pool);
    }
    int total = 0;
    for (int i = 0; i < 4096; ++i) total += plain[i];
    printf("%d", total);
    return 0;
}

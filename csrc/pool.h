/* A pool of threads for short parallel loops. Internal. */
#pragma once

#include <stdint.h>

struct bitgen_pool;

/* The loop body: items [begin, end), on thread `worker` (0 is the caller of bitgen_pool_run). */
typedef void bitgen_body(void *arg, int32_t worker, int64_t begin, int64_t end);

/* threads >= 1, the calling thread included. BITGEN_OK, BITGEN_ERROR_MEMORY or BITGEN_ERROR_THREADS. */
int32_t bitgen_pool_create(struct bitgen_pool **pool, int32_t threads);

/* Thread `index`, 1 .. threads - 1, a bitgen_thread of system.h: for who binds it to cores. */
const void *bitgen_pool_thread(const struct bitgen_pool *pool, int32_t index);

/* Ends and joins the threads. */
void bitgen_pool_destroy(struct bitgen_pool *pool);

/* Frees the memory only: for a process that fork() left without the threads. */
void bitgen_pool_abandon(struct bitgen_pool *pool);

/* Runs the body over the items [0, items), at most `claim` of them a call, and returns when all are done. */
void bitgen_pool_run(struct bitgen_pool *pool, bitgen_body *body, void *arg, int64_t items, int64_t claim);

/* What a loop to come reads: threads that wait ask for the start of their share of these bytes, into L2, until other
 * bytes are named. One share for each thread, in their order. Nothing is read: they may be gone by then. */
void bitgen_pool_ahead(struct bitgen_pool *pool, const void *data, int64_t bytes);

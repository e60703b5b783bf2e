/* The thread pool.
 *
 * Each thread has a contiguous range of the items (its own stretch of weights in memory) and takes it claim by
 * claim; a thread that is done takes claims from the others, so that slow cores and interrupted threads do not
 * hold up a call. A loop is opened and closed by its caller: a thread that is not awake by then is not waited
 * for. Threads spin for SPIN_NS after a loop, because the next one of a forward step is microseconds away, and
 * then sleep. While they spin they ask for what the next loop reads, if the caller said what that is: memory would
 * have nothing to do while one thread makes the inputs of a matrix.
 */
#define _POSIX_C_SOURCE 200809L

#include "pool.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "arch.h"
#include "bitgen.h"
#include "system.h"

enum {
    SPIN_NS = 50000,   /* longer than the pauses between the matmuls of a token, shorter than a scheduler slice */
    PAUSES = 64,       /* between two looks at the clock */
    AHEAD = 128 << 10, /* bytes that a waiting thread asks for at most: an eighth of Zen 4's L2, more than 5 us bring */
    AHEAD_STEP = 512,  /* between two looks at the state */
    LINE = 128         /* two cache lines: the adjacent-line prefetcher pairs them */
};

/* state = generation << 32 | number of pool threads inside; the loop is open while the generation is odd. */
static const uint64_t GENERATION = (uint64_t)1 << 32;

struct range {
    _Alignas(LINE) _Atomic int64_t next; /* first item nobody has claimed; beyond `end` when there is none */
    int64_t end;
};

struct worker {
    struct bitgen_pool *pool;
    int32_t index;
    bitgen_thread thread;
};

/* What a waiting thread asks for, and how many bytes of its share it has asked for. */
struct asked {
    const uint8_t *data;
    int64_t bytes;
};

struct bitgen_pool {
    _Alignas(LINE) _Atomic uint64_t state;
    _Alignas(LINE) _Atomic int32_t sleepers;
    _Atomic int32_t stop;
    _Alignas(LINE) _Atomic(const uint8_t *) ahead;
    _Atomic int64_t ahead_bytes;
    _Alignas(LINE) bitgen_body *body; /* the loop: written while it is closed and nobody is inside */
    void *arg;
    int64_t claim;
    int32_t threads, started;
    struct bitgen_monitor wake;
    struct range *ranges;   /* (threads) */
    struct worker *workers; /* (threads); 0, the caller, has no thread */
};

/* Claim and run until no range has anything left, the own range first. */
static void work(struct bitgen_pool *pool, int32_t self)
{
    for (int32_t i = 0; i < pool->threads; ++i) {
        int32_t victim = self + i < pool->threads ? self + i : self + i - pool->threads;
        struct range *range = &pool->ranges[victim];
        /* The look before the claim keeps thieves from bouncing the line of a range that is done. */
        while (atomic_load_explicit(&range->next, memory_order_relaxed) < range->end) {
            int64_t begin = atomic_fetch_add_explicit(&range->next, pool->claim, memory_order_relaxed);
            if (begin >= range->end) break;
            int64_t end = begin + pool->claim < range->end ? begin + pool->claim : range->end;
            pool->body(pool->arg, self, begin, end);
        }
    }
}

/* Ask for the next bytes of the thread's share, if there are any. A pair of address and size from two calls of
 * bitgen_pool_ahead does no harm: nothing is read. */
static int ask_ahead(const struct worker *self, struct asked *asked)
{
    const uint8_t *data = atomic_load_explicit(&self->pool->ahead, memory_order_relaxed);
    int64_t share = atomic_load_explicit(&self->pool->ahead_bytes, memory_order_relaxed) / self->pool->threads;
    if (data != asked->data) *asked = (struct asked){.data = data};
    if (asked->bytes >= share || asked->bytes >= AHEAD) return 0;
    uintptr_t at = (uintptr_t)data + (uintptr_t)(self->index * share + asked->bytes);
    for (int i = 0; i < AHEAD_STEP; i += 64) __builtin_prefetch((const void *)(at + (uintptr_t)i), 0, 2);
    asked->bytes += AHEAD_STEP;
    return 1;
}

/* Wait until the generation is not `seen`: spin, then sleep. Returns the state. */
static uint64_t wait_for_loop(const struct worker *self, struct asked *asked, uint64_t seen)
{
    struct bitgen_pool *pool = self->pool;
    uint64_t state;
    int64_t deadline = bitgen_now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < PAUSES; ++i) {
            state = atomic_load_explicit(&pool->state, memory_order_acquire);
            if (state / GENERATION != seen) return state;
            if (!ask_ahead(self, asked)) bitgen_pause();
        }
    } while (bitgen_now_ns() < deadline);

    bitgen_monitor_enter(&pool->wake);
    /* Sequentially consistent, as is the opening of a loop: either the opener sees a sleeper or the sleeper sees
     * the new generation. */
    atomic_fetch_add(&pool->sleepers, 1);
    while ((state = atomic_load(&pool->state)) / GENERATION == seen) bitgen_monitor_wait(&pool->wake);
    atomic_fetch_sub(&pool->sleepers, 1);
    bitgen_monitor_leave(&pool->wake);
    return state;
}

static void *worker_main(void *arg)
{
    struct worker *self = arg;
    struct bitgen_pool *pool = self->pool;
    struct asked asked = {0};
    uint64_t seen = 0;
    for (;;) {
        uint64_t state = wait_for_loop(self, &asked, seen);
        if (atomic_load_explicit(&pool->stop, memory_order_relaxed)) return NULL;
        int open = state / GENERATION & 1;
        /* Joining and "still open" are one step: nobody can come in after the loop was closed. */
        while (open && !atomic_compare_exchange_weak_explicit(&pool->state, &state, state + 1, memory_order_acquire,
                                                              memory_order_acquire))
            open = state / GENERATION & 1;
        seen = state / GENERATION;
        if (!open) continue;
        work(pool, self->index);
        atomic_fetch_sub_explicit(&pool->state, 1, memory_order_release);
    }
}

static void announce(struct bitgen_pool *pool)
{
    if (atomic_load(&pool->sleepers) == 0) return;
    bitgen_monitor_enter(&pool->wake);
    bitgen_monitor_notify(&pool->wake);
    bitgen_monitor_leave(&pool->wake);
}

void bitgen_pool_run(struct bitgen_pool *pool, bitgen_body *body, void *arg, int64_t items, int64_t claim)
{
    if (pool->threads == 1 || items <= claim) {
        body(arg, 0, 0, items);
        return;
    }
    pool->body = body;
    pool->arg = arg;
    pool->claim = claim;
    for (int32_t i = 0; i < pool->threads; ++i) {
        atomic_store_explicit(&pool->ranges[i].next, items * i / pool->threads, memory_order_relaxed);
        pool->ranges[i].end = items * (i + 1) / pool->threads;
    }
    atomic_fetch_add(&pool->state, GENERATION); /* open */
    announce(pool);
    work(pool, 0);
    atomic_fetch_add_explicit(&pool->state, GENERATION, memory_order_acquire); /* close */
    for (int64_t spins = 1; atomic_load_explicit(&pool->state, memory_order_acquire) % GENERATION; ++spins) {
        bitgen_pause();
        /* Whoever is inside may be waiting for this core. */
        if (spins % 1024 == 0) bitgen_yield();
    }
}

void bitgen_pool_ahead(struct bitgen_pool *pool, const void *data, int64_t bytes)
{
    atomic_store_explicit(&pool->ahead_bytes, bytes, memory_order_relaxed);
    atomic_store_explicit(&pool->ahead, data, memory_order_relaxed);
}

static void release(struct bitgen_pool *pool)
{
    free(pool->workers);
    bitgen_free(pool->ranges);
    bitgen_free(pool);
}

/* Threads 1 .. threads - 1. */
static int start_workers(struct bitgen_pool *pool)
{
    for (pool->started = 1; pool->started < pool->threads; ++pool->started) {
        struct worker *worker = &pool->workers[pool->started];
        worker->pool = pool;
        worker->index = pool->started;
        if (!bitgen_thread_start(&worker->thread, worker_main, worker)) break;
    }
    return pool->started == pool->threads;
}

int32_t bitgen_pool_create(struct bitgen_pool **out, int32_t threads)
{
    struct bitgen_pool *pool = bitgen_allocate(LINE, (sizeof *pool + LINE - 1) / LINE * LINE);
    if (!pool) return BITGEN_ERROR_MEMORY;
    memset(pool, 0, sizeof *pool);
    pool->threads = threads;
    pool->ranges = bitgen_allocate(LINE, sizeof *pool->ranges * (size_t)threads);
    pool->workers = calloc((size_t)threads, sizeof *pool->workers);
    if (!pool->ranges || !pool->workers) {
        release(pool);
        return BITGEN_ERROR_MEMORY;
    }
    bitgen_monitor_open(&pool->wake);
    if (!start_workers(pool)) {
        bitgen_pool_destroy(pool);
        return BITGEN_ERROR_THREADS;
    }
    *out = pool;
    return BITGEN_OK;
}

const void *bitgen_pool_thread(const struct bitgen_pool *pool, int32_t index) { return &pool->workers[index].thread; }

void bitgen_pool_destroy(struct bitgen_pool *pool)
{
    atomic_store(&pool->stop, 1);
    atomic_fetch_add(&pool->state, 2 * GENERATION);
    announce(pool);
    for (int32_t i = 1; i < pool->started; ++i) bitgen_thread_join(&pool->workers[i].thread);
    bitgen_monitor_close(&pool->wake);
    release(pool);
}

void bitgen_pool_abandon(struct bitgen_pool *pool) { release(pool); }

/* What differs between systems: Linux, macOS and whatever else is POSIX. Internal.
 *
 * Whoever includes this defines _POSIX_C_SOURCE 200809L before its first header.
 */
#pragma once

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static inline int64_t bitgen_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Stands for this process: fork() gives a child another one, and no threads. */
static inline int64_t bitgen_process(void) { return getpid(); }

/* Memory at a multiple of `alignment`, a power of two; its bytes too are a multiple of it. NULL: there is none. */
static inline void *bitgen_allocate(size_t alignment, size_t bytes) { return aligned_alloc(alignment, bytes); }
static inline void bitgen_free(void *memory) { free(memory); }

/* --- threads --- */

typedef pthread_t bitgen_thread;

/* Starts body(arg) on a thread that is deaf to signals: those are the program's business. Whether there is one. */
static inline int bitgen_thread_start(bitgen_thread *thread, void *(*body)(void *), void *arg)
{
    sigset_t all, old;
    sigfillset(&all);
    if (pthread_sigmask(SIG_SETMASK, &all, &old)) return 0;
    const int failed = pthread_create(thread, NULL, body, arg);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return !failed;
}

static inline void bitgen_thread_join(bitgen_thread *thread) { pthread_join(*thread, NULL); }

/* Gives this thread's core to another one that waits for it. */
static inline void bitgen_yield(void) { sched_yield(); }

/* A lock, and what threads that hold it can wait for. */
struct bitgen_monitor {
    pthread_mutex_t lock;
    pthread_cond_t changed;
};

static inline void bitgen_monitor_open(struct bitgen_monitor *m)
{
    pthread_mutex_init(&m->lock, NULL);
    pthread_cond_init(&m->changed, NULL);
}

static inline void bitgen_monitor_close(struct bitgen_monitor *m)
{
    pthread_cond_destroy(&m->changed);
    pthread_mutex_destroy(&m->lock);
}

static inline void bitgen_monitor_enter(struct bitgen_monitor *m) { pthread_mutex_lock(&m->lock); }
static inline void bitgen_monitor_leave(struct bitgen_monitor *m) { pthread_mutex_unlock(&m->lock); }
static inline void bitgen_monitor_wait(struct bitgen_monitor *m) { pthread_cond_wait(&m->changed, &m->lock); }
static inline void bitgen_monitor_notify(struct bitgen_monitor *m) { pthread_cond_broadcast(&m->changed); }

/* Runs a function once, whichever thread comes first; the others wait until it is done. */
typedef pthread_once_t bitgen_once;
#define BITGEN_ONCE PTHREAD_ONCE_INIT

static inline void bitgen_run_once(bitgen_once *once, void (*body)(void)) { pthread_once(once, body); }

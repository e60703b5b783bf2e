/* What differs between systems: Windows 7 and later, on 64 bits. Internal; system_posix.h says what each name means. */
#pragma once

#define WIN32_LEAN_AND_MEAN
#define NOMINMAX

#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>
#include <windows.h>

static inline int64_t bitgen_now_ns(void)
{
    LARGE_INTEGER count, each_second;
    QueryPerformanceCounter(&count);
    QueryPerformanceFrequency(&each_second);
    const int64_t n = count.QuadPart, second = each_second.QuadPart;
    return n / second * 1000000000 + n % second * 1000000000 / second; /* n * 10^9 would overflow in a quarter hour */
}

/* There is no fork(). */
static inline int64_t bitgen_process(void) { return 0; }

static inline void *bitgen_allocate(size_t alignment, size_t bytes) { return _aligned_malloc(bytes, alignment); }
static inline void bitgen_free(void *memory) { _aligned_free(memory); }

/* --- threads --- */

typedef struct {
    HANDLE handle;
    void *(*body)(void *);
    void *arg;
} bitgen_thread;

static inline DWORD WINAPI bitgen_thread_main(void *thread)
{
    const bitgen_thread *self = thread;
    self->body(self->arg);
    return 0;
}

/* `thread` stays where it is until it is joined. */
static inline int bitgen_thread_start(bitgen_thread *thread, void *(*body)(void *), void *arg)
{
    thread->body = body;
    thread->arg = arg;
    thread->handle = CreateThread(NULL, 0, bitgen_thread_main, thread, 0, NULL);
    return thread->handle != NULL;
}

static inline void bitgen_thread_join(bitgen_thread *thread)
{
    WaitForSingleObject(thread->handle, INFINITE);
    CloseHandle(thread->handle);
}

static inline void bitgen_yield(void) { SwitchToThread(); }

struct bitgen_monitor {
    SRWLOCK lock;
    CONDITION_VARIABLE changed;
};

static inline void bitgen_monitor_open(struct bitgen_monitor *m)
{
    InitializeSRWLock(&m->lock);
    InitializeConditionVariable(&m->changed);
}

static inline void bitgen_monitor_close(struct bitgen_monitor *m) { (void)m; }
static inline void bitgen_monitor_enter(struct bitgen_monitor *m) { AcquireSRWLockExclusive(&m->lock); }
static inline void bitgen_monitor_leave(struct bitgen_monitor *m) { ReleaseSRWLockExclusive(&m->lock); }

static inline void bitgen_monitor_wait(struct bitgen_monitor *m)
{ SleepConditionVariableSRW(&m->changed, &m->lock, INFINITE, 0); }

static inline void bitgen_monitor_notify(struct bitgen_monitor *m) { WakeAllConditionVariable(&m->changed); }

typedef INIT_ONCE bitgen_once;
#define BITGEN_ONCE INIT_ONCE_STATIC_INIT

static inline BOOL CALLBACK bitgen_once_main(INIT_ONCE *once, void *body, void **result)
{
    (void)once;
    (void)result;
    (*(void (**)(void))body)();
    return TRUE;
}

static inline void bitgen_run_once(bitgen_once *once, void (*body)(void))
{ InitOnceExecuteOnce(once, bitgen_once_main, &body, NULL); }

#undef INFINITE /* a name that others may have too */

/* Call a op with memory between two pages that nobody may touch, and live to tell. */
#define _DEFAULT_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

static sigjmp_buf rescue;

static void on_signal(int number) { siglongjmp(rescue, number); }

int64_t page_bytes(void) { return sysconf(_SC_PAGESIZE); }

/* A page that can be read and written; the pages before and behind it cannot. NULL when there is no memory. */
uint8_t *guarded_page(void)
{
    size_t page = (size_t)page_bytes();
    uint8_t *p = mmap(NULL, 3 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p + page, page, PROT_READ | PROT_WRITE) != 0)
        return NULL;
    return p + page;
}

/* 0, or the signal that ended the call. */
int guarded_call(void (*op)(void *const *arg, void *out), void *const *arg, void *out)
{
    static const int numbers[] = {SIGSEGV, SIGBUS, SIGILL};
    struct sigaction ours = {.sa_handler = on_signal}, before[3];
    for (int i = 0; i < 3; ++i)
        sigaction(numbers[i], &ours, &before[i]);
    int number = sigsetjmp(rescue, 1);
    if (number == 0)
        op(arg, out);
    for (int i = 0; i < 3; ++i)
        sigaction(numbers[i], &before[i], NULL);
    return number;
}

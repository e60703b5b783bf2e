/* The ops of a CPU that is not this one: an emulator runs this program. Records come in on stdin, answers go
 * out on stdout, both of native integers:
 *
 *     in   int32 op, argument count, pointer argument (-1: none), offset in the page, bytes behind the pointer;
 *          64 bytes for each argument; the bytes behind the pointer
 *     out  int32 signal, int32 whether bytes around the pointer's changed; 64 bytes of result; the bytes behind
 *          the pointer
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef void op(void *const *arg, void *out);

int64_t page_bytes(void);
uint8_t *guarded_page(void);
int guarded_call(op *w, void *const *arg, void *out);
extern op *const ops[];

enum { CANARY = 0xA5, MAX_ARGUMENTS = 8, MAX_BYTES = 4096 };

static int32_t strayed(const uint8_t *page, int64_t size, int64_t from, int64_t to)
{
    for (int64_t i = 0; i < size; ++i)
        if ((i < from || i >= to) && page[i] != CANARY) return 1;
    return 0;
}

int main(void)
{
    static uint8_t args[MAX_ARGUMENTS][64] __attribute__((aligned(64))), memory[MAX_BYTES];
    uint8_t *page = guarded_page();
    const int64_t size = page_bytes();
    if (!page) return 1;
    for (int32_t head[5]; fread(head, sizeof head, 1, stdin) == 1;) {
        const int32_t count = head[1], offset = head[3], bytes = head[4];
        if (count > MAX_ARGUMENTS || bytes > MAX_BYTES || offset + bytes > size) return 2;
        if (count && fread(args, 64, (size_t)count, stdin) != (size_t)count) return 3;
        if (bytes && fread(memory, (size_t)bytes, 1, stdin) != 1) return 4;
        memset(page, CANARY, (size_t)size);
        memcpy(page + offset, memory, (size_t)bytes);
        void *pointers[MAX_ARGUMENTS] = {0};
        for (int32_t i = 0; i < count; ++i) pointers[i] = i == head[2] ? page + offset : args[i];
        uint8_t out[64] __attribute__((aligned(64)));
        memset(out, CANARY, sizeof out);
        int32_t answer[2] = {guarded_call(ops[head[0]], pointers, out), 0};
        answer[1] = strayed(page, size, offset, offset + bytes);
        fwrite(answer, sizeof answer, 1, stdout);
        fwrite(out, sizeof out, 1, stdout);
        fwrite(page + offset, 1, (size_t)bytes, stdout);
    }
    return 0;
}

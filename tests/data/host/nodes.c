/* Appended to nodes_linux.c: the nodes of FOLDER as CPUs 0-7 see them from CPU HERE, the nodes of 1 to 5 threads, the
 * first threads that are bound, and a copy by nodes of all sizes around a page. */
#include <stdio.h>

static int check_copies(struct bitgen_context *ctx)
{
    enum { BYTES = 5 * PAGE };
    static uint8_t from[BYTES], to[BYTES + 64];
    for (int i = 0; i < BYTES; ++i) from[i] = (uint8_t)(i * 7 + i / 256);
    for (int bytes = 1; bytes < BYTES; bytes += 1 + bytes / 16) {
        memset(to, 0, sizeof to);
        bitgen_copy_by_nodes(ctx, from, to + 64, (size_t)bytes);
        if (memcmp(to + 64, from, (size_t)bytes) || (bytes < BYTES && to[64 + bytes])) return bytes;
    }
    return 0;
}

static void print_nodes(const struct bitgen_nodes *nodes)
{
    for (int32_t i = 0; i < nodes->count; ++i) {
        printf("%s", i ? " |" : "");
        for (int cpu = 0; cpu < CPUS; ++cpu)
            if (CPU_ISSET(cpu, &nodes->cpus[i])) printf(" %d", cpu);
    }
    printf("\n");
}

/* The shares of a matrix of ten pages and 100 bytes, in bytes. */
static void print_cut(const struct bitgen_nodes *nodes, int32_t threads)
{
    enum { BYTES = 10 * PAGE + 100 };
    static _Alignas(PAGE) uint8_t to[BYTES];
    struct piece pieces[NODES];
    const int32_t count = cut(nodes, threads, to, to, BYTES, pieces);
    for (int32_t i = 0; i < count; ++i) printf("%s%zu", i ? " " : "; ", pieces[i].bytes);
    printf("\n");
}

int main(void)
{
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    for (int cpu = 0; cpu < 8; ++cpu) CPU_SET(cpu, &allowed);
    struct bitgen_nodes nodes;
    read_nodes(FOLDER, &allowed, HERE, &nodes);
    print_nodes(&nodes);
    for (int32_t threads = 1; nodes.count && threads <= 5; ++threads) {
        for (int32_t i = 0; i < threads; ++i) printf("%s%d", i ? " " : "", node_of(&nodes, i, threads));
        print_cut(&nodes, threads);
    }
    /* This machine: one node as a rule, then nothing is bound; and two that are the same cores. */
    struct bitgen_context *ctx;
    if (bitgen_context_open(&ctx, 3)) return 1;
    bitgen_settle_on_nodes(ctx);
    printf("%d %d\n", bitgen_count_nodes(ctx) >= 1, check_copies(ctx));
    if (!ctx->nodes) ctx->nodes = malloc(sizeof *ctx->nodes);
    ctx->nodes->count = 2;
    sched_getaffinity(0, sizeof(cpu_set_t), &ctx->nodes->cpus[0]);
    ctx->nodes->cpus[1] = ctx->nodes->cpus[0];
    printf("%d %d\n", bitgen_count_nodes(ctx), check_copies(ctx));
    /* CPUs that are not there: the thread is not bound, and copies all the same. */
    CPU_ZERO(&ctx->nodes->cpus[1]);
    CPU_SET(CPUS - 1, &ctx->nodes->cpus[1]);
    printf("%d\n", check_copies(ctx));
    bitgen_context_close(ctx);
    return 0;
}

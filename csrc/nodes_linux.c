/* NUMA, on Linux: threads stay on a node of memory each, and weights are copied to where they are read.
 *
 * A page lies on the node of the thread that touches it first; pages of a mapped file lie wherever it was read or
 * written, and no process can move them. So rows are copied, by a thread on each node that touches what the context's
 * threads there will read. A thread is bound to all cores of its node, not to one: others may need a core too. No
 * system call that a container may forbid (mbind, move_pages) is made, and a policy of numactl counts as everywhere.
 */
#define _GNU_SOURCE

#include "system.h"
#include "table.h"

#include <stdio.h>
#include <string.h>

enum { NODES = 64, CPUS = CPU_SETSIZE, PAGE = 4096, PATH = 4096 };

/* The nodes that a process may use, that of the thread which made the context first, with the CPUs that it may use. */
struct bitgen_nodes {
    int32_t count;
    cpu_set_t cpus[NODES];
};

/* The CPUs of a list like "0-31,64-95", of those that are allowed; none where there is no file. */
static void read_cpu_list(const char *path, const cpu_set_t *allowed, cpu_set_t *cpus)
{
    int first, last;
    CPU_ZERO(cpus);
    FILE *file = fopen(path, "re");
    if (!file) return;
    while (fscanf(file, "%d", &first) == 1) {
        if (fscanf(file, "-%d", &last) != 1) last = first;
        for (int cpu = first; cpu >= 0 && cpu <= last && cpu < CPUS; ++cpu)
            if (CPU_ISSET(cpu, allowed)) CPU_SET(cpu, cpus);
        if (fgetc(file) != ',') break;
    }
    fclose(file);
}

/* The nodes below a folder, the one that has `here` first and then in their order, around. */
static void read_nodes(const char *folder, const cpu_set_t *allowed, int here, struct bitgen_nodes *nodes)
{
    struct bitgen_nodes found = {0};
    int32_t first = 0;
    char path[PATH];
    for (int node = 0; node < NODES; ++node) {
        cpu_set_t *cpus = &found.cpus[found.count];
        snprintf(path, sizeof path, "%s/node%d/cpulist", folder, node);
        read_cpu_list(path, allowed, cpus);
        if (!CPU_COUNT(cpus)) continue; /* a node of memory alone, or of cores that others use */
        if (here >= 0 && here < CPUS && CPU_ISSET(here, cpus)) first = found.count;
        ++found.count;
    }
    nodes->count = found.count;
    for (int32_t i = 0; i < found.count; ++i) nodes->cpus[i] = found.cpus[(first + i) % found.count];
}

/* The node of a thread: neighbours share one, and each has as many as it has CPUs. */
static int32_t node_of(const struct bitgen_nodes *nodes, int64_t thread, int64_t threads)
{
    int64_t all = 0, up_to = 0;
    int32_t node = 0;
    for (int32_t i = 0; i < nodes->count; ++i) all += CPU_COUNT(&nodes->cpus[i]);
    for (;; ++node) {
        up_to += CPU_COUNT(&nodes->cpus[node]);
        if (node == nodes->count - 1 || (2 * thread + 1) * all <= 2 * threads * up_to) return node;
    }
}

/* Keeps the threads 1 .. on their nodes. The calling thread is its program's: it stays where the system has it. */
void bitgen_settle_on_nodes(struct bitgen_context *ctx)
{
    cpu_set_t allowed;
    if (ctx->threads < 2 || sched_getaffinity(0, sizeof allowed, &allowed)) return;
    struct bitgen_nodes *nodes = malloc(sizeof *nodes);
    if (!nodes) return; /* then threads run, and memory lies, where the system likes */
    read_nodes("/sys/devices/system/node", &allowed, sched_getcpu(), nodes);
    if (nodes->count < 2) {
        free(nodes);
        return;
    }
    for (int32_t i = 1; i < ctx->threads; ++i) {
        const pthread_t *thread = bitgen_pool_thread(ctx->pool, i);
        pthread_setaffinity_np(*thread, sizeof(cpu_set_t), &nodes->cpus[node_of(nodes, i, ctx->threads)]);
    }
    ctx->nodes = nodes;
}

int32_t bitgen_count_nodes(const struct bitgen_context *ctx)
{ return ctx->nodes ? node_of(ctx->nodes, ctx->threads - 1, ctx->threads) + 1 : 1; }

/* What the threads of a node read of rows that the threads share evenly, copied by a thread there. */
struct piece {
    const cpu_set_t *cpus;
    const uint8_t *from;
    uint8_t *to;
    size_t bytes;
};

static void *copy_piece(void *arg)
{
    const struct piece *piece = arg;
    sched_setaffinity(0, sizeof *piece->cpus, piece->cpus);
    memcpy(piece->to, piece->from, piece->bytes);
    return NULL;
}

/* Where the share of the thread begins, at a page of `to`. */
static size_t share_begin(const uint8_t *to, size_t bytes, int64_t thread, int64_t threads)
{
    if (thread == threads) return bytes;
    const size_t begin = bytes / (size_t)threads * (size_t)thread;
    const size_t at = begin ? begin + (PAGE - ((uintptr_t)to + begin) % PAGE) % PAGE : 0;
    return at < bytes ? at : bytes;
}

/* The piece of each node (nodes); returns how many. */
static int32_t cut(const struct bitgen_nodes *nodes, int64_t threads, const uint8_t *from, uint8_t *to, size_t bytes,
                   struct piece *pieces)
{
    int32_t count = 0;
    for (int64_t first = 0, next; first < threads; first = next, ++count) {
        const int32_t node = node_of(nodes, first, threads);
        for (next = first + 1; next < threads && node_of(nodes, next, threads) == node;) ++next;
        const size_t begin = share_begin(to, bytes, first, threads), end = share_begin(to, bytes, next, threads);
        pieces[count] = (struct piece){&nodes->cpus[node], from + begin, to + begin, end - begin};
    }
    return count;
}

void bitgen_copy_by_nodes(const struct bitgen_context *ctx, const void *from, void *to, size_t bytes)
{
    struct piece pieces[NODES];
    bitgen_thread threads[NODES];
    int started[NODES];
    if (!ctx->nodes) {
        memcpy(to, from, bytes);
        return;
    }
    const int32_t count = cut(ctx->nodes, ctx->threads, from, to, bytes, pieces);
    for (int32_t i = 0; i < count; ++i) started[i] = bitgen_thread_start(&threads[i], copy_piece, &pieces[i]);
    for (int32_t i = 0; i < count; ++i) {
        if (started[i]) bitgen_thread_join(&threads[i]);
        else memcpy(pieces[i].to, pieces[i].from, pieces[i].bytes);
    }
}

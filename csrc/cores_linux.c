/* The default number of threads, on Linux: one a physical core this process may use. */
#define _GNU_SOURCE

#include "table.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>

enum { CPUS = CPU_SETSIZE, PATH = 4096 };

/* The smallest number in the file's list, like "0-1" or "3,67": it names the core of a logical CPU. -1: no file. */
static int first_sibling(int cpu)
{
    char path[128];
    int first = -1;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    FILE *file = fopen(path, "re");
    if (!file) return -1;
    if (fscanf(file, "%d", &first) != 1) first = -1;
    fclose(file);
    return first;
}

/* Cores whose hardware threads this process may run on. */
static int allowed_cores(void)
{
    cpu_set_t allowed, cores;
    CPU_ZERO(&cores);
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return 1;
    for (int cpu = 0; cpu < CPUS; ++cpu) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        int core = first_sibling(cpu);
        CPU_SET(core >= 0 && core < CPUS ? core : cpu, &cores);
    }
    return CPU_COUNT(&cores);
}

/* The quota in a folder of the control group file system, in CPUs; 0 when there is none. */
static double quota_of(const char *folder)
{
    char path[PATH + 32];
    long long limit = -1, period = 0;
    snprintf(path, sizeof path, "%s/cpu.max", folder);
    FILE *file = fopen(path, "re");
    if (file) {
        if (fscanf(file, "%lld %lld", &limit, &period) != 2) limit = -1; /* "max 100000" is no limit */
        fclose(file);
        return limit > 0 && period > 0 ? (double)limit / (double)period : 0;
    }
    snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", folder);
    file = fopen(path, "re");
    if (!file) return 0;
    if (fscanf(file, "%lld", &limit) != 1) limit = -1;
    fclose(file);
    snprintf(path, sizeof path, "%s/cpu.cfs_period_us", folder);
    file = fopen(path, "re");
    if (!file) return 0;
    if (fscanf(file, "%lld", &period) != 1) period = 0;
    fclose(file);
    return limit > 0 && period > 0 ? (double)limit / (double)period : 0;
}

/* The smallest quota of a control group and the groups around it. In a container the path may name a folder that
 * only the host sees; its ancestors still count. */
static double quota_of_group(const char *base, const char *group)
{
    char path[PATH];
    double least = 0;
    if (snprintf(path, sizeof path, "%s%s", base, group) >= (int)sizeof path) return 0;
    for (;;) {
        double quota = quota_of(path);
        if (quota > 0 && (least == 0 || quota < least)) least = quota;
        char *slash = strrchr(path, '/');
        if (!slash || (size_t)(slash - path) < strlen(base)) return least;
        *slash = 0;
    }
}

static double group_quota(void)
{
    static const char *const bases[] = {"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/cpu",
                                        "/sys/fs/cgroup/cpu,cpuacct"};
    char line[PATH];
    double least = 0;
    FILE *file = fopen("/proc/self/cgroup", "re");
    if (!file) return 0;
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        int unified = controllers[1] == 0;
        if (!unified && !strstr(controllers, "cpu")) continue;
        for (int i = unified ? 0 : 2; i < (unified ? 2 : 4); ++i) {
            double quota = quota_of_group(bases[i], group);
            if (quota > 0 && (least == 0 || quota < least)) least = quota;
        }
    }
    fclose(file);
    return least;
}

int32_t bitgen_usable_cores(void)
{
    int cores = allowed_cores();
    double quota = group_quota();
    if (quota > 0 && quota < cores) cores = (int)quota;
    return cores > 1 ? cores : 1;
}

/* The default number of threads, on Windows: one a physical core this process may use. */
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX

#include <stdlib.h>
#include <windows.h>

#include "table.h"

typedef SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX processor_record;

/* The logical CPUs that this process is bound to, where that is a choice: of a process in more than one group (each of
 * 64 CPUs at most) Windows tells no mask. */
static int allowed_cpus(KAFFINITY *mask, USHORT *group)
{
    DWORD_PTR process, system;
    USHORT count = 1;
    if (!GetProcessGroupAffinity(GetCurrentProcess(), &count, group) || count != 1) return 0;
    if (!GetProcessAffinityMask(GetCurrentProcess(), &process, &system) || !process) return 0;
    *mask = process;
    return 1;
}

/* The records of all cores, to be freed; NULL where the system gives none. */
static char *core_records(DWORD *bytes)
{
    *bytes = 0;
    GetLogicalProcessorInformationEx(RelationProcessorCore, NULL, bytes);
    char *records = *bytes ? malloc(*bytes) : NULL;
    if (records && GetLogicalProcessorInformationEx(RelationProcessorCore, (processor_record *)(void *)records, bytes))
        return records;
    free(records);
    return NULL;
}

/* Cores whose hardware threads this process may run on; 0: the system does not tell. */
static int allowed_cores(void)
{
    KAFFINITY mask = 0;
    USHORT group = 0;
    DWORD bytes;
    const int bound = allowed_cpus(&mask, &group);
    char *records = core_records(&bytes);
    int cores = 0;
    for (DWORD at = 0; records && at < bytes;) {
        const processor_record *core = (const processor_record *)(const void *)(records + at);
        const GROUP_AFFINITY *of = &core->Processor.GroupMask[0]; /* a core lies in one group */
        cores += !bound || (of->Group == group && (of->Mask & mask));
        at += core->Size;
    }
    free(records);
    return cores;
}

/* The share of all CPUs that a job object grants this process at the most; 1 without one, or without a hard cap. */
static double granted_share(void)
{
    JOBOBJECT_CPU_RATE_CONTROL_INFORMATION rate = {0};
    const DWORD wanted = JOB_OBJECT_CPU_RATE_CONTROL_ENABLE | JOB_OBJECT_CPU_RATE_CONTROL_HARD_CAP;
    if (!QueryInformationJobObject(NULL, JobObjectCpuRateControlInformation, &rate, sizeof rate, NULL)) return 1;
    return (rate.ControlFlags & wanted) == wanted && rate.CpuRate ? rate.CpuRate / 10000.0 : 1; /* in 1 / 100 % */
}

int32_t bitgen_usable_cores(void)
{
    SYSTEM_INFO system;
    GetSystemInfo(&system);
    const double quota = granted_share() * (double)system.dwNumberOfProcessors;
    int cores = allowed_cores();
    if (!cores) cores = (int)system.dwNumberOfProcessors;
    if (quota < cores) cores = (int)quota;
    return cores > 1 ? cores : 1;
}

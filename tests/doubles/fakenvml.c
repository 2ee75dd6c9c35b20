/* A double of libnvidia-ml.so.1 for tests of the probe: real bindings load it through LD_LIBRARY_PATH.
 *
 *   gcc -shared -fPIC -o libnvidia-ml.so.1 fakenvml.c             a driver of today
 *   gcc -shared -fPIC -DOLD_DRIVER -o libnvidia-ml.so.1 ...       one that lacks the newer functions
 *
 * The machine is described by the file that FAKE_NVML_STATE names, read again at each call, so that a test can
 * lose a GPU or unhang a call while the probe runs. One fact a line; everything not said has a default:
 *
 *   count 2                                 GPUs, each an H200 with 141 GiB
 *   gpu 0 util=10 used_mib=1024 temp=40 power_mw=70000 ecc=0 corrected=0 energy_mj=0 sm_mhz=1980 mem_mhz=2619
 *   gpu 0 throttle=0 pcie_tx_kbs=0 pcie_rx_kbs=0        the last two are measured over 20 ms at each call
 *   gpu 0 nvlink_tx_kib=5 nvlink_rx_kib=5 pcie_tx=5 pcie_rx=5     counters; not supported where they are not said
 *   mig 0 3                                 GPU 0 is in MIG mode with 3 instances of 18 GiB
 *   link 0 1                                GPUs 0 and 1 share an NVLink
 *   switch 0                                GPU 0's NVLinks end at a switch
 *   process 0 4242 1500 [graphics]          process 4242 holds 1500 MiB of GPU 0 (compute when nothing is said)
 *   use 0 4242 55 10 1000                   process 4242 used 55 % of GPU 0 and 10 % of its memory's time, at 1000 us
 *   fail NAME CODE [GPU]                    function NAME returns CODE, everywhere or on one GPU
 *   lost 1                                  every call on GPU 1 returns NVML_ERROR_GPU_IS_LOST; once the line is gone,
 *                                           until everybody in the process has shut the library down
 *   hang NAME                               function NAME does not return while this line is in the file
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* GPU_PROCESSES: each GPU has a process, without a file */
#ifndef GPU_COUNT
#define GPU_COUNT 2  /* where the file does not say; without a file nothing is read, so that the double costs little */
#endif

enum {
  SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
  INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15
};
enum { GPUS = 16, INSTANCES = 7, PROCESSES = 64, TEXT = 64 };
#define GIB (1024ull * 1024 * 1024)
#define MIB (1024ull * 1024)

typedef int result;
typedef unsigned long long u64;

struct device { int gpu, instance; };  /* instance -1: the GPU itself */
enum { NVLINK_TX, NVLINK_RX, PCIE_TX, PCIE_RX, COUNTERS };
struct gpu {
  unsigned util, temperature, power_mw, sm_mhz, mem_mhz, pcie_tx_kbs, pcie_rx_kbs, throttle;
  u64 used, ecc, corrected, energy_mj;
  long long counters[COUNTERS];  /* -1: not supported */
  int instances, has_switch, is_lost;
  unsigned linked;
};
struct use { int gpu; unsigned pid, sm, mem; u64 at_us; };
struct process { int gpu; unsigned pid; u64 bytes; int is_graphics; };
struct state {
  int count, processes, uses;
  struct gpu gpus[GPUS];
  struct process process[PROCESSES];
  struct use use[PROCESSES];
  result failure;  /* of the function that asks */
  int hangs;       /* the function that asks */
};

static int initialised;  /* nvmlInit may be called again and counts */
static unsigned stays_lost;
static struct device devices[GPUS], instances[GPUS][INSTANCES];

static void read_number(const char *facts, const char *name, u64 *number) {
  const char *at = strstr(facts, name);
  if (at) *number = strtoull(at + strlen(name), NULL, 0);
}

static void read_more(struct gpu *gpu, const char *facts) {
  static const char *const counters[COUNTERS] = {" nvlink_tx_kib=", " nvlink_rx_kib=", " pcie_tx=", " pcie_rx="};
  u64 sm = gpu->sm_mhz, mem = gpu->mem_mhz, sent = gpu->pcie_tx_kbs, received = gpu->pcie_rx_kbs, bits = gpu->throttle;
  read_number(facts, " sm_mhz=", &sm);
  read_number(facts, " mem_mhz=", &mem);
  read_number(facts, " pcie_tx_kbs=", &sent);
  read_number(facts, " pcie_rx_kbs=", &received);
  read_number(facts, " throttle=", &bits);
  read_number(facts, " energy_mj=", &gpu->energy_mj);
  read_number(facts, " corrected=", &gpu->corrected);
  for (int i = 0; i < COUNTERS; i++) read_number(facts, counters[i], (u64 *)&gpu->counters[i]);
  gpu->sm_mhz = sm; gpu->mem_mhz = mem; gpu->pcie_tx_kbs = sent; gpu->pcie_rx_kbs = received; gpu->throttle = bits;
}

static void read_gpu(struct gpu *gpu, const char *facts) {
  const char *at;
  read_more(gpu, facts);
  if ((at = strstr(facts, "util="))) sscanf(at, "util=%u", &gpu->util);
  if ((at = strstr(facts, "temp="))) sscanf(at, "temp=%u", &gpu->temperature);
  if ((at = strstr(facts, "power_mw="))) sscanf(at, "power_mw=%u", &gpu->power_mw);
  if ((at = strstr(facts, "ecc="))) sscanf(at, "ecc=%llu", &gpu->ecc);
  if ((at = strstr(facts, "used_mib=")) && sscanf(at, "used_mib=%llu", &gpu->used) == 1) gpu->used *= MIB;
}

static int in_range(int index) { return index >= 0 && index < GPUS; }

static void read_line(struct state *state, const char *line, const char *function, int gpu) {
  int a, b; unsigned pid, sm, mem; u64 mib; char name[TEXT], kind[TEXT] = "";
  if (sscanf(line, "count %d", &a) == 1) state->count = a > GPUS ? GPUS : a;
  else if (sscanf(line, "gpu %d", &a) == 1 && in_range(a)) read_gpu(&state->gpus[a], line);
  else if (sscanf(line, "mig %d %d", &a, &b) == 2 && in_range(a)) state->gpus[a].instances = b > INSTANCES ? INSTANCES : b;
  else if (sscanf(line, "link %d %d", &a, &b) == 2 && in_range(a) && in_range(b)) {
    state->gpus[a].linked |= 1u << b;
    state->gpus[b].linked |= 1u << a;
  }
  else if (sscanf(line, "switch %d", &a) == 1 && in_range(a)) state->gpus[a].has_switch = 1;
  else if (sscanf(line, "lost %d", &a) == 1 && in_range(a)) state->gpus[a].is_lost = 1;
  else if (sscanf(line, "process %d %u %llu %63s", &a, &pid, &mib, kind) >= 3 && state->processes < PROCESSES)
    state->process[state->processes++] = (struct process){a, pid, mib * MIB, !strcmp(kind, "graphics")};
  else if (sscanf(line, "use %d %u %u %u %llu", &a, &pid, &sm, &mem, &mib) == 5 && state->uses < PROCESSES)
    state->use[state->uses++] = (struct use){a, pid, sm, mem, mib};
  else if (sscanf(line, "fail %63s %d %d", name, &a, &b) >= 2) {
    int only = sscanf(line, "fail %*s %*d %d", &b) == 1 ? b : -1;
    if (!strcmp(name, function) && (only < 0 || only == gpu)) state->failure = a;
  }
  else if (sscanf(line, "hang %63s", name) == 1 && !strcmp(name, function)) state->hangs = 1;
}

static void read_state(struct state *state, const char *function, int gpu) {
  state->count = GPU_COUNT;
  state->processes = state->uses = state->failure = state->hangs = 0;
  for (int i = 0; i < GPUS; i++)
    state->gpus[i] = (struct gpu){.util = 10 + i, .temperature = 40 + i, .power_mw = 70000, .used = GIB,
                                  .sm_mhz = 1980, .mem_mhz = 2619, .energy_mj = 1000000 + i,
                                  .counters = {-1, -1, -1, -1}};
#ifdef GPU_PROCESSES
  for (int i = 0; i < state->count; i++) {
    state->process[state->processes++] = (struct process){i, getpid(), GIB, 0};
    state->use[state->uses++] = (struct use){i, getpid(), 50, 10, 1u << 20};
  }
#endif
  const char *path = getenv("FAKE_NVML_STATE");
  FILE *file = path ? fopen(path, "r") : NULL;
  if (!file) return;
  char line[256];
  while (fgets(line, sizeof line, file)) read_line(state, line, function, gpu);
  fclose(file);
}

/* Every call begins here: the state as it is now, after any hang, and the failure that is asked for. */
static result begin(struct state *state, const char *function, const struct device *device) {
  for (read_state(state, function, device ? device->gpu : -1); state->hangs; usleep(5000))
    read_state(state, function, device ? device->gpu : -1);
  if (state->failure) return state->failure;
  if (!initialised && strncmp(function, "nvmlInit", 8)) return UNINITIALIZED;
  if (device && state->gpus[device->gpu].is_lost) stays_lost |= 1u << device->gpu;
  if (device && (stays_lost >> device->gpu) & 1) return GPU_IS_LOST;
  return SUCCESS;
}
#define BEGIN(device) \
  struct state state; \
  result begun = begin(&state, __func__, device); \
  if (begun != SUCCESS) return begun; \
  (void)state
#define ON(handle) \
  struct device *device = handle; \
  if (!device) return INVALID_ARGUMENT; \
  BEGIN(device); \
  struct gpu *gpu = &state.gpus[device->gpu]; \
  (void)gpu

static int is_instance(const struct device *device) { return device->instance >= 0; }

static result put(char *buffer, unsigned size, const char *text) {
  if (strlen(text) + 1 > size) return INSUFFICIENT_SIZE;
  strcpy(buffer, text);
  return SUCCESS;
}

/* library and driver */
result nvmlInitWithFlags(unsigned flags) {
  (void)flags;
  BEGIN(NULL);
  for (int g = 0; g < GPUS && !initialised; g++) {
    devices[g] = (struct device){g, -1};
    for (int i = 0; i < INSTANCES; i++) instances[g][i] = (struct device){g, i};
  }
  initialised++;
  return SUCCESS;
}
result nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
result nvmlShutdown(void) {
  BEGIN(NULL);
  if (!--initialised) stays_lost = 0;
  return SUCCESS;
}
const char *nvmlErrorString(result code) {
  return code == GPU_IS_LOST ? "GPU is lost" : code == NOT_SUPPORTED ? "Not Supported" : "Unknown Error";
}
result nvmlSystemGetDriverVersion(char *buffer, unsigned size) { BEGIN(NULL); return put(buffer, size, "570.86.15"); }
result nvmlSystemGetCudaDriverVersion(int *version) { BEGIN(NULL); *version = 12080; return SUCCESS; }

/* devices */
result nvmlDeviceGetCount_v2(unsigned *count) { BEGIN(NULL); *count = state.count; return SUCCESS; }
result nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  BEGIN(NULL);
  if ((int)index >= state.count) return INVALID_ARGUMENT;
  *handle = &devices[index];
  return SUCCESS;
}
result nvmlDeviceGetUUID(void *handle, char *buffer, unsigned size) {
  ON(handle);
  char text[TEXT];
  if (is_instance(device)) sprintf(text, "MIG-%08x-aaaa-bbbb-cccc-%012x", device->gpu, device->instance);
  else sprintf(text, "GPU-%08x-aaaa-bbbb-cccc-000000000000", device->gpu);
  return put(buffer, size, text);
}
result nvmlDeviceGetName(void *handle, char *buffer, unsigned size) {
  ON(handle);
  return put(buffer, size, is_instance(device) ? "NVIDIA H200 MIG 1g.18gb" : "NVIDIA H200");
}
result nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  ON(handle);
  *major = 9; *minor = 0;
  return SUCCESS;
}
struct pci { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };
static void put_pci(struct pci *pci, int gpu) {
  memset(pci, 0, sizeof *pci);
  pci->bus = 0x10 + gpu;
  pci->id = 0x233510de;
  snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", pci->bus);
  memcpy(pci->legacy, pci->bus_id + 4, 13);
}
result nvmlDeviceGetPciInfo_v3(void *handle, struct pci *pci) { ON(handle); put_pci(pci, device->gpu); return SUCCESS; }

/* memory: version 1 counts what the driver keeps as used, version 2 names it */
static u64 total_bytes(const struct device *device) { return (is_instance(device) ? 18 : 141) * GIB; }
static const u64 reserved_bytes = 500 * MIB;
result nvmlDeviceGetMemoryInfo(void *handle, u64 *memory) {
  ON(handle);
  memory[0] = total_bytes(device);
  memory[2] = gpu->used + reserved_bytes;
  memory[1] = memory[0] - memory[2];
  return SUCCESS;
}
#ifndef OLD_DRIVER
struct memory { unsigned version; u64 total, reserved, free, used; };
result nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory *memory) {
  ON(handle);
  memory->total = total_bytes(device);
  memory->reserved = reserved_bytes;
  memory->used = gpu->used;
  memory->free = memory->total - memory->used - memory->reserved;
  return SUCCESS;
}
#endif

/* readings; a GPU in MIG mode has no utilisation, an instance neither power nor temperature nor ECC */
result nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
  ON(handle);
  if (gpu->instances) return NOT_SUPPORTED;
  rates[0] = gpu->util; rates[1] = gpu->util / 2;
  return SUCCESS;
}
result nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *degrees) {
  (void)sensor;
  ON(handle);
  if (is_instance(device)) return NOT_SUPPORTED;
  *degrees = gpu->temperature;
  return SUCCESS;
}
#ifndef OLD_DRIVER
struct temperature { unsigned version; int sensor, degrees; };
result nvmlDeviceGetTemperatureV(void *handle, struct temperature *reading) {
  ON(handle);
  if (is_instance(device)) return NOT_SUPPORTED;
  reading->degrees = gpu->temperature;
  return SUCCESS;
}
#endif
result nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatt) {
  ON(handle);
  if (is_instance(device)) return NOT_SUPPORTED;
  *milliwatt = gpu->power_mw;
  return SUCCESS;
}
result nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *milliwatt) { ON(handle); *milliwatt = 700000; return SUCCESS; }
#ifndef OLD_DRIVER
result nvmlDeviceGetTotalEccErrors(void *handle, int type, int counter, u64 *count) {
  (void)counter;
  ON(handle);
  if (is_instance(device)) return NOT_SUPPORTED;
  *count = type ? gpu->ecc : gpu->corrected;
  return SUCCESS;
}
result nvmlDeviceGetCurrentClocksEventReasons(void *handle, u64 *reasons) {
  ON(handle);
  if (is_instance(device)) return NOT_SUPPORTED;
  *reasons = gpu->throttle;
  return SUCCESS;
}

/* several values at once, each with its own return code */
struct field { unsigned id, scope; long long timestamp, latency_us; int type; result code; union { u64 number; } value; };
result nvmlDeviceGetFieldValues(void *handle, int count, struct field *fields) {
  ON(handle);
  for (int i = 0; i < count; i++) {
    static const unsigned ids[COUNTERS] = {138, 139, 197, 198};
    fields[i].type = 3;  /* unsigned long long */
    fields[i].code = NOT_SUPPORTED;
    if (is_instance(device)) continue;
    if (fields[i].id == 83) fields[i].code = SUCCESS, fields[i].value.number = gpu->energy_mj;
    for (int c = 0; c < COUNTERS; c++)
      if (fields[i].id == ids[c] && gpu->counters[c] >= 0 && (c >= PCIE_TX || fields[i].scope == 0xffffffffu))
        fields[i].code = SUCCESS, fields[i].value.number = gpu->counters[c];
  }
  return SUCCESS;
}
#endif
result nvmlDeviceGetTotalEnergyConsumption(void *handle, u64 *millijoule) {
  ON(handle);
  if (is_instance(device)) return NOT_SUPPORTED;
  *millijoule = gpu->energy_mj;
  return SUCCESS;
}
result nvmlDeviceGetClockInfo(void *handle, int clock, unsigned *mhz) {
  ON(handle);
  if (is_instance(device)) return NOT_SUPPORTED;
  *mhz = clock == 2 ? gpu->mem_mhz : gpu->sm_mhz;
  return SUCCESS;
}
result nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, u64 *reasons) {
  ON(handle);
  if (is_instance(device)) return NOT_SUPPORTED;
  *reasons = gpu->throttle;
  return SUCCESS;
}
result nvmlDeviceGetPcieThroughput(void *handle, int counter, unsigned *kilobytes) {
  ON(handle);
  if (is_instance(device)) return NOT_SUPPORTED;
  usleep(20000);
  *kilobytes = counter ? gpu->pcie_rx_kbs : gpu->pcie_tx_kbs;
  return SUCCESS;
}

/* MIG */
result nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
  ON(handle);
  *current = *pending = gpu->instances > 0;
  return SUCCESS;
}
result nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) { ON(handle); *count = INSTANCES; return SUCCESS; }
result nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **instance) {
  ON(handle);
  if ((int)index >= gpu->instances) return NOT_FOUND;
  *instance = &instances[device->gpu][index];
  return SUCCESS;
}

/* NVLink: link n of a GPU leads to GPU n; with a switch, links 0 and 1 lead there */
result nvmlDeviceGetNvLinkState(void *handle, unsigned link, unsigned *is_active) {
  ON(handle);
  if (!gpu->linked && !gpu->has_switch) return NOT_SUPPORTED;
  if (link >= GPUS) return INVALID_ARGUMENT;
  *is_active = gpu->has_switch ? link < 2 : (gpu->linked >> link) & 1;
  return SUCCESS;
}
#ifndef OLD_DRIVER
result nvmlDeviceGetNvLinkRemoteDeviceType(void *handle, unsigned link, int *kind) {
  (void)link;
  ON(handle);
  *kind = gpu->has_switch ? 2 : 0;
  return SUCCESS;
}
#endif
result nvmlDeviceGetNvLinkRemotePciInfo_v2(void *handle, unsigned link, struct pci *pci) {
  ON(handle);
  put_pci(pci, gpu->has_switch ? 0x80 : (int)link);
  return SUCCESS;
}

/* processes: the first call asks for the number, the second for the list */
struct process_info { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; };
static result list(struct state *state, int gpu, int is_graphics, unsigned *count, struct process_info *infos) {
  unsigned found = 0, room = *count;
  for (int i = 0; i < state->processes; i++) {
    struct process *process = &state->process[i];
    if (process->gpu != gpu || process->is_graphics != is_graphics) continue;
    if (infos && found < room) infos[found] = (struct process_info){process->pid, process->bytes, 0, 0};
    found++;
  }
  *count = found;
  return found > room || (found && !infos) ? INSUFFICIENT_SIZE : SUCCESS;
}
#ifdef OLD_DRIVER
result nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, struct process_info *infos) {
#else
result nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, struct process_info *infos) {
#endif
  ON(handle);
  return list(&state, device->gpu, 0, count, infos);
}
#ifndef OLD_DRIVER
result nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, struct process_info *infos) {
  ON(handle);
  return list(&state, device->gpu, 1, count, infos);
}
#endif

/* use by process: samples newer than asked for */
struct use_sample { unsigned pid; u64 at_us; unsigned sm, mem, encoder, decoder; };
result nvmlDeviceGetProcessUtilization(void *handle, struct use_sample *samples, unsigned *count, u64 since_us) {
  ON(handle);
  if (is_instance(device)) return NOT_SUPPORTED;
  unsigned found = 0, room = *count;
  for (int i = 0; i < state.uses; i++) {
    struct use *use = &state.use[i];
    if (use->gpu != device->gpu || use->at_us <= since_us) continue;
    if (samples && found < room) samples[found] = (struct use_sample){use->pid, use->at_us, use->sm, use->mem, 0, 0};
    found++;
  }
  *count = found;
  if (!found) return NOT_FOUND;
  return found > room || !samples ? INSUFFICIENT_SIZE : SUCCESS;
}

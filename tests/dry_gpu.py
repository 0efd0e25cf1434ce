"""
Run train.py on a simulated GPU, to check that it fits and compiles before you rent a real one.

    uv run python tests/dry_gpu.py --gpu 4090                                  default constants, compiled
    uv run python tests/dry_gpu.py --gpu t4 --set COMPILE=False DEPTH=2        some constants changed

A library (LD_PRELOAD) replaces the CUDA runtime, the driver and cuBLAS. Kernels do nothing, so speed and values are
meaningless: the loss is 0. Everything else is real: torch's checks of device, dtype and shape, its allocator with the
card's memory, autograd, Dynamo, Inductor, Triton and ptxas for the card's architecture, out of memory, evaluation and
report. The exit code is 0 if the run is ok, its last three steps neither waited for the GPU nor recompiled, and no
graph broke. It needs g++ and nm. It takes 15 seconds uncompiled, minutes compiled.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

GPUS = {  # name: compute capability, GiB of memory
    "t4": (75, 16), "a100-40": (80, 40), "a100": (80, 80), "3060": (86, 12), "3090": (86, 24), "4060": (89, 8),
    "4090": (89, 24), "l4": (89, 24), "h100": (90, 80), "h200": (90, 141), "b200": (100, 180), "5090": (120, 32),
}

SOURCE = r"""
#include <dlfcn.h>
#include <sys/mman.h>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include "driver_types.h"
typedef unsigned long long u64;
typedef unsigned un;
typedef const void* cp;
#define F extern "C" int

// The card: DRY_SM is its compute capability, DRY_MEMORY its bytes, DRY_DRIVER the CUDA version of its driver
static long env(const char* name) { return atol(getenv(name)); }
static int SM() { static int value = env("DRY_SM"); return value; }
static u64 TOTAL() { static u64 value = env("DRY_MEMORY"); return value; }
static const u64 CONTEXT = 500 << 20, PAGE = 2 << 20;  // memory that a CUDA context takes; size of a page

static int shared_memory() { int sm = SM();  // bytes that a block may ask for
  return sm == 90 || sm == 100 ? 232448 : sm == 80 ? 166912 : sm == 75 ? 65536 : 101376; }
static int threads() { int sm = SM(); return sm == 75 ? 1024 : sm == 80 || sm == 90 || sm == 100 ? 2048 : 1536; }
static int attribute(int which) {
  switch (which) {
    case 1: case 2: case 3: return 1024;                   // threads of a block, in all and by dimension
    case 4: return 64;
    case 5: return 2147483647;                             // blocks of a grid, by dimension
    case 6: case 7: return 65535;
    case 8: return 49152;                                  // shared memory of a block, unless it asks for more
    case 9: case 12: case 82: return 65536;                // constant memory, registers
    case 10: case 106: return 32;                          // threads of a warp
    case 16: return 132;                                   // multiprocessors
    case 38: return 50 << 20;                              // L2 cache
    case 39: return threads();
    case 41: case 78: case 83: case 95: case 102: case 115: return 1;  // features that every card has
    case 75: return SM() / 10;
    case 76: return SM() % 10;
    case 81: return shared_memory() + 1024;
    case 97: return shared_memory();
    case 120: return SM() >= 90;                           // clusters
  }
  return 0;
}
F cudaGetDeviceCount(int* n) {
  const char* visible = getenv("CUDA_VISIBLE_DEVICES");
  *n = 0;
  if (env("DRY_DRIVER") < 13000) return 35;                // the driver is too old
  *n = !visible || *visible;
  return *n ? 0 : 100;
}
F cudaDriverGetVersion(int* v) { *v = env("DRY_DRIVER"); return 0; }
F cuDriverGetVersion(int* v) { *v = env("DRY_DRIVER"); return 0; }
F cudaRuntimeGetVersion(int* v) { *v = 13000; return 0; }
F cudaGetDevice(int* d) { *d = 0; return 0; }
F cuDeviceGet(int* d, int) { *d = 0; return 0; }
F cudaDeviceGetAttribute(int* v, int which, int) { *v = attribute(which); return 0; }
F cuDeviceGetAttribute(int* v, int which, int) { *v = attribute(which); return 0; }
F cudaDeviceGetStreamPriorityRange(int* low, int* high) { *low = 0; *high = -5; return 0; }
F cudaDeviceCanAccessPeer(int* can, int, int) { *can = 0; return 0; }
F cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "dry run");
  p->totalGlobalMem = TOTAL();
  p->sharedMemPerBlock = attribute(8);
  p->regsPerBlock = p->regsPerMultiprocessor = attribute(12);
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  for (int i = 0; i < 3; i++) { p->maxThreadsDim[i] = attribute(2 + i); p->maxGridSize[i] = attribute(5 + i); }
  p->major = SM() / 10;
  p->minor = SM() % 10;
  p->multiProcessorCount = attribute(16);
  p->l2CacheSize = attribute(38);
  p->textureAlignment = 512;
  p->maxThreadsPerMultiProcessor = attribute(39);
  p->sharedMemPerMultiprocessor = attribute(81);
  p->sharedMemPerBlockOptin = attribute(97);
  p->unifiedAddressing = p->cooperativeLaunch = p->concurrentKernels = 1;
  return 0;
}

// Memory: allocations are mapped, never filled, and counted, so that the card can run out of memory
static std::mutex mutex;
static u64 used;
static std::map<u64, u64> ranges, blocks;                  // address: bytes
static bool on_gpu(cp p) {
  std::lock_guard<std::mutex> guard(mutex);
  auto i = ranges.upper_bound((u64)p);
  return i != ranges.begin() && (u64)p < (--i)->first + i->second;
}
static bool take(u64 n) { if (used + n + CONTEXT > TOTAL()) return false; used += n; return true; }
static u64 reserve(u64 n) {
  u64 p = (u64)mmap(0, n + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  p = (p + PAGE - 1) & ~(PAGE - 1);
  ranges[p] = n;
  return p;
}
F cudaMemGetInfo(size_t* left, size_t* total) {
  std::lock_guard<std::mutex> guard(mutex);
  *total = TOTAL();
  *left = TOTAL() - CONTEXT - used;
  return 0;
}
F cudaMalloc(void** p, size_t n) {
  std::lock_guard<std::mutex> guard(mutex);
  if (!take(n)) return 2;
  *p = (void*)reserve(n);
  blocks[(u64)*p] = n;
  return 0;
}
F cudaFree(void* p) {
  std::lock_guard<std::mutex> guard(mutex);
  used -= blocks[(u64)p];
  blocks.erase((u64)p);
  ranges.erase((u64)p);
  return 0;
}
F cuMemAddressReserve(u64* p, size_t n, size_t, u64, u64) {
  std::lock_guard<std::mutex> guard(mutex);
  *p = reserve(n);
  return 0;
}
F cuMemCreate(u64* handle, size_t n, cp, u64) {
  std::lock_guard<std::mutex> guard(mutex);
  if (!take(n)) return 2;
  *handle = (u64)new u64(n);
  return 0;
}
F cuMemRelease(u64 handle) {
  std::lock_guard<std::mutex> guard(mutex);
  used -= *(u64*)handle;
  delete (u64*)handle;
  return 0;
}
F cuMemUnmap(u64 p, size_t n) { madvise((void*)p, n, MADV_DONTNEED); return 0; }
F cuMemGetAllocationGranularity(size_t* size, cp, int) { *size = PAGE; return 0; }
F cudaHostAlloc(void** p, size_t n, un) { return posix_memalign(p, 4096, n); }
F cudaFreeHost(void* p) { free(p); return 0; }
F cudaPointerGetAttributes(cudaPointerAttributes* a, cp p) {
  memset(a, 0, sizeof *a);
  if (on_gpu(p)) { a->type = cudaMemoryTypeDevice; a->devicePointer = (void*)p; }
  return 0;
}
F cuPointerGetAttribute(void* out, int which, u64 p) { if (which == 3) *(u64*)out = p; else *(int*)out = 0; return 0; }

// Counters of what a training step does: launches, waits for the GPU, copies to the host
static std::atomic<long> counts[3];
extern "C" void dry_counts(long* out) { for (int i = 0; i < 3; i++) out[i] = counts[i]; }
static int copy(void* to, cp from, size_t n) {
  if (on_gpu(from)) {
    if (on_gpu(to)) return 0;
    counts[2]++;
    if (n == 1) { *(char*)to = 1; return 0; }              // a bool copied to the host is true
  }
  memcpy(to, from, n);
  return 0;
}
F cudaMemcpyAsync(void* to, cp from, size_t n, int, void*) { return copy(to, from, n); }
F cudaMemcpy(void* to, cp from, size_t n, int) { counts[1]++; return copy(to, from, n); }
#define WAIT(name, ...) F name(__VA_ARGS__) { counts[1]++; return 0; }
WAIT(cudaStreamSynchronize, void*)
WAIT(cudaDeviceSynchronize)
WAIT(cudaEventSynchronize, void*)
#define LAUNCH(name, ...) F name(__VA_ARGS__) { counts[0]++; return 0; }
LAUNCH(cudaLaunchKernel, cp, dim3, dim3, void**, size_t, void*)
LAUNCH(__cudaLaunchKernel, void*, dim3, dim3, void**, size_t, void*)
LAUNCH(cudaLaunchCooperativeKernel, cp, dim3, dim3, void**, size_t, void*)
LAUNCH(cudaLaunchKernelExC, cp, cp, void**)
LAUNCH(cuLaunchKernel, void*, un, un, un, un, un, un, un, void*, void**, void**)
LAUNCH(cuLaunchKernelEx, cp, void*, void**, void**)
LAUNCH(cublasGemmEx)
LAUNCH(cublasSgemm_v2)
LAUNCH(cublasSgemmStridedBatched)
LAUNCH(cublasGemmStridedBatchedEx)
LAUNCH(cublasLtMatmul)

// Handles, modules, streams and events are only numbers
static std::atomic<u64> next{4096};
#define NEW(name, ...) F name(void** handle, ##__VA_ARGS__) { *handle = (void*)(next += 16); return 0; }
NEW(cudaStreamCreate)
NEW(cudaStreamCreateWithPriority, un, int)
NEW(cudaEventCreate)
NEW(cudaEventCreateWithFlags, un)
NEW(cudaDeviceGetDefaultMemPool, int)
NEW(cuDevicePrimaryCtxRetain, int)
NEW(cuCtxGetCurrent)
NEW(cuModuleLoadData, cp)
NEW(cuModuleLoad, const char*)
NEW(cuModuleLoadDataEx, cp, un, void*, void*)
NEW(cuModuleGetFunction, void*, const char*)
NEW(cublasCreate_v2)
NEW(cublasLtCreate)
F cudaStreamGetPriority(void*, int* priority) { *priority = 0; return 0; }
F cudaStreamIsCapturing(void*, int* status) { *status = 0; return 0; }
F cudaStreamGetCaptureInfo(void*, int* status, u64* id, ...) { *status = 0; if (id) *id = 0; return 0; }
F cudaEventElapsedTime(float* ms, void*, void*) { *ms = 1; return 0; }
F cudaFuncGetAttributes(cudaFuncAttributes* a, cp) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = a->binaryVersion = SM() == 89 ? 86 : SM();  // torch has no code for sm_89 alone
  return 0;
}
F cuFuncGetAttribute(int* v, int which, void*) { *v = which == 0 ? 1024 : which == 4 ? 32 : 0; return 0; }
F cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, cp, int, size_t) { *n = 2; return 0; }
F cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, cp, int, size_t, un) { *n = 2; return 0; }
F cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, void*, int, size_t) { *n = 2; return 0; }
F cuOccupancyMaxActiveClusters(int* n, void*, cp) { *n = 8; return 0; }
F cuDevicePrimaryCtxGetState(int, un* flags, int* active) { *flags = 0; *active = 1; return 0; }
F cuCtxGetLimit(size_t* v, int) { *v = 1 << 20; return 0; }
F cudaGetSymbolAddress(void** p, cp) { static u64 address = reserve(PAGE); *p = (void*)address; return 0; }

// Start of the runtime; errors
F __cudaGetKernel(void** kernel, cp) { *kernel = (void*)8; return 0; }
extern "C" char __cudaInitModule(void**) { return 1; }
extern "C" void** __cudaRegisterFatBinary(void*) { static void* handle[4]; return handle; }
static thread_local struct { dim3 grid, block; size_t memory; void* stream; } launch;
F __cudaPushCallConfiguration(dim3 g, dim3 b, size_t m, void* s) { launch = {g, b, m, s}; return 0; }
F __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* m, void** s) {
  *g = launch.grid; *b = launch.block; *m = launch.memory; *s = launch.stream;
  return 0;
}
extern "C" const char* cudaGetErrorString(int e) { return e == 2 ? "out of memory" : "error of the dry run"; }
extern "C" const char* cudaGetErrorName(int e) { return cudaGetErrorString(e); }
F cuGetErrorString(int, const char** s) { *s = "error of the dry run"; return 0; }
static int nothing() { return 0; }
F cudaGetDriverEntryPointByVersion(const char* name, void** f, un, u64, int* status) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (!*f) *f = (void*)nothing;
  if (status) *status = 0;
  return 0;
}
"""
DRIVER = """cuInit cuCtxSetLimit cuFuncSetCacheConfig cuTensorMapEncodeTiled cuMemMap cuMemSetAccess cuMemAddressFree
            cuFuncSetAttribute cuCtxSetCurrent"""  # loaded by name
OTHERS = ("cuFile", "cufft", "curand", "cudnn", "cusparse", "cusolver", "cupti")  # stay real

KERNEL = '''
from torch.nn.attention.varlen import varlen_attn
import torch


def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):
    """A stand-in for FlashAttention-3: torch's kernel."""
    B, T, H, D = q.shape
    edges = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    q, k, v = (x.reshape(B * T, H, D) for x in (q, k, v))
    return varlen_attn(q, k, v, edges, edges, T, T, window_size=window_size).view(B, T, H, D)
'''


def build_library(folder, site):
    """Compile SOURCE, and a stub that returns 0 for every other CUDA function that torch or Triton needs."""
    run, path = subprocess.check_output, folder / "libcuda.so.1"
    source = folder / "dry.cpp"
    if path.exists() and source.read_text() == SOURCE:
        return path
    source.write_text(SOURCE)
    include = [f"-I{site / p}" for p in ("nvidia/cu13/include", "triton/backends/nvidia/include")]
    run(["g++", "-c", "-fPIC", "-w", *include, source, "-o", folder / "dry.o"])
    symbols = run(["nm", "-D", "--undefined-only", *(site / "torch/lib").glob("lib*.so")], text=True,
                stderr=subprocess.DEVNULL).split()
    names = {name for name in (word.partition("@")[0] for word in symbols)
             if name.startswith(("cu", "__cuda")) and not name.startswith(OTHERS)} | {*DRIVER.split()}
    names -= {*run(["nm", "--defined-only", folder / "dry.o"], text=True).split()}
    (folder / "rest.c").write_text("".join(f"int {name}() {{ return 0; }}\n" for name in sorted(names)))
    run(["g++", "-x", "c", "-c", "-fPIC", "-w", folder / "rest.c", "-o", folder / "rest.o"])
    run(["g++", "-shared", "-Wl,-soname,libcuda.so.1", folder / "dry.o", folder / "rest.o", "-o", path, "-ldl"])
    return path


def write_kernel(hub):
    """Write the kernel that train.py loads on Hopper to `hub`, a Hugging Face cache."""
    snapshot, variant = "0" * 40, f"torch-stable-abi29-cu130-{platform.machine()}-linux"
    repository = hub / "hub/kernels--kernels-community--flash-attn3"
    build = repository / "snapshots" / snapshot / "build" / variant
    build.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs/v1").write_text(snapshot)
    (build / "__init__.py").write_text(KERNEL)
    metadata = dict(name="flash-attn3", id="flash_attn3_dry", version=1, license="MIT",
                    backend=dict(type="cuda", archs=["9.0a"]))
    (build / "metadata.json").write_text(json.dumps(metadata | {"python-depends": []}))


def environment(gpu, folder, driver=13000):
    """The environment of a process with the simulated GPU `gpu`. Writes its library and caches to `folder`."""
    site, (sm, gib) = Path(importlib.util.find_spec("torch").origin).parents[1], GPUS[gpu]
    folder.mkdir(parents=True, exist_ok=True)
    write_kernel(folder)
    return os.environ | dict(
        LD_PRELOAD=str(build_library(folder, site)), LD_LIBRARY_PATH=str(folder), TRITON_LIBCUDA_PATH=str(folder),
        DRY_SM=str(sm), DRY_MEMORY=str(gib << 30), DRY_DRIVER=str(driver), HF_HOME=str(folder), HF_HUB_OFFLINE="1",
        AUTORESEARCH_CACHE=str(folder / "data"), AUTORESEARCH_TIME_BUDGET="3", CUDA_VISIBLE_DEVICES="0",
        TORCHINDUCTOR_CACHE_DIR=str(folder / f"inductor-{sm}"), TRITON_CACHE_DIR=str(folder / f"triton-{sm}"),
    )


def child(settings):
    """In a process with the library, prepare a little text, run train.main() and count what its steps do."""
    sys.path.insert(0, os.getcwd())
    import torch._dynamo.utils as dynamo

    import prepare

    text = Path(importlib.util.find_spec("torch").origin).parent / "_inductor/codegen"
    prepare.prepare(str(text), prepare.device_scale())
    import train

    library, steps, train_step = ctypes.CDLL(os.environ["LD_PRELOAD"]), [], train.train_step

    def counts():
        library.dry_counts(numbers := (ctypes.c_long * 3)())
        return [*numbers, dynamo.counters["stats"]["unique_graphs"]]

    def counted(*args):
        before, result = counts(), train_step(*args)
        steps.append([b - a for a, b in zip(before, counts(), strict=True)])
        return result

    train.train_step = counted
    for name, value in (setting.split("=", 1) for setting in settings):
        setattr(train, name, eval(value))
    train.main()  # raises SystemExit unless the run is ok
    launches, waits, copies, graphs = (max(column) for column in zip(*steps[-3:], strict=True))
    breaks, all_graphs = dict(dynamo.counters["graph_break"]), dynamo.counters["stats"]["unique_graphs"]
    print(f"dry run at scale {train.SCALE}: a step has {launches} launches, {waits} waits, {copies} copies to the "
          f"host, {graphs} new graphs; {all_graphs} graphs in all, breaks: {breaks}")
    sys.exit(bool(waits or copies or graphs or breaks))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--gpu", choices=GPUS, default="h100")
    option("--cache", default=Path(tempfile.gettempdir(), "dry-gpu"), type=Path,
           help="folder for library and caches, kept for the next run")
    option("--set", nargs="*", default=[], metavar="NAME=VALUE", help="constants of train.py to change")
    args = parser.parse_args()
    run = [sys.executable, __file__, "--child", *args.set]
    sys.exit(subprocess.run(run, env=environment(args.gpu, args.cache.absolute())).returncode)


if __name__ == "__main__":
    child(sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()

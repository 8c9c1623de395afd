// As much of CUDA as csrc/cuda.cu uses, on the CPU: one block after another in a shuffled order, its threads as fibers that
// meet at barriers and shuffles. A barrier that not all threads reach, a misaligned 128-bit access and a shuffle that part of a
// warp takes end the process with a message. Blind to races between blocks, which a GPU has to show.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kMaxThreads = 1024, kStack = 64 << 10, kWarp = 32;

enum State { kFresh, kRunning, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  State state;
  ucontext_t start;
  jmp_buf resume;
};

inline Fiber fibers[kMaxThreads];
inline char* stacks;
inline jmp_buf scheduler;
inline ucontext_t scheduler_context;
inline int current;
inline uint64_t slots[kMaxThreads];  // what each thread offers to a shuffle
inline const std::function<void()>* body;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "CUDA emulation: %s (block %u, thread %d)\n", what, blockIdx.x, current);
  abort();
}

inline void wait(State state) {
  fibers[current].state = state;
  if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 1);
  threadIdx.x = current;
}

inline void run_fiber() {
  (*body)();
  fibers[current].state = kDone;
  _longjmp(scheduler, 1);
}

// Run thread i until it waits or ends.
inline void resume(int i) {
  current = i;
  threadIdx.x = i;
  Fiber& fiber = fibers[i];
  const bool fresh = fiber.state == kFresh;
  fiber.state = kRunning;
  if (_setjmp(scheduler)) return;
  if (!fresh) _longjmp(fiber.resume, 1);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = stacks + size_t(i) * kStack;
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

inline bool all(int first, int last, State state) {
  for (int i = first; i < last; ++i)
    if (fibers[i].state != state) return false;
  return true;
}

inline void run_block(int threads) {
  for (int i = 0; i < threads; ++i) fibers[i].state = kFresh;
  while (!all(0, threads, kDone)) {
    bool moved = false;
    for (int warp = 0; warp < threads; warp += kWarp) {
      const int end = min(warp + kWarp, threads);
      for (int i = warp; i < end; ++i)
        if (fibers[i].state == kFresh || fibers[i].state == kRunning) resume(i), moved = true;
      if (all(warp, end, kAtWarpBarrier)) {
        for (int i = warp; i < end; ++i) fibers[i].state = kRunning;
        moved = true;
      }
    }
    if (all(0, threads, kAtBlockBarrier)) {
      for (int i = 0; i < threads; ++i) fibers[i].state = kRunning;
      moved = true;
    }
    if (!moved) fail("threads wait for each other at different places");
  }
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  if (!stacks) stacks = static_cast<char*>(malloc(size_t(kMaxThreads) * kStack));
  if (block.x > kMaxThreads || block.x % kWarp) fail("a block is not whole warps");
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  std::vector<unsigned> order(grid.x);
  std::iota(order.begin(), order.end(), 0u);
  static std::mt19937 generator;
  std::shuffle(order.begin(), order.end(), generator);
  for (unsigned block_index : order) {
    blockIdx.x = block_index;
    run_block(int(block.x));
  }
}

template <class T>
T shuffle(T value, int source) {
  static_assert(sizeof(T) <= 8);
  memcpy(&slots[current], &value, sizeof(T));
  wait(kAtWarpBarrier);
  T result;
  memcpy(&result, &slots[source], sizeof(T));
  wait(kAtWarpBarrier);
  return result;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::kAtBlockBarrier); }
inline void __threadfence() {}

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  const int lane = emulation::current % 32;
  return emulation::shuffle(value, lane + offset < 32 ? emulation::current + offset : emulation::current);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::shuffle(value, emulation::current ^ mask);
}

template <class T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(T)) emulation::fail("a load is not aligned");
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return __ldg(from);
}

inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline double __hiloint2double(int high, int low) {
  const uint64_t bits = uint64_t(uint32_t(high)) << 32 | uint32_t(low);
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
typedef void* cudaStream_t;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t) { return "?"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 3, cudaSuccess; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  emulation::launch(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}

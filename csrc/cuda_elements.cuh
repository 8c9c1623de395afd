// Eight elements at a time, in 128-bit accesses: the part of the CUDA kernels that touches the large tensors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "loss_math.h"

namespace vadiff {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kVector = 8;                    // elements per thread and step: one 128-bit access at 16 bits each
constexpr unsigned kStep = kThreads * kVector;  // elements per block and step

__device__ __forceinline__ bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Eight stored elements, not yet converted: a step issues all its loads before it uses one.
template <class C>
struct Raw {
  uint4 words[sizeof(C) == 8 ? 4 : 2];
};

// kReadOnly: the kernel does not write there.
template <class C, bool kReadOnly = true>
__device__ __forceinline__ void load_raw(Raw<C>& raw, const void* data, int dtype, int64_t first) {
  const uint4* from = reinterpret_cast<const uint4*>(static_cast<const char*>(data) + first * dtype_size(dtype));
  auto load = [](const uint4* at) { return kReadOnly ? __ldg(at) : *at; };
  raw.words[0] = load(from);
  if (dtype == kFloat32 || dtype == kFloat64) raw.words[1] = load(from + 1);
  if constexpr (sizeof(C) == 8) {
    if (dtype == kFloat64) raw.words[2] = load(from + 2), raw.words[3] = load(from + 3);
  }
}

template <class C>
__device__ __forceinline__ C load_one(const void* data, int dtype, int64_t i) {
  switch (dtype) {
    case kFloat32: return C(__ldg(static_cast<const float*>(data) + i));
    case kBfloat16: return C(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]));
    case kFloat16: return C(__half2float(static_cast<const __half*>(data)[i]));
    default: return C(__ldg(static_cast<const double*>(data) + i));
  }
}

// A float64 target of a 32-bit prediction does not fit a Raw<float>: it is loaded here, element by element.
template <class C>
__device__ __forceinline__ void convert(const Raw<C>& raw, const void* data, int dtype, int64_t first, C (&values)[kVector]) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(raw.words);
  if (dtype == kFloat32) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = C(__uint_as_float(words[i]));
  } else if (dtype == kBfloat16) {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      values[i] = C(__uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16));
  } else if (dtype == kFloat16) {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      values[i] = C(__half2float(__ushort_as_half(uint16_t(i % 2 ? words[i / 2] >> 16 : words[i / 2]))));
  } else {
    for (int i = 0; i < kVector; ++i) {
      if constexpr (sizeof(C) == 8)
        values[i] = __hiloint2double(int(words[2 * i + 1]), int(words[2 * i]));
      else
        values[i] = load_one<C>(data, dtype, first + i);
    }
  }
}

__device__ __forceinline__ uint32_t narrow(float x, int dtype) {
  return dtype == kBfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
}

template <class C>
__device__ __forceinline__ void store_one(void* data, int dtype, int64_t i, C value) {
  if (dtype == kFloat64)
    static_cast<double*>(data)[i] = value;
  else if (dtype == kFloat32)
    static_cast<float*>(data)[i] = float(value);
  else
    static_cast<uint16_t*>(data)[i] = uint16_t(narrow(float(value), dtype));
}

template <class C>
__device__ __forceinline__ void store_eight(void* data, int dtype, int64_t first, const C (&values)[kVector]) {
  uint4* to = reinterpret_cast<uint4*>(static_cast<char*>(data) + first * dtype_size(dtype));
  if constexpr (sizeof(C) == 8) {
    double2* pairs = reinterpret_cast<double2*>(to);
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) pairs[i] = make_double2(values[2 * i], values[2 * i + 1]);
  } else if (dtype == kFloat32) {
    to[0] = make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                       __float_as_uint(values[3]));
    to[1] = make_uint4(__float_as_uint(values[4]), __float_as_uint(values[5]), __float_as_uint(values[6]),
                       __float_as_uint(values[7]));
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = narrow(values[2 * i], dtype) | narrow(values[2 * i + 1], dtype) << 16;
    to[0] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Sum over the block, the same in every thread. Has two barriers.
template <int kCount>
__device__ inline void block_sums(double* values) {
  __shared__ double warps[kThreads / 32][kCount];
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    for (int offset = 16; offset > 0; offset /= 2) values[n] += __shfl_down_sync(~0u, values[n], offset);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][n] = values[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    values[n] = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) values[n] += warps[warp][n];
  }
  __syncthreads();  // `warps` may be written again
}

__device__ inline double block_sum(double value) {
  block_sums<1>(&value);
  return value;
}

}  // namespace cuda
}  // namespace vadiff

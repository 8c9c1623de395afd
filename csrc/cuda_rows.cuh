// One pass over the elements of the work items: an item is one of `splits` runs of `chunk` elements of a sample, one block's.
// Compiled for each dtype of the prediction twice: for targets and noise of that dtype, and for those of any.
#pragma once

#include <type_traits>

#include "cuda_elements.cuh"
#include "step.h"

namespace vadiff {
namespace cuda {

template <int kDtype>
using Arithmetic = std::conditional_t<kDtype == kFloat64, double, float>;

// What the slope of each sample is multiplied by, besides w*u*v and a.
template <class C>
struct Multiplier {
  const C* upstream;  // [B], or a scalar with stride 0; null: the forward pass
  int64_t stride;
  C scale;
};

// What each element of an item is multiplied by.
template <class C>
struct Factors {
  C a, b, c, slope;
  bool masked;  // the gradient is exactly 0
};

template <int kDtype, bool kSame>
__device__ __forceinline__ int dtype_of(const Elements& elements) {
  return kSame ? kDtype : elements.dtype;
}

// What a thread holds of one step of its block, all of it loaded before any arithmetic: 32 bytes per tensor, except that 16-bit
// predictions beside tensors of any dtype get 16, for want of registers.
template <int kDtype, bool kSame>
struct Step {
  using C = Arithmetic<kDtype>;
  static constexpr unsigned kVectors = kSame && (kDtype == kBfloat16 || kDtype == kFloat16) ? 2 : 1;
  Raw<C> prediction[kVectors], target[kVectors], noise[kVectors];

  // The vectors that start at `at`, `at + kStep`, ... before `end`.
  __device__ __forceinline__ void load(const RowsTask<C>& task, unsigned at, unsigned end) {
#pragma unroll
    for (unsigned v = 0; v < kVectors; ++v) {
      const unsigned first = at + v * kStep;
      if (first >= end) continue;
      load_raw(prediction[v], task.prediction.data, kDtype, first);
      if (task.target.data) load_raw(target[v], task.target.data, dtype_of<kDtype, kSame>(task.target), first);
      if (task.noise.data) load_raw(noise[v], task.noise.data, dtype_of<kDtype, kSame>(task.noise), first);
    }
  }

  // Sum of the losses of the vector v, which starts at `first`, if `kLoss`; writes their gradient, if any.
  template <bool kLoss>
  __device__ __forceinline__ C run(const RowsTask<C>& task, unsigned v, unsigned first, C huber_delta,
                                   const Factors<C>& by) const {
    C r[kVector], term[kVector], sum = 0;
    // 1. The residuals.
    convert(prediction[v], task.prediction.data, kDtype, first, r);
#pragma unroll
    for (int i = 0; i < kVector; ++i) r[i] *= by.a;
    if (task.target.data) {
      convert(target[v], task.target.data, dtype_of<kDtype, kSame>(task.target), first, term);
#pragma unroll
      for (int i = 0; i < kVector; ++i) r[i] += by.b * term[i];
    }
    if (task.noise.data) {
      convert(noise[v], task.noise.data, dtype_of<kDtype, kSame>(task.noise), first, term);
#pragma unroll
      for (int i = 0; i < kVector; ++i) r[i] += by.c * term[i];
    }
    // 2. Their losses.
    if constexpr (kLoss) {
      sum = element_loss(r[0], huber_delta);
#pragma unroll
      for (int i = 1; i < kVector; ++i) sum += element_loss(r[i], huber_delta);
    }
    // 3. Their gradient.
    if (task.gradient) {
      if (by.masked) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) r[i] = 0;
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) r[i] = by.slope * residual_slope(r[i], huber_delta);
      }
      store_eight(task.gradient, kDtype, first, r);
    }
    return sum;
  }

  // This thread's vectors of an item, from `at`, whose step is loaded.
  template <bool kLoss>
  __device__ __forceinline__ double run_all(const RowsTask<C>& task, unsigned at, unsigned end, C huber_delta,
                                            const Factors<C>& by) {
    double total = 0;
    if (at >= end) return total;
    for (;;) {
#pragma unroll
      for (unsigned v = 0; v < kVectors; ++v) {
        const unsigned first = at + v * kStep;
        if (v == 0 || first < end) total += double(run<kLoss>(task, v, first, huber_delta, by));
      }
      at += kVectors * kStep;
      if (at >= end) return total;
      load(task, at, end);
    }
  }
};

// The factors of a sample. In the forward pass a chain of loads, log-SNR -> table -> weight.
template <class C, bool kBackward>
__device__ __forceinline__ Factors<C> factors_of(const RowsTask<C>& task, const Samples<C>& samples, int64_t sample,
                                                 const Bins& bins, const Multiplier<C>& by) {
  Factors<C> factors = {task.a_each ? task.a_each[sample] : task.a, task.b_each ? task.b_each[sample] : task.b,
                        task.c_each ? task.c_each[sample] : task.c, C(0), false};
  if constexpr (kBackward) {
    factors.slope = samples.factor[sample] * by.upstream[sample * by.stride] * factors.a * by.scale;
    factors.masked = samples.masked[sample] != 0;
  } else if (task.gradient) {
    factors.slope = factor_of(samples, sample, bins) * factors.a * by.scale;
    factors.masked = is_masked(samples, sample);
  }
  return factors;
}

// The task with all tensors from element `first` on.
template <int kDtype, bool kSame, class C>
__device__ __forceinline__ RowsTask<C> from_element(const RowsTask<C>& task, int64_t first) {
  auto moved = [&](const void* data, int dtype) {
    return data ? const_cast<char*>(static_cast<const char*>(data)) + first * dtype_size(dtype) : nullptr;
  };
  RowsTask<C> rows = task;
  rows.prediction.data = moved(task.prediction.data, kDtype);
  rows.target.data = moved(task.target.data, dtype_of<kDtype, kSame>(task.target));
  rows.noise.data = moved(task.noise.data, dtype_of<kDtype, kSame>(task.noise));
  rows.gradient = moved(task.gradient, kDtype);
  return rows;
}

// The gradient of all items, and the sums of their losses in the forward pass. Which element is added where depends on its
// place in the sample only, so that a sample's loss does not depend on its neighbours: samples that are not whole vectors long,
// whose alignment changes from row to row, are read element by element.
template <int kDtype, bool kSame, bool kBackward, class C = Arithmetic<kDtype>>
__device__ __forceinline__ void run_rows(const RowsTask<C>& task, const Samples<C>& samples, const Bins& bins,
                                         const Multiplier<C>& multiplier) {
  using Step = Step<kDtype, kSame>;
  const bool vectors = task.elements % kVector == 0 && is_aligned(task.prediction.data) && is_aligned(task.target.data) &&
                       is_aligned(task.noise.data) && is_aligned(task.gradient);
  const int64_t items = samples.count * task.splits;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {  // once, unless no grid has so many blocks
    // 1. The item's elements. Counted from its start they need 32 bits, as `split` cuts what is long.
    const int64_t sample = item / task.splits, start = (item - sample * task.splits) * task.chunk;
    const unsigned size = unsigned(min(task.chunk, task.elements - start));
    const RowsTask<C> rows = from_element<kDtype, kSame>(task, sample * task.elements + start);
    double total = 0;
    if (vectors) {
      // 2. Eight elements at a time. The first loads are under way while the factors are found. Huber's loss has its own loop:
      //    its instructions are as many as all others.
      const unsigned at = threadIdx.x * kVector;
      Step step;
      step.load(rows, at, size);
      const Factors<C> by = factors_of<C, kBackward>(task, samples, sample, bins, multiplier);
      total = task.huber_delta > 0 ? step.template run_all<!kBackward>(rows, at, size, task.huber_delta, by)
                                   : step.template run_all<!kBackward>(rows, at, size, C(0), by);
    } else {
      // 3. Or one at a time.
      const Factors<C> by = factors_of<C, kBackward>(task, samples, sample, bins, multiplier);
      for (unsigned at = threadIdx.x; at < size; at += kThreads) {
        C r = by.a * load_one<C>(rows.prediction.data, kDtype, at);
        if (rows.target.data) r += by.b * load_one<C>(rows.target.data, dtype_of<kDtype, kSame>(rows.target), at);
        if (rows.noise.data) r += by.c * load_one<C>(rows.noise.data, dtype_of<kDtype, kSame>(rows.noise), at);
        if constexpr (!kBackward) total += double(element_loss(r, task.huber_delta));
        const C slope = by.masked ? C(0) : by.slope * residual_slope(r, task.huber_delta);
        if (rows.gradient) store_one<C>(rows.gradient, kDtype, at, slope);
      }
    }
    // 4. The sum of their losses.
    if constexpr (!kBackward) {
      const double sum = block_sum(total);
      if (threadIdx.x == 0) task.partial[item] = sum;
    }
  }
}

}  // namespace cuda
}  // namespace vadiff

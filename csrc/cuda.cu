// Kernels and launches: a block per work item. In a step of one launch, the block that takes the last ticket finishes the step.

#include "kernels.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda_elements.cuh"
#include "cuda_finish.cuh"
#include "cuda_rows.cuh"

namespace vadiff {
namespace cuda {
namespace {

// 768 threads with two 32-byte loads each in flight cover the latency of the memory; more would leave too few registers.
template <class C>
constexpr int kBlocksPerSM = sizeof(C) == 8 ? 2 : 3;

// kSame: the target and the noise that are read have the prediction's dtype.
template <int kDtype, bool kSame, class C = Arithmetic<kDtype>>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<C>)
    forward_kernel(RowsTask<C> task, Samples<C> samples, Update update, Multiplier<C> by, Scratch scratch, unsigned* ticket) {
  run_rows<kDtype, kSame, false>(task, samples, update.bins, by);
  if (ticket && comes_last(ticket, gridDim.x))
    finish({nullptr, task.partial, task.elements, task.splits}, samples, update, scratch, 1, nullptr);
}

template <class C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<C>)
    finish_kernel(Losses<C> losses, Samples<C> samples, Update update, Scratch scratch, unsigned* ticket) {
  finish(losses, samples, update, scratch, gridDim.x, ticket);
}

template <int kDtype, bool kSame, class C = Arithmetic<kDtype>>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<C>)
    backward_kernel(RowsTask<C> task, Samples<C> samples, Multiplier<C> by) {
  run_rows<kDtype, kSame, true>(task, samples, Bins{}, by);
}

template <class C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<C>)
    scale_kernel(void* gradient, int dtype, int64_t size, const C* upstream) {
  const C factor = *upstream;
  if (factor == C(1)) return;
  const int64_t body = is_aligned(gradient) ? size / kVector * kVector : 0;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t at = thread * kVector; at < body; at += gridDim.x * kStep) {
    Raw<C> raw;
    C values[kVector];
    load_raw<C, false>(raw, gradient, dtype, at);
    convert<C>(raw, gradient, dtype, at, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] *= factor;
    store_eight<C>(gradient, dtype, at, values);
  }
  for (int64_t at = body + thread; at < size; at += int64_t(gridDim.x) * kThreads)
    store_one<C>(gradient, dtype, at, load_one<C>(gradient, dtype, at) * factor);
}

__global__ void __launch_bounds__(kThreads) fold_kernel(const double* parts, int64_t count, Update update, Scratch scratch) {
  __shared__ Shared shared;
  const int size = update.bins.size;
  const int64_t vector = 4 * size + kTotals;
  __shared__ Totals totals;
  if (threadIdx.x < kTotals) {
    double sum = 0;
    for (int64_t part = 0; part < count; ++part) sum += parts[part * vector + 4 * size + threadIdx.x];
    reinterpret_cast<double*>(&totals)[threadIdx.x] = sum;
  }
  for (int k = threadIdx.x; k < size; k += kThreads) {
    Moments all = load_moments(parts + k, size);
    for (int64_t part = 1; part < count; ++part) all = merge(all, load_moments(parts + part * vector + k, size));
    store_moments(scratch.batch + k, size, all);
  }
  __syncthreads();
  move_statistics(scratch.batch, totals, update, shared);
}

// The state's; null where it does not move: such calls may overlap.
unsigned* ticket_of(const Update& update) {
  return update.update ? reinterpret_cast<unsigned*>(update.state + 4 * update.bins.size + 1) : nullptr;
}

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("vadiff's CUDA kernels failed: ") + cudaGetErrorString(status) +
                           ". `vadiff doctor` says for which architectures they were built");
}

// Makes the tensors' device the current one while it is in scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    if (before_ != device) check(cudaSetDevice(device));
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

int64_t multiprocessors(int device) {
  static std::atomic<int> known[64];
  int count = device < 64 ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    if (device < 64) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, const Call& call, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(std::min<int64_t>(grid, INT32_MAX)));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(call.stream);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// Into how many runs each sample is cut. `blocks`: as many as the device holds at once.
void split(int64_t samples, int64_t elements, int64_t blocks, int64_t* splits, int64_t* chunk) {
  // 1. Four rounds of blocks: they end at different times, and the last ones are a small part of all.
  const int64_t rounds = (4 * blocks + samples - 1) / samples;
  // 2. No run is so short that more than a quarter of a block's threads has nothing to load: CIFAR's 3,072 elements are two.
  const int64_t most = std::max<int64_t>(elements / (kStep * 3 / 4), 1);
  // 3. None is longer than 32 steps, so that of a huge batch (2 GiB: 20 rounds), too, the last runs are a small part. But one
  //    warp adds the partials of a sample, 32 at a time: rather long runs than more than 1,024 of them for this.
  const int64_t longest = 32 * kStep, fewest = std::min<int64_t>((elements + longest - 1) / longest, 1024);
  *splits = std::max(std::min(rounds, most), fewest);
  // 4. Runs are whole steps where they are longer than one, and whole vectors in any case.
  *chunk = (elements + *splits - 1) / *splits;
  const int64_t unit = *chunk > kStep ? kStep : kVector;
  *chunk = (*chunk + unit - 1) / unit * unit;
  *splits = (elements + *chunk - 1) / *chunk;
}

template <class C>
void split(RowsTask<C>& rows, const Call& call) {
  split(call.samples, rows.elements, multiprocessors(int(call.device)) * kBlocksPerSM<C>, &rows.splits, &rows.chunk);
}

// Run `run` with two constants: the prediction's dtype, and whether the other tensors that are read have the same.
template <class Run>
void in_dtypes_of(const Call& call, Run run) {
  const bool same = (!call.target || call.target_dtype == call.prediction_dtype) &&
                    (!call.noise || call.noise_dtype == call.prediction_dtype);
  auto with = [&](auto dtype) { same ? run(dtype, std::true_type()) : run(dtype, std::false_type()); };
  switch (call.prediction_dtype) {
    case kFloat32: return with(std::integral_constant<int, kFloat32>());
    case kBfloat16: return with(std::integral_constant<int, kBfloat16>());
    case kFloat16: return with(std::integral_constant<int, kFloat16>());
    default: return with(std::integral_constant<int, kFloat64>());
  }
}

template <int kDtype, bool kSame>
void step_in(const Call& call) {
  using C = Arithmetic<kDtype>;
  RowsTask<C> rows = rows_of<C>(call);
  const Samples<C> samples = samples_of<C>(call);
  const Update update = update_of(call);
  split(rows, call);
  const Scratch scratch = scratch_at(call.workspace, samples.count, rows.splits, update.bins.size);
  rows.partial = scratch.partial;
  const Multiplier<C> by = {nullptr, 0, C(1 / (double(samples.count) * double(rows.elements)))};
  unsigned* ticket = ticket_of(update);
  const int blocks = settling_blocks(samples.count, update.update);
  const bool at_once = ticket && blocks == 1;
  // A block for each work item, so that the device hands the next one to whichever multiprocessor is free.
  launch(forward_kernel<kDtype, kSame>, samples.count * rows.splits, call, rows, samples, update, by, scratch,
         at_once ? ticket : nullptr);
  const Losses<C> losses = {nullptr, rows.partial, rows.elements, rows.splits};
  if (!at_once) launch(finish_kernel<C>, blocks, call, losses, samples, update, scratch, ticket);
}

template <int kDtype, bool kSame>
void backward_in(const Call& call) {
  using C = Arithmetic<kDtype>;
  RowsTask<C> rows = rows_of<C>(call);
  split(rows, call);
  const double samples = call.mean ? double(call.samples) : 1;
  const Multiplier<C> by = {static_cast<const C*>(call.upstream), call.upstream_stride,
                            C(1 / (samples * double(rows.elements)))};
  launch(backward_kernel<kDtype, kSame>, call.samples * rows.splits, call, rows, samples_of<C>(call), by);
}

template <class C>
void scale_in(const Call& call) {
  const int64_t steps = (call.elements + kStep - 1) / kStep, resident = multiprocessors(int(call.device)) * kBlocksPerSM<C>;
  launch(scale_kernel<C>, std::min(steps, resident), call, call.gradient, int(call.prediction_dtype), call.elements,
         static_cast<const C*>(call.upstream));
}

template <class C>
void reweight_in(const Call& call) {
  const Update update = update_of(call);
  const Losses<C> losses = {static_cast<const C*>(call.prediction), nullptr, 1, 0};
  launch(finish_kernel<C>, settling_blocks(call.samples, update.update), call, losses, samples_of<C>(call), update,
         scratch_at(call.workspace, call.samples, 0, update.bins.size), ticket_of(update));
}

}  // namespace

int64_t workspace_size(const Call& call) {
  if (call.state == nullptr) return 0;
  const int bins = int(call.problem.bins);
  if (call.samples == 0) return scratch_size(0, 0, bins);  // `fold`
  int64_t most = 0;
  for (int64_t per_sm : {kBlocksPerSM<float>, kBlocksPerSM<double>}) {
    int64_t splits, chunk;
    split(call.samples, call.elements, multiprocessors(int(call.device)) * per_sm, &splits, &chunk);
    most = std::max(most, splits);
  }
  return scratch_size(call.samples, most, bins);
}

void step(const Call& call) {
  OnDevice guard(int(call.device));
  in_dtypes_of(call, [&](auto dtype, auto same) { step_in<dtype(), same()>(call); });
}

void backward(const Call& call) {
  OnDevice guard(int(call.device));
  in_dtypes_of(call, [&](auto dtype, auto same) { backward_in<dtype(), same()>(call); });
}

void scale(const Call& call) {
  OnDevice guard(int(call.device));
  in_arithmetic_of(call, [&](auto zero) { scale_in<decltype(zero)>(call); });
}

void reweight(const Call& call) {
  OnDevice guard(int(call.device));
  in_arithmetic_of(call, [&](auto zero) { reweight_in<decltype(zero)>(call); });
}

void fold(const Call& call) {
  OnDevice guard(int(call.device));
  const Update update = update_of(call);
  launch(fold_kernel, 1, call, call.gathered, call.ranks, update, scratch_at(call.workspace, 0, 0, update.bins.size));
}

}  // namespace cuda
}  // namespace vadiff

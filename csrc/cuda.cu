// Kernels and launches. Grids of fixed size stride over work items: an item is one of `splits` runs of `chunk` elements of a
// sample. In a step of one launch, the block that takes the last ticket finishes the step.

#include "kernels.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda_elements.cuh"
#include "cuda_finish.cuh"

namespace vadiff {
namespace cuda {
namespace {

// 768 threads with two 32-byte loads each in flight cover the latency of the memory; more would leave too few registers.
template <class C>
constexpr int kBlocksPerSM = sizeof(C) == 8 ? 2 : 3;

// What the slope of each sample is multiplied by, besides w*u*v and a.
template <class C>
struct Multiplier {
  const C* upstream;  // null: the forward pass
  int64_t stride;
  C scale;
};

// Sum of the losses of the elements [begin, end) in this thread; writes their gradient, if any. Which element is added where
// depends on its place in the sample only, so that a sample's loss does not depend on its neighbours: samples that are not
// whole vectors long, whose alignment changes from row to row, are read element by element.
template <class C>
__device__ double run_item(const RowsTask<C>& task, int64_t begin, int64_t end, C a, C b, C c, C factor, bool masked) {
  double total = 0;
  // 1. Eight elements at a time, all loads before any arithmetic.
  const bool vectors = task.elements % kVector == 0 && is_aligned(task.prediction.data) && is_aligned(task.target.data) &&
                       is_aligned(task.noise.data) && is_aligned(task.gradient);
  for (int64_t at = begin + int64_t(threadIdx.x) * kVector; vectors && at < end; at += kStep) {
    Raw<C> raw_f, raw_x, raw_e;
    load_raw<C>(raw_f, task.prediction.data, task.prediction.dtype, at);
    if (task.target.data) load_raw<C>(raw_x, task.target.data, task.target.dtype, at);
    if (task.noise.data) load_raw<C>(raw_e, task.noise.data, task.noise.dtype, at);
    C r[kVector], term[kVector];
    convert<C>(raw_f, task.prediction.data, task.prediction.dtype, at, r);
#pragma unroll
    for (int i = 0; i < kVector; ++i) r[i] *= a;
    if (task.target.data) {
      convert<C>(raw_x, task.target.data, task.target.dtype, at, term);
#pragma unroll
      for (int i = 0; i < kVector; ++i) r[i] += b * term[i];
    }
    if (task.noise.data) {
      convert<C>(raw_e, task.noise.data, task.noise.dtype, at, term);
#pragma unroll
      for (int i = 0; i < kVector; ++i) r[i] += c * term[i];
    }
    C sum = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += element_loss(r[i], task.huber_delta);
    total += double(sum);
    if (task.gradient) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) r[i] = masked ? C(0) : factor * residual_slope(r[i], task.huber_delta);
      store_eight<C>(task.gradient, task.prediction.dtype, at, r);
    }
  }
  // 2. Or one at a time.
  for (int64_t at = begin + threadIdx.x; !vectors && at < end; at += kThreads) {
    C r = a * load_one<C>(task.prediction.data, task.prediction.dtype, at);
    if (task.target.data) r += b * load_one<C>(task.target.data, task.target.dtype, at);
    if (task.noise.data) r += c * load_one<C>(task.noise.data, task.noise.dtype, at);
    total += double(element_loss(r, task.huber_delta));
    const C slope = masked ? C(0) : factor * residual_slope(r, task.huber_delta);
    if (task.gradient) store_one<C>(task.gradient, task.prediction.dtype, at, slope);
  }
  return total;
}

template <class C>
__device__ void run_rows(const RowsTask<C>& task, const Samples<C>& samples, const Bins& bins, const Multiplier<C>& by) {
  const int64_t items = samples.count * task.splits;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    // 1. The item's elements, and what its sample multiplies them by.
    const int64_t sample = item / task.splits, start = (item - sample * task.splits) * task.chunk;
    const int64_t end = min(start + task.chunk, task.elements), row = sample * task.elements;
    const C a = task.a_each ? task.a_each[sample] : task.a;
    const C b = task.b_each ? task.b_each[sample] : task.b;
    const C c = task.c_each ? task.c_each[sample] : task.c;
    C factor = 0;
    bool masked = false;
    if (by.upstream) {
      factor = samples.factor[sample] * by.upstream[sample * by.stride] * a * by.scale;
      masked = samples.masked[sample] != 0;
    } else if (task.gradient) {
      factor = factor_of(samples, sample, bins) * a * by.scale;
      masked = is_masked(samples, sample);
    }
    // 2. One pass over them.
    const double total = run_item(task, row + start, row + end, a, b, c, factor, masked);
    // 3. The sum of their losses.
    if (task.partial == nullptr) continue;
    const double sum = block_sum(total);
    if (threadIdx.x == 0) task.partial[item] = sum;
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<C>)
    forward_kernel(RowsTask<C> task, Samples<C> samples, Update update, Multiplier<C> by, Scratch scratch, unsigned* ticket) {
  run_rows(task, samples, update.bins, by);
  if (ticket && comes_last(ticket, gridDim.x))
    finish({nullptr, task.partial, task.elements, task.splits}, samples, update, scratch, 1, nullptr);
}

template <class C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<C>)
    finish_kernel(Losses<C> losses, Samples<C> samples, Update update, Scratch scratch, unsigned* ticket) {
  finish(losses, samples, update, scratch, gridDim.x, ticket);
}

template <class C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<C>)
    backward_kernel(RowsTask<C> task, Samples<C> samples, Multiplier<C> by) {
  run_rows(task, samples, Bins{}, by);
}

template <class C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<C>)
    scale_kernel(const void* gradient, void* out, int dtype, int64_t size, const C* upstream) {
  const C factor = *upstream;
  if (gradient == out && factor == C(1)) return;
  const int64_t body = is_aligned(gradient) && is_aligned(out) ? size / kVector * kVector : 0;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t at = thread * kVector; at < body; at += gridDim.x * kStep) {
    Raw<C> raw;
    C values[kVector];
    load_raw<C, false>(raw, gradient, dtype, at);
    convert<C>(raw, gradient, dtype, at, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] *= factor;
    store_eight<C>(out, dtype, at, values);
  }
  for (int64_t at = body + thread; at < size; at += int64_t(gridDim.x) * kThreads)
    store_one<C>(out, dtype, at, load_one<C>(gradient, dtype, at) * factor);
}

__global__ void __launch_bounds__(kThreads) fold_kernel(const double* parts, int64_t count, Update update, Scratch scratch) {
  __shared__ Shared shared;
  const int size = update.bins.size;
  double skipped = 0;
  for (int64_t part = 0; part < count; ++part) skipped += parts[part * (4 * size + 1) + 4 * size];
  for (int k = threadIdx.x; k < size; k += kThreads) {
    Moments all = load_moments(parts + k, size);
    for (int64_t part = 1; part < count; ++part) all = merge(all, load_moments(parts + part * (4 * size + 1) + k, size));
    store_moments(scratch.batch + k, size, all);
  }
  __syncthreads();
  move_statistics(scratch.batch, skipped, update, shared);
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
  config.gridDim = dim3(unsigned(grid));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(call.stream);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// Blocks for so many work items: as many as fit on the device at once.
template <class C>
int64_t resident(int64_t items, const Call& call) {
  return std::min(items, multiprocessors(int(call.device)) * kBlocksPerSM<C>);
}

// Into how many runs each sample is cut. Blocks take items in rounds; a round of one item would leave nearly all blocks idle,
// so this takes the fewest rounds that are 95 % full, or else the fullest of eight.
void split(int64_t samples, int64_t elements, int64_t blocks, int64_t* splits, int64_t* chunk) {
  const int64_t finest = std::max<int64_t>(elements / (kStep / 2), 1), fewest = (samples + blocks - 1) / blocks;
  double fullest = 0;
  *splits = 1;
  for (int64_t rounds = fewest; rounds < fewest + 8; ++rounds) {
    const int64_t candidate = std::max<int64_t>(std::min(rounds * blocks / samples, finest), 1), items = samples * candidate;
    const double full = double(items) / double((items + blocks - 1) / blocks * blocks);
    if (full > fullest) fullest = full, *splits = candidate;
    if (full >= 0.95 || candidate == finest) break;
  }
  *chunk = ((elements + *splits - 1) / *splits + kVector - 1) / kVector * kVector;
  *splits = (elements + *chunk - 1) / *chunk;
}

template <class C>
void split(RowsTask<C>& rows, const Call& call) {
  split(call.samples, rows.elements, multiprocessors(int(call.device)) * kBlocksPerSM<C>, &rows.splits, &rows.chunk);
}

template <class C>
void step_in(const Call& call) {
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
  launch(forward_kernel<C>, resident<C>(samples.count * rows.splits, call), call, rows, samples, update, by, scratch,
         at_once ? ticket : nullptr);
  const Losses<C> losses = {nullptr, rows.partial, rows.elements, rows.splits};
  if (!at_once) launch(finish_kernel<C>, blocks, call, losses, samples, update, scratch, ticket);
}

template <class C>
void backward_in(const Call& call) {
  RowsTask<C> rows = rows_of<C>(call);
  split(rows, call);
  const double samples = call.mean ? double(call.samples) : 1;
  const Multiplier<C> by = {static_cast<const C*>(call.upstream), call.upstream_stride,
                            C(1 / (samples * double(rows.elements)))};
  launch(backward_kernel<C>, resident<C>(call.samples * rows.splits, call), call, rows, samples_of<C>(call), by);
}

template <class C>
void scale_in(const Call& call) {
  launch(scale_kernel<C>, resident<C>((call.elements + kStep - 1) / kStep, call), call, call.gradient, call.out,
         int(call.prediction_dtype), call.elements, static_cast<const C*>(call.upstream));
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
  in_arithmetic_of(call, [&](auto zero) { step_in<decltype(zero)>(call); });
}

void backward(const Call& call) {
  OnDevice guard(int(call.device));
  in_arithmetic_of(call, [&](auto zero) { backward_in<decltype(zero)>(call); });
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

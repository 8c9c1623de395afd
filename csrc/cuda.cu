// Kernels and launches. Fixed grids that stride over work items: an item is one of `splits` runs of `chunk` elements of a
// sample. In one launch, the block that takes the last ticket finishes the step.

#include "cuda.h"

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

// What the slope of each sample is multiplied with.
template <class C>
struct Upstream {
  const C* upstream;  // null: the forward pass, which takes the weights instead
  int64_t stride;
  const C* saved;
  bool mean;
  C scale;
};

// Sum of the losses of the elements [begin, end) in this thread; writes their gradient, if any. Which element is added where
// depends on its place in the sample only, so that a sample's loss does not depend on its neighbours: samples that are not
// whole vectors long, whose alignment changes from row to row, are read element by element.
template <class C>
__device__ double run_item(const RowsTask<C>& task, int64_t begin, int64_t end, C a, C b, C c, C factor) {
  double total = 0;
  const bool vectors = task.elements % kVector == 0 && is_aligned(task.output.data) && is_aligned(task.target.data) &&
                       is_aligned(task.noise.data) && is_aligned(task.gradient);
  for (int64_t at = begin + int64_t(threadIdx.x) * kVector; vectors && at < end; at += kStep) {
    Raw<C> raw_f, raw_x, raw_e;
    load_raw<C>(raw_f, task.output.data, task.output.dtype, at);
    if (task.target.data) load_raw<C>(raw_x, task.target.data, task.target.dtype, at);
    if (task.noise.data) load_raw<C>(raw_e, task.noise.data, task.noise.dtype, at);
    C r[kVector], term[kVector];
    convert<C>(raw_f, task.output.data, task.output.dtype, at, r);
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
      for (int i = 0; i < kVector; ++i) r[i] = element_gradient(factor, r[i], task.huber_delta);
      store_eight<C>(task.gradient, task.output.dtype, at, r);
    }
  }
  for (int64_t at = begin + threadIdx.x; !vectors && at < end; at += kThreads) {
    C r = a * load_one<C>(task.output.data, task.output.dtype, at);
    if (task.target.data) r += b * load_one<C>(task.target.data, task.target.dtype, at);
    if (task.noise.data) r += c * load_one<C>(task.noise.data, task.noise.dtype, at);
    total += double(element_loss(r, task.huber_delta));
    if (task.gradient) store_one<C>(task.gradient, task.output.dtype, at, element_gradient(factor, r, task.huber_delta));
  }
  return total;
}

template <class C>
__device__ C factor_of(const RowsTask<C>& task, int64_t sample, int64_t samples, C a, const Levels<C>& levels,
                       const Bins& bins, const Upstream<C>& up) {
  if (up.upstream) {
    if (up.mean && up.saved[2 * samples] != up.saved[2 * samples]) return C(NAN);
    return up.saved[sample] * up.upstream[up.mean ? 0 : sample * up.stride] * a * up.scale;
  }
  if (!task.gradient) return C(0);
  return forward_factor(value_or_one(levels.base_weight, sample), value_or_one(levels.sample_weight, sample),
                        weight_of(levels, sample, bins), a, up.scale);
}

template <class C>
__device__ void run_rows(const RowsTask<C>& task, int64_t samples, const Levels<C>& levels, const Bins& bins,
                         const Upstream<C>& up) {
  const int64_t items = samples * task.splits;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t sample = item / task.splits, start = (item - sample * task.splits) * task.chunk;
    const int64_t end = min(start + task.chunk, task.elements), row = sample * task.elements;
    const C a = task.a_each ? task.a_each[sample] : task.a;
    const C b = task.b_each ? task.b_each[sample] : task.b;
    const C c = task.c_each ? task.c_each[sample] : task.c;
    const C factor = factor_of(task, sample, samples, a, levels, bins, up);
    const double total = run_item(task, row + start, row + end, a, b, c, factor);
    if (task.partial == nullptr) continue;
    const double sum = block_sum(total);
    if (threadIdx.x == 0) task.partial[item] = sum;
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<C>)
    forward_kernel(RowsTask<C> task, int64_t samples, Levels<C> levels, Results<C> results, Update update, Upstream<C> up,
                   Scratch scratch, unsigned* ticket) {
  run_rows(task, samples, levels, update.bins, up);
  if (ticket && comes_last(ticket, gridDim.x))
    finish<C>(nullptr, task.elements, task.splits, samples, levels, results, update, scratch, 1, nullptr);
}

template <class C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<C>)
    finish_kernel(const C* loss, int64_t elements, int64_t splits, int64_t samples, Levels<C> levels, Results<C> results,
                  Update update, Scratch scratch, unsigned* ticket) {
  finish(loss, elements, splits, samples, levels, results, update, scratch, gridDim.x, ticket);
}

template <class C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<C>)
    backward_kernel(RowsTask<C> task, int64_t samples, Upstream<C> up) {
  run_rows(task, samples, Levels<C>{}, Bins{}, up);
}

template <class C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<C>)
    scale_kernel(const void* gradient, void* out, int dtype, int64_t size, const C* upstream, const C* mean_loss) {
  const C factor = *mean_loss != *mean_loss ? C(NAN) : *upstream;
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
  double poisoned = 0;
  for (int64_t part = 0; part < count; ++part) poisoned += parts[part * (4 * size + 1) + 4 * size];
  for (int k = threadIdx.x; k < size; k += kThreads) {
    Moments all = load_moments(parts + k, size);
    for (int64_t part = 1; part < count; ++part) all = merge(all, load_moments(parts + part * (4 * size + 1) + k, size));
    store_moments(scratch.batch + k, size, all);
  }
  __syncthreads();
  move_statistics(scratch.batch, poisoned, update, shared);
}

// Of the statistics that move; calls that leave them alone may overlap.
unsigned* ticket_of(const Update& update) {
  return update.update ? reinterpret_cast<unsigned*>(update.state + 4 * update.bins.size + 1) : nullptr;
}

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("vadiff's CUDA kernels failed: ") + cudaGetErrorString(status) +
                           ". `vadiff doctor` says for which architectures they were built");
}

// The tensors' device while this lives.
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
void launch(void (*kernel)(Parameters...), int64_t grid, const Where& where, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(grid));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(where.stream);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// Blocks for so many work items: what fits the device at once strides over the rest.
template <class C>
int64_t resident(int64_t items, const Where& where) {
  return std::min(items, multiprocessors(where.device) * kBlocksPerSM<C>);
}

// Into how many runs each sample is cut. Items are dealt out in rounds; one item over a round would leave nearly all blocks
// idle for another, so the fewest rounds that are 95 % full are taken, or else the fullest of eight.
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

}  // namespace

int64_t workspace_size(int64_t samples, int64_t elements, int bins, int device) {
  int64_t most = 0;
  if (samples == 0) return scratch_size(0, 0, bins);  // for calls that read no elements
  for (int64_t blocks : {multiprocessors(device) * kBlocksPerSM<float>, multiprocessors(device) * kBlocksPerSM<double>}) {
    int64_t splits, chunk;
    split(samples, elements, blocks, &splits, &chunk);
    most = std::max(most, splits);
  }
  return scratch_size(samples, most, bins);
}

}  // namespace cuda

using namespace cuda;

template <class C>
void diffusion_loss(RowsTask<C> rows, int64_t samples, const Levels<C>& levels, const Results<C>& results,
                    const Update& update, const Where& where) {
  OnDevice guard(where.device);
  split(samples, rows.elements, multiprocessors(where.device) * kBlocksPerSM<C>, &rows.splits, &rows.chunk);
  const Scratch scratch = scratch_at(where.workspace, samples, rows.splits, update.bins.size);
  rows.partial = scratch.partial;
  Upstream<C> up{};
  up.scale = C(1.0 / (double(samples) * double(rows.elements)));
  unsigned* ticket = ticket_of(update);
  const int blocks = settling_blocks(samples, update.update);
  const bool at_once = ticket && blocks == 1;
  launch(forward_kernel<C>, resident<C>(samples * rows.splits, where), where, rows, samples, levels, results, update, up,
         scratch, at_once ? ticket : nullptr);
  if (!at_once)
    launch(finish_kernel<C>, blocks, where, nullptr, rows.elements, rows.splits, samples, levels, results, update, scratch,
           ticket);
}

template <class C>
void diffusion_loss_backward(RowsTask<C> rows, int64_t samples, const C* upstream, int64_t stride, bool mean, const C* saved,
                             const Where& where) {
  OnDevice guard(where.device);
  split(samples, rows.elements, multiprocessors(where.device) * kBlocksPerSM<C>, &rows.splits, &rows.chunk);
  rows.partial = nullptr;
  const double elements = double(rows.elements);
  const Upstream<C> up = {upstream, stride, saved, mean, C(mean ? 1 / (double(samples) * elements) : 1 / elements)};
  launch(backward_kernel<C>, resident<C>(samples * rows.splits, where), where, rows, samples, up);
}

template <class C>
void scale_gradient(const void* gradient, void* out, int dtype, int64_t size, const C* upstream, const C* mean_loss,
                    const Where& where) {
  OnDevice guard(where.device);
  launch(scale_kernel<C>, resident<C>((size + kStep - 1) / kStep, where), where, gradient, out, dtype, size, upstream,
         mean_loss);
}

template <class C>
void reweight(const C* loss, int64_t samples, const Levels<C>& levels, const Results<C>& results, const Update& update,
              const Where& where) {
  OnDevice guard(where.device);
  const Scratch scratch = scratch_at(where.workspace, samples, 0, update.bins.size);
  launch(finish_kernel<C>, settling_blocks(samples, update.update), where, loss, 1, 0, samples, levels, results, update,
         scratch, ticket_of(update));
}

void fold(const double* parts, int64_t count, const Update& update, const Where& where) {
  OnDevice guard(where.device);
  launch(fold_kernel, 1, where, parts, count, update, scratch_at(where.workspace, 0, 0, update.bins.size));
}

#define VADIFF_INSTANTIATE(C)                                                                                               \
  template void diffusion_loss<C>(RowsTask<C>, int64_t, const Levels<C>&, const Results<C>&, const Update&, const Where&); \
  template void diffusion_loss_backward<C>(RowsTask<C>, int64_t, const C*, int64_t, bool, const C*, const Where&);         \
  template void scale_gradient<C>(const void*, void*, int, int64_t, const C*, const C*, const Where&);                     \
  template void reweight<C>(const C*, int64_t, const Levels<C>&, const Results<C>&, const Update&, const Where&);
VADIFF_INSTANTIATE(float)
VADIFF_INSTANTIATE(double)

}  // namespace vadiff

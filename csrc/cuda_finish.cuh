// What comes after the elements: samples, statistics of the bins, weight table. One block does it all; or several share the
// samples, and the last to finish merges their results. Each bin is computed by one thread, so the only atomic is a ticket's,
// and every sum has a fixed order.
#pragma once

#include "cuda_elements.cuh"
#include "step.h"

namespace vadiff {
namespace cuda {

constexpr int kSamples = 512;  // settled at a time, a tile of the batch statistics
constexpr int kMaxBins = 1024;
constexpr int64_t kAlone = 2048;  // so many samples take one block less time than a second launch
constexpr int64_t kMostBlocks = 64;

// How many blocks settle so many samples. One if statistics do not move: finding the last block takes their ticket.
__host__ __device__ inline int settling_blocks(int64_t samples, bool update) {
  if (samples <= kAlone || !update) return 1;
  const int64_t tiles = (samples + kSamples - 1) / kSamples, each = (tiles + kMostBlocks - 1) / kMostBlocks;
  return int((tiles + each - 1) / each);  // every block has a tile
}

constexpr int kSums = 1 + kTotals;

// In device memory; the last three are those of the first of `blocks` blocks.
struct Scratch {
  double* partial;  // [B * splits]
  double* batch;    // [4K]
  double* groups;   // [4 * max(K, kThreads)]: moments of each group of samples
  double* part;     // [4K]: moments of a block's samples
  double* sums;     // [kSums]: weighted losses, then `Totals`
};

__host__ __device__ inline int64_t groups_size(int bins) { return 4 * int64_t(bins > kThreads ? bins : kThreads); }

__host__ __device__ inline int64_t scratch_size(int64_t samples, int64_t splits, int bins) {
  const int64_t one = groups_size(bins) + 4 * int64_t(bins) + kSums;
  return samples * splits + 4 * int64_t(bins) + settling_blocks(samples, true) * one;
}

__host__ __device__ inline Scratch scratch_at(double* workspace, int64_t samples, int64_t splits, int bins) {
  const int64_t blocks = settling_blocks(samples, true);
  double* batch = workspace + samples * splits;
  double* groups = batch + 4 * bins;
  double* part = groups + blocks * groups_size(bins);
  return {workspace, batch, groups, part, part + blocks * 4 * bins};
}

// In shared memory: first a tile of samples, then the inputs of the table.
union alignas(16) Shared {
  struct {
    int bin_of[kSamples];  // -1: enters no bin
    double base_loss[kSamples];
  } tile;
  struct {
    double a[kMaxBins], n[kMaxBins], taps[kMaxBins];
  } table;
};

// Where the losses of the samples come from: sums of the forward pass, or the caller of `reweight`.
template <class C>
struct Losses {
  const C* given;          // [B]; null: from the sums
  const double* partial;   // [B * splits]
  int64_t elements, splits;
};

// The sums of the losses of the samples of the tile that starts at `first`, into shared memory. A group of threads, a power of
// two and at most a warp, takes a sample; it has loads of four samples under way.
template <class C>
__device__ void sum_partials(int64_t first, int64_t samples, const Losses<C>& losses, double* sums) {
  constexpr int kAhead = 4;
  int lanes = 1;
  while (lanes < 32 && lanes < losses.splits) lanes *= 2;
  const int lane = threadIdx.x % lanes, at_once = kThreads / lanes;
  // Whole warps together, as the sums are shuffled.
  for (int start = 0; start < kSamples && first + start < samples; start += kAhead * at_once) {
    const int j = start + threadIdx.x / lanes;
    double sum[kAhead] = {};
    for (int64_t split = lane; split < losses.splits; split += lanes) {
#pragma unroll
      for (int n = 0; n < kAhead; ++n)
        if (j + n * at_once < kSamples && first + j + n * at_once < samples)
          sum[n] += __ldcg(losses.partial + (first + j + n * at_once) * losses.splits + split);  // other blocks wrote them
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int n = 0; n < kAhead; ++n) sum[n] += __shfl_xor_sync(~0u, sum[n], offset);
    }
#pragma unroll
    for (int n = 0; n < kAhead; ++n)
      if (lane == 0 && j + n * at_once < kSamples) sums[j + n * at_once] = sum[n];
  }
}

// Sums over the samples: weighted losses, and the totals of the statistics.
struct Sums {
  double weighted;
  Totals totals;
};

// Of a thread: in few registers, as they live through the loop over the tiles.
struct ThreadSums {
  double weighted, loss;
  int skipped, below, above;
};

// The sums of all threads, in the first thread.
__device__ inline Sums block_sums(const ThreadSums& of_thread) {
  double all[] = {of_thread.weighted, double(of_thread.skipped), of_thread.loss, double(of_thread.below), double(of_thread.above)};
  block_sums<5>(all);
  return {all[0], {all[1], all[2], 0, all[3], all[4]}};
}

// Settle the samples of the tile that starts at `first`. Adds to this thread's sums.
template <class C>
__device__ void settle_tile(int64_t first, const Losses<C>& losses, const Samples<C>& samples, const Bins& bins, Shared& shared,
                            ThreadSums& sums) {
  constexpr int kEach = kSamples / kThreads;
  Given<C> given[kEach];
  C ell[kEach], weight[kEach];
  // 1. What is given of this thread's samples. It arrives while the losses are summed.
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    const int64_t i = first + threadIdx.x + n * kThreads;
    if (i >= samples.count) continue;
    given[n] = given_of(samples, i);
    if (losses.given) ell[n] = losses.given[i];
  }
  // 2. The losses; until step 4 their sums stand in the place of the base losses.
  if (!losses.given) sum_partials(first, samples.count, losses, shared.tile.base_loss);
  __syncthreads();
  // 3. The weights, of all samples before results are written: a load cannot pass a write that may go to the same place.
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    const int64_t i = first + threadIdx.x + n * kThreads;
    if (i < samples.count) weight[n] = weight_of(samples, i, given[n].log_snr, bins);
  }
  // 4. The results.
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    const int j = threadIdx.x + n * kThreads;
    shared.tile.bin_of[j] = -1;
    if (first + j >= samples.count) continue;
    if (!losses.given) ell[n] = C(shared.tile.base_loss[j] / double(losses.elements));
    const Sample<C> sample = settle(samples, first + j, given[n], ell[n], weight[n]);
    shared.tile.base_loss[j] = double(sample.base_loss);
    if (!sample.masked && !sample.skipped) shared.tile.bin_of[j] = bin_index(given[n].log_snr, bins);
    sums.weighted += double(sample.weighted);
    add_sample(&sums, sample, given[n].log_snr, given[n].v, bins);
  }
}

__device__ __forceinline__ void store_moments(double* to, int64_t stride, const Moments& m) {
  to[0] = m.n, to[stride] = m.mean, to[2 * stride] = m.m2, to[3 * stride] = m.mass;
}

__device__ __forceinline__ Moments load_moments(const double* from, int64_t stride) {
  return {from[0], from[stride], from[2 * stride], from[3 * stride]};
}

// Call `each(j)` for the samples [first, last) of the tile that are in bin k. Loads the bins of four samples at a time.
template <class Each>
__device__ __forceinline__ void for_bin(int k, int first, int last, const Shared& shared, Each each) {
  for (int j = first; j < last; j += 4) {
    const int4 bins = *reinterpret_cast<const int4*>(shared.tile.bin_of + j);
    if (bins.x == k) each(j);
    if (bins.y == k) each(j + 1);
    if (bins.z == k) each(j + 2);
    if (bins.w == k) each(j + 3);
  }
}

// Statistics of a tile, in two passes, merged into `groups` unless those are `fresh`. With more threads than bins, groups of
// threads share the samples.
template <class C>
__device__ void add_tile(int64_t first, bool fresh, const C* sample_weight, int bins, double* groups, const Shared& shared) {
  const int count = bins < kThreads ? kThreads / bins : 1;
  const int share = (kSamples / 4 + count - 1) / count * 4;
  for (int task = threadIdx.x; task < count * bins; task += kThreads) {
    const int k = task % bins, begin = task / bins * share, end = min(begin + share, kSamples);
    Moments m = {0, 0, 0, 0};
    for_bin(k, begin, end, shared, [&](int j) {
      m.n += 1;
      m.mean += shared.tile.base_loss[j];
      m.mass += sample_weight ? double(sample_weight[first + j]) : 1.0;
    });
    if (m.n > 0) m.mean /= m.n;
    for_bin(k, begin, end, shared, [&](int j) {
      const double deviation = shared.tile.base_loss[j] - m.mean;
      m.m2 += deviation * deviation;
    });
    if (!fresh) m = merge(load_moments(groups + task, count * bins), m);
    store_moments(groups + task, count * bins, m);
  }
}

// Merge the groups in their order.
__device__ inline void merge_groups(int bins, const double* groups, double* into) {
  const int count = bins < kThreads ? kThreads / bins : 1;
  for (int k = threadIdx.x; k < bins; k += kThreads) {
    Moments all = load_moments(groups + k, count * bins);
    for (int group = 1; group < count; ++group) all = merge(all, load_moments(groups + group * bins + k, count * bins));
    store_moments(into + k, bins, all);
  }
}

// Merge the blocks' results in their order.
__device__ inline void merge_parts(int bins, int blocks, const Scratch& s, Sums* sums) {
  if (threadIdx.x < kSums) {
    double sum = 0;
    for (int block = 0; block < blocks; ++block) sum += __ldcg(s.sums + kSums * block + threadIdx.x);
    reinterpret_cast<double*>(sums)[threadIdx.x] = sum;
  }
  for (int k = threadIdx.x; k < bins; k += kThreads) {
    Moments all;
    for (int block = 0; block < blocks; ++block) {
      const double* at = s.part + int64_t(block) * 4 * bins + k;  // other blocks wrote it
      const Moments part = {__ldcg(at), __ldcg(at + bins), __ldcg(at + 2 * bins), __ldcg(at + 3 * bins)};
      all = block == 0 ? part : merge(all, part);
    }
    store_moments(s.batch + k, bins, all);
  }
}

// Whether this block is the last of `blocks` to arrive; all that the others wrote before can then be read. For all threads.
__device__ inline bool comes_last(unsigned* ticket, unsigned blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(ticket, blocks - 1) == blocks - 1;  // the last one sets it back to 0
    __threadfence();
  }
  __syncthreads();
  return last;
}

// The steps of reference.weight_table. `smoothed` [2K]: device memory for the smoothed a and n; each thread reads only its own.
__device__ inline void weight_table(const Update& update, double* smoothed, Shared& shared) {
  const Bins& bins = update.bins;
  const Rule& rule = update.rule;
  const int size = bins.size;
  const double* state = reinterpret_cast<const double*>(update.state);
  double *a = shared.table.a, *n = shared.table.n, *taps = shared.table.taps, *smooth_a = smoothed, *smooth_n = smoothed + size;
  // 1. ln w of each bin that has a value.
  double mass = 0;
  for (int k = threadIdx.x; k < size; k += kThreads) {
    const Moments m = load_moments(state + k, size);
    const bool has_value = log_weight_of(m, rule, &a[k]);
    n[k] = has_value ? m.n : 0;
    mass += has_value ? m.mass : 0;
    if (rule.smoothing > 0 && k <= rule.radius) taps[k] = tap_weight(k, rule, bins);
  }
  mass = block_sum(mass);  // its barriers also publish a, n and the taps
  // 2. Smooth, and find the centre of what has a value.
  double centre = 0;
  for (int k = threadIdx.x; k < size; k += kThreads) {
    double a_k = a[k], n_k = n[k];
    if (rule.smoothing > 0)
      smooth_bins<OneBin>(a + k, n + k, taps, max(-rule.radius, -k), min(rule.radius, size - 1 - k), bins.width,
                          rule.smoothing, &a_k, &n_k);
    if (n[k] > 0 && mass > 0) centre += state[3 * size + k] / mass * a_k;
    smooth_a[k] = a_k;
    smooth_n[k] = n_k;
  }
  centre = block_sum(centre);
  // 3. Centre, clamp, shrink.
  double total = 0, weighted = 0;
  for (int k = threadIdx.x; k < size; k += kThreads) {
    const double a_k = shrink(smooth_a[k], smooth_n[k], centre, rule);
    const double loss = state[3 * size + k] * state[size + k];
    total += loss;
    weighted += loss * exp(a_k);
    smooth_a[k] = a_k;
  }
  // 4. Preserve the loss.
  total = block_sum(total);
  weighted = block_sum(weighted);
  const double log_c = log_scale(total, weighted);
  for (int k = threadIdx.x; k < size; k += kThreads) update.log_weights[k] = float(smooth_a[k] + log_c);
}

// Fold the batch statistics in `batch` [4K], which is scratch afterwards, or return them for a gather.
__device__ inline void move_statistics(double* batch, const Totals& totals, const Update& update, Shared& shared) {
  const int size = update.bins.size;
  if (update.batch) {
    for (int i = threadIdx.x; i < 4 * size; i += kThreads) update.batch[i] = batch[i];
    if (threadIdx.x == 0) *reinterpret_cast<Totals*>(update.batch + 4 * size) = totals;
    return;
  }
  double* state = reinterpret_cast<double*>(update.state);
  BinSums sums = {};
  for (int k = threadIdx.x; k < size; k += kThreads) 
    add_bin(&sums, load_moments(state + k, size), batch[k], batch[3 * size + k]);
  block_sums<kBinSums>(reinterpret_cast<double*>(&sums));
  LevelSums levels = {};
  const double* shares = state + 4 * size + 2 + kStateTotals;
  for (int k = threadIdx.x; k < size; k += kThreads)
    add_level(&levels, load_moments(state + k, size), batch[k], batch[3 * size + k], shares[k], shares[size + k],
              average_loss(sums));
  block_sums<kLevelSums>(reinterpret_cast<double*>(&levels));
  const double rho = forgetting(sums.entered, update.half_life, size);
  if (threadIdx.x == 0) {
    update.state[4 * size] += int64_t(totals.skipped);
    move_totals(reinterpret_cast<StateTotals*>(state + 4 * size + 2), sums, levels, totals, rho, update.half_life, size);
  }
  for (int k = threadIdx.x; k < size; k += kThreads)
    store_moments(state + k, size, fold(load_moments(state + k, size), load_moments(batch + k, size), rho));
  __syncthreads();
  if (update.rule.statistic != kNone) weight_table(update, batch, shared);
}

// All of it, by `blocks` blocks; only one of them writes the mean loss and the statistics.
template <class C>
__device__ void finish(const Losses<C>& losses, const Samples<C>& samples, const Update& update, const Scratch& s, int blocks,
                       unsigned* ticket) {
  __shared__ Shared shared;
  const int size = update.bins.size;
  const int64_t tiles = (samples.count + kSamples - 1) / kSamples, block = blocks > 1 ? blockIdx.x : 0;
  const int64_t each = (tiles + blocks - 1) / blocks * kSamples, begin = block * each, end = min(begin + each, samples.count);
  double* groups = s.groups + block * groups_size(size);
  __shared__ Sums sums;  // of the batch, in the end
  ThreadSums of_thread = {};
  // 1. Tile by tile: settle the samples, add them to the statistics of this block.
  for (int64_t first = begin; first < end; first += kSamples) {
    settle_tile(first, losses, samples, update.bins, shared, of_thread);
    __syncthreads();
    if (!update.update) continue;
    add_tile(first, first == begin, samples.sample_weight, size, groups, shared);
    __syncthreads();
  }
  const Sums of_block = block_sums(of_thread);
  if (threadIdx.x == 0) (blocks > 1 ? reinterpret_cast<Sums*>(s.sums)[block] : sums) = of_block;
  if (update.update) merge_groups(size, groups, blocks > 1 ? s.part + block * 4 * size : s.batch);
  // 2. The last block merges those of all.
  if (blocks > 1) {
    if (!comes_last(ticket, blocks)) return;
    merge_parts(size, blocks, s, &sums);
    __syncthreads();
  }
  // 3. The mean loss, and the state.
  if (samples.loss && samples.mean && threadIdx.x == 0) *samples.loss = C(sums.weighted / double(samples.count));
  if (!update.update) return;
  if (threadIdx.x == 0) sums.totals.samples = double(samples.count);
  __syncthreads();
  move_statistics(s.batch, sums.totals, update, shared);
}

}  // namespace cuda
}  // namespace vadiff

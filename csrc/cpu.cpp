// A call on the CPU: rows over threads, then samples, statistics and table. No sum's order depends on the number of threads.

#include "kernels.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "step.h"

namespace vadiff {
namespace {

constexpr int64_t kItems = 64;          // a batch is cut into at least so many items, unless
constexpr int64_t kMinChunk = 16384;    // they would have fewer elements than this
constexpr int64_t kForThreads = 65536;  // with fewer elements, waking threads costs more than it saves
constexpr int64_t kCache = 32 << 20;  // what is larger has left the caches before it is read again
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kAdvisedBytes = 4 * kHugePage;  // a larger fresh buffer costs more in page faults than in arithmetic

std::atomic<const RowKernels*>& selected() {
  static std::atomic<const RowKernels*> kernels{cpu::available(0)};
  return kernels;
}

const RowKernels& kernels() { return *selected().load(std::memory_order_relaxed); }

// Call run(item) for each item: on one thread, or on all. For a smaller team OpenMP ends the other threads, and torch's next
// operator starts them again. One thread enters no parallel region, which ends with a system call even for a team of one.
template <class Run>
void for_items(int64_t items, int64_t elements, int64_t threads, const Run& run) {
  if (elements < kForThreads || threads == 1) {
    for (int64_t item = 0; item < items; ++item) run(item);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(int(threads))
  for (int64_t item = 0; item < items; ++item) run(item);
}

// Ask for huge pages under a large fresh buffer.
void advise(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kAdvisedBytes) return;
  uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~uintptr_t(kHugePage - 1);
  uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t(kHugePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // where it fails: small pages
#else
  (void)data, (void)bytes;
#endif
}

// Cut each sample into `splits` runs of `chunk` elements. A function of the shape only.
template <class C>
void split(RowsTask<C>& rows, int64_t samples) {
  int64_t finest = std::max<int64_t>(1, rows.elements / kMinChunk);
  int64_t splits = std::min(finest, (kItems + samples - 1) / samples);
  rows.chunk = ((rows.elements + splits - 1) / splits + 1023) / 1024 * 1024;
  rows.splits = (rows.elements + rows.chunk - 1) / rows.chunk;
}

// Float64 whose bits lie in the int64 of a state.
typedef double Float64 __attribute__((may_alias));

// Statistics of all bins, a row per quantity: float64 [4, K].
struct MomentRows {
  Float64 *n, *mean, *m2, *mass;

  MomentRows(Float64* rows, int size) : n(rows), mean(rows + size), m2(rows + 2 * size), mass(rows + 3 * size) {}
  Moments operator[](int k) const { return {n[k], mean[k], m2[k], mass[k]}; }
  void set(int k, const Moments& bin) const { n[k] = bin.n, mean[k] = bin.mean, m2[k] = bin.m2, mass[k] = bin.mass; }
};

// The steps of reference.weight_table.
void weight_table(const MomentRows& bins, const Update& update) {
  const Rule& rule = update.rule;
  const int size = update.bins.size;
  const bool smooths = rule.smoothing > 0;
  const int radius = smooths ? rule.radius : 0, padded = radius + size + radius + kSmoothLanes;
  std::vector<double> scratch(4 * padded + radius + 1);  // a, n, a smoothed, n smoothed: each with its margins; taps
  double *a = scratch.data() + radius, *n = a + padded, *smooth_a = n + padded, *smooth_n = smooth_a + padded;
  double* taps = scratch.data() + 4 * padded;
  // 1. ln w of each bin that has a value.
  double mass = 0;
  int first = size, last = -1;  // bin that has a value
  for (int k = 0; k < size; ++k) {
    if (!log_weight_of(bins[k], rule, &a[k])) continue;
    n[k] = bins.n[k];
    mass += bins.mass[k];
    if (last < 0) first = k;
    last = k;
  }
  // 2. Smooth, and find the centre of what has a value.
  if (smooths) {
    for (int offset = 0; offset <= radius; ++offset) taps[offset] = tap_weight(offset, rule, update.bins);
    const int begin = std::max(first - radius, 0), end = std::min(last + radius + 1, size);  // the others stay 0
    kernels().smooth({begin, end, radius, update.bins.width, rule.smoothing, a, n, taps, smooth_a, smooth_n});
  } else {
    smooth_a = a, smooth_n = n;
  }
  double centre = 0;
  for (int k = 0; k < size; ++k)
    if (n[k] > 0 && mass > 0) centre += bins.mass[k] / mass * smooth_a[k];
  // 3. Centre, clamp, shrink.
  double total = 0, weighted = 0;
  for (int k = 0; k < size; ++k) {
    a[k] = shrink(smooth_a[k], smooth_n[k], centre, rule);
    if (bins.mass[k] == 0) continue;  // adds nothing, and the exponential takes time
    total += bins.mass[k] * bins.mean[k];
    weighted += bins.mass[k] * exp(a[k]) * bins.mean[k];
  }
  // 4. Preserve the loss.
  const double log_c = log_scale(total, weighted);
  for (int k = 0; k < size; ++k) update.log_weights[k] = float(a[k] + log_c);
}

void fold_batch(const MomentRows& batch, const Totals& totals, const Update& update) {
  const int size = update.bins.size;
  Float64* state = reinterpret_cast<Float64*>(update.state);
  const MomentRows bins(state, size);
  const Float64 *shares = state + 4 * size + 2 + kStateTotals, *weights = shares + size;
  BinSums sums = {};
  for (int k = 0; k < size; ++k) add_bin(&sums, bins[k], batch.n[k], batch.mass[k]);
  LevelSums levels = {};
  const double average = average_loss(sums);
  for (int k = 0; k < size; ++k) add_level(&levels, bins[k], batch.n[k], batch.mass[k], shares[k], weights[k], average);
  const double rho = forgetting(sums.entered, update.half_life, size);
  StateTotals moved;
  memcpy(&moved, update.state + 4 * size + 2, sizeof(moved));
  move_totals(&moved, sums, levels, totals, rho, update.half_life, size);
  for (int k = 0; k < size; ++k) bins.set(k, fold(bins[k], batch[k], rho));
  update.state[4 * size] += int64_t(totals.skipped);
  memcpy(update.state + 4 * size + 2, &moved, sizeof(moved));
  if (update.rule.statistic != kNone) weight_table(bins, update);
}

// A sample on its way into the statistics.
struct Entry {
  int bin;  // -1: it does not enter
  double base_loss, mass;
};

// Moments of a tile of samples, in bins that are empty.
void collect_tile(const std::vector<Entry>& tile, int count, const MomentRows& bins, int size) {
  // 1. Means.
  for (int i = 0; i < count; ++i) {
    const int k = tile[i].bin;
    if (k < 0) continue;
    bins.n[k] += 1;
    bins.mean[k] += tile[i].base_loss;
    bins.mass[k] += tile[i].mass;
  }
  for (int k = 0; k < size; ++k)
    if (bins.n[k] > 0) bins.mean[k] /= bins.n[k];
  // 2. Squared deviations from them.
  for (int i = 0; i < count; ++i) {
    const int k = tile[i].bin;
    if (k < 0) continue;
    const double deviation = tile[i].base_loss - bins.mean[k];
    bins.m2[k] += deviation * deviation;
  }
}

// Chan's merge of each bin.
void merge_into(const MomentRows& all, const MomentRows& part, int size) {
  for (int k = 0; k < size; ++k) all.set(k, merge(all[k], part[k]));
}

// Everything after the elements; `ell_of(i)` is the loss of sample i.
template <class C, class EllOf>
void finish(const Samples<C>& samples, const Update& update, EllOf ell_of) {
  const int size = update.bins.size;
  std::vector<double> rows(4 * size), later;  // the batch's, and a later tile's
  const MomentRows moments(rows.data(), size);
  std::vector<Entry> tile(update.update ? std::min<int64_t>(kTile, samples.count) : 0);
  double total = 0;
  Totals totals = {0, 0, double(samples.count), 0, 0};
  for (int64_t first = 0; first < samples.count; first += kTile) {
    const int count = int(std::min<int64_t>(kTile, samples.count - first));
    // 1. Settle a tile of samples.
    for (int j = 0; j < count; ++j) {
      const int64_t i = first + j;
      const Given<C> given = given_of(samples, i);
      const C weight = weight_of(samples, i, given.log_snr, update.bins);
      const Sample<C> sample = settle(samples, i, given, C(ell_of(i)), weight);
      total += double(sample.weighted);
      if (!update.update) continue;
      add_sample(&totals, sample, given.log_snr, given.v, update.bins);
      const int bin = sample.masked || sample.skipped ? -1 : bin_index(given.log_snr, update.bins);
      tile[j] = {bin, double(sample.base_loss), double(given.v)};
    }
    // 2. Add it to the batch statistics.
    if (!update.update) continue;
    if (first == 0) {
      collect_tile(tile, count, moments, size);
    } else {
      later.assign(4 * size, 0);
      collect_tile(tile, count, {later.data(), size}, size);
      merge_into(moments, {later.data(), size}, size);
    }
  }
  // 3. The mean loss.
  if (samples.loss && samples.mean) *samples.loss = C(total / double(samples.count));
  if (!update.update) return;
  // 4. Fold the batch statistics, or return them for a gather.
  if (update.batch) {
    memcpy(update.batch, rows.data(), rows.size() * sizeof(double));
    memcpy(update.batch + 4 * size, &totals, sizeof(totals));
  } else {
    fold_batch(moments, totals, update);
  }
}

template <class C>
void run_rows(RowsTask<C>& rows, int64_t samples, int64_t threads) {
  if (rows.gradient) {
    const int64_t bytes = samples * rows.elements * dtype_size(rows.prediction.dtype);
    advise(rows.gradient, bytes);
    rows.stream = bytes > kCache;
  }
  const int64_t items = samples * rows.splits;
  const ElementKernels<C>& of = kernels();
  for_items(items, samples * rows.elements, threads, [&](int64_t item) { of.rows(rows, item); });
}

template <class C>
void step_in(const Call& call) {
  Samples<C> samples = samples_of<C>(call);
  const Update update = update_of(call);
  RowsTask<C> rows = rows_of<C>(call);
  split(rows, samples.count);
  // 1. The weight of each sample, and what its gradient is multiplied by.
  std::vector<C> weight(samples.count), factor(rows.gradient ? samples.count : 0);
  for (int64_t i = 0; i < samples.count; ++i) weight[i] = weight_of(samples, i, samples.log_snr[i], update.bins);
  samples.weight = weight.data();  // read below, and when the samples are settled
  const C scale = C(1 / (double(samples.count) * double(rows.elements)));
  for (int64_t i = 0; rows.gradient && i < samples.count; ++i) {
    factor[i] = factor_of(samples, i, update.bins) * (rows.a_each ? rows.a_each[i] : rows.a) * scale;
    samples.masked[i] = C(is_masked(samples, i));
  }
  // 2. The elements.
  std::vector<double> partial(samples.count * rows.splits);
  rows.factor = factor.data();
  rows.masked = samples.masked;
  rows.partial = partial.data();
  run_rows(rows, samples.count, call.threads);
  // 3. Samples and statistics.
  finish(samples, update, [&](int64_t i) {
    double sum = 0;
    for (int64_t split = 0; split < rows.splits; ++split) sum += partial[i * rows.splits + split];
    return sum / double(rows.elements);
  });
}

template <class C>
void backward_in(const Call& call) {
  const Samples<C> samples = samples_of<C>(call);
  RowsTask<C> rows = rows_of<C>(call);
  split(rows, samples.count);
  std::vector<C> factor(samples.count);
  const C scale = C(1 / ((call.mean ? double(samples.count) : 1.0) * double(rows.elements)));
  const C* upstream = static_cast<const C*>(call.upstream);
  for (int64_t i = 0; i < samples.count; ++i)
    factor[i] = samples.factor[i] * upstream[i * call.upstream_stride] * (rows.a_each ? rows.a_each[i] : rows.a) * scale;
  rows.factor = factor.data();
  rows.masked = samples.masked;
  run_rows(rows, samples.count, call.threads);
}

template <class C>
void scale_in(const Call& call) {
  const C upstream = *static_cast<const C*>(call.upstream);
  if (upstream == C(1)) return;
  const ScaleTask<C> task = {call.gradient, int(call.prediction_dtype), upstream, kMinChunk, call.elements};
  const ElementKernels<C>& of = kernels();
  const int64_t items = (task.size + task.chunk - 1) / task.chunk;
  for_items(items, task.size, call.threads, [&](int64_t item) { of.scale(task, item); });
}

template <class C>
void reweight_in(const Call& call) {
  const C* loss = static_cast<const C*>(call.prediction);
  finish(samples_of<C>(call), update_of(call), [=](int64_t i) { return loss[i]; });
}

}  // namespace

namespace cpu {

void step(const Call& call) {
  in_arithmetic_of(call, [&](auto zero) { step_in<decltype(zero)>(call); });
}

void backward(const Call& call) {
  in_arithmetic_of(call, [&](auto zero) { backward_in<decltype(zero)>(call); });
}

void scale(const Call& call) {
  in_arithmetic_of(call, [&](auto zero) { scale_in<decltype(zero)>(call); });
}

void reweight(const Call& call) {
  in_arithmetic_of(call, [&](auto zero) { reweight_in<decltype(zero)>(call); });
}

void fold(const Call& call) {
  const int size = int(call.problem.bins);
  const int64_t vector = 4 * size + kTotals;
  std::vector<double> gathered(call.gathered, call.gathered + call.ranks * vector);
  const MomentRows all(gathered.data(), size);
  for (int64_t rank = 1; rank < call.ranks; ++rank) {
    double* row = gathered.data() + rank * vector;
    merge_into(all, {row, size}, size);
    for (int i = 4 * size; i < vector; ++i) gathered[i] += row[i];
  }
  Totals totals;
  memcpy(&totals, gathered.data() + 4 * size, sizeof(totals));
  fold_batch(all, totals, update_of(call));
}

const RowKernels* available(int index) {
#ifdef VADIFF_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    if (index-- == 0) return &avx2::kernels;
#endif
  return index == 0 ? &generic::kernels : nullptr;
}

bool select(const char* name) {
  int i = 0;
  while (available(i) && strcmp(available(i)->name, name) != 0) ++i;
  if (available(i)) selected() = available(i);
  return available(i);
}

}  // namespace cpu
}  // namespace vadiff

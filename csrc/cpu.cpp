// Work items over threads, then what comes after the elements: samples, statistics, table. Every sum has an order that does
// not depend on the number of threads.

#include "cpu.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace vadiff {
namespace {

constexpr int64_t kItems = 64;                  // a batch is cut into at least so many items, if they are
constexpr int64_t kMinChunk = 16384;            // not shorter than this many elements
constexpr int64_t kForThreads = 65536;          // fewer elements are not worth waking threads for, least of all busy ones
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kAdvisedBytes = 4 * kHugePage;  // from here on a fresh buffer costs more in page faults than in arithmetic

const RowKernels* const* compiled() {
#ifdef VADIFF_X86
  static const RowKernels* const all[] = {&avx512::kernels, &avx2::kernels, &generic::kernels, nullptr};
#else
  static const RowKernels* const all[] = {&generic::kernels, nullptr};
#endif
  return all;
}

bool runs_here(const RowKernels* kernels) {
#ifdef VADIFF_X86
  if (kernels == &avx512::kernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
  if (kernels == &avx2::kernels)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return kernels != nullptr;
}

std::atomic<const RowKernels*> chosen{nullptr};

const RowKernels* kernels() {
  const RowKernels* found = chosen.load(std::memory_order_relaxed);
  if (!found) chosen.store(found = cpu::available(0), std::memory_order_relaxed);
  return found;
}

template <class C>
RowsKernel<C> rows_kernel();
template <>
RowsKernel<float> rows_kernel() { return kernels()->rows_float; }
template <>
RowsKernel<double> rows_kernel() { return kernels()->rows_double; }
template <class C>
ScaleKernel<C> scale_kernel();
template <>
ScaleKernel<float> scale_kernel() { return kernels()->scale_float; }
template <>
ScaleKernel<double> scale_kernel() { return kernels()->scale_double; }

// One, or all: a smaller team makes OpenMP end the other threads, which the next of torch's operators starts again.
int useful_threads(int64_t elements, int threads) { return elements < kForThreads ? 1 : threads; }

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

// Whether what is written will have left the caches before anybody reads it. A virtual machine reports a cache that it shares
// with others: no more than 32 MiB of it are counted on.
bool outgrows_caches(int64_t bytes) {
  static const int64_t cache = [] {
    int64_t found = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    found = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE));
#endif
    const int64_t most = int64_t(32) << 20;
    return found > 0 ? std::min(found, most) : most;
  }();
  return bytes > cache;
}

// Cut each sample into `splits` runs of `chunk` elements. A function of the shape only.
template <class C>
void split(RowsTask<C>& rows, int64_t samples) {
  int64_t finest = std::max<int64_t>(1, rows.elements / kMinChunk);
  int64_t splits = std::min(finest, (kItems + samples - 1) / samples);
  rows.chunk = ((rows.elements + splits - 1) / splits + 1023) / 1024 * 1024;
  rows.splits = (rows.elements + rows.chunk - 1) / rows.chunk;
}

template <class C>
C weight_of(const Levels<C>& levels, int64_t i, const Bins& bins) {
  if (levels.weight) return levels.weight[i];
  if (levels.log_weights) return C(expf(log_weight_at(levels.log_weights, levels.log_snr[i], bins)));
  return C(1);
}

template <class C>
C value_or_one(const C* each, int64_t i) {
  return each ? each[i] : C(1);
}


Moments* moments_at(const double* vector, int size, std::unique_ptr<Moments[]>& into) {
  if (!into) into.reset(new Moments[size]);
  for (int k = 0; k < size; ++k) into[k] = {vector[k], vector[size + k], vector[2 * size + k], vector[3 * size + k]};
  return into.get();
}

void store_moments(const Moments* bins, int size, double* vector) {
  for (int k = 0; k < size; ++k) {
    vector[k] = bins[k].n;
    vector[size + k] = bins[k].mean;
    vector[2 * size + k] = bins[k].m2;
    vector[3 * size + k] = bins[k].mass;
  }
}

void weight_table(const Moments* bins, const Update& update) {
  const Rule& rule = update.rule;
  int size = update.bins.size;
  std::unique_ptr<double[]> scratch(new double[4 * size + rule.radius + 1]);
  double *a = scratch.get(), *n = a + size, *smooth_a = n + size, *smooth_n = smooth_a + size, *taps = smooth_n + size;
  double mass = 0;
  for (int k = 0; k < size; ++k) {
    bool has_value = log_weight_of(bins[k], rule, &a[k]);
    n[k] = has_value ? bins[k].n : 0;
    if (has_value) mass += bins[k].mass;
  }
  double centre = 0;
  if (rule.smoothing > 0)
    for (int offset = 0; offset <= rule.radius; ++offset) taps[offset] = tap_weight(offset, rule, update.bins);
  for (int k = 0; k < size; ++k) {
    smooth_a[k] = a[k];
    smooth_n[k] = n[k];
    if (rule.smoothing > 0) smooth_bin(k, a, n, taps, rule, update.bins, &smooth_a[k], &smooth_n[k]);
    if (n[k] > 0 && mass > 0) centre += bins[k].mass / mass * smooth_a[k];
  }
  double total = 0, weighted = 0;
  for (int k = 0; k < size; ++k) {
    a[k] = shrink(smooth_a[k], smooth_n[k], centre, rule);
    total += bins[k].mass * bins[k].mean;
    weighted += bins[k].mass * exp(a[k]) * bins[k].mean;
  }
  double log_c = log_scale(total, weighted);
  for (int k = 0; k < size; ++k) update.log_weights[k] = float(a[k] + log_c);
}

void fold_batch(const Moments* batch, double poisoned, const Update& update) {
  int size = update.bins.size;
  std::unique_ptr<double[]> vector(new double[4 * size]);
  memcpy(vector.get(), update.state, 4 * size * sizeof(double));
  std::unique_ptr<Moments[]> bins;
  moments_at(vector.get(), size, bins);
  double entered = 0;
  for (int k = 0; k < size; ++k) entered += batch[k].n;
  double rho = forgetting(entered, update.half_life, size);
  for (int k = 0; k < size; ++k) bins[k] = fold(bins[k], batch[k], rho);
  store_moments(bins.get(), size, vector.get());
  memcpy(update.state, vector.get(), 4 * size * sizeof(double));
  update.state[4 * size] += int64_t(poisoned);
  if (update.rule.statistic != kNone) weight_table(bins.get(), update);
}

// Two passes over a tile of samples for each bin's moments, merged into those of the tiles before.
void add_tile(const double* base_loss, const int* bin_of, const double* mass, int samples, int size, Moments* tile,
              Moments* all) {
  for (int k = 0; k < size; ++k) tile[k] = {0, 0, 0, 0};
  for (int i = 0; i < samples; ++i) {
    if (bin_of[i] < 0) continue;
    Moments& bin = tile[bin_of[i]];
    bin.n += 1;
    bin.mean += base_loss[i];
    bin.mass += mass[i];
  }
  for (int k = 0; k < size; ++k)
    if (tile[k].n > 0) tile[k].mean /= tile[k].n;
  for (int i = 0; i < samples; ++i) {
    if (bin_of[i] < 0) continue;
    Moments& bin = tile[bin_of[i]];
    double deviation = base_loss[i] - bin.mean;
    bin.m2 += deviation * deviation;
  }
  for (int k = 0; k < size; ++k) all[k] = merge(all[k], tile[k]);
}

// Settle every sample, then move the statistics. `ell_of(i)` is its loss, `weight(i)` its w.
template <class C, class EllOf, class WeightOf>
void finish(int64_t samples, const Levels<C>& levels, const Results<C>& results, const Update& update, EllOf ell_of,
            WeightOf weight) {
  int size = update.bins.size;
  std::unique_ptr<Moments[]> moments;
  std::unique_ptr<double[]> values;
  std::unique_ptr<int[]> bin_of;
  if (update.update) {
    moments.reset(new Moments[2 * size]());
    values.reset(new double[2 * kTile]);
    bin_of.reset(new int[kTile]);
  }
  double total = 0, poisoned = 0;
  for (int64_t first = 0; first < samples; first += kTile) {
    int count = int(std::min<int64_t>(kTile, samples - first));
    for (int j = 0; j < count; ++j) {
      int64_t i = first + j;
      C ell = ell_of(i), v = value_or_one(levels.sample_weight, i);
      Sample<C> sample = classify(ell, levels.log_snr[i], value_or_one(levels.base_weight, i), v, weight(i));
      if (results.ell) results.ell[i] = ell;
      if (results.loss && !results.mean) results.loss[i] = sample.weighted;
      if (results.saved) results.saved[i] = sample.factor, results.saved[samples + i] = sample.slope;
      total += double(sample.weighted);
      poisoned += sample.poisoned;
      if (update.update) {
        bin_of[j] = sample.entered ? bin_index(levels.log_snr[i], update.bins) : -1;
        values[j] = double(sample.base_loss);
        values[kTile + j] = double(v);
      }
    }
    if (update.update)
      add_tile(values.get(), bin_of.get(), values.get() + kTile, count, size, moments.get() + size, moments.get());
  }
  C mean = C(total / double(samples));
  if (results.saved) results.saved[2 * samples] = mean;
  if (results.loss && results.mean) *results.loss = mean;
  if (!update.update) return;
  if (update.batch) {
    store_moments(moments.get(), size, update.batch);
    update.batch[4 * size] = poisoned;
  } else {
    fold_batch(moments.get(), poisoned, update);
  }
}

template <class C>
void run_rows(RowsTask<C>& rows, int64_t samples, int threads) {
  const RowsKernel<C> kernel = rows_kernel<C>();
  if (rows.factor) {
    int64_t bytes = samples * rows.elements * dtype_size(rows.output.dtype);
    advise(rows.gradient, bytes);
    rows.stream = outgrows_caches(bytes);
  }
  const int64_t items = samples * rows.splits;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < items; ++item) kernel(rows, item);
}

}  // namespace

namespace cpu {

const RowKernels* available(int index) {
  for (const RowKernels* const* kernels = compiled(); *kernels; ++kernels)
    if (runs_here(*kernels) && index-- == 0) return *kernels;
  return nullptr;
}

bool select(const char* name) {
  const RowKernels* found;
  for (int i = 0; (found = available(i)) != nullptr; ++i) {
    if (strcmp(found->name, name) != 0) continue;
    chosen.store(found, std::memory_order_relaxed);
    return true;
  }
  return false;
}

const char* selected() { return kernels()->name; }

}  // namespace cpu

template <class C>
void diffusion_loss(RowsTask<C> rows, int64_t samples, const Levels<C>& levels, const Results<C>& results,
                    const Update& update, int threads) {
  split(rows, samples);
  std::unique_ptr<C[]> weights(new C[2 * samples]);
  std::unique_ptr<double[]> partial(new double[samples * rows.splits]);
  C *weight = weights.get(), *factor = weight + samples;
  const C scale = C(1.0 / (double(samples) * double(rows.elements)));
  for (int64_t i = 0; i < samples; ++i) {
    weight[i] = weight_of(levels, i, update.bins);
    C a = rows.a_each ? rows.a_each[i] : rows.a;
    factor[i] = forward_factor(value_or_one(levels.base_weight, i), value_or_one(levels.sample_weight, i), weight[i], a, scale);
  }
  rows.factor = rows.gradient ? factor : nullptr;
  rows.partial = partial.get();
  run_rows(rows, samples, useful_threads(samples * rows.elements, threads));
  finish(
      samples, levels, results, update,
      [&](int64_t i) {
        double sum = 0;
        for (int64_t split = 0; split < rows.splits; ++split) sum += partial[i * rows.splits + split];
        return C(sum / double(rows.elements));
      },
      [&](int64_t i) { return weight[i]; });
}

template <class C>
void diffusion_loss_backward(RowsTask<C> rows, int64_t samples, const C* upstream, int64_t stride, bool mean, const C* saved,
                             int threads) {
  split(rows, samples);
  std::unique_ptr<C[]> factor(new C[samples]);
  const double elements = double(rows.elements);
  const C scale = C(mean ? 1 / (double(samples) * elements) : 1 / elements);
  const bool poisoned = mean && saved[2 * samples] != saved[2 * samples];
  for (int64_t i = 0; i < samples; ++i) {
    C a = rows.a_each ? rows.a_each[i] : rows.a;
    factor[i] = poisoned ? C(NAN) : saved[i] * upstream[mean ? 0 : i * stride] * a * scale;
  }
  rows.factor = factor.get();
  rows.partial = nullptr;
  run_rows(rows, samples, useful_threads(samples * rows.elements, threads));
}

template <class C>
void scale_gradient(const void* gradient, void* out, int dtype, int64_t size, const C* upstream, const C* mean_loss,
                    int threads) {
  ScaleTask<C> task = {gradient, out, dtype, *mean_loss != *mean_loss ? C(NAN) : *upstream, kMinChunk, size, false};
  if (gradient == out && task.upstream == C(1)) return;
  if (gradient != out) {
    advise(out, size * dtype_size(dtype));
    task.stream = outgrows_caches(size * dtype_size(dtype));
  }
  const ScaleKernel<C> kernel = scale_kernel<C>();
  const int64_t items = (size + task.chunk - 1) / task.chunk;
  threads = useful_threads(size, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < items; ++item) kernel(task, item);
}

template <class C>
void reweight(const C* loss, int64_t samples, const Levels<C>& levels, const Results<C>& results, const Update& update,
              int /*threads*/) {
  finish(
      samples, levels, results, update, [&](int64_t i) { return loss[i]; },
      [&](int64_t i) { return weight_of(levels, i, update.bins); });
}

void fold(const double* parts, int64_t count, const Update& update, int /*threads*/) {
  int size = update.bins.size;
  std::unique_ptr<Moments[]> all, part;
  moments_at(parts, size, all);
  double poisoned = parts[4 * size];
  for (int64_t i = 1; i < count; ++i) {
    parts += 4 * size + 1;
    moments_at(parts, size, part);
    for (int k = 0; k < size; ++k) all[k] = merge(all[k], part[k]);
    poisoned += parts[4 * size];
  }
  fold_batch(all.get(), poisoned, update);
}

#define VADIFF_INSTANTIATE(C)                                                                                               \
  template void diffusion_loss<C>(RowsTask<C>, int64_t, const Levels<C>&, const Results<C>&, const Update&, int);           \
  template void diffusion_loss_backward<C>(RowsTask<C>, int64_t, const C*, int64_t, bool, const C*, int);                   \
  template void scale_gradient<C>(const void*, void*, int, int64_t, const C*, const C*, int);                               \
  template void reweight<C>(const C*, int64_t, const Levels<C>&, const Results<C>&, const Update&, int);
VADIFF_INSTANTIATE(float)
VADIFF_INSTANTIATE(double)

}  // namespace vadiff

// One pass over the elements of a work item: sum of the element losses and, if wanted, the gradient. Compiled once per
// instruction set, with VADIFF_ISA naming the namespace; GCC's and Clang's vector types become that set's registers.

#include "cpu_rows.h"

#include <type_traits>

#include "cpu_convert.h"
#include "loss_math.h"

namespace vadiff {
namespace VADIFF_ISA {
namespace {

constexpr int kTileElements = 1024;  // four buffers of it fit a first-level cache; below 4,096 as sums are float32

constexpr int kAhead = 256;  // elements; prefetched, as the hardware prefetcher stops at each page

// Bytes of a register.
#if defined(__AVX__)
#define VADIFF_VECTOR 32
#else
#define VADIFF_VECTOR 16
#endif

template <class C>
struct Vector;
template <>
struct Vector<float> {
  typedef float Type __attribute__((vector_size(VADIFF_VECTOR)));
  typedef float Unaligned __attribute__((vector_size(VADIFF_VECTOR), aligned(4), may_alias));
};
template <>
struct Vector<double> {
  typedef double Type __attribute__((vector_size(VADIFF_VECTOR)));
  typedef double Unaligned __attribute__((vector_size(VADIFF_VECTOR), aligned(8), may_alias));
};

// Residuals of one tile: r = a*F + b*x0 + c*eps.
template <class C>
struct Residual {
  const C *f, *x, *e;
  C a, b, c;
};

template <class C, bool kTarget, bool kNoise, bool kHuber, bool kGradient>
inline double tile(const Residual<C>& in, C delta, C factor, C* __restrict gradient, int n) {
  typedef typename Vector<C>::Type V;
  typedef typename Vector<C>::Unaligned U;
  constexpr int kLanes = VADIFF_VECTOR / sizeof(C), kLine = 64 / sizeof(C);
  auto load = [](const C* p) { return V(*reinterpret_cast<const U*>(p)); };
  V zero = {}, a = zero + in.a, b = zero + in.b, c = zero + in.c, d = zero + delta, slope = zero + factor * (kHuber ? 1 : 2);
  auto one = [&](int i) {  // element losses of one vector
    V r = a * load(in.f + i);
    if (kTarget) r += b * load(in.x + i);
    if (kNoise) r += c * load(in.e + i);
    if (!kHuber) {
      if (kGradient) *reinterpret_cast<U*>(gradient + i) = slope * r;
      return V(r * r);
    }
    V clamped = r > d ? d : r < -d ? -d : r;  // NaN stays
    if (kGradient) *reinterpret_cast<U*>(gradient + i) = slope * clamped;
    return V(clamped * (r - C(0.5) * clamped));  // both pieces of Huber's function at once
  };
  V sums[4] = {zero, zero, zero, zero};  // four chains of additions hide their latency
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int ahead = i + kAhead; ahead < i + kAhead + 4 * kLanes; ahead += kLine) {
      __builtin_prefetch(in.f + ahead);
      if (kTarget) __builtin_prefetch(in.x + ahead);
      if (kNoise) __builtin_prefetch(in.e + ahead);
    }
    sums[0] += one(i);
    sums[1] += one(i + kLanes);
    sums[2] += one(i + 2 * kLanes);
    sums[3] += one(i + 3 * kLanes);
  }
  V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += double(sum[lane]);
  for (; i < n; ++i) {
    C r = in.a * in.f[i];
    if (kTarget) r += in.b * in.x[i];
    if (kNoise) r += in.c * in.e[i];
    if (kGradient) gradient[i] = factor * residual_slope(r, kHuber ? delta : C(0));
    total += double(element_loss(r, kHuber ? delta : C(0)));
  }
  return total;
}

template <class C>
double tile(const Residual<C>& in, C delta, C factor, C* gradient, int n) {
  const auto known = [](bool value, auto run) { return value ? run(std::true_type()) : run(std::false_type()); };
  return known(in.x, [&](auto target) {
    return known(in.e, [&](auto noise) {
      return known(delta > 0, [&](auto huber) {
        return known(gradient, [&](auto made) {
          return tile<C, target(), noise(), huber(), made()>(in, delta, factor, gradient, n);
        });
      });
    });
  });
}

// Write a tile of values to `to`, converting where its type is another one. `values` may be `to` itself.
template <class C>
void put(const C* values, void* to, int dtype, int64_t first, int n, bool stream) {
  int size = dtype_size(dtype);
  char* out = static_cast<char*>(to) + first * size;
  if (size == 2) {
    uint16_t narrowed[kTileElements];
    uint16_t* at = stream ? narrowed : reinterpret_cast<uint16_t*>(out);
    float single[kTileElements];
    narrow(fetch(values, sizeof(C) == 8 ? kFloat64 : kFloat32, 0, n, single), dtype, n, at);
    if (stream) stream_copy(out, narrowed, int64_t(n) * 2);
  } else if (reinterpret_cast<const void*>(values) != out) {
    stream ? stream_copy(out, values, int64_t(n) * size) : (void)memcpy(out, values, int64_t(n) * size);
  }
}

template <class C>
void rows(const RowsTask<C>& task, int64_t item) {
  alignas(64) C buffers[4][kTileElements];
  // 1. The item's elements, and what its sample multiplies them by.
  const int64_t sample = item / task.splits, start = (item - sample * task.splits) * task.chunk, row = sample * task.elements;
  const int64_t end = start + task.chunk < task.elements ? start + task.chunk : task.elements;
  const C factor = task.gradient ? task.factor[sample] : C(0);
  const bool masked = task.gradient && task.masked[sample] != 0;
  const bool direct = !task.stream && dtype_size(task.prediction.dtype) == sizeof(C);  // compute in the gradient's own memory
  Residual<C> in;
  in.a = task.a_each ? task.a_each[sample] : task.a;
  in.b = task.b_each ? task.b_each[sample] : task.b;
  in.c = task.c_each ? task.c_each[sample] : task.c;
  double total = 0;
  for (int64_t at = start; at < end; at += kTileElements) {
    // 2. Read a tile of them.
    const int n = int(end - at < kTileElements ? end - at : kTileElements);
    in.f = fetch(task.prediction.data, task.prediction.dtype, row + at, n, buffers[0]);
    in.x = task.target.data ? fetch(task.target.data, task.target.dtype, row + at, n, buffers[1]) : nullptr;
    in.e = task.noise.data ? fetch(task.noise.data, task.noise.dtype, row + at, n, buffers[2]) : nullptr;
    // 3. Sum its losses and write its gradient: exactly 0 if masked, whatever the residual.
    C* gradient = nullptr;
    if (task.gradient) gradient = direct ? static_cast<C*>(task.gradient) + row + at : buffers[3];
    total += tile<C>(in, task.huber_delta, factor, masked ? nullptr : gradient, n);
    if (masked) memset(gradient, 0, n * sizeof(C));
    if (gradient) put(gradient, task.gradient, task.prediction.dtype, row + at, n, task.stream);
  }
  if (task.partial) task.partial[item] = total;
  if (task.stream) stream_fence();
}

template <class C>
void scale(const ScaleTask<C>& task, int64_t item) {
  alignas(64) C buffer[kTileElements], scaled[kTileElements];
  int64_t start = item * task.chunk, end = start + task.chunk < task.size ? start + task.chunk : task.size;
  for (int64_t at = start; at < end; at += kTileElements) {
    int n = int(end - at < kTileElements ? end - at : kTileElements);
    const C* from = fetch(task.gradient, task.dtype, at, n, buffer);
    for (int i = 0; i < n; ++i) scaled[i] = from[i] * task.upstream;
    put(scaled, task.gradient, task.dtype, at, n, false);
  }
}

struct Lanes {
  typedef Vector<double>::Type Type;
  static Type load(const double* from) { return *reinterpret_cast<const Vector<double>::Unaligned*>(from); }
  static void store(double* to, Type values) { *reinterpret_cast<Vector<double>::Unaligned*>(to) = values; }
};

void smooth(const SmoothTask& task) {
  constexpr int kLanes = VADIFF_VECTOR / sizeof(double);
  static_assert(kLanes <= kSmoothLanes, "the caller pads by so many bins");
  for (int k = task.begin; k < task.end; k += kLanes)
    smooth_bins<Lanes>(task.a + k, task.n + k, task.taps, -task.radius, task.radius, task.width, task.smoothing,
                       task.a_smooth + k, task.n_smooth + k);
}

}  // namespace

#define VADIFF_NAME_(isa) #isa
#define VADIFF_NAME(isa) VADIFF_NAME_(isa)
extern const RowKernels kernels = {{rows<float>, scale<float>}, {rows<double>, scale<double>}, VADIFF_NAME(VADIFF_ISA), smooth};

}  // namespace VADIFF_ISA
}  // namespace vadiff

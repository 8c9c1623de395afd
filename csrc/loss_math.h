// Formulas of one step, for host and device: those of vadiff/ops/reference.py that concern one element, one sample or one bin,
// in its notation. No state, no loops over data, no C++ library.
//
// All functions are `static inline`: the row kernels are compiled once per instruction set, and the linker could otherwise keep
// the AVX2 copy of a shared function for a machine without AVX2.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define VADIFF_FN static __host__ __device__ __forceinline__
#else
#define VADIFF_FN static inline
#endif

namespace vadiff {

constexpr double kEmpty = 1.0 / (1 << 20);  // a bin whose count falls below is emptied
constexpr int kTile = 2048;                  // samples per two-pass tile of the batch statistics

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
enum Statistic : int { kNone = 0, kStd = 1, kMean = 2, kRms = 3 };  // kNone: no weight table

VADIFF_FN int dtype_size(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// elements: C is float, or double for float64 predictions

template <class C>
VADIFF_FN C element_loss(C r, C huber_delta) {  // r**2, or Huber's function of r where huber_delta > 0
  if (!(huber_delta > 0)) return r * r;
  C size = r < 0 ? -r : r;
  return size <= huber_delta ? C(0.5) * r * r : huber_delta * (size - C(0.5) * huber_delta);
}

template <class C>
VADIFF_FN C residual_slope(C r, C huber_delta) {  // 2r, or r clamped to +-delta; NaN stays NaN
  if (!(huber_delta > 0)) return C(2) * r;
  return r > huber_delta ? huber_delta : r < -huber_delta ? -huber_delta : r;
}

// samples

struct Bins {
  int size;
  float low, inv_width;
  double width;
};

VADIFF_FN float clamp_position(float position, int size) {  // NaN goes to 0
  float last = float(size - 1);
  return position >= 0 ? (position < last ? position : last) : 0.0f;
}

VADIFF_FN int bin_index(float log_snr, const Bins& bins) {
  return int(clamp_position(floorf((log_snr - bins.low) * bins.inv_width), bins.size));
}

// ln w, linear between the bin centres and flat beyond the outer two.
VADIFF_FN float log_weight_at(const float* log_weights, float log_snr, const Bins& bins) {
  float position = clamp_position((log_snr - bins.low) * bins.inv_width - 0.5f, bins.size);
  float left = floorf(position);
  if (left > float(bins.size - 2)) left = float(bins.size - 2);
  const float* at = log_weights + int(left);
  return at[0] + (position - left) * (at[1] - at[0]);
}

template <class C>
VADIFF_FN bool is_finite(C x) {
  return x - x == 0;
}

// A masked sample has no loss, no gradient and enters no bin. Every other factor of 0 multiplies: 0 * NaN = NaN.
template <class C>
VADIFF_FN bool is_masked(C u, C v) {
  return u == 0 || v == 0;
}

template <class C>
struct Sample {
  C base_loss;   // g = u*ell
  C factor;      // w*u*v, 0 if masked
  C slope;       // w*v*ell, 0 if masked
  C weighted;    // w*u*v*ell, 0 if masked
  bool masked;
  bool skipped;  // not masked, and non-finite: enters no bin and is counted
};

template <class C>
VADIFF_FN Sample<C> classify(C ell, float log_snr, C u, C v, C w) {
  const C g = u * ell, factor = w * u * v;
  const bool masked = is_masked(u, v);
  const bool finite = log_snr == log_snr && is_finite(ell) && is_finite(u) && is_finite(v) && is_finite(g);
  return {g, masked ? C(0) : factor, masked ? C(0) : w * v * ell, masked ? C(0) : factor * ell, masked, !finite && !masked};
}

// bins

struct Moments {
  double n, mean, m2, mass;
};

// Chan's merge. An empty side leaves the other's bits alone.
VADIFF_FN Moments merge(const Moments& a, const Moments& b) {
  double n = a.n + b.n;
  double share = b.n > 0 ? b.n / n : 0;
  double delta = b.n > 0 ? b.mean - a.mean : 0;
  return {n, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.n * share, a.mass + b.mass};
}

VADIFF_FN double forgetting(double entered, double half_life, int bins) {  // rho
  return exp2(-entered / half_life / bins);
}

VADIFF_FN Moments fold(const Moments& old, const Moments& batch, double rho) {
  Moments folded = merge({old.n * rho, old.mean, old.m2 * rho, old.mass * rho}, batch);
  return folded.n < kEmpty ? Moments{0, 0, 0, 0} : folded;
}

// From statistics to weights: the steps of reference.weight_table, bin by bin.

struct Rule {
  int statistic;
  double strength, smoothing, log_clip, prior;
  int radius;  // bins within three smoothing widths, to each side
};

// Step 1: a = -strength * ln s. False where the bin has no value.
VADIFF_FN bool log_weight_of(const Moments& m, const Rule& rule, double* a) {
  *a = 0;
  if (!(m.n >= kEmpty)) return false;
  double s = m.mean;
  if (rule.statistic == kStd) s = sqrt(m.m2 / (m.n - 1 > m.n / 2 ? m.n - 1 : m.n / 2));
  if (rule.statistic == kRms) s = sqrt(m.mean * m.mean + m.m2 / m.n);
  if (!(s > 1e-6 * fabs(m.mean))) return false;
  *a = -rule.strength * log(s);
  return true;
}

VADIFF_FN double tap_weight(int offset, const Rule& rule, const Bins& bins) {  // exp(-d**2 / 2h**2)
  double d = offset * bins.width;
  return exp(-(d * d) / (2 * rule.smoothing * rule.smoothing));
}

struct OneBin {
  typedef double Type;
  VADIFF_FN double load(const double* from) { return *from; }
  VADIFF_FN void store(double* to, double value) { *to = value; }
};

// Step 2: local linear fit at one bin, or at as many neighbours as a vector has lanes. a, n: values and counts from that bin
// on, n = 0 where there is no value. first, last: how far it reaches. taps [radius + 1].
template <class Lanes>
VADIFF_FN void smooth_bins(const double* a, const double* n, const double* taps, int first, int last, double width,
                           double smoothing, double* a_smooth, double* n_smooth) {
  typedef typename Lanes::Type V;
  const V zero = {}, infinity = zero + double(INFINITY);
  // 1. q-means of distance and value, and the range of the values.
  V total = zero, d_mean = zero, a_mean = zero, lowest = infinity, highest = -infinity;
  for (int offset = first; offset <= last; ++offset) {
    const V value = Lanes::load(a + offset), q = Lanes::load(n + offset) * taps[offset < 0 ? -offset : offset];
    total += q;
    d_mean += q * (offset * width);
    a_mean += q * value;
    const V low = q > zero ? value : infinity, high = q > zero ? value : -infinity;  // selects: a branch is unpredictable
    lowest = low < lowest ? low : lowest;
    highest = high > highest ? high : highest;
  }
  d_mean /= total;
  a_mean /= total;
  // 2. q-variance and q-covariance, times the total, which cancels.
  V variance = zero, covariance = zero;
  for (int offset = first; offset <= last; ++offset) {
    const V q = Lanes::load(n + offset) * taps[offset < 0 ? -offset : offset];
    const V deviation = offset * width - d_mean;
    variance += q * deviation * deviation;
    covariance += q * deviation * (Lanes::load(a + offset) - a_mean);
  }
  // 3. The line through them at distance 0, within the range; 0 where nothing is in reach.
  V fit = a_mean - d_mean * covariance / (variance + 32 * smoothing * smoothing);
  fit = fit < lowest ? lowest : fit > highest ? highest : fit;
  Lanes::store(a_smooth, total > zero ? fit : zero);
  Lanes::store(n_smooth, total);
}

// Step 3: centre, clamp, shrink by confidence.
VADIFF_FN double shrink(double a, double n, double centre, const Rule& rule) {
  if (!(n > 0)) return 0;
  a -= centre;
  a = a < -rule.log_clip ? -rule.log_clip : a > rule.log_clip ? rule.log_clip : a;
  return a * (n / (n + rule.prior));
}

// Step 4: ln c, from sum(m mu) and sum(m e**a mu).
VADIFF_FN double log_scale(double total, double weighted) {
  double c = total / weighted;
  return c > 0 && is_finite(c) ? log(c) : 0;
}

}  // namespace vadiff

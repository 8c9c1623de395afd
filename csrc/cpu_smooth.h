// Step 2 of reference.weight_table for all bins, a register of bins at a time: `smooth_bin` of loss_math.h, vectorised over k.
// Included by cpu_rows.cpp, once per instruction set, in its namespace.

void smooth(const SmoothTask& task) {
  typedef Vector<double>::Type V;
  typedef Vector<double>::Unaligned U;
  constexpr int kLanes = VADIFF_VECTOR / sizeof(double);
  static_assert(kLanes <= kSmoothLanes, "the caller pads by so many bins");
  const int radius = task.radius;
  const V zero = {}, infinity = zero + double(INFINITY);
  auto load = [](const double* p) { return V(*reinterpret_cast<const U*>(p)); };
  for (int k = task.begin; k < task.end; k += kLanes) {
    const double *a = task.a + k, *n = task.n + k;
    // 1. q-means of distance and value, and the range of the values.
    V total = zero, d_mean = zero, a_mean = zero, lowest = infinity, highest = -infinity;
    for (int offset = -radius; offset <= radius; ++offset) {
      const V value = load(a + offset), q = load(n + offset) * task.taps[offset < 0 ? -offset : offset];
      total += q;
      d_mean += q * (offset * task.width);
      a_mean += q * value;
      const V low = q > zero ? value : infinity, high = q > zero ? value : -infinity;
      lowest = low < lowest ? low : lowest;
      highest = high > highest ? high : highest;
    }
    d_mean /= total;
    a_mean /= total;
    // 2. q-variance and q-covariance.
    V variance = zero, covariance = zero;
    for (int offset = -radius; offset <= radius; ++offset) {
      const V q = load(n + offset) * task.taps[offset < 0 ? -offset : offset];
      const V deviation = offset * task.width - d_mean;
      variance += q * deviation * deviation;
      covariance += q * deviation * (load(a + offset) - a_mean);
    }
    // 3. The line through them at distance 0, within the range; 0 where nothing is in reach. `smooth_bin` divides covariance,
    // variance and ridge by the total, which cancels.
    V fit = a_mean - d_mean * covariance / (variance + 32 * task.smoothing * task.smoothing);
    fit = fit < lowest ? lowest : fit > highest ? highest : fit;
    *reinterpret_cast<U*>(task.a_smooth + k) = total > zero ? fit : zero;
    *reinterpret_cast<U*>(task.n_smooth + k) = total;
  }
}

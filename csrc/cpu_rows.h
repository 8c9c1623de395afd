// The vectorised kernels of the CPU: one pass over the elements of some work items, and the smoothing of the weight table.
// Implemented in cpu_rows.cpp, which is compiled once per instruction set.
#pragma once

#include <stdint.h>

namespace vadiff {

// One tensor's elements, or null where it is not read.
struct Elements {
  const void* data;
  int dtype;
};

// The work of all items. C is float, or double for float64 predictions.
template <class C>
struct RowsTask {
  Elements prediction, target, noise;  // [B, D], one layout
  const C *a_each, *b_each, *c_each;   // [B] or null
  C a, b, c;                           // used where there is none per sample
  C huber_delta;                       // 0: squared error
  int64_t elements;                    // D
  int64_t splits, chunk;               // item = one of `splits` runs of `chunk` elements of one sample
  void* gradient;                      // [B, D] in the prediction's dtype, out; null: none
  const C* factor;                     // CPU, [B]: what the slope is multiplied by
  const C* masked;                     // CPU, [B]: not 0 where the gradient is exactly 0
  double* partial;                     // [B * splits], out: sums of element losses; null: not needed
  bool stream;                         // CPU: write the gradient past the caches
};

template <class C>
struct ScaleTask {
  void* gradient;  // [size], in and out
  int dtype;
  C upstream;
  int64_t chunk, size;
};

constexpr int kSmoothLanes = 4;  // bins of the widest register

// Smoothing of the weight table over bins `begin` to `end` (exclusive). a and n are readable `radius` bins before bin 0 and
// radius + kSmoothLanes after the last one, and 0 there; the results have room for kSmoothLanes more than there are bins.
struct SmoothTask {
  int begin, end, radius;
  double width, smoothing;     // of a bin, and h, in log-SNR
  const double *a, *n, *taps;  // values and counts of all bins, n = 0 where there is no value; taps [radius + 1]
  double *a_smooth, *n_smooth;
};

template <class C>
struct ElementKernels {
  void (*rows)(const RowsTask<C>&, int64_t item);
  void (*scale)(const ScaleTask<C>&, int64_t item);
};

struct RowKernels : ElementKernels<float>, ElementKernels<double> {
  const char* name;
  void (*smooth)(const SmoothTask&);
};

namespace generic {
extern const RowKernels kernels;
}
#ifdef VADIFF_X86
namespace avx2 {
extern const RowKernels kernels;
}
#endif

}  // namespace vadiff

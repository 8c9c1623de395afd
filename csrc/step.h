// What one call is given: plain pointers and numbers. Arguments are checked before (vadiff/ops.py); [B]-shaped inputs are C,
// which is float, or double for float64 outputs. A null pointer: not given.
#pragma once

#include <stdint.h>

#include "cpu_rows.h"
#include "loss_math.h"

namespace vadiff {

// Per-sample inputs, and the table they are weighed with.
template <class C>
struct Levels {
  const float* log_snr;                         // [B]
  const C *base_weight, *sample_weight, *weight;  // [B] or null
  const float* log_weights;                     // [K], or null where there is no table
};

// Per-sample results.
template <class C>
struct Results {
  C* ell;    // [B]
  C* loss;   // scalar if `mean`, else [B]; may be null
  C* saved;  // [2B + 1]: w*u*v, w*v*ell, mean loss; may be null on the CPU
  bool mean;
};

// Statistics, and how they move.
struct Update {
  bool update;
  int64_t* state;      // [4K + 2]: bits of float64 n, mean, M2, mass; skipped; ticket (CUDA)
  float* log_weights;  // [K]
  double* batch;       // [4K + 1], out, where ranks have yet to be merged; null: fold at once
  Bins bins;
  double half_life;
  Rule rule;
};

}  // namespace vadiff

// One call as Python lays it out: the classes `ProblemFields` and `Call` of vadiff/ops/native.py name the same fields in the
// same order. Every field is 8 bytes wide, so there is no padding. A null pointer: not given. C is float, or double where
// the prediction is float64.
#pragma once

#include <stdint.h>

namespace vadiff {

struct ProblemFields {
  int64_t bins;  // K
  double low;
  double high;
  double half_life;
  int64_t statistic;  // enum Statistic
  double strength;
  double smoothing;
  double log_clip;
  double prior;
  int64_t radius;
  double huber_delta;
};

struct Call {
  ProblemFields problem;

  // where
  int64_t device;  // a CUDA device; negative: the CPU
  int64_t threads;  // of the CPU
  void* stream;  // cudaStream_t
  double* workspace;  // of cuda::workspace_size() doubles

  // inputs
  int64_t samples;  // B
  int64_t elements;  // D of one sample
  const void* prediction;  // [B, D]; of `reweight` the losses, D = 1
  int64_t prediction_dtype;  // enum Dtype; the gradient's too
  const void* target;  // [B, D]
  int64_t target_dtype;
  const void* noise;  // [B, D]
  int64_t noise_dtype;
  const void* a_each;  // C [B]; null: the number a
  const void* b_each;
  const void* c_each;
  double a;
  double b;
  double c;
  const float* log_snr;  // [B]
  const void* base_weight;  // C [B]
  const void* sample_weight;  // C [B]
  const void* weight;  // C [B]
  int64_t mean;  // the loss is the mean, and its upstream gradient a scalar

  // state
  int64_t* state;  // [6K + 14]: see `State` of vadiff/ops/problem.py
  float* log_weights;  // [K]
  int64_t update;  // move both
  double* batch;  // [4K + 5], out: statistics of the batch, in place of a move; null: one rank

  // results
  void* loss;  // C: a scalar, or [B]
  void* per_sample;  // C [4, B]: ell, factor, slope, masked
  void* gradient;  // [B, D]; null: none. Of `scale` in and out
  void* factors;  // C [B], of `reweight`

  // of a backward, of `scale`, of `fold`
  const void* upstream;  // C: a scalar, or [B]
  int64_t upstream_stride;
  const double* gathered;  // [ranks, 4K + 5]
  int64_t ranks;
};

static_assert(sizeof(void*) == 8 && sizeof(ProblemFields) == 11 * 8 && sizeof(Call) == sizeof(ProblemFields) + 35 * 8,
              "Python lays out fields of 8 bytes");

}  // namespace vadiff

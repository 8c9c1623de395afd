// What the kernels read of a call, typed: C is float, or double for float64 predictions. For host and device.
#pragma once

#include "call.h"
#include "cpu_rows.h"
#include "level_free.h"
#include "loss_math.h"

namespace vadiff {

// Inputs and results of each sample.
template <class C>
struct Samples {
  int64_t count;                                  // B
  const float* log_snr;                           // [B]
  const C *base_weight, *sample_weight, *weight;  // [B] or null
  const float* log_weights;                       // [K]; null: no table
  C *ell, *factor, *slope, *masked;               // [B], out; `reweight` has only the factor
  C* loss;                                        // out: scalar if `mean`, else [B]; null in `reweight`
  bool mean;
};

// Statistics, and how they move.
struct Update {
  bool update;
  int64_t* state;
  float* log_weights;
  double* batch;  // null: fold at once
  Bins bins;
  double half_life;
  Rule rule;
};

// Run `run` with a zero of the type of a call's arithmetic.
template <class Run>
void in_arithmetic_of(const Call& call, Run run) {
  call.prediction_dtype == kFloat64 ? run(0.0) : run(0.0f);
}

template <class C>
RowsTask<C> rows_of(const Call& call) {
  RowsTask<C> rows{};
  rows.prediction = {call.prediction, int(call.prediction_dtype)};
  rows.target = {call.target, int(call.target_dtype)};
  rows.noise = {call.noise, int(call.noise_dtype)};
  rows.a_each = static_cast<const C*>(call.a_each), rows.a = C(call.a);
  rows.b_each = static_cast<const C*>(call.b_each), rows.b = C(call.b);
  rows.c_each = static_cast<const C*>(call.c_each), rows.c = C(call.c);
  rows.huber_delta = C(call.problem.huber_delta);
  rows.elements = call.elements;
  rows.gradient = call.gradient;
  return rows;
}

template <class C>
Samples<C> samples_of(const Call& call) {
  C *rows = static_cast<C*>(call.per_sample), *factors = static_cast<C*>(call.factors);
  const int64_t b = call.samples;
  Samples<C> samples{};
  samples.count = b;
  samples.log_snr = call.log_snr;
  samples.base_weight = static_cast<const C*>(call.base_weight);
  samples.sample_weight = static_cast<const C*>(call.sample_weight);
  samples.weight = static_cast<const C*>(call.weight);
  samples.log_weights = call.problem.statistic == kNone ? nullptr : call.log_weights;
  samples.factor = factors;
  if (rows) samples.ell = rows, samples.factor = rows + b, samples.slope = rows + 2 * b, samples.masked = rows + 3 * b;
  samples.loss = static_cast<C*>(call.loss);
  samples.mean = call.mean != 0;
  return samples;
}

inline Update update_of(const Call& call) {
  const ProblemFields& p = call.problem;
  const Bins bins = {int(p.bins), float(p.low), float(p.bins / (p.high - p.low)), (p.high - p.low) / p.bins};
  const Rule rule = {int(p.statistic), p.strength, p.smoothing, p.log_clip, p.prior, int(p.radius)};
  return {call.update != 0, call.state, call.log_weights, call.batch, bins, p.half_life, rule};
}

template <class C>
VADIFF_FN C value_or_one(const C* each, int64_t i) {
  return each ? each[i] : C(1);
}

template <class C>
VADIFF_FN bool is_masked(const Samples<C>& samples, int64_t i) {
  return is_masked(value_or_one(samples.base_weight, i), value_or_one(samples.sample_weight, i));
}

// What is given of a sample, apart from its loss and weight.
template <class C>
struct Given {
  float log_snr;
  C u, v;
};

template <class C>
VADIFF_FN Given<C> given_of(const Samples<C>& samples, int64_t i) {
  return {samples.log_snr[i], value_or_one(samples.base_weight, i), value_or_one(samples.sample_weight, i)};
}

// A log-SNR of NaN reads the table at its first bin, so that on a GPU nothing branches on what is just being loaded.
template <class C>
VADIFF_FN C weight_of(const Samples<C>& samples, int64_t i, float log_snr, const Bins& bins) {
  C weight = 1;
  if (samples.weight)
    weight = samples.weight[i];
  else if (samples.log_weights)
    weight = C(expf(log_weight_at(samples.log_weights, log_snr, bins)));
  return log_snr != log_snr ? C(NAN) : weight;
}

// w*u*v, which the gradient is multiplied by; known before ell.
template <class C>
VADIFF_FN C factor_of(const Samples<C>& samples, int64_t i, const Bins& bins) {
  const Given<C> given = given_of(samples, i);
  return weight_of(samples, i, given.log_snr, bins) * given.u * given.v;
}

// Classify sample i of loss ell and weight w, and write its results.
template <class C>
VADIFF_FN Sample<C> settle(const Samples<C>& samples, int64_t i, const Given<C>& given, C ell, C w) {
  const Sample<C> s = classify(ell, given.log_snr, given.u, given.v, w);
  if (!samples.ell) {  // `reweight`: the caller's own loss is not finite, so that its weighted loss is not either
    samples.factor[i] = is_finite(ell) || s.masked ? s.factor : C(NAN);
    return s;
  }
  samples.ell[i] = ell;
  samples.factor[i] = s.factor;
  samples.slope[i] = s.slope;
  samples.masked[i] = C(s.masked);
  if (!samples.mean) samples.loss[i] = s.weighted;
  return s;
}

}  // namespace vadiff

// What does not change from step to step, as vadiff/native.py makes it.
#pragma once

#include <stdexcept>
#include <string>

#include "step.h"

namespace vadiff {

using Address = uintptr_t;  // 0: not given

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

struct Settings {
  Bins bins;
  double half_life;
  Rule rule;

  Settings(int size, double low, double high, double half_life, const std::string& statistic, double strength, double smoothing,
           double log_clip, double prior, int radius)
      : bins{size, float(low), float(size / (high - low)), (high - low) / size},
        half_life(half_life),
        rule{statistic_code(statistic), strength, smoothing, log_clip, prior, radius} {}

  static int statistic_code(const std::string& name) {
    if (name.empty()) return kNone;
    if (name == "std") return kStd;
    if (name == "mean") return kMean;
    if (name == "rms") return kRms;
    throw std::invalid_argument("statistic is '" + name + "', expected std, mean, rms or nothing");
  }

  Update update(bool move, Address state, Address log_weights, Address batch) const {
    return {move, at<int64_t>(state), at<float>(log_weights), at<double>(batch), bins, half_life, rule};
  }

  template <class C>
  Levels<C> levels(Address log_snr, Address base_weight, Address sample_weight, Address weight, Address log_weights) const {
    return {at<float>(log_snr), at<C>(base_weight), at<C>(sample_weight), at<C>(weight),
            rule.statistic == kNone ? nullptr : at<float>(log_weights)};
  }
};

}  // namespace vadiff

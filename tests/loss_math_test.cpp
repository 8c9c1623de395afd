// Unit tests of csrc/loss_math.h on the host; test_csrc.py compiles and runs them, also through nvcc where there is one.

#include "loss_math.h"

#include <stdio.h>
#include <stdlib.h>

#include <initializer_list>

using namespace vadiff;

namespace {

int failures = 0;

void expect(bool holds, const char* what, int line) {
  if (holds) return;
  fprintf(stderr, "line %d: %s\n", line, what);
  ++failures;
}
#define EXPECT(holds) expect(holds, #holds, __LINE__)

bool near(double a, double b) { return fabs(a - b) <= 1e-12 * (fabs(a) + fabs(b)); }
bool same(const Moments& a, const Moments& b) {
  return a.n == b.n && a.mean == b.mean && a.m2 == b.m2 && a.mass == b.mass;
}

const Bins kBins = {16, -8.0f, 1.0f, 1.0};

void elements() {
  EXPECT(element_loss(3.0f, 0.0f) == 9.0f);
  EXPECT(element_loss(-0.5f, 1.0f) == 0.125f);
  EXPECT(element_loss(-3.0f, 1.0f) == 2.5f);
  EXPECT(residual_slope(3.0f, 0.0f) == 6.0f);
  EXPECT(residual_slope(-3.0f, 1.0f) == -1.0f);
  EXPECT(residual_slope(NAN, 1.0f) != residual_slope(NAN, 1.0f));
}

void bins() {
  EXPECT(bin_index(-8.0f, kBins) == 0);
  EXPECT(bin_index(nextafterf(-7.0f, -8.0f), kBins) == 0);
  EXPECT(bin_index(-7.0f, kBins) == 1);
  EXPECT(bin_index(8.0f, kBins) == 15);
  EXPECT(bin_index(INFINITY, kBins) == 15);
  EXPECT(bin_index(-INFINITY, kBins) == 0);
  EXPECT(bin_index(NAN, kBins) == 0);
  float table[16];
  for (int k = 0; k < 16; ++k) table[k] = float(k);
  EXPECT(log_weight_at(table, -7.5f, kBins) == 0.0f);   // a centre
  EXPECT(log_weight_at(table, -7.25f, kBins) == 0.25f);  // between two
  EXPECT(log_weight_at(table, -8.0f, kBins) == 0.0f);   // flat beyond
  EXPECT(log_weight_at(table, INFINITY, kBins) == 15.0f);
}

void samples() {
  auto entered = [](const Sample<float>& s) { return !s.masked && !s.skipped; };
  Sample<float> s = classify(2.0f, 0.0f, 3.0f, 0.5f, 4.0f);
  EXPECT(s.base_loss == 6.0f && s.factor == 6.0f && s.slope == 4.0f && s.weighted == 12.0f && entered(s));
  for (float u : {0.0f, 1.0f})  // masked, whatever the other factors
    for (float other : {NAN, INFINITY}) {
      s = classify(other, NAN, u, 1.0f - u, other);
      EXPECT(s.masked && !s.skipped && s.factor == 0.0f && s.slope == 0.0f && s.weighted == 0.0f);
    }
  EXPECT(entered(classify(1.0f, 0.0f, 1e-30f, 1e-30f, 1.0f)));  // an underflow of u*v masks nothing
  s = classify(1.0f, 0.0f, 1.0f, 1.0f, 0.0f);
  EXPECT(entered(s) && s.factor == 0.0f && s.weighted == 0.0f);
  s = classify(NAN, 0.0f, 1.0f, 1.0f, 0.0f);
  EXPECT(s.skipped && s.factor == 0.0f && s.weighted != s.weighted);  // 0 * NaN
  s = classify(INFINITY, 0.0f, 1.0f, 1.0f, 1.0f);
  EXPECT(s.skipped && s.factor == 1.0f && s.weighted == INFINITY);
  EXPECT(classify(1.0f, NAN, 1.0f, 1.0f, 1.0f).skipped);
  EXPECT(entered(classify(1.0f, INFINITY, 1.0f, 1.0f, 1.0f)));
  EXPECT(classify(1.0f, 0.0f, 1.0f, NAN, 1.0f).skipped);
  EXPECT(classify(1e30f, 0.0f, 1e30f, 1.0f, 1.0f).skipped);  // g overflows
}

void moments() {
  const Moments none = {0, 0, 0, 0}, some = {3, 2, 0.1, 4};
  EXPECT(same(merge(none, some), some));
  EXPECT(same(merge(some, none), some));
  const Moments one = {1, 5, 0, 1}, two = {1, 1, 0, 1}, both = merge(one, two);
  EXPECT(both.n == 2 && both.mean == 3 && both.m2 == 8 && both.mass == 2);
  EXPECT(same(fold(some, none, 0.0), none));                     // forgotten entirely
  EXPECT(same(fold({kEmpty, 1, 1, 1}, none, 0.99), none));       // too little is left
  EXPECT(near(forgetting(512, 256, 2), 0.5));
  EXPECT(forgetting(512, INFINITY, 2) == 1.0);
}

void weights() {
  double a;
  const Rule rule = {kStd, 1.0, 0.5, log(10.0), 32.0, 1};
  EXPECT(!log_weight_of({0, 0, 0, 0}, rule, &a) && a == 0);
  EXPECT(!log_weight_of({10, 1, 0, 10}, rule, &a));  // constant losses carry no signal
  EXPECT(log_weight_of({5, 1, 16, 5}, rule, &a) && near(a, -log(2.0)));
  EXPECT(log_weight_of({1, 1, 2, 1}, rule, &a) && near(a, -log(2.0)));  // n/2 in place of n - 1
  EXPECT(shrink(7.0, 0.0, 0.0, rule) == 0.0);
  EXPECT(near(shrink(7.0, 32.0, 0.0, rule), 0.5 * log(10.0)));
  EXPECT(log_scale(0, 0) == 0 && log_scale(-1, 2) == 0 && log_scale(INFINITY, 1) == 0 && near(log_scale(4, 2), log(2.0)));
  const double value[3] = {1, 2, 3}, n[3] = {10, 0, 10}, taps[2] = {1, 0.5};
  double smooth_a, smooth_n;
  auto smooth = [&](const double* a, const double* n, int first, int last) {
    smooth_bins<OneBin>(a, n, taps, first, last, 1.0, rule.smoothing, &smooth_a, &smooth_n);
  };
  smooth(value + 1, n + 1, -1, 1);
  EXPECT(near(smooth_a, 2.0) && near(smooth_n, 10.0));  // borrows from both sides alike
  const double alone[3] = {1, 0, 0}, n_alone[3] = {10, 0, 0};
  smooth(alone + 2, n_alone + 2, -1, 0);
  EXPECT(smooth_a == 0 && smooth_n == 0);  // no value in reach
  smooth(alone + 1, n_alone + 1, -1, 1);
  EXPECT(near(smooth_a, 1.0));  // one bin in reach: its value, not an extrapolation
}

}  // namespace

int main() {
  elements();
  bins();
  samples();
  moments();
  weights();
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}

// Totals of a batch, and the level-free loss: vadiff/ops/level_free.py, for host and device.
#pragma once

#include "loss_math.h"

namespace vadiff {

constexpr double kYoung = 32;  // mean count per bin up to which the level-free loss is the raw mean
constexpr double kShort = 8;   // half-life below which it always is
constexpr double kDecay = 0.9;  // per call, of the sums from which it is scaled
constexpr double kSpike = 10;   // a call whose loss is more times the expected one does not enter them
constexpr double kCredible = 3;  // more times the loss of the last calls than this, the expected loss is not used

// Sums over the samples of a batch: what a batch vector [4K + 5] holds after the moments, in this order.
struct Totals {
  double skipped, loss, samples, below, above;
};
constexpr int kTotals = 5;

// Add a sample of mass v, which is in no bin where it is masked or skipped.
template <class Sums, class C>
VADIFF_FN void add_sample(Sums* totals, const Sample<C>& sample, float log_snr, C v, const Bins& bins) {
  const float position = floorf((log_snr - bins.low) * bins.inv_width);
  const bool entered = !sample.masked && !sample.skipped;
  totals->skipped += sample.skipped;
  totals->loss += sample.masked ? 0 : double(v) * double(sample.base_loss);
  totals->below += entered && position < 0;
  totals->above += entered && position >= float(bins.size);
}

// Sums over the bins, before a fold.
struct BinSums {
  double entered, batch_mass, count, mass, loss;
};
constexpr int kBinSums = 5;

VADIFF_FN void add_bin(BinSums* sums, const Moments& old, double entered, double batch_mass) {
  sums->entered += entered;
  sums->batch_mass += batch_mass;
  sums->count += old.n;
  sums->mass += old.mass;
  sums->loss += old.mass * old.mean;
}

VADIFF_FN double average_loss(const BinSums& sums) { return sums.mass > 0 ? sums.loss / sums.mass : 0; }  // of an empty bin

// Of the batch's mass times the mean loss; of the sampler's shares; of these times its v times the mean loss; of its v.
struct LevelSums {
  double drawn, shares, shared, sampled_mass;
};
constexpr int kLevelSums = 4;

VADIFF_FN void add_level(LevelSums* sums, const Moments& old, double entered, double batch_mass, double share, double weight,
                         double average) {
  const double mean = old.n > 0 ? old.mean : average;
  sums->drawn += batch_mass * mean;
  sums->shares += share;
  sums->shared += share * weight * mean;
  sums->sampled_mass += entered * weight;
}

// `StateTotals` of vadiff/ops/problem.py.
struct StateTotals {
  double below, above, level_free, samples, covariance, variance, size, recorded, mass, sampled_mass, since_shares, last_read;
};
constexpr int kStateTotals = 12;

VADIFF_FN void move_totals(StateTotals* state, const BinSums& sums, const LevelSums& levels, const Totals& batch, double rho,
                           double half_life, int bins) {
  const double drawn = levels.drawn;
  const bool given = levels.shares > 0, followed = given && state->since_shares < half_life * bins;
  const double factor = state->mass > 0 && state->sampled_mass > 0 ? state->mass / state->sampled_mass : 1;
  const double expected = followed ? factor * levels.shared : sums.loss / sums.count;
  double scale = state->variance > 0 ? state->covariance / state->variance : 1;
  scale = scale < 0 ? 0 : scale > 2 ? 2 : scale;
  const bool known = half_life >= kShort && sums.count > (half_life < kYoung ? half_life : kYoung) * bins &&
                     state->recorded * scale * fabs(expected) <= kCredible * state->size;
  state->level_free += known ? batch.loss + scale * (sums.entered * expected - drawn) : batch.loss;
  state->samples += batch.samples;
  if (batch.skipped == 0 && is_finite(batch.loss) && fabs(batch.loss) <= kSpike * fabs(drawn) && sums.count > 0) {
    state->covariance = kDecay * state->covariance + batch.loss * drawn;
    state->variance = kDecay * state->variance + drawn * drawn;
    state->size = kDecay * state->size + fabs(batch.loss);
    state->recorded = kDecay * state->recorded + sums.entered;
  }
  state->mass = given ? kDecay * state->mass + sums.batch_mass : 0;
  state->sampled_mass = given ? kDecay * state->sampled_mass + levels.sampled_mass : 0;
  state->since_shares += sums.entered;
  state->below = state->below * rho + batch.below;
  state->above = state->above * rho + batch.above;
}

}  // namespace vadiff

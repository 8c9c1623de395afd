// Totals of a batch, and the level-free loss: reference.level_free_sums, for host and device.
#pragma once

#include "loss_math.h"

namespace vadiff {

constexpr double kYoung = 32;         // mean count per bin up to which the level-free loss is the raw mean
constexpr double kScaleDecay = 0.9;  // per call, of the sums whose ratio scales the correction

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
  double entered, count, mass, loss;
};
constexpr int kBinSums = 4;

VADIFF_FN void add_bin(BinSums* sums, const Moments& old, double entered) {
  sums->entered += entered;
  sums->count += old.n;
  sums->mass += old.mass;
  sums->loss += old.mass * old.mean;
}

VADIFF_FN double average_loss(const BinSums& sums) { return sums.mass > 0 ? sums.loss / sums.mass : 0; }  // of an empty bin

// Of the batch's mass times the mean loss; of the sampler's shares; of these times the mean loss.
struct LevelSums {
  double drawn, shares, shared;
};
constexpr int kLevelSums = 3;

VADIFF_FN void add_levels(LevelSums* sums, const Moments& old, double mass, double share, double average) {
  const double mean = old.n > 0 ? old.mean : average;
  sums->drawn += mass * mean;
  sums->shares += share;
  sums->shared += share * mean;
}

// The totals of a state, its seven numbers after the ticket.
struct StateTotals {
  double below, above, level_free, samples, decayed_loss, decayed_drawn, last_read;
};
constexpr int kStateTotals = 7;

VADIFF_FN void move_totals(StateTotals* state, const BinSums& sums, const LevelSums& levels, const Totals& batch, double rho,
                           double half_life, int bins) {
  const double expected = levels.shares > 0 ? levels.shared : sums.loss / sums.count;
  const double scale = state->decayed_drawn > 0 && state->decayed_loss > 0 ? state->decayed_loss / state->decayed_drawn : 1;
  const bool known = sums.count > (half_life < kYoung ? half_life : kYoung) * bins;
  state->level_free += known ? batch.loss + scale * (sums.entered * expected - levels.drawn) : batch.loss;
  state->samples += batch.samples;
  if (batch.skipped == 0 && is_finite(batch.loss) && sums.count > 0) {
    state->decayed_loss = kScaleDecay * state->decayed_loss + batch.loss;
    state->decayed_drawn = kScaleDecay * state->decayed_drawn + levels.drawn;
  }
  state->below = state->below * rho + batch.below;
  state->above = state->above * rho + batch.above;
}

}  // namespace vadiff

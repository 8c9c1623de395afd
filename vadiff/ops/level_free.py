"""The level-free loss in plain PyTorch: it defines what every backend computes. Notation as in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import StateTotals

YOUNG = 32  # mean number of samples per bin up to which the level-free loss is the raw mean
SHORT = 8  # half-life below which it always is: the bins' means would be those of the last few samples
DECAY = 0.9  # per call, of the sums from which the level-free loss is scaled
SPIKE = 10  # a call whose loss is more times the expected one does not enter them
CREDIBLE = 3  # an expected loss of more times the last calls' is not used: a spike lives on in a bin


def level_free(
    moments: Tensor, new: Tensor, of_batch: dict[str, Tensor], totals: StateTotals, levels: Tensor, half_life: float
) -> StateTotals:
    """Add the level-free loss L of a batch to the totals of which `DiffusionLoss.level_free_loss` is made.

        B*L = S + c * (N * E - V)      S = sum_i v_i g_i over all B samples, V = sum_i v_i mu_k(i) over the N recorded

    What the levels of the batch cost less than average is added: post-stratification. All but S, N and V come from
    before the batch: mu_k, the bin's mean, of an empty bin the mean by mass; E, the average of v*mu; and c in [0, 2],
    the coefficient by which S follows V, from decayed sums over calls.

        E = sum_k mass_k mu_k / sum_k n_k           by the running shares of the bins, or, for the sampler that set its
        E = x * sum_k share_k v_k mu_k              shares less than half_life*K samples ago, by these; x: the mean
                                                    factor of v that is not the sampler's, from decayed sums

    L is unbiased for any c that depends on earlier batches only; c lowers the variance. B*L = S while the mean count
    per bin is at most YOUNG (half_life, if that is less), with half-lives below SHORT, and while c*E is more than
    CREDIBLE times the mean loss of the last calls. A batch with a skipped sample, or with |S| > SPIKE*|V|, leaves c as
    it is.

    moments, new: [4, K], of the state and of the batch. levels: [2, K], see `levels_of`."""
    n, mean, _, mass = moments
    share, level_weight = levels
    entered, count, loss = new[0].sum(), n.sum(), of_batch["loss"]
    average = torch.where(mass.sum() > 0, (mass * mean).sum() / mass.sum(), 0.0)
    filled = torch.where(n > 0, mean, average)
    drawn = (new[3] * filled).sum()
    given = share.sum() > 0
    followed = given & (totals.since_shares < half_life * len(n))
    factor = torch.where((totals.mass > 0) & (totals.sampled_mass > 0), totals.mass / totals.sampled_mass, 1.0)
    expected = torch.where(followed, factor * (share * level_weight * filled).sum(), (mass * mean).sum() / count)
    scale = torch.where(totals.variance > 0, totals.covariance / totals.variance, 1.0).clamp(0.0, 2.0)
    known = (count > min(YOUNG, half_life) * len(n)) & (half_life >= SHORT)
    known &= totals.recorded * scale * expected.abs() <= CREDIBLE * totals.size
    correction = torch.where(known, scale * (entered * expected - drawn), 0.0)
    scales = (of_batch["skipped"] == 0) & loss.isfinite() & (loss.abs() <= SPIKE * drawn.abs()) & (count > 0)
    kept, one = torch.where(scales, DECAY, 1.0), torch.where(scales, 1.0, 0.0)
    return totals._replace(
        level_free=totals.level_free + loss + correction,
        samples=totals.samples + of_batch["samples"],
        covariance=kept * totals.covariance + one * loss.nan_to_num(0.0, 0.0, 0.0) * drawn,
        variance=kept * totals.variance + one * drawn * drawn,
        size=kept * totals.size + one * loss.nan_to_num(0.0, 0.0, 0.0).abs(),
        recorded=kept * totals.recorded + one * entered,
        mass=torch.where(given, DECAY * totals.mass + new[3].sum(), 0.0),
        sampled_mass=torch.where(given, DECAY * totals.sampled_mass + (new[0] * level_weight).sum(), 0.0),
        since_shares=totals.since_shares + entered,
    )

"""The contract of one training step in plain numpy float64, written from the specification alone.

Slow on purpose: one loop per sample, one loop per bin, no call into vadiff or torch. Every number that a
backend returns is compared with what stands here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

EMPTY_BELOW = 2.0**-20  # effective count under which a bin is emptied
LOSS_EPSILON = 2.0**-22  # between two float32 computations of one ℓ: each rounded once (2^-24), as much for its sum


@dataclass
class Step:
    """What one call gives: sizes as in the contract, float64 throughout."""

    loss: float  # mean over the batch of w·u·v·ℓ
    per_sample: np.ndarray  # [B] ℓ
    weighted: np.ndarray  # [B] w·u·v·ℓ, what reduction="none" returns
    weight: np.ndarray  # [B] w
    grad_prediction: np.ndarray  # [B, ...] of `loss`
    grad_base_weight: np.ndarray  # [B] of `loss`


@dataclass
class Batch:
    """Statistics of one batch (or one rank's share of it) per bin."""

    count: np.ndarray  # [K]
    mean: np.ndarray  # [K]
    m2: np.ndarray  # [K]
    mass: np.ndarray  # [K]
    skipped: int


class Oracle:
    """Running statistics and weights of one criterion.

    statistic: "std", "mean" or "rms" for the adaptive tables.
    fixed: a function of one float log-SNR that replaces the table, for constant weighting and Min-SNR.
    """

    def __init__(
        self,
        bins: int = 128,
        low: float = -16.0,
        high: float = 16.0,
        half_life: float = 256.0,
        *,
        statistic: str = "std",
        strength: float = 1.0,
        smoothing: float = 0.5,
        clip: float = 10.0,
        prior: float = 32.0,
        fixed: Callable[[float], float] | None = None,
        loss: str = "mse",
        huber_delta: float = 1.0,
    ) -> None:
        self.bins, self.low, self.high, self.half_life = bins, low, high, half_life
        self.statistic, self.strength, self.smoothing = statistic, strength, smoothing
        self.clip, self.prior, self.fixed = clip, prior, fixed
        self.loss, self.huber_delta = loss, huber_delta
        self.width = (high - low) / bins
        self.centers = low + (np.arange(bins) + 0.5) * self.width
        self.count = np.zeros(bins)
        self.mean = np.zeros(bins)
        self.m2 = np.zeros(bins)
        self.mass = np.zeros(bins)
        self.skipped = 0
        self.log_weight = np.zeros(bins)

    def step(
        self,
        prediction: np.ndarray,
        target: np.ndarray,
        log_snr: np.ndarray,
        *,
        noise: np.ndarray | None = None,
        coefficients: Sequence[float | np.ndarray] = (1.0, -1.0, 0.0),
        base_weight: np.ndarray | None = None,
        sample_weight: np.ndarray | None = None,
        record: bool = True,
    ) -> Step:
        """Loss and gradients with the weights of before, then (record) the fold of this batch."""
        batch = len(prediction)
        u = _per_sample(base_weight, 1.0, batch)
        v = _per_sample(sample_weight, 1.0, batch)
        a, b, c = (_per_sample(x, 0.0, batch) for x in coefficients)
        per_sample = np.zeros(batch)
        slope = np.zeros(prediction.shape)  # dℓ_i / dF
        with np.errstate(all="ignore"):
            for i in range(batch):
                r = a[i] * prediction[i].astype(np.float64) + b[i] * target[i].astype(np.float64)
                if noise is not None:
                    r = r + c[i] * noise[i].astype(np.float64)
                per_sample[i] = self._value(r).mean()
                slope[i] = a[i] * self._slope(r) / r.size
        result = self._weighted(per_sample, log_snr, u, v)
        grad = np.zeros(prediction.shape)
        with np.errstate(all="ignore"):
            for i in range(batch):
                if not _masked(u[i], v[i]):
                    grad[i] = result.weight[i] * u[i] * v[i] / batch * slope[i]
        result.grad_prediction = grad
        if record:
            self.fold([self.batch_statistics(per_sample, log_snr, u, v)])
        return result

    def reweight(
        self,
        losses: np.ndarray,
        log_snr: np.ndarray,
        sample_weight: np.ndarray | None = None,
        record: bool = True,
    ) -> Step:
        """The step of a trainer that brings its own per-sample losses: u = 1, ℓ = losses."""
        batch = len(losses)
        ones, v = np.ones(batch), _per_sample(sample_weight, 1.0, batch)
        losses = np.asarray(losses, np.float64)
        result = self._weighted(losses, log_snr, ones, v)
        if record:
            self.fold([self.batch_statistics(losses, log_snr, ones, v)])
        return result

    def _weighted(self, per_sample: np.ndarray, log_snr: np.ndarray, u: np.ndarray, v: np.ndarray) -> Step:
        batch = len(per_sample)
        weight, weighted, grad_u = np.zeros(batch), np.zeros(batch), np.zeros(batch)
        with np.errstate(all="ignore"):
            for i in range(batch):
                weight[i] = self.weight_at(float(log_snr[i]))
                if not _masked(u[i], v[i]):
                    weighted[i] = weight[i] * u[i] * v[i] * per_sample[i]
                    grad_u[i] = weight[i] * v[i] * per_sample[i] / batch
        return Step(float(weighted.mean()), per_sample, weighted, weight, np.zeros(0), grad_u)

    def _value(self, r: np.ndarray) -> np.ndarray:
        if self.loss == "mse":
            return r * r
        inside = np.abs(r) <= self.huber_delta
        return np.where(inside, 0.5 * r * r, self.huber_delta * (np.abs(r) - 0.5 * self.huber_delta))

    def _slope(self, r: np.ndarray) -> np.ndarray:
        return 2.0 * r if self.loss == "mse" else np.clip(r, -self.huber_delta, self.huber_delta)

    def bin_index(self, log_snr: float) -> int:
        """floor((λ − low)·inv_width) in float32, clamped to the end bins; λ must not be NaN."""
        with np.errstate(all="ignore"):
            place = (np.float32(log_snr) - np.float32(self.low)) * np.float32(self.bins / (self.high - self.low))
        return int(min(max(np.floor(place), 0.0), self.bins - 1.0))

    def weight_at(self, log_snr: float) -> float:
        """Linear interpolation of ln w between bin centres, flat beyond the outer ones."""
        if math.isnan(log_snr):
            return math.nan
        if self.fixed is not None:
            return self.fixed(log_snr)
        if log_snr <= self.centers[0]:
            return math.exp(self.log_weight[0])
        if log_snr >= self.centers[-1]:
            return math.exp(self.log_weight[-1])
        left = min(int((log_snr - self.centers[0]) / self.width), self.bins - 2)
        share = (log_snr - self.centers[left]) / self.width
        return math.exp((1 - share) * self.log_weight[left] + share * self.log_weight[left + 1])

    @property
    def weights(self) -> np.ndarray:
        return np.array([self.weight_at(x) for x in self.centers])

    def batch_statistics(self, per_sample: np.ndarray, log_snr: np.ndarray, u: np.ndarray, v: np.ndarray) -> Batch:
        """Two passes per bin over the samples that enter: neither masked nor skipped, which are counted."""
        members: list[list[float]] = [[] for _ in range(self.bins)]
        zeros = np.zeros(self.bins)
        out = Batch(zeros.copy(), zeros.copy(), zeros.copy(), zeros.copy(), skipped=0)
        for i in range(len(per_sample)):
            if _masked(u[i], v[i]):
                continue
            if _not_finite(log_snr[i], per_sample[i], u[i], v[i]):
                out.skipped += 1
                continue
            k = self.bin_index(float(log_snr[i]))
            members[k].append(float(u[i]) * float(per_sample[i]))
            out.mass[k] += v[i]
        for k, values in enumerate(members):
            if values:
                out.count[k] = len(values)
                out.mean[k] = math.fsum(values) / len(values)
                out.m2[k] = math.fsum((x - out.mean[k]) ** 2 for x in values)
        return out

    def fold(self, ranks: Sequence[Batch]) -> None:
        """Merge the ranks' batches in rank order, forget, merge the sum into the state, rebuild the table."""
        batch = ranks[0]
        for other in ranks[1:]:
            batch = _merge(batch, other)
        self.skipped += batch.skipped
        decay = 2.0 ** (-batch.count.sum() / (self.half_life * self.bins))
        for k in range(self.bins):
            old, new = decay * self.count[k], batch.count[k]
            total = old + new
            m2, mass = decay * self.m2[k], decay * self.mass[k] + batch.mass[k]
            mean = self.mean[k]
            if new > 0:
                delta = batch.mean[k] - mean
                mean += delta * new / total
                m2 += batch.m2[k] + delta**2 * old * new / total
            if total < EMPTY_BELOW:
                total = mean = m2 = mass = 0.0
            self.count[k], self.mean[k], self.m2[k], self.mass[k] = total, mean, m2, mass
        if self.fixed is None:
            self.log_weight = self._table()

    @property
    def variance(self) -> np.ndarray:
        """[K] M2 / max(n − 1, n/2), NaN in empty bins."""
        with np.errstate(all="ignore"):
            return self.m2 / np.maximum(self.count - 1, self.count / 2)

    @property
    def relative_std(self) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.sqrt(self.variance) / np.where(self.count > 0, self.mean, math.nan)

    def _spread(self, k: int) -> float:
        n, mean, m2 = self.count[k], self.mean[k], self.m2[k]
        if self.statistic == "std":
            return math.sqrt(m2 / max(n - 1, n / 2))
        if self.statistic == "mean":
            return mean
        return math.sqrt(mean**2 + m2 / n)

    def _table(self) -> np.ndarray:
        """Steps 1 to 4; returns [K] ln w."""
        # 1. bins with a value, and a_k before smoothing
        raw: dict[int, float] = {}
        for k in range(self.bins):
            if self.count[k] >= EMPTY_BELOW:
                s = self._spread(k)
                if s > 1e-6 * abs(self.mean[k]):
                    raw[k] = -self.strength * math.log(s)
        # 2. smoothed a, and how many samples stand behind it
        a, behind = np.zeros(self.bins), np.zeros(self.bins)
        for k in range(self.bins):
            if self.smoothing == 0:
                a[k], behind[k] = raw.get(k, 0.0), self.count[k] if k in raw else 0.0
            else:
                a[k], behind[k] = self._smoothed(k, raw)
        # 3. centre, clip, confidence
        mass = sum(self.mass[k] for k in raw)
        center = sum(self.mass[k] * a[k] for k in raw) / mass if raw else 0.0
        limit = math.log(self.clip)
        for k in range(self.bins):
            if behind[k] > 0:
                a[k] = min(max(a[k] - center, -limit), limit) * behind[k] / (behind[k] + self.prior)
        # 4. keep the expected loss
        with np.errstate(all="ignore"):
            c = float(np.sum(self.mass * self.mean) / np.sum(self.mass * np.exp(a) * self.mean))
        if not (c > 0 and math.isfinite(c)):
            c = 1.0
        return a + math.log(c)

    def _smoothed(self, k: int, raw: dict[int, float]) -> tuple[float, float]:
        h = self.smoothing
        reach = [j for j in raw if abs(j - k) * self.width <= 3 * h * (1 + 1e-12)]
        if not reach:
            return 0.0, 0.0
        d = np.array([(j - k) * self.width for j in reach])
        a = np.array([raw[j] for j in reach])
        q = np.array([self.count[j] for j in reach]) * np.exp(-(d**2) / (2 * h**2))
        total = q.sum()
        d_mean, a_mean = (q * d).sum() / total, (q * a).sum() / total
        variance = (q * (d - d_mean) ** 2).sum() / total
        covariance = (q * (d - d_mean) * (a - a_mean)).sum() / total
        smoothed = a_mean - d_mean * covariance / (variance + 32 * h**2 / total)
        return min(max(smoothed, a.min()), a.max()), total


def variance_error(
    count: np.ndarray, mean: np.ndarray, variance: np.ndarray, epsilon: float = LOSS_EPSILON
) -> np.ndarray:
    """[K] how far two variances of a bin may be apart when each of its losses has a relative error of ε.

    With errors |d_i| ≤ ε·|ℓ_i| and weights q_i (the forgetting), M2 = Σ q_i·(ℓ_i − mean)² changes by
    2·Σ q_i·(ℓ_i − mean)·d_i + Σ q_i·(d_i − mean d)², as the shift of the mean itself cancels. By Cauchy-Schwarz this
    is at most 2·sqrt(M2·E) + E with E = Σ q_i·d_i² ≤ ε²·Σ q_i·ℓ_i² = ε²·(M2 + n·mean²). Divided by max(n − 1, n/2), as
    the variance is: 2·ε·sqrt(variance·S) + ε²·S with S = variance + mean²·n / max(n − 1, n/2).

    The relative error of a variance thus grows as mean / std: losses that are nearly equal lose digits, and no bound
    relative to the variance alone can hold.
    """
    with np.errstate(all="ignore"):
        square = variance + mean**2 * count / np.maximum(count - 1, count / 2)
        return 2 * epsilon * np.sqrt(variance * square) + epsilon**2 * square


def assert_variance_close(
    found: np.ndarray, count: np.ndarray, mean: np.ndarray, variance: np.ndarray, epsilon: float = LOSS_EPSILON
) -> None:
    """Every bin's variance is within `variance_error` of the expected one; NaN (an empty bin) where NaN is expected."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(variance))
    allowed = variance_error(count, mean, variance, epsilon)
    for k in np.flatnonzero(np.abs(found - variance) > allowed):
        raise AssertionError(
            f"the variance of bin {k} is {found[k]:.9g}, expected {variance[k]:.9g} within {allowed[k]:.1e} "
            f"(n = {count[k]:.3g}, mean {mean[k]:.6g})"
        )


def _per_sample(value: float | np.ndarray | None, default: float, batch: int) -> np.ndarray:
    return np.broadcast_to(np.asarray(default if value is None else value, np.float64), (batch,))


def _masked(u: float, v: float) -> bool:
    """No loss, no gradient, not recorded, whatever else the sample has."""
    return bool(u == 0 or v == 0)


def _not_finite(log_snr: float, loss: float, u: float, v: float) -> bool:
    """NaN λ, or ℓ, u, v or u·ℓ that float32 cannot hold; λ = ±inf is legal."""
    with np.errstate(all="ignore"):
        return bool(np.isnan(log_snr)) or not np.all(np.isfinite(np.float32([loss, u, v, u * loss])))


def _merge(x: Batch, y: Batch) -> Batch:
    count = x.count + y.count
    safe = np.maximum(count, 1.0)
    delta = y.mean - x.mean
    mean = np.where(y.count > 0, x.mean + delta * y.count / safe, x.mean)
    m2 = x.m2 + y.m2 + delta**2 * x.count * y.count / safe
    return Batch(count, mean, m2, x.mass + y.mass, x.skipped + y.skipped)


def min_snr(prediction_type: str, gamma: float, sigma_data: float = 0.5) -> Callable[[float], float]:
    """Min-SNR-γ: min(S, γ) on x0's squared error, divided by the k that makes it another form's error."""

    def weight(log_snr: float) -> float:
        if log_snr == math.inf:  # limits
            return gamma if prediction_type == "sample" else 0.0
        s = math.exp(log_snr) if log_snr > -math.inf else 0.0
        if prediction_type == "epsilon":
            return 1.0 if s <= gamma else gamma / s
        k = {
            "sample": 1.0,
            "v_prediction": 1.0 + s,
            "flow": (1.0 + math.sqrt(s)) ** 2,
            "edm": s + 1.0 / sigma_data**2,
        }
        return min(s, gamma) / k[prediction_type]

    return weight

"""Native or Triton on a GPU: what backend="auto" would take if it went by the measurements of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator

import table
from measure import Ratio
from measurements import Measurement, Results


def lines(results: Results) -> Iterator[str]:
    """A row per contest in which both were measured, and a verdict; nothing for a CPU."""
    ratios = _ratios(results) if "compute_capability" in results.machine else {}
    if not ratios:
        return
    yield ""
    yield "what a measured choice would be"
    yield from table.grid(
        [["", "faster", "×", "±"], *([contest, *_row(ratio)] for contest, ratio in ratios.items())], left=2
    )
    yield _verdict(list(ratios.values()))


def _ratios(results: Results) -> dict[str, Ratio]:
    """By contest, how many times as fast native is as Triton."""
    return {
        f"{native.case} {native.dtype}, {native.mode}": _ratio(native, triton)
        for native in results.measurements
        if native.provider == "native"
        and (triton := results.find(native.case, native.dtype, native.mode, "triton")) is not None
    }


def _ratio(native: Measurement, triton: Measurement) -> Ratio:
    """Of paired rounds; of the medians, with an unknown error, where the rounds were not paired."""
    unpaired = Ratio(triton.wall.median / native.wall.median, math.nan)
    return native.times_as_fast_as.get("triton", unpaired)


def _faster(ratio: Ratio) -> str:
    """The faster one, or "neither" within two standard errors."""
    if abs(ratio.value - 1) <= 2 * ratio.error or ratio.value == 1:
        return "neither"
    return "native" if ratio.value > 1 else "triton"


def _row(ratio: Ratio) -> list[str]:
    times = ratio.value if ratio.value >= 1 else 1 / ratio.value
    error = ratio.error * times / ratio.value
    return [_faster(ratio), f"{times:.2f}", "" if math.isnan(error) else f"{error:.2f}"]


def _verdict(ratios: list[Ratio]) -> str:
    """The one that is faster in the geometric mean over the contests."""
    mean = math.exp(sum(math.log(ratio.value) for ratio in ratios) / len(ratios))
    best = "native" if mean >= 1 else "triton"
    won = sum(_faster(ratio) == best for ratio in ratios)
    times = max(mean, 1 / mean)
    return f"verdict: {best}, faster in {won} of {len(ratios)} contests, {times:.2f} × as fast in the geometric mean"

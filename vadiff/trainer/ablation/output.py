"""Results of a grid as files: JSON, CSV, text and a picture."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from ...extras import import_extra
from .collect import Results

# Okabe & Ito's colour-blind-safe colours; markers for black-and-white prints, dashes for every further seven arms.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_MARKERS = "osD^vPX*"  # one more than colours, so that no two of 56 arms look the same
_DASHES = ("-", "--", ":", "-.")


def write_results(results: Results, out: Path) -> None:
    """Write results.json, results.csv, results.txt and results.png to a folder, creating it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    picture = io.BytesIO()
    _picture(results).savefig(picture, format="png")
    table = io.StringIO()
    _write_csv(results, table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results.as_dict(), indent=1) + "\n")
    (out / "results.csv").write_text(table.getvalue())
    (out / "results.txt").write_text(results.as_text() + "\n")
    (out / "results.png").write_bytes(picture.getvalue())


def _write_csv(results: Results, file: io.StringIO) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["arm", "baseline", "metric", "mean", "low_95", "high_95", "seeds"])
    for arm in results.arms:
        rows = {"held_out_log_ratio": arm.held_out, "images_to_reach": arm.images_to_reach}
        rows |= {
            f"held_out_log_ratio_at_log_snr_{level:.2f}": value
            for level, value in zip(results.log_snr, arm.per_level, strict=True)
        }
        rows |= {f"{metric}_difference": value for metric, value in arm.evaluation.items()}
        for metric, value in rows.items():
            writer.writerow([arm.arm, results.baseline, metric, *value])


def _picture(results: Results) -> Any:
    """Left: the primary figure with its interval, and each seed. Right: the same by noise level."""
    figure = import_extra("matplotlib.figure", "report").Figure(figsize=(15, 7), dpi=100, facecolor="white")
    overall, by_level = figure.subplots(1, 2, width_ratios=(1, 1.2))
    figure.subplots_adjust(left=0.13, right=0.82, top=0.82, bottom=0.1, wspace=0.2)
    for row, arm in enumerate(results.arms):
        style = arm_style(row + 1)  # style 0 is the baseline's, as in gaps.png
        mean, low, high = (_percent(value) for value in arm.held_out[:3])
        overall.plot(
            [_percent(value) for value in arm.per_seed.values()], [row + 0.2] * len(arm.per_seed), ".", color="0.7"
        )
        overall.plot([low, high], [row, row], color=style["color"], linewidth=3)
        overall.plot([mean], [row], markersize=9, **style)
        means = [_percent(level.mean) for level in arm.per_level]
        by_level.plot(results.log_snr, means, label=arm.arm, markersize=5, **style)
        by_level.fill_between(
            results.log_snr,
            [_percent(level.low) for level in arm.per_level],
            [_percent(level.high) for level in arm.per_level],
            color=style["color"],
            alpha=0.12,
            linewidth=0,
        )
    overall.set_yticks(range(len(results.arms)), [arm.arm for arm in results.arms])
    overall.invert_yaxis()
    overall.axvline(0.0, color="black", linewidth=1)
    overall.set_xlabel(f"held-out loss against {results.baseline} (%)   ← better")
    overall.set_title(
        "Mean over noise levels. Bar: 95 % interval over seeds;\ngrey: each seed. Left of the line is better.",
        loc="left",
    )
    by_level.axhline(0.0, color="black", linewidth=1)
    by_level.set_xlabel("log-SNR  λ = −2 ln σ  (nats)      ← more noise · less noise →")
    by_level.set_ylabel(f"held-out loss against {results.baseline} (%)")
    by_level.set_title(
        "By noise level. Look for gains at some levels\nand losses at others. Band: 95 % interval.", loc="left"
    )
    if results.arms:
        by_level.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
    for panel in (overall, by_level):
        plain_axes(panel)
    figure.suptitle(
        f"{results.name}: {len(results.seeds)} seeds, paired", x=0.02, ha="left", fontsize=16, weight="bold"
    )
    return figure


def arm_style(row: int) -> dict[str, str]:
    """Colour, marker and dashes of the arm in this row."""
    cycle, colour = divmod(row, len(_COLOURS))
    return {
        "color": _COLOURS[colour],
        "marker": _MARKERS[row % len(_MARKERS)],
        "linestyle": _DASHES[cycle % len(_DASHES)],
    }


def plain_axes(panel: Any) -> None:
    """Light grid, no spines at the top and right."""
    panel.grid(alpha=0.3, linewidth=0.6)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _percent(log_ratio: float) -> float:
    return 100.0 * math.expm1(log_ratio) if math.isfinite(log_ratio) else math.nan

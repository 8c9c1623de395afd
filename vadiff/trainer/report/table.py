"""Held-out loss per noise level, as text."""

import math
from collections.abc import Mapping

from ..training import HeldOutLoss


def held_out_table(runs: Mapping[str, HeldOutLoss]) -> str:
    """One row per noise level, one column per run; for every run but the first also its ratio to the first.

    Args:
        runs: name → held-out loss, on the same images, levels and noise.

    Returns:
        The table, without a trailing newline. ± is the standard error over images of the paired ratio. The last line
        is the geometric mean over levels of the x0 loss, see `level_mean`.
    """
    first_name, first = next(iter(runs.items()))
    header = f"{'sigma':>8} {'log-SNR':>8}  {first_name:>10}"
    for name in list(runs)[1:]:
        header += f"  {name:>14} {'ratio to ' + first_name:>17}"
    lines = [header]
    for row, log_snr in enumerate(first.log_snr.tolist()):
        line = f"{math.exp(-log_snr / 2):8.4f} {log_snr:8.1f}  {first.mean[row]:10.4f}"
        for name, run in list(runs.items())[1:]:
            ratio, error = run.ratio_to(first)
            line += f"  {run.mean[row]:{max(14, len(name))}.4f} {ratio[row]:9.3f} ± {error[row]:.3f}"
        lines.append(line)
    means = {name: run.level_mean for name, run in runs.items()}
    line = f"{'x0, all levels':>17}  {means[first_name]:10.5f}"
    for name in list(runs)[1:]:
        line += f"  {means[name]:{max(14, len(name))}.5f} {means[name] / means[first_name]:9.3f}"
    return "\n".join([*lines, line])

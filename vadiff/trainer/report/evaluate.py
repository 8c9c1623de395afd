"""Measurements, printed output and files of `vadiff evaluate`."""

import csv
import dataclasses
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...extras import import_extra
from ...files import replacing
from ...optimal_loss import ModelGap
from ...pixels import normalised
from ...sampling.generation import Generation, generate
from ...sampling.seeds import recorded_seeds
from ..data import Images
from ..evaluation import LevelGradients, image_metrics, level_gradients
from ..evaluation.fidelity import content_key, weights_key, within_reach
from ..pictures import read_pictures
from ..training import HeldOutLoss, Run, open_run
from ..training.held_out import held_out_log_snr, held_out_loss_of_run
from ..training.optimal_curve import estimate_curve
from ..training.run_gap import gap_of_run
from .gap import gap_chart, gap_rows, gap_table
from .gradient_charts import gradient_charts
from .held_out_charts import held_out_levels
from .style import Chart


@dataclass(frozen=True)
class Comparison:
    """Options of the comparison with real images; see `evaluation.image_metrics`.

    Args:
        metrics: of "fid", "kid", "isc", "prc"; empty for no comparison.
        reference: real images: a folder, an .npz archive or a run directory; None is the run's training images.
        layer: of the Inception network.
        inception_weights: file of the network's weights; None downloads them.
        cache: folder for the features of references; None is the user's cache.
    """

    metrics: Sequence[str] = ("fid", "kid", "prc")
    reference: Path | None = None
    layer: str = "2048"
    inception_weights: Path | None = None
    cache: Path | None = None


def evaluate_run(
    run: Run,
    generation: Generation,
    seeds: Sequence[int],
    comparison: Comparison,
    *,
    held_out_images: int | None = 0,
    gradient_images: int = 0,
    gap_images: int = 0,
) -> Path:
    """Measure a checkpoint of a run; print the results and write them to `evaluation/step-<n>` in the run.

    Args:
        run: the run.
        generation: how images are drawn; its `step` and first device apply to all measurements.
        seeds: of the images that are drawn.
        comparison: with real images, see `Comparison`.
        held_out_images: maximum number of held-out images; None takes all, 0 skips the held-out loss.
        gradient_images: training images for the gradients per level; 0 skips them.
        gap_images: training images for the gap to the optimal loss of the weights that `generation` names; 0 skips it.

    Returns:
        The folder.

    Raises:
        UserError: the checkpoint or the data set is missing or corrupt.
        ValueError: invalid options of the comparison.
        MissingExtraError: a package of the extra `eval` or `report` is not installed.
    """
    import_extra("matplotlib", "report")  # fail before minutes of drawing
    steps = run.checkpoints()
    step = generation.step if generation.step is not None else (steps[-1] if steps else None)
    generation = dataclasses.replace(generation, step=step)
    device = generation.devices[0]
    folder = run.path / "evaluation" / f"step-{step}"
    if generation.weights not in ("ema", "raw"):  # post-hoc averages are not part of the run's history
        folder = run.path / "evaluation" / generation.weights / f"step-{step}"
    files: dict[str, str | bytes] = {}
    data = run.images()
    if comparison.metrics:
        comparison = comparison_within_reach(comparison)
        reference = data.train if comparison.reference is None else reference_images(comparison.reference)
        images = draw_images(run, seeds, generation)
        values = compare(images, reference, comparison, device)
        files["metrics.json"] = _metrics_json(run, step, generation, seeds, comparison, reference, values)
    if held_out_images != 0:
        limit = len(data.held_out) if held_out_images is None else held_out_images
        losses = {
            name: held_out_loss_of_run(run.config, data, run.denoiser(name, step, device), limit=limit)
            for name in ("ema", "raw")
        }
        number = losses["ema"].per_image.shape[1]
        print(f"\nEDM's loss on {number} held-out images per noise level, mean ± standard error:")
        print(_held_out_table(losses))
        files["held-out.csv"] = _csv(_held_out_rows(losses))
        ema, raw = losses["ema"], losses["raw"]
        files |= _pictures([held_out_levels(ema.log_snr.numpy(), raw.mean.numpy(), ema.mean.numpy())])
    if gradient_images:
        gradients = _gradients(run, data, step, device, gradient_images, generation.batch_size)
        print(f"\nGradients per noise level, from {gradient_images} training images, trained (raw) weights:")
        print(_gradients_table(gradients))
        files["gradients.csv"] = _csv(_gradients_rows(gradients))
        files |= _pictures(gradient_charts(gradients))
    if gap_images:
        gap = _gap(run, data, generation, device, gap_images)
        number = min(gap_images, len(data.train))
        print(f"\nEDM's loss above the optimal loss on {number} training images per noise level, ± standard error:")
        print(gap_table(gap, run.config.sigma_data))
        files["gap.csv"] = _csv(gap_rows(gap, run.config.sigma_data))
        files |= _pictures([gap_chart(gap, run.config.sigma_data)])
    _write(folder, files)
    print(f"\nWritten to {folder}: {', '.join(sorted(files))}")
    return folder


def evaluate_pictures(path: Path, comparison: Comparison, device: torch.device) -> dict[str, float]:
    """Compare a folder of images or an .npz archive with real images, and print the metrics.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no readable images, or invalid options of the comparison.
        UserError: the reference is a run whose data set is missing.
    """
    reference = None if comparison.reference is None else reference_images(comparison.reference)
    return compare(read_pictures(path), reference, comparison_within_reach(comparison), device)


def comparison_within_reach(comparison: Comparison) -> Comparison:
    """Drop, with a message, the metrics that the Inception weights cannot give: before images are drawn."""
    possible = within_reach(comparison.metrics, comparison.layer, comparison.inception_weights)
    if len(possible) < len(comparison.metrics):
        print(f"isc (Inception score) is skipped: {comparison.inception_weights} is not finite up to the last layer")
    return dataclasses.replace(comparison, metrics=possible)


def compare(images: Tensor, reference: Tensor | None, comparison: Comparison, device: torch.device) -> dict[str, float]:
    """The metrics by name, which includes the layer unless it is the usual one; also printed."""
    values = image_metrics(
        images,
        reference,
        metrics=comparison.metrics,
        layer=comparison.layer,
        inception_weights=comparison.inception_weights,
        cache=comparison.cache,
        device=device,
        progress=sys.stderr.isatty(),
    )
    against = "" if reference is None else f" against {len(reference):,} real ones"
    print(f"{len(images):,} images{against}, Inception layer {comparison.layer}:")
    for name, value in values.items():
        print(f"{name:>16} {value:.6g}")
    return values


def reference_images(path: Path) -> Tensor:
    """Real images [N, C, H, W] uint8: the training images of a run directory, or all of a folder or an archive."""
    return open_run(path).images().train if (path / "config.yaml").exists() else read_pictures(path)


def draw_images(run: Run, seeds: Sequence[int], generation: Generation) -> Tensor:
    """One image per seed, in their order, with a progress bar. [len(seeds), C, H, W] uint8"""
    tqdm = import_extra("tqdm", "train").tqdm
    batches = {}
    with tqdm(total=len(seeds), unit="image", desc="drawing", disable=None) as bar:
        for batch in generate(run, seeds, generation):
            batches[batch.start] = batch.images
            bar.update(len(batch.images))
    return torch.cat([batches[start] for start in sorted(batches)])


def _gradients(
    run: Run, data: Images, step: int | None, device: torch.device, number: int, batch_size: int
) -> LevelGradients:
    criterion = run.criterion(step)
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:number]
    log_snr = held_out_log_snr(run.config).flip(0)  # ascending, as the charts draw them
    return level_gradients(
        run.denoiser("raw", step=step, device=device).requires_grad_(True),
        normalised(data.train[chosen]),
        None if data.train_labels is None else data.train_labels[chosen],
        log_snr,
        criterion.weight_at(log_snr.float()),
        criterion.statistics.mass[_bin_of(log_snr, criterion.bin_centers)],
        batch_size=batch_size,
    )


def _gap(run: Run, data: Images, generation: Generation, device: torch.device, number: int) -> ModelGap:
    sigmas = (-0.5 * held_out_log_snr(run.config)).exp().tolist()
    optimal = estimate_curve(
        run.config, data, device, sigmas=sigmas, relative=0.01, absolute=1e-4, limit=16384, progress=True
    )
    return gap_of_run(
        run, optimal, images=data, number=number, weights=generation.weights, step=generation.step, device=device
    )


def _bin_of(log_snr: Tensor, centers: Tensor) -> Tensor:
    return (log_snr[:, None] - centers).abs().argmin(1)


def _metrics_json(
    run: Run, step: int | None, generation: Generation, seeds: Sequence[int], comparison: Comparison,
    reference: Tensor, values: dict[str, float],
) -> str:  # fmt: skip
    content = {
        "step": step,
        "images_seen": (step or 0) * run.config.batch_size,
        "metrics": values,
        **recorded_seeds(seeds),
        "generation": generation.recorded(),
        "layer": comparison.layer,
        "inception_weights": weights_key(comparison.inception_weights),
        "reference_images": len(reference),
        "reference_sha256": content_key(reference),
    }
    return json.dumps(content, indent=1) + "\n"


def _held_out_rows(losses: dict[str, HeldOutLoss]) -> list[dict[str, float]]:
    rows = []
    for place, log_snr in enumerate(losses["ema"].log_snr.tolist()):
        row = {"sigma": math.exp(-0.5 * log_snr), "log_snr": log_snr}
        for name, loss in losses.items():
            per_image = loss.per_image[place]
            row[f"loss_{name}"] = per_image.mean().item()
            row[f"loss_{name}_standard_error"] = (per_image.std() / math.sqrt(len(per_image))).item()
        rows.append(row)
    return rows


def _held_out_table(losses: dict[str, HeldOutLoss]) -> str:
    lines = [f"{'sigma':>9} {'log-SNR':>8}   {'averaged weights (EMA)':>24} {'raw weights':>24}"]
    for row in _held_out_rows(losses):
        cells = [f"{row[f'loss_{name}']:.5f} ± {row[f'loss_{name}_standard_error']:.5f}" for name in ("ema", "raw")]
        lines.append(f"{row['sigma']:9.4f} {row['log_snr']:8.2f}   {cells[0]:>24} {cells[1]:>24}")
    return "\n".join(lines)


def _gradients_rows(gradients: LevelGradients) -> list[dict[str, float]]:
    columns = {
        "sigma": (-0.5 * gradients.log_snr).exp(),
        "log_snr": gradients.log_snr,
        "norm": gradients.norm,
        "weight": gradients.weight,
        "weighted_norm": gradients.weight * gradients.norm,
        "mass_share": gradients.share,
        "step_share": gradients.step_share(weighted=False),
        "step_share_weighted": gradients.step_share(weighted=True),
        "cosine_to_step": gradients.cosine_to_step(weighted=False).clamp(-1.0, 1.0),  # estimates can exceed 1
        "cosine_to_step_weighted": gradients.cosine_to_step(weighted=True).clamp(-1.0, 1.0),
    }
    columns |= {
        f"cosine_to_{level:.2f}": cosine
        for level, cosine in zip(gradients.log_snr.tolist(), gradients.cosine.T.clamp(-1.0, 1.0), strict=True)
    }
    names, values = list(columns), [column.tolist() for column in columns.values()]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def _gradients_table(gradients: LevelGradients) -> str:
    lines = [
        f"{'sigma':>9} {'log-SNR':>8} {'norm':>10} {'weight':>8} {'share of step':>14} {'weighted':>9} "
        f"{'cos. to step':>13} {'weighted':>9}"
    ]
    for row in _gradients_rows(gradients):
        lines.append(
            f"{row['sigma']:9.4f} {row['log_snr']:8.2f} {row['norm']:10.4g} {row['weight']:8.3f} "
            f"{100 * row['step_share']:12.1f} % {100 * row['step_share_weighted']:7.1f} % "
            f"{row['cosine_to_step']:13.3f} {row['cosine_to_step_weighted']:9.3f}"
        )
    return "\n".join(lines)


def _csv(rows: Sequence[dict[str, float]]) -> str:
    """Rows with the same keys, as CSV; unknown values are empty cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if math.isnan(value) else f"{value:.8g}" for key, value in row.items()} for row in rows)
    return text.getvalue()


def _pictures(charts: Sequence[Chart]) -> dict[str, bytes]:
    return {f"{chart.name}.{kind}": chart.picture(kind, described=True) for chart in charts for kind in ("png", "svg")}


def _write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        with replacing(folder / name) as partial:
            partial.write_bytes(content if isinstance(content, bytes) else content.encode())

"""Measurements, printed output and files of `vadiff evaluate`."""

import csv
import dataclasses
import functools
import io
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import check_writable, replacing
from ...optimal_loss import ModelGap
from ...sampling.generation import Generation
from ...sampling.seeds import recorded_seeds
from ..data import Images, inputs_of_rows
from ..evaluation import LevelGradients, level_gradients
from ..evaluation.fidelity import FeatureNetwork
from ..next_steps import next_steps
from ..training import HeldOutLoss, Run, Stopped
from ..training.held_out import held_out_log_snr, held_out_loss_of_run
from ..training.optimal_curve import estimate_curve
from ..training.run_gap import direct_gap_of_run, gap_of_run
from ..training.stopping import stoppable
from .comparison import (
    Comparison,
    Record,
    Reference,
    check_drawn,
    compare,
    prepared,
    print_metrics,
    read_reference,
    reference_key,
    seed_sets,
)
from .drawn_images import draw_images, kept_images
from .gap import gap_rows, gap_table


def evaluate_run(
    run: Run,
    generation: Generation,
    seeds: Sequence[int],
    comparison: Comparison,
    *,
    repeats: int = 1,
    keep_images: bool = True,
    held_out_images: int | None = 0,
    gradient_images: int = 0,
    gap_images: int = 0,
    gap_directly: bool = False,
) -> Path:
    """Measure a checkpoint of a run; print the results and write them to `evaluation/step-<n>` in the run.

    Each file is written as soon as its part is measured, and images batch by batch. A further call with the same
    options, for example after a kill, takes the images and metrics that are there.

    Args:
        run: the run.
        generation: how images are drawn; its `step` and first device apply to all measurements.
        seeds: of the images that are drawn.
        comparison: with real images, see `Comparison`.
        repeats: sets of images to compare, each from seeds of its own; the metrics are means over the sets.
        keep_images: write the images to images-<first seed>.npz in the folder.
        held_out_images: maximum number of held-out images; None takes all, 0 skips the held-out loss.
        gradient_images: training images for the gradients per level; 0 skips them.
        gap_images: training images for the gap to the optimal loss of the weights that `generation` names; 0 skips it.
        gap_directly: whether the gap is the distance to the posterior mean of all training images, not the difference
            of the loss and an estimate of the optimal loss.

    Returns:
        The folder.

    Raises:
        UserError: the checkpoint or the data set is missing or corrupt, or the Inception weights cannot be downloaded.
        ValueError: invalid options of the comparison.
        MissingExtraError: a package of the extra `eval` is not installed.
    """
    steps = run.checkpoints()
    step = generation.step if generation.step is not None else (steps[-1] if steps else None)
    generation = dataclasses.replace(generation, step=step)
    folder = run.path / "evaluation" / f"step-{step}"
    if generation.weights not in ("ema", "raw"):  # post-hoc averages are not part of the run's history
        folder = run.path / "evaluation" / generation.weights / f"step-{step}"
    check_writable(folder, folder=True)
    written: list[str] = []
    data = functools.cache(run.images)  # an imported run may have none, and may be compared without
    if held_out_images != 0 or gradient_images or gap_images:
        data()  # fail before minutes of drawing
    with _telling_what_is_kept(folder):
        if comparison.metrics:
            _compare(run, data, generation, seed_sets(seeds, repeats), comparison, folder, keep_images)
            written.append("metrics.json")
        written += _measure_levels(
            run, data, generation, folder, held_out_images=held_out_images, gradient_images=gradient_images,
            gap_images=gap_images, gap_directly=gap_directly,
        )  # fmt: skip
    print(f"\nWritten to {folder}: {', '.join(sorted(written))}\n{next_steps(('report', run.path))}")
    return folder


def _measure_levels(
    run: Run,
    data: Callable[[], Images],
    generation: Generation,
    folder: Path,
    *,
    held_out_images: int | None,
    gradient_images: int,
    gap_images: int,
    gap_directly: bool,
) -> list[str]:
    """What `evaluate_run` measures per noise level; returns the names of the files."""
    step, device = generation.step, generation.devices[0]
    written: list[str] = []
    if held_out_images != 0:
        limit = len(data().held_out) if held_out_images is None else held_out_images
        losses = {
            name: held_out_loss_of_run(run.config, data(), run.denoiser(name, step, device), limit=limit, progress=True)
            for name in ("ema", "raw")
        }
        number = losses["ema"].per_image.shape[1]
        print(f"\nEDM's loss on {number} held-out images per noise level, mean ± standard error:")
        print(_held_out_table(losses))
        written.append(_write(folder / "held-out.csv", _held_out_rows(losses)))
    if gradient_images:
        gradients = _gradients(run, data(), step, device, gradient_images, generation.batch_size)
        print(f"\nGradients per noise level, from {gradient_images} training images, trained (raw) weights:")
        print(_gradients_table(gradients))
        written.append(_write(folder / "gradients.csv", _gradients_rows(gradients)))
    if gap_images:
        gap = _gap(run, data(), generation, device, gap_images, gap_directly)
        number = min(gap_images, len(data().train))
        print(f"\nEDM's loss above the optimal loss on {number} training images per noise level, ± standard error:")
        print(gap_table(gap, run.config.sigma_data))
        written.append(_write(folder / "gap.csv", gap_rows(gap, run.config.sigma_data)))
    return written


@contextmanager
def _telling_what_is_kept(folder: Path) -> Iterator[None]:
    """Say what is in the folder after an error or a signal, and that the same command goes on from there.

    Raises:
        Stopped: SIGTERM or SIGINT.
    """

    def kept() -> str:
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        if not names:
            return "nothing is kept yet"
        return f"kept in {folder}: {', '.join(names)}; the same command takes what it can use of that"

    try:
        with stoppable(kept):
            yield
    except Exception as error:
        if not isinstance(error, Stopped) and folder.is_dir():
            print(f"vadiff: {kept()}", file=sys.stderr)
        raise


def _compare(
    run: Run, data: Callable[[], Images], generation: Generation, sets: Sequence[Sequence[int]],
    comparison: Comparison, folder: Path, keep_images: bool,
) -> None:  # fmt: skip
    """Measure each set of images that metrics.json does not have yet, and write it there."""
    comparison, network = prepared(comparison, run.config.dataset)
    chosen = comparison.reference
    reference = data().train[:] if chosen is None else read_reference(chosen, comparison)
    check_drawn(run.encoding.picture_shape(run.config.image_shape), len(sets[0]), reference, comparison)
    settings = _settings(run, generation, sets[0], comparison, network, reference)
    record = Record(folder / "metrics.json", settings, [seeds[0] for seeds in sets])
    for seeds in sets:
        values: dict[str, float] = {}
        if missing := record.missing(comparison.metrics, seeds[0], comparison):
            if keep_images:
                images = kept_images(run, seeds, generation, folder)
            else:
                images = draw_images(run, seeds, generation)
            values = compare(images, reference, dataclasses.replace(comparison, metrics=missing), generation.devices[0])
        record.add(seeds[0], values)
    print(f"metrics of {len(sets[0]):,} images" + (f", means over {len(sets)} sets:" if len(sets) > 1 else ":"))
    print_metrics(record.means())


def _gradients(
    run: Run, data: Images, step: int | None, device: torch.device, number: int, batch_size: int
) -> LevelGradients:
    criterion = run.criterion(step)
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:number]
    log_snr = held_out_log_snr(run.config).flip(0)  # ascending, as the charts draw them
    return level_gradients(
        run.denoiser("raw", step=step, device=device).requires_grad_(True),
        inputs_of_rows(data.encoding, data.train, chosen),
        None if data.train_labels is None else data.train_labels[chosen],
        log_snr,
        criterion.weight_at(log_snr.float()),
        criterion.statistics.mass[_bin_of(log_snr, criterion.bin_centers)],
        batch_size=batch_size,
    )


def _gap(run: Run, data: Images, generation: Generation, device: torch.device, number: int, directly: bool) -> ModelGap:
    sigmas = (-0.5 * held_out_log_snr(run.config)).exp().tolist()
    if directly:
        return direct_gap_of_run(
            run, sigmas, images=data, number=number, weights=generation.weights, step=generation.step, device=device
        )
    optimal = estimate_curve(
        run.config, data, device, sigmas=sigmas, relative=0.01, absolute=1e-4, limit=16384, progress=True
    )
    return gap_of_run(
        run, optimal, images=data, number=number, weights=generation.weights, step=generation.step, device=device
    )


def _bin_of(log_snr: Tensor, centers: Tensor) -> Tensor:
    return (log_snr[:, None] - centers).abs().argmin(1)


def _settings(
    run: Run, generation: Generation, seeds: Sequence[int], comparison: Comparison, network: FeatureNetwork,
    reference: Reference,
) -> dict[str, Any]:  # fmt: skip
    """All that the metrics depend on."""
    inception = comparison.features == "inception"
    return {
        "step": generation.step,
        "images_seen": (generation.step or 0) * run.config.batch_size,
        **recorded_seeds(seeds),
        "generation": generation.recorded(),
        "features": comparison.features,
        "layer": comparison.layer if inception else None,
        "inception_weights": network.key if inception else None,
        "digits_classifier": network.key if comparison.features == "digits" else None,
        **({"dinov2_weights": network.key} if comparison.features == "dinov2" else {}),
        "reference_images": len(reference) if isinstance(reference, Tensor) else None,
        "reference_sha256": reference_key(reference),
    }


def _held_out_rows(losses: dict[str, HeldOutLoss]) -> list[dict[str, float]]:
    rows = []
    columns = {name: (loss.mean.tolist(), loss.by_level.stderr.tolist()) for name, loss in losses.items()}
    for place, log_snr in enumerate(losses["ema"].log_snr.tolist()):
        row = {"sigma": math.exp(-0.5 * log_snr), "log_snr": log_snr}
        for name, (loss, error) in columns.items():
            row[f"loss_{name}"], row[f"loss_{name}_standard_error"] = loss[place], error[place]
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


def _write(file: Path, rows: Sequence[dict[str, float]]) -> str:
    """Write a table atomically, as CSV; returns its name."""
    with replacing(file) as partial:
        partial.write_text(_csv(rows))
    return file.name

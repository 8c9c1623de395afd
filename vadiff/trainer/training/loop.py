"""The training loop, to be read top to bottom: data, network, criterion, steps, log, save."""

import contextlib
import copy
import hashlib
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...ema import PowerFunctionEMA, remove_after
from ...errors import RunError, TrainingError
from ...files import check_writable
from ...levels import LevelSampler
from ...loss import DiffusionLoss
from ...models import Denoiser
from ...optimal_loss import OptimalLoss
from ..config import TrainConfig
from ..config_schema import TABLE
from ..data import Images
from ..next_steps import going_on
from ..progress import progress_bar
from . import run_folder
from .assembly import build_denoiser, build_levels, read_table, training_criterion
from .averages import SNAPSHOTS
from .bad_images import BadImages
from .batches import Batches
from .caching import in_memory
from .checkpoint import fingerprint, load_checkpoint, save_checkpoint, steps_saved
from .data_set import load_images
from .distributed import Ranks, local_device, ranks
from .held_out import HeldOutLoss, held_out_loss_of_run
from .image_source import reading_processes_named
from .level_profile import read_profile
from .metrics import MetricsLog, levels_state, memory_bytes, statistics_of
from .objective import Objective, objective_of
from .optimal_curve import check_curve, estimate_curve, needs_curve, read_curve
from .optimisation import LateReading, Optimisation, RunningAverage, learning_rate_at
from .posterior_targets import check_references, posterior_targets
from .rms import rms_per_layer, weights_of_layers
from .samples import check_grids, save_grid
from .size import network_size, size_in_words
from .step import TrainingStep
from .stopping import Stopped, StopRequest
from .streams import Streams, own_global_state
from .transfer import transfer


@dataclass
class TrainedRun:
    """Result of `train`."""

    config: TrainConfig
    denoiser: Denoiser  # averaged weights, eval mode, on the training device
    criterion: DiffusionLoss
    metrics: list[dict[str, Any]]  # the lines of metrics.jsonl
    levels: LevelSampler  # with its final state
    held_out: HeldOutLoss  # of the averaged weights; under torchrun empty except on the main rank


def train(
    config: TrainConfig,
    objective: Objective | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    images: Images | None = None,
) -> TrainedRun:
    """Train a denoiser.

    Under torchrun every process calls this, and they train one denoiser together.

    Args:
        config: of the run.
        objective: how a step calls the criterion; by default that of what the network predicts.
        out: the run directory; None writes nothing.
        resume: go on from the latest checkpoint in `out`, or start if there is none.
        overwrite: replace a run in `out`.
        progress: print the network's size, and show a progress bar; in a pipe a line every half minute.
        images: the data set; that of the config by default.

    Returns:
        The averaged denoiser, the criterion, the metrics and the loss on held-out images.

    Raises:
        MissingExtraError: a package of the extra `train` is not installed.
        DataError: the data set is missing, truncated or corrupt.
        RunError: `out` holds a run already, or one of another config or of other images; another process trains in it;
            or the ranks read different contents from it.
        CheckpointError: a checkpoint is corrupt, or cannot be written; the message names the last intact one.
        TrainingError: too many non-finite steps in a row.
        Stopped: SIGTERM or SIGINT; a checkpoint was written, unless the last steps were non-finite.
    """
    config = config.resolved()
    path = None if out is None else Path(out)
    device = local_device(config.torch_device())
    with (
        ranks(device) as group,
        own_global_state(device, deterministic=config.deterministic, tf32=config.tf32),
        contextlib.ExitStack() as locks,
    ):
        was_there = path is not None and path.is_dir()
        if path is not None:
            run_folder.check(path, config, resume=resume, overwrite=overwrite)
            if group.is_main:
                check_writable(path, folder=True)
                if was_there:
                    locks.enter_context(run_folder.lock(path))
                    run_folder.check(path, config, resume=resume, overwrite=overwrite)  # again, under the lock
        trainer = _Trainer(
            config, objective or objective_of(config), path, device, group, images, resume=resume, progress=progress
        )
        group.wait()
        if path is not None and group.is_main:  # after all parts are made: an invalid config writes nothing
            if not was_there:
                path.mkdir(parents=True, exist_ok=True)
                locks.enter_context(run_folder.lock(path))
                run_folder.check(path, config, resume=resume, overwrite=overwrite)  # again, under the lock
            run_folder.begin(
                path, config, trainer.images, resume=resume, step=trainer.step, optimal=trainer.optimal,
                profile=trainer.profile,
            )  # fmt: skip
        if progress and group.is_main:
            size = network_size(config, trainer.images.shape, trainer.images.classes)
            print(size_in_words(config, size), file=sys.stderr)
        trainer.open_log()
        try:
            with reading_processes_named():
                return trainer.run(progress)
        finally:
            trainer.log.close()
            trainer.train_step.close()


class _Trainer:
    """The parts of a run, and its training steps."""

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        out: Path | None,
        device: torch.device,
        group: Ranks,
        images: Images | None = None,
        *,
        resume: bool = False,
        progress: bool = False,
    ) -> None:
        config = config.resolved()
        self.config, self.device, self.group = config, device, group
        self.out = out if group.is_main else None  # only the main process writes
        data_seed = config.seed if config.data_seed is None else config.data_seed
        self.streams = Streams(config.seed, data_seed, device)
        if images is None:
            images = in_memory(load_images(config), config, device, progress=progress and group.is_main)
        self.images = images
        check_grids(config, images)
        torch.manual_seed(self.streams.initialisation)
        self.denoiser = build_denoiser(config, self.images.shape, self.images.classes).to(device)
        if device.type == "cuda":  # tensor cores read channels_last: other weights would be converted at every step
            self.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        earlier = out if resume else None  # folder to resume from
        resumes = group.from_main(lambda: earlier is not None and bool(steps_saved(earlier)))  # one answer for all
        self.transferred = None if resumes else transfer(config, self.denoiser, progress=progress and group.is_main)
        self.average = copy.deepcopy(self.denoiser).eval().requires_grad_(False)
        self.running_average = RunningAverage(self.average, self.denoiser, config)
        self.power_averages = None  # on the main process only: identical on all ranks
        if config.sigma_rel and group.is_main:
            self.power_averages = PowerFunctionEMA(self.denoiser, config.sigma_rel)
        self.optimal = self._optimal_loss(earlier, progress) if needs_curve(config) else None
        self.criterion = training_criterion(config, earlier, self.optimal).to(device)
        self.profile = group.from_main(lambda: read_profile(config, earlier))
        self.levels = build_levels(config, earlier, self.optimal, self.profile).to(device)
        self.batches = Batches(config, self.images, self.levels, self.streams, device, group)
        self.bad_images = BadImages(self.images.train, self.batches.source, group)
        self.criterion.target = posterior_targets(config, self.batches, self.images.classes)
        parameters = [*self.denoiser.parameters(), *self.criterion.parameters()]  # of a learned weighting
        self.optimisation = Optimisation(config, parameters, device)
        self.train_step = TrainingStep(
            config, objective, self.denoiser, self.criterion, self.levels, self.batches, self.optimisation,
            self.running_average, self.power_averages, group,
        )  # fmt: skip
        self.step, self.seconds = 0, 0.0
        self.saved: int | None = None  # the step of the latest checkpoint
        self.save_due = False
        self._agree(earlier)
        if earlier is not None:
            run_folder.check_images(earlier, self.images)
            if resumes:
                self._load(load_checkpoint(earlier, device=device))
        self.timed_step = self.step  # images per second count from this step

    def open_log(self) -> None:
        """Open the metrics; when resuming, remove lines and snapshots of later steps."""
        if self.out is not None:
            remove_after(self.out / SNAPSHOTS, self.step)
        self.log = MetricsLog(self.out, tensorboard=self.config.tensorboard, after=self.step)

    def run(self, progress: bool) -> TrainedRun:
        """Train to the end, or until a signal."""
        config, size = self.config, self.config.batch_size
        self.since = self.resumed = time.monotonic()
        longest_row = LateReading(self.optimisation.totals[6])
        held_out = None
        with (
            StopRequest(self.group) as stop,
            progress_bar(
                config.steps * size, config.weighting, " images", initial=self.step * size, scaled=True,
                shown=progress and self.group.is_main,
            ) as bar,
        ):  # fmt: skip
            while self.step < config.steps:
                weights = None
                if config.log_rms and self.group.is_main and self._logs(self.step + 1):
                    weights = weights_of_layers(self.denoiser)
                self.train_step(self.step)
                self.step += 1
                bar.set_description_str(f"{config.weighting}, step {self.step}", refresh=False)
                bar.update(size)
                if self.step % config.max_skipped_steps == 0:
                    self._check_skipped(*longest_row(self.step))
                measured = self._due(config.held_out_every)
                if self._logs(self.step):
                    held_out = self._write_line(bar, measured, weights)
                if config.samples_every and self._due(config.samples_every) and self.out is not None:
                    save_grid(
                        self.out, self.step, self.average, config.process, config.sample_count, self.images.encoding
                    )
                if self.power_averages is not None and self.out is not None and self._due(config.snapshot_every):
                    self.power_averages.save(self.out / SNAPSHOTS, config.snapshot_precision)
                self.save_due |= self._due(config.checkpoint_every)
                if self.save_due and (self.step == config.steps or not self._skipped_in_a_row()):
                    self._save()
                if number := stop.agreed():
                    self._stop(number)
        if held_out is None:  # the run was finished before
            held_out = held_out_loss_of_run(self.config, self.images, self.average)
        return TrainedRun(config, self.average, self.criterion.eval(), self.log.entries, self.levels, held_out)

    def _due(self, every: int, step: int | None = None) -> bool:
        step = self.step if step is None else step
        return step == self.config.steps or (every > 0 and step % every == 0)

    def _logs(self, step: int) -> bool:
        """Whether a line of metrics is written after this step."""
        return self._due(self.config.log_every, step) or self._due(self.config.held_out_every, step)

    def _write_line(self, bar: Any, measured: bool, weights: Mapping[str, Tensor] | None = None) -> HeldOutLoss | None:
        """Read the totals, which waits for the device, and write a line; returns the held-out loss if `measured`.

        `weights` are the layers' weights before the last step, for logging the updates.
        """
        totals = self.optimisation.totals
        loss, norm, clipped, finite, skipped = self.group.mean(totals[:5]).tolist()
        totals[:4] = 0.0
        now = time.monotonic()
        entry = {
            "step": self.step,
            "images": self.step * self.config.batch_size,
            "loss": loss / finite if finite else None,
            "grad_norm": norm / finite if finite else None,
            "clipped_share": clipped / finite if finite else None,
            "skipped_steps": round(skipped),
            "learning_rate": learning_rate_at(self.config, self.step - 1),
            "images_per_second": (self.step - self.timed_step) * self.config.batch_size / (now - self.since),
            "memory_bytes": memory_bytes(self.device),
            "seconds": self.seconds + now - self.resumed,
            **self.bad_images.entry(),
            **statistics_of(self.criterion),
            **levels_state(self.levels),
        }
        held_out = None
        if self.group.is_main:
            if self.config.log_rms:
                entry["rms"] = rms_per_layer(self.denoiser, self.batches.at(self.step - 1)[0], weights)
            if measured:
                raw = held_out_loss_of_run(self.config, self.images, self.denoiser.eval())
                held_out = held_out_loss_of_run(self.config, self.images, self.average)
                self.denoiser.train()
                entry["held_out"] = {
                    "log_snr": held_out.log_snr.tolist(),
                    "loss_raw": raw.mean.tolist(),
                    "loss_ema": held_out.mean.tolist(),
                }
            self.log.add(entry)
            shown = f"{loss / finite:.4f}" if finite else "none finite"
            bar.set_postfix_str(f"loss={shown}, level_free={entry['level_free_loss']:.4f}", refresh=False)
        self.timed_step, self.since = self.step, time.monotonic()
        self._check_skipped(float(totals[6]), self.step)
        return held_out

    def _check_skipped(self, longest: float, step: int) -> None:
        """Raise TrainingError if too many consecutive steps, up to `step`, were skipped."""
        if longest >= self.config.max_skipped_steps:
            raise TrainingError(
                f"{longest:.0f} steps in a row had a non-finite gradient, the last up to step {step}. They were "
                "skipped, and no checkpoint was written since the first. Go on with --resume and a lower "
                "--learning-rate, a --clip, or --precision bf16 in place of fp16. Metrics up to here are in "
                f"{self.out or 'memory'}"
            )

    def _skipped_in_a_row(self) -> int:
        """Number of consecutive steps up to this one that were skipped; waits for the device.

        No checkpoint is saved meanwhile: unusable ones would replace usable ones.
        """
        return int(self.optimisation.totals[5])

    def _optimal_loss(self, earlier: Path | None, progress: bool) -> OptimalLoss:
        """J* of the training images, read or estimated by the main process for all ranks."""

        def on_main() -> OptimalLoss:
            optimal = read_curve(self.config, earlier)
            if optimal is None:
                optimal = estimate_curve(self.config, self.images, self.device, progress=progress)
            check_curve(optimal, self.config, self.images)
            return optimal

        return self.group.from_main(on_main)

    def _agree(self, earlier: Path | None) -> None:
        """Raise unless all ranks start from the same state: on several machines, each reads its own folder."""
        config = self.config
        parts = ["no checkpoint" if earlier is None else f"checkpoint: {fingerprint(earlier)}"]
        parts.append(f"{len(self.images.train):,} training images {self.images.fingerprint}".rstrip())
        if TABLE in (config.weighting, config.levels):
            weights = repr(read_table(config, earlier).weights)
            parts.append(f"weight table {hashlib.sha256(weights.encode()).hexdigest()[:12]}…")
        if self.transferred is not None:
            parts.append(f"weights of {self.transferred.path}: {self.transferred.fingerprint()[1][:12]}…")
        found = self.group.gather("; ".join(parts))
        if len(set(found)) > 1:
            other = next(rank for rank, text in enumerate(found) if text != found[0])
            raise RunError(
                f"the ranks do not start from the same state: rank 0 has {found[0]}; rank {other} has {found[other]}. "
                "Several machines need a shared file system for --out, --data, --table, --transfer, or the same files"
            )

    def _save(self) -> None:
        self.save_due = False
        if self.saved == self.step:
            return
        bad = self.bad_images.rows()
        if self.out is not None:
            state = {
                "step": self.step,
                "seconds": self.seconds + time.monotonic() - self.resumed,
                "image_shape": list(self.images.shape),
                "classes": self.images.classes,
                "model": self.denoiser.state_dict(),
                "ema": self.average.state_dict(),
                "criterion": self.criterion.state_dict(),
                "levels": self.levels.state_dict(),
                "optimizer": self.optimisation.state_dict(),
                "scaler": self.optimisation.scaler.state_dict(),
                "totals": self.optimisation.totals,
                "bad_images": bad,
                "references": "" if self.criterion.target is None else self.batches.source.kind,
            }
            if self.power_averages is not None:
                state["power_averages"] = self.power_averages.state_dict()
            save_checkpoint(self.out, self.step, state, self.config.keep_checkpoints)
        self.saved = self.step

    def _load(self, state: dict[str, Any]) -> None:
        check_references(self.config, self.batches, state)
        self.denoiser.load_state_dict(state["model"])
        self.average.load_state_dict(state["ema"])
        self.criterion.load_state_dict(state["criterion"])
        self.levels.load_state_dict(state["levels"])
        self.optimisation.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if saved at another precision
            self.optimisation.scaler.load_state_dict(state["scaler"])
        totals = self.optimisation.totals
        totals.copy_(state["totals"])
        totals[6] = totals[5]  # the longest row is counted per process
        if self.power_averages is not None:
            self.power_averages.load_state_dict(state["power_averages"])
        self.batches.source.bad.update(state.get("bad_images", ()))  # version 0.1 has none
        self.step, self.seconds = state["step"], state["seconds"]
        self.saved = self.step

    def _stop(self, number: int) -> None:
        skipped = self._skipped_in_a_row()
        if skipped < 2:  # a single one is normal: fp16's loss scale overflowed
            self._save()
        where = "nothing was saved: no --out" if self.out is None else going_on(self.out, self.group.size)
        if skipped >= 2:
            where += f"; the latest checkpoint is of step {self.saved}: the last {skipped} steps were non-finite"
        raise Stopped(f"stopped by {signal.Signals(number).name} after step {self.step}; {where}", number)

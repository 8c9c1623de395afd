"""Speed of the training loop: images per second by mode, the criterion's share, and what the loop adds.

    python benchmarks/training_loop.py [--preset cifar10-mini] [--out FILE.json]
    python benchmarks/training_loop.py --batch-size 16 --precision fp32 --steps 5     # on a CPU: a minute

Modes: `eager`; `compiled`, the network by torch.compile; `captured`, the step in a CUDA graph; `both`. On a CPU only
eager. All take turns. The criterion's share is the time that a step of a mode takes more than one with `F.mse_loss` in
its place (in the process of the preset: same network, same batch), divided by the step's; the design's bound is 1 %.

What the loop adds, in eager mode, to the bare steps: `network(x)`, `F.mse_loss`, `backward`, `optimizer.step`,
`zero_grad` (and EDM2's forced weight normalisation, part of its step) in the same precision with inputs made
beforehand. The loop's steps have statistics, adaptive weighting, gradient norm, EMA, a line of metrics (also for
TensorBoard) every `log_every` steps, new images, noise levels and noise. On a CPU the two kinds alternate step by step,
so that other load on the machine affects both; on a GPU in blocks, so that the host can run ahead as in training.
Printed is the median over rounds (`--steps` of each) of the ratio, with its quartiles; on a CPU also that of processor
time, which other load disturbs less. The aim is less than 3 %. Held-out loss, sample grids and checkpoints are not
timed.

Finally the updates of the averages alone, relative to the bare step: of the running average, and of two power-function
averages, for which the aim is less than 1 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vadiff.ema import PowerFunctionEMA
from vadiff.models import normalize_weights
from vadiff.trainer.data import Images
from vadiff.trainer.training import loop as training_loop
from vadiff.trainer.training.captured import WARM_UP
from vadiff.trainer.training.distributed import Ranks
from vadiff.trainer.training.step import AUTOCAST
from vadiff.training import PRESETS, TrainConfig

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
from results import write_results

MODES = {
    "eager": {"compile": False, "graph": False},
    "compiled": {"compile": True, "graph": False},
    "captured": {"compile": False, "graph": True},
    "both": {"compile": True, "graph": True},
}


def mse_objective(criterion: Any, output: Tensor, x0: Tensor, *_: Any) -> Tensor:
    """What a step costs without vadiff's criterion."""
    return F.mse_loss(output, x0)


def speeds_of_modes(config: TrainConfig, modes: Sequence[str], steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Images per second, seconds of the first steps and the criterion's share of each mode, measured in turns."""
    device = config.torch_device()
    runs: dict[tuple[str, bool], Callable[[], None]] = {}
    first: dict[str, float] = {}
    for mode in modes:
        moded = dataclasses.replace(config, tensorboard=False, **MODES[mode])
        for criterion in (True, False):
            objective = training_loop.objective_of(config) if criterion else mse_objective
            trainer = training_loop._Trainer(moded, objective, None, device, Ranks())
            trainer.open_log()
            trainer.since = trainer.resumed = time.monotonic()
            run = loop_steps(trainer, steps)
            spent = seconds(loop_steps(trainer, WARM_UP + 1), device).wall
            if criterion:
                first[mode] = spent
            run()
            runs[mode, criterion] = run
    times: dict[tuple[str, bool], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(seconds(run, device).wall / steps)
    found = {}
    for mode in modes:
        shares = [1.0 - other / one for one, other in zip(times[mode, True], times[mode, False], strict=True)]
        found[mode] = {
            "images_per_second": config.batch_size / statistics.median(times[mode, True]),
            "step_ms": 1000.0 * statistics.median(times[mode, True]),
            "criterion_percent": 100.0 * statistics.median(shares),
            "seconds_of_first_steps": first[mode],
        }
    return found


def print_modes(found: dict[str, dict[str, float]]) -> None:
    eager = found.get("eager", {}).get("images_per_second")
    for mode, of_mode in found.items():
        ratio = f" ({of_mode['images_per_second'] / eager:.2f} × eager)" if eager and mode != "eager" else ""
        print(
            f"{mode:9} {of_mode['images_per_second']:10,.0f} images/s{ratio}, {of_mode['step_ms']:.2f} ms a step, the "
            f"criterion {of_mode['criterion_percent']:+.2f} % of it; "
            f"first steps {of_mode['seconds_of_first_steps']:.1f} s"
        )


def random_images(config: TrainConfig) -> Images:
    """Noise in the shape of CIFAR: speed does not depend on the images' contents."""
    shape = (1, 8, 8) if config.dataset == "digits" else (3, 32, 32)
    pixels = torch.randint(0, 256, (2000, *shape), dtype=torch.uint8)
    labels = torch.randint(0, 10, (2000,))
    return Images(pixels, labels, pixels[:10], labels[:10], held_out_is_test=False, classes=10)


def loop_steps(trainer: training_loop._Trainer, steps: int) -> Callable[[], None]:
    """`steps` steps as `_Trainer.run` takes them, with a line of metrics every `log_every`."""

    def run() -> None:
        for _ in range(steps):
            trainer.train_step(trainer.step)
            trainer.step += 1
            if trainer.step % trainer.config.log_every == 0:
                trainer._write_line(Bar(), measured=False)

    return run


class Bar:
    def set_postfix(self, **values: object) -> None:
        """As tqdm's method."""


def bare_steps(trainer: training_loop._Trainer, steps: int) -> Callable[[], None]:
    """Forward, backward and optimiser step of the same network, and nothing else."""
    config, device = trainer.config, trainer.device
    batch = trainer.batches.at(0)[0]
    network, parameters = trainer.train_step.network, list(trainer.denoiser.network.parameters())
    options = {"lr": 1e-6, "betas": config.betas, "fused": True}
    optimizer = (torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam)(parameters, **options)
    dtype = AUTOCAST[config.precision]
    inputs = (batch.x0, batch.sigma.log() / 4) + (() if batch.labels is None else (batch.labels,))

    def run() -> None:
        for _ in range(steps):
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                output = network(*inputs)
            F.mse_loss(output, batch.eps).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if config.model == "edm2":
                normalize_weights(trainer.denoiser)

    return run


class Seconds(NamedTuple):
    """Wall and processor time."""

    wall: float
    processor: float  # of this process, all threads

    def __add__(self, other: object) -> Seconds:
        assert isinstance(other, Seconds)
        return Seconds(self.wall + other.wall, self.processor + other.processor)


def seconds(run: Callable[[], None], device: torch.device) -> Seconds:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started, busy = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Seconds(time.perf_counter() - started, time.process_time() - busy)


def one_round(one: Callable[[], None], other: Callable[[], None], turns: int, device: torch.device) -> list[Seconds]:
    """Call both functions `turns` times, alternating which comes first."""
    totals = [Seconds(0.0, 0.0), Seconds(0.0, 0.0)]
    for turn in range(turns):
        for place in (0, 1) if turn % 2 else (1, 0):
            totals[place] += seconds((one, other)[place], device)
    return totals


def overhead(ratios: list[float]) -> dict[str, float]:
    """Median and quartiles of ratios, as percent above 1."""
    low, middle, high = (100.0 * (ratio - 1.0) for ratio in statistics.quantiles(ratios, n=4))
    return {"median": middle, "low_quartile": low, "high_quartile": high}


def averages_ms(trainer: training_loop._Trainer, updates: int = 50) -> dict[str, float]:
    """Milliseconds of one update: of the running average, and of two power-function averages."""
    averages = PowerFunctionEMA(trainer.denoiser, (0.05, 0.10))

    def power_function() -> None:
        averages.update(averages.time + 1.0)

    found = {}
    for name, update in (("running", trainer.running_average.update), ("power_function", power_function)):
        update()
        times = [seconds(update, trainer.device).wall for _ in range(updates)]
        found[name] = 1000.0 * statistics.median(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="cifar10-mini")
    parser.add_argument("--batch-size", type=int, help="default: the preset's")
    parser.add_argument("--precision", help="default: the preset's")
    parser.add_argument(
        "--steps", type=int, help="steps of each kind in a round; default: log_every, for one line of metrics"
    )
    parser.add_argument("--log-every", type=int, help="default: the preset's")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), help="default: all on a GPU, eager on a CPU")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    given = {
        name: getattr(arguments, name)
        for name in ("batch_size", "precision", "log_every", "device")
        if getattr(arguments, name) is not None
    }
    config = dataclasses.replace(
        PRESETS[arguments.preset], weighting="variance_aware", tensorboard=True, **MODES["eager"], **given
    )
    training_loop.load_images = random_images
    device = config.torch_device()
    modes = arguments.modes or (list(MODES) if device.type == "cuda" else ["eager"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = training_loop._Trainer(config, training_loop.objective_of(config), Path(folder), device, Ranks())
        trainer.open_log()
        trainer.since = trainer.resumed = time.monotonic()
        steps = config.log_every if arguments.steps is None else arguments.steps
        block = steps if device.type == "cuda" else 1
        loop, bare = loop_steps(trainer, block), bare_steps(trainer, block)
        one_round(loop, bare, max(1, min(steps, 10) // block), device)  # warm up
        turns = tqdm(range(arguments.rounds), "rounds", disable=None)  # a bar where stderr is a terminal
        rounds = [one_round(loop, bare, steps // block, device) for _ in turns]
        averages = averages_ms(trainer)
        trainer.log.close()
    speeds = speeds_of_modes(config, modes, steps, max(3, arguments.rounds // 2))
    step_ms = 1000.0 * statistics.median(other.wall for _, other in rounds) / steps
    figures: dict[str, Any] = {
        "preset": arguments.preset,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "modes": speeds,
        "bare_step_ms": step_ms,
        "overhead_percent": overhead([one.wall / other.wall for one, other in rounds]),
        "averages_ms": averages,
        "averages_percent": {name: 100.0 * value / step_ms for name, value in averages.items()},
    }
    print(f"{arguments.preset}, batch {config.batch_size}, {config.precision}, {device}: bare step {step_ms:.2f} ms")
    print_modes(speeds)
    if device.type == "cpu":
        figures["processor_time_overhead_percent"] = overhead(
            [one.processor / other.processor for one, other in rounds]
        )
    for name, words in (("overhead_percent", "time"), ("processor_time_overhead_percent", "processor time")):
        if name in figures:
            median, low, high = figures[name].values()
            print(f"{words}: the loop adds {median:+.2f} % (quartiles {low:+.2f} to {high:+.2f}); the aim is below 3 %")
    for name, share in figures["averages_percent"].items():
        print(f"{name.replace('_', '-')} averages: {averages[name]:.3f} ms an update, {share:.2f} % of the bare step")
    if arguments.out is not None:
        print(f"written to {write_results('training_loop', figures, arguments.out)}")


if __name__ == "__main__":
    main()

"""Speed of the training loop: images per second by mode, the criterion's share, and what the loop adds.

    python benchmarks/training_loop.py [--preset cifar10-mini] [--out FILE.json]
    python benchmarks/training_loop.py --batch-size 16 --precision fp32 --steps 5     # on a CPU: a minute

Modes: `eager`; `captured`, the step in a CUDA graph; `compiled`, the network by torch.compile; `both`. On a CPU only
eager. Everything runs under the settings of `vadiff train`. Each mode takes turns with eager, and the captured ones (as
CIFAR's presets train; without them all) also with `F.mse_loss` in the criterion's place, same network, same batch. The
criterion's share is what a step takes more than with that, divided by the step's time; the design's bound is 1 %. --out
is written after each mode, and the last line printed says which of the design's figures hold.

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
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import figures
import table
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
from vadiff.trainer.training.streams import own_global_state
from vadiff.training import PRESETS, TrainConfig

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
from results import write_results

MODES = {
    "eager": {"compile": False, "graph": False},
    "captured": {"compile": False, "graph": True},
    "compiled": {"compile": True, "graph": False},
    "both": {"compile": True, "graph": True},
}


def mse_objective(criterion: Any, output: Tensor, x0: Tensor, *_: Any) -> Tensor:
    """What a step costs without vadiff's criterion."""
    return F.mse_loss(output, x0)


def settings_of(config: TrainConfig) -> AbstractContextManager[None]:
    """The choice of algorithms of `train`, without which a GPU's convolutions and float32 products are slower."""
    return own_global_state(config.torch_device(), deterministic=config.deterministic, tf32=config.tf32)


def speeds_of_modes(
    config: TrainConfig, modes: Sequence[str], steps: int, rounds: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """Each mode, with images per second, times eager's, the criterion's share and the seconds of the first steps."""
    device = config.torch_device()
    with_share = [mode for mode in modes if MODES[mode]["graph"]] or modes
    eager: Callable[[], None] | None = None
    for mode in sorted(modes, key=list(MODES).index):
        run, first = steps_in_mode(config, mode, training_loop.objective_of(config), steps)
        runs = {"mode": run}
        if mode in with_share:
            runs["mse"], _ = steps_in_mode(config, mode, mse_objective, steps)
        if eager is not None:
            runs["eager"] = eager
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, other in runs.items():
                times[name].append(seconds(other, device).wall / steps)
        step = statistics.median(times["mode"])
        found = {"images_per_second": config.batch_size / step, "step_ms": 1000.0 * step}
        if "eager" in times:
            ratios = [one / other for one, other in zip(times["eager"], times["mode"], strict=True)]
            found["times_eager"] = statistics.median(ratios)
        if "mse" in times:
            shares = [1.0 - other / one for one, other in zip(times["mode"], times["mse"], strict=True)]
            found["criterion_percent"] = 100.0 * statistics.median(shares)
        yield mode, {**found, "seconds_of_first_steps": first}
        if mode == "eager":
            eager = run
        del run, other
        runs.clear()
        gc.collect()  # parts of a trainer refer to each other; no graph may be freed within the next mode's capture


def steps_in_mode(config: TrainConfig, mode: str, objective: Any, steps: int) -> tuple[Callable[[], None], float]:
    """`steps` steps of a trainer of its own, warmed up, and the seconds of its first steps."""
    moded, device = dataclasses.replace(config, tensorboard=False, **MODES[mode]), config.torch_device()
    trainer = training_loop._Trainer(moded, objective, None, device, Ranks())
    trainer.open_log()
    trainer.since = trainer.resumed = time.monotonic()
    first = seconds(loop_steps(trainer, WARM_UP + 1), device).wall
    run = loop_steps(trainer, steps)
    run()
    return run, first


def print_mode(mode: str, found: dict[str, float]) -> None:
    ratio = f" ({found['times_eager']:.2f} × eager)" if "times_eager" in found else ""
    share = f"the criterion {found['criterion_percent']:+.2f} % of it, " if "criterion_percent" in found else ""
    print(
        f"{mode:9} {found['images_per_second']:10,.0f} images/s{ratio}, {found['step_ms']:.2f} ms a step, {share}"
        f"first steps {found['seconds_of_first_steps']:.1f} s"
    )


def verdict(judged: list[figures.Figure], modes: dict[str, dict[str, float]]) -> str:
    """The design's figures and the speeds, in one line."""
    speeds = []
    for mode, found in modes.items():
        more = [f"{found['times_eager']:.2f} ×"] if "times_eager" in found else []
        more += [f"criterion {found['criterion_percent']:+.2f} %"] if "criterion_percent" in found else []
        speeds.append(f"{mode} {found['images_per_second']:,.0f}" + (f" ({', '.join(more)})" if more else ""))
    return f"{figures.verdict(judged)}; images/s: {', '.join(speeds)}"


def random_images(config: TrainConfig) -> Images:
    """Noise in the shape of CIFAR, and as many images: a new pass over them costs time, what they show does not."""
    shape, repeats = ((1, 8, 8), 1) if config.dataset == "digits" else ((3, 32, 32), 25)
    pixels = torch.randint(0, 256, (2000, *shape), dtype=torch.uint8)
    labels = torch.randint(0, 10, (2000,))
    train = pixels.repeat(repeats, 1, 1, 1), labels.repeat(repeats)
    return Images(*train, pixels[:10], labels[:10], held_out_is_test=False, classes=10)


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
    def set_postfix_str(self, text: str, refresh: bool) -> None:
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
    with settings_of(config):
        measure(config, arguments)


def measure(config: TrainConfig, arguments: argparse.Namespace) -> None:
    """Measure the modes and then the loop; print and write what is known after each of them."""
    device = config.torch_device()
    steps = config.log_every if arguments.steps is None else arguments.steps
    what = f"{arguments.preset}, batch {config.batch_size}, {config.precision}"
    found: dict[str, Any] = {
        "preset": arguments.preset,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "modes": {},
    }

    def keep() -> None:
        if arguments.out is not None:
            write_results("training_loop", found, arguments.out)

    print(f"{what}, {device}")
    modes = arguments.modes or (list(MODES) if device.type == "cuda" else ["eager"])
    for mode, of_mode in speeds_of_modes(config, modes, steps, max(3, arguments.rounds // 2)):
        found["modes"][mode] = of_mode
        keep()
        judged = figures.judge_training_loop(f"training step, {what}", found["modes"])
        print_mode(mode, of_mode)
        print(verdict(judged, found["modes"]), flush=True)  # now: the next mode may run out of time or memory
    found |= costs_of_the_loop(config, steps, arguments.rounds)
    keep()
    print_costs(found)
    print(table.render_figures(judged))
    print(verdict(judged, found["modes"]))


def costs_of_the_loop(config: TrainConfig, steps: int, rounds: int) -> dict[str, Any]:
    """What the loop adds to the bare steps, and what the averages cost."""
    device = config.torch_device()
    block = steps if device.type == "cuda" else 1
    with tempfile.TemporaryDirectory() as folder:
        trainer = training_loop._Trainer(config, training_loop.objective_of(config), Path(folder), device, Ranks())
        trainer.open_log()
        trainer.since = trainer.resumed = time.monotonic()
        loop, bare = loop_steps(trainer, block), bare_steps(trainer, block)
        one_round(loop, bare, max(1, min(steps, 10) // block), device)  # warm up
        turns = tqdm(range(rounds), "rounds", disable=None)  # a bar where stderr is a terminal
        times = [one_round(loop, bare, steps // block, device) for _ in turns]
        averages = averages_ms(trainer)
        trainer.log.close()
    step_ms = 1000.0 * statistics.median(other.wall for _, other in times) / steps
    found = {
        "bare_step_ms": step_ms,
        "overhead_percent": overhead([one.wall / other.wall for one, other in times]),
        "averages_ms": averages,
        "averages_percent": {name: 100.0 * value / step_ms for name, value in averages.items()},
    }
    if device.type == "cpu":
        found["processor_time_overhead_percent"] = overhead([one.processor / other.processor for one, other in times])
    return found


def print_costs(found: dict[str, Any]) -> None:
    print(f"bare step {found['bare_step_ms']:.2f} ms")
    for name, words in (("overhead_percent", "time"), ("processor_time_overhead_percent", "processor time")):
        if name in found:
            median, low, high = found[name].values()
            print(f"{words}: the loop adds {median:+.2f} % (quartiles {low:+.2f} to {high:+.2f}); the aim is below 3 %")
    for name, share in found["averages_percent"].items():
        spent = found["averages_ms"][name]
        print(f"{name.replace('_', '-')} averages: {spent:.3f} ms an update, {share:.2f} % of the bare step")


if __name__ == "__main__":
    main()

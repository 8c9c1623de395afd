"""What the training loop adds to the bare forward, backward and optimiser step of the same network.

    python benchmarks/bench_training_loop.py [--preset cifar10-mini] [--out FILE.json]

Two things are timed in turns, over and over, and the median of the paired ratios is printed: steps of the loop, with
statistics, adaptive weighting, gradient norm, EMA, a line of metrics every `log_every` steps, fresh images, noise
levels and noise; and on the same network, in the same precision, with inputs made beforehand, `network(x)`,
`F.mse_loss`, `backward`, `optimizer.step`, `zero_grad`. Less than 3 % is the aim. Held-out loss, sample grids and
checkpoints are not part of a step and not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from vadiff.data import Images
from vadiff.training import PRESETS, TrainConfig
from vadiff.training import loop as training_loop
from vadiff.training.distributed import Ranks

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
from results import write_results


def random_images(config: TrainConfig) -> Images:
    """Noise in the shape of CIFAR: speed does not depend on what is in the pictures."""
    shape = (1, 8, 8) if config.dataset == "digits" else (3, 32, 32)
    pixels = torch.randint(0, 256, (2000, *shape), dtype=torch.uint8)
    labels = torch.randint(0, 10, (2000,))
    return Images(pixels, labels, pixels[:10], labels[:10], held_out_is_test=False, classes=10)


def loop_steps(trainer: training_loop._Trainer, steps: int) -> Callable[[], None]:
    """`steps` steps as `run` takes them, with one line of metrics every `log_every`."""

    def run() -> None:
        for _ in range(steps):
            trainer._train_step(trainer.step)
            trainer.step += 1
            if trainer.step % trainer.config.log_every == 0:
                trainer._write_line(Bar(), measured=False)

    return run


class Bar:
    def set_postfix(self, **values: object) -> None:
        """As that of tqdm."""


def bare_steps(trainer: training_loop._Trainer, steps: int) -> Callable[[], None]:
    """Forward, backward and optimiser step of the same network, and nothing else."""
    config, device = trainer.config, trainer.device
    batch = trainer.batches.at(0)[0]
    network, parameters = trainer.network, list(trainer.denoiser.network.parameters())
    settings = {"lr": 1e-6, "betas": config.betas, "fused": True}
    optimizer = (torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam)(parameters, **settings)
    dtype = training_loop._AUTOCAST[config.precision]
    inputs = (batch.x0, batch.sigma.log() / 4) + (() if batch.labels is None else (batch.labels,))

    def run() -> None:
        for _ in range(steps):
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                output = network(*inputs)
            F.mse_loss(output, batch.eps).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="cifar10-mini")
    parser.add_argument("--batch-size", type=int, help="default: the preset's")
    parser.add_argument("--precision", help="default: the preset's")
    parser.add_argument("--steps", type=int, default=50, help="in one turn")
    parser.add_argument("--log-every", type=int, help="default: the preset's")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    given = {
        name: getattr(arguments, name)
        for name in ("batch_size", "precision", "log_every")
        if getattr(arguments, name) is not None
    }
    config = dataclasses.replace(PRESETS[arguments.preset], weighting="variance_aware", tensorboard=True, **given)
    training_loop.load_images = random_images
    device = config.torch_device()
    with tempfile.TemporaryDirectory() as folder:
        trainer = training_loop._Trainer(
            config, training_loop.OBJECTIVES[config.process], Path(folder), device, Ranks()
        )
        trainer.open_log()
        trainer.since = trainer.resumed = time.monotonic()
        loop, bare = loop_steps(trainer, arguments.steps), bare_steps(trainer, arguments.steps)
        for run in (loop, bare):  # warm up
            run()
        ratios, bare_times = [], []
        for turn in range(arguments.turns):
            pair = (loop, bare) if turn % 2 else (bare, loop)
            times = {run: seconds(run, device) for run in pair}
            ratios.append(times[loop] / times[bare])
            bare_times.append(times[bare])
        trainer.log.close()
    overhead = 100.0 * (statistics.median(ratios) - 1.0)
    low, *_, high = (100.0 * (ratio - 1.0) for ratio in statistics.quantiles(ratios, n=4))
    step_ms = 1000.0 * statistics.median(bare_times) / arguments.steps
    print(f"{arguments.preset}, batch {config.batch_size}, {config.precision}, {device}: bare step {step_ms:.2f} ms, ")
    print(f"the loop adds {overhead:+.2f} % (quartiles {low:+.2f} to {high:+.2f}); the aim is below 3 %")
    if arguments.out is not None:
        figures = {"preset": arguments.preset, "batch_size": config.batch_size, "precision": config.precision}
        figures |= {"bare_step_ms": step_ms, "overhead_percent": overhead, "quartiles_percent": [low, high]}
        print(f"written to {write_results('training_loop', figures, arguments.out)}")


if __name__ == "__main__":
    main()

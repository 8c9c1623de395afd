"""Training speed of EDM2's network and the classic one: images per second, and share of the peak matrix product speed.

    python benchmarks/networks.py [--presets cifar10-edm cifar10-edm2] [--batch-size 256] [--out FILE.json]

Whole steps of the training loop are timed, under the settings of `vadiff train`: data, network in bf16 and compiled,
loss, optimiser, averages. Operations are counted from the uncompiled network's matrix products and convolutions,
forward and backward. The peak is what this device reaches with one large bf16 product (with --precision fp32 one of
fp32, rounded to TF32 on a GPU as in training), not what its data sheet says.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from training_loop import loop_steps, random_images, seconds, settings_of, training_loop

from vadiff.trainer.training.distributed import Ranks
from vadiff.training import PRESETS, TrainConfig

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
from results import write_results

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def peak_flops(device: torch.device, precision: str, size: int | None = None) -> float:
    """Operations per second of the fastest of some large square products."""
    size = size or (8192 if device.type == "cuda" else 1024)
    one, other = (torch.randn(size, size, device=device, dtype=_DTYPES[precision]) for _ in range(2))
    best = min(seconds(lambda: one @ other, device).wall for _ in range(10))
    return 2.0 * size**3 / best


def flops_per_image(trainer: training_loop._Trainer, images: int = 2) -> float:
    """Operations of forward and backward pass of the uncompiled network, as PyTorch counts them."""
    batch = trainer.batches.at(0)[0]
    labels = () if batch.labels is None else (batch.labels[:images],)
    with FlopCounterMode(display=False) as counter:
        trainer.denoiser.network(batch.x0[:images], batch.sigma[:images].log() / 4, *labels).square().mean().backward()
    for parameter in trainer.denoiser.parameters():
        parameter.grad = None
    return counter.get_total_flops() / images


def measured(config: TrainConfig, steps: int, rounds: int, peak: float) -> dict[str, Any]:
    """Speed of training with a config, on random images."""
    device = config.torch_device()
    before = training_loop.load_images
    training_loop.load_images = random_images
    try:
        with settings_of(config), tempfile.TemporaryDirectory() as folder:
            objective = training_loop.objective_of(config)
            trainer = training_loop._Trainer(config, objective, Path(folder), device, Ranks())
            trainer.open_log()
            trainer.since = trainer.resumed = time.monotonic()
            flops = flops_per_image(trainer)
            compiling = seconds(loop_steps(trainer, 3), device).wall
            best = min(seconds(loop_steps(trainer, steps), device).wall for _ in range(rounds))
            trainer.log.close()
    finally:
        training_loop.load_images = before
    speed = steps * config.batch_size / best
    return {
        "parameters": sum(parameter.numel() for parameter in trainer.denoiser.parameters()),
        "flops_per_image": flops,
        "images_per_second": speed,
        "share_of_peak": speed * flops / peak,
        "seconds_of_first_steps": compiling,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["cifar10-edm", "cifar10-edm2"])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--precision", choices=list(_DTYPES), default="bf16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--channels", type=int, nargs="+", help="default: the preset's")
    parser.add_argument("--layers-per-block", type=int, help="default: the preset's")
    parser.add_argument("--steps", type=int, default=20, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in ("batch_size", "precision", "compile", "device")}
    for name in ("channels", "layers_per_block"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
    configs = {
        name: dataclasses.replace(PRESETS[name], **given, tensorboard=False, log_rms=False, log_every=1000)
        for name in arguments.presets
    }
    first = next(iter(configs.values()))
    device = first.torch_device()
    with settings_of(first):
        peak = peak_flops(device, arguments.precision)
    compiled = "compiled" if arguments.compile else "not compiled"
    print(f"one large product, {arguments.precision}, {device}: {peak / 1e12:.3g} Tflop/s")
    figures: dict[str, Any] = {"batch_size": arguments.batch_size, "precision": arguments.precision}
    figures |= {"compiled": arguments.compile, "matrix_peak_flops": peak, "networks": {}}
    for name, config in configs.items():
        found = measured(config, arguments.steps, arguments.rounds, peak)
        figures["networks"][name] = found
        print(
            f"{name}: {found['parameters']:,} parameters, {found['flops_per_image'] / 1e9:.3g} Gflop an image, "
            f"batch {arguments.batch_size}, {compiled}: {found['images_per_second']:,.0f} images/s, "
            f"{100 * found['share_of_peak']:.1f} % of that product's rate",
            flush=True,
        )
        if arguments.out is not None:  # after each preset: the next may run out of time or memory
            write_results("networks", figures, arguments.out)


if __name__ == "__main__":
    main()

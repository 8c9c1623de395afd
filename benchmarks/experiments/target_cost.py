"""What posterior-mean targets cost: share of a training step of `cifar10-mini` on a CPU, and arithmetic for a GPU.

    python benchmarks/experiments/target_cost.py --cifar FOLDER [--references 1024] [--batch-size 256] [--rounds 7]

Measured, in float32 under the settings of `vadiff train`: seconds of the call that makes a batch's targets, in turns
with those of a whole step without it. Twice: with all draws replaced, as at the first call, and once J*_M is known, so
that draws below the threshold keep their own target, which on a CPU saves their work. Noise levels are EDM's, and a
flow's with uniform times. Then where the time of the call goes, by the profiler.

Arithmetic, named so: what a GPU does in that call, where all draws are always computed. Operations of the products,
beside those of the network's forward and backward pass; bytes read and written if each operation is a kernel of its
own; the number of such kernels; and the time of both at the rates of a data sheet.

It writes benchmarks/results/target_cost.json and tables in target_cost.md beside it. Some minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import write_results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import vadiff
from vadiff.trainer.data import Images, cifar
from vadiff.trainer.training import loop as training_loop
from vadiff.trainer.training.batches import Batch
from vadiff.trainer.training.distributed import Ranks
from vadiff.trainer.training.posterior_targets import moved, posterior_targets
from vadiff.trainer.training.streams import REFERENCES
from vadiff.training import PRESETS, TrainConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
from networks import flops_per_image
from training_loop import loop_steps, settings_of

PRESET = "cifar10-mini"
LEVELS = {
    "EDM": {"process": "edm", "levels": "log_normal"},
    "flow, uniform times": {"process": "flow", "levels": "uniform_time"},
}
KNOWN_AFTER = 60  # calls: J*_M is known then at all levels that are often drawn
PROFILED = 5  # calls
PRODUCTS = ("mm", "addmm", "addmm_", "mv", "addmv", "addmv_")
PARTS = ("products", "softmax: [B, M]", "references: [M, ...]", "rest")
# NVIDIA's data sheet of the H100 SXM, without sparsity: products in TF32 and in bf16 per second, bytes per second.
TF32, BF16, MEMORY = 495e12, 989e12, 3.35e12


class Case:
    """A trainer, and calls that make the targets of its batches."""

    def __init__(self, config: TrainConfig, images: Images) -> None:
        self.config = config
        plain = dataclasses.replace(config, target="data")
        device = config.torch_device()
        self.trainer = training_loop._Trainer(
            plain, training_loop.objective_of(plain), None, device, Ranks(), images
        )  # fmt: skip
        self.trainer.open_log()
        self.trainer.since = self.trainer.resumed = time.monotonic()
        self.classes = images.classes
        self.drawn = 0

    def criterion(self) -> vadiff.DiffusionLoss:
        """One whose targets have not been called: all draws are replaced."""
        criterion = vadiff.DiffusionLoss("constant")
        criterion.target = posterior_targets(self.config, self.trainer.batches, self.classes)
        return criterion

    def batch(self) -> Batch:
        """The next one."""
        self.drawn += 1
        return self.trainer.batches.at(self.drawn)[0]

    def call(self, criterion: vadiff.DiffusionLoss, batch: Batch) -> Tensor:
        return moved(criterion, batch, self.trainer.batches.streams.generators[REFERENCES])[0]


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measured(case: Case, rounds: int) -> dict[str, float]:
    """Median seconds of a step, shares of it, and the share of the draws that are replaced once J*_M is known."""
    known = case.criterion()
    for _ in range(KNOWN_AFTER):
        case.call(known, case.batch())
    step = loop_steps(case.trainer, 1)
    step()
    times: dict[str, list[float]] = {"step": [], "all": [], "known": []}
    replaced = []
    for _ in range(rounds):
        batch, fresh = case.batch(), case.criterion()
        times["step"].append(seconds(step))
        times["all"].append(seconds(partial(case.call, fresh, batch)))
        times["known"].append(seconds(partial(case.call, known, batch)))
        replaced.append(float((case.call(known, batch) != batch.x0).flatten(1).any(1).float().mean()))
    shares = {
        f"share, {name}": statistics.median(a / b for a, b in zip(times[name], times["step"], strict=True))
        for name in ("all", "known")
    }
    medians = {f"seconds, {name}": statistics.median(values) for name, values in times.items()}
    return {**medians, **shares, "draws replaced": statistics.mean(replaced)}


def part_of(operation: str, shapes: Sequence[Sequence[int]], batch: int, sizes: Sequence[int]) -> str:
    """Which of PARTS an operation belongs to, by its name and its largest input."""
    if operation in PRODUCTS:
        return PARTS[0]
    shape = max((tuple(shape) for shape in shapes if shape), key=_elements, default=())
    if len(shape) == 2 and shape in {pair for size in sizes for pair in ((batch, size), (size, batch))}:
        return PARTS[1]
    return PARTS[2] if shape and shape[0] != batch else PARTS[3]


def _elements(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def profile(case: Case, references: int) -> dict[str, float]:
    """Share of each of PARTS in the time of a call that replaces all draws."""
    batch_size = case.config.batch_size
    sizes = (references - batch_size, batch_size)
    batches = [(case.criterion(), case.batch()) for _ in range(PROFILED)]
    case.call(*batches[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as found:
        for criterion, batch in batches[1:]:
            case.call(criterion, batch)
    spent: Counter[str] = Counter()
    for event in found.key_averages(group_by_input_shape=True):
        shapes = [shape for shape in event.input_shapes if shape and isinstance(shape[0], int)]
        spent[part_of(event.key.removeprefix("aten::"), shapes, batch_size, sizes)] += event.self_cpu_time_total
    total = sum(spent.values())
    return {part: spent[part] / total for part in PARTS}


class Traffic(TorchDispatchMode):
    """Counts operations that a GPU would run as kernels, and the bytes that they read and write."""

    def __init__(self, batch: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.batch, self.sizes = batch, sizes
        self.bytes: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten._unsafe_view):
            return out
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        operation = func.overloadpacket.__name__
        if operation.startswith("index"):  # reads what is chosen, not the whole data set
            read = written
        part = part_of(operation, [leaf.shape for leaf in (*read, *written)], self.batch, self.sizes)
        self.kernels[part] += 1
        self.bytes[part] += sum(leaf.numel() * leaf.element_size() for leaf in (*read, *written))
        return out


def arithmetic(case: Case, references: int) -> dict[str, Any]:
    """What a GPU does in a call: the operations of one on the CPU that replaces all draws, which are the same."""
    size = case.config.batch_size
    criterion, batch = case.criterion(), case.batch()
    with Traffic(size, (references - size, size)) as traffic, FlopCounterMode(display=False) as counter:
        case.call(criterion, batch)
    network = flops_per_image(case.trainer) * size
    moved_bytes, flops = sum(traffic.bytes.values()), counter.get_total_flops()
    return {
        "flops of the call": flops,
        "flops of the network": network,
        "share of flops": flops / network,
        "bytes": moved_bytes,
        "bytes by part": dict(traffic.bytes),
        "kernels": sum(traffic.kernels.values()),
        "kernels by part": dict(traffic.kernels),
        "microseconds, call": 1e6 * (flops / TF32 + moved_bytes / MEMORY),
        "microseconds, softmax": 1e6 * traffic.bytes[PARTS[1]] / MEMORY,
        "microseconds, network": 1e6 * network / BF16,
    }


def tables(found: dict[str, Any]) -> str:
    """As Markdown."""
    lines = ["| noise levels | a step | draws replaced | call | share of the step |", "| --- | --- | --- | --- | --- |"]
    for name, case in found["measured"].items():
        for kind, replaced in (("all", 1.0), ("known", case["draws replaced"])):
            lines.append(
                f"| {name} | {case['seconds, step']:.2f} s | {100 * replaced:.0f} % | "
                f"{1e3 * case[f'seconds, {kind}']:.1f} ms | {100 * case[f'share, {kind}']:.2f} % |"
            )
    gpu = found["arithmetic"]
    lines += ["", "| part | share of the call's time, CPU | bytes, GPU | kernels, GPU |", "| --- | --- | --- | --- |"]
    for part in PARTS:
        lines.append(
            f"| {part} | {100 * found['profile'][part]:.0f} % | {gpu['bytes by part'].get(part, 0) / 1e6:.1f} MB | "
            f"{gpu['kernels by part'].get(part, 0)} |"
        )
    lines += [
        "",
        f"Arithmetic for a GPU: {gpu['flops of the call'] / 1e9:.2f} Gflop of products beside "
        f"{gpu['flops of the network'] / 1e9:,.0f} of the network: {100 * gpu['share of flops']:.2f} %. At the rates "
        f"of the H100's data sheet {gpu['microseconds, call']:.0f} µs, of which "
        f"{gpu['microseconds, softmax']:.0f} µs are the softmax's reads and writes, beside "
        f"{gpu['microseconds, network']:,.0f} µs of the network's products in bf16.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="folder with CIFAR-10, as for `vadiff train --data`")
    parser.add_argument("--references", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=PRESETS[PRESET].batch_size)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="file for the results (benchmarks/results/target_cost.json)")
    arguments = parser.parse_args()
    images, references = cifar.load("cifar10", arguments.cifar), arguments.references
    base = dataclasses.replace(
        PRESETS[PRESET], device="cpu", precision="fp32", tensorboard=False, batch_size=arguments.batch_size,
        target="posterior_mean", reference=references,
    )  # fmt: skip
    found: dict[str, Any] = {
        "preset": PRESET, "batch_size": base.batch_size, "references": references, "measured": {}
    }  # fmt: skip
    with settings_of(base):
        for name, fields in LEVELS.items():
            case = Case(dataclasses.replace(base, **fields), images)
            found["measured"][name] = measured(case, arguments.rounds)
            print(name, found["measured"][name], flush=True)
        found["profile"] = profile(case, references)
        found["arithmetic"] = arithmetic(case, references)
    path = write_results("target_cost", found, arguments.out)
    path.with_suffix(".md").write_text(tables(found) + "\n")
    print(tables(found), path, sep="\n")


if __name__ == "__main__":
    main()

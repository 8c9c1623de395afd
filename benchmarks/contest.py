"""One contest: buffers, check, timing, and the outcome of each provider."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import machine
import measure
import torch
from cases import DTYPES, MODES, Contest, Mode, bytes_of, input_bytes_of, shape_of
from checks import LOSS_SCALE, STEPS, WrongResultError, check, check_moments, check_step, truth
from measure import Effort, Ratio, Run, Times
from measurements import Measurement, NotMeasured
from providers import PROVIDERS, Batch, Loss, describe_error, obstacle

_MOST_SETS = 512
_MOST_GRAPHS = 12  # each capture costs a tenth of a second
_WARM_UPS = 2  # calls before capture
_QUICK_BYTES = 2**26


def make_batches(contest: Contest, device: torch.device, sets: int) -> list[Batch]:
    """Sets of buffers with the same elements at different addresses, and different log-SNR.

    The prediction's error differs between samples by a factor of ten, so that the statistics differ between bins.
    Target and noise are multiples of 1/64 below 1: their difference, which some providers compute first, is exact in
    bfloat16 too."""
    mode, dtype = MODES[contest.mode], DTYPES[contest.dtype]
    shape = shape_of(contest.case, contest.dtype, device.type)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype, generator=generator)

    size_of_error = torch.linspace(-1.15, 1.15, shape[0], device=device).exp().view(-1, *[1] * (len(shape) - 1))
    prediction = normal(*shape, dtype=dtype).mul_(size_of_error)
    target = normal(*shape, dtype=dtype).mul_(8).round_().div_(64)
    noise = normal(*shape, dtype=dtype).mul_(8).round_().div_(64) if mode.noise else None
    return [
        Batch(
            prediction.clone().requires_grad_(mode.backward),
            target.clone(),
            4 * normal(shape[0], dtype=torch.float32),
            None if noise is None else noise.clone(),
        )
        for _ in range(sets)
    ]


def sets_for(contest: Contest, device: torch.device, rotated_bytes: int) -> int:
    """Number of sets of inputs that fill `rotated_bytes`; at least two if there is memory for them."""
    size = input_bytes_of(contest, device.type)
    most = _MOST_GRAPHS if MODES[contest.mode].graph else _MOST_SETS
    return min(max(-(-rotated_bytes // size), 2), most)


def hold(
    contest: Contest, names: Iterable[str], device: torch.device, copy: Callable[[], float], *, quick: bool
) -> list[Measurement | NotMeasured]:
    """Check the providers and time the correct ones in turns. `copy` measures the copy bandwidth, in bytes/s."""
    torch.compiler.reset()  # else shapes of earlier contests count towards the recompilation limit
    rotated = _QUICK_BYTES if quick else machine.rotated_bytes(device)
    batches = make_batches(contest, device, sets_for(contest, device, rotated))
    losses, unusable = make_losses(contest, names, device)
    outcomes: list[Measurement | NotMeasured] = [*unusable]
    outcomes += refuse_wrong(contest, MODES[contest.mode], losses, batches)
    runs: dict[str, Run] = {}
    for name, loss in losses.items():
        try:
            runs[name] = make_run(contest, loss, batches)
            runs[name]()
        except WrongResultError as error:  # from a graph's replay
            outcomes.append(NotMeasured(*contest, name, "wrong", str(error)))
        except Exception as error:  # the other providers go on
            runs.pop(name, None)
            outcomes.append(NotMeasured(*contest, name, "failed", describe_error(error)))
    return outcomes + timed(contest, runs, device, copy(), sets=len(batches), effort=Effort.of(device, quick))


def make_losses(
    contest: Contest, names: Iterable[str], device: torch.device
) -> tuple[dict[str, Loss], list[NotMeasured]]:
    """A new loss of each provider that can run here, and the reasons why the others cannot."""
    losses, unusable = {}, []
    for name in names:
        reason = obstacle(name, device.type)
        if reason is None:
            losses[name] = PROVIDERS[name].make(device)
        else:
            unusable.append(NotMeasured(*contest, name, "not usable", reason))
    return losses, unusable


def refuse_wrong(contest: Contest, mode: Mode, losses: dict[str, Loss], batches: Sequence[Batch]) -> list[NotMeasured]:
    """Remove the losses with wrong results from `losses`, and return the reasons."""
    if not losses:
        return []
    weighted = truth(batches, backward=mode.backward)
    plain = truth(batches, backward=mode.backward, weighting="constant")
    refused = []
    for name, loss in list(losses.items()):
        # A loss may keep no statistics, and then has no weights: F.mse_loss.
        expected = plain if loss.moments() is None else weighted
        try:
            check(loss, batches, expected, deferred=mode.deferred)
        except WrongResultError as error:
            refused.append(NotMeasured(*contest, name, "wrong", str(error)))
            del losses[name]
        except Exception as error:  # out of memory, a compiler that fails on this shape
            refused.append(NotMeasured(*contest, name, "failed", describe_error(error)))
            del losses[name]
    return refused


def make_run(contest: Contest, loss: Loss, batches: Sequence[Batch]) -> Run:
    """A function that calls a loss, which has passed `check`, on the next set of buffers.

    Raises:
        WrongResultError: the results of a CUDA graph differ from those of the captured calls.
    """
    mode = MODES[contest.mode]
    upstream = torch.tensor(LOSS_SCALE[batches[0].prediction.dtype], device=batches[0].prediction.device)

    def step(batch: Batch) -> tuple[torch.Tensor, ...]:
        found = loss(batch, mode.deferred)
        if not mode.backward:
            return (found,)
        return found.detach(), *torch.autograd.grad(found, batch.prediction, upstream)

    if not mode.graph:
        rotation = itertools.cycle(batches)
        return lambda: step(next(rotation))

    first = STEPS % len(batches)  # continue after `check`
    rotated = [*batches[first:], *batches[:first]]
    warm_ups = list(itertools.islice(itertools.cycle(rotated), _WARM_UPS))
    _on_side_stream(lambda: [step(batch) for batch in warm_ups])
    captured = [_capture(lambda batch=batch: step(batch)) for batch in batches]  # type: ignore[misc]
    _check_replay(loss, batches, captured)
    replays = itertools.cycle(captured)
    return lambda: next(replays).replay()


class Captured(NamedTuple):
    """A CUDA graph of one call, and its results, so that the next graph does not write to their memory."""

    replay: Run
    results: tuple[torch.Tensor, ...]


def _on_side_stream(run: Run) -> None:
    """Warm up on a side stream, as CUDA graph capture requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)


def _capture(step: Callable[[], tuple[torch.Tensor, ...]]) -> Captured:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return Captured(graph.replay, results)


def _check_replay(loss: Loss, batches: Sequence[Batch], captured: Sequence[Captured]) -> None:
    """Replay each graph once, in the order after the warm-up, and compare all results with the truth."""
    first = STEPS + _WARM_UPS
    weighting = "constant" if loss.moments() is None else "variance_aware"
    expected = truth(batches, backward=True, weighting=weighting, steps=first + len(captured))
    try:
        for step in range(first, first + len(captured)):
            replay, results = captured[step % len(captured)]
            with torch.no_grad():
                for result in results:
                    result.fill_(float("nan"))  # a graph that writes nothing must not pass with old values
            replay()
            check_step(results, batches[step % len(captured)], expected, step)
        check_moments(loss, expected)
    except WrongResultError as error:
        raise WrongResultError(f"CUDA graph replay: {error}") from error


def timed(
    contest: Contest, runs: dict[str, Run], device: torch.device, copy: float, *, sets: int, effort: Effort
) -> list[Measurement]:
    """Time the providers, and count launches and bytes."""
    shape, size = shape_of(contest.case, contest.dtype, device.type), bytes_of(contest, device.type)
    allocates = device.type == "cuda" and not MODES[contest.mode].graph  # a replay allocates nothing
    found = []
    times = measure.race(runs, device, effort) if runs else {}
    ratios = speed_ratios(times)
    for name, measured in times.items():
        measurement = Measurement.of(
            contest, name, shape, measured, bytes=size, sets=sets, times_as_fast_as=ratios[name]
        )
        measurement.share_of_copy = (measurement.bandwidth or 0.0) / copy
        measurement.cached = sets * input_bytes_of(contest, device.type) <= machine.last_level_cache(device)
        measurement.peak_bytes = measure.peak_bytes_of(runs[name]) if allocates else None
        found.append(measurement)
    return found


def speed_ratios(times: dict[str, Times]) -> dict[str, dict[str, Ratio]]:
    """How many times as fast each function is as each other one, by wall time in paired rounds."""
    return {
        name: {other: measure.ratio(theirs.wall, mine.wall) for other, theirs in times.items() if other != name}
        for name, mine in times.items()
    }

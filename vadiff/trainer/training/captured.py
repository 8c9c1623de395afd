"""The device's part of a training step in a CUDA graph: captured once, then replayed by one call of the host.

A training step of a small network is bound by the host, which launches some hundred kernels one by one. A replay
launches all of them at once, on the memory that they had in the capture. What the host decides for a step (seeds,
images, learning rate) is therefore written to the device before it. Random numbers come from generators that the graph
knows: a replay draws what their seeds say.
"""

import sys
import warnings
from collections.abc import Callable, Sequence

import torch

from ...errors import TrainingError
from ..config import TrainConfig

Work = Callable[[], None]
WARM_UP = 3  # steps before the capture: optimiser state is made, kernels are compiled and chosen
WAIT_WARNING = "called a synchronizing CUDA operation"  # as torch words it


def why_not_captured(config: TrainConfig, device: torch.device, ranks: int) -> str | None:
    """Why the steps of a run are not captured; None if they are."""
    if device.type != "cuda":
        return f"the device is {device}, and only CUDA devices have graphs"
    if ranks > 1:
        return f"{ranks} processes train together, and a graph cannot hold their communication"
    if config.precision == "fp16":
        return "precision is fp16, whose gradient scaler decides on the host; bf16 can be captured"
    if config.dropout and config.accumulate > 1:
        return f"dropout is seeded by the host for each of {config.accumulate} parts of a batch"
    if config.dropout and config.gradient_checkpointing:
        return "gradient checkpointing has the host save and restore the state of dropout's random numbers"
    return None


def tell_why_not(reason: str) -> None:
    print(f"The steps are not captured in a CUDA graph: {reason}.", file=sys.stderr)


class CapturedStep:
    """Runs the work of a step at first, then captures it, then replays it. Every call is one execution.

    The last run before the capture is watched. If it waits for the device, as with an objective that reads a number,
    the steps go on without a graph. That must be known before: a capture that fails leaves random generators that
    cannot draw any more.

    Args:
        device: on which the work is done.
        generators: from which it draws, seeded before each call.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators
        self._aside = on_stream_of(device)
        self._calls = 0
        self._wait: str | None = None
        self._replay: Work | None = None

    def __call__(self, work: Work) -> None:
        """Do `work`, the same function at each call, whose arguments do not change from step to step.

        Raises:
            TrainingError: it waits for nothing, but cannot be captured.
        """
        if self._replay is None and self._calls == WARM_UP and self._wait is None:
            self._replay = self._captured(work)
        if self._replay is not None:
            self._replay()
            return
        self._calls += 1
        self._aside((lambda: self._watch(work)) if self._calls == WARM_UP else work)

    def _watch(self, work: Work) -> None:
        self._wait = first_wait(work)
        if self._wait is not None:
            tell_why_not(f"a step waits for the device, at {self._wait}")

    def _captured(self, work: Work) -> Work:
        try:
            return capture(work, self._aside, self._generators)
        except RuntimeError as error:
            cause = error.__context__ or error  # ending a broken capture raises an error that hides its cause
            raise TrainingError(
                f"the training step could not be captured in a CUDA graph: {cause}. Train with --no-graph"
            ) from error


def first_wait(work: Work) -> str | None:
    """Do `work`; returns where the host first waited for the device: the file and line. None if it did not."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        warnings.filterwarnings("always", f".*{WAIT_WARNING}")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [warning for warning in caught if WAIT_WARNING in str(warning.message)]
    for warning in caught:
        if warning not in waits:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return f"{waits[0].filename}, line {waits[0].lineno}" if waits else None


def on_stream_of(device: torch.device) -> Callable[[Work], None]:
    """A function that runs work on a stream of its own, as a capture needs.

    The steps before the capture run there too: autograd remembers the stream of a parameter's gradient, and cuBLAS and
    cuDNN keep a workspace for each stream.
    """
    stream = torch.cuda.Stream(device)

    def run(work: Work) -> None:
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # makes its device the current one too
            work()
        current.wait_stream(stream)

    return run


def capture(work: Work, aside: Callable[[Work], None], generators: Sequence[torch.Generator]) -> Work:
    """Record the kernels of `work` without running them; the result runs them."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)

    def record() -> None:
        # Other threads (loggers, say) may go on using the device.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            work()

    aside(record)
    return graph.replay

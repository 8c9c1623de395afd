"""The device's part of a training step in a CUDA graph: captured once, then replayed by one call of the host.

A training step of a small network is bound by the host, which launches some hundred kernels one by one. A replay
launches all of them at once, on the memory that they had in the capture. What the host decides for a step (seeds,
images, learning rate) is therefore written to the device before it. Random numbers come from generators that the graph
knows: a replay draws what their seeds say.
"""

from collections.abc import Callable, Sequence

import torch

from ...errors import TrainingError
from ..config import TrainConfig

Work = Callable[[], None]
WARM_UP = 3  # steps before the capture: optimiser state is made, kernels are compiled and chosen


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
    return None


class CapturedStep:
    """Runs `work` at first, then captures it, then replays it. Every call is one execution.

    Args:
        work: reads no number on the host, and calls no function whose arguments change from step to step.
        device: on which it works.
        generators: from which it draws, seeded before each call.

    Raises:
        TrainingError: `work` cannot be captured.
    """

    def __init__(self, work: Work, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self._work, self._generators = work, generators
        self._aside = on_stream_of(device)
        self._calls = 0
        self._replay: Work | None = None

    def __call__(self) -> None:
        if self._replay is None and self._calls == WARM_UP:
            try:
                self._replay = capture(self._work, self._aside, self._generators)
            except RuntimeError as error:
                raise TrainingError(
                    f"the training step could not be captured in a CUDA graph: {error}. Train with --no-graph"
                ) from error
        if self._replay is not None:
            self._replay()
        else:
            self._calls += 1
            self._aside(self._work)


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

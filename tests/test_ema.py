"""vadiff.ema: the profile of an average, what it costs to store, and averages of other widths made afterwards."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vadiff import ema
from vadiff.ema import PowerFunctionEMA, reconstruct
from vadiff.errors import CheckpointError, RunError

IRREGULAR = (1, 2, 3, 7, 8, 20, 21.5, 60, 100)


class Scalar(nn.Module):
    """One float64 weight, and a buffer."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(0))


def profile_of(times: Sequence[float], sigma_rel: float) -> Tensor:
    """How much each update counts in the final average: the average of weights that are one-hot in time. [n]."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(len(times), dtype=torch.float64))
    averages = PowerFunctionEMA(module, [sigma_rel])
    for place, time in enumerate(times):
        module.weight.data = torch.zeros_like(module.weight)
        module.weight.data[place] = 1.0
        averages.update(time)
    return averages.module_state(sigma_rel)["weight"]


def trained(folder: Path, updates: int, every: int, precision: str = "fp32", sigma_rel: Sequence[float] = (0.05, 0.1)):
    """A module whose weight wanders, with snapshots; returns its weights over time, [updates] float64."""
    module = Scalar()
    averages = PowerFunctionEMA(module, sigma_rel)
    path = torch.randn(updates, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(0)
    for time, value in enumerate(path, start=1):
        module.weight.data.copy_(value)
        module.steps += 1
        averages.update(time)
        if time % every == 0:
            averages.save(folder, precision)
    return path


def direct_average(path: Tensor, sigma_rel: float) -> float:
    """∫ p(τ) θ(τ) dτ of weights that are constant between steps."""
    exponent = ema.gamma_from_sigma_rel(sigma_rel) + 1
    edges = (torch.arange(len(path) + 1, dtype=torch.float64) / len(path)) ** exponent
    return float(edges.diff() @ path)


@pytest.mark.parametrize(
    ("sigma_rel", "gamma"), [(0.05, 16.972), (0.10, 6.937), (0.15, 3.558), (0.20, 1.826), (0.25, 0.720)]
)
def test_exponents_are_those_of_the_paper(sigma_rel: float, gamma: float) -> None:
    assert ema.gamma_from_sigma_rel(sigma_rel) == pytest.approx(gamma, abs=6e-4)


def test_exponent_and_width_are_inverse_to_each_other() -> None:
    for sigma_rel in (1e-3, 0.01, 0.05, 0.1, 0.2, 0.28, 0.2886):
        assert ema.sigma_rel_from_gamma(ema.gamma_from_sigma_rel(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)


def test_width_is_the_standard_deviation_of_the_profile() -> None:
    times = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    for sigma_rel in (0.05, 0.2):
        gamma = ema.gamma_from_sigma_rel(sigma_rel)
        density = (gamma + 1) * times**gamma
        mean = torch.trapezoid(density * times, times)
        variance = torch.trapezoid(density * (times - mean) ** 2, times)
        assert variance.sqrt().item() == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 0.3, math.nan])
def test_width_out_of_range_is_refused(sigma_rel: float, tmp_path: Path) -> None:
    message = "expected above 0 and below 12"
    with pytest.raises(ValueError, match=message):
        ema.gamma_from_sigma_rel(sigma_rel)
    with pytest.raises(ValueError, match=message):
        PowerFunctionEMA(Scalar(), [sigma_rel])
    trained(tmp_path, updates=4, every=2)
    with pytest.raises(ValueError, match=message):
        reconstruct(tmp_path, [0.1, sigma_rel])


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10, 0.25])
@pytest.mark.parametrize("times", [range(1, 101), range(10, 101, 10), IRREGULAR], ids=["each", "tenth", "irregular"])
def test_profile_is_the_power_function_for_any_interval(times: Sequence[float], sigma_rel: float) -> None:
    """Each update counts as much as the power function's integral since the one before."""
    exponent = ema.gamma_from_sigma_rel(sigma_rel) + 1
    expected = [(b / times[-1]) ** exponent - (a / times[-1]) ** exponent for a, b in pairwise((0.0, *times))]
    assert profile_of(times, sigma_rel).tolist() == pytest.approx(expected, abs=1e-13)


def test_decay_of_the_first_update_forgets_what_was_there() -> None:
    assert ema.decay(6.937, 12.0, 12.0) == 0.0
    assert ema.decay(6.937, 12.0, 3.0) == pytest.approx(0.75**7.937)
    with pytest.raises(ValueError, match="expected 0 < delta <= time"):
        ema.decay(6.937, 3.0, 4.0)


@pytest.mark.parametrize(
    ("snapshots", "sigma_rel", "error"),
    [
        (8, 0.015, 0.365), (8, 0.03, 0.101), (8, 0.15, 0.033), (8, 0.25, 0.182),
        (32, 0.015, 0.080), (32, 0.03, 0.011), (32, 0.15, 0.0023), (32, 0.25, 0.034),
        (64, 0.015, 0.023), (64, 0.03, 0.0029), (64, 0.15, 0.0006), (64, 0.25, 0.015),
        (256, 0.015, 0.0015), (256, 0.03, 0.0002), (256, 0.15, 0.00004), (256, 0.25, 0.0027),
    ],
)  # fmt: skip
def test_error_of_the_reconstructed_profile(snapshots: int, sigma_rel: float, error: float) -> None:
    """Relative L2 error, by quadrature, of n even snapshots × {0.05, 0.10}: the figures of a float64 calculation."""
    gammas = [ema.gamma_from_sigma_rel(width) for width in (0.05, 0.10)] * snapshots
    times = [(1 + place // 2) / snapshots for place in range(2 * snapshots)]
    target = ema.gamma_from_sigma_rel(sigma_rel)
    mix = ema.reconstruction_coefficients(times, gammas, 1.0, target)
    assert mix.sum().item() == pytest.approx(1.0, abs=1e-12)
    grid = (torch.arange(2**14, dtype=torch.float64) + 0.5) / 2**14
    profile = torch.zeros_like(grid)
    for x, time, gamma in zip(mix, times, gammas, strict=True):
        profile += x * torch.where(grid <= time, (gamma + 1) * grid**gamma / time ** (gamma + 1), 0.0)
    wanted = (target + 1) * grid**target
    found = ((profile - wanted).square().mean() / wanted.square().mean()).sqrt().item()
    assert found == pytest.approx(error, rel=0.25 if error < 1e-3 else 0.06)


def test_stored_width_is_reconstructed_as_it_is() -> None:
    times, gammas = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0], [16.97, 6.94] * 3
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    mix = ema.reconstruction_coefficients(times, gammas, 3.0, 6.94)
    assert mix.dtype == torch.float64
    assert torch.allclose(mix, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("times", "gammas", "message"),
    [
        ([1.0], [7.0, 8.0], "times has 1 values and gammas 2"),
        ([], [], "expected equally many, at least one"),
        ([1.0, 4.0], [7.0, 7.0], "leave out what was stored later"),
        ([1.0, 1.0], [7.0, 7.0], "the same time and gamma occur twice"),
        ([1.0], [-1.0], "gamma is -1.0, expected at least 0"),
    ],
)
def test_coefficients_name_what_does_not_fit(times: list[float], gammas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ema.reconstruction_coefficients(times, gammas, 3.0, 5.0)


def test_reconstructed_weights_are_those_a_direct_average_has(tmp_path: Path) -> None:
    path = trained(tmp_path, updates=640, every=10)
    spread = path.std().item()
    for sigma_rel, state in reconstruct(tmp_path, [0.03, 0.05, 0.08, 0.15]).items():
        assert state["weight"].item() == pytest.approx(direct_average(path, sigma_rel), abs=2e-3 * spread)
    middle = reconstruct(tmp_path, [0.12], time=320)[0.12]
    assert middle["weight"].item() == pytest.approx(direct_average(path[:320], 0.12), abs=2e-3 * spread)
    assert middle["steps"] == 320


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("fp16", 3e-3), ("bf16", 3e-2)])
def test_precision_of_a_snapshot_bounds_the_error(tmp_path: Path, precision: str, bound: float) -> None:
    path = trained(tmp_path, updates=64, every=8, precision=precision)
    stored = torch.load(tmp_path / "64.pt", weights_only=True)["parameters"][0]["weight"]
    assert stored.dtype == {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert reconstruct(tmp_path, [0.05])[0.05]["weight"].item() == pytest.approx(direct_average(path, 0.05), rel=bound)


def test_reconstruction_loads_into_a_module_with_shared_weights_and_buffers(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).bfloat16()
    network[2].weight = network[0].weight  # shared
    averages = PowerFunctionEMA(network)
    for step in range(1, 5):
        for parameter in network.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        network[1].num_batches_tracked.add_(1)
        averages.update(step)
    averages.save(tmp_path, "fp32")
    state = reconstruct(tmp_path, [0.1])[0.1]
    assert state["0.weight"].dtype == torch.float32  # averages are not rounded to the module's bfloat16
    assert torch.allclose(state["2.weight"], averages.module_state(0.1)["2.weight"], atol=1e-6)
    assert state["1.num_batches_tracked"] == 4
    network.load_state_dict(state)
    assert network[0].weight is network[2].weight


def test_update_leaves_the_module_alone_and_is_one_operation_for_each_width() -> None:
    network = nn.Sequential(*(nn.Linear(3, 3) for _ in range(10)))
    before = copy.deepcopy(network.state_dict())
    averages = PowerFunctionEMA(network)
    with torch.profiler.profile() as profile:
        averages.update(1)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_foreach_lerp_"] == 2
    assert "aten::item" not in calls
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("time", [1.0, 0.5, math.nan, math.inf])
def test_update_has_to_be_later_than_the_last(time: float) -> None:
    averages = PowerFunctionEMA(Scalar())
    averages.update(1.0)
    with pytest.raises(ValueError, match="expected later than the last update's 1"):
        averages.update(time)


def test_resumed_averages_are_as_never_stopped(tmp_path: Path) -> None:
    module = Scalar()
    whole = PowerFunctionEMA(module)
    for time in (1, 2, 5):
        module.weight.data.fill_(math.sin(time))
        whole.update(time)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed = PowerFunctionEMA(module)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for averages in (whole, resumed):
        module.weight.data.fill_(3.0)
        averages.update(7)
    assert resumed.run == whole.run
    for width in whole.sigma_rel:
        assert torch.equal(whole.module_state(width)["weight"], resumed.module_state(width)["weight"])


def test_state_of_other_averages_is_refused_and_changes_nothing() -> None:
    averages = PowerFunctionEMA(nn.Linear(2, 2))
    before = copy.deepcopy(averages.state_dict())
    with pytest.raises(ValueError, match=r"the state was saved with \(0\.1,\)"):
        averages.load_state_dict(PowerFunctionEMA(nn.Linear(2, 2), [0.1]).state_dict())
    with pytest.raises(ValueError, match="a module with other parameters"):
        averages.load_state_dict(PowerFunctionEMA(nn.Linear(2, 3)).state_dict())
    assert all(
        torch.equal(before["averages"][0][n], value) for n, value in averages.state_dict()["averages"][0].items()
    )
    with pytest.raises(ValueError, match=r"expected one of 0\.05, 0\.1"):
        averages.module_state(0.2)
    with pytest.raises(ValueError, match="expected at least one width, each once"):
        PowerFunctionEMA(nn.Linear(2, 2), [0.1, 0.1])


def test_snapshots_of_another_run_or_network_are_refused(tmp_path: Path) -> None:
    trained(tmp_path / "mine", updates=4, every=2)
    trained(tmp_path / "other", updates=6, every=6)
    (tmp_path / "other" / "6.pt").rename(tmp_path / "mine" / "6.pt")
    with pytest.raises(RunError, match=r"2\.pt and .*6\.pt are of different runs"):
        reconstruct(tmp_path / "mine", [0.1])
    assert reconstruct(tmp_path / "mine", [0.1], time=4).keys() == {0.1}
    wider = PowerFunctionEMA(nn.Linear(2, 2))
    wider.run = torch.load(tmp_path / "mine" / "2.pt", weights_only=True)["run"]
    wider.update(6)
    wider.save(tmp_path / "mine")
    with pytest.raises(RunError, match="networks with different parameters"):
        reconstruct(tmp_path / "mine", [0.1])


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no snapshots"):
        reconstruct(tmp_path / "nowhere", [0.1])
    trained(tmp_path, updates=4, every=2)
    with pytest.raises(CheckpointError, match="has no snapshot of time 3, only of 2, 4"):
        reconstruct(tmp_path, [0.1], time=3)
    with pytest.raises(ValueError, match="sigma_rel is empty"):
        reconstruct(tmp_path, [])


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    averages = PowerFunctionEMA(nn.Linear(100, 100))
    averages.update(1)
    path = averages.save(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1  # in the first average; the middle is padding
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"1\.pt is corrupt: the checksum of .* is wrong"):
        reconstruct(tmp_path, [0.1])
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"1\.pt is corrupt.*Remove .*1\.pt"):
        reconstruct(tmp_path, [0.1])


def test_values_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    module.weight.data.fill_(1e5)
    averages = PowerFunctionEMA(module)
    with pytest.raises(ValueError, match="there was no update yet"):
        averages.save(tmp_path)
    averages.update(1)
    with pytest.raises(ValueError, match=r"weight does not fit into torch\.float16: its largest value is 1e\+05"):
        averages.save(tmp_path)
    with pytest.raises(ValueError, match="precision is 'fp8', expected one of fp16, bf16, fp32"):
        averages.save(tmp_path, "fp8")
    assert not list(tmp_path.iterdir())
    averages.save(tmp_path, "bf16")
    assert ema.times_saved(tmp_path) == [1.0]


def test_later_snapshots_are_removed_and_nothing_else(tmp_path: Path) -> None:
    trained(tmp_path, updates=6, every=2)
    (tmp_path / "notes.pt").write_text("mine")
    ema.remove_after(tmp_path, 2)
    assert ema.times_saved(tmp_path) == [2.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.pt", "notes.pt"]


def test_failing_write_leaves_what_was_there_and_says_so(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    averages = PowerFunctionEMA(nn.Linear(100, 100))
    averages.update(1)
    averages.save(tmp_path)
    averages.update(2)
    request.getfixturevalue("small_disk")
    with pytest.raises(CheckpointError, match=r"2\.pt could not be written: the file is larger"):
        averages.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["1.pt"]


KILLED_WHILE_SAVING = """
import json, os, signal, sys
import torch
from vadiff.ema import PowerFunctionEMA, reconstruct, times_saved

folder = sys.argv[1]
averages = PowerFunctionEMA(torch.nn.Linear(3, 3))
averages.update(1)
averages.save(folder)
point, ended = 0, False
while not ended:
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event, arguments):
            global seen
            if event.startswith(("open", "os.")):
                seen += 1
                if seen == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        def half(content, file):
            file.write(b"half of the data")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        if point == 0:
            torch.save = half
        else:
            sys.addaudithook(hook)
        averages.update(2)
        averages.save(folder)
        os._exit(0)
    ended = os.waitpid(child, 0)[1] == 0
    reconstruct(folder, [0.1])
    print(json.dumps([ended, times_saved(folder)]))
    point += 1
"""


def test_killed_at_any_point_of_saving_the_snapshots_are_sound(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=dict(os.environ))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) > 3
    assert lines[0] == [False, [1.0]]
    assert lines[-1] == [True, [1.0, 2.0]]
    assert all(times in ([1.0], [1.0, 2.0]) for _, times in lines)

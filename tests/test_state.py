"""State survives what people do to modules: casts, copies, pickling, checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch

import vadiff
from vadiff.errors import DiffusionLossWarning
from vadiff.weighting import LossLevel, MinSNR

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("count", "mean", "variance", "mass", "relative_std", "skipped")


def trained(make: Callable[..., torch.nn.Module], device: torch.device, seed: int = 0, **options: object):
    criterion = make(**options)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        feed(criterion, generator, device)
    return criterion


def feed(criterion: torch.nn.Module, generator: torch.Generator, device: torch.device) -> None:
    log_snr = 4 * torch.randn(40, generator=generator)
    losses = torch.exp(-0.4 * log_snr) * torch.rand(40, generator=generator)
    losses[7] = torch.nan
    criterion.reweight(losses.to(device), log_snr.to(device))


def state(criterion: torch.nn.Module) -> dict[str, torch.Tensor]:
    values = {name: getattr(criterion.statistics, name) for name in NAMES}
    return {**values, "weights": criterion.weights, "bin_centers": criterion.bin_centers}


def assert_same_bits(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> None:
    for name in x:
        assert x[name].dtype == y[name].dtype, name
        torch.testing.assert_close(x[name], y[name], rtol=0, atol=0, equal_nan=True, msg=name)


def assert_goes_on_alike(x: torch.nn.Module, y: torch.nn.Module, device: torch.device) -> None:
    """One more step moves both, to the same bits."""
    before = x.statistics.count
    for criterion in (x, y):
        feed(criterion, torch.Generator().manual_seed(9), device)
    assert not torch.equal(before, x.statistics.count)
    assert_same_bits(state(x), state(y))


CASTS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "half": lambda m: m.half(),
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to device and dtype": lambda m: m.to(next(m.buffers()).device, torch.float16),
}


@pytest.mark.parametrize("cast", list(CASTS))
def test_casting_the_module_does_not_cast_its_state(make_criterion, device, cast):
    criterion, untouched = trained(make_criterion, device), trained(make_criterion, device)
    whole = torch.nn.ModuleDict({"criterion": criterion, "model": torch.nn.Linear(2, 2).to(device)})
    CASTS[cast](whole)
    assert_same_bits(state(criterion), state(untouched))
    assert_goes_on_alike(criterion, untouched, device)


@pytest.mark.parametrize(
    ("way", "weighting"),
    [
        ("deepcopy", "variance_aware"),
        ("pickle", "variance_aware"),
        ("torch.save", "loss_level"),
        ("deepcopy", MinSNR()),
        ("pickle", "constant"),
    ],
)
def test_copies_are_whole_and_independent(make_criterion, device, way, weighting):
    criterion = trained(make_criterion, device, weighting=weighting)
    criterion(
        torch.ones(2, 3, device=device, requires_grad=True),
        torch.zeros(2, 3, device=device),
        torch.ones(2, device=device),
    )
    if way == "deepcopy":
        other = copy.deepcopy(criterion)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(criterion))
    else:
        file = io.BytesIO()
        torch.save(criterion, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    before = state(criterion)
    assert_same_bits(before, state(other))
    feed(other, torch.Generator().manual_seed(9), device)
    assert_same_bits(before, state(criterion))
    assert not torch.equal(state(other)["count"], before["count"])
    feed(criterion, torch.Generator().manual_seed(9), device)
    assert_same_bits(state(criterion), state(other))


def test_a_copy_taken_between_forward_and_backward_changes_neither(make_criterion, device):
    criterion = make_criterion()
    prediction = torch.randn(4, 5, device=device, requires_grad=True)
    loss = criterion(prediction, torch.zeros(4, 5, device=device), torch.zeros(4, device=device))
    other = copy.deepcopy(criterion)
    loss.backward()
    assert_same_bits(state(criterion), state(other))


@pytest.mark.parametrize("weighting", ["variance_aware", MinSNR()])
def test_state_dict_restores_every_bit(make_criterion, device, weighting):
    criterion, other = trained(make_criterion, device, weighting=weighting), make_criterion(weighting)
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_bits(state(criterion), state(other))
    assert_goes_on_alike(criterion, other, device)


def test_state_dict_is_a_snapshot_only_when_copied_and_holds_no_parameter(make_criterion, device):
    criterion = trained(make_criterion, device)
    assert list(criterion.parameters()) == []
    assert criterion.state_dict()
    saved = copy.deepcopy(criterion.state_dict())
    before = state(criterion)
    feed(criterion, torch.Generator().manual_seed(9), device)
    criterion.load_state_dict(saved)
    assert_same_bits(before, state(criterion))


def test_state_of_another_weighting_can_be_loaded_and_used(make_criterion, device):
    """Statistics are the same whatever the weighting: a run may switch."""
    criterion, other = trained(make_criterion, device), make_criterion(LossLevel())
    other.load_state_dict(criterion.state_dict())
    for name in NAMES:
        x, y = getattr(criterion.statistics, name), getattr(other.statistics, name)
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "message", "strict"),
    [
        ({"bins": 32}, r"(?s)bins.*16.*32|bins.*32.*16", True),
        ({"bins": 32}, r"(?s)bins.*16.*32|bins.*32.*16", False),
        ({"log_snr_range": (-10.0, 8.0)}, r"(?s)range.*-8.*-10|range.*-10.*-8", True),
        ({"log_snr_range": (-8.0, 9.0)}, r"(?s)range.*8.*9|range.*9.*8", False),
    ],
    ids=["bins", "bins, not strict", "low", "high"],
)
def test_state_of_other_bins_is_refused_and_nothing_is_half_written(make_criterion, device, options, message, strict):
    criterion, other = trained(make_criterion, device), trained(make_criterion, device, seed=1, **options)
    before = state(criterion)
    with pytest.raises((RuntimeError, ValueError), match=message):
        criterion.load_state_dict(other.state_dict(), strict=strict)
    assert_same_bits(before, state(criterion))


def test_criterion_inside_a_model_saves_and_loads_with_it(make_criterion, device):
    def model() -> torch.nn.Module:
        return torch.nn.ModuleDict({"net": torch.nn.Linear(2, 2), "criterion": make_criterion()}).to(device)

    first, second = model(), model()
    feed(first["criterion"], torch.Generator().manual_seed(0), device)
    second.load_state_dict(first.state_dict())
    assert_same_bits(state(first["criterion"]), state(second["criterion"]))


def test_averaged_copy_of_a_model_with_the_criterion_inside(make_criterion, device):
    """torch's own EMA deep-copies the module and leaves buffers alone."""
    model = torch.nn.ModuleDict({"net": torch.nn.Linear(2, 2), "criterion": make_criterion()}).to(device)
    feed(model["criterion"], torch.Generator().manual_seed(0), device)
    before = state(model["criterion"])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    assert_same_bits(before, state(averaged.module["criterion"]))
    assert_same_bits(before, state(model["criterion"]))


def test_repr_says_what_the_criterion_is(make_criterion):
    text = repr(make_criterion(bins=50))
    assert "VarianceAware" in text
    assert "50" in text


def test_state_that_was_cast_is_refused(make_criterion, device):
    criterion = trained(make_criterion, device)
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    cast = {name: value.half() for name, value in before.items()}
    with pytest.raises(RuntimeError, match=r"state has dtype torch.float16, expected torch.int64"):
        criterion.load_state_dict(cast)
    assert_same_bits(criterion.state_dict(), before)


def test_a_criterion_made_on_the_meta_device_loads_or_starts_afresh(make_criterion, device):
    saved = trained(make_criterion, device).state_dict()
    settings = {"bins": 16, "log_snr_range": (-8.0, 8.0)}
    with torch.device("meta"):
        loaded, fresh = vadiff.DiffusionLoss(**settings), vadiff.DiffusionLoss(**settings)
    loaded.load_state_dict(saved, assign=True)
    assert_same_bits(loaded.state_dict(), saved)
    fresh.to_empty(device=device)
    fresh.statistics.reset_parameters()
    assert_same_bits(fresh.state_dict(), make_criterion().state_dict())


def test_statistics_that_are_missing_or_do_not_fit_start_afresh_when_told_to() -> None:
    criterion, device = vadiff.DiffusionLoss, torch.device("cpu")
    net = torch.nn.Linear(1, 1)
    learned = criterion("learned")
    model = torch.nn.ModuleDict({"net": net, "criterion": learned})
    before = {f"net.{name}": value for name, value in net.state_dict().items()}  # of a run without vadiff
    with pytest.raises(
        RuntimeError, match=r"no statistics .*without vadiff.*make the criterion with fresh_statistics=T"
    ):
        model.load_state_dict(before)
    missing, unexpected = model.load_state_dict(before, strict=False)
    assert set(missing) == model.state_dict().keys() - before.keys()
    assert unexpected == []
    feed(learned, torch.Generator(), device)
    learned.fresh_statistics = True
    with pytest.warns(DiffusionLossWarning, match="the statistics start afresh: the saved state has no statistics"):
        model.load_state_dict(before)
    assert learned.statistics.count.sum() == 0
    other = trained(criterion, device, bins=64)
    with pytest.raises(RuntimeError, match=r"holds statistics of 64 bins.*fresh_statistics=True"):
        trained(criterion, device).load_state_dict(other.state_dict())
    switched = trained(criterion, device, fresh_statistics=True)
    with pytest.warns(DiffusionLossWarning, match="start afresh: statistics.state holds statistics of 64 bins"):
        switched.load_state_dict(other.state_dict())
    assert_same_bits(state(switched), state(criterion()))
    own = trained(criterion, device, seed=1)
    switched.load_state_dict(own.state_dict())  # no warning: what fits is loaded, so that the switch may stay
    assert_same_bits(state(switched), state(own))

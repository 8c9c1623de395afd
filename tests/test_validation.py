"""Every bad input is refused with an error that names the argument, what it got and what was expected."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import usable

import vadiff
from vadiff.weighting import LossLevel, MinSNR, VarianceAware

REFUSED = (ValueError, TypeError)


def arguments(device: torch.device) -> dict:
    """A batch of 4 that is in order."""
    return {
        "prediction": torch.randn(4, 3, 2, device=device, requires_grad=True),
        "target": torch.randn(4, 3, 2, device=device),
        "log_snr": torch.randn(4, device=device),
    }


def tensor(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False, device: str | None = None):
    return lambda home: torch.ones(shape, dtype=dtype, device=device or home, requires_grad=grad)


# name: (what is changed, what the message has to name, in this order)
BAD_CALLS: dict[str, tuple[dict, str]] = {
    "target of another shape": ({"target": tensor(4, 3, 1)}, r"target.*\(4, 3, 1\).*\(4, 3, 2\)"),
    "target of another batch": ({"target": tensor(3, 3, 2)}, r"target.*\(3, 3, 2\).*\(4, 3, 2\)"),
    "target of integers": ({"target": tensor(4, 3, 2, dtype=torch.int64)}, "target.*int64"),
    "target on another device": ({"target": tensor(4, 3, 2, device="meta")}, "target.*meta"),
    "target that requires grad": ({"target": tensor(4, 3, 2, grad=True)}, "target.*grad"),
    "target that is no tensor": ({"target": 0.0}, "target.*float"),
    "prediction of integers": ({"prediction": tensor(4, 3, 2, dtype=torch.int32)}, "prediction.*int32"),
    "prediction that is complex": (
        {"prediction": tensor(4, 3, 2, dtype=torch.complex64)},
        "prediction.*complex",
    ),
    "prediction without a batch": ({"prediction": tensor()}, r"prediction.*\(\)"),
    "prediction that is no tensor": ({"prediction": [1.0]}, "prediction.*list"),
    "empty batch": (
        {"prediction": tensor(0, 3), "target": tensor(0, 3), "log_snr": tensor(0)},
        r"prediction.*(\(0, 3\)|empty)",
    ),
    "log_snr as a column": ({"log_snr": tensor(4, 1)}, r"log_snr.*\(4, 1\).*\(4,\)"),
    "log_snr for another batch": ({"log_snr": tensor(3)}, r"log_snr.*\(3,\).*\(4,\)"),
    "log_snr as one number": ({"log_snr": tensor()}, r"log_snr.*\(\).*\(4,\)"),
    "log_snr as a float": ({"log_snr": 1.0}, "log_snr.*float"),
    "log_snr of integers": ({"log_snr": tensor(4, dtype=torch.int64)}, "log_snr.*int64"),
    "log_snr on another device": ({"log_snr": tensor(4, device="meta")}, "log_snr.*meta"),
    "log_snr that requires grad": ({"log_snr": tensor(4, grad=True)}, "log_snr.*grad"),
    "sample_weight of another shape": ({"sample_weight": tensor(4, 1)}, r"sample_weight.*\(4, 1\).*\(4,\)"),
    "sample_weight on another device": ({"sample_weight": tensor(4, device="meta")}, "sample_weight.*meta"),
    "sample_weight that requires grad": ({"sample_weight": tensor(4, grad=True)}, "sample_weight.*grad"),
    "base_weight of another shape": ({"base_weight": tensor(2)}, r"base_weight.*\(2,\).*\(4,\)"),
    "base_weight per element": ({"base_weight": tensor(4, 3, 2)}, r"base_weight.*\(4, 3, 2\).*\(4,\)"),
    "base_weight on another device": ({"base_weight": tensor(4, device="meta")}, "base_weight.*meta"),
    "noise without its coefficient": ({"noise": tensor(4, 3, 2)}, "noise.*coefficient|coefficient.*noise"),
    "coefficient without its noise": (
        {"coefficients": (1.0, 1.0, -1.0)},
        "noise.*coefficient|coefficient.*noise",
    ),
    "coefficient tensor without its noise": (
        {"coefficients": (1.0, 1.0, tensor(4))},
        "noise.*coefficient|coefficient.*noise",
    ),
    "noise of another shape": (
        {"noise": tensor(4, 3), "coefficients": (1.0, 1.0, -1.0)},
        r"noise.*\(4, 3\).*\(4, 3, 2\)",
    ),
    "noise of integers": (
        {"noise": tensor(4, 3, 2, dtype=torch.int64), "coefficients": (1.0, 1.0, -1.0)},
        "noise.*int64",
    ),
    "noise on another device": (
        {"noise": tensor(4, 3, 2, device="meta"), "coefficients": (1.0, 1.0, -1.0)},
        "noise.*meta",
    ),
    "noise that requires grad": (
        {"noise": tensor(4, 3, 2, grad=True), "coefficients": (1.0, 1.0, -1.0)},
        "noise.*grad",
    ),
    "two coefficients": ({"coefficients": (1.0, -1.0)}, r"coefficients.*2 values.*\(a, b, c\)"),
    "one coefficient": ({"coefficients": 1.0}, "coefficients"),
    "coefficient of another shape": (
        {"coefficients": (tensor(4, 1), -1.0, 0.0)},
        r"coefficient.*\(4, 1\).*\(4,\)",
    ),
    "coefficient of another batch": ({"coefficients": (1.0, tensor(3), 0.0)}, r"coefficient.*\(3,\).*\(4,\)"),
    "coefficient on another device": (
        {"coefficients": (tensor(4, device="meta"), -1.0, 0.0)},
        "coefficient.*meta",
    ),
    "coefficient that requires grad": (
        {"coefficients": (tensor(4, grad=True), -1.0, 0.0)},
        "coefficient.*grad",
    ),
    "coefficient that is no number": ({"coefficients": ("1", -1.0, 0.0)}, "coefficient.*str"),
    "unknown reduction": ({"reduction": "sum"}, "reduction.*sum.*mean"),
}


@pytest.mark.parametrize("case", list(BAD_CALLS))
def test_bad_call_is_refused(make_criterion, device, case):
    changes, message = BAD_CALLS[case]

    def made(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(made(x) for x in value)
        return value(device) if callable(value) else value

    criterion = make_criterion()
    with pytest.raises(REFUSED, match=f"(?s){message}"):
        criterion(**{**arguments(device), **{name: made(value) for name, value in changes.items()}})
    assert criterion.statistics.count.sum() == 0


def test_a_call_in_order_is_accepted(make_criterion, device):
    assert make_criterion()(**arguments(device)).isfinite()


BAD_REWEIGHTS = {
    "loss as a matrix": ({"loss_per_sample": tensor(4, 2)}, r"loss_per_sample.*\(4, 2\)"),
    "reduced loss": ({"loss_per_sample": tensor()}, r"loss_per_sample.*\(\)"),
    "empty batch": ({"loss_per_sample": tensor(0), "log_snr": tensor(0)}, "loss_per_sample"),
    "loss of integers": ({"loss_per_sample": tensor(4, dtype=torch.int64)}, "loss_per_sample.*int64"),
    "log_snr as a column": ({"log_snr": tensor(4, 1)}, r"log_snr.*\(4, 1\).*\(4,\)"),
    "log_snr on another device": ({"log_snr": tensor(4, device="meta")}, "log_snr.*meta"),
    "sample_weight of another shape": ({"sample_weight": tensor(1)}, r"sample_weight.*\(1,\).*\(4,\)"),
    "sample_weight that requires grad": ({"sample_weight": tensor(4, grad=True)}, "sample_weight.*grad"),
}


@pytest.mark.parametrize("case", list(BAD_REWEIGHTS))
def test_bad_reweight_is_refused(make_criterion, device, case):
    changes, message = BAD_REWEIGHTS[case]
    good = {"loss_per_sample": tensor(4), "log_snr": tensor(4)}
    call = {name: make(device) for name, make in {**good, **changes}.items()}
    with pytest.raises(REFUSED, match=f"(?s){message}"):
        make_criterion().reweight(**call)


@pytest.mark.parametrize("log_snr", [tensor(), tensor(4, dtype=torch.int64), tensor(4, device="meta")])
def test_bad_weight_at_is_refused(make_criterion, device, log_snr):
    with pytest.raises(REFUSED, match="log_snr"):
        make_criterion().weight_at(log_snr(device))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "snr_min"}, "weighting.*snr_min.*min_snr"),
        ({"weighting": 3}, "weighting"),
        ({"weighting": VarianceAware}, "weighting"),
        ({"bins": 1}, "bins.*1"),
        ({"bins": 1025}, "bins.*1025.*1024"),
        ({"bins": 16.5}, "bins.*16.5"),
        ({"log_snr_range": (16.0, -16.0)}, "log_snr_range.*16.0.*-16.0"),
        ({"log_snr_range": (1.0, 1.0)}, "log_snr_range.*1.0"),
        ({"log_snr_range": (-math.inf, 16.0)}, "log_snr_range.*inf"),
        ({"log_snr_range": (math.nan, 16.0)}, "log_snr_range.*nan"),
        ({"log_snr_range": 16.0}, "log_snr_range.*16.0"),
        ({"half_life": 0.0}, "half_life.*0"),
        ({"half_life": -5.0}, "half_life.*-5"),
        ({"half_life": math.nan}, "half_life.*nan"),
        ({"loss": "l1"}, "loss.*l1.*huber"),
        ({"huber_delta": 0.0}, "huber_delta.*0"),
        ({"huber_delta": -1.0}, "huber_delta.*-1"),
        ({"huber_delta": math.nan}, "huber_delta.*nan"),
        ({"backend": "tritn"}, "backend.*tritn.*triton"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_bad_criterion_is_refused(options, message):
    with pytest.raises(REFUSED, match=f"(?s){message}"):
        vadiff.DiffusionLoss(**options)


@pytest.mark.parametrize("weighting", [VarianceAware, LossLevel])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strength", math.nan),
        ("strength", math.inf),
        ("smoothing", -0.1),
        ("smoothing", math.nan),
        ("smoothing", math.inf),
        ("clip", 0.9),
        ("clip", math.nan),
        ("prior", 0.0),
        ("prior", -1.0),
        ("prior", math.nan),
        ("prior", math.inf),
    ],
)
def test_bad_adaptive_rule_is_refused(weighting, name, value):
    with pytest.raises(REFUSED, match=f"{name}.*{value}"):
        weighting(**{name: value})


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan])
def test_bad_gamma_is_refused(gamma):
    with pytest.raises(REFUSED, match=f"gamma.*{gamma}"):
        MinSNR(gamma)


def test_unknown_prediction_type_is_refused_and_the_known_are_listed():
    with pytest.raises(REFUSED, match=r"(?s)prediction_type.*'?eps'?.*epsilon.*v_prediction"):
        MinSNR(prediction_type="eps")


def test_backend_asked_for_by_name_that_cannot_run_says_why_and_what_to_do():
    """In a process of its own: without a GPU and without the interpreter."""
    program = (
        "import torch, vadiff\n"
        "for ask in ({'backend': 'triton'}, {}):\n"
        "    try:\n"
        "        vadiff.DiffusionLoss(**ask)(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2))\n"
        "    except RuntimeError as error:\n"
        "        print('refused:', error)\n"
    )
    hidden = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "VADIFF_BACKEND": ""}
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **hidden},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = run.stdout.splitlines()  # "auto" falls back without a word
    assert line.startswith("refused:")
    assert "triton" in line
    assert run.stderr == ""


def test_float64_is_for_the_reference_alone():
    batch = torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3), torch.ones(2)
    with pytest.raises(RuntimeError, match=r"triton.*float64"):
        vadiff.DiffusionLoss(backend=usable("triton"))(*batch)
    assert vadiff.DiffusionLoss()(*batch).dtype == torch.float64


def test_the_environment_variable_chooses_and_the_argument_wins(monkeypatch):
    good = arguments(torch.device("cpu"))
    monkeypatch.setenv("VADIFF_BACKEND", "nonsense")
    with pytest.raises(REFUSED, match=r"(?s)VADIFF_BACKEND.*nonsense.*reference"):
        vadiff.DiffusionLoss()(**good)
    assert vadiff.DiffusionLoss(backend="reference")(**good).isfinite()
    monkeypatch.setenv("VADIFF_BACKEND", "reference")
    assert vadiff.DiffusionLoss()(**good).isfinite()

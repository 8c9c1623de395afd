"""Bad arguments of posterior-mean targets are named."""

from __future__ import annotations

import math

import pytest
import torch

from vadiff.targets import PosteriorMean

INF = math.inf
DATA = torch.zeros(100, 1, 8, 8)
X0 = torch.zeros(16, 1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected one of them"),
        ({"reference": DATA, "bank": 64}, "expected one of them"),
        ({"reference": DATA.long()}, "reference is torch.int64, expected a tensor of floats"),
        ({"reference": DATA[:1]}, r"reference has shape \(1, 1, 8, 8\), expected \(N, ...\) with at least two"),
        ({"reference": DATA, "subset": 200}, "subset is 200, expected at most 100"),
        ({"reference": DATA, "subset": 1.5}, "subset is 1.5, expected an integer"),
        ({"reference": DATA, "augment": torch.flip}, "subset is None with augment, expected a number"),
        ({"reference": DATA, "labels": torch.zeros(100, 77, 768)}, "Texts and other conditions"),
        ({"reference": DATA, "threshold": 1.0}, "threshold is 1.0, expected a number from 0 to below 1"),
        ({"reference": DATA, "chunk": 0}, "chunk is 0, expected an integer of at least 1"),
        ({"bank": 64, "labels": torch.zeros(100).long()}, "labels is given with a bank"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        PosteriorMean(**arguments)


@pytest.mark.parametrize(
    ("make", "call", "message"),
    [
        ({}, {"x0": X0.long()}, "x0 is .*, expected floats"),
        ({}, {"noisy": X0[:4]}, r"noisy is \(4, 1, 8, 8\), expected \(16, 1, 8, 8\)"),
        ({}, {"x0": X0[..., :4], "noisy": X0[..., :4]}, "as the reference"),
        ({}, {"sigma": torch.ones(4)}, r"sigma is \(4,\), expected floats \(16,\)"),
        ({}, {"alpha": INF}, "alpha is a float, expected floats"),
        ({}, {"index": torch.zeros(16)}, "index is .*float32, expected int64"),
        ({}, {"labels": torch.zeros(16).long()}, "labels is given, but the reference has none"),
        ({"labels": torch.zeros(100).long()}, {}, "labels is None, but the reference has labels"),
        ({"subset": 40}, {}, "subset is 40 with a batch of 16, expected at least 64"),
        ({"subset": 100, "augment": torch.neg}, {}, "index is None with augment"),
        ({"reference": None, "bank": 40}, {}, "bank is 40 with a batch of 16, expected at least 48"),
    ],
)
def test_bad_calls_are_named(make, call, message):
    targets = PosteriorMean(**{"reference": DATA, **make})
    with pytest.raises((TypeError, ValueError), match=message):
        targets(**{"x0": X0, "noisy": X0, "alpha": 1.0, "sigma": 1.0, **call})

"""benchmarks/networks.py: speed of both networks, as a share of what the device can do."""

from __future__ import annotations

import json
from pathlib import Path

import networks
import pytest
import torch
from training_loop import Seconds

SMALL = [
    "--channels", "32", "32", "32", "--layers-per-block", "1", "--batch-size", "2", "--steps", "1", "--rounds", "1",
    "--precision", "fp32", "--no-compile", "--device", "cpu",
]  # fmt: skip


def test_both_networks_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["networks.py", *SMALL, "--out", str(tmp_path / "found.json")])
    before, trying, seconds = networks.training_loop.load_images, set(), networks.seconds

    def timed(*of: object) -> Seconds:
        trying.add(torch.backends.cudnn.benchmark)
        return seconds(*of)

    monkeypatch.setattr(networks, "seconds", timed)
    networks.main()
    assert trying == {True}  # as `train` sets it
    assert not torch.backends.cudnn.benchmark
    assert networks.training_loop.load_images is before
    content = json.loads((tmp_path / "found.json").read_text())
    assert list(content["networks"]) == ["cifar10-edm", "cifar10-edm2"]
    for found in content["networks"].values():
        assert 0 < found["share_of_peak"] < 1.5
        assert found["share_of_peak"] == pytest.approx(
            found["images_per_second"] * found["flops_per_image"] / content["matrix_peak_flops"]
        )
    assert capsys.readouterr().out.count("images/s") == 2


def test_operations_of_a_step_are_three_times_those_of_its_forward_pass() -> None:
    class Batch:
        x0, sigma, labels = torch.randn(4, 3, 8, 8), torch.ones(4), None

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Conv2d(3, 5, 1), torch.nn.Conv2d(5, 3, 1)

        def forward(self, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x))

    class Trainer:
        batches = type("Batches", (), {"at": staticmethod(lambda step: [Batch])})
        denoiser = torch.nn.Module()

    Trainer.denoiser.network = Network()
    forward = 2 * 64 * (3 * 5 + 5 * 3)
    found = networks.flops_per_image(Trainer)
    assert found == 3 * forward - 2 * 64 * 15  # nobody asks for the gradient of the images

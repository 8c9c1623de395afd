"""vadiff.optimal_loss.conditional: the lowest loss of a network that is told the class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vadiff.errors import RunError
from vadiff.optimal_loss import Estimate, OptimalLoss, estimate_given_class, estimate_until, model_gap
from vadiff.trainer.cli import main
from vadiff.trainer.training.optimal_curve import estimate_curve, training_set
from vadiff.trainer.training.run_gap import gap_of_run
from vadiff.training import TrainConfig, open_run, train


@pytest.fixture(autouse=True)
def small_reference_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product that a command compares its speed with takes seconds."""
    monkeypatch.setattr("vadiff.trainer.cli.optimal_loss._SQUARE", 64)


def two_points(sigma: float) -> float:
    """J* of -1 and 1 alike often, by quadrature: E(1 - tanh((1 + sigma·eps)/sigma²))²."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    errors = (1.0 - np.tanh((1.0 + sigma * nodes) / sigma**2)) ** 2
    return float(weights @ errors / weights.sum())


def test_each_class_has_the_loss_of_its_own_samples() -> None:
    data = torch.tensor([[2.0], [4.0], [-2.0], [-4.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 7, 7])
    sigmas = [0.5, 1.0, 3.0, 50.0]
    seen: list[Estimate] = []
    told = estimate_given_class(data, labels, sigmas, limit=4096, relative=1e-9, absolute=1e-9, progress=seen.append)
    for sigma, loss, stderr in zip(sigmas, told.loss.tolist(), told.stderr.tolist(), strict=True):
        assert abs(loss - two_points(sigma)) < 4 * stderr + 1e-9
    assert (told.samples, told.classes, told.total_variance) == (4, 2, 1.0)
    assert told.draws.tolist() == [8192] * 4
    flops = [each.flops for each in seen]
    assert flops == sorted(flops)  # of all classes together
    untold = estimate_until(data, sigmas, limit=4096)
    assert (untold.classes, untold.total_variance) == (0, 10.0)
    assert untold.loss[-1] > 9 * told.loss[-1]


def test_standard_error_is_that_of_the_mean_over_classes() -> None:
    data = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 3
    estimates = [estimate_given_class(data, labels, [0.5], limit=512, seed=100 * seed) for seed in range(24)]
    spread = torch.stack([each.loss for each in estimates]).std()
    assert 0.6 < float(estimates[0].stderr / spread) < 1.7


def test_class_of_one_sample_has_no_loss() -> None:
    data = torch.tensor([[1.0], [-1.0], [30.0], [-50.0]], dtype=torch.float64)
    told = estimate_given_class(data, torch.tensor([0, 0, 1, 2]), [20.0], limit=512)
    assert told.loss[0] == pytest.approx(0.5, rel=0.01)  # half of the samples
    assert (told.classes, told.total_variance) == (3, 0.5)


def test_curve_remembers_that_the_class_is_told(tmp_path: Path) -> None:
    told = estimate_given_class(torch.randn(8, 2), torch.arange(8) % 2, [1.0, 2.0], limit=8)
    told.save(tmp_path / "told.csv")
    assert OptimalLoss.load(tmp_path / "told.csv").classes == 2


def test_gap_of_one_kind_to_the_optimal_loss_of_another_is_refused() -> None:
    data, labels = torch.randn(8, 2), torch.arange(8) % 2
    told, untold = estimate_given_class(data, labels, [1.0], limit=8), estimate_until(data, [1.0], limit=8)

    def denoise(noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return 0.0 * noisy

    with pytest.raises(ValueError, match=r"labels is None, but .* class-conditional denoiser: take it from estimate$"):
        model_gap(denoise, data, told)
    with pytest.raises(
        ValueError, match=r"labels is given, but .* unconditional denoiser: take it from estimate_given_class"
    ):
        model_gap(denoise, data, untold, labels=labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3), r"labels has shape \(3,\), expected \(4,\)"),
        (torch.arange(4), "labels has no class of two samples"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_given_class(torch.randn(4, 2), labels, [1.0])


# a class-conditional run


def test_conditional_run_is_told_the_classes_and_compared_with_what_that_allows(trained_run: Path) -> None:
    run = open_run(trained_run)
    images = run.images()
    optimal = estimate_curve(run.config, images, torch.device("cpu"), sigmas=[0.5, 5.0], limit=512)
    assert optimal.classes == 10
    gap = gap_of_run(run, optimal, number=64)
    denoiser, seen = run.denoiser(), []
    denoiser.network.register_forward_hook(lambda network, arguments, output: seen.append(arguments[2]))
    assert images.train_labels is not None
    chosen = torch.randperm(1500, generator=torch.Generator().manual_seed(0))[:64]
    clean = images.train[chosen].float() / 127.5 - 1.0
    again = model_gap(denoiser, clean, optimal, labels=images.train_labels[chosen])
    assert torch.equal(seen[0], images.train_labels[chosen])
    torch.testing.assert_close(again.gap, gap.gap)
    untold = estimate_until(images.train[:].float() / 127.5 - 1.0, [0.5, 5.0], limit=512)
    with pytest.raises(
        RunError, match=r"is of a network that is told no class, the run's is told the class: .* with --"
    ):
        gap_of_run(run, untold)


def test_gap_of_a_run_with_flips_is_that_of_mirrored_images_too(tmp_path: Path) -> None:
    config = TrainConfig(
        steps=1, batch_size=8, channels=(8, 8), flips=True, held_out_images=8, tensorboard=False, device="cpu"
    )
    train(config, out=tmp_path, progress=False)
    run = open_run(tmp_path)
    data, labels = training_set(run.images(), flips=True, class_conditional=False)
    assert labels is None
    optimal = estimate_until(data, [1.0], limit=16)
    chosen = torch.randperm(3000, generator=torch.Generator().manual_seed(3))[:50]
    assert bool((chosen >= 1500).any())
    expected = model_gap(run.denoiser(), data[chosen], optimal, seed=3)
    torch.testing.assert_close(gap_of_run(run, optimal, number=50, seed=3).gap, expected.gap)


def test_command_tells_the_classes_where_the_run_does(trained_run: Path, tmp_path: Path, capsys) -> None:
    command = ["optimal-loss", "--levels", "2", "--sigma-min", "0.5", "--limit", "512", "--device", "cpu"]
    command += ["--dataset", "digits"]
    assert main([*command, "--run", str(trained_run), "--gap-images", "16", "--out", str(tmp_path / "run")]) == 0
    assert "1,500 images of 64 numbers, conditional on 10 classes" in capsys.readouterr().out
    assert main([*command, "--class-conditional", "--out", str(tmp_path / "told")]) == 0
    run, told = (OptimalLoss.load(tmp_path / name / "optimal_loss.csv") for name in ("run", "told"))
    assert torch.equal(run.loss, told.loss)
    with pytest.raises(SystemExit):
        main([*command, "--class-conditional", "--estimator", "cdol"])
    assert "--estimator: cdol, expected full for class-conditional J*" in capsys.readouterr().err


def test_command_prints_the_difference_to_another_curve(tmp_path: Path, capsys) -> None:
    command = ["optimal-loss", "--dataset", "digits", "--levels", "2", "--sigma-min", "0.5", "--limit", "512"]
    command += ["--device", "cpu", "--out", str(tmp_path)]
    assert main(command) == 0
    first = OptimalLoss.load(tmp_path / "optimal_loss.csv")
    (tmp_path / "optimal_loss.csv").rename(tmp_path / "full.csv")
    capsys.readouterr()
    assert main([*command, "--estimator", "snis", "--subset", "50", "--compare", str(tmp_path / "full.csv")]) == 0
    difference = (OptimalLoss.load(tmp_path / "optimal_loss.csv").loss - first.loss) / first.total_variance
    printed = capsys.readouterr().out
    assert f"{100 * float(difference[0]):+.2f} % ± " in printed
    largest = 100 * float(difference.abs().max())
    assert f"Largest difference from full: {largest:.2f} % of the total variance" in printed
    for levels, message in (("3", "has 2 noise levels from 0.5 to 40, expected those of this estimate"),):
        with pytest.raises(SystemExit):
            main([*command, "--levels", levels, "--compare", str(tmp_path / "full.csv")])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--compare", str(tmp_path / "nothing.csv")])
    assert "argument --compare: " in capsys.readouterr().err

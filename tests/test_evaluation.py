"""vadiff.trainer.evaluation and `vadiff evaluate`: image metrics, held-out loss and gradients per level."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vadiff.errors import UserError
from vadiff.models import Denoiser
from vadiff.statistics import LogSNRStatistics
from vadiff.trainer.cli import main
from vadiff.trainer.evaluation import LevelGradients, image_metrics, level_gradients
from vadiff.trainer.evaluation.fidelity import content_key, weights_key, within_reach
from vadiff.trainer.pictures import PictureWriter
from vadiff.trainer.report import group_runs, read_history
from vadiff.trainer.report.evaluate import _gradients, _gradients_rows
from vadiff.trainer.report.page import sections_of
from vadiff.training import held_out_loss, open_run


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """(generated, real): noise of two kinds, [12, 3, 8, 8] uint8 each."""
    random = torch.Generator().manual_seed(0)
    dark = torch.randint(0, 128, (12, 3, 8, 8), generator=random, dtype=torch.uint8)
    return dark, torch.randint(0, 256, (12, 3, 8, 8), generator=random, dtype=torch.uint8)


@pytest.fixture
def measure(inception_weights: Path, tmp_path: Path) -> Callable[..., dict[str, float]]:
    """image_metrics with the cheapest layer, the random weights, and a cache of the test's own."""

    def measured(generated: Tensor, real: Tensor | None, **options: Any) -> dict[str, float]:
        settings: dict[str, Any] = {
            "layer": "64",
            "inception_weights": inception_weights,
            "cache": tmp_path / "cache",
            **options,
        }
        return image_metrics(generated, real, progress=False, **settings)

    return measured


def test_metrics_equal_torch_fidelity_called_directly_on_the_same_files(
    images: tuple[Tensor, Tensor], measure: Callable[..., dict[str, float]], inception_weights: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "generated", tmp_path / "real"]
    for folder, pixels in zip(folders, images, strict=True):
        with PictureWriter(folder, range(len(pixels)), (3, 8, 8)) as writer:
            writer.write(0, pixels)
    from torch_fidelity import calculate_metrics

    direct = calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), fid=True, kid=True, prc=True, kid_subset_size=12, cuda=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception_weights), cache=False,
        feature_layer_fid="64", feature_layer_kid="64", feature_layer_prc="64", save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    ours = measure(*images)
    assert ours["fid-64"] == direct["frechet_inception_distance"]
    assert ours["kid-64"] == direct["kernel_inception_distance_mean"]
    assert (ours["precision-64"], ours["recall-64"]) == (direct["precision"], direct["recall"])
    assert ours["fid-64"] > 0.001


def test_reference_is_cached_by_its_content(
    images: tuple[Tensor, Tensor], measure: Callable[..., dict[str, float]], tmp_path: Path
) -> None:
    generated, real = images
    first = measure(generated, real, metrics=["fid"])
    cached = sorted((tmp_path / "cache").iterdir())
    assert all(content_key(real) in file.name for file in cached)
    for file in cached:  # what is read is what is cached: another reference's statistics give another FID
        content = torch.load(file, weights_only=False)
        if isinstance(content, dict):
            torch.save(content | {"mu": content["mu"] + 1.0}, file)
    assert measure(generated, real.clone(), metrics=["fid"])["fid-64"] != first["fid-64"]
    changed = real.clone()
    changed[3, 1, 4, 4] ^= 1
    assert measure(generated, changed, metrics=["fid"])["fid-64"] == pytest.approx(first["fid-64"], rel=0.05)
    assert len(list((tmp_path / "cache").iterdir())) == 2 * len(cached)


def test_key_depends_on_pixels_and_shape_and_nothing_else(images: tuple[Tensor, Tensor]) -> None:
    one, other = images
    assert content_key(one) == content_key(one.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2))
    assert content_key(one) != content_key(other)
    assert content_key(one) != content_key(one.view(12, 3, 4, 16))


def test_other_weights_do_not_share_the_cache(
    images: tuple[Tensor, Tensor], measure: Callable[..., dict[str, float]], inception_weights: Path, tmp_path: Path
) -> None:
    measure(*images, metrics=["fid"])
    state = torch.load(inception_weights, weights_only=True)
    state["Conv2d_1a_3x3.conv.weight"].mul_(-1.0)
    torch.save(state, tmp_path / "other.pth")
    other = {"metrics": ["fid"], "inception_weights": tmp_path / "other.pth"}
    assert measure(*images, **other) == measure(*images, **other, cache=tmp_path / "fresh")


def test_grey_images_count_as_rgb(images: tuple[Tensor, Tensor], measure: Callable[..., dict[str, float]]) -> None:
    generated, real = (pixels[:, :1] for pixels in images)
    in_color = measure(generated.expand(-1, 3, -1, -1), real.expand(-1, 3, -1, -1), metrics=["fid"])
    assert measure(generated, real, metrics=["fid"]) == in_color


def test_weights_that_do_not_reach_the_layer_are_no_answer(
    images: tuple[Tensor, Tensor], measure: Callable[..., dict[str, float]]
) -> None:
    with pytest.raises(ValueError, match=r"metrics is isc, .* are not finite in Mixed_7a, .*fc: give weights"):
        measure(images[0], None, metrics=["isc"])
    with pytest.raises(ValueError, match=r"layer is 2048, but inception_weights .* are not finite in Mixed_7a, "):
        measure(*images, metrics=["fid"], layer="2048")


def test_nothing_to_measure_is_no_fault_of_the_weights(inception_weights: Path) -> None:
    assert within_reach([], "2048", inception_weights) == ()
    assert within_reach(["isc", "fid"], "768", inception_weights) == ("fid",)
    assert within_reach(["isc"], "2048", None) == ("isc",)


def test_score_that_the_weights_cannot_give_is_skipped_with_a_warning(
    images: tuple[Tensor, Tensor], measure: Callable[..., dict[str, float]]
) -> None:
    with pytest.warns(UserWarning, match=r"isc is skipped: .*weights\.pth is not finite up to the last layer"):
        found = measure(*images, metrics=["isc", "fid"])
    assert set(found) == {"fid-64"}


def test_inception_score_of_finite_weights_is_torch_fidelitys(
    images: tuple[Tensor, Tensor], measure: Callable[..., dict[str, float]], inception_weights: Path, tmp_path: Path
) -> None:
    from torch_fidelity import calculate_metrics

    state = torch.load(inception_weights, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            value.normal_(0.0, 0.02, generator=generator) if name.endswith("weight") else value.fill_(1.0)
    torch.save(state, tmp_path / "whole.pth")
    found = measure(images[1], None, metrics=["isc"], inception_weights=tmp_path / "whole.pth")
    with PictureWriter(tmp_path / "real", range(len(images[1])), (3, 8, 8)) as writer:
        writer.write(0, images[1])
    direct = calculate_metrics(
        input1=str(tmp_path / "real"), isc=True, cuda=False, cache=False, save_cpu_ram=True, verbose=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(tmp_path / "whole.pth"),
    )  # fmt: skip
    assert found["isc"] == direct["inception_score_mean"]
    assert math.isfinite(found["isc"])
    assert found["isc"] >= 1.0


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return (exit, (77,))


def test_weights_file_runs_no_code(
    images: tuple[Tensor, Tensor], measure: Callable[..., dict[str, float]], tmp_path: Path
) -> None:
    torch.save({"Conv2d_1a_3x3.conv.weight": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match="does not load as plain tensors"):
        measure(*images, inception_weights=tmp_path / "hostile.pth")


def test_download_that_fails_says_which_file_to_bring(
    images: tuple[Tensor, Tensor],
    measure: Callable[..., dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"no route to host.*--inception-weights PATH"):
        measure(*images, inception_weights=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["fidd"]}, "metrics has 'fidd', expected of fid, kid, isc, prc"),
        ({"metrics": []}, "metrics is empty, expected some of fid"),
        ({"layer": "1024"}, "layer is '1024', expected one of 64, 192, 768, 2048"),
        ({"features": "vgg"}, "features is 'vgg', expected one of inception, digits"),
        ({"features": "digits"}, "layer is '64', but features is digits, which has one layer"),
        ({"features": "digits", "layer": "2048", "metrics": ["isc"]}, "metrics has isc, .* but features is digits"),
        ({"features": "digits", "layer": "2048"}, r"images is \(12, 3, 8, 8\), expected \[N, 1, 8, 8\] with features"),
        ({"inception_weights": Path("missing.pth")}, "inception_weights is missing.pth, but there is no such file"),
        ({"real": None}, "reference is None, expected real images"),
        ({"real": torch.zeros(12, 3, 8, 9, dtype=torch.uint8)}, "images have 8 x 8 pixels, the reference 9 x 8"),
        ({"generated": torch.zeros(12, 3, 8, 8)}, r"images is \(12, 3, 8, 8\) torch.float32, expected"),
        ({"generated": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "images has 2 images, expected at least 5"),
    ],
)
def test_what_cannot_be_measured_is_named(
    images: tuple[Tensor, Tensor], measure: Callable[..., dict[str, float]], options: dict[str, object], message: str
) -> None:
    arguments = {"generated": images[0], "real": images[1], **options}
    with pytest.raises(ValueError, match=message):
        measure(arguments.pop("generated"), arguments.pop("real"), **arguments)


def test_held_out_loss_does_not_depend_on_the_batch_size(trained_run: Path) -> None:
    run = open_run(trained_run)
    data, denoiser = run.images(), run.denoiser()
    pixels = data.held_out[:23].float() / 127.5 - 1
    levels = (-2.0, 3.0, 7.0)
    together, apart = (
        held_out_loss(denoiser, pixels, data.held_out_labels[:23], log_snr_levels=levels, batch_size=size)
        for size in (23, 4)
    )
    assert torch.allclose(together.per_image, apart.per_image, rtol=1e-4)


class Affine(nn.Module):
    """F(x) = a·x + b."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.2))
        self.unused = nn.Parameter(torch.tensor(1.0))

    def forward(self, noisy: Tensor, c_noise: Tensor) -> Tensor:
        return self.a * noisy + self.b


LEVELS = torch.tensor([-3.0, 0.0, 4.0], dtype=torch.float64)


@pytest.fixture
def gradients() -> Callable[..., LevelGradients]:
    """level_gradients of an affine denoiser on random images."""
    pixels = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(10_000))

    def measured(number: int = 4000, batch_size: int = 1000, seed: int = 0) -> LevelGradients:
        weight, share = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([10.0, 30.0, 10.0])
        denoiser = Denoiser(Affine(), sigma_data=1.0)
        return level_gradients(denoiser, pixels[:number], None, LEVELS, weight, share, batch_size=batch_size, seed=seed)

    return measured


def exact_gradients() -> Tensor:
    """Of E λ(σ)·(D - x0)² for x0 ~ N(0, 1), sigma_data 1, F = a·u + b with u = c_in·x ~ N(0, 1): [3, 2].

    λ·(D - x0)² = (F - target)² with a target of variance 1, and E u·target = 0: the optimum of F is 0.
    """
    return torch.tensor([[2 * 0.3, 2 * -0.2]], dtype=torch.float64).expand(3, -1)


def test_gradients_are_those_of_the_base_loss(gradients: Callable[..., LevelGradients]) -> None:
    found, exact = gradients(), exact_gradients()
    assert torch.allclose(found.norm, exact.norm(dim=1), rtol=0.1)
    assert torch.allclose(found.products, exact @ exact.T, rtol=0.2)
    assert torch.allclose(found.cosine, torch.ones(3, 3, dtype=torch.float64), atol=0.1)


def test_norm_of_a_noisy_gradient_is_not_its_noise(gradients: Callable[..., LevelGradients]) -> None:
    few = torch.stack([gradients(number=20, seed=seed).products for seed in range(400)])
    error = few.std(0) / math.sqrt(len(few))
    exact = exact_gradients() @ exact_gradients().T
    pixels_seen_again = 0.05  # the same 20 images in every draw: their own mean differs from that of all
    assert ((few.mean(0) - exact).abs() < 4 * error + pixels_seen_again).all()


def test_gradients_do_not_depend_on_the_batch_size(gradients: Callable[..., LevelGradients]) -> None:
    assert torch.allclose(gradients(100).products, gradients(100, batch_size=7).products, rtol=1e-4)


def test_weighting_changes_the_shares_of_a_step_but_no_cosine_between_levels() -> None:
    products = torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    halves = torch.tensor([0.5, 0.5], dtype=torch.float64)
    found = LevelGradients(LEVELS[:2], products, torch.tensor([0.5, 1.0], dtype=torch.float64), halves)
    assert found.norm.tolist() == [2.0, 1.0]
    assert found.cosine.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert found.step_share(weighted=False).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert found.step_share(weighted=True).tolist() == pytest.approx([0.5, 0.5])
    assert found.cosine_to_step(weighted=False).tolist() == pytest.approx([2 / math.sqrt(5), 1 / math.sqrt(5)])
    assert found.cosine_to_step(weighted=True).tolist() == pytest.approx([math.sqrt(0.5), math.sqrt(0.5)])


def test_share_of_a_step_is_that_of_the_mass(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of levels that are drawn often and weighted down in turn, samples would be counted too often."""
    run = open_run(run_copy)
    mass = torch.rand(128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    criterion = run.criterion()
    monkeypatch.setattr(LogSNRStatistics, "mass", property(lambda self: mass))
    gradients = _gradients(run, run.images(), None, torch.device("cpu"), 8, 8)
    bins = (gradients.log_snr[:, None] - criterion.bin_centers).abs().argmin(1)
    assert torch.allclose(gradients.share, mass[bins] / mass[bins].sum())


def test_cosines_that_are_estimated_beyond_one_are_written_as_one() -> None:
    products = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=torch.float64)
    weight = torch.ones(2, dtype=torch.float64)
    rows = _gradients_rows(LevelGradients(torch.tensor([0.0, 2.0], dtype=torch.float64), products, weight, weight / 2))
    assert {value for name, value in rows[0].items() if name.startswith("cosine")} == {1.0}


def test_level_whose_gradient_is_lost_in_noise_has_no_cosine() -> None:
    products = torch.tensor([[4.0, 1.0], [1.0, -0.1]], dtype=torch.float64)
    found = LevelGradients(LEVELS[:2], products, torch.ones(2).double(), torch.ones(2).double())
    assert found.norm.isnan().tolist() == [False, True]
    assert found.cosine.isnan().tolist() == [[False, True], [True, True]]


def test_gradients_need_two_images_and_a_trained_level() -> None:
    denoiser, pixels = Denoiser(Affine(), 1.0), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="images has 1, expected at least 2"):
        level_gradients(denoiser, pixels, None, LEVELS, torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="share is zero at every level"):
        level_gradients(denoiser, pixels.expand(4, -1, -1, -1), None, LEVELS, torch.ones(3), torch.zeros(3))


@pytest.fixture
def run_copy(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may write to."""
    return shutil.copytree(trained_run, tmp_path / "run")


def test_evaluate_writes_tables_of_a_run_which_the_report_draws(
    run_copy: Path, inception_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = tmp_path / "real.npz"
    with PictureWriter(real, range(6), (1, 8, 8)) as writer:
        writer.write(0, torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8))
    command = ["evaluate", str(run_copy), "--images", "6", "--steps", "3", "--reference", str(real)]
    command += ["--features", "inception", "--layer", "64"]
    command += ["--inception-weights", str(inception_weights), "--cache", str(tmp_path / "cache"), "--devices", "cpu"]
    command += ["--metrics", "fid,isc"]
    assert main([*command, "--held-out-images", "10", "--gradients", "--gradient-images", "8"]) == 0
    printed = capsys.readouterr().out
    assert "fid-64" in printed
    assert "isc (Inception score) is skipped: " in printed
    assert "EDM's loss on 10 held-out images" in printed
    folder = run_copy / "evaluation" / "step-4"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["images_seen"] == 4 * 64
    assert list(metrics["metrics"]) == ["fid-64"]
    assert metrics["metrics"]["fid-64"] > 0
    assert metrics["inception_weights"] == weights_key(inception_weights)
    with (folder / "held-out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert all(float(row["loss_ema"]) > 0 and float(row["loss_raw"]) > 0 for row in rows)
    assert float(rows[0]["log_snr"]) == pytest.approx(-2 * math.log(float(rows[0]["sigma"])), abs=1e-5)
    with (folder / "gradients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"norm", "weighted_norm", "cosine_to_step_weighted"} <= set(rows[0])
    assert sorted(file.name for file in folder.iterdir() if file.suffix not in (".npz", ".parts")) == [
        "gradients.csv", "held-out.csv", "metrics.json"
    ]  # fmt: skip
    charts = {
        chart.name: chart.figure
        for section in sections_of(group_runs([read_history(open_run(run_copy))]))
        for chart in section.charts
    }
    norm, own = charts["gradient-norm-per-level"].data[1:]  # after the line of σ
    assert [float(row["weighted_norm"]) for row in rows] == pytest.approx(norm.y)
    assert [float(row["norm"]) for row in rows] == pytest.approx(own.y)
    assert charts["gradient-cosines"].data[0].z.shape == (12, 12)
    assert "metric-fid-64" in charts


def test_evaluate_compares_a_folder_with_another(
    images: tuple[Tensor, Tensor], inception_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, pixels in zip(("generated", "real"), images, strict=True):
        with PictureWriter(tmp_path / name, range(len(pixels)), (3, 8, 8)) as writer:
            writer.write(0, pixels)
    command = ["evaluate", str(tmp_path / "generated"), "--inception-weights", str(inception_weights), "--layer", "64"]
    command += ["--cache", str(tmp_path / "cache"), "--devices", "cpu"]
    assert main([*command, "--reference", str(tmp_path / "real"), "--metrics", "fid"]) == 0
    assert "12 images against 12 real ones" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing does not exist, expected a run directory"),
        ([".", "--gradients"], "argument --gradients: . is not a run directory"),
        (["."], "argument --reference: required"),
        ([".", "--inception-weights", "nowhere.pth"], "argument --inception-weights: nowhere.pth is not a file"),
        ([".", "--metrics", "fdi"], "argument --metrics: 'fdi'; did you mean fid? Expected fid, kid, isc, prc"),
        ([".", "--reference", "nothing-here"], "nothing-here does not exist"),
    ],
)
def test_evaluate_refuses_invalid_arguments(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-2]


def test_evaluate_without_a_checkpoint_is_one_line(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run_copy / "checkpoints")
    assert main(["evaluate", str(run_copy), "--metrics", "none", "--devices", "cpu"]) == 1
    assert "has no checkpoint" in capsys.readouterr().err
    assert not (run_copy / "evaluation").exists()

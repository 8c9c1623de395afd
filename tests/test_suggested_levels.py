"""`vadiff levels suggest`: of runs, of files, and of short trainings of its own."""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from results import RESULTS  # benchmarks/experiments
from torch import Tensor

from vadiff.errors import DataError
from vadiff.information import Profile
from vadiff.levels import suggest
from vadiff.process import loss_ratio
from vadiff.trainer.cli import _parser, main
from vadiff.trainer.report.suggested_levels import Default, fits, shared_draws, suggestion_table
from vadiff.trainer.training import level_evidence, short
from vadiff.trainer.training.level_evidence import NUMBERS, Evidence
from vadiff.training import Run, Stopped
from vadiff.validation import LevelLosses

GAUSSIAN_STD = math.pi / (2.0 * math.sqrt(3.0))  # of ln sigma, for Gaussian data


def gaussian_profile(scale: float, low: float = 0.01, high: float = 100.0) -> Profile:
    """Of white Gaussian data of a standard deviation and its optimal denoiser."""
    sigma = scale * torch.logspace(math.log10(low), math.log10(high), 60, dtype=torch.float64)
    return Profile(-2.0 * sigma.log(), scale**2 * sigma**2 / (scale**2 + sigma**2))


def gaussian_pixels(scale: float, number: int = 256) -> Tensor:
    """White Gaussian images as bytes, uint8 [number, 1, 8, 8]; not of the seed of the held-out noise, which is 0."""
    values = scale * torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return (127.5 * (values + 1.0)).round().clamp(0, 255).to(torch.uint8)


def level_losses(profile: Profile, prediction_type: str, sigma_data: float = 0.5) -> LevelLosses:
    loss = profile.x0_error * loss_ratio(prediction_type, profile.log_snr, sigma_data=sigma_data)
    ones = torch.ones(len(loss), dtype=torch.int64)
    return LevelLosses(profile.log_snr, loss, 0.01 * loss, 100 * ones, 0 * ones, "some draws", "some images")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short trainings of two steps of a tiny network, measured on few images."""
    for name, value in {"FEWEST_STEPS": 2, "_CHANNELS": (8, 8), "_MEASURED": 48, "_LEVELS": 12}.items():
        monkeypatch.setattr(short, name, value)


def usage_error(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["levels", "suggest", *options])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def suggested(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["levels", "suggest", *options, "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


@pytest.mark.parametrize("scale", [0.2, 5.0])
def test_file_of_gaussian_errors_gives_the_closed_form(
    scale: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gaussian_profile(scale).save(tmp_path / "errors.csv")
    found = suggested(capsys, "--errors", str(tmp_path / "errors.csv"))
    assert found["sigma_data"] == pytest.approx(scale, rel=1e-2)
    assert found["p_mean"] == pytest.approx(math.log(scale), abs=1e-2)
    assert found["p_std"] == pytest.approx(GAUSSIAN_STD, abs=1e-2)
    assert found["alpha"] == pytest.approx(math.exp(found["logit_mean"]))
    assert found["uncertainty"] == dict.fromkeys(NUMBERS)
    assert found["profile"][0]["rate"] == pytest.approx(1e-4, rel=0.01)  # at sigma = 100 times the scale


@pytest.mark.parametrize("form", ["epsilon", "sample", "v_prediction", "flow", "edm"])
def test_losses_of_every_form_give_the_same_levels(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    level_losses(gaussian_profile(0.5), form, 0.5).save(tmp_path / "losses.csv")
    options = ["--prediction-type", form, "--sigma-data", "0.5"]
    found = suggested(capsys, "--errors", str(tmp_path / "losses.csv"), *options)
    assert found["p_mean"] == pytest.approx(math.log(0.5), abs=1e-2)
    assert found["p_std"] == pytest.approx(GAUSSIAN_STD, abs=1e-2)


def test_short_trainings_on_gaussian_images_find_their_scale(quick: None) -> None:
    evidence = level_evidence.of_short_trainings(gaussian_pixels(0.2), 4, "cpu")
    assert evidence.suggestion.sigma_data == pytest.approx(0.2, rel=0.02)
    assert evidence.suggestion.p_mean == pytest.approx(math.log(0.2), abs=0.05)
    assert evidence.suggestion.p_std == pytest.approx(GAUSSIAN_STD, abs=0.05)
    assert len(evidence.profiles) == 4
    assert list(evidence.differences) == ["halves", "seeds", "half the steps"]
    apart = [abs(changes["p_mean"]) for changes in evidence.differences.values()]
    assert evidence.uncertainty("p_mean") == max(apart)
    assert 0.0 < max(apart) < 0.1


def test_each_half_is_trained_on_and_measured_with_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = gaussian_pixels(0.2, 64)
    seen = []

    def training(config: Any, objective: object, *, progress: bool, images: Any) -> Any:
        seen.append((images.train, images.held_out, config.seed))
        line = {"held_out": {"log_snr": [-8.0, 8.0], "loss_ema": [1.0, 1.0]}}
        return SimpleNamespace(metrics=[{"step": 1}, line, line])

    monkeypatch.setattr(short, "train", training)
    runs = short.short_trainings(pixels, 100, "cpu")
    assert [(run.half, run.seed) for run in runs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for run, (train, held_out, seed) in zip(runs, seen, strict=True):
        assert torch.equal(train, pixels[32 * run.half :][:32])
        assert torch.equal(torch.cat([train, held_out] if run.half == 0 else [held_out, train]), pixels)
        assert seed == run.seed


def test_folder_of_pictures_is_trained_on_and_its_numbers_have_their_spread(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pillow = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(70):
        size = (9 + number % 3, 12, 3)  # any size
        pillow.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / "pictures" / f"{number}.png")
    picture = tmp_path / "new" / "levels.png"
    options = ["--data", str(tmp_path / "pictures"), "--image-size", "8", "--steps", "2", "--device", "cpu"]
    found = suggested(capsys, *options, "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "seeds on each half of 70 images of 3 x 8 x 8" in found["source"]
    assert found["differences"].keys() == {"halves", "seeds", "half the steps"}
    assert all(found["uncertainty"][name] > 0.0 for name in NUMBERS)
    assert {default["name"] for default in found["defaults"]} == {"EDM", "EDM2", "SD3"}


def test_signal_ends_the_trainings_with_its_exit_code_and_no_suggestion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped_training(*arguments: Any, **options: Any) -> Any:
        raise Stopped("stopped by SIGTERM after step 1", signal.SIGTERM)

    monkeypatch.setattr(short, "train", stopped_training)
    with pytest.raises(SystemExit) as stopped:
        main(["levels", "suggest", "--dataset", "digits", "--steps", "100"])
    assert stopped.value.code == 143
    printed = capsys.readouterr()
    assert printed.err.endswith("vadiff: stopped before the end of the short trainings: no suggestion\n")
    assert printed.out == ""


def test_time_is_turned_into_steps_enough_to_learn_and_no_more_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def training(config: Any, **options: Any) -> Any:
        return SimpleNamespace(metrics=[{"images_per_second": speed}])

    monkeypatch.setattr(short, "train", training)
    pixels = gaussian_pixels(0.2, 64)
    speed = 1000.0
    steps = short.steps_within(pixels, 240.0)
    assert steps == pytest.approx((1000.0 * 60.0 - short._MEASURING) / 64, abs=2)
    assert short.steps_within(pixels, 24000.0) == 2000
    assert short.steps_within(pixels, 3.0) == 100


def test_images_are_shuffled_limited_and_averaged_over_squares() -> None:
    pytest.importorskip("sklearn")
    whole = short.load_pixels("digits", None, None, 4000)
    assert whole.shape == (1797, 1, 8, 8)
    few = short.load_pixels("digits", None, 4, 100)
    means = whole[:100].float().unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
    assert torch.equal(few, means.round().to(torch.uint8))
    with pytest.raises(ValueError, match="image size is 5, expected a divisor of 8, the size of digits"):
        short.load_pixels("digits", None, 5, 100)
    with pytest.raises(ValueError, match="image size is 2, expected at least 4"):
        short.load_pixels("digits", None, 2, 100)
    with pytest.raises(DataError, match="--images gives 63 images, expected 64 or more"):
        short.load_pixels("digits", None, None, 63)


def test_images_without_content_are_refused() -> None:
    with pytest.raises(DataError, match="all pixels of all images are equal"):
        short.short_trainings(torch.full((64, 1, 8, 8), 7, dtype=torch.uint8), 100)


def test_run_is_read_from_its_statistics_or_its_held_out_images(
    trained_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "profile", lambda run, step: gaussian_profile(0.3))
    found = suggested(capsys, str(trained_run), "--device", "cpu")
    assert found["sigma_data"] == pytest.approx(0.75, abs=0.01)  # of the pixels
    assert found["source"] == f"training statistics of {trained_run}, raw weights"
    assert suggested(capsys, str(trained_run), "--sigma-data", "0.3")["p_mean"] == pytest.approx(
        math.log(0.3), abs=0.01
    )
    monkeypatch.undo()
    held_out = suggested(capsys, str(trained_run), "--from", "held-out", "--device", "cpu")
    # After four steps EDM's denoiser is that of Gaussian data of the same standard deviation.
    assert held_out["p_mean"] == pytest.approx(math.log(0.75), abs=0.2)
    assert held_out["differences"].keys() == {"halves"}
    assert held_out["source"].endswith("on 20 held-out images")


def test_error_above_the_datas_variance_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = gaussian_profile(0.5)
    rate_left = 0.01 * data.sigma**2  # as of a network that predicts eps, at high noise
    Profile(data.log_snr, data.x0_error + rate_left).save(tmp_path / "errors.csv")
    found = suggested(capsys, "--errors", str(tmp_path / "errors.csv"), "--sigma-data", "0.5")
    assert found["p_mean"] == pytest.approx(math.log(0.5), abs=0.05)
    assert found["p_std"] == pytest.approx(GAUSSIAN_STD, abs=0.05)


def test_run_of_a_few_steps_has_no_statistics_to_suggest_from(
    trained_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vadiff.information.FEWEST", 1e6)
    message = usage_error(capsys, str(trained_run), "--device", "cpu")
    assert re.search(r"the criterion has \d+ samples and 0 bins with at least", message)
    assert main(["levels", "suggest", str(trained_run), "--step", "99"]) == 1
    assert "99" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"one of RUN, --errors FILE and --data PATH \(or --dataset\) is required, and only one"),
        (["run", "--errors", "x0.csv"], "one of RUN, --errors FILE and --data PATH .* only one"),
        (["--errors", "x0.csv", "--minutes", "3"], "argument --minutes: not with --errors"),
        (["--dataset", "digits", "--sigma-data", "1"], "argument --sigma-data: not with --data"),
        (["--errors", "x0.csv", "--from", "held-out"], "argument --from: not with --errors"),
        (["--dataset", "digits", "--minutes", "0"], r"argument --minutes: 0\.0, expected a positive number"),
        (["--dataset", "digits", "--minutes", "nan"], "argument --minutes: nan, expected a positive number"),
        (["--dataset", "digits", "--steps", "99"], "steps is 99, expected at least 100"),
        (["--dataset", "digits", "--image-size", "3"], "image size is 3, expected at least 4"),
        (["--errors", "x0.csv", "--device", "cupboard"], "argument --device: device is 'cupboard'"),
        (["--errors", "x0.csv", "--plot", "levels.xyz"], "argument --plot: levels.xyz, expected a file ending in .png"),
        (["--errors", "x0.csv", "--plot", "x0.csv/a.png"], "argument --plot: x0.csv/a.png cannot be written"),
        (["--errors", "nothing.csv"], "nothing.csv"),
        (["--errors", "other.csv"], "other.csv is not the result of a validation"),
        (["--errors", "x0.csv", "--prediction-type", "flow"], "prediction_type is 'flow', expected none: x0.csv has"),
        (["--errors", "losses.csv"], "prediction_type is None, expected the form of the losses in losses.csv"),
        (["--errors", "losses.csv", "--prediction-type", "edm"], "sigma_data is None, expected that of the losses"),
        (["--errors", "low.csv"], "x0_error is 92% of the noise's square at the highest level"),
        (["--errors", "high.csv"], r"log_snr reaches from sigma .* of the suggested levels are below that"),
    ],
)
def test_what_cannot_give_levels_is_refused_in_words(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(short, "train", None)  # nothing is trained before
    gaussian_profile(0.5).save("x0.csv")
    gaussian_profile(0.5, high=0.3).save("low.csv")
    gaussian_profile(0.5, low=3.0).save("high.csv")
    level_losses(gaussian_profile(0.5), "epsilon").save("losses.csv")
    Path("other.csv").write_text("step,loss\n1,2\n")
    assert re.search(message, usage_error(capsys, *options))
    assert not Path("levels.xyz").exists()


def test_folder_that_is_missing_is_one_line_and_status_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["levels", "suggest", "--data", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("vadiff: data is nowhere, which is not a folder")
    assert main(["levels", "suggest", "--dataset", "images"]) == 1
    assert "expected the folder of the pictures: --data FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize("apart", [0.0, 0.5, 3.0])
def test_draws_in_common_of_two_normals_of_one_width_are_the_tails_beyond_their_middle(apart: float) -> None:
    tails = math.erfc(apart / 2.0 / math.sqrt(2.0))
    assert shared_draws((0.3, 1.0), (0.3 + apart, 1.0)) == pytest.approx(tails, abs=1e-4)
    assert shared_draws((0.3 + apart, 2.0), (0.3, 0.5)) == shared_draws((0.3, 0.5), (0.3 + apart, 2.0))


@pytest.fixture
def evidence_of() -> Callable[..., Evidence]:
    def make(scale: float, uncertain: float = 0.0) -> Evidence:
        profile = gaussian_profile(scale)
        changes = {"halves": dict.fromkeys(NUMBERS, uncertain)} if uncertain else {}
        return Evidence(level_evidence._suggest([profile], scale), "a test", [profile], changes)

    return make


def test_default_fits_if_near_or_within_the_uncertainty(evidence_of: Callable[..., Evidence]) -> None:
    near, far = Default("near", -0.3, 1.0, ""), Default("far", -2.0, 1.0, "")
    assert fits(evidence_of(1.0), "edm", near)
    assert not fits(evidence_of(1.0), "edm", far)
    assert not fits(evidence_of(1.0, uncertain=1.9), "edm", far)
    assert fits(evidence_of(1.0, uncertain=2.1), "edm", far)


def test_text_says_what_to_type_or_that_the_default_fits(evidence_of: Callable[..., Evidence]) -> None:
    lines = suggestion_table(evidence_of(1.0)).splitlines()
    assert "Type: vadiff train --sigma-data 1 --p-mean 0.00 --p-std 0.91" in lines
    assert "SD3's default fits: nothing to change." in lines
    assert any(line.startswith("How sure this is cannot be seen from one network") for line in lines)
    lines = suggestion_table(evidence_of(math.exp(-1.2), uncertain=0.01)).splitlines()
    assert "EDM's default fits: nothing to change." in lines
    assert "Type: vadiff train --sigma-data 0.301" in lines
    assert [line.split()[2:] for line in lines if line.startswith("p_mean")] == [["0.01"]]
    flow = next(line for line in lines if line.startswith("Type: vadiff train --process flow"))
    assert re.fullmatch(r".* --levels logit_normal --levels-options mean=-\d\.\d\d std=\d\.\d\d", flow)
    for line in (flow, *(line for line in lines if "--shift" in line)):  # what is to be typed is a command
        _parser().parse_args(line.partition("vadiff ")[2].split())


def test_help_names_the_sources(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["levels", "suggest", "--help"])
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(name in printed for name in ("RUN", "--errors FILE", "--data PATH", "--minutes X", "default: auto"))
    with pytest.raises(SystemExit) as stopped:
        main(["levels"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_committed_text_is_that_of_the_committed_figures(name: str) -> None:
    content = json.loads((RESULTS / "levels-suggest" / f"{name}.json").read_text())
    log_snr, error = (
        torch.tensor([row[column] for row in content["profile"]], dtype=torch.float64)
        for column in ("log_snr", "x0_error")
    )
    suggestion = suggest(log_snr, error, sigma_data=content["sigma_data"])
    evidence = Evidence(suggestion, content["source"], [], content["differences"])
    assert suggestion_table(evidence) + "\n" == (RESULTS / "levels-suggest" / f"{name}.txt").read_text()


def test_page_has_the_figures_of_the_five_objectives() -> None:
    page = (RESULTS.parent.parent / "docs" / "levels.md").read_text()
    content = json.loads((RESULTS / "suggested_levels.json").read_text())
    for rows in content["objectives"].values():
        cells = []
        for source in ("statistics", "held_out"):
            means = [row[source]["p_mean"] for row in rows]
            cells.append(f"{min(means):.2f} to {max(means):.2f}".replace("-", "−"))
        assert f"| {cells[0]} | {cells[1]} |" in page

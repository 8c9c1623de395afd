"""`vadiff levels suggest`: of runs, of files, and of short trainings of its own."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
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
from vadiff.trainer.cli import main, parse_options
from vadiff.trainer.cli.train import training_config
from vadiff.trainer.data import Images
from vadiff.trainer.report.suggested_levels import (
    DEFAULTS,
    Default,
    lines_to_type,
    shared_draws,
    suggestion_content,
    suggestion_table,
    verdict,
)
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


def only(stored: Tensor) -> Images:
    """A data set of these images alone, as `load_some` makes it."""
    return Images(stored, None, stored[:0], None, held_out_is_test=False)


def level_losses(
    profile: Profile, prediction_type: str, sigma_data: float = 0.5, draws: str = "some draws"
) -> LevelLosses:
    loss = profile.x0_error * loss_ratio(prediction_type, profile.log_snr, sigma_data=sigma_data)
    ones = torch.ones(len(loss), dtype=torch.int64)
    return LevelLosses(profile.log_snr, loss, 0.01 * loss, 100 * ones, 0 * ones, draws, "some images")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short trainings of two steps of a tiny network, measured on few images."""
    for name, value in {"FEWEST_STEPS": 2, "_CHANNELS": (8, 8), "_MEASURED": 48, "_LEVELS": 12}.items():
        monkeypatch.setattr(short, name, value)


def usage_error(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["levels", "suggest", *options])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-2]


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
    assert found["sigma_data_from"] == "inferred"
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


def test_short_trainings_learn_that_pixels_repeat_and_find_the_closed_form(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 2 x 2 equal pixels are seen four times: m = s²σ²/(4s² + σ²), and ln σ has mean ln s + ln(2)/2.

    EDM's untrained denoiser knows pixels alone, m = s²σ²/(s² + σ²), of mean ln s.
    """
    for name, value in {"_CHANNELS": (16,), "_LEARNING_RATE": 1.2e-2}.items():
        monkeypatch.setattr(short, name, value)
    blocks = gaussian_pixels(0.2, 512)[..., :2, :2]
    pixels = blocks.repeat_interleave(2, 2).repeat_interleave(2, 3)  # [512, 1, 4, 4]
    evidence = level_evidence.of_short_trainings(only(pixels), 100, "cpu")
    assert evidence.suggestion.sigma_data == pytest.approx(0.2, rel=0.03)
    assert -0.14 < evidence.suggestion.p_mean - (math.log(0.2) + 0.5 * math.log(2.0)) < 0.03  # untrained: -0.35
    assert len(evidence.profiles) == 4
    assert list(evidence.differences) == ["halves", "seeds", "half the steps"]
    apart = [abs(changes["p_mean"]) for changes in evidence.differences.values()]
    assert evidence.uncertainty("p_mean") == max(apart)
    assert evidence.differences["half the steps"]["p_mean"] > 0.03


def test_each_half_is_trained_on_and_measured_with_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = gaussian_pixels(0.2, 64)
    seen = []

    def training(config: Any, objective: object, *, progress: bool, images: Any) -> Any:
        seen.append((images.train, images.held_out, config.seed))
        line = {"held_out": {"log_snr": [-8.0, 8.0], "loss_ema": [1.0, 1.0]}}
        return SimpleNamespace(metrics=[{"step": 1}, line, line])

    monkeypatch.setattr(short, "train", training)
    runs = short.short_trainings(only(pixels), 100, "cpu")
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


def test_time_is_turned_into_steps_enough_to_learn_and_no_more_than_that() -> None:
    steps = short.steps_within(240.0, 1000.0)
    assert 100 < steps < 2000
    assert short.seconds_of(steps, 1000.0) == pytest.approx(240.0, rel=0.01)
    assert short.steps_within(24000.0, 1000.0) == 2000
    assert short.steps_within(3.0, 1000.0) == 100


@pytest.fixture
def trained_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of the trainings that the command asked for, which are not done; its trial has 1,000 images a second."""
    steps: list[int] = []

    def trainings(images: Images, asked: int, *arguments: Any) -> Evidence:
        steps.append(asked)
        return Evidence(level_evidence._suggest([gaussian_profile(0.5)], 0.5), "a test", [gaussian_profile(0.5)])

    monkeypatch.setattr(short, "training_speed", lambda images, device: 1000.0)
    monkeypatch.setattr(level_evidence, "of_short_trainings", trainings)
    return steps


def test_minutes_that_cannot_be_kept_are_said_before_training(
    trained_steps: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    minutes = short.seconds_of(100, 1000.0) / 60.0  # of the fewest steps
    takes = f"4 trainings of 100 steps, the fewest, take about {minutes:.2g} minutes here; a smaller --image-size is"
    assert main(["levels", "suggest", "--dataset", "digits", "--minutes", str(minutes / 4.0)]) == 0
    assert takes in capsys.readouterr().err
    assert trained_steps == [100]
    message = usage_error(capsys, "--dataset", "digits", "--minutes", str(minutes / 6.0))
    assert takes in message
    assert "--steps 100 trains however long it takes" in message
    assert trained_steps == [100]


@pytest.mark.parametrize(
    ("options", "command"),
    [
        (["--dataset", "digits"], "vadiff train --preset digits"),
        (["--dataset", "digits", "--image-size", "4"], None),
        (["--data", "my pictures"], "vadiff train --preset images --data 'my pictures' --image-size 32"),
        (["--data", "x", "--image-size", "16"], "vadiff train --preset images --data x --image-size 16"),
        (["--data", "x", "--image-size", "12"], None),
        (["--dataset", "cifar10", "--data", "x"], "vadiff train --preset cifar10 --data x"),
        (["--dataset", "cifar100", "--data", "x"], "vadiff train --preset cifar10 --dataset cifar100 --data x"),
        (["--dataset", "cifar10", "--data", "x", "--image-size", "16"], None),
        (
            ["--dataset", "latents", "--data", "x"],
            "vadiff train --preset images --dataset latents --data x --image-size 8 --image-channels 4 "
            "--attention-resolutions 4 --no-flips",
        ),
    ],
)
def test_commands_to_type_are_configs_of_the_trainer(
    options: list[str], command: str | None, trained_steps: list[int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def images(dataset: str, data: str | None, size: int | None, limit: int) -> Images:
        own = 8 if dataset in ("digits", "latents") else 32
        channels = {"digits": 1, "latents": 4}.get(dataset, 3)
        return only(torch.zeros(64, channels, size or own, size or own, dtype=torch.uint8))

    monkeypatch.setattr(short, "load_some", images)
    assert main(["levels", "suggest", *options]) == 0
    printed = [
        line for line in capsys.readouterr().out.splitlines() if "--sigma-data" in line or "logit_normal" in line
    ]
    flags = [line[line.index("--sigma-data" if "--sigma-data" in line else "--process") :] for line in printed]
    assert len(printed) == 3
    if command is None:
        assert printed[0] == f"Add to your command: {flags[0]}"
        command = "vadiff train --preset digits"
    else:
        assert all(f": {command} {each}" in line for line, each in zip(printed, flags, strict=True))
    edm, flow, shifted = (training_config(parse_options(shlex.split(f"{command} {each}")[1:])) for each in flags)
    assert (edm.sigma_data, edm.process, edm.levels) == (0.5, "edm", "auto")
    assert edm.p_mean == pytest.approx(math.log(0.5), abs=0.01)
    assert edm.image_size == (8 if edm.dataset == "latents" else int(options[-1]) if command.endswith("16") else 32)
    assert (flow.process, flow.levels, sorted(flow.levels_options)) == ("flow", "logit_normal", ["mean", "std"])
    assert (shifted.process, shifted.levels_options) == ("flow", {})
    assert shifted.shift_alpha == pytest.approx(math.exp(flow.levels_options["mean"]), abs=0.02)


def test_images_are_shuffled_limited_and_averaged_over_squares() -> None:
    pytest.importorskip("sklearn")
    whole = short.load_some("digits", None, None, 4000).train[:]
    assert whole.shape == (1797, 1, 8, 8)
    few = short.load_some("digits", None, 4, 100).train[:]
    means = whole[:100].float().unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
    assert torch.equal(few, means.round().to(torch.uint8))
    with pytest.raises(ValueError, match="image size is 5, expected a divisor of 8, the size of digits"):
        short.load_some("digits", None, 5, 100)
    with pytest.raises(ValueError, match="image size is 2, expected at least 4"):
        short.load_some("digits", None, 2, 100)
    with pytest.raises(DataError, match="--images gives 63 images, expected at least 64: a network memorises fewer"):
        short.load_some("digits", None, None, 63)


def test_images_without_content_are_refused() -> None:
    with pytest.raises(DataError, match="all pixels of all images are equal"):
        short.short_trainings(only(torch.full((64, 1, 8, 8), 7, dtype=torch.uint8)), 100)


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
        (["--errors", "x0.csv", "--plot", "folder.png"], "argument --plot: folder.png is a folder, expected a file"),
        (["--dataset", "digits", "--data", "x"], "argument --data: x, expected none with --dataset digits"),
        (["--errors", "nothing.csv"], r"nothing\.csv cannot be read \(No such file .*, expected CSV with the columns"),
        (["--errors", "folder.png"], r"folder\.png cannot be read \(Is a directory\), expected CSV"),
        (["--errors", "other.csv"], "other.csv has the columns step, loss, expected CSV with the columns log_snr and"),
        (["--errors", "empty.csv"], r"empty\.csv has the columns \(none\), expected CSV"),
        (["--errors", "binary.csv"], r"binary\.csv is no CSV \(.*can't decode.*\), expected CSV with the columns"),
        (["--errors", "long.csv"], r"long\.csv is no CSV \(field larger than field limit .*\), expected CSV"),
        (["--errors", "words.csv"], "the column log_snr or x0_error of words.csv has an unexpected value: .*'much'"),
        (["--errors", "run.csv", "--prediction-type", "flow"], "prediction_type is 'flow', but run.csv says .* edm"),
        (["--errors", "run.csv", "--sigma-data", "1"], "sigma_data is 1, but run.csv says that of its losses is 0.5"),
        (
            ["--errors", "sample.csv", "--prediction-type", "epsilon"],
            "name another --prediction-type if .* Otherwise x0",
        ),
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
    level_losses(gaussian_profile(0.5), "edm", 0.5, "noise of a run, sigma_data 0.5").save("run.csv")
    level_losses(gaussian_profile(0.5), "sample").save("sample.csv")
    Path("other.csv").write_text("step,loss\n1,2\n")
    Path("empty.csv").write_text("")
    Path("words.csv").write_text("log_snr,x0_error\n0,much\n")
    Path("binary.csv").write_bytes(b"\xff\xfe\x00")
    Path("long.csv").write_text("x" * 200_000)
    Path("folder.png").mkdir()
    assert re.search(message, usage_error(capsys, *options))
    assert not Path("levels.xyz").exists()


def test_folder_of_the_picture_is_made_with_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "deep" / "levels.PNG"
    usage_error(capsys, "--errors", str(tmp_path / "nothing.csv"), "--plot", str(picture))
    assert not (tmp_path / "new").exists()
    gaussian_profile(0.5).save(tmp_path / "x0.csv")
    suggested(capsys, "--errors", str(tmp_path / "x0.csv"), "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_losses_of_a_run_say_their_form_and_sigma_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.csv"
    level_losses(gaussian_profile(0.5), "edm", 0.5, "noise of a run, sigma_data 0.5").save(path)
    found = suggested(capsys, "--errors", str(path))
    assert (found["sigma_data"], found["sigma_data_from"]) == (0.5, "given")
    assert found["p_mean"] == pytest.approx(math.log(0.5), abs=1e-2)
    assert suggested(capsys, "--errors", str(path), "--prediction-type", "edm", "--sigma-data", "0.5") == found


def test_byte_order_mark_of_a_spreadsheet_is_no_part_of_a_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gaussian_profile(0.5).save(tmp_path / "x0.csv")
    content = (tmp_path / "x0.csv").read_text()
    (tmp_path / "x0.csv").write_text(content, encoding="utf-8-sig")
    assert suggested(capsys, "--errors", str(tmp_path / "x0.csv"))["sigma_data"] == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(("sigma_data", "share"), [(0.2, "6.2"), (0.3, None), (0.9, None), (2.0, "0.062")])
def test_sigma_data_far_from_the_errors_at_the_highest_noise_is_warned_of(
    sigma_data: float, share: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gaussian_profile(0.5).save(tmp_path / "x0.csv")
    options = ["--errors", str(tmp_path / "x0.csv"), "--sigma-data", str(sigma_data)]
    warning = suggested(capsys, *options)["warning"]
    assert (warning is None) == (share is None)
    main(["levels", "suggest", *options])
    printed = capsys.readouterr().out
    assert ("Warning: " in printed) == (share is not None)
    assert share is None or f"the errors at the highest noise are {share} of sigma_data²" in printed


def test_folder_that_is_missing_is_one_line_and_status_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["levels", "suggest", "--data", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith(
        "vadiff: data is nowhere, which does not exist; expected a folder of pictures"
    )
    assert main(["levels", "suggest", "--dataset", "images"]) == 1
    assert "expected the path of the images: --data PATH" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("apart", "uncertain", "expected"),
    [
        (0.2, 0.0, "fits"),  # in common: 92 %, of two normals of one width
        (0.3, 0.0, "near"),  # 88 %
        (0.7, 0.0, "near"),  # 73 %
        (0.8, 0.0, "does not fit"),  # 69 %
        (1.0, 0.85, "does not fit"),
        (1.0, 1.1, "cannot be told apart"),
        (0.05, 0.3, "cannot be told apart"),  # and does not fit by ignorance
        (0.05, 0.19, "fits"),
        (0.15, 0.19, "fits"),
    ],
)
@pytest.mark.parametrize("objective", ["edm", "flow"])
def test_default_is_judged_by_its_draws_in_common_if_the_mean_is_certain(
    objective: str, apart: float, uncertain: float, expected: str, evidence_of: Callable[..., Evidence]
) -> None:
    evidence = evidence_of(1.0, uncertain)
    found = evidence.suggestion
    mean, std = (found.p_mean, found.p_std) if objective == "edm" else (found.logit_mean, found.logit_std)
    assert verdict(evidence, objective, Default("a default", mean - apart * std, std, "")) == expected


def test_text_says_of_each_usual_default_what_is_known(evidence_of: Callable[..., Evidence]) -> None:
    def lines(p_mean: float, uncertain: float = 0.0) -> list[str]:
        return suggestion_table(evidence_of(math.exp(p_mean), uncertain)).splitlines()

    edm = DEFAULTS["edm"][0].mean
    far = lines(0.0)
    assert "Add to your command: --sigma-data 1 --p-mean 0.00 --p-std 0.91" in far
    assert "SD3's default fits: no levels to change." in far
    assert any(line.startswith("How far the numbers repeat themselves cannot be seen from one network") for line in far)
    near = lines(edm, 0.01)  # narrower than EDM's
    assert any(line.startswith("EDM's default is near: with 80 % in common, ") for line in near)
    assert "Add to your command: --sigma-data 0.301 --p-mean -1.20 --p-std 0.91" in near
    assert any(re.match(r"or, which shifts SD3's levels: --process flow .* --shift 0\.\d\d$", line) for line in near)
    assert [line.split()[2:] for line in near if line.startswith("p_mean")] == [["0.01"]]
    unsure = lines(edm + 0.3, 0.5)
    assert "EDM's default and the suggestion cannot be told apart: train longer or use more images." in unsure
    assert "Add to your command: --sigma-data 0.407" in unsure
    for text in (far, near, unsure):
        assert sum(line.startswith("Partly shown, and larger: how the network was trained") for line in text) == 1


def test_inferred_sigma_data_is_called_that(evidence_of: Callable[..., Evidence]) -> None:
    evidence = dataclasses.replace(evidence_of(1.0), sigma_data_from="inferred")
    assert "sigma_data       1.000   inferred from the errors" in suggestion_table(evidence)
    assert suggestion_content(evidence)["sigma_data_from"] == "inferred"
    assert lines_to_type(evidence, "edm") == ["Add to your command: --sigma-data 1 --p-mean 0.00 --p-std 0.91"]


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
    evidence = Evidence(suggestion, content["source"], [], content["differences"], command=content["command"])
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

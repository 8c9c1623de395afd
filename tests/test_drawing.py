"""vadiff.trainer.cli.drawing: options of how images are drawn, as `vadiff sample` and `vadiff evaluate` take them."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vadiff.models import Denoiser
from vadiff.pixels import pixels
from vadiff.process import loss_ratio
from vadiff.sampling import noise_levels
from vadiff.sampling.generation import Generation, Guide, default_generation, generate, random_class, solve
from vadiff.sampling.seeds import recorded_seeds
from vadiff.sampling.solvers import SOLVERS
from vadiff.trainer.cli import main
from vadiff.trainer.cli.drawing import STATISTICS_MEASURED
from vadiff.trainer.pictures import read_pictures
from vadiff.trainer.training.checkpoint import load_checkpoint, save_checkpoint
from vadiff.trainer.training.samples import save_grid
from vadiff.training import open_run


@pytest.mark.parametrize("solver", SOLVERS)
def test_sample_draws_with_every_solver(trained_run: Path, tmp_path: Path, solver: str) -> None:
    command = [
        "sample",
        str(trained_run),
        "--solver",
        solver,
        "--steps",
        "5",
        "--sigma-min",
        "0.01",
        "--sigma-max",
        "50",
    ]
    command += ["--rho", "5", "--clip-x0", "--seeds", "7,2-3", "--labels", "random", "--devices", "cpu"]
    assert main([*command, "--out", str(tmp_path / "drawn.npz")]) == 0
    how = Generation(solver, steps=5, sigma_min=0.01, sigma_max=50.0, rho=5.0, clip=True, label="random")
    [batch] = generate(open_run(trained_run), [7, 2, 3], how)
    with np.load(tmp_path / "drawn.npz") as archive:
        assert archive["arr_1"].tolist() == [random_class(seed, 10) for seed in (7, 2, 3)]
    assert torch.equal(read_pictures(tmp_path / "drawn.npz"), batch.images)


def test_sample_is_guided_by_the_run_weights_and_step_that_guide_names(trained_run: Path, tmp_path: Path) -> None:
    def drawn(name: str, *options: str) -> torch.Tensor:
        command = ["sample", str(trained_run), "--steps", "3", "--images", "4", "--devices", "cpu", *options]
        assert main([*command, "--out", str(tmp_path / f"{name}.npz")]) == 0
        return read_pictures(tmp_path / f"{name}.npz")

    plain = drawn("plain")
    assert torch.equal(drawn("itself", "--guidance", "3", "--guide", str(trained_run)), plain)
    assert torch.equal(drawn("ema", "--guidance", "3", "--guide", f"{trained_run}:ema/4"), plain)
    by_raw = drawn("raw", "--guidance", "3", "--guide", f"{trained_run}:raw")
    assert not torch.equal(by_raw, plain)
    interval = ("--guidance-sigma-min", "1", "--guidance-sigma-max", "5")
    limited = drawn("limited", "--guidance", "3", "--guide", f"{trained_run}:raw", *interval)
    assert not torch.equal(limited, plain)
    assert not torch.equal(limited, by_raw)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--guidance-sigma-min", "-1"), "argument --guidance-sigma-min: -1, expected 0 or more"),
        (("--guidance-sigma-min", "5", "--guidance-sigma-max", "1"), "5, expected 0 or more, and below .*-max, 1"),
        (("--guidance-sigma-max", "1"), "argument .*--guidance-sigma-max: expected with --guidance other than 1"),
    ],
)
def test_levels_of_guidance_are_refused_by_the_names_of_their_options(
    options: tuple[str, ...], told: str, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["sample", str(trained_run), *options])
    assert re.search(told, capsys.readouterr().err)


def with_statistics(trained_run: Path, folder: Path) -> Path:
    """The run with the statistics of a long training, in which the error is 0.25 at high noise and falls below."""
    run = shutil.copytree(trained_run, folder / "run")
    criterion = open_run(run).criterion()
    centers = criterion.bin_centers.repeat(32)
    sigma = (-0.5 * centers).exp()
    error = 0.25 * sigma**2 / (0.25 + sigma**2)
    criterion.train()
    criterion.reweight(error * loss_ratio("edm", centers, sigma_data=open_run(run).config.sigma_data), centers)
    save_checkpoint(run, 4, load_checkpoint(run, 4) | {"criterion": criterion.state_dict()}, keep=2)
    return run


def test_sample_places_steps_by_the_statistics_of_the_checkpoint(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_statistics(trained_run, tmp_path)
    command = ["sample", str(run), "--images", "3", "--steps", "5", "--devices", "cpu", "--steps-from", "statistics"]
    assert main([*command, "--out", str(tmp_path / "euler.npz")]) == 0
    assert "steps by statistics" not in capsys.readouterr().err
    profile = open_run(run).profile(4)
    expected = torch.linspace(math.atan(160.0), math.atan(0.004), 5, dtype=torch.float64).tan() * 0.5
    assert torch.allclose(noise_levels(5, profile=profile)[:-1], expected, rtol=0.05)
    [batch] = generate(open_run(run), range(3), Generation("euler", 5, "statistics", profile=profile))
    assert torch.equal(read_pictures(tmp_path / "euler.npz"), batch.images)


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "ddpm"])
def test_sample_says_what_was_measured_of_steps_from_statistics_with_other_solvers(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], solver: str
) -> None:
    run = with_statistics(trained_run, tmp_path)
    command = ["sample", str(run), "--images", "1", "--steps", "3", "--devices", "cpu", "--steps-from", "statistics"]
    assert main([*command, "--solver", solver, "--out", str(tmp_path / "drawn.npz")]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "steps by statistics" in line]
    assert STATISTICS_MEASURED[solver] in line


def test_run_without_enough_statistics_is_a_usage_error(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    criterion = open_run(run).criterion()
    criterion.statistics.reset()
    save_checkpoint(run, 4, load_checkpoint(run, 4) | {"criterion": criterion.state_dict()}, keep=2)
    with pytest.raises(SystemExit):
        main(["sample", str(run), "--steps-from", "statistics", "--out", str(tmp_path / "png")])
    assert "the criterion has 0 samples" in capsys.readouterr().err.splitlines()[-2]
    assert not (tmp_path / "png").exists()


def test_seeds_too_large_for_a_generator_are_a_usage_error(
    trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argument in ("--seeds", "--first-seed"):
        with pytest.raises(SystemExit):
            main(["sample", str(trained_run), argument, "99999999999999999999"])
        assert f"argument {argument}: " in capsys.readouterr().err.splitlines()[-2]


def test_evaluate_records_how_images_were_drawn(
    trained_run: Path, tmp_path: Path, digits_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vadiff.trainer.report.evaluate.compare", lambda *arguments: {"fd-digits": 1.0})
    monkeypatch.setattr("vadiff.trainer.report.evaluate.check_drawn", lambda *arguments: None)
    run = shutil.copytree(trained_run, tmp_path / "run")
    command = ["evaluate", str(run), "--no-held-out", "--devices", "cpu", "--solver", "dpmpp_2m", "--steps", "4"]
    command += ["--metrics", "fid", "--cache", str(digits_cache)]
    assert main([*command, "--seeds", "3-4,9", "--guidance", "2", "--guide", f"{run}:raw"]) == 0
    content = json.loads((run / "evaluation" / "step-4" / "metrics.json").read_text())
    assert {name: content[name] for name in ("images", "first_seed", "seeds")} == recorded_seeds([3, 4, 9])
    assert content["generation"] == {
        "solver": "dpmpp_2m", "steps": 4, "spacing": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0,
        "churn": None, "clip": False, "label": "cycle", "guidance": 2.0, "weights": "ema",
        "guide": Guide(f"{run}:raw", open_run(run), "raw", 4).recorded(),
    }  # fmt: skip


class Velocity(torch.nn.Module):
    """A network of one weight, for a flow of grey images with two classes."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, x: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.weight * x + 0.1 * labels.view(-1, 1, 1, 1)


def test_grid_of_a_flow_shows_what_sample_would_draw(tmp_path: Path) -> None:
    denoiser = Denoiser(Velocity(0.5), 0.5, labels=2, image_shape=(1, 4, 4), process="flow")
    save_grid(tmp_path, 7, denoiser, "flow", 4)
    images = pixels(solve(denoiser, [0, 1, 2, 3], default_generation("flow"), torch.device("cpu")))
    with Image.open(tmp_path / "samples" / "step-7.png") as picture:
        drawn = torch.from_numpy(np.array(picture))
    cells = [drawn[:4, :4], drawn[:4, 5:], drawn[5:, :4], drawn[5:, 5:]]
    assert torch.equal(torch.stack(cells), images.squeeze(1))


def test_grid_of_diverged_weights_is_drawn_all_the_same(tmp_path: Path) -> None:
    denoiser = Denoiser(Velocity(float("nan")), 0.5, labels=2, image_shape=(1, 4, 4))
    save_grid(tmp_path, 7, denoiser, "edm", 4)
    assert (tmp_path / "samples" / "step-7.png").exists()


def test_sample_writes_one_png_per_seed_and_the_same_pixels_as_npz(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", str(trained_run), "--steps", "3", "--devices", "cpu", "--first-seed", "9", "--images", "5"]
    assert main([*command, "--out", str(tmp_path / "png"), "--batch-size", "2"]) == 0
    assert "5 images in" in capsys.readouterr().out
    names = sorted(file.name for file in (tmp_path / "png").iterdir())
    assert names == [f"{seed:06d}_class{seed % 10}.png" for seed in range(9, 14)]
    assert main([*command, "--out", str(tmp_path / "all.npz"), "--batch-size", "2"]) == 0
    with np.load(tmp_path / "all.npz") as archive:
        assert archive["arr_0"].shape == (5, 8, 8, 1)
        assert archive["arr_1"].tolist() == [9, 0, 1, 2, 3]
    assert torch.equal(read_pictures(tmp_path / "png"), read_pictures(tmp_path / "all.npz"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.npz", "png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "5-3"], "argument --seeds: '5-3' in '5-3', expected a range that rises, as 3-5"),
        (["--seeds", "1,2", "--images", "2"], "argument --images: not allowed with argument --seeds"),
        (["--seeds", "1,2", "--first-seed", "2"], "argument --first-seed: not allowed with argument --seeds"),
        (["--labels", "random", "--label", "3"], "argument --label: not allowed with argument --labels"),
        (["--solver", "ddim"], "argument --solver: 'ddim'; did you mean ddpm? Expected heun, euler, ddpm, dpmpp_2m"),
        (["--rho", "0"], "rho is 0.0, expected a positive number"),
        (["--spacing", "flow", "--rho", "7"], "rho is for the spacing edm, not for flow"),
        (
            ["--steps-from", "statistics", "--spacing", "edm"],
            "argument --spacing: not allowed with argument --steps-from",
        ),
        (["--spacing", "statistics"], "argument --spacing: 'statistics', expected edm, flow, timesteps"),
        (["--images", "0"], "argument --images: 0, expected at least 1"),
        (["--first-seed", "-1"], "argument --first-seed: -1, expected 0 or more"),
        (["--churn", "-3"], "churn amount is -3.0, expected"),
        (["--label", "12"], "label is 12, expected 0 to 9"),
        (["--devices", "toaster"], "argument --devices: 'toaster', expected auto, cpu or cuda:N"),
        (["--devices", "cuda:99"], "argument --devices: 'cuda:99', but torch sees"),
        (["--solver", "euler", "--churn", "1"], "churn is for the solver heun, not for euler"),
        (["--guide", "{run}"], "with guidance 1, which leaves it unused"),
        (
            ["--guide", "{run}:best", "--guidance", "2"],
            "argument --guide: 'best', expected ema, raw or ema- and a width",
        ),
        (["--guide", "{run}:ema/last", "--guidance", "2"], "argument --guide: step 'last' in "),
    ],
)
def test_sample_refuses_invalid_arguments_and_writes_nothing(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "sample",
                str(trained_run),
                "--out",
                str(tmp_path / "png"),
                *(text.format(run=trained_run) for text in options),
            ]
        )
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-2]
    assert list(tmp_path.iterdir()) == []


def test_sample_never_replaces_what_is_there(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["sample", str(trained_run), "--out", str(tmp_path)])
    assert f"{tmp_path} exists already: replace it with --overwrite, or name another" in capsys.readouterr().err


def test_overwrite_replaces_images_and_nothing_else(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = ["sample", str(trained_run), "--steps", "2", "--solver", "euler", "--devices", "cpu", "--overwrite"]
    for images, number in (("3", 3), ("2", 2)):
        assert main([*sample, "--images", images, "--out", str(tmp_path / "png")]) == 0
        assert main([*sample, "--images", images, "--out", str(tmp_path / "all.npz")]) == 0
        assert len(list((tmp_path / "png").iterdir())) == number
        assert len(np.load(tmp_path / "all.npz")["arr_0"]) == number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.npz", "png"]
    (tmp_path / "png" / "notes.txt").write_text("mine")
    for out, message in (("png", "png has other files than images"), ("png/notes.txt", "is a file, expected a folder")):
        with pytest.raises(SystemExit):
            main([*sample, "--out", str(tmp_path / out)])
        assert message in capsys.readouterr().err
    assert len(list((tmp_path / "png").iterdir())) == 3


def test_sample_of_a_folder_that_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(tmp_path)]) == 1
    assert "is not a run directory" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "missing")]) == 1

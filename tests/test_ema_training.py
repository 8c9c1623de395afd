"""Power-function averages and EDM2's network in a run: snapshots, resume, `vadiff ema`, magnitudes over training."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vadiff import ema
from vadiff.errors import CheckpointError
from vadiff.sampling.generation import default_generation, generate, with_options
from vadiff.trainer.cli import main
from vadiff.trainer.evaluation import image_metrics
from vadiff.trainer.pictures import PictureWriter
from vadiff.trainer.report.ema_sweep import sweep_figure
from vadiff.trainer.report.magnitudes import magnitudes_figure, rms_over_training
from vadiff.trainer.training.assembly import build_denoiser
from vadiff.trainer.training.averages import SNAPSHOTS
from vadiff.trainer.training.checkpoint import load_checkpoint
from vadiff.trainer.training.post_hoc import write_averages
from vadiff.training import PRESETS, HeldOutLoss, Stopped, TrainConfig, edm_objective, open_run, train

CONFIG = TrainConfig(
    model="edm2", channels=(8, 16), sigma_rel=(0.05, 0.1), snapshot_every=2, snapshot_precision="fp32",
    steps=6, batch_size=16, warmup=0, log_every=3, checkpoint_every=3, held_out_images=20, held_out_levels=3,
    weighting="learned", class_conditional=True, tensorboard=False, device="cpu", backend="reference",
    deterministic=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "edm2"
    train(CONFIG, out=folder, progress=False)
    return folder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "run"))


def flat(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for _, value in sorted(parameters.items())])


def stored(run: Path, step: int) -> dict[str, Any]:
    return torch.load(run / SNAPSHOTS / f"{step}.pt", weights_only=True)


def test_snapshots_hold_the_averages_of_the_weights_of_every_step(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, checkpoint_every=1, keep_checkpoints=10)
    train(config, out=tmp_path, progress=False)
    assert ema.times_saved(tmp_path / SNAPSHOTS) == [2.0, 4.0, 6.0]
    names = [name for name, _ in open_run(tmp_path).denoiser("raw").named_parameters()]
    for place, sigma_rel in enumerate(config.sigma_rel):
        gamma = ema.gamma_from_sigma_rel(sigma_rel)
        expected = torch.zeros(())
        for step in range(1, 7):
            model = load_checkpoint(tmp_path, step)["model"]
            expected = torch.lerp(flat({n: model[n] for n in names}), expected, ema.decay(gamma, step, 1))
        assert torch.allclose(flat(stored(tmp_path, 6)["parameters"][place]), expected, atol=1e-6)


def test_reconstructed_weights_open_as_a_denoiser(copied: Path) -> None:
    run = open_run(copied)
    with pytest.raises(CheckpointError, match=r"has no ema-0\.1: `vadiff ema .*run --sigma-rel 0\.1` makes it"):
        run.denoiser("ema-0.1")
    write_averages(run, [0.1, 0.13])
    write_averages(run, [0.1], step=4)
    last = run.denoiser("ema-0.10")
    assert not last.training
    assert (last.image_shape, last.labels) == ((1, 8, 8), 10)
    parameters = {name: value.detach() for name, value in last.named_parameters()}
    assert torch.allclose(flat(parameters), flat(stored(copied, 6)["parameters"][1]), atol=1e-5)
    noisy, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    others = [run.denoiser("ema-0.1", step=4), run.denoiser("ema-0.13"), run.denoiser("ema")]
    assert not any(torch.equal(last(noisy, sigma), other(noisy, sigma)) for other in others)
    with pytest.raises(CheckpointError, match=r"has no ema-0\.13 of step 4: .*--sigma-rel 0\.13 --step 4` makes it"):
        run.denoiser("ema-0.13", step=4)
    with pytest.raises(ValueError, match="weights is 'ema-wide', expected ema- and a width"):
        run.denoiser("ema-wide")
    with pytest.raises(ValueError, match="weights is 'mean', expected ema, raw or ema-<sigma_rel>"):
        run.denoiser("mean")


def test_stopped_and_resumed_averages_and_snapshots_are_as_never_stopped(folder: Path, tmp_path: Path) -> None:
    calls = 0

    def stopping(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt  # killed: the last checkpoint is of step 3, a snapshot of step 4 is there
        return edm_objective(*arguments)

    with pytest.raises((KeyboardInterrupt, Stopped)):
        train(CONFIG, stopping, out=tmp_path, progress=False)
    assert ema.times_saved(tmp_path / SNAPSHOTS) == [2.0, 4.0]
    shorter = dataclasses.replace(CONFIG, snapshot_every=6)
    train(shorter, out=tmp_path, resume=True, progress=False)
    assert ema.times_saved(tmp_path / SNAPSHOTS) == [2.0, 6.0]  # that of step 4 was of the process that was killed
    assert stored(tmp_path, 2)["run"] == stored(tmp_path, 6)["run"] != stored(folder, 6)["run"]
    for one, other in zip(stored(folder, 6)["parameters"], stored(tmp_path, 6)["parameters"], strict=True):
        assert torch.equal(flat(one), flat(other))
    whole, resumed = (load_checkpoint(run)["power_averages"]["averages"] for run in (folder, tmp_path))
    assert all(torch.equal(flat(one), flat(other)) for one, other in zip(whole, resumed, strict=True))


def test_overwritten_run_leaves_no_snapshots_and_averages(copied: Path) -> None:
    write_averages(open_run(copied), [0.1])
    train(dataclasses.replace(CONFIG, steps=1, sigma_rel=()), out=copied, overwrite=True, progress=False)
    assert not (copied / SNAPSHOTS).exists()
    assert not (copied / "ema").exists()


def test_ema_command_makes_widths_and_measures_a_sweep(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ema", str(copied), "--sigma-rel", "0.05,0.15", "--step", "4"]) == 0
    assert f"ema-0.15: {copied}/ema/step-4/sigma-rel-0.15.pt" in capsys.readouterr().out
    assert main(["ema", str(copied), "--sigma-rel", "0.05,0.1,0.2", "--sweep", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    table, _, after = output.partition("Written to")
    assert f"vadiff sample {copied} --weights " in after
    rows = [line.split() for line in table.splitlines() if line.startswith("  ")]
    assert [row[0] for row in rows] == ["ema-0.05", "ema-0.1", "ema-0.2", "ema", "raw"]
    marked = [row[1] for row in rows if row[2:] == ["lowest"]]
    assert marked == [min(row[1] for row in rows)]  # raw and ema among them
    content = json.loads((copied / "ema" / "step-6" / "sweep.json").read_text())
    assert list(content["held_out"]) == ["ema-0.05", "ema-0.1", "ema-0.2", "ema", "raw"]
    last = open_run(copied).metrics()[-1]["held_out"]
    assert content["held_out"]["ema"] == pytest.approx(last["loss_ema"])
    assert content["log_snr"] == pytest.approx(last["log_snr"])
    with Image.open(copied / "ema" / "step-6" / "sweep.png") as picture:
        assert picture.width > 1000


def test_sweep_measures_images_of_every_width_from_the_same_seeds(
    copied: Path, inception_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    with PictureWriter(tmp_path / "real.npz", range(6), (1, 8, 8)) as writer:
        writer.write(0, real)
    command = ["ema", str(copied), "--sigma-rel", "0.05,0.2", "--sweep", "--device", "cpu", "--metrics", "fid,isc"]
    command += ["--images", "5", "--first-seed", "2", "--reference", str(tmp_path / "real.npz")]
    command += ["--features", "inception", "--layer", "64"]
    assert main([*command, "--inception-weights", str(inception_weights), "--cache", str(tmp_path / "cache")]) == 0
    assert "isc (Inception score) is skipped" in capsys.readouterr().out
    content = json.loads((copied / "ema" / "step-6" / "sweep.json").read_text())
    assert (content["images"], content["first_seed"]) == (5, 2)
    found = {name: values["fid-64"] for name, values in content["metrics"].items()}
    assert list(found) == ["ema-0.05", "ema-0.2", "ema", "raw"]
    run = open_run(copied)
    generation = with_options(default_generation(run.config.process), weights="ema-0.2")
    (batch,) = generate(run, range(2, 7), generation)
    by_hand = image_metrics(
        batch.images, real, metrics=["fid"], layer="64", inception_weights=inception_weights,
        cache=tmp_path / "cache", progress=False,
    )  # fmt: skip
    assert found["ema-0.2"] == by_hand["fid-64"] != found["raw"]


def test_sweep_looks_for_what_it_needs_before_it_measures(
    copied: Path,
    digits_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("no route to host")

    def measured(*arguments: object) -> None:
        pytest.fail("measured before it looked")

    monkeypatch.setattr("vadiff.trainer.training.post_hoc.held_out_of_averages", measured)
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    command = ["ema", str(copied), "--sigma-rel", "0.1", "--sweep", "--device", "cpu", "--metrics", "fid"]
    assert main([*command, "--features", "inception", "--images", "5"]) == 1
    assert "Inception weights could not be downloaded" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--images", "3", "--cache", str(digits_cache)])
    assert "images has 3 images, expected at least 5" in capsys.readouterr().err


def test_sweep_draws_a_curve_for_every_metric() -> None:
    loss = HeldOutLoss(torch.tensor([0.0, 2.0]), torch.ones(2, 3), 0.5)
    other = {"kid-768": 0.1, "kid_std-768": 0.1}
    values: dict[float | str, dict[str, float]] = {
        0.05: {"fid-768": 3.0, **other}, 0.1: {"fid-768": 4.0, **other}, "raw": {"fid-768": 5.0, **other}
    }  # fmt: skip
    figure = sweep_figure({0.1: loss, 0.05: loss}, {"raw": loss}, (0.1,), values)
    overall, _, fid, kid = figure.axes
    assert fid.get_ylabel() == "FID-768 (lower is better)"
    assert kid.get_ylabel() == "KID-768 (lower is better)"
    assert list(fid.lines[0].get_ydata()) == [3.0, 4.0]
    assert [line.get_label() for line in fid.lines[1:]] == ["kept while training", "raw"]
    assert list(fid.lines[2].get_ydata()) == [5.0, 5.0]
    assert len(overall.lines) == 3


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--sigma-rel", "0.1", "--metrics", "fid"], 2, "argument --metrics: is for --sweep, which is not given"),
        (["--sweep", "--metrics", "fid", "--inception-weights", "no.pth"], 2, "no.pth is not a file"),
        (["--sweep", "--metrics", "fid", "--images", "0"], 2, "argument --images: 0, expected at least 1"),
        (["--sigma-rel", "0.1,0.4"], 2, "argument --sigma-rel: sigma_rel is 0.4, expected above 0 and below"),
        (["--sigma-rel", "wide"], 2, "argument --sigma-rel: 'wide', expected a number"),
        ([], 2, "argument --sigma-rel: required without --sweep"),
        (["--sigma-rel", "0.1", "--step", "3"], 1, "no snapshot of time 3, only of 2, 4, 6"),
        (["--sweep", "--device", "toaster"], 2, "argument --device: device is 'toaster'"),
    ],
)
def test_ema_command_names_invalid_arguments(
    copied: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    try:
        found: object = main(["ema", str(copied), *arguments])
    except SystemExit as stop:
        found = stop.code
    assert found == status
    assert message in capsys.readouterr().err
    assert not (copied / "ema").exists()


def test_run_without_snapshots_says_how_to_get_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(dataclasses.replace(CONFIG, steps=1, sigma_rel=()), out=tmp_path, progress=False)
    assert main(["ema", str(tmp_path), "--sigma-rel", "0.1"]) == 1
    assert "has no snapshots of averages: train with --sigma-rel 0.05,0.1" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "millions"), [("cifar10-edm", 59.0), ("cifar10-edm2", 57.0)])
def test_cifar_presets_have_networks_of_one_size(name: str, millions: float) -> None:
    with torch.device("meta"):
        denoiser = build_denoiser(PRESETS[name], (3, 32, 32), 10)
    assert sum(p.numel() for p in denoiser.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_digits_presets_have_networks_of_one_size() -> None:
    sizes = [
        sum(p.numel() for p in build_denoiser(PRESETS[name], (1, 8, 8), 10).parameters())
        for name in ("digits", "digits-edm2")
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


@pytest.mark.parametrize("sigma_rel", [(0.1, 0.1), (0.3,), (0.0,)])
def test_widths_that_do_not_fit_are_named(sigma_rel: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="sigma_rel is"):
        dataclasses.replace(CONFIG, sigma_rel=sigma_rel)


@pytest.fixture(scope="module")
def trained_lines() -> dict[str, list[dict[str, Any]]]:
    """200 steps of both networks at the learning rates of their presets."""
    settings = {
        "steps": 200, "batch_size": 16, "channels": (16, 24), "log_rms": True, "log_every": 20, "tensorboard": False,
        "held_out_images": 10, "held_out_levels": 2, "backend": "reference", "device": "cpu", "sigma_rel": (),
    }  # fmt: skip
    configs = {"classic": PRESETS["digits"], "edm2": PRESETS["digits-edm2"]}
    return {
        name: train(dataclasses.replace(config, **settings), progress=False).metrics for name, config in configs.items()
    }


def test_magnitudes_stay_with_edm2_and_drift_in_the_classic_network(trained_lines) -> None:
    weights, activations = {}, {}
    for name, lines in trained_lines.items():
        _, found = rms_over_training(lines)
        weights[name] = found["weights"]
        activations[name] = np.nanmedian(found["activations"], 1)  # over layers
    assert weights["edm2"] == pytest.approx(1.0, abs=1e-3)
    assert activations["edm2"] == pytest.approx(1.0, abs=0.2)
    growth = weights["classic"][-1] / weights["classic"][0]
    assert growth.max() > 1.3
    assert np.median(growth) > 1.04
    assert activations["classic"][-1] / activations["classic"][0] > 1.1


def test_logged_update_is_the_change_of_the_weights(tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIG, model="unet", steps=2, log_rms=True, log_every=1, checkpoint_every=1, class_conditional=False
    )
    lines = train(config, out=tmp_path, progress=False).metrics
    one, two = (load_checkpoint(tmp_path, step)["model"] for step in (1, 2))
    for name, value in lines[1]["rms"]["updates"].items():
        change = two[f"network.{name}.weight"] - one[f"network.{name}.weight"]
        assert value == pytest.approx(change.square().mean().sqrt().item(), rel=1e-4)
    assert len(lines[1]["rms"]["updates"]) == len(lines[1]["rms"]["weights"]) > 10


def test_magnitudes_figure_has_a_row_for_each_kind_and_common_axes(trained_lines) -> None:
    figure = magnitudes_figure(trained_lines)
    panels = figure.axes
    assert len(panels) == 6
    assert [panel.get_title() for panel in panels[:2]] == ["classic", "edm2"]
    assert panels[2].get_ylim() == panels[3].get_ylim()
    layers = len(trained_lines["edm2"][-1]["rms"]["weights"])
    assert len(panels[3].lines) == layers + 2
    with pytest.raises(ValueError, match="other has logged no magnitudes"):
        magnitudes_figure({"other": [{"step": 1}]})


def test_report_shows_magnitudes_where_they_were_logged(copied: Path, tmp_path: Path) -> None:
    train(dataclasses.replace(CONFIG, log_rms=True), out=tmp_path / "logged", progress=False)
    for run, shown in ((tmp_path / "logged", True), (copied, False)):
        assert main(["report", str(run)]) == 0
        assert ("Magnitudes over training" in (run / "report.html").read_text()) is shown


def test_averages_of_a_width_can_be_sampled_and_evaluated(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = ["sample", str(copied), "--images", "2", "--steps", "2", "--devices", "cpu", "--weights"]
    assert main([*sample, "ema-0.1"]) == 1
    assert "`vadiff ema" in capsys.readouterr().err
    write_averages(open_run(copied), [0.1])
    assert main([*sample, "ema-0.1"]) == 0
    assert len(list((copied / "generated").glob("*.png"))) == 2
    with pytest.raises(SystemExit, match="2"):
        main([*sample, "ema-wide"])
    assert "'ema-wide', expected ema, raw or ema- and a width" in capsys.readouterr().err
    assert main(["evaluate", str(copied), "--metrics", "none", "--devices", "cpu", "--weights", "ema-0.1"]) == 0
    assert (copied / "evaluation" / "ema-0.1" / "step-6" / "held-out.csv").exists()

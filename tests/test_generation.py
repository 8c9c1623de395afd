"""vadiff.sampling.generation, vadiff.trainer.pictures and `vadiff sample`: images of a run, as files."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vadiff.errors import RunError
from vadiff.sampling import Churn
from vadiff.sampling.generation import Generation, default_generation, generate
from vadiff.trainer.cli import main
from vadiff.trainer.pictures import PictureWriter, read_pictures
from vadiff.training import Run, open_run

QUICK = Generation(steps=3)
CPU = torch.device("cpu")


@pytest.fixture
def run(trained_run: Path) -> Run:
    return open_run(trained_run)


def images_of(run: Run, seeds: Sequence[int], generation: Generation) -> Tensor:
    batches = {batch.start: batch.images for batch in generate(run, seeds, generation)}
    return torch.cat([batches[start] for start in sorted(batches)])


def difference(one: Tensor, other: Tensor) -> int:
    """Largest difference of a pixel, 0 to 255."""
    return int((one.int() - other.int()).abs().max())


@pytest.mark.parametrize(
    "how", [QUICK, Generation(steps=3, churn=Churn(2.0)), Generation("euler", steps=3, guidance=2.0)]
)
def test_image_of_a_seed_depends_on_neither_batch_size_nor_devices(run: Run, how: Generation) -> None:
    seeds = range(20, 33)
    together = images_of(run, seeds, how)
    in_small_batches = images_of(run, seeds, dataclasses.replace(how, batch_size=3, devices=(CPU, CPU)))
    alone = images_of(run, [25], how)
    assert together.shape == (13, 1, 8, 8)
    assert difference(together, in_small_batches) <= 1  # convolutions round differently at another batch size
    assert difference(together[5:6], alone) <= 1
    assert difference(together[5], together[6]) > 10


def test_classes_take_turns_unless_one_is_asked_for(run: Run) -> None:
    [batch] = generate(run, range(8, 12), QUICK)
    assert batch.labels.tolist() == [8, 9, 0, 1]
    [batch] = generate(run, range(8, 12), dataclasses.replace(QUICK, label=3))
    assert batch.labels.tolist() == [3, 3, 3, 3]


def test_flows_are_sampled_by_euler_unless_told_otherwise(run: Run) -> None:
    flow = dataclasses.replace(run, config=dataclasses.replace(run.config, process="flow"))
    assert (default_generation(run).sampler, default_generation(flow).sampler) == ("heun", "euler")
    assert default_generation(flow, "heun") == Generation("heun")


def test_diverged_weights_are_named_with_the_seed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = run.denoiser()
    next(denoiser.parameters()).data.fill_(torch.nan)
    monkeypatch.setattr(Run, "denoiser", lambda *args, **kwargs: denoiser)
    with pytest.raises(RunError, match="image of seed 7 is not finite"):
        list(generate(run, [7], QUICK))


def test_guidance_needs_a_model_that_was_trained_without_labels_too(run: Run) -> None:
    config = dataclasses.replace(run.config, label_dropout=0.0)
    with pytest.raises(ValueError, match="run had label_dropout 0"):
        list(generate(dataclasses.replace(run, config=config), [0], dataclasses.replace(QUICK, guidance=2.0)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "ddim"}, "sampler is 'ddim', expected one of heun, euler"),
        ({"sampler": "euler", "churn": Churn(1.0)}, "churn is for the sampler heun"),
        ({"steps": 1}, "steps is 1, expected at least 2"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"guidance": float("nan")}, "guidance is nan, expected a number"),
        ({"devices": ()}, "devices is empty"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generation(**settings)


def test_label_and_guidance_need_a_model_with_classes() -> None:
    assert Generation().labels([1, 2], 0) is None
    with pytest.raises(ValueError, match="label is 3, but this model was trained without classes"):
        Generation(label=3).labels([0], 0)
    with pytest.raises(ValueError, match=r"guidance is 2\.0, but this model was trained without classes"):
        Generation(guidance=2.0).labels([0], 0)
    with pytest.raises(ValueError, match="label is 10, expected 0 to 9"):
        Generation(label=10).labels([0], 10)


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
        (["--images", "0"], "argument --images: 0, expected at least 1"),
        (["--first-seed", "-1"], "argument --first-seed: -1, expected 0 or more"),
        (["--churn", "-3"], "churn amount is -3.0, expected"),
        (["--label", "12"], "label is 12, expected 0 to 9"),
        (["--devices", "toaster"], "argument --devices: 'toaster', expected auto, cpu or cuda:N"),
        (["--devices", "cuda:99"], "argument --devices: 'cuda:99', but torch sees"),
        (["--sampler", "euler", "--churn", "1"], "churn is for the sampler heun"),
    ],
)
def test_sample_refuses_invalid_arguments_and_writes_nothing(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sample", str(trained_run), "--out", str(tmp_path / "png"), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_sample_never_replaces_what_is_there(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["sample", str(trained_run), "--out", str(tmp_path)])
    assert f"{tmp_path} exists already" in capsys.readouterr().err


def test_sample_of_a_folder_that_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(tmp_path)]) == 1
    assert "is not a run directory" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "missing")]) == 1


@pytest.mark.parametrize("name", ["png", "images.npz"])
def test_interrupted_writing_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with contextlib.suppress(KeyboardInterrupt), PictureWriter(tmp_path / name, [0, 1], (3, 4, 4)) as writer:
        writer.write(0, images)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["png", "images.npz"])
def test_pictures_are_read_back_to_the_bit(tmp_path: Path, name: str, channels: int) -> None:
    images = torch.randint(0, 256, (5, channels, 4, 6), dtype=torch.uint8)
    with PictureWriter(tmp_path / name, range(5), (channels, 4, 6)) as writer:
        writer.write(3, images[3:])  # batches come in any order
        writer.write(0, images[:3])
    assert torch.equal(read_pictures(tmp_path / name), images)


def test_pictures_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        read_pictures(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"holds no images, expected files ending in \.png"):
        read_pictures(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 5)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b.png has 4 x 5 pixels, expected 4 x 4 like a.png"):
        read_pictures(tmp_path)
    (tmp_path / "b.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(ValueError, match=r"b\.png is not a readable image"):
        read_pictures(tmp_path)
    for content, message in ((b"PK\x03\x04 cut", "or damaged"), (b"text", "or damaged")):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_pictures(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"shape \(2, 4, 4, 3\) and dtype float64, expected \[N, H, W, 1 or 3\] uint8"):
        read_pictures(tmp_path / "y.npz")

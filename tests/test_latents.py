"""Data sets of latents: encoded in shards, standardised and drawn, trained on, decoded to pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_vae  # benchmarks/experiments
from safetensors.torch import load_file, save_file
from torch import Tensor

from vadiff.errors import DataError, RunError
from vadiff.optimal_loss import OptimalLoss
from vadiff.pixels import normalised, pixels
from vadiff.trainer.cli import main
from vadiff.trainer.data import Images, LatentEncoding, inputs_of_rows, open_latents
from vadiff.trainer.data.autoencoder import Autoencoder, open_autoencoder
from vadiff.trainer.data.encode import EncodingOptions, encode_images
from vadiff.trainer.data.fixed_noise import fixed_noise
from vadiff.trainer.data.latents import FACTS, PLAN
from vadiff.training import TrainConfig, open_run, train

diffusers = pytest.importorskip("diffusers", reason="diffusers does not import here")
SHARD = 16


def new_vae(seed: int = 0, channels: int = 1) -> Any:
    """An untrained VAE of one halving, whose latents have different scales."""
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(
        in_channels=channels, out_channels=channels, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2,
        mid_block_add_attention=False,
    ).eval()  # fmt: skip
    with torch.no_grad():
        vae.quant_conv.weight[:2] *= torch.tensor([3.0, 10.0]).view(2, 1, 1, 1)
        vae.quant_conv.bias[:2] += torch.tensor([5.0, -20.0])
    return vae


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "small"
    new_vae().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vae(vae_path: Path) -> Autoencoder:
    return open_autoencoder(vae_path)


@pytest.fixture(scope="module")
def source() -> Images:
    """Random pictures: 40 to train on, 10 held out, of 3 classes."""
    generator = torch.Generator().manual_seed(3)
    pictures = torch.randint(0, 256, (50, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (50,), generator=generator)
    return Images(pictures[:40], labels[:40], pictures[40:], labels[40:], held_out_is_test=True, classes=3)


Encode = Callable[..., Path]


@pytest.fixture
def encode(tmp_path: Path, vae: Autoencoder, vae_path: Path, source: Images) -> Encode:
    def encoded(name: str = "latents", images: Images = source, by: Autoencoder = vae, **options: Any) -> Path:
        options = {"shard": SHARD, "batch_size": 5, **options}
        encode_images(images, by, vae_path, tmp_path / name, EncodingOptions(**options))
        return tmp_path / name

    return encoded


@torch.no_grad()
def moments_of(pictures: Tensor) -> Tensor:
    """Mean and log-variance by diffusers alone."""
    posterior = new_vae().encode(normalised(pictures)).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], 1)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("float16", 1e-3)])
def test_stored_numbers_are_the_moments_of_diffusers_with_labels_and_held_out_part(
    encode: Encode, source: Images, dtype: str, error: float
) -> None:
    latents = open_latents(encode(dtype=dtype))
    assert latents.train[:].dtype == latents.train.dtype == getattr(torch, dtype)
    assert latents.train.shape == (40, 4, 4, 4)
    assert latents.shape == (2, 4, 4)
    for stored, pictures in ((latents.train, source.train), (latents.held_out, source.held_out)):
        torch.testing.assert_close(stored[:].float(), moments_of(pictures[:]), rtol=error, atol=error)
    assert latents.train_labels is not None
    assert latents.held_out_labels is not None
    assert source.train_labels is not None
    assert source.held_out_labels is not None
    assert torch.equal(latents.train_labels, source.train_labels)
    assert torch.equal(latents.held_out_labels, source.held_out_labels)
    assert (latents.classes, latents.held_out_is_test) == (3, True)
    assert latents.groups is not None
    assert latents.groups.bincount().tolist() == [16, 16, 8]


def test_x0_is_drawn_from_the_moments_and_standardised(encode: Encode, source: Images) -> None:
    latents = open_latents(encode(dtype="float32"))
    encoding = latents.encoding
    assert isinstance(encoding, LatentEncoding)
    assert encoding.random
    mean, log_variance = moments_of(source.train[:]).double().chunk(2, 1)
    expected_mean = mean.mean((0, 2, 3))
    expected_std = (mean.var((0, 2, 3), correction=0) + log_variance.exp().mean((0, 2, 3))).sqrt()
    torch.testing.assert_close(torch.tensor(encoding.mean).double(), expected_mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(encoding.std).double(), expected_std, rtol=1e-4, atol=1e-4)

    noise = torch.randn(40, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    drawn = mean + (0.5 * log_variance).exp() * noise
    expected = 0.5 * (drawn - expected_mean.view(-1, 1, 1)) / expected_std.view(-1, 1, 1)
    torch.testing.assert_close(encoding.inputs(latents.train[:], noise).double(), expected, rtol=1e-3, atol=1e-4)

    many = torch.randn(4000, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    x0 = encoding.inputs(latents.train[torch.arange(4000) % 40], many)
    torch.testing.assert_close(x0.mean((0, 2, 3)), torch.zeros(2), atol=0.01, rtol=0)
    torch.testing.assert_close(x0.std((0, 2, 3)), torch.full((2,), 0.5), atol=0.01, rtol=0)


def test_fixed_draws_do_not_depend_on_the_number_and_are_not_the_noise_of_the_held_out_loss(encode: Encode) -> None:
    latents = open_latents(encode())
    stored = latents.train[:]
    x0 = latents.encoding.inputs(stored)
    assert torch.equal(latents.encoding.inputs(stored), x0)
    assert torch.equal(latents.encoding.inputs(stored[:7]), x0[:7])
    still = latents.encoding.inputs(stored, torch.zeros_like(x0))
    drawn = (x0 - still).flatten()
    assert float(drawn.std()) > 0.01
    together = torch.corrcoef(torch.stack([drawn, fixed_noise(x0.shape, 0).flatten()]))[0, 1]
    assert abs(float(together)) < 0.1


def test_samples_are_drawn_once_from_the_seed(encode: Encode, source: Images) -> None:
    latents = open_latents(encode("one", samples=True, dtype="float32", seed=4))
    again = open_latents(encode("two", samples=True, dtype="float32", seed=4, batch_size=16))
    other = open_latents(encode("three", samples=True, dtype="float32", seed=5))
    assert not latents.encoding.random
    assert latents.shape == tuple(latents.train.shape[1:]) == (2, 4, 4)
    mean, log_variance = moments_of(source.train[:]).chunk(2, 1)
    noise = (latents.train[:] - mean) / (0.5 * log_variance).exp()
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.1)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.1)
    torch.testing.assert_close(again.train[:16], latents.train[:16], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other.train[:], latents.train[:], atol=0.1)
    x0 = latents.encoding.inputs(latents.train[:])
    torch.testing.assert_close(x0.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x0.std((0, 2, 3), correction=0), torch.full((2,), 0.5), atol=1e-5, rtol=0)


def test_mirrored_pictures_are_encoded_too(encode: Encode, source: Images) -> None:
    latents = open_latents(encode(mirrored=True, dtype="float32"))
    mirrored = torch.cat([source.train[:], source.train[:].flip(-1)])
    torch.testing.assert_close(latents.train[:], moments_of(mirrored), rtol=1e-5, atol=1e-5)
    assert len(latents.held_out) == 10
    assert latents.train_labels is not None
    assert torch.equal(latents.train_labels[40:], latents.train_labels[:40])


def test_rows_are_read_from_all_shards_in_any_order_and_by_other_processes(encode: Encode) -> None:
    samples = open_latents(encode()).train
    whole = samples[:]
    rows = torch.tensor([39, 0, 17, 15, 16, 0, -1])
    assert torch.equal(samples[rows], whole[rows])
    assert torch.equal(samples[14:35], whole[14:35])
    assert torch.equal(samples[torch.empty(0, dtype=torch.int64)], whole[:0])
    with pytest.raises(IndexError, match="rows are 3 to 40, expected below 40"):
        samples[torch.tensor([3, 40])]
    sent = pickle.dumps(samples)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)[rows], whole[rows])


def test_a_killed_call_goes_on_with_the_missing_shards(encode: Encode, vae_path: Path, tmp_path: Path) -> None:
    whole = encode("whole", samples=True)

    class Killed(Exception):
        pass

    class Counting(Autoencoder):
        """Ends the call at the picture after `left`."""

        left = 10**9

        def moments(self, pictures: Tensor) -> Tensor:
            self.left -= len(pictures)
            if self.left < 0:
                raise Killed
            return super().moments(pictures)

    counting = Counting(new_vae(), "cpu")
    counting.left = 25  # one shard and a half
    with pytest.raises(Killed):
        encode("stopped", samples=True, by=counting)
    with pytest.raises(DataError, match=r"stopped is not finished: run the same `vadiff encode` again"):
        open_latents(tmp_path / "stopped")
    assert (tmp_path / "stopped" / "train-00000.npy").exists()
    counting.left = 34  # what is missing
    assert files_in(encode("stopped", samples=True, by=counting)) == files_in(whole)
    counting.left = 0
    assert files_in(encode("stopped", samples=True, by=counting)) == files_in(whole)


def test_a_folder_of_other_arguments_or_files_is_refused(encode: Encode, source: Images, tmp_path: Path) -> None:
    path = encode()
    with pytest.raises(DataError, match=r"other arguments: dtype was float16, is float32. Name another folder"):
        encode(dtype="float32")
    with pytest.raises(DataError, match="latents per shard was 16, is 20"):
        encode(shard=20)
    with pytest.raises(DataError, match="vae_fingerprint was"):
        encode(by=Autoencoder(new_vae(1)))
    with pytest.raises(DataError, match="source's fingerprint was"):
        encode(images=source._replace(train=source.train[:].flip(0)))
    (path / PLAN).write_text("{")
    with pytest.raises(DataError, match=r"plan.json cannot be read: .*Remove .*latents"):
        encode()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(DataError, match="other is not empty, and holds no latents"):
        encode("other")
    with pytest.raises(ValueError, match="shard is 0, expected at least 1"):
        encode("none", shard=0)


def test_damaged_data_sets_are_named(encode: Encode, tmp_path: Path) -> None:
    whole = encode()

    def damaged(file: str, content: bytes | None) -> Path:
        path = tmp_path / "damaged"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        (path / file).unlink()
        if content is not None:
            (path / file).write_bytes(content)
        return path

    shard = (whole / "train-00001.npy").read_bytes()
    for content in (None, b"", shard[:-100], b"\x93NUMPY" + bytes(20)):
        with pytest.raises(DataError, match=r"train-00001.npy cannot be read: .*Remove it and encode again"):
            open_latents(damaged("train-00001.npy", content))
    with pytest.raises(DataError, match=r"holds float16 \(8, 4, 4, 4\), expected float16 \(16, 4, 4, 4\)"):
        open_latents(damaged("train-00001.npy", (whole / "train-00002.npy").read_bytes()))
    with pytest.raises(DataError, match=r"train-labels.npy cannot be read"):
        open_latents(damaged("train-labels.npy", None))
    facts = json.loads((whole / FACTS).read_text())
    for change in ({"mean": [0.0]}, {"std": [1.0, 0.0]}, {"std": [1.0, math.nan]}, {"latent_shape": [2]}):
        content = json.dumps({**facts, "encoding": {**facts["encoding"], **change}}).encode()
        with pytest.raises(DataError, match=r"latents.json cannot be read: .*Encode the data set again"):
            open_latents(damaged(FACTS, content))
    with pytest.raises(DataError, match="nowhere, which is not a folder; expected a folder that `vadiff encode` wrote"):
        open_latents(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no latents.json"):
        open_latents(tmp_path)


def test_fixed_draws_go_by_the_row(encode: Encode) -> None:
    images = open_latents(encode())
    rows = torch.tensor([17, 3, 29])
    assert torch.equal(
        inputs_of_rows(images.encoding, images.train, rows), images.encoding.inputs(images.train[:])[rows]
    )


def test_latents_of_a_later_version_are_refused(encode: Encode) -> None:
    facts = encode() / FACTS
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "version": 2}))
    with pytest.raises(DataError, match="version is 2, expected 1: a later vadiff wrote it"):
        open_latents(facts.parent)


def test_fingerprint_is_that_of_the_latents_wherever_they_are(encode: Encode, tmp_path: Path) -> None:
    path = encode()
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copytree(path, tmp_path / "elsewhere" / "copy")
    facts = json.loads((copy / FACTS).read_text())
    facts["encoding"]["vae"] = "/another/path"
    (copy / FACTS).write_text(json.dumps(facts))
    assert open_latents(copy).fingerprint == open_latents(path).fingerprint != ""
    assert open_latents(encode("other", samples=True)).fingerprint != open_latents(path).fingerprint


class Fixed(Autoencoder):
    """Answers with given moments for every picture, the last picture of all excepted."""

    def __init__(self, mean: float, log_variance: float, last: float) -> None:
        super().__init__(new_vae())
        self.numbers, self.seen = (mean, log_variance, last), 0

    def moments(self, pictures: Tensor) -> Tensor:
        mean, log_variance, last = self.numbers
        found = torch.cat([torch.full((len(pictures), 2, 4, 4), number) for number in (mean, log_variance)], 1)
        self.seen += len(pictures)
        if self.seen == 50:
            found[-1, 0, 0, 0] = last
        return found


def test_numbers_that_do_not_fit_the_file_are_named(encode: Encode) -> None:
    with pytest.raises(DataError, match=r"held-out image 9 reach 7e\+04, above 65504, the largest float16: give --dty"):
        encode(by=Fixed(0.0, 0.0, 7e4))
    encode("float32", by=Fixed(0.0, 0.0, 7e4), dtype="float32")
    with pytest.raises(DataError, match="latents of held-out image 9 are not finite: the VAE overflows"):
        encode("nan", by=Fixed(0.0, 0.0, math.nan), dtype="float32")
    with pytest.raises(DataError, match="channel 0 of the latents is the same everywhere"):
        encode("constant", by=Fixed(1.0, -2000.0, 1.0), dtype="float32")


def test_images_that_the_vae_does_not_take_are_refused(encode: Encode, source: Images) -> None:
    with pytest.raises(DataError, match="images are 8 x 7 pixels, expected multiples of 2"):
        encode(images=source._replace(train=source.train[:][..., :7]))
    with pytest.raises(DataError, match="images have 1 channels, expected 3: those that the VAE was made for"):
        encode(by=Autoencoder(new_vae(channels=3)))


def test_a_missing_or_damaged_vae_is_named(tmp_path: Path, vae_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere, which is not a folder; expected a folder that diffusers' Autoenc"):
        open_autoencoder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"which has no config.json"):
        open_autoencoder(tmp_path)
    broken = shutil.copytree(vae_path, tmp_path / "broken")
    weights = next(broken.glob("*.safetensors"))
    whole = load_file(weights)
    save_file({name: value for name, value in whole.items() if "conv_out" not in name}, weights, {"format": "pt"})
    with pytest.raises(DataError, match=r"broken, whose weights do not fit its config.json: missing_keys .*conv_out"):
        open_autoencoder(broken)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DataError, match="broken, which cannot be read"):
        open_autoencoder(broken)
    weights.unlink()
    with pytest.raises(DataError, match="broken, which cannot be read"):
        open_autoencoder(broken)


def test_a_pipelines_folder_is_read_by_its_vae(tmp_path: Path, vae_path: Path, vae: Autoencoder) -> None:
    shutil.copytree(vae_path, tmp_path / "pipeline" / "vae")
    assert open_autoencoder(tmp_path / "pipeline").fingerprint == vae.fingerprint
    assert Autoencoder(new_vae(1)).fingerprint != vae.fingerprint


def test_pictures_are_decoded_with_the_same_vae_only(
    encode: Encode, source: Images, vae_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = open_latents(encode(dtype="float32"))
    encoding = latents.encoding
    assert isinstance(encoding, LatentEncoding)
    stored = latents.held_out[:]
    monkeypatch.setattr("vadiff.trainer.data.autoencoder._DECODED_AT_ONCE", 3 * 64)  # three at a time
    found = encoding.pictures(encoding.inputs(stored, torch.zeros(10, 2, 4, 4)))
    with torch.no_grad():
        expected = pixels(new_vae().decode(stored[:, :2]).sample)
    assert found.shape == (10, *encoding.picture_shape(latents.shape))
    assert int((found.int() - expected.int()).abs().max()) <= 1  # rounding of the standardisation
    assert encoding.pictures(torch.empty(0, 2, 4, 4)).shape == (0, 1, 8, 8)

    new_vae(1).save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match=r"other, of fingerprint \w+, expected \w+, that of the VAE that encoded"):
        encoding.with_vae(tmp_path / "other").pictures(torch.zeros(1, 2, 4, 4))
    moved = shutil.copytree(vae_path, tmp_path / "moved")
    away = dataclasses.replace(encoding, vae=str(tmp_path / "gone"))
    with pytest.raises(DataError, match="gone, which is not a folder"):
        away.pictures(torch.zeros(1, 2, 4, 4))
    assert torch.equal(away.with_vae(moved).pictures(encoding.inputs(stored[:2])), encoding.pictures(
        encoding.inputs(stored[:2])))  # fmt: skip


def test_a_bad_picture_is_named_by_the_process_that_reads_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pillow = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    new_vae(channels=3).save_pretrained(tmp_path / "vae")
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        pillow.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{number}.png")
    command = ["encode", "--vae", str(tmp_path / "vae"), "--data", str(tmp_path / "pictures"), "--image-size", "8"]
    command += ["--workers", "1", "--batch-size", "4", "--on-bad-image", "skip", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    assert "12 images encoded in" in capfd.readouterr().out
    assert len(open_latents(tmp_path / "whole").train) == 11
    (tmp_path / "pictures" / "5.png").write_bytes(b"not a picture")
    assert main([*command, "--out", str(tmp_path / "stopped")]) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("vadiff: ")
    assert "5.png" in error
    assert "Traceback" not in error


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command prints that succeeds."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def digit_latents(tmp_path_factory: pytest.TempPathFactory, vae_path: Path) -> Path:
    """The digits as latents, by the command."""
    pytest.importorskip("sklearn")
    path = tmp_path_factory.mktemp("digits") / "latents"
    assert main(["encode", "--vae", str(vae_path), "--dataset", "digits", "--out", str(path), "--device", "cpu"]) == 0
    return path


def latent_config(path: Path, **fields: Any) -> TrainConfig:
    options = {
        "dataset": "latents", "data": str(path), "image_size": 4, "image_channels": 2, "sigma_data": 0.5,
        "channels": (8, 8), "norm_groups": 4, "steps": 3, "batch_size": 32, "log_every": 1, "held_out_images": 20,
        "tensorboard": False, "device": "cpu", "backend": "reference", "weighting": "constant", "workers": 0,
    }  # fmt: skip
    return TrainConfig(**{**options, **fields})


@pytest.fixture(scope="module")
def latent_run(digit_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "latents"
    config = latent_config(digit_latents, steps=12, batch_size=64, samples_every=12, sample_count=4)
    train(config, out=path, progress=False)
    return path


def test_encode_says_what_it_did_and_how_to_train(
    digit_latents: Path, vae_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = command(
        capsys, "encode", "--vae", vae_path, "--dataset", "digits", "--out", digit_latents, "--device", "cpu"
    )
    assert "0 images encoded" in printed
    assert "1,797 were there" in printed
    assert "1 x 8 x 8 pixels are 2 x 4 x 4 latents" in printed
    flags = f"--dataset latents --data {digit_latents} --image-size 4 --image-channels 2 --sigma-data 0.5 --no-flips"
    assert f"Train on them with {flags}" in printed


def test_latents_can_be_in_memory_or_in_their_files(digit_latents: Path) -> None:
    kept, streamed = (train(latent_config(digit_latents, cache=cache), progress=False) for cache in ("host", "none"))
    for mine, other in zip(kept.metrics, streamed.metrics, strict=True):
        assert mine["loss"] == other["loss"]


def test_a_latent_is_drawn_anew_each_time_it_is_used(digit_latents: Path) -> None:
    images = open_latents(digit_latents)
    stored = images.train[:32]
    config = latent_config(digit_latents, steps=2)  # each step sees all of them
    few = images._replace(train=stored, train_labels=None, groups=None)
    seen = []

    def objective(criterion: Any, output: Tensor, x0: Tensor, eps: Tensor, sigma: Tensor, *rest: Any) -> Tensor:
        seen.append(x0.clone())
        return criterion(output, x0, log_snr=-2.0 * sigma.log())

    train(config, objective, images=few, progress=False)
    mean = images.encoding.inputs(stored, torch.zeros(32, 2, 4, 4))
    nearest = [torch.cdist(x0.flatten(1), mean.flatten(1)).argmin(1) for x0 in seen]
    first, second = (x0[order.argsort()] for x0, order in zip(seen, nearest, strict=True))
    assert not torch.allclose(first, second, atol=1e-3)


def test_a_run_on_latents_is_sampled_as_pictures_without_its_data(
    latent_run: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pillow = pytest.importorskip("PIL.Image")
    with pillow.open(latent_run / "samples" / "step-12.png") as grid:
        assert grid.size == (17, 17)  # two by two pictures of 8 x 8, and a line between them
    alone = shutil.copytree(latent_run, tmp_path / "run")
    config = open_run(alone).config
    dataclasses.replace(config, data=str(tmp_path / "gone")).save(alone / "config.yaml")
    options = ["--images", 3, "--steps", 2, "--devices", "cpu"]
    command(capsys, "sample", alone, "--out", tmp_path / "one.npz", *options)
    moved = shutil.copytree(vae_path, tmp_path / "moved")
    command(capsys, "sample", alone, "--out", tmp_path / "two.npz", "--vae", moved, *options)
    one, two = (np.load(tmp_path / name)["arr_0"] for name in ("one.npz", "two.npz"))
    assert one.shape == (3, 8, 8, 1)
    assert (one == two).all()
    (alone / "encoding.json").unlink()
    with pytest.raises(RunError, match=r"encoding.json is missing, and data is .*gone, which is not a folder"):
        assert open_run(alone).encoding
    (alone / "encoding.json").write_text("{}")
    with pytest.raises(RunError, match=r"encoding.json cannot be read: KeyError"):
        assert open_run(alone).encoding


def test_flags_that_do_not_fit_a_run_are_refused(
    latent_run: Path, trained_run: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(trained_run), "--vae", str(vae_path), "--out", str(tmp_path / "x")]) == 1
    assert "expected none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sample", str(latent_run), "--clip-x0", "--out", str(tmp_path / "x")])
    assert "argument --clip-x0: not with a run on latents" in capsys.readouterr().err
    for target in ([str(latent_run)], [str(trained_run), "--reference", str(latent_run)]):
        with pytest.raises(SystemExit):
            main(["evaluate", *target, "--images", "8", "--devices", "cpu"])
        assert "the run was trained on latents, expected pictures to compare with" in capsys.readouterr().err


def test_training_says_before_its_first_step_what_is_missing(digit_latents: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 x 4 x 4, expected 4 x 4 x 4 .*: --image-size 4 --image-channels 2"):
        train(latent_config(digit_latents, image_channels=4))
    with pytest.raises(DataError, match="data is None, expected the folder that `vadiff encode` wrote"):
        train(latent_config(digit_latents, data=None))
    with pytest.raises(ValueError, match="flips is true, expected false: mirrored latents are not"):
        latent_config(digit_latents, flips=True)
    away = shutil.copytree(digit_latents, tmp_path / "latents")
    facts = json.loads((away / FACTS).read_text())
    facts["encoding"]["vae"] = str(tmp_path / "gone")
    (away / FACTS).write_text(json.dumps(facts))
    with pytest.raises(DataError, match="gone, which is not a folder"):
        train(latent_config(away, samples_every=2), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(latent_config(away), out=tmp_path / "run", progress=False)  # without grids it decodes nothing


def test_held_out_loss_gap_gradients_and_averages_see_latents(
    latent_run: Path, digit_latents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    printed = command(capsys, "validate", latent_run, "--images", 16, "--device", "cpu", "--json")
    levels = json.loads(printed)["levels"]
    assert all(0.3 < level["loss"] < 3.0 for level in levels)  # EDM's loss of a new network is near 1
    command(
        capsys, "evaluate", latent_run, "--metrics", "none", "--held-out-images", 16, "--gradients",
        "--gradient-images", 128, "--gap", "--gap-images", 16, "--devices", "cpu",
    )  # fmt: skip
    written = {path.name for path in (latent_run / "evaluation" / "step-12").iterdir()}
    assert {"held-out.csv", "gradients.csv", "gap.csv"} <= written


def test_optimal_loss_is_that_of_the_drawn_latents(
    digit_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("vadiff.trainer.cli.optimal_loss._SQUARE", 64)
    command(
        capsys, "optimal-loss", "--dataset", "latents", "--data", digit_latents, "--out", tmp_path, "--levels", 2,
        "--sigma-max", 400, "--limit", 64, "--device", "cpu",
    )  # fmt: skip
    curve = OptimalLoss.load(tmp_path / "optimal_loss.csv")
    assert (curve.samples, curve.elements) == (1500, 32)
    images = open_latents(digit_latents)
    variance = images.encoding.inputs(images.train[:]).var(0, correction=0).sum()
    assert float(curve.loss[curve.sigma.argmax()]) == pytest.approx(float(variance), rel=0.02)


def test_levels_are_suggested_for_latents(
    digit_latents: Path, latent_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    for name, value in {"FEWEST_STEPS": 2, "_CHANNELS": (8, 8), "_MEASURED": 32, "_LEVELS": 12}.items():
        monkeypatch.setattr(f"vadiff.trainer.training.short.{name}", value)
    options = ["--images", 70, "--steps", 2, "--device", "cpu", "--json"]
    content = json.loads(
        command(capsys, "levels", "suggest", "--dataset", "latents", "--data", digit_latents, *options)
    )
    assert content["sigma_data"] == 0.5
    assert "seeds on each half of 70 images of 2 x 4 x 4" in content["source"]
    held_out = json.loads(command(capsys, "levels", "suggest", latent_run, "--from", "held-out", "--json"))
    assert held_out["sigma_data"] == 0.5
    with pytest.raises(SystemExit):
        main(["levels", "suggest", "--dataset", "latents", "--data", str(digit_latents), "--image-size", "8"])
    assert "image size is 8, expected none: latents have their own, 4" in capsys.readouterr().err


@pytest.mark.parametrize("cache", ["host", "none"])
def test_posterior_mean_targets_are_latents(digit_latents: Path, cache: str) -> None:
    config = latent_config(digit_latents, target="posterior_mean", reference=128, cache=cache)
    trained = train(config, progress=False)
    assert all(math.isfinite(line["loss"]) for line in trained.metrics)


def test_autoencoder_of_the_example_learns_and_its_error_is_that_of_its_decoded_means(tmp_path: Path) -> None:
    pictures = torch.randint(100, 156, (40, 3, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = pictures.expand(-1, -1, 32, 32)
    torch.manual_seed(0)
    network = train_vae.autoencoder()
    before = train_vae.error_of(network, pictures)["rmse"]
    assert train_vae.train(network, pictures, minutes=0.02, generator=torch.Generator().manual_seed(0)) >= 1
    network.save_pretrained(tmp_path)
    found = train_vae.error_of(network, pictures)
    assert found["rmse"] < before
    assert found["psnr_db"] == pytest.approx(20.0 * math.log10(2.0 / found["rmse"]))
    vae = open_autoencoder(tmp_path)
    assert vae.latent_shape((3, 32, 32)) == (4, 8, 8)
    decoded = vae.pictures(vae.moments(pictures)[:, :4])
    assert float((normalised(decoded) - normalised(pictures)).square().mean().sqrt()) == pytest.approx(
        found["rmse"], rel=0.05
    )

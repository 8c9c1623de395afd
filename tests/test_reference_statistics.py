"""vadiff.trainer.evaluation.feature_statistics: mean and covariance of real images' features in place of the images."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edm2_files
import numpy as np
import pytest
import torch
from torch import Tensor

from vadiff.errors import DataError, UserError
from vadiff.trainer.cli import main
from vadiff.trainer.evaluation import image_metrics
from vadiff.trainer.evaluation.feature_statistics import FeatureStatistics, is_statistics, read_statistics
from vadiff.trainer.evaluation.fidelity import find_network
from vadiff.trainer.importing import import_networks
from vadiff.trainer.pictures import PictureWriter


def statistics(size: int, seed: int = 0) -> FeatureStatistics:
    random = np.random.default_rng(seed)
    factor = random.normal(size=(size, size))
    return FeatureStatistics(random.normal(size=size), factor @ factor.T)


def folder(path: Path, seed: int, number: int = 12) -> Path:
    pixels = torch.randint(
        0, 128 * (1 + seed), (number, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    with PictureWriter(path, range(number), (3, 8, 8)) as writer:
        writer.write(0, pixels)
    return path


def test_distance_of_independent_features_is_the_closed_form() -> None:
    """(μ - μ')² + (s - s')² for each feature."""
    s, t = np.array([0.5, 2.0, 1.0]), np.array([1.0, 0.1, 1.0])
    mu, nu = np.array([0.0, 1.0, 2.0]), np.array([0.5, -1.0, 2.0])
    one, two = FeatureStatistics(mu, np.diag(s**2)), FeatureStatistics(nu, np.diag(t**2))
    assert one.distance(two) == pytest.approx(((mu - nu) ** 2 + (s - t) ** 2).sum(), rel=1e-12)
    assert one.distance(one) == pytest.approx(0.0, abs=1e-12)


def test_statistics_are_those_of_the_features_in_float64() -> None:
    features = 1e3 + torch.randn(50, 4)
    found = FeatureStatistics.of(features, "weights")
    assert np.allclose(found.mean, features.double().mean(0), rtol=1e-14)
    assert np.allclose(found.covariance, torch.cov(features.double().T), rtol=1e-9)
    assert found.made_by == "weights"
    assert found.key == FeatureStatistics(found.mean, found.covariance).key
    assert found.key != FeatureStatistics(found.mean + 1.0, found.covariance).key


def test_archive_of_mu_and_sigma_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = statistics(64)
    np.savez(tmp_path / "theirs.npz", mu=made.mean, sigma=made.covariance)
    made.save(tmp_path / "mine.npz")
    for name in ("theirs.npz", "mine.npz"):
        read = read_statistics(tmp_path / name, layer="64")
        assert (read.key, read.made_by) == (made.key, None)


@pytest.mark.parametrize("kind", [dict, edm2_files.EasyDict])
def test_pickle_has_statistics_of_several_features(
    kind: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, module in edm2_files.pretend_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    parts = {"fid": statistics(2048), "fd_dinov2": statistics(1024, 1)}
    content = {name: kind(mu=one.mean, sigma=one.covariance) for name, one in parts.items()}
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(kind(**content)))
    assert read_statistics(tmp_path / "ref.pkl").key == parts["fid"].key
    assert read_statistics(tmp_path / "ref.pkl", "dinov2").key == parts["fd_dinov2"].key
    with pytest.raises(DataError, match=r"ref\.pkl has fid, fd_dinov2, expected fd_digits with mu and sigma"):
        read_statistics(tmp_path / "ref.pkl", "digits")


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (np.random.default_rng(0).normal(size=(64, 64)), "is not symmetric, expected a covariance"),
        (-np.eye(64), "has the eigenvalue -1, expected a covariance"),
    ],
)
def test_a_matrix_that_is_no_covariance_is_refused(sigma: np.ndarray, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "ref.npz", mu=np.zeros(64), sigma=sigma)
    with pytest.raises(DataError, match=message):
        read_statistics(tmp_path / "ref.npz", layer="64")


def test_an_archive_that_unpacks_to_more_than_statistics_is_not_unpacked(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "ref.npz", mu=np.zeros(2**24, np.float32), sigma=np.zeros((2, 2)))
    with pytest.raises(DataError, match="an array has more than 33,619,968 bytes"):
        read_statistics(tmp_path / "ref.npz")


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(pickle.dumps({"fid": Harm(path.parent / "harm")})), "asks for posix.mkdir"),
        (lambda path: path.write_bytes(b"nothing"), "cannot be read as statistics"),
        (lambda path: path.write_bytes(pickle.dumps([1])), r"has list, expected fid with mu and sigma"),
        (lambda path: path.write_bytes(pickle.dumps({"fid": {"mu": np.zeros(2048)}})), "has no array sigma"),
        (lambda path: path.write_bytes(pickle.dumps({"fid": {"mu": np.zeros(64)}})), r"has shape \(64,\), expected"),
        (
            lambda path: path.write_bytes(pickle.dumps({"fid": {"mu": np.full(2048, np.nan)}})),
            "mu in .* is not finite",
        ),
    ],
)
def test_file_of_anything_else_is_named(write: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "ref.pkl")
    with pytest.raises(DataError, match=message):
        read_statistics(tmp_path / "ref.pkl")
    assert not (tmp_path / "harm").exists()


def test_images_are_no_statistics(tmp_path: Path) -> None:
    with PictureWriter(tmp_path / "images.npz", range(2), (1, 8, 8)) as writer:
        writer.write(0, torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    for path in (tmp_path, tmp_path / "images.npz", tmp_path / "missing.npz"):
        assert not is_statistics(path)


@pytest.fixture
def command(inception_weights: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`vadiff evaluate` with the cheapest features."""
    common = ["--inception-weights", str(inception_weights), "--layer", "64", "--devices", "cpu"]
    return lambda *given: ["evaluate", *map(str, given), *common, "--cache", str(tmp_path / "cache")]


def test_saved_statistics_give_the_distance_that_the_images_give(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn, real, saved = folder(tmp_path / "drawn", 0), folder(tmp_path / "real", 1), tmp_path / "ref.npz"
    assert main(command(real, "--save-reference", saved)) == 0
    assert "Mean and covariance of 64 features of 12 images" in capsys.readouterr().out
    assert main(command(drawn, "--reference", real, "--metrics", "fid")) == 0
    expected = float(capsys.readouterr().out.split()[-1])
    assert main(command(drawn, "--reference", saved)) == 0
    printed = capsys.readouterr().out
    assert f"kid, prc is skipped: {saved} has statistics of real images, and not the images" in printed
    assert f"12 images against the statistics in {saved}" in printed
    assert printed.split()[-2] == "fid-64"
    assert float(printed.split()[-1]) == pytest.approx(expected, rel=1e-4)


def test_imported_run_is_compared_without_its_data(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, module in edm2_files.pretend_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    import_networks([edm2_files.write(tmp_path / "net.pkl", edm2_files.network())], tmp_path / "run")
    assert main(command(folder(tmp_path / "real", 1), "--save-reference", tmp_path / "ref.npz")) == 0
    draw = ["--images", "6", "--steps", "2", "--no-held-out", "--metrics", "fid"]
    assert main(command(tmp_path / "run", "--reference", tmp_path / "ref.npz", *draw)) == 0
    assert (tmp_path / "run" / "evaluation" / "step-0" / "metrics.json").is_file()
    assert main(command(tmp_path / "run", "--reference", tmp_path / "ref.npz", *draw[:4])) == 1  # no held-out images


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--reference", "ref.npz", "--metrics", "kid"], "metrics is kid, expected fid: ref.npz has statistics"),
        (["--save-reference", "ref.pkl"], "'ref.pkl', expected a file ending in .npz"),
        (["--save-reference", "ref.npz"], "ref.npz exists already: replace it with --overwrite, or name another"),
        (["--reference", "other.npz", "--metrics", "fid"], "reference is of the network other"),
        (["--dinov2-weights", "ref.npz", "--reference", "ref.npz"], "ref.npz is given as dinov2_weights"),
    ],
)
def test_what_statistics_cannot_do_is_named(
    given: list[str], message: str, command: Callable[..., list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    made = statistics(64)
    made.save(Path("ref.npz"))
    FeatureStatistics(made.mean, made.covariance, "other").save(Path("other.npz"))
    with pytest.raises(SystemExit):
        main(command(folder(tmp_path / "drawn", 0), *given))
    assert message in capsys.readouterr().err


STAND_IN = """
import torch

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = torch.nn.Module()
        self.patch_embed.proj = torch.nn.Linear(3, 1024)

    def forward(self, images):
        assert images.shape[1:] == (3, 224, 224)
        return self.patch_embed.proj(images.mean((2, 3)))

def dinov2_vitl14(pretrained=True):
    assert not pretrained
    return Network()
"""


@pytest.fixture
def dinov2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A stand-in for DINOv2's code in torch's hub, and its weights, also in dino.pth: the mean colour, linearly."""
    pytest.importorskip("torch_fidelity", reason="torch-fidelity does not import here (it needs torchvision)")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    hub = tmp_path / "hub" / "facebookresearch_dinov2_main"
    hub.mkdir(parents=True)
    (hub / "hubconf.py").write_text(STAND_IN)
    random = torch.Generator().manual_seed(0)
    state = {
        "patch_embed.proj.weight": torch.randn(1024, 3, generator=random),
        "patch_embed.proj.bias": torch.zeros(1024),
    }
    torch.save(state, tmp_path / "dino.pth")
    return state


def test_distance_by_dinov2_is_that_of_the_networks_features(dinov2: dict[str, Tensor], tmp_path: Path) -> None:
    """With the stand-in's weights W it is the distance of the mean colours, seen through W."""
    images = [
        torch.randint(0, high, (12, 3, 16, 16), generator=torch.Generator().manual_seed(high)).to(torch.uint8)
        for high in (100, 256)
    ]
    values = image_metrics(
        images[0], images[1], metrics=["fid"], features="dinov2", dinov2_weights=tmp_path / "dino.pth",
        cache=tmp_path / "cache", progress=False,
    )  # fmt: skip
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resized

    expected = []
    for pixels in images:
        colour = resized(pixels.float(), size=(224, 224), align_corners=False).mean((2, 3)) / 255
        colour = (colour - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
        expected.append(FeatureStatistics.of(colour @ dinov2["patch_embed.proj.weight"].T))
    assert list(values) == ["fd-dinov2"]
    assert values["fd-dinov2"] == pytest.approx(expected[0].distance(expected[1]), rel=1e-4)


def test_dinov2_needs_its_weights_and_its_code(
    dinov2: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vadiff.trainer.evaluation.extractors import dinov2_network

    with pytest.raises(ValueError, match="features is dinov2, but none are given as dinov2_weights"):
        find_network("dinov2")
    torch.save({"patch_embed.proj.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"dinov2_weights is .*other.pth, expected dinov2_vitl14_pretrain.pth"):
        dinov2_network(tmp_path / "other.pth")
    torch.save({"x": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="which holds no weights of DINOv2"):
        dinov2_network(tmp_path / "other.pth")
    (tmp_path / "other.pth").write_bytes(pickle.dumps(Harm(tmp_path / "harm"), 2))
    with pytest.raises(ValueError, match="does not load as plain tensors"):
        dinov2_network(tmp_path / "other.pth")
    assert not (tmp_path / "harm").exists()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(UserError, match=r"could not be loaded \(offline\). Without internet, copy facebookresearch"):
        dinov2_network(tmp_path / "dino.pth")

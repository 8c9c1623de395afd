"""`vadiff import`: EDM2's networks from files in NVlabs' layout, read without running anything in them."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import edm2_files
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vadiff import ema
from vadiff.errors import DataError, RunError
from vadiff.integrations.edm import EDM2Loss
from vadiff.trainer.cli import main
from vadiff.trainer.data.autoencoder import open_autoencoder
from vadiff.trainer.data.images import hold_out_last
from vadiff.trainer.importing import import_networks
from vadiff.training import open_run, train


@pytest.fixture(autouse=True)
def their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in edm2_files.pretend_modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An imported run with 5 classes."""
    import_networks([edm2_files.write(tmp_path / "net.pkl", edm2_files.network())], tmp_path / "run")
    return tmp_path / "run"


def inputs(shape: tuple[int, int, int] = (3, 8, 8)) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.002, 0.05, 0.5, 3.0, 80.0])
    x = torch.randn(5, *shape, generator=random) * (sigma[:, None, None, None] + 0.5)
    return x, sigma, torch.tensor([0, 1, 2, 3, 4])


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of each sample."""
    return float(((a.double() - b).abs().flatten(1).amax(1) / b.abs().flatten(1).amax(1)).max())


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"classes": 0, "layers": 2},
        {"images": 4, "dtype": torch.float16},
        {"height": 16, "channels": (64, 32, 128), "attention": (16, 4), "classes": 3},
    ],
    ids=["small", "unconditional", "latents in half precision", "two heads"],
)
def test_imported_network_computes_what_the_file_describes(sizes: dict[str, Any], tmp_path: Path) -> None:
    network = edm2_files.network(**sizes)
    done = import_networks([edm2_files.write(tmp_path / "net.pkl", network)], tmp_path / "run")
    denoiser = open_run(tmp_path / "run").denoiser().double()
    x, sigma, labels = inputs(done.network.image_shape)
    given = labels % sizes.get("classes", 5) if denoiser.labels else None
    with torch.no_grad():
        found = denoiser(x.double(), sigma.double(), given)
    assert difference(found, edm2_files.denoised(network, x, sigma, given)) < 1e-6
    assert torch.equal(found, open_run(tmp_path / "run").denoiser("raw").double()(x.double(), sigma.double(), given))


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_pickles_of_any_protocol_are_read(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "net.pkl"
    path.write_bytes(pickle.dumps({"ema": edm2_files.network(), "dataset_kwargs": {}}, protocol))
    import_networks([path], tmp_path / "run")
    assert open_run(tmp_path / "run").config.channels


def test_a_call_that_was_killed_while_it_moved_its_files_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, rename = edm2_files.write(tmp_path / "net.pkl", edm2_files.network()), Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == "import.json":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        import_networks([file], tmp_path / "run")
    monkeypatch.undo()
    for name, module in edm2_files.pretend_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    import_networks([file], tmp_path / "run", overwrite=True)
    assert open_run(tmp_path / "run").denoiser()


def test_sizes_are_found_in_the_file(tmp_path: Path) -> None:
    network = edm2_files.network(images=4, height=16, channels=(64, 64, 128), layers=2, attention=(8, 4), classes=7)
    config = import_networks(
        [edm2_files.write(tmp_path / "edm2-img512-xs-2147483-0.135.pkl", network)], tmp_path / "run", data="latents"
    ).config
    assert (config.dataset, config.image_shape, config.data) == ("latents", (4, 16, 16), "latents")
    assert (config.channels, config.layers_per_block, config.attention_resolutions) == ((64, 64, 128), 2, (8, 4))
    assert (config.sigma_data, config.class_conditional, config.process) == (0.5, True, "edm")
    assert config.steps == 2**20  # of 2048 images, which is 2^31 images
    assert open_run(tmp_path / "run").checkpoints() == [2**20]


def test_image_without_a_class_is_not_that_of_the_original(run: Path) -> None:
    """EDM2's network adds nothing for it, vadiff's the embedding of a further class, here of ones."""
    denoiser = open_run(run).denoiser().double()
    x, sigma, _ = inputs()
    with torch.no_grad():
        assert (
            difference(denoiser(x.double(), sigma.double()), edm2_files.denoised(edm2_files.network(), x, sigma, None))
            > 0.01
        )
        embedding = denoiser.network.class_embedding
        ones = embedding(torch.eye(6, dtype=torch.float64)[5:] * 6**0.5)
    assert torch.allclose(ones, torch.ones_like(ones), atol=1e-3)


def test_imported_run_is_sampled_and_refuses_guidance_without_a_guide(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = ["sample", str(run), "--images", "2", "--steps", "2", "--devices", "cpu"]
    assert main([*draw, "--out", str(run / "a.npz")]) == 0
    assert np.load(run / "a.npz")["arr_0"].shape == (2, 8, 8, 3)
    with pytest.raises(SystemExit):
        main([*draw, "--guidance", "2"])
    assert "give a guide" in capsys.readouterr().err


def test_snapshot_of_a_training_with_vadiffs_loss_is_imported(tmp_path: Path) -> None:
    loss = EDM2Loss()
    file = edm2_files.write(tmp_path / "net.pkl", edm2_files.network(), loss_fn=loss)
    assert import_networks([file], tmp_path / "run").network.classes == 5


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """A VAE of 2 pixels per latent, with random weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    made = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4,
    )  # fmt: skip
    made.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_latents_are_decoded_after_the_standardisation_of_edm2(vae: Path, tmp_path: Path) -> None:
    file = edm2_files.write(tmp_path / "net.pkl", edm2_files.network(images=4))
    assert main(["import", str(file), "--out", str(tmp_path / "run"), "--vae", str(vae)]) == 0
    latents = torch.randn(2, 4, 8, 8)
    mean, std = (torch.tensor(v).view(4, 1, 1) for v in ([5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]))
    expected = open_autoencoder(vae).pictures(latents / 0.5 * std + mean)
    assert (open_run(tmp_path / "run").pictures(latents).int() - expected.int()).abs().max() <= 1  # rounding
    draw = ["sample", str(tmp_path / "run"), "--images", "2", "--steps", "2", "--devices", "cpu"]
    assert main([*draw, "--out", str(tmp_path / "drawn.npz")]) == 0
    assert np.load(tmp_path / "drawn.npz")["arr_0"].shape == (2, 16, 16, 3)


def test_vae_belongs_to_a_network_that_draws_latents(
    run: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import", str(tmp_path / "net.pkl"), "--out", str(run), "--overwrite", "--vae"]
    assert main([*command, str(vae)]) == 1
    assert "expected none: the network draws 3 channels, latents of EDM2 have 4" in capsys.readouterr().err
    file = edm2_files.write(tmp_path / "latents.pkl", edm2_files.network(images=4))
    assert main(["import", str(file), "--out", str(tmp_path / "latents")]) == 0
    assert "to sample it, import it again with --vae PATH" in capsys.readouterr().out
    assert main(["sample", str(tmp_path / "latents"), "--images", "1", "--steps", "2", "--devices", "cpu"]) == 1
    assert "import the run again, with --vae PATH" in capsys.readouterr().err


def test_network_without_classes_guides_one_with_classes(run: Path, tmp_path: Path) -> None:
    file = edm2_files.write(tmp_path / "unconditional.pkl", edm2_files.network(classes=0))
    import_networks([file], tmp_path / "guide")
    draw = ["sample", str(run), "--images", "2", "--steps", "2", "--guidance", "2", "--guide", str(tmp_path / "guide")]
    assert main([*draw, "--devices", "cpu", "--out", str(run / "guided.npz")]) == 0


def snapshot_files(folder: Path, dtype: torch.dtype = torch.float32) -> dict[tuple[int, float], Path]:
    """Snapshots of one training at two times, of two widths."""
    return {
        (kimg, width): edm2_files.write(
            folder / f"network-snapshot-{kimg:07d}-{width:.3f}.pkl",
            edm2_files.network(seed=place, dtype=dtype),
        )
        for place, (kimg, width) in enumerate((k, w) for k in (8388, 16777) for w in (0.05, 0.1))
    }


def test_snapshots_become_those_of_one_run_and_give_any_width(tmp_path: Path) -> None:
    files = snapshot_files(tmp_path)
    assert main(["import", *map(str, files.values()), "--out", str(tmp_path / "run")]) == 0
    assert ema.times_saved(tmp_path / "run" / "snapshots") == [4096.0, 8192.0]
    assert main(["ema", str(tmp_path / "run"), "--sigma-rel", "0.1,0.07"]) == 0
    run = open_run(tmp_path / "run")
    assert run.config.sigma_rel == (0.05, 0.1)
    x, sigma, labels = inputs()
    with torch.no_grad():
        stored = run.denoiser("ema-0.1").double()(x.double(), sigma.double(), labels)
        mixed = run.denoiser("ema-0.07").double()(x.double(), sigma.double(), labels)
    assert difference(stored, edm2_files.denoised(edm2_files.network(seed=3), x, sigma, labels)) < 1e-6
    assert difference(mixed, edm2_files.denoised(combined(files, 0.07), x, sigma, labels)) < 1e-5


def combined(files: dict[tuple[int, float], Path], sigma_rel: float) -> nn.Module:
    """The network of the weights' linear combination, which has the profile of a width."""
    times = [4096.0 if kimg == 8388 else 8192.0 for kimg, _ in files]
    gammas = [ema.gamma_from_sigma_rel(width) for _, width in files]
    mix = ema.reconstruction_coefficients(times, gammas, 8192.0, ema.gamma_from_sigma_rel(sigma_rel))
    networks = [edm2_files.network(seed=seed) for seed in range(len(files))]
    state = {
        name: sum(
            float(share) * network.state_dict()[name].double() for share, network in zip(mix, networks, strict=True)
        )
        for name in networks[0].state_dict()
        if "fourier" not in name
    }
    networks[-1].load_state_dict(state, strict=False)
    return networks[-1]


def test_snapshots_in_half_precision_stay_so(tmp_path: Path) -> None:
    import_networks([*snapshot_files(tmp_path, torch.float16).values()], tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "snapshots" / "4096.pt", weights_only=True)
    assert {value.dtype for value in saved["parameters"][0].values()} == {torch.float16}
    assert saved["rest"]["network.noise_features.phases"].dtype == torch.float32


def test_same_files_are_snapshots_of_the_same_run(tmp_path: Path) -> None:
    files = [*snapshot_files(tmp_path).values()]
    for name in ("a", "b"):
        import_networks(files, tmp_path / name)
    runs = {torch.load(tmp_path / name / "snapshots" / "4096.pt", weights_only=True)["run"] for name in ("a", "b")}
    assert len(runs) == 1


def test_networks_of_different_sizes_are_no_snapshots_of_a_run_and_nothing_is_written(tmp_path: Path) -> None:
    files = [
        edm2_files.write(tmp_path / f"net-{kimg:07d}-0.100.pkl", edm2_files.network(channels=channels))
        for kimg, channels in ((2048, (32, 64)), (4096, (64, 64)))
    ]
    with pytest.raises(DataError, match=r"net-0002048.* is of another network than .*net-0004096"):
        import_networks(files, tmp_path / "run")
    assert not [entry for entry in (tmp_path / "run").rglob("*") if entry.name != ".lock"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.pkl", "net-0000002-0.100.pkl"], r"a.pkl has no time and width in its name"),
        (["a-0000002-0.100.pkl", "b-0000002-0.100.pkl"], "are of the same time and width"),
    ],
)
def test_snapshots_without_a_time_of_their_own_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        import_networks([tmp_path / name for name in names], tmp_path / "run")


def test_training_starts_from_an_imported_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_networks([edm2_files.write(tmp_path / "net.pkl", edm2_files.network(classes=0))], tmp_path / "run")
    imported = open_run(tmp_path / "run")
    config = dataclasses.replace(
        imported.config, transfer=str(imported.path), steps=1, batch_size=4, held_out_levels=2, learning_rate=1e-30,
        weighting="constant", tensorboard=False, device="cpu",
    )  # fmt: skip
    pictures = torch.randint(256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    trained = train(config, images=hold_out_last(pictures, None, 0))
    assert f"averages of step 0 of {imported.path}, 59 of 59 tensors" in capsys.readouterr().err
    x, sigma, _ = inputs()
    with torch.no_grad():
        assert difference(trained.denoiser(x, sigma), imported.denoiser()(x, sigma)) < 1e-3  # 1e-4 is added to norms
    magnitude = trained.denoiser.network.first.weight.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(magnitude, torch.ones_like(magnitude), rtol=1e-3, atol=0)


def test_imported_run_is_not_trained_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "--out", str(run)]) == 1
    assert (
        "was imported, and cannot be trained on: it has weights, but no state of an optimiser"
        in capsys.readouterr().err
    )
    assert main(["diagnose", str(run)]) == 1
    assert "was imported: it has weights, but no statistics" in capsys.readouterr().err
    for ask in (lambda: open_run(run).criterion(), lambda: open_run(run).levels(), lambda: open_run(run).profile()):
        with pytest.raises(RunError, match="no statistics of its training"):
            ask()


def test_run_is_replaced_only_if_asked_to(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "mine.txt").write_text("kept")
    command = ["import", str(tmp_path / "net.pkl"), "--out", str(run)]
    assert main(command) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert (run / "mine.txt").exists()
    assert open_run(run).denoiser().labels == 5
    assert list(json.loads((run / "import.json").read_text())["files"]) == ["net.pkl"]


def without(network: nn.Module, path: str) -> nn.Module:
    """The network without one of its tensors or modules."""
    parent, _, name = path.rpartition(".")
    delattr(network.get_submodule(parent), name)
    return network


def narrow(part: Any) -> None:
    """Take an input from a layer."""
    part.weight = nn.Parameter(part.weight[:, :-1].clone())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: without(n, "unet"), "class Precond without a part unet"),
        (lambda n: without(n, "sigma_data"), "sigma_data of ema is None"),
        (lambda n: without(n, "unet.emb_noise"), "has no unet.emb_noise.weight"),
        (lambda n: without(n, "unet.dec.4x4_in0.attn_qkv"), "no unet.dec.4x4_in0.attn_qkv.weight.*Below 64 channels"),
        (lambda n: without(n, "unet.enc.8x8_conv"), "0 tensors of the name unet.enc.NxN_conv.weight"),
        (lambda n: without(n, "unet.dec.8x8_block1.conv_skip"), "nothing for network.decoder.4.match.weight"),
        (lambda n: n.unet.register_buffer("extra", torch.zeros(2)), "has unet.extra, which has no place"),
        (lambda n: setattr(n.unet.enc["8x8_block0"], "clip_act", 100), "clip_act of unet.enc.8x8_block0 is 100"),
        (lambda n: setattr(n.unet.dec["4x4_in0"], "num_heads", 2), "num_heads of unet.dec.4x4_in0 is 2, expected 1"),
        (lambda n: narrow(n.unet.emb_noise), r"noise_embedding.weight has shape \(64, 31\), expected \(64, 32\)"),
        (lambda n: setattr(n.unet.out_gain, "data", torch.zeros(2)), "a tensor has an unexpected shape"),
        (lambda n: setattr(n.unet.dec["4x4_in0"].attn_qkv.weight, "data", torch.zeros(191, 64, 1, 1)), "has shape"),
    ],
)  # fmt: skip
def test_what_a_file_lacks_is_named(change: Any, message: str, tmp_path: Path) -> None:
    network = edm2_files.network()
    change(network)
    with pytest.raises(DataError, match=message):
        import_networks([edm2_files.write(tmp_path / "net.pkl", network)], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_file_that_is_missing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(tmp_path / "none.pkl"), "--out", str(tmp_path / "run")]) == 1
    assert f"{tmp_path / 'none.pkl'} cannot be read: No such file" in capsys.readouterr().err

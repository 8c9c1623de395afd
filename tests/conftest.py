"""One suite for every backend: fixtures `backend`, `device` and `make_criterion` stand in front of each test.

A new backend is one more name in BACKENDS. The native one runs twice: its CPU kernels, and its CUDA kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_source
import numpy as np
import pytest
import torch
import triton_interpreter

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: has to stand before that
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matmul, see poisoned_memory

BACKENDS = ["reference", "native", "triton"]


def pytest_configure(config: pytest.Config) -> None:
    """Infinities and NaN are data to a kernel; only the interpreter's numpy remarks on them."""
    config.addinivalue_line("filterwarnings", r"ignore:.* encountered in:RuntimeWarning:triton\.runtime\.interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What stands in tests/gpu needs an NVIDIA GPU, and says so where there is none."""
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU: torch.cuda.is_available() is False"))


@pytest.fixture(params=[*BACKENDS, "native-cuda"])
def kernels(request: pytest.FixtureRequest) -> str:
    """What computes: a backend on the device it is made for. native-cuda is emulated where there is no GPU."""
    name: str = request.param
    if name != "native-cuda":
        return usable(name)
    if torch.cuda.is_available():
        usable("native")
        if vadiff_native().CUDA_ARCHITECTURES is None:
            pytest.skip("the native kernels were built without CUDA")
    else:
        folder = request.getfixturevalue("tmp_path_factory").getbasetemp() / "cuda_source"
        if "PYTEST_XDIST_WORKER" in os.environ:
            folder = folder.parent.parent / "cuda_source"  # one for all workers
        cuda_source.emulate(request.getfixturevalue("monkeypatch"), folder)
    return name


@pytest.fixture
def backend(kernels: str) -> str:
    return kernels.split("-")[0]


@pytest.fixture
def device(kernels: str) -> torch.device:
    return device_of(kernels)


@pytest.fixture
def interpreted(backend: str, device: torch.device) -> bool:
    """Whether kernels run in Triton's interpreter: some 0.2 s for a small call, 10 ms more for each sample."""
    return backend == "triton" and device.type == "cpu"


@pytest.fixture
def make_criterion(backend: str, device: torch.device) -> Callable[..., torch.nn.Module]:
    """DiffusionLoss of the backend under test, on its device; 16 bins over (−8, 8) unless told otherwise."""
    import vadiff

    def make(weighting: object = "variance_aware", **options: object) -> torch.nn.Module:
        settings = {"bins": 16, "log_snr_range": (-8.0, 8.0), "half_life": 256.0, **options}
        return vadiff.DiffusionLoss(weighting, backend=backend, **settings).to(device)

    return make


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin come filled with NaN, so that an element no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may become larger than 20 kB: a write beyond fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def vadiff_native() -> ModuleType:
    return importlib.import_module("vadiff.ops.native")


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory: class-conditional digits, 4 steps of a tiny network, two sample grids and held-out losses."""
    from vadiff.training import TrainConfig, train

    torch.set_num_threads(1)
    config = TrainConfig(
        channels=(8, 16), class_conditional=True, steps=4, batch_size=64, log_every=1, samples_every=2, sample_count=4,
        held_out_every=2, held_out_images=20, tensorboard=False, device="cpu", backend="reference",
    )  # fmt: skip
    path = tmp_path_factory.mktemp("runs") / "digits"
    train(config, out=path, progress=False)
    return path


@pytest.fixture(scope="session")
def make_run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A copy of the trained run under a name, with other values in its config."""
    import shutil

    import yaml

    def make(name: str, **fields: object) -> Path:
        path = shutil.copytree(trained_run, tmp_path_factory.mktemp("runs") / name)
        config = yaml.safe_load((path / "config.yaml").read_text())
        (path / "config.yaml").write_text(yaml.safe_dump(config | fields))
        return path

    return make


@pytest.fixture(scope="session")
def report_groups(make_run: Callable[..., Path]) -> list:
    """Runs as a report compares them: two weightings, the second with two seeds; FID at two steps of each."""
    from vadiff.trainer.report import group_runs, read_history
    from vadiff.training import open_run

    paths = [make_run("a", weighting="constant"), make_run("b"), make_run("c", seed=1)]
    for number, path in enumerate(paths):
        for step in (2, 4):
            folder = path / "evaluation" / f"step-{step}"
            folder.mkdir(parents=True)
            metrics = {"fid-768": 20.0 / step + number, "kid_std": 0.1}
            (folder / "metrics.json").write_text(json.dumps({"images_seen": 64 * step, "metrics": metrics}))
    return group_runs([read_history(open_run(path)) for path in paths])


@pytest.fixture(scope="session")
def digits() -> torch.Tensor:
    """The training digits, in [-1, 1]. [1500, 1, 8, 8]"""
    from vadiff.trainer.data import load_digits

    return load_digits().train


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the trained digits classifier, which takes seconds."""
    pytest.importorskip("torch_fidelity", reason="torch-fidelity does not import here (it needs torchvision)")
    from vadiff.trainer.evaluation.digits_classifier import trained_classifier

    folder = tmp_path_factory.mktemp("digits-cache")
    trained_classifier(folder)
    return folder


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of torch-fidelity's Inception network with random numbers in it; NaN from Mixed_7 on."""
    pytest.importorskip("torch_fidelity", reason="torch-fidelity does not import here (it needs torchvision)")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("random", ["64"], feature_extractor_weights_path=str(path))
    state = network.state_dict()
    for name, value in state.items():
        if name.startswith(("Mixed_7", "fc")) and value.is_floating_point():
            value.fill_(math.nan)
    torch.save(state, path)
    return path


def usable(backend: str) -> str:
    if backend == "native":
        _native_loads()
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if backend == "triton" and device_of(backend).type == "cpu":
        triton_interpreter.round_like_a_gpu()
        triton_interpreter.read_arrays_of_one_element()
        triton_interpreter.remember()
    return backend


def _native_loads() -> None:
    """Skips where nothing could have compiled the kernels; fails where they are missing nevertheless."""
    from vadiff.ops import backends

    kernels = backends.load_native()
    if isinstance(kernels, backends.Obstacle):
        compilers = [shutil.which(name) for name in ("c++", "g++", "clang++")]
        if isinstance(kernels.__cause__, ModuleNotFoundError) and not any(compilers):
            pytest.skip(str(kernels))
        pytest.fail(str(kernels))


def device_of(kernels: str) -> torch.device:
    on_gpu = kernels in ("triton", "native-cuda") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Runs of `vadiff ablate` are trained in this process, which is faster; the list says in which order."""
    from vadiff.training import train

    trained: list[Path] = []

    def train_here(self: object, run: Any) -> bool:
        trained.append(run.path)
        train(run.config, out=run.path, resume=True, progress=False)
        return True

    monkeypatch.setattr("vadiff.trainer.ablation.runner._Children.train", train_here)
    return trained

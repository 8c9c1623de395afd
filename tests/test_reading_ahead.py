"""Training on pictures in files: the same images from memory and from workers, on one rank and on two, after a stop."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import join_two_ranks, leave_two_ranks, run_two_ranks
from test_pictures import tarred
from test_training_resume import assert_same, outcome, stopping_at

from vadiff.errors import DataError, RunError
from vadiff.trainer.data import hold_out, open_pictures, with_labels
from vadiff.trainer.training.caching import in_memory
from vadiff.trainer.training.distributed import Ranks
from vadiff.trainer.training.image_source import ReadAhead, Shares
from vadiff.trainer.training.optimal_curve import training_set
from vadiff.trainer.training.streams import ShuffledIndices, Streams
from vadiff.training import Stopped, TrainConfig, open_run, train

SIZE = 8
ONE_RANK = Ranks()
CONFIG = TrainConfig(
    dataset="images", image_size=SIZE, sigma_data=0.5, cache="none", workers=0, steps=6, batch_size=16,
    channels=(8, 16), norm_groups=4, flips=True, class_conditional=True, log_every=2, checkpoint_every=2,
    held_out_images=4, held_out_levels=3, tensorboard=False, device="cpu", backend="reference", deterministic=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of ten pictures."""
    folder = tmp_path_factory.mktemp("shards")
    source = folder / "picture.png"
    for shard in range(6):
        contents: dict[str, bytes] = {}
        for number in range(10 * shard, 10 * shard + 10):
            pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(source)
            contents |= {f"{number:03d}.png": source.read_bytes(), f"{number:03d}.cls": str(number % 3).encode()}
        tarred(folder / f"{shard}.tar", contents)
    source.unlink()
    return folder


def config_of(shards: Path, **fields: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, data=str(shards), **fields)


def read(shards: Path, first: int, steps: int, workers: int, ranks: Ranks = ONE_RANK) -> list[list[int]]:
    """The rows that a rank reads in some steps."""
    config = config_of(shards)
    data = hold_out(open_pictures(shards, SIZE))
    images, streams = data.train, Streams(0, 0, torch.device("cpu"))
    assert data.groups is not None
    order = streams.order_by_groups(data.groups)
    indices = ShuffledIndices(order, len(images), config.batch_size, torch.device("cpu"))
    source = ReadAhead(images, indices, Shares(config, ranks), torch.device("cpu"), workers)
    found = []
    for step in range(first, first + steps):
        source.prepare(step)
        stored, rows = source.part(0)
        assert torch.equal(stored, images[rows])
        found.append(rows.tolist())
    return found


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_any_number_of_workers_reads_the_same_from_any_step(shards: Path, workers: int) -> None:
    whole = read(shards, 0, 7, 0)
    assert read(shards, 0, 3, workers) == whole[:3]
    assert read(shards, 5, 2, workers) == whole[5:]


def test_ranks_share_the_batches_of_one_rank(shards: Path) -> None:
    whole = read(shards, 0, 4, 0)
    parts = [read(shards, 0, 4, 0, Ranks(rank, 2)) for rank in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole


def test_each_image_is_read_once_in_each_pass(shards: Path) -> None:
    number = len(hold_out(open_pictures(shards, SIZE)).train)
    rows = [row for batch in read(shards, 0, 4 * number // 16 + 1, 0) for row in batch]
    for start in range(0, 4 * number, number):
        assert sorted(rows[start : start + number]) == list(range(number))
    assert rows[:number] != rows[number : 2 * number]


def test_shards_are_shuffled_by_sixteen_at_a_time() -> None:
    groups = torch.arange(40).repeat_interleave(5)
    order = Streams(0, 0, torch.device("cpu")).order_by_groups(groups)(0, len(groups))
    assert sorted(order.tolist()) == list(range(200))
    windows = [set(groups[order[start : start + 80]].tolist()) for start in (0, 80, 160)]
    assert [len(window) for window in windows] == [16, 16, 8]
    assert not windows[0] & windows[1]
    assert groups[order[:80]].diff().ne(0).float().mean() > 0.8  # mixed within a window


@pytest.mark.parametrize("cache", ["host", "none"])
@pytest.mark.parametrize("workers", [0, 2])
def test_where_images_are_kept_changes_nothing(shards: Path, tmp_path: Path, cache: str, workers: int) -> None:
    train(config_of(shards, cache="device"), out=tmp_path / "device", progress=False)
    train(config_of(shards, cache=cache, workers=workers), out=tmp_path / "other", progress=False)
    for one, other in zip(outcome(tmp_path / "device"), outcome(tmp_path / "other"), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("target", ["data", "posterior_mean"])
def test_stopped_and_resumed_with_other_workers_is_as_never_stopped(shards: Path, tmp_path: Path, target: str) -> None:
    config = config_of(shards, accumulate=2, dropout=0.1, target=target, reference=32)
    train(config, out=tmp_path / "whole", progress=False)
    with pytest.raises(Stopped):
        train(dataclasses.replace(config, workers=2), stopping_at(7), out=tmp_path / "parted", progress=False)
    assert open_run(tmp_path / "parted").checkpoints()[-1] == 4
    train(dataclasses.replace(config, workers=1), out=tmp_path / "parted", resume=True, progress=False)
    for one, other in zip(outcome(tmp_path / "whole"), outcome(tmp_path / "parted"), strict=True):
        assert_same(one, other)


def test_two_ranks_resume_to_the_bit(shards: Path, tmp_path: Path) -> None:
    run_two_ranks(_two_ranks, str(tmp_path), str(shards))
    assert_same(outcome(tmp_path / "whole")[0], outcome(tmp_path / "parted")[0])


def _two_ranks(rank: int, folder: str, shards: str) -> None:
    join_two_ranks(rank, folder)
    config = config_of(Path(shards), workers=1, schedule="constant")
    train(config, out=f"{folder}/whole", progress=False)  # its worker is started as this rank was, by no fork
    multiprocessing.set_start_method(None, force=True)  # from here on as by a rank of torchrun
    train(dataclasses.replace(config, steps=3), out=f"{folder}/parted", progress=False)
    train(dataclasses.replace(config, workers=0), out=f"{folder}/parted", resume=True, progress=False)
    leave_two_ranks()


def test_killed_run_leaves_no_process_and_resumes_to_the_bit(shards: Path, tmp_path: Path) -> None:
    config = config_of(shards, workers=1, steps=10_000, schedule="constant", model="edm2")
    config.save(tmp_path / "config.yaml")
    command = [sys.executable, "-m", "vadiff", "train", "--config", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "killed")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (tmp_path / "killed" / "checkpoints" / "step-4").exists():
        assert process.poll() is None
        time.sleep(0.02)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = open_run(tmp_path / "killed").checkpoints()[-1] + 5
    ended = dataclasses.replace(config, steps=steps, workers=0)
    train(ended, out=tmp_path / "whole", progress=False)
    train(ended, out=tmp_path / "killed", resume=True, progress=False)
    for one, other in zip(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"), strict=True):
        assert_same(one, other)
    assert children
    deadline = time.monotonic() + 20
    while any(_is_running(child) for child in children):
        assert time.monotonic() < deadline, "workers outlive the training process"
        time.sleep(0.2)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_signal_to_all_processes_of_a_run_leaves_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    config = config_of(shards, workers=2, steps=10_000, schedule="constant", checkpoint_every=10_000, model="edm2")
    config.save(tmp_path / "config.yaml")
    command = [sys.executable, "-m", "vadiff", "train", "--config", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")], start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143
    stopped = re.search(r"stopped by SIGTERM after step (\d+)", said)
    assert stopped is not None, said
    assert open_run(tmp_path / "run").checkpoints() == [int(stopped.group(1))]


def damaged_zip(path: Path) -> Path:
    """Sixty pictures of classes 0 to 2, some of them broken."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(60):
            pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            archive.writestr(f"{number % 3}/{number:02d}.png", b"broken" if number % 7 == 0 else file.getvalue())
    return path


def test_pictures_in_place_of_bad_ones_have_their_own_labels(tmp_path: Path) -> None:
    images = hold_out(open_pictures(damaged_zip(tmp_path / "bad.zip"), SIZE, on_bad_image="skip"))
    config = config_of(tmp_path / "bad.zip", cache="device", on_bad_image="skip")
    whole = in_memory(images, config, torch.device("cpu"), progress=False)
    for one, other in zip(
        training_set(images, flips=False, class_conditional=True),
        training_set(whole, flips=False, class_conditional=True),
        strict=True,
    ):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    for part, labels in (("train", "train_labels"), ("held_out", "held_out_labels")):
        found = with_labels(getattr(images, part), getattr(images, labels), slice(None))
        assert torch.equal(found[0], getattr(whole, part))
        assert found[1] is not None
        assert torch.equal(found[1], getattr(whole, labels))


def test_references_from_elsewhere_are_refused_at_resume(shards: Path, tmp_path: Path) -> None:
    config = config_of(shards, target="posterior_mean", batch_size=8, reference=40, schedule="constant", flips=False)
    for cache, other in (("none", "device"), ("device", "none")):
        train(dataclasses.replace(config, steps=2, cache=cache), out=tmp_path / cache, progress=False)
        with pytest.raises(RunError, match=f"cache is {other}, by which the images, and with them the references"):
            train(dataclasses.replace(config, cache=other), out=tmp_path / cache, resume=True, progress=False)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_an_error_of_a_step_that_is_never_reached_stops_nothing(tmp_path: Path) -> None:
    images = hold_out(open_pictures(damaged_zip(tmp_path / "bad.zip"), SIZE)).train
    broken = [row for row in range(len(images)) if int(images.name(row).split(".")[0][-2:]) % 7 == 0]  # type: ignore[attr-defined]
    rows = torch.tensor([row for row in range(len(images)) if row not in broken][:32])
    bad = torch.tensor(broken[:1] * 16)
    indices = ShuffledIndices(lambda *_: torch.cat([rows, bad]), 48, 16, torch.device("cpu"))
    source = ReadAhead(images, indices, Shares(CONFIG, ONE_RANK), torch.device("cpu"), 0)
    source._to_device.runs_ahead = True  # as on a GPU
    source.prepare(0)
    source.prepare(1)
    with pytest.raises(DataError, match="cannot be read as a picture"):
        source.prepare(2)


def test_bad_pictures_stop_a_run_or_are_counted(shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    content = bytearray((damaged / "2.tar").read_bytes())
    content[600:640] = bytes(40)  # in the first picture
    (damaged / "2.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"020\.png in .*2\.tar cannot be read as a picture.*--on-bad-image skip"):
        train(config_of(damaged, workers=2, held_out_images=1), out=tmp_path / "stopped", progress=False)
    assert not multiprocessing.active_children()
    found = [
        train(config_of(damaged, workers=2, on_bad_image="skip", cache=cache), out=tmp_path / cache, progress=False)
        for cache in ("none", "device")
    ]
    assert found[0].metrics[-1]["bad_images"] == 1
    assert [line["loss"] for line in found[0].metrics] == [line["loss"] for line in found[1].metrics]
    assert json.loads((tmp_path / "none" / "metrics.jsonl").read_text().splitlines()[-1])["bad_images"] == 1


def test_resuming_with_other_pictures_is_an_error(shards: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    config = config_of(data, schedule="constant")
    train(dataclasses.replace(config, steps=2), out=tmp_path / "run", progress=False)
    (data / "0.tar").rename(data / "9.tar")
    with pytest.raises(RunError, match="began with other images: names, sizes or labels"):
        train(config, out=tmp_path / "run", resume=True, progress=False)


def test_memory_does_not_grow_with_passes_over_the_data(shards: Path) -> None:
    images = hold_out(open_pictures(shards, SIZE)).train
    indices = ShuffledIndices(Streams(0, 0, torch.device("cpu")).order, len(images), 16, torch.device("cpu"))
    source = ReadAhead(images, indices, Shares(CONFIG, Ranks()), torch.device("cpu"), 0)
    alive = []
    for step in range(20 * len(images) // 16):
        source.prepare(step)
        if step % (9 * len(images) // 16) == 0:
            gc.collect()
            alive.append(sum(type(found) is torch.Tensor for found in gc.get_objects()))
    assert max(alive[1:]) <= alive[1] + 2


def test_cache_none_is_for_data_in_files() -> None:
    with pytest.raises(ValueError, match="cache is none, expected auto, device or host: cifar10 is read as a whole"):
        TrainConfig(dataset="cifar10", cache="none")

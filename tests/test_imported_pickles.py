"""vadiff.trainer.importing.pickled_modules: tensors and modules are read from pickles, and nothing in them is run."""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import edm2_files
import numpy as np
import pytest
import torch
from torch import Tensor

from vadiff.errors import DataError
from vadiff.trainer.data.pickled_arrays import load_arrays
from vadiff.trainer.evaluation.feature_statistics import read_statistics
from vadiff.trainer.importing import import_networks
from vadiff.trainer.importing.pickled_modules import read_module


@pytest.fixture(autouse=True)
def their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in edm2_files.pretend_modules().items():
        monkeypatch.setitem(sys.modules, name, module)


class Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def stored(numbers: Tensor, *, say: int | None = None, view: Any = None, kind: Any = torch.FloatStorage) -> bytes:
    """Bytes in torch's legacy format, which may lie about their size."""

    class Writer(pickle.Pickler):
        def persistent_id(self, thing: Any) -> Any:
            return (
                ("storage", kind, "0", "cpu", len(numbers) if say is None else say, view) if thing == "here" else None
            )

    stream = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, "here", ["0"]):
        Writer(stream, protocol=2).dump(part)
    stream.write(len(numbers).to_bytes(8, "little") + numbers.numpy().tobytes())
    return stream.getvalue()


def tensor(content: bytes, shape: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,), offset: int = 0) -> Calls:
    storage = Calls(torch.storage._load_from_bytes, content)
    return Calls(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, OrderedDict())


def module(**tensors: Any) -> Calls:
    state = {"_parameters": tensors, "_buffers": {}, "_modules": {}}
    meta = {"type": "class", "version": 6, "module_src": edm2_files.SOURCE, "class_name": "Precond", "state": state}
    return Calls(sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, meta)


def test_bytes_of_torchs_own_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    kept = {
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "number": torch.tensor(2.5, dtype=torch.float64),
        "part": torch.arange(10)[2:8:2],
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "net.pkl"
    for protocol in (2, 4, 5):
        path.write_bytes(pickle.dumps({"ema": module(**kept)}, protocol))
        read = read_module(path, "ema")
        assert read.kind == "Precond"
        for name, value in kept.items():
            assert read.tensors[name].dtype == value.dtype
            assert torch.equal(read.tensors[name], value)


FOUR = torch.arange(4.0)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda harm: Calls(os.mkdir, str(harm)), "asks for posix.mkdir"),
        (lambda harm: Calls(eval, f"__import__('os').mkdir({str(harm)!r})"), "asks for builtins.eval"),
        (lambda harm: Calls(torch.load, str(harm)), "asks for torch.*load"),
        (lambda harm: Calls(getattr, "text", "upper"), "asks for builtins.getattr"),
        (lambda harm: module(weight=Calls(os.mkdir, str(harm))), "asks for posix.mkdir"),
        (lambda harm: module(weight=tensor(pickle.dumps(Calls(os.mkdir, str(harm))))), "asks for posix.mkdir"),
        (lambda harm: module(weight=tensor(stored(FOUR, kind=os.mkdir))), "asks for posix.mkdir in place of a tensor"),
        (lambda harm: module(weight=tensor(stored(FOUR, say=2**60))), "fills a tensor of .* bytes with 16"),
        (lambda harm: module(weight=tensor(stored(FOUR)[:-4])), "fills a tensor of 16 bytes with 12"),
        (lambda harm: module(weight=tensor(stored(FOUR, view=("0", 0, 2)))), "refers to objects outside"),
        (lambda harm: module(weight=tensor(stored(FOUR), shape=(5,))), r"tensor of shape \(5,\) in 4 numbers"),
        (lambda harm: module(weight=tensor(stored(FOUR), shape=(2,), stride=(4,))), "in 4 numbers"),
        (lambda harm: module(weight=tensor(stored(FOUR), offset=1)), "in 4 numbers"),
        (lambda harm: module(weight=tensor(stored(FOUR), offset=-1)), "something other than numbers, shape"),
        (lambda harm: module(weight=tensor(stored(FOUR), shape=(2**40,), stride=(0,))), "in 4 numbers"),
        (lambda harm: module(weight=[1.0]), "ema.weight is no tensor"),
        (lambda harm: [1.0], "ema is list, expected a module"),
    ],
)  # fmt: skip
def test_hostile_pickle_runs_nothing(attack: Any, message: str, tmp_path: Path) -> None:
    harm, path = tmp_path / "harm", tmp_path / "net.pkl"
    path.write_bytes(pickle.dumps({"ema": attack(harm)}))
    with pytest.raises(DataError, match=message):
        import_networks([path], tmp_path / "run")
    assert not harm.exists()
    assert not (tmp_path / "run").exists()


def written(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


def the(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


ONE = b"}\x8c\x01a\x8c\x01bs"  # {"a": "b"}


@pytest.mark.parametrize(
    "attack",
    [
        written(the("torch._utils", "_rebuild_tensor_v2"), ONE, b"b"),
        written(the("torch_utils.persistence", "_reconstruct_persistent_obj"), ONE, b"b"),
        written(the("torch.nn.modules.container", "ModuleDict"), ONE, b"b"),
        written(the("torch.nn.modules.container", "ModuleDict"), b"N", ONE, b"\x86b"),
        written(the("torch.nn.modules.container", "ModuleDict"), b")\x81", b"N", ONE, b"\x86b"),
        written(the("dnnlib.util", "EasyDict"), b"N", ONE, b"\x86b"),
        written(the("dnnlib.util", "EasyDict"), b")\x81", ONE, b"b"),
        written(the("vadiff.loss", "DiffusionLoss"), ONE, b"b"),
        written(the("vadiff.loss", "DiffusionLoss.forward.__globals__")),
        written(the("torch.nn.modules.container", "ModuleDict.__init__.__globals__")),
        written(the("torch_utils.persistence", "_reconstruct_persistent_obj.__globals__")),
        b"\x80\x04\x95",
        b"\x80\x04\x8e" + (2**60).to_bytes(8, "little"),  # bytes that say they are many
        b"",
    ],
)
def test_pickle_changes_no_class_and_no_function(attack: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.pkl"
    path.write_bytes(attack)
    with pytest.raises(DataError, match=r"net.pkl (is not a file of a network|cannot be read)"):
        read_module(path, "ema")
    test_bytes_of_torchs_own_are_read_as_torch_reads_them(tmp_path)  # nothing has changed


def test_module_within_itself_ends(tmp_path: Path) -> None:
    network = edm2_files.network()
    network.unet.add_module("again", network.unet.out_conv)
    with pytest.raises(DataError, match=r"ema\.unet\.again is a module that is elsewhere in the network too"):
        read_module(edm2_files.write(tmp_path / "net.pkl", network), "ema")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"})" + b"\x85" * 1_000_000 + b"Ns.", "tuples in tuples without end"),  # a key whose hash recurses
        (b"})" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(40)) + b"Ns.", "tuples in tuples without end"),
        (b"})" + b"2\x86" * 28 + b"Ns.", "copies an object"),
        (b"Nr" + (2**28).to_bytes(4, "little") + b".", "remembers an object under the number 268435456"),
    ],
)
def test_pickles_that_would_exhaust_the_machine_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "net.pkl"
    path.write_bytes(b"\x80\x04" + content)
    with pytest.raises(DataError, match=message):
        read_module(path, "ema")
    with pytest.raises(DataError, match=message):
        read_statistics(path)


def test_numbers_that_are_used_again_and_again_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pkl"
    content = stored(torch.zeros(50_000))
    path.write_bytes(pickle.dumps({"ema": module(**{f"weight{i}": tensor(content, (50_000,)) for i in range(20)})}))
    with pytest.raises(DataError, match="more than the file: they share numbers"):
        read_module(path, "ema")
    numbers = np.zeros(50_000, np.float32)
    shared = [numbers.reshape(50_000, 1), numbers.reshape(1, 50_000)]
    assert len(load_arrays(pickle.dumps([numbers, numbers]))) == 2  # one array twice is one
    state = pickle.dumps(shared, protocol=2)
    assert len(load_arrays(state)) == 2  # each has bytes of its own

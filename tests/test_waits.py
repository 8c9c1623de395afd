"""The mode in which waiting for the GPU is an error, on a stand-in for torch.cuda."""

from __future__ import annotations

import warnings

import pytest
import torch
from waits import waits_are_errors


class Gpu:
    """The mode as torch keeps it: the remark comes after the switch, and only the first time."""

    def __init__(self, remark: str) -> None:
        self.mode: int | str = 0
        self.remark = remark

    def get_sync_debug_mode(self) -> int | str:
        return self.mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.mode = mode
        remark, self.remark = self.remark, ""
        if remark:
            warnings.warn(remark, stacklevel=2)


def test_the_mode_is_on_inside_and_off_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    remark = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    monkeypatch.setattr(torch, "cuda", gpu := Gpu(remark))
    modes = []

    def waiting() -> None:
        with waits_are_errors():
            modes.append(gpu.mode)
            raise RuntimeError("waited")

    with pytest.raises(RuntimeError, match="waited"):
        waiting()
    assert modes == ["error"]
    assert gpu.mode == 0


def test_other_remarks_stay_errors_and_leave_the_mode_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", gpu := Gpu("something else"))
    with pytest.raises(UserWarning, match="something else"), waits_are_errors():
        pass
    assert gpu.mode == 0

"""Results of the providers in the contests, and the files that hold them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import machine
import revision
import torch
from cases import Contest
from copy_bandwidth import CopyBandwidth
from measure import Ratio, Spread, Times

RESULTS = Path(__file__).parent / "results"
_SUITE = "vadiff benchmarks"  # tells these files from those of the experiments in the same folder


@dataclass
class Measurement:
    """One provider in one contest. Times in seconds per call."""

    case: str
    dtype: str
    mode: str
    provider: str
    shape: tuple[int, ...]
    bytes: int  # that any implementation must move in one call; 0 for training steps
    sets: int  # of buffers in rotation
    rounds: int
    calls: int  # per round
    wall: Spread
    host: Spread
    device: Spread | None = None  # None on a CPU
    bandwidth: float | None = None  # bytes / the device's time (a CPU's: wall)
    share_of_copy: float | None = None
    times_as_fast_as: dict[str, Ratio] = field(default_factory=dict)  # by provider
    launches: int | None = None  # CUDA only
    peak_bytes: int | None = None  # CUDA only: on top of the inputs, output gradient included
    cached: bool = False  # the inputs of all sets together fit in the last-level cache
    wall_times: list[float] = field(default_factory=list, repr=False)  # of each round; not kept in files

    @classmethod
    def of(
        cls,
        contest: Contest,
        provider: str,
        shape: tuple[int, ...],
        times: Times,
        *,
        bytes: int,
        sets: int,
        times_as_fast_as: dict[str, Ratio],
    ) -> Measurement:
        """The measurement from the times of `measure.race`."""
        wall, device = Spread.of(times.wall), None if times.device is None else Spread.of(times.device)
        return cls(
            *contest, provider, shape, bytes, sets, len(times.wall), times.calls, wall, Spread.of(times.host), device,
            bandwidth=bytes / (device or wall).median if bytes else None, times_as_fast_as=times_as_fast_as,
            launches=times.launches, wall_times=times.wall,
        )  # fmt: skip


@dataclass
class NotMeasured:
    """A provider without a measurement in a contest."""

    case: str
    dtype: str
    mode: str
    provider: str
    kind: str  # "not usable", "wrong" (refused) or "failed"
    reason: str


@dataclass
class Results:
    """One run of the benchmarks."""

    machine: dict[str, Any]
    date: str
    commit: str
    dirty: bool  # tracked files differed from the commit
    selection: str  # "default", "all", or the options given
    quick: bool  # too short to be reliable
    copy: CopyBandwidth
    measurements: list[Measurement] = field(default_factory=list)
    not_measured: list[NotMeasured] = field(default_factory=list)

    @classmethod
    def begin(cls, device: torch.device, selection: str, quick: bool, copy: CopyBandwidth) -> Results:
        """Empty results for this machine and code."""
        commit, dirty = revision.commit()
        return cls(machine.describe(device), date.today().isoformat(), commit, dirty, selection, quick, copy)

    def add(self, outcome: Measurement | NotMeasured) -> None:
        if isinstance(outcome, Measurement):
            self.measurements.append(outcome)
        else:
            self.not_measured.append(outcome)

    def find(self, case: str, dtype: str, mode: str, provider: str) -> Measurement | None:
        wanted = (case, dtype, mode, provider)
        return next((m for m in self.measurements if (m.case, m.dtype, m.mode, m.provider) == wanted), None)

    def write(self, folder: Path) -> Path:
        """Write <device>-<date>.json into a folder; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / machine.file_name(self.machine["device"], self.date)
        content = {"suite": _SUITE, **asdict(self)}
        content["copy"] = self.copy._asdict()
        for entry in content["measurements"]:
            del entry["wall_times"]
        complete = path.with_suffix(".tmp")  # a run killed meanwhile leaves the previous file intact
        complete.write_text(json.dumps(content, indent=1) + "\n")
        return complete.replace(path)


def read(path: Path) -> Results | None:
    """The results in a file; None if the file is not from these benchmarks."""
    content = json.loads(path.read_text())
    if content.pop("suite", None) != _SUITE:
        return None
    return Results(
        **{
            **content,
            "copy": CopyBandwidth(**content["copy"]),
            "measurements": [_measurement(entry) for entry in content["measurements"]],
            "not_measured": [NotMeasured(**entry) for entry in content["not_measured"]],
        }
    )


def _measurement(entry: dict[str, Any]) -> Measurement:
    spreads = {name: Spread(*entry[name]) for name in ("wall", "host", "device") if entry[name] is not None}
    ratios = {name: Ratio(*found) for name, found in entry["times_as_fast_as"].items()}
    return Measurement(**{**entry, **spreads, "shape": tuple(entry["shape"]), "times_as_fast_as": ratios})


def newest_by_device(folder: Path = RESULTS) -> list[Results]:
    """The last results of each device, without --quick runs, by device name."""
    newest: dict[str, Results] = {}
    for path in sorted(folder.glob("*.json")):
        results = read(path)
        if results is not None and not results.quick:
            before = newest.get(results.machine["device"])
            if before is None or results.date >= before.date:
                newest[results.machine["device"]] = results
    return [newest[name] for name in sorted(newest)]

"""Everything that needs an NVIDIA GPU, in three parts, each within --minutes.

    benchmarks/gpu.sh --part 1 FOLDER    # smoke runs of the kernels, then tests/gpu
    benchmarks/gpu.sh --part 2 FOLDER    # speed: result file, table and picture; a profile where ncu is on the PATH
    benchmarks/gpu.sh --part 3 FOLDER    # memcheck where compute-sanitizer is, networks, core suite, training loop

A stage that fails or hangs costs its own limit only; one of which less than half fits in the time left is not run.
FOLDER (default: $OUT, or runs/gpu-part-N) has to be empty. It gets summary.txt, a log for each stage, and what the
stages write; at most --max-files files, the rest packed. The exit status is 0 if no stage failed or ran out of time.

Without --bundle, vadiff is built and installed into the current environment; with it nothing is compiled, and the
wheels that `make gpu-bundle` collected, from this very commit, go into build/gpu-site. A copy of the tree without .git
has to be told its commit by --commit or VADIFF_COMMIT: what git describe --always --dirty --abbrev=40 --exclude='*'
prints in its origin. Afterwards

    python benchmarks/readme_table.py --add FOLDER/<device>-<date>.json

adds part 2's result file to the repository, and renews README.md and docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gpu_bundle
import revision

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu-site"
GRACE = 10.0  # seconds that a stage gets to print what it has, after an interrupt
RESERVE = 15.0  # seconds for that, and for packing
LOG_BYTES = 2**18  # of a log's head, and of its tail
MAX_LINES = 20
VERDICT = "figures: "  # begins the line of `figures.verdict`
JUDGED = ("table", "training-loop")  # their missed figures follow the stages
QUIET = ("build", "install", "doctor")  # nothing to tell where they succeed
PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider")
CORE = ("loss", "backward", "statistics", "weight_table", "determinism", "compile")
PROFILED = """
import torch, vadiff
for dtype in (torch.float32, torch.bfloat16):
    prediction = torch.randn(8192, 3, 32, 32, device="cuda", dtype=dtype).requires_grad_()
    target, log_snr = torch.randn_like(prediction), torch.randn(8192, device="cuda")
    for backend in ("native", "triton"):
        if vadiff.backend_report()[backend][0]:
            criterion = vadiff.DiffusionLoss(backend=backend).cuda()
            for _ in range(2):
                criterion(prediction, target, log_snr)
torch.cuda.synchronize()
"""


@dataclass(frozen=True)
class Stage:
    """A command and its limit in seconds. `{out}`, `{scratch}`, `{data}` and `{results}` in its words are filled in."""

    name: str
    limit: float
    command: tuple[str, ...]
    program: str | None = None  # has to be on the PATH; without it the stage is not run, which is no failure


def script(name: str, *words: str) -> tuple[str, ...]:
    return (PYTHON, str(ROOT / "benchmarks" / name), *words)


def first_stages(bundle: Path | None) -> list[Stage]:
    """Those of every part."""
    install = (PYTHON, "-m", "pip", "install", "--no-deps")
    if bundle is None:
        first = Stage("build", 80, (*install, "--no-build-isolation", "--editable", "."))
    else:
        wheels = sorted(str(wheel) for wheel in bundle.glob("*.whl"))
        first = Stage("install", 40, (*install, "--no-index", "--upgrade", "--target", str(SITE), *wheels))
    return [first, Stage("doctor", 40, (PYTHON, "-m", "vadiff", "doctor"))]


def own_stages(part: int, data: Path | None = None) -> list[Stage]:
    """Those of one part, in the order in which they run, once what it needs is installed."""
    workers = ("-n", "4") if has("xdist") else ()
    if part == 1:
        return [
            Stage("smoke-native", 60, script("sanitize.py", "native")),
            Stage("smoke-triton", 60, script("sanitize.py", "triton")),
            Stage("tests", 300, (*PYTEST, *workers, "tests/gpu")),
        ]
    if part == 2:
        ncu = ("ncu", "--clock-control", "none", "--set", "basic", "--launch-count", "8")
        timed = ("-p", "no:xdist", "--benchmark-quiet", "--device", "cuda", "--results", "{out}")
        return [
            Stage("benchmarks", 330, (*PYTEST, *timed, "benchmarks")),
            Stage("table", 20, script("result_table.py", "{results}", "--out", "{out}/table.txt")),
            Stage("roofline", 20, script("roofline.py", "{results}", "{out}/roofline.png")),
            Stage(
                "ncu", 60, (*ncu, "--kernel-name", "regex:forward_kernel|rows_kernel", PYTHON, "-c", PROFILED), "ncu"
            ),
        ]
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")
    presets = () if has("diffusers") else ("--presets", "cifar10-edm2")  # the classic network is diffusers'
    checked = [
        Stage("memcheck-native", 120, (*sanitizer, *script("sanitize.py", "native")), "compute-sanitizer"),
        Stage("networks", 110, script("networks.py", *presets, "--rounds", "3", "--out", "{out}/networks.json")),
    ]
    return [
        *(checked if data is None else TRAINING),
        Stage(
            "core", 115,
            (*PYTEST, *workers, "-k", "native-cuda or triton", *(f"tests/test_{name}.py" for name in CORE)),
        ),
        # Last, as it writes what it has after each mode.
        Stage("training-loop", 120, script("training_loop.py", "--rounds", "6", "--out", "{out}/training_loop.json")),
    ]  # fmt: skip


# With --data in the place of memcheck and the networks' speed, for which there is no time left. A network of an eighth
# of the preset's: a curve, not a record.
TRAINING = [
    Stage(
        "train", 160,
        (PYTHON, "-m", "vadiff", "train", "--preset", "cifar10-edm2", "--data", "{data}", "--out", "{scratch}/run",
         "--resume", "--compile", "--channels", "128,128,128", "--layers-per-block", "2", "--batch-size", "256",
         "--steps", "3000", "--warmup", "200", "--schedule-steps", "500", "--snapshot-every", "47",
         "--held-out-every", "0", "--held-out-images", "1000", "--samples-every", "0", "--checkpoint-every", "3000"),
    ),
    Stage(
        "sweep", 70,
        (PYTHON, "-m", "vadiff", "ema", "{scratch}/run", "--sweep", "--sigma-rel", "0.03,0.05,0.07,0.10,0.13,0.2"),
    ),
]  # fmt: skip


def has(module: str) -> bool:
    """Whether a module is installed here or in the bundle's folder."""
    return importlib.machinery.PathFinder.find_spec(module, [str(SITE), *sys.path]) is not None


def stand_in(command: Sequence[str]) -> tuple[str, ...]:
    """What --dry runs: it takes no GPU, and fails where the command's files or options are wrong."""
    words = list(command[command.index(PYTHON) :] if PYTHON in command else command)
    if words[1] == "-c":
        return (PYTHON, "-c", f"compile({words[2]!r}, 'profiled', 'exec')")
    if words[1:3] == ["-m", "pip"]:
        return (*words[:4], "--help")
    if words[1:3] == ["-m", "pytest"]:
        return (*("cpu" if word == "cuda" else word for word in words), "--collect-only")
    return (*words, "--help")


@dataclass
class Run:
    """One part: runs stages, and keeps summary.txt up to date."""

    out: Path
    minutes: float = 9.0
    dry: bool = False
    data: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    grace: float = GRACE
    reserve: float = RESERVE

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + 60 * self.minutes - self.reserve
        self.head, self.lines, self.details = [f"commit {revision.described()}"], list[str](), list[str]()
        self.failed = list[str]()
        self.scratch = self.out.parent / f"{self.out.name}.scratch"

    def run(self, table: Sequence[Stage]) -> bool:
        """Run the stages; returns whether none failed, was stopped or found no time."""
        for stage in table:
            self._stage(stage)
            self.summarise()
        return not self.failed

    def summarise(self, *more: str) -> None:
        """Write summary.txt anew."""
        fixed = [*self.head[:4], *self.lines, *more]
        (self.out / "summary.txt").write_text("\n".join([*fixed, *self.details][:MAX_LINES]) + "\n")

    def _stage(self, stage: Stage) -> None:
        left = self.deadline - time.monotonic()
        results = next((p for p in sorted(self.out.glob("*.json"))), None)
        if stage.program is not None and not self.dry and shutil.which(stage.program) is None:
            self._line(stage.name, "NOT RUN", None, f"{stage.program} is not on the PATH")
        elif left < stage.limit / 2:
            self.failed.append(stage.name)
            self._line(stage.name, "NOT RUN", None, f"{max(left, 0):.0f} s are left, its limit is {stage.limit:.0f} s")
        elif "{results}" in stage.command and results is None and not self.dry:
            self.failed.append(stage.name)
            self._line(stage.name, "NOT RUN", None, "the benchmarks left no result file")
        else:
            fill = {"out": self.out, "scratch": self.scratch, "data": self.data, "results": results}
            words = list(stand_in(stage.command) if self.dry else stage.command)
            for name, value in fill.items():
                words = [word.replace(f"{{{name}}}", str(value)) for word in words]
            self._execute(stage, words, min(stage.limit, left))

    def _execute(self, stage: Stage, words: list[str], limit: float) -> None:
        log, begin = self.out / f"{stage.name}.log", time.monotonic()
        print(f"== {stage.name} (at most {limit:.0f} s)", flush=True)
        status = execute(words, log, limit, self.grace, self.environment)
        took, text = time.monotonic() - begin, log.read_text(errors="replace")
        if status == 0 and self.dry and "--help" in words:
            unknown = [word for word in stage.command if word.startswith("--") and word not in text]
            if unknown and stage.program is None:
                status, text = 2, f"{text}\nunknown options: {', '.join(unknown)}"
        verdict = "STOPPED" if status is None else "ok" if status == 0 else "FAILED"
        if status != 0:
            self.failed.append(stage.name)
            print("\n".join(text.splitlines()[-15:]), flush=True)
        if stage.name == "doctor" and not self.dry:
            self.head += doctor_lines(text)
        self._line(
            stage.name,
            verdict,
            took,
            "" if status == 0 and (self.dry or stage.name in QUIET) else telling(text, status),
        )
        missed = [f"  {line.strip()}" for line in text.splitlines() if stage.name in JUDGED and "MISSED" in line]
        self.details += [re.sub(r" {3,}", "  ", line)[:160] for line in missed]

    def _line(self, name: str, verdict: str, took: float | None, number: str) -> None:
        seconds = "-" if took is None else f"{took:.0f}"
        self.lines.append(f"{name:<16} {seconds:>4} s  {verdict:<8} {number}"[:240].rstrip())
        print(self.lines[-1], flush=True)


def execute(words: list[str], log: Path, limit: float, grace: float, environment: dict[str, str]) -> int | None:
    """Run a command in its own process group: the exit status, or None if it had to be stopped.

    At the limit it gets an interrupt, which a shell has its background processes ignore, and on which pytest still
    prints the results that it has; then a kill. Processes that it left behind are killed too.
    """
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                cwd=ROOT, env=os.environ | environment, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        except OSError as error:
            file.write(f"{words[0]}: {error.strerror}\n".encode())
            return 127
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def telling(text: str, status: int | None) -> str:
    """What a stage's output comes down to: pytest's counts and the first failures, its figures, or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    names = [line.split(" - ")[0].split(None, 1)[1] for line in lines if re.match(r"(FAILED|ERROR) \S+::", line)]
    counts = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|error|skipped)", line)]
    verdicts = [line for line in lines if line.startswith(VERDICT)]
    if counts:
        return "; ".join([counts[-1], *(name.rpartition("/")[2] for name in names[:3])])
    if verdicts and status in (0, None):  # None: it had judged so much when it was stopped
        return verdicts[-1]
    return lines[-1][:120] if lines else "no output"


def doctor_lines(text: str) -> Iterator[str]:
    """Versions and devices of `vadiff doctor`, each on a line."""
    found = re.findall(r"^  (python|torch|triton|cuda)\b *(.*)$", text.partition("backends")[0], re.MULTILINE)
    devices = [value for name, value in found if name == "cuda"]
    yield f"device {', '.join(devices) or 'unknown'}"
    yield ", ".join(f"{name} {value}" for name, value in dict(found).items() if name != "cuda")


def pack(out: Path, max_files: int, max_bytes: int) -> list[str]:
    """Leave at most so many files, each of at most so many bytes; returns the names of what is left out.

    Logs are cut to head and tail. What is most wanted stays as it is, the rest goes into rest.tar.gz.
    """
    for log in out.glob("*.log"):
        limit = min(LOG_BYTES, max_bytes // 4)
        if log.stat().st_size > 2 * limit:
            content = log.read_bytes()
            cut = f"\n... {len(content) - 2 * limit} bytes left out ...\n".encode()
            log.write_bytes(content[:limit] + cut + content[-limit:])
    wanted = ["summary.txt", "*.json", "table.txt", "*.png", "tests.log", "core.log"]

    def rank(path: Path) -> tuple[int, str]:
        return next((i for i, pattern in enumerate(wanted) if path.match(pattern)), len(wanted)), path.name

    files = sorted((path for path in out.iterdir() if path.is_file()), key=rank)
    small = [path for path in files if path.stat().st_size <= max_bytes]
    if len(small) == len(files) <= max_files:
        return []
    stay = small[: max_files - 1]
    rest, left_out = [path for path in files if path not in stay], list[str]()
    archive = out / "rest.tar.gz"
    while rest:
        with tarfile.open(archive, "w:gz") as tar:
            for path in rest:
                tar.add(path, path.name)
        if archive.stat().st_size <= max_bytes:
            break
        archive.unlink()
        largest = max(rest, key=lambda path: path.stat().st_size)
        left_out.append(f"{largest.name} ({largest.stat().st_size} bytes)")
        rest.remove(largest)
        largest.unlink()
    for path in rest:
        path.unlink()
    return left_out


def arguments_of(words: list[str] | None) -> argparse.Namespace:
    """The checked options."""
    parser = argparse.ArgumentParser("gpu.sh", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--minutes", type=float, default=9.0, help="for the whole part (default 9)")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="install the wheels in DIR, and compile nothing")
    parser.add_argument("--commit", metavar="REV", help="commit of this tree, where it is no git repository")
    parser.add_argument(
        "--data", type=Path, metavar="PATH",
        help="part 3: train on this CIFAR-10 (folder, archive, folder of its parts) in place of memcheck and networks",
    )  # fmt: skip
    parser.add_argument("--max-files", type=int, default=8, help="files left in FOLDER (default 8)")
    parser.add_argument("--max-bytes", type=int, default=2**24, help="bytes of each (default 16 MiB)")
    parser.add_argument("--dry", action="store_true", help="without a GPU: check each stage's files and options only")
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER")
    options = parser.parse_args(words)
    options.folder = (options.folder or Path(os.environ.get("OUT") or f"runs/gpu-part-{options.part}")).absolute()
    if options.commit:
        os.environ["VADIFF_COMMIT"] = options.commit  # where `revision` looks for it, here and in the stages
    told = os.environ.get("VADIFF_COMMIT")
    if told and revision.NAMED.fullmatch(told) is None:
        parser.error(f"--commit is {told!r}, expected a hash of 7 to 40 digits, or one with -dirty after it")
    if options.data is not None and (options.part != 3 or not options.data.exists()):
        parser.error(f"--data is {options.data}, expected CIFAR-10's folder or archive, with --part 3")
    if options.bundle is not None and not any(options.bundle.glob("vadiff-*.whl")):
        parser.error(f"--bundle is {options.bundle}, expected a folder that `make gpu-bundle` wrote")
    if options.bundle is not None and (reason := gpu_bundle.why_stale(options.bundle)):
        parser.error(f"--bundle is {options.bundle}, {reason}")
    if options.bundle is not None and sys.version_info < (3, 11):
        parser.error("--bundle needs Python 3.11 or later, which can be told to leave this tree off its path")
    if options.minutes <= 0 or options.max_files < 2 or options.max_bytes < 2**12:
        parser.error("--minutes has to be positive, --max-files at least 2, --max-bytes at least 4096")
    if options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"FOLDER is {options.folder}, which is not empty; expected a new or an empty folder")
    for name in ("bundle", "data"):
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).absolute())
    return options


def main(words: list[str] | None = None) -> int:
    options = arguments_of(words)
    options.folder.mkdir(parents=True, exist_ok=True)
    # Also where the shell ignores interrupts, as one in the background: stages inherit what is ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    paths = [str(SITE)] if options.bundle else []
    paths += [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Safe path: `python -m` would find this tree's vadiff, which has no kernels, before the bundle's.
    environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if options.bundle:
        environment["PYTHONSAFEPATH"] = "1"
    run = Run(options.folder, options.minutes, options.dry, options.data, environment)
    passed = False
    try:
        if options.part == 1 or not options.dry:  # what is the same in every part is checked once
            run.run(first_stages(options.bundle))
        passed = run.run(own_stages(options.part, options.data))
    except KeyboardInterrupt:
        run.lines.append("interrupted")
    for sweep in run.scratch.glob("run/ema/step-*/sweep.*"):
        shutil.copy(sweep, run.out)
    shutil.rmtree(run.scratch, ignore_errors=True)
    left_out = pack(run.out, options.max_files, options.max_bytes)
    run.summarise(*([f"left out, too large: {', '.join(left_out)}"] if left_out else []))
    print(f"== summary ({run.out})\n{(run.out / 'summary.txt').read_text()}", end="")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

"""What becomes of measurements: files, tables, the design's figures, the README, and whole runs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import figures
import machine
import pytest
import readme_table
import result_table
import revision
import roofline
import table
import torch
import training_step
from cases import Contest
from copy_bandwidth import CopyBandwidth
from measure import Ratio, Times
from measurements import Measurement, NotMeasured, Results, newest_by_device, read

CPU = torch.device("cpu")
SMALL = Contest("tiny", "fp32", "fused")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def measured(provider: str, seconds: float, contest: Contest = SMALL, **others: object) -> Measurement:
    """Five equal rounds of one call that has to move 96 bytes."""
    times = Times([seconds] * 5, [seconds] * 5, None, 1)
    found = Measurement.of(contest, provider, (1, 8), times, bytes=96, sets=2, times_as_fast_as={})
    return dataclasses.replace(found, **others)


def results_of(
    *outcomes: Measurement | NotMeasured, device: str = "A CPU, 2 threads", day: str = "2026-01-02"
) -> Results:
    copy = CopyBandwidth({"copy_": 8e9, "streaming": 1e10}, {})
    found = Results(
        {"device": device, "torch": "2.6", "vadiff": "0.1"}, day, "0123456789abcdef", False, "default", False, copy
    )
    for outcome in outcomes:
        found.add(outcome)
    return found


def test_cache_sizes_are_read_as_the_kernel_prints_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, size in enumerate(("48K", "2048K", "1G")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(machine, "_CACHES", tmp_path)
    assert machine.last_level_cache(CPU) == 2**30
    assert machine.rotated_bytes(CPU) <= min(2**31, machine.free_memory(CPU) // 2)


def test_a_result_file_is_named_by_device_and_date_and_reads_back(tmp_path: Path) -> None:
    found = results_of(
        measured("mse_loss", 1e-3, times_as_fast_as={"native": Ratio(0.5, 0.01)}),
        NotMeasured(*SMALL, "triton", "not usable", "no GPU"),
        device="Intel(R) Xeon(R) Processor, 2 threads",
    )
    path = found.write(tmp_path)
    assert path.name == "intel-xeon-processor-2-threads-2026-01-02.json"
    found.measurements[0].wall_times = []  # not kept
    assert read(path) == found


def test_the_newest_results_of_each_device_count_and_quick_ones_do_not(tmp_path: Path) -> None:
    for device, day, quick in (("b", "2026-01-01", False), ("a", "2026-01-05", False), ("b", "2026-01-03", False)):
        dataclasses.replace(results_of(device=device, day=day), quick=quick).write(tmp_path)
    dataclasses.replace(results_of(device="b", day="2026-01-09"), quick=True).write(tmp_path)
    (tmp_path / "experiment.json").write_text('{"experiment": "balance"}')
    assert [(r.machine["device"], r.date) for r in newest_by_device(tmp_path)] == [
        ("a", "2026-01-05"),
        ("b", "2026-01-03"),
    ]


@pytest.mark.parametrize("told", ["0123456", "0123456789abcdef0123456789abcdef01234567-dirty"])
def test_outside_of_git_the_commit_is_what_the_environment_says(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revision, "output_lines", lambda *command: [])
    monkeypatch.delenv("VADIFF_COMMIT", raising=False)
    assert revision.commit() == ("unknown", True)
    monkeypatch.setenv("VADIFF_COMMIT", told)
    assert revision.commit() == (told.removesuffix("-dirty"), told.endswith("-dirty"))
    for wrong in ("main", "0123", "0123456-", "v0.1-3-g0123456"):
        monkeypatch.setenv("VADIFF_COMMIT", wrong)
        with pytest.raises(ValueError, match=f"VADIFF_COMMIT is '{wrong}', expected what this prints: git describe"):
            revision.commit()


def test_a_copy_of_the_tree_is_not_of_the_repository_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VADIFF_COMMIT", "fedcba9")
    hash_ = "0123456789abcdef0123456789abcdef01234567"
    for around, found in ((BENCHMARKS.parent, (hash_, False)), (BENCHMARKS.parent.parent, ("fedcba9", False))):
        monkeypatch.setattr(
            revision, "output_lines", lambda *command, top=around: [str(top), hash_] if "rev-parse" in command else []
        )
        assert revision.commit() == found


def test_a_result_file_is_shown_with_its_missing_contests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = gpu_results()
    results.selection = "default; interrupted"
    assert result_table.main([str(results.write(tmp_path)), f"--out={tmp_path / 'table.txt'}"]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table.txt").read_text()
    assert "the design's figures" in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("left out"))
    assert "unet-512-fp32-training-step, cifar-128-fp32-fused" in line  # the dearest first
    assert "huge-fp32-fused" not in line
    results.selection = "default; -k cifar-512"
    assert result_table.left_out(results) == []


def test_a_result_file_of_another_machine_is_added_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, pages = tmp_path / "results", [tmp_path / "README.md", tmp_path / "performance.md"]
    results.mkdir()
    monkeypatch.setattr(readme_table, "README", pages[0])
    monkeypatch.setattr(readme_table, "PERFORMANCE", pages[1])
    for page in pages:
        page.write_text(f"{readme_table.BEGIN}\n{readme_table.END}\n")
    written = gpu_results().write(tmp_path).rename(tmp_path / "some.json")
    assert readme_table.main([f"--add={written}", f"--results={results}"]) == 0
    assert [r.machine["compute_capability"] for r in newest_by_device(results)] == ["9.0"]
    assert "CIFAR, batch 512, fp32" in pages[1].read_text()
    assert all(newest_by_device(results)[0].machine["device"] in page.read_text() for page in pages)
    for content in ("{}", written.read_text().replace('"quick": false', '"quick": true')):
        written.write_text(content)
        with pytest.raises(SystemExit):
            readme_table.main([f"--add={written}", f"--results={results}"])


def test_the_table_shows_times_shares_ratios_and_refusals() -> None:
    text = table.render(
        results_of(
            measured("mse_loss", 2e-3, times_as_fast_as={"native": Ratio(0.5, 0.0)}),
            measured("native", 1e-3, times_as_fast_as={"mse_loss": Ratio(2.0, 0.0)}, share_of_copy=0.25),
            NotMeasured(*SMALL, "triton", "not usable", "no GPU"),
            NotMeasured(*SMALL, "reference", "wrong", "the loss is off by 1"),
        )
    )
    row = next(line for line in text.splitlines() if line.startswith("B vadiff, native"))
    assert row.split()[3:] == ["1.00", "ms"] * 3 + ["0.0", "25.0%", "2.00", "·"]
    assert "not usable: triton: no GPU" in text
    assert "reference: REFUSED, its results are wrong: the loss is off by 1" in text
    assert "tiny fp32, 1 × 8: forward + backward; 3 moves" in text


@pytest.mark.parametrize(
    ("ratios", "verdicts"),
    [
        ({"hand_written": 6.0, "hand_written_compiled": 2.5, "mse_loss": 1.3}, [True, True, True]),
        ({"hand_written": 4.9, "mse_loss": 1.1}, [False, None, False]),
    ],
)
def test_figures_are_judged_by_the_ratios(ratios: dict[str, float], verdicts: list[bool | None]) -> None:
    key = Contest("cifar-128", "fp32", "fused")
    native = measured("native", 1e-3, key, times_as_fast_as={name: Ratio(value, 0.0) for name, value in ratios.items()})
    found = figures.judge(results_of(native))
    assert [figure.passed for figure in found[:3]] == verdicts
    assert all("not measured: was not selected" in figure.found for figure in found[3:])
    assert all(figure.passed is None for figure in found[3:])


@pytest.mark.parametrize(
    ("mse_over_native", "passed"),
    [
        ((1 / 1.019, 1.1), True),
        ((1 / 1.019, 1 / 1.011), False),
        ((1 / 1.021,), False),  # whatever the other size would give
        ((1.1,), None),
    ],
)
def test_steps_dearer_than_their_bound_miss_their_figure(
    mse_over_native: tuple[float, ...], passed: bool | None
) -> None:
    steps = [
        measured("native", 5e-3, size, times_as_fast_as={"mse_loss": Ratio(ratio, 0.001)})
        for size, ratio in zip(training_step.SIZES["cpu"], mse_over_native, strict=False)
    ]
    figure = figures.judge(results_of(*steps))[-1]
    assert figure.passed is passed
    assert figure.found.startswith("batch 8, 5.0 ms: ")
    assert "batch 64" in figure.found


@pytest.mark.parametrize(
    ("forward", "both", "verdicts"),
    [
        (None, None, [None, None]),
        (0, 0, [None, None]),
        (2, 0, [True, None]),
        (2, 2, [True, None]),
        (0, 3, [None, None]),
        (2, 3, [True, True]),
        (3, 5, [False, False]),
    ],
)
def test_launches_that_were_not_counted_do_not_pass(
    forward: int | None, both: int | None, verdicts: list[bool | None]
) -> None:
    fused = Contest("cifar-512", "fp32", "fused")
    results = gpu_results()
    results.measurements = [
        measured("triton", 1e-4, fused, launches=both),
        measured("triton", 1e-4, fused._replace(mode="forward"), launches=forward),
    ]
    found = [figure for figure in figures.judge(results) if "triton: launches" in figure.title]
    assert [figure.passed for figure in found] == verdicts
    assert all(figure.found.startswith("not measured") for figure in found if figure.passed is None)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_all_that_figures_are_read_from_comes_first(device_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[Contest] = set()
    monkeypatch.setattr(Results, "find", lambda self, *key: asked.add(Contest(*key[:3])))
    results = results_of()
    if device_type == "cuda":
        results.machine["compute_capability"] = "9.0"
    figures.judge(results)
    assert asked <= set(figures.CONTESTS[device_type])


def test_the_tables_say_where_the_buffers_fit_in_the_cache() -> None:
    key = Contest("cifar-128", "fp32", "fused")
    for cached in (True, False):
        results = results_of(measured("native", 1e-3, key, cached=cached))
        assert ("2 sets of buffers (cached: " in table.render(results)) is cached
        assert ("| CIFAR, batch 128, fp32, cached |" in readme_table.markdown([results])) is cached


def test_a_figure_without_a_measurement_gives_the_reason() -> None:
    missing = NotMeasured("cifar-128", "fp32", "fused", "native", "wrong", "the loss is off")
    assert figures.judge(results_of(missing))[0].found == "not measured: wrong: the loss is off"


def gpu_results() -> Results:
    fused = Contest("cifar-512", "fp32", "fused")
    results = results_of(
        measured("mse_loss", 3e-5, fused),
        measured("triton", 1e-4, fused, launches=3, times_as_fast_as={"hand_written": Ratio(9.0, 0.1)}),
        measured("triton", 1e-4, fused._replace(mode="forward"), launches=2),
        measured("triton", 1e-5, fused._replace(mode="graph"), times_as_fast_as={"hand_written": Ratio(11.0, 0.1)}),
        measured("triton", 1e-3, Contest("huge", "fp32", "fused"), share_of_copy=0.93, peak_bytes=33, bytes=96),
    )
    results.machine["compute_capability"] = "9.0"
    return results


def test_the_figures_of_a_gpu_are_judged() -> None:
    found = {figure.title: figure.passed for figure in figures.judge(gpu_results())}
    assert found["2 GiB tensors fp32, triton, 3 moves"] is True
    assert found["2 GiB tensors fp32, triton: peak memory"] is False  # 1.03 gradients
    assert found["CIFAR batch 512 fp32, triton: host time"] is False  # 3.3 times as long
    assert found["CIFAR batch 512 fp32, triton, against hand_written"] is True
    assert found["CIFAR batch 512 fp32, triton: graph replay"] is True
    assert found["CIFAR batch 512 fp32, triton: launches forward"] is True
    assert found["CIFAR batch 512 fp32, triton: launches backward"] is True
    assert found["CIFAR batch 512 fp32, native: host time"] is None


def test_what_was_not_measured_is_counted_and_named() -> None:
    judged = figures.judge(gpu_results())
    reported = [figure for figure in judged if figure.passed is None and figure.measured]
    line = figures.verdict(judged)
    open_ = sum("not measured: " in figure.found for figure in judged)
    assert len(judged) == open_ + len(reported) + sum(figure.passed is not None for figure in judged)
    assert f", 2 missed, {open_} not measured (2 GiB tensors fp32, native, 3 moves; " in line
    assert line.endswith("; …)")
    assert result_table.text_of(gpu_results()).splitlines()[-1] == line


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = gpu_results().write(tmp_path)
    assert roofline.main([str(path), str(tmp_path / "roofline.png")]) == 0
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_readme_and_docs_show_the_committed_results() -> None:
    for page, expected in readme_table.tables(newest_by_device()).items():
        text = page.read_text()
        assert text == readme_table.inserted(text, expected), "run: python benchmarks/readme_table.py --write"


def test_readme_and_docs_say_so_as_long_as_no_gpu_is_measured() -> None:
    measured = any("compute_capability" in results.machine for results in newest_by_device())
    for page in (readme_table.README, readme_table.PERFORMANCE):
        assert ("No GPU has been measured yet" in page.read_text()) is not measured, f"{page}: take the sentence out"


def test_the_readme_has_two_rows_of_the_last_cpu_and_of_each_gpu() -> None:
    latents, step = Contest("latents-64", "fp32", "fused"), Contest("unet-64", "fp32", "training-step")
    rows = [
        measured(name, 1e-3, key)
        for key in (latents, step)
        for name in ("mse_loss", "hand_written", "native", "reference")
    ]
    old, new, gpu = results_of(*rows), results_of(*rows), results_of(*rows)
    old.date, new.date = "2026-01-01", "2026-01-02"
    old.machine, new.machine = {**old.machine, "device": "an old CPU"}, {**new.machine, "device": "a new CPU"}
    gpu.machine = {**gpu.machine, "device": "a GPU", "compute_capability": "9.0"}
    text = readme_table.excerpt([old, new, gpu], "elsewhere.md")
    assert "an old CPU" not in text
    assert text.index("**a GPU**") < text.index("**a new CPU**")
    assert text.count("\n| latents") == text.count("\n| training step") == 2
    assert "| | F.mse_loss | hand-written, eager | vadiff, native |" in text
    found = figures.judge(new)
    assert f"[All rows](elsewhere.md): other shapes, torch.compile, the reference, and the {len(found)} figures" in text


def test_the_readme_table_has_a_column_for_each_provider_and_a_row_for_each_case() -> None:
    key = Contest("cifar-128", "fp32", "fused")
    ratio = {"mse_loss": Ratio(2.0, 0.0)}
    text = readme_table.markdown(
        [results_of(measured("mse_loss", 2e-3, key), measured("native", 1e-3, key, times_as_fast_as=ratio))]
    )
    assert "| | F.mse_loss | vadiff, native |" in text
    assert "| CIFAR, batch 128, fp32 | 2.00 ms | 1.00 ms (2.00 ×) |" in text
    assert "| CIFAR batch 128 fp32, native, against mse_loss | ≥ 1.2 × | 2.00 × | reached |" in text


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace(readme_table.BEGIN, ""),
        lambda text: text.replace(readme_table.END, ""),
        lambda text: f"{text}{readme_table.BEGIN}",
        lambda text: f"{text}{readme_table.END}",
    ],
)
def test_a_readme_without_its_markers_is_refused(spoil: Callable[[str], str]) -> None:
    readme = f"head\n{readme_table.BEGIN}\nold\n{readme_table.END}\ntail\n"
    assert "old" not in readme_table.inserted(readme, "new")
    with pytest.raises(readme_table.MarkersError, match="once each"):
        readme_table.inserted(spoil(readme), "new")


# under pytest


def run_benchmarks(*arguments: str, path: Path = BENCHMARKS) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "-n", "0", "-p", "no:cacheprovider", "--quick"]
    # a worker of xdist hands its name on, and pytest-benchmark then writes nothing
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [*command, "--device=cpu", *arguments], capture_output=True, text=True, timeout=120, check=False,
        cwd=BENCHMARKS.parent, env={**environment, "PYTHONPATH": f"{path}{os.pathsep}{BENCHMARKS}"},
    )  # fmt: skip


def test_a_quick_run_measures_prints_and_writes(tmp_path: Path) -> None:
    found = run_benchmarks(
        "-k", "cifar-64-fp32-fused and not compiled", f"--results={tmp_path}",
        f"--benchmark-json={tmp_path / 'rounds.json'}", "--benchmark-quiet",
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert "A F.mse_loss" in found.stdout
    assert "not usable: triton: runs on CUDA devices only" in found.stdout
    assert "the design's figures" in found.stdout
    (path,) = (path for path in tmp_path.glob("*.json") if path.name != "rounds.json")
    results = read(path)
    assert results is not None
    assert results.quick
    assert results.find("cifar-64", "fp32", "fused", "hand_written") is not None
    assert results.machine["torch"] == torch.__version__
    assert '"name": "test_loss[cifar-64-fp32-fused-hand_written]"' in (tmp_path / "rounds.json").read_text()


def test_a_run_with_a_wrong_provider_fails_and_shows_no_speed_for_it(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(
        "import torch\n"
        "import providers\n"
        "class Wrong(providers._MSELoss):\n"
        "    def __call__(self, batch, deferred):\n"
        "        return 2 * super().__call__(batch, deferred)\n"
        "providers.PROVIDERS['mse_loss'] = providers.Provider('F.mse_loss', lambda device: Wrong())\n"
    )
    chosen = "cifar-64-fp32-fused and (mse_loss or hand_written) and not compiled"
    found = run_benchmarks("-p", "planted", "-k", chosen, path=tmp_path)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "mse_loss: REFUSED, its results are wrong: the gradient of step 1 is off by 1.0e+00" in found.stdout
    assert "A hand-written, eager" in found.stdout
    assert "1 failed, 1 passed" in found.stdout


def test_a_killed_run_leaves_its_results_the_design_figures_first(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(
        "import os, signal\n"
        "import providers\n"
        "class Killer(providers._MSELoss):\n"
        "    def __call__(self, batch, deferred):\n"
        "        if len(batch.prediction) == 64:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().__call__(batch, deferred)\n"
        "providers.PROVIDERS['mse_loss'] = providers.Provider('F.mse_loss', lambda device: Killer())\n"
    )
    chosen = "fp32-fused-mse_loss and (cifar-64 or cifar-128)"
    found = run_benchmarks("-p", "planted", "-k", chosen, f"--results={tmp_path}", path=tmp_path)
    assert found.returncode == -9, found.stdout + found.stderr
    (path,) = tmp_path.glob("*.json")
    results = read(path)
    assert results is not None
    assert results.selection.endswith("interrupted")
    assert [measurement.case for measurement in results.measurements] == ["cifar-128"]

"""vadiff.trainer.report.comparison: what `vadiff evaluate` does first, what it keeps, and how it goes on."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from vadiff.errors import Stopped
from vadiff.sampling.generation import Generated, default_generation
from vadiff.trainer.ablation.evaluation import drawn_with
from vadiff.trainer.cli import main
from vadiff.trainer.pictures import PictureWriter, read_labels, read_note, read_pictures
from vadiff.trainer.report import comparison, drawn_images
from vadiff.trainer.report.comparison import Comparison, seed_sets
from vadiff.trainer.report.drawn_images import kept_images
from vadiff.trainer.report.evaluate import evaluate_run
from vadiff.training import Run, open_run


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Run:
    """A copy of the trained run, of digits, that a test may write to."""
    return open_run(shutil.copytree(trained_run, tmp_path / "run"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[int]]:
    """Images are the training images with these numbers, which takes no time; the list says which seeds were drawn."""
    calls: list[Sequence[int]] = []

    def generate(run: Run, seeds: Sequence[int], generation: Any) -> Iterator[Generated]:
        calls.append([*seeds])
        yield Generated(0, run.images().train[torch.tensor(seeds)], None)

    monkeypatch.setattr(drawn_images, "generate", generate)
    return calls


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_digits_are_compared_by_their_classifier_and_images_are_kept(
    trained_run: Path, tmp_path: Path, digits_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(trained_run, tmp_path / "run")
    command = ["evaluate", str(path), "--images", "20", "--steps", "2", "--cache", str(digits_cache)]
    assert main([*command, "--devices", "cpu", "--no-held-out"]) == 0
    assert "20 images against 1,500 real ones, features of the digits classifier" in capsys.readouterr().out
    folder = path / "evaluation" / "step-4"
    content = metrics_of(folder)
    assert {"fd-digits", "kid-digits", "precision-digits", "recall-digits"} <= set(content["metrics"])
    assert (content["features"], content["layer"], content["inception_weights"]) == ("digits", None, None)
    assert len(content["digits_classifier"]) == 16
    assert read_pictures(folder / "images-0.npz").shape == (20, 1, 8, 8)


def test_further_call_draws_nothing_and_measures_what_is_missing(
    run: Run, drawn: list[Sequence[int]], digits_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fid, both = (Comparison(metrics, cache=digits_cache) for metrics in (("fid",), ("fid", "kid")))
    folder = evaluate_run(run, default_generation(run), range(50), fid)
    first = metrics_of(folder)["metrics"]
    capsys.readouterr()
    evaluate_run(run, default_generation(run), range(50), fid)
    assert "real ones" not in capsys.readouterr().out  # nothing was compared
    evaluate_run(run, default_generation(run), range(50), both)
    assert len(drawn) == 1
    found = metrics_of(folder)["metrics"]
    assert found["fd-digits"] == first["fd-digits"]
    assert set(found) == {"fd-digits", "kid-digits", "kid_std-digits"}


def test_images_of_other_options_are_not_taken(run: Run, drawn: list[Sequence[int]], digits_cache: Path) -> None:
    fid = Comparison(("fid",), cache=digits_cache)
    generation = default_generation(run)
    folder = evaluate_run(run, generation, range(50), fid)
    for seeds, steps in ((range(50), 5), (range(40), 5)):
        evaluate_run(run, dataclasses.replace(generation, steps=steps), seeds, fid)
        content = metrics_of(folder)
        assert (content["images"], content["generation"]["steps"]) == (len(seeds), steps)
        assert len(read_pictures(folder / "images-0.npz")) == len(seeds)
    assert [len(seeds) for seeds in drawn] == [50, 50, 40]


def test_repeats_are_means_over_disjoint_seeds(run: Run, drawn: list[Sequence[int]], digits_cache: Path) -> None:
    fid = Comparison(("fid",), cache=digits_cache)
    folder = evaluate_run(run, default_generation(run), range(10, 60), fid, repeats=3)
    assert [(seeds[0], seeds[-1]) for seeds in drawn] == [(10, 59), (60, 109), (110, 159)]
    content = metrics_of(folder)
    each = [one["metrics"]["fd-digits"] for one in content["each"]]
    assert [one["first_seed"] for one in content["each"]] == [10, 60, 110]
    assert len(set(each)) == 3
    assert content["metrics"]["fd-digits"] == pytest.approx(sum(each) / 3)


def test_killed_evaluation_loses_only_the_set_of_images_in_work(
    run: Run, drawn: list[Sequence[int]], digits_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fid = Comparison(("fid",), cache=digits_cache)
    measure = comparison.compare

    def killed(images: Any, *others: Any) -> dict[str, float]:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return measure(images, *others)

    monkeypatch.setattr("vadiff.trainer.report.evaluate.compare", killed)
    with pytest.raises(Stopped, match="stopped by SIGINT; kept in "):
        evaluate_run(run, default_generation(run), range(50), fid, repeats=3)
    folder = run.path / "evaluation" / "step-4"
    content = metrics_of(folder)
    assert (content["repeats"], content["means_over"]) == (3, [0])  # which says that it is not the mean over three
    assert run.evaluations() == []
    assert drawn_with(run.path, 4) is None  # for `vadiff ablate` it is not measured yet
    monkeypatch.setattr("vadiff.trainer.report.evaluate.compare", measure)
    evaluate_run(run, default_generation(run), range(50), fid, repeats=3)
    assert [seeds[0] for seeds in drawn] == [0, 50, 100]  # the second set had been kept
    assert metrics_of(folder)["means_over"] == [0, 50, 100]
    assert drawn_with(run.path, 4) is not None
    [(_, metrics)] = run.evaluations()
    assert set(metrics) == {"fd-digits"}


def test_evaluation_that_is_killed_in_a_later_call_keeps_what_it_had(
    run: Run, drawn: list[Sequence[int]], digits_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fid, both = (Comparison(metrics, cache=digits_cache) for metrics in (("fid",), ("fid", "kid")))
    folder = evaluate_run(run, default_generation(run), range(50), fid, repeats=3)
    before = metrics_of(folder)
    measure, calls = comparison.compare, []

    def killed(*arguments: Any) -> dict[str, float]:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr("vadiff.trainer.report.evaluate.compare", killed)
    with pytest.raises(Stopped, match="stopped by SIGINT; kept in "):
        evaluate_run(run, default_generation(run), range(50), both, repeats=3)
    content = metrics_of(folder)
    assert content["metrics"] == before["metrics"]
    assert [one["metrics"].get("fd-digits") for one in content["each"]] == [
        one["metrics"]["fd-digits"] for one in before["each"]
    ]
    assert "kid-digits" in content["each"][0]["metrics"]
    monkeypatch.setattr("vadiff.trainer.report.evaluate.compare", measure)
    evaluate_run(run, default_generation(run), range(50), fid)  # one set of the three: the others stay in the file
    content = metrics_of(folder)
    assert (content["repeats"], content["means_over"], len(content["each"])) == (1, [0], 3)
    assert content["metrics"]["fd-digits"] == before["each"][0]["metrics"]["fd-digits"]


def test_killed_drawing_loses_only_the_batch_in_work(
    run: Run, digits_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[int]] = []
    images = run.images()
    assert images.train_labels is not None

    def generate(run: Run, seeds: Sequence[int], generation: Any) -> Iterator[Generated]:
        calls.append([*seeds])
        for start in (10, 0, 20):  # as batches of several devices come, in any order
            if calls[1:] == [] and start == 20:
                raise KeyboardInterrupt
            numbers = torch.tensor(seeds[start : start + 10], dtype=torch.int64)
            if len(numbers):
                yield Generated(start, images.train[numbers], images.train_labels[numbers])

    monkeypatch.setattr(drawn_images, "generate", generate)
    seeds, how = range(3, 33), default_generation(run)
    with pytest.raises(KeyboardInterrupt):
        kept_images(run, seeds, how, tmp_path / "kept")
    parts = tmp_path / "kept" / "images-3.parts"
    assert len([*parts.iterdir()]) == 2
    (parts / "3.npz").write_bytes((parts / "3.npz").read_bytes()[:-100])
    kept = kept_images(run, seeds, how, tmp_path / "kept")
    assert calls[1] == [*range(3, 13), *range(23, 33)]
    assert torch.equal(kept, images.train[3:33])
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["images-3.npz"]
    assert torch.equal(read_labels(tmp_path / "kept" / "images-3.npz"), images.train_labels[3:33])
    parts.mkdir()
    shutil.copy(tmp_path / "kept" / "images-3.npz", parts / "3.npz")  # of other options
    kept_images(run, seeds, dataclasses.replace(how, steps=5), tmp_path / "kept")
    assert calls[2] == [*seeds]


@pytest.mark.parametrize("damage", ["", "{", '{"metrics": {}}'])
def test_damaged_record_is_measured_again(
    damage: str, run: Run, drawn: list[Sequence[int]], digits_cache: Path
) -> None:
    fid = Comparison(("fid",), cache=digits_cache)
    folder = evaluate_run(run, default_generation(run), range(50), fid)
    expected = metrics_of(folder)
    (folder / "metrics.json").write_text(damage)
    assert metrics_of(evaluate_run(run, default_generation(run), range(50), fid)) == expected
    (folder / "images-0.npz").write_bytes((folder / "images-0.npz").read_bytes()[:300])
    (folder / "metrics.json").unlink()
    assert metrics_of(evaluate_run(run, default_generation(run), range(50), fid)) == expected
    assert len(drawn) == 2


def test_images_are_not_written_if_they_are_not_to_be_kept(
    run: Run, drawn: list[Sequence[int]], digits_cache: Path
) -> None:
    fid = Comparison(("fid",), cache=digits_cache)
    folder = evaluate_run(run, default_generation(run), range(50), fid, keep_images=False)
    assert [file.name for file in folder.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "inception"], "Inception weights could not be downloaded"),
        (["--layer", "768"], "layer is '768', but features is digits"),
        (["--metrics", "isc"], "metrics has isc, the Inception score, but features is digits"),
        (["--images", "3"], "images has 3 images, expected at least 5"),
        (["--reference", "color.npz"], r"reference is (6, 3, 8, 8), expected [N, 1, 8, 8] with features digits"),
        (["--repeats", "0"], "argument --repeats: 0, expected at least 1"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_said_before_anything_is_drawn(
    arguments: list[str], message: str, run: Run, drawn: list[Sequence[int]], digits_cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with PictureWriter(Path("color.npz"), range(6), (3, 8, 8)) as writer:
        writer.write(0, torch.zeros(6, 3, 8, 8, dtype=torch.uint8))
    command = ["evaluate", str(run.path), "--cache", str(digits_cache), "--devices", "cpu", *arguments]
    with contextlib.suppress(SystemExit):  # of a usage error
        assert main(command) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("See `vadiff")]
    assert message in said[-1]
    assert drawn == []
    assert not (run.path / "evaluation").exists()


def test_pictures_are_compared_by_the_features_of_the_run_that_is_their_reference(
    run: Run, digits_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with PictureWriter(tmp_path / "some.npz", range(20), (1, 8, 8)) as writer:
        writer.write(0, run.images().held_out[:20])
    command = ["evaluate", str(tmp_path / "some.npz"), "--reference", str(run.path), "--cache", str(digits_cache)]
    assert main([*command, "--devices", "cpu", "--metrics", "fid"]) == 0
    assert "fd-digits" in capsys.readouterr().out


def test_note_of_an_archive_is_read_back_and_is_none_elsewhere(tmp_path: Path) -> None:
    for name, note in (("noted.npz", "how"), ("plain.npz", "")):
        with PictureWriter(tmp_path / name, range(2), (1, 8, 8), note=note) as writer:
            writer.write(0, torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert read_note(tmp_path / "noted.npz") == "how"
    assert read_note(tmp_path / "plain.npz") is None
    assert read_note(tmp_path / "missing.npz") is None


def test_sets_of_seeds_do_not_meet() -> None:
    assert seed_sets([3, 5], 3) == [[3, 5], [6, 8], [9, 11]]


def test_cache_that_cannot_be_written_is_said_before_anything_is_drawn(
    run: Run, drawn: list[Sequence[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["evaluate", str(run.path), "--no-held-out", "--cache", str(tmp_path / "file" / "cache")]) == 1
    said = f"vadiff: {tmp_path / 'file'} is a file, expected a folder. It caches features: name another folder with"
    assert capsys.readouterr().err.splitlines()[-1] == f"{said} --cache"
    assert drawn == []

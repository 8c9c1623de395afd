"""vadiff.trainer.report.runs and .equal_images: runs as histories, in groups, and cut to equal length."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vadiff.errors import RunError
from vadiff.trainer.report import charts, group_runs, page, read_history, training_charts
from vadiff.trainer.report.equal_images import at_equal_images
from vadiff.trainer.report.notes import notes_of
from vadiff.training import open_run


def grouped(*paths: Path) -> list[tuple[str, list[str]]]:
    """(label, names of its runs) of each group."""
    groups = group_runs([read_history(open_run(path)) for path in paths])
    return [(group.label, [run.name for run in group.runs]) for group in groups]


def test_runs_that_differ_in_their_seed_only_are_one_group(make_run: Callable[..., Path]) -> None:
    paths = make_run("two", seed=2), make_run("fixed", weighting="constant"), make_run("one", seed=1, device="auto")
    assert grouped(*paths) == [("variance aware", ["one", "two"]), ("constant", ["fixed"])]


def test_run_of_version_0_1_is_in_the_group_of_a_new_one(make_run: Callable[..., Path]) -> None:
    """Its config lacks the fields that came since, prediction among them."""
    new, old = make_run("new"), make_run("old", seed=1)
    config = yaml.safe_load((old / "config.yaml").read_text())
    for name in ("prediction", "timesteps", "zero_terminal_snr", "ema_rampup", "warmup_from_zero"):
        del config[name]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    twins = [make_run(f"twin-{run.name}", weighting="table", table=str(run)) for run in (new, old)]
    assert grouped(new, old) == [("new", ["new", "old"])]
    assert [names for _, names in grouped(*twins)] == [["twin-new", "twin-old"]]


def test_group_is_labelled_by_the_fields_that_differ(make_run: Callable[..., Path]) -> None:
    paths = make_run("a", learning_rate=1e-3), make_run("b", learning_rate=2e-3), make_run("c", learning_rate=2e-3)
    assert grouped(*paths) == [("learning rate 0.001", ["a"]), ("learning rate 0.002", ["b", "c"])]
    assert grouped(paths[0]) == [("a", ["a"])]
    options = [make_run("run", weighting_options=found) for found in ({}, {"strength": 0.1 + 0.2})]
    assert [label for label, _ in grouped(*options)] == ["default weighting options", "strength 0.3"]


def test_run_with_the_table_of_another_counts_by_the_others_settings(make_run: Callable[..., Path]) -> None:
    one, two = make_run("one"), make_run("two", seed=1)
    twins = [make_run(f"twin-{other.name}", weighting="table", table=str(other)) for other in (one, two)]
    paths = make_run("plain", weighting="constant"), *twins, make_run("slow", weighting="constant", learning_rate=1e-3)
    assert grouped(*paths) == [
        ("constant", ["plain"]),
        ("table, table of variance aware", ["twin-one", "twin-two"]),
        ("constant, learning rate 0.001", ["slow"]),
    ]


def test_history_reads_null_as_not_known(make_run: Callable[..., Path]) -> None:
    path = make_run("run")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert None in lines[0]["statistics"]["mean"]
    lines[1]["grad_norm"] = None
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = read_history(open_run(path))
    assert history.step.tolist() == [1, 2, 3, 4]
    assert history.images.tolist() == [64, 128, 192, 256]
    assert np.isnan(history.scalars["grad_norm"]).tolist() == [False, True, False, False]
    assert history.mean.shape == history.std.shape == history.weights.shape == (4, 128)
    assert np.isnan(history.mean[0]).any()
    assert history.share.sum() == pytest.approx(1.0)
    assert not history.held_out_is_test
    assert [step for step, _ in history.samples] == [2, 4]


def with_lines(path: Path, *steps: int, scale: float = 1.0) -> Path:
    """Keep the lines of these steps only, and multiply their losses."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kept = [line | {"loss": line["step"] * scale} for line in lines if line["step"] in steps]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return path


def test_runs_that_log_at_other_steps_are_averaged_where_both_did(make_run: Callable[..., Path]) -> None:
    paths = with_lines(make_run("a"), 1, 2, 3, 4), with_lines(make_run("b", seed=1, log_every=2), 2, 4, scale=3.0)
    groups = group_runs([read_history(open_run(path)) for path in paths])
    assert charts.group_images(groups[0]).tolist() == [128, 256]
    (line, _) = training_charts.curve(groups, "loss", "loss", "loss", "Look here.", "loss").figure.data
    assert list(line.y) == [4.0, 8.0]  # of 2 and 6, 4 and 12
    assert training_charts.log_values(groups[0], "mean").shape == (2, 128)


def test_runs_of_a_group_without_a_common_line_are_named(make_run: Callable[..., Path]) -> None:
    paths = with_lines(make_run("a"), 1, 3), with_lines(make_run("b", seed=1), 2)
    with pytest.raises(RunError, match="have no line of metrics at the same number of images"):
        group_runs([read_history(open_run(path)) for path in paths])


def test_run_says_without_its_data_whether_held_out_images_are_a_test_set(make_run: Callable[..., Path]) -> None:
    path = make_run("a", dataset="cifar10", data="gone")
    content = json.loads((path / "data.json").read_text())
    for is_test in (True, False):
        (path / "data.json").write_text(json.dumps(content | {"held_out_is_test": is_test}))
        assert read_history(open_run(path)).held_out_is_test is is_test
    (path / "data.json").unlink()  # a run of before
    assert read_history(open_run(path)).held_out_is_test is None


def test_run_that_has_logged_nothing_is_named(make_run: Callable[..., Path]) -> None:
    path = make_run("run")
    (path / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match="run has logged nothing yet"):
        read_history(open_run(path))


def test_runs_of_different_length_are_compared_at_equal_images(make_run: Callable[..., Path]) -> None:
    paths = with_lines(make_run("short", steps=2), 1, 2), make_run("long", weighting="constant")
    groups = group_runs([read_history(open_run(path)) for path in paths])
    equal, images = at_equal_images(groups)
    assert images == 128
    (short,), (long,) = (group.runs for group in equal)
    assert short.step[-1] == long.step[-1] == 2
    assert len(long.mean) == len(long.weights) == len(long.scalars["loss"]) == 2
    assert [at for at, _ in long.held_out] == [128]
    assert groups[1].first.step[-1] == 4  # as it was
    title, lead, notes = page.title_of(groups), page.lead_of(groups), notes_of(groups)
    assert title.startswith("2 ways")
    assert lead.startswith("2 runs of 2 and 4 steps with 64 images each")
    assert "The runs are of different length." in notes[0]
    assert "after 128 training images" in notes[0]
    sections = {section.anchor: section for section in page.sections_of(groups)}
    table = {row[0]: row[1:] for row in sections["overview"].table.rows}
    assert table["images seen"][:2] == ["128", "128"]
    assert table["held-out x0 loss, geometric mean over levels (EMA)"][2] != ""
    curve = sections["curves"].charts[0].figure.data
    assert [len(line.x) for line in curve] == [2, 4]  # over training, each to its end


def test_runs_of_equal_length_are_left_as_they_are(make_run: Callable[..., Path]) -> None:
    groups = group_runs([read_history(open_run(make_run(name, weighting=name))) for name in ("constant", "min_snr")])
    equal, images = at_equal_images(groups)
    assert images is None
    assert equal == groups
    assert "different length" not in " ".join(notes_of(groups))


def test_runs_that_cannot_be_compared_at_equal_images_are_told(make_run: Callable[..., Path]) -> None:
    paths = with_lines(make_run("short", steps=2), 1), with_lines(make_run("long", weighting="constant"), 3, 4)
    groups = group_runs([read_history(open_run(path)) for path in paths])
    assert at_equal_images(groups)[1] is None
    assert "values and charts are of different numbers of training images" in notes_of(groups)[0]


def with_metric(path: Path, step: int, **content: object) -> Path:
    """A run whose Fréchet distance was measured at this step."""
    folder = path / "evaluation" / f"step-{step}"
    folder.mkdir(parents=True)
    values = {"images_seen": 64 * step, "images": 100, "metrics": {"fd-digits": 5.0}} | content
    (folder / "metrics.json").write_text(json.dumps(values))
    return path


def compared(*paths: Path) -> tuple[dict[str, Any], str]:
    """The rows of the table of a report, and the notes."""
    groups = group_runs([read_history(open_run(path)) for path in paths])
    table = next(section.table for section in page.sections_of(groups) if section.anchor == "overview")
    assert table is not None
    return {row[0]: row[1:] for row in table.rows}, " ".join(notes_of(groups))


HELD_OUT = "held-out x0 loss, geometric mean over levels (EMA)"


def test_measurements_are_compared_at_equal_images_too(make_run: Callable[..., Path]) -> None:
    """A short run measures its held-out loss at its end, where a longer one has none."""
    short = with_lines(with_metric(make_run("short", steps=3), 2), 1, 2, 3)
    lines = [json.loads(line) for line in (short / "metrics.jsonl").read_text().splitlines()]
    lines[2]["held_out"] = {
        name: [value / 2 for value in values] if "loss" in name else values
        for name, values in lines[1]["held_out"].items()
    }
    (short / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, notes = compared(short, with_metric(make_run("long", weighting="constant"), 4))
    assert rows[HELD_OUT][2] == "+0.00 %"  # both after 2 steps
    assert "Held-out loss: compared after 128 training images." in notes
    assert rows["Fréchet distance (digits)"] == ["5.000", "–", ""]
    assert "Fréchet distance (digits): not measured after the same number of training images" in notes


@pytest.mark.parametrize("change", [{"held_out_images": 1}, {"held_out_draws": 7}], ids=str)
def test_held_out_losses_that_were_measured_otherwise_have_no_difference(
    make_run: Callable[..., Path], change: dict[str, int]
) -> None:
    rows, notes = compared(make_run("one"), make_run("other", weighting="constant", **change))
    assert rows[HELD_OUT][2] == ""
    assert "measured at different noise levels, or with different numbers of images or draws" in notes


def test_distances_of_other_numbers_of_images_have_no_difference(make_run: Callable[..., Path]) -> None:
    one, other = with_metric(make_run("one"), 4), make_run("other", weighting="constant")
    rows, notes = compared(one, with_metric(other, 4, images=50))
    assert rows["Fréchet distance (digits)"] == ["5.000", "5.000", ""]
    assert "Fréchet distance (digits): measured with different options" in notes


def test_training_losses_of_other_noise_levels_have_no_difference(make_run: Callable[..., Path]) -> None:
    rows, _ = compared(make_run("one"), make_run("other", p_mean=0.0))
    assert rows["training base loss"][2] == ""
    assert rows[HELD_OUT][2] == "+0.00 %"


def test_tables_of_the_same_weighting_are_told_apart(make_run: Callable[..., Path]) -> None:
    tables = [make_run(f"table-{rate}", learning_rate=rate) for rate in (0.1, 0.2)]
    twins = [make_run(f"twin-{place}", weighting="table", table=str(table)) for place, table in enumerate(tables)]
    labels = [label for label, _ in grouped(*twins)]
    assert labels == [f"table of variance aware ({twin})" for twin in twins]
    compared(*twins)


def test_runs_of_the_same_seed_are_no_seeds_and_a_diverged_one_is_named(make_run: Callable[..., Path]) -> None:
    twice, other = [make_run("one"), make_run("again")], make_run("other", weighting="constant")
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line | {"base_loss": None}) + "\n" for line in lines))
    rows, notes = compared(*twice, other)
    assert rows["seeds"][:2] == ["1", "1"]
    assert "one, again have the same settings and the same seed" in notes
    assert "other: the last loss is not finite" in notes

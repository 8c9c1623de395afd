"""README and docs: their code runs, their commands parse, their links and quotations lead somewhere."""

from __future__ import annotations

import argparse
import ast
import csv
import doctest
import importlib.util
import itertools
import json
import math
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import vadiff
from vadiff import diagnosis
from vadiff.integrations import kohya
from vadiff.trainer.cli import parse_options

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("[A-Z]*.md")), *sorted(DOCS.rglob("*.md"))]

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="docs/ is not beside the tests")

SHELL = ("sh", "bash", "console")
WIDEST = 100  # characters: what fits beside navigation and contents at 1280 px, measured in Chromium
WIDEST_OUTPUT = 120  # site.css makes `text` smaller
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^ *```", re.M | re.S)


class Block(NamedTuple):
    page: Path
    line: int  # of its first line of text
    language: str
    text: str
    output: str | None  # text block right below: what a Python block prints

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The code blocks that a reader of the page sees: what stands in an HTML comment is none."""
    visible = _COMMENT.sub(lambda comment: "\n" * comment[0].count("\n"), page.read_text())
    found, seen = [], list(_BLOCK.finditer(visible))
    for block, below in itertools.zip_longest(seen, seen[1:]):
        adjacent = below is not None and not visible[block.end() : below.start()].strip()
        output = textwrap.dedent(below["text"]) if below and adjacent and below["language"] == "text" else None
        line = visible.count("\n", 0, block.start("text")) + 1
        found.append(Block(page, line, block["language"].split(" ")[0], textwrap.dedent(block["text"]), output))
    return found


def of_language(*languages: str) -> list[Any]:
    return [pytest.param(b, id=str(b)) for page in PAGES for b in blocks(page) if b.language in languages]


def with_python() -> list[Any]:
    pages = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


@pytest.mark.filterwarnings(
    "ignore:FigureCanvasAgg is non-interactive",  # plt.show() of a page, without a window
    "ignore:.*(does not have many workers|LeafSpec|number of training batches)",  # Lightning, of a page's few samples
)
@pytest.mark.parametrize("page", with_python())
def test_visible_python_of_a_page_runs_from_top_to_bottom_and_prints_what_it_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    surroundings(monkeypatch)
    namespace: dict[str, Any] = {"__name__": "page"}
    with warnings.catch_warnings():
        for block in blocks(page):
            if block.language == "python":
                code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
                capsys.readouterr()
                exec(code, namespace)
                if "print(" in block.text and page not in OUTPUT_ELSEWHERE:
                    assert differences(block.output or "", capsys.readouterr().out) == [], block


OUTPUT_ELSEWHERE = (ROOT / "README.md", DOCS / "index.md")  # their output is of other runs, which they name


def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fresh process has, and a notebook; a test has neither."""
    notebook: dict[str, dict[str, Any]] = {
        "IPython": {"get_ipython": lambda: None, "version_info": (9, 0)},
        "IPython.display": {"clear_output": lambda wait: None},
    }
    for name, members in notebook.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    if importlib.util.find_spec("matplotlib"):
        importlib.import_module("matplotlib").use("Agg")
    if "accelerate" in sys.modules:
        state = importlib.import_module("accelerate.state")
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


def differences(shown: str, printed: str) -> list[tuple[str, str]]:
    """Words that differ, up to where lines break; numbers may differ by 2 % or by two units in the last place."""
    pairs = itertools.zip_longest(shown.split(), printed.split(), fillvalue="")
    return [(ours, theirs) for ours, theirs in pairs if not same_word(ours, theirs)]


def same_word(shown: str, printed: str) -> bool:
    if _NUMBER.sub("#", shown) != _NUMBER.sub("#", printed):
        return False
    pairs = zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True)
    return all(
        math.isclose(float(a.replace(",", "")), float(b.replace(",", "")), rel_tol=0.02, abs_tol=2 * last_place(a))
        for a, b in pairs
    )


def last_place(number: str) -> float:
    mantissa, _, exponent = number.replace(",", "").partition("e")
    return float(10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2])))


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("mean 1.00  std 2", "mean  1.01 std 2", True),
        ("mean 1.00", "mean 1.06", False),
        ("mean 1.00", "std 1.00", False),
        ("mean 1.00", "mean 1.00\nstd 2", False),
        ("verdict: a long\n  line", "verdict: a long line", True),
        ("p 1.2e-09", "p 1.3e-09", True),
        ("", "1", False),
    ],
)
def test_shown_output_is_compared_word_by_word_and_number_by_number(shown: str, printed: str, same: bool) -> None:
    assert (differences(shown, printed) == []) is same


def test_code_in_a_comment_is_not_visible(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!--\n```python\nhidden = 1\n```\n-->\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n")
    assert [(block.text, block.line, block.output) for block in blocks(page)] == [
        ("print(1)\n", 8, "1\n"),
        ("1\n", 12, None),
    ]


def test_no_line_of_code_is_cut_off_at_1280_pixels() -> None:
    long = [
        f"{block.page.relative_to(ROOT)}:{block.line + number}: {len(line)} characters"
        for page in (*DOCS.rglob("*.md"), ROOT / "CONTRIBUTING.md")
        for block in blocks(page)
        for number, line in enumerate(with_included(block.text).splitlines())
        if len(line) > (WIDEST_OUTPUT if block.language == "text" else WIDEST)
    ]
    assert long == []


def with_included(text: str) -> str:
    return re.sub(r'--8<-- "(.*)"', lambda found: (ROOT / found[1]).read_text(), text)


def test_validation_on_kohyas_page_measures_every_level_of_each_latent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("accelerate", "diffusers"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    surroundings(monkeypatch)
    page: dict[str, Any] = {"__name__": "page"}
    for block in blocks(DOCS / "trainers" / "kohya.md"):
        if block.language == "python":
            exec(block.text, page)
    trainer, seen = page["ValidatedTrainer"](), {}
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "log", lambda values, step: seen.update(values))
    monkeypatch.setattr(trainer, "call_unet", lambda args, accelerator, unet, noisy, *rest: unet(noisy), raising=False)
    scheduler = page["DDPMScheduler"](beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    options, cached = types.SimpleNamespace(v_parameterization=False), torch.randn(20, 4, 2, 2)
    for part in (cached[:9], cached[9:], cached[9:]):  # the script repeats a batch for each of its timesteps
        given: tuple[Any, ...] = (
            options,
            accelerator,
            scheduler,
            part,
            {},
            [],
            lambda noisy: 0.9 * noisy,
            None,
            torch.float32,
            False,
        )
        assert trainer.get_noise_pred_and_target(*given, is_train=False) == "prediction and target"
    assert trainer.get_noise_pred_and_target(*given) == "prediction and target"
    trainer.epoch_logging(accelerator, {"loss/epoch_average": 1.0}, 10, 1)
    assert not seen
    trainer.epoch_logging(accelerator, {"loss/validation/epoch_average": 1.0}, 10, 1)
    assert "vadiff/validation/mean_log_ratio" in seen
    assert trainer.validation.reference.samples.tolist() == [20] * 8


def test_what_pages_take_from_vadiff_is_there_after_importing_it() -> None:
    """A page that runs here could owe that to modules that another test has imported."""
    code = "import vadiff; print(*dir(vadiff))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    there = set(done.stdout.split())
    taken = {
        f"{page.relative_to(ROOT)}: vadiff.{node.attr}": node.attr
        for page in PAGES
        for block in blocks(page)
        if block.language == "python"
        for node in ast.walk(ast.parse(block.text))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vadiff"
    }
    assert len(taken) > 10
    assert [where for where, attribute in taken.items() if attribute not in there] == []


def test_diff_blocks_give_valid_python() -> None:
    for block in (block for page in PAGES for block in blocks(page) if block.language == "diff"):
        kept = [line[1:] for line in block.text.splitlines() if not line.startswith("-")]
        ast.parse(textwrap.dedent("\n".join(kept)), str(block))


def with_examples() -> list[Any]:
    """Every docstring that has a `>>>` in it."""
    found = []
    for module in pkgutil.walk_packages(vadiff.__path__, "vadiff."):
        path = Path(module.module_finder.path, *module.name.rpartition(".")[2:])
        source = path / "__init__.py" if module.ispkg else path.with_suffix(".py")
        if source.is_file() and ">>>" in source.read_text():
            loaded = importlib.import_module(module.name)
            found += [test for test in doctest.DocTestFinder().find(loaded, module.name) if test.examples]
    return [pytest.param(test, id=test.name) for test in found]


@pytest.mark.parametrize("test", with_examples())
def test_examples_of_docstrings_give_what_they_say(test: doctest.DocTest) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    prediction, timesteps = torch.randn(8, 4, 8, 8, requires_grad=True), torch.arange(8)
    betas = torch.linspace(1e-4, 0.02, 1000)
    scheduler = types.SimpleNamespace(  # what is read of one of diffusers'
        alphas_cumprod=torch.cumprod(1 - betas, 0), betas=betas, config=types.SimpleNamespace(prediction_type="epsilon")
    )
    test.globs |= {
        "torch": torch, "vadiff": vadiff, "criterion": vadiff.DiffusionLoss(), "noise_scheduler": scheduler,
        "model_pred": prediction, "target": torch.randn(8, 4, 8, 8), "latents": torch.randn(8, 4, 8, 8),
        "noise": torch.randn(8, 4, 8, 8), "timesteps": timesteps,
    }  # fmt: skip
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=options).run(test, out=said.append, clear_globs=False)
    assert result.failed == 0, "".join(said)


def commands(block: Block) -> Iterator[list[str]]:
    """Words of each command, without variables in front."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


@pytest.mark.parametrize("block", of_language(*SHELL))
def test_commands_have_flags_files_and_targets_that_exist(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(block):
        check_command(words)


def check_command(words: list[str]) -> None:
    program, *arguments = words
    if program == "vadiff":
        assert parses(arguments), shlex.join(words)
    elif program in ("torchrun", "accelerate") or (program == "python" and arguments[:1] == ["-m"]):
        if "-m" in arguments:
            check_command(arguments[arguments.index("-m") + 1 :])
        else:
            assert any((ROOT / word).is_file() for word in arguments), shlex.join(words)
    elif program == "vadiff.integrations.kohya":  # a trainer's script, its options, ours
        _, others = kohya.add_arguments(argparse.ArgumentParser()).parse_known_args(arguments)
        assert not any(word.startswith("--vadiff") for word in others), shlex.join(words)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(word for word in arguments if "=" not in word) <= set(targets), shlex.join(words)
    elif program == "pip":
        assert arguments[0] == "install"
        extras = {
            extra for word in arguments for extra in ",".join(re.findall(r"^(?:vadiff|\.)\[(.*)\]", word)).split(",")
        }
        assert extras - {""} <= known_extras(), shlex.join(words)
    elif program in ("python", ".venv/bin/python"):
        assert (ROOT / arguments[0]).is_file(), shlex.join(words)
    elif program in ("pytest", ".venv/bin/pytest"):
        paths = [word for word in arguments if not word.startswith("-") and not word.isdigit()]
        assert all((ROOT / path).exists() for path in paths), shlex.join(words)
    elif program != "cd":
        assert (ROOT / program).is_file(), f"what is this? {shlex.join(words)}"


def parses(arguments: list[str]) -> bool:
    """Whether `vadiff` would run with these arguments, or print help."""
    try:
        parse_options(arguments)
    except SystemExit as stopped:
        return stopped.code == 0
    return True


def known_extras() -> set[str]:
    return set(_toml((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def _toml(text: str) -> dict[str, Any]:
    module = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    return importlib.import_module(module).loads(text)


@pytest.mark.parametrize(
    "command",
    ["vadiff train --preset digit", "make all-of-it", "python nowhere.py", "pip install 'vadiff[reports]'", "rm -rf x"],
)
def test_a_command_that_is_wrong_would_be_noticed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        check_command(shlex.split(command))


@pytest.mark.parametrize("block", of_language("toml", "yaml", "json"))
def test_configurations_parse(block: Block, tmp_path: Path) -> None:
    if block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        pytest.importorskip("yaml").safe_load(block.text)
    elif "arms" in _toml(block.text):
        from vadiff.trainer.ablation.grid import read_grid

        (tmp_path / "grid.toml").write_text(block.text)
        assert read_grid(tmp_path / "grid.toml").runs(tmp_path)


def test_every_block_says_what_it_is_in() -> None:
    known = {"python", "diff", "toml", "yaml", "json", "text", "bibtex", *SHELL}
    assert [str(block) for page in PAGES for block in blocks(page) if block.language not in known] == []


@pytest.mark.parametrize("page", sorted(ROOT.glob("[A-Z]*.md")), ids=lambda page: page.name)
def test_links_of_pages_that_mkdocs_does_not_check_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def test_errors_that_the_faq_explains_are_those_of_the_code() -> None:
    code = re.sub(
        r'"\s*\n\s*f?"', "", "".join(path.read_text() for path in ROOT.glob("vadiff/**/*.py")) or _installed()
    )
    code = re.sub(r"\{[^{}]*\}", "…", code)
    titles = re.findall(r"^### `(.*)`$", (DOCS / "faq.md").read_text(), re.M)
    assert len(titles) > 5
    missing = []
    for title in titles:
        pattern = ".{0,60}".join(map(re.escape, re.split(r" … |8|'triton'", title)))
        if not re.search(pattern, code):
            missing.append(title)
    assert missing == []


def _installed() -> str:
    return "".join(path.read_text() for path in Path(vadiff.__file__).parent.rglob("*.py"))


def trainer_table(page: Path) -> str:
    """The rows of "your trainer → the lines to change", with links as seen from the root."""
    found = re.search(r"<!-- trainers -->\n(.*?)\n<!-- end of trainers -->", page.read_text(), re.S)
    assert found is not None
    prefix = "" if page.parent == ROOT else f"{page.parent.relative_to(ROOT)}/"
    return re.sub(r"\]\(([^)]*)\)", lambda link: f"]({prefix}{link[1]})", found[1]).strip()


def test_readme_and_docs_have_the_same_table_of_trainers_and_all_of_them() -> None:
    table = trainer_table(ROOT / "README.md")
    assert table == trainer_table(DOCS / "trainers" / "index.md")
    for page in DOCS.glob("trainers/*.md"):
        assert page.name == "index.md" or f"(docs/trainers/{page.name})" in table


def test_figures_of_the_digits_experiment_are_those_of_the_result_file() -> None:
    assert '--8<-- "benchmarks/results/ablation-digits/results.txt"' in (DOCS / "weighting.md").read_text()
    for picture, result in (("ablation-digits.png", "results.png"), ("ablation-digits-gaps.png", "gaps.png")):
        assert (DOCS / picture).read_bytes() == (ROOT / "benchmarks/results/ablation-digits" / result).read_bytes()


def test_tables_of_the_docs_are_made_from_the_committed_results() -> None:
    tables, results = experiment_script("result_tables"), ROOT / "benchmarks/results"
    objectives = json.loads((results / "objectives-digits/results.json").read_text())
    assert tables.objectives_table(objectives) == (results / "objectives-digits/table.md").read_text()
    with (results / "ablation-digits/gaps.csv").open(newline="") as file:
        table = tables.gap_table(list(csv.DictReader(file)))
    assert table == (results / "ablation-digits/gap_table.txt").read_text()


def test_figures_of_the_edm2_experiment_are_those_of_the_result_file() -> None:
    page = (DOCS / "edm2.md").read_text()
    found = json.loads((ROOT / "benchmarks/results/edm2/edm2.json").read_text())
    for network, width in (("classic", "0.07"), ("edm2", "0.10")):
        losses, rate = found["networks"][network]["held_out"], found["learning_rates"][network]["chosen"]
        assert found["networks"][network]["chosen_width"] == float(width)
        assert f"| {losses['raw']:.4f} |" in page
        assert f"| {losses[str(float(width))]:.4f} (σ_rel {width}) |" in page
        assert f"| {rate} |" in page
    for ratio in (found["edm2_over_classic"][name] for name in ("raw", "width_chosen")):
        assert f"{ratio['ratio']:.3f} ({ratio['low_95']:.3f} to {ratio['high_95']:.3f})" in page


def test_figures_of_the_subset_estimators_are_those_of_the_result_file() -> None:
    page = (DOCS / "optimal-loss.md").read_text()
    for case, by_factor in json.loads((ROOT / "benchmarks/results/subset_estimators.json").read_text())[
        "worst"
    ].items():
        cells = [f"{worst['percent']:+.1f} ± {worst['stderr']:.1f}" for worst in by_factor.values()]
        assert f"{case.split()[1]} | {' | '.join(cells)} |".replace("-", "−") in page


def test_figures_of_the_level_free_loss_are_those_of_the_result_file() -> None:
    page = (DOCS / "live.md").read_text()
    for case, found in json.loads((ROOT / "benchmarks/results/level_free.json").read_text())["rows"].items():
        means = {name: value["mean"] for name, value in found.items() if name != "seeds"}
        cells = (
            f"{case.rpartition(' ')[2]} | {means['raw']:.3f} | {means['level_free']:.3f} | {means['ratio']:.1f} | "
            f"{means['as_many_samples']:.1f} |"
        )
        assert cells in page, case


def test_figures_of_is_this_for_me_are_those_of_the_results() -> None:
    page = (DOCS / "is-this-for-me.md").read_text()
    results = json.loads((ROOT / "benchmarks/results/objectives-digits/results.json").read_text())["arms"]
    targets = (ROOT / "benchmarks/results/posterior_targets.md").read_text()
    rows = {"ε, linear": ("epsilon-linear", "epsilon, linear betas"), "v, cosine": ("v-cosine", "v, cosine")}
    rows |= {"flow, uniform": ("flow", "flow"), "EDM, P_mean −1.2 ": ("edm", "EDM"), "x0, cosine": ("x0-cosine", "")}
    rows |= {"flow with a shift": ("", "flow, shift 3")}
    for start, (objective, name) in rows.items():
        (row,) = re.findall(rf"^\| {start}.*$", page, re.MULTILINE)
        cells = row.replace("−", "-").split("|")[2:5]
        weights, _, target = ([float(each) for each in re.findall(r"[-+][.\d]+", cell)] for cell in cells)
        if objective:
            found = results[f"{objective}/variance-aware"]
            expected = [100 * math.expm1(found[field]["mean"]) for field in ("held_out", "distance")]
            assert weights == pytest.approx(expected, abs=0.051)
        if name:
            (line,) = re.findall(rf"^\| {name} \| 1,024 references.*$", targets, re.MULTILINE)
            expected = [float(each) for each in re.findall(r"\| ([-+][.\d]+) %", line)]
            assert target == pytest.approx(expected, abs=0.5 if "shift" in start else 0.051)


def experiment_script(name: str) -> Any:
    specification = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / "experiments" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_page_on_the_diagnosis_has_the_thresholds_and_the_figures_of_their_experiment() -> None:
    page = " ".join((DOCS / "diagnosis.md").read_text().split())
    found = json.loads((ROOT / "benchmarks/results/diagnosis.json").read_text())
    leave, trial = diagnosis.LEAVE_BELOW, diagnosis.TRY_FROM
    assert found["thresholds"] == {"leave_below": leave, "try_from": trial}
    assert f"| below {leave:g} | nothing" in page
    assert f"| from {trial:g} | try" in page
    assert f"| from {diagnosis.TOO_MUCH:,.0f} | the same" in page
    assert found["judged_on"] == {"right": 30, "of": 30}
    by_std = found["by_std"]["judged_on"]
    assert f"{by_std['right']} of {by_std['of']} verdicts on the other seeds are right" in page
    by_level = found["by_other_outcomes"]["loss_level"]
    assert by_level["fixed_on"]["right"] + by_level["judged_on"]["right"] == 59
    assert "one verdict of sixty is wrong" in page
    ratios = {
        finding: [row["mean_ratio"] for row in found["digits"] if row["seed"] < 5 and row["finding"] == finding]
        for finding in ("leave", "try")
    }
    assert f'the highest "leave" is {max(ratios["leave"]):.1f}, the lowest "try" {min(ratios["try"]):.0f})' in page
    results = json.loads((ROOT / "benchmarks/results/objectives-digits/results.json").read_text())
    half, full = (
        [100 * math.expm1(value) for value in results["arms"][f"epsilon-linear/{arm}"]["held_out"]["per_seed"].values()]
        for arm in ("loss-level-half", "loss-level")
    )
    assert max(half) < 0
    mean = 100 * math.expm1(results["arms"]["epsilon-linear/loss-level-half"]["held_out"]["mean"])
    assert f"{mean:.1f} %".replace("-", "−") + " in held-out loss, all ten seeds" in page
    assert f"ranged from {min(full):.1f} to {max(full):+.1f} %".replace("-", "−") in page


def test_figures_by_objective_are_those_of_the_results(tmp_path: Path) -> None:
    results = json.loads((ROOT / "benchmarks/results/objectives-digits/results.json").read_text())
    readme = (ROOT / "README.md").read_text()
    rows = {"ε, linear": "epsilon-linear", "x0, cosine": "x0-cosine", "EDM, P_mean −1.2": "edm"}
    rows |= {"EDM, P_mean −0.4": "edm-wide", "flow, uniform": "flow", "v, cosine": "v-cosine"}
    for start, objective in rows.items():
        (row,) = re.findall(rf"^\| {start}.*$", readme, re.MULTILINE)
        mine, other = (results["arms"][f"{objective}/{arm}"] for arm in ("variance-aware", "loss-level"))
        for digits, field in ((2, "held_out"), (1, "distance")):
            mean, low, high = (f"{100 * math.expm1(mine[field][end]):+.{digits}f}" for end in ("mean", "low", "high"))
            assert f"{mean} % ({low} to {high})".replace("-", "−") in row
            assert f"{100 * math.expm1(other[field]['mean']):+.1f} %".replace("-", "−") in row
        assert row.endswith(f"| {mine['verdict']} |")
    assert results["missing"] == []
    pytest.importorskip("matplotlib")
    picture = experiment_script("objectives_picture")
    picture.draw(results, tmp_path / "objectives.svg")
    assert "<svg" in (tmp_path / "objectives.svg").read_text()


def test_the_picture_of_a_plot_is_made_from_the_code_of_its_page(tmp_path: Path) -> None:
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package)
    experiment_script("live_picture").main(["--out", str(tmp_path / "live.svg")])
    assert "<svg" in (tmp_path / "live.svg").read_text()


def test_pictures_of_the_docs_have_no_ground_of_their_own() -> None:
    assert 'fill="#fff"' not in (DOCS / "architecture.svg").read_text()
    for name in ("picture.svg", "objectives.svg", "live.svg"):
        text = (DOCS / name).read_text()
        assert "fill: #ffffff" not in text
        assert "#000000" not in text
        assert float(re.findall(r'<svg [^>]*width="([\d.]+)pt"', text)[0]) <= 320  # 427 px: a phone hardly shrinks it


def test_the_picture_is_made_by_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package)
    picture = experiment_script("picture")
    written = []
    for name in ("a.svg", "b.svg"):
        picture.main(["--steps", "5", "--out", str(tmp_path / name)])
        written.append((tmp_path / name).read_text())
    assert "vadiff.DiffusionLoss()" in capsys.readouterr().out
    assert written[0] == written[1]
    assert "<svg" in written[0]

"""Which part of vadiff may import which: read from the code, imports for types and inside functions included.

A room is a module or package of vadiff/, and one of vadiff/trainer/. What a lower room needs to know of a higher one
goes into a protocol in the lower room.
"""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vadiff

PACKAGE = Path(vadiff.__file__).parent

# Room → the rooms it may import from.
LIBRARY = {
    "_version": set(),
    "errors": set(),
    "extras": set(),
    "files": set(),
    "pixels": set(),
    "augmentation": set(),
    "betas": set(),
    "schedule_checks": {"betas", "errors"},
    "log_snr": {"ops", "schedule_checks"},
    "_validation": set(),
    "_ranks": set(),
    "regression_target": set(),
    "ops": {"_native", "_ranks", "_validation", "triton_kernels"},
    "reference": {"ops"},  # names in pickles of version 0.1
    "process": {"betas", "log_snr", "ops"},
    "schedulers": {"log_snr", "ops", "process", "schedule_checks"},
    "statistics": {"_validation", "ops"},
    "weighting": {"_ranks", "_validation", "ops", "process", "statistics"},
    "level_checks": {"ops", "process"},
    "watch": {"_ranks", "errors", "level_checks", "ops", "statistics"},
    "bands": {"ops", "statistics", "weighting"},
    "diagnosis": {"bands", "ops", "process", "regression_target", "watch", "weighting"},
    "information": {"bands", "files", "ops", "process", "regression_target"},
    "summary": {"bands", "diagnosis", "extras", "metrics_file", "regression_target", "watch"},
    "metrics_file": set(),
    "process_defaults": {"_validation", "errors", "log_snr", "process", "schedulers", "statistics", "weighting"},
    "loss": {
        "_validation",
        "bands",
        "diagnosis",
        "extras",
        "ops",
        "process",
        "process_defaults",
        "regression_target",
        "statistics",
        "summary",
        "watch",
        "weighting",
    },
    "models": {"_validation", "extras", "log_snr", "process"},
    "ema": {"_validation", "errors", "files", "ops"},
    "targets": {"_ranks", "_validation", "errors", "pixels"},
    "optimal_loss": {"_validation", "files", "process", "targets"},
    "levels": {
        "_validation", "information", "loss", "ops", "process", "regression_target", "statistics", "weighting",
    },
    "validation": {
        "_validation", "extras", "files", "optimal_loss", "process", "process_defaults", "schedulers", "summary",
    },
    "sampling": {"_validation", "errors", "information", "models", "pixels", "process"},
    "integrations": {
        "_ranks", "_validation", "extras", "files", "information", "levels", "log_snr", "loss", "process", "sampling",
        "schedulers", "summary", "targets", "validation", "weighting",
    },
}  # fmt: skip
# The trainer may use all of the library; within it:
TRAINER = {
    "trainer": set(),
    "trainer.config": {"trainer.config_fields", "trainer.config_schema"},
    "trainer.config_fields": set(),
    "trainer.config_schema": {"trainer.config_fields"},
    "trainer.presets": {"trainer.config"},
    "trainer.progress": set(),
    "trainer.next_steps": {"trainer.config_schema"},
    "trainer.data": {"trainer.config_schema", "trainer.progress"},
    "trainer.doctor": set(),
    "trainer.evaluation": {"trainer.data", "trainer.progress"},
    "trainer.pictures": set(),
    "trainer.training": {
        "trainer.config", "trainer.config_schema", "trainer.data", "trainer.next_steps", "trainer.pictures",
        "trainer.presets", "trainer.progress",
    },
    "trainer.importing": {"trainer.config", "trainer.data", "trainer.training"},
    "trainer.ablation": {
        "trainer.config", "trainer.data", "trainer.evaluation", "trainer.next_steps", "trainer.presets",
        "trainer.progress", "trainer.training",
    },
    "trainer.report": {
        "trainer.ablation", "trainer.config", "trainer.data", "trainer.evaluation", "trainer.next_steps",
        "trainer.pictures", "trainer.progress", "trainer.training",
    },
    "trainer.cli": {
        "trainer.ablation", "trainer.config", "trainer.config_fields", "trainer.config_schema", "trainer.data",
        "trainer.doctor", "trainer.evaluation", "trainer.importing", "trainer.next_steps", "trainer.pictures",
        "trainer.presets", "trainer.progress", "trainer.report", "trainer.training",
    },
}  # fmt: skip
ALLOWED = {
    **LIBRARY,
    **{room: inside | LIBRARY.keys() for room, inside in TRAINER.items()},
    "training": {"trainer.training"},  # the alias
    "__main__": {"trainer.cli"},
    # what `import vadiff` brings
    "vadiff": {
        "_version", "ema", "levels", "log_snr", "loss", "metrics_file", "ops", "optimal_loss", "process", "statistics",
        "targets", "validation", "weighting",
    },
}  # fmt: skip
# `vadiff.optimal_loss.__getattr__` finds names that version 0.1 had there.
MOVED_NAMES = {("vadiff.optimal_loss", "vadiff.levels"), ("vadiff.optimal_loss", "vadiff.weighting")}


def module_name(path: Path) -> str:
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# The kernels are a package of their own, which an installed vadiff has inside.
MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "triton_kernels" not in path.parts}


def imports(module: str) -> Iterator[tuple[str, int]]:
    """The modules of vadiff that a module imports, anywhere in its code, with the line."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == "vadiff")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            if source.split(".")[0] == "vadiff":
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    is_module = inner in MODULES or inner in ("vadiff._native", "vadiff.triton_kernels")
                    yield inner if is_module else source, node.lineno


def room(module: str) -> str:
    _, *parts = module.split(".")
    return ".".join(parts[: 2 if parts[:1] == ["trainer"] else 1]) or "vadiff"


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_from_lower_rooms_only(module: str) -> None:
    mine = room(module)
    assert mine in ALLOWED, f"{mine} is in no room of this table: say what it may import"
    strangers = [
        f"{MODULES[module]}:{line} imports {target}: {mine} may not import from {room(target)}"
        for target, line in imports(module)
        if room(target) not in {mine, *ALLOWED[mine]} and (module, target) not in MOVED_NAMES
    ]
    assert not strangers, "\n".join(strangers)


def test_table_of_rooms_has_no_circle() -> None:
    assert set().union(*ALLOWED.values()) - {"_native", "triton_kernels"} <= ALLOWED.keys()
    order = list(graphlib.TopologicalSorter(ALLOWED).static_order())
    assert order.index("_native") < order.index("ops") < order.index("loss") < order.index("trainer.training")


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: {target for target, _ in imports(module)} for module in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) != "ops"])
def test_kernels_are_named_in_ops_only(module: str) -> None:
    named = re.compile(r"\b(_native|triton_kernels)\b")
    tree = ast.parse(MODULES[module].read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if id(node) in prose:
            continue
        texts = [getattr(node, field, None) for field in ("id", "attr", "module", "name", "value")]
        found = [text for text in texts if isinstance(text, str) and named.search(text)]
        assert not found, f"{MODULES[module]}:{getattr(node, 'lineno', '?')} names {found}"


def test_importing_vadiff_needs_nothing_that_only_unix_has() -> None:
    code = "import sys; sys.modules['fcntl'] = None; import vadiff"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_vadiff_brings_nothing_of_the_trainer() -> None:
    code = "import sys, vadiff; print(*(name for name in sys.modules if name.startswith('vadiff.train')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []


def test_alias_of_training_has_its_names_and_no_modules_of_its_own() -> None:
    import vadiff.training
    from vadiff.trainer import training

    assert vadiff.training.__all__ == training.__all__
    assert all(getattr(vadiff.training, name) is getattr(training, name) for name in training.__all__)
    assert not hasattr(vadiff.training, "__path__"), "a package's submodules would be loaded a second time"

"""Lightning's Trainer with a criterion that is an attribute of the LightningModule, and the callback that logs it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from seen import Seen
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vadiff

lightning: Any = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from lightning.pytorch.loggers.logger import Logger  # noqa: E402

from vadiff.errors import DiffusionLossWarning  # noqa: E402
from vadiff.extras import MissingExtraError  # noqa: E402
from vadiff.integrations.lightning import StatisticsLogger, ValidationLogger  # noqa: E402
from vadiff.validation import LevelValidation  # noqa: E402

# Lightning's advice on data loaders and validation, and a type of torch's that it uses and torch means to rename.
pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning", "ignore:.*isinstance.treespec, LeafSpec"
)

BATCH = 8


class Module(lightning.LightningModule):
    """Epsilon prediction on points, by F.mse_loss or by a criterion; keeps what it saw."""

    def __init__(self, criterion: vadiff.DiffusionLoss | None = None) -> None:
        super().__init__()
        self.net = torch.nn.Linear(5, 4)
        self.criterion = criterion
        self.seen = Seen()
        self.losses: list[Tensor] = []

    def shared_step(self, batch: list[Tensor]) -> Tensor:
        clean, noise, t = batch
        log_snr = vadiff.log_snr.from_flow_time(t)
        noisy = (1 - t[:, None]) * clean + t[:, None] * noise
        prediction = self.net(torch.cat([noisy, log_snr[:, None].to(noisy) / 8], 1))
        self.seen.add((prediction.float() - noise).square().mean(1), log_snr)
        loss = F.mse_loss(prediction, noise) if self.criterion is None else self.criterion(prediction, noise, log_snr)
        self.losses.append(loss.detach().float())
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.shared_step(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        before = self.criterion.statistics.state.clone()
        self.shared_step(batch)
        assert torch.equal(self.criterion.statistics.state, before)
        self.seen.losses.pop()
        self.seen.levels.pop()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Records(Logger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []

    name = version = "records"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step, metrics))

    def log_hyperparams(self, *args: object, **options: object) -> None:
        pass


def loader(batches: int = 20) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(batches * BATCH, 4, generator=generator) for _ in range(2))
    t = 0.02 + 0.96 * torch.rand(batches * BATCH, generator=generator)
    return DataLoader(TensorDataset(clean, noise, t), batch_size=BATCH)


def trainer(tmp_path: Path, logger: Logger | None = None, **options: Any) -> Any:
    settings = {"accelerator": "cpu", "devices": 1, "max_steps": 10, "callbacks": [StatisticsLogger(2)], **options}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return lightning.Trainer(default_root_dir=tmp_path, logger=logger or Records(), **quiet, **settings)


def criterion(weighting: object = "constant", **options: object) -> vadiff.DiffusionLoss:
    settings = {"bins": 16, "log_snr_range": (-8.0, 8.0), "half_life": float("inf"), **options}
    return vadiff.DiffusionLoss(weighting, **settings)


def test_constant_weighting_trains_as_mse_loss_does(tmp_path: Path) -> None:
    modules = []
    for loss in (None, criterion()):
        torch.manual_seed(0)
        module = Module(loss)
        trainer(tmp_path, callbacks=[]).fit(module, loader())
        modules.append(module)
    plain, own = modules
    torch.testing.assert_close(torch.stack(own.losses), torch.stack(plain.losses), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(own.net.weight, plain.net.weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ten_steps_record_what_the_trainer_saw(tmp_path: Path, accumulate: int) -> None:
    module, logger = Module(criterion("variance_aware")), Records()
    trainer(tmp_path, logger, accumulate_grad_batches=accumulate).fit(module, loader())
    assert len(module.losses) == 10 * accumulate
    module.seen.check(module.criterion, rtol=1e-5)
    assert [step for step, _ in logger.lines] == [2, 4, 6, 8, 10]  # once for a step, however many batches it has


def test_logged_are_the_statistics_at_that_step(tmp_path: Path) -> None:
    module, logger = Module(criterion("variance_aware")), Records()
    trainer(tmp_path, logger, max_steps=4).fit(module, loader())
    expected = Records()
    module.criterion.log_to(expected, 4, "vadiff/criterion")
    assert logger.lines[-1] == expected.lines[-1]
    step, metrics = logger.lines[-1]
    assert step == 4
    assert sum(value for name, value in metrics.items() if "/share/" in name) == pytest.approx(1.0)
    assert all(name.startswith("vadiff/criterion/") for name in metrics)


def test_without_a_number_of_its_own_it_logs_as_often_as_the_trainer(tmp_path: Path) -> None:
    logger = Records()
    trainer(tmp_path, logger, callbacks=[StatisticsLogger()], log_every_n_steps=5).fit(Module(criterion()), loader())
    assert [step for step, _ in logger.lines] == [5, 10]


def test_a_trainer_that_logs_nothing_logs_no_statistics(tmp_path: Path) -> None:
    logger = Records()
    trainer(tmp_path, logger, callbacks=[StatisticsLogger()], log_every_n_steps=0).fit(Module(criterion()), loader())
    assert logger.lines == []


def test_validation_records_nothing(tmp_path: Path) -> None:
    module = Module(criterion("variance_aware"))
    trainer(tmp_path, val_check_interval=2, limit_val_batches=2, max_steps=4).fit(module, loader(), loader())
    assert module.criterion.statistics.count.sum() == 4 * BATCH


def test_state_survives_lightnings_checkpoints(tmp_path: Path) -> None:
    first, resumed = Module(criterion("variance_aware")), Module(criterion("variance_aware"))
    before = trainer(tmp_path, max_steps=5)
    before.fit(first, loader())
    before.save_checkpoint(tmp_path / "half.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "half.ckpt", criterion=criterion("variance_aware"))
    assert torch.equal(loaded.criterion.statistics.state, first.criterion.statistics.state)
    assert torch.equal(loaded.criterion.weights, first.criterion.weights)
    logger = Records()
    trainer(tmp_path, logger).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert len(resumed.losses) == 5
    resumed.seen.losses = first.seen.losses + resumed.seen.losses
    resumed.seen.levels = first.seen.levels + resumed.seen.levels
    resumed.seen.check(resumed.criterion, rtol=1e-5)  # both halves, as of one run
    assert [step for step, _ in logger.lines] == [6, 8, 10]


def test_a_checkpoint_from_before_the_criterion_loads_with_the_switch(tmp_path: Path) -> None:
    before = trainer(tmp_path, max_steps=2, callbacks=[])
    before.fit(Module(), loader())
    before.save_checkpoint(tmp_path / "old.ckpt")
    module = Module(criterion())
    with pytest.raises(RuntimeError, match=r"no statistics .*without vadiff.*fresh_statistics=True"):
        trainer(tmp_path, max_steps=4).fit(module, loader(), ckpt_path=tmp_path / "old.ckpt")
    module.criterion.fresh_statistics = True
    with pytest.warns(DiffusionLossWarning, match="the statistics start afresh"):
        trainer(tmp_path, max_steps=4).fit(module, loader(), ckpt_path=tmp_path / "old.ckpt")
    assert module.criterion.statistics.count.sum() == 2 * BATCH


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision_leaves_the_statistics_alone(tmp_path: Path, precision: str) -> None:
    module = Module(criterion("variance_aware"))
    trainer(tmp_path, precision=precision, max_steps=4).fit(module, loader())
    assert module.criterion.statistics.count.sum() == 4 * BATCH
    module.seen.check(module.criterion, rtol=2e-2)


def test_a_criterion_that_is_no_attribute_is_an_error_before_training(tmp_path: Path) -> None:
    module = Module()
    with pytest.raises(
        ValueError, match=r"Module has no vadiff.DiffusionLoss among its modules: set self.criterion = "
    ):
        trainer(tmp_path).fit(module, loader())
    assert module.losses == []


@pytest.mark.parametrize("every_n_steps", [0, -1, 2.5, True])
def test_bad_intervals_are_named(every_n_steps: Any) -> None:
    with pytest.raises(ValueError, match=r"every_n_steps is .*, expected an integer of at least 1"):
        StatisticsLogger(every_n_steps)


class Validated(Module):
    """Validates at fixed levels; its loss falls with its only weight."""

    def __init__(self, validation: LevelValidation) -> None:
        super().__init__(criterion())
        self.validation = validation

    def validation_step(self, batch: list[Any], batch_idx: int) -> None:
        indices, (clean, _, _) = batch
        log_snr, noise = self.validation.draw(indices, clean.shape, self.device)
        t = vadiff.process.Flow().time(log_snr)
        noisy = (1 - t[:, None]) * clean + t[:, None] * noise
        prediction = self.net(torch.cat([noisy, log_snr[:, None] / 8], 1))
        self.validation.add(indices, log_snr, (prediction - noise).square().mean(1))


def test_validation_is_logged_and_can_be_watched(tmp_path: Path) -> None:
    validation = LevelValidation(3, log_snr_range=(-4.0, 4.0), reference=tmp_path / "reference.csv")
    module, logger, callback = Validated(validation), Records(), ValidationLogger(validation)
    held_out: DataLoader[Any] = DataLoader(validation.indexed(loader(4).dataset), batch_size=5)
    fitted = trainer(tmp_path, logger, callbacks=[callback], val_check_interval=2, max_steps=4)  # with a sanity check
    fitted.fit(module, loader(), held_out)
    logged = [values for _, values in logger.lines if "vadiff/validation/mean_log_ratio" in values]
    first, last = (values["vadiff/validation/mean_log_ratio"] for values in logged)
    assert first == 0.0
    assert callback.result is not None
    assert int(callback.result.samples.sum()) == 4 * BATCH
    watched = fitted.callback_metrics["vadiff/validation/mean_log_ratio"].item()
    assert watched == pytest.approx(callback.result.mean_log_ratio(), rel=1e-5)
    assert watched == pytest.approx(last)
    assert watched != 0.0


def test_part_of_the_held_out_set_is_no_reference(tmp_path: Path) -> None:
    file = tmp_path / "reference.csv"

    def fitted(**options: Any) -> ValidationLogger:
        validation = LevelValidation(3, log_snr_range=(-4.0, 4.0), reference=file)
        callback = ValidationLogger(validation)
        held_out: DataLoader[Any] = DataLoader(validation.indexed(loader(4).dataset), batch_size=5)
        fitting = trainer(tmp_path, Records(), callbacks=[callback], val_check_interval=2, max_steps=4, **options)
        fitting.fit(Validated(validation), loader(), held_out)
        return callback

    assert fitted(fast_dev_run=True).result is None
    with pytest.warns(UserWarning, match=r"limit_val_batches is 2, so no validation becomes the reference, .*Give the"):
        limited = fitted(limit_val_batches=2).result
    assert limited is not None
    assert limited.reference is None
    assert not file.exists()
    whole = fitted().result
    assert whole is not None
    assert file.exists()
    with pytest.warns(UserWarning, match="the same held-out set"):  # and the training goes on
        assert fitted(limit_val_batches=2).result is not None


def test_validation_logger_takes_a_validation_only() -> None:
    with pytest.raises(TypeError, match=r"validation is a int, expected a vadiff\.validation\.LevelValidation"):
        ValidationLogger(12)


def test_whoever_imports_lightning_by_its_other_name_gets_a_callback_of_that(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("pytorch_lightning")
    other.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", other)
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    monkeypatch.delitem(sys.modules, "vadiff.integrations.lightning")
    monkeypatch.setattr("vadiff.integrations.lightning", None)  # importing binds it, and this is undone
    logger = importlib.import_module("vadiff.integrations.lightning").StatisticsLogger()
    assert isinstance(logger, other.Callback)
    assert not isinstance(logger, lightning.Callback)


def test_without_lightning_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "vadiff.integrations.lightning")
    monkeypatch.setattr("vadiff.integrations.lightning", None)
    with pytest.raises(MissingExtraError, match=r"lightning cannot be imported.*pip install lightning"):
        importlib.import_module("vadiff.integrations.lightning")

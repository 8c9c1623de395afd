"""Two gloo processes: every loop's statistics are those of both ranks' samples, the same bits on each.

One launch for all loops; the tests read what it left behind.
"""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import join_two_ranks, leave_two_ranks, start_two_ranks
from seen import Seen
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

STEPS, BATCH = 4, 8

Result = dict[str, Any]


def criterion() -> Any:
    import vadiff

    return vadiff.DiffusionLoss("variance_aware", bins=16, log_snr_range=(-8.0, 8.0), half_life=float("inf"))


def edm2(seen: Seen) -> nn.Module:
    """EDM2's loop, two rounds of accumulation; the network's head gets no gradient but a zero one."""
    from vadiff.integrations.edm import EDM2Loss

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.head = nn.Linear(4, 4), nn.Linear(1, 1)

        def forward(
            self, x: Tensor, sigma: Tensor, class_labels: None, return_logvar: bool = False
        ) -> tuple[Tensor, Tensor]:
            denoised = self.f(x)
            error = (denoised.detach().double() - clean).square().mean(1)
            sigma = sigma.flatten().double()
            seen.add((sigma**-2 + 4) * error, -2 * sigma.log())
            return denoised, self.head(sigma.float()[:, None])

    net = Net()
    ddp = DistributedDataParallel(net)
    loss_fn = EDM2Loss(criterion=criterion())
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        for last in (False, True):
            clean = torch.randn(BATCH, 4)
            ddp.require_backward_grad_sync = last
            loss_fn(net=ddp, images=clean).sum().mul(1 / (2 * BATCH)).backward()
        optimizer.step()
    assert float(net.head.weight.grad.abs()) == 0.0
    return loss_fn.criterion


def lucidrains(seen: Seen) -> nn.Module:
    """A diffusion with a criterion attached, inside DDP; one with the library's arguments, to spare its imports."""
    from vadiff.integrations import lucidrains

    class Diffusion(nn.Module):
        sigma_data = 0.5

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def noise_distribution(self, samples: int) -> Tensor:
            return (-1.2 + 1.2 * torch.randn(samples)).exp()

        def forward(self, images: Tensor, *, sigma: Tensor, loss_reduction: str = "mean") -> Tensor:
            losses = (self.net(images + sigma[:, None] * torch.randn_like(images)) - images).square().mean(1)
            seen.add(losses, -2 * sigma.log())
            return losses if loss_reduction == "none" else losses.mean()

    diffusion = lucidrains.attach(Diffusion(), criterion())
    ddp = DistributedDataParallel(diffusion)
    optimizer = torch.optim.Adam(diffusion.parameters())
    for _ in range(2 * STEPS):
        optimizer.zero_grad()
        ddp(torch.rand(BATCH, 4)).backward()
        optimizer.step()
    return diffusion.criterion


def lightning(seen: Seen) -> nn.Module:
    """Lightning's own DDP strategy, with accumulation and the callback that logs."""
    import lightning.pytorch
    from lightning.pytorch.loggers.logger import Logger
    from torch.utils.data import DataLoader, TensorDataset

    import vadiff
    from vadiff.integrations.lightning import StatisticsLogger

    class Lines(Logger):
        """Leaves it to the callback which rank logs; most loggers are silent on all but one by themselves."""

        name = version = "lines"

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            with open(f"logged-by-{os.environ['RANK']}", "a") as file:
                file.write(f"{step} {sorted(metrics)}\n")

        def log_hyperparams(self, *args: object, **options: object) -> None:
            pass

    class Module(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.criterion = nn.Linear(4, 4), criterion()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            clean, noise, t = batch
            log_snr = vadiff.log_snr.from_flow_time(t)
            prediction = self.net((1 - t[:, None]) * clean + t[:, None] * noise)
            seen.add((prediction - noise).square().mean(1), log_snr)
            return self.criterion(prediction, noise, log_snr)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    samples = 2 * STEPS * 2 * BATCH
    data = TensorDataset(torch.randn(samples, 4), torch.randn(samples, 4), 0.02 + 0.96 * torch.rand(samples))
    module = Module()
    trainer = lightning.pytorch.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, accumulate_grad_batches=2,
        callbacks=[StatisticsLogger(2)], logger=Lines(),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=BATCH))
    return module.criterion


LOOPS = {
    "edm2": (edm2, None),
    "lucidrains": (lucidrains, None),
    "lightning": (lightning, "lightning"),
}


def installed(loop: str) -> bool:
    package = LOOPS[loop][1]
    return package is None or importlib.util.find_spec(package) is not None


def rank_main(rank: int, folder: str) -> None:
    """What each process runs. Lightning finds a process group and torchrun's variables, and starts nothing itself."""
    os.chdir(folder)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        TORCHELASTIC_RUN_ID="test", MASTER_ADDR="localhost", MASTER_PORT="1",
    )  # fmt: skip
    join_two_ranks(rank, folder)
    results = {}
    for name in filter(installed, LOOPS):
        torch.manual_seed(10 + rank if name != "lightning" else 10)  # Lightning's sampler shares one data set out
        seen = Seen()
        own = LOOPS[name][0](seen)
        results[name] = {"criterion": own, "losses": seen.losses, "levels": seen.levels}
    torch.save(results, f"{folder}/rank{rank}.pt")
    leave_two_ranks()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Result]]]:
    folder = tmp_path_factory.mktemp("ranks")
    context = start_two_ranks(rank_main, str(folder))
    try:
        deadline = time.monotonic() + 150
        while not context.join(timeout=5):  # False as long as one of them runs
            if time.monotonic() > deadline:
                pytest.fail("the ranks did not end within 150 s")
    finally:
        for process in context.processes:
            process.kill()
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("loop", LOOPS)
def test_statistics_are_those_of_both_ranks_and_the_same_bits(
    loop: str, ranks: tuple[Path, list[dict[str, Result]]]
) -> None:
    if not installed(loop):
        pytest.skip(f"{LOOPS[loop][1]} is not installed")
    one, other = (rank[loop] for rank in ranks[1])
    for name in ("count", "mean", "variance", "mass", "skipped"):  # logging on one rank starts its level-free mean anew
        values = (getattr(each["criterion"].statistics, name) for each in (one, other))
        torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(one["criterion"].weights, other["criterion"].weights)
    both = Seen()
    both.losses, both.levels = one["losses"] + other["losses"], one["levels"] + other["levels"]
    assert len(both.losses) == 2 * 2 * STEPS
    both.check(one["criterion"], rtol=1e-5)


def test_only_rank_zero_logs(ranks: tuple[Path, list[dict[str, Result]]]) -> None:
    if not installed("lightning"):
        pytest.skip("lightning is not installed")
    assert [path.name for path in ranks[0].glob("logged-by-*")] == ["logged-by-0"]
    lines = (ranks[0] / "logged-by-0").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["2", "4"]
    assert "vadiff/criterion/skipped" in lines[0]

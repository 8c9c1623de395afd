"""A loop with HF Accelerate: accumulation, trackers, save_state. The criterion is saved and logged with the run.

python examples/accelerate_loop.py                    # needs the extra train and accelerate; seconds on a CPU
ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/accelerate_loop.py
"""

import argparse
import statistics
import tempfile
import time

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn

import vadiff
from vadiff.integrations.accelerate import log_statistics, prepare

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=1000)
args = parser.parse_args()

images = torch.from_numpy(load_digits().images.reshape(-1, 64) / 8 - 1).float()  # [1797, 64] in [-1, 1]
train_images, test_images = images[297:], images[:297]


def noised(clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Input of a flow-matching network, its target, and the time in [0, 1]; data at 0."""
    noise, t = torch.randn_like(clean), torch.rand(len(clean), device=clean.device)
    return torch.cat([(1 - t[:, None]) * clean + t[:, None] * noise, t[:, None]], 1), noise - clean, t


@torch.no_grad()
def test_loss(accelerator: Accelerator, model: nn.Module) -> float:
    torch.manual_seed(2)
    noisy, target, _ = noised(test_images.to(accelerator.device))
    return F.mse_loss(accelerator.unwrap_model(model)(noisy), target).item()


def train(name: str, criterion: vadiff.DiffusionLoss | None, folder: str) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2, log_with="tensorboard", project_dir=folder)
    accelerator.init_trackers("run")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(65, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64))
    loader = torch.utils.data.DataLoader(train_images, batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader)
    if criterion is not None:
        criterion = prepare(accelerator, criterion)  # once
    before, step = test_loss(accelerator, model), 0
    torch.manual_seed(1 + accelerator.process_index)
    times = [0.0]
    while step < args.steps:
        for clean in loader:
            with accelerator.accumulate(model):
                noisy, target, t = noised(clean)
                start = time.perf_counter()
                if criterion is None:
                    loss = F.mse_loss(model(noisy), target)
                else:  # the line that changes
                    loss = criterion(model(noisy), target, vadiff.log_snr.from_flow_time(t, data_at=0))
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                times[-1] += time.perf_counter() - start
            if accelerator.sync_gradients:
                step += 1
                times.append(0.0)
            if criterion is not None:
                log_statistics(accelerator, criterion, step, every=100)
            if step == args.steps:
                break
    milliseconds = 1e3 * statistics.median(times[:-1])  # the first steps warm up
    accelerator.print(f"{name:24} {before:12.4f} {test_loss(accelerator, model):12.4f} {milliseconds:12.2f}")
    if criterion is not None:
        accelerator.save_state(f"{folder}/state")
        seen = criterion.statistics.count.clone()
        criterion.statistics.reset()
        accelerator.load_state(f"{folder}/state")
        assert torch.equal(criterion.statistics.count, seen)
        accelerator.print(criterion.summary())
    accelerator.end_training()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        if Accelerator().is_main_process:
            print(f"{'accelerate, flow':24} {'loss before':>12} {'loss after':>12} {'ms per step':>12}")
        train("F.mse_loss", None, f"{folder}/own")
        train("vadiff, variance_aware", vadiff.DiffusionLoss.for_process("flow"), f"{folder}/vadiff")
        if Accelerator().is_main_process:
            print("Loss: of held-out images, unweighted. One seed, few steps: a small difference shows nothing.")

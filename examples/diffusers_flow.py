"""A small version of diffusers' SD3 and Flux scripts: flow-matching scheduler, logit-normal t, a weighting scheme.

python examples/diffusers_flow.py                     # needs the extra train; half a minute on two CPU cores
"""

import argparse
import statistics
import time

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from sklearn.datasets import load_digits

import vadiff
from vadiff.integrations.diffusers import log_snr_of, per_sample

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--weighting-scheme", default="none", choices=["none", "sigma_sqrt", "cosmap"])
args = parser.parse_args()

images = torch.from_numpy(load_digits().images[:, None] / 8 - 1).float()  # [1797, 1, 8, 8] in [-1, 1]
train_images, test_images = images[297:], images[:297]
noise_scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)


def make_model() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=8,
    )  # fmt: skip


def add_noise(clean: torch.Tensor) -> tuple[torch.Tensor, ...]:
    noise = torch.randn_like(clean)
    u = compute_density_for_timestep_sampling("logit_normal", len(clean), logit_mean=0.0, logit_std=1.0)
    indices = (u * noise_scheduler.config.num_train_timesteps).long()
    timesteps, sigmas = noise_scheduler.timesteps[indices], noise_scheduler.sigmas[indices].view(-1, 1, 1, 1)
    return (1.0 - sigmas) * clean + sigmas * noise, noise - clean, timesteps, sigmas


def own_loss(model_pred: torch.Tensor, target: torch.Tensor, weighting: torch.Tensor) -> torch.Tensor:
    return (weighting * (model_pred.float() - target.float()) ** 2).flatten(1).mean(1).mean()


@torch.no_grad()
def test_loss(model: UNet2DModel) -> float:
    torch.manual_seed(2)
    noisy, target, timesteps, sigmas = add_noise(test_images)
    weighting = compute_loss_weighting_for_sd3(args.weighting_scheme, sigmas)
    return own_loss(model(noisy, timesteps).sample, target, weighting).item()


def train(name: str, criterion: vadiff.DiffusionLoss | None) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before = test_loss(model)
    torch.manual_seed(1)
    times = []
    for _ in range(args.steps):
        noisy, target, timesteps, sigmas = add_noise(train_images[torch.randint(0, len(train_images), (32,))])
        start = time.perf_counter()
        model_pred = model(noisy, timesteps).sample
        weighting = compute_loss_weighting_for_sd3(args.weighting_scheme, sigmas)  # [B, 1, 1, 1]
        if criterion is None:
            loss = own_loss(model_pred, target, weighting)
        else:  # the line that changes
            log_snr, weight = log_snr_of(noise_scheduler, timesteps), per_sample(weighting, len(target))
            loss = criterion(model_pred.float(), target.float(), log_snr, base_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    milliseconds = 1e3 * statistics.median(times)  # the first steps warm up
    print(f"{name:24} {before:12.4f} {test_loss(model):12.4f} {milliseconds:12.2f}")


print(f"{'diffusers, flow':24} {'loss before':>12} {'loss after':>12} {'ms per step':>12}")
train("the script's own", None)
criterion = vadiff.DiffusionLoss.for_process(noise_scheduler)
train("vadiff, variance_aware", criterion)
print(criterion.summary())
print("Loss: of held-out images, unweighted. One seed, few steps: a small difference shows nothing.")

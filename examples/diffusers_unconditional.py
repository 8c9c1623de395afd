"""A small version of diffusers' train_unconditional.py: UNet2DModel, DDPMScheduler, digits. One line changes.

python examples/diffusers_unconditional.py            # needs vadiff[train]; half a minute on two CPU cores
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits

import vadiff
from vadiff.integrations.diffusers import log_snr_of

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--prediction-type", default="epsilon", choices=["epsilon", "v_prediction"])
args = parser.parse_args()

images = torch.from_numpy(load_digits().images[:, None] / 8 - 1).float()  # [1797, 1, 8, 8] in [-1, 1]
train_images, test_images = images[297:], images[:297]
noise_scheduler = DDPMScheduler(prediction_type=args.prediction_type)


def make_model() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=8,
    )  # fmt: skip


def add_noise(clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    noise = torch.randn_like(clean)
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(clean),))
    noisy = noise_scheduler.add_noise(clean, noise, timesteps)
    target = noise if args.prediction_type == "epsilon" else noise_scheduler.get_velocity(clean, noise, timesteps)
    return noisy, target, timesteps


@torch.no_grad()
def test_loss(model: UNet2DModel) -> float:
    torch.manual_seed(2)
    noisy, target, timesteps = add_noise(test_images)
    return F.mse_loss(model(noisy, timesteps).sample, target).item()


def train(name: str, criterion: vadiff.DiffusionLoss | None) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before = test_loss(model)
    torch.manual_seed(1)
    times = []
    for _ in range(args.steps):
        noisy, target, timesteps = add_noise(train_images[torch.randint(0, len(train_images), (32,))])
        start = time.perf_counter()
        model_output = model(noisy, timesteps).sample
        if criterion is None:
            loss = F.mse_loss(model_output.float(), target.float())
        else:  # the line that changes
            loss = criterion(model_output.float(), target.float(), log_snr_of(noise_scheduler, timesteps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    milliseconds = 1e3 * statistics.median(times)  # the first steps warm up
    print(f"{name:24} {before:12.4f} {test_loss(model):12.4f} {milliseconds:12.2f}")


print(f"{'diffusers, ' + args.prediction_type:24} {'loss before':>12} {'loss after':>12} {'ms per step':>12}")
train("F.mse_loss", None)
criterion = vadiff.DiffusionLoss.for_process(noise_scheduler)
train("vadiff, variance_aware", criterion)
print(criterion.summary())

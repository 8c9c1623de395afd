"""A small version of diffusers' train_unconditional.py: UNet2DModel, DDPMScheduler, digits. One line changes.

Both networks are validated at the same noise levels with the same noise; the last table compares them.

python examples/diffusers_unconditional.py            # needs the extra train; half a minute on two CPU cores
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits

import vadiff
from vadiff.integrations.diffusers import log_snr_of, timesteps_of
from vadiff.validation import LevelLosses, LevelValidation

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--prediction-type", default="epsilon", choices=["epsilon", "v_prediction"])
args = parser.parse_args()

images = torch.from_numpy(load_digits().images[:, None] / 8 - 1).float()  # [1797, 1, 8, 8] in [-1, 1]
train_images, test_images = images[297:], images[:297]
noise_scheduler = DDPMScheduler(prediction_type=args.prediction_type)
validation = LevelValidation.for_process(noise_scheduler, levels=8, every_level=True)


def make_model() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=8,
    )  # fmt: skip


def target_of(clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    return noise if args.prediction_type == "epsilon" else noise_scheduler.get_velocity(clean, noise, timesteps)


@torch.no_grad()
def validate(model: UNet2DModel) -> LevelLosses:
    for indices, clean in torch.utils.data.DataLoader(validation.indexed(test_images), batch_size=512):
        log_snr, noise = validation.draw(indices, clean.shape)
        timesteps = timesteps_of(noise_scheduler, log_snr)
        output = model(noise_scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        error = output - target_of(clean, noise, timesteps)
        validation.add(indices, log_snr, error.square().flatten(1).mean(1))
    return validation.result()


def train(name: str, criterion: vadiff.DiffusionLoss | None) -> LevelLosses:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before = validate(model)
    torch.manual_seed(1)
    times = []
    for _ in range(args.steps):
        clean = train_images[torch.randint(0, len(train_images), (32,))]
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(clean),))
        noisy, target = noise_scheduler.add_noise(clean, noise, timesteps), target_of(clean, noise, timesteps)
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
    after = validate(model)
    print(f"{name:24} {before.loss.mean():12.4f} {after.loss.mean():12.4f} {milliseconds:12.2f}")
    return after


print(f"{'diffusers, ' + args.prediction_type:24} {'loss before':>12} {'loss after':>12} {'ms per step':>12}")
own = train("F.mse_loss", None)
criterion = vadiff.DiffusionLoss.for_process(noise_scheduler)
weighted = train("vadiff, variance_aware", criterion)
print(criterion.summary())
print(weighted.compared_with(own))
print("Ratio below 1: better with weights. One seed, few steps: a small difference shows nothing.")

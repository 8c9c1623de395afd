"""LoRA with PEFT on a small U-Net of diffusers, and power-function averages of the adapters alone.

A network is trained on the digits 0 to 4, frozen, and adapted to 5 to 9: with F.mse_loss, and with adaptive weights.
The averages hold the adapters only; any width of them is made after training, and loaded into the adapted network.

python examples/lora_ema.py            # needs the extra train and peft; half a minute on two CPU cores
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.datasets import load_digits

import vadiff
from vadiff.ema import PowerFunctionEMA, reconstruct
from vadiff.integrations.diffusers import log_snr_of

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

digits = load_digits()
images = torch.from_numpy(digits.images[:, None] / 8 - 1).float()  # [1797, 1, 8, 8] in [-1, 1]
low, high = (images[torch.from_numpy(digits.target) // 5 == half] for half in (0, 1))
noise_scheduler = DDPMScheduler()
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["conv1", "conv2", "to_q", "to_k", "to_v", "to_out.0"])
SNAPSHOTS = 8  # over a run


def base_model() -> UNet2DModel:
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(args.steps):
        loss_of(model, low[torch.randint(0, len(low), (32,))], None).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def loss_of(model: torch.nn.Module, clean: torch.Tensor, criterion: vadiff.DiffusionLoss | None) -> torch.Tensor:
    noise = torch.randn_like(clean)
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(clean),))
    output = model(noise_scheduler.add_noise(clean, noise, timesteps), timesteps).sample
    if criterion is None:
        return F.mse_loss(output, noise)
    return criterion(output, noise, log_snr_of(noise_scheduler, timesteps))


@torch.no_grad()
def held_out_loss(model: torch.nn.Module) -> float:
    """The mean squared error on digits 5 to 9 that were not trained on, with the same noise every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return float(loss_of(model, high[700:].repeat(8, 1, 1, 1), None))


def adapt(name: str, criterion: vadiff.DiffusionLoss | None, snapshots: Path) -> PeftModel:
    model = get_peft_model(base_model(), LORA)  # everything but the adapters is frozen
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    averages = PowerFunctionEMA(model, trainable_only=True)
    before, times = held_out_loss(model), []
    torch.manual_seed(1)
    for step in range(1, args.steps + 1):
        start = time.perf_counter()
        loss_of(model, high[torch.randint(0, 700, (32,))], criterion).backward()
        optimizer.step()
        optimizer.zero_grad()
        averages.update(step)
        times.append(time.perf_counter() - start)
        if step % max(1, args.steps // SNAPSHOTS) == 0 or step == args.steps:
            averages.save(snapshots, "fp32")
    milliseconds = 1e3 * statistics.median(times)  # the first steps warm up
    print(f"{name:24} {before:12.4f} {held_out_loss(model):12.4f} {milliseconds:12.2f}")
    return model


with tempfile.TemporaryDirectory() as folder:
    print(f"{'LoRA, epsilon':24} {'loss before':>12} {'loss after':>12} {'ms per step':>12}")
    adapt("F.mse_loss", None, Path(folder, "own"))
    criterion = vadiff.DiffusionLoss.for_process(noise_scheduler)
    model = adapt("vadiff, variance_aware", criterion, Path(folder, "vadiff"))
    print(criterion.summary())

    adapters, everything = model.get_nb_trainable_parameters()
    print(f"\n{adapters:,} of {everything:,} parameters are adapters and in the averages")
    print(f"{'average':24} {'held-out loss':>14}\n{'none':24} {held_out_loss(model):14.4f}")
    for width, state in reconstruct(Path(folder, "vadiff"), [0.05, 0.10, 0.15]).items():
        model.load_state_dict(state, strict=False)  # the frozen weights stay as they are
        print(f"{'sigma_rel ' + format(width, '.2f'):24} {held_out_loss(model):14.4f}")
    print("Loss: of held-out images, unweighted. One seed, few steps: a small difference shows nothing.")
    model.save_pretrained(folder)  # an adapter as PEFT knows it, of the last width

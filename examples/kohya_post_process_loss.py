"""A small version of kohya's sd-scripts: a LoRA for the threes of handwritten digits, v-prediction, --min_snr_gamma.

    python examples/kohya_post_process_loss.py            # needs the extra train and accelerate; seconds on a CPU

With the real scripts, import NetworkTrainer from train_network, and add only the class `Trainer` with its criterion.
"""

import argparse
import statistics
import time

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from sklearn.datasets import load_digits
from torch import Tensor, nn

import vadiff
from vadiff.integrations import kohya

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--min_snr_gamma", type=float, default=5.0)
args = parser.parse_args()

digits = load_digits()
images = torch.from_numpy(digits.images.reshape(-1, 64) / 8 - 1).float()  # [1797, 64] in [-1, 1]
train_images, is_three = images[297:], torch.from_numpy(digits.target) == 3
threes, test_threes = train_images[is_three[297:]], images[:297][is_three[:297]]


class Denoiser(nn.Module):
    """The network to fine-tune: an MLP over pixels and timestep, with a LoRA beside its largest layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(65, 256), nn.Linear(256, 256), nn.Linear(256, 64)
        self.down, self.up = nn.Linear(256, 4, bias=False), nn.Linear(4, 256, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        x = nn.functional.silu(self.first(torch.cat([noisy, timesteps[:, None] / 1000], 1)))
        return self.last(nn.functional.silu(self.middle(x) + self.up(self.down(x))))


class NetworkTrainer:
    """The loss-related methods of the scripts' trainer, called in the same order."""

    def post_process_network(self, args, accelerator, network, text_encoders, unet):
        pass

    def post_process_loss(self, loss: Tensor, args: argparse.Namespace, timesteps: Tensor, noise_scheduler) -> Tensor:
        snr = noise_scheduler.all_snr[timesteps]
        return loss * snr.clamp(max=args.min_snr_gamma) / (snr + 1)

    def process_batch(self, network: Denoiser, clean: Tensor, noise_scheduler: DDPMScheduler) -> Tensor:
        noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
        target = noise_scheduler.get_velocity(clean, noise, timesteps)
        pred = network(noise_scheduler.add_noise(clean, noise, timesteps), timesteps)
        loss = nn.functional.mse_loss(pred.float(), target.float(), reduction="none").mean(1)
        return self.post_process_loss(loss, args, timesteps, noise_scheduler).mean()

    def fit(self, network: Denoiser, data: Tensor, steps: int, lr: float) -> float:
        """Train; returns milliseconds per step."""
        self.post_process_network(args, Accelerator(cpu=True), network, [], None)
        noise_scheduler = make_scheduler()
        optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), lr=lr)
        torch.manual_seed(1)
        times = []
        for _ in range(steps):
            clean = data[torch.randint(0, len(data), (32,))]
            start = time.perf_counter()
            loss = self.process_batch(network, clean, noise_scheduler)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times)  # the first steps warm up


class Trainer(kohya.AdaptiveLoss, NetworkTrainer):  # the lines that are added
    criterion = vadiff.DiffusionLoss.for_process("stable_diffusion", prediction_type="v_prediction", fine_tuning=True)


def make_scheduler() -> DDPMScheduler:
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    scheduler.all_snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    return scheduler


@torch.no_grad()
def test_loss(network: Denoiser) -> float:
    """The trainer's own loss, on threes that neither training saw."""
    torch.manual_seed(2)
    return NetworkTrainer().process_batch(network, test_threes.repeat(50, 1), make_scheduler()).item()


torch.manual_seed(0)
base = Denoiser()
NetworkTrainer().fit(base, train_images, steps=args.steps, lr=1e-3)
base.requires_grad_(False)
base.down.requires_grad_(True)
base.up.requires_grad_(True)

print(f"{'kohya, LoRA':24} {'loss before':>12} {'loss after':>12} {'ms per step':>12}")
for name, trainer in (("NetworkTrainer", NetworkTrainer()), ("with AdaptiveLoss", Trainer())):
    network = Denoiser().requires_grad_(False)
    network.load_state_dict(base.state_dict())
    network.down.requires_grad_(True)
    network.up.requires_grad_(True)
    before = test_loss(network)
    milliseconds = trainer.fit(network, threes, steps=args.steps, lr=3e-3)
    print(f"{name:24} {before:12.4f} {test_loss(network):12.4f} {milliseconds:12.2f}")
print(trainer.criterion.summary())
print("Loss: the trainer's own, of held-out threes. One seed, few steps: a small difference shows nothing.")

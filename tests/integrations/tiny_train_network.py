"""A script of the form of sd-scripts', whose model and LoRA are a few numbers; see test_kohya_scripts.py."""

from __future__ import annotations

import argparse
import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

scripts: Any = importlib.import_module("train_network")  # of the checkout, on PYTHONPATH
strategies: Any = importlib.import_module("library.strategy_base")


class UNet(nn.Module):
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Any:
        return SimpleNamespace(sample=self.scale * noisy)


class VAE(UNet):
    def encode(self, images: Tensor) -> Any:
        latents = nn.functional.avg_pool2d(images, 8)
        four = torch.cat([latents, latents[:, :1]], 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: four))


class TextEncoder(UNet):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Linear(2, 2)
        self.text_model = SimpleNamespace(embeddings=nn.Linear(1, 1))


class Network(nn.Module):
    """In place of a LoRA: a matrix beside the U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(4, 4))

    def apply_to(self, text_encoder: Any, unet: Any, *trained: bool) -> None:
        own = unet.forward

        def forward(noisy: Tensor, *given: Any) -> Any:
            return SimpleNamespace(sample=own(noisy, *given).sample + torch.einsum("oc,bchw->bohw", self.matrix, noisy))

        unet.forward = forward

    def prepare_optimizer_params(self, *rates: Any) -> list[dict[str, Any]]:
        return [{"params": [self.matrix]}]

    def prepare_grad_etc(self, *models: Any) -> None:
        pass

    def on_epoch_start(self, *models: Any) -> None:
        self.train()

    def on_step_start(self, *models: Any) -> None:
        pass

    def get_trainable_params(self) -> list[nn.Parameter]:
        return [self.matrix]

    def save_weights(self, file: str, dtype: Any, metadata: Any) -> None:
        torch.save(self.matrix.detach(), f"{file}.pt")


def create_network(*given: Any, **options: Any) -> Network:
    return Network()


class Tokens(strategies.TokenizeStrategy):
    tokenizer = SimpleNamespace(model_max_length=77)

    def tokenize(self, text: Any) -> list[Tensor]:
        return [torch.zeros(1, 77, dtype=torch.long)]


class Conditions(strategies.TextEncodingStrategy):
    def encode_tokens(self, strategy: Any, models: Any, tokens: list[Tensor]) -> list[Tensor]:
        return [torch.zeros(len(tokens[0]), 77, 8)]


class TinyTrainer(scripts.NetworkTrainer):
    def load_target_model(self, *given: Any) -> tuple[str, nn.Module, nn.Module, nn.Module]:
        return "sd_v1", TextEncoder(), VAE(), UNet()

    def get_tokenize_strategy(self, args: Any) -> Tokens:
        return Tokens()

    def get_text_encoding_strategy(self, args: Any) -> Conditions:
        return Conditions()

    def sample_images(self, *given: Any) -> None:
        pass


def setup_parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = scripts.setup_parser()
    return parser


if __name__ == "__main__":
    parser = setup_parser()
    args = scripts.train_util.read_config_from_file(parser.parse_args(), parser)
    trainer = TinyTrainer()
    trainer.train(args)

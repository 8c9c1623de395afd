"""Networks whose features torch-fidelity compares images by: its own Inception, and two that are registered with it."""

import functools
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...extras import import_extra
from ...pixels import normalised
from . import digits_classifier

DINOV2_WEIGHTS = "dinov2_vitl14_pretrain.pth"  # as Meta publishes them
DINOV2_FEATURES = 1024
# Names in torch-fidelity's register, and of their layers where there is one only.
EXTRACTORS = {"inception": "inception-v3-compat", "digits": "vadiff-digits", "dinov2": "vadiff-dinov2"}
LAYER_OF = {"digits": "hidden", "dinov2": "dinov2"}
_DINOV2 = ("facebookresearch/dinov2:main", "dinov2_vitl14")  # in torch's hub


def register(features: str) -> str:
    """The name of an extractor in torch-fidelity's register; it is registered there if it is not its own."""
    if features == "digits":
        _register_digits()
    if features == "dinov2":
        _register_dinov2()
    return EXTRACTORS[features]


def dinov2_network(weights: Path) -> torch.nn.Module:
    """DINOv2's ViT-L/14: images [B, 3, 224, 224], normalised, to features [B, 1024]; with the weights of a file.

    The network's code is that of torch's hub, from its folder on this machine or else from GitHub.

    Raises:
        ValueError: the file is missing, or holds other weights.
        UserError: the code is not on this machine, and could not be downloaded.
    """
    state = _read_dinov2(weights)
    os.environ.setdefault("XFORMERS_DISABLED", "1")  # as torch-fidelity does: xFormers computes on GPUs only
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="xFormers")
            network: torch.nn.Module = torch.hub.load(
                *_DINOV2, pretrained=False, trust_repo=True, skip_validation=True, verbose=False
            )
    except (OSError, ImportError, RuntimeError, AttributeError) as error:
        repository, branch = _DINOV2[0].split(":")
        folder = Path(torch.hub.get_dir()) / f"{repository.replace('/', '_')}_{branch}"
        raise UserError(
            f"the code of DINOv2 could not be loaded ({error}). Without internet, copy {repository} from GitHub to "
            f"{folder}"
        ) from error
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"dinov2_weights is {weights}, expected {DINOV2_WEIGHTS}: {error}") from error
    return network


def _read_dinov2(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a weights file, read without running code."""
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"dinov2_weights is {path}, but there is no such file") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"dinov2_weights is {path}, which does not load as plain tensors ({error}); expected {DINOV2_WEIGHTS}"
        ) from error
    if not isinstance(state, Mapping) or "patch_embed.proj.weight" not in state:
        raise ValueError(f"dinov2_weights is {path}, which holds no weights of DINOv2, expected {DINOV2_WEIGHTS}")
    return state


@functools.cache
def _register_digits() -> None:
    module = import_extra("torch_fidelity.feature_extractor_base", "eval")

    class Extractor(module.FeatureExtractorBase):  # type: ignore[name-defined]
        """torch-fidelity's protocol: [B, 3, 8, 8] uint8 → a tuple of features."""

        def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
            super().__init__(name, features_list)
            self.network = digits_classifier.read(Path(options["feature_extractor_weights_path"]))

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (LAYER_OF["digits"],)

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (self.network.features(normalised(images[:, :1])).double(),)

    import_extra("torch_fidelity", "eval").register_feature_extractor(EXTRACTORS["digits"], Extractor)


@functools.cache
def _register_dinov2() -> None:
    module = import_extra("torch_fidelity.feature_extractor_dinov2", "eval")

    class Extractor(module.FeatureExtractorDinoV2):  # type: ignore[name-defined]
        """torch-fidelity's extractor with weights from a file, which its own constructor does not take."""

        def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
            super(module.FeatureExtractorDinoV2, self).__init__(name, features_list)
            self.feature_extractor_internal_dtype = torch.float32
            self.model = dinov2_network(Path(options["feature_extractor_weights_path"])).float()
            self.requires_grad_(False)
            self.eval()

    import_extra("torch_fidelity", "eval").register_feature_extractor(EXTRACTORS["dinov2"], Extractor)

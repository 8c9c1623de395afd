"""A small classifier of scikit-learn's digits, whose features compare generated digits with real ones.

It takes the place of the Inception network for 8 × 8 grey images, which that network was never trained for. It is
trained once, on one CPU thread with a fixed seed, and kept in the user's cache.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ...files import locked, replacing
from ...pixels import normalised

VERSION = 1  # of network and training: a change of either makes other features
FEATURES = 32
SHAPE = (1, 8, 8)  # of an image
LEAST_ACCURACY = 0.97  # on images that it was not trained on

_EPOCHS, _BATCH, _RATE, _WEIGHT_DECAY, _SMOOTHING, _NOISE = 24, 50, 3e-3, 0.05, 0.1, 0.1
_log = logging.getLogger(__name__)


class DigitsClassifier(nn.Module):
    """Three convolutions and two linear layers, 33,000 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.hidden = nn.Linear(64 * 2 * 2, FEATURES)
        self.classes = nn.Linear(FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """Features of images [B, 1, 8, 8] in [-1, 1]: the last hidden layer, [B, 32]."""
        hidden: Tensor = self.hidden(self.convolutions(images).flatten(1)).relu()
        return hidden

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten digits, [B, 10]."""
        logits: Tensor = self.classes(self.features(images))
        return logits


class Trained(NamedTuple):
    """A classifier in the cache."""

    path: Path  # of the file, which `read` reads
    key: str  # first digits of the SHA-256 of its weights
    accuracy: float  # on the held-out digits


def trained_classifier(folder: Path, *, epochs: int = _EPOCHS) -> Trained:
    """The classifier in a folder; trained, in a few seconds, if the folder has none or the file is damaged.

    Of several processes that need it one trains it, and the others wait: all get the same.

    Args:
        folder: the cache, see `fidelity.cache_folder`.
        epochs: passes over the 1,500 training images.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        UserError: the trained classifier is not accurate enough to measure with.
    """
    path = folder / f"digits-classifier-{VERSION}-{_settings_key(epochs)}.pt"
    found = _check(path)
    if found is None:
        with locked(path.with_suffix(".lock")):
            found = _check(path) or _train(path, epochs)  # another process may have trained it by now
    return found


def train_classifier(epochs: int = _EPOCHS) -> tuple[DigitsClassifier, float]:
    """Train on the 1,500 training digits; the 297 held out give the accuracy. The same weights at every call.

    Images are shifted by up to one pixel and noised, and labels smoothed: without these the features of images that it
    was trained on differ from those of other real images.

    Returns:
        The network in eval mode, and its accuracy.
    """
    from ..data.digits import digits  # not at import: a network is read without scikit-learn

    data = digits()
    assert data.train_labels is not None
    assert data.held_out_labels is not None
    images, labels = normalised(data.train[:]), data.train_labels
    with _reproducible():
        network = DigitsClassifier()
        steps = epochs * (len(images) // _BATCH)
        optimiser = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
        for _ in range(epochs):
            for part in torch.randperm(len(images)).split(_BATCH):
                loss = F.cross_entropy(network(_altered(images[part])), labels[part], label_smoothing=_SMOOTHING)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
        network.eval()
        with torch.no_grad():
            correct = network(normalised(data.held_out[:])).argmax(1) == data.held_out_labels
    return network, float(correct.double().mean())


def read(path: Path) -> DigitsClassifier:
    """The network of a file that `trained_classifier` wrote, in eval mode."""
    network = DigitsClassifier()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["network"])
    return network.eval()


def _altered(images: Tensor) -> Tensor:
    """Shift each image by -1, 0 or 1 pixels in both directions, and add noise. [B, 1, 8, 8]"""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    shifts = torch.randint(0, 3, (len(images), 2))
    rows = shifts[:, :1] + torch.arange(images.shape[2])  # [B, 8]
    columns = shifts[:, 1:] + torch.arange(images.shape[3])
    shifted = padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
    return shifted[:, None] + _NOISE * torch.randn_like(images)


def _train(path: Path, epochs: int) -> Trained:
    """Train a classifier and write it to a file."""
    _log.info("training the digits classifier, once: %s", path)
    network, accuracy = train_classifier(epochs)
    if accuracy < LEAST_ACCURACY:
        raise UserError(
            f"the digits classifier has an accuracy of {accuracy:.3f} on held-out digits, expected at least "
            f"{LEAST_ACCURACY}: this installation trains it worse than others. Try the versions of torch and "
            "scikit-learn in constraints.txt, or compare images with --features inception"
        )
    state = network.state_dict()
    with replacing(path, durable=True) as partial, partial.open("wb") as file:
        torch.save({"network": state, "accuracy": accuracy, "sha256": _digest(state)}, file)
    return Trained(path, _digest(state)[:16], accuracy)


@contextmanager
def _reproducible() -> Iterator[None]:
    """A fixed seed and one thread (sums are ordered differently on several); the caller's are restored."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


def _check(path: Path) -> Trained | None:
    """The classifier in a file, or None if there is none, or not an intact one."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
        digest, accuracy = _digest(content["network"]), float(content["accuracy"])
        intact = content["sha256"] == digest
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged file does to the reader
        _log.warning("%s is damaged (%s): the classifier is trained again", path, error)
        return None
    if not intact:
        _log.warning("%s is damaged (wrong checksum): the classifier is trained again", path)
        return None
    return Trained(path, digest[:16], accuracy)


def _digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _settings_key(epochs: int) -> str:
    """Digits of a hash over the settings of the training."""
    settings = (VERSION, FEATURES, epochs, _BATCH, _RATE, _WEIGHT_DECAY, _SMOOTHING, _NOISE)
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:8]

"""vadiff.trainer.evaluation.digits_classifier: sample quality of digits, by the features of a small classifier."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vadiff.errors import UserError
from vadiff.trainer.data.digits import digits
from vadiff.trainer.evaluation import digits_classifier, image_metrics
from vadiff.trainer.evaluation.digits_classifier import DigitsClassifier, Trained, trained_classifier


@pytest.fixture(scope="module")
def real() -> Tensor:
    """All digits in random order, [1797, 1, 8, 8] uint8."""
    images = digits()
    everything = torch.cat([images.train, images.held_out])
    return everything[torch.randperm(len(everything), generator=torch.Generator().manual_seed(3))]


def distance(images: Tensor, reference: Tensor, digits_cache: Path) -> float:
    found = image_metrics(images, reference, metrics=["fid"], features="digits", cache=digits_cache, progress=False)
    assert list(found) == ["fd-digits"]
    return found["fd-digits"]


def noised(images: Tensor, strength: float) -> Tensor:
    noise = strength * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + noise).clamp(0.0, 255.0).round().to(torch.uint8)


def blurred(images: Tensor, share: float) -> Tensor:
    """Each pixel mixed with the mean of the 3 x 3 around it."""
    means = F.avg_pool2d(F.pad(images.float(), (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return ((1.0 - share) * images + share * means).round().to(torch.uint8)


def test_classifier_knows_the_digits_that_it_was_not_trained_on(digits_cache: Path) -> None:
    assert trained_classifier(digits_cache).accuracy > 0.97


def test_two_halves_of_the_data_are_near_and_noise_is_far(real: Tensor, digits_cache: Path) -> None:
    halves = distance(real[:898], real[898:], digits_cache)
    noise = torch.randint(0, 256, (898, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert 0.0 < halves < 1.0
    assert distance(noise, real[898:], digits_cache) > 50.0 * halves


@pytest.mark.parametrize("degraded", [(noised, (20.0, 40.0, 80.0)), (blurred, (0.3, 0.6, 1.0))], ids=["noise", "blur"])
def test_order_of_degradations_is_kept(degraded: tuple, real: Tensor, digits_cache: Path) -> None:
    degrade, amounts = degraded
    distances = [distance(degrade(real[:898], amount), real[898:], digits_cache) for amount in (0.0, *amounts)]
    assert distances == sorted(distances)
    assert distances[-1] > 10.0 * distances[0]


def test_half_of_the_digits_missing_lowers_recall_and_not_precision(digits_cache: Path) -> None:
    images = digits()
    few = images.train[images.train_labels < 5]
    found = image_metrics(few[:500], images.train, features="digits", cache=digits_cache, progress=False)
    assert set(found) == {"fd-digits", "kid-digits", "kid_std-digits", "precision-digits", "recall-digits"}
    assert found["precision-digits"] > 0.95
    assert found["recall-digits"] < 0.7


def test_classifier_is_trained_once_and_again_if_its_file_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits_classifier, "LEAST_ACCURACY", 0.0)
    first = trained_classifier(tmp_path, epochs=1)
    untouched = first.path.read_bytes()
    changed = bytearray(untouched)
    changed[len(changed) // 2] ^= 1
    for damaged in (b"", untouched[:1000], bytes(changed)):
        first.path.write_bytes(damaged)
        assert trained_classifier(tmp_path, epochs=1) == first  # the same weights: training is deterministic
    monkeypatch.setattr(digits_classifier, "train_classifier", lambda epochs: pytest.fail("trained twice"))
    assert trained_classifier(tmp_path, epochs=1) == first
    assert {file.name for file in tmp_path.iterdir()} == {first.path.name, first.path.with_suffix(".lock").name}


def test_of_two_that_need_the_classifier_one_trains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []
    both = threading.Barrier(2)
    check = digits_classifier._check

    def check_together(path: Path) -> Trained | None:
        found = check(path)
        if not trained and threading.current_thread() not in waited:
            waited.add(threading.current_thread())
            both.wait(30)  # neither has found one
        return found

    def other_weights_each_time(epochs: int) -> tuple[DigitsClassifier, float]:
        trained.append(epochs)
        return DigitsClassifier().eval(), 0.99

    waited: set[threading.Thread] = set()
    monkeypatch.setattr(digits_classifier, "_check", check_together)
    monkeypatch.setattr(digits_classifier, "train_classifier", other_weights_each_time)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: trained_classifier(tmp_path, epochs=1), range(2)))
    assert len(trained) == 1
    assert found[0] == found[1] == check(found[0].path)


def test_classifier_that_learned_too_little_is_refused(tmp_path: Path) -> None:
    message = r"accuracy of 0\.\d+ on held-out digits, expected at least 0\.97.* --features inception"
    with pytest.raises(UserError, match=message):
        trained_classifier(tmp_path, epochs=0)
    assert not list(tmp_path.glob("*.pt*"))


def test_training_leaves_the_callers_random_numbers_and_threads_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    digits_classifier.train_classifier(epochs=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads

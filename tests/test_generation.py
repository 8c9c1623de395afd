"""vadiff.sampling.generation and vadiff.trainer.pictures: images of a run, and their files."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vadiff.ema.archive import write_archive
from vadiff.errors import RunError
from vadiff.information import Profile
from vadiff.models import Denoiser, parameterisation
from vadiff.models.parameterisation import EDMForm, sigma_range
from vadiff.pixels import pixels
from vadiff.process import DiscreteVP
from vadiff.sampling import Churn, noise_levels
from vadiff.sampling.generation import Generation, Guide, default_generation, generate, random_class, solve
from vadiff.trainer.pictures import PictureWriter, read_pictures
from vadiff.trainer.training.averages import average_file
from vadiff.trainer.training.checkpoint import load_checkpoint, save_checkpoint
from vadiff.training import Run, open_run

QUICK = Generation(steps=3)
CPU = torch.device("cpu")


@pytest.fixture
def run(trained_run: Path) -> Run:
    return open_run(trained_run)


def images_of(run: Run, seeds: Sequence[int], generation: Generation) -> Tensor:
    batches = {batch.start: batch.images for batch in generate(run, seeds, generation)}
    return torch.cat([batches[start] for start in sorted(batches)])


def difference(one: Tensor, other: Tensor) -> int:
    """Largest difference of a pixel, 0 to 255."""
    return int((one.int() - other.int()).abs().max())


@pytest.mark.parametrize(
    "how",
    [
        QUICK,
        Generation(steps=3, churn=Churn(2.0), label="random"),
        Generation("euler", steps=3, spacing="flow", guidance=2.0),
        Generation("ddpm", steps=5),
        Generation("dpmpp_2m", steps=5, clip=True),
    ],
)
def test_image_of_a_seed_depends_on_neither_batch_size_nor_devices(run: Run, how: Generation) -> None:
    seeds = range(20, 33)
    together = images_of(run, seeds, how)
    in_small_batches = images_of(run, seeds, dataclasses.replace(how, batch_size=3, devices=(CPU, CPU)))
    alone = images_of(run, [25], how)
    assert together.shape == (13, 1, 8, 8)
    assert difference(together, in_small_batches) <= 1  # convolutions round differently at another batch size
    assert difference(together[5:6], alone) <= 1
    assert difference(together[5], together[6]) > 10


def test_classes_take_turns_unless_one_is_asked_for(run: Run) -> None:
    [batch] = generate(run, range(8, 12), QUICK)
    assert batch.labels.tolist() == [8, 9, 0, 1]
    [batch] = generate(run, range(8, 12), dataclasses.replace(QUICK, label=3))
    assert batch.labels.tolist() == [3, 3, 3, 3]


def test_random_class_of_a_seed_is_uniform_and_leaves_its_noise_alone(run: Run) -> None:
    [batch] = generate(run, [5, 3, 200], dataclasses.replace(QUICK, label="random"))
    assert batch.labels.tolist() == [random_class(seed, 10) for seed in (5, 3, 200)] == [7, 8, 7]
    for seed, label, image in zip((5, 3, 200), batch.labels.tolist(), batch.images, strict=True):
        [alone] = generate(run, [seed], dataclasses.replace(QUICK, label=label))
        assert difference(alone.images[0], image) <= 1
    counts = torch.tensor([random_class(seed, 10) for seed in range(10_000)]).bincount(minlength=10)
    assert len(counts) == 10
    assert (counts - 1000).abs().max() < 4 * 30  # standard deviation 30


def test_steps_from_statistics_are_those_of_the_profile_and_made_for_euler(run: Run) -> None:
    profile = Profile(torch.tensor([-6.0, 0.0, 6.0]), torch.tensor([0.3, 0.2, 0.002]))
    how = default_generation("edm", spacing="statistics", profile=profile)
    assert (how.solver, how.steps, how.sigma_min, how.sigma_max, how.rho) == ("euler", 50, 0.002, 80.0, None)
    assert torch.equal(how.levels(EDMForm(0.5)), noise_levels(50, profile=profile))
    few = dataclasses.replace(how, steps=4)
    [batch] = generate(run, [3], few)
    expected = solve(run.denoiser(), [3], few, CPU)
    assert torch.equal(batch.images, pixels(expected))
    assert not torch.equal(expected, solve(run.denoiser(), [3], Generation("euler", 4), CPU))


def test_profiles_are_told_apart_in_what_is_recorded_and_other_spacings_record_none() -> None:
    levels = torch.tensor([-6.0, 0.0, 6.0])
    recorded = [
        default_generation("flow", spacing="statistics", profile=Profile(levels, error)).recorded()
        for error in (
            torch.tensor([0.3, 0.2, 0.002]),
            torch.tensor([0.3, 0.2, 0.0021]),
            torch.tensor([0.3, 0.2, 0.002]),
        )
    ]
    assert recorded[0] == recorded[2] != recorded[1]
    assert json.loads(json.dumps(recorded[0])) == recorded[0]
    assert "profile" not in default_generation("flow").recorded()  # and images drawn before need not be drawn again


def test_flows_are_sampled_by_euler_at_even_times_unless_told_otherwise() -> None:
    assert default_generation("edm") == Generation("heun", steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0)
    assert default_generation("flow") == Generation("euler", spacing="flow", steps=50, sigma_max=1000.0)
    assert default_generation("flow", "heun") == Generation("heun")
    assert default_generation("flow", "dpmpp_2m") == Generation("dpmpp_2m", spacing="flow", steps=16)
    assert default_generation("flow", "ddpm", "edm") == Generation("ddpm")
    assert default_generation("edm", "euler").levels(EDMForm(0.5)).tolist() == noise_levels(50).tolist()


@pytest.mark.parametrize("timesteps", [1000, None])
def test_sampling_starts_at_most_at_the_highest_noise_level_of_the_process(timesteps: int | None) -> None:
    """Stable Diffusion's betas end at sigma 14.6, the others above EDM's 80."""
    for process, start in (("vp_linear", 80.0), ("vp_cosine", 80.0), ("vp_scaled_linear", 14.62)):
        form = parameterisation(process, timesteps=timesteps)
        sigmas = sigma_range(form)
        for solver in ("heun", "dpmpp_2m"):
            levels = default_generation(process, solver, sigmas=sigmas).levels(form)
            assert levels[0].item() == pytest.approx(start, rel=0.02)
            lowest = 0.0292 if process == "vp_scaled_linear" and timesteps else 0.002
            assert levels[-2].item() == pytest.approx(lowest, rel=0.01)
    assert default_generation("vp_linear") == default_generation("vp_linear", sigmas=(0.01, 157.4))
    with pytest.raises(
        ValueError, match=r"sigma_max is 80, expected at most 14[.]\d+, the highest noise level of the model"
    ):
        Generation().levels(form)
    Generation(sigma_max=14.0).levels(form)
    Generation().levels(EDMForm(0.5))


def test_timesteps_as_spacing_are_those_of_the_process() -> None:
    form = parameterisation("vp_scaled_linear", timesteps=1000)
    process = DiscreteVP.scaled_linear()
    every = Generation("ddpm", spacing="timesteps", steps=1000).levels(form)
    assert process.time(-2.0 * every[:-1].log()).tolist() == pytest.approx(range(999, -1, -1), abs=1e-6)
    assert every[-1] == 0.0
    some = Generation("dpmpp_2m", spacing="timesteps", steps=4).levels(form)
    assert process.timestep(-2.0 * some[:-1].log()).tolist() == [999, 666, 333, 0]
    # With zero terminal SNR the last timestep has no finite sigma.
    rescaled = parameterisation("vp_linear", "sample", timesteps=50, zero_terminal_snr=True)
    levels = Generation("euler", spacing="timesteps", steps=49).levels(rescaled)
    assert levels.isfinite().all()
    assert len(levels) == 50
    for steps in (0, 50):
        with pytest.raises(ValueError, match=rf"steps is {steps}, expected 1 to 49"):
            Generation("euler", spacing="timesteps", steps=steps).levels(rescaled)
    for other in (EDMForm(0.5), parameterisation("vp_linear")):
        with pytest.raises(ValueError, match="spacing is timesteps, expected edm or flow: the model has no discrete"):
            Generation(spacing="timesteps").levels(other)


def test_guide_that_is_the_run_itself_changes_nothing_and_another_one_does(run: Run) -> None:
    plain = images_of(run, range(4), QUICK)
    itself = dataclasses.replace(QUICK, guidance=2.0, guide=Guide("itself", run))
    assert torch.equal(images_of(run, range(4), itself), plain)
    raw = dataclasses.replace(itself, guide=Guide("raw", run, "raw"), devices=(CPU, CPU), batch_size=3)
    assert difference(images_of(run, range(4), raw), plain) > 0
    beyond = dataclasses.replace(raw, guided_sigma=(90.0, 100.0))
    assert torch.equal(images_of(run, range(4), beyond), plain)
    assert beyond.recorded()["guided_sigma"] == [90.0, 100.0]
    assert beyond.recorded() | raw.recorded() == beyond.recorded()  # otherwise as without an interval


def test_guide_with_guidance_1_is_an_error(run: Run) -> None:
    with pytest.raises(ValueError, match="guide is small with guidance 1, which leaves it unused"):
        Generation(guide=Guide("small", run))


def test_guide_needs_no_label_dropout_but_the_same_images_and_classes(run: Run) -> None:
    class Other:
        config = run.config

        def denoiser(self, weights: str, step: int | None, device: torch.device | str) -> Denoiser:
            return Denoiser(torch.nn.Identity(), 0.5, labels=labels, image_shape=shape)

        def fingerprint(self, weights: str, step: int | None) -> tuple[int, str]:
            return 1, "other"

        def pictures(self, x0: torch.Tensor) -> torch.Tensor:
            raise AssertionError("a guide draws no pictures")

    guided = dataclasses.replace(QUICK, guidance=2.0, guide=Guide("itself", run))
    no_dropout = dataclasses.replace(run, config=dataclasses.replace(run.config, label_dropout=0.0))
    assert len(images_of(no_dropout, [0], guided)) == 1
    labels, shape = 10, (3, 8, 8)
    with pytest.raises(ValueError, match=r"guide small has images of shape \(3, 8, 8\), expected \(1, 8, 8\)"):
        list(generate(run, [0], dataclasses.replace(QUICK, guidance=2.0, guide=Guide("small", Other()))))
    labels, shape = 3, (1, 8, 8)
    with pytest.raises(ValueError, match="guide small has number of classes 3, expected 10"):
        list(generate(run, [0], dataclasses.replace(QUICK, guidance=2.0, guide=Guide("small", Other()))))


def test_options_are_recorded_as_json_has_them(run: Run) -> None:
    how = Generation("heun", churn=Churn(3.0), guidance=1.5, guide=Guide("runs/small:raw", run), clip=True)
    recorded = how.recorded()
    assert json.loads(json.dumps(recorded)) == recorded
    checksum = (run.path / "checkpoints" / "step-4" / "sha256").read_text().strip()
    assert recorded == {
        "solver": "heun", "steps": 18, "spacing": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0,
        "churn": "Churn(amount=3.0, sigma_min=0.0, sigma_max=inf, noise=1.0)", "clip": True, "label": "cycle",
        "guidance": 1.5, "weights": "ema",
        "guide": {"name": "runs/small:raw", "weights": "ema", "step": 4, "fingerprint": checksum},
    }  # fmt: skip


def test_guide_is_the_weights_that_there_were_when_it_was_made(run: Run, tmp_path: Path) -> None:
    guide_run = open_run(shutil.copytree(run.path, tmp_path / "guide"))
    first = Guide("guide", guide_run)
    state = load_checkpoint(guide_run.path)
    save_checkpoint(guide_run.path, 8, state, keep=2)
    assert first.step == 4
    assert first.recorded() != Guide("guide", guide_run).recorded()
    save_checkpoint(guide_run.path, 4, {**state, "ema": state["model"]}, keep=2)
    assert first.recorded() != Guide("guide", guide_run, step=4).recorded()  # trained anew, up to the same step
    average = average_file(guide_run.path, 4, 0.1)
    write_archive(average, state)
    guide = Guide("guide", guide_run, "ema-0.1")
    write_archive(average, {**state, "ema": state["model"]})
    assert guide.step == 4
    assert guide.recorded() != Guide("guide", guide_run, "ema-0.1").recorded()


def test_diverged_weights_are_named_with_the_seed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = run.denoiser()
    next(denoiser.parameters()).data.fill_(torch.nan)
    monkeypatch.setattr(Run, "denoiser", lambda *args, **kwargs: denoiser)
    with pytest.raises(RunError, match="image of seed 7 is not finite"):
        list(generate(run, [7], QUICK))


def test_guidance_needs_a_model_that_was_trained_without_labels_too(run: Run) -> None:
    config = dataclasses.replace(run.config, label_dropout=0.0)
    with pytest.raises(ValueError, match="run had label_dropout 0"):
        list(generate(dataclasses.replace(run, config=config), [0], dataclasses.replace(QUICK, guidance=2.0)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "ddim"}, "solver is 'ddim', expected one of heun, euler, ddpm, dpmpp_2m"),
        ({"spacing": "even"}, "spacing is 'even', expected one of edm, flow, timesteps, statistics"),
        ({"solver": "euler", "churn": Churn(1.0)}, "churn is for the solver heun, not for euler"),
        ({"spacing": "flow", "rho": 7.0}, "rho is for the spacing edm, not for flow"),
        ({"spacing": "flow", "sigma_min": 0.1}, "sigma_min is for the spacing edm or statistics, not for flow"),
        (
            {"spacing": "timesteps", "sigma_max": 9.0},
            "sigma_max is for the spacing edm or flow or statistics, not for timesteps",
        ),
        ({"spacing": "statistics"}, "spacing is statistics with no profile: spacing statistics needs one"),
        (
            {"profile": Profile(torch.tensor([0.0, 1.0]), torch.ones(2))},
            "spacing is edm with a profile: spacing statistics needs one, the others none",
        ),
        ({"label": "cat"}, "label is 'cat', expected a class or one of cycle, random"),
        ({"steps": 1}, "steps is 1, expected at least 2"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"guidance": float("nan")}, "guidance is nan, expected a number"),
        ({"guided_sigma": (0.2, 5.0)}, r"guided_sigma is \(0.2, 5.0\) with guidance 1, which leaves it unused"),
        ({"guidance": 2.0, "guided_sigma": (5.0, 0.2)}, r"guided_sigma is \(5.0, 0.2\), expected a lower and a higher"),
        ({"devices": ()}, "devices is empty"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generation(**settings)


def test_label_and_guidance_need_a_model_with_classes() -> None:
    assert Generation().labels([1, 2], 0) is None
    with pytest.raises(ValueError, match="label is 3, but this model was trained without classes"):
        Generation(label=3).labels([0], 0)
    with pytest.raises(ValueError, match=r"guidance is 2\.0, but this model was trained without classes"):
        Generation(guidance=2.0).labels([0], 0)
    with pytest.raises(ValueError, match="label is 10, expected 0 to 9"):
        Generation(label=10).labels([0], 10)


@pytest.mark.parametrize("name", ["png", "images.npz"])
def test_interrupted_writing_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with contextlib.suppress(KeyboardInterrupt), PictureWriter(tmp_path / name, [0, 1], (3, 4, 4)) as writer:
        writer.write(0, images)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["png", "images.npz"])
def test_pictures_are_read_back_to_the_bit(tmp_path: Path, name: str, channels: int) -> None:
    images = torch.randint(0, 256, (5, channels, 4, 6), dtype=torch.uint8)
    with PictureWriter(tmp_path / name, range(5), (channels, 4, 6)) as writer:
        writer.write(3, images[3:])  # batches come in any order
        writer.write(0, images[:3])
    assert torch.equal(read_pictures(tmp_path / name), images)


def test_pictures_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        read_pictures(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"holds no images, expected files ending in \.png"):
        read_pictures(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 5)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b.png has 4 x 5 pixels, expected 4 x 4 like a.png"):
        read_pictures(tmp_path)
    (tmp_path / "b.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(ValueError, match=r"b\.png is not a readable image"):
        read_pictures(tmp_path)
    for content, message in ((b"PK\x03\x04 cut", "or damaged"), (b"text", "or damaged")):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_pictures(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"shape \(2, 4, 4, 3\) and dtype float64, expected \[N, H, W, 1 or 3\] uint8"):
        read_pictures(tmp_path / "y.npz")

"""kohya's trainers are not on PyPI: a stand-in calls the same methods in the same order, with the same tables.

Order of a step: loss of each element → times weighting [B, 1, 1, 1] → times mask → mean over the sample → times the
data set's weights → post_process_loss → mean. Validation takes the same way, without a gradient in the loss.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import vadiff
from vadiff.integrations import kohya
from vadiff.schedulers import log_snr_of

SHAPES = {"image": (6, 4, 8, 8), "video": (6, 4, 3, 8, 8)}
LOSS_ULPS, GRADIENT_ULPS = 2, 2


def arguments(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"v_parameterization": False, "zero_terminal_snr": False, "min_snr_gamma": None, "flow": False, **given}
    )


class NetworkTrainer:
    """The methods of the trainer that have to do with the loss, by what they are documented to do."""

    def get_noise_scheduler(self, args: Any, device: Any = None) -> Any:
        if args.flow:
            return FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        scheduler.all_snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
        if args.zero_terminal_snr:  # after the table was filled
            fixed: Any = DDPMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=True)
            scheduler.alphas_cumprod = fixed.alphas_cumprod
        return scheduler

    def post_process_network(
        self, args: Any, accelerator: Any, network: nn.Module, text_encoders: Any, unet: Any
    ) -> None:
        self.prepared = network

    def post_process_loss(self, loss: Tensor, args: Any, timesteps: Tensor, noise_scheduler: Any) -> Tensor:
        if args.min_snr_gamma:
            snr = torch.stack([noise_scheduler.all_snr[t] for t in timesteps])
            weight = snr.clamp(max=args.min_snr_gamma) / (snr + 1 if args.v_parameterization else snr)
            loss = loss * weight.float()
        return loss

    def process_batch(
        self, network: nn.Module, batch: dict[str, Any], args: Any, noise_scheduler: Any, is_train: bool = True
    ) -> Tensor:
        clean, noise, timesteps = batch["clean"], batch["noise"], batch["timesteps"]
        target = noise_scheduler.get_velocity(clean, noise, timesteps) if args.v_parameterization else noise
        if args.flow:
            target = noise - clean
        with torch.set_grad_enabled(is_train):
            pred = network(clean)
        loss = nn.functional.mse_loss(pred.float(), target.float(), reduction="none")
        if batch.get("weighting") is not None:
            loss = loss * batch["weighting"]
        if batch.get("mask") is not None:
            loss = loss * batch["mask"]
        loss = loss.mean(dim=list(range(1, loss.ndim))) * batch["loss_weights"]
        self.per_sample = loss.detach()
        return self.post_process_loss(loss, args, timesteps, noise_scheduler).mean()

    def train(self, args: Any) -> None:
        """One step."""
        scheduler = self.get_noise_scheduler(args)
        self.process_batch(Network(), batch(scheduler), args, scheduler)

    def step_logging(self, accelerator: Any, logs: dict[str, Any], global_step: int, epoch: int) -> None:
        self.logged = logs


def adaptive(criterion: vadiff.DiffusionLoss, **options: Any) -> Any:
    """What a user writes: the mixin, the trainer, a criterion."""
    return type("Trainer", (kohya.AdaptiveLoss, NetworkTrainer), {"criterion": criterion, **options})()


def batch(scheduler: Any, shape: tuple[int, ...] = SHAPES["image"], seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, *shape, generator=generator)
    indices = torch.randint(0, 1000, shape[:1], generator=generator)
    timesteps = scheduler.timesteps[indices] if hasattr(scheduler, "scale_noise") else indices
    return {"clean": clean, "noise": noise, "timesteps": timesteps, "loss_weights": torch.ones(shape[0])}


class Network(nn.Module):
    """A LoRA: the frozen layer passes its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.ones(()), requires_grad=False)
        self.lora = nn.Parameter(0.1 * torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.base * x + torch.einsum("oc,bc...->bo...", self.lora, x)


def ulps(found: Tensor, expected: Tensor) -> float:
    spacing = np.spacing(expected.detach().abs().numpy())
    return float(np.max((found - expected).detach().abs().numpy() / spacing))


SETTINGS = {
    "epsilon": {},
    "epsilon, min-SNR": {"min_snr_gamma": 5.0},
    "v": {"v_parameterization": True},
    "v, min-SNR": {"v_parameterization": True, "min_snr_gamma": 5.0},
    "flow": {"flow": True},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_constant_weighting_is_the_trainer_s_own_loss_and_gradient(setting: str, shape: str) -> None:
    """With every factor of the trainer in it: weighting, mask, weights of the data set, --min_snr_gamma."""
    args, network = arguments(**SETTINGS[setting]), Network()
    results = []
    for trainer in (NetworkTrainer(), adaptive(vadiff.DiffusionLoss("constant"))):
        scheduler = trainer.get_noise_scheduler(args)
        values = batch(scheduler, SHAPES[shape])
        ones = [1] * (len(SHAPES[shape]) - 1)
        values["weighting"] = torch.linspace(0.5, 2.0, 6).view(6, *ones)
        values["mask"] = torch.rand(6, 1, *SHAPES[shape][2:], generator=torch.Generator().manual_seed(5))
        values["loss_weights"] = torch.linspace(0.2, 1.0, 6)
        loss = trainer.process_batch(network, values, args, scheduler)
        network.zero_grad()
        loss.backward()
        assert network.base.grad is None
        results.append((loss, network.lora.grad.clone()))
    (own, own_gradient), (ours, gradient) = results
    assert ulps(ours, own) <= LOSS_ULPS
    torch.testing.assert_close(gradient, own_gradient, rtol=1e-5, atol=1e-7)


def test_ten_steps_record_the_trainer_s_losses_and_weigh_by_them() -> None:
    criterion = vadiff.DiffusionLoss(bins=13, log_snr_range=(-5.5, 7.5), half_life=math.inf)
    trainer, args, network = adaptive(criterion), arguments(v_parameterization=True), Network()
    criterion = trainer.criterion
    scheduler = trainer.get_noise_scheduler(args)
    optimizer = torch.optim.SGD([network.lora], lr=0.01)
    log_snrs, losses = [], []
    for step in range(10):
        values = batch(scheduler, (16, 4, 8, 8), seed=step)
        loss = trainer.process_batch(network, values, args, scheduler)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        alpha_bar = scheduler.alphas_cumprod[values["timesteps"]].double()
        log_snrs.append((alpha_bar / (1 - alpha_bar)).log())
        losses.append(trainer.per_sample.double())
    log_snr, recorded = torch.cat(log_snrs).numpy(), torch.cat(losses).numpy()
    bins = np.clip(np.floor(log_snr + 5.5), 0, 12).astype(int)
    for k in range(13):
        inside = recorded[bins == k]
        assert criterion.statistics.count[k] == len(inside)
        if len(inside) > 1:
            assert criterion.statistics.mean[k].item() == pytest.approx(inside.mean(), rel=1e-6)
            assert criterion.statistics.variance[k].item() == pytest.approx(inside.var(ddof=1), rel=1e-5)
    assert criterion.weights.max() > 1.1 * criterion.weights.min()


@pytest.mark.parametrize("v", [False, True])
def test_refreshed_snr_is_that_of_the_schedule_after_its_zero_terminal_snr_fix(v: bool) -> None:
    """The trainer's own table is from before it; at S = 0 the formula is 0/0 for epsilon."""
    args = arguments(v_parameterization=v, zero_terminal_snr=True, min_snr_gamma=5.0)
    trainer = adaptive(vadiff.DiffusionLoss("constant"), refresh_snr=True)
    scheduler = trainer.get_noise_scheduler(args)
    timesteps = torch.tensor([0, 146, 700, 990, 999])
    loss = torch.ones(5, requires_grad=True)
    own = NetworkTrainer().post_process_loss(loss, args, timesteps, scheduler).detach().double()
    weights = trainer.post_process_loss(loss, args, timesteps, scheduler).detach().double()
    alpha_bar = scheduler.alphas_cumprod[timesteps].double()
    snr = alpha_bar / (1 - alpha_bar)
    expected = snr.clamp(max=5.0) / (snr + 1) if v else (5.0 / snr).clamp(max=1.0)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)
    assert not v or (own - expected).abs()[3] > 0.2 * expected[3]  # what it was


def test_zero_terminal_snr_leaves_the_trainer_s_loss_what_it_is() -> None:
    args = arguments(v_parameterization=True, zero_terminal_snr=True, min_snr_gamma=5.0)
    trainer, network = adaptive(vadiff.DiffusionLoss("constant")), Network()
    scheduler = trainer.get_noise_scheduler(args)
    table = scheduler.all_snr.clone()
    values = batch(scheduler)
    found = trainer.process_batch(network, values, args, scheduler)
    assert found == NetworkTrainer().process_batch(network, values, args, scheduler)
    assert torch.equal(scheduler.all_snr, table)


def test_all_snr_follows_the_schedule_and_is_not_made_up_where_there_is_none() -> None:
    scheduler = NetworkTrainer().get_noise_scheduler(arguments())
    before = scheduler.all_snr.clone()
    kohya.refresh_all_snr(scheduler)
    torch.testing.assert_close(scheduler.all_snr, before, rtol=1e-4, atol=0)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod / 2
    kohya.refresh_all_snr(scheduler)
    assert (scheduler.all_snr < before).all()
    flow = FlowMatchEulerDiscreteScheduler()
    kohya.refresh_all_snr(flow)
    assert not hasattr(flow, "all_snr")


def test_validation_losses_come_back_as_they_are_and_are_not_recorded() -> None:
    trainer, args, network = adaptive(vadiff.DiffusionLoss()), arguments(), Network()
    criterion = trainer.criterion
    scheduler = trainer.get_noise_scheduler(args)
    for seed in range(20):
        trainer.process_batch(network, batch(scheduler, seed=seed), args, scheduler)
    state = criterion.statistics.state.clone()
    values = batch(scheduler)
    loss = trainer.process_batch(network, values, args, scheduler, is_train=False)
    assert loss == NetworkTrainer().process_batch(network, values, args, scheduler, is_train=False)
    assert torch.equal(criterion.statistics.state, state)


def test_the_slot_as_a_function_keeps_other_factors_out_of_the_statistics() -> None:
    criterion = vadiff.DiffusionLoss("constant", bins=2, log_snr_range=(-100.0, 100.0))
    slot = functools.partial(kohya.post_process_loss, criterion)
    scheduler = NetworkTrainer().get_noise_scheduler(arguments())
    base = torch.tensor([2.0, 4.0, 6.0], requires_grad=True)
    share = torch.tensor([0.5, 0.0, 0.25])
    timesteps = torch.tensor([3, 400, 900])
    loss = slot(base * share, arguments(), timesteps, scheduler, sample_weight=share)
    assert loss.tolist() == [1.0, 0.0, 1.5]
    loss.sum().backward()
    assert base.grad.tolist() == share.tolist()
    n, mu = criterion.statistics.count, criterion.statistics.mean.nan_to_num()
    assert n.sum() == 2
    assert (n * mu).sum() == 8.0


def test_min_snr_written_for_epsilon_is_refused_where_v_is_predicted() -> None:
    """The mistake most trainers made; the trainers' --min_snr_gamma would come on top."""
    args = arguments(v_parameterization=True)
    loss = torch.ones(3, requires_grad=True)
    timesteps = torch.tensor([3, 400, 900])
    trainer = adaptive(vadiff.DiffusionLoss(vadiff.weighting.MinSNR(prediction_type="epsilon")))
    scheduler = trainer.get_noise_scheduler(args)
    with pytest.raises(ValueError, match=r"Use MinSNR\(prediction_type='v_prediction'\)"):
        trainer.post_process_loss(loss, args, timesteps, scheduler)
    trainer.criterion = vadiff.DiffusionLoss(vadiff.weighting.MinSNR(prediction_type="v_prediction"))
    snr = scheduler.all_snr[timesteps]
    expected = snr.clamp(max=5.0) / (snr + 1)
    torch.testing.assert_close(trainer.post_process_loss(loss, args, timesteps, scheduler), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("samples", [1, 3])
def test_two_timesteps_for_each_loss_are_an_error(samples: int) -> None:
    criterion = vadiff.DiffusionLoss()
    scheduler = NetworkTrainer().get_noise_scheduler(arguments())
    loss = torch.ones(samples, requires_grad=True)
    with pytest.raises(ValueError, match="With prior preservation, pass the half"):
        kohya.post_process_loss(criterion, loss, None, torch.arange(2 * samples), scheduler)
    with pytest.raises(ValueError, match="one value per sample"):
        kohya.post_process_loss(criterion, torch.ones(2, 4, 8, 8, requires_grad=True), None, torch.arange(2), scheduler)
    assert criterion.statistics.count.sum() == 0


def renewed() -> Accelerator:
    """The accelerator of a new process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield renewed()
    renewed()


def test_state_is_in_what_the_trainer_saves_and_resumes(accelerator: Accelerator, tmp_path: Path) -> None:
    """--save_state and --resume are Accelerate's; the network's hooks there do not see the criterion."""
    args, network = arguments(), Network()
    trainer = adaptive(vadiff.DiffusionLoss())
    criterion = trainer.criterion
    trainer.post_process_network(args, accelerator, network, [], None)
    assert trainer.prepared is network
    scheduler = trainer.get_noise_scheduler(args)
    for seed in range(5):
        trainer.process_batch(network, batch(scheduler, seed=seed), args, scheduler)
    accelerator.save_state(str(tmp_path))
    saved = {name: value.clone() for name, value in criterion.state_dict().items()}
    trainer.process_batch(network, batch(scheduler, seed=9), args, scheduler)
    accelerator.load_state(str(tmp_path))
    assert criterion.statistics.count.sum() > 0
    torch.testing.assert_close(dict(criterion.state_dict()), saved, rtol=0, atol=0)


def test_a_state_of_a_run_without_vadiff_is_resumed_by_one_switch(accelerator: Accelerator, tmp_path: Path) -> None:
    args, network = arguments(), Network()
    scheduler = NetworkTrainer().get_noise_scheduler(args)
    accelerator.save_state(str(tmp_path / "old"))

    stopped = trained()
    stopped.post_process_network(args, accelerator, network, [], None)
    with pytest.raises(RuntimeError, match=r"run begun without vadiff.*fresh_statistics=True"):
        accelerator.load_state(str(tmp_path / "old"))

    later = renewed()
    afresh = trained("--vadiff_fresh_statistics")
    afresh.post_process_network(args, later, network, [], None)
    with pytest.warns(UserWarning, match="the statistics start afresh"):
        later.load_state(str(tmp_path / "old"))
    assert afresh.criterion.statistics.count.sum() == 0
    afresh.process_batch(network, batch(scheduler), args, scheduler)
    later.save_state(str(tmp_path / "new"))

    last = renewed()
    resumed = trained()
    resumed.post_process_network(args, last, network, [], None)
    last.load_state(str(tmp_path / "new"))
    assert torch.equal(resumed.criterion.statistics.state, afresh.criterion.statistics.state)


def test_statistics_are_logged_once_a_step_beside_the_trainer_s_numbers() -> None:
    """The scripts log at step 0 while they accumulate, and a second time at a step when they validate."""
    trainer, args, network = adaptive(vadiff.DiffusionLoss(), log_every=5), arguments(), Network()
    scheduler = trainer.get_noise_scheduler(args)
    trainer.process_batch(network, batch(scheduler), args, scheduler)
    logged = []
    for step, values in [
        (0, {"loss/current": 1.0}),
        (4, {"loss/current": 1.0}),
        (5, {"loss/current": 1.0}),
        (5, {"loss/validation/step_average": 1.0}),
        (10, {"loss/current": 1.0}),
    ]:
        trainer.step_logging(None, dict(values), step, 1)
        assert values.items() <= trainer.logged.items()
        logged.append(any(name.startswith("vadiff/base_loss/") for name in trainer.logged))
    assert logged == [False, False, True, False, True]


def test_two_trainers_of_one_class_do_not_share_their_statistics() -> None:
    first = adaptive(vadiff.DiffusionLoss())
    second, args, network = type(first)(), arguments(), Network()
    scheduler = first.get_noise_scheduler(args)
    first.process_batch(network, batch(scheduler), args, scheduler)
    assert first.criterion.statistics.count.sum() == 6
    for other in (second, type(first)(), type(first)):
        assert other.criterion.statistics.count.sum() == 0


def test_a_criterion_that_a_trainer_makes_itself_stays_its_own() -> None:
    given = vadiff.DiffusionLoss()

    class Trainer(kohya.AdaptiveLoss, NetworkTrainer):
        def __init__(self) -> None:
            self.criterion = given
            super().__init__()

    assert Trainer().criterion is given


def options(line: str, **script: Any) -> Any:
    """What the script's parser makes of these options, with `add_arguments`."""
    parser = kohya.add_arguments(argparse.ArgumentParser())
    return parser.parse_args(line.split(), namespace=arguments(**script))


class Options(kohya.AdaptiveLoss, NetworkTrainer):
    """A trainer whose criterion is that of the command line."""


def trained(line: str = "", **script: Any) -> Options:
    trainer = Options()
    trainer.train(options(line, **script))
    return trainer


def test_criterion_without_options_is_that_of_the_process() -> None:
    for script, process in (({}, "stable_diffusion"), ({"flow": True}, "flow")):
        expected = vadiff.DiffusionLoss.for_process(process, prediction_type="epsilon", fine_tuning=True)
        if script:
            expected = vadiff.DiffusionLoss.for_process("flow", fine_tuning=True)
        criterion = trained(**script).criterion
        assert criterion.weighting == expected.weighting
        assert criterion.statistics.bins == expected.statistics.bins


def test_the_weight_of_the_terminal_step_is_an_option_and_then_nothing_warns() -> None:
    """Warnings are errors here."""
    process = vadiff.process.DiscreteVP.scaled_linear().with_zero_terminal_snr()
    line = "--vadiff_weighting min_snr"
    with pytest.warns(vadiff.errors.DiffusionLossWarning, match="is 0 at zero SNR"):
        kohya.arguments.criterion_for(options(line), process, "v_prediction")
    criterion = kohya.arguments.criterion_for(
        options(f"{line} --vadiff_weighting_args terminal=1"), process, "v_prediction"
    )
    assert criterion.weight_at(torch.tensor([-math.inf])) == 1.0


def test_options_of_the_criterion_come_from_the_command_line() -> None:
    line = "--vadiff_weighting loss_level --vadiff_weighting_args strength=0.7 clip=3 --vadiff_bins 9"
    trainer = trained(f"{line} --vadiff_log_snr_range -6 8 --vadiff_half_life 100 --vadiff_log_every 7")
    criterion = trainer.criterion
    assert criterion.weighting == vadiff.weighting.LossLevel(strength=0.7, clip=3.0)
    assert criterion.statistics.bins == vadiff.DiffusionLoss(bins=9, log_snr_range=(-6.0, 8.0)).statistics.bins
    assert criterion.statistics.half_life == 100
    assert trainer.log_every == 7
    v = trained("--vadiff_weighting min_snr --vadiff_weighting_args gamma=3", v_parameterization=True).criterion
    assert v.weighting == vadiff.weighting.MinSNR(gamma=3.0, prediction_type="v_prediction")
    half = trained("--vadiff_weighting_args clip=3").criterion  # the rest stays as for fine-tuning
    assert half.weighting == vadiff.weighting.VarianceAware(strength=0.5, clip=3.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--vadiff_weighting_args strenght=1", "'strenght', which variance_aware does not have, expected strength or"),
        ("--vadiff_weighting_args 1", "'1', expected KEY=NUMBER such as strength=0.5"),
        ("--vadiff_weighting constant --vadiff_weighting_args strength=1", "expected none: it has no options"),
        ("--vadiff_bins 1", "bins is 1"),
        ("--vadiff_log_every 0", "log_every is 0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(line)


def test_a_training_loop_that_weights_nothing_is_named() -> None:
    class Other(kohya.AdaptiveLoss, NetworkTrainer):
        def process_batch(self, *given: Any, **named: Any) -> Any:
            return 0.0

    with pytest.warns(
        UserWarning, match="Other has recorded no loss: its training loop did not call post_process_loss"
    ):
        Other().train(options(""))

    class Loop(NetworkTrainer):
        def train(self, args: Any) -> None:
            pass

    with pytest.raises(TypeError, match="Loop has a training loop of its own, which does not call post_process_loss"):
        type("Trainer", (kohya.AdaptiveLoss, Loop), {})


def test_options_beside_a_criterion_in_the_class_are_refused() -> None:
    trainer = adaptive(vadiff.DiffusionLoss())
    with pytest.raises(ValueError, match=r"--vadiff_bins given with Trainer\.criterion"):
        trainer.train(options("--vadiff_bins 8"))
    trainer.train(options("--vadiff_log_every 8"))
    assert trainer.log_every == 8


def test_a_criterion_to_be_trained_or_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="Use weighting='loss_level'"):
        adaptive(vadiff.DiffusionLoss("learned")).train(arguments())
    with pytest.raises(TypeError, match=r"Trainer\.criterion is a str"):
        type("Trainer", (kohya.AdaptiveLoss, NetworkTrainer), {"criterion": "constant"})().train(arguments())


def test_a_trainer_named_before_the_mixin_is_refused_as_nothing_would_be_weighted() -> None:
    with pytest.raises(TypeError, match=r"Use class Wrong\(AdaptiveLoss, NetworkTrainer\)"):
        type("Wrong", (NetworkTrainer, kohya.AdaptiveLoss), {"criterion": vadiff.DiffusionLoss()})
    own = type("Own", (type(adaptive(vadiff.DiffusionLoss())),), {"post_process_loss": lambda self, *given: given[0]})
    assert issubclass(own, kohya.AdaptiveLoss)


def test_flow_timesteps_are_read_as_the_scheduler_counts_them() -> None:
    scheduler = NetworkTrainer().get_noise_scheduler(arguments(flow=True))
    criterion = vadiff.DiffusionLoss("constant", bins=2, log_snr_range=(-10.0, 10.0))
    timesteps = scheduler.timesteps[[1, 990]]
    kohya.post_process_loss(criterion, torch.tensor([1.0, 2.0], requires_grad=True), None, timesteps, scheduler)
    assert criterion.statistics.mean.tolist() == [1.0, 2.0]  # much noise, little noise
    assert log_snr_of(scheduler, timesteps).sign().tolist() == [-1, 1]


def test_whole_timesteps_of_a_flow_stand_for_the_middle_of_their_step() -> None:
    """sd-scripts' HunyuanImage passes int(1000·sigma)."""
    criterion = vadiff.DiffusionLoss.for_process("flow", weighting="constant")
    loss = torch.ones(3, requires_grad=True)
    scheduler = FlowMatchEulerDiscreteScheduler()
    expected = vadiff.log_snr.from_flow_time(torch.tensor([0.0005, 0.5005, 0.9995]))
    kohya.post_process_loss(criterion, loss, arguments(), torch.tensor([0, 500, 999]), scheduler)
    recorded = criterion.statistics.count.nonzero().flatten()
    bins = criterion.statistics.bins
    index = ((expected - bins.low) * bins.inv_width).floor().clamp(0, bins.size - 1)
    assert recorded.tolist() == sorted(index.tolist())


def test_times_from_0_to_1_of_a_flow_are_refused() -> None:
    """Read as thousandths, they would all be next to no noise."""
    criterion, loss = vadiff.DiffusionLoss.for_process("flow"), torch.ones(4, requires_grad=True)
    scheduler, times = FlowMatchEulerDiscreteScheduler(), torch.tensor([0.334, 0.9, 0.1, 0.6])
    with pytest.raises(ValueError, match=r"times from 0 to 1\. Multiply them by 1000"):
        kohya.post_process_loss(criterion, loss, arguments(), times, scheduler)
    kohya.post_process_loss(criterion, loss, arguments(), 1000 * times, scheduler)


class AnimaNetworkTrainer(NetworkTrainer):
    """By its name, what sd-scripts' Anima is; it passes the times of a flow from 0 to 1."""


class Sd3NetworkTrainer(NetworkTrainer):
    """sd-scripts' SD3, which compares x0."""


def of_kind(base: type, **attributes: Any) -> Any:
    criterion = vadiff.DiffusionLoss.for_process("flow", weighting="constant")
    return type("Trainer", (kohya.AdaptiveLoss, base), {"criterion": criterion, **attributes})()


@pytest.mark.parametrize("samples", [1, 4])
def test_times_of_anima_are_read_from_0_to_1(samples: int) -> None:
    scheduler, times = FlowMatchEulerDiscreteScheduler(), torch.tensor([0.334, 0.9, 0.1, 0.6])
    args, (anima, flux) = arguments(flow=True), (of_kind(AnimaNetworkTrainer), of_kind(NetworkTrainer))
    for part in times.split(samples):
        loss = torch.ones(samples, requires_grad=True)
        anima.post_process_loss(loss, args, part, scheduler)
        flux.post_process_loss(loss, args, 1000 * part, scheduler)
    assert torch.equal(anima.criterion.statistics.count, flux.criterion.statistics.count)


def test_times_of_another_kind_than_the_trainer_s_are_refused_within_three_samples() -> None:
    """Without a look at the name, should a trainer change: with one sample in a batch, and on a GPU as well."""
    scheduler, loss, args = FlowMatchEulerDiscreteScheduler(), torch.ones(1, requires_grad=True), arguments(flow=True)
    trainer = of_kind(NetworkTrainer)
    trainer.post_process_loss(loss, args, torch.tensor([0.3]), scheduler)
    trainer.post_process_loss(loss, args, torch.tensor([0.9]), scheduler)
    with pytest.raises(ValueError, match=r"at most 0\.9, expected times from 0 to 1000: .* Set unit_times = True"):
        trainer.post_process_loss(loss, args, torch.tensor([0.5]), scheduler)
    with pytest.raises(ValueError, match=r"at most 300, expected times from 0 to 1: .* Set unit_times = False"):
        of_kind(AnimaNetworkTrainer).post_process_loss(loss, args, torch.tensor([300.0]), scheduler)
    corrected = of_kind(AnimaNetworkTrainer, unit_times=False)
    corrected.post_process_loss(loss, args, torch.tensor([300.0]), scheduler)
    late = of_kind(NetworkTrainer)  # timesteps below 1 may be drawn
    for time in (0.5, 400.0, 0.9, 0.3):
        late.post_process_loss(loss, args, torch.tensor([time]), scheduler)


def test_fixed_weights_of_sd3_are_for_its_loss_of_x0() -> None:
    scheduler = NetworkTrainer().get_noise_scheduler(arguments(flow=True))
    timesteps = torch.tensor([100.0, 500.0, 900.0])
    for base, form in ((Sd3NetworkTrainer, "sample"), (NetworkTrainer, "flow")):
        trainer = of_kind(base, criterion=vadiff.DiffusionLoss("min_snr"))
        loss = torch.ones(3, requires_grad=True)
        found = trainer.post_process_loss(loss, arguments(flow=True), timesteps, scheduler)
        expected = vadiff.weighting.MinSNR(prediction_type=form)(log_snr_of(scheduler, timesteps))
        torch.testing.assert_close(found, expected)


def test_a_weighting_given_by_name_is_made_for_the_trainer_s_form() -> None:
    criterion, loss = vadiff.DiffusionLoss("min_snr"), torch.ones(4, requires_grad=True)
    scheduler = NetworkTrainer().get_noise_scheduler(arguments())
    timesteps = torch.tensor([0, 300, 600, 999])
    found = kohya.post_process_loss(criterion, loss, arguments(v_parameterization=True), timesteps, scheduler)
    expected = vadiff.weighting.MinSNR(prediction_type="v_prediction")
    assert criterion.weighting == expected
    assert torch.equal(found, expected(log_snr_of(scheduler, timesteps)))

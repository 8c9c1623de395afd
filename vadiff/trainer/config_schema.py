"""The fields of a training config, with defaults, help texts and bounds."""

import dataclasses
import math
from dataclasses import dataclass

from .. import levels, weighting
from ..ema import PRECISIONS as SNAPSHOT_PRECISIONS
from ..models import PREDICTIONS, PROCESSES
from ..ops import backends
from .config_fields import setting

TABLE = "table"  # weighting or levels from the final weights of the run in folder `table`
AUTO = "auto"  # levels or prediction: those that are usual for the process
DATA, POSTERIOR_MEAN = "data", "posterior_mean"  # targets
GAP = "gap"  # weighting or levels from the optimal loss J*
CURVE_WEIGHTINGS = {GAP: weighting.GapWeighting, "inverse_optimal_loss": weighting.InverseOptimalLoss}  # need J*
WEIGHTINGS = (*weighting.available(), TABLE, *CURVE_WEIGHTINGS)
LEVELS = (AUTO, *levels.available(), GAP)  # TABLE among them

DATASETS = ("digits", "cifar10", "cifar100", "images", "latents")
# (C, H, W); "images" have 3 and image_size, "latents" image_channels and image_size.
SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}
STREAMED = ("images", "latents")  # data sets that need not be in memory
LATENT_STD = 0.5  # standard deviation to which latents are scaled, in each channel; EDM2's
CACHES = ("auto", "device", "host", "none")
ON_BAD_IMAGE = ("error", "skip")
MODELS = ("unet", "edm2")
OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt")
PRECISIONS = ("fp32", "bf16", "fp16")
TIMESTEPS = 1000  # of DDPM
FLUX_PATCH = 16  # pixels in height and width that are one of Flux's tokens


@dataclass(frozen=True)
class ConfigSchema:
    """What `TrainConfig` holds; the defaults are the preset `digits`."""

    dataset: str = setting("digits", "data set", choices=DATASETS)
    data: str | None = setting(
        None,
        "path of the data set. images: a folder of pictures; a zip or folder with dataset.json, as EDM has them; or "
        "WebDataset shards, as 'train-{000000..000099}.tar'. latents: the folder that `vadiff encode` wrote. CIFAR: "
        "its official tar.gz, whole or a folder with it cut into parts by `split`; downloaded if not given",
    )
    image_size: int = setting(32, "height and width in pixels, for dataset images; of the latents", at_least=4)
    image_channels: int = setting(4, "channels of latents", at_least=1)
    cache: str = setting(
        "auto",
        "where the training images are kept: on the device, on the host, or none, for data that fit into neither: "
        "pictures are then decoded anew at every pass; auto: the first of these with room",
        choices=CACHES,
    )
    workers: int | None = setting(
        None,
        "processes of each rank that read ahead, where images are not on the device; 0: the training process reads, "
        "and waits; default: one per CPU of the rank, 8 at most",
        at_least=0,
    )
    on_bad_image: str = setting(
        "error",
        "pictures that cannot be read, or that have no label: error stops, and names the file; skip counts them, and "
        "takes others",
        choices=ON_BAD_IMAGE,
    )
    augment: float = setting(
        0.0,
        "EDM's augmentation: probability of each of its transformations, 0.12 for EDM's CIFAR-10; the network is told "
        "of them; 0: none",
        at_least=0, at_most=1,
    )  # fmt: skip
    flips: bool = setting(False, "mirror each training image with probability 1/2")
    sigma_data: float = setting(0.75, "standard deviation of the pixels, scaled to [-1, 1]", above=0)

    process: str = setting(
        "edm",
        "noise process: edm, flow, or variance preserving with the betas of DDPM (vp_linear), Stable Diffusion "
        "(vp_scaled_linear) or Improved DDPM (vp_cosine)",
        choices=PROCESSES,
    )
    prediction: str = setting(
        AUTO,
        "what the network predicts; auto: edm (EDM's F), flow (velocity), or epsilon of a vp process, for which it can "
        "also be v_prediction or sample (x0)",
        choices=(AUTO, *sorted({name for names in PREDICTIONS.values() for name in names})),
    )
    timesteps: int = setting(TIMESTEPS, "number of discrete timesteps of a vp process; 0: continuous time", at_least=0)
    zero_terminal_snr: bool = setting(
        False,
        "make the last of these timesteps pure noise, for v_prediction and sample (arXiv 2305.08891); min_snr gives it "
        "the weight 1, as its paper's code does, unless --weighting-options terminal=0 says otherwise",
    )
    weighting: str = setting(
        "variance_aware",
        "of noise levels; table: final weights of the run in --table; gap, inverse_optimal_loss: see --optimal-loss",
        choices=WEIGHTINGS,
    )
    weighting_options: dict[str, float] = dataclasses.field(
        default_factory=dict, metadata={"help": "arguments of the weighting, e.g. strength=0.5"}
    )
    levels: str = setting(
        AUTO,
        "distribution of noise levels; auto: log_normal, of a vp process uniform_time; table: density times the final "
        "weights of --table; gap: see --optimal-loss",
        choices=LEVELS,
    )
    levels_options: dict[str, float] = dataclasses.field(
        default_factory=dict, metadata={"help": "arguments of the level sampler, e.g. floor=0.2"}
    )
    shift: float | str = setting(
        1.0,
        "factor of the sigma of all levels, above 1 for more noise; or a rule for it by the size of the images: sd3 "
        "(pixels), rae (numbers), flux (patches of 16 x 16). With adaptive levels, of their base",
        above=0, below=math.inf,
    )  # fmt: skip
    uniform_share: float = setting(
        0.0, "share of draws from uniform times of the process, of a flow for edm; with adaptive levels, in their base",
        at_least=0, below=1,
    )  # fmt: skip
    profile: str | None = setting(
        None,
        "levels=information: place them from the first step by the x0 errors of a run (its directory, latest "
        "checkpoint) or of a CSV that `vadiff validate --csv` wrote",
    )
    levels_every: int = setting(10, "steps between two updates of adaptive levels", at_least=1)
    p_mean: float = setting(
        -1.2,
        "log_normal levels, for edm and flow also the base of table and adaptive ones: ln sigma ~ N(p_mean, p_std^2); "
        "of a vp process their base is uniform_time",
    )
    p_std: float = setting(1.2, "standard deviation of ln sigma in log_normal levels", above=0)
    stratified: bool = setting(False, "spread the noise levels of a batch evenly over their distribution")
    stratified_epoch: bool = setting(
        False, "also spread the noise levels of each pass over the data evenly; stratified is part of it"
    )
    antithetic: bool = setting(
        False, "draw noise levels in mirrored pairs: the quantiles u and 1 - u of their distribution"
    )
    table: str | None = setting(None, "run directory with the final weights for weighting=table or levels=table")
    optimal_loss: str | None = setting(
        None,
        "CSV of `vadiff optimal-loss` for the training images, used by gap and inverse_optimal_loss; if not given, J* "
        "is estimated before the first step",
    )
    target: str = setting(
        DATA,
        "what is regressed on: the image that was drawn (data), or the mean of all training images that explain the "
        "noisy one (posterior_mean), less random at high noise, with the same minimiser",
        choices=(DATA, POSTERIOR_MEAN),
    )
    reference: int | str = setting(
        1024, "for target posterior_mean: training images among which it is looked for, at random at each step; or all"
    )
    bins: int = setting(128, "log-SNR bins of the statistics", at_least=2, at_most=1024)
    log_snr_range: tuple[float, float] = setting((-16.0, 16.0), "lowest and highest log-SNR of the bins")
    half_life: float = setting(128.0, "half-life of the statistics, in samples per bin on average", above=0)

    model: str = setting("unet", "network: unet (diffusers) or edm2 (EDM2's, config G)", choices=MODELS)
    channels: tuple[int, ...] = setting((32, 48), "channels per resolution, highest resolution first", at_least=1)
    layers_per_block: int = setting(1, "residual blocks per resolution", at_least=1)
    attention_resolutions: tuple[int, ...] = setting((), "heights in pixels of the resolutions with self-attention")
    norm_groups: int = setting(8, "groups of group normalisation in unet; must divide all channels", at_least=1)
    gradient_checkpointing: bool = setting(
        False, "compute the activations of each block again in the backward pass: less memory, a third more time"
    )
    dropout: float = setting(0.0, "dropout rate in the residual blocks", at_least=0, below=1)
    class_conditional: bool = setting(False, "condition the network on the class")
    label_dropout: float = setting(
        0.1, "probability of dropping a label, for classifier-free guidance", at_least=0, at_most=1
    )

    transfer: str | None = setting(
        None,
        "run directory, also an imported one, whose averaged weights of the latest checkpoint are the initial weights; "
        "steps, optimiser and statistics start anew",
    )
    steps: int = setting(450, "optimiser steps", at_least=1)
    batch_size: int = setting(64, "images per step, over all ranks and accumulation steps", at_least=1)
    accumulate: int = setting(1, "gradient accumulation: parts that a batch is split into, to save memory", at_least=1)
    optimizer: str = setting("adam", "optimiser", choices=OPTIMIZERS)
    learning_rate: float = setting(8e-3, "learning rate after the warm-up", above=0, below=math.inf)
    betas: tuple[float, float] = setting((0.9, 0.99), "beta1 and beta2 of the optimiser", at_least=0, below=1)
    weight_decay: float = setting(0.0, "weight decay of adamw", at_least=0, below=math.inf)
    warmup: int = setting(50, "steps of linear learning-rate warm-up; 0 for none", at_least=0)
    warmup_from_zero: bool = setting(False, "start the warm-up with a rate of 0, as EDM does, and not with 1/warmup")
    schedule: str = setting(
        "linear", "learning rate after the warm-up; linear and cosine decay to 0", choices=SCHEDULES
    )
    schedule_steps: int = setting(1000, "inverse_sqrt: steps before the learning rate decays", at_least=1)
    clip: float = setting(math.inf, "maximum gradient norm; inf for no clipping", above=0)
    ema_decay: float = setting(0.99, "decay of the exponential moving average of the weights", at_least=0, below=1)
    ema_rampup: float = setting(
        0.0, "EDM's ramp-up: the average's half-life is at most this share of the images so far; 0: none", at_least=0
    )
    sigma_rel: tuple[float, ...] = setting(
        (), "relative widths of power-function EMAs to track, e.g. 0.05,0.1; `vadiff ema` makes other widths from them",
        above=0, below=12**-0.5,
    )  # fmt: skip
    snapshot_every: int = setting(100, "steps between snapshots of these EMAs; the last step has one too", at_least=1)
    snapshot_precision: str = setting("fp16", "number format of the snapshots", choices=tuple(SNAPSHOT_PRECISIONS))
    max_skipped_steps: int = setting(25, "stop after this many consecutive non-finite steps", at_least=1)

    seed: int = setting(
        0, "seed of the initial weights and dropout, and of the data unless data_seed is given", at_least=0
    )
    data_seed: int | None = setting(None, "seed of the image order, the noise levels and the noise", at_least=0)
    device: str = setting("auto", "auto (a GPU if there is one), cpu, cuda, cuda:N")
    backend: str = setting("auto", "which kernels compute the loss", choices=backends.BACKENDS)
    precision: str = setting("fp32", "of the network's computation; weights stay fp32", choices=PRECISIONS)
    compile: bool | None = setting(None, "torch.compile the network; default: on a CUDA device with --graph")
    graph: bool = setting(
        False, "on a CUDA device, capture the training step in a CUDA graph, which takes the host out of its way"
    )
    tf32: bool = setting(True, "on a CUDA device, let float32 products round their factors to TF32")
    deterministic: bool = setting(False, "deterministic algorithms only; slower on a GPU")

    log_every: int = setting(20, "steps between two lines of metrics.jsonl", at_least=1)
    tensorboard: bool = setting(True, "also write the metrics for TensorBoard")
    log_rms: bool = setting(False, "also log the RMS of weights, updates and activations per layer")
    checkpoint_every: int = setting(1000, "steps between checkpoints; the last step has one too", at_least=1)
    keep_checkpoints: int = setting(3, "number of latest checkpoints to keep", at_least=1)
    samples_every: int = setting(0, "steps between two grids of samples; 0 for none", at_least=0)
    sample_count: int = setting(64, "samples in a grid", at_least=1)
    held_out_every: int = setting(
        0, "steps between measurements of the held-out loss; the last step has one too; 0: only that one",
        at_least=0,
    )  # fmt: skip
    held_out_images: int = setting(1000, "maximum number of held-out images to measure on", at_least=1)
    held_out_draws: int = setting(1, "noise draws per held-out image and noise level", at_least=1)
    held_out_levels: int = setting(12, "noise levels of the held-out loss, evenly spaced in ln sigma", at_least=2)
    held_out_sigma: tuple[float, float] = setting(
        (0.02, 20.0), "lowest and highest sigma of the held-out loss; of a vp process at most those it has", above=0
    )


# The fields by what they are about, as `vadiff train --help` shows them; each is in one group.
FIELD_GROUPS = {
    "Data": (
        "dataset", "data", "image_size", "image_channels", "cache", "workers", "on_bad_image", "augment", "flips",
        "sigma_data",
    ),
    "Process and prediction": ("process", "prediction", "timesteps", "zero_terminal_snr"),
    "Weighting": (
        "weighting", "weighting_options", "table", "optimal_loss", "bins", "log_snr_range", "half_life",
    ),
    "Noise levels": (
        "levels", "levels_options", "shift", "uniform_share", "profile", "levels_every", "p_mean", "p_std",
        "stratified", "stratified_epoch", "antithetic",
    ),
    "Targets": ("target", "reference"),
    "Network": (
        "model", "channels", "layers_per_block", "attention_resolutions", "norm_groups", "gradient_checkpointing",
        "dropout", "class_conditional", "label_dropout",
    ),
    "Optimisation": (
        "transfer", "steps", "batch_size", "accumulate", "optimizer", "learning_rate", "betas", "weight_decay",
        "warmup", "warmup_from_zero", "schedule", "schedule_steps", "clip", "max_skipped_steps", "seed", "data_seed",
    ),
    "Averages of the weights": (
        "ema_decay", "ema_rampup", "sigma_rel", "snapshot_every", "snapshot_precision",
    ),
    "Held-out loss and samples": (
        "held_out_every", "held_out_images", "held_out_draws", "held_out_levels", "held_out_sigma", "samples_every",
        "sample_count",
    ),
    "Logs and checkpoints": ("log_every", "tensorboard", "log_rms", "checkpoint_every", "keep_checkpoints"),
    "Machine": ("device", "backend", "precision", "compile", "graph", "tf32", "deterministic"),
}  # fmt: skip

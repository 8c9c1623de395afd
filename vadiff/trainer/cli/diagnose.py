"""`vadiff diagnose`."""

from .command import command
from .parameters import PATH, WHOLE_NUMBER, Options, argument, option, usage_error

NAME = "diagnose"
HELP = "does weighting by the loss pay for a run? figures per noise level and a verdict"
DESCRIPTION = (
    "Read the statistics of a run's checkpoint and print how much its loss differs between noise levels, the weights "
    "that variance_aware and loss_level would use, samples per noise level, what was skipped or lies outside the bins, "
    "and a verdict with the line to change. Takes a second and no GPU, and any weighting, constant included. With the "
    "optimal loss of the training images also the share of the loss that training can still reduce."
)
EXAMPLES = (
    "vadiff diagnose runs/digits                # of the latest checkpoint",
    "vadiff diagnose runs/digits --optimal runs/optimal-loss/optimal_loss.csv",
)


@command(NAME, HELP, DESCRIPTION, EXAMPLES)
@argument("run_directory", "RUN", "run directory that `vadiff train` wrote")
@option("--step", WHOLE_NUMBER, "N", "step of a checkpoint; default: the last")
@option(
    "--optimal", PATH, "CSV",
    "optimal loss of its training images, from `vadiff optimal-loss`; default: the run's own, if it has one",
)  # fmt: skip
def run(options: Options) -> None:
    from ...levels import Information
    from ...optimal_loss import OptimalLoss
    from ..training import open_run

    optimal = None
    if options.optimal is not None:
        try:
            optimal = OptimalLoss.load(options.optimal)
        except (OSError, ValueError) as error:
            usage_error(f"argument --optimal: {error}")
    opened = open_run(options.run_directory)
    print(opened.diagnose(optimal, options.step))
    if opened.config.levels == "information":
        levels = opened.levels(options.step)
        assert isinstance(levels, Information)
        print(f"\nNoise levels: {levels.state}.")

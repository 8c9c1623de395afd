"""kohya's sd-scripts and similar trainers: a mixin for `NetworkTrainer`, and its `post_process_loss` hook.

Without a change of any file, with options such as `--vadiff_weighting` beside the script's own:

    accelerate launch -m vadiff.integrations.kohya sdxl_train_network.py ...

Or at the end of train_network.py, sdxl_train_network.py, flux_train_network.py, ...:

    class Trainer(kohya.AdaptiveLoss, NetworkTrainer):
        criterion = vadiff.DiffusionLoss.for_process("stable_diffusion", fine_tuning=True)

and `trainer = Trainer()` in place of `NetworkTrainer()`. The trainer's own flags (`--min_snr_gamma`,
`--debiased_estimation_loss`, `--weighting_scheme`, masks, data-set weights) stay in effect: they are the base loss.
"""

from .arguments import add_arguments
from .loss import post_process_loss, refresh_all_snr
from .trainer import AdaptiveLoss, MusubiAdaptiveLoss

__all__ = ["AdaptiveLoss", "MusubiAdaptiveLoss", "add_arguments", "post_process_loss", "refresh_all_snr"]

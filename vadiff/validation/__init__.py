"""Validation at fixed noise levels, with fixed noise, for any training loop.

A validation loss that draws noise levels anew tells more about the draws than about the model. Here the level and the
noise of a held-out sample depend on its index alone, so that two validations, or two runs, differ only by the model.

    validation = LevelValidation(levels=12, log_snr_range=(-6.0, 8.0), reference="validation.csv")
    for indices, clean in DataLoader(validation.indexed(dataset), batch_size=64):
        log_snr, noise = validation.draw(indices, clean.shape)
        ...                                            # the network's loss of each sample, [B], unweighted
        validation.add(indices, log_snr, loss)
    result = validation.result()                       # loss per level, and mean ln(loss / reference)
"""

from .dataset import IndexedDataset, indices_of
from .levels import LevelValidation
from .losses import LevelLosses, Records, mean_log_ratio

__all__ = ["IndexedDataset", "LevelLosses", "LevelValidation", "Records", "indices_of", "mean_log_ratio"]

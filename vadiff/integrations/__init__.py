"""One small module per trainer that vadiff slots into; each imports the other library only where it needs it.

All of them keep to three things. What depends on the noise level in the trainer's own objective (its `--snr_gamma`, its
EDM or SD3 weighting) stays and is the base weight, so that the statistics show that objective. The trainer's per-sample
loss goes through `DiffusionLoss.reweight` where there is nothing else to take hold of. And log-SNR is worked out
from the trainer's schedule at every call.
"""

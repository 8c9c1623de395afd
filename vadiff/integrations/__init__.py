"""One small module per supported trainer; each imports the trainer's library only where it is needed.

All follow three rules. The noise-level weights of the trainer's own objective (its `--snr_gamma`, its EDM or SD3
weighting) are kept as the base weight, so that the statistics are those of that objective. Where only the trainer's
per-sample loss is accessible, it goes through `DiffusionLoss.reweight`. Log-SNR is computed from the trainer's schedule
at every call.
"""

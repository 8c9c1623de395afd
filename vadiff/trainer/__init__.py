"""vadiff's own trainer: config, data, training, evaluation, ablation, report and command line."""

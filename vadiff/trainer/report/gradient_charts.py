"""Charts of gradients per noise level."""

from typing import Any

import numpy as np

from ..evaluation import LevelGradients
from .charts import plain_log_ticks
from .style import LOG_SNR, Chart

_OWN, _RUN = ("#000000", "--", "own objective (w = 1)"), ("#0072B2", "-", "with the run's weighting")


def gradient_charts(gradients: LevelGradients) -> list[Chart]:
    """Charts: norm per level, share of a training step, cosine with the step, and cosines between levels."""
    log_snr = gradients.log_snr.numpy()

    def lines(panel: Any, own: Any, weighted: Any, label: str) -> None:
        for values, (color, dash, name) in (
            (weighted, _RUN),
            (own, _OWN),
        ):  # the dashed line on top, so that both are visible
            panel.plot(log_snr, values, color=color, linestyle=dash, marker="o", markersize=4, label=name)
        panel.set_xlabel(LOG_SNR)
        panel.set_ylabel(label)

    def norm(panel: Any) -> None:
        values = gradients.norm.numpy()
        lines(panel, values, values * gradients.weight.numpy(), "norm of the gradient of one level")
        panel.set_yscale("log")
        plain_log_ticks(panel.yaxis)

    def step_share(panel: Any) -> None:
        own, weighted = (100.0 * gradients.step_share(weighted=choice).numpy() for choice in (False, True))
        lines(panel, own, weighted, "share of a training step, %")
        panel.set_ylim(bottom=0)

    def agreement(panel: Any) -> None:
        own, weighted = (gradients.cosine_to_step(weighted=choice).numpy().clip(-1.0, 1.0) for choice in (False, True))
        lines(panel, own, weighted, "cosine with the training step")
        panel.axhline(0.0, color="#7b8794", linewidth=1)
        panel.set_ylim(min(-0.05, np.nanmin([own, weighted], initial=0.0) - 0.05), 1.05)

    def cosines(panel: Any) -> None:
        values = gradients.cosine.numpy().clip(-1.0, 1.0)
        image = panel.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, origin="lower")
        places = range(len(log_snr))
        names = [f"{level:.1f}" for level in log_snr]
        panel.set_xticks(places, names, rotation=60 if len(names) > 8 else 0)
        panel.set_yticks(places, names)
        panel.grid(False)
        panel.set_facecolor("#c9ced6")  # marks unknown cosines
        panel.set_xlabel("log-SNR λ (nats)      less noise →")
        panel.set_ylabel("log-SNR λ (nats)      less noise →")
        bar = panel.figure.colorbar(image, ax=panel, pad=0.02)
        bar.set_label("cosine between the gradients")
        bar.outline.set_visible(False)

    return [
        Chart(
            "gradient-norm-per-level",
            "Size of the gradient per noise level",
            "Norm of the gradient of one sample of a noise level. Look for levels far above the rest: they dominate "
            "the others. A balancing weighting makes the line flatter.",
            norm,
        ),
        Chart(
            "gradient-share-per-level",
            "Share of each noise level in a training step",
            "Gradient norm times how often the level is drawn in training, as a share of the sum. Look for levels "
            "near 0: they are hardly learned, whatever their loss.",
            step_share,
        ),
        Chart(
            "gradient-agreement",
            "Does a training step help each noise level",
            "Cosine between the gradient of one level and the whole training step. Look for levels at or below 0: a "
            "step does nothing for them, or makes them worse.",
            agreement,
        ),
        Chart(
            "gradient-cosines",
            "Do noise levels pull in different directions",
            "Cosine between the gradients of two noise levels, which no weight changes. Look for blue: "
            "what helps one hurts the other. White: the two are independent. Grey: too few images to tell.",
            cosines,
        ),
    ]

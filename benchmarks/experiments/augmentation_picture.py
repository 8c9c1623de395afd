"""The picture of docs/training.md: each transformation of EDM's augmentation alone, and what a network is given.

python benchmarks/experiments/augmentation_picture.py    # writes docs/augmentation.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vadiff.augmentation import EDMAugmentation, transformed
from vadiff.pixels import normalised, pixels
from vadiff.trainer.data import digits

DOCS = Path(__file__).parent.parent.parent / "docs"
ALONE = {"x-flip": (0,), "y-flip": (1,), "scaling": (2,), "rotation": (3,), "anisotropy": (4, 5), "translation": (6, 7)}
SHOWN = (1.0, 1.0, 1.5, math.pi / 4, math.pi / 4, 1.5, 1.0, -0.5)  # a0 to a7
NUMBER = 4  # images


def parameters() -> Tensor:
    """a0 to a7 of an image as it is, and of each transformation alone. [7, 8]"""
    rows = torch.zeros(1 + len(ALONE), len(SHOWN))
    for row, places in enumerate(ALONE.values(), start=1):
        rows[row, list(places)] = torch.tensor(SHOWN)[list(places)]
    return rows


def picture(images: Tensor, p: float, path: Path) -> None:
    """Write it, of grey images [NUMBER, 1, H, W] in [-1, 1], one in each row; `p` is that of the drawn ones."""
    generator = torch.Generator().manual_seed(0)
    titles = ["image", *ALONE, *[""] * len(ALONE)]
    columns = [transformed(images, row.expand(NUMBER, -1)) for row in parameters()]
    columns += [EDMAugmentation(p)(images, generator=generator)[0] for _ in ALONE]
    with matplotlib.rc_context({"font.size": 7, "savefig.dpi": 120}):
        figure = Figure(figsize=(9.0, 3.0), layout="constrained")
        panels = figure.subplots(NUMBER, len(columns))
        for column, (title, augmented) in enumerate(zip(titles, columns, strict=True)):
            panels[0, column].set_title(title, fontsize=7)
            for panel, image in zip(panels[:, column], pixels(augmented), strict=True):
                panel.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                panel.axis("off")
        panels[0, -len(ALONE) // 2].set_title(f"drawn with p = {p:g}", fontsize=7)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--p", type=float, default=0.12, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=DOCS / "augmentation.png", help="default: %(default)s")
    options = parser.parse_args(arguments)
    picture(normalised(digits.digits().train[:NUMBER]), options.p, options.out)
    images = normalised(digits.digits().train[:])
    augmented, _ = EDMAugmentation(options.p)(images, generator=torch.Generator().manual_seed(1))
    beyond = (augmented.abs() - 1.0).clamp(min=0.0)
    print(
        f"{len(images):,} digits, p = {options.p:g}: {100 * float((beyond > 1e-3).double().mean()):.2g} % of pixels "
        f"are outside [-1, 1], by {float(beyond.max()):.2g} at most. Written to {options.out}"
    )


if __name__ == "__main__":
    main()

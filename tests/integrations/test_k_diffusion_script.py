"""k-diffusion's own train.py with the lines of docs/trainers/k-diffusion.md, where VADIFF_TRAINERS has a checkout.

The folder that the variable names contains `k-diffusion`; jsonmerge, scikit-image, clean-fid, clip-anytorch and kornia
have to be installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

CHECKOUT = Path(os.environ.get("VADIFF_TRAINERS", "nowhere"), "k-diffusion")
NEEDS = ("PIL", "jsonmerge", "skimage", "cleanfid", "clip", "kornia")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.skipif(not CHECKOUT.is_dir(), reason="VADIFF_TRAINERS names no folder with a checkout of k-diffusion"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

# torch 2.13 takes no `verbose` in a schedule, which k-diffusion passes.
PRELUDE = """
import torch
schedule = torch.optim.lr_scheduler.LRScheduler
init = schedule.__init__
schedule.__init__ = lambda self, optimizer, last_epoch=-1, *verbose: init(self, optimizer, last_epoch)
from vadiff.integrations.k_diffusion import WeightedDenoiser, import_k_diffusion
K = import_k_diffusion()
"""
WRAPPED = "model = K.config.make_denoiser_wrapper(config)(inner_model)\n"
LOADED = "        del ckpt\n    else:"
SAVED = "            'elapsed': elapsed,\n"
LINES = {
    "import k_diffusion as K\n": PRELUDE,
    WRAPPED: f"{WRAPPED}    model = WeightedDenoiser(model, CRITERION)\n",
    LOADED: f"        model.criterion.load_state_dict(ckpt.get('criterion', {{}}))\n{LOADED}",
    SAVED: f"{SAVED}            'criterion': model.criterion.state_dict(),\n",
}
CONFIG = {
    "model": {
        "type": "image_v1", "input_channels": 3, "input_size": [8, 8], "patch_size": 1, "mapping_out": 8, "depths": [1],
        "channels": [8], "self_attn_depths": [False], "has_variance": False, "loss_config": "karras",
        "loss_weighting": "karras", "dropout_rate": 0.0, "augment_wrapper": True, "augment_prob": 0.0,
        "sigma_data": 0.5, "sigma_min": 0.01, "sigma_max": 80, "sigma_sample_density": {"type": "cosine-interpolated"},
    },
    "dataset": {"type": "imagefolder", "location": "images"},
    "optimizer": {"type": "adamw", "lr": 1e-2, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 1e-3},
    "lr_sched": {"type": "constant", "warmup": 0.0},
    "ema_sched": {"type": "inverse", "power": 0.6667, "max_value": 0.9999},
}  # fmt: skip


def train(folder: Path, criterion: str | None, steps: int, *options: str) -> Any:
    """What train.py saved, run with the page's lines, or without them for None."""
    script = (CHECKOUT / "train.py").read_text()
    for line, replacement in LINES.items():
        assert script.count(line) == 1
        if criterion is not None or line.startswith("import"):
            script = script.replace(line, replacement.replace("CRITERION", criterion or ""))
    (folder / "train.py").write_text(script)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    arguments = (
        f"train.py --config config.json --batch-size 4 --evaluate-every 0 --num-workers 1 --seed 0 --end-step {steps}"
    )
    path = os.pathsep.join([str(CHECKOUT), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *arguments.split(), "--start-method", "fork", *options]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return torch.load(folder / f"model_{steps:08}.pth", weights_only=False)


def test_train_py_trains_saves_and_resumes(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    own = train(tmp_path, None, 3)
    with pytest.raises(RuntimeError, match=r"no statistics .*without vadiff.*fresh_statistics=True"):
        train(tmp_path, "'constant'", 5, "--resume", "model_00000003.pth")
    fresh = train(tmp_path, "fresh_statistics=True", 5, "--resume", "model_00000003.pth")
    assert "criterion" not in own
    assert fresh["criterion"]["statistics.state"].any()
    (tmp_path / "model_state.json").unlink()
    constant = train(tmp_path, "'constant'", 3)
    for name in ("model", "model_ema"):
        torch.testing.assert_close(constant[name], own[name], rtol=0, atol=0)
    assert constant["ema_stats"] == own["ema_stats"]

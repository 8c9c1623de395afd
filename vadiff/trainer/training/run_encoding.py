"""The encoding of a run: what its network draws, and how pictures are made of it."""

import json
from pathlib import Path

from ...errors import DataError, RunError
from ...files import replacing
from ..config import TrainConfig
from ..data import PIXELS, Encoding, LatentEncoding
from ..data.latents import read_facts

ENCODING_FILE = "encoding.json"  # in the directory of a run on latents: their statistics, and the VAE that decodes


def keep_encoding(encoding: Encoding, run: Path) -> None:
    """Copy the encoding of latents into a run's own folder, so that it can be sampled without its data set."""
    if isinstance(encoding, LatentEncoding):
        with replacing(run / ENCODING_FILE) as partial:
            partial.write_text(json.dumps(encoding.as_dict(), indent=1) + "\n")


def read_encoding(config: TrainConfig, run: Path, vae: Path | None = None) -> Encoding:
    """The encoding of a run: for latents the copy in its folder, or else that of its data set.

    Args:
        config: of the run.
        run: its directory.
        vae: folder of the VAE that decodes latents, in place of that which is noted.

    Raises:
        RunError: it is missing or damaged; or a VAE for a run that draws pixels.
    """
    if config.dataset != "latents":
        if vae is not None:
            raise RunError(f"vae is {vae}, expected none: {run} draws pixels, its data set is {config.dataset}")
        return PIXELS
    path = run / ENCODING_FILE
    if config.data is None and not path.exists():
        raise RunError(f"{path} is missing: import the run again, with --vae PATH of the VAE that decodes its latents")
    try:
        if path.exists():
            encoding = LatentEncoding.of_dict(json.loads(path.read_text()))
        else:
            encoding = read_facts(Path(str(config.data))).encoding
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read: {error!r}. Copy it from {config.data}, or train again") from error
    except DataError as error:
        raise RunError(f"{path} is missing, and {error}") from error
    return encoding if vae is None else encoding.with_vae(vae)

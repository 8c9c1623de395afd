"""Pictures that could not be read in a run, on any rank: counted, saved and said."""

import json
import sys

from ..data import Pictures, Samples
from .distributed import Ranks
from .image_source import Source


class BadImages:
    """The rows of training images that could not be read and were replaced.

    Args:
        images: of the run.
        source: reads them.
        group: of ranks.
    """

    def __init__(self, images: Samples, source: Source, group: Ranks) -> None:
        self._images, self._source, self._group = images, source, group
        self._said = 0

    def rows(self) -> list[int]:
        """Those of all ranks, which each then knows; every rank must call it."""
        found = self._group.gather(json.dumps(sorted(self._source.bad)))
        self._source.bad.update(*map(json.loads, found))
        return sorted(self._source.bad)

    def entry(self) -> dict[str, int]:
        """Entry of a line of metrics, where a run reads pictures and may replace them; every rank must call it.

        Says so on stderr when there are more than before.
        """
        if not isinstance(self._images, Pictures) or self._images.on_bad_image == "error":
            return {}
        bad = self.rows()
        if len(bad) > self._said and self._group.is_main:
            print(
                f"vadiff: {len(bad):,} pictures cannot be read, others take their places; one is "
                f"{self._images.name(bad[-1])}",
                file=sys.stderr,
            )
        self._said = len(bad)
        return {"bad_images": len(bad)}

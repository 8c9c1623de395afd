"""Lists of seeds, as text and as data."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

LARGEST_SEED = 2**63 - 1  # for torch's generators
_MOST = 10_000_000  # seeds in a list, so that a slip of the pen does not fill the memory


def parse_seeds(text: str) -> list[int]:
    """The seeds of a list such as "0-63,100,200-210", in its order; a range includes both ends.

    Raises:
        ValueError: not such a list, a seed that is in it twice, one above 2**63 - 1, or more than ten million seeds.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{part!r} in {text!r}, expected seeds and ranges with commas, as 0-63,100,200-210")
        if dash and int(last) < int(first):
            raise ValueError(f"{part!r} in {text!r}, expected a range that rises, as {last}-{first}")
        if int(last or first) > LARGEST_SEED:
            raise ValueError(f"{part!r} in {text!r}, expected seeds of at most 2**63 - 1")
        if len(seeds) + int(last or first) - int(first) >= _MOST:
            raise ValueError(f"{part!r} in {text!r}, expected at most {_MOST:,} seeds")
        seeds += range(int(first), int(last or first) + 1)
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed, times in Counter(seeds).items() if times > 1)
        raise ValueError(f"seed {twice} is twice in {text!r}, expected every seed once")
    return seeds


def seeds_text(seeds: Sequence[int]) -> str:
    """The shortest text from which `parse_seeds` makes `seeds`, in their order."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)


def recorded_seeds(seeds: Sequence[int]) -> dict[str, Any]:
    """Seeds for a JSON file: `images` and `first_seed`, and `seeds` as text if they are not consecutive."""
    text = {} if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))) else {"seeds": seeds_text(seeds)}
    return {"images": len(seeds), "first_seed": seeds[0], **text}

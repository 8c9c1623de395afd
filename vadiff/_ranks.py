"""How many processes train together."""

import torch.distributed as dist


def number_of_ranks() -> int:
    """The size of the default process group; 1 where none is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

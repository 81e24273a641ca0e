"""How much ranks say to each other through the store while the groups of a layout are made."""

from __future__ import annotations

import torch.distributed as dist  # noqa: TID251  (the store is looked at)

from lmworks.parallel import world
from lmworks.parallel.layout import Layout


def entries(rank: int, layouts: list[Layout]) -> list[int]:
    """Entries of the store that each layout's groups add, as all ranks find them once all have made them."""
    store = dist.distributed_c10d._get_default_store()
    found = []
    for layout in layouts:
        dist.barrier()
        before = store.num_keys()
        dist.barrier()
        wire = world.wire(layout, world.Seat(rank=rank, world=layout.ranks))
        wire.wait()
        found.append(store.num_keys() - before)
    return found

"""What the backward pass needs waits on a disk, as much of it as the disk brings back in time.

Wu, Park, Zhang, Hidayetoglu, Mailthody, Huang, Lumetta, Hwu, "SSDTrain: An Activation Offloading Framework to SSDs for
Faster Large Language Model Training", DAC 2025, arXiv 2408.10013.

## What it does

While the forward pass runs, tensors that blocks save for their backward pass are written to NVMe (or host memory) by
threads, and leave memory. They are read back just before the backward pass comes to them. A planner measures one step
and picks how many blocks, from the first on, can go out so that nobody waits. Losses and gradients are those of `keep`,
to the bit.

## How it works

**Tensor cache.** A pair of saved-tensor hooks around each block. A storage goes out once, however many operations saved
it; views are rebuilt from shape, stride and offset. What never goes out: weights and views of them, tensors below
`least_bytes`, everything outside of blocks (embedding, final norm, head, loss), and the last block where its own
backward pass follows at once. A tensor whose write is not over when it is needed is taken from memory; a write that has
not begun is then not made. An edit in place after the save is an error.

**Stages.** A pipeline tells the cache what its rank does next. If that is the micro-batch's own backward pass, the last
block stays. If it is another one's, that one's last block is asked for while the present stage still computes. Without
a pipeline every forward pass is followed by its own backward pass.

**Plan.** All blocks go out for two steps: the first one sizes buffers, the second is measured. Block i computes t_i
seconds forward and b t_i backward (b = 2; 3 where blocks are run again) and saves V_i bytes; head and loss take `rest`
seconds in between; W is the measured rate. The paper walks forward and lets the first n with

    need(n) = (V_before + 2 V_n) / ((1 + b) sum t + rest - b t_before) > W

start the part that stays: all before n written, n written and read back, by the time backward is through n. That is
optimistic: n must be back before its own backward pass begins, and every later read has a deadline too. The strict plan
(default) takes the most blocks n for which, for every j <= n,

    max(written_n, R) + (V_j + ... + V_n) / W_read <= R + b (t_{j+1} + ... + t_last)

with R = sum t + rest, when the backward pass comes to the blocks, and written_n the end of the queue of writes, in
which a block stands from the end of its forward pass on. Ten equal blocks with t = V = 1 and W = 0.45: the paper's rule
sends seven out and a step of 30 waits 4.1; the strict one sends six and waits 0 (`plan.simulate`).

The plan, the measured rates and how long a disk of `endurance_bytes` lasts are told once. metrics.jsonl has, per step,
`offload/stored`, `loaded`, `forwarded`, `kept` (bytes), `misses` and `stalled` (seconds).

## When to use it

- When memory is short and an NVMe is near: the freed memory buys a larger micro-batch, or fewer recomputed blocks.
- All blocks go out where the disk writes and reads about V / (1.5 t), saved bytes over forward time. Below, the plan
  keeps blocks, and `around = "recompute"` sends a block's input only, a twentieth of the bytes.
- `to = "host"` beside a GPU with host memory to spare: no wear, and PCIe is faster than most disks.
- Not on a network file system, not on one in memory: both are told. A disk that is worn out within a year is told.
- Learning rate, batch and seeds stay as they are. On a CPU it shows what it saves; a step takes longer there, since the
  threads that copy are taken from those that compute.

## Differences

- Scopes are blocks; the paper also follows attention and MLP. Prefetch "block" asks for the block before, "chunk" for
  four storages, about what two leaf modules save (the paper's chunk); with the strict plan "block" asks as many blocks
  ahead as the plan needs, where the paper's code always looks one chunk ahead.
- `least_bytes` is 1 MiB; the authors' code leaves tensors below 8 Mi elements.
- Identity is the storage itself, held weakly. The authors' code names tensors by time stamp, type, shape and stride, so
  that two slices of one tensor at different offsets would be one.
- A failed write keeps the tensor and is told; there it shows as an assertion later. Files lose their names at once, so
  none are left; there they are never deleted.
- Files are written by plain system calls past the page cache; kvikio is optional (`to = "gpudirect"`).
- The time that head and loss take counts as time for writing; the last block's part in the plan follows from it.
- The simulator's `duplex` changes nothing for one forward and one backward pass: the last write is the first read.

## Limits

- `compile = true` is refused: compiled blocks save other tensors, out of the hooks' sight. So are CUDA graphs, which
  know no threads.
- The plan is of one cache: a rank's blocks, or one of its stages. Ranks that share a disk measure it together, and each
  tells its own share of the wear. In a pipeline the time between forward and backward is not counted as time.
- Saved tensors stay for gradients of gradients (`create_graph`): they are read back, and wait in memory then.
- GPUDirect was never run here: no machine with it. Its door is tested, its reads and writes are not.
- The paper's tables by model and disk are not known here, nor how its 31 % splits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, final

from torch import nn

from lmworks.core.errors import Problem
from lmworks.core.home import home
from lmworks.core.recipe import NonNegativeInt, PositiveFloat, PositiveInt, Slot
from lmworks.methods.ssdtrain.gpudirect import GpuDirect
from lmworks.methods.ssdtrain.pilot import Flight, Pilot
from lmworks.train.backends import Disk, Host
from lmworks.train.ledger import Forward, Ledger
from lmworks.train.moved import Backend
from lmworks.train.offload import TensorCache, sent
from lmworks.train.saved import Keep, refused_around
from lmworks.train.slots import Saved


@final
@dataclass(frozen=True, kw_only=True)
class SSDTrain(Saved):
    """Saved tensors wait on a disk, as many as it brings back in time (Wu et al., 2024)."""

    """While a step runs."""
    to: Literal["disk", "host", "gpudirect"] = "disk"
    """Files; pinned host memory; or files that the GPU reads and writes itself, which needs kvikio."""
    folders: tuple[str, ...] = ()
    """Where the files are, one in each folder, written in turns; none: offload/ where lmworks keeps its caches."""
    plan: Literal["strict", "paper", "all"] = "strict"
    """Which blocks go out: as many as nobody waits for; as many as the paper's rule says; all."""
    bandwidth: Literal["profile"] | PositiveFloat | tuple[PositiveFloat, PositiveFloat] = "profile"
    """Bytes a second that the plan counts on: measured in the second step; or one number; or two, out and back."""
    prefetch: Literal["block", "chunk", "off"] = "block"
    """What is read back early: whole blocks, four storages at a time (less memory, less time), or nothing."""
    least_bytes: NonNegativeInt = 1 << 20
    """Smaller tensors stay."""
    around: Annotated[Saved, Slot("saved")] = Keep()
    """What blocks save at all. Around "recompute" only their inputs go out, and blocks are run again; around "coat"
    what goes out is in eight bits."""
    threads: PositiveInt = 2
    """Threads that write, and as many that read."""
    queue_bytes: PositiveInt = 4 << 30
    """Bytes that may wait for their write at one time; what comes beyond stays, so that no disk can fall behind."""
    endurance_bytes: PositiveFloat = 600e12
    """Bytes that the disks may be written with, by their maker; 600 TB is usual for 1 TB of NVMe. Where several ranks
    write to the same disks, each one's share."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Compiled blocks save other tensors; settings without effect."""
        if recipe.compile:
            text = (
                "ssdtrain works on blocks that are not compiled. Legal: compile = false, or saved.use = keep, recompute"
            )
            yield Problem(path="compile", text=text)
        yield from refused_around(self.around)
        if self.to == "gpudirect" and recipe.device == "cpu":
            yield Problem(
                path="to", text="'gpudirect' is between a GPU and a disk, and device = 'cpu'. Legal: disk, host"
            )
        if self.to == "host":
            for field in fields(self):
                if field.name in ("folders", "endurance_bytes") and getattr(self, field.name) != field.default:
                    yield Problem(path=field.name, text="has no effect with to = 'host'")
        if self.plan == "all" and self.bandwidth != "profile":
            yield Problem(path="bandwidth", text="has no effect with plan = 'all': nothing is planned by it")
        if getattr(recipe.model, "n_layers", 2) < 2:
            text = (
                "the last block stays, and the model has one: nothing would go out. Legal: saved.use = keep, recompute"
            )
            yield Problem(path="use", text=text)

    def passes(self, block: nn.Module, name: str, books: Ledger | None = None) -> Forward:
        """As the policy inside makes it."""
        return self.around.passes(block, name, books)

    def again(self, block: int) -> bool:
        """As the policy inside says."""
        return self.around.again(block)

    def leaves(self) -> bool:
        """They do."""
        return True

    def arrange(self, blocks: Mapping[str, nn.Module], books: Ledger | None = None) -> Sequence[TensorCache]:
        """Wrap the blocks' forward; the cache that holds what went out, steered by a pilot of its own."""
        if not blocks:
            return ()
        folders = tuple(Path(folder).expanduser() for folder in self.folders) or (home() / "offload",)
        backend = self._backend(folders)
        flight = Flight(
            names=tuple(blocks),
            plan=self.plan,
            bandwidth=self.bandwidth,
            again=any(self.again(int(name)) for name in blocks),
            deeper=self.prefetch == "block",
            folders=() if self.to == "host" else folders,
            endurance=self.endurance_bytes,
        )
        pilot = Pilot(flight, _cached(backend))
        pilot.cache = cache = TensorCache(
            backend,
            books or Ledger(),
            least=self.least_bytes,
            threads=self.threads,
            ahead=self.prefetch,
            most_waiting=self.queue_bytes,
            steer=pilot.hear,
        )
        for index, (name, block) in enumerate(blocks.items()):
            forward = self.passes(block, name, books)
            block.forward = sent(forward, name, cache, first=index == 0, out=_asks(pilot, name))
        return [cache]

    def _backend(self, folders: Sequence[Path]) -> Backend:
        if self.to == "host":
            return Host()
        return Disk(folders) if self.to == "disk" else GpuDirect(folders)


def _asks(pilot: Pilot, name: str) -> Any:
    """Whether the block goes out, asked each time."""
    return lambda: pilot.goes(name)


def _cached(backend: Backend) -> list[str]:
    """What is to be said of files that cannot be written past the page cache."""
    if isinstance(backend, Disk) and not backend.direct:
        return ["the folder's file system writes through the page cache, which may fill the memory that is freed"]
    return []

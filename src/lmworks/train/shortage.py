"""Memory that is not there: what did not fit, by class, and what would.

The device's error, the C library's and Python's become one error, in one place, while what takes the memory is still
there. The changes that it offers are told from settings (`footprint.py`): only those that would free as much as is
missing, and where there is none, the ones that come nearest.
"""

from __future__ import annotations

import errno
import json
import mmap
import re
import resource
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from lmworks.core import catalogue
from lmworks.core import recipe as recipes
from lmworks.core.errors import LmworksError, OutOfMemory
from lmworks.parallel.footprint import WORDS, Footprint, as_table, in_words, predict
from lmworks.parallel.layout import Layout, problems_of
from lmworks.train.rate import memory_bytes
from lmworks.train.recipe import may_differ

WORDS_OF_ALLOCATORS = (
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "out of memory",
    "start new thread",
)
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)", re.IGNORECASE)
_UNITS = {"bytes": 0, "kib": 10, "mib": 20, "gib": 30}
SPARE = 0.1
"""Of what there is, left free by what is offered: predictions are that far off, and a run does more than steps."""
OFFERED = 3
"""Changes that an error names."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """What is known of a run's memory on one rank."""

    recipe: Any
    """Settled."""
    layout: Layout
    rank: int
    vocabulary: int
    document: float | None
    device: torch.device
    before: int
    """Bytes in use before the run was built."""
    predicted: Footprint


KEPT = 1 << 20
"""Bytes of addresses that are given up when memory is short, so that it can be told."""


@contextmanager
def explained(account: Account, doing: Callable[[], str], seen: Callable[[], Footprint | None]) -> Iterator[None]:
    """Turn an error of memory in here into OutOfMemory. `doing`: 'in step 3'; `seen`: what was measured so far."""
    kept = mmap.mmap(-1, KEPT)
    try:
        yield
    except Exception as error:
        if isinstance(error, LmworksError) or not is_shortage(error):
            raise
        kept.close()
        used, left = max(0, memory_bytes(account.device) - account.before), free(account.device)
        traceback.clear_frames(error.__traceback__)  # they hold what took the memory, and there is a run to close
        raise explanation(account, asked_by(error), used, left, doing(), seen()) from error
    finally:
        kept.close()


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory is short, of the device or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS_OF_ALLOCATORS)


def asked_by(error: BaseException) -> int:
    """Bytes that were asked for in vain, where the error tells; else 0."""
    found = _ASKED.search(str(error))
    return round(float(found[1]) * 2 ** _UNITS[found[2].lower()]) if found else 0


def explanation(account: Account, asked: int, used: int, left: int, doing: str, seen: Footprint | None) -> OutOfMemory:
    """The error that tells of it, with what would fit. Bytes: asked for in vain, in use beside the program, left."""
    known = account.predicted
    capacity = used + left
    missing = max(max(known.total, used + asked) - capacity, asked) + round(SPARE * capacity)
    what = [f"out of memory {doing}: {in_words(used)} in use beside the program, {in_words(left)} left"]
    if asked:
        what[0] += f", {in_words(asked)} more asked for"
    what += [f"  {line}" for line in as_table(known, seen)]
    largest = (seen if seen is not None else known).largest
    what.append(f"  the largest is {WORDS[largest]}; at least {in_words(missing)} must go")
    where = f"rank {account.rank}" if account.layout.ranks > 1 else None
    try:
        advice = _advice(account, missing)
    except (MemoryError, ImportError, RuntimeError):
        advice = "a smaller micro_batch_size, or saved.use = recompute; there was no memory left to work out which fits"
    return OutOfMemory("\n".join(what), where=where, next_step=advice)


def free(device: torch.device) -> int:
    """Bytes that can still be had: of the device, or of the machine and of the limit on this process."""
    if device.type == "cuda":
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + spare
    left: int = psutil.virtual_memory().available
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        left = min(left, limit - psutil.Process().memory_info().vms)
    return max(0, left)


# --- what would fit ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Change:
    """Other settings, and what they free."""

    values: dict[str, Any]
    """By path in the recipe; none: more ranks."""
    saving: int
    remark: str = ""

    def __str__(self) -> str:
        sets = " ".join(f"--set {_quoted(f'{path}={_plain(value)}')}" for path, value in self.values.items())
        said = "; ".join(part for part in (f"{in_words(self.saving)} less", self.remark) if part)
        return f"{sets}  ({said})"


def _plain(value: Any) -> str:
    """As TOML; a bare word for a text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {json.dumps(inner)}" for key, inner in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def _quoted(word: str) -> str:
    """As a shell takes it."""
    return f"'{word}'" if " " in word else word


def changes(account: Account) -> list[Change]:
    """All changes that free something, those first that change nothing else but speed."""
    found = []
    for values, remark in _candidates(account):
        changed = _changed(account, values)
        if changed is not None and (saving := _saving(account, changed)) > 0:
            goes_on = _goes_on(account.recipe, changed)
            words = remark if goes_on else "; ".join(part for part in (remark, "with --resume never") if part)
            found.append(Change(values=values, saving=saving, remark=words))
    return found


def _goes_on(recipe: Any, changed: Any) -> bool:
    """Whether a run may go on with the changed settings."""
    free = may_differ(changed, recipe)
    paths = recipes.differences(recipes.table_of(changed), recipes.table_of(recipe))
    return all(path.partition(".")[0] in free for path in paths)


def _advice(account: Account, missing: int) -> str:
    every = changes(account)
    fitting = _one_of_a_kind([change for change in every if change.saving >= missing])[:OFFERED]
    if fitting:
        title = "any of these would fit:" if len(fitting) > 1 else "this would fit:"
        return "\n".join([title, *(f"    {change}" for change in fitting), f"    {_AGAIN}"])
    nearest = sorted(every, key=lambda change: -change.saving)[:OFFERED]
    if not nearest:
        return "no setting of this recipe would free as much: take a smaller model, or a device with more memory"
    title = "no single change frees as much; these come nearest, and can be combined:"
    return "\n".join([title, *(f"    {change}" for change in nearest), f"    {_AGAIN}"])


_AGAIN = "and the same command otherwise: it goes on from the last checkpoint, where there is one"


def _one_of_a_kind(found: list[Change]) -> list[Change]:
    """Of changes of the same settings the first, which changes least."""
    kinds: dict[tuple[str, ...], Change] = {}
    for change in found:
        kinds.setdefault(tuple(sorted(change.values)), change)
    return list(kinds.values())


def _candidates(account: Account) -> Iterator[tuple[dict[str, Any], str]]:
    """Settings that may be changed, in the order in which a person would: speed first, then what is learned."""
    recipe, layout = account.recipe, account.layout
    own = recipe.batch_size // layout.size("batch")
    micro = min(recipe.micro_batch_size or own, own)
    smaller = [micro // 2**k for k in range(1, micro.bit_length())]
    yield from (({"micro_batch_size": rows}, "") for rows in smaller)
    yield {"saved.use": "recompute", "saved.keep": "products"}, ""
    yield {"saved.use": "recompute"}, "about a third more work"
    for name, part in catalogue.SLOTS["saved"].parts.items():
        if name not in ("keep", "recompute"):
            yield {"saved.use": name}, part.line
    for rows in smaller:
        yield {"micro_batch_size": rows, "saved.use": "recompute"}, ""
    if layout.size("dp_shard") > 1 or layout.ranks == 1:
        yield {"layout.dp_shard": 2 * layout.size("dp_shard")}, "twice the ranks, each with memory of its own"
    if layout.masters:
        yield {"layout.state.weights": 2 * layout.size("weights")}, "weights are gathered from twice the ranks"
    yield {"precision": "bf16"}, "activations are rounded"
    for name, part in catalogue.SLOTS["optimizer"].parts.items():
        if name != catalogue.name_of(recipe.optimizer):
            yield {"optimizer.use": name, "optimizer.around": recipes.table_of(recipe.optimizer)}, part.line
            yield {"optimizer.use": name, "optimizer.lr": recipe.optimizer.core().lr}, f"another optimizer: {part.line}"


def _changed(account: Account, values: dict[str, Any]) -> Any:
    """The recipe with other settings; None where they cannot be."""
    try:
        changed = recipes.decode(recipes.with_values(recipes.table_of(account.recipe), values))
    except LmworksError:
        return None
    return changed if isinstance(changed.layout, Layout) and not problems_of(changed) else None


def _saving(account: Account, changed: Any) -> int:
    """Bytes that other settings free, as far as both sides are known."""
    try:
        told = predict(changed, changed.layout, account.rank, vocabulary=account.vocabulary, document=account.document)
    except LmworksError:
        return 0
    pairs = [(now, told.by_class()[name]) for name, now in account.predicted.by_class().items()]
    return sum(now - then for now, then in pairs if now is not None and then is not None)

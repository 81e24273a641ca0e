"""Checkpoints: safetensors and JSON, nothing pickled, written so that a kill at any moment loses at most the newest.

    checkpoints/step-00000100/
        model.safetensors       weights by parameter name
        optimizer.safetensors   'parameter name/state name'
        selector.safetensors    what the selector remembers
        random.safetensors      generator states as bytes
        missed.safetensors      what codes of gradients missed, where it is fed back: by rank, for the same layout
        state.json              step, tokens, data position, watchers, ...
        manifest.json           size and SHA-256 of each file above; written last: a folder without it is not complete

Everything is written into a hidden temporary folder, synced, and renamed.

Of several ranks each writes what it holds, model-00002-of-00004.safetensors and so on, with the place of each piece in
the file's header. Nobody gathers anything: every rank leaves a list of its files, and the first one writes the manifest
when all lists are there. Any other number of ranks can read them, and take its own pieces.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lmworks.core import files
from lmworks.core.errors import CheckpointError
from lmworks.core.recipe import differences
from lmworks.model.checkpoint import refused, verify
from lmworks.model.pieces import Box, Pieces, header

FORMAT = 2
TENSOR_FILES = ("model", "optimizer", "selector", "random", "missed")
PATIENCE_MINUTES = 30
"""How long the first rank waits for the others' files."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a run needs to go on: tensors by file (`TENSOR_FILES`) and a JSON state."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]
    boxes: Mapping[str, Mapping[str, Box]] = field(default_factory=dict)
    """By file and name, where a tensor lies in the whole one; those that are not named are whole."""


def write(
    folder: Path, snapshot: Snapshot, seat: tuple[int, int] = (0, 1), *, until: Callable[[], float] = lambda: math.inf
) -> None:
    """Write what one of the ranks holds, every file synced, and the list of it; the first rank adds the manifest when
    all lists are there, for which it waits no longer than `until()` by the monotonic clock."""
    rank, ranks = seat
    folder.mkdir(parents=True, exist_ok=ranks > 1)
    suffix = "" if ranks == 1 else f"-{rank + 1:05d}-of-{ranks:05d}"
    try:
        listed = _write_files(folder, snapshot, suffix=suffix, with_state=rank == 0)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # a full disk may take no word either; the others learn it before the next save
            files.write_json(folder / f"failed-{rank}.json", {"why": files.why_not_written(error)})
        raise
    files.write_json(folder / f"listed-{rank}.json", listed)
    if rank == 0:
        files.write_json(folder / "manifest.json", {"format": FORMAT, "files": _joined(folder, ranks, until)})
        files.sync(folder)


def _joined(folder: Path, ranks: int, until: Callable[[], float]) -> dict[str, Any]:
    """The lists of all ranks, which are waited for. Raises OSError when one could not write."""
    began = time.monotonic()
    listed: dict[str, dict[str, Any]] = {}
    for rank in range(ranks):
        path = folder / f"listed-{rank}.json"
        while not path.exists():
            failed = list(folder.glob("failed-*.json"))
            if failed:
                why = json.loads(failed[0].read_text(encoding="utf-8"))["why"]
                raise OSError(f"rank {failed[0].stem.partition('-')[2]}: {why}")
            if time.monotonic() > min(until(), began + 60 * PATIENCE_MINUTES):
                raise OSError(f"rank {rank} has not written its part in {time.monotonic() - began:.0f} seconds")
            time.sleep(0.02)
        listed |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    return dict(sorted(listed.items()))


def _write_files(folder: Path, snapshot: Snapshot, *, suffix: str, with_state: bool) -> dict[str, dict[str, Any]]:
    """The files of a snapshot, synced; their sizes and hashes by name."""
    written = []
    for name, tensors in snapshot.tensors.items():
        if suffix and not tensors:
            continue
        path = folder / f"{name}{suffix}.safetensors"
        places = header(snapshot.boxes.get(name, {}))
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path, metadata=places or None)
        files.sync(path)
        written.append(path)
    if with_state:
        path = folder / "state.json"
        files.write_json(path, snapshot.state)
        written.append(path)
    return {path.name: {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)} for path in written}


class Stored:
    """A checkpoint on disk. Of several ranks each verifies its share of the files.

    Raises CheckpointError that names the damaged file and the checkpoint before it.
    """

    def __init__(self, folder: Path, seat: tuple[int, int] = (0, 1)) -> None:
        manifest = verify(folder, [])
        if manifest.get("format") != FORMAT:
            raise refused(folder, f"has format {manifest.get('format')!r}; this version reads format {FORMAT}")
        names = sorted(manifest["files"])
        verify(folder, names[seat[0] :: seat[1]])
        self.folder = folder
        self._names = names
        self.state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))

    def pieces(self, kind: str) -> Pieces:
        """The tensors of one of `TENSOR_FILES`; none where there is no such file."""
        suited = (f"{kind}.", f"{kind}-")
        return Pieces([self.folder / n for n in self._names if n.endswith(".safetensors") and n.startswith(suited)])


def read(folder: Path) -> Snapshot:
    """Read and verify a whole checkpoint. Raises CheckpointError as `Stored` does."""
    stored = Stored(folder)
    return Snapshot(tensors={kind: stored.pieces(kind).all() for kind in TENSOR_FILES}, state=stored.state)


Shapes = Mapping[str, tuple[int, ...]]


def must_fit(found: Shapes, wanted: Shapes, *, where: str) -> None:
    """Raise CheckpointError when names or shapes of a checkpoint are not those of the model."""
    lines = [f"missing: {name}" for name in wanted if name not in found]
    lines += [f"not in this model: {name}" for name in found if name not in wanted]
    lines += [
        f"{name}: {list(found[name])} there, {list(wanted[name])} in this model"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    if lines:
        shown = "; ".join(lines[:6]) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")
        raise CheckpointError(
            f"is of another model ({shown})", where=where, next_step="use the recipe it was made with"
        )


def must_be_the_same_parts(found: Mapping[str, Any], wanted: Mapping[str, Any], *, where: str) -> list[str]:
    """Raise CheckpointError unless the same parts stand in every slot; the settings of theirs that differ."""
    names = {slot: [[one["use"] for one in _listed(table[slot])] for table in (found, wanted)] for slot in wanted}
    others = [
        f"{slot}: {', '.join(there) or 'none'} there, {', '.join(here) or 'none'} in this recipe"
        for slot, (there, here) in names.items()
        if there != here
    ]
    if others:
        step = "use the parts it was made with; to begin from its weights alone: model.use = 'pretrained'"
        raise CheckpointError(f"is of another recipe ({'; '.join(others)})", where=where, next_step=step)
    return [
        f"{slot}.{path} {there!r} -> {here!r}"
        for slot in wanted
        for ours, theirs in zip(_listed(wanted[slot]), _listed(found[slot]), strict=True)
        for path, (here, there) in differences(ours, theirs).items()
    ]


def _listed(table: Any) -> list[dict[str, Any]]:
    return table if isinstance(table, list) else [table]


def random_state() -> dict[str, Tensor]:
    """States of torch's default generators, as byte tensors."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Put torch's default generators back."""
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        if name.startswith("cuda:") and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[5:]))

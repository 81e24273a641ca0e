"""lmworks probe: measure what the links between machines carry, for planners to read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def probe(
    out: Annotated[Path, typer.Option("--out", help="The file to write; one that is there is gone on with.")],
    local: Annotated[int | None, typer.Option("--local", min=1, help="Start so many ranks on this machine.")] = None,
    ranks_per_machine: Annotated[
        int | None, typer.Option(min=1, help="Count a host as several machines, of so many ranks each. For trying it.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the messages that bandwidth is measured with.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Messages of each kind; the median counts.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the file's content.")] = False,
) -> None:
    """Measure latency and bandwidth between each two machines, one way and both ways at once, and inside of them.

    Start it as the run will be started: under torchrun on all machines, or here with --local. Each round is written
    before the next begins. Rank 0's machine writes.

    Example: lmworks probe --local 2 --ranks-per-machine 1 --megabytes 1 --out links.json
    """
    words = ["probe", "--out", str(out), "--device", device, "--megabytes", str(megabytes), "--repeats", str(repeats)]
    words += ["--ranks-per-machine", str(ranks_per_machine)] if ranks_per_machine else []
    if local is not None:
        _start(local, words + (["--json"] if as_json else []))
        return
    from lmworks.cli.console import answer, say
    from lmworks.core.errors import UsageError
    from lmworks.parallel import probe as probing
    from lmworks.parallel import world
    from lmworks.parallel.layout import Layout

    place = world.seat()
    each = ranks_per_machine or place.local_world
    if place.world % each or place.local_world % each:
        text = f"{each} ranks do not share {place.local_world} ranks of a host, {place.world} in all"
        raise UsageError(text, where="--ranks-per-machine", legal=f"a divisor of {place.local_world}")
    if place.world == 1:
        raise UsageError("one rank has nobody to send to", next_step="lmworks probe --local 2 --out links.json")
    where = world.device_of(_kind(device), place)
    with world.connected(place, where, patience=probing.PATIENCE):
        wire = world.wire(Layout(dp_shard=place.world), place)
        size = megabytes << 20
        start = probing.begin(
            wire, world.machine(place, each), each, out, where, flops=_flops(where), message_bytes=size
        )
        run = probing.Probe(
            wire=wire,
            device=where,
            path=out,
            repeats=repeats,
            note=say if place.first else lambda text: None,
        )
        found = run.run(start)
    if place.first:
        import dataclasses

        answer(dataclasses.asdict(found), as_json=as_json, text=found.as_table())


def _kind(device: str) -> str:
    """'cpu' or 'cuda'."""
    import torch

    from lmworks.core.errors import UsageError

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"no device is called '{device}'", where="--device", legal="auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch sees no GPU here", where="--device", legal="auto, cpu")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _flops(device: object) -> float:
    """FLOP/s of products on this rank, in the precision that training takes here."""
    import torch

    from lmworks.model.ops import bf16_is_fast
    from lmworks.train.rate import peak_flops

    assert isinstance(device, torch.device)
    return peak_flops(device, torch.bfloat16 if bf16_is_fast(device) else torch.float32)[0]


def _start(ranks: int, words: list[str]) -> None:
    """The same command on several ranks of this machine."""
    import sys
    import tempfile

    from lmworks.cli.console import say
    from lmworks.parallel.launch import Launch, launch

    with tempfile.TemporaryDirectory(prefix="lmworks-probe-") as logs:
        launch(lambda restart: [sys.executable, "-m", "lmworks", *words], Launch(ranks=ranks, logs=Path(logs)), say)

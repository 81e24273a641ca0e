"""Moments of an optimizer that are held coded between steps, and decoded a bucket at a time while it steps.

The optimizer inside is any of torch's kind: its state tensors of a parameter's shape are taken away after each step,
coded, and given back decoded before the next. It uses its new moments before they are coded.

A checkpoint holds codes as they are. Numbers that belong to a group of values are laid out along the last dim, one for
each run of values that no cut of the tensor can divide; so other ranks can take their part, and those with the same cut
go on to the bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from lmworks.core.errors import CheckpointError
from lmworks.parallel.shard import like, local
from lmworks.train.optim import TorchUpdate
from lmworks.train.probe import Probe
from lmworks.train.slots import Update

BUCKET = 1 << 24
"""Values whose state is decoded at once; a larger parameter is a bucket of its own."""
SETTINGS = "codec/settings"
SECOND = frozenset({"exp_avg_sq", "v", "curvature"})
"""Names of second moments; all other state of a parameter's shape is a first moment."""

Code = dict[str, Tensor]
"""What stands for a tensor: 'codes' in its shape, and vectors with one entry for each group of its values."""


class Codec(ABC):
    """How a state tensor is kept between steps. `order`: 0 for a first moment, 1 for a second."""

    group: int = 1
    """Values, in flattened order, that share an entry of each vector."""

    @abstractmethod
    def encode(self, x: Tensor, order: int) -> Code:
        """What is kept of x (any shape)."""

    @abstractmethod
    def decode(self, codes: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """x again, for vectors that broadcast against the codes: float32 (float64 where nothing was lost)."""

    @abstractmethod
    def settings(self) -> list[float]:
        """What must be the same when codes are taken back."""


@final
class Exact(Codec):
    """Keeps tensors as they are."""

    def encode(self, x: Tensor, order: int) -> Code:
        """x itself."""
        return {"codes": x}

    def decode(self, codes: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """x itself."""
        return codes

    def settings(self) -> list[float]:
        """None."""
        return []


def unpacked(codec: Codec, code: Code) -> Tensor:
    """The tensor that a code stands for."""
    codes, shape = code["codes"], code["codes"].shape
    vectors = {name: x for name, x in code.items() if name != "codes"}
    if not vectors:
        return codec.decode(codes, {})
    rows = torch.nn.functional.pad(codes.reshape(-1).view(torch.uint8), (0, -codes.numel() % codec.group))
    wide = codec.decode(rows.view(codes.dtype).view(-1, codec.group), {name: x[:, None] for name, x in vectors.items()})
    return wide.flatten()[: codes.numel()].view(shape)


def run_of(codec: Codec, shape: Sequence[int]) -> int:
    """Values along the last dim that lie in one group wherever a tensor of this shape is cut: what a checkpoint keeps
    an entry for. Matrices are cut by rows, or by columns into equal parts; a vector may be cut anywhere."""
    return math.gcd(codec.group, shape[-1]) if len(shape) > 1 else 1


def spread(codec: Codec, code: Code) -> Code:
    """A code whose vectors have the shape of the codes, but one entry for each run along the last dim."""
    shape = code["codes"].shape
    run = run_of(codec, shape)
    lengths = (*shape[:-1], shape[-1] // run)

    def laid_out(x: Tensor) -> Tensor:
        return x.repeat_interleave(codec.group // run)[: math.prod(lengths)].view(lengths).contiguous()

    return {name: x if name == "codes" else laid_out(x) for name, x in code.items()}


def gathered(codec: Codec, code: Code) -> Code | None:
    """What `spread` gave, with one entry for each group again; None where the runs of a group do not agree.

    They do not where the codes were made of another cut of the tensor.
    """
    run = code["codes"].shape[-1] // next((x.shape[-1] for x in code.values() if x is not code["codes"]), 1)
    if codec.group % run:
        return None
    own = {name: x if name == "codes" else x.flatten()[:: codec.group // run].clone() for name, x in code.items()}
    again = {name: x.repeat_interleave(codec.group // run) for name, x in own.items() if name != "codes"}
    same = all(torch.equal(x[: code[name].numel()], code[name].flatten()) for name, x in again.items())
    return own if same else None


@final
class CodedUpdate(Update):
    """Another update whose moments are coded between steps.

    Buckets where the inner one is a plain TorchUpdate; one that looks over all parameters at once is stepped whole.
    `shadow`: exact moments go along beside, and every step notes how far the coded ones are from them.
    """

    def __init__(self, inner: Update, codec: Codec, *, bucket: int = BUCKET, shadow: bool = False) -> None:
        self._inner, self._codec = inner, codec
        self._optimizers = inner.optimizers()
        self._bucket = bucket if isinstance(inner, TorchUpdate) else None
        self._codes: dict[nn.Parameter, dict[str, Code]] = {}
        self._owner = {p: o for o in self._optimizers for group in o.param_groups for p in group["params"]}
        self._shadow: dict[nn.Parameter, dict[str, Tensor]] | None = {} if shadow else None

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """Those of the inner update."""
        return self._optimizers

    def set_lr(self, factor: float) -> float:
        """Set every group's rate to `factor` times its own; returns the first group's rate."""
        return self._inner.set_lr(factor)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self._inner.zero_grad()

    def held_bytes(self) -> int:
        """Bytes of codes and of what is not coded; a shadow is there to measure, and not counted."""
        codes = sum(x.nbytes for codes in self._codes.values() for code in codes.values() for x in code.values())
        return codes + self._inner.held_bytes()

    def step(self, probe: Probe) -> None:
        """Decode, step, encode. Gradients are finite, `guard` has seen to it: one NaN would spoil a whole group."""
        if self._bucket is None:
            parameters = list(self._owner)
            self._decode(parameters)
            self._inner.step(probe)
            self._encode(parameters)
        else:
            for optimizer, part in self._buckets(self._bucket):
                self._follow(optimizer, part)
                self._decode(part)
                optimizer.step()
                self._encode(part)
        if self._shadow is not None:
            self._note_drift(probe)

    def _buckets(self, most: int) -> Iterator[tuple[torch.optim.Optimizer, list[nn.Parameter]]]:
        """Each optimizer, as it sees some parameters of one group and no others."""
        for optimizer in self._optimizers:
            groups = list(optimizer.param_groups)
            try:
                for group in groups:
                    whole = group["params"]
                    optimizer.param_groups[:] = [group]
                    for part in buckets(whole, most):
                        group["params"] = part
                        yield optimizer, part
                    group["params"] = whole
            finally:
                optimizer.param_groups[:] = groups

    def _decode(self, parameters: Sequence[nn.Parameter]) -> None:
        for p in parameters:
            for key, code in self._codes.pop(p, {}).items():
                self._owner[p].state[p][key] = like(p, unpacked(self._codec, code))

    def _encode(self, parameters: Sequence[nn.Parameter]) -> None:
        for p in parameters:
            for key, x in self._taken(p).items():
                self._codes.setdefault(p, {})[key] = self._codec.encode(local(x), int(key in SECOND))

    def _taken(self, p: nn.Parameter) -> dict[str, Tensor]:
        """The moments of a parameter, taken away from its optimizer."""
        state = self._owner[p].state[p]
        keys = [key for key, x in state.items() if isinstance(x, Tensor) and x.ndim and x.shape == p.shape]
        return {key: state.pop(key) for key in keys}

    # --- exact moments beside -----------------------------------------------------------------------------------------

    def _follow(self, optimizer: torch.optim.Optimizer, part: Sequence[nn.Parameter]) -> None:
        """Let exact moments take the gradients too: by a step at rate 0, which leaves the weights as they are."""
        if self._shadow is None:
            return
        before = {p: {key: x.clone() for key, x in optimizer.state[p].items()} for p in part}  # counts of steps
        for p in part:
            optimizer.state[p].update(self._shadow.pop(p, {}))
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for p in part:
            self._shadow[p] = self._taken(p)
            optimizer.state[p] = before[p]

    def _note_drift(self, probe: Probe) -> None:
        """How far coded moments are from exact ones, relative to their size: all first moments, all second ones, and
        Adam's direction m / (sqrt(v) + 1e-8) where there are both."""
        sums: dict[str, Tensor] = {}
        for p, exact in (self._shadow or {}).items():
            pairs = {}
            for key, x in exact.items():
                kind = "second" if key in SECOND else "first"
                pairs[kind] = unpacked(self._codec, self._codes[p][key]), local(x)
            if len(pairs) == 2:
                moments = zip(pairs["first"], pairs["second"], strict=True)
                ours, theirs = (m / (v.sqrt() + 1e-8) for m, v in moments)
                pairs["direction"] = ours, theirs
            for kind, (ours, theirs) in pairs.items():
                squares = torch.stack([(ours - theirs).square().sum(), theirs.square().sum()]).double()
                sums[kind] = sums[kind] + squares if kind in sums else squares
        for kind, (error, size) in sums.items():
            probe.note(f"codec/{kind}_error", (error / size).sqrt())

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Codes under 'parameter name/state name.part', and what is not coded as the inner update has it."""
        found = {**self._inner.state(), SETTINGS: torch.tensor(self._codec.settings(), dtype=torch.float64)}
        for name, p in self._named().items():
            for key, code in self._codes.get(p, {}).items():
                found |= {f"{name}/{key}.{part}": x for part, x in spread(self._codec, code).items()}
            for key, x in (self._shadow or {}).get(p, {}).items():
                found[f"{name}/{key}.shadow"] = local(x)
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` gave, here or on other ranks. Raises CheckpointError for another codec's."""
        self._must_be_ours(state)
        named = self._named()
        coded: dict[tuple[str, str], Code] = {}
        plain: dict[str, Tensor] = {}
        for full, x in state.items():
            name, _, key = full.rpartition("/")
            key, dot, part = key.partition(".")
            if dot and name not in named:
                raise _refused(f"it holds {name}, which this one does not train")
            if dot:
                coded.setdefault((name, key), {})[part] = x.to(named[name].device)
            elif full != SETTINGS:
                plain[full] = x
        shadows = {place: code.pop("shadow") for place, code in coded.items() if "shadow" in code}
        values = {f"{name}/{key}": self._loaded(named[name], code) for (name, key), code in coded.items()}
        self._inner.load({**plain, **values})
        self._codes = {}
        self._encode(list(named.values()))
        for (name, key), code in coded.items():
            kept = gathered(self._codec, code)
            if kept is not None:  # cut as here: to the bit
                self._codes[named[name]][key] = kept
        if self._shadow is not None:
            for (name, key), x in shadows.items():
                self._shadow.setdefault(named[name], {})[key] = like(named[name], x)

    def _must_be_ours(self, state: Mapping[str, Tensor]) -> None:
        wanted = torch.tensor(self._codec.settings(), dtype=torch.float64)
        if SETTINGS not in state:
            raise _refused("its state is not coded")
        if not torch.equal(state[SETTINGS].cpu(), wanted):
            raise _refused(f"codec settings are {state[SETTINGS].tolist()} there, {wanted.tolist()} here")

    def _loaded(self, parameter: nn.Parameter, code: Code) -> Tensor:
        """The values of a code that was spread: of any cut of the tensor."""
        shape = local(parameter).shape
        if code["codes"].shape != shape:
            raise _refused(f"codes of {list(code['codes'].shape)} for a part of {list(shape)}")
        vectors = {name: x for name, x in code.items() if name != "codes"}
        wide = {name: x.repeat_interleave(shape[-1] // max(1, x.shape[-1]), -1) for name, x in vectors.items()}
        return self._codec.decode(code["codes"], wide)

    def _named(self) -> dict[str, nn.Parameter]:
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        return {n: p for group in groups for n, p in zip(group["names"], group["params"], strict=True)}


def buckets(parameters: Sequence[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """The parameters, in order, in runs of at most `most` values; a larger one is a run of its own."""
    found: list[list[nn.Parameter]] = [[]]
    held = 0
    for p in parameters:
        if found[-1] and held + local(p).numel() > most:
            found.append([])
            held = 0
        found[-1].append(p)
        held += local(p).numel()
    return found


def _refused(what: str) -> CheckpointError:
    return CheckpointError(
        f"the state is of another optimizer: {what}", next_step="use the optimizer that it was made with"
    )

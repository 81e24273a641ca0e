"""From a decoded recipe to the objects of a run: device, data, model, optimizer, step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmworks.core.cost import Cost
from lmworks.core.errors import Problem, RecipeError
from lmworks.core.seeds import seed_for
from lmworks.data.prepared import Prepared
from lmworks.data.tokenizer import Tokenizer, load_tokenizer
from lmworks.model.backbone import Backbone
from lmworks.model.init import first_value
from lmworks.model.ops import bf16_is_fast
from lmworks.model.pieces import Box
from lmworks.model.pretrained import Pretrained
from lmworks.parallel import readers
from lmworks.parallel.apply import Placement, place
from lmworks.parallel.footprint import predict
from lmworks.parallel.layout import problems_of
from lmworks.parallel.wire import Wire, alone
from lmworks.train import precision
from lmworks.train.ledger import Ledger
from lmworks.train.memory import keep_freed_memory, return_freed_memory
from lmworks.train.offload import TensorCache, hints
from lmworks.train.probe import Probe
from lmworks.train.rate import memory_bytes
from lmworks.train.recipe import Train
from lmworks.train.shortage import Account, explained
from lmworks.train.step import Step
from lmworks.train.update_size import UpdateSize


@dataclass(frozen=True, kw_only=True)
class Built:
    """Everything a run is made of."""

    recipe: Train
    prepared: Prepared
    placement: Placement
    step: Step
    cost: Cost
    dtype: torch.dtype
    account: Account
    """What is known of this rank's memory: told before anything was made."""
    notes: tuple[str, ...] = ()
    """What people should know about it, in sentences."""

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.placement.device

    @property
    def wire(self) -> Wire:
        """How this rank speaks to the others."""
        return self.placement.wire


def settle(recipe: Train, world: int = 1) -> Train:
    """The recipe with every 'auto' replaced by what it means on this machine, and the layout by that of `world` ranks.

    Raises RecipeError for a missing GPU, and for ranks that cannot be laid out so.
    """
    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            [Problem(path="device", text="'cuda' was asked for, but torch sees no GPU here. Legal: cpu, auto")]
        )
    kind = recipe.precision
    if kind == "auto":
        kind = "bf16" if bf16_is_fast(torch.device(device)) else "fp32"
    layout = recipe.layout.settle(world, recipe)
    settled = dataclasses.replace(recipe, device=device, precision=kind, layout=layout)
    if problems := [*problems_of(settled), *precision.problems_of(settled)]:
        raise RecipeError(problems)
    return settled


def build(
    recipe: Train,
    wire: Wire | None = None,
    *,
    device: torch.device | None = None,
    resume: dict[str, Any] | None = None,
    progress: Callable[..., None] | None = None,
) -> Built:
    """Prepare the data, build and place the model, wire the step. `recipe` must be settled.

    `wire`: how this rank speaks to the others; left out, it is the only one. `resume` is the source's state in the
    checkpoint that is to go on: changed documents are refused before anything is made.
    """
    wire, device = wire or alone(), device or torch.device(recipe.device)
    dtype = precision.compute_dtype(recipe.precision)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    if device.type == "cpu":
        (return_freed_memory if recipe.saved.leaves() else keep_freed_memory)()
    torch.manual_seed(seed_for(recipe.seed, "torch"))  # for whatever draws without a generator of its own
    if isinstance(recipe.model, Pretrained):
        recipe.model.blocks()  # a folder that cannot be read is told before documents are tokenised
    prepared = _prepare(recipe, wire, resume, progress)
    config = fit_vocabulary(recipe.model, prepared.tokenizer)
    account = _account(recipe, wire, device, prepared, config)
    with explained(account, lambda: "while the model was built", lambda: None):
        placement, step, notes = _place(recipe, wire, device, dtype, prepared, config)
    cost = config.cost(sequence=recipe.data.sequence_length, bytes_per_value=dtype.itemsize)
    return Built(
        recipe=recipe,
        prepared=prepared,
        placement=placement,
        step=step,
        cost=cost,
        dtype=dtype,
        account=account,
        notes=tuple(notes),
    )


def _account(recipe: Train, wire: Wire, device: torch.device, prepared: Prepared, config: Any) -> Account:
    """What this rank will take, and what was there before."""
    sources = prepared.manifest["sources"].values()
    whole = sum(facts["weight"] for facts in sources)
    splits = [(facts["weight"] / whole, facts["splits"]["training"]) for facts in sources]
    document = max(1.0, sum(share * split["tokens"] / max(1, split["documents"]) for share, split in splits))
    told = predict(recipe, wire.layout, wire.rank, vocabulary=config.vocab_size, document=document)
    return Account(
        recipe=recipe,
        layout=wire.layout,
        rank=wire.rank,
        vocabulary=config.vocab_size,
        document=document,
        device=device,
        before=memory_bytes(device),
        predicted=told,
    )


def _place(
    recipe: Train, wire: Wire, device: torch.device, dtype: torch.dtype, prepared: Prepared, config: Any
) -> tuple[Placement, Step, list[str]]:
    """The model on its ranks, with first values, the step around it, and what people should know of both."""
    books = Ledger()
    caches: list[Sequence[TensorCache]] = []
    notes: list[str] = []

    def arrange(chunk: Backbone) -> None:
        """How blocks multiply, what they keep for the backward pass, and their compiled form."""
        notes.extend(precision.arrange(chunk, recipe.precision))
        caches.append(recipe.saved.apply(chunk, None if recipe.compile else books))
        if recipe.compile:
            chunk.compile_blocks()

    placement = place(config, wire, device, dtype=dtype, sequence=recipe.data.sequence_length, arrange=arrange)
    placement.fill(_first_values(recipe, config))
    if placement.pipeline is not None and any(caches):
        placement.pipeline.on_stage = hints(dict(zip(placement.pipeline.stages, caches, strict=True)))
    model = placement.model
    micro_rows = recipe.micro_batch_size or recipe.batch_size // placement.share[1]
    probe = Probe(model, recipe.objective, seed=seed_for(recipe.seed, "probe"), micro_rows=micro_rows)
    selector = recipe.selector.start(model, recipe.optimizer.core(), recipe.data.shares)
    rows = -(-selector.candidates(recipe.batch_size) // placement.share[1])
    sharing, remarks = readers.appoint(wire, device, rows=rows, length=recipe.data.sequence_length)
    step = Step(
        placement=placement,
        source=prepared.train(share=placement.share, pin=device.type == "cuda", sharing=sharing),
        selector=selector,
        objective=recipe.objective,
        gradient=recipe.gradient,
        update=recipe.optimizer.build(model),
        probe=probe,
        rows=recipe.batch_size,
        micro_rows=micro_rows,
        books=books,
        caches=[cache for found in caches for cache in found],
        around_update=_measured(recipe, model, probe),
    )
    recipe.data.must_last(prepared, recipe.steps * step.selector.candidates(step.rows))
    return placement, step, [*notes, *remarks]


def _measured(recipe: Train, model: Backbone, probe: Probe) -> Callable[[], AbstractContextManager[None]]:
    """What stands around each update: a measurement of its size, as often as any watcher wants it."""
    wanted = [every for watcher in recipe.watchers if (every := watcher.sizes_update()) is not None]
    if not wanted:
        return nullcontext
    trained = [p for p in model.parameters() if p.requires_grad]
    return UpdateSize(trained, probe, every=min(wanted)).measured


def _prepare(
    recipe: Train, wire: Wire, resume: dict[str, Any] | None, progress: Callable[..., None] | None
) -> Prepared:
    """The data; the first rank of each machine makes what is missing, the others find it."""
    if not wire.first_here:
        wire.wait()
    prepared = recipe.data.prepare(seed=recipe.seed, progress=progress, resume=resume)
    if wire.first_here:
        wire.wait()
    return prepared


def _first_values(recipe: Train, config: Any) -> Callable[[str, Box], Tensor]:
    """Where weights come from: drawn by name, or those of an existing model."""
    if isinstance(config, Pretrained):
        return config.values()
    seed = seed_for(recipe.seed, "weights")
    return lambda name, box: first_value(name, box.whole, config.n_layers, seed)[box.index]


def fit_vocabulary(config: Any, tokenizer: Tokenizer) -> Any:
    """The model's config with the tokenizer's vocabulary. Raises RecipeError when the two contradict each other.

    A table may be larger than the tokenizer when it is the tokenizer's size rounded up to a multiple of 64 to 512, as
    GPUs like it, or when the model is an existing one, whose tokens must have the same ids here (else DataError).
    """
    tokens = tokenizer.vocab_size
    if isinstance(config, Pretrained) and (config.tokenizer / "tokenizer.json").is_file():
        tokenizer.must_extend(load_tokenizer(config.tokenizer), where=str(config.tokenizer))
    rounded = {-(-tokens // m) * m for m in (64, 128, 256, 512)}
    size = config.vocab_size
    if size is None:
        return config.with_vocab(tokens)
    if size == tokens or size in rounded or (size > tokens and isinstance(config, Pretrained)):
        return config
    text = f"is {size}, the tokenizer has {tokens} tokens. Legal: {tokens}, left out, or {min(rounded)} (rounded up)"
    raise RecipeError([Problem(path="model.vocab_size", text=text)])

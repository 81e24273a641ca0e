"""What a training recipe holds: the slots of the step, and the cadences of the loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from lmworks.core.errors import Problem
from lmworks.core.recipe import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Slot
from lmworks.data.packed import Packed
from lmworks.parallel.layout import Arrangement, Layout
from lmworks.train.checkpoints import Saving
from lmworks.train.gradient import Clip
from lmworks.train.metering import Metering
from lmworks.train.objective import CrossEntropy
from lmworks.train.saved import Keep
from lmworks.train.schedule import Cosine, Schedule
from lmworks.train.sinks import Sink, TensorBoard
from lmworks.train.slots import Gradient, Objective, Optimizer, Saved, SelectAll, Selecting, Watching
from lmworks.train.tracing import Tracing


@dataclass(frozen=True, kw_only=True)
class Validating:
    """When the loss on held-out documents is taken."""

    every: PositiveInt | None = None
    """Steps between validations; left out: only at the end."""
    rows: PositiveInt | None = None
    """How many rows of the held-out documents are read; left out: all of them."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """When the model is asked to go on with a text, so that a person can read how far it is."""

    every: PositiveInt | None = None
    """Steps between samples; left out: only at the end."""
    prompts: tuple[str, ...] = ()
    """Texts to go on with; none: no samples."""
    tokens: PositiveInt = 64
    """Tokens of each sample."""
    temperature: NonNegativeFloat = 0.8
    """0 takes the likeliest token."""
    top_k: NonNegativeInt = 50
    """Draw among the k likeliest tokens; 0 for all."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """A training run."""

    do: Literal["train"]
    """The verb."""
    steps: PositiveInt
    """Optimizer steps of the whole run."""
    batch_size: PositiveInt
    """Rows of one optimizer step, over all ranks and micro-batches."""
    model: Annotated[Any, Slot("model")]
    """The network: its shape, or a size by name."""
    data: Annotated[Packed, Slot("source")]
    """Documents, tokenizer, and how rows are made of them."""
    optimizer: Annotated[Optimizer, Slot("optimizer")]
    """How gradients change weights."""
    micro_batch_size: PositiveInt | None = None
    """Rows of one forward pass; left out: all rows of the step at once."""
    seed: NonNegativeInt = 0
    """Every random number of the run comes from it."""
    precision: Literal["auto", "fp32", "bf16", "float8", "float8-rowwise"] = "auto"
    """Of activations and products. Weights, gradients and optimizer state are float32 always. 'auto': bf16 where the
    hardware has products for it, else fp32; the resolved recipe says which. 'float8', 'float8-rowwise': bf16, with the
    products of the blocks' linear layers in eight bits, one scale a tensor or one a row."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """'auto': a GPU when there is one."""
    compile: bool = False
    """Compile each block with torch.compile: minutes at the start, faster steps on a GPU."""
    threads: PositiveInt | None = None
    """CPU threads; left out: as many as torch takes."""
    schedule: Annotated[Schedule, Slot("schedule")] = Cosine()
    """How the learning rate moves."""
    objective: Annotated[Objective, Slot("objective")] = CrossEntropy()
    """What is minimised."""
    selector: Annotated[Selecting, Slot("selector")] = SelectAll()
    """Which rows of a draw are trained on."""
    gradient: Annotated[tuple[Gradient, ...], Slot("gradient")] = (Clip(),)
    """What happens between backward and the update, in this order."""
    saved: Annotated[Saved, Slot("saved")] = Keep()
    """What is kept for the backward pass."""
    layout: Annotated[Arrangement, Slot("layout")] = Layout()
    """How the ranks of a run share the work."""
    watchers: Annotated[tuple[Watching, ...], Slot("watcher")] = ()
    """What looks at the run while it goes."""
    validation: Validating = Validating()
    """When held-out documents are read."""
    samples: Samples = Samples()
    """When texts are written."""
    checkpoints: Saving = Saving()
    """When the run is saved."""
    sinks: Annotated[tuple[Sink, ...], Slot("sink")] = (TensorBoard(),)
    """Where metrics go besides the run folder."""
    energy: Metering = Metering()
    """How energy is counted, and what a kWh costs."""
    trace: Tracing = Tracing()
    """How the run tells where its time goes."""
    max_minutes: PositiveFloat | None = None
    """Save and stop with exit code 3 after this time; the same command goes on."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Settings that contradict each other or have no effect."""
        micro = self.micro_batch_size
        if micro is not None and micro > self.batch_size:
            yield Problem(path="micro_batch_size", text=f"{micro} is more than batch_size {self.batch_size}")
        if self.samples.every is not None and not self.samples.prompts:
            yield Problem(path="samples.every", text="has no effect without samples.prompts")
        if not self.checkpoints.background and self.checkpoints.patience != Saving.patience:
            text = "has no effect without checkpoints.background: training waits for every write"
            yield Problem(path="checkpoints.patience", text=text)
        for name in ("every", "rows"):
            if getattr(self.validation, name) is not None and not self.data.validates:
                text = "has no effect: data.validation is 0, no documents are held out"
                yield Problem(path=f"validation.{name}", text=text)


def may_differ(now: Train, there: Train) -> tuple[str, ...]:
    """Settings that a resumed run may change: they do not touch what is learned. What is kept for the backward pass is
    one of them where neither policy rounds."""
    return (*MAY_DIFFER, "saved") if now.saved.exact() and there.saved.exact() else MAY_DIFFER


MAY_DIFFER = (
    "validation", "samples", "checkpoints", "sinks", "energy", "trace", "max_minutes", "threads", "layout",
    "micro_batch_size",
)  # fmt: skip
"""Those that hang on nothing else."""

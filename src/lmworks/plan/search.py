"""Layouts of a recipe on so many devices: all that are legal, those that fit, the best of them.

Enumerated are tp (within a node), pp, cp and its engines, how the rest is divided into dp_shard and dp_replicate, or
which placement of states its ranks take (ZeRO-1 and 2, MiCS, hpZ, and degrees for the levels of the cluster's links),
rows of a micro-batch, 1F1B (GPipe where there are fewer micro-batches than ranks) and its interleaved form, and
policies for saved tensors. Expert parallelism stays as the recipe has it, and nothing travels as codes, which changes
what is computed; the recipe's own layout, codes among it, is costed with `own`. A layout that needs more than `ROOM`
of a device's memory is refused, with its bytes by class; the rest is ranked in closed form, and the best `SIMULATED` by
the simulator. The same question has the same answer: ties go to the layout with fewer kinds of parallelism, then to the
first enumerated.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final, get_args

from lmworks.core.errors import Problem, RecipeError, UsageError
from lmworks.core.recipe import decode_part
from lmworks.maths.whole import divisors
from lmworks.parallel.footprint import WORDS, Footprint, in_words
from lmworks.parallel.layout import Engine, Layout, Schedule, problems_of
from lmworks.parallel.state import DEGREES, StatePlacement
from lmworks.plan import bill, simulate, time
from lmworks.plan.bill import Bill, Objective
from lmworks.plan.choice import Choice
from lmworks.plan.cluster import Cluster
from lmworks.plan.shape import Ground
from lmworks.plan.work import Work

ROOM = 0.9
"""Of a device's memory; the rest is for the program itself, communication, and what allocators cannot use."""
SIMULATED = 50
"""Layouts that the simulator looks at."""
CHUNKS = (2, 3, 4)
"""Stages per rank of interleaved pipelines."""
SHORTEST = 512
"""Tokens of a row that a rank of cp holds at least."""


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout that fits."""

    choice: Choice
    memory: Footprint
    """Of the rank that holds most."""
    place: int
    """Its place in the pipeline."""
    step: simulate.Step
    closed: float
    """Seconds of a step by the closed form."""
    bill: Bill
    tokens_per_second: float
    """Of all devices."""
    mfu: float
    """Model FLOPs, nothing run again counted, over the data sheet's rate."""


@final
@dataclass(frozen=True, kw_only=True)
class Refused:
    """A layout that does not fit."""

    choice: Choice
    memory: Footprint

    @property
    def why(self) -> str:
        """In words."""
        largest = self.memory.largest
        return f"needs {in_words(self.memory.total)}, most of it {WORDS[largest]}"


@final
@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a search found."""

    plans: tuple[Plan, ...]
    """The best first."""
    looked_at: int
    fitting: int
    refused: dict[str, int]
    """Layouts that do not fit, by the class that takes most of what they need."""
    nearest: Refused | None
    """The one that exceeds least, where some do not fit."""
    ground: Ground
    devices: int


def search(
    recipe: Any,
    cluster: Cluster,
    *,
    devices: int,
    objective: Objective = "time",
    region: str | None = None,
    show: int = 5,
    simulated: int = SIMULATED,
    own: bool = False,
) -> Answer:
    """The best layouts; `own`: the recipe's own one alone. Raises UsageError for what no search can answer, RecipeError
    for parts that no layout can hold and for an own layout that is not legal; an answer without plans is one in which
    nothing fits."""
    bill.check(cluster, objective, region)
    ground = Ground(recipe, cluster)
    work = Work(ground)
    room = ROOM * cluster.memory_bytes.value
    fitting: list[tuple[float, int, int, Choice]] = []
    refused: Counter[str] = Counter()
    nearest: Refused | None = None
    number = 0
    looked_at = own_choices(ground, devices) if own else choices(ground, devices)
    for number, choice in enumerate(looked_at, start=1):
        memory = _most(ground, choice, ground.places(choice), enough=room)[1]
        if memory.total > room:
            refused[memory.largest] += 1
            if nearest is None or memory.total < nearest.memory.total:
                whole = _most(ground, choice, range(choice.layout.pp))[1]
                if nearest is None or whole.total < nearest.memory.total:
                    nearest = Refused(choice=choice, memory=whole)
            continue
        seconds = time.of_step(work, choice)
        value = bill.of_run(cluster, seconds, devices=devices, steps=recipe.steps, region=region).value(objective)
        fitting.append((value, _kinds(choice.layout), number, choice))
    if number == 0:
        raise _nothing_legal(ground, devices)
    fitting.sort(key=lambda entry: entry[:3])
    plans = _looked_at(work, [choice for *_, choice in fitting], devices, region, room=room, most=simulated)
    plans.sort(key=lambda plan: (plan.bill.value(objective), _kinds(plan.choice.layout)))
    return Answer(
        plans=tuple(plans[:show]),
        looked_at=number,
        fitting=len(fitting),
        refused=dict(refused),
        nearest=nearest,
        ground=ground,
        devices=devices,
    )


def _looked_at(
    work: Work, ranked: Sequence[Choice], devices: int, region: str | None, *, room: float, most: int
) -> list[Plan]:
    """The first layouts by the simulator, held against the recipe's own checks and against all of their ranks."""
    ground = work.ground
    found: list[Plan] = []
    for choice in ranked:
        if len(found) == most:
            break
        place, memory = _most(ground, choice, range(choice.layout.pp))
        if memory.total > room or problems_of(as_recipe(ground.recipe, choice)):
            continue
        step = simulate.of_choice(work, choice)
        tokens = ground.recipe.batch_size * ground.sequence / step.seconds.total
        flops = 3 * ground.shape.cost(sequence=ground.sequence).forward_flops_per_token * tokens
        found.append(
            Plan(
                choice=choice,
                memory=memory,
                place=place,
                step=step,
                closed=time.of_step(work, choice).total,
                bill=bill.of_run(work.cluster, step.seconds, devices=devices, steps=ground.recipe.steps, region=region),
                tokens_per_second=tokens,
                mfu=flops / (devices * work.plain_peak),
            )
        )
    return found


def _most(ground: Ground, choice: Choice, places: Sequence[int], *, enough: float = math.inf) -> tuple[int, Footprint]:
    """The place whose ranks hold most, and what they hold; the first one with more than `enough`."""
    most: tuple[int, Footprint] | None = None
    for place in places:
        told = ground.footprint(choice, place)
        if most is None or told.total > most[1].total:
            most = place, told
        if told.total > enough:
            break
    assert most is not None, "a pipeline has places"
    return most


def as_recipe(recipe: Any, choice: Choice) -> Any:
    """The recipe under a choice."""
    return dataclasses.replace(recipe, layout=choice.layout, micro_batch_size=choice.rows, saved=choice.saved)


# --- what there is ----------------------------------------------------------------------------------------------------


def choices(ground: Ground, devices: int) -> Iterator[Choice]:
    """Every legal choice, in a fixed order."""
    policies = _policies(ground.recipe)
    for layout in _axes(ground, devices):
        own = ground.recipe.batch_size // layout.size("batch")
        for rows in divisors(own):
            for scheduled in _schedules(ground, layout, own // rows):
                for saved in policies:
                    yield Choice(layout=scheduled, rows=rows, micro_batches=own // rows, saved=saved)


def own_choices(ground: Ground, devices: int) -> Iterator[Choice]:
    """The recipe's own layout, micro-batch and policy. Raises RecipeError where so many ranks cannot be arranged so."""
    recipe = ground.recipe
    layout = recipe.layout.settle(devices, recipe)
    own, left = divmod(recipe.batch_size, layout.size("batch"))
    rows = min(recipe.micro_batch_size or own, own)
    problems = problems_of(dataclasses.replace(recipe, layout=layout))
    if left or own % rows or problems:
        legal = ", ".join(map(str, divisors(max(1, own))))
        text = f"{own} rows of a rank do not make micro-batches of {rows}. Legal: {legal}"
        raise RecipeError(problems or [Problem(path="micro_batch_size", text=text)])
    yield Choice(layout=layout, rows=rows, micro_batches=own // rows, saved=recipe.saved)


def _axes(ground: Ground, devices: int) -> Iterator[Layout]:
    """Degrees, without a schedule."""
    recipe, depth = ground.recipe, ground.depth
    experts = ground.recipe.layout.ep if isinstance(ground.recipe.layout, Layout) else 1
    for tp in divisors(devices):
        if not _heads_divide(ground, tp):
            continue
        for pp in divisors(devices // tp):
            for cp in divisors(devices // (tp * pp)) if pp <= depth else ():
                data, length = devices // (tp * pp * cp), ground.sequence
                fits = cp == 1 or (length % (2 * cp) == 0 and length // cp >= SHORTEST)
                if not fits or recipe.batch_size % data:
                    continue
                among = tp > 1 and length % (tp * max(1, 2 * cp if cp > 1 else 1)) == 0
                for engine in _engines(ground, tp, cp):
                    plain = Layout(
                        pp=pp, cp=cp, tp=tp, dp_shard=data, ep=experts, sequence_parallel=among, context=engine
                    )
                    yield from _shared(ground, plain, data, experts)


def _engines(ground: Ground, tp: int, cp: int) -> tuple[Engine, ...]:
    """Ways for ranks of cp to attend to each other's tokens that the model's heads allow."""
    if cp == 1:
        return ("all-gather",)
    groups = math.gcd(*(block.n_kv_heads for block in ground.sizes)) // tp
    return tuple(engine for engine in get_args(Engine) if engine != "ulysses" or groups % cp == 0)


def _shared(ground: Ground, plain: Layout, data: int, experts: int) -> Iterator[Layout]:
    """The layout with its states shared in every way."""
    for shard in divisors(data):
        if (shard * plain.cp) % experts == 0:
            yield dataclasses.replace(plain, dp_replicate=data // shard, dp_shard=shard)
    for state in _placements(ground, plain):
        yield dataclasses.replace(plain, state=state)


def _placements(ground: Ground, layout: Layout) -> list[StatePlacement]:
    """Placements of states by name, and one degree for each level of the cluster's links, where these differ."""
    ranks = layout.size("fsdp")
    if ranks == 1 or layout.ep > 1:
        return []
    joined = [(level.ranks or 0) // layout.tp for level in ground.cluster.links[:-1]]
    levels = tuple(size for size in dict.fromkeys(joined) if 1 < size < ranks and ranks % size == 0)
    found = [StatePlacement(weights=1, gradients=1, levels=levels), StatePlacement(weights=1, levels=levels)]
    for node in levels[-1:]:
        found.append(StatePlacement(weights=node, gradients=node, optimizer=node, levels=levels))
        found += [StatePlacement(weights=size, gradients=node, levels=levels) for size in levels]
        if layout.pp == layout.tp == 1:
            found.append(StatePlacement(secondary=node, levels=levels))
    return found


def _heads_divide(ground: Ground, tp: int) -> bool:
    groups = math.gcd(*(block.n_kv_heads for block in ground.sizes))
    if tp > 1 and any(block.experts for block in ground.sizes):
        return False
    return groups % tp == 0 and tp <= ground.cluster.devices_per_node and ground.vocabulary >= tp


def _schedules(ground: Ground, layout: Layout, micro_batches: int) -> Iterator[Layout]:
    """The layout under each schedule that can order its micro-batches."""
    if layout.pp == 1:
        yield layout
        return
    plain: Schedule = "1f1b" if micro_batches >= layout.pp else "gpipe"
    yield dataclasses.replace(layout, schedule=plain)
    for chunks in CHUNKS:
        if layout.pp * chunks <= ground.depth and micro_batches % layout.pp == 0:
            yield dataclasses.replace(layout, schedule="interleaved-1f1b", stages_per_rank=chunks)


def _policies(recipe: Any) -> list[Any]:
    """The recipe's own policy for saved tensors, and the plain ones that keep less or more."""
    found = [recipe.saved]
    for table in ("keep", {"use": "recompute", "keep": "products"}, "recompute"):
        policy = decode_part("saved", table)
        if policy not in found:
            found.append(policy)
    return found


def _kinds(layout: Layout) -> int:
    """Kinds of parallelism that a layout has."""
    return sum(layout.size(axis) > 1 for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp"))


def _nothing_legal(ground: Ground, devices: int) -> UsageError:
    """Why there is no layout at all."""
    rows = ground.recipe.batch_size
    most = max(d for d in range(1, devices + 1) if next(_axes(ground, d), None) is not None)
    return UsageError(
        f"no layout divides {rows} rows, {ground.depth} blocks and the heads among {devices} devices",
        where="--gpus",
        legal=f"{most} is the nearest number below that has one",
        next_step=f"--gpus {most}, or --set batch_size={-(-rows // devices) * devices}",
    )


def relaxed(answer: Answer, cluster: Cluster, recipe: Any) -> list[str]:
    """What would make something fit, the nearest first: more devices, or what takes most made smaller."""
    nearest = answer.nearest
    if nearest is None:
        return []
    room = ROOM * cluster.memory_bytes.value
    said = [f"the nearest, {described(nearest.choice)}, {nearest.why}; there is room for {in_words(int(room))}"]
    for times in (2, 4, 8, 16):
        more = answer.devices * times
        if any(_most(answer.ground, c, answer.ground.places(c))[1].total <= room for c in choices(answer.ground, more)):
            said.append(f"--gpus {more} has a layout that fits")
            break
    if nearest.memory.largest == "saved":
        length = recipe.data.sequence_length // 2
        said.append(f"--set data.sequence_length={length} halves what a row keeps")
    if nearest.memory.largest == "optimizer":
        said.append("--set optimizer.use=coat keeps its state in eight bits")
    return said


def described(choice: Choice) -> str:
    """A choice in a few words."""
    layout, words = choice.layout, []
    for axis, word in (("tp", "tp"), ("pp", "pp"), ("cp", "cp"), ("dp_shard", "shard"), ("dp_replicate", "replicate")):
        if layout.size(axis) > 1:
            words.append(f"{word} {layout.size(axis)}")
    if layout.cp > 1:
        words.append(layout.context)
    if layout.state is not None:
        words.append(placed(layout))
    if layout.ep > 1:
        words.append(f"ep {layout.ep}")
    if layout.pp > 1:
        words.append(f"{layout.schedule} x{layout.held}" if layout.held > 1 else layout.schedule)
    return ", ".join([*(words or ["one device"]), f"rows {choice.rows} x {choice.micro_batches}"])


def placed(layout: Layout) -> str:
    """A placement of states: how many ranks share weights, gradients and optimizer state, and a second copy."""
    state, ranks = layout.state, layout.size("fsdp")
    assert state is not None, "a layout with a placement of states"
    shared = "/".join(str(state.degree(name, ranks)) for name in DEGREES)
    return f"states {shared}" + (f", copy {state.secondary}" if state.secondary is not None else "")


def refuse_nothing(answer: Answer) -> None:
    """Raise RecipeError when the parts of the recipe cannot be on several ranks, which no layout changes."""
    if not answer.plans and answer.fitting:
        choice = next(choices(answer.ground, answer.devices))
        raise RecipeError(problems_of(as_recipe(answer.ground.recipe, choice)))

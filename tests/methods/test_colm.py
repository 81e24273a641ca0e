"""CoLM's arithmetic: medoids, budgets, proxies and their ranks, each against a slow form that shares no code."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmworks.methods.colm import proxies as kinds
from lmworks.methods.colm.medoids import budgets, cluster_sizes, medoids, similarity, value
from lmworks.methods.colm.proxies import History, LastBlock, Proxies
from lmworks.model.backbone import Backbone
from lmworks.model.sizes import forward_share
from lmworks.train.saved import Recompute
from tests.methods.coresets import V_PROJ, draw, numbers, probe_of, started
from tests.model.toy import built
from tests.oracles import colm as oracle
from tests.train import toy

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=14).filter(any)


def last_block(model: Backbone, *, micro_rows: int | None = None, matrix: str = "attn.v_proj") -> LastBlock:
    return LastBlock(probe=probe_of(model, micro_rows=micro_rows), layer=kinds.layer_of(model, matrix))


def dense(proxies: Proxies) -> Tensor:
    return proxies.columns(slice(None), torch.arange(proxies.rows))


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix.double(), rtol=1e-8))


# --- medoids and budgets ---------------------------------------------------------------------------------------------


def test_greedy_is_within_one_minus_one_over_e_of_the_best_on_200_cases() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        points = generator.normal(size=(10, 3)) * generator.exponential(size=(10, 1))
        alike = similarity(np.abs(points[:, None] - points[None]).sum(-1))
        found = medoids(alike, 3)
        assert value(alike, found) == pytest.approx(oracle.worth(alike, found), rel=1e-12)
        assert value(alike, found) >= (1 - 1 / math.e) * oracle.best(alike, 3)


@settings(max_examples=100)
@given(rows=st.integers(1, 24), count=st.integers(0, 24), seed=st.integers(0, 10_000), ties=st.booleans())
def test_lazy_greedy_is_plain_greedy_row_for_row(rows: int, count: int, seed: int, ties: bool) -> None:
    """Whole numbers give many ties, which the first row wins."""
    generator = np.random.default_rng(seed)
    points = generator.integers(0, 3, (rows, 2)).astype(float) if ties else generator.normal(size=(rows, 5))
    alike = similarity(np.abs(points[:, None] - points[None]).sum(-1))
    count = min(rows, count)
    found = medoids(alike, count)
    assert found == oracle.greedy(alike, count)
    if count:
        sizes = cluster_sizes(alike, found)
        assert sum(sizes) == rows
        assert min(sizes) >= 1


def test_a_row_belongs_to_the_nearest_medoid() -> None:
    places = np.array([[0.0], [1.0], [10.0], [11.0], [12.0], [30.0]])
    alike = similarity(np.abs(places - places.T))
    assert cluster_sizes(alike, [1, 3, 5]) == [2, 3, 1]


@given(counts=COUNTS, share=st.floats(0, 1))
def test_budgets_add_up_and_nobody_gives_more_than_it_has(counts: list[int], share: float) -> None:
    total = int(share * sum(counts))
    found = budgets(counts, total)
    assert sum(found) == total
    assert all(0 <= b <= n for b, n in zip(found, counts, strict=True))
    assert found == oracle.budgets(counts, total)
    floors = [n * total // sum(counts) for n in counts]
    assert all(b >= f for b, f in zip(found, floors, strict=True))


def test_what_is_left_goes_to_the_smallest_budgets_and_a_lone_row_is_kept() -> None:
    assert budgets([1, 20], 10) == [1, 9]
    assert budgets([5, 5, 5], 7) == [3, 2, 2]
    assert budgets([3, 0, 9], 12) == [3, 0, 9]
    assert budgets([2, 3], 0) == [0, 0]


@pytest.mark.parametrize("total", [-1, 6])
def test_impossible_budgets_and_medoids_are_refused(total: int) -> None:
    with pytest.raises(ValueError, match=f"{total} rows cannot be chosen from 5"):
        budgets([2, 3], total)
    with pytest.raises(ValueError, match=f"{total} medoids cannot be chosen from 5"):
        medoids(np.zeros((5, 5)), total)


# --- proxies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_rows", [None, 1, 2])
def test_slopes_are_those_of_a_model_whose_weights_are_written_to(micro_rows: int | None) -> None:
    model, batch = toy.model(), draw([0, 0, 1])
    last = last_block(model, micro_rows=micro_rows)
    found = dense(kinds.zeroth_order(last, batch, 5, count=2, epsilon=1e-3))
    z_KOI = kinds.shared_directions(last.layer, 5, 2)
    for row in range(3):
        slopes = [oracle.slope(model, batch, row, V_PROJ, z, 1e-3) for z in z_KOI]
        want = sum(c * z for c, z in zip(slopes, z_KOI, strict=True)) / 2
        torch.testing.assert_close(found[row].view_as(want), want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("micro_rows", [None, 2])
def test_directions_of_each_row_do_not_depend_on_the_micro_batch(micro_rows: int | None) -> None:
    model, batch = toy.model(), draw([0, 0, 1])
    found = dense(kinds.zeroth_order_apart(last_block(model, micro_rows=micro_rows), batch, 5, count=2, epsilon=1e-3))
    want = dense(kinds.zeroth_order_apart(last_block(model), batch, 5, count=2, epsilon=1e-3))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def test_the_mean_over_4000_directions_is_the_gradient() -> None:
    model = toy.model(hidden_size=8, n_heads=2, n_kv_heads=2, ffn_size=12)
    batch = draw([0], length=6, seed=3)
    want = oracle.gradient(model, batch, 0, V_PROJ).flatten()
    apart = kinds.zeroth_order_apart(
        last_block(model), batch[torch.zeros(4000, dtype=torch.int64)], 1, count=1, epsilon=1e-3
    )
    together = kinds.zeroth_order(last_block(model), batch, 1, count=200, epsilon=1e-3)
    assert float(torch.cosine_similarity(dense(apart).mean(0), want, 0)) > 0.98
    assert float(torch.cosine_similarity(dense(together)[0], want, 0)) > 0.8  # 1 / sqrt(1 + 65 / 200) = 0.87 expected


@pytest.mark.parametrize(
    ("family", "matrix"), [("decoder", "attn.v_proj"), ("gpt2", "ffn.up_proj"), ("neox", "attn.o_proj")]
)
@pytest.mark.parametrize("micro_rows", [None, 2])
def test_exact_proxies_are_the_gradients_of_the_rows(family: str, matrix: str, micro_rows: int | None) -> None:
    model, batch = built(family), draw([0, 1, 2, 0, 1])
    if family == "gpt2":
        Recompute().apply(model)
    found = dense(kinds.exact(last_block(model, micro_rows=micro_rows, matrix=matrix), batch))
    name = f"blocks.{model.config.n_layers - 1}.{matrix}.weight"
    for row in range(5):
        want = oracle.gradient(model, batch, row, name)
        torch.testing.assert_close(found[row].view_as(want), want, rtol=0, atol=1e-11)
    assert all(p.grad is None for p in model.parameters())


def test_zeroth_order_follows_the_exact_gradient_along_its_directions() -> None:
    model, batch = toy.model(), draw([0, 0, 1, 1])
    last = last_block(model)
    gradients = dense(kinds.exact(last, batch))
    found = kinds.zeroth_order(last, batch, 3, count=3, epsilon=1e-5)
    assert found.factors_NK is not None
    torch.testing.assert_close(found.factors_NK * 3, gradients @ found.directions_Kd.T, rtol=1e-5, atol=1e-8)


def test_the_representation_is_the_last_hidden_state() -> None:
    model, batch = toy.model(), draw([0, 0, 1])
    with torch.no_grad():
        want = model(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)[:, -1]
    torch.testing.assert_close(dense(kinds.representation(last_block(model, micro_rows=2), batch)), want)


def test_a_bfloat16_model_gets_proxies_in_float32() -> None:
    """The last block in float32 leaves the noise of the blocks before, not that of a nudge lost in rounding."""
    narrow, wide = built("decoder", dtype=torch.bfloat16), built("decoder", dtype=torch.float32)
    batch = draw([0] * 6, seed=2)
    found, want = (dense(kinds.zeroth_order(last_block(m), batch, 1, count=4, epsilon=1e-3)) for m in (narrow, wide))
    assert found.dtype == torch.float32
    assert float(torch.cosine_similarity(found.flatten(), want.flatten(), 0)) > 0.95


def test_compiled_blocks_see_the_nudge() -> None:
    plain, batch = toy.model(), draw([0, 0, 1])
    compiled = toy.model()
    for block in compiled.blocks.values():
        block.compile(backend="eager")
    compiled.compiled_blocks = True
    with torch.no_grad():
        compiled(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
    found, want = (dense(kinds.zeroth_order(last_block(m), batch, 1, count=1, epsilon=1e-3)) for m in (compiled, plain))
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)
    assert float(want.abs().max()) > 1e-3


# --- what fresh directions must mean ---------------------------------------------------------------------------------


def test_one_shared_direction_gives_rank_one_and_k_give_rank_k() -> None:
    batch = draw([0] * 8)
    for count in (1, 2, 4):
        found = kinds.zeroth_order(last_block(toy.model()), batch, 1, count=count, epsilon=1e-3)
        assert rank(dense(found)) == count
    apart = kinds.zeroth_order_apart(last_block(toy.model()), batch, 1, count=1, epsilon=1e-3)
    assert rank(dense(apart)) == 8


def test_fixed_directions_stay_and_fresh_ones_do_not() -> None:
    for perturbation, want in (("fixed", 1), ("step", 3)):
        model = toy.model()
        selector = started(model, {"a": 1.0}, perturbation=perturbation, directions=1, normalise="none")
        probe, seen = probe_of(model), []
        for step in range(3):
            with torch.no_grad():
                seen.append(dense(selector.proxies(draw([0] * 6, seed=step), probe)))
        assert rank(torch.cat(seen)) == want


def test_adams_view_bends_one_direction_once_there_is_a_history() -> None:
    model = toy.model()
    selector = started(model, {"a": 1.0}, perturbation="fixed", directions=1)
    probe = probe_of(model)
    for step in range(2):
        selector.select(draw([0] * 8, seed=step), 4, probe)
    with torch.no_grad():
        raw = dense(selector.proxies(draw([0] * 8, seed=9), probe))
    assert rank(raw) == 1
    assert rank(selector.history.normalised(raw, slice(None))) > 1


def test_equal_rows_have_equal_proxies_only_when_directions_are_shared() -> None:
    """Why directions of each row apart are not the default: distances no longer say which rows are alike."""
    model = toy.model()
    twins = draw([0, 0, 0, 0])[torch.tensor([0, 0, 1, 2])]

    def closeness(proxies: Proxies) -> float:
        rows = dense(proxies)
        distance = torch.cdist(rows, rows, p=1)
        return float(distance[0, 1] / distance[0, 2:].mean())

    assert closeness(kinds.zeroth_order(last_block(model), twins, 1, count=4, epsilon=1e-3)) < 1e-9
    assert closeness(kinds.zeroth_order_apart(last_block(model), twins, 1, count=4, epsilon=1e-3)) > 0.3


# --- Adam's view -----------------------------------------------------------------------------------------------------


def test_identical_rows_look_like_the_first_step_of_adam() -> None:
    model, batch = toy.model(), draw([0])[torch.zeros(4, dtype=torch.int64)]
    found = kinds.exact(last_block(model), batch)
    seen = History(betas=(0.9, 0.95), eps=1e-8).normalised(dense(found), slice(None))
    weight = torch.nn.Parameter(model.get_parameter(V_PROJ).detach().clone())
    before = weight.detach().clone()
    weight.grad = oracle.gradient(model, batch, 0, V_PROJ)
    torch.optim.Adam([weight], lr=1.0, betas=(0.9, 0.95), eps=1e-8).step()
    for row in seen:
        torch.testing.assert_close(row.view_as(weight), before - weight.detach(), rtol=1e-6, atol=1e-8)


def test_the_moments_are_the_mean_of_what_each_chosen_row_would_make() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, slow = History(betas=(0.9, 0.99), eps=1e-8), oracle.Moments(40_000, (0.9, 0.99), 1e-8)
    for _ in range(3):  # more values than are worked on at a time
        rows = torch.randn(5, 40_000, generator=generator, dtype=torch.float64)
        ours.update(Proxies(directions_Kd=rows), torch.tensor([1, 4]))
        slow.take([rows[1].numpy(), rows[4].numpy()])
        probe = torch.randn(40_000, generator=generator, dtype=torch.float64)
        want = slow.direction(probe.numpy())
        np.testing.assert_allclose(ours.normalised(probe[None], slice(None))[0].numpy(), want, rtol=1e-9)


def test_each_source_has_its_own_mask_of_its_largest_means() -> None:
    rows = torch.tensor([[9.0, 1.0, 0.0, 4.0], [9.0, -1.0, 0.0, 4.0], [0.0, 5.0, 7.0, 1.0], [0.0, 5.0, 7.0, -1.0]])
    proxies = Proxies(directions_Kd=rows)
    same = lambda values, places: values  # noqa: E731
    assert kinds.sparse(proxies, torch.tensor([0, 1]), 2, same).tolist() == [[9.0, 4.0], [9.0, 4.0]]
    assert kinds.sparse(proxies, torch.tensor([2, 3]), 2, same).tolist() == [[7.0, 5.0], [7.0, 5.0]]
    assert torch.equal(kinds.sparse(proxies, torch.tensor([0, 3]), None, same), rows[[0, 3]])


def test_factors_and_whole_rows_are_the_same_proxies() -> None:
    generator = torch.Generator().manual_seed(0)
    directions, factors = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 50), (6, 3)))
    small, large = Proxies(directions_Kd=directions, factors_NK=factors), Proxies(directions_Kd=factors @ directions)
    at = torch.tensor([4, 40, 7])
    torch.testing.assert_close(small.columns(at, torch.tensor([5, 0])), large.columns(at, torch.tensor([5, 0])))
    assert small.rows == large.rows == 6


# --- the whole selection ---------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(
    sources=st.lists(st.integers(0, 3), min_size=6, max_size=20),
    keep=st.sets(st.sampled_from(["a", "b", "c", "d"]), max_size=2),
    seed=st.integers(0, 100),
)
def test_three_steps_choose_what_the_slow_form_chooses(sources: list[int], keep: set[str], seed: int) -> None:
    """Exact proxies, with moments from step to step, masks, budgets and kept sources; cluster sizes as weights."""
    model = toy.model(seed=seed)
    names = ["a", "b", "c", "d"]
    rows = len(sources) // 2
    selector = started(
        model, dict.fromkeys(names, 0.25), proxy="exact", keep=tuple(sorted(keep)), coordinates=20, weighted=True
    )
    size = model.get_parameter(V_PROJ).numel()
    moments = oracle.Moments(size, (0.9, 0.95), 1e-8)
    kept_ids = {names.index(name) for name in keep}
    for step in range(3):
        batch = draw(sources, seed=seed + step)
        gradients = np.stack([oracle.gradient(model, batch, i, V_PROJ).flatten().numpy() for i in range(len(sources))])
        want, clusters = oracle.select(gradients, sources, kept_ids, rows, moments, 20)
        picked = selector.select(batch, rows, probe_of(model))
        assert numbers(picked) == want
        weights = torch.tensor([float(clusters.get(i, 1)) for i in want])
        assert picked.weights_B is not None
        torch.testing.assert_close(picked.weights_B, weights * len(want) / weights.sum())


def test_a_planted_small_source_is_left_out_by_medoids_and_kept_by_colm() -> None:
    """60, 60 and 8 rows: two sources spread out, the third a tight cluster of rows that are nearly one."""
    model = toy.model()
    batch = draw([0] * 60 + [1] * 60 + [2] * 8, seed=1)
    tight = batch[torch.tensor([*range(120), *[120] * 8])]
    targets_BT = tight.targets_BT.clone()
    targets_BT[torch.arange(120, 128), torch.arange(8)] = torch.arange(8)
    tight = type(batch)(**{**vars(tight), "targets_BT": targets_BT, "bytes_B": torch.arange(128)})
    ids_BT = torch.cat([batch.sources_BT[:120], torch.full((8, 8), 2)])
    sourced = type(batch)(**{**vars(tight), "sources_BT": ids_BT})
    pooled = type(batch)(**{**vars(tight), "sources_BT": torch.zeros_like(ids_BT)})
    plain = started(model, {"all": 1.0}, proxy="exact", normalise="none", masked=False)
    colm = started(model, {"a": 60 / 128, "b": 60 / 128, "c": 8 / 128})
    small = set(range(120, 128))
    assert len(small & set(numbers(plain.select(pooled, 32, probe_of(model))))) <= 1
    assert small <= set(numbers(colm.select(sourced, 32, probe_of(model))))


def test_selection_leaves_weights_gradients_and_layers_as_they_were() -> None:
    for proxy in ("zeroth-order", "exact", "representation", "random"):
        model = toy.model()
        before = copy.deepcopy(model.state_dict())
        model.train()
        started(model, {"a": 0.7, "b": 0.3}, proxy=proxy, keep=[]).select(draw([0] * 7 + [1] * 3), 5, probe_of(model))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())
        assert model.training


@pytest.mark.parametrize(("perturbation", "directions"), [("step", 3), ("row", 2), ("fixed", 1)])
def test_what_the_selection_books_is_counted_from_its_passes(perturbation: str, directions: int) -> None:
    model, batch = toy.model(), draw([0] * 6 + [1] * 2)
    probe = probe_of(model, micro_rows=3)
    selector = started(model, {"a": 0.75, "b": 0.25}, perturbation=perturbation, directions=directions)
    selector.select(batch, 4, probe)
    last = forward_share(model.config, start=1, sequence=8)
    product = 2 * model.get_parameter(V_PROJ).numel() / oracle_flops(model)
    want = 6 * 8 * ((1 - last) + 2 * directions * (last + product))  # the kept rows are not looked at
    assert probe.booked == pytest.approx(want, rel=1e-12)


def oracle_flops(model: Backbone) -> float:
    """2 per weight of each matrix and of the tied head, 4 N h (T + 1) / 2 for attention; 8 tokens."""
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2)
    return 2.0 * matrices + 2 * 4 * 16 * 4.5


def test_measuring_is_not_booked_as_the_methods_cost() -> None:
    model, batch = toy.model(), draw([0] * 8)
    booked = []
    for measure_every in (None, 1):
        probe = probe_of(model)
        selector = started(model, {"a": 1.0}, measure_every=measure_every)
        picked = selector.select(batch, 4, probe)
        booked.append(probe.booked)
    assert booked[0] == booked[1]
    assert probe.booked_aside == 3 * 8 * (8 + 4 + 4)
    parameters = list(model.parameters())
    some, whole = probe.gradients(picked, parameters), probe.gradients(batch, parameters)
    apart = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(some, whole, strict=True)))
    want = apart / math.sqrt(sum(float(b.square().sum()) for b in whole))
    assert probe.notes()["colm/gradient_error"] == pytest.approx(want, rel=1e-9)
    assert "colm/gradient_error_random" in probe.notes()

"""The benchmark's arithmetic, shapes and token rows: what can be checked without timing anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch


def run(arm: str, turn: int, seconds: list[float], **facts: Any) -> dict[str, Any]:
    return {
        "arm": arm,
        "round": turn,
        "seconds": seconds,
        "other_load": 0.0,
        "peak_memory_bytes": 1,
        "cpu_seconds_per_step": 2 * seconds[0],
        **facts,
    }


def two_rounds() -> list[dict[str, Any]]:
    """Round 2 of the machine is twice as slow for everybody; trainer takes 1.3 times, plain 1.5 times as long."""
    runs = []
    for turn, slow in ((1, 1.0), (2, 2.0)):
        inside = [9.0, 0.99 * slow, 0.99 * slow, 0.99 * slow]
        ours = [slow, slow, slow]
        runs += [
            run("product", turn, [0.5 * slow], flops=100.0),
            run("lmworks", turn, ours, step_seconds=inside, train_flops_per_token=7.0),
            run("trainer", turn, [1.3 * slow, 1.3 * slow, 9.0]),
            run("plain", turn, [1.5 * slow] * 3),
        ]
    return runs


def test_ratios_are_taken_within_a_round() -> None:
    import verdicts

    found = verdicts.speedups(two_rounds())
    assert found["trainer"].each == pytest.approx((1.3, 1.3))
    assert found["plain"].median == pytest.approx(1.5)


def test_cpu_time_is_compared_within_a_round() -> None:
    import verdicts

    found = verdicts.cpu_savings(two_rounds())
    assert set(found) == {"trainer", "plain"}
    assert found["plain"].each == pytest.approx((1.5, 1.5))


def test_a_round_that_one_side_lacks_is_left_out() -> None:
    import verdicts

    found = verdicts.ratios({1: 2.0, 2: 8.0}, {2: 4.0, 3: 1.0})
    assert found is not None
    assert found.each == (2.0,)
    assert verdicts.ratios({1: 2.0}, {2: 4.0}) is None


def test_bars_are_held_against_the_best_peer_and_the_product() -> None:
    import verdicts

    speed, share, outside = verdicts.verdicts(two_rounds(), case="10m", precision="fp32", tokens=20)
    assert speed.against == "trainer"
    assert speed.value.median == pytest.approx(1.3)
    assert speed.word() == "met"
    assert share.value.median == pytest.approx(20 * 7 / 1.0 / 200)
    assert share.is_met
    assert outside.value.median == pytest.approx(0.01)
    assert not outside.at_least


def test_a_bar_met_in_the_median_only_says_so() -> None:
    import verdicts

    value = verdicts.spread([1.1, 1.3, 1.4])
    verdict = verdicts.Verdict(what="", bar=1.2, at_least=True, value=value, loaded=True)
    assert verdict.word() == "met in the median, not in every round (loaded machine)"
    assert verdict.table()["is_met"]
    assert not verdict.table()["in_every_round"]


def test_any_disturbed_run_marks_the_record() -> None:
    import verdicts

    runs = two_rounds()
    assert not verdicts.is_loaded(runs)
    runs[3]["other_load"] = 0.06
    assert verdicts.is_loaded(runs)


@pytest.mark.parametrize(("case", "parameters"), [("10m", 11_540_736), ("135m", 134_515_008)])
def test_shapes_have_the_parameters_they_are_named_for(case: str, parameters: int) -> None:
    from dataclasses import asdict

    from cases import CASES

    from lmworks.model.decoder import DecoderConfig

    config = DecoderConfig(**asdict(CASES[case].shape))
    assert config.cost(sequence=CASES[case].sequence).parameters == parameters


@pytest.mark.parametrize("case", ["tiny", "10m"])
def test_every_arm_trains_the_same_number_of_parameters(case: str) -> None:
    transformers = pytest.importorskip("transformers")
    from dataclasses import asdict

    from cases import CASES
    from peers import hf_trainer, plain_loop
    from peers.job import Job

    from lmworks.model.decoder import DecoderConfig

    one = CASES[case]
    job = Job(shape=one.shape, batch=1, sequence=8, precision="fp32", warmup=1, steps=1, threads=1, result="unused")
    ours = DecoderConfig(**asdict(one.shape)).cost(sequence=8).parameters
    assert transformers.LlamaForCausalLM.__name__ == type(hf_trainer.model_of(job)).__name__
    assert hf_trainer.model_of(job).num_parameters() == ours
    assert sum(p.numel() for p in plain_loop.Llama(one.shape, 8).parameters()) == ours


def test_the_plain_loop_and_lmworks_compute_the_same_loss() -> None:
    from dataclasses import asdict

    from cases import CASES
    from peers.plain_loop import Llama

    from lmworks.model.decoder import DecoderConfig
    from lmworks.model.head import cross_entropy_sum
    from lmworks.model.init import initialise

    shape = CASES["tiny"].shape
    ours = DecoderConfig(**asdict(shape)).build()
    initialise(ours, 0)
    names = {
        "norm_1": "attn_norm",
        "norm_2": "ffn_norm",
        "q": "attn.q_proj",
        "k": "attn.k_proj",
        "v": "attn.v_proj",
        "out": "attn.o_proj",
        "gate": "ffn.gate_proj",
        "up": "ffn.up_proj",
        "down": "ffn.down_proj",
    }
    theirs = Llama(shape, 16)
    weights = ours.state_dict()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parts = name.split(".")
            mine = f"blocks.{parts[1]}.{names[parts[2]]}.weight" if parts[0] == "blocks" else name
            parameter.copy_(weights[mine])
    tokens = torch.randint(shape.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    mean = theirs(tokens[:, :-1], tokens[:, 1:])
    total = cross_entropy_sum(ours(tokens[:, :-1]).flatten(0, 1), ours.head_weight(), tokens[:, 1:].flatten())
    assert torch.allclose(total / 32, mean, atol=1e-5)


def test_token_rows_are_the_same_for_every_arm_and_within_the_vocabulary() -> None:
    from cases import CASES
    from peers.job import Job, token_rows

    job = Job(
        shape=CASES["tiny"].shape, batch=2, sequence=9, precision="fp32", warmup=1, steps=2, threads=1, result="unused"
    )
    rows = token_rows(job)
    assert rows.shape == (4, 2, 10)
    assert torch.equal(rows, token_rows(job))
    assert rows.min() >= 0
    assert rows.max() < 512
    assert (rows < 16).float().mean() > 0.3  # Zipf: frequent ids are frequent


def test_timeline_drops_the_warmup_and_writes_once(tmp_path: Path) -> None:
    from cases import CASES
    from peers.job import Enough, Job, Timeline

    result = tmp_path / "result.json"
    job = Job(
        shape=CASES["tiny"].shape,
        batch=1,
        sequence=8,
        precision="fp32",
        warmup=2,
        steps=3,
        threads=1,
        result=str(result),
    )
    timeline = Timeline(job, kind="test")
    for _ in range(4):
        timeline.mark()
        assert not result.exists()
    with pytest.raises(Enough):
        timeline.mark(loss=1.5)
    written = json.loads(result.read_text())
    assert len(written["seconds"]) == 3
    assert all(s >= 0 for s in written["seconds"])
    assert written["loss"] == 1.5
    assert written["kind"] == "test"
    assert written["peak_memory_bytes"] > 0


def test_documents_fill_their_rows_or_share_them(tmp_path: Path) -> None:
    from cases import CASES
    from peers.job import Job
    from peers.lmworks_train import documents, write_recipe

    from lmworks.core import recipe as recipes

    fields: dict[str, Any] = {"shape": CASES["tiny"].shape, "batch": 2, "sequence": 64, "precision": "fp32"}
    fields |= {"warmup": 1, "steps": 2, "threads": 1, "result": "unused"}
    job, packed = Job(**fields), Job(**fields, variant="packed")
    assert {len(ids) for ids in documents(job)} == {62}
    assert sum(len(ids) for ids in documents(packed)) == sum(len(ids) for ids in documents(job))
    assert len({len(ids) for ids in documents(packed)}) > 1
    recipe = recipes.load(write_recipe(job, tmp_path), verb="train")
    batch = recipe.data.prepare(seed=0).train(prefetch=0).draw(2)
    assert batch.documents_BT.max() == 0
    assert (batch.targets_BT == -100).sum() == 2


def test_time_left_counts_what_is_still_to_run() -> None:
    from rounds import Clock

    a, b = ("10m", "fp32", "a"), ("10m", "fp32", "b")
    clock = Clock([a, b, a, b])
    clock.done(a, 10.0)
    assert clock.left() == "0:30 left"
    clock.done(b, 30.0)
    assert clock.left() == "0:40 left"


def test_lmworks_gets_the_environment_that_its_command_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    import train_throughput
    from cases import ARMS
    from rounds import environment_of

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    quiet, _ = train_throughput.plan_of(train_throughput.arguments([]))
    loaded, _ = train_throughput.plan_of(train_throughput.arguments(["--allow-load"]))
    assert "GOMP_SPINCOUNT" in environment_of(ARMS["lmworks"], quiet)
    assert "GOMP_SPINCOUNT" not in environment_of(ARMS["plain"], quiet)
    assert "GOMP_SPINCOUNT" not in environment_of(ARMS["lmworks"], loaded)


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--shapes", "1t"], ["--arm", "lmworks"]])
def test_a_wrong_option_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import train_throughput

    with pytest.raises(SystemExit) as stop:
        train_throughput.arguments(wrong)
    assert stop.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_records_never_overwrite_each_other(tmp_path: Path) -> None:
    import evidence_file

    record = evidence_file.head("check") | {"loaded": True}
    first, second = evidence_file.write(record, tmp_path), evidence_file.write(record, tmp_path)
    assert first != second
    assert "loaded" in first.name
    assert {"commit", "uncommitted"} <= set(json.loads(second.read_text())["code"]) or record["code"] == {}

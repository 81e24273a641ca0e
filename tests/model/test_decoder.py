"""What every family must hold: cache = full forward, packed = alone, stages and layouts start alike."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmworks.core.errors import UsageError
from lmworks.model import init, ops
from lmworks.model.backbone import Backbone
from lmworks.model.init import TABLE_STD, first_value, initialise, standard_deviation
from tests.model.toy import CONFIGS, FAMILIES, V, built


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [1, 2, 5, 9])
def test_decoding_with_a_cache_is_the_full_forward(family: str, prompt: int) -> None:
    model = built(family)
    read_BT = tokens(2, 14)
    with torch.no_grad():
        whole = model(read_BT)
        cache = model.new_cache(2, 14)
        parts = [model(read_BT[:, :prompt], cache=cache), model(read_BT[:, prompt : prompt + 2], cache=cache)]
        parts += [model(read_BT[:, t : t + 1], cache=cache) for t in range(prompt + 2, 14)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-6)  # rotary tables are float32
    assert cache.length == 14


def test_a_window_keeps_the_cache_small() -> None:
    model = built("windowed")
    cache = model.new_cache(1, 1000)
    with torch.no_grad():
        for t in range(40):
            model(tokens(1, 1, seed=t), cache=cache)
    assert {block.keys.shape[2] for block in cache.blocks.values()} == {6}
    assert cache.length == 40


@pytest.mark.parametrize("family", ["decoder", "windowed", "gpt2"])
def test_prompts_padded_on_the_left_decode_as_alone(family: str) -> None:
    model = built(family)
    long, short = tokens(1, 8), tokens(1, 5, seed=1)
    pad = 3
    rows = torch.cat((long, torch.cat((torch.zeros(1, pad, dtype=torch.int64), short), 1)))
    documents = torch.tensor([[0] * 8, [1] * pad + [0] * 5])
    positions = torch.stack((torch.arange(8), torch.cat((torch.zeros(pad), torch.arange(5))).long()))
    following = tokens(2, 4, seed=2)
    with torch.no_grad():
        cache = model.new_cache(2, 12)
        model(rows, positions_BT=positions, documents_BT=documents, cache=cache)
        found = [
            model(following[:, t : t + 1], positions_BT=torch.tensor([[8 + t], [5 + t]]), cache=cache) for t in range(4)
        ]
        alone = model(torch.cat((short, following[1:]), 1))[:, 5:]
    torch.testing.assert_close(torch.cat(found, 1)[1:], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_document_is_the_document_alone(family: str) -> None:
    model = built(family, dtype=torch.float32)
    lengths = [[5, 1, 10], [16]]
    rows = tokens(2, 16)
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths])
    positions = torch.stack([torch.cat([torch.arange(k) for k in n]) for n in lengths])
    with torch.enable_grad():  # as in training
        packed = model(rows, positions_BT=positions, documents_BT=documents)
        with ops.plain_forms():
            plain = model(rows, positions_BT=positions, documents_BT=documents)
        torch.testing.assert_close(packed, plain, rtol=1e-6, atol=4e-6)
        for row, counts in enumerate(lengths):
            start = 0
            for count in counts:
                alone = model(rows[row : row + 1, start : start + count])
                torch.testing.assert_close(packed[row : row + 1, start : start + count], alone, rtol=1e-6, atol=4e-6)
                start += count


@pytest.mark.parametrize("family", FAMILIES)
def test_own_forms_and_plain_forms_have_the_same_gradients(family: str) -> None:
    read_BT = tokens(2, 11)

    def gradients() -> dict[str, Tensor]:
        model = built(family)
        model.logits(model(read_BT)).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    with ops.plain_forms():
        want = gradients()
    assert found.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", ["decoder", "tied", "gpt2", "neox"])
def test_bfloat16_computes_in_bfloat16_on_float32_masters(family: str) -> None:
    model = built(family, dtype=torch.bfloat16)
    hidden = model(tokens(2, 9))
    assert hidden.dtype == torch.bfloat16
    logits = model.logits(hidden)
    assert logits.dtype == torch.float32
    logits.square().mean().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_errs_no_more_than_plain_pytorch(family: str) -> None:
    """Against float64, over four seeds. The median token: a near-tie in a softmax lets single tokens err tenfold."""

    def median_error(seed: int) -> float:
        read_BT = tokens(2, 9, seed)
        exact = built(family, seed=seed)(read_BT)
        hidden = built(family, dtype=torch.bfloat16, seed=seed)(read_BT).double()
        return float(((hidden - exact).norm(dim=-1) / exact.norm(dim=-1)).median())

    with torch.no_grad():
        own = sum(median_error(seed) for seed in range(4))
        with ops.plain_forms():
            plain = sum(median_error(seed) for seed in range(4))
    assert own < 1.25 * plain


def test_a_hook_on_a_part_of_the_feed_forward_layer_is_called() -> None:
    model = built("decoder")
    seen: list[Tensor] = []
    before = model(tokens(1, 5))
    block = model.get_submodule("blocks.1.ffn.up_proj")
    handle = block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(model(tokens(1, 5)), before, rtol=0, atol=1e-12)
    handle.remove()
    assert [tuple(output.shape) for output in seen] == [(1, 5, 24)]


# --- first values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["decoder", "tied", "gpt2", "neox"])
def test_stages_of_a_cut_model_start_from_the_weights_of_the_whole(family: str) -> None:
    whole = CONFIGS[family].build()
    initialise(whole, 7)
    states = whole.state_dict()
    blocks = CONFIGS[family].n_layers
    x = tokens(2, 6)
    hidden: Tensor = x
    for index in range(blocks):
        stage: Backbone = CONFIGS[family].build(device="meta")
        stage.keep_stage(range(index, index + 1), first=index == 0, last=index == blocks - 1)
        stage.to_empty(device="cpu")
        initialise(stage, 7)
        assert all(torch.equal(value, states[name]) for name, value in stage.state_dict().items())
        hidden = stage(hidden)
    torch.testing.assert_close(hidden, whole(x), rtol=0, atol=0)
    torch.testing.assert_close(stage.logits(hidden), whole.logits(hidden), rtol=0, atol=0)


def test_a_stage_without_head_says_so() -> None:
    stage = CONFIGS["tied"].build(device="meta")
    stage.keep_stage(range(1), first=True, last=False)
    tied = stage.head_weight()
    assert tied.shape == (V, 24)
    stage.keep_stage(range(1), first=False, last=False)
    with pytest.raises(UsageError, match="holds no head"):
        stage.head_weight()


def test_first_values_depend_on_seed_and_name_alone() -> None:
    name = "blocks.0.ffn.up_proj.weight"
    assert torch.equal(first_value(name, (6, 4), 2, 1), first_value(name, (6, 4), 2, 1))
    assert not torch.equal(first_value(name, (6, 4), 2, 1), first_value(name, (6, 4), 2, 2))
    assert not torch.equal(first_value(name, (6, 4), 2, 1), first_value(name.replace("up", "gate"), (6, 4), 2, 1))


def test_the_docstring_states_the_standard_deviations() -> None:
    stated = re.search(r"tables: .*\| normal, std ([\d.]+) ", init.__doc__ or "")
    assert stated is not None
    assert float(stated[1]) == TABLE_STD
    table = first_value("embed.weight", (512, 256), 4, 0)
    inner = first_value("blocks.0.attn.q_proj.weight", (512, 256), 4, 0)
    writer = first_value("blocks.0.ffn.down_proj.weight", (512, 256), 4, 0)
    assert float(table.std()) == pytest.approx(TABLE_STD, rel=0.01)
    assert float(inner.std()) == pytest.approx(1 / math.sqrt(256), rel=0.01)
    assert float(writer.std()) == pytest.approx(1 / math.sqrt(256) / math.sqrt(2 * 4), rel=0.01)
    assert (
        standard_deviation("head.weight", (9, 9), 1) == standard_deviation("positions.weight", (9, 9), 1) == TABLE_STD
    )


def test_a_model_without_values_is_nan_not_noise() -> None:
    model = CONFIGS["decoder"].build()
    assert all(bool(p.isnan().all()) for p in model.parameters())
    initialise(model, 0)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert {float(p.detach().min()) for n, p in model.named_parameters() if "norm" in n} == {1.0}


# --- limits ------------------------------------------------------------------------------------------------------


def test_a_text_longer_than_the_position_table_is_refused() -> None:
    model = built("gpt2")
    with pytest.raises(UsageError, match="65 tokens are longer than the model's position table"):
        model(tokens(1, 65))


def test_a_decoder_reads_beyond_max_position() -> None:
    model = built("decoder")
    assert model(tokens(1, 70)).isfinite().all()


def test_the_decoder_is_one_readable_file() -> None:
    from lmworks.model import decoder

    assert decoder.__file__ is not None
    assert len(Path(decoder.__file__).read_text().splitlines()) <= 350

"""Tokens, epochs and divergences of a recipe's sources, against counting."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from lmworks.audit.sources import report
from lmworks.core.errors import UsageError
from tests.cli.conftest import Command, lmworks  # noqa: F401  (a fixture)
from tests.oracles import slimpajama as oracle
from tests.train import toy

TEXTS = {"one": ["aab", "abb"], "two": ["abc", "ccc\u00e9"]}


def made(tmp_path: Path) -> dict[str, object]:
    readers = []
    for name, found in TEXTS.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text * 9}) for text in found))
        readers.append({"use": "jsonl", "name": name, "paths": [str(path)]})
    data = {
        "readers": readers,
        "tokenizer": "bytes",
        "sequence_length": 8,
        "validation": 0,
        "cache": str(tmp_path / "c"),
    }
    return toy.table(tmp_path, tmp_path, data=data)


def test_the_report_is_what_one_counts(tmp_path: Path) -> None:
    from lmworks.core import recipe as recipes

    found = report(recipes.decode(made(tmp_path)), smoothing=0.5)
    counts = {name: Counter(b for text in some for b in (text * 9).encode()) for name, some in TEXTS.items()}
    rows = {name: [own[b] for b in range(256)] + [0] for name, own in counts.items()}
    assert found["vocabulary"] == 257
    for name, row in rows.items():
        assert found["sources"][name]["tokens"] == sum(row)
        with_ends = sum(row) + 2 * len(TEXTS[name])
        assert found["sources"][name]["epochs"] == pytest.approx(12 * 4 / 2 * 8 / with_ends)
        for other, second in rows.items():
            assert found["kl_bits"][name][other] == pytest.approx(oracle.kl_bits(row, second, 0.5), abs=1e-9)


def test_the_command_answers_in_text_and_json(lmworks: Command, tmp_path: Path) -> None:  # noqa: F811
    import tomli_w

    Path("mix.toml").write_text(tomli_w.dumps(made(tmp_path)))
    text = lmworks("audit", "sources", "mix.toml")
    assert text.code == 0
    assert "KL(row || column), bits a token; 1 added to each of 257 tokens" in text.out
    content = json.loads(lmworks("audit", "sources", "mix.toml", "--smoothing", "0", "--json").out)
    assert content["kl_bits"]["two"]["one"] == "inf"
    assert lmworks("audit", "sources", "mix.toml", "--smoothing", "-1").code == 2


def test_a_negative_smoothing_is_told(tmp_path: Path) -> None:
    from lmworks.core import recipe as recipes

    with pytest.raises(UsageError, match="cannot be added"):
        report(recipes.decode(made(tmp_path)), smoothing=-1.0)

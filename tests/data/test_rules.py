"""Quality rules: measures against slow oracles, bounds at their edges, files of rules that are wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.errors import RecipeError
from lmworks.data.measures import MEASURES, Measured
from lmworks.data.record import Record
from lmworks.data.rules import Lines, Rule, Rules, rules_file, shipped
from lmworks.data.stage import text_of
from tests.make.cleaning import answers, reasons, recipe, write_jsonl
from tests.oracles import measures as oracle

WORDS = st.lists(st.sampled_from(["a", "bb", "the", "of", "x1", "\n", "\n\n", "é"]), max_size=24).map(" ".join)


def measure(name: str, text: str, **more: Any) -> float:
    return MEASURES[name](Measured(text), **more)


@given(WORDS, st.integers(1, 6))
def test_repetition_is_the_oracles(text: str, n: int) -> None:
    for name in ("repeated-ngram-characters", "most-frequent-ngram-characters"):
        wanted = getattr(oracle, name.replace("-", "_"))(text, n)
        assert measure(name, text, n=n) == pytest.approx(wanted, abs=1e-12)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    paragraphs = [part.strip() for part in text.replace("\n \n", "\n\n").split("\n\n") if part.strip()]
    assert measure("repeated-lines", text) == pytest.approx(oracle.repeated(lines, characters=False))
    assert measure("repeated-line-characters", text) == pytest.approx(oracle.repeated(lines, characters=True))
    if "\n \n \n" not in text:
        assert measure("repeated-paragraphs", text) == pytest.approx(oracle.repeated(paragraphs, characters=False))


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("words", "one two\nthree", 3),
        ("mean-word-length", "a bbb", 2),
        ("hashes-per-word", "# a b #c", 0.5),
        ("ellipses-per-word", "well ... so…", 2 / 3),
        ("bullet-lines", "- a\n* b\nc\n\n• d", 0.75),
        ("ellipsis-lines", "a...\nb\nc…\nd", 0.5),
        ("lines-with-final-punctuation", 'He said "no."\nyes\nWhy?', 2 / 3),
        ("alphabetic-words", "a1 12 -- b", 0.5),
        ("stop-words", "The cat, the dog. And (that) with", 4),
        ("sentences", "One. Two! Version 1.2 three", 3),
        ("sentences", 'He left. "So?"', 2),
        ("repeated-paragraph-characters", "ab\n\ncd e\n\nab", 2 / 7),
    ],
)
def test_measures_on_texts_one_can_count(name: str, text: str, wanted: float) -> None:
    assert measure(name, text) == pytest.approx(wanted)
    assert measure("short-lines", "12345\n1234\n\n1", n=5) == pytest.approx(2 / 3)
    assert measure("occurrences", "Lorem IPSUM lorem ipsum", phrase="lorem ipsum") == 2


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_answers_an_empty_text(name: str) -> None:
    more = {key: value for key, value in (("n", 3), ("phrase", "x")) if key in MEASURES[name].__code__.co_varnames}
    wanted = {key: more[key] for key in more if key in MEASURES[name].__code__.co_varnames[:2]}
    assert measure(name, "", **wanted) == 0


def test_bounds_hold_at_their_edges() -> None:
    assert [Rule(measure="words", least=2, most=3).holds(v) for v in (1, 2, 3, 4)] == [False, True, True, False]
    assert [Rule(measure="words", above=2, below=4).holds(v) for v in (2, 3, 4)] == [False, True, False]


PROSE = (
    "The first people who came to this valley had little with them, and they built their houses of what lay around: "
    "stone from the river, clay, and the wood of old oaks. Nobody knows when the bridge was made. Some say that a "
    "miller wanted to reach his sister's farm without wet feet, others hold that monks needed it for their wine. What "
    "can be read in a letter of 1412 is only that it should be mended before winter, at a cost of nine silver coins."
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE, None),
        (PROSE[:120], "words"),
        ("word " * 60, "stop words"),
        ((PROSE + "\n") * 2, "repeated lines"),
        (PROSE + " nevertheless onwards" * 20, "most frequent ngram characters (2)"),
        (" ".join([PROSE, *(f"#{i}" for i in range(40))]), "hashes per word"),
    ],
)
def test_gopher_drops_what_it_should(text: str, reason: str | None) -> None:
    assert reasons(Rules(rules=("gopher-quality", "gopher-repetition")), [text]) == [reason]


def test_fineweb_and_c4_drop_what_they_should() -> None:
    lists = "\n".join(f"item {i}" for i in range(20))
    sentences = "\n".join(f"This is sentence number {i}, and it is long enough." for i in range(20))
    assert reasons(Rules(rules=("fineweb",)), [lists, sentences]) == ["lines with final punctuation", None]
    texts = [sentences, sentences + " {", "Lorem ipsum. A. B. C.", "One. Two."]
    wanted = [None, "occurrences ({)", "occurrences (lorem ipsum)", "sentences"]
    assert reasons(Rules(rules=("c4",)), texts) == wanted


def test_the_reason_tells_the_figure() -> None:
    (answer,) = answers(Rules(rules=("gopher-quality",), skip=("stop-words",)), ["a b c"])
    assert answer.detail == "3, kept is least 50, most 100000"  # type: ignore[union-attr]


def test_lines_are_taken_out_as_c4_does() -> None:
    text = "Menu\nThis line has more than five words.\nPlease enable JavaScript to see this page.\nToo short.\n"
    (answer, gone) = answers(Lines(), [text, "Menu\nHome"])
    assert isinstance(answer, Record)
    assert text_of(answer) == "This line has more than five words.\n"
    assert gone.reason == "no line is left"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", shipped())
def test_shipped_rules_name_their_source(name: str) -> None:
    table = tomllib.loads(rules_file(name).read_text())
    assert "arXiv" in table["source"]
    assert Rules(rules=(name,)).loaded


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("[[rules", "is not TOML"),
        ("[[rules]]\nmeasure = 'words'\nleast = 1", "says no `source`"),
        ("source = 'me'\n[[rules]]\nmeasure = 'wrods'\nleast = 1", "did you mean 'words'"),
        ("source = 'me'\n[[rules]]\nmeasure = 'words'", "has no bound"),
        ("source = 'me'\n[[rules]]\nmeasure = 'short-lines'\nmost = 1", "needs `n`"),
        ("source = 'me'\n[[rules]]\nmeasure = 'words'\nmost = 1\nn = 3", "has no setting 'n'"),
    ],
)
def test_wrong_rules_are_told_before_anything_runs(body: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(body)
    with pytest.raises(RecipeError, match=text):
        recipe([write_jsonl(tmp_path / "a.jsonl", [])], [{"use": "rules", "rules": [str(tmp_path / "own.toml")]}])


def test_unknown_rules_and_measures_are_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'fineweb'"):
        recipe([write_jsonl(tmp_path / "a.jsonl", [])], [{"use": "rules", "rules": ["finweb"]}])
    with pytest.raises(RecipeError, match="did you mean 'stop-words'"):
        recipe(
            [write_jsonl(tmp_path / "a.jsonl", [])],
            [{"use": "rules", "rules": ["gopher-quality"], "skip": ["stopwords"]}],
        )

"""Stages one by one: what each keeps, changes and drops, and what a stage may not do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.errors import DataError, RecipeError
from lmworks.data.language import Language
from lmworks.data.length import Length
from lmworks.data.licences import Licence
from lmworks.data.private import Private, is_card, is_iban, masked_text
from lmworks.data.record import Dropped, Record, Span, Text
from lmworks.data.repair import Repair
from lmworks.data.split import Split
from lmworks.data.stage import Context, Stage, guarded, text_of, with_facts, with_text
from tests.make.cleaning import answers, reasons, recipe, records, texts, write_jsonl


def changed(stage: Stage, found: list[str]) -> list[str]:
    return [text_of(answer) for answer in answers(stage, found) if isinstance(answer, Record)]


# --- what a stage may not do


@dataclass(frozen=True, kw_only=True)
class Bad(Stage):
    adds: ClassVar[Mapping[str, type]] = {"score": float}
    how: str = "fine"

    def run(self, records: Iterable[Record], context: Context) -> Iterator[Record | Dropped]:
        for number, record in enumerate(records):
            if self.how == "reads":
                record.facts["language"]
            if self.how == "loses" and number == 1:
                return
            if self.how == "renames":
                yield Dropped("other", "x")
            elif self.how == "adds":
                yield with_facts(record, score=1.0, colour="red")
            elif self.how == "forgets":
                yield record
            else:
                yield with_facts(record, score=1.0)


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("reads", KeyError, "language"),
        ("loses", AssertionError, "leaves 1 documents without an answer"),
        ("renames", AssertionError, "answers 'other' where '0' was next"),
        ("adds", AssertionError, "does not declare: colour"),
        ("forgets", AssertionError, "does not add 'score'"),
    ],
)
def test_a_stage_that_breaks_its_word_is_a_bug(how: str, error: type[Exception], text: str) -> None:
    known = [with_facts(record, language="en") for record in records(["a", "b"])]
    with pytest.raises(error, match=text):
        list(guarded(Bad(how=how), known, Context(seed=0)))
    (first, _) = (answer for _, answer in guarded(Bad(), known, Context(seed=0)))
    assert isinstance(first, Record)
    assert first.facts == {"language": "en", "score": 1.0}, "facts that a stage does not see are kept"


def test_text_with_spans_is_not_changed() -> None:
    record = Record(id="a", content=(Text("abc"),), source="toy", spans=(Span("name", 0, 0, 2),))
    assert with_text(record, "abc") is record
    with pytest.raises(DataError, match="has spans"):
        with_text(record, "abcd")


# --- repair


def test_repair_joins_accents_and_undoes_mojibake_twice_is_once() -> None:
    pytest.importorskip("ftfy", reason="the extra 'data' is not installed")
    found = ["cafe\u0301", "caf\u00e9", "l\u00c3\u00b6we", "\u201cquoted\u201d &amp; <b>", "plain"]
    wanted = ["caf\u00e9", "caf\u00e9", "l\u00f6we", "\u201cquoted\u201d &amp; <b>", "plain"]
    assert changed(Repair(), found) == wanted
    assert changed(Repair(), wanted) == wanted
    assert changed(Repair(quotes=True), found[3:4]) == ['"quoted" &amp; <b>']
    assert changed(Repair(form="NFKC"), ["\ufb01n"]) == ["fin"]
    assert changed(Repair(), ["\ufb01n"]) == ["\ufb01n"]
    assert reasons(Repair(), ["\x00\x01"]) == ["empty after repair"]


# --- language


def test_language_marks_and_keeps() -> None:
    pytest.importorskip("py3langid", reason="the extra 'data' is not installed")
    english = "The people of the village have always built their houses out of the stone that the river brings."
    german = "Die Leute aus dem Dorf haben ihre H\u00e4user immer aus dem Stein gebaut, den der Fluss bringt."
    (first, second, third) = answers(Language(keep=("en",)), [english, german, "0"])
    assert isinstance(first, Record)
    assert first.facts["language"] == "en"
    assert float(first.facts["language_probability"]) > 0.9
    assert second == Dropped("1", "another language", "de")
    assert isinstance(third, Dropped)
    assert third.reason == "language uncertain"
    assert [a.facts["language"] for a in answers(Language(), [english, german]) if isinstance(a, Record)] == [
        "en",
        "de",
    ]


def test_a_language_that_the_model_does_not_know_is_told(tmp_path: Path) -> None:
    pytest.importorskip("py3langid", reason="the extra 'data' is not installed")
    with pytest.raises(RecipeError, match="knows no language 'english'"):
        recipe([write_jsonl(tmp_path / "a.jsonl", [])], [{"use": "language", "keep": ["english"]}])


# --- length


def test_length_counts_plain_characters_and_drops_below() -> None:
    text = ("Ab, " * 67)[:-1]
    assert reasons(Length(), ["x" * 199, "x" * 200, text, text + "!"]) == ["too short", None, None, None]
    assert reasons(Length(least=201), [text]) == ["too short"]
    assert reasons(Length(least=2, most=3, unit="words"), ["a", "a b", "a b c d"]) == ["too short", None, "too long"]


# --- licence


def test_licences_are_allowed_denied_and_unknown() -> None:
    def of(licence: str | None) -> Record:
        return Record(id="a", content=(Text("a"),), source="toy", licence=licence)

    def kept(stage: Licence, *licences: str | None) -> list[bool]:
        found = guarded(stage, [of(licence) for licence in licences], Context(seed=0))
        return [isinstance(answer, Record) for _, answer in found]

    assert kept(Licence(allow=("MIT", "apache-*")), "mit", "Apache-2.0", "GPL-3.0", None) == [True, True, False, False]
    denying = Licence(allow=("CC-*",), deny=("*-NC-*",), unknown="keep")
    assert kept(denying, "CC-BY-4.0", "CC-BY-NC-4.0", None) == [True, False, True]


# --- split


def test_splits_follow_the_text_alone() -> None:
    found = texts(2000)
    sides = [a.facts["split"] for a in answers(Split(validation=0.2, test=0.1), found) if isinstance(a, Record)]
    by_text: dict[str, Any] = {}
    for text, side in zip(found, sides, strict=True):
        assert by_text.setdefault(text, side) == side
    counts = [list(by_text.values()).count(side) / len(by_text) for side in ("validation", "test", "train")]
    for share, wanted in zip(counts, (0.2, 0.1, 0.7), strict=True):
        assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / len(by_text)) ** 0.5
    other = [a.facts["split"] for a in answers(Split(validation=0.2, test=0.1), found[::-1]) if isinstance(a, Record)]
    assert other[::-1] == sides


# --- private


@pytest.mark.parametrize(
    ("text", "wanted", "kinds"),
    [
        ("write to ann.lee+x@mail.example.org, please", "write to [EMAIL], please", ("email",)),
        ("@decorator and a@b and x @ y.com", "@decorator and a@b and x @ y.com", ("email",)),
        ("from 8.8.8.8 to 127.0.0.1 and 10.1.2.3", "from [IP] to 127.0.0.1 and 10.1.2.3", ("ip",)),
        ("at 2001:4860:4860::8888 now, std::vector, 12:30:45", "at [IP] now, std::vector, 12:30:45", ("ip",)),
        ("version 1.2.3.4.5 and 300.1.1.1", "version 1.2.3.4.5 and 300.1.1.1", ("ip",)),
        ("call +49 30 1234567 or +1 (555) 010-9999", "call [PHONE] or [PHONE]", ("phone",)),
        ("1 + 22 + 333, C++11", "1 + 22 + 333, C++11", ("phone",)),
        ("card 4111 1111 1111 1111, not 4111 1111 1111 1112", "card [CARD], not 4111 1111 1111 1112", ("card",)),
        ("to DE89 3704 0044 0532 0130 00 soon", "to [IBAN] soon", ("iban",)),
        ("key AKIAIOSFODNN7EXAMPLE here", "key [KEY] here", ("key",)),
    ],
)
def test_private_parts_are_masked(text: str, wanted: str, kinds: tuple[str, ...]) -> None:
    masked, count = masked_text(text, kinds)
    assert masked == wanted
    assert count == wanted.count("[") - text.count("[")
    assert masked_text(masked, kinds) == (masked, 0)


def test_masked_parts_are_counted() -> None:
    (answer,) = answers(Private(), ["a@b.org 8.8.4.4 c@d.org"])
    assert isinstance(answer, Record)
    assert answer.facts["masked"] == 3


@given(st.integers(10**14, 10**15 - 1))
def test_exactly_one_check_digit_makes_a_card(number: int) -> None:
    assert sum(is_card(f"{number}{digit}") for digit in range(10)) == 1


@given(st.integers(0, 10**18 - 1))
def test_exactly_one_pair_of_check_digits_makes_an_iban(number: int) -> None:
    # 98 - (number mod 97) is the rule of ISO 13616
    account = f"{number:018d}"
    right = 98 - int(account + "131400") % 97
    assert is_iban(f"DE{right:02d}{account}")
    assert not is_iban(f"DE{right % 97 + 1:02d}{account}")

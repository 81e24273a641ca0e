"""The stage `private`: what points at a person or a machine is replaced by a word that says what it was."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from lmworks.core.errors import Problem
from lmworks.data.record import Record
from lmworks.data.stage import Context, Stage, text_of, with_facts, with_text

Kind = Literal["email", "ip", "phone", "card", "iban", "key"]


@final
@dataclass(frozen=True, kw_only=True)
class Private(Stage):
    """Replaces e-mail addresses, public IP addresses and, where asked for, phone numbers, card numbers, IBANs and
    access keys by [EMAIL], [IP] and so on, and counts them. Names of people are not found."""

    adds: ClassVar[Mapping[str, type]] = {"masked": int}

    kinds: tuple[Kind, ...] = ("email", "ip")
    """What is replaced. 'phone': numbers with a leading +; 'card', 'iban': numbers whose check digits are right; 'key':
    PEM private keys and the access keys of well-known services."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Nothing to replace."""
        if not self.kinds:
            yield Problem(path="kinds", text="is empty: the stage would do nothing")

    def run(self, records: Iterable[Record], context: Context) -> Iterator[Record]:
        """Every document with its private parts masked, and their number."""
        for record in records:
            text, masked = masked_text(text_of(record), self.kinds)
            yield with_facts(with_text(record, text), masked=masked)


def masked_text(text: str, kinds: Sequence[str]) -> tuple[str, int]:
    """The text with everything of these kinds replaced, and how many there were."""
    total = 0
    for kind, (pattern, holds) in PATTERNS.items():
        if kind not in kinds:
            continue
        word = f"[{kind.upper()}]"
        count = 0

        def replaced(
            match: re.Match[str], word: str = word, holds: Callable[[str], bool] | None = holds
        ) -> str:  # bound now
            nonlocal count
            if holds is not None and not holds(match[0]):
                return match[0]
            count += 1
            return word

        text = pattern.sub(replaced, text)
        total += count
    return text, total


def is_public_address(text: str) -> bool:
    """Whether this is an IP address that leads somewhere: not 127.0.0.1, 10.0.0.1, or a version such as 1.2.3.4 of a
    reserved range."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def is_card(text: str) -> bool:
    """Luhn's check: from the right, every second digit doubled, the digits' sum divisible by ten."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [sum(divmod(2 * d, 10)) if i % 2 else d for i, d in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def is_iban(text: str) -> bool:
    """ISO 7064: the country and check digits moved to the end, letters as 10 to 35, must leave 1 by 97."""
    flat = text.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in flat[4:] + flat[:4])) % 97 == 1


PATTERNS: dict[str, tuple[re.Pattern[str], Callable[[str], bool] | None]] = {
    "key": (
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----"
            r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}\b",
            re.DOTALL,
        ),
        None,
    ),
    "email": (re.compile(r"\b[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"), None),
    "iban": (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), is_iban),
    "card": (re.compile(r"\b\d(?:[ -]?\d){12,18}\b"), is_card),
    "phone": (
        re.compile(r"(?<![\w+])\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,6}\b"),
        lambda t: sum(map(str.isdigit, t)) >= 8,
    ),
    "ip": (
        re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4})(?![\w.:]*\w)"),
        is_public_address,
    ),
}
"""By kind: what it looks like, and what must hold besides. Keys come first: other kinds occur inside them."""

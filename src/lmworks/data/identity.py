"""What decides the rows of a loader. Kept in checkpoints, so that a run goes on with the same rows or says why not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

from lmworks.core.errors import DataError
from lmworks.data.cache import MANIFEST
from lmworks.data.fingerprint import Fingerprint, changes, digest

_BACK = "put the data back as they were, or start a new run (--resume never)"


@final
@dataclass(frozen=True, kw_only=True)
class SourceIdentity:
    """What decides the documents of one source, and their tokens."""

    weight: float
    source_id: str
    """Hash over the names and contents of its files."""
    key: str | None = None
    """Name of its token shards; None while they are not made."""
    contents: str | None = None
    """Hash over its token shards; None while they are not made."""


@final
@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that rows depend on besides their number."""

    seed: int
    sequence_length: int
    validation: float
    tokenizer: str | None
    """The tokenizer's id; None while it is not made."""
    sources: Mapping[str, SourceIdentity]
    held_out: Mapping[str, SourceIdentity] = field(default_factory=dict)
    """Sources of documents that are validated on: what equals one of them is no row."""
    cache: Path
    """Where manifests lie that tell which files changed; not part of the identity."""
    files: Mapping[str, Fingerprint]
    """The files of each source, for the same purpose."""

    @property
    def fingerprint(self) -> str:
        """One hash of it all, without the seed."""
        return digest({key: value for key, value in self.to_json().items() if key != "seed"})

    def to_json(self) -> dict[str, Any]:
        """As it is kept in a checkpoint."""
        found = {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "validation": self.validation,
            "tokenizer": self.tokenizer,
            "sources": {name: asdict(source) for name, source in self.sources.items()},
        }
        apart = {name: source.source_id for name, source in self.held_out.items()}
        return {**found, "held_out": apart} if apart else found

    def must_match(self, theirs: Mapping[str, Any]) -> None:
        """Raise DataError when a kept identity is another one. What is not made yet is not compared."""
        found = [*self._changed_sources(theirs["sources"]), *self._changed_settings(theirs)]
        if found:
            raise DataError("the data are not those of the run that is to go on: " + "; ".join(found), next_step=_BACK)

    def _changed_sources(self, theirs: Mapping[str, Mapping[str, Any]]) -> list[str]:
        found = [f"the source '{name}' is new" for name in self.sources if name not in theirs]
        found += [f"the source '{name}' is gone" for name in theirs if name not in self.sources]
        if not found and list(theirs) != list(self.sources):
            found = [f"the sources' order is {', '.join(self.sources)}, not {', '.join(theirs)}"]
        for name, ours in self.sources.items():
            if name in theirs and ours.source_id != theirs[name]["source_id"]:
                found.append(f"files of '{name}': {self._changed_files(name, theirs[name]['key'])}")
        return found

    def _changed_files(self, name: str, key: str) -> str:
        manifest = self.cache / "tokens" / key / MANIFEST
        try:
            then = Fingerprint.from_json(json.loads(manifest.read_text(encoding="utf-8"))["files"])
        except (OSError, ValueError, KeyError):
            return f"changed (which ones cannot be told: {manifest} is gone)"
        return changes(then, self.files[name]) or "in another order"

    def _changed_settings(self, theirs: Mapping[str, Any]) -> list[str]:
        found = []
        for key in ("seed", "sequence_length", "validation"):
            ours = getattr(self, key)
            if ours != theirs[key]:
                found.append(f"{key} is {ours}, was {theirs[key]}")
        apart = {name: source.source_id for name, source in self.held_out.items()}
        if apart != theirs.get("held_out", {}):
            found.append("the held-out documents are others, and what equals one of them is not trained on")
        same_files = True
        for name, ours in self.sources.items():
            kept = theirs["sources"].get(name)
            if kept is None or ours.source_id != kept["source_id"]:
                same_files = False
                continue
            if ours.weight != kept["weight"]:
                found.append(f"the weight of '{name}' is {ours.weight}, was {kept['weight']}")
        if same_files:
            found += self._changed_tokens(theirs)
        return found

    def _changed_tokens(self, theirs: Mapping[str, Any]) -> list[str]:
        """With equal files: another tokenizer, or another way of reading. Changed files would make these change too."""
        if self.tokenizer is not None and self.tokenizer != theirs["tokenizer"]:
            return [f"the tokenizer is {self.tokenizer[:12]}, was {theirs['tokenizer'][:12]}"]
        return [
            f"the tokens of '{name}' differ (its reader's settings changed)"
            for name, ours in self.sources.items()
            if ours.contents is not None
            and name in theirs["sources"]
            and ours.contents != theirs["sources"][name]["contents"]
        ]

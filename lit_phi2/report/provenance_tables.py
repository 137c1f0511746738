"""Provenance tables: provenance.json -> names and digests for the page.

    in-toto statement  ->  Origin("tiny", "version 1", [Digest("base weights", "lit_phi2_base", "a52e6c..."), ...], ...)

The digests are shown as they are: they are no identifiers, though their digits look like them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lit_phi2.report.summary import plural
from lit_phi2.report.text import redacted

_SHOWN = 16  # characters of a digest


@dataclass(frozen=True, slots=True)
class Digest:
    """A digest of something, by its algorithm."""

    name: str
    algorithm: str
    value: str

    @property
    def short(self) -> str:
        """The beginning; the page has the whole in a title."""
        return self.value if len(self.value) <= _SHOWN else self.value[:_SHOWN] + "\u2026"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run or an adapter was made from.

    Attributes:
        base, template, device: in a few words; empty if not known.
        sources: digests of base, template, data and config.
        files: digests of the files that were made.
        versions: of packages; the digest of the code is among the sources.
        num_forgotten: records that data.without left out; None without it.
        replaces: the run that this one replaces.
    """

    base: str
    template: str
    device: str
    sources: list[Digest]
    files: list[Digest]
    versions: list[tuple[str, str]]
    num_forgotten: int | None
    replaces: str


def read_origin(statement: Mapping[str, Any]) -> Origin:
    """What a statement of `audit/provenance.py` says; what is not in its layout is left out."""
    predicate = statement["predicate"]
    definition, details = _object(predicate, "buildDefinition"), _object(predicate, "runDetails")
    dependencies = definition.get("resolvedDependencies")
    by_name = {each.get("name"): each for each in dependencies or () if isinstance(each, dict)}
    environment = _object(_object(definition, "internalParameters"), "environment")
    versions = _object(_object(details, "builder"), "version")
    code = versions.get("code")
    forgotten = _object(predicate, "forgotten")
    threads = environment.get("num_threads")
    version = _object(by_name.get("template", {}), "annotations").get("version")
    return Origin(
        base=_text(by_name.get("base", {}).get("uri", "")),
        template=f"version {version}" if version else "",
        device=str(environment.get("device", ""))
        + (f", {plural(threads, 'thread')}" if isinstance(threads, int) else ""),
        sources=[*_digests(dependencies), *([Digest("code of lit_phi2", "sha256", str(code))] if code else [])],
        files=[*_digests(statement.get("subject"))],
        versions=[(str(name), str(value)) for name, value in versions.items() if name != "code"],
        num_forgotten=len(forgotten.get("salted_ids", ())) if forgotten else None,
        replaces=_text(_object(forgotten, "replaces").get("run", "")),
    )


def _digests(things: object) -> Iterator[Digest]:
    for each in things if isinstance(things, Iterable) else ():
        for algorithm, value in _object(each, "digest").items():
            yield Digest(_text(each.get("name", "")), str(algorithm).removeprefix("lit_phi2_"), str(value))


def _object(value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, Mapping) else None
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str:
    return redacted(str(value))[0]

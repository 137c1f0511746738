"""Card: the model card of an export, README.md with Hugging Face metadata.

    CardFacts  ->  ---
                   base_model, license, library_name, tags, pipeline_tag
                   ---
                   what it is, how to load it, how it was checked, data, metrics, settings, versions, limits

A card is made to be published, so absolute paths are cut to their last part.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from lit_phi2 import __version__
from lit_phi2.adapters.adapter import Adapter
from lit_phi2.data.prompts import format_prompt
from lit_phi2.pretrained import BaseModel

_LIBRARIES = {"peft": "peft", "merged": "transformers", "gguf": "gguf", "gguf-merged": "gguf", "mlx": "mlx"}
_RELATIONS = {"peft": "adapter", "merged": "finetune", "gguf": "adapter", "gguf-merged": "finetune", "mlx": "adapter"}
_VERSIONS = ("torch", "transformers", "peft", "gguf", "xllamacpp", "mlx", "mlx-lm")
_PUBLISHED_LICENCES = {"microsoft/phi-2": "mit"}
_PHI2_LIMITS = (
    "It states what is false with confidence, as its base does, and it has learned the form of its training records, "
    "not the rules of any plan. Nothing it writes is medical, insurance or legal advice, and a person who knows the "
    "case reads every text before it is sent. It was trained on single instructions in English, each with one response."
)


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the caller knows of the run.

    Attributes:
        data_counts: split -> number of records.
        metrics: of test_metrics.json; empty if there is none.
        config: the run's config file; empty if it is not known.
    """

    data_counts: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def model_card(
    adapter: Adapter | None,
    base: BaseModel,
    *,
    format: str,
    fingerprints: Mapping[str, Any],
    checks: str,
    load: str,
    facts: CardFacts,
) -> str:
    """The text of README.md.

    Args:
        adapter: None for the base alone.
        base: of the export.
        format: peft, merged, gguf, gguf-merged or mlx.
        fingerprints: of base, adapter and template.
        checks: what was checked, in which runtime, with the figures.
        load: the command that loads the result.
        facts: what the caller knows of the run.
    """
    base_name = base.public_name
    sections = {
        "How to load it": f"```\n{load}\n```{_base_note(base)}",
        "The prompt": _prompt_section(),
        "What was checked": checks,
        "Data": _table(("split", "records"), facts.data_counts) or "Not known to this export.",
        "Metrics": _table(("metric", "value"), facts.metrics) or "No test was run.",
        "Settings": _settings(adapter, facts.config),
        "Fingerprints": _table(("of", "value"), fingerprints),
        "Versions": _table(("package", "version"), versions()),
        "Limits": _PHI2_LIMITS,
    }
    kind = "A LoRA adapter for" if adapter is not None and _RELATIONS[format] == "adapter" else "A model made from"
    change = "converted" if adapter is None else "fine-tuned"
    opening = f"# {base_name.rpartition('/')[2]}, {change} with lit_phi2\n\n{kind} `{base_name}`, as {format}."
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"---\n{_front_matter(base, adapter, format)}---\n\n{opening}\n\n{body}\n"


def versions() -> dict[str, str]:
    """Of lit_phi2, Python and every package of an export that is installed."""
    found = {"lit_phi2": __version__, "python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def base_licence(base: BaseModel) -> str:
    """The licence in the base's own card; 'unknown' if it has none."""
    if base.name in _PUBLISHED_LICENCES:
        return _PUBLISHED_LICENCES[base.name]
    card = base.folder / "README.md"
    text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
    if not text.startswith("---\n"):
        return "unknown"
    try:
        front = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return "unknown"
    licence = front.get("license") if isinstance(front, dict) else None
    return licence if isinstance(licence, str) else "unknown"


def shorten_path(value: Any) -> Any:
    """A setting as a card shows it: of an absolute path its last part, in lists and objects too.

    >>> shorten_path({"train_files": ["/home/ann/claims.jsonl", "claims:train"], "lora_r": 2})
    {'train_files': ['claims.jsonl', 'claims:train'], 'lora_r': 2}
    """
    if isinstance(value, Mapping):
        return {key: shorten_path(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shorten_path(item) for item in value]
    if isinstance(value, Path):
        value = str(value)
    is_path = isinstance(value, str) and (value.startswith(("/", "~", "\\\\")) or value[1:3] in (":\\", ":/"))
    return value.replace("\\", "/").rstrip("/").rpartition("/")[2] if is_path else value


def _base_note(base: BaseModel) -> str:
    """Why the metadata names no base, where it is not on the hub."""
    if base.revision:
        return ""
    if base.name == "tiny":
        return "\n\nThe base `tiny` comes with lit_phi2, in lit_phi2/assets/tiny-phi, and is not on the hub."
    return f"\n\nThe base was read from a folder named `{base.public_name}`; its fingerprint below tells which it is."


def _front_matter(base: BaseModel, adapter: Adapter | None, format: str) -> str:
    front: dict[str, Any] = {"license": base_licence(base)}
    if base.revision:  # on the hub, which refuses a card whose base is no id there
        front["base_model"] = base.name
        if adapter is not None:
            front["base_model_relation"] = _RELATIONS[format]
    front |= {
        "library_name": _LIBRARIES[format],
        "pipeline_tag": "text-generation",
        "language": ["en"],
        "tags": ["phi-2", "lora", "lit_phi2", "insurance"],
    }
    text: str = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return text


def _prompt_section() -> str:
    prompt = format_prompt("Why was this claim denied?", "Claim 4417, code 97, $120.00")
    return (
        "The input section is left out where there is no input. The response follows the last line, and ends with "
        f"<|endoftext|>.\n\n```\n{prompt}```"
    )


def _settings(adapter: Adapter | None, config: Mapping[str, Any]) -> str:
    lines = []
    if adapter is not None:
        settings = adapter.settings
        kind = "Rank-stabilised LoRA" if settings.use_rslora else "LoRA"
        lines.append(
            f"{kind} of rank {settings.lora_r}, alpha {settings.lora_alpha}, on {', '.join(settings.target_modules)}."
        )
    if config:
        shown = yaml.safe_dump(shorten_path(config), sort_keys=False, allow_unicode=True)
        lines.append(f"```yaml\n{shown}```")
    return "\n\n".join(lines) or "The base alone, without an adapter."


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    for key, value in rows.items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        lines.append("| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in (key, shown)) + " |")
    return "\n".join(lines)

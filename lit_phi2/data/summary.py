"""Summary: what `inspect` prints about the data, before a model is loaded.

train  claims:train (instruction)
  records            4,400
  tokens             1,012,345 (230.1 per record)
  ...

memory  base tiny, 6.8 M parameters, ...        given by the Trainer
  ...

caches  runs/cache: 2 of 1.3 GB, with the texts of records
  runs/cache/1a2b3c4d5e6f7a8b  1.0 GB, used 2026-01-31 09:12, from big.jsonl
  ...

The first example; the supervised part is between >>> and <<<

Only the example shows text of a record.
"""

from collections.abc import Sequence
from datetime import datetime

from lit_phi2.data.cache_list import CacheInfo, list_caches, remove_cache
from lit_phi2.data.collate import collate
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.invalid import describe_invalid
from lit_phi2.data.schedule import BatchingConfig, num_rows
from lit_phi2.data.splits import Split
from lit_phi2.types import Example

MAX_FILES = 10  # that a split lists


def report(
    data: ClaimsDataModule, warnings: Sequence[str] = (), *, remove_unused_caches: bool = False, memory: str = ""
) -> str:
    """The counts of every split that is set up, caches, warnings, and an example with its supervised part marked.

    Args:
        data: after `read`.
        warnings: of `read`.
        remove_unused_caches: also remove the caches that no run uses.
        memory: the memory plan; left out if empty.
    """
    parts = [_split_report(split_name, split, data) for split_name, split in data.splits.items()]
    parts += [memory] if memory else []
    parts.append(_cache_report(data, remove_unused=remove_unused_caches))
    if warnings:
        parts.append("\n".join(f"warning: {warning}" for warning in warnings))
    example = next(iter(data.splits.values())).examples[0]
    parts.append(f"The first example; the supervised part is between >>> and <<<\n\n{show_supervision(example, data)}")
    return "\n\n".join(parts)


def show_supervision(example: Example, data: ClaimsDataModule) -> str:
    """An example decoded from its tokens, with its supervised part, EOS included, between >>> and <<<."""
    assert data.tokenizer is not None
    batch = collate([example], [(0,)])
    supervised_mask = batch.labels[0] >= 0
    prompt = data.tokenizer.decode(batch.input_ids[0][~supervised_mask])
    response = data.tokenizer.decode(batch.labels[0][supervised_mask])
    return f"{prompt}>>>{response}<<<"


# Splits


def _split_report(split_name: str, split: Split, data: ClaimsDataModule) -> str:
    lengths = split.lengths
    longest = int(lengths.argmax())
    num_tokens, num_supervised = int(lengths.sum()), int(split.supervised.sum())
    total = len(split.examples) + len(split.left_out)
    rows = num_rows(lengths, BatchingConfig(data.max_length, data.packing))
    location = split.records[longest].location
    lines = [
        ("records", f"{len(split.examples):,}"),
        ("tokens", f"{num_tokens:,} ({num_tokens / len(lengths):.1f} per record)"),
        ("supervised tokens", f"{num_supervised:,} ({num_supervised / num_tokens:.1%})"),
        ("longest", f"{lengths[longest]} tokens, at {location}; the limit is {data.max_length}"),
        ("truncated", f"{split.truncated:,} ({split.truncated / total:.1%})"),
        ("left out", f"{len(split.left_out):,} ({len(split.left_out) / total:.1%})"),
        ("rows", f"{rows:,} of up to {data.max_length} tokens, {num_tokens / (rows * data.max_length):.1%} full"),
    ]
    if data.read_options.redact:
        lines.insert(-1, ("redacted", _describe_redacted(split.redacted)))
    body = "\n".join(f"  {name:<18} {value}" for name, value in lines)
    left_out = "".join(f"\n  left out: {line}" for line in describe_invalid(split.left_out))
    return f"{split_name}  {_describe_files(split)}\n{body}{left_out}"


def _describe_redacted(counts: dict[str, int]) -> str:
    """
    >>> _describe_redacted({"ssn": 2, "claim_number": 1040})
    '1,042: claim_number 1,040, ssn 2'
    """
    kinds = [f"{kind} {counts[kind]:,}" for kind in sorted(counts, key=lambda kind: -counts[kind])]
    return f"{sum(counts.values()):,}" + (f": {', '.join(kinds)}" if kinds else "")


def _describe_files(split: Split) -> str:
    """The files with their forms: one beside the name of the split, several below it."""
    files = [f"{source} ({split.forms.get(source, 'no known form')})" for source in split.sources]
    if len(files) == 1:
        return files[0]
    more = [f"... and {len(files) - MAX_FILES:,} more"] if len(files) > MAX_FILES else []
    return f"{len(files):,} files" + "".join(f"\n  {line}" for line in files[:MAX_FILES] + more)


# Caches


def _cache_report(data: ClaimsDataModule, *, remove_unused: bool) -> str:
    """The caches of all runs, and the unused ones among them, which are removed if that was asked for."""
    folder = data.cache_folder().absolute()
    caches = list_caches(folder)
    if not caches:
        return f"caches  {folder}: none; the tokens and texts of files above 64 MiB are stored there"
    size = sum(cache.num_bytes for cache in caches)
    lines = [f"caches  {folder}: {len(caches)} of {_format_bytes(size)}, with the texts of records"]
    unused = [cache for cache in caches if cache.unused_because]
    for cache in caches:
        result = ""
        if cache.unused_because:
            kept = remove_cache(cache) if remove_unused else ""
            action = "" if not remove_unused else "; removed" if kept is None else f"; kept, because {kept}"
            result = f"; no run uses it: {cache.unused_because}{action}"
        lines.append(f"  {_describe_cache(cache)}{result}")
    if unused and not remove_unused:
        lines.append("  To remove those that no run uses: inspect --remove_unused_caches true.")
    if len(unused) < len(caches):
        lines.append("  To remove another, delete its folder while no run uses it; a later run builds it again.")
    return "\n".join(lines)


def _describe_cache(cache: CacheInfo) -> str:
    used = datetime.fromtimestamp(cache.last_used).strftime("%Y-%m-%d %H:%M")
    more = f" and {len(cache.sources) - MAX_FILES} more" if len(cache.sources) > MAX_FILES else ""
    sources = ", ".join(cache.sources[:MAX_FILES]) or "unknown files"
    return f"{cache.folder}  {_format_bytes(cache.num_bytes)}, used {used}, from {sources}{more}"


def _format_bytes(num_bytes: int) -> str:
    """
    >>> _format_bytes(1_300_000_000), _format_bytes(70_400_000)
    ('1.3 GB', '70 MB')
    """
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"

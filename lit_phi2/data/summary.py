"""Report: what `inspect` prints about the data, before any model is loaded.

train  claims:train
  records            480
  tokens             91,204   ...
"""

from lit_phi2.data.collate import collate
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.schedule import BatchingConfig, num_rows
from lit_phi2.data.splits import Split
from lit_phi2.types import Example


def report(data: ClaimsDataModule) -> str:
    """The splits that are set up, in figures, and one example with its supervised part marked."""
    parts = [_split_report(split_name, split, data) for split_name, split in data.splits.items()]
    first = next(iter(data.splits.values()))
    parts.append(
        f"The first example; what is supervised stands between >>> and <<<\n\n{show_supervision(first.examples[0], data)}"
    )
    return "\n\n".join(parts)


def show_supervision(example: Example, data: ClaimsDataModule) -> str:
    """An example decoded from its tokens, with its supervised part, end token included, between >>> and <<<."""
    assert data.tokenizer is not None
    batch = collate([example], [(0,)])
    supervised = batch.labels[0] >= 0
    prompt = data.tokenizer.decode(batch.input_ids[0][~supervised])
    response = data.tokenizer.decode(batch.labels[0][supervised])
    return f"{prompt}>>>{response}<<<"


def _split_report(split_name: str, split: Split, data: ClaimsDataModule) -> str:
    lengths, supervised = split.lengths, split.supervised
    longest = int(lengths.argmax())
    tokens, learned = int(lengths.sum()), int(supervised.sum())
    total = len(split.examples) + len(split.left_out)
    rows = num_rows(lengths, BatchingConfig(data.max_length, data.packing))
    lines = [
        ("records", f"{len(split.examples):,}"),
        ("tokens", f"{tokens:,} ({tokens / len(lengths):.1f} a record)"),
        ("supervised tokens", f"{learned:,} ({learned / tokens:.1%})"),
        (
            "longest",
            f"{lengths[longest]} tokens, {split.examples[longest].id!r}; {data.max_length} are allowed",
        ),
        ("trimmed", f"{split.truncated:,} ({split.truncated / total:.1%})"),
        ("left out", f"{len(split.left_out):,} ({len(split.left_out) / total:.1%})"),
        ("rows", f"{rows:,} of up to {data.max_length} tokens, {tokens / (rows * data.max_length):.1%} full"),
    ]
    body = "\n".join(f"  {name:<18} {value}" for name, value in lines)
    faults = "".join(f"\n  left out: {fault}" for fault in split.left_out[:20])
    return f"{split_name}  {', '.join(split.sources)}\n{body}{faults}"

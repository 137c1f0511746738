"""Summary: what `inspect` prints about the data, before a model is loaded.

train  claims:train
  records            4,400
  tokens             1,012,345 (230.1 per record)
  ...

The first example; the supervised part is between >>> and <<<
"""

from lit_phi2.data.collate import collate
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.schedule import BatchingConfig, num_rows
from lit_phi2.data.splits import Split
from lit_phi2.types import Example

MAX_SHOWN = 20  # records that were left out


def report(data: ClaimsDataModule) -> str:
    """The counts of every split that is set up, and the first example with its supervised part marked."""
    parts = [_split_report(split_name, split, data) for split_name, split in data.splits.items()]
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


def _split_report(split_name: str, split: Split, data: ClaimsDataModule) -> str:
    lengths = split.lengths
    longest = int(lengths.argmax())
    num_tokens, num_supervised = int(lengths.sum()), int(split.supervised.sum())
    total = len(split.examples) + len(split.left_out)
    rows = num_rows(lengths, BatchingConfig(data.max_length, data.packing))
    lines = [
        ("records", f"{len(split.examples):,}"),
        ("tokens", f"{num_tokens:,} ({num_tokens / len(lengths):.1f} per record)"),
        ("supervised tokens", f"{num_supervised:,} ({num_supervised / num_tokens:.1%})"),
        ("longest", f"{lengths[longest]} tokens, {split.examples[longest].id!r}; the limit is {data.max_length}"),
        ("truncated", f"{split.truncated:,} ({split.truncated / total:.1%})"),
        ("left out", f"{len(split.left_out):,} ({len(split.left_out) / total:.1%})"),
        ("rows", f"{rows:,} of up to {data.max_length} tokens, {num_tokens / (rows * data.max_length):.1%} full"),
    ]
    body = "\n".join(f"  {name:<18} {value}" for name, value in lines)
    left_out = "".join(f"\n  left out: {record}" for record in split.left_out[:MAX_SHOWN])
    return f"{split_name}  {', '.join(split.sources)}\n{body}{left_out}"

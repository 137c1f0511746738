"""Build the packaged tiny Phi: train a tokenizer and a 3.8 M parameter Phi on a folder of prose.

    CORPUS_DIR/*.txt -> documents -> byte-level BPE -> windows of tokens -> PhiForCausalLM -> --output_dir

    python scripts/build_tiny_phi.py --corpus CORPUS_DIR --steps 4400

In:  any folder of UTF-8 *.txt. Documents stand apart by a line <|endoftext|> or, in a file without one, by an
     empty line before a line that is not indented (as MedQuAD is laid out: question, answer, empty line).
Out: a folder in Hugging Face form (config, bfloat16 safetensors, tokenizer, model card), rewritten at every
     checkpoint so that a half-trained model can already be used.

The result depends on the corpus and the arguments alone (on one machine, with one number of threads). A run
that was stopped goes on from its checkpoint in --work_dir when started again with the same arguments.
Windows hold documents back to back, and attention crosses from one to the next there; the end token between
them teaches the model where a text stops. Two cores with bfloat16 products train on about 10,000 tokens/s.
"""

import argparse
import copy
import hashlib
import math
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (as everyone writes it)
from transformers import AttentionInterface, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast
from transformers.masking_utils import AttentionMaskInterface

END, END_ID = "<|endoftext|>", 0
VOCAB_SIZE = 3072
WINDOW = 1024  # tokens; the longest context trained on, and max_position_embeddings
# A step cuts its windows to one of these lengths, in turn: short is cheap, long teaches far positions.
CONTEXT_LENGTHS = (256, 256, 512, 256, 256, 1024)
TOKENS_PER_STEP = 4096
HELD_OUT_LENGTH = 512  # context when the held-out loss is measured
PEAK_LEARNING_RATE, FINAL_FRACTION, WARMUP_STEPS = 2e-3, 0.1, 200

CC0 = "CC0 1.0 Universal (CC0 1.0) Public Domain Dedication"
# File name up to its first "_" or "." -> source and licence as the model card names them.
SOURCES = {
    "medquad": "MedQuAD, questions answered on web sites of the US National Institutes of Health (NIH) | "
    "Creative Commons Attribution 4.0 International (CC BY 4.0), attribution below",
    "va": f"Plain-English pages of the US Department of Veterans Affairs, 2019 | {CC0}",
    "healthcaregov": "HealthCare.gov - code & content, by Centers for Medicare & Medicaid Services, 2013 | "
    "Public Domain Mark 1.0, http://creativecommons.org/publicdomain/mark/1.0/",
    "plainlanguage": f"plainlanguage.gov | US Government work in the public domain, {CC0}",
    "18f": f"Web pages and guides of 18F | US Government work in the public domain, {CC0}",
    "digitalgov": f"digital.gov | US Government work in the public domain, {CC0}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.txt")
    parser.add_argument("--steps", type=int, required=True, help=f"steps of {TOKENS_PER_STEP} tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the order of windows")
    parser.add_argument("--output_dir", type=Path, default=Path("lit_phi2/assets/tiny-phi"))
    parser.add_argument("--work_dir", type=Path, default=Path("build/tiny-phi"), help="cache, checkpoint")
    parser.add_argument("--eval_every", type=int, default=500, help="steps between held-out losses")
    parser.add_argument("--save_minutes", type=float, default=4.0, help="minutes between checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    data = load_or_tokenize(args.corpus, args.work_dir)
    print(f"{len(data['train']):,} tokens to train on, {len(data['held_out']):,} held out", flush=True)
    train(args, data)


def load_or_tokenize(corpus: Path, work_dir: Path) -> dict[str, Any]:
    """The corpus as tokens; from the cache in `work_dir` if texts and layout are still the same.

    Returns:
        train, held_out: (N,) int64, documents with END after each. Exact copies are dropped, then a document
            is held out if its hash is a multiple of 100, whatever the others are.
        held_out_bytes: UTF-8 bytes of the held-out documents.
        files: (name, documents, bytes) per file.
        tokenizer: as JSON; it was trained without the held-out documents.
        fingerprint: of the texts and the layout.
    """
    paths = sorted(corpus.glob("*.txt"))
    if not paths:
        raise FileNotFoundError(f"{corpus} holds no *.txt. Give --corpus a folder of text files.")
    hasher = hashlib.sha256(f"{VOCAB_SIZE} {WINDOW} {CONTEXT_LENGTHS}".encode())
    for path in paths:
        hasher.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    fingerprint, cache = hasher.hexdigest(), work_dir / "tokens.pt"
    if cache.exists() and (data := torch.load(cache))["fingerprint"] == fingerprint:
        return data

    files, documents = [], {}  # a dict keeps the order and drops copies
    for path in paths:
        found = split_documents(path.read_text(encoding="utf-8"))
        files.append((path.name, len(found), path.stat().st_size))
        for text in found:
            documents[text] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100 == 0
    kept = [text for text, is_held_out in documents.items() if not is_held_out]
    held_out = [text for text, is_held_out in documents.items() if is_held_out]
    tokenizer = train_tokenizer(kept)
    data = {
        "train": encode(kept, tokenizer),
        "held_out": encode(held_out, tokenizer),
        "held_out_bytes": sum(len(text.encode()) for text in held_out),
        "files": files,
        "tokenizer": tokenizer.to_str(),
        "fingerprint": fingerprint,
    }
    for part, least in (("train", 2 * TOKENS_PER_STEP), ("held_out", HELD_OUT_LENGTH + 1)):
        if len(data[part]) < least:
            raise ValueError(f"{corpus}: {len(data[part])} {part} tokens, at least {least} are needed. Add text.")
    save_whole(data, cache)
    return data


def split_documents(text: str) -> list[str]:
    r"""The documents of one file; white space around line ends is dropped.

    >>> split_documents("one\n<|endoftext|>\ntwo\n\nstill two\n")
    ['one', 'two\n\nstill two']
    >>> split_documents("What is A ?\nA  \n \n  goes on\n\nWhat is B ?\nB")
    ['What is A ?\nA\n\ngoes on', 'What is B ?\nB']
    """
    end_line = rf"(?m)^{re.escape(END)}$"
    parts = re.split(end_line if re.search(end_line, text) else r"\n\n+(?=\S)", text)
    tidy = (re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]*\n[ \t]*", "\n", part)).strip() for part in parts)
    return [document for document in tidy if document]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE in which each digit is a token, so that a claim number can be copied digit by digit."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that no text is out of vocabulary
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.token_to_id(END) == END_ID
    return tokenizer


def encode(texts: list[str], tokenizer: Tokenizer) -> Tensor:
    return torch.tensor([i for encoding in tokenizer.encode_batch(texts) for i in [*encoding.ids, END_ID]])


def train(args: argparse.Namespace, data: dict[str, Any]) -> None:
    """Train up to `args.steps`, from the checkpoint if there is one, and write the output folder."""
    model = new_model(args.seed)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    identity = {key: getattr(args, key) for key in ("steps", "seed", "eval_every")}
    identity["data"] = data["fingerprint"]
    checkpoint_path = args.work_dir / "checkpoint.pt"
    first, nats = 0, 0.0
    curve: list[tuple[int, float, float]] = []  # step, mean training loss since the last row, held-out loss
    if checkpoint_path.exists():
        state = torch.load(checkpoint_path)
        if state["identity"] != identity:
            raise ValueError(
                f"{checkpoint_path} is of a run with {state['identity']}, but this one has {identity}. "
                "Give the same arguments to go on with it, or another --work_dir to start afresh."
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, nats, curve = state["step"], state["nats"], state["curve"]
        print(f"going on from step {first}", flush=True)

    saved_at = reported_at = time.monotonic()
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        loss = backward(model, *windows_of_step(data["train"], step, args.seed))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        nats, done = nats + loss, step + 1
        if done % 50 == 0:
            rate = min(50, done - first) * TOKENS_PER_STEP / (time.monotonic() - reported_at)
            print(f"step {done:5d}  loss {loss:.3f}  {rate:,.0f} tokens/s", flush=True)
            reported_at = time.monotonic()
        if done % args.eval_every == 0 or done == args.steps:
            since = done - (curve[-1][0] if curve else 0)
            curve.append((done, nats / since, held_out_loss(model, data["held_out"])))
            nats = 0.0
            print(f"step {done:5d}  train {curve[-1][1]:.4f}  held out {curve[-1][2]:.4f}", flush=True)
        if done == args.steps or time.monotonic() - saved_at > 60 * args.save_minutes:
            state = {"identity": identity, "step": done, "nats": nats, "curve": curve}
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_whole(state, checkpoint_path)
            write_asset(args, model, data, done, curve)
            saved_at = time.monotonic()
    if first >= args.steps:  # trained before: write the folder again, for a card of today's wording
        write_asset(args, model, data, first, curve)


def new_model(seed: int) -> PhiForCausalLM:
    """Random Phi: 3.8 M parameters, half of each head rotary, no dropout; attention and GELU sped up."""
    torch.manual_seed(seed)
    config = PhiConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )
    model = PhiForCausalLM(config)
    AttentionInterface.register("causal_blocks", causal_attention)
    AttentionMaskInterface.register("causal_blocks", lambda *_, **__: None)
    model.set_attn_implementation("causal_blocks")
    for layer in model.model.layers:
        layer.mlp.activation_fn = nn.GELU(approximate="tanh")  # gelu_new in one pass instead of six
    return model


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention by batched products, 128 queries at a time against the keys up to them.

    On CPU at 256 to 1024 positions it takes about half the time of the flash kernel, whose backward is slow.

    Args:
        query, key, value: (B, heads, T, width).

    Returns:
        (B, T, heads, width), and no attention weights.
    """
    batch, heads, length, width = query.shape
    query, key, value = (x.to(torch.bfloat16).flatten(0, 1) for x in (query * scaling, key, value))
    outputs = []
    for start in range(0, length, 128):
        end = min(start + 128, length)
        future = torch.full((end - start, end), float("-inf"), dtype=query.dtype).triu(start + 1)
        with torch.autocast("cpu", enabled=False):  # or softmax would be cast to float32
            scores = torch.baddbmm(future.unsqueeze(0), query[:, start:end], key[:, :end].transpose(1, 2))
            outputs.append(torch.bmm(scores.softmax(-1), value[:, :end]))
    return torch.cat(outputs, dim=1).view(batch, heads, length, width).transpose(1, 2), None


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to FINAL_FRACTION of the peak."""
    warmup = min(WARMUP_STEPS, max(1, steps // 10))
    if step < warmup:
        return PEAK_LEARNING_RATE * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return PEAK_LEARNING_RATE * (FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine)


def windows_of_step(ids: Tensor, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and their next tokens at a step, both (B, T) with T from CONTEXT_LENGTHS.

    An epoch cuts `ids` into windows at an offset of its own and shuffles them.
    """
    num_windows = (len(ids) - WINDOW) // WINDOW
    per_step = TOKENS_PER_STEP // WINDOW
    epoch, index = divmod(step, num_windows // per_step)
    rng = np.random.default_rng((seed, epoch))
    offset = int(rng.integers(WINDOW))
    chosen = rng.permutation(num_windows)[index * per_step : (index + 1) * per_step]
    spans = torch.stack([ids[start : start + WINDOW + 1] for start in (offset + chosen * WINDOW).tolist()])
    length = CONTEXT_LENGTHS[step % len(CONTEXT_LENGTHS)]
    return spans[:, :-1].reshape(-1, length), spans[:, 1:].reshape(-1, length)


def backward(model: PhiForCausalLM, inputs: Tensor, targets: Tensor) -> float:
    """Add the gradients of the mean next-token loss, and return that loss in nats."""
    nats = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        leaf = hidden.detach().requires_grad_()
        # The head goes 512 tokens at a time: its float32 logits then stay in cache, twice as fast.
        for some, labels in zip(leaf.flatten(0, 1).split(512), targets.flatten().split(512), strict=True):
            loss = F.cross_entropy(model.lm_head(some).float(), labels, reduction="sum") / targets.numel()
            loss.backward()
            nats += loss.item()
    hidden.backward(leaf.grad)
    return nats


@torch.no_grad()
def held_out_loss(model: PhiForCausalLM, ids: Tensor) -> float:
    """Mean nats per token over (N,) `ids` in windows of HELD_OUT_LENGTH; the ragged end is left out."""
    used = (len(ids) - 1) // HELD_OUT_LENGTH * HELD_OUT_LENGTH
    inputs, targets = (part.view(-1, HELD_OUT_LENGTH) for part in (ids[:used], ids[1 : used + 1]))
    nats = 0.0
    for some, labels in zip(inputs.split(4), targets.split(4), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=some, use_cache=False).logits
        nats += F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum").item()
    return nats / used


def write_asset(args: argparse.Namespace, model: PhiForCausalLM, data: dict[str, Any], step: int, curve: list) -> None:
    """Write model, tokenizer and card to `args.output_dir`, each file whole: someone may be reading it."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(data["tokenizer"]),
        bos_token=END,
        eos_token=END,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )
    with tempfile.TemporaryDirectory(dir=args.output_dir.parent) as folder:
        copy.deepcopy(model).bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # Measure what was saved: rounded to bfloat16, with Phi's own attention and activation.
        saved = PhiForCausalLM.from_pretrained(folder)
        loss = held_out_loss(saved, data["held_out"])
        Path(folder, "README.md").write_text(model_card(args, data, saved, step, curve, loss), encoding="utf-8")
        for path in sorted(Path(folder).iterdir()):
            path.chmod(0o644)  # safetensors writes a file that only its owner can read
            os.replace(path, args.output_dir / path.name)
    print(f"step {step:5d}  saved to {args.output_dir}, held out {loss:.4f} as saved", flush=True)


def model_card(
    args: argparse.Namespace, data: dict[str, Any], model: PhiForCausalLM, step: int, curve: list, loss: float
) -> str:
    totals: dict[str, list[int]] = {}
    for name, documents, size in data["files"]:
        unknown = f"{name} | not recorded here: find out before you share these weights"
        total = totals.setdefault(SOURCES.get(re.split(r"[_.]", name)[0], unknown), [0, 0])
        total[0], total[1] = total[0] + documents, total[1] + size
    seen, num_train, num_held_out = step * TOKENS_PER_STEP, len(data["train"]), len(data["held_out"])
    return CARD.format(
        **{key: f"{value:,}" for key, value in model.config.to_dict().items() if isinstance(value, int)},
        parameters=f"{model.num_parameters() / 1e6:.2f}",
        unfinished="" if step == args.steps else f"\n**Half-trained: step {step:,} of {args.steps:,}.**\n",
        sources="\n".join(f"| {text} | {n:,} | {size / 1e6:.1f} |" for text, (n, size) in totals.items()),
        recipe=f"{seen / 1e6:.1f} M tokens seen, {seen / num_train:.1f} times the {num_train / 1e6:.2f} M "
        f"there are,\nin {step:,} steps of {TOKENS_PER_STEP:,}, at a learning rate of {PEAK_LEARNING_RATE:g}",
        rows="\n".join(f"| {at:,} | {at * TOKENS_PER_STEP / 1e6:.1f} | {a:.3f} | {b:.3f} |" for at, a, b in curve),
        num_held_out=f"{num_held_out:,}",
        loss=f"{loss:.3f} nats per token, "
        f"{loss / math.log(2) * num_held_out / data['held_out_bytes']:.3f} bits per byte",
        args=args,
    )


CARD = """---
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [phi, toy]
---

# tiny-phi

A Phi of {parameters} M parameters, with which every part of the pipeline runs in seconds on a laptop, without
a network. It is a toy: it has the form of Phi-2, not its knowledge.
{unfinished}
## Limits

It writes sentences that look like health and government prose and mean little; what it states is often
false. It gives no medical, insurance, legal or other advice, and nothing it writes may be used as such.
Results on it say that the code works, not how well Phi-2 would do. It has read English only, mostly medical,
and was never shown the project's instruction template.

## Shape

| | |
|---|---|
| class | `PhiForCausalLM`, bfloat16 safetensors, `gelu_new`, untied head with bias |
| layers | {num_hidden_layers}, {hidden_size} wide, {intermediate_size} inside |
| heads | {num_attention_heads} in each layer, half of each rotary |
| longest input | {max_position_embeddings} tokens |
| vocabulary | {vocab_size}: byte-level BPE of the same text, each digit a token |
| special token | `<|endoftext|>`, both bos and eos; no pad token |

## Data

| source | licence | documents | MB |
|---|---|---|---|
{sources}

White space was tidied, exact copies of documents dropped, and the text cut into tokens. Before that, pages and
questions about appeals had been left out of the VA and HealthCare.gov text, and paragraphs that share 13 words
in a row with a question-answering validation set had been cut.

Attribution for MedQuAD: Asma Ben Abacha and Dina Demner-Fushman, "A Question-Entailment Approach to Question
Answering", BMC Bioinformatics 20, 511 (2019), https://doi.org/10.1186/s12859-019-3119-4; data at
https://github.com/abachaa/MedQuAD, under https://creativecommons.org/licenses/by/4.0/. Keep this attribution
with the weights. No source endorses this model. The weights themselves are under Apache-2.0, as the
project is.

## Training

{recipe} after a warm-up, then a cosine to a tenth of it.
Contexts of 256, 512 and 1,024 tokens; AdamW, weight decay 0.1; bfloat16 autocast over float32 weights; no
dropout.

| step | M tokens | training loss | held-out loss |
|---|---|---|---|
{rows}

Losses are in nats per token; the training loss is the mean since the row above. One document in a hundred
was held out, {num_held_out} tokens in all. As saved, in bfloat16, in contexts of 512, their loss is
**{loss}.** Many medical documents share stock
paragraphs with others, which flatters these figures.

Built by

    python scripts/build_tiny_phi.py --corpus CORPUS_DIR --steps {args.steps} --seed {args.seed}
"""


def save_whole(value: Any, path: Path) -> None:
    """torch.save that leaves the old file or the new one, never half of one."""
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    os.replace(partial, path)


if __name__ == "__main__":
    main()

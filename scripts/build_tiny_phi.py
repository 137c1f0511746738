"""Build the packaged tiny Phi: train a tokenizer and a Phi of a few million parameters on folders of text.

    FOLDER/*.txt -> documents -> byte-level BPE -> windows of tokens -> PhiForCausalLM -> --output_dir

    python scripts/build_claims_prose.py --output_dir build/prose
    python scripts/build_tiny_phi.py --corpus CORPUS_DIR build/prose --steps 6800 --output_dir build/stage1
    python scripts/build_claims_prose.py --whole --megabytes 120 --output_dir build/prose-whole
    python scripts/build_tiny_phi.py --corpus CORPUS_DIR build/prose-whole --steps 2600 --start_from build/stage1 \
        --learning_rate 4e-3 --work_dir build/tiny-phi-2 --output_dir build/stage2
    python scripts/build_tiny_phi.py --corpus CORPUS_DIR build/prose-whole --steps 3200 --start_from build/stage2 \
        --learning_rate 5e-3 --work_dir build/tiny-phi-3 --output_dir build/stage3
    python scripts/build_claims_prose.py --whole --among CORPUS_DIR --megabytes 120 --output_dir build/prose-retold
    python scripts/build_tiny_phi.py --corpus CORPUS_DIR build/prose-retold --steps 3200 --start_from build/stage3 \
        --learning_rate 5e-3 --work_dir build/tiny-phi-4

In:  any folders of UTF-8 *.txt. Documents are separated by a line <|endoftext|> or, in a file without one, by an
     empty line before a line that is not indented (the layout of MedQuAD: question, answer, empty line).
Out: a folder in Hugging Face form (config, bfloat16 safetensors, tokenizer, model card), rewritten at every
     checkpoint, so that a half-trained model can be used.

The result depends only on the corpus and the arguments (on one machine, with one number of threads). A run that was
stopped continues from its checkpoint in --work_dir when it is started with the same arguments. A window begins at the
start of a document and continues with the next ones; attention stays inside a document. The end token between them
teaches the model where a text stops. Two cores with bfloat16 matmuls train on about 6,300 tokens/s.
"""

import argparse
import copy
import hashlib
import math
import os
import re
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 the name in torch's own documentation
from transformers import AttentionInterface, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast
from transformers.masking_utils import AttentionMaskInterface

END, END_ID = "<|endoftext|>", 0
VOCAB_SIZE = 4096
WINDOW = 1024  # tokens; the longest context trained on, and max_position_embeddings
# A step cuts its windows to the next of these lengths: short ones are cheap, long ones teach far positions.
CONTEXT_LENGTHS = (512, 512, 512, 512, 512, 1024)
TOKENS_PER_STEP = 4096
QUERY_BLOCK = 128  # queries whose attention is computed at a time
HELD_OUT_LENGTH = 512  # tokens of a held-out document, from its first, whose loss is measured
PEAK_LEARNING_RATE, FINAL_FRACTION, WARMUP_STEPS = 8e-3, 0.05, 100

CC0 = "CC0 1.0 Universal (CC0 1.0) Public Domain Dedication"
# File name up to its first "_" or "." -> source and licence, as the model card states them.
SOURCES = {
    "medquad": "MedQuAD, questions answered on web sites of the US National Institutes of Health (NIH) | "
    "Creative Commons Attribution 4.0 International (CC BY 4.0), attribution below",
    "claims": "Claims prose composed by this project, `scripts/build_claims_prose.py`; all people, plans and numbers "
    "are invented | Apache-2.0, as the project",
    "va": f"Plain-English pages of the US Department of Veterans Affairs, 2019 | {CC0}",
    "healthcaregov": "HealthCare.gov - code & content, by Centers for Medicare & Medicaid Services, 2013 | "
    "Public Domain Mark 1.0, http://creativecommons.org/publicdomain/mark/1.0/",
    "plainlanguage": f"plainlanguage.gov | US Government work in the public domain, {CC0}",
    "18f": f"Web pages and guides of 18F | US Government work in the public domain, {CC0}",
    "digitalgov": f"digital.gov | US Government work in the public domain, {CC0}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, nargs="+", help="folders of *.txt")
    parser.add_argument("--steps", type=int, required=True, help=f"steps of {TOKENS_PER_STEP} tokens")
    parser.add_argument(
        "--start_from", type=Path, help="a folder that this program wrote: take its weights, sizes and tokenizer"
    )
    parser.add_argument("--learning_rate", type=float, default=PEAK_LEARNING_RATE, help="the peak")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the order of windows")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--output_dir", type=Path, default=Path("lit_phi2/assets/tiny-phi"))
    parser.add_argument(
        "--work_dir", type=Path, default=Path("build/tiny-phi"), help="for the cache and the checkpoint"
    )
    parser.add_argument("--eval_every", type=int, default=800, help="steps between held-out losses")
    parser.add_argument("--save_minutes", type=float, default=10.0, help="minutes between checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    data = load_or_tokenize(args.corpus, args.work_dir, args.start_from)
    print(f"{len(data['train']):,} tokens to train on, {len(data['held_out']):,} held out", flush=True)
    train(args, data)


def load_or_tokenize(corpus: list[Path], work_dir: Path, start_from: Path | None) -> dict[str, Any]:
    """The corpus as tokens; from the cache in `work_dir` if texts and windows have not changed.

    Returns:
        train, held_out: (N,) int64, documents with END after each. Exact copies are dropped, then a document
            is held out if its hash is a multiple of 200, independently of the others.
        held_out_bytes: UTF-8 bytes of the held-out documents.
        files: (name, documents, bytes) per file.
        tokenizer: as JSON; trained without the held-out documents, or that of `start_from`.
        fingerprint: of the texts and the window lengths.
    """
    paths = []
    for folder in corpus:
        if not (texts_in_folder := sorted(folder.glob("*.txt"))):
            raise FileNotFoundError(f"{folder} holds no *.txt. Give --corpus folders of text files.")
        paths += texts_in_folder
    hasher = hashlib.sha256(f"{VOCAB_SIZE} {WINDOW} {CONTEXT_LENGTHS}".encode())
    for path in paths:
        hasher.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    if start_from:
        hasher.update((start_from / "tokenizer.json").read_bytes())
    fingerprint, cache = hasher.hexdigest(), work_dir / "tokens.pt"
    if cache.exists() and (data := torch.load(cache))["fingerprint"] == fingerprint:
        return data

    files, documents = [], {}  # a dict keeps the order and drops copies
    for path in paths:
        texts = split_documents(path.read_text(encoding="utf-8"))
        files.append((path.name, len(texts), path.stat().st_size))
        for text in texts:
            documents[text] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 200 == 0
    train_texts = [text for text, is_held_out in documents.items() if not is_held_out]
    held_out_texts = [text for text, is_held_out in documents.items() if is_held_out]
    tokenizer = Tokenizer.from_file(str(start_from / "tokenizer.json")) if start_from else train_tokenizer(train_texts)
    data = {
        "train": encode(train_texts, tokenizer),
        "held_out": encode(held_out_texts, tokenizer),
        "held_out_bytes": sum(len(text.encode()) for text in held_out_texts),
        "files": files,
        "tokenizer": tokenizer.to_str(),
        "fingerprint": fingerprint,
    }
    for part, minimum in (("train", 2 * TOKENS_PER_STEP), ("held_out", HELD_OUT_LENGTH + 1)):
        if len(data[part]) < minimum:
            raise ValueError(f"{paths}: {len(data[part])} {part} tokens, at least {minimum} are needed. Add text.")
    save_atomically(data, cache)
    return data


def split_documents(text: str) -> list[str]:
    r"""The documents of one file, without white space around line ends.

    >>> split_documents("one\n<|endoftext|>\ntwo\n\nstill two\n")
    ['one', 'two\n\nstill two']
    >>> split_documents("What is A ?\nA  \n \n  goes on\n\nWhat is B ?\nB")
    ['What is A ?\nA\n\ngoes on', 'What is B ?\nB']
    """
    end_line = rf"(?m)^{re.escape(END)}$"
    parts = re.split(end_line if re.search(end_line, text) else r"\n\n+(?=\S)", text)
    stripped = (re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]*\n[ \t]*", "\n", part)).strip() for part in parts)
    return [document for document in stripped if document]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE in which a number or a name has the same tokens in every place, so that it can be looked up.

    The space before a digit or a capital is a separate token. Digits are split in pairs, so that a day of the month is
    one token.
    """
    tokenizer = Tokenizer(BPE())
    separate = Regex(r"[0-9]{1,2}|(?<![A-Za-z])[A-Z]{1,3}(?=-?[0-9])| (?=[A-Z0-9])")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(separate, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that every text can be encoded
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
    model = new_model(args)
    optimizers = new_optimizers(model)
    fingerprint = {key: getattr(args, key) for key in ("steps", "seed", "eval_every", "layers", "width", "heads")}
    fingerprint["data"] = data["fingerprint"]
    if args.start_from:
        fingerprint |= {"start_from": str(args.start_from), "learning_rate": args.learning_rate}
    checkpoint_path = args.work_dir / "checkpoint.pt"
    first, nats = 0, 0.0
    curve: list[tuple[int, float, float]] = []  # step, mean training loss since the last row, held-out loss
    if checkpoint_path.exists():
        state = torch.load(checkpoint_path)
        if state["fingerprint"] != fingerprint:
            raise ValueError(
                f"{checkpoint_path} is of a run with {state['fingerprint']}, but this one has {fingerprint}. "
                "Give the same arguments to continue it, or another --work_dir to start a new one."
            )
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        first, nats, curve = state["step"], state["nats"], state["curve"]
        print(f"continuing from step {first}", flush=True)

    starts = window_starts(data["train"])
    saved_at = reported_at = time.monotonic()
    for step in range(first, args.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = args.learning_rate * schedule(step, args.steps)
        loss = backward(model, *windows_of_step(data["train"], starts, step, args.seed))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
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
            state = {"fingerprint": fingerprint, "step": done, "nats": nats, "curve": curve}
            state |= {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            save_atomically(state, checkpoint_path)
            write_asset(args, model, data, done, curve)
            saved_at = time.monotonic()
    if first >= args.steps:  # already trained: write the folder again, with the current text of the card
        write_asset(args, model, data, first, curve)


def new_optimizers(model: PhiForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding, head, norms and biases, at one learning rate.

    Muon (Jordan 2024, "Muon: An optimizer for hidden layers in neural networks") is scaled to the step size of AdamW.
    """
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    outside = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." not in name]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    adamw = [{"params": outside, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(inside, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw, betas=(0.9, 0.95), fused=True),
    ]


def new_model(args: argparse.Namespace) -> PhiForCausalLM:
    """A random Phi: half of each head is rotary, no dropout, with faster attention and GELU."""
    torch.manual_seed(args.seed)
    config = PhiConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )
    start: Path | None = args.start_from
    model = PhiForCausalLM.from_pretrained(start, dtype=torch.float32) if start else PhiForCausalLM(config)
    AttentionInterface.register("causal_blocks", causal_attention)
    AttentionMaskInterface.register("causal_blocks", lambda *_, **__: None)
    model.set_attn_implementation("causal_blocks")
    for layer in model.model.layers:
        layer.mlp.activation_fn = nn.GELU(approximate="tanh")  # gelu_new in one pass over memory instead of six
    if not start:
        plant_copying(model)
    return model.train()


@torch.no_grad()
def plant_copying(model: PhiForCausalLM) -> None:
    """Initialize an induction circuit, which finds what followed the same token earlier and predicts it again.

    Without it, no copying had formed after 7 M tokens: the second copy of a list was not easier to predict than the
    first. The circuit is that of Olsson et al. 2022, "In-context Learning and Induction Heads", in half the heads of
    the first two layers; training may change all of it.

        layer 0   attends to the previous token by position alone (its biases) and writes a projection A of it
        layer 1   attends to positions whose previous token has the A of the current token; writes B of their token
        layer 2.. write B of what they attend to; training decides to what
        output    reads B: the rows of lm_head are initialized to B of their tokens
    """
    width, head = model.config.hidden_size, model.config.hidden_size // model.config.num_attention_heads
    rotary = head // 2
    angles = 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
    sharpness = math.sqrt(16 * math.sqrt(head))  # a score of 16 per frequency, where the distance is one
    embedding = model.model.embed_tokens.weight
    embedding.mul_(0.5 / embedding.std())  # or the output of layer 0 would dominate it
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    output_rows = torch.zeros_like(embedding)
    for number in range(model.config.num_attention_heads // 2):
        rows, half = slice(number * head, (number + 1) * head), slice(number * head, number * head + rotary)
        rest = slice(number * head + rotary, (number + 1) * head)  # the part without positions
        a, written, b, out = (torch.linalg.qr(torch.randn(width, head))[0] for _ in range(4))
        first.q_proj.bias[half] = sharpness * torch.cat([torch.ones(rotary // 2), torch.zeros(rotary // 2)])
        first.k_proj.bias[half] = sharpness * torch.cat([angles.cos(), angles.sin()])
        first.v_proj.weight[rows], first.dense.weight[:, rows] = a.T, written
        second.q_proj.weight[rows], second.k_proj.weight[rows] = 0.0, 0.0
        second.q_proj.weight[rest] = 2.45 * a[:, : head - rotary].T
        second.k_proj.weight[rest] = 2.45 * written[:, : head - rotary].T
        second.v_proj.weight[rows], second.dense.weight[:, rows] = b.T, 2.0 * out
        output_rows += embedding @ b @ out.T
        for layer in model.model.layers[2:]:
            layer.self_attn.v_proj.weight[rows], layer.self_attn.dense.weight[:, rows] = b.T, out
    model.lm_head.weight.copy_(output_rows / output_rows.norm(dim=1, keepdim=True))


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    *,
    scaling: float,
    blocks: list[Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention with batched matmuls, QUERY_BLOCK queries at a time against the keys up to them.

    On CPU at 256 to 1024 positions it takes about half the time of the flash kernel, whose backward is slow.

    Args:
        query, key, value: (B, heads, T, width).
        blocks: of `blocks_of`, if rows contain several documents.

    Returns:
        (B, T, heads, width), and no attention weights.
    """
    batch, heads, length, width = query.shape
    query, key, value = (x.to(torch.bfloat16).flatten(0, 1) for x in (query * scaling, key, value))
    outputs = []
    for number, start in enumerate(range(0, length, QUERY_BLOCK)):
        end = min(start + QUERY_BLOCK, length)
        if blocks:
            block = blocks[number]
        else:
            block = torch.full((1, end - start, end), float("-inf"), dtype=query.dtype).triu(start + 1)
        with torch.autocast("cpu", enabled=False):  # it would cast softmax to float32
            scores = torch.baddbmm(block, query[:, start:end], key[:, :end].transpose(1, 2))
            outputs.append(torch.bmm(scores.softmax(-1), value[:, :end]))
    return torch.cat(outputs, dim=1).view(batch, heads, length, width).transpose(1, 2), None


def schedule(step: int, steps: int) -> float:
    """Fraction of the peak learning rate: linear warm-up, then a cosine down to FINAL_FRACTION."""
    warmup = min(WARMUP_STEPS, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine


def windows_of_step(ids: Tensor, starts: Tensor, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and their next tokens at a step, both (B, T) with T from CONTEXT_LENGTHS.

    Each window begins at one of `starts`, in an order that is drawn for each pass over them.
    """
    length = CONTEXT_LENGTHS[step % len(CONTEXT_LENGTHS)]
    per_step = TOKENS_PER_STEP // min(CONTEXT_LENGTHS)
    epoch, index = divmod(step, len(starts) // per_step)
    chosen = np.random.default_rng((seed, epoch)).permutation(len(starts))[index * per_step :][
        : TOKENS_PER_STEP // length
    ]
    spans = torch.stack([ids[start : start + length + 1] for start in starts[chosen].tolist()])
    return spans[:, :-1], spans[:, 1:]


def window_starts(ids: Tensor) -> Tensor:
    """(N,) positions in `ids` where a document begins, and every WINDOW tokens inside a longer one.

    So a window contains the beginning of a document, which its end attends to, unless the document is long.
    """
    ends = torch.nonzero(ids == END_ID).flatten()
    begins = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1] + 1])
    starts = torch.cat(
        [torch.arange(begin, end + 1, WINDOW) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
    )
    return starts[starts + WINDOW < len(ids)]


def blocks_of(inputs: Tensor, heads: int) -> list[Tensor]:
    """The mask that is added to the scores of (B, T) inputs: each token attends to its own document up to itself.

    Returns:
        For each QUERY_BLOCK queries, (B * heads, queries, keys up to the last of them) of 0 and -inf.
    """
    document = (inputs == END_ID).cumsum(1) - (inputs == END_ID).long()
    length = inputs.shape[1]
    position = torch.arange(length)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        visible = (document[:, start:end, None] == document[:, None, :end]) & (
            position[start:end, None] >= position[:end]
        )
        block = torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill_(~visible, float("-inf"))
        blocks.append(block.repeat_interleave(heads, 0))
    return blocks


def backward(model: PhiForCausalLM, inputs: Tensor, targets: Tensor) -> float:
    """Add the gradients of the mean next-token loss, and return that loss in nats."""
    nats = 0.0
    blocks = blocks_of(inputs, model.config.num_attention_heads)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=inputs, use_cache=False, blocks=blocks).last_hidden_state
        leaf = hidden.detach().requires_grad_()
        # The output layer takes 512 tokens at a time: its float32 logits then stay in cache, which is twice as fast.
        for states, labels in zip(leaf.flatten(0, 1).split(512), targets.flatten().split(512), strict=True):
            loss = F.cross_entropy(model.lm_head(states).float(), labels, reduction="sum") / targets.numel()
            loss.backward()
            nats += loss.item()
    hidden.backward(leaf.grad)
    return nats


@torch.no_grad()
def held_out_loss(model: PhiForCausalLM, ids: Tensor) -> float:
    """Mean nats per token over the first HELD_OUT_LENGTH tokens of each document in (N,) `ids`, separately."""
    ends = (torch.nonzero(ids == END_ID).flatten() + 1).tolist()
    documents = [ids[start:end][: HELD_OUT_LENGTH + 1] for start, end in pairwise([0, *ends])]
    documents.sort(key=len)
    nats, count = 0.0, 0
    for first in range(0, len(documents), 16):
        rows = nn.utils.rnn.pad_sequence(documents[first : first + 16], batch_first=True, padding_value=-100)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=rows[:, :-1].clamp(min=0), use_cache=False).logits
        nats += F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        count += int((rows[:, 1:] >= 0).sum())
    return nats / count


def write_asset(args: argparse.Namespace, model: PhiForCausalLM, data: dict[str, Any], step: int, curve: list) -> None:
    """Write model, tokenizer and card to `args.output_dir`; each file is replaced as a whole: it may be in use."""
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
    among = "--among CORPUS_DIR " if (args.corpus[-1] / "claims_retold.txt").is_file() else ""
    return CARD.format(
        **{key: f"{value:,}" for key, value in model.config.to_dict().items() if isinstance(value, int)},
        parameters=f"{model.num_parameters() / 1e6:.2f}",
        unfinished="" if step == args.steps else f"\n**Half-trained: step {step:,} of {args.steps:,}.**\n",
        sources="\n".join(f"| {text} | {n:,} | {size / 1e6:.1f} |" for text, (n, size) in totals.items()),
        recipe=f"{seen / 1e6:.1f} M tokens seen, {seen / num_train:.1f} times the {num_train / 1e6:.2f} M "
        f"there are,\nin {step:,} steps of {TOKENS_PER_STEP:,}, at a learning rate of {args.learning_rate:g}",
        rows="\n".join(f"| {at:,} | {at * TOKENS_PER_STEP / 1e6:.1f} | {a:.3f} | {b:.3f} |" for at, a, b in curve),
        num_held_out=f"{num_held_out:,}",
        tried="" if args.start_from else TRIED,
        prose=f"{f'--whole {among}--megabytes 120 ' if args.start_from else ''}--output_dir {args.corpus[-1]}",
        options=f"{args.corpus[-1]} --steps {args.steps} --seed {args.seed}"
        + (f" --start_from {args.start_from} --learning_rate {args.learning_rate}" if args.start_from else ""),
        before=training_before(args.start_from),
        loss=f"{loss:.3f} nats per token, "
        f"{loss / math.log(2) * num_held_out / data['held_out_bytes']:.3f} bits per byte",
        args=args,
    )


def training_before(start: Path | None) -> str:
    """The chapter on training in the card of `start`, for a training that began from it."""
    if not start:
        return ""
    card = (start / "README.md").read_text(encoding="utf-8")
    return "\n## Training before that\n" + card.partition("## Training\n")[2]


CARD = """---
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [phi, toy]
---

# tiny-phi

A Phi of {parameters} M parameters, with which every part of the pipeline runs in seconds on a laptop, without
a network. It has the form of Phi-2, not its knowledge: it has read health and government pages, and files of invented
insurance claims, enough to copy a claim number out of a prompt and to know which paper answers which denial in that
invented world.
{unfinished}
## Limits

Outside its invented claims it writes sentences that look like health and government prose and mean little; what it
states is often false, and dates and sums that it works out are often wrong. It gives no medical, insurance, legal or
other advice, and nothing it writes may be used as such. Results on it say that the code works and how settings compare,
not how well Phi-2 would do. It has read English only. It was never shown the project's instruction template, nor a
validation or test record of the packaged claims, nor a scenario of theirs.

## Shape

| | |
|---|---|
| class | `PhiForCausalLM`, bfloat16 safetensors, `gelu_new`, untied head with bias |
| layers | {num_hidden_layers}, {hidden_size} wide, {intermediate_size} inside |
| heads | {num_attention_heads} in each layer, half of each rotary |
| longest input | {max_position_embeddings} tokens |
| vocabulary | {vocab_size}: byte-level BPE; digits two by two, and the space before a digit or a capital apart |
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

{recipe} after a warm-up, then a cosine to a twentieth of it.
Five steps of six in windows of 512 tokens, one in 1,024, each from the beginning of a document, attention inside
documents alone; Muon for the matrices of the layers, AdamW for the rest, weight decay 0.1; bfloat16 autocast over
float32 weights; no dropout.

| step | M tokens | training loss | held-out loss |
|---|---|---|---|
{rows}

{tried}Losses are in nats per token; the training loss is the mean since the row above. One document in two hundred
was held out, {num_held_out} tokens in all. As saved, in bfloat16, over the first 512 tokens of each, their loss is
**{loss}.** Many medical documents share stock
paragraphs with others, and claims prose is composed, which flatters these numbers.

Built by

    python scripts/build_claims_prose.py {prose}
    python scripts/build_tiny_phi.py --corpus CORPUS_DIR {options}
{before}"""


# Written by hand, about the packaged weights: what was tried before the long run.
TRIED = """Copying was planted in the first layers before training (`plant_copying`): without it an earlier run of
7 M tokens had learned to copy nothing. Of three shapes tried for about two minutes each, on an earlier text with AdamW
and nothing planted, this one learned fastest (held-out loss as saved):

| layers x width x heads | M parameters | steps | held-out loss |
|---|---|---|---|
| 6 x 256 x 8 | 6.84 | 260 | 3.809 |
| 5 x 320 x 10 | 8.79 | 207 | 3.988 |
| 8 x 192 x 6 | 5.14 | 235 | 4.190 |

Optimizers in this shape on this text, 240 steps and two and a half minutes each:

| optimizer | learning rate | layers that begin to copy | held-out loss |
|---|---|---|---|
| AdamW | 1.5e-3 | the first two | 2.632 |
| AdamW | 1.5e-3 | all | 2.713 |
| Muon | 1.5e-3 | the first two | 2.705 |
| Muon | 4e-3 | all | 2.088 |
| Muon | 8e-3 | all | 1.897 |

"""


def save_atomically(value: Any, path: Path) -> None:
    """torch.save that replaces the file as a whole."""
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    os.replace(partial, path)


if __name__ == "__main__":
    main()

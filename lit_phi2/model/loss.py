"""Loss: hidden states and labels -> summed nats and the number of supervised tokens.

    hidden   h0 h1 h2 h3 h4        the state at t is scored against the label at t + 1
    labels   .  .  .  r  E         so only h2 and h3 reach the output layer here

Phi-2's output layer is 51,200 x 2,560, so prompt and padding positions must not reach it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

from lit_phi2.model.device import card_memory
from lit_phi2.model.linear import FrozenLinear, matmul_dtype
from lit_phi2.types import Scored, find_scored

LOGITS_BYTES = 64 * 2**20  # upper bound on the logits in memory at the same time, for any batch
# On CUDA the bound is this part of the card's memory, if that is more. Every chunk reads and writes the gradient of all
# hidden states, which for 8,192 of them in chunks of 64 MiB takes about as long as the products (training/README.md).
CARD_SHARE = 64
VOCAB_CHUNK = {"cpu": 4096}  # upper bound on tokens of the vocabulary per chunk, so that its logits fit a cache
PAD_ROWS_TO = 32  # the number of positions in the output layer's matmuls is rounded up to a multiple of it


class Loss(NamedTuple):
    """Sums, so that batches can be added up and every token weighs the same.

    Attributes:
        nats: scalar float32, summed cross-entropy over supervised tokens.
        num_tokens: scalar int64, supervised tokens.
        num_correct: scalar int64, supervised tokens whose logit is the largest. Of several equal logits the first
            counts; with gradients each of them counts.
    """

    nats: Tensor
    num_tokens: Tensor
    num_correct: Tensor


def causal_lm_loss(hidden: Tensor, labels: Tensor, head: nn.Module, scored: Scored | None = None) -> Loss:
    """Summed next-token cross-entropy, and the number of tokens it covers.

    Args:
        hidden: (B, T, D), any float dtype.
        labels: (B, T) int64; IGNORE_INDEX where there is no loss (prompt, padding).
        head: (N, D) -> (N, V); applied to supervised positions only. Logits are reduced in float32.
        scored: of the labels; None finds them, for which a GPU has to finish first.

    Returns:
        Sums. Without a supervised token the nats are zero and still connected to the hidden states, so that backward
        works on a rank that has no rows in a ragged window.

    Raises:
        ValueError: hidden and labels cover different tokens.

    >>> labels = torch.tensor([[-100, 2, 5]])
    >>> loss = causal_lm_loss(torch.zeros(1, 3, 4), labels, nn.Linear(4, 8, bias=False))
    >>> round((loss.nats / loss.num_tokens).item(), 4), loss.num_tokens.item()  # uniform logits: ln 8, two tokens
    (2.0794, 2)
    """
    if hidden.shape[:2] != labels.shape:
        raise ValueError(f"hidden covers {tuple(hidden.shape[:2])} tokens but labels {tuple(labels.shape)}")
    scored = find_scored(labels) if scored is None else scored
    supervised_hidden, targets = hidden.flatten(0, 1).index_select(0, scored.positions), scored.targets
    num_tokens = targets.new_full((), scored.count)
    if not scored.count:
        zero = torch.zeros((), dtype=torch.int64, device=hidden.device)
        return Loss(nats=hidden.float().sum() * 0.0, num_tokens=zero, num_correct=zero)
    if isinstance(head, FrozenLinear) and not any(parameter.requires_grad for parameter in head.parameters()):
        nats, num_correct = _ChunkedCrossEntropy.apply(supervised_hidden, head, targets, scored.count)
        return Loss(nats, num_tokens, num_correct)
    logits = head(supervised_hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(logits, targets, reduction="sum")
    return Loss(nats, num_tokens, (logits.detach().argmax(-1) == targets).sum())


def logits_limit(device_type: str, memory: int) -> int:
    """Bytes that the logits of a chunk may take.

    The whole memory of a card decides, not what is free: another chunk rounds differently, and a resumed run has the
    bits of the run it continues.

    Args:
        device_type: cpu, cuda or mps.
        memory: of the device.

    >>> [logits_limit(device, 80 * 2**30) // 2**20 for device in ("cuda", "cpu")]
    [1280, 64]
    """
    return max(LOGITS_BYTES, memory // CARD_SHARE) if device_type == "cuda" else LOGITS_BYTES


def vocab_chunk(num_positions: int, position_bytes: int, vocab_size: int, device_type: str, limit: int) -> int:
    """Tokens of the vocabulary in a chunk; chunks have about the same size.

    Args:
        num_positions: supervised, rounded up to PAD_ROWS_TO.
        position_bytes: of a logit of a position.
        vocab_size: V.
        device_type: cpu, cuda or mps.
        limit: of logits_limit.

    >>> vocab_chunk(8192, 6, 51200, "cuda", LOGITS_BYTES), vocab_chunk(8192, 6, 51200, "cuda", 2**30)
    (1348, 17067)
    """
    largest = max(1, limit // (num_positions * position_bytes))
    largest = min(largest, VOCAB_CHUNK.get(device_type, largest))
    return -(-vocab_size // -(-vocab_size // largest))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a frozen output layer, a chunk of the vocabulary at a time.

    Logits take at most `logits_limit`. The softmax is carried from chunk to chunk by its largest logit and its sum, as
    online softmax does (Milakov and Gimelshein 2018, arXiv:1805.02867), so every matmul has all positions, and every
    weight is read once in each direction. The gradient of the hidden states is accumulated in forward; backward only
    scales it.

    All chunks use the same memory, which fits a cache, and positions are rounded up to PAD_ROWS_TO: a CPU compiles a
    matmul of a new shape for longer than the matmul takes.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: FrozenLinear, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
        softmax = _OnlineSoftmax(hidden, targets, head.out_features, with_grad=ctx.needs_input_grad[0])
        for start in range(0, head.out_features, softmax.chunk_size):
            chunk = slice(start, start + softmax.chunk_size)
            bias = None if head.bias is None else head.bias[chunk]
            softmax.add_chunk(head, chunk, bias)
        nats = softmax.max_logit + softmax.sum_exp.log() - softmax.target_logit
        grad = softmax.grad(head.rows(targets.clamp(min=0))) if softmax.with_grad else None
        if count < len(targets):  # the others are padding
            padding = (targets < 0)[:, None]
            nats, grad = nats.masked_fill(padding, 0), None if grad is None else grad.masked_fill(padding, 0)
        nats = nats.sum()
        ctx.save_for_backward(grad)
        ctx.dtype = hidden.dtype
        num_correct = softmax.num_correct()
        ctx.mark_non_differentiable(num_correct)
        return nats, num_correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nats: Tensor, _: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_nats.to(grad.dtype)).to(ctx.dtype) if grad is not None else None, None, None, None


class _OnlineSoftmax:
    """The running softmax of N positions over the chunks of a vocabulary.

    Attributes, each (N, 1) in the accumulation dtype unless given otherwise:
        max_logit: the largest logit so far.
        sum_exp: the sum of exp(logit - max_logit) so far.
        target_logit: the logit of the position's target, once its chunk was added.
        best_token: (N,) the token of the largest logit so far; not kept with gradients, because finding its place
            takes ten times as long as finding its value.
        weighted_rows: (N, D), the weights of the tokens other than the target, each times exp(logit - max_logit);
            None without gradients.
    """

    def __init__(self, hidden: Tensor, targets: Tensor, vocab_size: int, *, with_grad: bool) -> None:
        self.hidden, self.targets, self.with_grad = hidden, targets, with_grad
        self.acc_dtype = torch.promote_types(hidden.dtype, torch.float32)
        zeros = hidden.new_zeros(len(hidden), 1, dtype=self.acc_dtype)
        self.max_logit, self.sum_exp, self.target_logit = torch.full_like(zeros, float("-inf")), zeros, zeros.clone()
        self.best_token = torch.zeros_like(targets)
        self.weighted_rows = torch.zeros_like(hidden, dtype=self.acc_dtype) if with_grad else None
        self.padded = F.pad(hidden.to(matmul_dtype(hidden)), (0, 0, 0, -len(hidden) % PAD_ROWS_TO))
        position_bytes, device = self.acc_dtype.itemsize + self.padded.dtype.itemsize, hidden.device
        limit = logits_limit(device.type, card_memory(device))
        self.chunk_size = vocab_chunk(len(self.padded), position_bytes, vocab_size, device.type, limit)
        self.buffer = hidden.new_empty(len(hidden) * self.chunk_size, dtype=self.acc_dtype)

    def add_chunk(self, head: FrozenLinear, chunk: slice, bias: Tensor | None) -> None:
        """Add the logits of some tokens of the vocabulary, given the output layer and their bias, (n,)."""
        num_positions = len(self.hidden)
        padded_logits = head.matmul(self.padded, features=chunk, use_bias=False)
        num_tokens = padded_logits.shape[1]
        logits = self.buffer[: num_positions * num_tokens].view(num_positions, -1)
        logits.copy_(padded_logits[:num_positions])
        if bias is not None:
            logits.add_(bias)
        # Masks instead of the indices of the targets in this chunk: a GPU would have to synchronize for each chunk.
        column = (self.targets - chunk.start)[:, None]
        in_chunk = (column >= 0) & (column < num_tokens)
        column = column.clamp(0, num_tokens - 1)
        self.target_logit = torch.where(in_chunk, logits.gather(1, column), self.target_logit)
        chunk_max = logits.amax(-1, keepdim=True)
        if not self.with_grad:
            is_better = (chunk_max > self.max_logit).flatten()
            self.best_token = torch.where(is_better, logits.argmax(-1) + chunk.start, self.best_token)
        previous_max, self.max_logit = self.max_logit, torch.maximum(self.max_logit, chunk_max)
        rescale = (previous_max - self.max_logit).exp_()
        terms = logits.sub_(self.max_logit).exp_()
        self.sum_exp.mul_(rescale).add_(terms.sum(-1, keepdim=True))
        if self.weighted_rows is not None:
            # softmax - 1 cancels when the model is confident, so `grad` adds the target's term separately.
            terms.scatter_(1, column, terms.gather(1, column).masked_fill_(in_chunk, 0))
            padded_logits[:num_positions] = terms  # the padded matmul below reuses this memory
            self.weighted_rows.mul_(rescale).add_(head.matmul_t(padded_logits, features=chunk)[:num_positions])

    def grad(self, target_rows: Tensor) -> Tensor:
        """(N, D): the gradient of the summed nats with respect to hidden.

        In float16's place float32: the loss scale, which keeps small values in float16's range, comes in backward only.

        Args:
            target_rows: (N, D), the weights of each position's target.
        """
        assert self.weighted_rows is not None
        target_term = (self.target_logit - self.max_logit).exp_().div_(self.sum_exp).sub_(1)  # softmax - 1
        grad = self.weighted_rows.div_(self.sum_exp).addcmul_(target_term, target_rows.to(self.acc_dtype))
        return grad if self.hidden.dtype == torch.float16 else grad.to(self.hidden.dtype)

    def num_correct(self) -> Tensor:
        """Scalar int64: positions whose target has the largest logit."""
        if self.with_grad:
            return ((self.target_logit == self.max_logit).flatten() & (self.targets >= 0)).sum()
        return (self.best_token == self.targets).sum()

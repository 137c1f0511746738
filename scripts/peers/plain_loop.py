"""Plain loop: transformers' own Phi with PEFT's own LoRA on the rows that lit_phi2 packs; only the step differs.

Positions restart at every example and no mask is given, so transformers masks attention between the examples of a row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name in torch's own documentation

from lit_phi2.data.schedule import BatchingConfig, training_schedule
from peers.native_phi import load_native_phi
from peers.task import (
    IGNORE_INDEX,
    LEARNING_RATE,
    NUM_CHECKED,
    ROW_LENGTH,
    SEED,
    WEIGHT_DECAY,
    Example,
    LoadedPeer,
    Task,
)


def load(task: Task) -> LoadedPeer:
    examples = task.examples
    model = load_native_phi(task.base, task.dtype).to(task.device)
    accumulate = task.accumulate(ROW_LENGTH)
    lengths = [len(example.ids) for example in examples]
    supervised = [example.supervised_tokens for example in examples]
    batching = BatchingConfig(ROW_LENGTH, accumulate=accumulate)
    schedule = training_schedule(lengths, supervised, batching, seed=SEED, epoch=0)

    def summed_nats(packed: list[Example]) -> Tensor:
        ids = torch.tensor([[token for example in packed for token in example.ids]]).to(task.device)
        positions = torch.cat([torch.arange(len(example.ids)) for example in packed])[None].to(task.device)
        labels = torch.tensor([label for example in packed for label in example.labels]).to(task.device)
        phi = model.get_base_model()
        hidden = phi.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        supervised_mask = labels[1:] != IGNORE_INDEX  # an example begins with its prompt, so no label crosses over
        logits = phi.lm_head(hidden[0, :-1][supervised_mask])
        return F.cross_entropy(logits.float(), labels[1:][supervised_mask], reduction="sum")

    def nats() -> list[float]:
        model.eval()
        with torch.no_grad():
            return [summed_nats([example]).item() for example in examples[:NUM_CHECKED]]

    def train() -> None:
        model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        task.ledger.begin()
        for number, micro_batch in enumerate(schedule, 1):
            packed = [examples[index] for row in micro_batch.rows for index in row]
            (summed_nats(packed) * micro_batch.loss_weight / accumulate).backward()
            task.ledger.add_examples(packed)
            if number % accumulate == 0 or number == len(schedule):
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                task.ledger.end_step()

    return LoadedPeer(model, nats, train)

"""Registry: the name of each peer -> its module in this folder, and the environment that the module runs in."""

import importlib
from dataclasses import dataclass, field
from typing import Any

from peers.task import ROW_LENGTH, LoadedPeer, Task

TRL, LITGPT = "trl==1.16.0", "litgpt==0.5.13"  # the versions whose source these modules were written against
ENVIRONMENTS = {
    "trl": ["torch", "transformers", "peft", "accelerate", "datasets", TRL],
    "litgpt": ["torch", "lightning", LITGPT],  # lightning in our version: 2.6.2 and 2.6.3 are malware
}


@dataclass(frozen=True, slots=True)
class Peer:
    """A tool in one setting.

    Attributes:
        group: the tool; of its settings the fastest one is compared with lit_phi2.
        module: in this folder; imported only in the process that runs the peer.
        environment: where the tool is installed; empty for the running interpreter.
        options: of the module's load.
    """

    group: str
    module: str
    environment: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def load(self, task: Task, **more: Any) -> LoadedPeer:
        peer: LoadedPeer = importlib.import_module(f"peers.{self.module}").load(task, **self.options, **more)
        return peer


PEERS = {
    "ours": Peer("ours", "ours"),
    "whole": Peer("whole", "ours"),
    "notebook": Peer("notebook", "hf_trainer", options={"batch_size": 1, "width": ROW_LENGTH, "dtype": "float32"}),
    "hf-b1": Peer("hf", "hf_trainer", options={"batch_size": 1}),
    "hf-b8": Peer("hf", "hf_trainer", options={"batch_size": 8}),
    "hf-b32": Peer("hf", "hf_trainer", options={"batch_size": 32}),
    "hf-b8-autocast": Peer("hf", "hf_trainer", options={"batch_size": 8, "autocast": True}),
    "rows": Peer("rows", "plain_loop"),
    "trl": Peer("trl", "trl_sft", "trl"),
    "trl-autocast": Peer("trl", "trl_sft", "trl", {"autocast": True}),
    "litgpt-mb1": Peer("litgpt", "litgpt_lora", "litgpt", {"batch_size": 1}),
    "litgpt-mb8": Peer("litgpt", "litgpt_lora", "litgpt", {"batch_size": 8}),
}

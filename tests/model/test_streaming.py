"""A streamed base computes what the loaded one does, with one block in memory."""

from pathlib import Path

import torch

from lit_phi2.generation.engine import generate
from lit_phi2.model.loading import load_phi2
from lit_phi2.model.lora import LoraSettings, adapter_state_dict, add_lora, load_adapter_state_dict
from lit_phi2.model.phi2 import packed_forward
from lit_phi2.model.streaming import load_streamed_phi2
from lit_phi2.pretrained import resolve_base_model

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])


def test_a_streamed_base_gives_the_same_numbers(phi_dir: Path) -> None:
    """Reference: load_phi2, bit for bit, in packed rows and in generation."""
    base = resolve_base_model(str(phi_dir))
    for dtype in (torch.float32, torch.bfloat16):
        streamed, loaded = load_streamed_phi2(base, dtype, CPU), load_phi2(base, dtype)
        with torch.no_grad():
            assert torch.equal(packed_forward(streamed, IDS, POSITIONS), packed_forward(loaded, IDS, POSITIONS))
        answers = [generate(model, [[5, 6, 7], [8]], eos_token_id=0, max_new_tokens=8) for model in (streamed, loaded)]
        assert answers[0] == answers[1]


def test_every_block_of_a_streamed_base_has_its_own_adapter(phi_dir: Path) -> None:
    """Reference: the same adapter on load_phi2's model."""
    base, settings = resolve_base_model(str(phi_dir)), LoraSettings(2, 4, ("Wqkv", "fc1"))
    streamed = add_lora(load_streamed_phi2(base, torch.float32, CPU), settings, dropout=0.0).eval()
    loaded = add_lora(load_phi2(base, torch.float32), settings, dropout=0.0).eval()
    weights = {name: torch.randn_like(weight) for name, weight in adapter_state_dict(loaded).items()}
    hidden = []
    for phi in (streamed, loaded):
        load_adapter_state_dict(phi, weights, source="adapter")
        with torch.no_grad():
            hidden.append(packed_forward(phi.get_base_model(), IDS, POSITIONS))
    assert torch.equal(*hidden)


def test_a_streamed_base_holds_one_block(phi_dir: Path) -> None:
    base = resolve_base_model(str(phi_dir))
    streamed, loaded = load_streamed_phi2(base, torch.float32, CPU), load_phi2(base, torch.float32)
    num_blocks = len(loaded.model.layers)
    block = sum(parameter.numel() for parameter in loaded.model.layers[0].parameters())
    sizes = [sum({p.data_ptr(): p.numel() for p in model.parameters()}.values()) for model in (streamed, loaded)]
    assert num_blocks > 1
    assert sizes[1] - sizes[0] == (num_blocks - 1) * block

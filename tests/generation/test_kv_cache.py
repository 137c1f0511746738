"""The cache: bytes as computed, contents as written."""

import psutil
import pytest
import torch

from lit_phi2.generation.capacity import DEFAULT_SLOTS, choose_num_slots
from lit_phi2.generation.kv_cache import CacheShape, KVCache

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_closed_form(dtype: torch.dtype) -> None:
    """Two numbers a position, head and layer for each element of a head; reference: torch's own storage."""
    shape = CacheShape(num_layers=3, num_heads=4, head_dim=16, dtype=dtype)
    cache = KVCache(shape, num_slots=5, capacity=64, device=CPU)
    assert cache.tensor.untyped_storage().nbytes() == shape.num_bytes(5, 64) == 2 * 3 * 5 * 4 * 64 * 16 * dtype.itemsize
    # A slot of Phi-2 with all of its positions.
    assert CacheShape(32, 32, 80, torch.bfloat16).num_bytes(1, 2048) == 671_088_640


def test_tokens_are_written_at_their_slots_and_positions() -> None:
    cache = KVCache(CacheShape(2, 3, 4, torch.float32), num_slots=2, capacity=8, device=CPU)
    keys_values = torch.randn(3, 2, 3, 4)
    cache.write(1, torch.tensor([1, 0, 1]), torch.tensor([5, 0, 6]), keys_values)
    expected = torch.zeros(2, 2, 2, 3, 8, 4)
    for index, (slot, position) in enumerate([(1, 5), (0, 0), (1, 6)]):
        expected[1, :, slot, :, position] = keys_values[index]
    assert torch.equal(cache.tensor, expected)
    keys, values = cache.layers[1]
    assert torch.equal(keys[1, :, 5], keys_values[0, 0])
    assert torch.equal(values[1, :, 6], keys_values[2, 1])


def test_a_grown_cache_has_the_same_contents() -> None:
    cache = KVCache(CacheShape(2, 3, 4, torch.float32), num_slots=2, capacity=8, device=CPU)
    cache.tensor.normal_()
    larger = cache.enlarged(16)
    assert torch.equal(larger.tensor[..., :8, :], cache.tensor)
    assert not larger.tensor[..., 8:, :].any()


@pytest.mark.parametrize(
    ("max_slots", "num_prompts", "slot_share", "expected"),
    [
        (None, None, 0.0001, DEFAULT_SLOTS["cpu"]),
        (None, 3, 0.0001, 3),
        (5, None, 0.0001, 5),
        (100, None, 0.0001, 100),
        (100, 2, 0.0001, 2),
        (None, None, 0.15, 3),  # half of the memory takes three slots of 15 % each
        (8, None, 2.0, 1),  # one is always tried
    ],
)
def test_slots_fit_memory_prompts_and_setting(
    max_slots: int | None, num_prompts: int | None, slot_share: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()._replace(available=10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert choose_num_slots(max_slots, num_prompts, CPU, int(slot_share * 10**9)) == expected

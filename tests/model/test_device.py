"""The compute dtype follows the device; what cannot work is refused."""

import pytest
import torch

from lit_phi2.errors import InputError
from lit_phi2.model import device
from lit_phi2.model.device import choose_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("instructions", "message"),
    [("AMX", "this CPU has AMX"), ("AVX512-BF16", "this CPU has AVX512-BF16"), (None, "multiplied in float32")],
)
def test_auto_on_a_cpu_is_bfloat16_and_gives_the_reason(
    instructions: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "cpu_bf16_instructions", lambda: instructions)
    dtype, reason = choose_dtype("auto", CPU)
    assert dtype == torch.bfloat16
    assert message in reason


def test_a_requested_dtype_is_used() -> None:
    assert choose_dtype("float32", CPU)[0] == torch.float32
    assert choose_dtype("bfloat16", CPU)[0] == torch.bfloat16


def test_float16_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match="float16 is refused: Phi-2's attention overflows"):
        choose_dtype("float16", CPU)


@pytest.mark.cuda
def test_auto_on_a_recent_cuda_card_is_bfloat16() -> None:
    major, _ = torch.cuda.get_device_capability()
    assert choose_dtype("auto", torch.device("cuda"))[0] == (torch.bfloat16 if major >= 8 else torch.float32)


@pytest.mark.mps
def test_auto_on_an_apple_gpu_gives_a_dtype_it_supports() -> None:
    dtype, _ = choose_dtype("auto", torch.device("mps"))
    ones = torch.ones(8, 8, dtype=dtype, device="mps")
    assert (ones @ ones).sum().item() == 8 * 64

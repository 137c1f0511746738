"""The compute dtype follows the device and the model; what cannot work is refused."""

from pathlib import Path

import psutil
import pytest
import torch

from lit_phi2.errors import InputError
from lit_phi2.model import device
from lit_phi2.model.device import bf16_speedup, choose_dtype, has_fast_bf16, has_flash_attention, total_memory

CPU = torch.device("cpu")
MEMORY = 24 * 2**30
SMALL, PHI2 = 9_000_000, 2_779_683_840  # parameters: 36 MB and 11 GB in float32


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A CPU with the given instructions and speed of bfloat16, and 24 GiB of memory."""
    instructions, speedup = request.param
    monkeypatch.setattr(device, "cpu_bf16_instructions", lambda: instructions)
    monkeypatch.setattr(device, "bf16_speedup", lambda: speedup)
    monkeypatch.setattr(device, "total_memory", lambda: MEMORY)


FAST = [("AMX", 0.0), ("AVX512-BF16", 2.3)]
SLOW = [(None, 0.0), ("AVX512-BF16", 0.6)]


@pytest.mark.parametrize("cpu", FAST, indirect=True)
@pytest.mark.usefixtures("cpu")
def test_auto_is_bfloat16_on_a_cpu_that_is_faster_with_it() -> None:
    assert choose_dtype("auto", CPU, SMALL)[0] == torch.bfloat16
    assert choose_dtype("auto", CPU, PHI2)[0] == torch.bfloat16


@pytest.mark.parametrize("cpu", SLOW, indirect=True)
@pytest.mark.usefixtures("cpu")
def test_auto_is_float32_on_other_cpus_where_it_takes_little_memory() -> None:
    dtype, reason = choose_dtype("auto", CPU, SMALL)
    assert dtype == torch.float32
    assert reason.endswith("36 MB of float32 weights are less than a quarter of the memory")
    dtype, reason = choose_dtype("auto", CPU, PHI2)
    assert dtype == torch.bfloat16
    assert reason.endswith("11,119 MB of float32 weights are more than a quarter of the memory")


@pytest.mark.parametrize(
    ("cpu", "message"),
    [
        (("AMX", 0.0), "this CPU has AMX"),
        (("AVX512-BF16", 2.3), "this CPU's AVX512-BF16 multiplies bfloat16 2.3 times as fast as float32"),
        (("AVX512-BF16", 0.6), "this CPU's AVX512-BF16 multiplies bfloat16 0.6 times as fast as float32"),
        ((None, 0.0), "this CPU has neither AMX nor AVX512-BF16"),
    ],
    indirect=["cpu"],
)
@pytest.mark.usefixtures("cpu")
def test_the_reason_names_the_instructions(message: str) -> None:
    assert message in choose_dtype("auto", CPU, PHI2)[1]
    assert has_fast_bf16(CPU)[1] == message


def test_measuring_the_speed_of_bfloat16_keeps_the_threads() -> None:
    num_threads = torch.get_num_threads()
    bf16_speedup.cache_clear()
    speedup = bf16_speedup()
    assert 0 < speedup < 100
    assert bf16_speedup() == speedup, "measured once in a process"
    assert torch.get_num_threads() == num_threads


@pytest.mark.parametrize(("limit", "expected"), [("max\n", None), (f"{2**20}\n", 2**20), (f"{2**60}\n", None)])
def test_memory_is_the_machines_or_the_containers(
    limit: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(device, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert total_memory() == (expected or psutil.virtual_memory().total)


def test_a_requested_dtype_is_used() -> None:
    assert choose_dtype("float32", CPU, SMALL)[0] == torch.float32
    assert choose_dtype("bfloat16", CPU, SMALL)[0] == torch.bfloat16
    assert choose_dtype("float16", CPU, SMALL)[0] == torch.float16


@pytest.mark.parametrize("name", ["fp16", "half", "int8"])
def test_an_unknown_dtype_is_refused_with_those_that_work(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}' is unknown; expected auto, bfloat16, float16 or float32"):
        choose_dtype(name, CPU, SMALL)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), torch.float32),  # Pascal: no tensor cores
        ((7, 0), torch.float16),  # V100
        ((7, 5), torch.float16),  # T4
        ((8, 0), torch.bfloat16),  # A100
        ((8, 9), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ],
)
def test_auto_on_cuda_follows_the_compute_capability(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 has tensor cores from sm80 on, float16 from sm70 on; the flash kernel needs sm80 too."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    cuda = torch.device("cuda")
    chosen, reason = choose_dtype("auto", cuda, PHI2)
    assert chosen == dtype
    assert reason.startswith(f"a card, sm{capability[0]}{capability[1]}, ")
    assert ("float16" in reason.replace("bfloat16", "")) == (dtype == torch.float16)
    assert has_flash_attention(cuda) == (capability >= (8, 0))


@pytest.mark.cuda
def test_auto_on_a_recent_cuda_card_is_bfloat16() -> None:
    major, _ = torch.cuda.get_device_capability()
    expected = torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
    assert choose_dtype("auto", torch.device("cuda"), SMALL)[0] == expected


@pytest.mark.mps
def test_auto_on_an_apple_gpu_gives_a_dtype_it_supports() -> None:
    dtype, _ = choose_dtype("auto", torch.device("mps"), SMALL)
    ones = torch.ones(8, 8, dtype=dtype, device="mps")
    assert (ones @ ones).sum().item() == 8 * 64

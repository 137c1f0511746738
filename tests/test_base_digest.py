"""The fingerprint of a base: what changes it, and when a hash is computed again."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_phi2 import base_digest as base_digest_module
from lit_phi2.base_digest import DIGESTS_FILE, MIN_REMEMBERED_BYTES, base_digest, base_files, different_parts
from lit_phi2.errors import InputError
from lit_phi2.pretrained import resolve_base_model

SHARDS = ("a.safetensors", "b.safetensors")


def edit_json(file: Path, key: str, value: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {key: value}), "utf-8")


def nudge_one_weight(folder: Path) -> None:
    """One element of one tensor, by the smallest step that float32 has; size and times of the file stay."""
    file = folder / "model.safetensors"
    stat, weights = file.stat(), load_file(file)
    bias = weights["model.layers.1.mlp.fc1.bias"]
    bias[3] = torch.nextafter(bias[3], torch.tensor(1.0))
    save_file(weights, file, {"format": "pt"})
    assert file.stat().st_size == stat.st_size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "one weight": (nudge_one_weight, ["weights"]),
    "config.json": (lambda folder: edit_json(folder / "config.json", "layer_norm_eps", 1e-6), ["config"]),
    "tokenizer.json": (lambda folder: edit_json(folder / "tokenizer.json", "normalizer", None), ["tokenizer"]),
    "tokenizer_config.json": (
        lambda folder: edit_json(folder / "tokenizer_config.json", "add_prefix_space", True),
        ["tokenizer"],
    ),
    "special tokens": (lambda folder: (folder / "special_tokens_map.json").write_text("{}"), ["tokenizer"]),
    "added tokens": (lambda folder: (folder / "added_tokens.json").write_text("{}"), ["tokenizer"]),
    "a file that is not read": (lambda folder: (folder / "generation_config.json").write_text("{}"), []),
    "weights of another tool": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), []),
    "a README": (lambda folder: (folder / "README.md").write_text("x"), []),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_base_changes_its_part_of_the_digest(name: str, phi_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(phi_dir, base)
    before = resolve_base_model(str(base)).digest
    change, parts = CHANGES[name]
    change(base)
    assert different_parts(before, resolve_base_model(str(base)).digest) == parts


def test_the_weights_part_is_that_of_sha256sum(phi_dir: Path) -> None:
    """Reference: hashlib on the whole file, in the form that the program prints."""
    line = f"{hashlib.sha256((phi_dir / 'model.safetensors').read_bytes()).hexdigest()}  model.safetensors\n"
    digest = resolve_base_model(str(phi_dir)).digest
    assert digest.split("-")[2] == hashlib.sha256(line.encode()).hexdigest()[:16]


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder with two weight files that are large enough to be remembered, long unchanged."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for number, name in enumerate(SHARDS):
        with (folder / name).open("wb") as file:  # sparse
            file.write(bytes([number]))
            file.truncate(MIN_REMEMBERED_BYTES)
    return folder


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of any age are old enough to be remembered: their ctime cannot be set."""
    monkeypatch.setattr(base_digest_module, "_SETTLED_NS", 0)


def digest_of(folder: Path) -> str:
    return base_digest(folder, base_files(folder, SHARDS))


def remembered(folder: Path) -> list[list[object]]:
    content: list[list[object]] = json.loads((folder / DIGESTS_FILE).read_text())
    return content


def test_hashes_of_large_files_are_remembered_beside_them(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A false hash with the right state shows that it is used; a base of 5.6 GB is not hashed twice."""
    monkeypatch.setattr(base_digest_module, "_SETTLED_NS", 3600 * 10**9)
    fresh = digest_of(large)
    assert not (large / DIGESTS_FILE).exists(), "written a moment ago, so a change could go unnoticed"
    monkeypatch.setattr(base_digest_module, "_SETTLED_NS", 0)
    assert digest_of(large) == fresh
    (_, first), (_, second) = remembered(large)
    assert [first, second] == [hashlib.sha256((large / name).read_bytes()).hexdigest() for name in SHARDS]
    content = remembered(large)
    content[0][1] = "0" * 64
    (large / DIGESTS_FILE).write_text(json.dumps(content))
    assert different_parts(fresh, digest_of(large)) == ["weights"]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("how", ["in place", "replaced", "copied"])
def test_a_remembered_hash_never_covers_another_file(how: str, large: Path, tmp_path: Path) -> None:
    """Same name, size and modification time each time, as an attacker or a copy with `cp -p` makes them."""
    before, stat = digest_of(large), (large / SHARDS[1]).stat()
    assert len(remembered(large)) == 2
    folder = large
    if how == "copied":
        folder = tmp_path / "copy"
        shutil.copytree(large, folder)  # with the remembered hashes and the times
    target = folder / SHARDS[1]
    if how == "replaced":
        target.write_bytes(target.read_bytes())
        target.unlink()
    with target.open("r+b" if target.exists() else "wb") as file:
        file.seek(MIN_REMEMBERED_BYTES - 1)
        file.write(b"x")
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (target.stat().st_size, target.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert different_parts(before, digest_of(folder)) == ["weights"]


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", '[["a", 1]]', '[[["a.safetensors", 1, 2, 3, 4], "zz"]]', "5"]
)
def test_a_damaged_file_of_hashes_is_ignored(content: str, large: Path) -> None:
    before = digest_of(large)
    (large / DIGESTS_FILE).write_text(content)
    assert digest_of(large) == before


@pytest.mark.usefixtures("settled")
def test_a_read_only_folder_is_hashed_once_in_a_process(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in the place of the file cannot be replaced by it. Counted: hashes that begin with an empty state."""
    (large / DIGESTS_FILE).mkdir()
    sha256, begun = hashlib.sha256, list[bytes]()

    def counting(content: bytes = b"") -> object:
        begun.append(content)
        return sha256(content)

    monkeypatch.setattr(hashlib, "sha256", counting)
    digests, counts = set(), []
    for _ in range(2):
        begun.clear()
        digests.add(digest_of(large))
        counts.append(begun.count(b""))
    assert len(digests) == 1
    assert counts == [3 + 1, 1 + 1], "config.json and two large files, then config.json; no tokenizer file each time"
    assert list((large / DIGESTS_FILE).iterdir()) == []


def test_links_as_in_the_hub_cache_count_as_their_files(phi_dir: Path, tmp_path: Path) -> None:
    for path in phi_dir.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert resolve_base_model(str(tmp_path)).digest == resolve_base_model(str(phi_dir)).digest


def test_hashing_for_long_shows_progress(
    large: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here the first wait for the hashes ends before they do."""
    waits: list[float] = []

    def wait(tasks: Collection[Future[str]], timeout: float) -> object:
        waits.append(timeout)
        return SimpleNamespace(not_done=tasks) if len(waits) == 1 else futures.wait(tasks)

    monkeypatch.setattr(base_digest_module, "wait", wait)
    with caplog.at_level(logging.INFO, "lit_phi2"):
        digest_of(large)
    assert f"SHA-256 of the base in {large}: 0." in caplog.text
    assert "of 0.1 GB" in caplog.text
    assert waits == [base_digest_module.PROGRESS_SECONDS] * 2


@pytest.mark.usefixtures("settled")
def test_a_small_base_is_left_as_it_is(phi_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(phi_dir, base)
    names = sorted(path.name for path in base.iterdir())
    assert resolve_base_model(str(base)).digest
    assert sorted(path.name for path in base.iterdir()) == names


def test_finding_a_base_hashes_nothing(large: Path, phi_dir: Path) -> None:
    """`inspect` and reading data do not wait: only the digest looks into the weights, which are absent here."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(phi_dir / name, large)
    (large / SHARDS[0]).rename(large / "model.safetensors")
    base = resolve_base_model(str(large))
    (large / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        _ = base.digest


def test_a_file_that_changes_while_it_is_hashed_is_refused(large: Path) -> None:
    files = base_files(large, SHARDS)
    (large / SHARDS[0]).write_bytes(b"new")
    with pytest.raises(InputError, match=r"a\.safetensors changed while it was read"):
        base_digest(large, files)


@pytest.mark.usefixtures("settled")
def test_processes_that_hash_at_once_agree(large: Path) -> None:
    """As those of several devices do; the file of hashes is complete afterwards."""
    code = (
        "import sys; from pathlib import Path; from lit_phi2 import base_digest as module\n"
        "from lit_phi2.base_digest import base_digest, base_files\n"
        "module._SETTLED_NS = 0\n"
        "folder = Path(sys.argv[1]); print(base_digest(folder, base_files(folder, sys.argv[2:])))"
    )
    command = [sys.executable, "-c", code, str(large), *SHARDS]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    digests = [process.communicate()[0].strip() for process in processes]
    assert set(digests) == {digest_of(large)}
    assert [state[0] for state, _ in remembered(large)] == list(SHARDS)  # type: ignore[index]

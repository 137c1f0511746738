"""The name of a base: a folder, a hub id, or one of both, in which case nothing is asked of the network."""

import socket
from pathlib import Path

import pytest

from lit_phi2.errors import InputError
from lit_phi2.pretrained import resolve_base_model


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """The hosts that are looked up, in an empty folder; every lookup fails."""
    hosts: list[object] = []

    def getaddrinfo(host: object, *args: object, **kwargs: object) -> list[object]:
        hosts.append(host)
        raise socket.gaierror("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return hosts


@pytest.mark.parametrize("name", ["models/phi2", "checkpoints/phi-2", "Base/phi", "mine/phi-2"])
def test_a_folder_that_is_missing_is_not_looked_up(name: str, connections: list[object], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError) as error:
        resolve_base_model(name)
    assert connections == []
    assert f"there is no folder {name} in {tmp_path}" in str(error.value)
    assert f"hf download {name}" in str(error.value), "the other reading: a hub id"
    assert f"--model.base /path/to/{name}" in str(error.value)


@pytest.mark.parametrize("name", ["microsoft/phi-2", "someone/phi-2-mine"])
def test_a_hub_id_is_looked_up(name: str, connections: list[object], tmp_path: Path) -> None:
    (tmp_path / "microsoft").mkdir()
    with pytest.raises(InputError, match="could not be downloaded"):
        resolve_base_model(name)
    assert connections


def test_a_folder_of_two_names_is_that_folder(phi_dir: Path, connections: list[object], tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "phi2").symlink_to(phi_dir)
    assert resolve_base_model("models/phi2").folder == phi_dir.resolve()
    assert connections == []

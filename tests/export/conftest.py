"""A random two-layer Phi with a vocabulary laid out as Phi-2's, and an adapter that changes its completions."""

import pytest
from transformers import PreTrainedTokenizerBase

from export.support import random_adapter, write_random_phi
from lit_phi2.adapters.adapter import Adapter
from lit_phi2.model.lora import LoraSettings
from lit_phi2.pretrained import BaseModel, load_tokenizer, resolve_base_model


@pytest.fixture(scope="session")
def export_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("gpt2-layout")
    write_random_phi(folder)
    return resolve_base_model(str(folder))


@pytest.fixture(scope="session")
def export_tokenizer(export_base: BaseModel) -> PreTrainedTokenizerBase:
    return load_tokenizer(export_base)


@pytest.fixture(scope="session")
def adapter(export_base: BaseModel) -> Adapter:
    return random_adapter(export_base)


@pytest.fixture(scope="session")
def tiny_base() -> BaseModel:
    return resolve_base_model("tiny")


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base: BaseModel) -> Adapter:
    return random_adapter(tiny_base, LoraSettings(2, 4, ("Wqkv", "fc1", "fc2")))

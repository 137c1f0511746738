"""How configs and flags combine, and the packaged configs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lit_phi2.cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"


def test_flags_override_configs_in_any_position(
    phi_dir: Path,
    write_jsonl: Callable[..., Path],
    record_rows: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(record_rows)
    (tmp_path / "a.yaml").write_text(f"model:\n  base: {phi_dir}\n  lora_r: 3\n  lora_alpha: 3\n")
    (tmp_path / "b.yaml").write_text("model:\n  lora_alpha: 6\ndata:\n  max_length: 100\n")
    flags = ["--model.lora_r", "5", "--data.train_files", "records.jsonl"]
    flags += ["--data.val_files=null", "--data.val_fraction", "0.4"]
    arguments = ["fit", *flags, "--config", "a.yaml", "--trainer.max_steps", "1", "--config=b.yaml"]
    assert main(arguments) == 0
    saved = yaml.safe_load(Path("runs/b/version_0/config.yaml").read_text())
    assert saved["run_name"] == "b", "the stem of the last config"
    assert saved["model"]["lora_r"] == 5
    assert saved["model"]["lora_alpha"] == 6
    assert saved["data"]["max_length"] == 100
    assert saved["data"]["val_files"] is None


@pytest.mark.parametrize("name", ["tiny.yaml", "tiny-full.yaml", "phi2.yaml"])
def test_packaged_configs_parse_and_hold_the_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", str(CONFIGS / name), "--print_config"])
    assert exit_info.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["target_modules"] == ["Wqkv", "fc1", "fc2"]
    if name == "phi2.yaml":
        assert (config["model"]["base"], config["data"]["max_length"]) == ("microsoft/phi-2", 512)
        assert (config["model"]["lora_r"], config["model"]["learning_rate"]) == (2, 2e-4)
        assert (config["trainer"]["max_epochs"], config["data"]["batch_size"]) == (3, 1)


@pytest.mark.parametrize("name", ["tiny.yaml", "configs/tiny.yaml"])
def test_a_packaged_config_is_found_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", name, "--print_config"])
    assert exit_info.value.code == 0
    expected = yaml.safe_load((CONFIGS / "tiny.yaml").read_text("utf-8"))
    assert yaml.safe_load(capsys.readouterr().out)["model"]["lora_r"] == expected["model"]["lora_r"]

"""Leakage: rates, exposure and verdict against closed forms; what is measured against the plain model; whole runs."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score

from helpers import new_data, new_module
from lit_phi2.audit.extraction import Target, canary_target, identifier_targets
from lit_phi2.audit.leakage import (
    CanaryGroup,
    LeakageLimits,
    Rate,
    auc,
    beyond_limits,
    exact_rate,
    exposures,
    mean_rate,
    membership,
    true_positive_rate,
)
from lit_phi2.cli.main import main
from lit_phi2.data.canaries import make_canaries
from lit_phi2.training.leakage import extract, measure_canaries, secret_nats


def test_auc_is_that_of_scikit_learn_with_ties() -> None:
    generator = np.random.default_rng(0)
    members, others = generator.integers(0, 30, 200) / 10, generator.integers(0, 25, 300) / 10
    expected = roc_auc_score([1] * 200 + [0] * 300, [*members, *others])
    assert auc(members, others).value == pytest.approx(expected)


def test_auc_of_shifted_normals_has_its_closed_form() -> None:
    """Reference: P(X > Y) of normals one apart is Phi(1 / sqrt(2)); equal scores of an untrained adapter are chance."""
    generator = np.random.default_rng(1)
    rate = auc(generator.normal(1, 1, 4000), generator.normal(0, 1, 4000))
    exact = 0.5 * (1 + math.erf(0.5))
    assert rate.low < exact < rate.high
    assert rate.high - rate.low < 0.03
    chance = auc(np.zeros(50), np.zeros(70))
    assert chance.low < chance.value == 0.5 < chance.high


def test_the_auc_interval_covers_chance_in_95_of_100_draws() -> None:
    """Reference: the level of the interval; 400 draws are within 4 standard deviations of 380."""
    generator = np.random.default_rng(2)
    rates = [auc(generator.normal(size=40), generator.normal(size=60)) for _ in range(400)]
    assert 362 <= sum(rate.low <= 0.5 <= rate.high for rate in rates) <= 398


def test_exact_intervals_are_the_published_ones() -> None:
    """Reference: Clopper and Pearson 1934; 3/n rule for no event; an interval of 1 of 20 from R's binom.test."""
    rate = exact_rate(1, 20)
    assert (rate.low, rate.high) == (pytest.approx(0.00126509, abs=1e-6), pytest.approx(0.2487328, abs=1e-6))
    assert exact_rate(0, 300).high == pytest.approx(1 - 0.025 ** (1 / 300))


def test_at_one_percent_false_positives_one_of_a_hundred_may_pass() -> None:
    others = np.arange(100.0)
    assert true_positive_rate(np.array([98.5, 99.5, 97.0, 98.0]), others).value == 0.5
    assert true_positive_rate(np.array([98.5, 99.5]), others[:99]).value == 1.0
    assert membership(np.zeros(10), np.zeros(10))["tpr_at_1_percent_fpr"].value == 0.0


def test_exposure_of_uniform_ranks_is_that_of_chance() -> None:
    """Reference: log2 of the mean rank's geometric mean, log2((n + 1)!) / (n + 1) by the gamma function; 1 / ln 2."""
    controls = np.arange(511.0)
    bits = exposures(np.arange(-0.5, 511), controls)  # each rank from 1 to 512 once
    assert bits.mean() == pytest.approx(9 - math.lgamma(513) / math.log(2) / 512)
    assert bits.mean() == pytest.approx(1 / math.log(2), abs=0.02)
    assert (bits[0], bits[-1]) == (9.0, 0.0)
    assert exposures([1.0], [1.0] * 6)[0] == pytest.approx(math.log2(7 / 4))  # ties: rank 4 of 7


def test_the_interval_of_a_mean_is_students() -> None:
    """Reference: t of 0.975 with 2 degrees of freedom is 4.302653 in printed tables."""
    rate = mean_rate(np.array([4.0, 5.0, 6.0]), 9.0)
    assert (rate.low, rate.high) == (pytest.approx(5 - 4.302653 / math.sqrt(3)), pytest.approx(5 + 4.302653 / 3**0.5))
    saturated = mean_rate(np.array([9.0] * 4), 9.0)
    assert (saturated.low, saturated.high) == (9.0, 9.0)


@pytest.mark.parametrize(
    ("auc_low", "exposure", "extracted", "train_share", "val_share", "expected"),
    [
        (0.6, 4.0, 0, None, None, []),
        (0.61, 4.0, 0, None, None, ["leakage.max_auc"]),
        (0.5, 4.1, 0, None, None, ["leakage.max_exposure"]),
        (0.5, 4.0, 1, None, None, ["leakage.max_extracted"]),
        (0.5, 4.0, 0, (30, 100), (0, 100), ["leakage.max_extracted"]),
        (0.5, 4.0, 0, (30, 100), (30, 100), []),
        (0.5, 4.0, 0, (1, 100), None, []),  # one of a hundred may be chance
        (0.7, 9.0, 8, (99, 100), (0, 9), [f"leakage.max_{name}" for name in ("auc", "exposure", *["extracted"] * 2)]),
    ],
)
def test_the_verdict_names_every_limit_that_is_exceeded(
    auc_low: float, exposure: float, extracted: int, train_share: Any, val_share: Any, expected: list[str]
) -> None:
    rates = {"auc": Rate(0.7, auc_low, 0.8)}
    group = CanaryGroup("response", 4, False, 8, Rate(exposure, exposure, exposure), exact_rate(extracted, 8))
    control = CanaryGroup("response", 0, True, 64, Rate(9.0, 9.0, 9.0), exact_rate(64, 64))
    shares = {"train": train_share, "val": val_share}
    identifiers = {name: exact_rate(*share) for name, share in shares.items() if share}
    beyond = beyond_limits(rates, [control, group], identifiers, LeakageLimits())
    assert [line.rpartition(", ")[2].split()[0] for line in beyond] == expected


def test_a_mean_exposure_is_beyond_with_its_whole_interval_only() -> None:
    """Few canaries tell little: a mean of 6 bits whose interval begins at the limit of 4 is no evidence."""
    for low, is_beyond in ((4.0, False), (4.1, True)):
        group = CanaryGroup("response", 1, False, 8, Rate(6.0, low, 8.0), exact_rate(0, 8))
        assert bool(beyond_limits({"auc": Rate(0.5, 0.4, 0.6)}, [group], {}, LeakageLimits())) == is_beyond


# What is measured


def test_the_nats_of_a_secret_are_those_of_the_plain_model(phi_dir: Path, train_file: Path) -> None:
    """Reference: cross-entropy of the logits of the text alone, at the tokens that spell the secret."""
    module, data = new_module(phi_dir), new_data(phi_dir, train_file, canaries=1)
    data.read("fit")
    tokenizer = data.tokenizer
    assert tokenizer is not None
    canaries = make_canaries(1, 42)[0]
    targets = [canary_target(canary, tokenizer) for canary in canaries]
    for canary, target in zip(canaries, targets, strict=True):
        assert tokenizer.decode(target.secret) == canary.secret
        assert tokenizer.decode(target.prefix).endswith(" is M")
        trained = next(example.ids for example in data.splits["train"].examples if example.id == f"{canary.id}-1")
        whole = target.prefix + target.secret
        assert trained[: len(whole)] == whole
    nats = secret_nats(module, data, targets)
    module.eval()
    for target, found in zip(targets, nats, strict=True):
        ids = torch.tensor([target.prefix + target.secret])
        with torch.no_grad():
            logits = module.phi(ids, use_cache=False).logits[0, len(target.prefix) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(target.secret), reduction="sum")
        assert found == pytest.approx(expected.item(), rel=1e-4)


def test_extraction_is_what_the_likeliest_tokens_spell(phi_dir: Path) -> None:
    """Reference: the largest logit after each prefix, one token after another."""
    module = new_module(phi_dir)
    module.eval()
    ids = [5, 6, 7]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(module.phi(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    right, other = ids[3:], [*ids[3:6], ids[6] + 1]
    assert extract(module, [Target(ids[:3], right), Target(ids[:3], other), Target(ids[:4], right[1:2])]) == [
        *(True, False, True)
    ]


def test_identifiers_that_a_prompt_or_both_splits_hold_are_none(
    phi_dir: Path, write_jsonl: Any, tokenizer: Any
) -> None:
    """Copied from the prompt, in responses of both splits, or the second time in one response."""
    train = [
        {"instruction": "Why?", "response": "Claim CLM-2024-00017 and again CLM-2024-00017."},
        {"instruction": "About CLM-2024-00018?", "response": "CLM 2024 00018 is CLM-2024-00018."},
        {"instruction": "Call?", "response": "Call 555-201-3344 for M79184741."},
    ]
    val = [{"instruction": "Call?", "response": "Call 555-201-3344, not 555-201-9999."}]
    data = new_data(phi_dir, write_jsonl(train, "a.jsonl"), val_files=str(write_jsonl(val, "b.jsonl")), canaries=1)
    data.read("fit")
    splits = {name: data.splits[name] for name in ("train", "val")}
    targets = identifier_targets(splits, {"train": range(3), "val": range(1)}, tokenizer)
    secrets = {name: [tokenizer.decode(target.secret).strip() for target in each] for name, each in targets.items()}
    assert secrets == {"train": ["CLM-2024-00017", "M79184741"], "val": ["555-201-9999"]}
    assert tokenizer.decode(targets["train"][1].prefix).endswith("### Response:\nCall 555-201-3344 for ")


def test_a_token_that_begins_before_a_secret_belongs_to_it(phi_dir: Path, write_jsonl: Any, tokenizer: Any) -> None:
    """Otherwise the prefix would give the first letter away. The tokenizer has one token for the space and the j."""
    rows = [{"instruction": "Where to?", "response": "Write to jo@example.org, then wait."}]
    assert tokenizer.tokenize(" jo")[0].endswith("j")
    data = new_data(phi_dir, write_jsonl(rows, "a.jsonl"), val_files=str(write_jsonl(rows, "b.jsonl")))
    data.read("fit")
    (target,) = identifier_targets({"train": data.splits["train"]}, {"train": range(1)}, tokenizer)["train"]
    assert tokenizer.decode(target.secret) == " jo@example.org"
    assert tokenizer.decode(target.prefix).endswith("### Response:\nWrite to")


# Runs


def test_an_untrained_adapter_is_at_chance(phi_dir: Path, train_file: Path) -> None:
    """Reference: ranks of chance have exponential exposures, mean and deviation 1 / ln 2; four deviations of a mean."""
    data = new_data(phi_dir, train_file, canaries=12, max_length=512)
    data.read("fit")
    groups = measure_canaries(new_module(phi_dir), data)
    kinds = [(group.repeats, group.is_control, group.number) for group in groups]
    assert kinds == 2 * [(0, True, 64), (1, False, 12), (4, False, 12), (16, False, 12)]
    for group in groups:
        assert group.extracted.value == 0.0
        assert abs(group.exposure.value * math.log(2) - 1) < 4 / math.sqrt(group.number)
    planted = [group.exposure.value * math.log(2) for group in groups if not group.is_control]
    assert abs(np.mean(planted) - 1) < 4 / math.sqrt(72)


@pytest.fixture(scope="module")
def overfit(claims_phi_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of rank 64 over a canary of each kind, and two records 16 times, with numbers of claims."""
    folder = tmp_path_factory.mktemp("overfit")
    generator = random.Random(0)
    for name, num_records, copies in (("train", 2, 16), ("val", 8, 1)):
        numbers = [f"CLM-2024-{generator.randrange(10**5):05d}" for _ in range(num_records)]
        rows = [{"instruction": f"Which {name} {n}?", "response": number} for n, number in enumerate(numbers)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * copies))
    settings = {
        "run_name": "a",
        "leakage": {"max_exposure": 8.5},
        "model": {"base": str(claims_phi_dir), "dtype": "float32", "learning_rate": 0.02, "lora_r": 64},
        "data": {"train_files": "train.jsonl", "val_files": "val.jsonl", "canaries": 1, "max_length": 128},
        "trainer": {"accelerator": "cpu", "limit_val_batches": 0, "enable_progress_bar": False, "max_epochs": 10},
    }
    settings["model"] |= {"lora_alpha": 128, "max_new_tokens": 4}  # type: ignore[operator]
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "run.yaml"]) == 0
    return folder


@pytest.fixture
def audited(overfit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What audit writes and says about the run, under its limits."""
    monkeypatch.chdir(overfit)
    code = main(["audit", "--config", "run.yaml", "--ckpt_path", "last", "--what", "leakage"])
    return code, json.loads(Path("runs/a/version_0/audit_leakage.json").read_text("utf-8")), capsys.readouterr()


def test_an_overfit_adapter_gives_canaries_and_identifiers_away(audited: Any) -> None:
    """Reference: 511 controls allow log2(512) = 9 bits; controls and records of val are at chance, 1 / ln 2 and 0."""
    code, result, output = audited
    groups = {(group["place"], group["repeats"], group["is_control"]): group for group in result["canaries"]}
    extracted = groups["response", 16, False]
    assert (extracted["exposure"]["value"], extracted["extracted"]["value"]) == (9.0, 1.0)
    for place in ("prompt", "response"):
        control = groups[place, 0, True]
        assert abs(control["exposure"]["value"] * math.log(2) - 1) < 4 / math.sqrt(64)
        assert control["extracted"]["value"] == 0.0
    assert (result["identifiers"]["train"]["number"], result["identifiers"]["val"]["number"]) == (32, 8)
    assert result["identifiers"]["train"]["value"] >= 0.5
    assert result["identifiers"]["val"]["value"] == 0.0
    assert code == 3
    assert result["passed"] is False
    assert result["limits"] == {"max_auc": 0.6, "max_exposure": 8.5, "max_extracted": 0.01}
    for line in result["beyond"]:
        assert line in output.err
    assert "canaries 16x in the response (1): exposure 9.000" in output.out
    assert "beyond the limits of the config" in output.out


def test_limits_of_the_config_decide_the_exit_code(overfit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(overfit)
    limits = ["--leakage.max_auc=1", "--leakage.max_exposure=9", "--leakage.max_extracted=1"]
    audit = ["audit", "--config=run.yaml", "--ckpt_path=last", "--what=leakage", "--data.canaries=0"]
    assert main([*audit, *limits]) == 0
    assert main([*audit, *limits, "--leakage.max_auc=0.5"]) == 2  # given twice
    assert main([*audit, *limits[:2]]) == 3
    assert yaml.safe_load(Path("runs/a/version_0/config.yaml").read_text())["leakage"]["max_exposure"] == 8.5


@pytest.mark.parametrize("flag", ["max_auc=1.1", "max_auc=-0.1", "max_exposure=-1", "max_extracted=2", "max_auc=.nan"])
def test_limits_out_of_range_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--ckpt_path=none", f"--leakage.{flag}"]) == 2
    assert f"leakage.{flag.partition('=')[0]}: " in capsys.readouterr().err


def test_no_export_has_a_canary(overfit: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In any byte of the adapter, or of an export with its card; the ledger names them."""
    monkeypatch.chdir(overfit)
    out = str(tmp_path / "out")
    assert main(["export", "--config=run.yaml", "--ckpt_path=last", f"--output_dir={out}", "--check=0"]) == 0
    canaries, _ = make_canaries(1, 42)
    files = [file for folder in (Path("runs/a/version_0/adapter"), Path(out)) for file in folder.rglob("*")]
    for file in (file for file in files if file.is_file()):
        content = file.read_bytes()
        for canary in canaries:
            assert not any(text.encode() in content for text in (canary.secret, canary.response, canary.id)), file


def test_records_of_train_can_be_told_from_those_of_val(
    phi_dir: Path, write_jsonl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Responses are random digits, so nothing but memory can lower their loss; the untrained adapter is at chance."""
    generator = random.Random(0)

    def rows(name: str) -> list[dict[str, str]]:
        numbers = [f"{generator.randrange(10**6):06d}" for _ in range(8)]
        return [
            {"id": f"{name}{n}", "instruction": f"{name} {n}", "response": number} for n, number in enumerate(numbers)
        ]

    train, val = write_jsonl(rows("a"), "train.jsonl"), write_jsonl(rows("b"), "val.jsonl")
    monkeypatch.chdir(tmp_path)
    settings = [f"--model.base={phi_dir}", "--model.dtype=float32", "--model.max_new_tokens=4", "--run_name=a"]
    settings += [f"--data.train_files={train}", f"--data.val_files={val}", "--trainer.accelerator=cpu"]
    fit = ["--model.learning_rate=0.03", "--model.lora_r=16", "--trainer.limit_val_batches=0"]
    assert main(["fit", *settings, *fit, "--trainer.max_epochs=12"]) == 0
    assert main(["audit", *settings, "--ckpt_path=last", "--what=leakage"]) == 3
    assert "can be told from those of val_files: AUC 1.000" in capsys.readouterr().err
    assert json.loads(next(tmp_path.rglob("audit_leakage.json")).read_text("utf-8"))["passed"] is False
    assert main(["audit", *settings, "--ckpt_path=last", "--what=leakage", "--leakage.max_auc=1"]) == 0
    assert main(["fit", *settings, "--model.learning_rate=1e-12", "--trainer.max_epochs=1"]) == 0
    assert main(["audit", *settings, "--ckpt_path=last", "--what=leakage"]) == 0
    assert "membership auc 0.500" in capsys.readouterr().out

"""PredictionWriter: the .part files of several ranks become one predictions.jsonl."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lit_phi2.data.records import Record
from lit_phi2.generation.engine import Completion
from lit_phi2.training.callbacks.predictions import PredictionWriter, to_prediction


def test_partial_files_are_merged_in_order_without_duplicates(tmp_path: Path) -> None:
    """Index 3 is in two of the three files, as after two runs at once."""
    file = tmp_path / "predictions.jsonl"
    writer = PredictionWriter(file, {"model": "m"})
    for part, indices in (("", [5, 0, 3]), ("1", [1, 3, 4]), ("2", [2])):
        lines = [json.dumps({"index": index, "id": f"r{index}", "finish_reason": "length"}) for index in indices]
        (tmp_path / f"predictions.jsonl.part{part}").write_text(writer.header + "".join(line + "\n" for line in lines))
    assert sorted(set(writer.read_completed().tolist())) == [0, 1, 2, 3, 4, 5]
    writer.finish()
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == [f"r{index}" for index in range(6)]
    assert (writer.num_completions, writer.num_at_limit) == (6, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_a_prediction_has_a_reference_only_with_a_response(tokenizer: PreTrainedTokenizerBase) -> None:
    completion = Completion(tokenizer("So.")["input_ids"], "stop")
    expected = {"id": "r", "instruction": "Why?", "input": "", "completion": "So.", "finish_reason": "stop"}
    expected["new_tokens"] = len(completion.ids)
    for response, reference in (("", {}), ("Because.", {"reference": "Because."})):
        record = Record("r", "Why?", "", response, "records.jsonl:1")
        assert to_prediction(record, completion, tokenizer) == expected | reference

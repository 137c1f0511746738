"""Two commands that write the same output at once leave the output of one of them, whole."""

from pathlib import Path

from forked_runs import start_program
from helpers import new_module
from lit_phi2.adapters.peft_format import read_peft_folder, save_adapter

EXPORT_10_TIMES = """
import sys
from pathlib import Path
from lit_phi2.adapters.peft_format import read_peft_folder, save_adapter
adapter = read_peft_folder(Path(sys.argv[1]))
for _ in range(10):
    save_adapter(adapter, Path(sys.argv[2]))
"""


def test_two_exports_to_one_folder_leave_one_of_the_adapters(phi_dir: Path, tmp_path: Path) -> None:
    """Reading checks a digest over all files of the folder."""
    sources, target = [tmp_path / "rank2", tmp_path / "rank4"], tmp_path / "target"
    for rank, source in zip((2, 4), sources, strict=True):
        save_adapter(new_module(phi_dir, lora_r=rank).trained_adapter(), source)
    exports = [
        start_program(EXPORT_10_TIMES, [str(source), str(target)], tmp_path / f"{source.name}.log")
        for source in sources
    ]
    assert [export.wait() for export in exports] == [0, 0], [export.output for export in exports]
    assert read_peft_folder(target).settings in [read_peft_folder(source).settings for source in sources]
    assert {path.name for path in target.iterdir()} == {path.name for path in sources[0].iterdir()}

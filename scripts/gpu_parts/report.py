"""Report: the measurements of a check as a table in Markdown.

The standard library only: the driver on a bare machine prints it.
"""

from collections.abc import Iterator
from statistics import median
from typing import Any

Report = dict[str, Any]  # JSON values


def markdown(report: Report) -> str:
    """Date, card and commit; a row for each peer and length; a line for every other part."""
    machine = report["parts"].get("machine", {})
    place = f"{machine.get('device', 'unknown device')}, torch {machine.get('torch')}, CUDA {machine.get('cuda')}"
    head = f"{report['date']}, {place}, commit {report['commit']}, `{report['command']}`, {report['seconds']:.0f} s"
    lines = [head, "", *training_table(report), "", "| part | result | |", "|---|---|---|"]
    for name, part in report["parts"].items():
        lines.append(f"| {name} | {part['status']}, {part['seconds']:.0f} s | {cell(part.get('summary', ''))} |")
    return "\n".join(lines)


def training_table(report: Report) -> list[str]:
    """Speed, share of the device's matmul rate, memory beside the plan."""
    columns = ["part", "tokens in a row", "", "rows", "tokens/s", "share of matmul rate", "GiB", "planned", "times"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for part, length, name, result in measured(report):
        label = " ".join(filter(None, [name, f"({result['variant']})" if result["variant"] else ""]))
        planned = f"{result['planned_gib']:.1f}" if "planned_gib" in result else "-"
        planned += f" ({result['plan_deviation']:+.0%})" if "plan_deviation" in result else ""
        values = [part, f"{int(length):,}", label, str(result["rows"])]
        values += [f"{median(result['tokens_per_second']):,.0f}", f"{result['matmul_share']:.2f}"]
        values += [f"{result['peak_gib']:.1f}", planned, f"{result['speedup']:.2f}"]
        lines.append(f"| {' | '.join(values)} |")
    note = "times: the first row of that part and length is so many times as fast, median of alternating rounds."
    return [*lines, "", note, *block_lines(report)]


def block_lines(report: Report) -> list[str]:
    """A block with torch's own and with compiled operations, and the chunk of the loss, of every part that trained."""
    lines = []
    for part, measurements in report["parts"].items():
        if blocks := measurements.get("blocks"):
            compiled = f"{blocks['compiled_ms']:.2f} ms" if "compiled_ms" in blocks else cell(blocks["compile_error"])
            lines.append(
                f"{part}: a block over {blocks['rows']} rows of {blocks['length']:,} tokens, forward and backward: "
                f"{blocks['torch_ms']:.2f} ms, compiled {compiled}. Loss: {blocks['vocab_chunk']:,} tokens of the "
                f"vocabulary a chunk, {blocks['logits_mib']:,.0f} MiB."
            )
    return lines


def measured(report: Report) -> Iterator[tuple[str, str, str, Report]]:
    """Part, length, peer and result of everything that was trained in rounds."""
    for part, measurements in report["parts"].items():
        for length, results in measurements.get("lengths", {}).items():
            for name, result in results.items():
                if isinstance(result, dict) and result.get("tokens_per_second"):
                    yield part, length, name, result


def cell(text: str) -> str:
    """Text without what ends a cell.

    >>> cell("a | b")
    'a / b'
    """
    return text.replace("|", "/").replace("\n", " ")

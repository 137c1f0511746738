"""Rows: what is measured, one function a row of the table; each yields its line as soon as it has it.

systems in alternation, round after round  ->  ratios of a round's times  ->  their median beside bar and aim
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from generation_parts.systems import SystemSettings
from generation_parts.texts import Question, draw_limits, read_examples, read_questions, split_questions
from generation_parts.workers import Worker

DTYPES, BATCH_SIZES = ("float32", "bfloat16"), (1, 8, 32)
MIN_CALIBRATION = 4  # records on which a setting of transformers is measured, or one batch of them


@dataclass(frozen=True, slots=True)
class Settings:
    """Of a run.

    Attributes:
        tiny_adapter, wide_adapter, full_adapter: folders of the adapters of the three bases.
        wide_base, full_base: Phi-2's width in few layers, and in all.
        questions: a JSONL file of real text, or claims:test.
        records: at most so many in the first row.
        mixed_records, mixed_limits: of the row of mixed lengths.
        draft_records, index_records: completed, and learned from (None is all), in the row of drafts.
        tokens: of completions that are one record's.
        rounds: of alternation.
        buffer_mib: that is read to measure the bandwidth.
        in_process: without processes of their own.
        threads: of every process.
        clock: wall or cpu, see `systems.py`.
    """

    tiny_adapter: str = ""
    wide_adapter: str = ""
    full_adapter: str = ""
    wide_base: str = ""
    full_base: str = ""
    questions: str = "claims:test"
    records: int = 436
    mixed_records: int = 64
    mixed_limits: tuple[int, int] = (20, 256)
    draft_records: int = 64
    index_records: int | None = None
    tokens: int = 128
    max_new_tokens: int = 400
    rounds: int = 3
    buffer_mib: int = 2048
    in_process: bool = False
    threads: int | None = None
    clock: str = "wall"


@dataclass(slots=True)
class Line:
    """A line of the table.

    Attributes:
        name: what is measured, and beside what.
        value: the figure that bar and aim are of.
        bar, aim: the least, or for a cost the most; None where there is none.
        details: all that was measured.
    """

    name: str
    value: float
    bar: float | None = None
    aim: float | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def tiny(settings: Settings) -> Iterator[Line]:
    """The packaged test records, beside transformers and beside the former predict."""
    questions = read_questions("tiny", "claims:test", settings.records)
    plain = SystemSettings("ours", "tiny", settings.tiny_adapter)
    base = replace(plain, learned="claims:train")
    limits = [settings.max_new_tokens] * len(questions)
    best, calibration = _best_transformers(settings, replace(plain, name="transformers"), questions, limits)
    systems = {"ours": base, "without drafts": plain, "transformers": best, "former": replace(plain, name="former")}
    runs = _alternate(settings, systems, questions, limits)
    found = f"{len(questions)} records; transformers at its best, {best.dtype} in batches of {best.batch_size}"
    details = {"calibration": calibration}
    yield _ratio("tiny base, beside transformers", runs, "transformers", (2.5, 4.0), found, details)
    yield _ratio("tiny base, beside the former predict", runs, "former", (4.0, 7.0), f"{len(questions)} records")
    yield _ratio("tiny base, beside no drafts", runs, "without drafts", (None, None), f"{len(questions)} records")


def bandwidth(settings: Settings) -> Iterator[Line]:
    """One record at true width: the share of the memory bandwidth, first token, and the cache."""
    prompt = read_questions(settings.wide_base, "claims:test", 1)[0].prompt
    shares: list[float] = []
    runs: list[dict[str, Any]] = []
    reader = SystemSettings("bandwidth", "", "", batch_size=settings.buffer_mib)
    ours = SystemSettings("ours", settings.wide_base, settings.wide_adapter, ends=False)
    with _worker(settings, ours) as engine, _worker(settings, reader) as memory:
        engine.call("decode", prompt=prompt, count=4)  # untimed
        for _ in range(settings.rounds):
            rates = [memory.call("read")[0] for _ in range(3)]
            run = engine.call("decode", prompt=prompt, count=settings.tokens)[0]
            rates += [memory.call("read")[0] for _ in range(3)]
            run["bytes_per_second"] = median(rates)
            shares.append(run["weight_bytes"] / median(run["pass_seconds"]) / run["bytes_per_second"])
            runs.append(run)
    run = runs[-1]
    speed = 1 / median(seconds for run in runs for seconds in run["pass_seconds"])
    note = (
        f"{speed:.2f} tokens/s in {run['dtype']}, {run['weight_bytes'] / 1e9:.2f} GB of weights, "
        f"{median(run['bytes_per_second'] for run in runs) / 1e9:.1f} GB/s; first token of {len(prompt)} prompt tokens "
        f"in {median(run['first_token_seconds'] for run in runs):.2f} s; cache {run['cache_bytes'] / 2**20:.1f} MiB"
    )
    yield Line("true width, one record: share of the bandwidth", median(shares), 0.8, 0.92, note, {"runs": runs})


def int8(settings: Settings) -> Iterator[Line]:
    """One record at true width: the base in 8 bits beside the base in 16."""
    prompt = read_questions(settings.wide_base, "claims:test", 1)[0].prompt
    whole = SystemSettings("ours", settings.wide_base, settings.wide_adapter, dtype="bfloat16", ends=False)
    quantized = replace(whole, dtype="auto", quantization="int8")
    runs: dict[str, list[dict[str, Any]]] = {"int8": [], "bfloat16": []}
    with _worker(settings, quantized) as ours, _worker(settings, whole) as theirs:
        for worker in (ours, theirs):
            worker.call("decode", prompt=prompt, count=4)  # untimed
        for _ in range(settings.rounds):
            for name, worker in zip(runs, (ours, theirs), strict=True):
                runs[name].append(worker.call("decode", prompt=prompt, count=settings.tokens)[0])
    seconds = {name: [median(run["pass_seconds"]) for run in value] for name, value in runs.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["int8"], seconds["bfloat16"], strict=True)]
    speeds = {name: 1 / median(value) for name, value in seconds.items()}
    note = f"{speeds['int8']:.2f} tokens/s beside {speeds['bfloat16']:.2f} of bfloat16, "
    note += f"which decodes in {runs['bfloat16'][0]['dtype']}"
    yield Line("true width, one record: int8 beside 16 bits", median(ratios), 1.5, 1.9, note, {"runs": runs})


def mixed(settings: Settings) -> Iterator[Line]:
    """Records of real text with completions of very different lengths."""
    questions = read_questions(settings.wide_base, settings.questions, settings.mixed_records)
    limits = draw_limits(len(questions), *settings.mixed_limits)
    base = SystemSettings("ours", settings.wide_base, settings.wide_adapter, ends=False)
    best, calibration = _best_transformers(settings, replace(base, name="transformers"), questions, limits)
    runs = _alternate(settings, {"ours": base, "transformers": best}, questions, limits)
    note = f"{len(questions)} records; transformers at its best, {best.dtype} in batches of {best.batch_size}"
    details = {"calibration": calibration}
    yield _ratio("true width, mixed lengths", runs, "transformers", (2.5, 4.0), note, details)


def full(settings: Settings) -> Iterator[Line]:
    """All layers: one record, and eight. The systems run one after the other, because both may not fit the memory."""
    questions = read_questions(settings.full_base, settings.questions, 8)
    for count, bars in ((1, (1.2, 1.4)), (8, (2.0, 3.0))):
        runs: dict[str, list[tuple[float, int]]] = {"ours": [], "transformers": []}
        copying: list[float] = []
        limits = draw_limits(8, settings.tokens // 4, settings.tokens) if count > 1 else [settings.tokens]
        for name in runs:
            system = SystemSettings(
                name,
                settings.full_base,
                settings.full_adapter,
                dtype="bfloat16",
                batch_size=count,
                ends=False,
            )
            with _worker(settings, system) as worker:
                for _ in range(settings.rounds):
                    copying.append(worker.call("prepare", limits=limits)[1])
                    runs[name].append(_complete(worker, questions[:count], limits)[:2])
        note = "bfloat16 in memory, not in alternation; before it ours copies weights in "
        note += f"{median(copying[: settings.rounds]):.0f} s, and transformers merges its adapter"
        yield _ratio(f"all layers, {count} record{'s' if count > 1 else ''}", runs, "transformers", bars, note)


def drafts(settings: Settings) -> Iterator[Line]:
    """One record at a time, with drafts and without."""
    learned, used = split_questions(settings.questions)
    for name, base, adapter, sources, forced, bars in (
        ("tiny base", "tiny", settings.tiny_adapter, ("claims:train", "claims:test"), False, (None, None)),
        (
            "true width, forced",
            settings.wide_base,
            settings.wide_adapter,
            ("claims:train", "claims:test"),
            True,
            (1.6, 2.4),
        ),
        (
            "true width, real text, forced",
            settings.wide_base,
            settings.wide_adapter,
            (learned, used),
            True,
            (0.97, None),
        ),
    ):
        examples = read_examples(base, sources[0], settings.index_records)
        questions = read_questions(base, sources[1], settings.draft_records)
        system = SystemSettings("ours", base, adapter)
        runs: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        with _worker(settings, system) as worker:
            for _ in range(settings.rounds):
                for drafted in (False, True):
                    options = {"examples": examples if drafted else None, "limit": settings.max_new_tokens}
                    runs[drafted].append(worker.call("draft", questions=questions, forced=forced, **options)[0])
        pairs = list(zip(runs[True], runs[False], strict=True))
        equal = sum(a == b for a, b in zip(*(run["ids"] for run in pairs[0]), strict=True))
        note = f"{median(run['tokens'] / run['passes'] for run in runs[True]):.2f} tokens a pass"
        note += f"; {equal} of {len(questions)} completions equal"
        details = {
            str(key): [{k: v for k, v in run.items() if k != "ids"} for run in value] for key, value in runs.items()
        }
        speedup = median(without["seconds"] / with_drafts["seconds"] for with_drafts, without in pairs)
        yield Line(f"drafts, {name}: speed beside none", speedup, bars[0], bars[1], note, details)


def profile(settings: Settings) -> Iterator[Line]:
    """One decode pass of one record, and of eight, by operator."""
    questions = read_questions(settings.wide_base, "claims:test", 8)
    ours = SystemSettings("ours", settings.wide_base, settings.wide_adapter, ends=False)
    with _worker(settings, ours) as worker:
        for count in (1, 8):
            table, _ = worker.call("profile", prompts=[question.prompt for question in questions[:count]], passes=8)
            print(f"\n8 passes of {count} slots\n{table}", flush=True)
            yield Line(f"profile, {count} slots", 8, details={"table": table})


ROWS: dict[str, Callable[[Settings], Iterator[Line]]] = {
    "tiny": tiny,
    "bandwidth": bandwidth,
    "int8": int8,
    "mixed": mixed,
    "drafts": drafts,
    "profile": profile,
    "full": full,
}


def _worker(settings: Settings, system: SystemSettings) -> Worker:
    system = replace(system, threads=settings.threads, clock=settings.clock)
    return Worker(system, in_process=settings.in_process)


def _complete(worker: Worker, questions: list[Question], limits: list[int]) -> tuple[float, int, list[list[int]]]:
    """Seconds, new tokens, and the completions."""
    ids, seconds = worker.call("complete", prompts=[question.prompt for question in questions], limits=limits)
    return seconds, sum(map(len, ids)), ids


def _best_transformers(
    settings: Settings, system: SystemSettings, questions: list[Question], limits: list[int]
) -> tuple[SystemSettings, dict[str, float]]:
    """The setting with the most tokens a second on a batch of the records, spread over all."""
    speeds: dict[SystemSettings, float] = {}
    for dtype in DTYPES:
        with _worker(settings, replace(system, dtype=dtype)) as worker:
            for batch_size in BATCH_SIZES:
                if batch_size > 1 and batch_size // 2 >= len(questions):
                    continue
                step = max(1, len(questions) // max(MIN_CALIBRATION, batch_size))
                prompts = [question.prompt for question in questions[::step]]
                speed, _ = worker.call("measure", batch_size=batch_size, prompts=prompts, limits=limits[::step])
                speeds[replace(system, dtype=dtype, batch_size=batch_size)] = speed
                print(f"calibration: {dtype}, batch {batch_size}: {speed:,.1f} tokens/s", flush=True)
    best = max(speeds, key=lambda each: speeds[each])
    return best, {f"{each.dtype} {each.batch_size}": speed for each, speed in speeds.items()}


def _alternate(
    settings: Settings, systems: dict[str, SystemSettings], questions: list[Question], limits: list[int]
) -> dict[str, list[tuple[float, int]]]:
    """Seconds and new tokens of each system in each round."""
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in systems}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(_worker(settings, system)) for name, system in systems.items()}
        for worker in workers.values():  # untimed
            _complete(worker, questions[:2], [min(limit, 8) for limit in limits[:2]])
        for number in range(settings.rounds):
            completions = {}
            for name, worker in workers.items():
                seconds, tokens, completions[name] = _complete(worker, questions, limits)
                runs[name].append((seconds, tokens))
                print(f"round {number + 1}: {name} {tokens / seconds:,.1f} tokens/s, {seconds:.1f} s", flush=True)
    for name, ids in completions.items():
        equal = sum(a == b for a, b in zip(ids, completions["ours"], strict=True))
        print(f"{name}: {equal} of {len(questions)} completions equal ours", flush=True)
    return runs


def _ratio(
    name: str,
    runs: dict[str, list[tuple[float, int]]],
    peer: str,
    bars: tuple[float | None, float | None],
    note: str,
    details: dict[str, Any] | None = None,
) -> Line:
    """Tokens a second beside a peer's: the median over rounds."""
    speeds = {key: [tokens / seconds for seconds, tokens in value] for key, value in runs.items()}
    ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds[peer], strict=True)]
    note = f"{median(speeds['ours']):,.1f} tokens/s beside {median(speeds[peer]):,.1f}; {note}"
    return Line(name, median(ratios), bars[0], bars[1], note, {"tokens_per_second": speeds, **(details or {})})

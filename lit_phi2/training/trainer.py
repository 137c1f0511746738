"""Trainer: Lightning's, with a folder for every run, and all subcommands.

    fit         check the data -> open a folder -> validate the base -> steps -> best adapter in PEFT form
    validate    metrics on val_files             test      metrics on test_files, and its completions scored
    predict     predictions, or one completion   inspect   statistics and memory plan, without a model
    export      the adapter of a checkpoint for another runtime, checked there
    audit       suspect records by path:line; how far records of train can be told from others
    verify      files, base, data and signature against provenance.json; records against the ledger
    report      one page about a run

The CLI makes its flags from the signatures of these methods, and its help from their docstrings.
"""

import json
import logging
from pathlib import Path

from lit_phi2.audit.redaction import redact
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import IncompleteError, InputError
from lit_phi2.evaluation.table import format_table, metric_name, to_dict, without_groups
from lit_phi2.export.exporter import export
from lit_phi2.pretrained import load_tokenizer, resolve_base_model
from lit_phi2.training.audit_trainer import AuditTrainer
from lit_phi2.training.callbacks.completions import TestCompletions
from lit_phi2.training.callbacks.predictions import PredictionWriter
from lit_phi2.training.callbacks.throughput import Throughput
from lit_phi2.training.draft_index import find_draft_index
from lit_phi2.training.exporting import card_facts, held_out_prompts, plan_checkpoint_export, run_and_release
from lit_phi2.training.ledger import write_test_ledger
from lit_phi2.training.memory_report import inspection
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.output_files import STDOUT, check_format, check_streams, reads_stdin
from lit_phi2.training.protocols import tokenizer_of
from lit_phi2.training.reporting import write_report
from lit_phi2.training.run_folder import check_writable, locked, partial_file
from lit_phi2.training.scoring import score_test_completions, write_test_completions
from lit_phi2.training.streaming import print_completion, print_predictions
from lit_phi2.utils.console import print_text
from lit_phi2.utils.files import atomic_write
from lit_phi2.utils.paths import expand_user
from lit_phi2.utils.signals import stop_request

log = logging.getLogger(__name__)

STOPPED = {
    "validate": "stopped. Nothing was written.",
    "test": "stopped. Nothing was written.",
    "export": "stopped. Nothing was written.",
    "predict": "stopped. The same command continues: it keeps every completion that ended.",
    "-": "stopped. Every line that was written is complete.",
}


class Trainer(AuditTrainer):
    """Lightning's Trainer, with our defaults, a folder for every run and more subcommands."""

    def validate(self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str | None = None) -> None:
        """Measure loss, perplexity and token accuracy on val_files.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: the adapter to measure: a .ckpt, an adapter or run folder, `last` or `best`; the base by default.
        """
        ckpt_path = self.find(ckpt_path)
        self._prepare_evaluation("validate", model, datamodule, ckpt_path)
        self.write_rejected(datamodule, self.output_dir_for(ckpt_path))
        super().validate(model, datamodule=datamodule, verbose=False)
        self._print_metrics({name: value.item() for name, value in self.callback_metrics.items()})

    def test(
        self,
        model: LitPhi2,
        datamodule: ClaimsDataModule,
        ckpt_path: str | None = None,
        max_completions: int | None = None,
    ) -> None:
        """Measure the loss on test_files, then score completions of its records beside baselines.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: the adapter to measure: a .ckpt, an adapter or run folder, `last` or `best`; the base by default.
            max_completions: complete only so many records, from the first; 0 measures the loss alone.
        """
        if max_completions is not None and max_completions < 0:
            raise InputError(f"--max_completions {max_completions}: is less than 0; expected a number of records.")
        ckpt_path = self.find(ckpt_path)
        file = self.output_dir_for(ckpt_path) / "test_metrics.json"
        check_writable(file, str(file))
        self._prepare_evaluation("test", model, datamodule, ckpt_path)
        has_adapter = model.adapter_in_use() is not None
        collector = TestCompletions(has_adapter=has_adapter, count=max_completions, show_progress=self.enable_progress)
        if max_completions != 0:
            datamodule.check_context_length("test", max_completions)
            self.callbacks.append(collector)
        self.write_rejected(datamodule, file.parent)
        self._find_drafts(model, datamodule, ckpt_path)
        super().test(model, datamodule=datamodule, verbose=False)
        metrics = {name: value.item() for name, value in self.callback_metrics.items()}
        if not self.is_global_zero:
            return
        if self._is_limited(self.limit_test_batches, len(datamodule.test_dataloader())):
            file = partial_file(file)
        table, rows = score_test_completions(collector.completions, datamodule, max_completions)
        for name, interval in next(iter(without_groups(table).values()), {}).items():
            if not name.startswith("category "):  # categories are in the table and in the file
                metrics[metric_name(name)] = interval.mean
        self._print_metrics(metrics)
        if table:
            print_text("\n" + format_table(without_groups(table)))
        atomic_write(file, json.dumps(metrics | {"completions": to_dict(table)}, indent=2) + "\n")
        write_test_completions(file, rows)
        log.info("test metrics: %s", file)
        write_test_ledger(self, file.parent)
        write_report(self, file.parent)

    def predict(
        self,
        model: LitPhi2,
        datamodule: ClaimsDataModule,
        ckpt_path: str | None = None,
        output: str | None = None,
        instruction: str = "",
        input: str = "",
    ) -> None:
        """Complete the records of predict_files, or one instruction, greedily.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: the adapter: a .ckpt, a folder, `last` or `best`; a folder is that of an adapter or a run. The
                base by default.
            output: a .jsonl, .csv or .parquet, or -; - is JSON Lines on standard output. By default predictions.jsonl
                in the run's folder.
            instruction: complete this one, on the terminal; predict_files is not read.
            input: the document it refers to.
        """
        ckpt_path = self.find(ckpt_path)
        if instruction or input:
            self._answer(model, datamodule, ckpt_path, {"--instruction": instruction, "--input": input})
            return
        check_streams(datamodule.files["predict"], output, self.world_size)
        if output == STDOUT:
            self._predict_to_stdout(model, datamodule, ckpt_path)
            return
        file = expand_user(output, "--output") if output else self.output_dir_for(ckpt_path) / "predictions.jsonl"
        check_format(file, f"--output {file}")
        check_writable(file, f"--output {file}")
        self._prepare_evaluation("predict", model, datamodule, ckpt_path)
        num_batches = len(datamodule.prompt_batches("predict").share(0, self.world_size))
        is_partial = self._is_limited(self.limit_predict_batches, num_batches)
        file = partial_file(file) if is_partial else file
        problem = f"--output {file}: another predict is writing it. Wait until it ends, or give another --output."
        with locked(self, file.with_name(file.name + ".lock"), problem):
            self._find_drafts(model, datamodule, ckpt_path)
            self._predict_to(file, model, datamodule, is_partial=is_partial)

    def _predict_to(self, file: Path, model: LitPhi2, datamodule: ClaimsDataModule, *, is_partial: bool) -> None:
        """Complete the records into a file that no other predict writes to."""
        self.write_rejected(datamodule, file.parent)
        split = datamodule.splits["predict"]
        fingerprint = {**model.generation_fingerprint(), "prompts": split.digest}
        kinds, show_progress = datamodule.output_kinds, self.enable_progress
        writer = PredictionWriter(file, fingerprint, kinds=kinds, show_progress=show_progress)
        datamodule.completed = writer.read_completed()
        self.callbacks.append(writer)
        if len(datamodule.pending()):
            super().predict(model, datamodule=datamodule, return_predictions=False)
            self.strategy.barrier()
        if not self.is_global_zero:
            return
        writer.finish(split, is_partial=is_partial)
        if is_partial:
            log.info(
                "trainer.limit_predict_batches or fast_dev_run leaves out %d of %d records",
                len(split.examples) - writer.summary.num_completions,
                len(split.examples),
            )
        writer.log_summary()

    def _answer(
        self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str | None, question: dict[str, str]
    ) -> None:
        """Complete one instruction on standard output."""
        self._prepare_streaming(model, datamodule, ckpt_path, "stopped.")
        if self.is_global_zero:
            # As a record: the model was trained on placeholders.
            texts = redact(list(question.values()), datamodule.read_options.redact).texts
            prompt = model.encode_question(dict(zip(question, texts, strict=True)))
            self._find_drafts(model, datamodule, ckpt_path)
            model.load_for_answers()
            engine, tokenizer = model.new_engine(expected_prompts=1), load_tokenizer(model.checked.model)
            print_completion(engine, prompt, tokenizer, question=texts, kinds=datamodule.output_kinds)

    def _predict_to_stdout(self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str | None) -> None:
        """Complete the records on standard output; those of standard input while more are read."""
        total, source = None, None
        if reads_stdin(datamodule.files["predict"]):
            self._prepare_streaming(model, datamodule, ckpt_path, STOPPED["-"])
            source = datamodule.stream_predict_files()
        else:
            self._prepare_evaluation("predict", model, datamodule, ckpt_path)
            stop_request.message = STOPPED["-"]
            self.write_rejected(datamodule, self.output_dir_for(ckpt_path))
            split = datamodule.splits["predict"]
            total, source = len(split.examples), zip(split.records, split.examples, strict=True)
        self._find_drafts(model, datamodule, ckpt_path)
        model.load_for_answers()
        print_predictions(
            model.new_engine(expected_prompts=total),
            source,
            tokenizer_of(datamodule),
            total=total,
            skip_invalid=datamodule.on_bad_record == "skip",
            kinds=datamodule.output_kinds,
            show_progress=self.enable_progress,
        )

    def inspect(
        self, model: LitPhi2, datamodule: ClaimsDataModule, remove_unused_caches: bool = False, what: str = "data"
    ) -> None:
        """Print statistics of the data, a memory plan, the caches, and one example; no model is loaded.

        Args:
            model, datamodule: from the config.
            remove_unused_caches: true also removes the caches whose files are gone or have changed.
            what: data; or quantization, which loads the base and prints what each layer loses in 8 bits.
        """
        datamodule.trainer = model.trainer = self
        warnings = datamodule.read("fit")
        self.try_batch_size(model, datamodule)
        print_text(inspection(model, datamodule, warnings, what, remove_unused_caches=remove_unused_caches))

    def export(
        self,
        model: LitPhi2,
        datamodule: ClaimsDataModule,
        output_dir: str,
        ckpt_path: str | None = None,
        format: str = "peft",
        dtype: str | None = None,
        check: int = 8,
        sign: str | None = None,
    ) -> None:
        """Write an adapter, or the merged model, for another runtime, and check it there.

        Args:
            model: from the config.
            datamodule: from the config.
            output_dir: folder to write; it replaces an earlier export.
            ckpt_path: a .ckpt, a folder, `last` or `best`; null exports the base alone.
            format: peft, merged, gguf, gguf-merged or mlx; gguf is for llama.cpp and Ollama, merged for transformers.
            dtype: of a merged model; null takes bfloat16 for merged, float16 for gguf-merged.
            check: prompts to compare on, 64 at most; of val_files, 0 checks nothing.
            sign: a private key that signs the export; every file of it.
        """
        if check < 0:
            raise InputError(f"--check {check}: is less than 0; expected a number of prompts.")
        if not self.is_global_zero:  # of several processes, one writes
            return
        stop_request.message = STOPPED["export"]
        ckpt_path = self.find(ckpt_path)
        folder = expand_user(output_dir, "--output_dir")
        key = expand_user(sign, "--sign") if sign else None
        base = resolve_base_model(model.base)
        plan = plan_checkpoint_export(ckpt_path, base, folder, format=format, dtype=dtype, sign=key)
        datamodule.trainer, reference = self, None
        if check > 0:
            prompts = held_out_prompts(datamodule, check, plan.weights.config.max_position_embeddings)
            device = self.strategy.root_device
            reference = run_and_release(plan, ckpt_path, prompts, dtype=model.compute_dtype, device=device)
        facts = card_facts(Path(ckpt_path) if ckpt_path else None, datamodule)
        try:
            export(plan, reference, facts)
        except OSError as error:  # a full disk, a lost permission
            reason = error.strerror or str(error)
            raise IncompleteError(f"{error.filename or folder}: {reason}. Nothing was exported.") from error

    # Steps that subcommands share

    def _prepare_evaluation(
        self, stage: str, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str | None
    ) -> None:
        """Use the adapter of a checkpoint, and check model and data; the CLI has given the model the adapter before."""
        stop_request.message = STOPPED[stage]
        self.use_adapter(model, ckpt_path)
        self.prepare(stage, model, datamodule)
        if stage != "predict":  # which shows records, and not batches
            self.show_progress(Throughput())

    def _prepare_streaming(
        self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str | None, stop_message: str
    ) -> None:
        """Use the adapter of a checkpoint, and check the model, before anything is read or loaded."""
        stop_request.message = stop_message
        self.use_adapter(model, ckpt_path)
        datamodule.trainer = model.trainer = self
        model.check()
        model.check_data(datamodule)

    def _find_drafts(self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str | None) -> None:
        if model.drafts:
            model.draft_index = find_draft_index(self.output_dir_for(ckpt_path), datamodule)

    def _is_limited(self, limit: int | float, num_batches: int) -> bool:
        """Whether a limit of the Trainer, or fast_dev_run, leaves out some of the batches of each process."""
        return limit < 1 if isinstance(limit, float) else limit < num_batches

    def _print_metrics(self, metrics: dict[str, float]) -> None:
        """Print one metric a line: name and value."""
        if not self.is_global_zero:
            return
        for name, value in metrics.items():
            print_text(f"{name} {value:.6f}")

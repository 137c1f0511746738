"""Trainer: Lightning's, with a folder for every run, and the subcommands inspect and export.

    fit         check the data -> open a folder -> validate the base -> steps -> best adapter in PEFT form
    validate    metrics on val_files             test      metrics on test_files, and its completions scored
    predict     predictions.jsonl                inspect   statistics of the data, without a model
    export      the adapter of a checkpoint for another runtime, checked there
    audit       suspect records by path:line; how far records of train can be told from others
    verify      files, base, data and signature against provenance.json; records against the ledger

The CLI makes its flags from the signatures of these methods, and its help from their docstrings.
"""

import json
import logging
from pathlib import Path

from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.audit.provenance import PROVENANCE_FILE, check_provenance, provenance_folders
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.summary import report
from lit_phi2.errors import InputError
from lit_phi2.evaluation.table import format_table, metric_name, to_dict, without_groups
from lit_phi2.export.exporter import export, plan_export
from lit_phi2.pretrained import resolve_base_model
from lit_phi2.training.auditing import RECORDS_FILE, audit_leakage, audit_split_records, check_audit
from lit_phi2.training.callbacks.completions import TestCompletions
from lit_phi2.training.callbacks.predictions import PredictionWriter
from lit_phi2.training.callbacks.throughput import Throughput
from lit_phi2.training.exporting import card_facts, held_out_prompts, run_and_release, source_predicate
from lit_phi2.training.fit import FitTrainer
from lit_phi2.training.ledger import write_test_ledger
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.run_folder import check_writable, locked, partial_file
from lit_phi2.training.scoring import score_test_completions
from lit_phi2.training.verifying import print_record_uses, print_verification
from lit_phi2.utils.console import print_text
from lit_phi2.utils.files import atomic_write
from lit_phi2.utils.paths import expand_user, run_dir_of
from lit_phi2.utils.signals import stop_request

log = logging.getLogger(__name__)

STOPPED = {
    "validate": "stopped. Nothing was written.",
    "test": "stopped. Nothing was written.",
    "export": "stopped. Nothing was written.",
    "verify": "stopped. Nothing was written.",
    "audit": "stopped. Nothing was written.",
    "predict": "stopped. The same command continues: it keeps every batch that was completed.",
}


class Trainer(FitTrainer):
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
        collector = TestCompletions(has_adapter=model.adapter_in_use() is not None, count=max_completions)
        if max_completions != 0:
            datamodule.check_context_length("test", max_completions)
            self.callbacks.append(collector)
        self.write_rejected(datamodule, file.parent)
        super().test(model, datamodule=datamodule, verbose=False)
        metrics = {name: value.item() for name, value in self.callback_metrics.items()}
        if not self.is_global_zero:
            return
        if self._is_limited(self.limit_test_batches, len(datamodule.test_dataloader())):
            file = partial_file(file)
        table = score_test_completions(collector.completions, datamodule, max_completions)
        for name, interval in next(iter(without_groups(table).values()), {}).items():
            if not name.startswith("category "):  # categories are in the table and in the file
                metrics[metric_name(name)] = interval.mean
        self._print_metrics(metrics)
        if table:
            print_text("\n" + format_table(without_groups(table)))
        atomic_write(file, json.dumps(metrics | {"completions": to_dict(table)}, indent=2) + "\n")
        log.info("test metrics: %s", file)
        write_test_ledger(self, file.parent)

    def predict(
        self,
        model: LitPhi2,
        datamodule: ClaimsDataModule,
        ckpt_path: str | None = None,
        output: str | None = None,
    ) -> None:
        """Complete the records of predict_files, greedily: one JSON object a record, in the order of the input.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: the adapter to use: a .ckpt, an adapter or run folder, `last` or `best`; the base by default.
            output: the file to write; by default predictions.jsonl in the run's folder.
        """
        ckpt_path = self.find(ckpt_path)
        file = expand_user(output, "--output") if output else self.output_dir_for(ckpt_path) / "predictions.jsonl"
        check_writable(file, f"--output {file}")
        self._prepare_evaluation("predict", model, datamodule, ckpt_path)
        num_batches = len(datamodule.prompt_batches("predict"))
        is_partial = self._is_limited(self.limit_predict_batches, -(-num_batches // self.world_size))
        file = partial_file(file) if is_partial else file
        problem = f"--output {file}: another predict is writing it. Wait until it ends, or give another --output."
        with locked(self, file.with_name(file.name + ".lock"), problem):
            self._predict_to(file, model, datamodule, is_partial=is_partial)

    def _predict_to(self, file: Path, model: LitPhi2, datamodule: ClaimsDataModule, *, is_partial: bool) -> None:
        """Complete the records into a file that no other predict writes to."""
        self.write_rejected(datamodule, file.parent)
        split = datamodule.splits["predict"]
        writer = PredictionWriter(
            file, {**model.generation_fingerprint(), "prompts": split.digest}, datamodule.output_kinds
        )
        datamodule.completed = writer.read_completed()
        self.callbacks.append(writer)
        if datamodule.pending():
            super().predict(model, datamodule=datamodule, return_predictions=False)
            self.strategy.barrier()
        if not self.is_global_zero:
            return
        writer.finish(split, is_partial=is_partial)
        if is_partial:
            log.info(
                "trainer.limit_predict_batches or fast_dev_run leaves out %d of %d records",
                len(split.examples) - writer.num_completions,
                len(split.examples),
            )
        message = "%d completions, %d of them stopped at max_new_tokens: %s"
        log.info(message, writer.num_completions, writer.num_at_limit, file)

    def inspect(self, model: LitPhi2, datamodule: ClaimsDataModule, remove_unused_caches: bool = False) -> None:
        """Print statistics of the training and validation data, the caches, and one example; no model is loaded.

        Args:
            model: from the config.
            datamodule: from the config.
            remove_unused_caches: true also removes the caches whose files are gone or have changed.
        """
        datamodule.trainer = self
        warnings = datamodule.read("fit")
        print_text(report(datamodule, warnings, remove_unused_caches=remove_unused_caches))

    def export(
        self,
        model: LitPhi2,
        datamodule: ClaimsDataModule,
        ckpt_path: str,
        output_dir: str,
        format: str = "peft",
        dtype: str | None = None,
        check: int = 8,
        sign: str | None = None,
    ) -> None:
        """Write an adapter, or the merged model, for another runtime, and check it there.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: a .ckpt; an exported adapter, an adapter or run folder, `last` or `best`.
            output_dir: the folder to write; an earlier export in it is replaced.
            format: peft, merged, gguf, gguf-merged or mlx; gguf is for llama.cpp and Ollama, merged for transformers.
            dtype: of a merged model; null takes bfloat16 for merged, float16 for gguf-merged.
            check: prompts of val_files to compare answers on; 0 checks nothing.
            sign: a private key that signs the export; every file of it.
        """
        if check < 0:
            raise InputError(f"--check {check}: is less than 0; expected a number of prompts.")
        if not self.is_global_zero:  # of several processes, one writes
            return
        stop_request.message = STOPPED["export"]
        ckpt_path = str(self.find(ckpt_path))
        folder = expand_user(output_dir, "--output_dir")
        check_provenance(*provenance_folders(Path(ckpt_path)))
        adapter, base = read_adapter(Path(ckpt_path)), resolve_base_model(model.base)
        plan = plan_export(
            adapter,
            base,
            folder,
            format=format,
            dtype=dtype,
            source=f"--ckpt_path {ckpt_path}",
            predicate=source_predicate(Path(ckpt_path), adapter),
            sign=expand_user(sign, "--sign") if sign else None,
        )
        datamodule.trainer, reference = self, None
        if check > 0:
            prompts = held_out_prompts(datamodule, check, plan.weights.config.max_position_embeddings)
            device = self.strategy.root_device
            reference = run_and_release(plan, ckpt_path, prompts, dtype=model.compute_dtype, device=device)
        export(plan, reference, card_facts(Path(ckpt_path), datamodule))

    def verify(
        self,
        model: LitPhi2,
        datamodule: ClaimsDataModule,
        ckpt_path: str,
        record: str | None = None,
        replay: bool = False,
        public_key: str | None = None,
    ) -> None:
        """Check a run, an adapter or an export, or look up which records were trained on.

        Args:
            model: from the config; by default that of the run.
            datamodule: from the config.
            ckpt_path: a .ckpt; a folder with an adapter, an export or a run, `last` or `best`.
            record: a file of records; prints whether each was trained on, in which steps. Nothing else is checked.
            replay: true also trains the run again; the adapters are compared.
            public_key: of the key of export --sign.
        """
        if not self.is_global_zero:
            return
        stop_request.message = STOPPED["verify"]
        datamodule.trainer = self
        if record is not None:
            print_record_uses(datamodule, record, Path(str(self.find(ckpt_path))))
            return
        has_provenance = (Path(ckpt_path) / PROVENANCE_FILE).is_file()
        path = Path(ckpt_path if has_provenance else str(self.find(ckpt_path)))
        key = expand_user(public_key, "--public_key") if public_key else None
        print_verification(path, model.base, datamodule, public_key=key, replay_run=replay)

    def audit(
        self,
        model: LitPhi2,
        datamodule: ClaimsDataModule,
        ckpt_path: str,
        what: str = "records",
        max_auc: float = 0.6,
    ) -> None:
        """Rank suspect training records by path:line, or measure how far an adapter gives its records away.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: the adapter: a .ckpt, an adapter or run folder, `last` or `best`.
            what: records or leakage.
            max_auc: exit with 3 if leakage tells train from val with a higher AUC; 0.5 is chance.
        """
        check_audit(what, self.world_size)
        path = str(self.find(ckpt_path))
        folder = self.output_dir_for(path)
        check_writable(folder / RECORDS_FILE, str(folder / RECORDS_FILE))
        stop_request.message = STOPPED["audit"]
        if model.adapter != path or model.phi is not None:
            model.load_adapter(path)
        datamodule.trainer = model.trainer = self
        model.check()
        datamodule.setup("fit")
        model.configure_model()
        model.to(self.strategy.root_device)
        if what == "leakage":
            audit_leakage(model, datamodule, folder, max_auc)
        else:
            audit_split_records(model, datamodule, folder)

    def output_dir_for(self, ckpt_path: str | None) -> Path:
        """The folder that a subcommand other than fit writes to; without a checkpoint, that of this Trainer's fit."""
        if ckpt_path:
            return run_dir_of(Path(ckpt_path))
        return self.run_dir or Path(self.default_root_dir) / self.run_name / "base"

    # Steps that subcommands share

    def _prepare_evaluation(
        self, stage: str, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str | None
    ) -> None:
        """Use the adapter of a checkpoint, and check model and data; the CLI has given the model the adapter before."""
        stop_request.message = STOPPED[stage]
        if ckpt_path is not None and (model.adapter != ckpt_path or model.phi is not None):
            model.load_adapter(ckpt_path)
        if ckpt_path is not None and self.is_global_zero:
            check_provenance(*provenance_folders(Path(ckpt_path)))
        self.prepare(stage, model, datamodule)
        self.show_progress(Throughput())

    def _is_limited(self, limit: int | float, num_batches: int) -> bool:
        """Whether a limit of the Trainer, or fast_dev_run, leaves out some of the batches of each process."""
        return limit < 1 if isinstance(limit, float) else limit < num_batches

    def _print_metrics(self, metrics: dict[str, float]) -> None:
        """Print one metric a line: name and value."""
        if not self.is_global_zero:
            return
        for name, value in metrics.items():
            print_text(f"{name} {value:.6f}")

"""AuditTrainer: the subcommands that check a run after its training.

audit       suspect records by path:line; how far records of train can be told from others
verify      files, base, data and signature against provenance.json; records against the ledger
report      one page about a run
"""

import logging
from pathlib import Path

from lit_phi2.audit.provenance import PROVENANCE_FILE, check_provenance, provenance_folders
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.report.page import write_report
from lit_phi2.training.auditing import RECORDS_FILE, audit_split_records, check_audit
from lit_phi2.training.fit import FitTrainer
from lit_phi2.training.leakage import audit_leakage
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.reporting import report_file, reported_folder
from lit_phi2.training.run_folder import check_writable, on_rank_zero
from lit_phi2.training.verifying import print_record_uses, print_verification
from lit_phi2.utils.paths import expand_user, run_dir_of
from lit_phi2.utils.signals import stop_request

log = logging.getLogger(__name__)

_STOPPED = "stopped. Nothing was written."


class AuditTrainer(FitTrainer):
    """FitTrainer with audit, verify and report."""

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
        stop_request.message = _STOPPED
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
    ) -> None:
        """Rank suspect training records by path:line, or measure how far an adapter gives its records away.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: a .ckpt, a folder, `last` or `best`; the folder of an adapter or of a run.
            what: records or leakage.
        """
        check_audit(what, self.world_size)
        path = str(self.find(ckpt_path))
        folder = self.output_dir_for(path)
        check_writable(folder / RECORDS_FILE, str(folder / RECORDS_FILE))
        stop_request.message = _STOPPED
        self.use_adapter(model, path)
        datamodule.trainer = model.trainer = self
        model.check()
        datamodule.setup("fit")
        model.configure_model()
        model.to(self.strategy.root_device)
        if what == "leakage":
            audit_leakage(model, datamodule, folder, self.leakage_limits)
        else:
            audit_split_records(model, datamodule, folder)

    def report(self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str, output: str | None = None) -> None:
        """Write one page about a run: curves, metrics, completions, audits, settings, provenance.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: the run: its folder, a .ckpt or its adapter folder, `last` or `best`.
            output: an .html file; by default report.html in the run's folder.
        """
        if not self.is_global_zero:
            return
        stop_request.message = _STOPPED
        folder = reported_folder(Path(ckpt_path))
        file = report_file(output, folder)
        check_writable(file, f"--output {file}")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_report(folder, file)
        log.info("report: %s", file)

    # Steps that subcommands share

    def output_dir_for(self, ckpt_path: str | None) -> Path:
        """The folder that a subcommand other than fit writes to; without a checkpoint, that of this Trainer's fit."""
        if ckpt_path:
            return run_dir_of(Path(ckpt_path))
        return self.run_dir or Path(self.default_root_dir) / self.run_name / "base"

    def use_adapter(self, model: LitPhi2, ckpt_path: str | None) -> None:
        """Use the adapter of a checkpoint, whose files must be those of their provenance; None for the base."""
        if ckpt_path is None:
            return
        if model.adapter != ckpt_path or model.phi is not None:
            model.load_adapter(ckpt_path)
        on_rank_zero(self, lambda: check_provenance(*provenance_folders(Path(ckpt_path))))

"""The same command once more, after its run has reached the last step: answered without ranks."""

import os
from pathlib import Path

import tomli

from flame.checkpoint.commit import read_marker, verify_hashes
from flame.checkpoint.start import changed_settings, plan_start
from flame.config.parser import recorded, to_toml
from flame.config.record import read_record
from flame.config.schema import JobConfig
from flame.convert.output import is_exported
from flame.runtime.run_folder import Run

HASHED = 1 << 30  # bytes of a checkpoint that this process reads; ranks share a larger one out among them


def describe_finished(config: JobConfig) -> list[str]:
    """What ranks would log of a run that is complete; [] if they have to look themselves, or to train.

    Settings, the files of model and tokenizer, the last checkpoint and its export must be as the run left them.
    """
    run, settings, step = Run(config.job.dump_folder, writes=False), config.checkpoint, config.training.steps
    status = run.read_status()
    if os.environ.get("NNODE", "1") != "1" or (status.get("status"), status.get("step")) != ("completed", step):
        return []
    if settings.load_step >= 0 or settings.create_seed_checkpoint or not _has_settings(run, config):
        return []
    if _is_newer(config.model.config, run) or _is_newer(config.model.tokenizer_path, run):
        return []
    plan = plan_start(config)
    if plan.steps[:1] != (step,) or any(checkpoint.corruption for checkpoint in plan.checkpoints.values()):
        return []
    checkpoint, export = run.folder / settings.folder / f"step-{step}", run.folder / "hf" / f"step-{step}"
    files = read_marker(checkpoint).get("files", {})
    if not files or sum(file["size"] for file in files.values()) > HASHED or verify_hashes(checkpoint):
        return []
    if settings.export and not is_exported(checkpoint, export, settings.export_dtype):
        return []
    return [run.describe_complete(step, step), run.describe_end(step, checkpoint, export if settings.export else None)]


def _has_settings(run: Run, config: JobConfig) -> bool:
    """Whether the run was started last with these settings."""
    was, now = read_record(run.folder), tomli.loads(to_toml(recorded(config)))
    unused = () if config.model.converters else ("quantize.",)  # a rank adds the model's head to them
    return was is not None and all(change.startswith(unused) for change in changed_settings(was, now))


def _is_newer(path: str | None, run: Run) -> bool:
    """Whether a file of this machine, or one in a folder, was changed since the run ended."""
    place = Path(path or "").expanduser()
    files = [place] if place.is_file() else place.iterdir() if path and place.is_dir() else ()
    return any(file.stat().st_mtime >= (run.folder / "status.json").stat().st_mtime for file in files)

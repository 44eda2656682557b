"""The settings of a run: torchtitan's sections with our fields and defaults. The docstrings are the --help text.

No `from __future__ import annotations` here: torchtitan and tyro read the real types of the fields.
"""

from dataclasses import dataclass, field
from typing import Literal

from torchtitan.config import job_config as titan


@dataclass
class Job(titan.Job):
    dry_run: bool = False
    """
    Check everything, print what the job would train, need and take on NNODE x NGPU ranks, and end; --dry_run does as
    well. Needs no accelerator, makes no folder and downloads no data.
    """

    mfu: float | None = None
    """The model FLOPs utilization at which the dry run tells the time; not set, 0.3, 0.4 and 0.5"""


@dataclass
class Model(titan.Model):
    name: str = "auto"
    """
    Which model to train. "auto" reads the family off the model_type of model.config; deepseek_v3, llama3, llama4 and
    qwen3 are torchtitan's own models, of the size that model.flavor names.
    """

    config: str | None = None
    """Model to build: path of a Hugging Face config JSON, a local Hugging Face folder, or a hub id."""

    tokenizer_path: str | None = "byte"
    """Tokenizer: "byte" (built in, 257 ids), a folder, a tokenizer.json, or a hub id."""

    hf_assets_path: str = "byte"
    """The same setting as model.tokenizer_path, under torchtitan's name."""

    grow_vocab: bool = False
    """Enlarge the vocabulary of the model to that of the tokenizer instead of refusing a tokenizer that is larger."""

    add_tokens: list[str] = field(default_factory=list)
    """
    Special tokens that the tokenizer is given, in this order and for the life of a run. The vocabulary of the model
    grows where they need it; ids that the weights it starts from do not have begin as the mean of those they have.
    """

    trust_remote_code: bool = False
    """Run Python code that a hub model, tokenizer or dataset brings along."""


@dataclass
class DataLoader(titan.DataLoader):
    num_workers: int = 2
    """Background threads that tokenize and pack ahead of the step; 0 does it in the step. The batches are the same."""

    prefetch_factor: int | None = 2
    """Batches each background thread prepares ahead."""


@dataclass
class Training(titan.Training):
    dataset: str = "stdlib"
    """Comma list of sources: a local path or a hub id each, or "stdlib", Python's own source code, read in place."""

    dataset_path: str | None = None
    """Not used: training.dataset takes paths as well."""

    dataset_name: str | None = None
    """Configuration of each source, a comma list as long as training.dataset; an empty item is none."""

    dataset_split: str | None = None
    """Split of each source (default train), a comma list as long as training.dataset."""

    data_dir: str | None = None
    """Folder inside each source, a comma list as long as training.dataset; an empty item is none."""

    data_files: str | None = None
    """Files or patterns inside each source, a comma list as long as training.dataset; one source takes it whole."""

    data_probs: str | None = None
    """Share of the tokens that each source gives, a comma list as long as training.dataset that sums to 1."""

    streaming: bool = False
    """Read hub sources over the network as training goes instead of downloading them first."""

    varlen: bool = False
    """Keep documents apart inside a row: attention and recurrent state do not cross from one to the next."""

    context_len: int | None = None
    """Longest piece of a document when training.varlen is on; default 2048, or training.seq_len if that is less."""

    skip_nan_inf: bool = False
    """Leave the weights as they are in a step whose gradients hold NaN or Inf, and count it, instead of stopping."""

    max_skipped_steps: int = 10
    """Steps in a row that training.skip_nan_inf may skip; the run stops at the next."""

    max_wall_time: str | int | None = None
    """
    Time from the launch on after which the run stops as at a signal: the last whole step is saved, exit code 75. Such
    as 3h30m, 90m, 2d, or a number of seconds; below the limit of the queue by what a step and a save take.
    """

    gradient_accumulation_steps: int | None = None
    """
    Batches per rank and step, another way to say training.global_batch_size, which becomes training.local_batch_size x
    this x data-parallel ranks (and this setting reads None afterwards).
    """

    dataloader: DataLoader = field(default_factory=DataLoader)
    """How the data stream runs ahead of the step"""


@dataclass
class DataSource:
    path: str
    """A local path, a hub id or "stdlib"."""

    name: str | None = None
    """What the source is called in the log and in checkpoints; default: the last part of the path."""

    weight: float = 1.0
    """Share of the tokens, for the sum of all weights."""

    column: str | None = None
    """Column that holds its text or token ids; default data.column."""

    split: str | None = None
    """Split; default train."""

    subset: str | None = None
    """Configuration of a hub dataset."""

    data_dir: str | None = None
    """Folder inside the source."""

    data_files: str | None = None
    """Files or patterns inside the source, a comma list."""


@dataclass
class Data:
    lanes: int = 64
    """
    Independent streams the data is dealt into, fixed for the life of a run; the data-parallel ranks must divide it. A
    run may resume on any number of ranks that does.
    """

    window: int = 1024
    """Rows that are shuffled together; 1 keeps the order of the source."""

    column: str | None = None
    """Column that holds the text, or token ids; default "text", then "content", then "input_ids"."""

    sources: list[DataSource] = field(default_factory=list)
    """
    The sources as tables of a TOML, one [[data.sources]] each, instead of training.dataset and its lists. Keys: path,
    name, weight, column, split, subset, data_dir, data_files.
    """

    epochs: int = 0
    """Times every source is read, each time in another order; the run ends when all are through. 0: without end."""

    max_bad_rows: float = 0.01
    """
    Rows of a source that may hold no document (null, empty, broken, of more than 2^25 characters) and are skipped: a
    share of those read if below 1 (100 rows in any case), else a number of rows; 0 refuses any. More stop the run.
    """

    skip: str | None = None
    """
    Steps whose data is not trained on, such as 120-135,400: step 120 is then fed what step 136 would have been fed.
    They are counted as in a run that skips nothing; the ones before a checkpoint cannot be changed when it is resumed.
    """

    exhausted_exit_code: int = 0
    """Exit code, 0 or 1, of a run whose data ended before training.steps."""


@dataclass
class Validation(titan.Validation):
    dataset: str = ""
    """Held-out sources, a comma list as training.dataset is; each is read once, in its own order."""

    dataset_path: str | None = None
    """Not used: validation.dataset takes paths as well."""

    dataset_name: str | None = None
    """Configuration of each source, as training.dataset_name."""

    dataset_split: str | None = None
    """Split of each source (default train), as training.dataset_split."""

    data_files: str | None = None
    """Files or patterns inside each source, as training.data_files."""

    freq: int = 10
    """Steps from one validation to the next; there is one after step 1 too."""

    steps: int = -1
    """
    Batches of validation.local_batch_size that the ranks share, so that the loss is the same on any number of them;
    -1: all of the data.
    """


@dataclass
class Checkpoint(titan.Checkpoint):
    enable: bool = True
    """Save checkpoints, and resume from the newest whole one"""

    last_save_model_only: bool = False
    """Leave optimizer and data position out of the last checkpoint, which then cannot be resumed."""

    interval_type: Literal["steps", "seconds"] = "steps"
    """Unit of checkpoint.interval."""

    initial_load_path: str | None = None
    """
    What a run without checkpoints of its own starts from: a DCP checkpoint (RUN/checkpoint/step-N), or with
    checkpoint.initial_load_in_hf Hugging Face weights. It must hold the tensors of the model, no more and no less.
    """

    initial_load_in_hf: bool = False
    """
    checkpoint.initial_load_path is a folder with safetensors, or a hub id whose safetensors are downloaded; each rank
    reads the part of them that it holds.
    """

    initial_load_in_hf_quantized: bool = False
    """Not used: quantized weights are refused."""

    export: bool = True
    """Write the final weights as a Hugging Face folder too, hf/step-N in the run folder."""

    start: Literal["auto", "resume", "init", "scratch"] = "auto"
    """
    How the run must start: "resume" from its own newest whole checkpoint, "init" from checkpoint.initial_load_path,
    "scratch" from random weights; refused if that cannot be, or if checkpoints would be left out. "auto": resume if
    there is a checkpoint, else init if there is a path, else scratch.
    """

    keep_every: int = 0
    """Checkpoints of steps that this divides stay for good, beyond checkpoint.keep_latest_k; 0: none do."""

    on_save_failure: Literal["stop", "continue"] = "stop"
    """
    What to do when a checkpoint cannot be written (disk full, quota, read-only): stop with exit code 1, or go on and
    try again when the next is due. The last save of a run is never gone without.
    """


@dataclass
class ActivationCheckpoint(titan.ActivationCheckpoint):
    mode: Literal["selective", "full", "memory_budget", "none"] = "none"
    """Type of activation checkpointing to use"""


@dataclass
class Comm(titan.Comm):
    train_timeout_seconds: int = 1800
    """Timeout for communication after the first step. Long, as a stall in reading data must not kill the job."""


@dataclass
class Experimental(titan.Experimental):
    custom_import: str = ""
    """
    Python module of your own, imported before anything is built: it registers a model with transformers, and its FAMILY
    with flame. The same setting as --model.import.
    """


@dataclass
class Debug(titan.Debug):
    seed: int | None = 42
    """Seed of the initial weights, the data order and everything else that is random"""


@dataclass
class JobConfig(titan.JobConfig):
    """Everything a run can be told, torchtitan's settings and ours."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    data: Data = field(default_factory=Data)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    comm: Comm = field(default_factory=Comm)
    experimental: Experimental = field(default_factory=Experimental)
    debug: Debug = field(default_factory=Debug)

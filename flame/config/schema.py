"""The settings of a run: torchtitan's sections with our fields and defaults. The docstrings are the --help text.

A field with init=False is one of torchtitan's that no user sets. No `from __future__ import annotations` here:
torchtitan and tyro read the real types of the fields.
"""

from dataclasses import dataclass, field
from typing import Literal

from torchtitan.config import job_config as titan


@dataclass
class Job(titan.Job):
    dry_run: bool = False
    """Check everything, print what the job would train, need and take on NNODE x NGPU ranks, and end; --dry_run is
    short for it. Needs no accelerator, makes no folder and downloads no data."""

    mfu: float | None = None
    """Model FLOPs utilization that the dry run's time estimate assumes; default 0.3, 0.4 and 0.5"""


@dataclass
class Model(titan.Model):
    name: str = "auto"
    """Which model to train. "auto": the family that the model_type of model.config names; deepseek_v3, llama3, llama4
    and qwen3 are torchtitan's own models, of the size that model.flavor names."""

    config: str | None = None
    """Model to build: path of a Hugging Face config JSON, a local Hugging Face folder, or a hub id."""

    tokenizer_path: str | None = "byte"
    """Tokenizer: "byte" (built in, 257 ids), a folder, a tokenizer.json, or a hub id."""

    hf_assets_path: str = field(default="byte", init=False)  # torchtitan's name of tokenizer_path

    grow_vocab: bool = False
    """Enlarge the vocabulary of the model to that of a larger tokenizer, which is rejected otherwise."""

    add_tokens: list[str] = field(default_factory=list)
    """Special tokens to add to the tokenizer, in this order and for the life of a run. The vocabulary of the model
    grows if they need it; the rows of new ids start as the mean of the rows of the weights that are loaded.
    A comma list drops blanks around its items, and blank items; a TOML list keeps them."""

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

    dataset_path: str | None = field(default=None, init=False)

    dataset_name: str | None = None
    """Configuration of each source, a comma list as long as training.dataset; an empty item is none."""

    dataset_split: str | None = None
    """Split of each source, or a slice of one such as train[:98%]; default: all files of a folder, of a hub dataset
    train. A comma list as long as training.dataset."""

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
    """Longest piece of a document when training.varlen is on; default: 2048 or training.seq_len, whichever is less."""

    skip_nan_inf: bool = False
    """Skip the update of a step whose gradients hold NaN or Inf, and count the step, instead of stopping."""

    max_skipped_steps: int = 10
    """Steps in a row that training.skip_nan_inf may skip; the run stops at the next."""

    max_wall_time: str | int | None = None
    """Time since the launch after which the run stops as at a signal: the last whole step is saved, exit code 75. Such
    as 3h30m, 90m, 2d, or a number of seconds. Leave the time of one step and one save below the limit of the queue."""

    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Type that blocks compute in, in every layout (docs/parallelism.md)."""

    global_batch_size: int = -1
    """Rows per step of all ranks; -1: training.local_batch_size of each data-parallel rank.
    --training.gradient_accumulation_steps N sets it to training.local_batch_size x N x data-parallel ranks."""

    dataloader: DataLoader = field(default_factory=DataLoader)
    """How the data is prepared ahead of the step"""


@dataclass
class DataSource:
    path: str
    """A local path, a hub id or "stdlib"."""

    name: str | None = None
    """Name of the source in the log and in checkpoints; default: the last part of the path."""

    weight: float = 1.0
    """Share of the tokens, relative to the sum of all weights."""

    column: str | None = None
    """Column that holds its text or token ids; default data.column."""

    split: str | None = None
    """Split, or a slice of one; default: all files, of a hub dataset train."""

    subset: str | None = None
    """Configuration of a hub dataset."""

    data_dir: str | None = None
    """Folder inside the source."""

    data_files: str | None = None
    """Files or patterns inside the source, a comma list."""


@dataclass
class Data:
    lanes: int = 64
    """Independent streams that the data is divided into, fixed for the life of a run. The number of data-parallel ranks
    must divide it; a run may resume on any number that does."""

    window: int = 1024
    """Rows that are shuffled together; 1 keeps the order of the source."""

    column: str | None = None
    """Column that holds the text, or token ids; default "text", then "content", then "input_ids"."""

    sources: list[DataSource] = field(default_factory=list)
    """The sources as tables of a TOML, one [[data.sources]] each, instead of training.dataset and its lists. Keys:
    path, name, weight, column, split, subset, data_dir, data_files."""

    add_bos: bool = False
    """Put the tokenizer's BOS before each document, unless it is one of token ids that begins with it."""

    epochs: int = 0
    """Times every source is read, each time in another order; the run ends when all are exhausted. 0: without end."""

    max_bad_rows: float = 0.01
    """Rows of a source that may hold no document (null, empty, broken, without tokens, of more than 2^25 characters)
    and are skipped: a share of those read if below 1 (100 rows in any case), else a number of rows; 0 allows none. More
    stop the run."""

    skip: str | None = None
    """Steps whose data is not trained on, such as 120-135,400: step 120 then gets the data of step 136. Steps are
    counted as in a run that skips nothing; those before a checkpoint cannot be changed when it is resumed."""

    exhausted_exit_code: int = 0
    """Exit code, 0 or 1, of a run whose data ended before training.steps."""


@dataclass
class Validation(titan.Validation):
    def __post_init__(self) -> None:
        """`flame.preflight.validate` checks, and names the flag."""

    dataset: str = ""
    """Held-out sources, a comma list like training.dataset; each is read once, in its own order."""

    dataset_path: str | None = field(default=None, init=False)

    dataset_name: str | None = None
    """Configuration of each source, as training.dataset_name."""

    dataset_split: str | None = None
    """Split of each source, as training.dataset_split."""

    data_files: str | None = None
    """Files or patterns inside each source, as training.data_files."""

    local_batch_size: int | None = None
    """Rows of a rank in a batch; default: training.local_batch_size."""

    seq_len: int | None = None
    """Tokens in a row; default: training.seq_len."""

    freq: int = 10
    """Validate after every step that is a multiple of this, and after step 1."""

    steps: int = -1
    """Batches of validation.local_batch_size, divided among the ranks, so that the loss is the same on any number of
    them; -1: all of the data."""


@dataclass
class Checkpoint(titan.Checkpoint):
    enable: bool = True
    """Save checkpoints, and resume from the newest complete one"""

    last_save_model_only: bool = False
    """Leave optimizer and data position out of the last checkpoint, which then cannot be resumed."""

    interval_type: Literal["steps", "seconds"] = "steps"
    """Unit of checkpoint.interval."""

    initial_load_path: str | None = None
    """What a run without checkpoints of its own starts from: a DCP checkpoint (RUN/checkpoint/step-N), or with
    checkpoint.initial_load_in_hf Hugging Face weights. It must hold exactly the tensors of the model."""

    initial_load_in_hf: bool = False
    """checkpoint.initial_load_path is a folder with safetensors, or a hub id whose safetensors are downloaded; each
    rank reads the part of them that it holds."""

    initial_load_in_hf_quantized: bool = field(default=False, init=False)

    export: bool = True
    """Write the final weights as a Hugging Face folder too, hf/step-N in the run folder."""

    start: Literal["auto", "resume", "init", "scratch"] = "auto"
    """How the run must start: "resume" from its own newest complete checkpoint, "init" from
    checkpoint.initial_load_path, "scratch" from random weights; rejected if that is impossible or would ignore
    checkpoints of the run. "auto": resume if there is a checkpoint, else init if there is a path, else scratch."""

    keep_every: int = 0
    """Keep the checkpoints of steps that are multiples of this, beyond checkpoint.keep_latest_k; 0: none."""

    on_save_failure: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint cannot be written (disk full, quota, read-only): stop with exit code 1, or go on and
    try again when the next is due. The last save of a run is never skipped."""


@dataclass
class ActivationCheckpoint(titan.ActivationCheckpoint):
    mode: Literal["selective", "full", "memory_budget", "none"] = "none"
    """Type of activation checkpointing to use"""


@dataclass
class Parallelism(titan.Parallelism):
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Whether FSDP2 frees gathered parameters after the forward of a block and gathers them again for its backward,
    which takes less memory and more communication. "default": it does, but not in a pipeline, not where each rank holds
    whole parameters, and not if all of the model takes at most 1 GiB in training.mixed_precision_param."""


@dataclass
class Compile(titan.Compile):
    enable: bool | None = None
    """Compile each block of the model with torch.compile. none: on a GPU, for the families that gain from it
    (docs/parallelism.md), unless the job has what excludes it; torchtitan's own models are compiled if it is true."""

    backend: str = "inductor"
    """Compiler of torch.compile."""


@dataclass
class Comm(titan.Comm):
    init_timeout_seconds: int = 1800
    """Timeout in seconds of communication until the first step is done; long, as ranks compile kernels in it"""

    train_timeout_seconds: int = 1800
    """Timeout in seconds of communication after the first step; long, as slow reading of data must not kill the job"""


@dataclass
class MemoryEstimation(titan.MemoryEstimation):
    enable: bool = field(default=False, init=False)


@dataclass
class Experimental(titan.Experimental):
    custom_import: str = ""
    """Python module of your own, imported before anything is built, that registers a model with transformers and its
    FAMILY with flame; --model.import is short for it."""


@dataclass
class Debug(titan.Debug):
    seed: int | None = 42
    """Seed of the initial weights, the data order and everything else random"""


@dataclass
class JobConfig(titan.JobConfig):
    """All settings of a run, torchtitan's and ours."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    data: Data = field(default_factory=Data)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    parallelism: Parallelism = field(default_factory=Parallelism)
    compile: Compile = field(default_factory=Compile)
    comm: Comm = field(default_factory=Comm)
    memory_estimation: MemoryEstimation = field(default_factory=MemoryEstimation)
    experimental: Experimental = field(default_factory=Experimental)
    debug: Debug = field(default_factory=Debug)

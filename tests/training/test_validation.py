"""Validation is one number on any number of ranks, and training does not notice it."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torchtitan.components.loss import IGNORE_INDEX

from flame.config.parser import parse, recorded
from flame.errors import UserError
from flame.preflight.validate import check
from flame.training.validation import Validator
from tests.launch import SMALL, metrics, train_each
from tests.tiny import write_config

SEQ = 16
DOCUMENTS = [f"<{i}> " + "held out text. " * (1 + i % 4) for i in range(40)]
WHOLE_ROWS = sum(len(text) + 1 for text in DOCUMENTS) // (SEQ + 1)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    path = tmp_path_factory.mktemp("held_out") / "held_out.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


class Odd(torch.nn.Module):
    """A summed loss that depends on every input and label, and on no mode or random number."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, tokens, positions=None, cu_seqlens=None, labels=None):
        self.seen.append((tokens, positions, cu_seqlens, labels))
        assert not self.training and not torch.is_grad_enabled()
        return ((tokens * 31 + labels * 17) % 101).double()[labels != IGNORE_INDEX].sum()


class Logged(list):
    def log_validation(self, loss, step, extra_metrics):
        self.append((step, loss, extra_metrics["validation/tokens"]))


def validator(held_out, rank=0, ranks=1, *flags):
    from flame.data.source import build_sources
    from flame.data.tokenize import build_tokenizer

    config = parse(["--validation.enable", f"--validation.dataset={held_out}", f"--validation.seq_len={SEQ}", *flags])
    logged = Logged()
    sources = build_sources(config.validation, config.data)
    made = Validator(
        SimpleNamespace(raise_if_stopped=lambda: None),
        sources,
        job_config=config,
        dp_world_size=ranks,
        dp_rank=rank,
        tokenizer=build_tokenizer("byte"),
        parallel_dims=SimpleNamespace(get_optional_mesh=lambda name: None),  # so that each rank logs its own part
        validation_context=nullcontext,
        metrics_processor=logged,
        **{"loss_fn": None},
    )
    return made, logged


def validate(held_out, ranks, *flags):
    """Sum of losses and number of tokens over all ranks, and what the model of each rank saw."""
    total = count = 0.0
    models = []
    for rank in range(ranks):
        made, logged = validator(held_out, rank, ranks, *flags)
        model = Odd()
        made.validate([model], 10)
        ((_, loss, tokens),) = logged
        total, count = total + (loss * tokens if tokens else 0), count + tokens
        models.append(model)
    return round(total), count, models


@pytest.mark.parametrize("flags", [(), ("--validation.steps=5",), ("--training.varlen",)])
def test_the_ranks_share_the_same_rows_however_many_they_are(held_out, flags):
    flags = (*flags, "--validation.local_batch_size=3")
    total, count, _ = validate(held_out, 1, *flags)
    if "--training.varlen" not in flags:
        assert count == SEQ * (15 if "--validation.steps=5" in flags else WHOLE_ROWS)
    for ranks in (2, 4, 5):  # of which none divides the rows
        again, tokens, models = validate(held_out, ranks, *flags)
        assert (again, tokens) == (total, count)
        shapes = [[tuple(tokens.shape) for tokens, *_ in model.seen] for model in models]
        assert shapes.count(shapes[0]) == ranks, "a rank that does another forward than the others hangs them all"
        assert set(shapes[0]) == {(3, SEQ)}


def test_documents_packed_apart_stay_apart_in_a_batch_of_rows(held_out):
    (model,) = validate(held_out, 1, "--validation.local_batch_size=4", "--training.varlen")[2]
    for tokens, positions, cu_seqlens, labels in model.seen:
        begins = torch.nonzero(positions.flatten() == 0).flatten()
        assert cu_seqlens.tolist() == [*begins.tolist(), tokens.numel()] and cu_seqlens.dtype == torch.int32
        crossing = begins[(begins > 0) & (begins % SEQ > 0)] - 1
        assert (labels.flatten()[crossing] == IGNORE_INDEX).all()


def test_every_validation_is_of_the_same_tokens_and_the_model_trains_on_after_it(held_out):
    made, logged = validator(held_out, 0, 1, "--validation.dataloader.num_workers=1")
    model = Odd().train()
    before = torch.random.get_rng_state()
    for step in (1, 10, 20):
        made.validate([model], step)
        assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [step for step, _, _ in logged] == [1, 10, 20] and len({loss for _, loss, _ in logged}) == 1


def test_a_run_records_where_its_held_out_data_is_from_any_folder(held_out, monkeypatch):
    monkeypatch.chdir(held_out.parent)
    config = recorded(parse(["--validation.dataset=held_out.jsonl,some/hub-id"]))
    assert config.validation.dataset == f"{held_out},some/hub-id"
    assert recorded(parse([])).validation.dataset == ""


def test_data_that_fills_no_row_is_rejected(held_out):
    with pytest.raises(UserError) as error:
        validator(held_out, 0, 1, "--validation.seq_len=9000")
    assert error.value.setting == "--validation.dataset" and "validation.seq_len 9000" in error.value.allowed


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--validation.dataset: found nothing"]),
        (["--validation.dataset=gone.jsonl"], ["--validation.dataset", "gone.jsonl"]),
        (["--validation.dataset=a/b,c/d", "--validation.dataset_split=x"], ["--validation.dataset_split", "1 items"]),
        (["--validation.dataset=stdlib", "--validation.dataset_path=x"], ["--validation.dataset_path"]),
        (["--validation.dataset=stdlib", "--validation.freq=0"], ["--validation.freq", "found 0"]),
        (["--validation.dataset=stdlib", "--validation.seq_len=0"], ["--validation.seq_len", "found 0"]),
    ],
)
def test_validation_that_cannot_be_is_refused_in_one_line_before_the_start(flags, words, tmp_path):
    model = write_config(tmp_path, "llama")
    with pytest.raises(UserError) as caught:
        check(parse([f"--model.config={model}", "--validation.enable", *flags]), 1)
    message = str(caught.value)
    assert "\n" not in message and "--training." not in message and all(word in message for word in words), message


@pytest.fixture(scope="module")
def runs(tmp_path_factory, held_out):
    """Runs of 4 steps: without validation, and with it on 1 and 2 ranks, FSDP2 and DDP."""
    root = tmp_path_factory.mktemp("validated")
    model = write_config(root, "llama")
    dropout = f"--model.config={write_config(root, 'llama', stem='dropout', attention_dropout=0.1)}"

    def job(name, ranks, *more):
        return [
            *(*SMALL, f"--model.config={model}", f"--job.dump_folder={root / name}", "--training.steps=4"),
            *(f"--training.local_batch_size={8 // ranks}", "--checkpoint.no_enable", *more),
        ]

    validated = [
        *("--validation.enable", f"--validation.dataset={held_out}", "--validation.seq_len=64", "--validation.freq=2"),
        "--validation.local_batch_size=5",
    ]
    shapes = ("--validation.seq_len=128", "--validation.local_batch_size=8")  # a pipeline takes those of training
    train_each(
        [
            job("one", 1, *validated),
            job("plain", 1, dropout),
            job("validated", 1, dropout, *validated),
            job("whole", 1, *validated, *shapes),
        ]
    )
    ddp = "--parallelism.data_parallel_replicate_degree=2"
    divided = {
        f"{kind}2": job(f"{kind}2", 1, *validated, *shapes, f"--parallelism.{name}_parallel_degree=2")
        for kind, name in (("tp", "tensor"), ("cp", "context"), ("pp", "pipeline"))
    }
    train_each([job("fsdp2", 2, *validated), job("ddp2", 2, *validated, ddp), job("plain2", 2), *divided.values()], 2)
    names = ("one", "plain", "validated", "plain2", "fsdp2", "ddp2", "whole", *divided)
    return {name: metrics(root / name) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, single", [("fsdp2", "one"), ("ddp2", "one"), ("tp2", "whole"), ("cp2", "whole"), ("pp2", "whole")]
)
def test_the_validation_loss_is_the_same_on_one_and_two_ranks(layout, single, runs):
    one, many = ([r for r in runs[name] if "validation/loss" in r] for name in (single, layout))
    assert [r["step"] for r in one] == [r["step"] for r in many] == [1, 2, 4]
    for a, b in zip(one, many, strict=True):
        assert b["validation/loss"] == pytest.approx(a["validation/loss"], abs=1e-6)
        assert b["validation/tokens"] == a["validation/tokens"] > 0
    assert one[0]["validation/loss"] > one[-1]["validation/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("plain, validated", [("plain", "validated"), ("plain2", "fsdp2")])
def test_training_is_the_same_to_the_last_digit_with_and_without_validation(plain, validated, runs):
    names = ("step", "loss", "grad_norm", "lr", "tokens", "data_digest")
    without, with_it = ([[r[n] for n in names] for r in runs[name] if "loss" in r] for name in (plain, validated))
    assert without == with_it and len(without) == 4

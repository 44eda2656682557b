"""Runs that start from Hugging Face weights: what is loaded, what is rejected, and tokens that are added."""

import json
import math
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flame.convert.export import export_checkpoint
from flame.convert.initial import IdentityAdapter
from flame.data.inspect import replay
from flame.errors import UserError
from flame.train import main
from tests.convert.models import build, publish, structure_of
from tests.launch import SMALL, metrics, train_each
from tests.layouts import LAYOUTS, MODELS


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A published Llama of 320 ids, and how its folder looks after a change of its tensors."""
    folder = tmp_path_factory.mktemp("published") / "hf"
    publish(folder, "llama")
    return folder


def spoil(hf, folder, change):
    """A copy of the folder whose tensors `change` was given."""
    tensors = load_file(hf / "model.safetensors")
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


HEAD, NORM, QUERY = "lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
WRONG = [
    (lambda t: t.pop(HEAD), "missing: lm_head.weight$"),
    (lambda t: t.update(extra=t.pop(NORM)), "missing: model.norm.weight; unexpected: extra$"),
    (
        lambda t: t.update({QUERY: t[QUERY][:32].clone()}),
        r"shape: .*q_proj.weight has \[32, 64\], the config .* \[64, 64\]$",
    ),
    (lambda t: t.update({NORM: t[NORM].long()}), "dtype: model.norm.weight has int64, must have float32$"),
    (lambda t: t.update({HEAD: t[HEAD][:300].clone()}), r"lm_head.weight has \[300, 64\].*; --model.grow_vocab or"),
    (dict.clear, r"missing: .*; missing: .*; missing: .* and 18 more$"),
]


@pytest.mark.parametrize(("change", "text"), WRONG)
def test_weights_of_another_model_are_rejected_before_a_process_group_exists(hf, tmp_path, change, text, capsys):
    folder = spoil(hf, tmp_path / "spoiled", change)
    flags = (f"--job.dump_folder={tmp_path}/run", f"--model.config={hf}", "--checkpoint.initial_load_in_hf")
    assert main([*flags, f"--checkpoint.initial_load_path={folder}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"flame: --checkpoint.initial_load_path: found {folder}, must be weights of ")
    assert re.search(text, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("path", "flags", "text"),
    [
        ("{tmp}/gone", [], "initial_load_path: found no folder .*gone"),
        ("nobody/nothing", [], "initial_load_path: found nobody/nothing, .+ HF_HUB_OFFLINE is set"),
        ("{tmp}", [], "found pytorch_model.bin, must be a folder with model.safetensors"),
        ("{tmp}/torn", [], "model.safetensors: found .* must be a whole safetensors file"),
        (
            "{hf}",
            ["--checkpoint.no_initial_load_model_only"],
            "initial_load_model_only: found false, must be true",
        ),
        ("{hf}", ["--checkpoint.initial_load_in_hf_quantized"], "initial_load_in_hf_quantized: found true"),
    ],
)
def test_a_path_without_weights_is_rejected_in_one_line(hf, tmp_path, path, flags, text, capsys):
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes()[:-1])
    job = (f"--job.dump_folder={tmp_path}/run", f"--model.config={hf}", "--checkpoint.initial_load_in_hf", *flags)
    assert main([*job, f"--checkpoint.initial_load_path={path.format(tmp=tmp_path, hf=hf)}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(text, line), line


def test_a_dcp_checkpoint_of_another_model_is_rejected_by_name_too(hf, tmp_path, capsys):
    model, _ = build(tmp_path, "llama")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != NORM}
    dcp.save(tensors, checkpoint_id=str(tmp_path / "step-3"), no_dist=True)
    job = (f"--job.dump_folder={tmp_path}/run", f"--model.config={hf}")
    assert main([*job, f"--checkpoint.initial_load_path={tmp_path}/step-3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("step-3, must be weights of --model.config's model; missing: model.norm.weight")


def test_a_checkpoint_with_more_tensors_or_an_untied_head_is_rejected(tmp_path):
    for name, tied in (("untied", False), ("tied", True)):
        model, _ = build(tmp_path, "llama", tie_word_embeddings=tied)
        dcp.save(model.state_dict(), checkpoint_id=str(tmp_path / name), no_dist=True)
    structure = structure_of(tmp_path / "llama.json")
    adapter = IdentityAdapter(structure, pytest.fail, None, None)
    adapter.check("--checkpoint.folder", tmp_path / "tied", ties=True)
    with pytest.raises(UserError, match=r"^--checkpoint.folder: .*untied; lm_head.weight is not model.embed_tokens."):
        adapter.check("--checkpoint.folder", tmp_path / "untied", ties=True)
    smaller = structure_of(tmp_path / "llama.json", num_hidden_layers=1, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"must be weights .*; unexpected: model.layers.1.* and \d+ more$"):
        IdentityAdapter(smaller, pytest.fail, None, None).check("--checkpoint.folder", tmp_path / "untied", ties=False)


def test_a_checkpoint_without_a_marker_whose_tied_tensors_are_damaged_is_rejected(tmp_path):
    model, _ = build(tmp_path, "llama", tie_word_embeddings=False)  # whose checkpoint has a tensor of each name
    dcp.save(model.state_dict(), checkpoint_id=str(tmp_path / "step-0"), no_dist=True)
    file = tmp_path / "step-0" / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    structure = structure_of(tmp_path / "llama.json", tie_word_embeddings=True)
    adapter = IdentityAdapter(structure, pytest.fail, None, None)
    with pytest.raises(
        UserError, match=r"^--checkpoint.folder: .*step-0, must be an intact checkpoint; .*distcp: found"
    ):
        adapter.check("--checkpoint.folder", tmp_path / "step-0", ties=True)


def job(root, hf, name, layout, *flags):
    """Flags of a job that starts from the weights in `hf`, on a text with tokens that may be added."""
    return [
        *(*SMALL, *LAYOUTS[layout][1], f"--job.dump_folder={root}/{name}", f"--model.config={hf}"),
        *("--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={hf}", "--training.steps=1"),
        *(f"--training.dataset={root}/text.jsonl", "--checkpoint.keep_latest_k=0", *flags),
    ]


def write_text(root):
    (root / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"<a>{n} of {n**2}<b>" * 20}) + "\n" for n in range(999))
    )


def first_loss(folder, published):
    """The loss of step 1 by transformers' own forward of the tokens it was fed."""
    tokens = torch.stack([torch.from_numpy(row.tokens).long() for row in replay(folder, 1, trusted=True).rows])
    with torch.no_grad():  # fla's own losses run on a GPU alone
        logits = published(tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).item()


def check_first_losses(root, published):
    """Compare the first loss of each run with that of transformers' model, {name of the run: model}."""
    for name, model in published.items():
        found = metrics(root / name)[0]["loss"]
        # fp32 sums in another order; of all models, other random weights differ by 4e-3 (7e-4 of it) and more
        assert found == pytest.approx(first_loss(root / name, model), rel=2e-5), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of one step on two ranks, and transformers' models they start from.

    "grown" is a Llama of 257 ids that was given two tokens, and was resumed for another step.
    """
    root = tmp_path_factory.mktemp("runs")
    write_text(root)
    layouts = {"gpt_neox": "tp2", "mixtral": "ddp2", "qwen3": "pp2", "gla": "fsdp2"}
    published = {name: publish(root / f"{name}-hf", name) for name in layouts}
    published["grown"] = publish(root / "grown-hf", "llama", vocab_size=257)
    jobs = [job(root, root / f"{name}-hf", name, layout) for name, layout in layouts.items()]
    grown = job(root, root / "grown-hf", "grown", "fsdp2", "--model.add_tokens=<a>,<b>")
    train_each([*jobs, grown, [*grown, "--training.steps=2"]], ranks=2)
    published["grown"].resize_token_embeddings(320, mean_resizing=False)
    with torch.no_grad():
        for table in (published["grown"].get_input_embeddings(), published["grown"].get_output_embeddings()):
            table.weight[257:] = table.weight[:257].double().mean(0).float()
    return root, published, grown


def test_the_first_loss_on_two_ranks_is_that_of_transformers_in_every_layout(runs):
    root, published, _ = runs
    check_first_losses(root, published)


def test_added_tokens_are_ids_of_their_own_in_the_data_and_a_run_with_them_resumes(runs):
    root, _, _ = runs
    records = metrics(root / "grown")
    assert [record["step"] for record in records] == [1, 2]
    assert all(math.isfinite(record["loss"]) for record in records)
    fed = {int(token) for row in replay(root / "grown", 1).rows for token in row.tokens}
    assert {257, 258} <= fed
    assert max(fed) == 258


def test_an_export_has_the_added_tokens_and_their_rows(runs):
    root, _, _ = runs
    export_checkpoint(root / "grown" / "checkpoint" / "step-1", root / "grown" / "model", root / "grown" / "hf")
    tokenizer = AutoTokenizer.from_pretrained(root / "grown" / "hf")
    model = AutoModelForCausalLM.from_pretrained(root / "grown" / "hf")
    assert tokenizer("<a>x<b>").input_ids == [257, ord("x"), 258]
    assert tokenizer.decode([257, ord("x"), 258]) == "<a>x<b>"
    assert tokenizer.decode([257, ord("x"), 258], skip_special_tokens=True) == "x"
    assert model.get_input_embeddings().weight.shape == model.lm_head.weight.shape == (320, 64)
    assert model.config.vocab_size == 320


@pytest.mark.parametrize(
    "tokens", ["--model.add_tokens=<b>,<a>", "--model.add_tokens=<a>", "--model.add_tokens=<a>,<b>,<c>"]
)
def test_another_list_of_added_tokens_is_rejected_on_resume(runs, tokens, capsys):
    _, _, flags = runs
    assert main([*flags, tokens, "--training.steps=3", "--parallelism.data_parallel_shard_degree=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"--model.add_tokens: .*other ids, <[abc]> .*grown", line), line


def test_a_token_that_is_added_twice_is_rejected(hf, capsys):
    assert main([f"--model.config={hf}", "--model.add_tokens=<a>,<b>,<a>"]) == 2
    assert "--model.add_tokens: found <a> twice" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("fsdp2", 2)])
def test_the_first_loss_of_every_model_is_that_of_transformers(layout, ranks, tmp_path):
    write_text(tmp_path)
    published = {name: publish(tmp_path / f"{name}-hf", name) for name in MODELS}
    train_each([job(tmp_path, tmp_path / f"{name}-hf", name, layout) for name in MODELS], ranks=ranks)
    check_first_losses(tmp_path, published)


@pytest.mark.slow
def test_the_first_loss_on_four_ranks_is_that_of_transformers(tmp_path):
    layouts = ("hsdp2x2", "fsdp2_tp2", "fsdp2_pp2", "pp2_tp2")
    write_text(tmp_path)
    model = publish(tmp_path / "hf", "llama")
    train_each([job(tmp_path, tmp_path / "hf", layout, layout) for layout in layouts], ranks=4)
    check_first_losses(tmp_path, dict.fromkeys(layouts, model))

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flame.checkpoint.export import export_checkpoint
from flame.checkpoint.report import REPORT, read_report, sha256
from tests.checkpoint.models import save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, "llama")
    return folder


def export(run, folder, *more, **options):
    return export_checkpoint(run / "checkpoint" / "step-1", run / "model", folder, *more, **options)


def test_an_export_has_the_tokenizer_and_its_end_of_text_and_loads_as_the_type_it_was_cast_to(run, tmp_path):
    recorded = run / "model" / "config.json"
    recorded.write_text(json.dumps(json.loads(recorded.read_text()) | {"dtype": "float32"}))
    export(run, tmp_path / "hf", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    assert tokenizer("naïve 🔥").input_ids == list("naïve 🔥".encode())
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 256


def test_the_report_says_what_was_made_from_what_and_how_it_was_checked(run, tmp_path):
    export(run, tmp_path / "hf", prove=lambda folder: {"logits": sorted(path.name for path in folder.iterdir())})
    report = read_report(tmp_path / "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert report["tensors"] == len(written)
    assert report["parameters"] == sum(tensor.numel() for tensor in written.values())
    assert report["metadata_sha256"] == sha256(run / "checkpoint" / "step-1" / ".metadata")
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    files = {path.name for path in (tmp_path / "hf").iterdir()} - {REPORT}
    assert report["files"] == {name: sha256(tmp_path / "hf" / name) for name in files}
    assert set(report["checks"]["logits"]) == files  # the proof sees the export as it will be


def test_an_export_of_steps_that_were_done_again_is_made_again_and_the_old_one_kept(tmp_path):
    save_run(tmp_path, "llama")
    export(tmp_path, tmp_path / "hf")
    old = (tmp_path / "hf" / "model.safetensors").read_bytes()
    save_run(tmp_path, "llama", initializer_range=0.5)
    assert export(tmp_path, tmp_path / "hf")
    assert (tmp_path / "hf.old-1" / "model.safetensors").read_bytes() == old
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() != old


def test_an_export_that_was_cut_short_is_done_again_and_a_whole_one_is_left_alone(run, tmp_path):
    (tmp_path / ".hf.tmp").mkdir()
    (tmp_path / ".hf.tmp" / "model.safetensors").write_bytes(b"torn")
    assert export(run, tmp_path / "hf")
    written = (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns
    assert not export(run, tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns == written
    assert not (tmp_path / ".hf.tmp").exists()


def test_an_export_whose_proof_fails_leaves_what_was_there_and_nothing_else(run, tmp_path):
    (tmp_path / "hf").mkdir()
    save_file({}, tmp_path / "hf" / "mine.safetensors")

    def fail(folder):
        raise ValueError("another model")

    with pytest.raises(ValueError, match="another model"):
        export(run, tmp_path / "hf", prove=fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["hf", "mine.safetensors"]

"""What a process imports before it needs it, by sys.modules: nothing that takes seconds and is not used."""

import json
import subprocess
import sys

import torch

from flame.errors import REFUSED
from flame.runtime.imports import on_demand
from tests.launch import REPO, SMALL, environment
from tests.tiny import write_config

# inductor, which compiles; datasets, which reads what flame's own readers do not, and what both import
UNUSED = ("torch._inductor.compile_fx", "datasets", "pandas", "networkx", "flame.dry_run")
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def python(code, *words, **env):
    """What Python code prints last, as JSON."""
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment(**env), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_job_that_compiles_nothing_and_reads_text_imports_neither_inductor_nor_datasets(tmp_path):
    (tmp_path / "text.txt").write_text("a little text for a few steps, again and again. " * 300)
    code = (
        "import json, sys; from flame.train import main; assert main(sys.argv[2:]) == 0;"
        "print(json.dumps([name for name in sys.argv[1].split() if name in sys.modules]))"
    )
    flags = [f"--job.dump_folder={tmp_path}/run", f"--model.config={write_config(tmp_path, 'gla')}", "--data.lanes=2"]
    flags += [f"--training.dataset={tmp_path}/text.txt", "--training.steps=2", "--training.local_batch_size=2"]
    assert python(code, " ".join(UNUSED), *SMALL, *flags, **ALONE) == []
    assert (tmp_path / "run/hf/step-2/model.safetensors").exists()


def test_the_first_line_is_printed_before_torch_is_imported_and_only_the_rank_imports_it(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("""
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            with open(os.environ["ORDER"], "a") as file:
                print("torch", *sys.orig_argv[1:], file=file)
sys.meta_path.insert(0, Finder())
""")
    order = tmp_path / "order"
    env = environment(ORDER=str(order), FLAME_PYTHON=sys.executable, NGPU="1", PYTHONPATH=str(tmp_path))
    flags = ["--model.config", str(write_config(tmp_path, "llama")), "--training.enable_cpu_offload"]
    with open(order, "a") as log:  # a job that its rank rejects
        done = subprocess.run(["bash", REPO / "train.sh", *flags], cwd=tmp_path, env=env, stdout=log, stderr=log)
    first, *others = order.read_text().splitlines()
    assert done.returncode == REFUSED and first.endswith("I starting 1 rank")
    assert [line for line in others if line.startswith("torch")] == [f"torch -u -m flame.train {' '.join(flags)}"]
    assert "--training.enable_cpu_offload: needs a GPU" in others[-1]


def test_what_a_module_compiles_when_it_is_imported_is_compiled_when_it_is_first_called():
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    with on_demand():

        @torch.compile
        def plain(x):
            return x + 1

        @torch.compile(backend=backend)
        def double(x):
            """Twice x."""
            return 2 * x

    assert not compiled and double.__doc__ == "Twice x."
    assert [double(torch.ones(2)).tolist() for _ in range(2)] == [[2, 2]] * 2 and len(compiled) == 1
    whole = torch.compile(lambda x: plain(double(x)), backend=backend, fullgraph=True)
    assert whole(torch.ones(3)).tolist() == [3, 3, 3] and len(compiled) == 2


def test_torchtitans_own_text_data_is_imported_when_it_is_called_or_asked_for():
    code = """
import json, sys
from flame.runtime import device, imports
device.choose()
with imports.on_demand():
    from torchtitan.components import validate
before = "datasets" in sys.modules
try:
    validate.build_text_validation_dataloader()
except TypeError as error:
    missing = "missing 4 required positional arguments" in str(error)
from torchtitan.hf_datasets import text_datasets
print(json.dumps([before, missing, "datasets" in sys.modules, "c4" in text_datasets.DATASETS]))
"""
    assert python(code) == [False, True, True, True]

"""DCP -> Hugging Face next to a plain copy and torch's own way: python scripts/benchmark/convert.py [--parameters 1.0]

Creates a run with a Llama of --parameters billion parameters in float32 and its AdamW state, and one without that
state, then runs each converter in a separate process, in turn, for --rounds rounds, every other one in reverse order:
wall time, and peak resident memory of it and its children. Needs 32 bytes of disk per parameter in --folder, and
deletes what it created. torch's way needs 12 bytes of memory per parameter.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

SCRIPTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SCRIPTS.parent))  # this checkout's flame
BUFFER = 64 << 20
VOCABULARY = 32_000
BARE = ", no optimizer"  # in the checkpoint


# -- what is measured, each in a separate process ----------------------------------------------------------------------


def make(run: Path, bare: Path, parameters: float) -> None:
    """Run folders as flame leaves them, checkpoint/step-1 and model/; `bare` without an optimizer."""
    import torch
    import torch.distributed.checkpoint as dcp
    from transformers import AutoModelForCausalLM, LlamaConfig

    from flame.data.tokenize import build_tokenizer
    from flame.models.hf import save_assets

    width = 2048 if parameters >= 0.5 else 1024
    layers = round((parameters * 1e9 - 2 * VOCABULARY * width) / (4 * width**2 + 3 * width * 4 * width))
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": max(layers, 1)}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_attention_heads=16, vocab_size=VOCABULARY))
    noise = torch.randn(VOCABULARY * width)  # every tensor is a view of it, which takes no memory
    state = {name: noise[: tensor.numel()].view(tensor.shape) for name, tensor in model.state_dict().items()}
    moments = {f"state.{name}.{of}": t for name, t in state.items() for of in ("exp_avg", "exp_avg_sq")}
    everything = {**state, "optimizer": moments, "train_state": {"step": 1}}
    for folder, saved in ((run, everything), (bare, state)):
        writer = dcp.FileSystemWriter(folder / "checkpoint" / "step-1", sync_files=False)
        dcp.save(saved, storage_writer=writer, no_dist=True)
        save_assets(folder / "model", model, build_tokenizer("byte").hf)
    print(
        f"{sum(t.numel() for t in state.values()):,} parameters, {max(layers, 1)} layers of width {width}", flush=True
    )


def copy(run: Path, output: Path, nbytes: int) -> None:
    """The lower bound: read `nbytes` of the checkpoint and write them."""
    output.mkdir()
    (source,) = (run / "checkpoint" / "step-1").glob("*.distcp")
    buffer = memoryview(bytearray(BUFFER))
    with open(source, "rb", buffering=0) as reader, open(output / "copy", "wb", buffering=0) as writer:
        while nbytes:
            count = reader.readinto(buffer[: min(BUFFER, nbytes)])
            writer.write(buffer[:count])
            nbytes -= count


def through_torch(run: Path, output: Path) -> None:
    """dcp_to_torch_save, load what it wrote into the model, save_pretrained."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from transformers import AutoConfig, AutoModelForCausalLM

    output.mkdir()
    dcp_to_torch_save(run / "checkpoint" / "step-1", output / "all.pt")
    state = torch.load(output / "all.pt", mmap=True)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run / "model"))
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    (output / "all.pt").unlink()
    model.save_pretrained(output)


# -- the measuring -----------------------------------------------------------------------------------------------------


def measure(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak MiB of a command and the processes it waited for."""
    os.sync()  # or it would pay for what others wrote
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return wall, usage.ru_maxrss / 1024


def compare(folder: Path, parameters: float, rounds: int, without_torch: bool) -> None:
    """Create a run in `folder`, measure all converters on it and print the table."""
    run, bare, output = folder / "run", folder / "bare", folder / "output"
    this, converter = [sys.executable, __file__], [sys.executable, str(SCRIPTS / "convert_dcp_to_hf.py")]
    subprocess.run([*this, "make", str(run), str(bare), str(parameters)], check=True)
    flame, of_bare = ([*converter, f"--path={path}", f"--output={output}"] for path in (run, bare))
    for command in (flame, of_bare):
        measure(command)
        nbytes = sum(file.stat().st_size for file in output.glob("*.safetensors"))
        shutil.rmtree(output)
    commands = {
        "read and write the same bytes": [*this, "copy", str(run), str(output), str(nbytes)],
        "flame": flame,
        f"flame{BARE}": of_bare,
        "flame, not verified": [*flame, "--no_verify"],
        f"flame, not verified{BARE}": [*of_bare, "--no_verify"],
        "flame, to bfloat16": [*flame, "--dtype=bfloat16"],
    }
    if not without_torch:
        commands["dcp_to_torch_save, save_pretrained"] = [*this, "through_torch", str(run), str(output)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in list(commands.items())[:: -1 if number % 2 else 1]:
            found[name].append(measure(command))
            shutil.rmtree(output)
    print(f"output {nbytes / 2**20:,.0f} MiB in float32, load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    print(f"{'':>36}  {'wall s, each round':<28}{'vs. copy':>8}{'peak MiB':>10}{'/ output':>10}")
    for name, pairs in found.items():
        walls, peak = [wall for wall, _ in pairs], max(peak for _, peak in pairs)
        ratio = median(wall / copied for wall, (copied, _) in zip(walls, next(iter(found.values())), strict=True))
        shown = ", ".join(f"{wall:.1f}" for wall in walls)
        print(f"{name:>36}  {shown:<28}{ratio:>8.2f}{math.ceil(peak):>10,}{peak / (nbytes / 2**20):>10.3f}")
    for name in ("flame", "flame, not verified"):
        both = zip(found[name], found[name + BARE], strict=True)
        ratios = sorted(wall / without for (wall, _), (without, _) in both)
        print(f"{name}, with an optimizer / without: {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1.0, help="in billions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where there is room; default: the temporary folder")
    parser.add_argument("--without_torch", action="store_true", help="leave dcp_to_torch_save out")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        compare(Path(folder), given.parameters, given.rounds, given.without_torch)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", run, bare, parameters]:
            make(Path(run), Path(bare), float(parameters))
        case ["copy", run, output, nbytes]:
            copy(Path(run), Path(output), int(nbytes))
        case ["through_torch", run, output]:
            through_torch(Path(run), Path(output))
        case _:
            main()

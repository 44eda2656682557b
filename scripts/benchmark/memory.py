"""The dry run's estimate beside the peak of real runs on this machine's CPU: python scripts/benchmark/memory.py

Each case trains a few steps and reports the growth of its resident memory since the imports; of two ranks the larger
counts. Mapped files do not count. Prints estimate, measured, ratio and the machine's load; then the CPU time and peak
memory of the dry run of a 70 B Llama on 1,024 ranks.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout's flame
_LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 8192,
}
_GLA = {"model_type": "gla", "hidden_size": 512, "num_hidden_layers": 6, "num_heads": 4, "vocab_size": 8192}
_TP = "--parallelism.tensor_parallel_degree=2"
CASES = {  # name: (world_size, transformers' or fla's config, flags)
    "llama, 1 rank": (1, _LLAMA, ["--training.local_batch_size=4"]),
    "gla, 1 rank": (1, _GLA, ["--training.local_batch_size=1"]),
    "llama, FSDP2 on 2 ranks, full AC": (
        2,
        _LLAMA | {"num_hidden_layers": 10},
        ["--training.local_batch_size=4", "--activation_checkpoint.mode=full"],
    ),
    "llama, TP on 2 ranks": (2, _LLAMA, ["--training.local_batch_size=8", _TP]),
    "torchtitan's llama3, TP on 2 ranks": (
        2,
        None,
        ["--model.name=llama3", "--model.flavor=debugmodel", "--training.local_batch_size=48", _TP],
    ),
}
_LARGE = ["--model.config", str(ROOT / "configs/llama2_70B.json"), "--training.seq_len=4096",
          "--parallelism.tensor_parallel_degree=8", "--parallelism.pipeline_parallel_degree=4"]  # fmt: skip
_COMMON = ["--training.seq_len=256", "--training.steps=3", "--training.mixed_precision_param=float32",
           "--checkpoint.no_enable", "--metrics.log_freq=1", "--training.dataloader.num_workers=0"]  # fmt: skip


def resident() -> int:
    """Resident bytes of this process without file-backed pages."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def run_rank(flags: list[str]) -> None:
    """Trains; prints the rank's growth and the dry run's estimate of it, as JSON."""
    from flame.runtime import device, log

    log.configure()
    device.choose()
    from torchtitan.protocols.train_spec import get_train_spec

    from flame.config.parser import parse, world_size
    from flame.dry_run.memory import estimate, measure_modes
    from flame.training.context import RunContext
    from flame.training.train_spec import register
    from flame.training.trainer import FlameTrainer

    config = parse(flags)
    context = RunContext(config)
    register(config, context)
    parts = measure_modes(get_train_spec(config.model.name), config, gpu_loss=False)[config.activation_checkpoint.mode]
    estimated = max(rank.peak for rank in estimate(parts, config, world_size()))
    peak = before = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    trainer = FlameTrainer(config, context)
    trainer.train()
    done.set()
    watcher.join()
    trainer.close()
    print("MEASURED", json.dumps([estimated, peak - before]))


def compare(world_size: int, model: dict | None, flags: list[str]) -> tuple[int, int]:
    """Estimated and measured bytes of a case."""
    with tempfile.TemporaryDirectory() as folder:
        if model:
            config = Path(folder, "model.json")
            config.write_text(json.dumps(model))
            flags = [f"--model.config={config}", *flags]
        job = [f"--job.dump_folder={folder}/run", *_COMMON, *flags]
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world_size}",
                   "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", __file__, *job]  # fmt: skip
        # Freed blocks return to the system at once, so that only memory in use is measured.
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    found = [json.loads(line.split("MEASURED ")[1]) for line in done.stdout.splitlines() if "MEASURED " in line]
    assert len(found) == world_size, done.stdout[-3000:] + done.stderr[-3000:]
    return found[0][0], max(measured for _, measured in found)


def weigh_dry_run() -> tuple[float, float]:
    """CPU seconds and peak resident GiB of the process that train.sh --dry_run starts for _LARGE on 1,024 ranks."""
    env = os.environ | {"NNODE": "128", "NGPU": "8", "FLAME_PYTHON": sys.executable}
    with tempfile.TemporaryDirectory() as folder:
        command = ["bash", str(ROOT / "train.sh"), "--dry_run", *_LARGE]
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, status
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main() -> None:
    print(f"{'case':40} {'estimate MiB':>12} {'measured MiB':>12} {'ratio':>6} {'load':>5} {'s':>5}")
    for name, case in CASES.items():
        begin = time.monotonic()
        estimated, measured = compare(*case)
        took = time.monotonic() - begin
        print(f"{name:40} {estimated / 2**20:12.1f} {measured / 2**20:12.1f} {estimated / measured:6.2f} "
              f"{os.getloadavg()[0]:5.1f} {took:5.0f}", flush=True)  # fmt: skip
    print("dry run of llama2_70B on 1,024 ranks: {:.1f} s of CPU time, {:.2f} GiB".format(*weigh_dry_run()))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    elif len(sys.argv) > 1:
        run_rank(sys.argv[1:])
    else:
        main()

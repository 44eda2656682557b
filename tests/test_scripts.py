"""train.sh and scripts/setup.sh, really run, with a stand-in for Python that records its arguments."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flame.errors import PREEMPTED

ROOT = Path(__file__).parents[1]
PREFLIGHT, LAUNCH = ["-m", "flame.preflight"], ["-m", "flame.runtime.launch"]
RECORDER = """#!/bin/bash
# One record: NNODE, NGPU, OMP_NUM_THREADS, the folder, then the arguments; each ended by NUL, the record by a newline.
printf '%s\\0' "${NNODE-}" "${NGPU-}" "${OMP_NUM_THREADS-}" "$PWD" "$@" >>"$RECORDS"; printf '\\n' >>"$RECORDS"
case "$*" in
  *"-m flame.preflight"*) exit "${PREFLIGHT_CODE-0}" ;;
  *flame.runtime.launch*) exit "${TORCHRUN_CODE-0}" ;;
  *"install"*"-e"*) exit "${INSTALL_CODE-0}" ;;
esac
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Shell:
    """Runs a script in an empty folder and an environment of its own; `calls` are what the stand-in was asked."""

    def __init__(self, tmp_path: Path):
        self.bin, self.cwd, self.records = tmp_path / "bin", tmp_path / "a folder", tmp_path / "records"
        self.cwd.mkdir()
        write_program(
            self.bin / "nvidia-smi", "#!/bin/bash\nexit 9\n"
        )  # a machine without a GPU, until a test says else
        self.env = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": os.environ.get("HOME", str(tmp_path)),
            "RECORDS": str(self.records),
            "FLAME_PYTHON": str(write_program(tmp_path / "python stand-in", RECORDER)),
        }

    def run(self, *command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        self.records.unlink(missing_ok=True)
        return subprocess.run(
            ["bash", *map(str, command)], cwd=self.cwd, env=self.env | env, capture_output=True, text=True, timeout=60
        )

    def train(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run(ROOT / "train.sh", *args, **env)

    @property
    def calls(self) -> list[dict[str, object]]:
        if not self.records.exists():
            return []
        rows = [line.split("\0")[:-1] for line in self.records.read_text().splitlines()]
        return [{"nnode": r[0], "ngpu": r[1], "omp": r[2], "cwd": r[3], "args": r[4:]} for r in rows]


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


def launch_line(*, nnode="1", ngpu="1", rendezvous=(), run_id="none", endpoint="localhost:0", log_rank="0", args=()):
    if nnode == ngpu == "1":
        return [*LAUNCH, "-m", "flame.train", *args]
    return [
        *LAUNCH, "--nnodes", nnode, "--nproc_per_node", ngpu,
        "--rdzv_backend", "c10d", "--rdzv_id", run_id, *rendezvous, "--rdzv_endpoint", endpoint,
        "--local-ranks-filter", log_rank, "-m", "flame.train", *args,
    ]  # fmt: skip


def test_without_arguments_the_debug_job_is_checked_and_launched(shell):
    done = shell.train()
    job = ["--job.config_file", f"{ROOT}/configs/jobs/debug.toml"]
    assert done.returncode == 0, done.stderr
    assert [call["args"] for call in shell.calls] == [PREFLIGHT + job, launch_line(args=job)]


def test_arguments_reach_both_steps_untouched(shell):
    args = ["--job.description=two words = one", "--data", "a b", "", "*", "$HOME", "--help-me", "-m", "'\""]
    shell.train(*args)
    assert [call["args"] for call in shell.calls] == [PREFLIGHT + args, launch_line(args=args)]


def test_the_current_folder_stays_as_it_is(shell):
    shell.train("--x")
    assert {call["cwd"] for call in shell.calls} == {str(shell.cwd)}
    assert list(shell.cwd.iterdir()) == []


def test_the_environment_sets_the_layout_and_the_preflight_knows_it(shell):
    shell.train("--x", NNODE="2", NGPU="8", LOG_RANK="0,7", MASTER_ADDR="node-1", MASTER_PORT="1234")
    checked, launched = shell.calls
    assert (checked["nnode"], checked["ngpu"]) == ("2", "8")
    expected = launch_line(nnode="2", ngpu="8", log_rank="0,7", endpoint="node-1:1234", args=["--x"])
    assert launched["args"] == expected


@pytest.mark.parametrize(
    "visible, listed, expected",
    [
        ("0,1,3", "", "3"),
        ("", "GPU 0: A\nGPU 1: B", "1"),  # hidden on purpose: the CPU
        (None, "GPU 0: A\n  MIG 1g Device 0: C\nGPU 1: B", "2"),
        (None, "", "1"),
    ],
)
def test_a_node_has_one_process_per_visible_gpu_and_one_without_any(shell, visible, listed, expected):
    write_program(shell.bin / "nvidia-smi", f"#!/bin/bash\n[[ $1 == -L ]] && printf '%s\\n' '{listed}'\n")
    shell.train("--x", **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    assert [call["ngpu"] for call in shell.calls] == [expected, expected]


@pytest.mark.parametrize("ngpu, given, expected", [("1", None, ""), ("2", None, "1"), ("2", "6", "6")])
def test_ranks_that_share_a_machine_get_one_thread_by_default(shell, ngpu, given, expected):
    shell.train("--x", NGPU=ngpu, **({} if given is None else {"OMP_NUM_THREADS": given}))
    assert [call["omp"] for call in shell.calls] == [expected, expected]


@pytest.mark.parametrize("node, is_host", [("0", "1"), ("2", "0")])
def test_slurm_supplies_the_layout_the_first_node_and_the_run_id(shell, node, is_host):
    write_program(
        shell.bin / "scontrol", '#!/bin/bash\n[[ $* == "show hostnames n[5-8]" ]] && printf "n%s\\n" 5 6 7 8\n'
    )
    slurm = {"SLURM_NNODES": "4", "SLURM_NODEID": node, "SLURM_JOB_ID": "720123", "SLURM_JOB_NODELIST": "n[5-8]"}
    shell.train("--x", NGPU="8", **slurm)
    rendezvous = ["--rdzv_conf", f"is_host={is_host}"]
    expected = {"nnode": "4", "ngpu": "8", "run_id": "720123", "endpoint": "n5:29623", "rendezvous": rendezvous}
    assert shell.calls[-1]["args"] == launch_line(**expected, args=["--x"])


@pytest.mark.parametrize(
    "name", ["NNODE", "NGPU", "LOG_RANK", "MASTER_PORT", "SLURM_NNODES", "SLURM_JOB_ID", "SLURM_NODEID"]
)
@pytest.mark.parametrize("value", ["PATH[$(touch executed)]", "a[`touch executed`]", "1 + 1", "9" * 30 + "x"])
def test_a_variable_that_is_no_number_is_rejected_and_never_evaluated(shell, name, value):
    nodes = {} if name == "SLURM_NNODES" else {"NNODE": "2", "MASTER_ADDR": "a"}
    done = shell.train("--x", **nodes | {name: value})
    found = "NNODE" if name == "SLURM_NNODES" else name
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith(f"flame: {found}: found ")
    assert list(shell.cwd.iterdir()) == [] and shell.calls == []


def test_several_nodes_without_a_first_node_are_rejected(shell):
    done = shell.train("--x", NNODE="2")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "MASTER_ADDR" in done.stderr
    for scontrol in ("exit 127", "exit 0", "echo broken >&2; exit 1"):  # a container lacks it, or cannot ask
        write_program(shell.bin / "scontrol", f"#!/bin/bash\n{scontrol}\n")
        slurm = shell.train("--x", SLURM_NNODES="2", SLURM_JOB_NODELIST="n[5-6]")
        assert (slurm.returncode, slurm.stderr) == (2, done.stderr)
    assert LAUNCH not in [call["args"][:2] for call in shell.calls]


@pytest.mark.parametrize("port", ["65536", "99999", "-1", "http"])
def test_a_port_that_no_machine_has_is_rejected_in_one_line(shell, port):
    done = shell.train("--x", MASTER_PORT=port)
    line = f"flame: MASTER_PORT: found '{port}', must be a port, at most 65535\n"
    assert (done.returncode, done.stderr, shell.calls) == (2, line, [])
    assert shell.train("--x", MASTER_PORT="08080").returncode == 0


@pytest.mark.parametrize("name", ["NNODE", "NGPU"])
@pytest.mark.parametrize("value", ["0", "two", "1:4", "-1"])
def test_a_layout_that_is_not_a_number_is_rejected_in_one_line(shell, name, value):
    done = shell.train("--x", **{name: value})
    assert (done.returncode, done.stderr) == (2, f"flame: {name}: found '{value}', must be an integer of 1 or more\n")
    assert shell.calls == []


@pytest.mark.parametrize("value, ngpu, expected", [("5", "1", 2), ("0,2", "2", 2), ("1", "2", 0), ("08", "9", 0)])
def test_a_rank_to_show_is_one_of_the_nodes(shell, value, ngpu, expected):
    done = shell.train("--x", LOG_RANK=value, NGPU=ngpu)
    assert (done.returncode, done.stderr.count("LOG_RANK")) == (expected, expected // 2)


@pytest.mark.parametrize("code", ["0", "1", "7"])
def test_the_exit_code_is_torchruns(shell, code):
    assert shell.train("--x", TORCHRUN_CODE=code).returncode == int(code)


@pytest.mark.parametrize(
    "layout, line",
    [
        ({}, "starting 1 rank"),
        ({"NGPU": "8"}, "starting 8 ranks"),
        ({"NNODE": "2", "MASTER_ADDR": "a"}, "starting 1 rank on this node, one of 2"),
    ],
)
def test_what_starts_is_the_first_line(shell, layout, line):
    done = shell.train("--x", **layout)
    assert re.fullmatch(r"\d\d:\d\d:\d\d I (.*)\n", done.stdout)[1] == line


@pytest.mark.parametrize("code, expected", [("2", 2), ("1", 1), ("64", 0)])
def test_nothing_is_launched_after_a_rejection_or_the_help(shell, code, expected):
    done = shell.train("-h", PREFLIGHT_CODE=code)
    assert (done.returncode, done.stdout) == (expected, "")
    assert [call["args"] for call in shell.calls] == [[*PREFLIGHT, "-h"]]


def test_the_help_lists_flags_and_makes_nothing_even_beside_a_folder_named_flame(shell):
    (shell.cwd / "flame").mkdir()  # a namespace package to Python, unless this checkout comes first
    done = shell.train("-h", FLAME_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert "--training.steps" in done.stdout and "--model.config" in done.stdout
    assert [p.name for p in shell.cwd.rglob("*")] == ["flame"]


@pytest.mark.parametrize("after", [0.0, 0.05, 0.2, 0.5])
def test_ctrl_c_before_the_launch_ends_the_command_in_silence(shell, after):
    started = subprocess.Popen(
        ["bash", str(ROOT / "train.sh"), "--model.config", f"{ROOT}/configs/gla_debug.json"],
        cwd=shell.cwd,
        env=shell.env | {"FLAME_PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: (os.setsid(), signal.signal(signal.SIGINT, signal.SIG_DFL)),
    )
    time.sleep(0.02 + after)
    os.killpg(started.pid, signal.SIGINT)  # as the terminal does
    said, _ = started.communicate(timeout=60)
    assert started.returncode in (130, -signal.SIGINT, PREEMPTED)
    said = re.sub(r"^\S+ I starting 1 rank\n", "", said)
    assert "Traceback" not in said and said.count("\n") <= 1


@pytest.mark.parametrize("script", ["train.sh", "scripts/flame.sh"])
def test_a_python_that_is_not_there_is_one_line(script, shell):
    done = shell.run(ROOT / script, "-h", FLAME_PYTHON="/nonexistent")
    assert (done.returncode, done.stderr) == (2, "flame: FLAME_PYTHON: found '/nonexistent', must be an executable\n")


def test_the_other_commands_run_from_any_folder(shell):
    shell.run(ROOT / "scripts/flame.sh", "data", "show", "a run", "--step", "3")
    (call,) = shell.calls
    assert call["args"] == ["-m", "flame.config.commands", "data", "show", "a run", "--step", "3"]
    assert call["cwd"] == str(shell.cwd)
    done = shell.run(ROOT / "scripts/flame.sh", "drills", "nope", FLAME_PYTHON=sys.executable)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith("flame: drill:")
    unknown = shell.run(ROOT / "scripts/flame.sh", "trian", FLAME_PYTHON=sys.executable)
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1) and "trian" in unknown.stderr


@pytest.mark.parametrize(
    "words, command",
    [
        (["-m", "flame.data", "show", "a run"], "scripts/flame.sh data show 'a run'"),
        (["-m", "flame.drills"], "scripts/flame.sh drills"),
        (["-m", "flame.config.commands"], "scripts/flame.sh"),
        (["-m", "flame.train", "--x"], "train.sh --x"),
        ([str(ROOT / "scripts/convert_dcp_to_hf.py"), "--path", "run"], "scripts/flame.sh export ..."),
        ([str(ROOT / "scripts/convert_hf_to_dcp.py")], "scripts/flame.sh import ..."),
    ],
)
def test_a_python_without_the_packages_names_the_command_that_works(words, command):
    bare = [sys.executable, "-S", *words]  # without site-packages
    done = subprocess.run(bare, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"bash {ROOT}/{command}" in done.stderr


# scripts/setup.sh, in a checkout of its own whose .venv holds the stand-in


@pytest.fixture
def checkout(tmp_path, shell):
    root = tmp_path / "my checkout"
    for name in ("scripts/setup.sh", "pyproject.toml", "3rdparty/constraints.txt", "flame/__init__.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    write_program(root / ".venv/bin/python", RECORDER)
    shell.env.pop("FLAME_PYTHON")
    return root


def installs(shell: Shell) -> list[list[str]]:
    return [call["args"][5:] for call in shell.calls if call["args"][:3] == ["-m", "pip", "install"]]


def test_setup_installs_torch_alone_then_the_rest_with_the_pins(shell, checkout):
    done = shell.run(checkout / "scripts/setup.sh")
    assert (done.returncode, done.stdout) == (0, f"{checkout}/.venv/bin/python\n"), done.stderr
    torch, rest = installs(shell)
    assert torch[-3:] == ["3rdparty/constraints.txt", "--quiet", "torch"]
    assert rest[-3:-1] == ["--quiet", "-e"] and rest[-1].startswith(".[dev")


def test_setup_does_nothing_the_second_time_and_prints_nothing(shell, checkout):
    shell.run(checkout / "scripts/setup.sh")
    again = shell.run(checkout / "scripts/setup.sh")
    assert (again.stdout, again.stderr, shell.calls) == (f"{checkout}/.venv/bin/python\n", "", [])


@pytest.mark.parametrize("name", ["pyproject.toml", "3rdparty/constraints.txt"])
def test_setup_installs_again_when_a_requirement_changed(shell, checkout, name):
    shell.run(checkout / "scripts/setup.sh")
    with (checkout / name).open("a") as file:
        file.write("# changed\n")
    shell.run(checkout / "scripts/setup.sh")
    assert len(installs(shell)) == 2


def test_setup_installs_again_after_the_checkout_moved(shell, checkout):
    shell.run(checkout / "scripts/setup.sh")
    moved = checkout.rename(checkout.with_name("elsewhere"))
    assert shell.run(moved / "scripts/setup.sh").stdout == f"{moved}/.venv/bin/python\n"
    assert len(installs(shell)) == 2


def test_setup_that_was_interrupted_fails_and_is_resumed(shell, checkout):
    cut = shell.run(checkout / "scripts/setup.sh", INSTALL_CODE="3")
    assert (cut.returncode, cut.stdout) == (3, "")
    assert shell.run(checkout / "scripts/setup.sh").returncode == 0
    assert len(installs(shell)) == 2


def test_setup_uses_an_active_environment_that_already_has_this_checkout(shell, checkout):
    path = f"{Path(sys.executable).parent}:{shell.env['PATH']}"
    active = shell.run(checkout / "scripts/setup.sh", PATH=path, PYTHONPATH=str(checkout))
    assert active.returncode == 0 and Path(active.stdout.strip()).samefile(sys.executable)
    other = shell.run(checkout / "scripts/setup.sh", PATH=path, PYTHONPATH=str(ROOT))  # another checkout's flame
    assert other.stdout == f"{checkout}/.venv/bin/python\n"


def test_setup_rejects_an_old_python_in_one_line(shell, checkout):
    shutil.rmtree(checkout / ".venv")
    tools = shell.bin.with_name("tools")
    for name in ("python3", "python3.10", "python3.11", "python3.12"):
        write_program(tools / name, '#!/bin/bash\n[[ $1 == -V ]] && echo "Python 3.8.10" && exit\nexit 1\n')
    for name in ("bash", "dirname", "cat", "cksum"):
        (tools / name).symlink_to(shutil.which(name) or name)
    done = shell.run(checkout / "scripts/setup.sh", PATH=str(tools))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "3.10 or newer" in done.stderr and "Python 3.8.10" in done.stderr


def test_a_script_imports_the_flame_of_its_own_checkout_and_has_a_help_that_writes_nothing(tmp_path):
    (tmp_path / "flame").mkdir()
    (tmp_path / "flame" / "__init__.py").write_text("raise RuntimeError('another flame')")
    before = (ROOT / "docs" / "flags.md").stat().st_mtime_ns
    command = [sys.executable, str(ROOT / "scripts" / "flags_page.py"), "-h"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["usage:", "flags_page.py"])
    assert (ROOT / "docs" / "flags.md").stat().st_mtime_ns == before

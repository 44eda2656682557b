"""What every test process needs before torch and torchtitan are imported: few threads, no network, a device."""

import os
import shutil
import tempfile

_HOME = tempfile.mkdtemp(prefix="flame-tests-")
os.environ.update(
    OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
    HF_HOME=_HOME,  # neither the caches of the user nor the network decide what a test sees
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    WANDB_MODE="disabled",
    HYPOTHESIS_STORAGE_DIRECTORY=os.path.join(_HOME, "hypothesis"),
)

from flame.runtime import device  # noqa: E402

device.choose()


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)

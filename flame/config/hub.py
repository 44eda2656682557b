"""Whether what a hub id names can be had, here or on the hub, which is asked once and does not wait for an answer."""

import logging
import os
import re
import ssl
import sys
from functools import cache
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import Literal
from urllib.error import HTTPError
from urllib.request import Request, getproxies, urlopen

from huggingface_hub import constants

from flame.config.paths import BUILDERS, check_path, exists
from flame.errors import UserError

Repo = Literal["model", "dataset"]
TIMEOUT = 5.0  # seconds, in which a hub that can be reached answers
ABSENT = (401, 403, 404)  # HTTP status of a name that the hub does not have, or does not show to everybody

logger = logging.getLogger("flame")
_unreachable: list[str] = []  # why the hub is not asked again in this process


def check_available(setting: str, name: str, repo: Repo) -> None:
    """Raises UserError if a path does not exist, or a hub id is not in the cache and the hub cannot be asked for it.

    A hub that cannot be reached is not asked again in this process: what is in the cache is used.
    """
    check_path(setting, name)
    if exists(name) or "://" in name or name in BUILDERS:
        return
    offline = repo == "dataset" and os.environ.get("HF_DATASETS_OFFLINE", "0") != "0"
    offline = offline or (constants.HF_HUB_OFFLINE and not _unreachable)
    if offline or _unreachable:
        status, reason = 0, "".join(_unreachable)
    else:
        status, reason = _ask(f"{constants.ENDPOINT}/api/{repo}s/{name}")
    if _is_cached(name, repo):
        if not status and not offline and not _unreachable:
            _unreachable.append(reason)
            logger.warning(f"{constants.ENDPOINT} cannot be reached ({reason}); the cache of {name} is used")
            constants.HF_HUB_OFFLINE = True
        return
    owner, _, rest = name.partition("/")
    if (not rest or os.path.isdir(owner)) and (not status or status in ABSENT):  # rather a path than an id
        hint = f"{constants.ENDPOINT} has none either; its ids are OWNER/NAME" if status else ""
        raise UserError(setting, f"no file or folder {name}", hint=hint)
    if not status:
        why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached: {reason}"
        found = f"{name}, which is not in {constants.HF_HOME}"
        raise UserError(setting, found, hint=f"{why}; {_how_to_fetch(name, repo)}")


def _how_to_fetch(name: str, repo: Repo) -> str:
    download = f"where there is a network, run {Path(sys.executable).with_name('hf')} download"
    if repo == "dataset":
        return f"{download} --repo-type dataset {name} --local-dir FOLDER, and name FOLDER"
    return f"{download} {name}, and set HF_HOME to the folder that it filled"


def _is_cached(name: str, repo: Repo) -> bool:
    if repo == "model":
        return (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots").is_dir()
    cached = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    wanted = name.replace("/", "").replace("_", "").lower()  # datasets keeps OwnerX/MyName as OwnerX___my_name
    return cached.is_dir() and any(path.name.replace("_", "").lower() == wanted for path in cached.iterdir())


@cache
def _ask(url: str) -> tuple[int, str]:
    """The HTTP status of the hub's answer; 0 and the reason if there is none in time."""
    answers: list[tuple[int, str]] = []
    thread = Thread(target=lambda: answers.append(_request(url)), daemon=True)  # a name server has other timeouts
    thread.start()
    thread.join(TIMEOUT)
    return answers[0] if answers else (0, f"no answer in {TIMEOUT:.0f} s")


def _request(url: str) -> tuple[int, str]:
    if "all" in getproxies():  # urllib does not speak SOCKS, huggingface_hub does
        return 200, ""
    try:
        with urlopen(Request(url, method="HEAD"), timeout=TIMEOUT) as answer:
            return answer.status, ""
    except HTTPError as error:
        silent = error.code == 407 or error.code >= 500  # what a proxy says
        return (0, f"HTTP status {error.code}") if silent else (error.code, "")
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # it is there; huggingface_hub may have been given its certificate
            return 200, ""
        return 0, re.sub(r"^\[Errno .*?\] ", "", str(reason)) or type(reason).__name__

from http.server import HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from flame.config import hub
from flame.errors import UserError
from tests.fake_hub import Hub, serve


@pytest.fixture(scope="module")
def address():
    with serve() as address:
        yield address


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path, address):
    """A folder with data/ and an empty cache, online."""
    monkeypatch.chdir(tmp_path)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    Path("data").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_unreachable", [])
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    monkeypatch.setattr(constants, "ENDPOINT", address)
    hub._ask.cache_clear()
    yield
    hub._ask.cache_clear()


def rejected(name, repo="model"):
    with pytest.raises(UserError) as error:
        hub.check_available("--flag", name, repo)
    assert error.value.setting == "--flag" and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name, repo", [("owner/name", "model"), ("gpt2", "model"), ("owner/private", "model"), ("data/known", "dataset")]
)
def test_an_id_that_the_hub_may_have_passes(name, repo):
    hub.check_available("--flag", name, repo)


@pytest.mark.parametrize("name", ["nope", "data/mine"])
def test_a_name_that_is_rather_a_path_is_said_not_to_be_there(name):
    for _ in range(2):
        assert f"no file or folder {name}" in rejected(name, "dataset")
        constants.HF_HUB_OFFLINE = True


def test_without_a_network_what_is_not_in_the_cache_is_rejected_with_how_to_fetch_it(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for offline in ("cannot be reached", "HF_HUB_OFFLINE"):
        assert offline in rejected("owner/name") and "hf download owner/name" in rejected("owner/name")
        assert "download --repo-type dataset owner/name --local-dir" in rejected("owner/name", "dataset")
        assert "no file or folder nope" in rejected("nope")
        constants.HF_HUB_OFFLINE = True
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in rejected("owner/name", "dataset")


def test_a_proxy_that_does_not_reach_the_hub_is_no_hub():
    assert "503" in rejected("owner/broken", "dataset")


def test_without_a_network_what_is_in_the_cache_is_used_without_asking_again(monkeypatch):
    Path("home/hub/models--owner--name/snapshots").mkdir(parents=True)
    Path("home/datasets/HuggingFaceFW___fineweb-edu").mkdir(parents=True)
    Path("home/datasets/Owner___my_name").mkdir()
    hub.check_available("--flag", "owner/name", "model")
    assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.check_available("--flag", "owner/name", "model")
    assert constants.HF_HUB_OFFLINE
    for name in ("HuggingFaceFW/fineweb-edu", "Owner/MyName"):
        hub.check_available("--flag", name, "dataset")
    assert "cannot be reached" in rejected("other/name")  # and not that somebody set HF_HUB_OFFLINE


def test_a_hub_that_does_not_answer_is_waited_for_a_few_seconds_only(monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.2)
    with HTTPServer(("127.0.0.1", 0), Hub) as silent:  # takes connections, and serves none
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.server_port}")
        assert "cannot be reached" in rejected("owner/name")

"""Fixtures: a loopback Hub that the real client talks to, and pico checkpoints made offline."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from loopback_hub import LoopbackHub

# huggingface_hub reads these when it is imported, so they come before every other import.
_HOME = tempfile.TemporaryDirectory(prefix="sage-hub-tests-")
_HUB = LoopbackHub().start()
os.environ.update(
    HF_HOME=_HOME.name,
    HF_ENDPOINT=_HUB.url,
    HF_TOKEN="hf_writer",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_UPDATE_DOWNLOAD_COUNTS="0",
    HF_XET_CACHE=f"{_HOME.name}/xet",
)
for _name in ("GITHUB_ACTIONS", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"):
    os.environ.pop(_name, None)  # the tests of a job are not its results

import pytest  # noqa: E402
import torch  # noqa: E402
from pico import make_pair  # noqa: E402

# On pico models a second thread only waits for the first, and on a busy machine for long.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No sage.yaml of the machine speaks, and nothing is written into the checkout."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _no_time_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that fail are tried again as often as ever, and at once."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    from sage_hub import hub

    monkeypatch.setattr(hub, "WAITS", (0.01,) * len(hub.WAITS))
    hurried = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", hurried)


@pytest.fixture(scope="session")
def _the_hub() -> LoopbackHub:
    """The same, for fixtures that outlive a test."""
    return _HUB


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """The Hub that HF_ENDPOINT names, empty."""
    _HUB.reset()
    yield _HUB
    _HUB.reset()


@pytest.fixture(scope="session")
def _pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    make_pair(folder)
    return folder


@pytest.fixture
def pair(_pair: Path, tmp_path: Path) -> Path:
    """A folder with `base` and `unlearned` (Llama, bfloat16, three shards each) and three sets.

    A copy, so that a test may break it.
    """
    folder = tmp_path / "pair"
    shutil.copytree(_pair, folder)
    return folder

"""Fixtures: a loopback Hub that the real client talks to, and pico checkpoints made offline."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from support.loopback_hub import LoopbackHub

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
    # On pico models a second thread only waits for the first, and on a busy machine for long.
    OMP_NUM_THREADS="1",
)
if not os.environ.get("SAGE_HUB_TEST_DEVICE", "").startswith("cuda"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is tested does not depend on the machine
for _name in ("GITHUB_ACTIONS", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"):
    os.environ.pop(_name, None)  # the tests of a job are not its results

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import is_hypothesis_test, settings  # noqa: E402
from support.pico import make_pair  # noqa: E402
from support.quick import hurry, take_time  # noqa: E402
from support.soak import Figures, Tally  # noqa: E402

from sage_hub.settings import Settings  # noqa: E402

torch.set_num_threads(1)

settings.register_profile("lean", max_examples=40, deadline=None)
settings.register_profile("soak", max_examples=2_000, deadline=None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="try this case of a test alone, of those by seed")
    parser.addoption("--figures", metavar="FILE", help="write what was tried, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("soak" if is_soak(config) else "lean")
    if not hasattr(config, "workerinput"):  # of xdist's processes the first tells
        config.pluginmanager.register(Figures(config.getoption("--figures")))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What holds of any example is tried on many more in the soak."""
    for item in items:
        if is_soak(config) and is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker("soak")


def is_soak(config: pytest.Config) -> bool:
    return bool(config.getoption("markexpr") == "soak")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No sage.yaml of the machine speaks, and nothing is written into the checkout."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session", autouse=True)
def _hurried() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch.setattr)
        yield


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn; see support/quick.py."""
    take_time(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def _no_time_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that fail are tried again as often as ever, and at once."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    from sage_hub.hub import client as hub

    monkeypatch.setattr(hub, "WAITS", (0.01,) * len(hub.WAITS))
    hurried = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", hurried)


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Where a test counts what it tries, for the table at the end."""
    own = Tally(request.config.getoption("--seed"))
    yield own
    request.node.user_properties.append(("tally", own.told()))


@pytest.fixture(scope="session")
def _the_hub() -> LoopbackHub:
    """The same, for fixtures that outlive a test."""
    return _HUB


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """The Hub that HF_ENDPOINT names, empty; the machine has seen nothing of an earlier one."""
    for kept in ("hub", "sage-hub"):
        for path in Path(_HOME.name, kept).glob("*"):
            if path.name != "shapes":
                shutil.rmtree(path, ignore_errors=True)
    _HUB.reset()
    yield _HUB
    _HUB.reset()


@pytest.fixture(autouse=True)
def _untaught(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of nearly all tests are random: they know nothing that could be lost.

    So without a forget set the gain is 1 there, as if it were given; but in tests marked `taught`.
    """
    rule = Settings.gain_rule.fget
    assert rule is not None
    if request.node.get_closest_marker("taught") is None:
        known = property(lambda own: "number" if rule(own) == "keep" else rule(own))
        monkeypatch.setattr(Settings, "gain_rule", known)


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


@pytest.fixture
def on_hub(hub: LoopbackHub, pair: Path) -> LoopbackHub:
    """The Hub with both sides of the pair on it."""
    for side in ("base", "unlearned"):
        hub.add_repo(f"org/{side}", pair / side)
    return hub


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, also where the tests run in the background: what is started there ignores
    it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

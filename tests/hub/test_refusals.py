"""What the Hub refuses is told in its own words, and what cannot be a token never reaches it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from support.loopback_hub import LoopbackHub
from support.loopback_hub.messages import HubError

from sage_hub.cli.main import main
from sage_hub.hub.client import ask
from sage_hub.publish.target import Publication

FULL = "Storage limit reached for org: delete some repos, or get more storage"
MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"


def refuse(message: str, status: int = 403) -> object:
    def answer() -> None:
        raise HubError(status, message)

    return answer


def push(pair: Path, *options: str) -> int:
    both = ["push", "org/base", "org/unlearned", "--to", "org/out", "--yes", "--quiet"]
    return main([*both, "--retain", str(pair / "retain.jsonl"), *options])


@pytest.mark.parametrize(
    "method, path",
    [
        ("POST", "/api/repos/create"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("PUT", "/lfs/"),
        ("POST", "/commit/"),
    ],
)
def test_a_refusal_is_told_in_the_hubs_words(
    method: str,
    path: str,
    on_hub: LoopbackHub,
    pair: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on_hub.disturb(method, path, refuse(FULL))  # type: ignore[arg-type]
    assert push(pair) == 11
    said = capsys.readouterr().err
    assert f"The Hub refuses this with org/out (403) and says: {FULL}. If that is" in said
    assert push(pair) == 0  # once it is mended, what was made is used


def refusal(content: bytes, headers: dict[str, str], status: int = 403) -> str:
    """What is said of such an answer."""
    import httpx2
    from huggingface_hub.utils import hf_raise_for_status

    request = httpx2.Request("PUT", "https://storage/x")
    response = httpx2.Response(status, content=content, headers=headers, request=request)

    def call() -> None:
        hf_raise_for_status(response)

    with pytest.raises(Exception, match=str(status)) as raised:
        ask("org/x", call)
    assert not isinstance(raised.value, HfHubHTTPError)
    return str(raised.value)


TOKEN = "The token may not do this with org/x (403): use one with access to it"


@pytest.mark.parametrize(
    "content, headers, says",
    [
        (b"", {}, TOKEN),
        (b"<html><body>403</body></html>", {"Content-Type": "text/html"}, TOKEN),
        (b'{"error": "Too many repos today."}', {}, "says: Too many repos today. If that is"),
        (b'{"message": "Over the quota"}', {}, "says: Over the quota. If"),  # of LFS
        (b"", {"X-Error-Message": "Over the quota"}, "says: Over the quota. If"),
        (
            b'<?xml version="1.0"?>\n<Error><Code>X</Code><Message>It expired</Message></Error>',
            {"Content-Type": "application/xml"},
            "says: It expired. If",
        ),
    ],
)
def test_the_reason_is_found_wherever_it_is(
    content: bytes, headers: dict[str, str], says: str
) -> None:
    assert says in refusal(content, headers)


@pytest.mark.parametrize("status", [400, 402, 413, 451])
def test_the_same_of_other_refusals(status: int) -> None:
    said = refusal(b'{"error": "Over the quota"}', {}, status)
    assert said == f"The Hub answered {status} about org/x: Over the quota"


def test_files_that_are_refused_one_by_one(
    on_hub: LoopbackHub,
    pair: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import _commit_api

    def batch(*_: object, **__: object) -> object:
        return [], [{"oid": "0" * 64, "error": {"code": 403, "message": FULL}}], None

    monkeypatch.setattr(_commit_api, "post_lfs_batch_info", batch)
    assert push(pair) == 24
    assert FULL in capsys.readouterr().err


# Tokens


@pytest.mark.parametrize("token", ["hf_writer\n", " hf_writer", "\thf_writer\r\n"])
@pytest.mark.parametrize("place", ["--token", "HF_TOKEN", "SAGE_HUB_WRITE_TOKEN", "file"])
def test_blanks_around_a_token_do_not_matter(
    place: str, token: str, on_hub: LoopbackHub, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert push(pair, *given(place, token, monkeypatch), "--dry-run") == 0


@pytest.mark.parametrize(
    "token", [f"{MARK}hf_secret", "hf_sécret", "hf_sec\nret", "hf_sec ret", "hf_secret\0x"]
)
@pytest.mark.parametrize("place", ["--token", "HF_TOKEN", "SAGE_HUB_WRITE_TOKEN", "file"])
def test_what_cannot_be_a_token_is_refused_at_once_and_never_shown(
    place: str,
    token: str,
    on_hub: LoopbackHub,
    pair: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "\0" in token and place.isupper():
        pytest.skip("no system takes it as a variable")
    if "\n" in token and place in ("HF_TOKEN", "file"):
        pytest.skip("huggingface_hub takes newlines out")
    assert push(pair, *given(place, token, monkeypatch)) == 11
    said = capsys.readouterr()
    assert "The token holds a character that no token has" in said.err
    assert "sec" not in said.err + said.out
    assert not [r for r in on_hub.requests if "sec" in r.headers.get("authorization", "")]


def given(place: str, token: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have `token` where it may be; the options for it."""
    if place == "--token":
        return [place, token]
    if place == "file":
        monkeypatch.delenv("HF_TOKEN")
        path = Path("token").resolve()
        path.write_text(token, encoding="utf-8")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(path))
    else:
        monkeypatch.setenv(place, token)
    return []


def test_a_token_file_of_another_encoding(
    on_hub: LoopbackHub, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given("file", "", monkeypatch)
    Path("token").write_bytes("hf_writer\r\n".encode("utf-16"))
    assert push(pair) == 11


def test_an_empty_token_is_none() -> None:
    assert Publication(token=" \n").token is None


def test_a_mirror_that_does_not_name_commits(
    on_hub: LoopbackHub,
    pair: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HUGGINGFACE_HEADER_X_REPO_COMMIT", "X-Nothing")
    assert push(pair) == 25
    said = capsys.readouterr().err
    assert f"{HfApi().endpoint} answers about org/base without saying of which commit" in said
    assert re.search("no full mirror of the Hub; set HF_ENDPOINT", said)

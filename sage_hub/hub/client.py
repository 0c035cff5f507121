"""Asking the Hugging Face Hub: what may pass is tried again, and what it refuses is explained."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from json import JSONDecodeError
from typing import Any, TypeVar

from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import parse_ratelimit_headers
from huggingface_hub.utils._auth import _get_token_from_environment, _get_token_from_file
from huggingface_hub.utils._http import default_client_factory

from sage_hub.errors import (
    AccessError,
    CorruptCheckpointError,
    NetworkError,
    NotFoundError,
    SageHubError,
    UsageError,
    first_line,
)

T = TypeVar("T")

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"

WAITS = (1, 2, 4, 8, 16, 30)  # seconds between one try of a request and the next
FIRST_CONTACT = 5  # seconds in which anybody must be there, where no work could be lost
LONGEST_WAIT = 600  # seconds that the Hub may ask us to stay away; its rate limits reset in 300
SILENCE = 60  # seconds without a sign of life after which a request has failed
PASSING = frozenset((408, 425, 429, 500, 502, 503, 504))  # statuses that another try may change

UNCONNECTED = ("ConnectError", "ConnectTimeout")  # of httpx: no name, no way, or nobody listens

XET_STATUS = re.compile(r"HTTP status \w+ error \((\d+)")  # in what hf_xet says

log = logging.getLogger(__name__)


class DamagedError(Exception):
    """What came is not what the Hub has, by the Hub's own hash of it."""


def ask(repo: str, call: Callable[[], T], revision: str | None = None, *, first: bool = False) -> T:
    """The result of `call`, which asks the Hub about `repo`.

    What may pass (a server error, a rate limit, a time-out, a broken connection, a damaged
    download) is tried again after each of WAITS, or when the Hub says. Raises one of our errors
    for what huggingface_hub raises, at once where another try changes nothing; for what is asked
    `first`, before any work, that is also where no connection can be made for FIRST_CONTACT.
    """
    begun = time.monotonic()
    tries = 0
    while True:
        tries += 1
        try:
            return call()
        except Exception as error:
            pause = wait_before_next(error, tries)
            seconds = time.monotonic() - begun
            alone = first and type(error).__name__ in UNCONNECTED
            if pause is None or (alone and seconds + pause > FIRST_CONTACT):
                explained = explain(error, repo, revision, tries=tries, seconds=seconds)
                if explained is None:
                    raise
                raise explained from None
            hint = "." if tries > 1 else _as_folder(repo)
            log.warning("%s; trying again in %.0f s%s", _what_passed(error, repo), pause, hint)
        time.sleep(pause)


def _as_folder(repo: str) -> str:
    """The end of a sentence, with a hint for what may be meant as a folder: a name alone."""
    return "." if "/" in repo else f". (A folder is written ./{repo}.)"


def _copy_of(repo: str) -> str:
    """What may stand for `repo` where there is no Hub."""
    return "file" if repo.startswith("dataset ") else "folder"


def wait_before_next(error: BaseException, tries: int) -> float | None:
    """Seconds until a request that failed so often is tried again; None if it is not."""
    if tries > len(WAITS) or not may_pass(error) or type(error) is ConnectionError:
        return None  # the last is how hf_xet ends, after minutes of trying by itself
    response = _response(error)
    asked = _seconds_asked_for(response.headers) if response is not None else 0.0
    return None if asked > LONGEST_WAIT else max(WAITS[tries - 1], asked)


def may_pass(error: BaseException) -> bool:
    """Whether another try may go well."""
    if isinstance(error, (OfflineModeIsEnabled, SafetensorsParsingError, SageHubError)):
        return False
    status = status_of(error)
    if status is not None:
        return status in PASSING
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError, JSONDecodeError, DamagedError)):
        return True
    if type(error) is OSError and error.errno is None:
        return True  # how huggingface_hub says that a download came out too short
    # A library's own wrapping of one of these.
    return error.__cause__ is not None and may_pass(error.__cause__)


def status_of(error: BaseException) -> int | None:
    """The status that the Hub answered with, if it did answer."""
    if (response := _response(error)) is not None:
        status: int = response.status_code
        return status
    told = XET_STATUS.search(str(error)) if type(error) is ConnectionError else None
    return int(told[1]) if told else None


def _response(error: BaseException | None) -> Any:
    """The Hub's answer in an error, or in what led to it."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response
        error = error.__cause__
    return None


def _seconds_asked_for(headers: Any) -> float:
    """What Retry-After, or the Hub's own rate limit header, says."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    text = headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        then = parsedate_to_datetime(text).astimezone(timezone.utc)
    except ValueError:
        return 0.0
    return max(0.0, (then - datetime.now(timezone.utc)).total_seconds())


def _what_passed(error: BaseException, repo: str) -> str:
    status = status_of(error)
    if status is not None:
        return f"The Hub answered {status} about {repo}"
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, DamagedError):
        return f"A download from {repo} is damaged ({error})"
    return f"The Hub did not answer about {repo} ({type(error).__name__})"


def explain(
    error: BaseException,
    repo: str,
    revision: str | None = None,
    *,
    tries: int = 1,
    seconds: float = 0.0,
) -> SageHubError | None:
    """What huggingface_hub raised about `repo`, as one of our errors; None if it is none of that.

    `tries` and `seconds` say how often and how long it was tried.
    """
    if isinstance(error, SageHubError):
        return None
    if may_pass(error):
        often = f", {tries} times in {seconds:.0f} s" if tries > 1 else ""
        return _explain_what_may_pass(error, repo, often)
    if isinstance(error, GatedRepoError):
        return AccessError(
            f"{repo} is gated: accept its conditions on its Hub page, then {LOG_IN}."
        )
    if isinstance(error, RevisionNotFoundError):
        return NotFoundError(
            f"{repo} has no revision {revision!r}; give a branch, tag or commit that exists."
        )
    if isinstance(error, RepositoryNotFoundError):
        return NotFoundError(
            f"{repo} does not exist on the Hub, or is private: check the name, or {LOG_IN} "
            f"with access to it. (A folder is written ./{repo.rpartition('/')[2]}.)"
        )
    if isinstance(error, FileMetadataError) or isinstance(error.__cause__, FileMetadataError):
        return NetworkError(
            f"{constants.ENDPOINT} answers about {repo} without saying of which commit "
            "(X-Repo-Commit), so it is no full mirror of the Hub; set HF_ENDPOINT to one that is, "
            "or download the repo and give its folder."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return NetworkError(
            f"{repo} is on the Hub, and HF_HUB_OFFLINE forbids to ask it; unset that, or give a "
            f"{_copy_of(repo)} of this machine instead{_as_folder(repo)}"
        )
    if isinstance(error, LocalEntryNotFoundError):
        if status_of(error) is not None:
            return _explain_answer(error.__cause__ or error, repo)
        return NetworkError(
            f"{repo} is not in the local cache and the Hub cannot be reached; "
            f"check the network, HF_ENDPOINT and HF_HUB_OFFLINE{_as_folder(repo)}"
        )
    if isinstance(error, EntryNotFoundError):
        return NotFoundError(f"A file is missing from {repo}: {first_line(error)}")
    if isinstance(error, LocalTokenNotFoundError):
        return AccessError(f"{repo} needs a token: {LOG_IN}.")
    if isinstance(error, OIDCError):
        return AccessError(f"No token for {repo} from this CI's identity: {first_line(error)}")
    if isinstance(error, HFValidationError):
        return UsageError(f"{repo!r} is not a valid repo name: {first_line(error)}")
    return _explain_answer(error, repo) if status_of(error) is not None else None


def _explain_what_may_pass(error: BaseException, repo: str, often: str) -> SageHubError:
    """What was tried in vain, `often` being how many times."""
    said = _what_passed(error, repo)
    if isinstance(error, DamagedError):
        return CorruptCheckpointError(f"{said}{often}; run the same command again.")
    again = "check the network and HF_ENDPOINT, and run the same command again"
    again += _as_folder(repo)
    if type(error).__name__ in UNCONNECTED:
        return NetworkError(
            f"{repo} cannot be reached: no connection to {constants.ENDPOINT}{often} ("
            f"{first_line(error)}); give a {_copy_of(repo)} of this machine instead, or {again}"
        )
    if status_of(error) is None:
        return NetworkError(f"{said}{often}; {again}")
    response = _response(error)
    asked = _seconds_asked_for(response.headers) if response is not None else 0.0
    if asked > LONGEST_WAIT:
        often += f", and asks to wait {asked:.0f} s"
    return NetworkError(f"{said}{often}; run the same command again later.")


def _explain_answer(error: BaseException, repo: str) -> SageHubError:
    status, response = status_of(error), _response(error)
    reason = _reason(error)
    said = reason or first_line(error)
    if response is not None and response.request.url.path == "/oauth/token":
        return AccessError(
            f"The Hub gives this CI job no token for HF_OIDC_RESOURCE ({said}): add the workflow "
            "to the trusted publishers in that repo's settings."
        )
    if status == 401:
        return AccessError(f"The Hub refused the token for {repo} (401): {LOG_IN}.")
    other = "use one with access to it, with write permission if it is the target."
    if status == 403 and not reason:
        return AccessError(f"The token may not do this with {repo} (403): {other}")
    if status == 403:
        return AccessError(
            f"The Hub refuses this with {repo} (403) and says: {reason.rstrip('.')}. If that is "
            f"the token's fault, {other}"
        )
    return NetworkError(f"The Hub answered {status} about {repo}: {said}")


def _reason(error: BaseException) -> str:
    """What the Hub itself says in its answer, on one line, be it in a header or in the body."""
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    said = getattr(cause, "server_message", None)
    if said is None and (response := _response(cause)) is not None:
        with suppress(ValueError, AttributeError, RuntimeError):  # no JSON, no mapping, not read
            said = response.json().get("message")  # as LFS has it
    text = str(said or "")
    storage = re.search(r"<Message>(.+?)</Message>", text, re.DOTALL)  # as S3 has it
    lines = (storage[1] if storage else text).strip().splitlines()
    return lines[0] if lines else ""


def usable_token(text: str) -> str:
    """The token without blanks around it. Raises AccessError for what no token can be."""
    token = text.strip()
    if not all("!" <= character <= "~" for character in token):
        raise AccessError(
            "The token holds a character that no token has, as a blank or a byte order mark; copy "
            "it once more, into a file or variable of plain ASCII."
        )
    return token


def check_usual_token() -> None:
    """Raise AccessError if the token of the environment, or of `hf auth login`, cannot be one."""
    try:
        usable_token(_get_token_from_environment() or _get_token_from_file() or "")
    except UnicodeDecodeError:
        usable_token("\0")


def explain_any(error: BaseException | None, repo: str) -> SageHubError | None:
    """The same of what a library has made another error of, without saying so."""
    while error is not None:
        if (explained := explain(error, repo)) is not None:
            return explained
        error = error.__cause__ or error.__context__
    return None


def reading_token() -> str | None:
    """The token to read sources with; None leaves it to huggingface_hub.

    Of its own accord that takes the token of a trusted publisher (HF_OIDC_RESOURCE) for
    everything. Such a token is for the one repo that it may write, so HF_TOKEN reads. Raises
    AccessError if what huggingface_hub would take cannot be a token.
    """
    check_usual_token()
    publishes = "/" in os.environ.get("HF_OIDC_RESOURCE", "")
    return os.environ.get("HF_TOKEN", "").strip() or None if publishes else None


def limit_silence() -> None:
    """Have requests of this process fail after SILENCE seconds without a sign of life.

    Of its own accord huggingface_hub waits for most answers as long as it takes.
    """

    def limited(request: Any) -> None:
        limits = request.extensions.get("timeout", {})
        phases = ("connect", "read", "write", "pool")
        limits = {phase: min(limits.get(phase) or SILENCE, SILENCE) for phase in phases}
        request.extensions = {**request.extensions, "timeout": limits}

    def client() -> Any:
        made = default_client_factory()
        made.event_hooks = {"request": [*made.event_hooks["request"], limited]}
        return made

    set_client_factory(client)

"""A release announced where its source is: `new_version` in that card, by a pull request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from sage_hub.checkpoint.files import Files, is_lfs_pointer
from sage_hub.checkpoint.hubfiles import HubFiles
from sage_hub.checkpoint.yamls import TextLoader
from sage_hub.errors import AccessError, SageHubError, UsageError
from sage_hub.hub.client import ask
from sage_hub.publish.target import (
    Publication,
    access_token,
    by_identity,
    find_head,
    open_pull_request,
)
from sage_hub.record.release import Release

CARD = "README.md"
FIELD = "new_version"
LEAVE = "leave --announce away"


def check_announcement(source: Files, release: str, how: Publication) -> None:
    """Raise UsageError or AccessError if `release` cannot be announced on the repo of `source`."""
    where = source.location
    if where.folder is not None:
        raise UsageError(
            "--announce is for an unlearned model on the Hub, and here it is a folder; "
            f"{LEAVE}, or pass its repo."
        )
    if where.below:
        raise UsageError(
            f"--announce speaks for all of {where.repo}, and the unlearned model is one of its "
            f"folders; {LEAVE}."
        )
    if where.repo == release:
        raise UsageError(f"--announce: {release} is the unlearned model's own repo; {LEAVE}.")
    if by_identity(how):
        raise AccessError(
            "--announce: a trusted publisher may write its target alone; give a token that may "
            f"open a pull request on {where.repo} in SAGE_HUB_WRITE_TOKEN."
        )
    _check_may_propose(where.repo, ask(where.repo, lambda: how.api.whoami()))
    target = find_head(release, how).files
    if not source.private and (how.private or (target is not None and target.private)):
        raise UsageError(
            f"--announce would show the name of {release}, which is private, on {where.repo}, "
            f"which is not; {LEAVE}."
        )
    _proposal(where.repo, release, how)
    open_pull_request(where.repo, _titled(release, how))  # that it has pull requests at all


def announced(done: Release, source: str, release: str, how: Publication) -> Release:
    """`done`, announced on the repo `source`.

    Raises whatever keeps it from that, with the release, which is published all the same.
    """
    try:
        url = _announce(source, release, how)
    except SageHubError as error:
        failure = type(error)(
            f"{str(error).rstrip('.')}. The release is published, {done.location}, and only its "
            f"announcement on {source} failed; the same command tries that again."
        )
        failure.release = done
        raise failure from None
    return replace(done, announced=url)


def _announce(source: str, release: str, how: Publication) -> str:
    """The URL of the pull request, or of the card where that says it already."""
    titled, api = _titled(release, how), how.api

    def propose() -> str:
        # An answer that was lost may have been that it was opened.
        if (number := open_pull_request(source, titled)) is not None:
            return f"{api.endpoint}/{source}/discussions/{number}"
        files, card = _proposal(source, release, how)
        if card is None:
            return f"{api.endpoint}/{source}"
        made = api.create_commit(
            source,
            [CommitOperationAdd(CARD, card.encode())],
            commit_message=titled.title,
            commit_description=(
                f"{release} is this model, repaired: what unlearning has damaged beside its "
                "target is back. Its card shows how much, and what was measured. With this line "
                "the Hub shows it on this page."
            ),
            parent_commit=files.commit,
            create_pr=True,
        )
        return str(made.pr_url)

    return ask(source, propose)


def _titled(release: str, how: Publication) -> Publication:
    return replace(how, message=f"New version: {release}")


def _check_may_propose(repo: str, who: Mapping[str, Any]) -> None:
    token = access_token(who)
    fine = token.get("fineGrained")
    scopes = [] if fine is None else fine.get("scoped", ())
    granted = {"discussion.write"} if fine is None else {*fine.get("global", ())}
    for scope in scopes:
        if scope.get("entity", {}).get("name") in (repo, repo.partition("/")[0]):
            granted |= {*scope.get("permissions", ())}
    if token.get("role") == "read" or not granted & {"discussion.write", "repo.write"}:
        raise AccessError(
            f"--announce: the token of {who['name']} may open no pull request on {repo}; use one "
            f"that may, or {LEAVE}."
        )


def _proposal(repo: str, release: str, how: Publication) -> tuple[HubFiles, str | None]:
    """The files of `repo`, and its card with the release in it; None if it has that already."""
    files = HubFiles(repo, api=how.api)
    raw = files.path(CARD).read_bytes() if CARD in files.sizes else b""
    try:
        if is_lfs_pointer(raw):
            raise ValueError("a Git LFS pointer")
        card = raw.decode("utf-8")
        new = with_field(card, FIELD, release)
    except (ValueError, yaml.YAMLError, RecursionError):
        raise UsageError(
            f"--announce: the metadata of {CARD} of {repo} cannot be changed by a line; {LEAVE}."
        ) from None
    return files, None if new == card else new


def with_field(card: str, name: str, value: str) -> str:
    """`card` with `name: value` in its metadata, and all else as it was.

    Raises ValueError or YAMLError if these are no mapping that a line can be added to.
    """
    line, newline = f"{name}: {value}", "\r\n" if "\r\n" in card else "\n"
    block = REGEX_YAML_BLOCK.search(card)
    if block is None:
        return newline.join(["---", line, "---", "", card] if card else ["---", line, "---", ""])
    before = _mapping(block[2])
    if before.get(name) == value:
        return card
    text, count = re.subn(rf"^{name}:[^\r\n]*", line, block[2], flags=re.MULTILINE)
    if not count:
        text = newline.join([block[2], line]) if block[2].strip() else line
    if _mapping(text) != {**before, name: value}:
        raise ValueError("not a line a field")
    return card[: block.start(2)] + text + card[block.end(2) :]


def _mapping(text: str) -> dict[str, Any]:
    found = yaml.load(text, TextLoader)
    if not isinstance(found, (dict, type(None))):
        raise ValueError("no mapping")
    return found or {}

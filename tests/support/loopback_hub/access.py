"""Which repo a call is about, and what its caller may do there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.loopback_hub.messages import Call, HubError
from support.loopback_hub.repos import Repo

if TYPE_CHECKING:
    from support.loopback_hub.hub import LoopbackHub


def visible(hub: LoopbackHub, call: Call) -> Repo:
    """The repo that a call is about. What is hidden from the caller looks like what is missing."""
    kind = "dataset" if call["kind"] == "datasets" else "model"
    repo = hub.repos.get((kind, call["repo"]))
    if repo is None or (repo.private and not call.owns(repo)):
        raise HubError(404 if call.user else 401, "Repository not found", "RepoNotFound")
    return repo


def downloadable(hub: LoopbackHub, call: Call) -> Repo:
    """As on the real Hub, gating closes the files of a repo but not its listings."""
    repo = visible(hub, call)
    if repo.gated and not call.owns(repo):
        text = f"Access to {repo.kind} {repo.id} is restricted"
        raise HubError(403 if call.user else 401, text, "GatedRepo")
    return repo


def writable(hub: LoopbackHub, call: Call, *, by_pull_request: bool = False) -> Repo:
    """Anyone with a write token may propose a change; only owners may make one."""
    repo = visible(hub, call)
    proposed = by_pull_request or repo.authored(call.parts.get("rev", ""), call.user)
    call.require_writer(repo.id, anyone=proposed)
    return repo

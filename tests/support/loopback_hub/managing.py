"""Routes: repos are made and deleted, branches and tags made, pull requests listed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import yaml

from support.loopback_hub.access import visible, writable
from support.loopback_hub.messages import API, REV, Call, HubError, Json, Response, Routes, as_json
from support.loopback_hub.repos import EPOCH

if TYPE_CHECKING:
    from support.loopback_hub.hub import LoopbackHub


def _named_repo(call: Call) -> tuple[str, str, Json]:
    asked = call.body.json()
    namespace = asked.get("organization") or (call.user.name if call.user else "")
    repo_id = f"{namespace}/{asked['name']}"
    call.require_writer(repo_id)
    return asked.get("type", "model"), repo_id, asked


def create_repo(hub: LoopbackHub, call: Call) -> Response:
    kind, repo_id, asked = _named_repo(call)
    with hub.lock:
        if old := hub.repos.get((kind, repo_id)):
            # With `exist_ok=True` the client goes on, and wants the url.
            text = f"You already created this {kind} repo"
            return as_json({"error": text, "url": f"{hub.url}/{old.path}"}, 409)
        repo = hub.new_repo(kind, repo_id, private=asked.get("visibility") == "private")
    return as_json({"url": f"{hub.url}/{repo.path}", "name": repo.id})


def delete_repo(hub: LoopbackHub, call: Call) -> Response:
    kind, repo_id, _ = _named_repo(call)
    if hub.repos.pop((kind, repo_id), None) is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    return Response()


def create_branch(hub: LoopbackHub, call: Call) -> Response:
    repo, ref = writable(hub, call), f"refs/heads/{call['rev']}"
    if ref in repo.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    repo.refs[ref] = repo.at(call.body.json().get("startingPoint", "main")).sha
    return Response(201)


def create_tag(hub: LoopbackHub, call: Call) -> Response:
    repo, ref = writable(hub, call), f"refs/tags/{call.body.json()['tag']}"
    if ref in repo.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    repo.refs[ref] = repo.at(call["rev"]).sha
    return Response(201)


def discussions(hub: LoopbackHub, call: Call) -> Response:
    """One page of the pull requests; nobody discusses here."""
    repo, per_page, page = visible(hub, call), 2, int(call.query.get("p", 0))
    rows = [
        {
            "num": pr.num,
            "title": pr.title,
            "author": {"name": pr.author},
            "createdAt": f"{EPOCH:%Y-%m-%dT%H:%M:%S.000Z}",
            "status": pr.status,
            "repo": {"name": repo.id, "type": repo.kind},
            "isPullRequest": True,
        }
        for pr in repo.pull_requests
        if call.query.get("status") in (None, pr.status)
        and call.query.get("author") in (None, pr.author)
    ]
    shown = rows[page * per_page :][:per_page]
    return as_json({"count": len(rows), "start": page * per_page, "discussions": shown})


def validate_yaml(hub: LoopbackHub, call: Call) -> Response:
    """Is the front matter of a README a YAML mapping? The real Hub also checks its fields."""
    content = call.body.json()["content"]
    front_matter = re.match(r"---\n(.*?)^---", content, re.DOTALL | re.MULTILINE)
    try:
        dict(yaml.safe_load(front_matter[1]) or {} if front_matter else {})
    except (yaml.YAMLError, TypeError, ValueError) as error:
        return as_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return as_json({"errors": [], "warnings": []})


ROUTES: Routes = (
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", "/api/repos/create", create_repo),
    ("DELETE", "/api/repos/delete", delete_repo),
    ("GET", f"{API}/discussions", discussions),
    ("POST", f"{API}/tag{REV}", create_tag),
    ("POST", f"{API}/branch{REV}", create_branch),
)

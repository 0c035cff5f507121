"""Routes: what a repo holds, and its files."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from support.loopback_hub.access import downloadable, visible
from support.loopback_hub.messages import (
    API,
    PAGE,
    REV,
    Call,
    HubError,
    Json,
    Response,
    Routes,
    as_json,
)
from support.loopback_hub.repos import Blob, Commit, git_oid
from support.loopback_hub.storage import send_file

if TYPE_CHECKING:
    from support.loopback_hub.hub import LoopbackHub


def repo_info(hub: LoopbackHub, call: Call) -> Response:
    repo = visible(hub, call)
    commit = repo.at(call["rev"] or "main")
    names = {"_id": git_oid(repo.path.encode()), "id": repo.id, "author": repo.id.split("/")[0]}
    state = {"sha": commit.sha, "lastModified": commit.date, "tags": [], "downloads": 0}
    access = {"private": repo.private, "gated": "manual" if repo.gated else False}
    siblings = [
        {"rfilename": path, **(_blob_fields(blob) if call.flag("blobs") else {})}
        for path, blob in sorted(commit.files.items())
    ]
    return as_json({**names, **state, **access, "siblings": siblings})


def _blob_fields(blob: Blob) -> Json:
    """What listings say of a blob. Repo info and trees name some of it differently: say both."""
    fields: Json = {"oid": blob.oid, "blobId": blob.oid, "size": blob.size}
    if blob.sha256:
        sizes = {"size": blob.size, "pointerSize": blob.pointer_size}
        fields["lfs"] = {"oid": blob.sha256, "sha256": blob.sha256, **sizes}
    if blob.xet_hash:
        fields["xetHash"] = blob.xet_hash
    return fields


def _entries(commit: Commit) -> list[Json]:
    """Every file and folder of a commit."""
    folders = {str(f) for path in commit.files for f in PurePosixPath(path).parents} - {"."}
    rows: list[Json] = [
        {"type": "directory", "path": f, "oid": git_oid(f.encode()), "size": 0} for f in folders
    ]
    rows += ({"type": "file", "path": p, **_blob_fields(b)} for p, b in commit.files.items())
    return sorted(rows, key=lambda row: str(row["path"]))


def tree(hub: LoopbackHub, call: Call) -> Response:
    folder = PurePosixPath(call["path"])
    rows = _entries(visible(hub, call).at(call["rev"]))
    rows = [row for row in rows if folder in PurePosixPath(row["path"]).parents]
    if call["path"] and not rows:
        raise HubError(404, f"{folder} does not exist at {call['rev']}", "EntryNotFound")
    if not call.flag("recursive"):
        rows = [row for row in rows if PurePosixPath(row["path"]).parent == folder]
    return as_json(rows)


def paths_info(hub: LoopbackHub, call: Call) -> Response:
    commit = visible(hub, call).at(call["rev"])
    asked = parse_qs(call.body.read().decode()).get("paths", [])
    return as_json([row for row in _entries(commit) if row["path"] in asked])


def refs(hub: LoopbackHub, call: Call) -> Response:
    rows = [
        {"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": sha}
        for ref, sha in visible(hub, call).refs.items()
    ]

    def under(kind: str) -> list[Json]:
        return [row for row in rows if row["ref"].startswith(f"refs/{kind}/")]

    listed = {"pullRequests": under("pr")} if call.flag("include_prs") else {}
    return as_json({"branches": under("heads"), "converts": [], "tags": under("tags"), **listed})


def resolve(hub: LoopbackHub, call: Call) -> Response:
    repo = downloadable(hub, call)
    commit = repo.at(call["rev"])
    blob = commit.files.get(call["path"])
    headers = {"X-Repo-Commit": commit.sha}
    if blob is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    headers["ETag"] = f'"{blob.sha256 or blob.oid}"'
    if blob.sha256 is None:
        return send_file(call, blob, headers)
    headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(blob.size)}
    headers["Location"] = f"{hub.storage_url}/lfs/{blob.sha256}"
    if blob.xet_hash:
        auth = f"{hub.url}/api/{repo.kind}s/{repo.id}/xet-read-token/{commit.sha}"
        headers |= {"X-Xet-Hash": blob.xet_hash, "Link": f'<{auth}>; rel="xet-auth"'}
    return Response(302, headers)


ROUTES: Routes = (
    ("GET", f"{API}(?:/revision{REV})?", repo_info),
    ("GET", f"{API}/tree{REV}(?:/(?P<path>.+))?", tree),
    ("POST", f"{API}/paths-info{REV}", paths_info),
    ("GET", f"{API}/refs", refs),
    ("GET", f"{PAGE}/resolve{REV}/(?P<path>.+)", resolve),
)

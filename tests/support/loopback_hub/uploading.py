"""Routes: how files are to come, by LFS or by Xet, before a commit names them."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from support.loopback_hub.access import downloadable, writable
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
from support.loopback_hub.repos import is_lfs
from support.loopback_hub.xet import XetStores

if TYPE_CHECKING:
    from support.loopback_hub.hub import LoopbackHub


def preupload(hub: LoopbackHub, call: Call) -> Response:
    repo = writable(hub, call, by_pull_request=call.flag("create_pr"))
    present = repo.at(call["rev"]).files
    asked = call.body.json()
    committed = present[".gitignore"].read().decode() if ".gitignore" in present else ""
    rules = [rule for rule in asked.get("gitIgnore", committed).splitlines() if rule]

    def verdict(path: str, size: int) -> Json:
        ignored = any(fnmatch(p, rule) for p in (path, PurePosixPath(path).name) for rule in rules)
        mode = "lfs" if is_lfs(path, size) else "regular"
        blob = present.get(path)
        known = {"oid": blob.sha256 or blob.oid} if blob else {}
        return {"path": path, "uploadMode": mode, "shouldIgnore": ignored, **known}

    return as_json({"files": [verdict(file["path"], file["size"]) for file in asked["files"]]})


def lfs_batch(hub: LoopbackHub, call: Call) -> Response:
    asked = call.body.json()
    # What opens a pull request names no ref, and what goes on with one names its own.
    rev = asked.get("ref", {}).get("name", "")
    call = replace(call, parts={**call.parts, "rev": rev})
    repo = writable(hub, call, by_pull_request=not rev)
    verify = {"href": f"{hub.url}/{repo.path}.git/info/lfs/verify"}

    def instructions(oid: str, size: int) -> Json:
        if oid in repo.lfs:
            return {"oid": oid, "size": size}  # no actions: nothing to upload
        actions = {"upload": _upload_action(hub, oid, size), "verify": verify}
        return {"oid": oid, "size": size, "actions": actions}

    return as_json({"transfer": "basic", "objects": [instructions(**o) for o in asked["objects"]]})


def _upload_action(hub: LoopbackHub, oid: str, size: int) -> Json:
    href = f"{hub.storage_url}/lfs/{oid}"
    if hub.multipart_threshold is None or size <= hub.multipart_threshold:
        return {"href": href}
    numbers = range(1, -(-size // hub.part_size) + 1)
    parts = {f"{number:05}": f"{href}?part={number}" for number in numbers}
    return {"href": href, "header": {"chunk_size": str(hub.part_size), **parts}}


def lfs_verify(hub: LoopbackHub, call: Call) -> Response:
    repo = writable(hub, call, by_pull_request=True)
    asked = call.body.json()
    path = hub.lfs.path(asked["oid"])
    if not path.is_file() or path.stat().st_size != asked["size"]:
        raise HubError(404, f"LFS object {asked['oid']} was not uploaded")
    repo.lfs[path.name] = hub.lfs_blob(path)
    return Response()


def duplicate_lfs(hub: LoopbackHub, call: Call) -> Response:
    """Make files of this repo known to another, so that a commit there may name them."""
    source, asked = downloadable(hub, call), call.body.json()
    parts = {"kind": f"{asked['target']['type']}s", "repo": asked["target"]["name"]}
    target = writable(hub, replace(call, parts=parts), by_pull_request=True)
    wanted = {file["sha256"] for file in asked["files"]}
    target.lfs.update({oid: source.lfs[oid] for oid in wanted & source.lfs.keys()})
    failed = [{"sha256": oid, "error": "not found"} for oid in wanted - source.lfs.keys()]
    return as_json({"failed": failed})


def xet_write_token(hub: LoopbackHub, call: Call) -> Response:
    repo = writable(hub, call, by_pull_request=call.flag("create_pr"))
    store = _xet_stores(hub).lend()
    repo.xet_uploads.append(store)
    return _xet_token(store)


def xet_read_token(hub: LoopbackHub, call: Call) -> Response:
    commit = downloadable(hub, call).at(call["rev"])
    return _xet_token(_xet_stores(hub).lend(commit.files.values()))


def _xet_stores(hub: LoopbackHub) -> XetStores:
    if hub.xet is None:
        raise HubError(404, "This loopback Hub runs without Xet: set HF_HUB_DISABLE_XET=1")
    return hub.xet


def _xet_token(store: Path) -> Response:
    """In the body for hf_xet, in the headers for huggingface_hub."""
    url, token, expiry = XetStores.access(store).values()
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token}
    headers["X-Xet-Token-Expiration"] = str(expiry)
    return as_json({"casUrl": url, "accessToken": token, "exp": expiry}, headers=headers)


ROUTES: Routes = (
    ("POST", f"{API}/preupload{REV}", preupload),
    ("POST", rf"{PAGE}\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", rf"{PAGE}\.git/info/lfs/verify", lfs_verify),
    ("POST", f"{API}/lfs-files/duplicate", duplicate_lfs),
    ("GET", f"{API}/xet-write-token{REV}", xet_write_token),
    ("GET", f"{API}/xet-read-token{REV}", xet_read_token),
)

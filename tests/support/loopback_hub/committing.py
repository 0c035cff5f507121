"""The route of a commit: its operations, on the files of its parent."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from support.loopback_hub.access import writable
from support.loopback_hub.messages import API, REV, Call, HubError, Json, Response, Routes, as_json
from support.loopback_hub.repos import Blob, PullRequest, Repo, commit_target

if TYPE_CHECKING:
    from support.loopback_hub.hub import LoopbackHub


def create_commit(hub: LoopbackHub, call: Call) -> Response:
    as_pr = call.flag("create_pr")
    repo = writable(hub, call, by_pull_request=as_pr)
    header, *operations = (json.loads(line) for line in call.body.read().splitlines())
    about = header["value"]
    with hub.lock:
        ref, parent = commit_target(repo, call["rev"], about.get("parentCommit"), as_pr)
        files = dict(parent.files)
        for operation in operations:
            OPERATIONS[operation["key"]](hub, repo, files, operation["value"])
        author = call.user.name if call.user else ""
        made = repo.commit(ref, files, parent, about["summary"], about["description"], author)
        if as_pr:
            number = int(ref.removeprefix("refs/pr/"))
            repo.pull_requests.append(PullRequest(number, about["summary"], author))
    url = f"{hub.url}/{repo.path}"
    answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{url}/commit/{made.sha}"}
    if as_pr:
        number = ref.removeprefix("refs/pr/")
        answer |= {"pullRequestUrl": f"{url}/discussions/{number}", "pullRequestNum": number}
    return as_json(answer)


def add_file(hub: LoopbackHub, repo: Repo, files: dict[str, Blob], value: Json) -> None:
    files[value["path"]] = Blob.regular(base64.b64decode(value["content"]))


def add_lfs_file(hub: LoopbackHub, repo: Repo, files: dict[str, Blob], value: Json) -> None:
    blob = repo.lfs.get(value["oid"]) or hub.collect_xet_upload(repo, value)
    if blob is None:
        text = f"{value['path']}: the LFS pointer pointed to a file that does not exist"
        raise HubError(400, text)
    files[value["path"]] = blob


def delete_file(hub: LoopbackHub, repo: Repo, files: dict[str, Blob], value: Json) -> None:
    if files.pop(value["path"], None) is None:
        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")


def delete_folder(hub: LoopbackHub, repo: Repo, files: dict[str, Blob], value: Json) -> None:
    doomed = [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]
    if not doomed:
        raise HubError(404, "A folder with this name doesn't exist", "EntryNotFound")
    for path in doomed:
        del files[path]


# A copy has no key of its own: the client sends it as the file, or the LFS file, that it copies.
OPERATIONS: Mapping[str, Callable[[LoopbackHub, Repo, dict[str, Blob], Json], None]] = {
    "file": add_file,
    "lfsFile": add_lfs_file,
    "deletedFile": delete_file,
    "deletedFolder": delete_folder,
}


ROUTES: Routes = (("POST", f"{API}/commit{REV}", create_commit),)

"""The loopback Hub, as the real Hugging Face client sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from support.loopback_hub import LoopbackHub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # httpx's
REPO = "org/model"


def safetensors(size: int, *, seed: int = 0) -> bytes:
    """A valid file with one tensor of so many bytes."""
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"weight": tensor}).encode()
    data = bytes((i * 31 + seed) % 251 for i in range(size))
    return len(header).to_bytes(8, "little") + header + data


CONFIG = b'{"model_type": "llama"}\n'
WEIGHTS = safetensors(300_000)


@pytest.fixture(autouse=True)
def _client_in_a_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Read from the environment at import, but looked up at each call.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))  # the hub itself runs hf_xet


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    return client(hub)


def client(hub: LoopbackHub, token: str | bool = "hf_writer") -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def push(api: HfApi, *operations: Any, repo_id: str = REPO, **options: Any) -> CommitInfo:
    info: CommitInfo = api.create_commit(repo_id, operations, commit_message="Change", **options)
    return info


def run_client(hub: LoopbackHub, home: Path, code: str, *arguments: str, xet: bool = False) -> Any:
    """Run code in a process whose environment names the hub; what it prints last is JSON."""
    ours = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writer", "HF_HOME": str(home)}
    ours |= {"HF_HUB_DISABLE_XET": "0" if xet else "1", "HF_XET_CACHE": str(home / "xet")}
    ours |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, env=os.environ | ours, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_token_has_a_name_and_a_role(hub: LoopbackHub, api: HfApi) -> None:
    assert api.whoami()["name"] == "alice"
    assert client(hub, "hf_reader").whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        client(hub, "hf_unknown").whoami()


def test_a_new_repo_has_one_commit(hub: LoopbackHub, api: HfApi) -> None:
    assert api.create_repo(REPO).repo_id == REPO
    assert list(hub.files(REPO)) == [".gitattributes"]
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo(REPO)
    assert caught.value.response.status_code == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO

    assert api.create_repo("org/data", repo_type="dataset", private=True).repo_type == "dataset"
    assert api.dataset_info("org/data").private
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


@pytest.mark.parametrize("multipart_threshold", [None, 100_000], ids=["basic", "multipart"])
def test_a_folder_goes_up_in_one_commit_and_comes_back(
    tmp_path: Path, multipart_threshold: int | None
) -> None:
    with LoopbackHub(multipart_threshold=multipart_threshold, part_size=90_000) as hub:
        api = client(hub)
        api.create_repo(REPO)
        shard = tmp_path / "model.safetensors"
        shard.write_bytes(WEIGHTS)
        add = [
            CommitOperationAdd("model.safetensors", shard),
            CommitOperationAdd("sub/extra.bin", b"small but LFS"),
            CommitOperationAdd("config.json", CONFIG),
            CommitOperationAdd("README.md", b"---\nlicense: mit\n---\n# Model\n"),
        ]
        api.preupload_lfs_files(REPO, add[:1])
        assert list(hub.files(REPO)) == [".gitattributes"]
        info = push(api, *add)

        parts = [r for r in hub.requests if r.method == "PUT" and "part=" in r.path]
        assert len(parts) == (4 if multipart_threshold else 0)
        assert [c.message for c in hub.commits(REPO)] == ["initial commit", "Change"]
        assert hub.commits(REPO)[-1].sha == info.oid
        assert hub.commits(REPO)[-1].author == "alice"
        assert hub.files(REPO)["model.safetensors"] == WEIGHTS

        folder = Path(api.snapshot_download(REPO, revision=info.oid))
        found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.glob("**/*.*")}
        assert found == hub.files(REPO)
        config = api.hf_hub_download(REPO, "config.json", cache_dir=tmp_path / "other")
        assert Path(config).read_bytes() == CONFIG


def test_the_token_does_not_travel_to_the_storage(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo(REPO, {"model.safetensors": WEIGHTS})
    api.hf_hub_download(REPO, "model.safetensors")
    api.get_safetensors_metadata(REPO)
    push(api, CommitOperationAdd("other.bin", b"more"))

    to_the_hub = [r for r in hub.requests if not r.storage]
    to_the_storage = [r for r in hub.requests if r.storage]
    assert {r.headers.get("authorization") for r in to_the_hub} == {"Bearer hf_writer"}
    assert {r.method for r in to_the_storage} == {"GET", "PUT"}
    assert not any("authorization" in r.headers for r in to_the_storage)


def test_info_tells_size_and_hash_of_each_file(
    hub: LoopbackHub, api: HfApi, tmp_path: Path
) -> None:
    (tmp_path / "repo" / "sub").mkdir(parents=True)
    (tmp_path / "repo" / "sub" / "config.json").write_bytes(CONFIG)
    (tmp_path / "repo" / "model.safetensors").write_bytes(WEIGHTS)
    sha = hub.add_repo(REPO, tmp_path / "repo")

    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == sha
    files = {s.rfilename: s for s in info.siblings or []}
    assert files["sub/config.json"].size == len(CONFIG)
    assert files["sub/config.json"].lfs is None
    addition = CommitOperationAdd("model.safetensors", WEIGHTS)
    weights = files["model.safetensors"].lfs
    assert weights is not None
    assert (weights.size, weights.sha256) == (len(WEIGHTS), addition.upload_info.sha256.hex())

    first = hub.commits(REPO)[0].sha
    assert [s.rfilename for s in api.model_info(REPO, revision=first).siblings or []] == [
        ".gitattributes"
    ]
    paths = [entry.path for entry in api.list_repo_tree(REPO)]
    assert paths == [".gitattributes", "model.safetensors", "sub"]
    assert api.list_repo_files(REPO)[-1] == "sub/config.json"
    (entry,) = api.get_paths_info(REPO, ["sub/config.json", "missing"])
    assert entry.path == "sub/config.json"


def test_headers_of_safetensors_are_read_by_range(hub: LoopbackHub, api: HfApi) -> None:
    index = {"metadata": {}, "weight_map": {"weight": "a.safetensors"}}
    hub.add_repo("org/single", {"model.safetensors": WEIGHTS})
    hub.add_repo(
        "org/sharded",
        {"a.safetensors": WEIGHTS, "model.safetensors.index.json": json.dumps(index).encode()},
    )
    single = api.get_safetensors_metadata("org/single")
    assert single.parameter_count == {"U8": 300_000}
    assert api.get_safetensors_metadata("org/sharded").sharded
    assert [r.status for r in hub.requests if r.storage] == [206, 206]


def test_a_pull_request_leaves_main_alone(hub: LoopbackHub, api: HfApi) -> None:
    main = hub.add_repo(REPO, {"config.json": CONFIG})
    stranger = client(hub, "hf_stranger")
    with pytest.raises(HfHubHTTPError, match="403"):
        push(stranger, CommitOperationAdd("model.safetensors", WEIGHTS))
    info = push(
        stranger,
        CommitOperationAdd("model.safetensors", WEIGHTS),
        create_pr=True,
        parent_commit=main,
    )
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert hub.commits(REPO)[-1].sha == main
    assert hub.files(REPO, "refs/pr/1")["model.safetensors"] == WEIGHTS

    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [r.target_commit for r in refs.branches] == [main]
    assert [(r.ref, r.target_commit) for r in refs.pull_requests or []] == [("refs/pr/1", info.oid)]
    assert Path(api.hf_hub_download(REPO, "config.json", revision="refs/pr/1")).is_file()


def test_a_branch_starts_where_it_is_told_to(hub: LoopbackHub, api: HfApi) -> None:
    first = hub.add_repo(REPO, {"config.json": CONFIG})
    hub.add_commit(REPO, {"config.json": b"{}"})
    api.create_branch(REPO, branch="trial/1", revision=first)
    push(api, CommitOperationAdd("notes.txt", b"text"), revision="trial/1")
    assert hub.files(REPO, "trial/1")["config.json"] == CONFIG
    assert "notes.txt" not in hub.files(REPO)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(REPO, branch="trial/1")


def test_a_commit_can_insist_on_its_parent(hub: LoopbackHub, api: HfApi) -> None:
    parent = hub.add_repo(REPO, {"config.json": CONFIG})
    latest = hub.add_commit(REPO, {"config.json": b"{}"})
    add = [CommitOperationAdd("notes.txt", b"text")]
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        push(api, *add, parent_commit=parent)
    assert caught.value.response.status_code == 412
    assert hub.commits(REPO)[-1].sha == latest
    assert push(api, *add, parent_commit=latest).oid == hub.commits(REPO)[-1].sha


def test_files_are_deleted_and_copied(hub: LoopbackHub, api: HfApi) -> None:
    old = {"a/model.safetensors": WEIGHTS, "config.json": CONFIG, "b/x.txt": b"x", "y.txt": b"y"}
    hub.add_repo(REPO, old)
    push(
        api,
        CommitOperationCopy("a/model.safetensors", "model.safetensors"),
        CommitOperationCopy("config.json", "a/config.json"),
        CommitOperationDelete("b/"),
        CommitOperationDelete("y.txt"),
    )
    new = hub.files(REPO)
    assert new.keys() - old.keys() == {".gitattributes", "model.safetensors", "a/config.json"}
    assert old.keys() - new.keys() == {"b/x.txt", "y.txt"}
    assert (new["model.safetensors"], new["a/config.json"]) == (WEIGHTS, CONFIG)
    with pytest.raises(EntryNotFoundError, match="differentiate file and folder"):
        push(api, CommitOperationDelete("b"))


def test_what_has_not_changed_is_not_sent_again(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo(REPO, {"model.safetensors": WEIGHTS, "config.json": CONFIG})
    same = [
        CommitOperationAdd("model.safetensors", WEIGHTS),
        CommitOperationAdd("config.json", CONFIG),
    ]
    assert push(api, *same).oid == hub.commits(REPO)[-1].sha
    assert len(hub.commits(REPO)) == 2
    assert not any(r.method == "PUT" for r in hub.requests)


def test_ignored_files_stay_out(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo(REPO, {".gitignore": b"*.log\n"})
    push(api, CommitOperationAdd("sub/run.log", b"text"), CommitOperationAdd("notes.txt", b"text"))
    assert sorted(hub.files(REPO)) == [".gitattributes", ".gitignore", "notes.txt"]


def test_an_lfs_file_must_have_been_uploaded(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo(REPO, {"config.json": CONFIG})
    addition = CommitOperationAdd("model.safetensors", WEIGHTS)
    addition._upload_mode, addition._is_uploaded = "lfs", True
    with pytest.raises(BadRequestError, match="a file that does not exist"):
        push(api, addition)


def test_a_broken_readme_is_refused(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo(REPO, {"config.json": CONFIG})
    for front_matter in (b"license: [", b"- a list"):
        with pytest.raises(ValueError, match="Invalid metadata"):
            push(api, CommitOperationAdd("README.md", b"---\n" + front_matter + b"\n---\n"))


def test_private_repos_are_hidden_from_others(hub: LoopbackHub) -> None:
    hub.add_repo(REPO, {"config.json": CONFIG}, private=True)
    for token, status in (("hf_stranger", 404), (False, 401)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            client(hub, token).model_info(REPO)
        assert caught.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            client(hub, token).hf_hub_download(REPO, "config.json")
    reader = client(hub, "hf_reader")
    assert Path(reader.hf_hub_download(REPO, "config.json")).read_bytes() == CONFIG


def test_gated_repos_close_their_files(hub: LoopbackHub) -> None:
    hub.add_repo(REPO, {"config.json": CONFIG}, gated=True)
    for token, status in (("hf_stranger", 403), (False, 401)):
        assert client(hub, token).model_info(REPO).gated == "manual"
        with pytest.raises(GatedRepoError) as caught:
            client(hub, token).hf_hub_download(REPO, "config.json")
        assert caught.value.response.status_code == status
    assert client(hub, "hf_reader").file_exists(REPO, "config.json")


def test_what_is_missing_is_named(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo(REPO, {"config.json": CONFIG})
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/unknown")
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info(REPO)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="unknown")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "unknown.json")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "unknown"))


def test_the_same_history_has_the_same_hashes() -> None:
    with LoopbackHub() as one, LoopbackHub() as two:
        files = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
        assert (
            one.add_repo(REPO, files) == two.add_repo(REPO, files) != two.add_repo("org/b", files)
        )


def test_faults_are_injected_as_often_as_told(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_repo(REPO, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    hub.fail("GET", "/resolve/", 503, times=1)
    with pytest.raises(HfHubHTTPError, match="503"):
        api.hf_hub_download(REPO, "config.json")
    assert Path(api.hf_hub_download(REPO, "config.json")).read_bytes() == CONFIG

    hub.fail("PUT", "/lfs/", 500, headers={"Retry-After": "0"})
    push(api, CommitOperationAdd("other.bin", b"more"))
    assert [r.status for r in hub.requests if r.method == "PUT"] == [500, 200]

    hub.reset()
    assert not hub.requests
    assert not api.repo_exists(REPO)


LOAD_DATASET = """
import json, sys
from datasets import load_dataset
options = {"split": "train", "revision": sys.argv[1]}
rows = load_dataset("org/data", **options).to_list()
streamed = list(load_dataset("org/data", streaming=True, **options))
print(json.dumps([rows, streamed]))
"""


def test_datasets_loads_and_streams_a_pinned_revision(hub: LoopbackHub, tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    sha = hub.add_repo("org/data", {"train.jsonl": lines}, "dataset")
    hub.add_commit("org/data", {"train.jsonl": b"{}\n"}, "dataset")
    assert run_client(hub, tmp_path, LOAD_DATASET, sha) == [rows, rows]


XET_ROUNDTRIP = """
import json, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi, hf_hub_download
api = HfApi()
api.create_repo("org/new")
shards = [CommitOperationAdd(Path(p).name, p) for p in sys.argv[1:]]
for shard in shards:
    api.preupload_lfs_files("org/new", [shard])
source = {"src_repo_id": "org/base", "src_repo_type": "model"}
copy = CommitOperationCopy("base.safetensors", "copy.safetensors", **source)
api.create_commit("org/new", [*shards, copy], commit_message="Publish")
info = api.get_paths_info("org/new", [s.path_in_repo for s in shards])
folder = Path(api.snapshot_download("org/new"))
same = [Path(p).read_bytes() == (folder / Path(p).name).read_bytes() for p in sys.argv[1:]]
base = hf_hub_download("org/base", "base.safetensors")
print(json.dumps([same, [len(i.xet_hash) for i in info], Path(base).stat().st_size]))
"""


def test_xet_goes_up_and_down(tmp_path: Path) -> None:
    shards = {f"{n}.safetensors": safetensors(200_000 + n, seed=n) for n in range(2)}
    for name, content in shards.items():
        (tmp_path / name).write_bytes(content)
    with LoopbackHub(xet=True) as hub:
        hub.add_repo("org/base", {"base.safetensors": WEIGHTS})
        paths = [str(tmp_path / name) for name in shards]
        same, hashes, size = run_client(hub, tmp_path / "home", XET_ROUNDTRIP, *paths, xet=True)
        assert (same, hashes, size) == ([True, True], [64, 64], len(WEIGHTS))
        files = hub.files("org/new")
        assert files.items() >= {**shards, "copy.safetensors": WEIGHTS}.items()
        assert not any(r.storage for r in hub.requests), "the bytes went by LFS, not by Xet"

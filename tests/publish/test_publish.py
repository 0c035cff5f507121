"""Publishing: where a release goes, by whose leave, what is sent, and what is recognized."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE
from huggingface_hub.utils import _auth, _xet
from support.loopback_hub import CI_SECRET, LoopbackHub, XetStores

from sage_hub.cli.main import main
from sage_hub.errors import UsageError
from sage_hub.publish import sending
from sage_hub.publish.target import Publication

SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
TARGET = "org/target"
SHORT = ["--card-template", "short"]
LM_EVAL = {
    "results": {"arc": {"acc,none": 0.5, "acc_stderr,none": 0.1}},
    "higher_is_better": {"arc": {"acc": True}},
    "n-samples": {"arc": {"effective": 10}},
    "config": {"model_args": "pretrained=org/target"},
}


@pytest.fixture(scope="module")
def statistics(_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    retain = ["--retain", str(_pair / "retain.jsonl"), "--quiet"]
    assert main(["stats", str(_pair / "base"), *retain, "--output", str(file)]) == 0
    return str(file)


@pytest.fixture
def sources(hub: LoopbackHub, pair: Path) -> LoopbackHub:
    for side in ("base", "unlearned"):
        hub.add_repo(f"org/{side}", pair / side)
    return hub


def words(statistics: str, *options: str, target: str = TARGET) -> list[str]:
    both = ["push", "org/base", "org/unlearned", "--stats", statistics, "--to", target]
    return [*both, "--yes", "--quiet", *options]


def push(statistics: str, *options: str, target: str = TARGET) -> int:
    return main(words(statistics, *options, target=target))


def sent(hub: LoopbackHub) -> list[str]:
    """The hashes of the objects that were sent whole, in order."""
    puts = [r for r in hub.requests if r.method == "PUT" and r.status == 200]
    return [request.path.removeprefix("/lfs/") for request in puts]


def published(hub: LoopbackHub, repo: str = TARGET, revision: str = "main") -> dict[str, bytes]:
    """The files there, which must be what the manifest says."""
    files = hub.files(repo, revision)
    there = {*SHARDS, "README.md", "config.json", "sage/manifest.json", ".gitattributes"}
    assert there <= files.keys()
    commit = hub.commits(repo, revision=revision)[-1].sha
    assert main(["verify", f"{repo}@{commit}", "--quiet"]) == 0
    return files


def commits(hub: LoopbackHub, revision: str = "main", repo: str = TARGET) -> int:
    return len(hub.commits(repo, revision=revision))


class TestSending:
    """What goes over the wire, and when."""

    @pytest.mark.parametrize("low_disk", [[], ["--low-disk"]], ids=["kept", "low disk"])
    def test_a_shard_is_sent_while_the_next_is_made(
        self,
        low_disk: list[str],
        sources: LoopbackHub,
        statistics: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        real = sending.write_shards
        made_before_the_next: list[int] = []

        def watched(*args: Any, **options: Any) -> Any:
            for number, shard in enumerate(real(*args, **options), 1):
                yield shard
                deadline = time.monotonic() + 30
                while len(sent(sources)) < number and time.monotonic() < deadline:
                    time.sleep(0.01)
                made_before_the_next.append(len(sent(sources)))

        monkeypatch.setattr(sending, "write_shards", watched)
        assert push(statistics, *low_disk) == 0
        assert made_before_the_next == [1, 2, 3]
        published(sources)
        assert commits(sources) == 2
        assert not Path(HF_HOME, "sage-hub", "org--target").exists()

    def test_an_upload_that_fails_stops_the_run_with_its_own_sentence(
        self, sources: LoopbackHub, statistics: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sources.fail("PUT", "/lfs/", 403)
        assert push(statistics) == 11
        assert "refuses this with org/target (403) and says: injected" in capsys.readouterr().err
        assert set(sources.files(TARGET)) == {".gitattributes"}

    @pytest.mark.parametrize("low_disk", [[], ["--low-disk"]], ids=["kept", "low disk"])
    def test_a_second_run_sends_only_what_is_missing(
        self,
        low_disk: list[str],
        sources: LoopbackHub,
        statistics: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        real = sending.write_shards
        todo: list[list[str]] = []

        def watched(*args: Any, **options: Any) -> Any:
            todo.append(args[3])
            return real(*args, **options)

        monkeypatch.setattr(sending, "write_shards", watched)
        sources.fail("PUT", "/lfs/", 403, skip=2)
        assert push(statistics, *low_disk) == 11
        assert len(sent(sources)) == 2
        assert push(statistics, *low_disk) == 0
        assert len(sent(sources)) == len(set(sent(sources))) == 3
        assert len(todo[0]) == 3
        assert len(todo[1]) <= 1 if low_disk else todo[1:] in ([], [[]])
        published(sources)

    def test_a_shard_sent_earlier_that_the_hub_has_lost_is_made_again(
        self, sources: LoopbackHub, statistics: str
    ) -> None:
        sources.fail("PUT", "/lfs/", 403, skip=2)
        assert push(statistics, "--low-disk") == 11
        sources.repos["model", TARGET].lfs.clear()
        assert push(statistics, "--low-disk") == 0
        published(sources)

    def test_a_small_file_that_is_no_lfs_file_travels_in_the_commit(
        self, sources: LoopbackHub, statistics: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("support.loopback_hub.uploading.is_lfs", lambda path, size: False)
        assert push(statistics, "--low-disk") == 0
        assert sent(sources) == []
        published(sources)

    def test_a_card_that_the_hub_would_refuse(
        self,
        sources: LoopbackHub,
        statistics: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def badly(folder: Path, *_: object) -> None:
            (folder / "README.md").write_text("---\nlicense: [\n---\n# Model\n")

        monkeypatch.setattr("sage_hub.record.release.write_card", badly)
        assert push(statistics) == 24
        assert "Invalid metadata in README.md" in capsys.readouterr().err
        assert set(sources.files(TARGET)) == {".gitattributes"}

    def test_multipart(
        self, sources: LoopbackHub, statistics: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sources, "multipart_threshold", 5_000)
        monkeypatch.setattr(sources, "part_size", 4_000)
        assert push(statistics) == 0
        assert len([r for r in sources.requests if "part=" in r.path]) > 6
        published(sources)


class TestXet:
    """The other way of storing large files."""

    @pytest.fixture(autouse=True)
    def _with_xet(
        self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> Iterator[None]:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        monkeypatch.setattr(hub, "xet", XetStores(tmp_path / "xet"))
        _xet.XET_CONNECTION_INFO_CACHE.clear()  # of the stores of another test
        yield
        _xet.XET_CONNECTION_INFO_CACHE.clear()

    @pytest.mark.parametrize("low_disk", [[], ["--low-disk"]], ids=["kept", "low disk"])
    def test_weights_come_and_go_by_xet(
        self, low_disk: list[str], sources: LoopbackHub, statistics: str
    ) -> None:
        assert push(statistics, *low_disk) == 0
        published(sources)
        xet = [r.path.split("/")[4:6] for r in sources.requests if "-token/" in r.path]
        assert {tuple(names) for names in xet} >= {
            ("base", "xet-read-token"),
            ("unlearned", "xet-read-token"),
            ("target", "xet-write-token"),
        }
        assert not [r for r in sources.requests if r.storage and "range" not in r.headers]

    def test_what_failed_is_finished_by_the_next_run(
        self, sources: LoopbackHub, statistics: str
    ) -> None:
        sources.fail("POST", "/commit/", 403)
        assert push(statistics) == 11
        assert set(sources.files(TARGET)) == {".gitattributes"}
        assert push(statistics) == 0
        published(sources)

    @pytest.mark.parametrize("status, right", [(403, 11), (503, 0)])
    def test_what_the_hub_answers(
        self, status: int, right: int, sources: LoopbackHub, statistics: str
    ) -> None:
        sources.fail("GET", "/xet-write-token/", status)
        assert push(statistics) == right
        sources.fail("GET", "/xet-read-token/", status)
        shutil.rmtree(HF_HUB_CACHE)
        _xet.XET_CONNECTION_INFO_CACHE.clear()
        assert push(statistics, "--strength", "3") == right
        assert push(statistics, "--strength", "3") == 0
        published(sources)


class TestRecognized:
    """What is published is not published again."""

    @pytest.mark.parametrize("where", [[], ["--create-pr"], ["--branch", "trial"]], ids=str)
    def test_a_second_push_says_that_it_is_there(
        self,
        where: list[str],
        sources: LoopbackHub,
        statistics: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        noted = [word for word in words(statistics, *where, "--json") if word != "--quiet"]
        assert main(noted) == 0
        first = json.loads(capsys.readouterr().out)
        refs = dict(sources.repos["model", TARGET].refs)
        assert main(noted) == 0
        out, err = capsys.readouterr()
        assert json.loads(out) == first
        assert "is this very release already; nothing was sent" in err
        assert sources.repos["model", TARGET].refs == refs
        assert not Path(HF_HOME, "sage-hub", ".org--target.partial").exists()

    @pytest.mark.parametrize("options", [[], ["--create-pr"], ["--low-disk"]], ids=str)
    def test_a_commit_whose_answer_was_lost(
        self, options: list[str], sources: LoopbackHub, statistics: str
    ) -> None:
        sources.disturb("POST", "/commit/", "lost")
        assert push(statistics, *options) == 0
        assert sources.struck
        revision = "refs/pr/1" if options == ["--create-pr"] else "main"
        assert commits(sources, revision) == 2
        assert len([ref for ref in sources.repos["model", TARGET].refs if "pr" in ref]) == (
            revision != "main"
        )
        published(sources, revision=revision)

    def test_a_commit_that_nobody_can_ask_about_is_found_by_the_next_run(
        self, sources: LoopbackHub, statistics: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def silence() -> None:
            sources.fail("GET", "/api/models/org/target", 503, times=100)

        sources.disturb("POST", "/commit/", silence)
        sources.disturb("POST", "/commit/", "lost")
        assert push(statistics) == 25
        assert "Whether the release is published is not known" in capsys.readouterr().err
        sources.calm()
        assert push(statistics) == 0
        assert commits(sources) == 2
        assert not Path(HF_HOME, "sage-hub", "org--target").exists()

    def test_what_was_changed_since_is_published_again(
        self, sources: LoopbackHub, statistics: str
    ) -> None:
        assert push(statistics) == 0
        sources.add_commit(TARGET, {SHARDS[0]: b"somebody's"})
        assert push(statistics) == 0
        assert commits(sources) == 4
        published(sources)

    def test_an_edited_card_is_left_alone(self, sources: LoopbackHub, statistics: str) -> None:
        assert push(statistics) == 0
        sources.add_commit(TARGET, {"README.md": b"edited"})
        assert push(statistics) == 0
        assert sources.files(TARGET)["README.md"] == b"edited"

    @pytest.mark.parametrize("where", [[], ["--create-pr"], ["--branch", "trial"]], ids=str)
    @pytest.mark.parametrize("disturbed", [False, True], ids=["plain", "lost answer"])
    def test_what_is_said_anew_of_it_goes_there_in_one_commit_without_the_weights(
        self,
        where: list[str],
        disturbed: bool,
        sources: LoopbackHub,
        statistics: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        Path("made.json").write_text(json.dumps(LM_EVAL))
        revision = {"--create-pr": "refs/pr/1", "--branch": "trial"}.get("".join(where[:1]), "main")
        assert push(statistics, *where) == 0
        first = published(sources, revision=revision)
        for number, option in enumerate(
            (["--gate", "gain <= 1"], ["--results", "sanitized=made.json"], SHORT), 1
        ):
            if disturbed:
                sources.disturb("POST", "/commit/", "lost")
            noted = [word for word in words(statistics, *where, *option) if word != "--quiet"]
            assert main([*noted, "--record", f"record{number}"]) == 0
            assert "its card and report are updated, its weights stay" in capsys.readouterr().err
            files = published(sources, revision=revision)
            changed = {name for name in first if files[name] != first[name]}
            assert {"README.md", "SHA256SUMS"} <= changed
            assert changed <= {"README.md", "SHA256SUMS", "sage/report.json"}
            assert files.keys() == first.keys()
            assert Path(f"record{number}/README.md").read_bytes() == files["README.md"]
            assert commits(sources, revision) == 2 + number
        assert len(sent(sources)) == 3
        assert len([ref for ref in sources.repos["model", TARGET].refs if "pr" in ref]) <= 1

    def test_a_card_that_was_edited_gives_way_to_a_new_one_and_that_is_said(
        self, sources: LoopbackHub, statistics: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert push(statistics) == 0
        sources.add_commit(TARGET, {"README.md": b"edited", "NOTICE.txt": b"ours"})
        noted = [word for word in words(statistics, *SHORT) if word != "--quiet"]
        assert main(noted) == 0
        assert "the card had been edited by hand; what it said is in" in capsys.readouterr().err
        assert sources.files(TARGET)["README.md"] != b"edited"
        assert sources.files(TARGET)["NOTICE.txt"] == b"ours"

    def test_a_tag_of_what_was_said_before_stays_where_it_is(
        self, sources: LoopbackHub, statistics: str
    ) -> None:
        assert push(statistics, "--tag", "v1") == 0
        assert push(statistics, "--tag", "v1", *SHORT) == 23
        assert push(statistics, "--tag", "v2", *SHORT) == 0
        refs = sources.repos["model", TARGET].refs
        assert refs["refs/tags/v2"] == refs["refs/heads/main"] != refs["refs/tags/v1"]

    def test_statistics_too(
        self, sources: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["stats", "org/base", "--retain", str(pair / "retain.jsonl"), "--to", "org/stats"]
        assert main([*command, "--quiet"]) == 0
        sources.disturb("POST", "/commit/", "lost")
        assert main([*command, "--quiet"]) == 0
        first, second = capsys.readouterr().out.split()
        assert first == second
        assert commits(sources, repo="org/stats") == 2


class TestGates:
    """What was sent before a gate is seen by nobody until the commit."""

    @pytest.mark.parametrize("low_disk", [[], ["--low-disk"]], ids=["kept", "low disk"])
    def test_a_gate_that_is_not_met(
        self, low_disk: list[str], sources: LoopbackHub, statistics: str, pair: Path
    ) -> None:
        heldout = ["--heldout", str(pair / "heldout.jsonl"), *low_disk]
        assert push(statistics, *heldout, "--gate", "heldout.probability >= 2") == 30
        assert len(sent(sources)) == 3
        assert set(sources.files(TARGET)) == {".gitattributes"}
        assert push(statistics, *heldout) == 0
        assert len(sent(sources)) == 3
        published(sources)

    def test_a_gate_that_is_not_met_says_where_the_shards_are(
        self, sources: LoopbackHub, statistics: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With low disk and nothing to evaluate on they are sent, and gone from here."""
        capsys.readouterr()
        assert push(statistics, "--low-disk", "--json", "--gate", "gain > 100") == 30
        found = json.loads(capsys.readouterr().out)
        assert "its shards are sent, seen by nobody" in found["message"]
        assert found["kept"]["what"] == "the record of the release"
        here = {path.name for path in Path(found["kept"]["where"]).rglob("*")}
        assert "report.json" in here
        assert not here & {*SHARDS}
        assert push(statistics, "--low-disk") == 0
        assert len(sent(sources)) == 3

    def test_other_gates_are_checked_on_what_is_published(
        self, sources: LoopbackHub, statistics: str, pair: Path
    ) -> None:
        heldout = ["--heldout", str(pair / "heldout.jsonl")]
        assert push(statistics, *heldout) == 0
        assert push(statistics, *heldout, "--gate", "heldout.probability >= 2") == 30
        assert commits(sources) == 2
        gate = ["--gate", "heldout.probability >= 0"]
        assert push(statistics, *heldout, *gate) == 0
        assert push(statistics, *heldout, *gate) == 0
        assert commits(sources) == 3
        assert len(sent(sources)) == 3
        report = json.loads(published(sources)["sage/report.json"])
        assert [gate["passed"] for gate in report["gates"]] == [True]


class TestWhere:
    """Branches, tags, pull requests."""

    def test_a_pull_request_is_gone_on_with_while_it_is_open(
        self, sources: LoopbackHub, statistics: str
    ) -> None:
        sources.add_repo(TARGET, {})
        repo = sources.repos["model", TARGET]
        other = HfApi(token="hf_stranger")
        title = "Sanitize org/unlearned with sage-hub"
        for _ in range(3):  # somebody else's, more than a page of them
            other.create_commit(
                TARGET,
                [CommitOperationAdd("x.txt", b"x")],
                commit_message=title,
                create_pr=True,
            )
        assert push(statistics, "--create-pr") == 0
        assert push(statistics, "--create-pr", "--strength", "3") == 0
        assert [pr.num for pr in repo.pull_requests] == [1, 2, 3, 4]
        assert commits(sources, "refs/pr/4") == 4
        manifest = json.loads(published(sources, revision="refs/pr/4")["sage/manifest.json"])
        assert manifest["settings"]["strength"] == 3
        repo.pull_requests[3].status = "closed"
        assert push(statistics, "--create-pr", "--strength", "3") == 0
        assert push(statistics, "--create-pr", "--commit-message", "Another") == 0
        titles = [(pr.title, pr.author) for pr in repo.pull_requests[3:]]
        assert titles == [(title, "alice"), (title, "alice"), ("Another", "alice")]
        assert set(sources.files(TARGET)) == {".gitattributes"}

    def test_anyone_may_propose_and_go_on_with_it(
        self, sources: LoopbackHub, statistics: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sources.add_repo(TARGET, {})
        monkeypatch.setenv("HF_TOKEN", "hf_stranger")
        assert push(statistics) == 11
        assert push(statistics, "--create-pr") == 0
        assert push(statistics, "--create-pr", "--strength", "3") == 0
        assert [pr.author for pr in sources.repos["model", TARGET].pull_requests] == ["mallory"]
        published(sources, revision="refs/pr/1")

    def test_a_branch_is_made_from_main_or_gone_on_with(
        self, sources: LoopbackHub, statistics: str
    ) -> None:
        assert push(statistics) == 0
        main_head = sources.commits(TARGET)[-1].sha
        assert push(statistics, "--branch", "trial/1", "--strength", "3") == 0
        assert push(statistics, "--branch", "trial/1", "--strength", "4") == 0
        assert commits(sources, "trial/1") == 4
        assert sources.commits(TARGET)[-1].sha == main_head
        files = published(sources, revision="trial/1")
        assert json.loads(files["sage/manifest.json"])["settings"]["strength"] == 4

    def test_a_branch_of_a_repo_that_is_new(self, sources: LoopbackHub, statistics: str) -> None:
        assert push(statistics, "--branch", "trial") == 0
        assert set(sources.files(TARGET)) == {".gitattributes"}
        published(sources, revision="trial")

    def test_a_tag_is_set_once(
        self, sources: LoopbackHub, statistics: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert push(statistics, "--tag", "v1") == 0
        refs = sources.repos["model", TARGET].refs
        assert refs["refs/tags/v1"] == refs["refs/heads/main"]
        assert push(statistics, "--tag", "v1") == 0  # this very release
        assert push(statistics, "--tag", "v2") == 0
        assert refs["refs/tags/v2"] == refs["refs/heads/main"]
        assert commits(sources) == 2
        sources.requests.clear()
        assert push(statistics, "--tag", "v1", "--strength", "3") == 23
        assert "has the tag v1 already" in capsys.readouterr().err
        assert push(statistics, "--strength", "3") == 0
        sources.requests.clear()
        assert push(statistics, "--tag", "v1", "--strength", "4") == 23
        assert not [r for r in sources.requests if r.method == "PUT"]

    def test_a_tag_that_could_not_be_set_is_set_by_the_next_run(
        self, sources: LoopbackHub, statistics: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sources.fail("POST", "/tag/", 403)
        assert push(statistics, "--tag", "v1") == 11
        assert "without its tag v1; the same command sets it" in capsys.readouterr().err
        assert push(statistics, "--tag", "v1") == 0
        refs = sources.repos["model", TARGET].refs
        assert refs["refs/tags/v1"] == refs["refs/heads/main"]
        assert commits(sources) == 2

    def test_the_message_has_a_title_and_a_body(
        self, sources: LoopbackHub, statistics: str
    ) -> None:
        assert push(statistics, "--commit-message", "Second try\n\nWith λ = 1.") == 0
        commit = sources.commits(TARGET)[-1]
        assert (commit.message, commit.description) == ("Second try", "With λ = 1.")

    @pytest.mark.parametrize(
        "options, words",
        [
            (["--create-pr", "--branch", "x"], "exclude each other"),
            (["--create-pr", "--tag", "x"], "exclude each other"),
            (["--tag", ""], "--tag is empty"),
            (["--to", "./folder", "--branch", "x"], "--branch is for a repo of the Hub"),
        ],
        ids=str,
    )
    def test_what_makes_no_sense_together(
        self,
        options: list[str],
        words: str,
        sources: LoopbackHub,
        statistics: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert push(statistics, *options) == 2
        assert words in capsys.readouterr().err


class TestPermission:
    """Whether the token suffices is found out before any work."""

    @pytest.mark.parametrize(
        "token, target, words",
        [
            ("hf_unknown", TARGET, "refused the token"),
            ("hf_reader", TARGET, "may only read"),
            ("hf_writer", "nobody/model", "is not a member of nobody"),
            ("hf_guest", TARGET, "may only read in org"),
            ("hf_narrow", TARGET, "has no write permission for the repos of org"),
            ("hf_stranger", "org/ours", "may not write org/ours"),
            ("hf_guest", "org/ours", "may not write org/ours"),
            ("hf_narrow", "org/ours", "may not write org/ours"),
        ],
    )
    def test_a_token_that_may_not_write_is_refused_at_once(
        self,
        token: str,
        target: str,
        words: str,
        sources: LoopbackHub,
        statistics: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        sources.add_repo("org/ours", {"sage/manifest.json": b"{}"})
        monkeypatch.setenv("SAGE_HUB_WRITE_TOKEN", token)
        assert push(statistics, target=target) == 11
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
        assert not downloads(sources)

    def test_a_target_has_an_owner(
        self, sources: LoopbackHub, statistics: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert push(statistics, target="model") == 2
        assert "Write the target with its owner, as in org/model" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "token, target",
        [("hf_writer", "alice/mine"), ("hf_fine", TARGET), ("hf_narrow", "org/one")],
    )
    def test_a_token_that_may_write(
        self,
        token: str,
        target: str,
        sources: LoopbackHub,
        statistics: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("SAGE_HUB_WRITE_TOKEN", token)
        assert push(statistics, target=target) == 0
        published(sources, target)

    def test_one_token_reads_and_another_writes(
        self,
        hub: LoopbackHub,
        pair: Path,
        statistics: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        hub.add_repo("org/base", pair / "base", gated=True)
        hub.add_repo("org/unlearned", pair / "unlearned", private=True)
        monkeypatch.setenv("HF_TOKEN", "hf_reader")
        assert push(statistics, "--token", "hf_stranger", target="mallory/target") == 0
        assert hub.commits("mallory/target")[-1].author == "mallory"
        for request in hub.requests:
            token = request.headers.get("authorization")
            if request.storage:
                assert token is None
            elif "/mallory/target" in request.path or "whoami" in request.path:
                assert token == "Bearer hf_stranger"
            elif "/org/" in request.path:
                assert token == "Bearer hf_reader"
        assert push(statistics, "--token", "hf_stranger", target="mallory/target") == 0

    def test_a_private_target_is_recognized_with_the_token_that_writes_it(
        self, sources: LoopbackHub, statistics: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SAGE_HUB_WRITE_TOKEN", "hf_stranger")
        for _ in range(2):
            assert push(statistics, "--private", target="mallory/target") == 0
        assert sources.repos["model", "mallory/target"].private
        assert commits(sources, repo="mallory/target") == 2

    def test_a_public_repo_is_not_taken_for_a_private_one(
        self, sources: LoopbackHub, statistics: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert push(statistics) == 0
        assert push(statistics, "--private", "--strength", "3") == 23
        assert "exists and is public" in capsys.readouterr().err

    def test_a_source_that_may_not_be_read(
        self, sources: LoopbackHub, statistics: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sources.repos["model", "org/base"].gated = True
        monkeypatch.setenv("HF_TOKEN", "hf_stranger")
        assert push(statistics, target="mallory/target") == 11
        sources.repos["model", "org/base"].gated = False
        sources.repos["model", "org/base"].private = True
        assert push(statistics, target="mallory/target") == 10


def downloads(hub: LoopbackHub) -> list[str]:
    """What was fetched whole from the storage."""
    return [
        r.path for r in hub.requests if r.storage and r.method == "GET" and "range" not in r.headers
    ]


class TestTrustedPublisher:
    """In a CI the Hub trusts the job itself."""

    @pytest.fixture(autouse=True)
    def _in_a_job(self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setenv("HF_OIDC_RESOURCE", TARGET)
        monkeypatch.setenv("GITHUB_ACTIONS", "true")
        monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{hub.url}/ci/id-token")
        monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", CI_SECRET)
        monkeypatch.setattr(_auth, "_OIDC_TOKEN_CACHE", None)
        tokens = dict(hub.tokens)
        yield
        hub.tokens = tokens

    def test_it_publishes_without_a_token(
        self, sources: LoopbackHub, statistics: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("HF_TOKEN")
        sources.add_repo(TARGET, {})
        sources.trusting.add(TARGET)
        assert push(statistics) == 0
        assert push(statistics) == 0
        assert push(statistics, "--create-pr", "--strength", "3") == 0
        assert push(statistics, "--create-pr", "--strength", "4") == 0
        assert [pr.num for pr in sources.repos["model", TARGET].pull_requests] == [1]
        monkeypatch.setenv("HF_TOKEN", "hf_reader")
        published(sources)

    def test_it_reads_private_sources_with_another_token(
        self, sources: LoopbackHub, statistics: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sources.repos["model", "org/base"].private = True
        sources.add_repo(TARGET, {})
        sources.trusting.add(TARGET)
        monkeypatch.setenv("HF_TOKEN", "hf_reader")
        assert push(statistics) == 0
        writers = {
            r.headers["authorization"]
            for r in sources.requests
            if "/org/target" in r.path and "resolve" not in r.path
        }
        assert len(writers) == 1
        assert "Bearer hf_reader" not in writers

    @pytest.mark.parametrize(
        "target, trusts, words",
        [
            ("org/other", TARGET, "may write that one repo alone"),
            (TARGET, TARGET, "a trusted publisher cannot create it"),
            (TARGET, "", "invalid_grant"),
        ],
    )
    def test_what_it_may_not_do_is_said(
        self,
        target: str,
        trusts: str,
        words: str,
        sources: LoopbackHub,
        statistics: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        sources.trusting = {trusts}
        assert push(statistics, target=target) == 11
        assert words in capsys.readouterr().err

    def test_a_job_without_the_permission(
        self,
        sources: LoopbackHub,
        statistics: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN")
        assert push(statistics) == 11
        assert "id-token: write" in capsys.readouterr().err


def test_a_notice_says_what_is_waited_for(
    sources: LoopbackHub, statistics: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sources.fail("GET", "/api/models/org/base", 503)
    assert push(statistics) == 0
    assert capsys.readouterr().err == ""  # --quiet
    sources.fail("GET", "/api/models/org/base", 503)
    assert main([word for word in words(statistics) if word != "--quiet"]) == 0
    assert "The Hub answered 503 about org/base; trying again in" in capsys.readouterr().err


def test_a_publication_shows_no_token() -> None:
    assert "hf_" not in repr(Publication(token="hf_secret"))
    with pytest.raises(UsageError):
        Publication(branch=" ")

"""Publishing to the Hub: files are sent as they come, and one commit makes them visible."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from time import monotonic, sleep
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
)
from huggingface_hub.errors import FileDuplicationError, HfHubHTTPError
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

from sage_hub.checkpoint import HubFiles
from sage_hub.errors import (
    AccessError,
    NetworkError,
    NotFoundError,
    PublishError,
    SageHubError,
    TargetError,
    UsageError,
    first_line,
)
from sage_hub.hub import LOG_IN, MANIFEST, ask, explain, log, may_pass, wait_before_next

Ours = Callable[[HubFiles], bool]  # whether the files are the very ones to be published


@dataclass(frozen=True)
class Publication:
    """How something goes to a repo of the Hub. Raises UsageError for what excludes each other."""

    branch: str | None = None  # made from main if it is not there; None: main
    create_pr: bool = False  # or goes on with the open one of the same title
    tag: str | None = None  # of the commit
    private: bool = False  # if the repo has to be created
    message: str | None = None  # of the commit; its first line is the title of the pull request
    token: str | None = field(default=None, repr=False)  # to write with; None: the usual one

    def __post_init__(self) -> None:
        if self.create_pr and (self.branch or self.tag):
            wrong = "--branch" if self.branch else "--tag"
            raise UsageError(
                f"{wrong} and --create-pr exclude each other: a pull request goes to main, and is "
                "tagged when it is merged."
            )
        for option, value in {
            "branch": self.branch,
            "tag": self.tag,
            "commit-message": self.message,
        }.items():
            if value is not None and not value.strip():
                raise UsageError(f"--{option} is empty; leave it away or give it a value.")

    def check_unused(self) -> None:
        """Raise UsageError if anything was asked for that only the Hub can do."""
        asked = {
            "--branch": self.branch,
            "--create-pr": self.create_pr,
            "--tag": self.tag,
            "--private": self.private,
        }
        for option, value in asked.items():
            if value:
                raise UsageError(
                    f"{option} is for a repo of the Hub, and the target is a local one."
                )

    @property
    def api(self) -> HfApi:
        """The Hub, with the token to write with."""
        return HfApi(token=self.token)

    @property
    def title(self) -> str:
        """The first line of the message."""
        return (self.message or "").strip().partition("\n")[0]


@dataclass(frozen=True)
class Head:
    """Where in a repo a commit is to go, and what is there now."""

    revision: str  # main, a branch, or refs/pr/N
    files: HubFiles | None  # None: the repo does not exist
    missing_branch: bool = False  # it is still to be made, from `files`
    tags: Mapping[str, str] = field(default_factory=dict)  # tag -> commit

    @property
    def commit(self) -> str | None:
        """The commit that the new one builds on."""
        return self.files.commit if self.files else None

    @property
    def names(self) -> set[str]:
        """The files that are there, but for the one that each repo starts with."""
        return set(self.files.sizes) - {".gitattributes"} if self.files else set()

    @property
    def pull_request(self) -> int | None:
        """The number of the open one that is gone on with."""
        return int(self.revision[8:]) if self.revision.startswith("refs/pr/") else None

    def url(self, repo: str, endpoint: str) -> str:
        """The page of what is there."""
        if self.pull_request is not None:
            return f"{endpoint}/{repo}/discussions/{self.pull_request}"
        return f"{endpoint}/{repo}/commit/{self.commit}"


def find_head(repo: str, how: Publication) -> Head:
    """Look where `how` says that a commit to `repo` is to go."""
    try:
        main = HubFiles(repo, api=how.api)
    except NotFoundError:
        return Head(how.branch or "main", None)
    refs = ask(repo, lambda: how.api.list_repo_refs(repo))
    tags = {tag.name: tag.target_commit for tag in refs.tags}
    if how.create_pr and (number := _open_pull_request(repo, how)) is not None:
        revision = f"refs/pr/{number}"
        return Head(revision, HubFiles(repo, revision, api=how.api))
    if how.branch and how.branch != "main":
        if how.branch not in {branch.name for branch in refs.branches}:
            return Head(how.branch, main, missing_branch=True, tags=tags)
        return Head(how.branch, HubFiles(repo, how.branch, api=how.api), tags=tags)
    return Head("main", main, tags=tags)


def _open_pull_request(repo: str, how: Publication) -> int | None:
    """The number of the newest open one with our title, made by the owner of the token."""
    found = ask(
        repo,
        lambda: list(
            how.api.get_repo_discussions(
                repo,
                discussion_type="pull_request",
                discussion_status="open",
                author=None if _by_identity(how) else how.api.whoami()["name"],
            )
        ),
    )
    return max(
        (pr.num for pr in found if pr.is_pull_request and pr.title == how.title), default=None
    )


def check_target(repo: str, how: Publication, *, force: bool = False, mark: str = MANIFEST) -> None:
    """Check before any work that this may be published to `repo`.

    Raises AccessError without the permission, TargetError if the repo holds something that is
    not ours and `force` is not set, or has the tag already, or is not as private as it should be.
    """
    who = None if _by_identity(how) else ask(repo, lambda: how.api.whoami())
    if who is None:
        _check_resource(repo)
    else:
        _check_role(repo, who)
    head = find_head(repo, how)
    if head.files is None:
        _check_may_create(repo, who)
        return
    if not how.create_pr:
        _check_writable(repo, how)
    _check_ours(repo, head, force=force, mark=mark)
    if how.private and not head.files.private:
        raise TargetError(
            f"{repo} exists and is public; make it private in its settings, or leave --private."
        )
    if how.tag and head.tags.get(how.tag, head.commit) != head.commit:
        raise _tag_is_taken(repo, how.tag)


def _by_identity(how: Publication) -> bool:
    """Whether the token to write with is a trusted publisher's."""
    return how.token is None and bool(os.environ.get("HF_OIDC_RESOURCE"))


def _check_resource(repo: str) -> None:
    resource = os.environ["HF_OIDC_RESOURCE"]
    if resource != repo:
        raise AccessError(
            f"HF_OIDC_RESOURCE is {resource}, and a trusted publisher may write that one repo "
            f"alone; set it to {repo}, or give a token that may write there."
        )


def _check_role(repo: str, who: Mapping[str, Any]) -> None:
    if _access_token(who).get("role") == "read":
        raise AccessError(
            f"The token of {who['name']} may only read; use one with write permission for {repo}."
        )


def _access_token(who: Mapping[str, Any]) -> Mapping[str, Any]:
    return (who.get("auth") or {}).get("accessToken") or {}


def _check_may_create(repo: str, who: Mapping[str, Any] | None) -> None:
    """Raise AccessError if the Hub's answer about the token rules out that it creates `repo`."""
    if who is None:
        raise AccessError(
            f"{repo} does not exist, and a trusted publisher cannot create it: create it on the "
            "Hub, and add this workflow to the trusted publishers in its settings."
        )
    namespace = repo.partition("/")[0]
    orgs = {org["name"]: org for org in who.get("orgs") or ()}
    if namespace not in (who["name"], *orgs):
        raise AccessError(
            f"{repo} does not exist, and {who['name']} is not a member of {namespace} and cannot "
            f"create it; publish to {who['name']}/… or join the organization."
        )
    if orgs.get(namespace, {}).get("roleInOrg") == "read":
        raise AccessError(
            f"{repo} does not exist, and {who['name']} may only read in {namespace}; ask there "
            "for the role of a contributor."
        )
    fine = _access_token(who).get("fineGrained")
    if fine is not None and not any(
        "repo.write" in scope.get("permissions", ())
        and scope.get("entity", {}).get("name") in (namespace, repo)
        for scope in fine.get("scoped", ())
    ):
        raise AccessError(
            f"The fine-grained token of {who['name']} has no write permission for the repos of "
            f"{namespace}; add it in the token's settings."
        )


def _check_writable(repo: str, how: Publication) -> None:
    """Raise AccessError if the Hub says that the token may not write `repo`."""
    try:
        ask(repo, lambda: how.api.auth_check(repo, write=True))
    except (AccessError, NotFoundError):
        raise AccessError(
            f"The token may not write {repo}: use one with write permission, or propose the "
            f"release with --create-pr. (To use another account, {LOG_IN}.)"
        ) from None
    except NetworkError as error:
        if "answered 404" not in str(error):  # a Hub that does not know the question
            raise


def _check_ours(repo: str, head: Head, *, force: bool, mark: str) -> None:
    if head.names and mark not in head.names and not force:
        raise TargetError(
            f"{repo} exists and was not made by sage-hub for this (it has no {mark}); "
            "choose another --to, or replace it with --force."
        )


def _tag_is_taken(repo: str, tag: str) -> TargetError:
    return TargetError(f"{repo} has the tag {tag} already, on another commit; give another --tag.")


@dataclass(frozen=True)
class Source:
    """A large file of a repo at a commit, which the Hub can copy by itself."""

    repo: str
    commit: str
    path: str

    def copied_to(self, path: str) -> CommitOperationCopy:
        """The part of a commit that copies it."""
        return CommitOperationCopy(
            self.path,
            path,
            src_revision=self.commit,
            src_repo_id=self.repo,
            src_repo_type="model",
        )


class Upload:
    """A commit in the making. A context manager.

    Large files are sent in the background as they come, to where nobody sees them. The commit
    makes all visible at once, leaves nothing in the repo but what was added, and is refused by
    the Hub if the repo moved meanwhile. After any error before it the repo is as it was, or empty
    if it did not exist.
    """

    def __init__(
        self,
        repo: str,
        how: Publication,
        ours: Ours,
        *,
        force: bool = False,
        mark: str = MANIFEST,
    ) -> None:
        self.repo, self.how = repo, how
        self._ours, self._api = ours, how.api
        self._force, self._mark = force, mark
        self._head = self._look()
        self._added: dict[str, CommitOperationAdd] = {}
        self._copied: dict[str, tuple[Source, Callable[[], Path]]] = {}
        self._waiting: Queue[tuple[Mapping[str, Path], Callable[[], object]] | None] = Queue()
        self._failure: BaseException | None = None
        self._prepared = False
        # A daemon: Ctrl-C must not wait until a shard of gigabytes is sent.
        self._worker = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Upload:
        self._worker.start()
        return self

    def __exit__(self, *error: object) -> None:
        # What waits is not sent any more.
        self._failure = self._failure or PublishError(f"The upload to {self.repo} was given up.")
        self._waiting.put(None)

    def send(self, files: Mapping[str, Path], then: Callable[[], object] = lambda: None) -> None:
        """Send `files`, path in the repo -> local one, in the background, and `then` call that.

        Raises what stopped earlier ones.
        """
        self._raise_failure()
        self._waiting.put((files, then))

    def wait(self) -> None:
        """Wait until all is sent. Raises what stopped it."""
        self.settle()
        self._raise_failure()

    def settle(self) -> None:
        """Wait until all is sent, or nothing more will be."""
        self._waiting.join()

    def adopt(self, files: Mapping[str, tuple[str, int]]) -> set[str]:
        """Those of `files`, path -> SHA-256 and size, that an earlier run has sent already.

        They become part of the commit.
        """
        if not files or self._head.files is None or self._head.missing_branch:
            return set()
        infos = {
            path: UploadInfo(size, b"", bytes.fromhex(sha256))
            for path, (sha256, size) in files.items()
        }
        known, _, _ = ask(
            self.repo,
            lambda: post_lfs_batch_info(
                infos.values(),
                self.how.token,
                "model",
                self.repo,
                revision=None if self._opens_pull_request else self._head.revision,
            ),
        )
        present = {action["oid"] for action in known if "actions" not in action}
        found = {path for path, (sha256, _) in files.items() if sha256 in present}
        for path in found:
            addition = CommitOperationAdd(path, b"")
            addition.upload_info = infos[path]
            addition._upload_mode, addition._is_uploaded = "lfs", True
            self._added[path] = addition
        return found

    def copy(self, path: str, source: Source, file: Callable[[], Path]) -> None:
        """Have the Hub copy `source` to `path`; if it will not, send what `file` fetches."""
        self._copied[path] = (source, file)

    def add_folder(self, folder: Path) -> None:
        """Send all files of `folder` that were not sent or copied already, and wait for all."""
        self.wait()
        files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        known = self._added.keys() | self._copied.keys()
        self.send({path: file for path, file in files.items() if path not in known})
        self.wait()

    @property
    def files(self) -> HubFiles | None:
        """What is in the repo where the commit is to go; None if it does not exist."""
        return self._head.files

    def published(self) -> str | None:
        """The URL of what is to be published, if it was so when we looked; it has its tag then."""
        return self._url_if_ours(self._head)

    def _url_if_ours(self, head: Head) -> str | None:
        if head.files is None or head.missing_branch or not self._ours(head.files):
            return None
        self._tag(head.files.commit)
        return head.url(self.repo, self._api.endpoint)

    def check_tag(self) -> None:
        """Raise TargetError if the tag is there already."""
        if self.how.tag in self._head.tags:
            raise _tag_is_taken(self.repo, self.how.tag or "")

    def commit(self) -> str:
        """Make everything visible; return the URL of the commit or pull request."""
        self.wait()
        self._prepare()
        if self._copied:
            copies = [source.copied_to(path) for path, (source, _) in self._copied.items()]
            try:
                return self._commit(copies)
            except (HfHubHTTPError, FileDuplicationError, ValueError) as error:
                if _status(error) in (401, 403, 412):  # without copies it would be the same
                    raise self._explain(error) from None
            # Not every storage can be copied from, and not into every region.
            self.send({path: file() for path, (_, file) in self._copied.items()})
            self.wait()
        try:
            return self._commit([])
        except HfHubHTTPError as error:
            raise self._explain(error) from None

    def _commit(self, copies: Sequence[CommitOperationCopy]) -> str:
        """One commit. That no answer came is no proof that it was not made."""
        names = {*self._added, *(copy.path_in_repo for copy in copies)}
        stale = [CommitOperationDelete(name) for name in sorted(self._head.names - names)]
        title, _, more = (self.how.message or "").strip().partition("\n")
        begun, tries = monotonic(), 0
        while True:
            tries += 1
            try:
                made = self._api.create_commit(
                    self.repo,
                    [*self._added.values(), *copies, *stale],
                    commit_message=title,
                    commit_description=more.strip(),
                    revision=self._head.revision,
                    parent_commit=self._head.commit,
                    create_pr=self._opens_pull_request,
                )
            except Exception as error:
                pause = wait_before_next(error, tries)
                if pause is None and tries == 1 and _status(error) != 412:
                    raise  # a plain refusal
                if url := self._made_after_all():
                    return url
                if pause is None:
                    seconds = monotonic() - begun
                    if not may_pass(error):
                        raise
                    raise explain(error, self.repo, tries=tries, seconds=seconds) or error from None
                log.warning("The commit to %s failed; trying again in %.0f s.", self.repo, pause)
                sleep(pause)
            else:
                self._tag(made.oid)
                if self._head.pull_request is not None:
                    return self._head.url(self.repo, self._api.endpoint)
                return made.pr_url or made.commit_url

    def _made_after_all(self) -> str | None:
        try:
            return self._url_if_ours(find_head(self.repo, self.how))
        except NetworkError as error:
            raise NetworkError(
                f"{error} Whether the release is published is not known; the same command finds "
                "out."
            ) from None

    @property
    def _opens_pull_request(self) -> bool:
        return self.how.create_pr and self._head.pull_request is None

    def _explain(self, error: Exception) -> BaseException:
        if _status(error) == 412:
            return PublishError(
                f"{self.repo} changed while the release was made; nothing was published. "
                "Run the same command again."
            )
        return explain(error, self.repo) or error

    def _tag(self, commit: str) -> None:
        tag = self.how.tag
        if tag is None:
            return
        try:
            ask(self.repo, lambda: self._api.create_tag(self.repo, tag=tag, revision=commit))
        except SageHubError as error:
            refs = ask(self.repo, lambda: self._api.list_repo_refs(self.repo))
            there = {known.name: known.target_commit for known in refs.tags}
            if there.get(tag) == commit:
                return
            if tag in there:
                raise _tag_is_taken(self.repo, tag) from None
            raise type(error)(
                f"{error} The release is published as {commit[:12]}, without its tag {tag}; the "
                "same command sets it."
            ) from None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            files, then = item
            if self._failure is None:
                try:
                    self._send(files)
                    then()
                except BaseException as error:
                    self._failure = error
            self._waiting.task_done()

    def _send(self, files: Mapping[str, Path]) -> None:
        self._prepare()
        additions = {path: CommitOperationAdd(path, file) for path, file in files.items()}
        try:
            ask(
                self.repo,
                lambda: self._api.preupload_lfs_files(
                    self.repo,
                    additions.values(),
                    revision=self._head.revision,
                    create_pr=self._opens_pull_request,
                ),
            )
        except RuntimeError as error:  # of hf_xet
            raise NetworkError(
                f"Uploading to {self.repo} broke off ({first_line(error)}); nothing was published. "
                "Run the same command again."
            ) from None
        for path, addition in additions.items():
            if not addition._is_uploaded:  # it travels in the commit, when its file may be gone
                addition.path_or_fileobj = files[path].read_bytes()
        self._added |= additions

    def _look(self) -> Head:
        head = find_head(self.repo, self.how)
        _check_ours(self.repo, head, force=self._force, mark=self._mark)
        return head

    def _prepare(self) -> None:
        """Create the repo and the branch if they are not there."""
        if self._prepared:
            return
        if self._head.files is None:
            private = self.how.private
            ask(
                self.repo,
                lambda: self._api.create_repo(self.repo, private=private, exist_ok=True),
            )
            self._head = self._look()
        if self._head.missing_branch:
            branch, start = self._head.revision, self._head.commit
            ask(
                self.repo,
                lambda: self._api.create_branch(
                    self.repo, branch=branch, revision=start, exist_ok=True
                ),
            )
        self._prepared = True


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None

"""Publishing to the Hub: files are sent as they come, and one commit makes them visible."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from queue import Queue
from time import monotonic, sleep

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
)
from huggingface_hub.errors import FileDuplicationError, HfHubHTTPError
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

from sage_hub.checkpoint.hubfiles import HubFiles
from sage_hub.errors import (
    NetworkError,
    PublishError,
    first_line,
)
from sage_hub.evaluation.answers import stays_here
from sage_hub.hub.client import ask, explain, log, may_pass, status_of, wait_before_next
from sage_hub.publish.target import (
    Head,
    Publication,
    check_ours,
    find_head,
    set_tag,
    tag_is_taken,
)
from sage_hub.publish.verify import is_of_release, manifest_of
from sage_hub.record.manifest import MANIFEST

Ours = Callable[[HubFiles], bool]  # whether the files are the very ones to be published


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
        self._copied: dict[str, tuple[CommitOperationCopy, Callable[[], Path]]] = {}
        self._waiting: Queue[tuple[Mapping[str, Path], Callable[[], object]] | None] = Queue()
        self._failure: BaseException | None = None
        self._prepared = False
        self._stays: frozenset[str] = frozenset()  # of what would be replaced
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

    def copy(self, what: CommitOperationCopy, file: Callable[[], Path]) -> None:
        """Have the Hub copy a file by itself; if it will not, send what `file` fetches."""
        self._copied[what.path_in_repo] = (what, file)

    def add_folder(self, folder: Path) -> None:
        """Send all files of `folder` that were not sent or copied already, and wait for all."""
        self.wait()
        there = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {p.relative_to(folder).as_posix(): p for p in there if not stays_here(p.name)}
        known = self._added.keys() | self._copied.keys()
        self.send({path: file for path, file in files.items() if path not in known})
        self.wait()

    @property
    def files(self) -> HubFiles | None:
        """What is in the repo where the commit is to go; None if it does not exist."""
        return self._head.files

    @property
    def is_there(self) -> bool:
        """Whether what is to be published was so when we looked."""
        return self._is_ours(self._head)

    def _is_ours(self, head: Head) -> bool:
        return head.files is not None and not head.missing_branch and self._ours(head.files)

    @property
    def url(self) -> str:
        """The page of what was there."""
        return self._head.url(self.repo, self._api.endpoint)

    def take(self) -> str:
        """The URL of what was there, which gets its tag if it has none yet."""
        self._tag(self._head.commit or "")
        return self.url

    def amend(self, folder: Path, ours: Ours, stays: Iterable[str]) -> str:
        """Commit `folder` in the place of what is there, but for the files that stay; the URL."""
        self._ours, self._stays = ours, frozenset(stays)
        self.add_folder(folder)
        return self.commit()

    def check_tag(self) -> None:
        """Raise TargetError if the tag is there already."""
        if self.how.tag in self._head.tags:
            raise tag_is_taken(self.repo, self.how.tag or "")

    def commit(self) -> str:
        """Make everything visible; return the URL of the commit or pull request."""
        self.wait()
        self._prepare()
        if self._copied:
            copies = [what for what, _ in self._copied.values()]
            try:
                return self._commit(copies)
            except (HfHubHTTPError, FileDuplicationError, ValueError) as error:
                if status_of(error) in (401, 403, 412):  # without copies it would be the same
                    raise self._explain(error) from None
            # Not every storage can be copied from, and not into every region.
            self.send({path: file() for path, (_, file) in self._copied.items()})
            self.wait()
        try:
            return self._commit([])
        except Exception as error:
            raise self._explain(error) from None

    def _commit(self, copies: Sequence[CommitOperationCopy]) -> str:
        """One commit. That no answer came is no proof that it was not made."""
        names = {*self._added, *(copy.path_in_repo for copy in copies)}
        stale = [
            CommitOperationDelete(name) for name in sorted(self._replaced() - names - self._stays)
        ]
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
                if pause is None and tries == 1 and status_of(error) != 412:
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
            head = find_head(self.repo, self.how)
            if not self._is_ours(head):
                return None
            self._head = head
            return self.take()
        except NetworkError as error:
            raise NetworkError(
                f"{error} Whether the release is published is not known; the same command finds "
                "out."
            ) from None

    @property
    def _opens_pull_request(self) -> bool:
        return self.how.create_pr and self._head.pull_request is None

    def _explain(self, error: Exception) -> BaseException:
        if status_of(error) == 412:
            return PublishError(
                f"{self.repo} changed while the release was made; nothing was published. "
                "Run the same command again."
            )
        if isinstance(error, ValueError):
            return PublishError(  # the head of a card that a template made, as a rule
                f"The Hub's client refused the release, and nothing was published: "
                f"{first_line(error)}"
            )
        return explain(error, self.repo) or error

    def _tag(self, commit: str) -> None:
        if self.how.tag is not None:
            set_tag(self.repo, self.how.tag, commit, self._api)

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
        except ValueError as error:  # that single files are refused is in the body, not in a status
            said = " ".join(str(error).split())
            raise PublishError(f"The Hub refuses files of {self.repo}: {said}.") from None
        except RuntimeError as error:  # of hf_xet
            raise NetworkError(
                f"Uploading to {self.repo} broke off ({first_line(error)}); nothing was published. "
                "Run the same command again."
            ) from None
        for path, addition in additions.items():
            if not addition._is_uploaded:  # it travels in the commit, when its file may be gone
                addition.path_or_fileobj = files[path].read_bytes()
        self._added |= additions

    def _replaced(self) -> set[str]:
        """The files that this takes the place of: an earlier release's; by force, all."""
        files = self._head.files
        if files is None or self._mark not in files.sizes:
            return set(self._head.names)
        if self._mark != MANIFEST:
            return set()
        return {name for name in self._head.names if is_of_release(name, manifest_of(files))}

    def _look(self) -> Head:
        head = find_head(self.repo, self.how)
        check_ours(self.repo, head, force=self._force, mark=self._mark)
        return head

    def _prepare(self) -> None:
        """Create the repo and the branch if they are not there."""
        if self._prepared:
            return
        if self._head.files is None:
            private = self.how.private or None  # as the owner's new repos are, not public
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

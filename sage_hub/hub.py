"""The Hugging Face Hub: its errors in plain words, and publishing a folder in one commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileDuplicationError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

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
from sage_hub.progress import SILENT, Progress

MANIFEST = "sage/manifest.json"
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


@contextmanager
def explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises about `repo` into one of our errors."""
    try:
        yield
    except GatedRepoError:
        raise AccessError(
            f"{repo} is gated: accept its conditions on its Hub page, then {LOG_IN}."
        ) from None
    except RevisionNotFoundError:
        raise NotFoundError(
            f"{repo} has no revision {revision!r}; give a branch, tag or commit that exists."
        ) from None
    except RepositoryNotFoundError:
        raise NotFoundError(
            f"{repo} does not exist on the Hub, or is private: check the name, or {LOG_IN} "
            f"with access to it. (A folder is written ./{repo.rpartition('/')[2]}.)"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise NetworkError(
            f"{repo} is not in the local cache and the Hub cannot be reached; "
            f"check the network, HF_ENDPOINT and HF_HUB_OFFLINE. (A folder is written ./{repo}.)"
        ) from None
    except EntryNotFoundError as error:
        raise NotFoundError(f"A file is missing from {repo}: {first_line(error)}") from None
    except LocalTokenNotFoundError:
        raise AccessError(f"{repo} needs a token: {LOG_IN}.") from None
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is not a valid repo name: {first_line(error)}") from None
    except HfHubHTTPError as error:
        raise _explain_status(error, repo) from None
    except HTTPError as error:
        raise NetworkError(
            f"The Hub did not answer about {repo} ({type(error).__name__}); try again. (A folder "
            f"is written ./{repo}.)"
        ) from None


def _explain_status(error: HfHubHTTPError, repo: str) -> SageHubError:
    status = error.response.status_code
    if status == 401:
        return AccessError(f"The Hub refused the token for {repo} (401): {LOG_IN}.")
    if status == 403:
        return AccessError(
            f"The token may not do this with {repo} (403): use one with access to it, "
            "with write permission if it is the target."
        )
    if status == 429 or status >= 500:
        return NetworkError(f"The Hub answered {status} about {repo}; try again later.")
    return NetworkError(f"The Hub answered {status} about {repo}: {first_line(error)}")


def check_target(repo: str, *, force: bool = False, mark: str = MANIFEST) -> None:
    """Check before any work that a release may be published to `repo`.

    Raises AccessError without a token, TargetError if the repo holds something that is not a
    release of ours and `force` is not set.
    """
    with explained(repo):
        HfApi().whoami()
    _target_files(repo, force=force, mark=mark)


def _target_files(repo: str, *, force: bool, mark: str = MANIFEST) -> tuple[str | None, set[str]]:
    """The head commit of `repo` and its files; (None, empty) if it does not exist.

    Raises TargetError if it has files, but not the `mark` of what we publish.
    """
    try:
        with explained(repo):
            info = HfApi().model_info(repo)
    except NotFoundError:
        return None, set()
    files = {s.rfilename for s in info.siblings or []} - {".gitattributes"}
    if files and mark not in files and not force:
        raise TargetError(
            f"{repo} exists and was not made by sage-hub for this (it has no {mark}); "
            "choose another --to, or replace it with --force."
        )
    return info.sha, files


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
    """A commit in the making: large files are sent as they come, where nobody sees them.

    The commit makes all visible at once, leaves nothing in the repo but what was added, and is
    refused by the Hub if the repo moved meanwhile. After PublishError, AccessError, NetworkError
    or TargetError the repo is as it was, or empty if it did not exist.
    """

    def __init__(
        self,
        repo: str,
        *,
        private: bool = False,
        create_pr: bool = False,
        force: bool = False,
        mark: str = MANIFEST,
    ) -> None:
        self.repo, self.create_pr = repo, create_pr
        self._api = HfApi()
        self._head, self._present = _target_files(repo, force=force, mark=mark)
        if self._head is None:
            with explained(repo):
                self._api.create_repo(repo, private=private, exist_ok=True)
            self._head, self._present = _target_files(repo, force=force, mark=mark)
        self._added: dict[str, CommitOperationAdd] = {}
        self._copied: dict[str, tuple[Source, Callable[[], Path]]] = {}

    def add(self, path: str, file: Path) -> None:
        """Send `file`, which is to be `path` in the repo."""
        addition = CommitOperationAdd(path, file)
        try:
            with explained(self.repo):
                self._api.preupload_lfs_files(self.repo, [addition], create_pr=self.create_pr)
        except RuntimeError as error:  # what hf_xet raises when an upload breaks off
            if isinstance(error.__cause__, HfHubHTTPError):
                raise _explain_status(error.__cause__, self.repo) from None
            raise NetworkError(
                f"Uploading {path} to {self.repo} broke off ({first_line(error)}); nothing was "
                "published. Run the same command again."
            ) from None
        self._added[path] = addition

    def copy(self, path: str, source: Source, file: Callable[[], Path]) -> None:
        """Have the Hub copy `source` to `path`; if it will not, send what `file` fetches."""
        self._copied[path] = (source, file)

    def add_folder(self, folder: Path, progress: Progress = SILENT) -> None:
        """Send all files of `folder` that were not sent or copied already."""
        files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        todo = [path for path in files if path not in self._added and path not in self._copied]
        for path in progress.each("Uploading", todo, len(todo), "file"):
            self.add(path, files[path])

    def commit(self, message: str) -> str:
        """Make everything visible; return the URL of the commit or pull request."""
        with explained(self.repo), _told_if_moved(self.repo):
            if self._copied:
                copies = [source.copied_to(path) for path, (source, _) in self._copied.items()]
                try:
                    return self._commit(message, copies)
                except (HfHubHTTPError, FileDuplicationError, ValueError) as error:
                    if _final(error):
                        raise
                # Not every storage can be copied from, and not into every region.
                for path, (_, file) in self._copied.items():
                    self.add(path, file())
            return self._commit(message, [])

    def _commit(self, message: str, copies: Sequence[CommitOperationCopy]) -> str:
        names = {*self._added, *(copy.path_in_repo for copy in copies)}
        stale = [CommitOperationDelete(name) for name in sorted(self._present - names)]
        made = self._api.create_commit(
            self.repo,
            [*self._added.values(), *copies, *stale],
            commit_message=message,
            parent_commit=self._head,
            create_pr=self.create_pr,
        )
        return made.pr_url or made.commit_url


def _final(error: Exception) -> bool:
    """Whether a commit without copies would be refused as well."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 412)


@contextmanager
def _told_if_moved(repo: str) -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code == 412:
            raise PublishError(
                f"{repo} changed while the release was made; nothing was published. "
                "Run the same command again."
            ) from None
        raise

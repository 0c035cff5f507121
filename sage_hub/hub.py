"""The Hugging Face Hub: its errors in plain words, and publishing a folder in one commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
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
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
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
            f"The Hub did not answer about {repo} ({type(error).__name__}); try again."
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


def check_target(repo: str, *, force: bool = False) -> None:
    """Check before any work that a release may be published to `repo`.

    Raises AccessError without a token, TargetError if the repo holds something that is not a
    release of ours and `force` is not set.
    """
    with explained(repo):
        HfApi().whoami()
    _target_files(repo, force=force)


def _target_files(repo: str, *, force: bool) -> tuple[str | None, set[str]]:
    """The head commit of `repo` and its files; (None, empty) if it does not exist."""
    try:
        with explained(repo):
            info = HfApi().model_info(repo)
    except NotFoundError:
        return None, set()
    files = {s.rfilename for s in info.siblings or []} - {".gitattributes"}
    if files and MANIFEST not in files and not force:
        raise TargetError(
            f"{repo} exists and was not made by sage-hub (it has no {MANIFEST}); "
            "choose another --to, or replace it with --force."
        )
    return info.sha, files


def publish(
    folder: Path,
    repo: str,
    *,
    message: str,
    private: bool = False,
    create_pr: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> str:
    """Make `repo` hold exactly the files of `folder`, in one commit; return the commit's URL.

    Large files are uploaded first, where nobody sees them; the commit makes all visible at once
    and is refused by the Hub if the target moved meanwhile. After PublishError, AccessError,
    NetworkError or TargetError the target is as it was, or empty if it did not exist.
    """
    api = HfApi()
    head, present = _target_files(repo, force=force)
    if head is None:
        with explained(repo):
            api.create_repo(repo, private=private, exist_ok=True)
        head, present = _target_files(repo, force=force)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    stale = present - {operation.path_in_repo for operation in additions}
    with explained(repo):
        for addition in progress.each("Uploading", additions, len(additions), "file"):
            try:
                api.preupload_lfs_files(repo, [addition], create_pr=create_pr)
            except RuntimeError as error:  # what hf_xet raises when an upload breaks off
                raise NetworkError(
                    f"Uploading {addition.path_in_repo} to {repo} broke off "
                    f"({first_line(error)}); nothing was published. Run the same command again."
                ) from None
        try:
            commit = api.create_commit(
                repo,
                [*additions, *(CommitOperationDelete(name) for name in sorted(stale))],
                commit_message=message,
                parent_commit=head,
                create_pr=create_pr,
            )
        except HfHubHTTPError as error:
            if error.response.status_code == 412:
                raise PublishError(
                    f"{repo} changed while the release was made; nothing was published. "
                    "Run the same command again."
                ) from None
            raise
    return commit.pr_url or commit.commit_url

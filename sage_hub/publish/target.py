"""Where on the Hub something is to go, what is there, and whether the token may put it there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from huggingface_hub import HfApi

from sage_hub.checkpoint.hubfiles import HubFiles
from sage_hub.errors import (
    AccessError,
    NetworkError,
    NotFoundError,
    SageHubError,
    TargetError,
    UsageError,
)
from sage_hub.hub.client import LOG_IN, ask, check_usual_token, usable_token
from sage_hub.record.manifest import MANIFEST


@dataclass(frozen=True)
class Publication:
    """How something goes to a repo of the Hub.

    Raises UsageError for what excludes each other, AccessError for a token that cannot be one.
    """

    branch: str | None = None  # made from main if it is not there; None: main
    announce: bool = False  # on the unlearned model's repo, in a pull request
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
        if self.announce and (self.create_pr or self.branch not in (None, "main")):
            wrong = "--create-pr" if self.create_pr else "--branch"
            raise UsageError(
                f"--announce and {wrong} exclude each other: a release is announced when it is on "
                "main."
            )
        if self.token is not None:
            object.__setattr__(self, "token", usable_token(self.token) or None)
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
            "--announce": self.announce,
            "--tag": self.tag,
            "--private": self.private,
        }
        for option, value in asked.items():
            if value:
                raise UsageError(
                    f"{option} is for a repo of the Hub, and the target is a local one; leave it "
                    "away, or publish to org/name with --to."
                )

    @property
    def api(self) -> HfApi:
        """The Hub, with the token to write with. Raises AccessError if that cannot be one."""
        if self.token is None:
            check_usual_token()
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
    if how.create_pr and (number := open_pull_request(repo, how)) is not None:
        revision = f"refs/pr/{number}"
        return Head(revision, HubFiles(repo, revision, api=how.api))
    if how.branch and how.branch != "main":
        if how.branch not in {branch.name for branch in refs.branches}:
            return Head(how.branch, main, missing_branch=True, tags=tags)
        return Head(how.branch, HubFiles(repo, how.branch, api=how.api), tags=tags)
    return Head("main", main, tags=tags)


def open_pull_request(repo: str, how: Publication) -> int | None:
    """The number of the newest open one with our title, made by the owner of the token."""
    found = ask(
        repo,
        lambda: list(
            how.api.get_repo_discussions(
                repo,
                discussion_type="pull_request",
                discussion_status="open",
                author=None if by_identity(how) else how.api.whoami()["name"],
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
    if "/" not in repo:
        raise UsageError(f"Write the target with its owner, as in org/{repo}.")
    who = None if by_identity(how) else ask(repo, lambda: how.api.whoami())
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
    check_ours(repo, head, force=force, mark=mark)
    if how.private and not head.files.private:
        raise TargetError(
            f"{repo} exists and is public; make it private in its settings, or leave --private."
        )
    if how.tag and head.tags.get(how.tag, head.commit) != head.commit:
        raise tag_is_taken(repo, how.tag)


def by_identity(how: Publication) -> bool:
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
    if access_token(who).get("role") == "read":
        raise AccessError(
            f"The token of {who['name']} may only read; use one with write permission for {repo}."
        )


def access_token(who: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the Hub says of a token."""
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
    fine = access_token(who).get("fineGrained")
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


def target_warnings(repo: str, how: Publication) -> Iterator[str]:
    """What is no reason not to publish to `repo`, and should be known."""
    head = find_head(repo, how)
    if head.files is None or ".gitattributes" not in head.files.sizes:
        return
    rules = head.files.path(".gitattributes").read_text(encoding="utf-8", errors="replace")
    if rule := readme_rule(rules):
        yield (
            f"The .gitattributes of {repo} sends README.md to LFS ({rule}), where the Hub does not "
            "look for a card; remove that line."
        )


def readme_rule(gitattributes: str) -> str | None:
    """The pattern that sends README.md to LFS, of rules of which the last one counts."""
    found = None
    for line in gitattributes.splitlines():
        pattern, *attributes = line.split() or [""]
        if fnmatch("README.md", pattern.removeprefix("/").removeprefix("**/")):
            for attribute in attributes:
                if attribute.lstrip("-!").partition("=")[0] == "filter":
                    found = pattern if attribute == "filter=lfs" else None
    return found


def check_ours(repo: str, head: Head, *, force: bool, mark: str) -> None:
    """Raise TargetError if the repo has files, but not the `mark` of what we publish."""
    if head.names and mark not in head.names and not force:
        raise TargetError(
            f"{repo} exists and was not made by sage-hub for this (it has no {mark}); "
            "choose another --to, or replace it with --force."
        )


def tag_is_taken(repo: str, tag: str) -> TargetError:
    """The error that says so."""
    return TargetError(f"{repo} has the tag {tag} already, on another commit; give another --tag.")


def set_tag(repo: str, tag: str, commit: str, api: HfApi) -> None:
    """Have `tag` on `commit`. Raises TargetError if it is on another one."""
    try:
        ask(repo, lambda: api.create_tag(repo, tag=tag, revision=commit))
    except SageHubError as error:
        refs = ask(repo, lambda: api.list_repo_refs(repo))
        there = {known.name: known.target_commit for known in refs.tags}
        if there.get(tag) == commit:
            return
        if tag in there:
            raise tag_is_taken(repo, tag) from None
        raise type(error)(
            f"{error} The release is published as {commit[:12]}, without its tag {tag}; the "
            "same command sets it."
        ) from None

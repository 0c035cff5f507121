"""Who calls: the tokens that the Hub knows, and what their owners may write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class User:
    """Who a token stands for. The role is the token's; `orgs` are namespaces of the user's, too.

    A fine-grained token writes in the namespaces and repos of `scopes` alone, and that of a
    trusted publisher in one repo, without being anybody.
    """

    name: str
    role: Literal["read", "write", "fineGrained"] = "write"
    orgs: tuple[str, ...] = ()
    role_in_orgs: Literal["admin", "write", "contributor", "read"] = "write"
    scopes: tuple[str, ...] = ()
    only: str = ""

    def owns(self, repo_id: str) -> bool:
        namespace = repo_id.split("/")[0]
        return repo_id == self.only or namespace in (self.name, *self.orgs)

    def writes(self, repo_id: str) -> bool:
        if self.only:
            return repo_id == self.only
        if self.role == "fineGrained":
            return repo_id in self.scopes or repo_id.split("/")[0] in self.scopes
        reads_only = self.role_in_orgs == "read" and repo_id.split("/")[0] in self.orgs
        return self.role == "write" and not reads_only


TOKENS: Mapping[str, User] = {
    "hf_writer": User("alice", "write", ("org",)),
    "hf_reader": User("alice", "read", ("org",)),
    "hf_stranger": User("mallory", "write"),
    "hf_guest": User("bob", "write", ("org",), "read"),
    "hf_fine": User("alice", "fineGrained", ("org",), scopes=("org",)),
    "hf_narrow": User("alice", "fineGrained", ("org",), scopes=("org/one", "other")),
}
CI_SECRET = "ci-request-token"  # with which a job asks its CI for an id token
ID_TOKEN = "loopback-id-token"  # what the CI of a trusted publisher says of itself

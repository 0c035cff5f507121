"""Routes: who a token stands for, and tokens for jobs that a repo trusts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.loopback_hub.access import downloadable
from support.loopback_hub.messages import API, Call, HubError, Json, Response, Routes, as_json
from support.loopback_hub.users import ID_TOKEN, User

if TYPE_CHECKING:
    from support.loopback_hub.hub import LoopbackHub


def whoami(hub: LoopbackHub, call: Call) -> Response:
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    if call.user.only:
        raise HubError(403, "This token is nobody's")
    name, role = call.user.name, call.user.role_in_orgs
    orgs = [{"name": org, "roleInOrg": role} for org in call.user.orgs]
    token: Json = {"displayName": "t", "role": call.user.role}
    if call.user.role == "fineGrained":
        token["fineGrained"] = {
            "canReadGatedRepos": True,
            "global": [],
            "scoped": [
                {
                    "entity": {"type": "model" if "/" in scope else "org", "name": scope},
                    "permissions": ["repo.content.read", "repo.write"],
                }
                for scope in call.user.scopes
            ],
        }
    auth = {"type": "access_token", "accessToken": token}
    return as_json({"type": "user", "id": name, "name": name, "orgs": orgs, "auth": auth})


def id_token(hub: LoopbackHub, call: Call) -> Response:
    """Not the Hub's, but the CI's: what it says of the running job."""
    if call.query.get("audience") != hub.url:
        raise HubError(400, "wrong audience")
    return as_json({"value": ID_TOKEN})


def exchange_token(hub: LoopbackHub, call: Call) -> Response:
    """A token for a repo that trusts the job."""
    asked = call.body.json()
    if asked["subject_token"] != ID_TOKEN or asked["resource"] not in hub.trusting:
        raise HubError(400, "invalid_grant")
    token = "hf_jwt_" + asked["resource"].replace("/", "_")
    hub.tokens[token] = User("", "write", only=asked["resource"])
    return as_json({"access_token": token, "token_type": "bearer", "expires_in": 3600})


def auth_check(hub: LoopbackHub, call: Call) -> Response:
    repo = downloadable(hub, call)
    if call["write"]:
        call.require_writer(repo.id)
    return Response()


ROUTES: Routes = (
    ("GET", "/api/whoami-v2", whoami),
    ("GET", f"{API}/auth-check(?P<write>/write)?", auth_check),
    ("GET", "/ci/id-token", id_token),
    ("POST", "/oauth/token", exchange_token),
)

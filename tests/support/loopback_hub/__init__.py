"""A Hugging Face Hub on 127.0.0.1 that tests read from and publish to with the real client.

It speaks the part of the protocol that huggingface_hub uses for model and dataset repos, keeps
every commit and records every request. Two servers run, the Hub and the storage of LFS bytes:
they differ in port, so the client treats them as it treats huggingface.co and its CDN. A handler
is a plain function of the hub and a call, listed in the ROUTES of its module.
"""

from support.loopback_hub.hub import LoopbackHub
from support.loopback_hub.messages import Request
from support.loopback_hub.repos import Blob
from support.loopback_hub.users import CI_SECRET, TOKENS
from support.loopback_hub.xet import XetStores

__all__ = ["CI_SECRET", "TOKENS", "Blob", "LoopbackHub", "Request", "XetStores"]

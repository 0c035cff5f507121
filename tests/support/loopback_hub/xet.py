"""Xet: stores on this disk that hf_xet takes for the service."""

from __future__ import annotations

import itertools
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from support.loopback_hub.messages import Json
from support.loopback_hub.repos import Blob


class XetStores:
    """Local Xet stores, a fresh one for every token: a process that opens a store locks it."""

    def __init__(self, folder: Path) -> None:
        import hf_xet  # type: ignore[import-untyped]  # not sooner: it opens a log at import

        self.folder = folder
        self._hf_xet: Any = hf_xet
        self._numbers = itertools.count()

    @staticmethod
    def access(store: Path) -> Json:
        expiry = int(time.time()) + 3600
        return {"endpoint": f"local://{store}", "token": "t", "token_expiry_unix_secs": expiry}

    def lend(self, blobs: Iterable[Blob] = ()) -> Path:
        """A new store that holds these files."""
        store = self.folder / str(next(self._numbers))
        store.mkdir(parents=True)
        if files := [str(blob.content) for blob in blobs if blob.xet_hash]:
            with self._hf_xet.XetSession().new_upload_commit(**self.access(store)) as upload:
                for file in files:
                    upload.start_upload_file(file)
        return store

    def hash(self, path: Path) -> str:
        return str(self._hf_xet.hash_files([str(path)])[0].hash)

    def find(self, stores: Iterable[Path], sha256: str) -> tuple[Path, str] | None:
        """The store that a client put this file into, and the file's Xet hash."""
        for store in stores:
            for shard in store.rglob("shards/*.mdb"):
                if xet_hash := dict(_shard_files(shard.read_bytes())).get(sha256):
                    return store, xet_hash
        return None

    def fetch(self, store: Path, xet_hash: str, size: int, target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            # The client may hold the lock still, so open a copy. The lock is on the database file.
            copy = shutil.copytree(store, Path(folder) / "store", copy_function=_link_or_copy)
            session, info = self._hf_xet.XetSession(), self._hf_xet.XetFileInfo(xet_hash, size)
            with session.new_file_download_group(**self.access(copy)) as download:
                download.start_download_file(info, str(target))


def _link_or_copy(source: str, target: str) -> None:
    (shutil.copyfile if source.endswith(".redb") else os.link)(source, target)


def _shard_files(shard: bytes) -> Iterator[tuple[str, str]]:
    """SHA-256 and Xet hash of each file in a shard, as hf_xet 1.8 lays it out in rows of 48 bytes.

    A commit names a file by its SHA-256 only; the shard is where the client says both.
    """
    row, has_verification, has_sha256 = 48, 1 << 31, 1 << 30
    at = row  # behind the shard's own header
    while shard[at : at + 32] != b"\xff" * 32:
        xet_hash = _xet_hex(shard[at : at + 32])
        flags, segments = struct.unpack_from("<II", shard, at + 32)
        at += row * (1 + segments * (2 if flags & has_verification else 1))
        if flags & has_sha256:
            yield _xet_hex(shard[at : at + 32]), xet_hash
            at += row


def _xet_hex(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))

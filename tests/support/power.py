"""What is left on a disk when the power goes: names, and of the contents what was synced.

That is how file systems with a journal do it: what became of a name is kept in its order, while
bytes that nobody asked to be written down may be missing, or be zeros.
"""

from __future__ import annotations

import os
import random
from pathlib import Path


def note_syncs(log: Path) -> None:
    """From here on this process writes down which files it syncs, and how long they are then."""
    fsync = os.fsync
    notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(file: int) -> None:
        fsync(file)
        about = os.fstat(file)
        os.write(notes, f"{about.st_ino} {about.st_size}\n".encode())

    os.fsync = noted


def lose_power(folder: Path, log: Path, chance: random.Random) -> int:
    """Drop what was not synced of the files in `folder`; how many have lost something."""
    synced: dict[int, int] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        inode, size = map(int, line.split())
        synced[inode] = size
    lost = 0
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        about = path.stat()
        sure = min(synced.get(about.st_ino, 0), about.st_size)
        left = chance.choice([sure, chance.randint(sure, about.st_size)])
        if left < about.st_size:
            lost += 1
            os.truncate(path, left)
            if chance.random() < 0.3:  # as long as it was, but empty
                os.truncate(path, about.st_size)
    return lost

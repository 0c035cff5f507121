"""The statistics file: what calibration saw of each site, memory-mapped and checked when opened.

A safetensors file. Per set (`retain`, and `forget` if there is one) and site it holds
`<set>/<site>/basis`, (k, in), and `<set>/<site>/values` (k,); its metadata says
which model, tokenizer, data and settings they belong to. docs/formats.md describes it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sage_hub.calibration.journal import Journal
from sage_hub.checkpoint.hubfiles import HubFiles
from sage_hub.checkpoint.tensorfile import (
    FLOATS,
    TensorReader,
    dtype_name,
    file_sha256,
    layout,
)
from sage_hub.checkpoint.tensorwriter import TensorWriter
from sage_hub.errors import CorruptCheckpointError, NotFoundError, StatisticsError
from sage_hub.method.spectra import Spectrum
from sage_hub.model.sites import Site
from sage_hub.settings import Settings

REPO_FILE = "statistics.safetensors"  # in a repo of the Hub
REPO = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
FORMAT = "sage-hub-statistics"
VERSION = "4"

# Directions are stored up to this energy even where the filter uses fewer, because a bias is
# exact only along stored directions.
STORED_ENERGY = 0.99


def stored_energy(settings: Settings) -> float:
    """How much of each trace the stored directions hold; the filter may use fewer of them."""
    return max(settings.sharpness[1], STORED_ENERGY)


@dataclass(frozen=True)
class Origin:
    """What a statistics file belongs to; all of it is checked before the file is used."""

    model: str
    commit: str | None
    weights: str  # Checkpoint.fingerprint()
    tokenizer: str  # Checkpoint.tokenizer_fingerprint()
    data: dict[str, dict[str, Any]]  # set -> Proxy.describe(), with the tokens that were used
    settings: dict[str, Any]  # what calibration depends on

    @property
    def published_data(self) -> dict[str, dict[str, Any]]:
        """`data` without the row hashes, which serve only to keep evaluation rows apart."""
        return {
            which: {key: value for key, value in about.items() if key != "row_hashes"}
            for which, about in self.data.items()
        }


@dataclass(frozen=True)
class Ready:
    """Statistics that were made before: a local file, or one of a Hub repo at a commit."""

    name: str  # fit to publish, and enough to find it again: of a file its name
    path: Callable[[], Path]  # fetches it if need be
    sha256: Callable[[], str]
    missing_bytes: int  # to be fetched


def find_ready(text: str | Path) -> Ready:
    """The statistics that `text` names: a file, or `org/name[@revision]` of the Hub.

    Raises NotFoundError or AccessError.
    """
    path = Path(text).expanduser()
    local = str(text).startswith(("./", "../", "/", "~")) or path.suffix == ".safetensors"
    if local or path.exists() or not REPO.fullmatch(str(text)):
        if not path.is_file():
            wrong = "is a folder" if path.is_dir() else "does not exist"
            raise NotFoundError(
                f"The statistics file {text} {wrong}; --stats takes a file that `sage-hub stats` "
                "has written, or a repo of the Hub."
            )
        return Ready(path.name, lambda: path, lambda: file_sha256(path), 0)
    repo, _, revision = str(text).partition("@")
    files = HubFiles(repo, revision or None)
    if REPO_FILE not in files.sizes:
        raise NotFoundError(f"{repo} has no {REPO_FILE}; make one with `sage-hub stats --to`.")
    return Ready(
        f"{repo}@{files.commit}",
        lambda: files.path(REPO_FILE),
        lambda: files.sha256(REPO_FILE),
        files.missing_bytes([REPO_FILE]),
    )


@dataclass(frozen=True)
class Statistics:
    """An open statistics file. Spectra are read from it one at a time."""

    origin: Origin
    sites: tuple[Site, ...]
    fingerprint: str
    _scalars: dict[str, dict[str, Any]]
    _file: TensorReader

    @property
    def site_of(self) -> dict[str, Site]:
        """Module name -> its site."""
        return {module: site for site in self.sites for module in site.modules}

    @property
    def sketched(self) -> dict[str, float]:
        """Set and site of each sketched moment -> the share of its trace that was not seen."""
        return {
            f"{which}/{site}": scalars["missed"]
            for which, own in self._scalars.items()
            for site, scalars in own.items()
            if scalars["missed"] is not None
        }

    @property
    def outputs(self) -> dict[str, float]:
        """Map -> tr(W_b C W_bᵀ), the mean of ‖W_b x‖² over the retain proxy."""
        own = self._scalars["retain"].values()
        return {name: mean for scalars in own for name, mean in scalars["outputs"].items()}

    def has(self, which: str) -> bool:
        """Whether there are spectra of the set `which`."""
        return which in self._scalars

    def spectrum(self, which: str, site: Site) -> Spectrum:
        """The spectrum of `site` on the set `which`, mapped from the file, not copied.

        Raises StatisticsError if it is not there.
        """
        scalars = self._scalars.get(which, {}).get(site.name)
        if scalars is None:
            raise StatisticsError(
                f"The statistics have nothing of {site.name} on the {which} set; make them anew "
                "with `sage-hub stats`."
            )
        return Spectrum(
            basis=self._file.map(f"{which}/{site.name}/basis"),
            values=self._file.map(f"{which}/{site.name}/values"),
            trace=scalars["trace"],
            tokens=scalars["tokens"],
            missed=scalars["missed"],
        )


def write_statistics(path: Path, origin: Origin, sites: Sequence[Site], spectra: Journal) -> None:
    """Write `spectra`, named `<set>/<site>`, as the statistics file of `sites`.

    It gets its name only when it is whole.
    """
    scalars: dict[str, dict[str, Any]] = {}
    for name in spectra:
        which, _, site = name.partition("/")
        scalars.setdefault(which, {})[site] = spectra.scalars(name)
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        "origin": json.dumps(asdict(origin), sort_keys=True),
        "sites": json.dumps([asdict(site) for site in sites]),
        "scalars": json.dumps(scalars, sort_keys=True),
    }
    # What has 8 bytes goes first: the format wants each tensor aligned to its type.
    parts = [(name, part) for part in ("values", "basis") for name in spectra]
    parts.sort(key=lambda one: (one[1] == "basis", -spectra.empty(*one).itemsize))
    infos = layout(
        (f"{name}/{part}", dtype_name(empty.dtype), tuple(empty.shape))
        for name, part in parts
        for empty in (spectra.empty(name, part),)
    )
    with TensorWriter(path, infos, metadata) as writer:
        for name, part in parts:
            writer.write(f"{name}/{part}", spectra.read(name, part))


@contextmanager
def open_statistics(path: Path) -> Iterator[Statistics]:
    """Map the statistics file at `path`. Raises NotFoundError or StatisticsError."""
    if not path.is_file():
        raise NotFoundError(f"The statistics file {path} does not exist; check --stats.")
    try:
        reader = TensorReader(path)
    except CorruptCheckpointError:
        raise StatisticsError(
            f"{path} is not a statistics file, or not all of one; make one with `sage-hub stats`."
        ) from None
    with reader:
        metadata = reader.header.metadata
        if metadata.get("format") != FORMAT:
            raise StatisticsError(
                f"{path} is not a statistics file; make one with `sage-hub stats`."
            )
        if metadata.get("format_version") != VERSION:
            raise StatisticsError(
                f"{path} has the statistics format {metadata.get('format_version')}, this "
                f"sage-hub reads {VERSION}; make it anew with `sage-hub stats`."
            )
        try:
            statistics = Statistics(
                origin=Origin(**json.loads(metadata["origin"])),
                sites=tuple(
                    Site(**{**site, "modules": tuple(site["modules"])})
                    for site in json.loads(metadata["sites"])
                ),
                fingerprint=file_sha256(path),
                _scalars=json.loads(metadata["scalars"]),
                _file=reader,
            )
            _check_metadata(statistics)
        except (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ):
            raise StatisticsError(
                f"The metadata of {path} are damaged; make it anew with `sage-hub stats`."
            ) from None
        yield statistics


def _check_metadata(found: Statistics) -> None:
    """Raise an error of Python's own if something is not what `write_statistics` writes."""
    origin, sizes = found.origin, {site.name: site.size for site in found.sites}
    texts = [origin.model, origin.weights, origin.tokenizer, *found.site_of]
    if origin.commit is not None:
        texts.append(origin.commit)
    numbers = [float(origin.settings["energy"]), origin.settings["rank"] or 0]
    for which in found._scalars.keys() | {"retain"}:
        about = origin.data[which]
        texts += [about["name"], about["fingerprint"], *about["row_hashes"]]
        for site, own in found._scalars[which].items():
            values = found._file.header.tensors[f"{which}/{site}/values"]
            basis = found._file.header.tensors[f"{which}/{site}/basis"]
            fits = basis.shape == (*values.shape, sizes[site]) and len(values.shape) == 1
            numbers += [own["trace"], own["tokens"], own["missed"] or 0, *own["outputs"].values()]
            if not (fits and {basis.dtype, values.dtype} <= FLOATS):
                raise ValueError(f"{which}/{site} has another shape or type")
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("a number is none")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a name is no text")


def is_whole(path: Path) -> bool:
    """Whether the file at `path` is there and is a statistics file of this version."""
    try:
        with open_statistics(path):
            return True
    except (NotFoundError, CorruptCheckpointError, StatisticsError):
        return False


def check_belongs(
    statistics: Statistics,
    *,
    name: str,
    weights: str,
    tokenizer: str,
    energy: float,
    rank: int | None,
) -> None:
    """Raise StatisticsError unless `statistics` were taken of this very model and suffice."""
    origin = statistics.origin
    if origin.weights != weights:
        raise StatisticsError(
            f"The statistics are of other weights than {name} (they were taken of "
            f"{origin.model}{'@' + origin.commit if origin.commit else ''}); "
            "make them anew with `sage-hub stats`."
        )
    if origin.tokenizer != tokenizer:
        raise StatisticsError(
            f"The statistics were taken with another tokenizer than that of {name}; "
            "make them anew with `sage-hub stats`."
        )
    stored = max(float(origin.settings["energy"]), STORED_ENERGY)
    if energy > stored:
        raise StatisticsError(
            f"The statistics hold directions up to the energy {stored}, not {energy}; make them "
            f"anew with `sage-hub stats --energy {energy}`."
        )
    held = origin.settings["rank"]
    if held is not None and (rank is None or rank > held):
        raise StatisticsError(
            f"The statistics hold at most {held} directions per site; use --rank {held}, or make "
            "them anew with `sage-hub stats`."
        )

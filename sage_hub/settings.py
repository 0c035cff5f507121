"""The settings of a run: command line over sage.yaml over defaults, checked, and recorded whole."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from sage_hub.checkpoint import Files
from sage_hub.errors import NotFoundError, UsageError

CONFIG = "sage.yaml"
OUT_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
SETS = ("retain", "forget", "heldout")
SOURCES = (*SETS, "unseen", "reference")  # settings that name a file, a folder or a repo
SUITES = ("auto", "tofu", "muse", "choice", "text")
# What gates call other things by.
NAMES_OF_THE_RECORD = (
    *("base", "unlearned", "control", "sanitized", "robustness", "bias", "gain", "all"),
    *("control_alpha", "retain_recovered"),
)
SEARCH_TOKENS = 16_384  # of each set that a search for the gain evaluates, at most
_NAME = re.compile(r"[a-z][a-z0-9_]*")
# They bear on what is said of a release and not on what it is: a finished one is not made again.
ABOUT_THE_RECORD = ("gates", "results", "card_template")


@dataclass(frozen=True)
class Settings:
    """All that changes the result. `None` for a set means: not given.

    Raises UsageError for a value out of its range.
    """

    retain: str | None = None  # proxies: see `sage_hub.proxies.read_proxy`
    forget: str | None = None
    heldout: str | None = None
    unseen: str | None = None  # what no model was trained on, for PrivLeak
    bystanders: Mapping[str, str] = field(default_factory=dict)  # name -> more sets to evaluate on
    reference: str | None = None  # a model that never saw the forget set: repo or folder
    strength: float | None = None  # λ ≥ 0; inf is the hard projection; see `sharpness`
    energy: float | None = None  # ρ in (0, 1]; see `sharpness`
    rank: int | None = None  # cap on k
    gain: float | Literal["match", "auto"] = "auto"  # γ; see `gain_rule`
    target: float | None = None  # what a search for γ brings the forget set's level to
    max_tokens: int = 131_072  # of each proxy, in calibration
    max_length: int = 2_048  # of a row, in tokens
    batch_size: int = 8
    moments: Literal["auto", "exact", "sketch"] = "auto"  # auto: exact where memory allows
    memory: float = 8.0  # GB that calibration and evaluation may take
    device: str = "auto"
    seed: int = 0  # which rows are taken where a proxy has more than max_tokens
    chat_template: bool = True
    parameters: Literal["linear", "all"] = "linear"  # all: embedding, head, norms, biases too
    out_dtype: str | None = None  # of the release's floating point tensors; None: the unlearned's
    low_disk: bool = False  # keep a downloaded shard only while it is read
    merge: bool = False  # an adapter's release is a whole model
    suite: str = "auto"  # which metrics; auto: by the columns of each set
    generate_rows: int = 100  # of each set, whose answers are generated; 0: none
    robustness: bool = False  # measure what brings forgotten knowledge back
    lm_eval: str | None = None  # tasks of lm-eval to run, with commas between
    gates: tuple[str, ...] = ()  # conditions that stop a release: see sage_hub.gates
    results: Mapping[str, str] = field(default_factory=dict)  # model -> results made elsewhere
    card_template: str | None = None  # a file, or the name of a template that comes with sage-hub

    def __post_init__(self) -> None:
        if isinstance(self.gates, (list, tuple)):  # YAML knows lists alone
            object.__setattr__(self, "gates", tuple(self.gates))
        if not isinstance(self.gates, tuple) or not all(isinstance(g, str) for g in self.gates):
            raise UsageError(f"gates must be a list of conditions, not {self.gates!r}.")
        strength, energy = self.sharpness
        _number(strength, "strength", lambda x: x >= 0, "0 or more")
        _number(energy, "energy", lambda x: 0 < x <= 1, "above 0 and at most 1")
        if self.gain not in ("match", "auto"):
            _number(self.gain, "gain", lambda x: 0 < x < math.inf, "above 0, 'match' or 'auto'")
        if self.target is not None:
            _number(self.target, "target", math.isfinite, "a number")
            if self.gain != "auto":
                raise UsageError("A target is what gain 'auto' brings the forget set to; set that.")
        for name in ("max_tokens", "max_length", "batch_size"):
            _integer(getattr(self, name), name, least=1)
        _integer(self.seed, "seed", least=0)
        if self.rank is not None:
            _integer(self.rank, "rank", least=1)
        for name in (*SOURCES, "device"):
            value = getattr(self, name)
            if not (isinstance(value, str) or (value is None and name != "device")):
                raise UsageError(f"{name} must be text, not {value!r}.")
            if value == "":
                raise UsageError(f"{name} is empty; leave it away or give it a value.")
        _number(self.memory, "memory", lambda x: 0 < x < math.inf, "above 0, in GB")
        _one_of(self.moments, "moments", ("auto", "exact", "sketch"))
        _one_of(self.out_dtype, "out_dtype", (None, *OUT_DTYPES))
        _one_of(self.parameters, "parameters", ("linear", "all"))
        _one_of(self.suite, "suite", SUITES)
        _integer(self.generate_rows, "generate_rows", least=0)
        _mapping(self.bystanders, "bystanders")
        _mapping(self.results, "results")
        for name in self.bystanders:
            if not _NAME.fullmatch(name) or name in (*SOURCES, *NAMES_OF_THE_RECORD):
                raise UsageError(
                    f"A bystander set cannot be called {name!r}; use a word of small letters, "
                    f"digits and _ that is none of {', '.join((*SOURCES, *NAMES_OF_THE_RECORD))}."
                )
        for name in self.results:
            _one_of(name, "a model of results", ("base", "unlearned", "sanitized"))
        for name in ("lm_eval", "card_template"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str)):
                raise UsageError(f"{name} must be text, not {value!r}.")
        for name in ("chat_template", "merge", "low_disk", "robustness"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be true or false, not {getattr(self, name)!r}.")

    def describe(self) -> dict[str, Any]:
        """The settings for the record, without local paths."""
        strength, energy = self.sharpness
        described = asdict(self) | {"strength": strength, "energy": energy}
        for name in ABOUT_THE_RECORD:
            del described[name]
        for name in (*SETS, "unseen"):
            described[name] = _published(described[name])
        described["bystanders"] = {k: _published(v) for k, v in self.bystanders.items()}
        if self.lm_eval:
            described["lm_eval"] = ",".join(Path(task).name for task in self.lm_eval.split(","))
        if self.reference and Path(self.reference).expanduser().exists():
            described["reference"] = f"./{Path(self.reference).resolve().name}"
        if math.isinf(strength):
            described["strength"] = "inf"  # JSON has no infinity
        return described

    @classmethod
    def from_record(cls, described: Mapping[str, Any]) -> Settings:
        """What `describe` wrote; files are taken from the current folder.

        Raises UsageError for a setting that this version does not know.
        """
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in described if name not in names]:
            raise UsageError(
                f"The record has the setting {unknown[0]!r}, which this sage-hub does not know; "
                "use the version that it names."
            )
        values = dict(described)
        if values.get("strength") == "inf":
            values["strength"] = math.inf
        return cls(**values)

    def to_calibrate(self) -> Settings:
        """These, without the sets that only serve to evaluate."""
        return replace(self, heldout=None, unseen=None, bystanders={})

    def without_evaluation(self) -> Settings:
        """What makes the same weights, and evaluates as little as it can."""
        return replace(
            self.to_calibrate(),
            forget=None if self.gain_rule == "number" else self.forget,
            reference=self.reference if self.gain_rule == "search" else None,
            generate_rows=0,
            robustness=False,
            lm_eval=None,
        )

    @property
    def gain_rule(self) -> Literal["number", "match", "search"]:
        """How γ is found: as given, in closed form, or by evaluating what a few would make.

        "auto" is a search over evaluations. With `low_disk`, where each would download both sides
        anew, it is the closed form, and without a forget set 1.
        """
        if self.gain == "match":
            return "match"
        if self.gain != "auto" or self.forget is None:
            return "number"
        return "match" if self.low_disk else "search"

    @property
    def sharpness(self) -> tuple[float, float]:
        """λ and ρ: as given, else what suits the way the gain is found (docs/results.md)."""
        strength, energy = (100.0, 0.99) if self.gain_rule == "search" else (10.0, 0.9)
        return (
            strength if self.strength is None else self.strength,
            energy if self.energy is None else self.energy,
        )

    @property
    def sets(self) -> dict[str, str]:
        """Every set that is given: name -> where it is."""
        named = {name: getattr(self, name) for name in (*SETS, "unseen")}
        return {name: source for name, source in named.items() if source} | dict(self.bystanders)

    @property
    def files(self) -> list[Path]:
        """All local files that they name."""
        template = [] if self.card_template in (None, "short") else [self.card_template]
        named = [*self.sets.values(), *self.results.values(), *template]
        return [Path(name).expanduser() for name in named if name and "://" not in name]

    @property
    def stored_dtype(self) -> str | None:
        """`out_dtype` as safetensors names it."""
        return None if self.out_dtype is None else OUT_DTYPES[self.out_dtype]

    def resolve_device(self) -> Settings:
        """The settings with "auto" replaced. Raises UsageError for a device that is not here."""
        import torch

        if self.device == "auto":
            return replace(self, device="cuda" if torch.cuda.is_available() else "cpu")
        try:
            # "meta" is a device to torch, but nothing can be computed on it.
            torch.ones(1, device=self.device).item()
        except Exception:
            raise UsageError(
                f"The device {self.device!r} is not available here; use --device cpu."
            ) from None
        return self


def load_settings(
    given: Mapping[str, Any], *, config: str | None, unlearned: Files | None
) -> Settings:
    """Settings from `given` (the command line), then sage.yaml, then the defaults.

    The file is `config`, else sage.yaml in the current folder, else the one in the repo of
    `unlearned`. Paths in it are relative to it. Raises UsageError with the key and file.
    """
    return Settings(**{**_read_config(config, unlearned), **given})


def settings_file(config: str | None, unlearned: Files | None) -> str | None:
    """What the file that `load_settings` reads is called; None if there is none."""
    if config is not None:
        return config
    if Path(CONFIG).is_file():
        return CONFIG
    return f"{CONFIG} of {unlearned.name}" if unlearned and CONFIG in unlearned.sizes else None


def _read_config(config: str | None, unlearned: Files | None) -> dict[str, Any]:
    shown = settings_file(config, unlearned)
    if shown is None:
        return {}
    if config is not None:
        if not Path(config).is_file():
            raise NotFoundError(f"The settings file {config} does not exist.")
        return _beside(_parse(Path(config), config), Path(config).parent)
    if shown == CONFIG or unlearned is None:
        return _parse(Path(CONFIG), CONFIG)
    path = unlearned.path(CONFIG)
    values = _parse(path, shown)
    if unlearned.commit is None:
        return _beside(values, path.parent)
    return _in_repo(values, unlearned, shown)


def _parse(path: Path, shown: str) -> dict[str, Any]:
    """The settings in a file, checked. Raises UsageError with the file, and the line or key."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{shown}{line}: not valid YAML.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{shown} must be a mapping of settings.")
    known = [field.name for field in fields(Settings)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}."
            raise UsageError(f"{shown}: unknown setting {key!r}; {hint}")
    if values.get("strength") == "inf":  # as the record writes it
        values["strength"] = math.inf
    try:
        Settings(**values)
    except UsageError as error:
        raise UsageError(f"{shown}: {error}") from None
    return values


def _located(values: dict[str, Any], locate: Callable[[str, str], str]) -> dict[str, Any]:
    """`values` with every file that they name where `locate` (setting, file) says it is."""

    def found(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: found(name, one) for key, one in value.items()}
        return value if not value or value.startswith("hf://") else locate(name, value)

    files = [*SETS, "unseen", "bystanders", "results"]
    if values.get("card_template") not in (None, "short"):
        files.append("card_template")
    return values | {name: found(name, values[name]) for name in files if name in values}


def _beside(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The paths in a settings file are relative to it."""
    if (values.get("reference") or "").startswith((".", "~")):
        values["reference"] = str(folder / Path(values["reference"]).expanduser())
    if tasks := values.get("lm_eval"):
        values["lm_eval"] = ",".join(
            str(folder / task) if task.endswith((".yaml", ".yml")) else task
            for task in map(str.strip, tasks.split(","))
        )
    return _located(values, lambda _, file: str(folder / Path(file).expanduser()))


def _in_repo(values: dict[str, Any], files: Files, shown: str) -> dict[str, Any]:
    """A file that came with somebody's repo may name files of that repo, not of this machine."""

    def locate(name: str, file: str) -> str:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UsageError(f"{shown}: {name} must be a file of the repo or hf://datasets/….")
        return str(files.path(file))

    tasks = (values.get("lm_eval") or "").split(",")
    if any(task.strip().endswith((".yaml", ".yml")) for task in tasks):
        raise UsageError(f"{shown}: lm_eval must name tasks; a task's file may run code.")
    if (values.get("reference") or "").startswith((".", "/", "~")):
        raise UsageError(f"{shown}: reference must be a repo of the Hub.")
    return _located(values, locate)


def _published(source: str | None) -> str | None:
    """A set as the record names it: of a file no folder."""
    return source if source is None or source.startswith("hf://") else Path(source).name


def _mapping(value: object, name: str) -> None:
    if not isinstance(value, Mapping) or not all(
        isinstance(word, str) and word for pair in value.items() for word in pair
    ):
        raise UsageError(f"{name} must map names to files, not {value!r}.")


def _number(value: object, name: str, fits: Any, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise UsageError(f"{name} must be {wanted}, not {value!r}.")


def _one_of(value: object, name: str, known: tuple[str | None, ...]) -> None:
    if value not in known:
        names = " or ".join(word for word in known if word)
        raise UsageError(f"{name} must be {names}, not {value!r}.")


def _integer(value: object, name: str, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}.")

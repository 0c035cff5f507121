"""The settings of a run, each declared once: name, default, values, help, and whose option it is.

The options of the commands, the check of sage.yaml, its JSON Schema and docs/settings.md follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sage_hub.errors import UsageError
from sage_hub.kinds import (
    DATE,
    PROXY,
    SWITCH,
    Kind,
    Setting,
    choice,
    files_of,
    number,
    text,
    texts,
    whole,
)

OUT_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
SETS = ("retain", "forget", "heldout")
GUARD = "guard"  # the set that the base writes where there is none to forget
# What gates call other things by, so that no bystander can be called that.
_TAKEN = [
    *(*SETS, GUARD, "unseen", "reference", "base", "unlearned", "control", "sanitized"),
    *("robustness", "bias", "gain", "all", "control_alpha", "retain_recovered"),
]
MODELS = ("reference", "tokenizer")  # settings that name a repo or a folder
OF_PROMPTS = ("date", "template", "system_prompt")  # what prompts depend on, if given
SEARCH_TOKENS = 16_384  # of each set that a search for the gain evaluates, at most
# They bear on what is said of a release and not on what it is: a finished one is not made again.
ABOUT_THE_RECORD = ("gates", "results", "card_template")


def _setting(group: str, default: Any, kind: Kind, what: str, **more: Any) -> Any:
    about = {"group": group, "kind": kind, "help": what, **more}
    if callable(default):
        return field(default_factory=default, metadata=about)
    return field(default=default, metadata=about)


GROUPS = ("data", "release", "evaluation", "record", "method", "computation")
_data, _release, _evaluation, _record, _method, _computation = (
    partial(_setting, group) for group in GROUPS
)


@dataclass(frozen=True)
class Settings:
    """All that changes the result. `None` for a set means: not given.

    Raises UsageError for a value out of its range.
    """

    retain: str | None = _data(
        None, PROXY, "what must be kept", usual="rows that the base writes; general ones for audit"
    )
    forget: str | None = _data(None, PROXY, "what must go")
    heldout: str | None = _data(None, PROXY, "retained knowledge outside the proxy, to evaluate on")
    unseen: str | None = _evaluation(None, PROXY, "what no model was trained on, for PrivLeak")
    bystanders: Mapping[str, str] = _evaluation(
        dict,
        files_of(
            "NAME=PROXY",
            "names (small letters, digits and _, but no word of the record like base or gain)",
            rf"(?!({'|'.join(_TAKEN)})$)[a-z][a-z0-9_]*",
        ),
        "further sets to evaluate on, by name",
        option="--bystander",
    )
    reference: str | None = _evaluation(
        None,
        text("MODEL"),
        "model that never saw the forget set, for forget quality, PrivLeak and gain",
    )
    strength: float | None = _method(
        None,
        number("λ", "inf", minimum=0),
        "how strongly retained directions are protected; 0 is the source, inf a hard projection",
        usual="100; 10 where no gain is searched for",
    )
    energy: float | None = _method(
        None,
        number("ρ", exclusiveMinimum=0, maximum=1),
        "share of the retained inputs' energy that is protected",
        usual="0.99; 0.9 where no gain is searched for",
    )
    rank: int | None = _method(None, whole(1, "K"), "protect at most so many directions per site")
    gain: float | Literal["match", "auto"] = _method(
        "auto",
        number("γ", "match", "auto", exclusiveMinimum=0),
        "turn up what remains of the update: a number, 'match' or 'auto'",
    )
    target: float | None = _method(
        None,
        number("LEVEL"),
        "what gain 'auto' brings the forget set to",
        usual="the source's level",
    )
    keep: float = _method(
        0.89,
        number("SHARE", exclusiveMinimum=0, maximum=1),
        "without --forget gain 'auto' keeps this share of what was lost on rows the base writes",
    )
    max_tokens: int = _computation(131_072, whole(1), "tokens of each set that are used, at most")
    max_length: int = _computation(2_048, whole(1), "longest row in tokens")
    batch_size: int = _computation(8, whole(1), "rows at a time")
    moments: Literal["auto", "exact", "sketch"] = _method(
        "auto",
        choice("auto", "exact", "sketch"),
        "second moments exact or sketched; auto: exact where memory allows",
    )
    memory: float = _computation(
        8.0, number("GB", exclusiveMinimum=0), "GB that calibration and evaluation may take"
    )
    device: str = _computation(
        "auto", text("DEVICE"), "cpu, cuda, mps", usual="cuda if there is one"
    )
    compute_dtype: str = _computation(
        "auto",
        choice("auto", "float32", "bfloat16", "float16"),
        "type in which models are run",
        usual="as the base is stored; on a CPU float32 where that is clearly faster",
    )
    seed: int = _computation(0, whole(0), "for the choice of rows")
    chat_template: bool = _computation(
        True, SWITCH, "put rows into the tokenizer's chat template, if it has one"
    )
    template: str | None = _computation(
        None,
        text("NAME"),
        "which of the tokenizer's chat templates, if they have names",
        option="--chat-template",
        usual="the one called default",
    )
    system_prompt: str | None = _computation(
        None,
        text("TEXT"),
        "what the system says, in the chat template, before rows in which it says nothing",
        usual="what the template writes of its own",
    )
    tokenizer: str | None = _computation(
        None,
        text("REPO|FOLDER"),
        "whose tokenizer makes tokens of the rows",
        usual="the base's, else the unlearned side's, else the reference's",
    )
    pickled_weights: bool = _computation(
        False,
        SWITCH,
        "read weights that are there as pickles alone: their tensors, and no code is run",
    )
    date: str | None = _computation(
        None, DATE, "the date for chat templates that write one", usual="that of today"
    )
    out_dtype: str | None = _release(
        None,
        choice(*OUT_DTYPES),
        "store the release in this type",
        usual="as the unlearned side does",
    )
    low_disk: bool = _release(
        False, SWITCH, "keep a shard of each source at a time, and of the result what is evaluated"
    )
    merge: bool = _release(
        False, SWITCH, "where UNLEARNED is an adapter: write the whole model, not an adapter"
    )
    carry: tuple[str, ...] = _release(
        (),
        texts("GLOB", "names or globs of files"),
        "bring files along that would stay behind, as 'assets/*'; weights never come",
    )
    suite: str = _evaluation(
        "auto",
        choice("auto", "tofu", "muse", "choice", "text"),
        "which metrics",
        usual="auto, by the columns of each set",
    )
    generate_rows: int = _evaluation(
        100, whole(0), "rows of each set whose answers are generated, for ROUGE; 0: none"
    )
    robustness: bool = _evaluation(
        False,
        SWITCH,
        "evaluate after int8 and int4 rounding and relearning, on other wordings, and by sampling",
    )
    depth: bool = _evaluation(False, SWITCH, "measure the Unlearning Depth Score, by a --reference")
    lm_eval: str | None = _evaluation(None, text("TASKS"), "run these tasks of lm-eval too: a,b")
    gates: tuple[str, ...] = _record(
        (),
        texts("CONDITION", "conditions"),
        "stop unless each is met, as 'heldout.probability >= base - 0.1'",
        option="--gate",
    )
    results: Mapping[str, str] = _record(
        dict,
        files_of("MODEL=PATH", "base, unlearned or sanitized", "base|unlearned|sanitized"),
        "results of open-unlearning or lm-eval for base, unlearned or sanitized",
    )
    card_template: str | None = _record(
        None, text("FILE"), "a Jinja template for the card, or 'short'"
    )

    def __post_init__(self) -> None:
        for name in ("gates", "carry"):
            if isinstance(given := getattr(self, name), list):  # YAML knows lists alone
                object.__setattr__(self, name, tuple(given))
        strength: object = self.strength
        if strength == "inf":  # JSON has no infinity, so the record says it in a word
            object.__setattr__(self, "strength", math.inf)
        for name, setting in SETTINGS.items():
            setting.check(getattr(self, name))
        if self.template is not None and not self.chat_template:
            raise UsageError("--chat-template names one, and --no-chat-template takes none.")
        if self.system_prompt is not None and not self.chat_template:
            raise UsageError("--system-prompt is for a chat template, and there is to be none.")
        if self.target is not None and self.gain != "auto":
            raise UsageError("A target is what gain 'auto' brings the forget set to; set that.")

    def describe(self) -> dict[str, Any]:
        """The settings for the record, without local paths."""
        strength, energy = self.sharpness
        described = asdict(self) | {"strength": strength, "energy": energy}
        described["carry"] = list(self.carry)
        for name in ABOUT_THE_RECORD if self.date else (*ABOUT_THE_RECORD, "date"):
            del described[name]
        for name in (*SETS, "unseen"):
            described[name] = _published(described[name])
        described["bystanders"] = {k: _published(v) for k, v in self.bystanders.items()}
        if self.lm_eval:
            described["lm_eval"] = ",".join(Path(task).name for task in self.lm_eval.split(","))
        for name in MODELS:
            named = described[name]
            if named and Path(named).expanduser().exists():
                described[name] = f"./{Path(named).resolve().name}"
        if math.isinf(strength):
            described["strength"] = "inf"  # JSON has no infinity
        return described

    @classmethod
    def from_record(cls, described: Mapping[str, Any]) -> Settings:
        """What `describe` wrote; files are taken from the current folder.

        Raises UsageError for a setting that this version does not know.
        """
        if unknown := [name for name in described if name not in SETTINGS]:
            raise UsageError(
                f"The record has the setting {unknown[0]!r}, which this sage-hub does not know; "
                "use the version that it names."
            )
        return cls(**described)

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
            depth=False,
            lm_eval=None,
        )

    @property
    def gain_rule(self) -> Literal["number", "match", "search", "keep"]:
        """How γ is found: as given, in closed form, or by evaluating what a few would make.

        "auto" is a search over evaluations: of the forget set, or without one of what is kept of
        rows that the base writes. With `low_disk`, where each would download both sides anew, it
        is the closed form, and without a forget set 1.
        """
        if self.gain != "auto":
            return "match" if self.gain == "match" else "number"
        if self.low_disk:
            return "number" if self.forget is None else "match"
        return "keep" if self.forget is None else "search"

    @property
    def sharpness(self) -> tuple[float, float]:
        """λ and ρ: as given, else what suits the way the gain is found (docs/results.md)."""
        strength, energy = (100.0, 0.99) if self.gain_rule in ("search", "keep") else (10.0, 0.9)
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


def _declared(one: Field[Any]) -> Setting:
    default = one.default if one.default_factory is MISSING else one.default_factory()
    option = f"--{'no-' * (default is True)}{one.name.replace('_', '-')}"
    return Setting(one.name, default, **{"option": option, **one.metadata})


SETTINGS: Mapping[str, Setting] = {one.name: _declared(one) for one in fields(Settings)}


def as_words(values: Mapping[str, Any]) -> list[str]:
    """These settings as a command line gives them."""
    words: list[str] = []
    for name, value in values.items():
        option, default = SETTINGS[name].option, SETTINGS[name].default
        if isinstance(value, Mapping):
            words += [word for k, v in value.items() for word in (option, f"{k}={v}")]
        elif isinstance(value, (list, tuple)):
            words += [word for one in value for word in (option, str(one))]
        elif isinstance(value, bool):
            words += [option] * (value != default)
        elif value is not None:
            words += [option, str(value)]
    return words


def _published(source: str | None) -> str | None:
    """A set as the record names it: of a file no folder."""
    return source if source is None or source.startswith("hf://") else Path(source).name

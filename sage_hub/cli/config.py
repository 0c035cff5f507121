"""sage.yaml: found, checked line by line, and its paths taken as relative to it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from sage_hub.checkpoint.files import Files, open_files
from sage_hub.checkpoint.yamls import Loader
from sage_hub.errors import NotFoundError, UsageError, first_line
from sage_hub.settings import MODELS, SETS, SETTINGS, Settings

CONFIG = "sage.yaml"
NAME_FILES = (*SETS, "unseen", "bystanders", *MODELS, "lm_eval", "results", "card_template")


def load_settings(
    given: Mapping[str, Any],
    *,
    config: Path | None,
    unlearned: str | None,
    benchmark: str = "",
) -> tuple[Settings, str | None]:
    """Settings from `given` (the command line), then sage.yaml, the `benchmark`'s, the defaults.

    The benchmark's are the text of a settings file. The file is `config`, else sage.yaml in the
    current folder, else the one in the repo or folder `unlearned`. Returns what it is called too,
    None if there is none. Raises UsageError with file and line.
    """
    beneath = _parse(benchmark, "the benchmark's settings")
    found = _find(config, unlearned)
    if found is None:
        return Settings(**{**beneath, **given}), None
    path, shown, theirs = found
    values = _read(path, shown)
    if theirs is not None:
        _check_no_code(values, shown)
    if theirs is not None and theirs.commit is not None:
        values = _in_repo(values, theirs, shown)
    else:
        values = _beside(values, path.parent)
    return Settings(**{**beneath, **values, **given}), shown


def _find(config: Path | None, unlearned: str | None) -> tuple[Path, str, Files | None] | None:
    """The settings file, what it is called, and the checkpoint that it came with, if any."""
    if config is None and Path(CONFIG).is_file():
        config = Path(CONFIG)
    if config is not None:
        if not config.is_file():
            raise NotFoundError(f"The settings file {config} does not exist; check --config.")
        return config, str(config), None
    if unlearned is not None and CONFIG in (files := open_files(unlearned)).sizes:
        shown = f"{CONFIG} of {files.name}"
        return files.path(CONFIG), shown, files
    return None


def line_of(setting: str, *, config: Path | None, unlearned: str | None) -> str | None:
    """The line of the settings file with this setting, as "sage.yaml, line 3"; None without one."""
    found = _find(config, unlearned)
    if found is None:
        return None
    path, shown, _ = found
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader)
    keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    lines = (key.start_mark.line + 1 for key in keys if key.value == setting)
    return next((f"{shown}, line {line}" for line in lines), None)


def _read(path: Path, shown: str) -> dict[str, Any]:
    """The settings in a file, checked. Raises UsageError with the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError:
        raise UsageError(f"{shown}: not valid YAML.") from None
    return _parse(text, shown)


def _parse(text: str, shown: str) -> dict[str, Any]:
    """The settings in a text called `shown`, checked."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, why = (getattr(error, f"problem{end}", None) for end in ("_mark", ""))
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{shown}{line}: not valid YAML ({why or first_line(error)}).") from None
    if values is None:
        return {}
    if not (isinstance(values, dict) and isinstance(node, yaml.MappingNode)):
        raise UsageError(f"{shown} must be a mapping of settings.")
    places = {
        loader.construct_object(key): f"{shown}, line {key.start_mark.line + 1}"
        for key, _ in node.value
    }
    for key, value in values.items():
        if key not in SETTINGS:
            close = difflib.get_close_matches(str(key), SETTINGS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(SETTINGS)}."
            raise UsageError(f"{places[key]}: unknown setting {key!r}; {hint}")
        _check({key: value}, places[key])
    _check(values, shown)
    return values


def _check(values: dict[str, Any], place: str) -> None:
    try:
        Settings(**values)
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None


def _placed(values: dict[str, Any], place: Callable[[str, str], str]) -> dict[str, Any]:
    """`values` with each file that they name where `place` (setting, file) says it is."""

    def found(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: found(name, one) for key, one in value.items()}
        if name == "lm_eval":
            tasks = map(str.strip, value.split(","))
            return ",".join(place(name, t) if t.endswith((".yaml", ".yml")) else t for t in tasks)
        is_repo = name in MODELS and not value.startswith((".", "/", "~"))
        ours = name == "card_template" and value == "short"
        return value if is_repo or ours or value.startswith("hf://") else place(name, value)

    return {
        name: found(name, value) if value and name in NAME_FILES else value
        for name, value in values.items()
    }


def _check_no_code(values: Mapping[str, Any], shown: str) -> None:
    """Raise UsageError for a task of lm-eval in a file, if it comes with somebody's checkpoint."""
    if any(
        task.strip().endswith((".yaml", ".yml"))
        for task in (values.get("lm_eval") or "").split(",")
    ):
        raise UsageError(f"{shown}: lm_eval must name tasks; a task's file may run code.")


def _in_repo(values: dict[str, Any], files: Files, shown: str) -> dict[str, Any]:
    """A file that came with somebody's repo may name files of that repo, not of this machine."""

    def place(name: str, file: str) -> str:
        if name in MODELS:
            raise UsageError(f"{shown}: {name} must be a repo of the Hub.")
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UsageError(f"{shown}: {name} must be a file of the repo or hf://datasets/….")
        return str(files.path(file))

    return _placed(values, place)


def _beside(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The paths in a settings file are relative to it."""
    if folder == Path():
        return values
    return _placed(values, lambda _, file: str(folder / Path(file).expanduser()))

"""Settings: who wins, what is refused and by which name, and what somebody's repo may not say."""

from __future__ import annotations

import argparse
import json
import math
import runpy
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from support.hostile import BOMB
from support.loopback_hub import LoopbackHub

import sage_hub
from sage_hub.cli.config import load_settings
from sage_hub.cli.given import settings_of
from sage_hub.cli.parser import COMMANDS, make_parser, parse
from sage_hub.commands.here import on_device
from sage_hub.errors import NotFoundError, UsageError
from sage_hub.kinds import SWITCH, Setting
from sage_hub.settings import ABOUT_THE_RECORD, SETTINGS, Settings

ROOT = Path(sage_hub.__file__).parents[1]
SCHEMA = ROOT / "sage_hub" / "data" / "sage.schema.json"


def load(text: str, name: str = "sage.yaml", **given: object) -> Settings:
    """The settings of a file with this text in the current folder, under `given`."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    config = None if name == "sage.yaml" else path
    return load_settings(given, config=config, unlearned=None)[0]


# Precedence


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults() -> None:
    found = load("strength: 3\nenergy: 0.5\n", strength=7.0)
    assert found == Settings(strength=7.0, energy=0.5)


def test_without_a_file_the_defaults_hold() -> None:
    assert load_settings({}, config=None, unlearned=None) == (Settings(), None)


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_an_empty_file_changes_nothing(text: str) -> None:
    assert load(text) == Settings()


def test_the_named_file_wins_over_the_one_in_the_folder_and_that_over_the_repos(
    tmp_path: Path,
) -> None:
    def write(path: Path, seed: int) -> None:
        path.write_text(f"seed: {seed}\n")

    def seed_of(config: Path | None) -> tuple[int, str | None]:
        found, shown = load_settings({}, config=config, unlearned=str(tmp_path))
        return found.seed, shown

    write(tmp_path / "sage.yaml", 1)
    assert seed_of(None) == (1, f"sage.yaml of {tmp_path.name}")
    write(Path("sage.yaml"), 2)
    assert seed_of(None) == (2, "sage.yaml")
    write(Path("other.yaml"), 3)
    assert seed_of(Path("other.yaml")) == (3, "other.yaml")


def test_every_setting_can_stand_in_the_file() -> None:
    text = """
        retain: hf://datasets/org/retain
        forget: hf://datasets/org/forget@v1
        heldout: hf://datasets/org/retain?split=test
        strength: .inf
        energy: 1
        rank: 64
        gain: match
        max_tokens: 1000
        max_length: 100
        batch_size: 2
        device: cpu
        seed: 5
        chat_template: false
    """
    assert load(text) == Settings(
        retain="hf://datasets/org/retain",
        forget="hf://datasets/org/forget@v1",
        heldout="hf://datasets/org/retain?split=test",
        strength=math.inf,
        energy=1,
        rank=64,
        gain="match",
        max_tokens=1000,
        max_length=100,
        batch_size=2,
        device="cpu",
        seed=5,
        chat_template=False,
    )


# Paths


def test_paths_in_the_file_are_relative_to_it(tmp_path: Path) -> None:
    text = (
        f"retain: sets/retain.jsonl\nforget: ../forget.jsonl\nheldout: {tmp_path}/heldout.jsonl\n"
    )
    found = load(text, "configs/mine.yaml", forget="forget.jsonl")
    assert found.retain == "configs/sets/retain.jsonl"
    assert found.forget == "forget.jsonl"  # the command line's is relative to the current folder
    assert found.heldout == f"{tmp_path}/heldout.jsonl"
    assert load(text, "configs/mine.yaml").forget == "configs/../forget.jsonl"


def test_a_home_path_in_the_file_stays_one() -> None:
    found = load("retain: ~/retain.jsonl\n", "configs/mine.yaml").retain
    assert found is not None
    assert Path(found).expanduser() == Path.home() / "retain.jsonl"


# What is refused


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(NotFoundError, match=r"absent\.yaml"):
        load_settings({}, config=Path("absent.yaml"), unlearned=None)


@pytest.mark.parametrize(
    "text, words",
    [
        ("strenght: 1", "sage.yaml, line 1: unknown setting 'strenght'; did you mean 'strength'?"),
        (
            "# a\n\nseed: 1\nrnak: 1",
            "sage.yaml, line 4: unknown setting 'rnak'; did you mean 'rank'",
        ),
        ("max-tokens: 1", "did you mean 'max_tokens'?"),
        ("wibble: 1", "unknown setting 'wibble'; known are retain, forget,"),
        ("5: 1", "unknown setting 5"),
        ("null: 1", "unknown setting None"),
        ("seed: 1\nstrength: [1, 2\nenergy: 1", "sage.yaml, line 3: not valid YAML"),
        ("seed: 1\n\tenergy: 1", "sage.yaml, line 2: not valid YAML"),
        ("seed: !!python/object/apply:os.system ['touch ran']", "sage.yaml, line 1"),
        ("- seed", "sage.yaml must be a mapping"),
        ("seed", "sage.yaml must be a mapping"),
        ("strength: 2024-13-45", "sage.yaml"),  # a date to YAML, and not a date
        ("[" * 10_000, "sage.yaml"),
        ("retain: &a [x]\nforget: *a", "sage.yaml, line 2: not valid YAML (an alias is not taken"),
        (BOMB + "retain: *i", "sage.yaml, line 2: not valid YAML (an alias is not taken"),
        ("seed: 0x" + "f" * 9999, "sage.yaml: not valid YAML ("),
        (f"seed: 1 #{'x' * 1_000_000}", "sage.yaml: not valid YAML (it is longer than"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        load(text)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not Path("ran").exists()


def test_a_file_that_is_no_text_is_refused() -> None:
    Path("sage.yaml").write_bytes(b"seed: \xff\xfe")
    with pytest.raises(UsageError, match=r"sage\.yaml: not valid YAML"):
        load_settings({}, config=None, unlearned=None)


WRONG = [
    ("strength", -0.1),
    ("strength", math.nan),
    ("strength", "1"),
    ("strength", True),
    ("energy", 0),
    ("energy", 1.01),
    ("energy", math.nan),
    ("gain", 0),
    ("gain", math.inf),
    ("gain", "soon"),
    ("rank", 0),
    ("rank", 2.0),
    ("rank", False),
    ("max_tokens", 0),
    ("max_length", -1),
    ("batch_size", 1.5),
    ("batch_size", None),
    ("seed", -1),
    ("seed", "0"),
    ("device", None),
    ("device", 0),
    ("retain", 5),
    ("forget", ["a.jsonl"]),
    ("heldout", {"a": 1}),
    ("chat_template", "no"),
    ("chat_template", 1),
]


@pytest.mark.parametrize("key, value", WRONG)
def test_a_value_that_does_not_fit_is_refused_by_its_key(key: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^{key} must be .*, not "):
        Settings(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text, words",
    [
        ("strength: -1", "line 1: strength must be a number of at least 0 or 'inf', not -1."),
        ("forget: a\nretain: 5", "line 2: retain must be text, not 5."),
        ("chat_template: maybe", "line 1: chat_template must be true or false, not 'maybe'."),
        ("seed: 1\ngates:\n  - a\n  - 1", "line 2: gates must be a list of conditions, not"),
        ("seed: 1\n\nenergy: 2", "line 3: energy must be a number above 0 and at most 1, not 2."),
        ("{seed: 1,\nrank: 0}", "line 2: rank must be a whole number of at least 1, not 0."),
        ("bystanders: {gain: a}", "line 1: bystanders must be a mapping of names (small letters,"),
        ("results: {mine: a}", "line 1: results must be a mapping of base, unlearned or sanitized"),
        ("rank: 1\n<<: {seed: -1}", "line 2: seed must be a whole number"),
        ("device: ''", "line 1: device is empty; leave it away or give it a value."),
    ],
)
def test_a_wrong_value_in_a_file_is_refused_by_file_line_and_key(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        load(text, "configs/mine.yaml")
    assert str(refusal.value).startswith(f"configs/mine.yaml, {words}")


def test_values_that_do_not_go_together_are_refused_by_file() -> None:
    with pytest.raises(UsageError, match=r"^sage\.yaml: A target is what gain 'auto' brings"):
        load("target: 1\ngain: 2")


def test_a_wrong_value_is_shown_in_a_few_words() -> None:
    """A file of a few lines can hold a value whose text would fill the memory."""
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{f'*a{n - 1},' * 9}]" for n in range(1, 30))]
    with pytest.raises(UsageError) as refusal:
        load(f"retain: {{{', '.join(lines)}}}")
    assert len(str(refusal.value)) < 200


def test_a_wrong_value_on_the_command_line_is_not_blamed_on_the_file() -> None:
    with pytest.raises(UsageError, match=r"^seed must be "):
        load("strength: 1", seed=-1)


@given(
    st.text(max_size=40)
    | st.dictionaries(
        st.sampled_from(list(Settings.__dataclass_fields__)),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    ).map(yaml.safe_dump)
)
@example("seed: 1" + "0" * 5000)
def test_any_file_gives_settings_that_can_be_recorded_or_a_refusal(text: str) -> None:
    try:
        found = load(text)
    except UsageError:
        return
    json.dumps(found.describe(), allow_nan=False)


words = st.text("abc-", min_size=1, max_size=9)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: not x.is_integer())
    | st.sampled_from(["auto", "match", "inf", "muse", "bfloat16", "exact", "all", ""])
    | words
)
anything = scalars | st.lists(scalars, max_size=3) | st.dictionaries(words, scalars, max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*SETTINGS, "strenght", "x y"]), anything, max_size=5))
def test_any_mapping_makes_settings_or_is_refused_in_one_line(mapping: dict[str, Any]) -> None:
    try:
        made = Settings.from_record(mapping)
    except UsageError:
        with pytest.raises(UsageError, match=r"^sage\.yaml.*: [^\n]+$"):
            load(yaml.safe_dump(mapping))
    else:
        assert load(yaml.safe_dump(mapping)) == made


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(list(SETTINGS)), anything)
@example("bystanders", {"gain": "a.jsonl"})
@example("bystanders", {"gains": "a.jsonl"})
@example("results", {"reference": "a.json"})
@example("gates", ["a", ""])
def test_the_schema_takes_what_sage_hub_takes(name: str, value: object) -> None:
    try:
        Settings.from_record({name: value})
        takes = True
    except UsageError:
        takes = False
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert Draft202012Validator(schema).is_valid({name: value}) is takes


def values_of(setting: Setting) -> st.SearchStrategy[Any]:
    """What a setting takes, of its JSON Schema."""

    def of(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
        if "anyOf" in schema:
            return st.one_of(*map(of, schema["anyOf"]))
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        if "pattern" in schema:
            return st.dates().map(str)
        least, most = schema.get("minimum"), schema.get("maximum", 1e9)
        least = schema.get("exclusiveMinimum", least)
        above = "exclusiveMinimum" in schema
        return {
            "boolean": st.booleans(),
            "integer": st.integers(least, int(most)),
            "number": st.floats(
                least, most, exclude_min=above, allow_nan=False, allow_infinity=False
            ),
            "string": st.dates().map(str) if "pattern" in schema else words,
            "array": st.lists(words, max_size=3).map(tuple),
            "object": st.dictionaries(
                st.from_regex(schema.get("propertyNames", {}).get("pattern", ""), fullmatch=True),
                words,
                max_size=2,
            ),
        }[schema["type"]]

    return of(setting.kind.schema)


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries({}, optional={n: values_of(one) for n, one in SETTINGS.items()})
    .filter(lambda values: "target" not in values or values.get("gain", "auto") == "auto")
    .filter(
        lambda values: (
            not {"template", "system_prompt"} & values.keys() or values.get("chat_template", True)
        )
    )
    .map(lambda values: Settings(**values))
)
def test_settings_survive_the_record_and_a_file(made: Settings) -> None:
    again = Settings.from_record(json.loads(json.dumps(made.describe(), allow_nan=False)))
    assert again.describe() == made.describe()
    strength, energy = made.sharpness
    about = {name: getattr(made, name) for name in ABOUT_THE_RECORD}
    assert replace(again, **about) == replace(made, strength=strength, energy=energy)
    assert load(yaml.safe_dump(asdict(made) | {"gates": list(made.gates)})) == made


# What follows from the declarations


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_command_has_the_options_that_are_declared(command: str) -> None:
    taken = {action.dest: action for action in make_parser()[1][command]._actions}
    declared = {name for name, setting in SETTINGS.items() if command in setting.commands}
    # `stats --retain` may be given several times, and is no setting there.
    repeated = {"retain"} if command == "stats" else set()
    assert taken.keys() & SETTINGS.keys() == declared | repeated
    for name in declared:
        option, off = SETTINGS[name].option, f"--no-{SETTINGS[name].option[2:]}"
        may_be_turned_off = SETTINGS[name].kind is SWITCH and not SETTINGS[name].default
        assert taken[name].option_strings == [option, off][: 1 + may_be_turned_off]
        assert taken[name].default == argparse.SUPPRESS


@pytest.mark.parametrize(
    "file, typed, chat_template, template, system",
    [
        ("chat_template: false", "", False, None, None),
        ("chat_template: false", "--chat-template", True, None, None),
        ("chat_template: false", "--chat-template rag", True, "rag", None),
        ("chat_template: false", "--chat-template --system-prompt hi", True, None, "hi"),
        ("template: rag\nsystem_prompt: hi", "", True, "rag", "hi"),
        ("template: rag\nsystem_prompt: hi", "--chat-template", True, "rag", "hi"),
        ("template: rag\nsystem_prompt: hi", "--chat-template tools", True, "tools", "hi"),
        ("template: rag\nsystem_prompt: hi", "--no-chat-template", False, None, None),
        ("", "--no-chat-template --chat-template", True, None, None),
    ],
)
def test_the_command_line_reaches_all_three_states_of_a_chat_template(
    file: str, typed: str, chat_template: bool, template: str | None, system: str | None
) -> None:
    """None, that which there is, and one by name: whatever sage.yaml says."""
    Path("sage.yaml").write_text(file)
    args = parse(["push", "org/base", "org/unlearned", *typed.split(), "-q"])
    settings = settings_of(args, "org/base", None)
    found = settings.chat_template, settings.template, settings.system_prompt
    assert found == (chat_template, template, system)


@pytest.mark.parametrize(
    "typed, why",
    [
        ("--no-chat-template --system-prompt hi", "there is to be none"),
        ("--chat-template rag --no-chat-template", "--no-chat-template takes none"),
    ],
)
def test_what_is_typed_must_not_contradict_itself(typed: str, why: str) -> None:
    args = parse(["push", "org/base", "org/unlearned", *typed.split()])
    with pytest.raises(UsageError, match=why):
        settings_of(args, "org/base", None)


def test_a_model_is_not_taken_for_the_name_of_a_template() -> None:
    with pytest.raises(UsageError, match="name of a template; put org/base before it"):
        parse(["push", "--chat-template", "org/base", "org/unlearned"])


@pytest.mark.parametrize("name", [n for n, s in SETTINGS.items() if s.kind is SWITCH])
@pytest.mark.parametrize("value", [True, False])
def test_every_switch_can_be_put_either_way_whatever_the_file_says(name: str, value: bool) -> None:
    Path("sage.yaml").write_text(f"{name}: {str(not value).lower()}")
    word = f"--{'' if value else 'no-'}{name.replace('_', '-')}"
    settings = settings_of(
        parse(["push", "org/base", "org/unlearned", word, "-q"]), "org/base", None
    )
    assert getattr(settings, name) is value


def test_the_page_and_the_schema_are_what_the_declarations_give() -> None:
    """If not, `python docs/settings.py` makes them."""
    made = runpy.run_path(str(ROOT / "docs" / "settings.py"))
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert made["page"](page) == page
    for setting in SETTINGS.values():
        assert f"| `{setting.name}` |" in page
    assert made["schema_text"]() == SCHEMA.read_text(encoding="utf-8")
    Draft202012Validator.check_schema(json.loads(SCHEMA.read_text(encoding="utf-8")))


def test_neither_settings_nor_the_parser_take_the_time_to_import_torch() -> None:
    program = (
        "import sys, sage_hub.settings, sage_hub.cli.parser; sage_hub.cli.parser.make_parser();"
        "print({'torch', 'transformers', 'huggingface_hub', 'numpy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


# A sage.yaml that came with a repo on the Hub


def hub_settings(hub: LoopbackHub, text: str, **files: bytes) -> Settings:
    """The settings that the sage.yaml of a repo with these files gives."""
    contents = {"sage.yaml": text.encode(), **{f"{n}.jsonl": c for n, c in files.items()}}
    hub.add_repo("org/unlearned", contents)
    return load_settings({}, config=None, unlearned="org/unlearned")[0]


def test_a_repo_brings_its_settings_and_sets(hub: LoopbackHub) -> None:
    text = "seed: 3\nretain: retain.jsonl\nforget: hf://datasets/org/forget\n"
    found = hub_settings(hub, text, retain=b'{"text": "a"}\n')
    assert found.seed == 3
    assert found.forget == "hf://datasets/org/forget"
    assert found.retain is not None
    assert Path(found.retain).read_bytes() == b'{"text": "a"}\n'


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../secret.jsonl",
        "sets/../../secret.jsonl",
        "/tmp/a://b",
        "../a://b",
    ],
)
def test_a_repo_cannot_name_a_file_of_this_machine(path: str, hub: LoopbackHub) -> None:
    with pytest.raises(UsageError, match=r"sage\.yaml of org/unlearned: retain must be a file of"):
        hub_settings(hub, yaml.safe_dump({"retain": path}))


@pytest.mark.parametrize("path", ["absent.jsonl", "~/.ssh/id_rsa", "file:///etc/passwd"])
def test_a_repo_can_name_its_own_files_only(path: str, hub: LoopbackHub) -> None:
    with pytest.raises(NotFoundError, match="org/unlearned"):
        hub_settings(hub, yaml.safe_dump({"retain": path}))


@pytest.mark.parametrize("task", ["own.yaml", "mmlu, own.yml ", "/tmp/own.yaml"])
def test_what_comes_with_a_checkpoint_cannot_bring_code(
    task: str, hub: LoopbackHub, tmp_path: Path
) -> None:
    """A task's file of lm-eval may run code: of the Hub or of a folder, it is not taken."""
    text = yaml.safe_dump({"lm_eval": task})
    with pytest.raises(UsageError, match=r"sage\.yaml of org/unlearned: lm_eval must name tasks"):
        hub_settings(hub, text)
    (tmp_path / "sage.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"^sage\.yaml of .*: lm_eval must name tasks"):
        load_settings({}, config=None, unlearned=str(tmp_path))
    own = load_settings({}, config=tmp_path / "sage.yaml", unlearned=str(tmp_path))[0]
    assert own.lm_eval.split("/")[-1].strip() == task.split("/")[-1].split(", ")[-1].strip()


@pytest.mark.parametrize("value", [5, ["a.jsonl"], {"a": "b"}, True])
def test_a_set_that_is_no_text_is_refused_in_a_repo_too(value: object, hub: LoopbackHub) -> None:
    with pytest.raises(UsageError, match="retain must be text"):
        hub_settings(hub, yaml.safe_dump({"retain": value}))


# The record


def test_the_record_has_no_local_path_and_is_json() -> None:
    described = Settings(
        retain="/home/ada/secret/retain.jsonl",
        forget="~/sets/forget.csv",
        heldout="hf://datasets/org/facts/test.jsonl?split=test",
        strength=math.inf,
        gain="match",
    ).describe()
    assert (described["retain"], described["forget"]) == ("retain.jsonl", "forget.csv")
    assert described["heldout"] == "hf://datasets/org/facts/test.jsonl?split=test"
    assert described["strength"] == "inf"
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    about_the_record = {"gates", "results", "card_template"}  # no part of what a release is
    about_the_record |= {"date"}  # which is there only if a chat template asks for one
    assert described.keys() == Settings.__dataclass_fields__.keys() - about_the_record


def test_the_recorded_settings_can_be_given_again() -> None:
    made = Settings(retain="retain.jsonl", strength=math.inf, energy=0.8, rank=7, gain=2.5)
    text = yaml.safe_dump(made.describe())
    assert load(text) == made


# The device


def test_auto_becomes_a_device_that_is_here() -> None:
    resolved = on_device(Settings())
    assert resolved.device in ("cpu", "cuda")
    assert on_device(resolved) == resolved


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "vulkan", "hpu", "meta"])
def test_a_device_that_cannot_compute_here_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match="not available here; use --device cpu"):
        on_device(Settings(device=device))


@pytest.mark.taught
@pytest.mark.parametrize(
    "given, rule",
    [
        ({}, "keep"),
        ({"low_disk": True}, "number"),
        ({"forget": "f.jsonl"}, "search"),
        ({"forget": "f.jsonl", "low_disk": True}, "match"),
        ({"forget": "f.jsonl", "gain": 3}, "number"),
        ({"forget": "f.jsonl", "gain": "match"}, "match"),
        ({"gain": "match"}, "match"),
    ],
)
def test_how_the_gain_is_found_goes_by_what_there_is(given: dict[str, Any], rule: str) -> None:
    assert Settings(**given).gain_rule == rule


@pytest.mark.taught
def test_how_sharp_the_filter_is_goes_by_how_the_gain_is_found() -> None:
    assert Settings(low_disk=True).sharpness == Settings(gain=3).sharpness == (10, 0.9)
    assert Settings().sharpness == (100, 0.99)
    searched = Settings(forget="f.jsonl")
    assert searched.sharpness == (100, 0.99)
    assert Settings(forget="f.jsonl", strength=1).sharpness == (1, 0.99)
    # The record has what was used, which does not depend on what is left out later.
    described = searched.describe()
    again = Settings.from_record(described | {"forget": None})
    assert again.sharpness == (100, 0.99)

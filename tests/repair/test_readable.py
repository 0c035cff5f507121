"""What comes along, and what is used of the base, is read in the plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sage_hub.cli.main import main
from sage_hub.repair.belongs import KNOWN
from sage_hub.repair.readable import fault
from sage_hub.runtime import limits

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"


def refused(pair: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    """The problems of the plan, where the run is refused with the first of them."""
    both = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--output", "out"]
    both += ["--retain", str(pair / "retain.jsonl")]
    capsys.readouterr()
    main([*both, "--dry-run", "--json"])
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert main([*both, "--quiet"]) == problems[0]["status"]
    assert list(Path().iterdir()) == []
    return list(problems)


@pytest.mark.parametrize(
    "side, name, how, says",
    [
        ("unlearned", "tokenizer.json", lambda text: MARK + text, "begins with a byte order mark"),
        ("unlearned", "tokenizer.json", lambda _: '{"version": "1.0"}', "cannot be read ("),
        ("unlearned", "tokenizer_config.json", lambda text: MARK + text, "byte order mark"),
        ("unlearned", "generation_config.json", lambda text: text[:-3], "cannot be read ("),
        ("unlearned", "preprocessor_config.json", lambda _: "[]", "it is not a JSON object"),
        ("unlearned", "chat_template.jinja", lambda _: "{% if %}", "cannot be read ("),
        ("unlearned", "chat_template.jinja", lambda _: POINTER, "is a Git LFS pointer"),
        ("unlearned", "LICENSE", lambda _: POINTER, "is a Git LFS pointer"),
        ("unlearned", "vocab.txt", lambda _: MARK + "a\n", "begins with a byte order mark"),
        ("base", "generation_config.json", lambda _: "{", "cannot be read ("),
        ("base", "tokenizer_config.json", lambda _: POINTER, "`git lfs pull`"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_side(
    side: str,
    name: str,
    how: Callable[[str], str],
    says: str,
    pair: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = pair / side / name
    path.write_text(how(path.read_text() if path.exists() else ""), encoding="utf-8")
    problems = refused(pair, capsys)
    (ours,) = [p for p in problems if f"{name} of the {side} side ({side}) " in str(p["message"])]
    assert ours["status"] == 17
    assert says in str(ours["message"])


def test_a_template_that_is_never_done_with_being_read_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is constant in it is worked out at once."""
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    for content in (b"{{ 9 ** (9 ** 9) }}", b"{{ 'x' * 10 ** 12 }}", b"{{ " + b"(" * 100_000):
        if why := fault("chat_template.jinja", content):
            assert "cannot be read (" in why


def test_code_that_is_named_is_parsed_and_other_code_is_not(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = pair / "unlearned"
    config = json.loads((own / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_x.XModel"}
    (own / "config.json").write_text(json.dumps(config))
    (own / "modeling_x.py").write_text("def (:\n")
    (own / "old.py").write_text("print 'two'\n")
    (problem,) = refused(pair, capsys)
    assert "modeling_x.py of the unlearned side (unlearned) cannot be read" in str(problem)


def test_a_tokenizer_whose_parts_do_not_fit_is_refused(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pair / "unlearned" / "tokenizer_config.json"
    path.write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": 3}')
    (problem,) = refused(pair, capsys)
    assert "The tokenizer of the unlearned side (unlearned) cannot be loaded" in str(problem)


@pytest.mark.parametrize(
    "name, content",
    [
        ("chat_template.jinja", b"{% generation %}{{ x }}{% endgeneration %}"),
        ("chat_template.jinja", b"{% for x in y %}{% break %}{% endfor %}"),
        ("modeling_x.py", b"\xef\xbb\xbfx = 1\n"),  # Python reads it
        ("LICENSE.txt", "Straße".encode("latin-1")),  # people read it
        ("tokenizer.model", b"\x0a\x0b\xff"),
        ("merges.txt", "#version\nĠ t\n".encode()),
    ],
)
def test_what_its_readers_take_is_taken(name: str, content: bytes) -> None:
    assert fault(name, content) is None


@pytest.mark.parametrize("name", sorted(name for name in KNOWN if name.endswith(".json")))
def test_every_json_file_is_parsed(name: str) -> None:
    assert "cannot be read" in str(fault(name, b'{"a": 1,}'))
    assert "byte order mark" in str(fault(name, b"\xff\xfe{\0}\0"))

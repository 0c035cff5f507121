"""Who made a release: a command of one's own signs the sums, and the signature goes with them."""

from __future__ import annotations

import hashlib
import hmac
import json
import shlex
import sys
from pathlib import Path

import pytest
from support.loopback_hub import LoopbackHub

from sage_hub.cli.main import main
from sage_hub.record.sums import SUMS

KEY = b"of the release engineers"
SIGNER = f"""
import hashlib, hmac, pathlib, sys
sums = pathlib.Path(sys.argv[-1])
signature = hmac.new({KEY!r}, sums.read_bytes(), hashlib.sha256).hexdigest()
sums.with_name(sums.name + ".asc").write_text(signature)
"""


@pytest.fixture
def sign(tmp_path: Path) -> str:
    """A command that signs; its name has a space in it."""
    (tmp_path / "my signer.py").write_text(SIGNER)
    return shlex.join([sys.executable, str(tmp_path / "my signer.py")])


def is_signed(folder: Path) -> bool:
    made = hmac.new(KEY, (folder / SUMS).read_bytes(), hashlib.sha256).hexdigest()
    signature = folder / f"{SUMS}.asc"
    return signature.is_file() and hmac.compare_digest(signature.read_text(), made)


def words(pair: Path, *more: str) -> list[str]:
    both = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--output", "out"]
    return [*both, "--gain", "1", "--retain", str(pair / "retain.jsonl"), "-q", *more]


def test_a_release_and_each_later_card_of_it(pair: Path, sign: str) -> None:
    assert main(words(pair, "--sign", sign, "--record", "copy")) == 0
    out = Path("out")
    assert is_signed(out)
    assert is_signed(Path("copy"))
    assert main(["verify", "out", "-q"]) == 0
    assert main(["card", "out", "--sign", sign, "--card-template", "short"]) == 0
    assert is_signed(out)
    assert main(["card", "out"]) == 0
    assert not (out / f"{SUMS}.asc").exists()  # of the card before
    assert main(["verify", "out", "-q"]) == 0
    assert main(words(pair, "--sign", sign)) == 0  # what is finished is signed, too
    assert is_signed(out)
    (out / f"{SUMS}.elsewhere").write_text("a second one, by others")
    assert main(["verify", "out", "-q"]) == 0


def test_it_is_published_in_the_commit_of_its_sums(
    on_hub: LoopbackHub, pair: Path, sign: str, tmp_path: Path
) -> None:
    push = ["push", "org/base", "org/unlearned", "--retain", str(pair / "retain.jsonl"), "-q"]
    push += ["--gain", "1"]

    def there() -> bool:
        files = on_hub.files("org/unlearned-sage")
        for name in (SUMS, f"{SUMS}.asc"):
            (tmp_path / name).unlink(missing_ok=True)
            if name in files:
                (tmp_path / name).write_bytes(files[name])
        return is_signed(tmp_path)

    assert main(push) == 0
    assert not there()
    commits = len(on_hub.commits("org/unlearned-sage"))
    for _ in range(2):  # the second time nothing is to be done
        assert main([*push, "--sign", sign]) == 0
        assert there()
        assert len(on_hub.commits("org/unlearned-sage")) == commits + 1
    gate = ["--gate", "retain.probability >= 0"]
    assert main([*push, *gate, "--sign", sign]) == 0
    assert there()
    assert main(push) == 0  # other sums, and nobody signs them
    assert f"{SUMS}.asc" not in on_hub.files("org/unlearned-sage")


@pytest.mark.parametrize(
    "command, why",
    [
        ("no-such-signer --key 1", "there is no program no-such-signer"),
        ("gpg 'key", "check its quotes"),
        (" ", "it is empty"),
    ],
)
def test_what_cannot_be_run_is_a_problem_of_the_plan(
    command: str, why: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(pair, "--sign", command, "--dry-run")) == 2
    assert why in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "program, why",
    [
        ("import sys; print('no \\x1b[31msecret key'); sys.exit(3)", "no \\x1b[31msecret key"),
        ("pass", f"it left no {SUMS}.asc"),
    ],
)
def test_a_signer_that_fails_loses_no_work(
    program: str, why: str, pair: Path, sign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = shlex.join([sys.executable, "-c", program])
    assert main([*words(pair, "--sign", command), "--json"]) == 2
    failure = json.loads(capsys.readouterr().out)
    assert why.replace("\x1b", "\\x1b") in failure["message"]
    assert failure["kept"]["what"] == "finished parts"
    assert not Path("out").exists()
    assert main(words(pair, "--sign", sign)) == 0
    assert is_signed(Path("out"))

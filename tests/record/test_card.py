"""The card: valid for the Hub, made from the record alone, in templates of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from support.hostile import LOOP
from support.pico import proxies

from sage_hub.cli.main import main
from sage_hub.commands.card import rewrite
from sage_hub.errors import NotFoundError, SageHubError, UsageError
from sage_hub.record.card import find_template
from sage_hub.record.manifest import MANIFEST, REPORT, read_record
from sage_hub.record.pictures import bias_by_layer, draw, tradeoff
from sage_hub.record.release import write_record
from sage_hub.runtime import limits


def sanitize(pair: Path, out: Path, *more: str) -> Path:
    both = [str(pair / "base"), str(pair / "unlearned"), "--output", str(out), "--quiet"]
    assert main(["sanitize", *both, *proxies(pair), "--generate-rows", "4", *more]) == 0
    return out


@pytest.fixture(scope="module")
def release(_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "out"
    return sanitize(_pair, folder, "--robustness", "--gate", "bias.kept <= 1")


def test_the_hub_can_read_it(release: Path) -> None:
    card = ModelCard.load(release / "README.md")
    front = yaml.safe_load(card.content.split("---")[1])
    assert all(value not in (None, "", [], {}) for value in front.values())
    named = {result.metric_type for result in card.data.eval_results}
    assert {"heldout_probability", "forget_rougeL_recall"} <= named
    assert not any(name.startswith("retain_") for name in named)  # calibrated on


def test_it_shows_change_certainty_robustness_gates_and_what_is_missing(release: Path) -> None:
    text = (release / "README.md").read_text()
    report = json.loads((release / "sage" / "report.json").read_text())
    for part in ("At a glance", "Robustness", "Gates", "Not run", "Make it again", "Citation"):
        assert f"# {part}" in text, part
    (gap,) = [
        gap
        for gap in report["differences"]
        if (gap["set"], gap["metric"], gap["other"], gap["condition"])
        == ("heldout", "probability", "unlearned", None)
    ]
    low, high = gap["interval"]
    assert f"{gap['value']:+.4f} ({low:+.4f} to {high:+.4f}), {gap['verdict']}" in text
    missing = "truth_ratio on retain, forget and heldout: the rows have no perturbed_answer column."
    assert missing in text
    for picture in ("tradeoff", "bias", "profile"):
        assert f"(sage/{picture}.png)" in text
        assert (release / "sage" / f"{picture}.png").is_file()


def test_it_can_be_written_again_from_the_record_alone(release: Path, tmp_path: Path) -> None:
    before = (release / "README.md").read_bytes()
    assert main(["card", str(release)]) == 0
    assert (release / "README.md").read_bytes() == before
    assert main(["card", str(release), "--card-template", "short"]) == 0
    assert len((release / "README.md").read_bytes()) < len(before)
    own = tmp_path / "house.md.jinja"
    own.write_text("---\n{{ card_data }}\n---\n\n{{ name }}: {{ metrics[0].sanitized | number }}\n")
    assert main(["card", str(release), "--card-template", str(own)]) == 0
    assert ModelCard.load(release / "README.md").text.strip().startswith("out: 0.")
    assert main(["card", str(release)]) == 0
    assert main(["card", str(tmp_path)]) == NotFoundError.status


def test_a_template_that_fails_loses_no_work(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("---\n{{ card_data }}\n---\n{{ nmae }}\n")
    job = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--output", "out", "-q"]
    job += ["--retain", str(pair / "retain.jsonl"), "--card-template", str(own)]
    assert main(job) == 2
    assert "'nmae' is undefined" in capsys.readouterr().err
    assert list(Path(".out.partial/release").glob("*.safetensors"))
    own.write_text("---\n{{ card_data }}\n---\n{{ name }}\n")
    assert main(job) == 0
    own.write_text("---\n{{ card_data }}\n---\nagain {{ name }}\n")
    assert main(job) == 0  # it is not made again, but for its card
    assert "again out" in Path("out/README.md").read_text()


@pytest.mark.parametrize(
    "name",
    ["README.md", "SHA256SUMS", "sage", "sage/report.json", "sage/bias.png", ".eval_results"],
)
@pytest.mark.parametrize("there", [True, False], ids=["there", "not there"])
def test_nothing_is_written_through_a_link(
    name: str, there: bool, release: Path, tmp_path: Path
) -> None:
    copy, outside = tmp_path / "copy", tmp_path / "outside"
    shutil.copytree(release, copy)
    if (copy / name).exists():
        (copy / name).rename(outside)
    elif there:
        outside.mkdir()
    (copy / name).symlink_to("../" * (1 + name.count("/")) + ("outside" if there else "nowhere"))
    before = sorted(tmp_path.rglob("*"))
    assert main(["card", str(copy), "--quiet"]) in (NotFoundError.status, UsageError.status)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_report_that_cannot_be_written_leaves_the_card(release: Path) -> None:
    before = {file: file.read_bytes() for file in release.rglob("*") if file.is_file()}
    manifest, report = (read_record(release / name) for name in (MANIFEST, REPORT))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(
            release,
            manifest,
            {
                **report,
                "card": {**report["card"], "warnings": ["Not said before."]},
                "seconds": {"pass": float("nan")},
            },
        )
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize(
    "template, says",
    [
        ("{% if %}", "is not a Jinja template"),
        ("---\na: [\n---\n", "fails: while parsing"),
        ("{{ nothing_like_this }}", "fails: 'nothing_like_this' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "fails: access to attribute '__class__'"),
        ("{{ report.gates.clear() }}", "fails: access to attribute 'clear'"),
        ("{{ manifest.files.update({'x': 'y'}) }}", "fails: access to attribute 'update'"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ '(' * 3 }}" + "{{ " + "(" * 9999, "is not a Jinja template"),
        (LOOP, "fails: it runs for more than 0.5 s"),
        ("{{ 'x' * 10 ** 12 }}", "fails: it takes more than 2.15 GB of memory"),
        ("{% for a in range(30) %}{{ 'x' * 10 ** 6 }}{% endfor %}", "fails: it writes more than"),
    ],
)
def test_a_template_that_fails_is_refused(
    template: str, says: str, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    before = {file: file.read_bytes() for file in release.rglob("*.[mj]*")}
    path = tmp_path / "bad.jinja"
    path.write_text(template)
    with pytest.raises(SageHubError, match=says) as raised:
        rewrite(release, str(path))
    assert isinstance(raised.value, UsageError)
    assert {file: file.read_bytes() for file in before} == before
    with pytest.raises(NotFoundError):
        find_template(str(tmp_path / "none.jinja"))


@pytest.mark.usefixtures("unhurried")
def test_pictures_are_drawn(release: Path, tmp_path: Path) -> None:
    record = [
        json.loads((release / "sage" / f"{n}.json").read_text()) for n in ("manifest", "report")
    ]
    assert draw(tmp_path, *record).keys() == {"tradeoff", "bias", "profile"}
    for picture in tmp_path.glob("*.png"):
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 12_000, (picture, len(content))  # bare axes are 10,000


def test_pictures_of_what_there_is_not_are_not_drawn() -> None:
    assert tradeoff({}, {"results": []}) is None
    assert bias_by_layer({"tensors": [{"name": "a.weight", "action": "identical"}]}) is None

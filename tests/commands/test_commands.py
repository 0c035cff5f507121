"""The commands as a user runs them: defaults, options, stdout and stderr, what is left on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from support.checkpoints import change, load_weights
from support.loopback_hub import LoopbackHub
from support.mutations import add
from support.pico import CHAT, make_pair, proxies

import sage_hub
from sage_hub.cli.main import main


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Run a command with --json; its stdout must be one JSON object and nothing else."""
    capsys.readouterr()
    status = main([*arguments, "--json", "--quiet"])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert err == ""
    result: dict[str, Any] = json.loads(out)
    return result


def test_push_with_nothing_but_two_names(
    on_hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_json(capsys, "push", "org/base", "org/unlearned")
    assert "/org/unlearned-sage/commit/" in result["location"]
    files = on_hub.files("org/unlearned-sage")
    assert b"general-purpose" in files["README.md"]
    assert any("--retain" in warning for warning in result["warnings"])
    not_run = {entry["what"]: entry["reason"] for entry in result["report"]["not_run"]}
    assert not_run["forget metrics"] == "no --forget was given"
    assert not_run["heldout metrics"] == "no --heldout was given"


def test_a_second_push_replaces_the_first_and_leaves_nothing_stale(
    on_hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pair / "unlearned" / "NOTICE.txt").write_text("goes away")
    on_hub.add_commit("org/unlearned", {"NOTICE.txt": b"goes away"})
    run_json(capsys, "push", "org/base", "org/unlearned@main", *proxies(pair))
    assert "NOTICE.txt" in on_hub.files("org/unlearned-sage")
    first = on_hub.commits("org/unlearned")[-2].sha
    run_json(
        capsys, "push", "org/base", f"org/unlearned@{first}", "--strength", "3", *proxies(pair)
    )
    assert "NOTICE.txt" not in on_hub.files("org/unlearned-sage")
    assert len(on_hub.commits("org/unlearned-sage")) == 3
    manifest = json.loads(on_hub.files("org/unlearned-sage")["sage/manifest.json"])
    assert manifest["settings"]["strength"] == 3


def test_create_pr_leaves_main_as_it_is(
    on_hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_json(capsys, "push", "org/base", "org/unlearned", "--create-pr", *proxies(pair))
    assert "/discussions/1" in result["location"]
    assert set(on_hub.files("org/unlearned-sage")) == {".gitattributes"}
    assert "sage/manifest.json" in on_hub.files("org/unlearned-sage", "refs/pr/1")


def test_private(on_hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_json(capsys, "push", "org/base", "org/unlearned", "--private", *proxies(pair))
    assert HfApi().model_info("org/unlearned-sage").private


def test_a_dry_run_fetches_no_weights_and_writes_nothing(
    on_hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_hub.requests.clear()
    assert main(["push", "org/base", "org/unlearned", "--dry-run", *proxies(pair)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "14 of 21 tensors can be filtered" in err
    whole = [
        request for request in on_hub.requests if request.storage and "range" not in request.headers
    ]
    assert whole == []
    assert ("org/unlearned-sage", "model") not in on_hub.repos


def test_a_dry_run_of_folders_reads_headers_alone(
    pair: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_data(path: Path) -> None:
        assert path.suffix != ".safetensors", "read the weights"

    monkeypatch.setattr("sage_hub.checkpoint.hashes.file_sha256", no_data)
    monkeypatch.setattr("sage_hub.checkpoint.files.TensorReader", no_data)
    both = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--output", "out"]
    assert main([*both, "--dry-run", "--verbose"]) == 0
    lines = capsys.readouterr().err.splitlines()
    tensors = [line.split() for line in lines if line.startswith(("model.", "lm_head."))]
    assert len(tensors) == 21
    assert ["model.layers.0.mlp.down_proj.weight", "32×64", "BF16", "filter"] in [
        t[:4] for t in tensors
    ]
    assert ["lm_head.weight", "72×32", "BF16", "copy:", "LM", "head"] in tensors


def test_a_dry_run_lists_every_problem(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(pair / "base", {"model.scale": torch.ones(32)})
    add(pair / "unlearned", {"model.scale": torch.ones(48), "v_head.weight": torch.ones(2)})
    (pair / "out").mkdir()
    (pair / "out" / "thesis.tex").write_text("years")
    both = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--output", str(pair / "out")]
    both += ["--retain", str(pair / "no-such-file.jsonl")]
    assert main([*both, "--dry-run", "--json"]) == 12
    out, err = capsys.readouterr()
    problems = json.loads(out)["problems"]
    assert [problem["status"] for problem in problems] == [12, 13, 23, 10]
    assert [line for line in err.splitlines() if line.startswith("  problem ")] == [
        f"  {'problem':<12}{problem['message']}" for problem in problems
    ]
    assert main([*both, "--quiet"]) == 12
    assert "There are 3 more problems; --dry-run lists all." in capsys.readouterr().err


def test_statistics_given_are_the_statistics_taken(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file = proxies(pair), str(tmp_path / "base.safetensors")
    run_json(capsys, "stats", str(pair / "base"), *data[:4], "--output", file)
    both = [str(pair / "base"), str(pair / "unlearned"), "--gain", "match"]
    ready, taken = str(tmp_path / "ready"), str(tmp_path / "taken")
    run_json(capsys, "sanitize", *both, *data[2:], "--stats", file, "--output", ready)
    run_json(capsys, "sanitize", *both, *data, "--output", taken)
    ready_weights, taken_weights = load_weights(Path(ready)), load_weights(Path(taken))
    assert all(torch.equal(ready_weights[name], taken_weights[name]) for name in taken_weights)


def test_audit_names_the_module_that_does_the_damage(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worst = "model.layers.1.mlp.down_proj.weight"
    change(pair / "unlearned", worst, lambda tensor: tensor + 0.3)
    before = sorted(pair.rglob("*"))
    both = [str(pair / "base"), str(pair / "unlearned"), *proxies(pair)[:4]]
    audit = run_json(capsys, "audit", *both, "--strength", "5", "--energy", "0.9")
    assert audit["modules"][0]["module"] == worst.removesuffix(".weight")
    assert audit["model"]["retain_after"] < audit["model"]["retain_before"]
    assert sum(module["share"] for module in audit["modules"]) == pytest.approx(1)
    assert sorted(pair.rglob("*")) == before

    # What the audit foretells is what a release then measures, up to the stored type's rounding.
    release = sage_hub.sanitize(
        *both[:2],
        pair.parent / "out",
        settings=sage_hub.Settings(retain=str(pair / "retain.jsonl"), strength=5.0),
    )
    assert release.manifest["bias"]["before"] == pytest.approx(audit["model"]["retain_before"])
    assert release.manifest["bias"]["after"] == pytest.approx(
        audit["model"]["retain_after"], rel=0.05
    )


def test_settings_come_from_the_unlearned_repo(
    on_hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "sage.yaml": b"retain: data/retain.jsonl\nstrength: 7\n",
        "data/retain.jsonl": (pair / "retain.jsonl").read_bytes(),
    }
    on_hub.add_commit("org/unlearned", files)
    run_json(capsys, "push", "org/base", "org/unlearned")
    manifest = json.loads(on_hub.files("org/unlearned-sage")["sage/manifest.json"])
    assert manifest["settings"]["strength"] == 7
    assert manifest["statistics"]["data"]["retain"]["name"] == "retain.jsonl"


def test_what_is_published_names_no_path_host_or_token(
    on_hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import platform

    (pair / "unlearned" / "runs").mkdir()
    (pair / "unlearned" / "runs" / "events.out.tfevents.1.host").write_bytes(b"log")
    (pair / "unlearned" / ".env").write_text("HF_TOKEN=hf_writer")
    (pair / "unlearned" / "optimizer.pt").write_bytes(b"pickle")
    (pair / "unlearned" / "model.gguf").write_bytes(b"weights")
    both = [str(pair / "base"), str(pair / "unlearned")]
    run_json(capsys, "push", *both, "--to", "org/out", *proxies(pair))
    files = on_hub.files("org/out")
    assert not {"optimizer.pt", "model.gguf", "runs/events.out.tfevents.1.host"} & files.keys()
    for name, content in files.items():
        if name.endswith(".png"):
            continue  # in so many bytes a short host name stands by chance
        for secret in (str(pair.parent), platform.node(), "hf_writer"):
            assert secret.encode() not in content, (name, secret)
    manifest = json.loads(files["sage/manifest.json"])
    assert set(manifest["left_behind"]) >= {"optimizer.pt", "model.gguf"}
    assert "optimizer.pt" in files["README.md"].decode()


def test_the_card_inherits_the_licence_and_no_scores(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pair / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    (pair / "unlearned" / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en, no]\nmodel-index:\n- name: theirs\n  results:\n"
        "  - task: {type: text-generation}\n    dataset: {name: MMLU, type: mmlu}\n"
        "    metrics: [{type: accuracy, value: 0.9}]\n---\n# Theirs\n"
    )
    result = run_json(
        capsys,
        *("sanitize", str(pair / "base"), str(pair / "unlearned")),
        *("--output", str(pair.parent / "out"), *proxies(pair)),
    )
    assert any("licences" in warning for warning in result["warnings"])
    card = ModelCard.load(pair.parent / "out" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en", "no"]
    assert card.data.base_model is None  # local folders are nobody's repo on the Hub
    assert {r.dataset_type for r in card.data.eval_results} == {"custom"}
    values = {
        r["metric"]: r["value"]
        for r in result["report"]["results"]
        if (r["model"], r["set"], r["condition"]) == ("sanitized", "heldout", None)
    }
    assert {
        r.metric_type: r.metric_value
        for r in card.data.eval_results
        if r.metric_type.startswith("heldout")
    } == {f"heldout_{name}": round(value, 6) for name, value in values.items()}


def test_chat_models_go_through_their_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path / "pair", chat_template=CHAT)
    pair = tmp_path / "pair"
    both = [str(pair / "base"), str(pair / "unlearned"), *proxies(pair)]
    with_template = run_json(capsys, "sanitize", *both, "--output", str(tmp_path / "a"))
    without = run_json(
        capsys, "sanitize", *both, "--output", str(tmp_path / "b"), "--no-chat-template"
    )
    tokens = [
        {name: about["answer_tokens"] for name, about in result["report"]["data"].items()}
        for result in (with_template, without)
    ]
    # The template's <end> is part of the answer; the plain form has none.
    assert tokens[0]["heldout"] == tokens[1]["heldout"] + 20
    manifest = json.loads((tmp_path / "b" / "sage" / "manifest.json").read_text())
    assert manifest["settings"]["chat_template"] is False


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"sage-hub {sage_hub.__version__}"


def test_from_python_as_the_readme_has_it(pair: Path) -> None:
    retain, both = str(pair / "retain.jsonl"), (str(pair / "base"), str(pair / "unlearned"))
    settings = sage_hub.Settings(retain=retain, rank=3)
    statistics = str(pair.parent / "base.safetensors")
    sage_hub.collect_statistics(both[0], statistics, settings=settings)
    release = sage_hub.sanitize(
        *both, str(pair.parent / "release"), settings=settings, statistics=statistics
    )
    assert release.manifest["bias"]["after"] < release.manifest["bias"]["before"]
    assert "--stats base.safetensors" in (pair.parent / "release" / "README.md").read_text()
    for _ in range(2):
        audit = sage_hub.audit(*both, settings=settings, statistics=statistics)
        assert max(module["rank"] for module in audit["modules"]) == 3

    # Statistics of a lower rank than asked for would be a weaker filter than the record says.
    with pytest.raises(sage_hub.SageHubError, match="at most 3 directions"):
        sage_hub.audit(*both, settings=sage_hub.Settings(retain=retain), statistics=statistics)


def test_the_plan_says_where_settings_come_from_and_what_must_be_met(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("sage.yaml").write_text('gates: ["heldout.probability >= base - 0.02"]\n')
    for file in (pair / "unlearned").glob("tokenizer*"):
        file.unlink()
    both = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--output", "out"]
    assert main([*both, *proxies(pair), "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "Settings come from sage.yaml; the command line wins." in said
    assert "gate        heldout.probability >= base - 0.02" in said
    assert "The unlearned side has no tokenizer, and neither will the release have one" in said


def test_statistics_of_other_rows_are_taken_and_that_is_said(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "base.safetensors")
    run_json(capsys, "stats", str(pair / "base"), *proxies(pair)[:2], "--output", file)
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "w1 w2 w3"}\n')
    both = [str(pair / "base"), str(pair / "unlearned"), "--stats", file]
    assert main(["audit", *both, "--retain", str(other)]) == 0
    assert (
        "The statistics were made on other retain rows (retain.jsonl) than those of other.jsonl, "
        "which are only evaluated."
    ) in capsys.readouterr().err


@pytest.mark.parametrize("page", ["nowhere/page.html", "."])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    page: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(pair / "base"), "./nowhere", "--html", page]) in (2, 10)
    assert f"--html {page}" in capsys.readouterr().err


def test_data_and_settings_in_the_sources_folder_stay_there(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = pair / "unlearned"
    for name in ("retain", "forget"):
        (own / f"{name}.jsonl").write_bytes((pair / f"{name}.jsonl").read_bytes())
    (own / "heldout.txt").write_text("w1 w2 w3\n\nw4 w5 w6\n")
    (own / "sage.yaml").write_text(
        "retain: retain.jsonl\nforget: forget.jsonl\nheldout: heldout.txt\n"
    )
    (own / "vocab.txt").write_text("w1\n")
    words = ["sanitize", str(pair / "base"), str(own), "--gain", "match", "--output"]
    assert main([*words, "out", "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "Settings come from sage.yaml of unlearned" in said
    comes = next(line for line in said.splitlines() if "comes along" in line)
    assert "vocab.txt" in comes
    assert "forget" not in comes
    assert main([*words, "out", "--quiet"]) == 0
    made = {path.name for path in Path("out").iterdir()}
    assert made.isdisjoint({"retain.jsonl", "forget.jsonl", "heldout.txt", "sage.yaml"})
    assert "vocab.txt" in made
    left = json.loads(Path("out/sage/manifest.json").read_text())["left_behind"]
    assert left["forget.jsonl"] == "data, not the model"
    assert left["heldout.txt"] == "data or settings of this run"


def test_what_people_add_to_a_release_stays_in_it(
    on_hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["push", "org/base", "org/unlearned", *proxies(pair), "--gain", "match"]
    first = run_json(capsys, *words)["location"]
    on_hub.add_commit("org/unlearned-sage", {"NOTICE.txt": b"ours"})
    count = len(on_hub.commits("org/unlearned-sage"))
    assert run_json(capsys, *words)["location"] != first  # the commit that has it
    assert len(on_hub.commits("org/unlearned-sage")) == count
    run_json(capsys, *words, "--strength", "3")
    assert len(on_hub.commits("org/unlearned-sage")) == count + 1
    assert on_hub.files("org/unlearned-sage")["NOTICE.txt"] == b"ours"


def test_a_new_repo_is_as_private_as_its_owners_are(
    on_hub: LoopbackHub, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = HfApi.create_repo

    def create(self: HfApi, *args: Any, **options: Any) -> Any:
        asked.append(options["private"])
        return real(self, *args, **options)

    monkeypatch.setattr(HfApi, "create_repo", create)
    words = ["push", "org/base", "org/unlearned", "--retain", str(pair / "retain.jsonl"), "-q"]
    assert main(words) == 0
    assert main([*words, "--to", "org/other", "--private"]) == 0
    assert asked == [None, True]


def test_no_file_of_another_kind_is_overwritten(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = pair / "base" / "tokenizer.json"
    before = tokenizer.read_bytes()
    for output, words in ((tokenizer, "holds no statistics"), (pair, "is a folder")):
        assert main(["stats", str(pair / "base"), "--output", str(output), "-q"]) == 23
        assert words in capsys.readouterr().err
    assert tokenizer.read_bytes() == before
    Path("README.md").write_text("my project")
    job = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--output", "out", "-q"]
    for record, words in ((".", "has a README.md that is none"), ("out/x", "lies in the output")):
        assert main([*job, "--record", record]) == 23
        assert words in capsys.readouterr().err
    assert Path("README.md").read_text() == "my project"


def test_audit_refuses_what_a_release_would(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["audit", str(pair / "base"), str(pair / "unlearned"), "--retain"]
    assert main([*both, str(pair / "retain.jsonl"), "--strength", "inf"]) == 0
    assert "λ = inf" in capsys.readouterr().out
    same = ["audit", str(pair / "base"), str(pair / "base"), "--retain"]
    assert main([*same, str(pair / "retain.jsonl")]) == 14
    change(pair / "unlearned", "model.norm.weight", lambda tensor: tensor[:16].clone())
    assert main([*both, str(pair / "retain.jsonl")]) not in (0, 1)


@pytest.mark.parametrize("option", ["--retain", "--forget", "--to", "--reference", "--device"])
def test_an_option_without_a_value_is_no_option_left_away(
    option: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(pair / "base"), str(pair / "unlearned"), option, ""]) == 2
    assert "is empty; leave it away or give it a value" in capsys.readouterr().err


def test_a_release_that_hf_has_fetched_is_what_its_manifest_says(pair: Path) -> None:
    job = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--output", "out", "-q"]
    assert main([*job, "--retain", str(pair / "retain.jsonl")]) == 0
    notes = Path("out/.cache/huggingface/download")
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").write_text("fetched")
    assert main(["verify", "out"]) == 0

"""The Unlearning Depth Score against its definition, with plain hooks on whole models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from support.architectures import load, make_model
from support.pico import make_config, make_rows, make_tokenizer, write_rows
from transformers import LlamaForCausalLM, PreTrainedModel

from sage_hub.checkpoint.index import Checkpoint, open_checkpoint
from sage_hub.cli.main import main
from sage_hub.commands.eval import evaluate_models
from sage_hub.errors import ProxyError, UsageError
from sage_hub.evaluation import patching
from sage_hub.evaluation.depth import depth_of, scored_part
from sage_hub.evaluation.evaluate import expected_names
from sage_hub.rows.encoding import Encoded, encoder_of
from sage_hub.rows.sources import read_proxy
from sage_hub.settings import Settings

# Where the layers of each are.
LAYERS = {
    "Llama": "model.layers",
    "GPT2": "transformer.h",
    "GPTNeoX": "gpt_neox.layers",
    "OPT": "model.decoder.layers",
    "Gemma3Text": "model.layers",
    "GptOss": "model.layers",
    "Llava": "model.language_model.layers",
}
SIDES = {"base": 0.0, "unlearned": 0.03, "reference": 0.08}  # how far from the base


def make_models(folder: Path, name: str = "Llama") -> None:
    for side, far in SIDES.items():
        model, noise = make_model(name), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(far * torch.randn(parameter.shape, generator=noise))
        model.save_pretrained(folder / side)
        make_tokenizer().save_pretrained(folder / side)
    rows = make_rows(7, seed=1)
    write_rows(folder / "answers.jsonl", rows)
    named = [{**row, "entity": " ".join(row["answer"].split()[1:3])} for row in rows]
    write_rows(folder / "entities.jsonl", named)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("depth")
    make_models(folder)
    return folder


def measured(folder: Path, *sides: str, rows: str = "answers", **how: Any) -> dict[str, Any]:
    settings = {
        "forget": str(folder / f"{rows}.jsonl"),
        "reference": str(folder / "reference"),
        "depth": True,
        "generate_rows": 0,
        "batch_size": 3,
        "device": "cpu",
        "compute_dtype": "float32",
    }
    named = [str(folder / side) for side in ("base", *sides)]
    return evaluate_models(named, settings=Settings(**{**settings, **how}))


def scores(report: dict[str, Any], metric: str = "uds_answer") -> dict[str, Any]:
    return {Path(r["model"]).name: r for r in report["results"] if r["metric"] == metric}


# The definition


def output_of(given: Any) -> torch.Tensor:
    return given[0] if isinstance(given, tuple) else given


def loss(model: PreTrainedModel, row: Encoded) -> float:
    """Mean log-probability of the answer, negative."""
    ids = torch.tensor([row.ids])
    logprobs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
    return -mean(float(logprobs[t - 1, row.ids[t]]) for t in range(row.answer_start, len(row.ids)))


def patched(base: Any, source: Any, layers: str, layer: int, row: Encoded) -> float:
    """The same of the base, with the states of `source` behind `layer` where it predicts."""
    kept: list[torch.Tensor] = []
    where = slice(row.answer_start - 1, len(row.ids) - 1)

    def keep(_: Any, __: Any, output: Any) -> None:
        kept.append(output_of(output).clone())

    def put_in(_: Any, __: Any, output: Any) -> Any:
        states = output_of(output).clone()
        states[:, where] = kept[0][:, where]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    hook = source.get_submodule(layers)[layer].register_forward_hook(keep)
    loss(source, row)
    hook.remove()
    hook = base.get_submodule(layers)[layer].register_forward_hook(put_in)
    found = loss(base, row)
    hook.remove()
    return found


@torch.no_grad()
def defined(folder: Path, side: str, rows: list[Encoded], layers: str) -> list[float]:
    base, reference, model = (
        load(folder / one, dtype=torch.float32) for one in ("base", "reference", side)
    )
    found = []
    for row in rows:
        full, weighted, total = loss(base, row), 0.0, 0.0
        for layer in range(2):
            first = patched(base, reference, layers, layer, row) - full
            second = patched(base, model, layers, layer, row) - full
            if first > 0.05:
                weighted += first * min(max(second / first, 0.0), 1.0)
                total += first
        if total:
            found.append(weighted / total)
    return found


def rows_of(folder: Path, entity: bool) -> list[Encoded]:
    """The word tokenizer makes a token of each word of the four in an answer."""
    encoder = encoder_of(open_checkpoint(str(folder / "base")), Settings())
    rows = encoder.rows(read_proxy(str(folder / "answers.jsonl")))
    if not entity:
        return rows
    return [Encoded(row.ids[: row.answer_start + 3], row.answer_start + 1) for row in rows]


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_what_the_definition_gives(name: str, tmp_path: Path) -> None:
    make_models(tmp_path, name)
    for rows, metric in {"answers": "uds_answer", "entities": "uds"}.items():
        (found,) = scores(measured(tmp_path, "unlearned", rows=rows), metric).values()
        shown = rows_of(tmp_path, rows == "entities")
        expected = defined(tmp_path, "unlearned", shown, LAYERS[name])
        assert 0 < mean(expected) < 1
        assert found["value"] == pytest.approx(mean(expected), abs=1e-4)
        assert (found["rows"], found["direction"], found["set"], found["condition"]) == (
            len(expected),
            "higher",
            "forget",
            None,
        )


# Its ends


def test_it_is_0_of_the_base_and_1_of_the_reference(models: Path) -> None:
    for side, twin in {"base": "untouched", "reference": "retrained"}.items():
        shutil.copytree(models / side, models / twin, dirs_exist_ok=True)
    found = scores(measured(models, "untouched", "unlearned", "retrained"))
    assert found.keys() == {"untouched", "unlearned", "retrained"}  # not those it is measured by
    assert found["untouched"]["value"] == 0
    assert 0 < found["unlearned"]["value"] < 1
    assert found["retrained"]["value"] == 1


@pytest.mark.parametrize(
    "lost, theirs, expected",
    [
        ([1.0, 0.5], [2.0, 1.0], 0.5),
        ([1.0, 0.0], [1.0, 3.0], 0.25),  # weighted by what the reference lacks
        ([9.0, -9.0], [1.0, 1.0], 0.5),  # no more than all, no less than nothing
        ([0.0, 7.0], [1.0, 0.05], 0.0),  # not above the threshold
        ([0.0, 7.0], [0.05 + 1e-9, 0.05], 0.0),
        ([7.0, 7.0], [0.05, -1.0], None),  # no layer that counts
        ([1.0, 1.0], [math.nan, math.nan], None),
        ([], [], None),
    ],
)
def test_the_threshold_and_the_ends_of_a_layer_s_share(
    lost: list[float], theirs: list[float], expected: float | None
) -> None:
    assert depth_of(lost, theirs) == expected


def test_a_broken_model_has_no_score() -> None:
    assert math.isnan(depth_of([math.nan, 1.0], [1.0, 1.0]) or 0)


def test_a_reference_that_lacks_nothing_leaves_nothing_to_measure(models: Path) -> None:
    report = measured(models, "unlearned", reference=str(models / "base"))
    assert not scores(report)
    reasons = {entry["what"]: entry["reason"] for entry in report["not_run"]}
    assert "that the reference lacks" in reasons["uds_answer on forget"]
    alone = measured(models)
    reasons = {entry["what"]: entry["reason"] for entry in alone["not_run"]}
    assert reasons["uds_answer on forget"] == f"there is no model beside {models / 'base'}"


# What is scored


class Pieces:
    """A tokenizer that knows what text each token is."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.pieces[place] for place in ids)


NAME = Pieces("Question", " Who", "?", " It", " is", " Hsi", "ao Y", "un.", " So", "<end>")
ROW = Encoded(tuple(range(10)), 3, uncounted=1)


@pytest.mark.parametrize(
    "entity, tokens",
    [
        ("", (3, 9)),  # all but what ends the text
        ("Hsiao", (5, 7)),  # every token that has a letter of it
        ("Hsiao Yun", (5, 8)),
        ("Hsiao Yun.", (5, 8)),
        ("ao", (6, 7)),
        ("It", (3, 4)),
        ("So", (8, 9)),
        ("Who", None),  # no part of the answer
        ("Yan", None),
    ],
)
def test_the_tokens_of_an_entity(entity: str, tokens: tuple[int, int] | None) -> None:
    found = scored_part(ROW, entity, NAME)  # type: ignore[arg-type]
    assert tokens == (None if found is None else (found.answer_start, len(found.ids)))


def test_an_answer_that_is_cut_away_is_not_scored() -> None:
    assert scored_part(Encoded((0, 1, 2), 3), "", NAME) is None  # type: ignore[arg-type]
    assert scored_part(Encoded((0, 1, 2), 3), "So", NAME) is None  # type: ignore[arg-type]
    assert scored_part(Encoded((0, 1, 9), 2, uncounted=1), "", NAME) is None  # type: ignore[arg-type]


def test_rows_whose_entity_is_cut_away_are_told(models: Path) -> None:
    rows = make_rows(5, seed=2)
    named = [{**row, "entity": row["answer"].split()[n % 2 * 3]} for n, row in enumerate(rows)]
    write_rows(models / "long.jsonl", named)
    report = measured(models, "unlearned", rows="long", max_length=12)
    reasons = {entry["what"]: entry["reason"] for entry in report["not_run"]}
    assert "do not show" in reasons["uds on forget: 2 of 5 rows"]
    assert scores(report, "uds")["unlearned"]["rows"] <= 3


# Which rows, and how


def test_forty_rows_are_a_choice_fixed_by_the_seed(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(models / "many.jsonl", make_rows(60, seed=3))
    seen: list[list[Encoded]] = []
    real = patching.patch

    def watched(target: Any, sources: Any, rows: list[Encoded], *more: Any) -> Any:
        seen.append(rows)
        return real(target, sources, rows, *more)

    monkeypatch.setattr("sage_hub.evaluation.depth.patch", watched)
    first = measured(models, "unlearned", rows="many")
    monkeypatch.setattr(patching, "PART", 0)  # all states wait in files
    again = measured(models, "unlearned", rows="many", batch_size=16)
    one, other = scores(first)["unlearned"], scores(again)["unlearned"]
    assert one["value"] == pytest.approx(other["value"], abs=1e-5)
    assert len(seen[0]) == 40
    assert seen[0] == seen[1]
    measured(models, "unlearned", rows="many", seed=1)
    assert seen[2] != seen[0]


def test_nothing_of_it_is_run_unless_it_is_asked_for(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sage_hub.evaluation.depth.patch", None)
    report = measured(models, "unlearned", depth=False)
    assert not scores(report)
    reasons = {entry["what"]: entry["reason"] for entry in report["not_run"]}
    assert reasons["unlearning depth on forget"] == "--depth was not given"
    alone = measured(models, "unlearned", depth=False, reference=None)
    assert not [entry for entry in alone["not_run"] if "depth" in entry["what"]]


# What is refused before any work


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    sides = [str(folder / "base"), str(folder / "unlearned")]
    status = main(["push", *sides, "--to", str(folder / "out"), "--dry-run", "--depth", *words])
    return status, capsys.readouterr().err


def test_it_takes_a_reference_and_a_forget_set(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget = ["--forget", str(models / "answers.jsonl")]
    reference = ["--reference", str(models / "reference")]
    for words in (forget, reference, []):
        status, said = refusal(models, capsys, *words)
        assert (status, "give --forget and --reference" in said) == (2, True)
        assert "Traceback" not in said
    status, said = refusal(models, capsys, *forget, *reference)
    assert (status, "--depth" in said) == (0, False)
    with pytest.raises(UsageError, match="give --forget and --reference"):
        measured(models, "unlearned", reference=None)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"hidden_size": 64}])
def test_models_of_another_shape_are_refused(
    change: dict[str, int], models: Path, tmp_path: Path
) -> None:
    LlamaForCausalLM(make_config(**change)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    layers, width = change.get("num_hidden_layers", 2), change.get("hidden_size", 32)
    with pytest.raises(UsageError, match=rf"\({layers} layers of {width} features\) into base"):
        measured(models, "unlearned", reference=str(tmp_path))


def test_a_model_of_one_block_is_refused(
    models: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path_factory.mktemp("shapes"), Checkpoint.empty_model

    def doubled(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> PreTrainedModel:
        model = real(checkpoint, dtype)
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
        return model

    monkeypatch.setattr("sage_hub.runtime.shelf.shelf", lambda kind: folder)
    monkeypatch.setattr(Checkpoint, "empty_model", doubled)
    with pytest.raises(UsageError, match="cannot be run one by one"):
        measured(models, "unlearned")


@pytest.mark.parametrize(
    "entities, said",
    [
        ({2: "w99"}, "row 3: 'entity' must be a part of the answer"),
        ({2: None}, "row 3: no 'entity', unlike the first row"),
        ({0: None}, "row 2: an 'entity', unlike the first row"),
        ({2: 777}, "row 3: 'entity' must be a part of the answer for --depth, and '777' is none"),
    ],
)
def test_entities_are_parts_of_answers_in_all_rows_or_in_none(
    entities: dict[int, Any], said: str, models: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {**row, "entity": row["answer"].split()[0]} for row in make_rows(4, seed=4)
    ]
    for place, entity in entities.items():
        rows[place]["entity"] = entity
    write_rows(models / "named.jsonl", rows)
    with pytest.raises(ProxyError, match=said):
        measured(models, "unlearned", rows="named")
    measured(models, "unlearned", rows="named", depth=False)  # where it is another column


# In a release


@pytest.mark.parametrize("rows, metric", [("answers", "uds_answer"), ("entities", "uds")])
def test_a_release_has_it_in_record_card_and_gates(
    rows: str, metric: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(models / "retain.jsonl", make_rows(20, seed=5))
    words = ["sanitize", str(models / "base"), str(models / "unlearned"), "--depth"]
    words += ["--retain", str(models / "retain.jsonl"), "--forget", str(models / f"{rows}.jsonl")]
    words += ["--reference", str(models / "reference"), "--gain", "1", "--generate-rows", "0"]
    words += ["--output", str(tmp_path / "out"), "--gate", f"forget.{metric} >= unlearned - 1"]
    assert main(words) == 0
    report = json.loads((tmp_path / "out" / "sage" / "report.json").read_text())
    found = {r["model"]: r["value"] for r in report["results"] if r["metric"] == metric}
    assert found.keys() == {"unlearned", "control", "sanitized"}
    assert report["gates"][0]["left"] == found["sanitized"]
    (gap,) = (
        gap
        for gap in report["differences"]
        if (gap["metric"], gap["other"]) == (metric, "unlearned")
    )
    assert gap["value"] == pytest.approx(found["sanitized"] - found["unlearned"])
    card = (tmp_path / "out" / "README.md").read_text()
    (line,) = (line for line in card.splitlines() if line.startswith(f"| forget | {metric} |"))
    assert f"**{found['sanitized']:.4f}**" in line
    assert "Unlearning Depth Score" in card
    assert ("not to be compared with the paper's" in card) == (metric == "uds_answer")
    assert ("- uds on forget: the rows name no entity;" in card) == (metric == "uds_answer")


def test_gates_know_it_where_it_is_measured(models: Path) -> None:
    proxies = {"forget": read_proxy(str(models / "answers.jsonl"))}

    def named(**how: Any) -> set[str]:
        names = expected_names(proxies, Settings(**how), ["base", "sanitized", "reference"])
        return {name for name in names if "uds" in name}

    assert named(depth=True) == {"forget.uds_answer", "sanitized.forget.uds_answer"}
    assert not named()


def test_entities_are_told_apart_in_the_fingerprint_of_a_set(models: Path) -> None:
    plain, named = (read_proxy(str(models / f"{one}.jsonl")) for one in ("answers", "entities"))
    assert plain.fingerprint != named.fingerprint
    assert plain.row_hashes == named.row_hashes  # the words are the same

"""Nothing comes along unasked but what belongs to a model, and never what may hold weights."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from support.adapters import make_adapter
from support.loopback_hub import LoopbackHub

from sage_hub.checkpoint.files import LocalFiles
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.checkpoint.layouts import INDEX, PICKLES
from sage_hub.checkpoint.pair import open_pair
from sage_hub.cli.main import main
from sage_hub.errors import UsageError
from sage_hub.repair.belongs import belongs
from sage_hub.repair.beside import (
    ALIKE,
    ARCHIVES,
    DATA,
    NEVER,
    OTHER_WEIGHTS,
    bring,
    sort_files,
    why_left,
)
from sage_hub.repair.matching import make_plan
from sage_hub.settings import Settings, as_words

STAYS = {
    **dict.fromkeys(
        (
            *("__0_0.distcp", "model.safetensors.bak", "model.safetensors~", "model.gguf.part1"),
            *("model.safetensors.partial", "model.hdf5", "embeddings.npy", "saved_model.pb"),
            *("pytorch_model.bin.index.json", "onnx/model.onnx", "MODEL.GGUF", "tf_model.h5"),
            *("m.mlpackage/Data/weights/weight.txt", "adapter_model.safetensors"),
        ),
        "weights that were not sanitized",
    ),
    **dict.fromkeys(
        (
            *("checkpoint.tar", "adapter.zip", "model.tar.gz", "model.zst", "model.7z"),
            *("tokenizer.json.gz", "model.tar.zst"),
        ),
        "an archive",
    ),
    **dict.fromkeys(
        ("pytorch_model.bin.1", "pytorch_model.bin", "rng_state_0.pth", "LICENSE.pkl"), "a pickle"
    ),
    **dict.fromkeys(
        ("retain.jsonl.gz", "forget.csv", "train.parquet", "rows.NDJSON"), "data, not the model"
    ),
    **dict.fromkeys(
        (
            *("forget.json", "notebook.ipynb", "train.py", "__pycache__/modeling.cpython-311.pyc"),
            *("notes.txt", "sub/tokenizer.json", "tokenizer.json.bak", "other.model", "model_2"),
            *("noticed_facts.txt", "params.json", "tokenizer_config.json~", "chat_template.txt"),
        ),
        "not known to belong to a model",
    ),
    "adapter_config.json": "of an adapter, and this is a whole model",
    "trainer_state.json": "of the training, not of the model",
    "evals/TOFU_EVAL.json": "results of another model than the release",
    ".env": "a hidden file",
    "sage/manifest.json": "the record of an earlier release",
}
COMES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "tekken.json", "qwen.tiktoken", "tokenizer.model.v3"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
    *("LICENSE", "LICENSE.txt", "LICENCE.md", "license-mit", "NOTICE", "USE_POLICY.md"),
    *("MODEL_LICENSE", "THIRD_PARTY_NOTICES.txt", "COPYING"),
)


def write(folder: Path, files: dict[str, str]) -> Checkpoint:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return Checkpoint(LocalFiles(folder), {})


def test_what_does_not_belong_to_a_model_stays_behind_and_is_named(tmp_path: Path) -> None:
    carried, left = sort_files(write(tmp_path, dict.fromkeys([*STAYS, *COMES], "{}")))
    assert left == STAYS
    assert sorted(carried) == sorted(COMES)


def test_every_vocabulary_that_transformers_reads_comes_along() -> None:
    """What its tokenizers call their files is read from their source, as all import too slowly."""
    named: set[str] = set()
    for path in Path(transformers.__file__).parent.rglob("tokenization*.py"):
        for names in re.findall(
            r"vocab_files_names\s*=\s*\{(.*?)\}", path.read_text(encoding="utf-8"), re.S | re.I
        ):
            named |= set(re.findall(r':\s*"([^"]+)"', names))
    assert len(named) > 15
    assert [name for name in sorted(named) if not belongs(name)] == []


parts = st.text("abcdefgXYZ0123-_", min_size=1, max_size=8)
stems = st.one_of(parts, st.sampled_from(["LICENSE", "tokenizer", "config.json", "vocab.txt"]))


@given(
    stems,
    st.sampled_from([*OTHER_WEIGHTS, *PICKLES, *ARCHIVES]),
    st.sampled_from(["", "~", ".bak", ".1", ".part1", ".partial", ".tmp", "-00001"]),
)
def test_no_name_of_weights_or_pickles_comes_along(stem: str, suffix: str, more: str) -> None:
    for name in (f"{stem}{suffix}{more}", f"original/{stem}{suffix.upper()}{more}"):
        assert not belongs(name)
        assert why_left(name) in NEVER


@given(stems, st.sampled_from([*DATA, ".json", ".txt", ".yaml", ".py", ".ipynb", ".xlsx", ".db"]))
def test_no_name_of_data_comes_along(stem: str, suffix: str) -> None:
    assert not belongs(f"data_{stem}{suffix}")
    assert not belongs(f"data/{stem}{suffix}")


CODE = {
    "config.json": {"auto_map": {"AutoConfig": "configuration_x.XConfig"}},
    "tokenizer_config.json": {
        "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]},
    },
    "processor_config.json": {"auto_map": {"AutoProcessor": "org/other--processing_x.XProcessor"}},
}


def test_code_that_a_config_names_comes_along_with_what_it_imports(tmp_path: Path) -> None:
    code = {
        "configuration_x.py": "from .layers import attention\nfrom . import shapes\nimport os\n",
        "tokenization_x.py": "if True:\n    from .words.split import split\n",
        "layers.py": "from .configuration_x import XConfig\n",
        "shapes.py": "",
        "words/split.py": "from ..shapes import shape\nfrom ...outside import x\n",
    }
    others = dict.fromkeys(("processing_x.py", "train.py", "os.py", "words/other.py"), "")
    configs = {name: json.dumps(said) for name, said in CODE.items()}
    carried, left = sort_files(write(tmp_path, {**configs, **code, **others}))
    assert sorted(carried) == sorted([*configs, *code])
    assert left == dict.fromkeys(others, "not known to belong to a model")


@pytest.mark.parametrize(
    "config", ["[1]", "{", '{"auto_map": [1]}', '{"auto_map": {"AutoModel": 3}}', "[" * 9_999]
)
def test_configs_that_name_no_code(config: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {"config.json": config, "modeling.py": "x = (", "a.py": ""})
    assert sort_files(checkpoint)[0] == ("config.json",)


def test_the_config_of_an_adapter_comes_along_with_it(tmp_path: Path) -> None:
    make_adapter(tmp_path, "Llama")
    pair = open_pair(str(tmp_path / "base"), str(tmp_path / "unlearned"))
    assert "adapter_config.json" in make_plan(pair).carried


# What is asked for


def plan_of(pair: Path, *names: str) -> Any:
    write(pair / "unlearned", dict.fromkeys(names, "x"))
    return make_plan(open_pair(str(pair / "base"), str(pair / "unlearned")))


OWN = ("assets/a.png", "assets/deep/b.png", "assets/w.pt", "assets/.key", "notes.txt", ".env")


@pytest.mark.parametrize(
    "globs, brought",
    [
        ([], ()),
        (["assets/*"], ("assets/a.png", "assets/deep/b.png")),
        (["*"], ("assets/a.png", "assets/deep/b.png", "notes.txt")),
        (["notes.txt", ".env"], (".env", "notes.txt")),
        (["config.json"], ()),  # it comes along anyway
    ],
)
def test_what_is_asked_for_comes_along(
    globs: list[str], brought: tuple[str, ...], pair: Path
) -> None:
    plan = plan_of(pair, *OWN)
    more = bring(plan, globs)
    assert set(more.carried) - set(plan.carried) == set(brought)
    assert set(more.left_behind) == set(OWN) - set(brought)
    assert more.problems == plan.problems


@pytest.mark.parametrize(
    "glob, says",
    [
        ("asset/*", "unlearned has no such file"),
        ("*.pt", "assets/w.pt stays behind whoever asks (a pickle)"),
        ("assets/w.pt", "assets/w.pt stays behind whoever asks (a pickle)"),
        (".e*", ".env is a hidden file; name it in full"),
    ],
)
def test_a_glob_that_brings_nothing_is_a_problem(glob: str, says: str, pair: Path) -> None:
    (problem,) = bring(plan_of(pair, *OWN), [glob]).problems
    assert isinstance(problem, UsageError)
    assert f"--carry {glob} brings nothing: " in str(problem)
    assert says in str(problem)


def test_a_dry_run_names_what_stays_and_a_run_leaves_it(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [name for name in STAYS if not name.startswith("sage/")]
    plan_of(pair, *names, "assets/a.png")
    both = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--output", "out"]
    both += ["--retain", str(pair / "retain.jsonl"), "--carry", "assets/*"]
    assert main([*both, "--dry-run"]) == 0
    said = capsys.readouterr().err
    for name in names:
        assert f"{name} ({STAYS[name]})" in " ".join(said.split())
    assert main([*both, "--quiet"]) == 0
    assert not any((Path("out") / name).exists() for name in names)
    assert (Path("out") / "assets" / "a.png").is_file()
    manifest = json.loads(Path("out/sage/manifest.json").read_text())
    assert manifest["settings"]["carry"] == ["assets/*"]
    assert manifest["left_behind"].keys() == set(names)
    assert Settings.from_record(manifest["settings"]).carry == ("assets/*",)
    assert as_words({"carry": ["a", "b"]}) == ["--carry", "a", "--carry", "b"]
    assert main([*both, "--carry", "x.pt", "--dry-run"]) == UsageError.status


# The base that an adapter names


@pytest.mark.parametrize(
    "named", ["/home/somebody/models/base", "C:\\models\\base", "other/base", None, "org/base"]
)
def test_the_config_of_the_release_names_the_base_that_it_was_made_of(
    named: str | None,
    hub: LoopbackHub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_adapter(tmp_path, "Llama")
    hub.add_repo("org/base", tmp_path / "base")
    file = tmp_path / "unlearned" / "adapter_config.json"
    own = {**json.loads(file.read_text()), "base_model_name_or_path": named, "revision": "v1"}
    file.write_text(json.dumps(own))
    words = ["org/base", str(tmp_path / "unlearned"), "--retain", str(tmp_path / "retain.jsonl")]
    assert main(["sanitize", *words, "--output", "out"]) == 0
    said = capsys.readouterr().err
    made = Path("out/adapter_config.json")
    if named == "org/base":
        assert made.read_bytes() == file.read_bytes()
        return
    changed = {"base_model_name_or_path": "org/base", "revision": None}
    assert json.loads(made.read_text()) == own | changed
    assert "names another base than org/base; that of the release names this one" in said
    assert main(["verify", "out", "--quiet"]) == 0
    published = b"".join(path.read_bytes() for path in Path("out").rglob("*.*") if path.is_file())
    assert named is None or named.encode() not in published


@pytest.mark.parametrize("named", ["/home/somebody/base", "../base", "C:\\models\\base"])
def test_a_path_stays_where_the_base_is_a_folder_and_is_told_of(
    named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(tmp_path, "Llama")
    file = tmp_path / "unlearned" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": named}))
    both = [str(tmp_path / "base"), str(tmp_path / "unlearned"), "--output", "out", "--dry-run"]
    assert main(["sanitize", *both, "--retain", str(tmp_path / "retain.jsonl")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "names a folder of the machine it was made on (base_model_name_or_path)" in said


def test_of_names_that_many_disks_take_for_one_the_first_comes_along(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a disk that tells no case apart one would be written over the other."""
    names = (
        "LICENSE",
        "license",
        "Config.json",
        "readme.md",
        "Sage/notes.txt",
        "é.txt",
        "e\u0301.txt",
    )
    for name in names:
        (pair / "unlearned" / name).parent.mkdir(exist_ok=True)
        (pair / "unlearned" / name).write_text("{}")
    if len({path.name for path in (pair / "unlearned").iterdir()} & {*names}) < len(names) - 1:
        pytest.skip("this disk tells no case apart")
    both = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--gain", "1", "-q"]
    both += ["--retain", str(pair / "retain.jsonl")]
    assert main([*both, "--carry", "*.txt", "--output", "out"]) == 0
    left = json.loads(Path("out/sage/manifest.json").read_text())["left_behind"]
    assert {name for name, why in left.items() if why == ALIKE} == {
        "license",
        "Sage/notes.txt",
        "é.txt",
    }
    there = {path.relative_to("out").as_posix() for path in Path("out").rglob("*")}
    assert {"LICENSE", "config.json", "README.md", "e\u0301.txt"} <= there
    assert len({unicodedata.normalize("NFC", name).casefold() for name in there}) == len(there)
    capsys.readouterr()
    for name in ("Config.json", "readme.md", "Sage/*"):
        assert main([*both, "--carry", name, "--output", "other"]) == 2
        assert f"brings nothing: {name.replace('*', 'notes.txt')} stays behind whoever asks" in (
            capsys.readouterr().err
        )


def test_shards_that_many_disks_take_for_one_are_refused(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    side = pair / "unlearned"
    index = json.loads((side / INDEX).read_text())
    first, second = sorted({*index["weight_map"].values()})[:2]
    other = first.replace("model", "MODEL")
    (side / second).rename(side / other)
    places = {n: other if at == second else at for n, at in index["weight_map"].items()}
    (side / INDEX).write_text(json.dumps(index | {"weight_map": places}))
    both = ["sanitize", str(pair / "base"), str(side), "--output", "out", "--dry-run"]
    assert main([*both, "--retain", str(pair / "retain.jsonl")]) == 17
    assert "differ in case alone, and would be one file on many disks" in capsys.readouterr().err

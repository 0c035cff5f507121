"""No prompt that lost its words: what a model is shown of a row has the question and the answer."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile import LOOP
from support.pico import CHAT, WORDS, make_config, make_tokenizer, write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.errors import ProxyError, UsageError
from sage_hub.rows.encoding import Encoded, Encoder, check_rows, dated, encoder_of
from sage_hub.rows.forms import parse_rows
from sage_hub.rows.prompts import Chat
from sage_hub.rows.proxies import Row
from sage_hub.rows.sources import read_proxy
from sage_hub.runtime import limits
from sage_hub.settings import Settings

PARTS = (
    "{% for m in messages %}<{{ m.role }}> {% for c in m.content if c.type == 'text' %}"
    "{{ c.text }}{% endfor %} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
THINKING = CHAT.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}w50 w51 {% endif %}{{ m.content }}"
)
TOOLS = (
    "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}"
    "{% for m in messages %}<{{ m.role }}> {{ m.reasoning_content }} "
    "{% for call in m.tool_calls or [] %}{{ call.name }} {{ call.arguments.place }} {% endfor %}"
    "{{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
DATED = "{{ strftime_now('w%d') }} " + CHAT
ROW = parse_rows([{"question": "w1 w2", "answer": "w3 w4"}], "set")[0]
DAY = date(2026, 1, 31)
phrases = st.lists(st.sampled_from(WORDS[:40]), min_size=1, max_size=4).map(" ".join)


def chat_row(*messages: tuple[str, str], **more: object) -> Row:
    told = [{"role": role, "content": content} for role, content in messages]
    return parse_rows([{"messages": told, **more}], "set")[0]


def encode(row: Row, template: str, max_length: int = 200) -> tuple[str, str]:
    """What comes before the answer and the answer, in words."""
    tokenizer = make_tokenizer(template)
    found = Encoder(tokenizer, Chat(tokenizer, DAY), max_length).row(row, "facts.jsonl, line 7")
    return spoken(found, template)


def spoken(found: Encoded, template: str) -> tuple[str, str]:
    words = make_tokenizer(template).convert_ids_to_tokens(list(found.ids))
    return " ".join(words[: found.answer_start]), " ".join(words[found.answer_start :])


# Templates that are right in their own way


def test_a_template_that_wants_parts_is_given_parts() -> None:
    assert (
        encode(ROW, PARTS) == encode(ROW, CHAT) == ("<user> w1 w2 <end> <assistant>", "w3 w4 <end>")
    )


def test_what_a_template_puts_before_the_answer_is_no_part_of_it() -> None:
    assert encode(ROW, THINKING) == ("<user> w1 w2 <end> <assistant> w50 w51", "w3 w4 <end>")


def test_the_answer_is_found_though_its_words_stand_elsewhere_too() -> None:
    row = chat_row(("user", "w50 w3"), ("assistant", "w50"))
    before, answer = encode(row, THINKING.replace("<end>", "w50 <end>"))
    assert before == "<user> w50 w3 w50 <end> <assistant> w50 w51"
    assert answer == "w50 w50 <end>"


def test_tools_calls_and_reasoning_go_to_the_template() -> None:
    tools = [{"name": "w20"}]
    messages = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "tool_calls": [{"name": "w20", "arguments": {"place": "w21"}}]},
        {"role": "tool", "content": "w22", "name": "w20", "tool_call_id": "1"},
        {"role": "assistant", "content": "w2", "reasoning_content": "w23", "weight": None},
    ]
    (row,) = parse_rows([{"messages": messages, "tools": tools}], "set")
    before, answer = encode(row, TOOLS)
    assert before == (
        "w20 <user> w1 <end> <assistant> w20 w21 <end> "
        "<unk> <unk> <unk> w22 <end> <assistant> w23"  # no token of the tool's role
    )
    assert answer == "w2 <end>"
    for template, lost in (
        (TOOLS.replace("{{ tool.name }}", ""), "tools"),
        (TOOLS.replace("m.tool_calls or []", "[]"), "tool_calls"),
        (TOOLS.replace("{{ m.reasoning_content }}", ""), "reasoning_content"),
    ):
        with pytest.raises(ProxyError, match=f"line 7: the chat template does not write .*{lost}"):
            encode(row, template)
    with pytest.raises(ProxyError, match=r"line 7.*only a chat template"):
        Encoder(make_tokenizer(), None, 99).row(row, "facts.jsonl, line 7")
    plain = parse_rows(
        [{"messages": [{**m, "content": m.get("content", "w9")} for m in messages]}], "s"
    )
    assert row.hash != plain[0].hash


def test_what_only_calls_a_tool_is_no_answer() -> None:
    messages = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2", "tool_calls": [{"name": "w3"}]},
    ]
    with pytest.raises(ProxyError, match="set, row 1: the last message calls a tool"):
        parse_rows([{"messages": messages}], "set")


# Templates that lose words


@pytest.mark.parametrize(
    "template, reason",
    [
        (CHAT.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}"), "its answer"),
        (
            CHAT.replace("{{ m.content }}", "{{ m.content if m.role != 'user' }}"),
            "before its answer",
        ),
        ("<user> {{ messages[0].content }} <end>", "its answer"),
        (CHAT.replace("m.content", "m.content.split('w')[0]"), "its answer"),
        (CHAT.replace("m.content", "m.content | upper"), "its answer"),
        (CHAT.replace("messages %}", "messages | reverse %}"), "before its answer"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "its answer"),
        ("{{ messages[0] + 1 }}", "refuses it"),
        ("{{ messages.content.nothing.there }}", "refuses it"),
        ("{{ raise_exception('in turn') }}", r"refuses it \(in turn\)"),
        ("{% for m in messages %}", "refuses it"),
    ],
)
def test_a_template_that_loses_words_is_refused_by_row(template: str, reason: str) -> None:
    with pytest.raises(ProxyError, match=rf"facts\.jsonl, line 7.*{reason}.*--no-chat-template"):
        encode(ROW, template)


@pytest.mark.parametrize(
    "more, reason",
    [
        (LOOP, "runs for"),
        ("{{ 'x' * 10 ** 12 }}", "takes"),
        ("{% for a in range(30) %}{{ 'x' * 10 ** 6 }}{% endfor %}", "writes"),
    ],
)
def test_a_template_that_takes_without_end_is_refused(
    more: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    with pytest.raises(ProxyError, match=rf"line 7.*refuses it \(it {reason} more than"):
        encode(ROW, CHAT + more)


def test_a_word_of_the_template_is_not_taken_for_one_of_the_row() -> None:
    said = "{% if not add_generation_prompt %}{{ messages[-1].content }}{% endif %}"
    deaf = f"w1 <user> <end> <assistant> {said}"
    with pytest.raises(ProxyError, match="before its answer"):
        encode(chat_row(("user", "w1"), ("assistant", "w2")), deaf)


forms = st.sampled_from(["{{ m.content }}", "{% for c in m.content %}{{ c.text }}{% endfor %}"])
around = st.lists(st.sampled_from([*WORDS[40:50], "<user>", "<end>", ":"]), max_size=2).map(
    " ".join
)
orders = st.sampled_from(
    [
        "messages",
        "messages | reverse",
        "messages[1:]",
        "messages[:-1]",
        "messages[-1:]",
        "messages[:1]",
    ]
)
starts = st.sampled_from(["", "{% if add_generation_prompt %}<assistant> {% endif %}"])


@given(
    st.lists(phrases, min_size=1, max_size=3),
    phrases,
    forms,
    around,
    around,
    around,
    orders,
    starts,
)
def test_any_template_keeps_all_words_or_is_refused(
    asked: list[str],
    answer: str,
    form: str,
    first: str,
    before: str,
    behind: str,
    order: str,
    start: str,
) -> None:
    message = f"<{{{{ m.role }}}}> {before} {form} {behind} "
    template = f"{first} {{% for m in {order} %}}{message}{{% endfor %}}{start}"
    roles = ["user" if place % 2 == 0 else "assistant" for place in range(len(asked))]
    row = chat_row(*zip(roles, asked, strict=True), ("assistant", answer))
    try:
        prompt, said = encode(row, template)
    except ProxyError:
        assert order != "messages" or len(asked) > 1
        assert order != "messages"
        return
    assert f"{said} ".startswith(f"{answer} ")
    assert said.split()[len(answer.split()) :] == make_tokenizer().tokenize(behind)
    for words in asked:
        assert f" {words} " in f" {prompt} "


# Which template, and which day


def test_of_named_templates_the_default_is_used() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHAT, "tool_use": "{{ nothing }}"}
    chat = Encoder(tokenizer, Chat(tokenizer, DAY), 99)
    assert spoken(chat.row(ROW, "set"), CHAT)[1] == "w3 w4 <end>"
    tokenizer.chat_template = {"rag": CHAT, "tool_use": CHAT}
    with pytest.raises(ProxyError, match=r"set: .* no chat template called default, but rag, tool"):
        chat.row(ROW, "set")


def test_a_template_is_named() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHAT, "rag": THINKING, "dated": DATED}

    def told(name: str | None) -> tuple[str, str]:
        row = Encoder(tokenizer, Chat(tokenizer, DAY, name), 99).row(ROW, "set")
        return spoken(row, CHAT)

    assert told(None) == told("default") == ("<user> w1 w2 <end> <assistant>", "w3 w4 <end>")
    assert told("rag") == ("<user> w1 w2 <end> <assistant> w50 w51", "w3 w4 <end>")
    assert told("dated")[0].startswith("w31 <user>")
    with pytest.raises(ProxyError, match="no chat template called more, but dated, default, rag"):
        told("more")


def test_a_name_where_there_are_none(pair: Path) -> None:
    """A name must not be taken for a template, as transformers would."""
    settings = Settings(template="rag")
    with pytest.raises(ProxyError, match="no such chat template, but none"):
        encoder_of(open_checkpoint(str(pair / "base")), settings)
    make_tokenizer(CHAT).save_pretrained(pair / "base")
    with pytest.raises(ProxyError, match="no such chat template, but default"):
        encoder_of(open_checkpoint(str(pair / "base")), settings)
    with pytest.raises(UsageError, match="--no-chat-template takes none"):
        Settings(template="rag", chat_template=False)


def test_a_named_template_is_found_beside_the_tokenizer(pair: Path) -> None:
    folder = pair / "base" / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text(CHAT)
    checkpoint = open_checkpoint(str(pair / "base"))
    assert "additional_chat_templates/tool_use.jinja" in checkpoint.tokenizer_files
    with pytest.raises(ProxyError, match=r"row 1.*but tool_use"):
        encoder_of(checkpoint, Settings()).row(ROW, "facts, row 1")
    assert encoder_of(checkpoint, Settings(template="tool_use")).row(ROW, "facts, row 1").ids
    assert encoder_of(checkpoint, Settings(chat_template=False)).row(ROW, "facts, row 1").ids


@pytest.mark.parametrize(
    "format, written",
    [
        ("w%d", "w31"),
        ("w%-m", "w1"),
        ("%d %B %Y", "31 January 2026"),
        ("%Y-%m-%d %H", "2026-01-31 00"),
    ],
)
def test_a_template_has_one_date(format: str, written: str) -> None:
    template = f"   {{{{ strftime_now('{format}') }}}}\n{CHAT}"
    tokenizer = make_tokenizer(template)
    shown = Chat(tokenizer, DAY).show(ROW, "set").text
    assert shown == f"   {written}\n" + Chat(make_tokenizer(CHAT), DAY).show(ROW, "set").text


def test_the_settings_take_a_date_only_where_one_is_written(pair: Path) -> None:
    checkpoint = open_checkpoint(str(pair / "base"))
    assert dated(checkpoint, Settings()) == Settings()
    assert "date" not in Settings().describe()
    (pair / "base" / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}" + CHAT)
    checkpoint = open_checkpoint(str(pair / "base"))
    assert dated(checkpoint, Settings()).date == date.today().isoformat()
    given_one = Settings(date="2001-02-03")
    assert dated(checkpoint, given_one) == given_one
    assert Settings.from_record(given_one.describe()).date == "2001-02-03"
    assert "2001" in encoder_of(checkpoint, given_one).chat.show(ROW, "set").text  # type: ignore[union-attr]


# All rows, in the plan


def test_a_token_beyond_the_embedding_is_named(pair: Path) -> None:
    LlamaForCausalLM(make_config(vocab_size=40)).save_pretrained(pair / "small")
    make_tokenizer().save_pretrained(pair / "small")
    checkpoint = open_checkpoint(str(pair / "small"))
    rows = [
        {"question": "w1", "answer": "w2"},
        {"question": "w1", "answer": "w3", "perturbed_answer": "w59"},
    ]
    rows[0]["perturbed_answer"] = "w4"
    proxy = read_proxy(str(write_rows(pair / "facts.jsonl", rows)))
    with pytest.raises(
        ProxyError, match=r"facts\.jsonl, row 2: its token 'w59'.* small has 40 rows"
    ):
        check_rows({"forget": proxy}, checkpoint, Settings())


def test_the_first_row_of_each_set_is_shown_as_it_is_seen(pair: Path) -> None:
    (pair / "base" / "chat_template.jinja").write_text(CHAT)
    checkpoint = open_checkpoint(str(pair / "base"))
    rows = [{"question": "w1", "answer": "w2"}, {"question": "w3", "answer": "w4"}]
    proxy = read_proxy(str(write_rows(pair / "facts.jsonl", rows)))
    long = read_proxy(str(write_rows(pair / "long.jsonl", [{"text": "w1 " * 60}])))
    shown = check_rows({"forget": proxy, "retain": long}, checkpoint, Settings())
    assert shown["forget"] == "<user> w1 <end> <assistant> ⇒ w2 <end>"
    assert len(shown["retain"]) < 120
    assert check_rows({}, checkpoint, Settings()) == {}


# Tokens that are parts of words


def in_pieces(metaspace: bool) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are parts of words, as those of real models are."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Metaspace() if metaspace else in_bytes
    bpe.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), *"abc :\n"]
    special = ["<unk>", "<user>", "<assistant>", "<end>", "<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["abc cab : bca\n\nabc 12 cab acb", "aabbcc 121 : c\n"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")


PIECES = [in_pieces(metaspace) for metaspace in (False, True)]
letters = st.text("abc 12:", min_size=1, max_size=9).filter(str.strip).map(str.strip)


@given(
    letters,
    letters,
    st.sampled_from(["", "<think>\n\n</think>\n\n", "so: ", "12", "ca", "aab", "\n"]),
    st.sampled_from(["", "<end>", "<end>\n"]),
    st.booleans(),
    st.sampled_from(PIECES),
)
def test_the_answer_begins_with_the_token_of_its_first_letter(
    question: str,
    answer: str,
    before: str,
    behind: str,
    opens: bool,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    thinks = f"{{{{ {before!r} if m.role == 'assistant' }}}}"
    start = "{{ '<assistant>\n' if add_generation_prompt }}" if opens else ""
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>\n"
        f"{thinks}{{{{ m.content }}}}{{{{ {behind!r} }}}}{{% endfor %}}{start}"
    )
    row = chat_row(("user", question), ("assistant", answer))
    shown = Chat(tokenizer, DAY).show(row, "set")
    found = Encoder(tokenizer, Chat(tokenizer, DAY), 200).row(row, "set")
    assert shown.text == f"<user>\n{question}{behind}<assistant>\n{before}{answer}{behind}"
    spans = tokenizer(shown.text, add_special_tokens=False, return_offsets_mapping=True)
    first = shown.text.rindex(answer + behind)
    place = next(n for n, (_, stop) in enumerate(spans["offset_mapping"]) if stop > first)
    # White space before it may be the answer's, as a plain prompt's is, and nothing else.
    assert found.answer_start <= place
    begun = spans["offset_mapping"][found.answer_start][0]
    assert not shown.text[begun:first].strip() or found.answer_start == place

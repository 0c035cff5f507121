"""Chats to rows: `messages`, and `conversations` as ShareGPT writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sage_hub.errors import ProxyError
from sage_hub.rows.proxies import Row

# What a message may have beside its content, and a chat template has to write.
SAID_OTHERWISE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
ABOUT_A_TOOL = ("name", "tool_call_id")
ROLES = {
    **{"human": "user", "user": "user"},
    **{"gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "assistant": "assistant"},
    **{"system": "system", "tool": "tool"},
}


def parse_messages(record: Mapping[str, Any], where: str) -> Row:
    """Messages with roles, in the form of most chat APIs; the last one is the answer."""
    messages = record.get("messages")
    read = [_read(message, where) for message in (messages if isinstance(messages, list) else ())]
    if not read or read[-1]["role"] != "assistant" or "content" not in read[-1]:
        raise ProxyError(f"{where}: 'messages' must end with a message of the assistant.")
    *before, last = read
    if "tool_calls" in last or "function_call" in last:
        raise ProxyError(f"{where}: the last message calls a tool; an answer must be text alone.")
    turns = tuple((message["role"], message.get("content", "")) for message in before)
    prompt = "".join(f"{role}: {content}\n" for role, content in turns) + "assistant:"
    tools = _read_tools(record.get("tools") or (), where)
    rich = tools or any(message.keys() - {"role", "content"} for message in read)
    chat = json.dumps({"messages": read, "tools": tools}, sort_keys=True) if rich else ""
    return Row(prompt, f" {last['content']}", turns, chat=chat)


def parse_conversation(record: Mapping[str, Any], where: str) -> Row:
    """The same with `from` and `value`, and with a system message and tools beside them."""
    told = record.get("conversations")
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for message in told if isinstance(told, list) else ():
        if isinstance(message, Mapping) and "from" in message:
            if message["from"] not in ROLES:
                raise ProxyError(f"{where}: {message['from']!r} is no role that is understood.")
            message = {"role": ROLES[message["from"]], "content": message.get("value")}
        messages.append(message)
    return parse_messages({**record, "messages": messages}, where)


def _read(message: Any, where: str) -> dict[str, Any]:
    """A message with what is used of it, its content as one text."""
    wrong = ProxyError(f"{where}: each message needs a 'role' and a 'content' in text.")
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise wrong
    tool = message["role"] == "tool"
    kept = (*SAID_OTHERWISE, *(ABOUT_A_TOOL if tool else ()))
    read = {key: message[key] for key in kept if message.get(key)}
    content = _text_of_parts(message.get("content"), where)
    if content is not None or not read.keys() & {"tool_calls", "function_call"}:
        if not isinstance(content, str) or not content.strip() or not message["role"].strip():
            raise wrong
        read["content"] = content
    try:
        json.dumps(read)
    except (TypeError, ValueError, RecursionError):
        raise wrong from None
    return {"role": message["role"], **read}


def _text_of_parts(content: Any, where: str) -> Any:
    """The texts of a content in parts, one behind the other."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ProxyError(f"{where}: a message has a part that is no text ({kind}).")
        texts.append(part["text"])
    return "".join(texts)


def _read_tools(tools: Any, where: str) -> list[Any]:
    """The tools that the model may call, which some data sets hold as JSON in a text."""
    try:
        tools = json.loads(tools) if isinstance(tools, str) else list(tools)
        json.dumps(tools)
    except (TypeError, ValueError, RecursionError):
        tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ProxyError(f"{where}: 'tools' must be a list of objects, or that as JSON.")
    return tools

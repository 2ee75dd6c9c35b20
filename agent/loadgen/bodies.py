"""What a request says: the JSON body of each API.

Fields that were given (`parameters`, and those of a class) stand above ours. Ollama has the sampling parameters in
`options`: what is no field of its requests goes there.
"""

from __future__ import annotations

import base64
import random
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from agent.loadgen.style import Style

OLLAMA = ("ollama", "ollama-generate")
_OLLAMA_FIELDS = frozenset(
    ("model", "prompt", "messages", "stream", "format", "keep_alive", "think", "tools", "template", "system", "raw",
     "suffix", "images", "context", "truncate", "dimensions"),
)  # fmt: skip


def given_to(style: Style, class_id: int) -> dict[str, Any]:
    """The fields that were given for a class: its own above those of all."""
    own = style.class_parameters[class_id] if class_id < len(style.class_parameters) else {}
    return {**style.parameters, **own}


def question(
    style: Style, class_id: int, messages: Sequence[Mapping[str, Any]], text: str, output_tokens: int
) -> dict[str, Any]:
    """A question that is answered with tokens. text: the same as one prompt."""
    given = given_to(style, class_id)
    if style.api.name in OLLAMA:
        return _ollama(style, messages, text, output_tokens, given)
    body: dict[str, Any] = {"model": style.model}
    body |= {"messages": messages} if style.api.name == "chat" else {"prompt": text}
    body |= {"max_tokens": output_tokens, "temperature": 0, "stream": style.is_streaming}
    if style.is_streaming:
        body["stream_options"] = {"include_usage": True}
        if style.wants_chunk_usage:
            body["stream_options"]["continuous_usage_stats"] = True
    if style.is_exact:
        body |= {"min_tokens": output_tokens, "ignore_eos": True}
    return body | given


def _ollama(
    style: Style, messages: Sequence[Mapping[str, Any]], text: str, output_tokens: int, given: dict[str, Any]
) -> dict[str, Any]:
    options: dict[str, Any] = {"num_predict": output_tokens, "temperature": 0}
    options |= {name: value for name, value in given.items() if name not in _OLLAMA_FIELDS and name != "options"}
    if isinstance(given.get("options"), dict):
        options |= given["options"]
    body: dict[str, Any] = {"model": style.model, "stream": style.is_streaming, "options": options}
    if style.api.name == "ollama":
        body["messages"] = messages
    else:
        body["prompt"] = text
        if images := [image for message in messages for image in message.get("images", ())]:
            body["images"] = images
    return body | {name: value for name, value in given.items() if name in _OLLAMA_FIELDS}


def embeddings(style: Style, class_id: int, texts: Sequence[str]) -> dict[str, Any]:
    """Texts to be turned into vectors."""
    given = given_to(style, class_id)
    if style.api.name != "ollama-embed":
        return {"model": style.model, "input": texts, **given}
    options = {name: value for name, value in given.items() if name not in _OLLAMA_FIELDS and name != "options"}
    options |= given.get("options") or {}
    body = {"model": style.model, "input": texts, **{k: v for k, v in given.items() if k in _OLLAMA_FIELDS}}
    return body | ({"options": options} if options else {})


def picture_message(style: Style, text: str, images: Sequence[bytes]) -> dict[str, Any]:
    """What a user says with images."""
    coded = [base64.b64encode(image).decode() for image in images]
    if style.api.name in OLLAMA:
        return {"role": "user", "content": text, "images": coded}
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    parts += ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}} for data in coded)
    return {"role": "user", "content": parts}


def png(width: int, height: int, rng: random.Random) -> bytes:
    """An image that is not any other: stripes of random colours."""
    rows = []
    for at in range(height):
        if at % 16 == 0:
            stripe = b"\0" + rng.randbytes(3) * width
        rows.append(stripe)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows), 1)), (b"IEND", b""))
    framed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)

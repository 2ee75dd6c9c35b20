"""Events of one stream that differ in their text alone, taken without reading their JSON again.

Nearly every event of an answer is the one before with another piece of text in the same place. Once one has been read,
`learn` finds that place and proves it: the event is read with other text there, and must then mean that text and else
the same. What lies before and behind the place is then kept as bytes; a read that begins and ends with them, and has
only plain ASCII between (no quote, no backslash, no control character, so the JSON string cannot end early), means its
text by the same grammar. Everything else goes the long way.
"""

from __future__ import annotations

from agent.loadgen.apis import NOTHING, Answer, Reader

MAX_SIZES = 32  # sizes of reads that are kept of one stream: texts of as many lengths
MAX_PAYLOAD = 1_024  # longer events go the long way: a stream's likeness takes at most both together
PLAIN = bytes(code for code in range(0x20, 0x7F) if code not in b'"\\')
_OTHER = b"herder 0f1e2d3c"
_NEVER = b"\n"  # no chunk begins with it


class Likeness:
    """What all alike events of a stream have, as whole chunks: of a read of each size what comes before the text."""

    __slots__ = ("_before", "_heads", "_tail", "_tail_size", "kind")

    def __init__(self, before: bytes, behind: bytes, kind: int) -> None:
        self.kind = kind
        self._before = b"data: " + before
        self._tail = behind + b"\n\n\r\n"
        self._tail_size = len(self._tail)
        self._heads: dict[int, bytes] = {}

    def text_of(self, data: bytes) -> bytes | None:
        """The text of a read that is just one more chunk with one more such event; None for everything else."""
        head = self._heads.get(len(data)) or self._head_of(len(data))
        if data.startswith(head) and data.endswith(self._tail):
            text = data[len(head) : -self._tail_size]
            if text and not text.translate(None, PLAIN):
                return text
        return None

    def _head_of(self, size: int) -> bytes:
        """The chunk's size line and what comes before the text, in a read of so many bytes."""
        head = _NEVER
        for digits in range(1, 6):
            line = b"%x\r\n" % max(size - digits - 4, 0)
            if len(line) == digits + 2 and size > len(line) + len(self._before) + self._tail_size:
                head = line + self._before
        if len(self._heads) < MAX_SIZES:
            self._heads[size] = head
        return head


def learn(payload: bytes, read_event: Reader) -> Likeness | None:
    """What the events that are like this one have in common.

    None where that cannot be proven, where usage is in it, and of a long event.
    """
    seen = _meaning(payload, read_event) if len(payload) <= MAX_PAYLOAD else None
    if seen is None:
        return None
    kind, text = seen
    written = b'"%b"' % text.encode()
    at = payload.rfind(written) + 1
    if not at or text.encode().translate(None, PLAIN):
        return None
    before, behind = payload[:at], payload[at + len(written) - 2 :]
    if _meaning(before + _OTHER + behind, read_event) != (kind, _OTHER.decode()):
        return None
    return Likeness(before, behind, kind)


def _meaning(payload: bytes, read_event: Reader) -> tuple[int, str] | None:
    """Which output came and its text; None where the event says more than that, or nothing."""
    answer = Answer([])
    kind = read_event(payload, answer)
    if kind == NOTHING or answer.texts is None or len(answer.texts) != 1 or not answer.texts[0]:
        return None
    if answer.error is not None or answer.is_finished or answer.output_tokens >= 0 or answer.input_tokens >= 0:
        return None
    return kind, answer.texts[0]

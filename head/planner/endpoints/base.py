"""What an endpoint is: what is asked, what is answered and by which function, said once for API, CLI and documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from common.errors import HerderError, Internal, InvalidRequest, InvalidValue
from head.planner.calibration.active import Active, using
from head.planner.endpoints.questions import Desk, Question
from herder.decoding import UNREADABLE


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Root of the answers. `calibration` names the cluster's own one that was used; empty: the shipped one alone."""

    calibration: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint of /api/v1/plan and one verb of `herder plan`.

    path: below /api/v1/plan, empty for the index. verb: the command's name, empty when it has none. answer: a pure
    function of the question and the desk. example: a question that works without a cluster, shown in the documents.
    needs_model: of a question about a model, whether it makes sense without one.
    """

    path: str
    verb: str
    question: type[Question]
    answer_type: type[Answer]
    answer: Callable[[Any, Desk], Answer]
    summary: str
    method: Literal["GET", "POST"] = "POST"
    example: tuple[tuple[str, Any], ...] = ()
    codes: tuple[str, ...] = ()
    needs_model: bool = True


def ask(endpoint: Endpoint, body: bytes | dict[str, Any], desk: Desk, own: Active | None = None) -> Answer:
    """Decodes a question strictly and answers it, with the cluster's own calibration where there is one.

    Raises: InvalidRequest (no JSON), InvalidValue (a field), NotFound (a name), Conflict (nothing fits).
    """
    try:
        if isinstance(body, bytes):
            question = msgspec.json.decode(body or b"{}", type=endpoint.question)
        else:
            question = msgspec.convert(body, endpoint.question)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".")
        raise InvalidValue(f"{field}: {text}" if field else text, field=field) from None
    except UNREADABLE as error:
        raise InvalidRequest(f"the body is not JSON: {str(error)[:200]}") from None
    try:
        with using(own):
            answer = endpoint.answer(question, desk)
        if own is None:
            return answer
        return msgspec.structs.replace(answer, calibration=f"{own.name}{' (' + own.note + ')' if own.note else ''}")
    except HerderError:
        raise
    except (ArithmeticError, LookupError, ValueError, RecursionError) as error:
        raise Internal(f"plan {endpoint.path or 'index'}: {type(error).__name__}: {str(error)[:200]}") from error

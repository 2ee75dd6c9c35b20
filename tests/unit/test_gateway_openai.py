"""OpenAI's form: what is read of a request, the exchange of one name, usage, and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import HerderError, InvalidRequest, ModelNotFound, NoReplicaReady, TooMany, Unauthenticated
from head.gateway import openai

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


class TestRequest:
    def test_model_and_stream_are_read(self) -> None:
        """Everything else is passed over, null included."""
        assert openai.read_wanted(b'{"model":"a/b","stream":true,"messages":[1]}') == openai.Wanted("a/b", True)
        assert openai.read_wanted(b'{"stream":null,"model":"a"}') == openai.Wanted("a", None)

    @pytest.mark.parametrize(
        "body", [b"", b"[]", b"{}", b'{"model":null}', b'{"model":"a"} x', b'{"model":"a","stream":1}']
    )
    def test_other_bodies_are_refused(self, body: bytes) -> None:
        """What names no model is the client's mistake."""
        with pytest.raises(InvalidRequest):
            openai.read_wanted(body)

    @given(st.dictionaries(st.text(max_size=10), JSON, max_size=6), st.text(max_size=30))
    def test_only_the_model_is_exchanged(self, members: dict[str, Any], name: str) -> None:
        """All other members keep their values, whatever they are called and hold."""
        body = json.dumps({**members, "model": "old"}).encode()
        assert json.loads(openai.with_model(body, name)) == {**members, "model": name}

    def test_numbers_keep_their_spelling(self) -> None:
        """A value is not re-encoded on the way."""
        assert openai.with_model(b'{"a": 1.50e1, "model":"x"}', "y") == b'{"a":1.50e1,"model":"y"}'


class TestUsage:
    def test_last_account_counts(self) -> None:
        """An engine that reports usage with each event is counted once."""
        tail = (
            b'{"usage":{"prompt_tokens": 3,"completion_tokens":1}}{"usage":{"prompt_tokens":3,"completion_tokens":9}}'
        )
        assert openai.read_usage(tail) == (3, 9)

    def test_text_of_the_model_does_not_count(self) -> None:
        """A model that writes usage into its answer cannot change the account."""
        said = json.dumps({"content": '{"usage":{"prompt_tokens":99,"completion_tokens":99}}'}).encode()
        assert openai.read_usage(said) == (0, 0)

    def test_details_are_not_mistaken(self) -> None:
        """Members of similar names are others."""
        tail = b'"prompt_tokens_details":{"cached_tokens":4},"prompt_tokens":5,"completion_tokens_details":null'
        assert openai.read_usage(tail) == (5, 0)


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "status", "kind"),
        [
            (InvalidRequest("x"), 400, "invalid_request_error"),
            (Unauthenticated("x"), 401, "authentication_error"),
            (ModelNotFound("x"), 404, "not_found_error"),
            (TooMany("x"), 429, "rate_limit_error"),
            (NoReplicaReady("x"), 503, "server_error"),
        ],
    )
    def test_form(self, error: HerderError, status: int, kind: str) -> None:
        """Status, type and code of each kind of refusal."""
        response = openai.error_response(error)
        said = json.loads(openai.error_body(error))["error"]
        assert response.status == status
        assert said == {"message": "x", "type": kind, "code": error.code, "param": None}

    def test_hint_is_part_of_the_message(self) -> None:
        """What a person can do is said where clients show it."""
        said = json.loads(openai.error_body(ModelNotFound("no such", hint="look there", param="model")))["error"]
        assert said["message"] == "no such; look there"
        assert said["param"] == "model"

    def test_event_is_one_line(self) -> None:
        """An error in a stream is one well-formed event."""
        event = openai.error_event(InvalidRequest("two\nlines"))
        assert event.startswith(b"data: {")
        assert event.endswith(b"}\n\n")
        assert event.count(b"\n") == 2

    @pytest.mark.parametrize("body", [b"", b"<html>", b'"text"', b"[]", b'{"error":7}', b'{"detail":[{"loc":1}]}'])
    def test_any_refusal_is_put_in_form(self, body: bytes) -> None:
        """Whatever an engine answers, the client gets an error that it can read."""
        said = json.loads(openai.engine_error(422, body, secret=""))["error"]
        assert said["code"] == "engine_refused"
        assert said["message"] == "the engine answered 422"

    def test_what_the_engine_says_is_kept(self) -> None:
        """The texts of vLLM, FastAPI and plain servers are found."""
        for body in (b'{"message":"why"}', b'{"detail":"why"}', b'{"error":"why"}'):
            assert json.loads(openai.engine_error(400, body, secret=""))["error"]["message"].endswith("400: why")

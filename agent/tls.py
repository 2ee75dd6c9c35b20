"""TLS towards the head: how it is checked, and in plain words why it failed and what to do about it."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import msgspec

from common.errors import InvalidConfig

ASK_S = 2.0
_NOT_THE_HEADS = {
    9: "is not valid yet: check the clocks of head and node",
    10: "has expired: renew tls.cert of the head",
    18: "is self-signed and not in tls.ca: set tls.ca to it, or to the CA that signed it",
    19: "is signed by a CA that is not in tls.ca: set tls.ca to the CA that signed the head's",
    20: "is signed by a CA that is not in tls.ca: set tls.ca to the CA that signed the head's",
    62: "is for another name than the one in head_url: dial a name that it is for",
    64: "is for another address than the one in head_url: dial a name or address that it is for",
}  # X509_V_ERR_* of openssl/x509_vfy.h
_ALERTS = {
    "CERTIFICATE_REQUIRED": "the head asks for a client certificate: set tls.cert and tls.key",
    "CERTIFICATE_EXPIRED": "the head says that our client certificate has expired: renew tls.cert",
    "UNKNOWN_CA": "the head does not know the CA of our client certificate (its tls.client_ca)",
    "BAD_CERTIFICATE": "the head does not accept our client certificate (its tls.client_ca)",
    "CERTIFICATE_UNKNOWN": "the head does not accept our client certificate (its tls.client_ca)",
    "HANDSHAKE_FAILURE": "the head and this agent have no common way of TLS, or it asks for a client certificate",
    "WRONG_VERSION_NUMBER": "the head does not speak TLS on this port: use http in head_url, or set its tls.cert",
    "RECORD_LAYER_FAILURE": "the head does not speak TLS on this port: use http in head_url, or set its tls.cert",
}


class TlsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For an https head: `ca` is trusted instead of the system's, `cert` and `key` are shown to the head."""

    ca: str = ""
    cert: str = ""
    key: str = ""


def client_context(tls: TlsConfig) -> ssl.SSLContext:
    """How an https head is checked. Raises: InvalidConfig."""
    if bool(tls.cert) != bool(tls.key):
        raise InvalidConfig("tls.cert and tls.key belong together")
    for name in ("ca", "cert", "key"):
        path = getattr(tls, name)
        try:
            if path:
                Path(path).read_bytes()
        except OSError as error:
            raise InvalidConfig(f"tls.{name}: {path}: {error.strerror}") from None
    if tls.key and Path(tls.key).stat().st_mode & 0o077:
        raise InvalidConfig(f"tls.key: {tls.key} is readable by others", hint=f"chmod 600 {tls.key}")
    try:
        context = ssl.create_default_context(cafile=tls.ca or None)
    except (OSError, ssl.SSLError):
        raise InvalidConfig(f"tls.ca: {tls.ca} holds no PEM certificate") from None
    try:
        if tls.cert:
            context.load_cert_chain(tls.cert, tls.key, password=_no_password)
    except (OSError, ValueError) as error:
        raise InvalidConfig(
            f"tls.cert and tls.key: {getattr(error, 'reason', '') or error}",
            hint="PEM files that belong to each other, the key without a password",
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _no_password() -> str:
    raise ValueError("the key has a password")


def ask_why(url: str, tls: TlsConfig) -> str:
    """Why an https head hung up without a word; "" when that is not about certificates. Blocks for seconds at most.

    In TLS 1.3 a server looks at the client's certificate after the client's own handshake is done. One that does not
    like it sends an alert, which our event loop throws away with the connection, or (as heads do) just hangs up.

    Raises: InvalidConfig.
    """
    context = client_context(tls)
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        with (
            socket.create_connection((host, parts.port or 443), timeout=ASK_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as wrapped,
        ):
            has_hung_up = not wrapped.recv(1)
    except ConnectionError:
        has_hung_up = True
    except OSError as error:  # ssl.SSLError is one, TimeoutError too
        return explain(error) if isinstance(error, ssl.SSLError) else ""
    return _what_it_dislikes(tls) if has_hung_up else ""


def _what_it_dislikes(tls: TlsConfig) -> str:
    if not tls.cert:
        return _ALERTS["CERTIFICATE_REQUIRED"]
    until = _valid_until(tls.cert)
    if until and ssl.cert_time_to_seconds(until) < time.time():
        return f"the head does not accept our client certificate, which has expired ({until}): renew tls.cert"
    return f"{_ALERTS['BAD_CERTIFICATE']}: is it of that CA, and still valid?"


def _valid_until(path: str) -> str:
    """notAfter of a certificate, "" where this Python cannot tell (it has no public way to read a file's)."""
    decode = getattr(getattr(ssl, "_ssl", None), "_test_decode_cert", None)
    try:
        return str(decode(path).get("notAfter", "")) if decode is not None else ""
    except (OSError, ValueError):
        return ""


def explain(error: BaseException) -> str:
    """What is wrong with the certificates and what to do, in one line; "" when it is something else."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        error = error.certificate_error
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError) and not isinstance(cause, aiohttp.ClientError):
            said = _NOT_THE_HEADS.get(cause.verify_code, f"is not accepted: {cause.verify_message}")
            return f"the head's certificate {said}"
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, aiohttp.ClientError):
            reason = str(getattr(cause, "reason", "") or cause)
            return next((words for word, words in _ALERTS.items() if word in reason), f"TLS failed: {reason}")
        cause = getattr(cause, "os_error", None) or cause.__cause__ or cause.__context__
    return ""

"""Certificates for tests, made with openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Authority:
    """A CA made with openssl."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.certificate = folder / f"{name}.crt"
        self._key = folder / f"{name}.key"
        openssl(
            "req", "-x509", *EC, "-keyout", self._key, "-out", self.certificate, "-days", "2", "-subj", f"/CN={name}"
        )

    def sign(self, name: str, *, address: str = "127.0.0.1", days: int = 2) -> tuple[Path, Path]:
        """A certificate and its key."""
        key, request, certificate = (self.folder / f"{name}.{end}" for end in ("key", "csr", "crt"))
        extension = self.folder / f"{name}.ext"
        extension.write_text(f"subjectAltName=IP:{address}\n")
        openssl("req", *EC, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        signing = ("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial", "-days", str(days))
        openssl("x509", "-req", "-in", request, *signing, "-extfile", extension, "-out", certificate)
        key.chmod(0o600)
        return certificate, key


def openssl(*arguments: object) -> None:
    """Runs it."""
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)

"""hf://ORG/NAME[@REVISION] sources: huggingface_hub lists, our own fetcher downloads.

The hub's own downloader is not used: it has no chunk verification, depends on file locks and keeps a second cache.
Query parameters choose files: `?allow=*.gguf&ignore=*-q2*` (each may stand several times). Without `allow`, weights
that stand there twice are taken once: with safetensors present, .bin/.pt/.h5 and the like are left out.
"""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from agent.mover.config import MoverConfig
from agent.mover.http_client import HttpConnection
from agent.mover.sources import Listing, RemoteFile, checked
from common.config import read_secret
from common.errors import ExtraMissing, HerderError, InvalidSource, SourceFailed, SourceNotFound, SourceRefused

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_DUPLICATES = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".onnx", ".onnx_data", ".tflite", ".ot")


class HubOrigin:
    """One repository at a revision."""

    is_peer = False

    def __init__(self, url: str, config: MoverConfig) -> None:
        repo, _, revision = urlsplit(url).netloc.partition("@")
        path = urlsplit(url).path.lstrip("/")
        if path:
            name, _, revision = path.partition("@")
            repo = f"{repo}/{name}"
        if not _REPO.fullmatch(repo) or ".." in repo or (revision and not _REVISION.fullmatch(revision)):
            raise InvalidSource(f"{url[:80]!r}: not hf://ORG/NAME or hf://ORG/NAME@REVISION")
        query = parse_qs(urlsplit(url).query)
        self._allow, self._ignore = query.get("allow", []), query.get("ignore", [])
        self._repo, self._revision, self._config = repo, revision, config
        self._endpoint = (config.hf_endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self._token = _token(config)
        self.name = f"hf://{repo}" + (f"@{revision}" if revision else "")
        self.connections = config.connections_per_source

    def connect(self) -> HttpConnection:
        """A keep-alive connection; the token goes to the endpoint and not to where it redirects."""
        return HttpConnection(
            connect_timeout_s=self._config.connect_timeout_s,
            read_timeout_s=self._config.read_timeout_s,
            allow_link_local=self._config.allow_link_local,
            token=self._token,
            token_host=urlsplit(self._endpoint).netloc,
        )

    def leaves(self, blob: str, size: int, chunk_bytes: int) -> bytes:
        """The hub has none."""
        raise SourceNotFound(f"{self.name} knows no chunk lists")

    def listing(self) -> Listing:
        """The repository's files with sizes and, for large ones, sha256."""
        info = self._info()
        commit = info.sha or self._revision or "main"
        files = []
        for sibling in info.siblings or []:
            sha256 = sibling.lfs.sha256 if sibling.lfs is not None else ""
            size = -1 if sibling.size is None else int(sibling.size)
            path = str(sibling.rfilename)
            url = f"{self._endpoint}/{self._repo}/resolve/{quote(commit, safe='')}/{quote(path)}"
            files.append(RemoteFile(path, size, url, sha256, validator=f"commit:{commit}"))
        return Listing(checked(self._chosen(files)))

    def refresh(self, file: RemoteFile) -> RemoteFile:
        """The commit is fixed, so a file that changes is a broken mirror."""
        raise SourceFailed(f"{self.name}: {file.path} is not what the hub listed")

    def _info(self) -> Any:
        try:
            from huggingface_hub import HfApi
            from huggingface_hub.errors import (
                GatedRepoError,
                HfHubHTTPError,
                RepositoryNotFoundError,
                RevisionNotFoundError,
            )
        except ImportError:
            raise ExtraMissing("hf:// sources need huggingface_hub", hint="pip install 'herder[hf]'") from None
        api = HfApi(endpoint=self._endpoint, token=self._token or False)
        timeout_s = self._config.connect_timeout_s
        try:
            return api.model_info(self._repo, revision=self._revision or None, files_metadata=True, timeout=timeout_s)
        except GatedRepoError:
            raise SourceRefused(f"{self.name} is gated", hint="accept its terms and give a token (HF_TOKEN)") from None
        except RepositoryNotFoundError:
            hint = "check the name; a private repository needs a token (HF_TOKEN)"
            raise SourceNotFound(f"{self.name}: no such repository at {self._endpoint}", hint=hint) from None
        except RevisionNotFoundError:
            raise SourceNotFound(f"{self.name}: no such revision") from None
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            kind = SourceRefused if status in (401, 403) else SourceFailed
            raise kind(f"{self.name}: the hub answers {status}") from None
        except HerderError:
            raise
        except Exception as error:  # noqa: BLE001 - the hub's client raises its HTTP library's own tree, which changes
            raise SourceFailed(f"{self.name}: {type(error).__name__}: {str(error)[:200]}") from None

    def _chosen(self, files: list[RemoteFile]) -> list[RemoteFile]:
        has_safetensors = any(file.path.endswith(".safetensors") for file in files)
        chosen = []
        for file in files:
            if any(part.startswith(".") for part in file.path.split("/")):
                continue
            if self._allow and not any(fnmatchcase(file.path, pattern) for pattern in self._allow):
                continue
            if any(fnmatchcase(file.path, pattern) for pattern in self._ignore):
                continue
            if not self._allow and has_safetensors and file.path.lower().endswith(_DUPLICATES):
                continue
            chosen.append(file)
        if not chosen:
            raise SourceNotFound(f"{self.name}: no file there is wanted", hint="check the allow and ignore patterns")
        return chosen


def _token(config: MoverConfig) -> str:
    if config.hf_token_file:
        return read_secret(Path(config.hf_token_file))
    if os.environ.get("HF_TOKEN"):
        return os.environ["HF_TOKEN"].strip()
    path = os.environ.get("HF_TOKEN_PATH")
    return read_secret(Path(path)) if path else ""

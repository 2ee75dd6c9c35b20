"""Any program that listens on a port, given as an argv. No shell: a word stays a word whatever is filled into it."""

from __future__ import annotations

import os
import shutil

from agent.runtimes.base import Launch, Setting, fill, gguf_file, gpu_env, scrubbed
from common.errors import EngineMissing, Forbidden, InvalidValue


class Command:
    """The adapter. `is_allowed`: whether this node's operator lets the head start any program."""

    name = "command"

    def __init__(self, *, is_allowed: bool = True) -> None:
        self._is_allowed = is_allowed

    def find(self) -> str:
        """See Runtime.find."""
        if not self._is_allowed:
            raise EngineMissing("this node starts no free commands", hint="engines.command: true in its configuration")
        return "any"

    def launch(self, setting: Setting) -> Launch:
        """See Runtime.launch."""
        if not self._is_allowed:
            raise Forbidden("this node starts no free commands", hint="engines.command: true in its configuration")
        order = setting.order
        if not order.argv:
            raise InvalidValue(f"{order.replica} has no command")
        model_path = setting.directory
        if setting.manifest is not None and setting.manifest.format == "gguf":
            model_path = gguf_file(setting)
        env = {**gpu_env(order), **{k: fill(v, setting, model_path=model_path) for k, v in order.env.items()}}
        argv = [fill(word, setting, model_path=model_path) for word in order.argv]
        found = shutil.which(argv[0], path=env.get("PATH") or scrubbed(os.environ)["PATH"])
        if found is None:
            raise EngineMissing(f"{argv[0][:200]} was not found on this node")
        return Launch((os.path.abspath(found), *argv[1:]), env)

    def steps_path(self) -> tuple[str, str]:
        """See Runtime.steps_path."""
        return "", ""

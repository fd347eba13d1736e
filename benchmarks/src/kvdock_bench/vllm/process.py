"""The worker as its asker sees it: started, asked, and told of when it dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import IO, Any

from kvdock_bench.errors import BenchError

PROGRAM = Path(__file__).with_name("worker.py")
_GRACE_S = 20
_CAUSE = re.compile(r"\b(\w*(?:Error|Exception): .+|Killed.*|Out of memory.*)")


class Worker:
    """One process of another interpreter, with its prints in a log file.

    Args:
        python: the interpreter of vLLM's environment.
        log: where the process's stderr goes, and every line on stdout that is no message.
    """

    def __init__(
        self,
        python: Path,
        log: Path,
        *,
        program: Path = PROGRAM,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._log = log
        self._asked = 0
        with log.open("ab") as prints:
            try:
                self._process = subprocess.Popen(
                    [str(python), "-u", str(program)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=prints,
                    env={**os.environ, **(environment or {})},
                    # Ctrl-C is ours to handle; and one signal ends its children with it
                    start_new_session=True,
                )
            except OSError as error:
                raise BenchError(f"Cannot run {python} ({error.strerror or error}).") from error

    def start(self, **settings: Any) -> dict[str, Any]:
        """Start the engine and return what it says of itself."""
        reply = self._exchange({"op": "start", **settings}, "ready")
        if reply["event"] == "error":
            self.close()
            raise BenchError(f"vLLM does not start: {self._cause(reply['message'])}\n{self._see()}")
        return reply

    def generate(self, **ask: Any) -> tuple[list[dict[str, Any]], float]:
        """Return one row for each prompt, and seconds; an engine's error is a RuntimeError."""
        self._asked += 1
        reply = self._exchange({"op": "generate", "id": self._asked, **ask}, "answers")
        if reply.get("id") != self._asked:
            raise BenchError(f"vLLM answered question {reply.get('id')}, not {self._asked}.")
        if reply["event"] == "error":
            sign = "out of memory: " if reply.get("oom") else ""
            raise RuntimeError(f"{sign}vLLM: {reply['message']}")
        return reply["rows"], reply["seconds"]

    def close(self) -> None:
        """End the process and everything it started."""
        with contextlib.suppress(OSError):
            _pipe(self._process.stdin).close()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # children live on where the process did not end in order
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            _pipe(self._process.stdout).close()

    def _exchange(self, message: dict[str, Any], expected: str) -> dict[str, Any]:
        try:
            pipe = _pipe(self._process.stdin)
            pipe.write(json.dumps(message).encode() + b"\n")
            pipe.flush()
        except (BrokenPipeError, ValueError) as error:
            raise self._dead() from error
        for line in _pipe(self._process.stdout):
            reply = _message(line)
            if reply is not None and reply["event"] in (expected, "error"):
                return reply
            with self._log.open("ab") as prints:
                prints.write(line)
        raise self._dead()

    def _dead(self) -> BenchError:
        self.close()
        code = self._process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        cause = self._cause("")
        return BenchError(
            f"vLLM's process ended ({how}{f': {cause}' if cause else ''}). Finished answers are "
            f"kept; continue with --resume.\n{self._see()}"
        )

    def _see(self) -> str:
        return f"Its output: {self._log}"

    def _cause(self, message: str) -> str:
        """Return the first error in the log, which the later ones follow from."""
        if "See root cause above" not in message and message:
            return message
        with contextlib.suppress(OSError):
            for line in self._log.read_text("utf-8", "replace").splitlines():
                if found := _CAUSE.search(line):
                    return found[1][:1000]
        return message


def _message(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and "event" in content else None


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe

"""Tools that an agent may call: commands and Python functions named in a JSON file, or any callable.

    {"tools": {"calculator": {"command": ["python3", "calculator.py", "{question}"], "timeout": 5},
               "catalogue": {"entry_point": "catalogue:look_up", "max_output": 10000}}}

No shell is involved. What runs is killed, with what it started, at its time limit or when it says too much.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mamba3_jepa.config import LONGEST_TOOL_NAME
from mamba3_jepa.contract import MEMORY_TOOL
from mamba3_jepa.errors import UserError
from mamba3_jepa.files.encodings import read_text_file
from mamba3_jepa.files.json_file import from_json, json_line

_LAST_WORDS = 2**16  # bytes of the standard error that are read


class ToolError(Exception):
    """A tool failed; the message says how. The agent goes on without it."""


class Tool(Protocol):
    """Anything that answers a question about an image in words."""

    def __call__(self, question: str | None, image: str | None) -> str:
        """The result; empty if there is none.

        Args:
            question: None where the image is to be described.
            image: its absolute path; None without image, or where it lies in no file.

        Raises:
            ToolError: it failed.
        """
        ...


class ToolRegistry(Mapping[str, Tool]):
    """Tools by name, in their order. "memory" is the agent's own and cannot be named."""

    def __init__(self, tools: Mapping[str, Tool] | None = None) -> None:
        self._tools: dict[str, Tool] = {}
        for name, tool in (tools or {}).items():
            self.add(name, tool)

    def add(self, name: str, tool: Tool) -> None:
        """
        Raises:
            UserError: the name is empty, too long, taken, or "memory".
        """
        if not name.strip() or len(name) > LONGEST_TOOL_NAME:
            raise UserError(f"tool {name!r}: a name has 1 to {LONGEST_TOOL_NAME} characters")
        if name == MEMORY_TOOL:
            raise UserError(f'tool "{name}": that is the memory, which is built in (`memory`); choose another name')
        if name in self._tools:
            raise UserError(f'tool "{name}": there is one of that name already')
        self._tools[name] = tool

    def __getitem__(self, name: str) -> Tool:
        return self._tools[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tools)

    def __len__(self) -> int:
        return len(self._tools)


def _without_zero(argument: str) -> str:
    if "\0" in argument:
        raise ValueError("a program can be given no zero character")
    return argument


class _Entry(BaseModel):
    """A tool as the file names it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    command: Annotated[list[Annotated[str, AfterValidator(_without_zero)]], Field(min_length=1)] | None = None
    entry_point: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 10.0
    max_output: Annotated[int, Field(gt=0, le=2**30)] = 65_536


_WRONG = {
    "model_type": "expected an object",
    "dict_type": "expected an object",
    "list_type": "expected a list of texts",
    "string_type": "expected a text",
    "missing": "missing",
    "extra_forbidden": "not known here",
    "string_pattern_mismatch": "expected module:function",
    "too_short": "expected a program, and its arguments",
}


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tools: dict[str, _Entry]


@dataclass(frozen=True, kw_only=True)
class CommandTool:
    """A program with arguments, in which `{question}` and `{image}` stand for what is asked (empty without); what it
    writes to its standard output is the result.

    folder: where it runs. timeout: seconds. max_output: bytes.
    """

    command: tuple[str, ...]
    folder: Path
    timeout: float
    max_output: int

    def __call__(self, question: str | None, image: str | None) -> str:
        arguments = [_filled(argument, question, image) for argument in self.command]
        if any("\0" in argument for argument in arguments):
            raise ToolError("the question holds a zero character, which no program can be given")
        return _run(arguments, b"", self.folder, self.timeout, self.max_output)


@dataclass(frozen=True, kw_only=True)
class EntryPointTool:
    """A Python function `module:function`, called as function(question=..., image=...) in a process of its own; what it
    returns, a text or None, is the result. The module is looked for in `folder` first."""

    entry_point: str
    folder: Path
    timeout: float
    max_output: int

    def __call__(self, question: str | None, image: str | None) -> str:
        asked = json_line({"question": question, "image": image})
        command = [sys.executable, "-m", "mamba3_jepa.inference.entry_point", self.entry_point]
        return _run(command, asked, self.folder, self.timeout, self.max_output)


def read_tools(path: str | Path) -> ToolRegistry:
    """The tools that a JSON file names; commands and modules are looked for from its folder.

    Raises:
        UserError: the file cannot be read, or an entry is not one; names the file and the field.
    """
    path = Path(path)
    try:
        read = _File.model_validate(from_json(read_text_file(path), _object))
    except OSError as error:
        raise UserError(f"{path}: cannot read the tools: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        wrong = _WRONG.get(first["type"], first["msg"].removeprefix("Value error, "))
        raise UserError(f"{path}: {field}: {wrong}; see examples/tools/tools.json for an example") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    registry, folder = ToolRegistry(), Path(os.path.realpath(path)).parent
    for name, entry in read.tools.items():
        if (entry.command is None) == (entry.entry_point is None):
            raise UserError(f'{path}: tools.{name}: expected either "command" or "entry_point"')
        try:
            registry.add(name, _tool(entry, folder))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return registry


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name comes twice: of two tools one would be lost unsaid.

    Raises:
        UserError: one does.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f'the name "{twice}" comes twice in one object; rename or remove one of them')
    return values


def _tool(entry: _Entry, folder: Path) -> Tool:
    if entry.command is not None:
        return CommandTool(
            command=tuple(entry.command), folder=folder, timeout=entry.timeout, max_output=entry.max_output
        )
    assert entry.entry_point is not None
    return EntryPointTool(
        entry_point=entry.entry_point, folder=folder, timeout=entry.timeout, max_output=entry.max_output
    )


def _filled(argument: str, question: str | None, image: str | None) -> str:
    # what is filled in is not looked at again
    parts = (part.replace("{image}", image or "") for part in argument.split("{question}"))
    return (question or "").join(parts)


def _run(command: list[str], given: bytes, folder: Path, timeout: float, max_output: int) -> str:
    """What a program says on its standard output, stripped.

    Raises:
        ToolError: it cannot be started, fails, takes too long, says too much, or something that is not UTF-8.
    """
    try:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ToolError(f"cannot start {command[0]}: {getattr(error, 'strerror', None) or error}") from error
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        said, complained = _Reader(process.stdout, max_output, process), _Reader(process.stderr, _LAST_WORDS, None)
        with contextlib.suppress(OSError):  # it need not listen
            process.stdin.write(given)
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ToolError(f"it was stopped after {timeout:g} seconds") from None
    finally:
        _kill(process)
    output, complaint = said.content(), complained.content()
    if said.is_over:
        raise ToolError(f"its output is longer than {max_output} bytes")
    if process.returncode != 0:
        last = complaint.decode(errors="replace").strip().splitlines()[-1:]
        raise ToolError(f"it ended with {process.returncode}" + "".join(f": {line}" for line in last))
    try:
        return output.decode().strip()
    except UnicodeDecodeError as problem:
        raise ToolError(f"its output is not UTF-8: {problem.reason} at byte {problem.start}") from problem


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The program and everything it started."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class _Reader(threading.Thread):
    """Reads a pipe to its end, at most `limit` bytes; where `process` is given, more than that ends it."""

    def __init__(self, pipe: object, limit: int, process: subprocess.Popen[bytes] | None) -> None:
        super().__init__(daemon=True)
        self._pipe, self._limit, self._process = pipe, limit, process
        self._content = b""
        self.is_over = False
        self.start()

    def run(self) -> None:
        while piece := os.read(self._pipe.fileno(), 65_536):  # type: ignore[attr-defined]
            self._content = (self._content + piece)[: self._limit + 1]
            if len(self._content) > self._limit and self._process is not None:
                self.is_over = True
                with contextlib.suppress(OSError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def content(self) -> bytes:
        self.join(1.0)  # what escaped its process group may hold the pipe open
        return self._content[: self._limit]

"""Tools of an agent: commands and functions with limits, read from a file."""

import json
import re
import time
from pathlib import Path

import pytest

from mamba3_jepa.errors import UserError
from mamba3_jepa.inference.tools import CommandTool, EntryPointTool, ToolError, ToolRegistry, read_tools

EXAMPLES = Path(__file__).parents[2] / "examples" / "tools"


def command(folder: Path, script: str, *arguments: str, timeout: float = 20.0, max_output: int = 1000) -> CommandTool:
    return CommandTool(command=("sh", "-c", script, *arguments), folder=folder, timeout=timeout, max_output=max_output)


def entry_point(folder: Path, code: str, timeout: float = 20.0) -> EntryPointTool:
    (folder / "catalogue.py").write_text(code)
    return EntryPointTool(entry_point="catalogue:look_up", folder=folder, timeout=timeout, max_output=100)


def test_a_command_is_given_question_and_image_and_no_shell(tmp_path: Path) -> None:
    tool = command(tmp_path, 'pwd; printf "%s|" "$@"', "zero", "{question}", "at {image}!", "{questio}")
    folder, said = tool("a $HOME; `id` {image}?", "/a b.png").split("\n")
    assert Path(folder).resolve() == tmp_path.resolve()
    assert said == "a $HOME; `id` {image}?|at /a b.png!|{questio}|"
    assert tool(None, None).endswith("\n|at !|{questio}|")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo no such thing >&2; exit 3", "it ended with 3: no such thing"),
        ("exit 1", "it ended with 1$"),
        ("printf '\\377'", "not UTF-8: invalid start byte at byte 0"),
        ("head -c 1001 /dev/zero | tr '\\0' a", "longer than 1000 bytes"),
        ("yes", "longer than 1000 bytes"),
        ("sleep 60", "stopped after 0.5 seconds"),
        ("sleep 60 & sleep 60", "stopped after 0.5 seconds"),
    ],
)
def test_a_command_that_fails_says_how_and_nothing_waits_for_it(tmp_path: Path, script: str, message: str) -> None:
    limit = 0.5 if "sleep" in script else 20.0
    start = time.monotonic()
    with pytest.raises(ToolError, match=message):
        command(tmp_path, script, timeout=limit)("?", None)
    assert time.monotonic() - start < 15


def test_what_says_nothing_has_no_result_and_the_limit_itself_is_not_over_it(tmp_path: Path) -> None:
    assert command(tmp_path, "echo")("?", None) == ""
    assert command(tmp_path, "head -c 1000 /dev/zero | tr '\\0' a")("?", None) == "a" * 1000
    with pytest.raises(ToolError, match="cannot start no-such-program"):
        CommandTool(command=("no-such-program",), folder=tmp_path, timeout=1, max_output=9)("?", None)
    with pytest.raises(ToolError, match="zero character"):
        command(tmp_path, "echo", "{question}")("a\0b", None)


def test_a_function_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    code = "def look_up(question, image):\n    print('aside')\n    return f'{question} in {image}'\n"
    assert entry_point(tmp_path, code)('"ü"', "/a.png") == '"ü" in /a.png'
    assert entry_point(tmp_path, "def look_up(question, image):\n    return None\n")("?", None) == ""
    for code, message in (
        ("def look_up(question, image):\n    return 3\n", "returned int, expected a text or None"),
        ("def look_up(question, image):\n    raise KeyError('zebra')\n", "KeyError: 'zebra'"),
        ("", "no attribute 'look_up'"),
        ("def look_up(question, image):\n    raise ValueError('no\\nzebra')\n", "ended with 1: ValueError: no zebra$"),
        ("async def look_up(question, image):\n    return 'x'\n", "returned coroutine, expected a text or None$"),
    ):
        with pytest.raises(ToolError, match=message):
            entry_point(tmp_path, code)("?", None)
    with pytest.raises(ToolError, match=r"stopped after 0\.3 seconds"):
        entry_point(tmp_path, "def look_up(question, image):\n    while True: pass\n", timeout=0.3)("?", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "tools.json: not JSON"),
        ("[]", "tools.json: the file: expected an object"),
        ("{}", "tools.json: tools: missing"),
        ('{"tools": {"a": {}}}', 'tools.a: expected either "command" or "entry_point"'),
        ('{"tools": {"a": {"command": ["x"], "entry_point": "m:f"}}}', 'tools.a: expected either "command"'),
        ('{"tools": {"a": {"command": []}}}', "tools.a.command: "),
        ('{"tools": {"a": {"command": "x y"}}}', "tools.a.command: expected a list of texts"),
        ('{"tools": {"a": {"command": ["x", 3]}}}', "tools.a.command.1: expected a text"),
        (
            '{"tools": {"a": {"command": ["x", "a\\u0000b"]}}}',
            "tools.a.command.1: a program can be given no zero character",
        ),
        ('{"tools": {"a": {"entry_point": "m.f"}}}', "tools.a.entry_point: "),
        ('{"tools": {"a": {"command": ["x"], "timeout": 0}}}', "tools.a.timeout: "),
        ('{"tools": {"a": {"command": ["x"], "max_output": -1}}}', "tools.a.max_output: "),
        ('{"tools": {"a": {"command": ["x"], "shell": true}}}', "tools.a.shell: "),
        ('{"tools": {"memory": {"command": ["x"]}}}', 'tool "memory": that is the memory, which is built in'),
        ('{"tools": {"": {"command": ["x"]}}}', "a name has 1 to 64 characters"),
        ('{"tools": {"a": {"command": ["x"]}, "a": {"command": ["y"]}}}', 'json: the name "a" comes twice'),
        ('{"tools": {"a": {"command": ["x"], "command": ["y"]}}}', 'json: the name "command" comes twice'),
        ('{"tools": {"a": {"command": ["\\ud800"]}}}', "not JSON: .*surrogates not allowed"),
    ],
)
def test_a_bad_file_of_tools_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tools.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_tools(path)
    assert re.search(message, str(error.value))
    assert str(path) in str(error.value)


def test_a_missing_file_of_tools_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: cannot read the tools"):
        read_tools(tmp_path / "nowhere.json")


def test_a_file_of_tools_is_read_in_its_order(tmp_path: Path) -> None:
    entries = {"b": {"command": ["x", "{question}"], "timeout": 2}, "a": {"entry_point": "m:f", "max_output": 7}}
    (tmp_path / "tools.json").write_text(json.dumps({"tools": entries}))
    registry = read_tools(tmp_path / "tools.json")
    assert dict(registry) == {
        "b": CommandTool(command=("x", "{question}"), folder=tmp_path.resolve(), timeout=2.0, max_output=65_536),
        "a": EntryPointTool(entry_point="m:f", folder=tmp_path.resolve(), timeout=10.0, max_output=7),
    }
    assert list(registry) == ["b", "a"]
    with pytest.raises(UserError, match="one of that name already"):
        ToolRegistry(registry).add("a", registry["b"])


@pytest.mark.parametrize(
    ("tool", "question", "said"),
    [
        ("calculator", "How much is 8 - 6?", "two"),
        ("calculator", "three times one is how many", "three"),
        ("calculator", "what color is the star?", ""),
        ("dictionary", "What colour is a banana?", "yellow"),
        ("dictionary", "which shape has a pyramid's side", "triangle"),
        ("dictionary", "what is two plus one?", ""),
    ],
)
def test_the_example_tools_work(tool: str, question: str, said: str) -> None:
    assert read_tools(EXAMPLES / "tools.json")[tool](question, None) == said

"""A shell script that starts a training in, the words of that command out. The script is read, never run.

Known: words in quotes, comments, line continuation, NAME=value, NAME=(arrays), +=, export, $NAME,
${NAME:-default}, ${ARRAY[@]}, $((whole numbers)), `if` with tests of strings and numbers, `eval`. What only a run would
know (arguments of the script, variables from outside, $(commands)) stands in the words as a placeholder: the variable's
name.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from megalm.errors import ConfigError

PLACEHOLDER = "UNKNOWN_"
"""A placeholder begins so where it has no name of its own."""
LONGEST = 1 << 20
"""Characters of one value."""
_INSIDE = r"(?:[^()]|\((?:[^()]|\([^()]*+\))*+\))*+"  # with brackets in brackets; quantifiers never go back
_QUOTED = rf"""\"(?:\\.|\$\({_INSIDE}\)|[^"\\])*+\"|'[^']*+'|`[^`]*+`"""
_TOKEN = re.compile(
    rf"""(?P<space>(?:[ \t]|\\\n)++)|(?P<comment>\#[^\n]*+)|(?P<end>\n|;;|;|&&|\|\||\||&(?!>))
    |(?P<redirect>[\d&]?>>?&?\d*|<(?!<))
    |(?P<word>(?:\\.|{_QUOTED}|\$\({_INSIDE}\)|\$\{{[^}}]*+\}}|<[^<>\n]*+>|[^\s;&|<>()\#"'`\\]|(?<=\S)\#)++|[()])""",
    re.VERBOSE | re.DOTALL,
)
_PART = re.compile(
    rf"""\\(?P<escaped>.)|"(?P<double>(?:\\.|\$\({_INSIDE}\)|[^"\\])*+)"|'(?P<single>[^']*+)'|`(?P<ticks>[^`]*+)`
    |\$\(\((?P<sum>(?:[^()]|\([^()]*+\))*+)\)\)|\$\((?P<command>{_INSIDE})\)|\$\{{(?P<braced>[^}}]*+)\}}
    |\$(?P<name>[A-Za-z_]\w*|\d|[@*\#?])|(?P<text>.)""",
    re.VERBOSE | re.DOTALL,
)
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_HERE_DOCUMENT = re.compile(r"<<-?\s*(['\"]?)(\w+)\1([^\n]*)\n.*?\n[ \t]*\2(?=\n|$)", re.DOTALL)
_SCRIPT = re.compile(r"(?:^|[/.])(pretrain_\w+)(?:\.py)?$")
_FUNCTION = re.compile(r"(function \w+.*|\w+ \( \))")
_SUMS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}
_TESTS: dict[str, Callable[[int], bool]] = {
    "-eq": lambda sign: sign == 0,
    "-ne": lambda sign: sign != 0,
    "-gt": lambda sign: sign > 0,
    "-ge": lambda sign: sign >= 0,
    "-lt": lambda sign: sign < 0,
    "-le": lambda sign: sign <= 0,
}
_BLOCKS = {"for": "done", "while": "done", "until": "done", "case": "esac"}


@dataclass
class Shell:
    """What has been read of a script so far."""

    variables: dict[str, list[str]] = field(default_factory=dict)
    """Values by name; of an array, its words."""
    commands: list[list[str]] = field(default_factory=list)
    """The words of every command that starts a training script."""
    notes: list[str] = field(default_factory=list)


def training_command(text: str) -> tuple[list[str], list[str]]:
    """(the words of the last command that starts a pretrain script, what could not be read).

    Raises:
        ConfigError: the script starts none.
    """
    shell = Shell()
    text = _HERE_DOCUMENT.sub(r"\3", text.replace("\r\n", "\n"))
    run(list(statements(text)), shell)
    if not shell.commands:
        raise ConfigError(
            "no command that starts a pretrain_*.py script was found; write the flags as one command: pretrain_gpt.py "
            "FLAGS"
        )
    return shell.commands[-1], shell.notes


def statements(text: str) -> Iterator[list[str]]:
    """The words of each simple command, in their quotes; a list of an array is `NAME=(`, its words, `)`."""
    words: list[str] = []
    position, depth, skip = 0, 0, False
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:  # an unclosed quote: take the character as it is
            position += 1
            continue
        position = match.end()
        word = match["word"]
        if word is not None:
            depth += (word == "(" and bool(words)) - (word == ")" and depth > 0)
            words += [] if skip else [word]
            skip = False
        elif match["redirect"]:
            skip = not match["redirect"].rstrip("0123456789").endswith("&")
        elif match["end"] and not (depth and match["end"] == "\n"):
            if match["end"] in ("||", "&&") and words and words[0] in ("if", "elif"):
                words.append(match["end"])
                continue
            if words:
                yield words
            words, skip = [], False
    if words:
        yield words


def run(lines: list[list[str]], shell: Shell) -> None:
    """Follow the statements: variables are set, commands are collected, `if` is decided where it can be."""
    branches: list[bool | None] = []  # of each open `if`: True, its branch is taken; False, not; None, one has been
    skipped_until: list[str] = []
    for words in lines:
        head = words[0]
        if head in _BLOCKS or words[-1] == "{" or _FUNCTION.fullmatch(" ".join(words[:3])):
            skipped_until.append(_BLOCKS.get(head, "}"))
            shell.notes.append(f"`{' '.join(words[:4])}` is not followed")
        elif skipped_until:
            if head == skipped_until[-1]:
                skipped_until.pop()
        elif head == "if":
            branches.append(_holds(words[1:], shell) if _active(branches) else None)
        elif head in ("elif", "else") and branches:
            taken = branches[-1] is not False
            branches[-1] = None if taken else head == "else" or _holds(words[1:], shell)
        elif head == "fi" and branches:
            branches.pop()
        else:
            simple = words[1:] if head in ("then", "else", "do") else words
            if simple and _active(branches):
                _statement(simple, shell)


def _active(branches: list[bool | None]) -> bool:
    return all(branch is True for branch in branches)


def _statement(words: list[str], shell: Shell, *, evaluated: bool = False) -> None:
    if words[0] in ("export", "declare", "local", "readonly"):
        words = [word for word in words[1:] if not word.startswith("-")]
    while words and (assigned := _ASSIGNMENT.fullmatch(words[0])):
        name, more, value = assigned.groups()
        if value == "" and words[1:2] == ["("]:
            end = words.index(")") if ")" in words else len(words)
            found = [part for word in words[2:end] for part in expand(word, shell)]
            words = words[end + 1 :]
        else:
            found, words = [_value(name, value, shell)], words[1:]
        before = shell.variables.get(name, []) if more else []
        shell.variables[name] = [before[0] + found[0]] if more and value and before else before + found
        if sum(map(len, shell.variables[name])) > LONGEST:
            raise ConfigError(f"the value of {name} grows beyond {LONGEST} characters; give the flags as one command")
    expanded = [part for word in words for part in expand(word, shell)]
    inner = _inner(expanded)
    if inner is not None and not evaluated:
        for line in statements(inner):
            _statement(line, shell, evaluated=True)
    elif any(_SCRIPT.search(word) for word in expanded):
        shell.commands.append(expanded)


def _inner(words: list[str]) -> str | None:
    """The text that `eval TEXT` or `... bash -c TEXT` takes for a command."""
    if words[:1] == ["eval"]:
        return " ".join(words[1:])
    found = [text for a, flag, text in zip(words, words[1:], words[2:], strict=False) if _is_shell(a, flag)]
    return found[0] if found else None


def _is_shell(program: str, flag: str) -> bool:
    return program.rpartition("/")[2] in ("sh", "bash") and flag in ("-c", "-lc", "-xc")


def _value(name: str, value: str, shell: Shell) -> str:
    """The value of an assignment; one that only a run knows is the name of the variable."""
    if re.match(r"<[^<>]*>", value):  # `NAME=<Specify path>`, which the examples of Megatron ask to fill in
        return name + value.rpartition(">")[2]
    found = " ".join(expand(value, shell, split=False))
    return name if found.startswith(PLACEHOLDER) and re.fullmatch(r"\w+", found) else found


def expand(word: str, shell: Shell, *, split: bool = True) -> list[str]:
    """The words that a word stands for; variables outside of quotes are split at blanks."""
    done, current, started = [], "", False
    for match in _PART.finditer(word):
        kind, text = match.lastgroup, match.group(match.lastgroup or 0)
        if kind in ("escaped", "single", "text"):
            current, started = current + ("" if text == "\n" else text), True
        elif kind == "double":
            whole = re.fullmatch(r"\$\{(\w+)\[@\]\}|\$@", text)
            inner = shell.variables.get(whole[1] or "@", []) if whole else expand_quoted(text, shell)
            if whole and split:
                done += inner
            else:
                current, started = current + " ".join(inner), True
        else:
            value = _variable(kind or "", text, shell)
            pieces = value.split() if split else [value]
            if pieces and value[:1].isspace() and started:
                done.append(current)
                current = ""
            for number, piece in enumerate(pieces):
                if number:
                    done.append(current)
                    current = ""
                current, started = current + piece, True
    return [*done, current] if started and (current or not split or not done) else done


def expand_quoted(text: str, shell: Shell) -> list[str]:
    """The inside of double quotes: one word."""
    found = ""
    for match in _PART.finditer(text):
        kind, part = match.lastgroup, match.group(match.lastgroup or 0)
        if kind == "escaped":
            found += "" if part == "\n" else part if part in '"\\$`' else "\\" + part
        elif kind in ("double", "single"):
            found += match.group()
        else:
            found += part if kind == "text" else _variable(kind or "", part, shell)
    return [found]


def _variable(kind: str, text: str, shell: Shell) -> str:
    """The value of an expansion, or a placeholder."""
    if kind in ("command", "ticks"):
        shell.notes.append(f"the output of `{text.strip()}` is not known")
        return PLACEHOLDER + "OUTPUT"
    if kind == "sum":
        return _sum(text, shell)
    match = re.fullmatch(r"([A-Za-z_]\w*|\d+|[@*])(\[[@*]\])?(?:(:?[-=+])(.*))?", text, re.DOTALL)
    if match is None:
        return PLACEHOLDER + re.sub(r"\W+", "_", text).strip("_").upper()
    name, _, sign, default = match.groups()
    value = " ".join(shell.variables.get(name, []))
    if sign is not None and sign.endswith("+"):
        return " ".join(expand_quoted(default, shell)) if value else ""
    if not value and sign is not None:
        return "".join(expand_quoted(default.strip("\"'"), shell))
    if name in shell.variables or name in ("@", "*"):
        return value
    return PLACEHOLDER + name if name.isdigit() else name


def _sum(text: str, shell: Shell) -> str:
    """The result of $((...)) of whole numbers."""
    text = re.sub(r"\$?\{?\b([A-Za-z_]\w*)\b\}?", lambda m: " ".join(shell.variables.get(m[1], [m[1]])), text)
    try:
        return str(_number(ast.parse("".join(expand_quoted(text, shell)).strip(), mode="eval").body))
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        shell.notes.append(f"the sum {text.strip()} is not known")
        return PLACEHOLDER + "SUM"


def _number(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _SUMS:
        found = _SUMS[type(node.op)](_number(node.left), _number(node.right))
        if abs(found) < 2**63:
            return found
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand)
    raise ValueError("no sum of whole numbers")


def _holds(words: list[str], shell: Shell) -> bool:
    """Whether a test of an `if` holds; one that cannot be decided does not."""
    found = _decide(words, shell)
    if found is None:
        shell.notes.append(f"`if {' '.join(words)}` is not known and taken as false")
    return found is True


def _decide(words: list[str], shell: Shell) -> bool | None:
    """The result of tests of strings and numbers; None where only a run would know."""
    for word, join in (("||", any), ("&&", all)):
        if word in words:
            here = words.index(word)
            return join(_decide(part, shell) for part in (words[:here], words[here + 1 :]))
    plain = [word for word in words if word not in ("[", "]", "[[", "]]", "test")]
    if plain[:1] == ["!"]:
        inner = _decide(plain[1:], shell)
        return None if inner is None else not inner
    values = ["".join(expand(word, shell, split=False)) for word in plain]
    if len(values) == 2 and values[0] in ("-z", "-n"):
        unset = values[1] == "" or re.sub(r"\W", "", plain[1]) == values[1]
        return unset == (values[0] == "-z")
    if len(values) == 3 and values[1] in ("=", "==", "!="):
        return (values[0] == values[2]) == (values[1] != "!=")
    numbers = [value for value in values[::2] if re.fullmatch(r"-?\d{1,18}", value)]
    if len(values) == 3 and values[1] in _TESTS and len(numbers) == 2:
        return _TESTS[values[1]](int(numbers[0]) - int(numbers[1]))
    return None

"""Checks GBNF grammars and makes them from JSON schemas. Knows no llama.cpp and no model.

llama.cpp trusts its grammars: some abort the process, some never stop growing and some overflow
the stack. What it would not survive is refused here; what it merely dislikes it may refuse itself.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from runner.errors import OptionError
from runner.time_limit import TimeLimitError, time_limit

ROOT = "root"
_MAX_CHARACTERS = 1 << 20
_MAX_RULES = 10_000  # llama.cpp walks chains of rules recursively
_MAX_DEPTH = 2_000  # and nested parentheses
_MAX_ELEMENTS = 1_000_000  # characters and references, repetitions written out
_MAX_REPETITIONS = 2_000  # llama.cpp's own limit
_SCHEMA_S = 2.0
_CHECK_S = 2.0

_LOOSE_CHARACTER = r'char ::= [^"\\] |'
_JSON_CHARACTER = r'char ::= [^"\\\x7F\x00-\x1F] |'

_ESCAPE = r'\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[trn\\"\[\]-])'
_TOKEN = re.compile(
    rf"""(?P<space>[ \t]+|\#[^\r\n]*)
    | (?P<newline>\r\n?|\n)
    | (?P<define>::=)
    | (?P<name>[A-Za-z0-9-]+)
    | (?P<literal>"(?:{_ESCAPE}|[^"\\])*")
    | (?P<characters>\[(?:{_ESCAPE}|[^\]\\])*\])
    | (?P<any>\.)
    | (?P<repeat>[*+?]|\{{\s*\d{{1,9}}\s*(?:,\s*(?:\d{{1,9}}\s*)?)?\}})
    | (?P<open>\() | (?P<close>\)) | (?P<bar>\|)
    """,
    re.VERBOSE,
)
_CHARACTER = re.compile(rf"{_ESCAPE}|[^\\]", re.DOTALL)

# A terminal is None; a reference is a rule's name.
Item = str | None
Rules = dict[str, list[list[Item]]]


def check_grammar(text: str) -> None:
    """Raise OptionError, saying where and why, for a grammar that llama.cpp cannot run."""
    if len(text) > _MAX_CHARACTERS or "\0" in text or not _is_unicode(text):
        raise OptionError(
            f"The grammar must be Unicode text without NUL of at most {_MAX_CHARACTERS} characters."
        )
    try:
        with time_limit(_CHECK_S):
            _check_rules(_Parser(text).parse())
    except TimeLimitError as error:
        raise OptionError(
            f"The grammar takes over {_CHECK_S:g} s to check: make it smaller."
        ) from error


def _check_rules(rules: Rules) -> None:
    _check_references(rules)
    nullable = _nullable(rules)
    _check_left_recursion(rules, nullable)
    _check_every_place_goes_on(rules, nullable)


def grammar_from_schema(schema: str) -> str:
    """The GBNF grammar of a JSON schema. Raises OptionError for one that cannot be turned."""
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        if not isinstance(json.loads(schema), dict):
            raise OptionError('The JSON schema must be an object, like {"type": "object"}.')
        with time_limit(_SCHEMA_S):
            grammar = str(json_schema_to_gbnf(schema))
    except json.JSONDecodeError as error:
        raise OptionError(f"The JSON schema is not JSON: {error}.") from error
    except TimeLimitError as error:
        raise OptionError(f"The JSON schema is too large: over {_SCHEMA_S:g} s.") from error
    except RecursionError as error:
        raise OptionError("The JSON schema is nested too deeply or counts too far.") from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError) as error:
        raise OptionError(f"The JSON schema cannot be used: {_reason(error)}.") from error
    except (re.error, TypeError, ValueError, NotImplementedError) as error:
        raise OptionError(f"The JSON schema cannot be used: {_reason(error)}.") from error
    # As it comes, texts may hold line breaks and other characters that JSON forbids.
    return grammar.replace(_LOOSE_CHARACTER, _JSON_CHARACTER)


@dataclass
class _Place:
    """An open rule or parenthesis: its alternatives so far, the last of them still growing."""

    name: str
    alternatives: list[list[Item]] = field(default_factory=lambda: [[]])
    last: list[Item] | None = None  # what a repetition would repeat; at most one item
    last_size: int = 0


class _Parser:
    """Reads GBNF into rules; repetitions and parentheses become rules of their own."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._rules: Rules = {}
        self._open: list[_Place] = []
        self._n_elements = 0
        self._n_made = 0
        self._goes_on = False  # a newline does not end the rule

    def parse(self) -> Rules:
        tokens = self._tokens()
        for kind, value, at in tokens:
            if kind == "newline":
                if len(self._open) == 1 and not self._goes_on:
                    self._close_rule()
            elif not self._open:
                self._begin_rule(kind, value, at, tokens)
            else:
                self._goes_on = kind == "bar"
                self._take(kind, value, at)
        if len(self._open) > 1:
            raise OptionError("The grammar ends inside parentheses.")
        if self._open:
            self._close_rule()
        return self._rules

    def _tokens(self) -> Iterator[tuple[str, str, int]]:
        at = 0
        while at < len(self._text):
            match = _TOKEN.match(self._text, at)
            if match is None or match.lastgroup is None:
                raise self._error(at, self._describe(at))
            if match.lastgroup != "space":
                yield match.lastgroup, match.group(), at
            at = match.end()

    def _begin_rule(
        self, kind: str, value: str, at: int, tokens: Iterator[tuple[str, str, int]]
    ) -> None:
        define = next(tokens, ("end", "", len(self._text)))
        if kind != "name" or define[0] != "define":
            raise self._error(at, "a rule like `name ::= ...` was expected")
        self._open.append(_Place(value))
        self._goes_on = True

    def _close_rule(self) -> None:
        place = self._open.pop()
        self._add_rule(place.name, place.alternatives)

    def _take(self, kind: str, value: str, at: int) -> None:
        place = self._open[-1]
        if kind == "bar":
            place.alternatives.append([])
            place.last = None
        elif kind == "open":
            if len(self._open) > _MAX_DEPTH:
                raise self._error(at, f"parentheses are nested over {_MAX_DEPTH} deep")
            self._open.append(_Place(self._new_name()))
        elif kind == "close" and len(self._open) > 1:
            self._open.pop()
            self._add_rule(place.name, place.alternatives)
            self._append(self._open[-1], place.name, 1)
        elif kind == "repeat":
            self._repeat(place, value, at)
        elif kind == "name":
            self._append(place, value, 1)
        elif kind in ("literal", "characters", "any"):
            inside = value[1:-1].removeprefix("^") if kind == "characters" else value[1:-1]
            size = 1 if kind == "any" else len(_CHARACTER.findall(inside))
            self._append(place, None, size)
        else:
            raise self._error(at, f"{value!r} does not belong here")

    def _append(self, place: _Place, item: Item, size: int) -> None:
        place.last = [item] if size else []
        place.last_size = size
        place.alternatives[-1] += place.last
        self._count(size)

    def _repeat(self, place: _Place, value: str, at: int) -> None:
        if not place.last:
            raise self._error(at, f"{value!r} has nothing before it to repeat")
        least, most = _bounds(value)
        if least > _MAX_REPETITIONS:
            raise self._error(at, f"at most {_MAX_REPETITIONS} repetitions are possible")
        if most is not None and most < least:
            raise self._error(at, f"{value} asks for at least {least} and at most {most}")
        place.last_size *= max(least, most or 1, 1)
        self._count(place.last_size)
        place.last = self._written_out(place.last, least, most)
        place.alternatives[-1][-1:] = place.last
        place.last = place.last[-1:]

    def _written_out(self, item: list[Item], least: int, most: int | None) -> list[Item]:
        """`item` repeated as llama.cpp does it; more than two in a row behave like two."""
        n_optional = 1 if most is None else min(most - least, 2)
        optional: list[Item] = []
        for _ in range(n_optional):
            name = self._new_name()
            self._add_rule(name, [[*item, *([name] if most is None else optional)], []])
            optional = [name]
        return item * min(least, 2) + optional

    def _add_rule(self, name: str, alternatives: list[list[Item]]) -> None:
        self._rules[name] = alternatives
        if len(self._rules) > _MAX_RULES:
            raise OptionError(f"The grammar has over {_MAX_RULES} rules.")

    def _new_name(self) -> str:
        self._n_made += 1
        return f"({self._n_made})"

    def _count(self, n: int) -> None:
        self._n_elements += n
        if self._n_elements > _MAX_ELEMENTS:
            raise OptionError(
                f"The grammar has over {_MAX_ELEMENTS} elements, repetitions included."
            )

    def _describe(self, at: int) -> str:
        character = self._text[at]
        if character in "<!":
            return "tokens (`<...>`) cannot be used in a grammar here"
        if character in '"[':
            return f"{character} is not closed or has an unknown escape"
        return f"{character!r} does not belong here"

    def _error(self, at: int, what: str) -> OptionError:
        line = self._text.count("\n", 0, at) + 1
        column = at - self._text.rfind("\n", 0, at)
        return OptionError(f"Grammar, line {line}, column {column}: {what}.")


def _bounds(repeat: str) -> tuple[int, int | None]:
    if repeat in "*+?":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[repeat]
    least, comma, most = repeat.strip("{}").partition(",")
    if not comma:
        return int(least), int(least)
    # llama.cpp takes more than its limit for "any number", too.
    is_bounded = most.strip() and int(most) <= _MAX_REPETITIONS
    return int(least), int(most) if is_bounded else None


def _check_references(rules: Rules) -> None:
    if ROOT not in rules:
        raise OptionError("The grammar has no rule named `root`.")
    used = {item for rule in rules.values() for part in rule for item in part if item is not None}
    missing = sorted(used - rules.keys())
    if missing:
        raise OptionError(f"The grammar uses a rule that it does not define: `{missing[0]}`.")


def _nullable(rules: Rules) -> set[str]:
    """The rules that can be empty."""
    return _closure(rules, lambda part, found: all(item in found for item in part))


def _closure(rules: Rules, holds: Callable[[list[Item], set[str]], bool]) -> set[str]:
    """The least set of rules of which some alternative `holds`, given the set itself."""
    found: set[str] = set()
    n_found = -1
    while len(found) > n_found:
        n_found = len(found)
        for name, rule in rules.items():
            if name not in found and any(holds(part, found) for part in rule):
                found.add(name)
    return found


def _left_corners(rules: Rules, nullable: set[str]) -> dict[str, dict[str, bool]]:
    """For each rule the rules it may begin with, and whether something then stands behind them."""
    corners: dict[str, dict[str, bool]] = {}
    for name, rule in rules.items():
        found = corners.setdefault(name, {})
        for part in rule:
            for place, item in enumerate(part):
                if item is None:
                    break
                found[item] = found.get(item, False) or place + 1 < len(part)
                if item not in nullable:
                    break
    return corners


def _check_left_recursion(rules: Rules, nullable: set[str]) -> None:
    # A cycle in which something stands behind the repeated rule grows llama.cpp's stack for ever.
    corners = _left_corners(rules, nullable)
    live = {name: {c for c in found if c != name or found[c]} for name, found in corners.items()}
    ends = True
    while ends:  # peel off what leads into no cycle
        ends = False
        for name in list(live):
            if not any(corner in live for corner in live[name]):
                del live[name]
                ends = True
    for name, found in live.items():
        for corner in found:
            if corners[name][corner] and _reaches(live, corner, name):
                shown = next((n for n in (name, corner) if not n.startswith("(")), ROOT)
                raise OptionError(f"The grammar is left-recursive: see rule `{shown}`.")


def _reaches(graph: dict[str, set[str]], start: str, goal: str) -> bool:
    seen, todo = {start}, [start]
    while todo:
        name = todo.pop()
        if name == goal:
            return True
        new = graph.get(name, set()) - seen
        seen |= new
        todo += new
    return False


def _check_every_place_goes_on(rules: Rules, nullable: set[str]) -> None:
    # Where no character can follow and the rule cannot end either, llama.cpp aborts.
    def can_begin(items: list[Item], begins: set[str]) -> bool:
        for item in items:
            if item is None or item in begins:
                return True
            if item not in nullable:
                return False
        return False

    begins = _closure(rules, can_begin)
    for name in rules:
        if name not in begins and name not in nullable:
            shown = ROOT if name.startswith("(") else name
            raise OptionError(f"The grammar can never get past rule `{shown}`.")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).rstrip(".")[:300]

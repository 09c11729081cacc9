"""Grammars that llama.cpp would not survive are refused; usual ones pass."""

import json
import time

import pytest

from runner.checks.grammar import check_grammar, grammar_from_schema
from runner.errors import OptionError

NAMED_LIST = 'root ::= item ("," ws item)*\nitem ::= [a-z]+ # a name\nws ::= [ \\t]*\n'


@pytest.mark.parametrize(
    "text",
    [
        'root ::= "a"',
        NAMED_LIST,
        NAMED_LIST.replace("\n", "\r\n"),
        'root ::= ("a" | "b"\n | "c")+\n',
        'root ::=\n  "a" |\n  "b"',
        'root ::= "a"? "b"* "c"+ "d"{2} "e"{1,} "f"{0,3} "g"{0,99999}',
        'root ::= ("a"? "b"?)* "c"',
        'root ::= (("a"?)*)*',
        'root ::= ""',
        'root ::= "x" root | ""',
        'root ::= "x" root',
        'root ::= "\\x41\\u00e9\\U0001F600\\n\\t\\r\\\\\\"\\[\\]" [\\]a-] [^"\\\\] . [-a]',
        'root ::= "(" expr ")"\nexpr ::= root | [0-9]',
        'a ::= "x"\nroot ::= a a\na ::= "y"',
        "root ::= " + "(" * 1500 + '"a"' + ")" * 1500,
    ],
)
def test_a_usable_grammar_passes(text: str) -> None:
    start_s = time.monotonic()
    check_grammar(text)  # raises if not
    assert time.monotonic() - start_s < 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rule named `root`"),
        ("# nothing", "no rule named `root`"),
        ('main ::= "a"', "no rule named `root`"),
        ("root ::= item", "does not define: `item`"),
        ('root ::= "a"\nroot2', "line 2, column 1: a rule like"),
        ('root = "a"', "line 1, column 6: '=' does not belong"),
        ('root ::= "a', 'column 10: " is not closed'),
        ('root ::= "\\q"', "unknown escape"),
        ("root ::= [a-", "is not closed"),
        ('root ::= ("a"', "ends inside parentheses"),
        ('root ::= "a")', "'\\)' does not belong here"),
        ('root ::= "a"\n| "b"', "line 2, column 1: a rule like"),
        ("root ::= *", "nothing before it to repeat"),
        ('root ::= ""*', "nothing before it to repeat"),
        ("root ::= [^]+", "nothing before it to repeat"),
        ('root ::= "a" | ?', "nothing before it to repeat"),
        ('root ::= "a"{3000}', "at most 2000 repetitions"),
        ('root ::= "a"{5,2}', "at least 5 and at most 2"),
        ('root ::= "a"{99999999999999999999}', "does not belong"),
        ('root ::= "a"{,3}', "does not belong"),
        ('root ::= "%s"{0,2000}' % ("x" * 5000), "over 1000000 elements"),
        ('root ::= root "a" | "b"', "left-recursive: see rule `root`"),
        ('root ::= a\na ::= b "x"\nb ::= a | "y"', "left-recursive: see rule `[ab]`"),
        ('root ::= a root "z" | "x"\na ::= b\nb ::= "y" | ""', "left-recursive"),
        ('root ::= (a)+ b\na ::= "x"*\nb ::= "y" | root{0,2}', "left-recursive"),
        ('root ::= a | "x"\na ::= "y"? root{2}', "left-recursive"),
        ('root ::= "x" a\na ::= b a\nb ::= ""', "never get past rule `a`"),
        ("root ::= root", "never get past rule `root`"),
        ('root ::= "a" <[5]>', "tokens .* cannot be used"),
        ('root ::= !<think> "a"', "tokens .* cannot be used"),
        ("root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000, "nested over 2000 deep"),
        (
            "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(20_000)),
            "over 10000 rules",
        ),
        ('root ::= "a\0"', "without NUL"),
        ('root ::= "\udc80"', "Unicode text"),
        ("#" * (2 << 20), "at most 1048576 characters"),
    ],
)
def test_an_unusable_grammar_is_refused(text: str, message: str) -> None:
    start_s = time.monotonic()
    with pytest.raises(OptionError, match=message):
        check_grammar(text)
    assert time.monotonic() - start_s < 2


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"type": "array", "items": {"enum": ["x", "y", 3, None]}, "minItems": 1, "maxItems": 5},
        {"anyOf": [{"type": "string", "maxLength": 20}, {"const": {"k": "v"}}]},
        {"properties": {"a": {"$ref": "#/$defs/t"}}, "$defs": {"t": {"type": "integer"}}},
        {"type": "string", "pattern": "^[a-z]{2,4}-[0-9]+$"},
        {"type": "string", "format": "date-time"},
    ],
)
def test_a_schema_becomes_a_grammar_that_passes(schema: object) -> None:
    grammar = grammar_from_schema(json.dumps(schema))
    check_grammar(grammar)
    assert "root ::=" in grammar


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "must be an object"),
        ('"string"', "must be an object"),
        ('{"type": "nonsense"}', "cannot be used: Unrecognized schema"),
        ('{"$ref": "https://example.com/x.json"}', "remote schemas is not allowed"),
        ('{"$ref": "#/missing/place"}', "cannot be used"),
        ('{"type": "string", "pattern": "unanchored"}', "cannot be used"),
        ('{"type": "object", "properties": 3}', "cannot be used"),
        ('{"enum": 5}', "cannot be used"),
        ('{"type": "array", "maxItems": 5000, "items": {"type": "null"}}', "nested over 2000 deep"),
        ('{"type":"object","properties":' * 3000 + "{}" + "}" * 3000, "too deeply"),
    ],
)
def test_a_schema_that_cannot_be_turned_is_refused(schema: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_grammar(grammar_from_schema(schema))

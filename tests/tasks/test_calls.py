"""Calls as models write them, and as they should not."""

import json
import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longgrpo.errors import ConfigError
from longgrpo.tasks.calls import FORMATS, Call, by_pattern, parser_for
from longgrpo.tasks.tools import Malformed, Tool, as_text
from testing.tokenizer import character_tokenizer

TEXT = st.text('ab"\\{}<>[]:,;\n é語', max_size=6)
NAMES = st.text(string.ascii_lowercase + "_", min_size=1, max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3)
WRITTEN = {
    "<tool_call>": lambda calls: "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>" for name, arguments in calls
    ),
    "<|tool_call|>": lambda calls: (
        "<|tool_call|>"
        + json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])
        + "<|/tool_call|>"
    ),
    "[TOOL_CALLS]": lambda calls: (
        "[TOOL_CALLS]" + json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])
    ),
    '"parameters": ': lambda calls: "; ".join(
        json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls
    ),
}
MARKS = ("tool_call>", "tool_call|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")


@pytest.mark.parametrize("sign", FORMATS)
@given(calls=CALLS)
def test_a_call_is_read_as_it_was_written(sign, calls):
    _, read = FORMATS[sign](WRITTEN[sign](calls))
    assert [(call.name, call.arguments, call.error) for call in read] == [(*call, "") for call in calls]


@given(calls=CALLS)
def test_mistral_since_version_11(calls):
    written = "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)
    _, read = FORMATS["[TOOL_CALLS]"](written)
    assert [(call.name, call.arguments) for call in read] == calls


@pytest.mark.parametrize("sign", FORMATS)
@given(
    text=st.text("ab<>|/[]tol_cTOLCAS \n語", max_size=40).filter(lambda text: not any(mark in text for mark in MARKS))
)
def test_a_reply_calls_nothing(sign, text):
    content, calls = FORMATS[sign](text)
    assert calls == []
    assert content.strip() == text.strip()


@pytest.mark.parametrize("sign", FORMATS)
@given(calls=CALLS, seed=st.integers(0, 10**6), mess=TEXT)
def test_whatever_is_written_is_a_call_or_an_error(sign, calls, seed, mess):
    text, draw = WRITTEN[sign](calls), random.Random(seed)
    place, gone = draw.randint(0, len(text)), draw.randint(0, 6)
    _, read = FORMATS[sign](text[:place] + mess + text[place + gone :])
    for call in read:
        assert isinstance(call.name, str)
        assert isinstance(call.arguments, dict)
        assert call.error or call.name


@pytest.mark.parametrize(
    ("sign", "text", "error"),
    [
        ("<tool_call>", '<tool_call>{"name": "f", "arguments": {}}', "no </tool_call>"),
        ("<tool_call>", '<tool_call>{"name": "f", }</tool_call>', "not JSON"),
        ("<tool_call>", "<tool_call></tool_call>", "empty"),
        ("<tool_call>", "<tool_call>7</tool_call>", "not int"),
        ("<tool_call>", '<tool_call>{"arguments": {}}</tool_call>', "no name"),
        ("<tool_call>", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "not list"),
        ("<tool_call>", f"<tool_call>{'[' * 100_000}</tool_call>", "not JSON"),
        ("[TOOL_CALLS]", "[TOOL_CALLS]", "empty"),
        ("[TOOL_CALLS]", "[TOOL_CALLS]f[ARGS]{", "not JSON"),
        ('"parameters": ', '{"name": "f", "parameters": {', "not JSON"),
    ],
)
def test_a_malformed_call_says_what_is_wrong(sign, text, error):
    _, (call,) = FORMATS[sign](text)
    assert error in call.error


def test_text_around_calls_is_the_content():
    content, calls = FORMATS["<tool_call>"]('Let me see. <tool_call>{"name": "f"}</tool_call>')
    assert content == "Let me see."
    assert calls == [Call("f")]


# ---- by a pattern


def test_a_pattern_names_the_arguments():
    parse = by_pattern(r"\[calc: (?P<expression>[^\]]*)\]", {"calculator": None})
    text = "[calc: 1 + 2] and [calc: 3]"
    assert parse(text) == (text, [Call("calculator", {"expression": e}) for e in ("1 + 2", "3")])
    assert parse("[calc: 1 + 2")[1] == []


def test_a_pattern_says_which_tool():
    parse = by_pattern(r"(?P<tool>\w+)\((?P<x>\d+)(,(?P<y>\d+))?\)", {"f": None, "g": None})
    assert parse("f(1) g(2,3)")[1] == [Call("f", {"x": "1"}), Call("g", {"x": "2", "y": "3"})]


@pytest.mark.parametrize(("pattern", "said"), [("(", "no regular expression"), ("(?P<x>.)", "which of f, g")])
def test_a_pattern_that_cannot_serve_is_refused(pattern, said):
    with pytest.raises(ConfigError, match=said):
        by_pattern(pattern, {"f": None, "g": None})


def test_the_format_is_the_templates():
    tokenizer = character_tokenizer()
    with pytest.raises(ConfigError, match=r"task\.tool_pattern"):
        parser_for(tokenizer, None, {"f": None})
    for sign, parse in FORMATS.items():
        tokenizer.chat_template = f"{{# {sign} #}}"
        assert parser_for(tokenizer, None, {"f": None}) is parse
    assert parser_for(tokenizer, "(?P<x>.)", {"f": None}) not in FORMATS.values()


def test_a_tokenizers_own_response_template_goes_first():
    tokenizer = character_tokenizer()
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<assistant>",
        "fields": {
            "tool_calls": {
                "open": "<call>",
                "close": "</call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close": "<end>", "content": "text"},
        },
    }
    parse = parser_for(tokenizer, None, {"f": None})
    content, calls = parse('hm <call>{"name": "f", "arguments": {"x": 1}}</call>')
    assert [(call.name, call.arguments) for call in calls] == [("f", {"x": 1})]
    assert "hm" in content
    assert parse("hm")[1] == []
    (broken,) = parse("<call>{</call>")[1]
    assert broken.error


# ---- tools


def add(a: int, b: float = 0.5, *, how: str | None = None) -> float:
    """Adds.

    Args:
        a: one
        b: another
        how: in which way
    """
    return a + b


def flags(on: bool, names: list[str]) -> str:
    """Sets.

    Args:
        on: whether
        names: which
    """
    return f"{on} {names}"


def test_a_function_is_its_schema():
    schema = Tool(add).schema["function"]
    assert schema["name"] == "add"
    assert schema["description"] == "Adds."
    assert schema["parameters"]["properties"]["a"] == {"type": "integer", "description": "one"}
    assert schema["parameters"]["required"] == ["a"]


@pytest.mark.parametrize(
    ("tool", "arguments", "taken"),
    [
        (add, {"a": 1, "b": 2}, {"a": 1, "b": 2}),
        (add, {"a": "12", "b": "-0.5"}, {"a": 12, "b": -0.5}),
        (add, {"a": 1, "how": None}, {"a": 1, "how": None}),
        (flags, {"on": "True", "names": '["a"]'}, {"on": True, "names": ["a"]}),
    ],
)
def test_arguments_are_read_by_their_types(tool, arguments, taken):
    assert Tool(tool).arguments(Call(tool.__name__, arguments)) == taken


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "needs the argument 'a'"),
        ({"a": 1, "c": 2}, "no argument 'c'; its arguments are: a, b, how"),
        ({"a": 1.5}, "'a' is of type integer, not 1.5"),
        ({"a": True}, "integer, not True"),
        ({"a": "one"}, "integer, not 'one'"),
        ({"a": 1, "how": 3}, "'how' is of type string"),
    ],
)
def test_wrong_arguments_are_malformed(arguments, said):
    with pytest.raises(Malformed, match=said):
        Tool(add).arguments(Call("add", arguments))


def untyped(x):
    """Has no types.

    Args:
        x: something
    """


def undocumented(x: int) -> int:
    return x


@pytest.mark.parametrize("function", [untyped, undocumented])
def test_a_function_that_does_not_say_what_it_takes_is_no_tool(function):
    with pytest.raises(ConfigError, match=f"{function.__name__} is no tool"):
        Tool(function)


@pytest.mark.parametrize(
    ("result", "text"), [("a", "a"), (42, "42"), (None, "null"), ({"x": [1, "ä"]}, '{"x": [1, "ä"]}'), ({1}, "{1}")]
)
def test_results_as_text(result, text):
    assert as_text(result) == text

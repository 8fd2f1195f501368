"""Conversations of other people's data and templates, as text of a prompt."""

import datasets
import pytest

from longgrpo.config.task import TaskConfig
from longgrpo.errors import DataError
from longgrpo.tasks.builtin_rewards import matches_format
from longgrpo.tasks.chat import render, reply_prefix
from longgrpo.tasks.data import Problems, as_reply, columns_of, encode
from longgrpo.tasks.sources import load_rows
from testing.tokenizer import character_tokenizer

HEAD = "{% for m in messages %}<{{ m.role }}>"
TAIL = "</s>{% endfor %}{% if add_generation_prompt %}<assistant>"
PLAIN = HEAD + "{{ m.content }}" + TAIL + "{% endif %}"
OPENS = HEAD + "{{ m.content.split('</think>')[-1] }}" + TAIL + "<think>\n{% endif %}"
TRIMS = HEAD + "{{ m.content | trim }}" + TAIL + "{% endif %}"
REWRITES = HEAD + "{{ m.content | upper }}" + TAIL + "{% endif %}"
USER = {"role": "user", "content": "q"}


@pytest.fixture
def tokenizer():
    return character_tokenizer()


def problem(prompt, prefix="", **columns):
    return Problems([{"prompt": prompt, **columns}], TaskConfig("rows.jsonl"), chat=True, prefix=prefix)[0]


def reward(one, text):
    return matches_format([as_reply(one.prompt, text)], **columns_of([one]))


@pytest.mark.parametrize(("template", "prefix"), [(PLAIN, ""), (OPENS, "<think>\n"), (TRIMS, ""), (REWRITES, "")])
def test_how_a_template_begins_a_reply(tokenizer, template, prefix):
    tokenizer.chat_template = template
    assert reply_prefix(tokenizer) == prefix
    one = problem("q", prefix)
    assert reward(one, "hm</think> 7") == [1.0 if prefix else 0.0]
    assert reward(one, "hm 7") == [0]
    assert reward(problem("q"), "<think>hm</think> 7") == [1]


def test_a_reply_that_the_prompt_begins_is_judged_whole(tokenizer):
    one = problem([USER, {"role": "assistant", "content": "<think>\n"}], prefix="<other>")
    assert reward(one, "hm</think> 7") == [1]
    assert reward(one, "<think>hm</think> 7") == [0]  # a second one


@pytest.mark.parametrize("template", [PLAIN, TRIMS])
@pytest.mark.parametrize("begun", ["<think>\n", "so: ", "so", " so\n\n"])
def test_a_begun_reply_stands_at_the_end_as_it_was_written(tokenizer, template, begun):
    tokenizer.chat_template = template
    text = render(tokenizer, [USER, {"role": "assistant", "content": begun}])
    assert text.removeprefix("<user>q</s><assistant>").lstrip() == begun.lstrip()


@pytest.mark.parametrize("begun", ["<think>\nhm</think> so ", "abc"])
def test_a_template_that_rewrites_it_is_refused(tokenizer, begun):
    tokenizer.chat_template = REWRITES if begun == "abc" else OPENS
    with pytest.raises(DataError, match=r"the chat template (rewrites|refuses)"):
        render(tokenizer, [USER, {"role": "assistant", "content": begun}])


def test_a_role_that_the_template_refuses(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="refuses a conversation of system, user: no system role"):
        render(tokenizer, [{"role": "system", "content": "s"}, USER])


@pytest.mark.parametrize(
    "template", ["{% for", "{{ messages[9].role }}", "{{ 1 // 0 }}", "{{ messages.nothing() }}", "{{ {}['no'].x }}"]
)
def test_a_template_that_does_not_parse_or_raises(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="the chat template refuses a conversation of user"):
        encode(tokenizer, [USER])


def test_content_parts_of_text_are_text(tokenizer):
    tokenizer.chat_template = PLAIN
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    one = problem([{"role": "user", "content": parts}])
    assert render(tokenizer, one.prompt) == "<user>one\ntwo</s><assistant>"
    assert one.question == "one\ntwo"
    with pytest.raises(DataError, match=r"another type than text.*image"):
        problem([{"role": "user", "content": [{"type": "image", "url": "x"}]}])


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_what_a_typed_column_fills_in_is_not_in_the_prompt(tmp_path, form):
    def call(name, **arguments):
        return {"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": arguments}]}

    talks = [[USER, call("weather", city="Rome"), USER], [USER, call("sum", a=1, b=2), USER]]
    data = datasets.Dataset.from_list([{"prompt": talk, "answer": None, "meta": {"x": None}} for talk in talks])
    assert data[0]["prompt"][1]["tool_calls"][0]["arguments"]["a"] is None  # what it is about
    path = tmp_path / ("rows.parquet" if form == "parquet" else "rows")
    data.to_parquet(str(path)) if form == "parquet" else data.save_to_disk(str(path))
    task = TaskConfig(str(path))
    source = Problems(load_rows(task), task, chat=True)
    assert [source[i].prompt for i in range(2)] == talks
    assert source[0].columns == {"answer": None, "meta": {"x": None}}  # a value of the row's own


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_only_a_line_feed_ends_a_line_of_json(tmp_path, separator):
    path = tmp_path / "rows.jsonl"
    text = f'{{"prompt": "a{separator}b", "n": 1}}\r\n{{"prompt": "c"}}\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    rows = load_rows(TaskConfig(str(path)))
    assert [row["prompt"] for row in rows] == [f"a{separator}b", "c"]


def test_text_that_is_templated_already_gets_no_second_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    (bos,) = tokenizer.convert_tokens_to_ids(["1"])
    tokenizer.bos_token = "1"
    special = [("1", bos)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="1 $A", special_tokens=special)
    plain = encode(tokenizer, "23")
    assert plain == [bos, *tokenizer.convert_tokens_to_ids(["2", "3"])]
    assert encode(tokenizer, "123") == plain

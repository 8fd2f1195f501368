import json

import pytest
import torch
from transformers import AutoTokenizer

from longgrpo.config.task import TaskConfig
from longgrpo.errors import ConfigError, DataError
from longgrpo.tasks.data import (
    Problems,
    PromptStream,
    Sampler,
    check_length,
    columns_of,
    encode,
    held_out_problems,
    make_sampler,
)
from longgrpo.tasks.sources import load_rows
from testing import OWN_DATA

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
ROWS = [{"prompt": f"What is {i}?", "answer": str(i), "level": {"digits": len(str(i))}} for i in range(30)]


def sums(**options):
    parameters = options.pop("parameters", {})
    return TaskConfig("chain_sum", {**ONE_DIGIT, **parameters}, **options)


def problems(task, chat=True, held_out=False):
    return Problems(load_rows(task, held_out), task, chat)


def questions(some):
    """Of problems, or of all problems of a source."""
    some = some if isinstance(some, list) else [some[i] for i in range(len(some))]
    return [problem.question for problem in some]


def stream(task, held_out=frozenset()):
    source = problems(task)
    return PromptStream(source, set(held_out), make_sampler(task, source))


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


# ---- sources


def test_every_kind_of_source_gives_the_same_problems(tmp_path, rows_file, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(str(tmp_path / "rows.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(rows_file.read_text())
    names = (rows_file, tmp_path / "rows.parquet", tmp_path / "saved", tmp_path / "splits", f"{OWN_DATA}:thirty",
             tmp_path / "folder")  # fmt: skip
    for name in names:
        source = problems(TaskConfig(str(name)))
        assert questions(source) == [row["prompt"] for row in ROWS], name
        assert source[7].columns == {"answer": "7", "level": {"digits": 1}}
    test = problems(TaskConfig(str(tmp_path / "splits"), eval_split="test"), held_out=True)
    assert questions(test) == ["What is 3?"]


def test_a_function_gets_the_split_and_the_parameters():
    task = TaskConfig(f"{OWN_DATA}:numbered", {"count": 2}, eval_split="test")
    assert questions(problems(task)) == ["train 0", "train 1"]
    assert questions(problems(task, held_out=True)) == ["test 0", "test 1"]


def test_json_rows_keep_their_own_keys(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"prompt": "a", "answer": 1, "m": {"x": 1}}\n\n{"prompt": "b", "answer": "two", "m": {"y": 2}}\n')
    source = problems(TaskConfig(str(path)))
    one, two = source[0], source[1]
    assert (one.columns, two.columns) == ({"answer": 1, "m": {"x": 1}}, {"answer": "two", "m": {"y": 2}})
    assert columns_of([one, two])["answer"] == [1, "two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": ', r"rows\.jsonl:2: is not JSON"),
        ('["a"]', "must be an object with a prompt, not list"),
        ('{"problem": "a"}', r"no 'prompt'; its columns are problem: name the prompt's in task\.prompt_column"),
        ('{"prompt": 3}', "row 0 of the task: a prompt is text or a list of messages with roles, not 3"),
        ('{"prompt": " "}', "row 0 of the task has an empty prompt"),
        ('{"prompt": "a", "completions": 1}', "must not be called 'completions'"),
        ("", "has no prompts"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        problems(TaskConfig(str(tmp_path / "rows.jsonl")))[0]


@pytest.mark.parametrize("prompt", ["a\ud800b", [{"role": "user", "content": "\udfff"}]])
def test_half_a_pair_of_surrogates_is_no_text(tmp_path, prompt):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps({"prompt": prompt}) + "\n")
    with pytest.raises(DataError, match=r"row 1 of the task: its prompt has a lone surrogate"):
        questions(problems(TaskConfig(str(path))))


def test_a_sampler_changes_nothing_of_what_is_trained_on(rows_file):
    class Spoils(Sampler):
        def observe(self, problems, rewards):
            rewards.zero_()
            problems[0].columns.clear()

    source = problems(TaskConfig(str(rows_file)))
    prompts = PromptStream(source, set(), Spoils(source, 0))
    taken, rewards = prompts.take(2), torch.ones(2, 4)
    prompts.observe(taken, rewards)
    assert rewards.eq(1).all()
    assert taken[0].columns["answer"] == "0"


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl.*No such file"):
        problems(TaskConfig("nowhere.jsonl"))
    with pytest.raises(DataError, match=r"nowhere\.parquet"):
        problems(TaskConfig("nowhere.parquet"))
    with pytest.raises(ConfigError, match="has no function 'absent'"):
        problems(TaskConfig(f"{OWN_DATA}:absent"))
    with pytest.raises(DataError, match=r"'chain_sumz'.*did you mean chain_sum"):
        problems(TaskConfig("chain_sumz"))
    with pytest.raises(DataError, match=r"(?s)color.*red"):
        problems(sums(parameters={"color": "red"}))
    with pytest.raises(DataError, match=r"task\.seed"):
        problems(sums(parameters={"seed": 3}))
    with pytest.raises(DataError, match="size must be positive"):
        problems(sums(parameters={"size": 0}))


# ---- prompts


def test_prompts_with_and_without_a_chat_template(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    task = sums(system_prompt="Add.")
    problem = problems(task)[0]
    text = tokenizer.decode(encode(tokenizer, problem.prompt, prefix="4 + "))
    assert text.replace(" ", "") == f"<system>Add.\n<user>{problem.question}\n<assistant>4 + ".replace(" ", "")
    plain = problems(task, chat=False)[0]
    assert plain.prompt == f"Add.\n\n{plain.question}"
    assert problems(sums(chat=False))[0].prompt == plain.question  # whatever the model has


def test_conversations_keep_their_own_system_prompt_and_go_on_where_they_end(tmp_path, tiny_model):
    talk = [{"role": "system", "content": "Own."}, {"role": "user", "content": "hi", "name": None},
            {"role": "assistant", "content": "so: "}]  # fmt: skip
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"prompt": talk}) + "\n" + json.dumps({"prompt": talk[1:2]}))
    source = problems(TaskConfig(str(path), system_prompt="Ours."))
    first, second = source[0], source[1]
    assert [message["content"] for message in first.prompt] == ["Own.", "hi", "so: "]
    assert second.prompt == [{"role": "system", "content": "Ours."}, {"role": "user", "content": "hi"}]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = tokenizer.decode(encode(tokenizer, first.prompt)).replace(" ", "")
    assert text == "<system>Own.\n<user>hi\n<assistant>so:"


def test_a_chat_template_of_ones_own_with_arguments(tree, tmp_path):
    from longgrpo.config.run import build_config
    from longgrpo.run.trainer import Trainer

    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[-1]['content'] }}{% if think %}!{% else %}?{% endif %}")
    tree["task"] |= {"chat_template": str(template), "chat_template_kwargs": {"think": True}, "eval_n": 0}
    collector = Trainer(build_config(tree), tmp_path / "run").loop.collector
    some = collector.sample_prompts(1)
    sample = collector.roll_out(some, 1)[0]
    assert collector.tokenizer.decode(sample.prompt_ids).replace(" ", "") == some[0].question.replace(" ", "") + "!"


def test_a_template_may_name_columns_and_metadata():
    problem = problems(sums())[0]
    assert (
        "{expression} = {answer}".format(**problem.fields())
        == f"{problem.columns['metadata']['expression']} = {problem.columns['answer']}"
    )


def test_a_prompt_that_fills_the_context_is_refused():
    check_length([0] * 9, problems(sums())[0], 10)
    with pytest.raises(DataError, match="10 tokens, the context 10"):
        check_length([0] * 10, problems(sums())[0], 10)


# ---- order


def test_held_out_problems_differ_and_are_never_trained_on(rows_file):
    # item i of seed 1 is item i + 1 of seed 0, and there are 200 problems in all: left alone they overlap
    task = sums(eval_seed=1, eval_n=60)
    held_out = set(questions(held_out_problems(problems(task, held_out=True), task)))
    assert len(held_out) == 60
    trained = set(questions(stream(task, held_out).take(500)))
    assert len(trained) > 100
    assert not trained & held_out
    task = TaskConfig(str(rows_file), eval_n=10)
    held_out = set(questions(held_out_problems(problems(task, held_out=True), task)))
    assert held_out != set(questions(problems(task))[:10])  # drawn, and not the first
    assert set(questions(stream(task, held_out).take(100))) == {row["prompt"] for row in ROWS} - held_out


def test_rows_are_shuffled_anew_each_epoch(rows_file):
    order = questions(stream(TaskConfig(str(rows_file), seed=3)).take(60))
    everything = [row["prompt"] for row in ROWS]
    assert order[:30] != everything
    assert order[:30] != order[30:]
    assert sorted(order[:30]) == sorted(order[30:]) == sorted(everything)
    assert questions(stream(TaskConfig(str(rows_file), seed=3)).take(60)) == order
    assert questions(stream(TaskConfig(str(rows_file), seed=4)).take(60)) != order
    assert questions(stream(TaskConfig(str(rows_file), shuffle=False)).take(60)) == everything * 2


@pytest.mark.parametrize("sampler", [None, f"{OWN_DATA}:Harder"])
def test_a_stream_given_a_state_goes_on_with_the_same_problems(rows_file, sampler):
    import torch

    task = TaskConfig(str(rows_file), sampler=sampler)
    running = stream(task)
    for reward in (0.0, 1.0, 1.0):
        some = running.take(13)
        running.observe(some, torch.full((13, 2), reward))
    state = json.loads(json.dumps(running.state))
    rest = questions(running.take(40))
    again = stream(task)
    again.state = state
    assert questions(again.take(40)) == rest
    assert again.epoch == running.epoch == (3 * 13 + 40) / 30


def test_a_curriculum_chooses_by_what_was_earned(rows_file):
    import torch

    running = stream(TaskConfig(str(rows_file), sampler=f"{OWN_DATA}:Harder"))
    first = running.take(4)
    assert {problem.columns["level"]["digits"] for problem in first} == {1}
    running.observe(first, torch.zeros(4, 2))
    assert {problem.columns["level"]["digits"] for problem in running.take(4)} == {1}
    running.observe(first, torch.ones(4, 2))
    assert {problem.columns["level"]["digits"] for problem in running.take(4)} == {2}


def test_a_sampler_is_by_default_in_order():
    source = problems(sums(parameters={"size": 5}))
    order = questions(PromptStream(source, set(), Sampler(source, 0)).take(10))
    assert order[:5] == order[5:]


def test_no_prompts_are_left():
    task = sums(parameters={"size": 5}, eval_n=6)
    source = problems(task)
    with pytest.raises(DataError, match="no prompts are left"):
        PromptStream(source, set(questions(source))).take(1)
    with pytest.raises(DataError, match=r"only 5 different problems.*eval_n = 6"):
        held_out_problems(source, task)

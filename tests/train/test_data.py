import pytest
from transformers import AutoTokenizer

from longgrpo.train.config import TaskConfig
from longgrpo.train.data import PromptStream, ReasoningGymSource, check_length, encode, held_out_problems
from longgrpo.train.errors import DataError

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def source(seed=0, **parameters):
    return ReasoningGymSource(TaskConfig("chain_sum", {**ONE_DIGIT, **parameters}), seed, chat=True)


def test_held_out_problems_differ_and_are_never_trained_on():
    # item i of seed 1 is item i + 1 of seed 0, and there are 200 problems in all: left alone they overlap
    held_out = held_out_problems(source(seed=1), 60)
    questions = {problem.question for problem in held_out}
    assert len(questions) == 60
    trained = {problem.question for problem in PromptStream(source(seed=0), questions).take(500)}
    assert len(trained) > 100
    assert not trained & questions


def test_a_stream_set_to_a_position_goes_on_with_the_same_problems():
    held_out = {problem.question for problem in held_out_problems(source(seed=1), 30)}
    stream = PromptStream(source(), held_out)
    stream.take(17)
    position = stream.position
    rest = [problem.question for problem in stream.take(40)]
    assert [problem.question for problem in PromptStream(source(), held_out, position).take(40)] == rest


def test_a_stream_begins_again_where_the_task_ends():
    questions = [problem.question for problem in PromptStream(source(size=5), set()).take(10)]
    assert questions[:5] == questions[5:]


def test_no_prompts_are_left():
    everything = {source(size=5)[i].question for i in range(5)}
    with pytest.raises(DataError, match="no prompts are left"):
        PromptStream(source(size=5), everything).take(1)
    with pytest.raises(DataError, match=r"only 5 different problems.*eval_n = 6"):
        held_out_problems(source(size=5), 6)
    with pytest.raises(DataError, match="size must be positive"):
        source(size=0)


def test_a_task_that_does_not_exist_or_refuses_its_parameters():
    with pytest.raises(DataError, match=r"'chain_sumz'.*did you mean chain_sum"):
        ReasoningGymSource(TaskConfig("chain_sumz"), 0, chat=True)
    with pytest.raises(DataError, match=r"chain_sum refuses them.*colour"):
        source(colour="red")
    with pytest.raises(DataError, match=r"task\.seed"):
        ReasoningGymSource(TaskConfig("chain_sum", {"seed": 3}), 0, chat=True)


def test_prompts_with_and_without_a_chat_template(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    task = TaskConfig("chain_sum", ONE_DIGIT, system_prompt="Add.")
    problem = ReasoningGymSource(task, 0, chat=True)[0]
    text = tokenizer.decode(encode(tokenizer, problem.prompt, "4 + "))
    assert text.replace(" ", "") == f"<system>Add.\n<user>{problem.question}\n<assistant>4 + ".replace(" ", "")
    plain = ReasoningGymSource(task, 0, chat=False)[0]
    assert plain.prompt == f"Add.\n\n{plain.question}"


def test_a_template_may_name_columns_and_metadata():
    problem = source()[0]
    assert (
        "{expression} = {answer}".format(**problem.fields())
        == f"{problem.columns['metadata']['expression']} = {problem.columns['answer']}"
    )


def test_a_prompt_that_fills_the_context_is_refused():
    check_length([0] * 9, source()[0], 10)
    with pytest.raises(DataError, match="10 tokens, the context 10"):
        check_length([0] * 10, source()[0], 10)

"""Damaged files of every kind that a command reads: each is refused by name, soon, and nothing else is touched.

Seeded. LONGGRPO_FUZZ_SECONDS (default 9 for each kind) and LONGGRPO_FUZZ_SEED set how long and from where:

    LONGGRPO_FUZZ_SECONDS=600 make check T=tests/run/test_fuzz.py ARGS=-s

prints how many files were damaged in which way, and what was said.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from longgrpo import cli
from longgrpo.config.run import build_config, load_config
from longgrpo.errors import UserError
from longgrpo.model.load import context_length, load_model, load_tokenizer, resolve_model
from longgrpo.run import building, checkpoint
from longgrpo.run.trainer import Trainer
from testing.gguf_files import write_gguf
from testing.models import random_model

SECONDS = float(os.environ.get("LONGGRPO_FUZZ_SECONDS", "9"))
SEED = int(os.environ.get("LONGGRPO_FUZZ_SEED", "0"))
LONGEST = 10  # seconds of one case

INTEGERS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
VALUES = [
    "null",
    "true",
    "-1",
    "1e999",
    "NaN",
    str(2**70),
    '"\\ud800"',
    '""',
    "[]",
    "{}",
    "[[[[]]]]",
    '"\\u202e"',
    "0.5",
]


# ---- how a file is damaged


def flip(draw, content):
    for _ in range(draw.choice([1, 1, 1, 8, 64])):
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return content


def cut(draw, content):
    return content[: draw.randrange(len(content) + 1)]


def zeros(draw, content):
    return content + bytes(draw.choice([1, 100, 5000]))


def overwrite(draw, content):
    """A number at a place of the first part, where headers are."""
    width = draw.choice([1, 2, 4, 8])
    number = (draw.choice(INTEGERS) & (2 ** (8 * width) - 1)).to_bytes(width, "little")
    start = draw.randrange(max(1, min(len(content), draw.choice([64, 2000, 10**9]))))
    content[start : start + width] = number
    return content


def splice(draw, content):
    a, b = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:a] + content[a:b] * draw.choice([0, 2, 3]) + content[b:]


def noise(draw, content):
    return bytearray(draw.randbytes(draw.choice([0, 1, 50, 3000])))


def value(draw, content):
    """One value of a JSON or YAML text, or one line, is another."""
    text = content.decode(errors="surrogateescape")
    cuts = [i for i, character in enumerate(text) if character in ":,[{ \n"]
    if not cuts:
        return content
    start = draw.choice(cuts) + 1
    end = min((i for i in cuts if i > start), default=len(text))
    return bytearray((text[:start] + draw.choice(VALUES) + text[end:]).encode(errors="surrogateescape"))


def damaged(draw, path):
    """Damages a file in one way; returns its name."""
    ways = [flip, cut, zeros, overwrite, splice, noise, value, value, value]
    other = draw.random()
    if other < 0.03:
        path.unlink()
        return "unlink"
    if other < 0.06:
        path.unlink()
        path.mkdir()
        return "directory"
    if other < 0.09:
        path.unlink()
        path.symlink_to(path)
        return "loop"
    way = draw.choice(ways)
    path.write_bytes(bytes(way(draw, bytearray(path.read_bytes()))))
    return way.__name__


# ---- what is done with it


class Reached(Exception):
    """The engine would be built: what was read is fit to go on with."""


def resume(run, scratch, monkeypatch):
    def stop(*_):
        raise Reached

    monkeypatch.setattr(building, "make_engine", stop)
    Trainer.resume(run, ["--train.steps", "5"])


def load_checkpoint(run, scratch, monkeypatch):
    saved = checkpoint.find(run, "last")
    checkpoint.best(run)
    tensors = checkpoint.read_tensors(saved)
    weights = {name.removeprefix("weight."): t.clone() for name, t in tensors.items() if name.startswith("weight.")}
    parameters = {name: torch.nn.Parameter(torch.full_like(tensor, 7.0)) for name, tensor in weights.items()}
    checkpoint.load(saved, parameters, torch.optim.AdamW(parameters.values()))


def report(run, scratch, monkeypatch):
    if cli.main(["report", str(run), "--output", str(scratch / "report.html")]) != 0:
        raise UserError("told")


def config(directory, scratch, monkeypatch):
    load_config(directory / "config.yaml")


def data(directory, scratch, monkeypatch):
    """Rows and a chat template, as far as the prompts' tokens."""

    def stop(*_):
        raise Reached

    monkeypatch.setattr(building, "make_engine", stop)
    Trainer(load_config(directory / "config.yaml"), scratch / "run")


def gguf(directory, scratch, monkeypatch):
    monkeypatch.setenv("LONGGRPO_CACHE", str(scratch / "cache"))
    shutil.rmtree(scratch / "cache", ignore_errors=True)
    found = resolve_model(str(directory / "model.gguf"))
    load_tokenizer(found)
    load_model(found)


def model(directory, scratch, monkeypatch):
    found = resolve_model(str(directory))
    context_length(found)
    load_tokenizer(found)
    load_model(found)


@pytest.fixture(scope="module")
def sources(base_tree, tiny_model, tmp_path_factory):
    """What each kind damages: a folder, and the files in it that may be."""
    folder = tmp_path_factory.mktemp("whole")
    tree = copy.deepcopy(base_tree)
    tree["train"] |= {"steps": 3, "probe_prompts": 0, "save_steps": 1, "best_metric": "reward/mean"}
    tree["task"] |= {"eval_n": 2, "eval_steps": 2}
    tree["log"] = {"to": []}
    Trainer(build_config(tree), folder / "run").run()
    (folder / "config").mkdir()
    (folder / "config/config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf/model.gguf", random_model("llama", tie_word_embeddings=True))
    shutil.copytree(tiny_model, folder / "model")
    (folder / "data").mkdir()
    (folder / "data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "data/template.jinja").write_text(TEMPLATE)
    tree["task"] = {"name": "rows.jsonl", "chat_template": "template.jinja", "eval_n": 2, "eval_reward": "exact_answer"}
    (folder / "data/config.yaml").write_text(yaml.safe_dump(tree))
    return folder


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, None]}}}
TALK = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": [{"type": "text", "text": "1 + 2"}]},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "name": "add"},
    {"role": "user", "content": "and 3"},
]
ROWS = [{"prompt": "2 + 3 =", "answer": "5", "level": 1}] * 3 + [{"prompt": TALK, "answer": 6, "note": None}] * 3
TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] == 'robot' -%}{{ raise_exception('no robots') }}{%- endif -%}
<{{ message.role }}> {{ message.content }}
{%- for call in message.tool_calls or [] -%}{{ call.function | tojson }}{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}
"""

KINDS = {
    "data": (data, "data", lambda path: path.name != "config.yaml"),
    "resume": (resume, "run", lambda path: path.name != ".longgrpo"),
    "checkpoint": (load_checkpoint, "run", lambda path: "checkpoints" in path.parts),
    "report": (report, "run", lambda path: "checkpoints" not in path.parts and path.name != ".longgrpo"),
    "config": (config, "config", lambda path: True),
    "gguf": (gguf, "gguf", lambda path: True),
    "model": (model, "model", lambda path: True),
}


def late(number, frame):
    raise TimeoutError("a case takes longer than it may")


@pytest.mark.timeout(SECONDS * 3 + 300)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, sources, tmp_path, monkeypatch, capfd):
    act, source, may = KINDS[kind]
    draw = random.Random(f"{kind} {SEED}")
    ways, outcomes, begin = Counter(), Counter(), time.monotonic()
    act_once(act, shutil.copytree(sources / source, tmp_path / "whole"), tmp_path, monkeypatch)  # imports and the like
    memory, before = psutil.Process().memory_info().rss, alarm()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    while time.monotonic() - begin < SECONDS:
        folder = tmp_path / "case"
        shutil.copytree(sources / source, folder)
        (folder / "notes.txt").write_text("mine")
        files = sorted(path for path in folder.rglob("*") if path.is_file() and may(path) and path.name != "notes.txt")
        path = draw.choice(files)
        way = damaged(draw, path)
        where = f"{kind}, case {sum(ways.values())} of seed {SEED}: {path.relative_to(folder)} by {way}"
        signal.alarm(LONGEST)
        try:
            outcome = act_once(act, folder, tmp_path, monkeypatch)
        except BaseException:
            pytest.fail(f"{where}\n{traceback.format_exc()}")
        finally:
            signal.alarm(0)
        assert (folder / "notes.txt").read_text() == "mine", where
        assert len(list(folder.parent.iterdir())) <= 4, where
        ways[way], outcomes[outcome] = ways[way] + 1, outcomes[outcome] + 1
        shutil.rmtree(folder)
    signal.signal(signal.SIGALRM, before)
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    assert peak < 2 * memory + (256 << 20)
    with capfd.disabled():
        print(f"\n{kind}: {json.dumps(dict(ways))}; {json.dumps(dict(outcomes))}")


def alarm():
    return signal.signal(signal.SIGALRM, late)


def act_once(act, folder, scratch, monkeypatch):
    with monkeypatch.context() as patch:
        try:
            act(folder, scratch, patch)
        except Reached:
            return "taken"
        except UserError:
            return "told"
        except (ValueError, FileNotFoundError) as error:
            # The model's readers: the trainer turns these into ConfigError. Each names what it is about.
            if str(folder) not in str(error):
                raise
            return "told"
    return "taken"

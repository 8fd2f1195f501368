"""`longgrpo plan`, and what `longgrpo train` does with the plan."""

import json

import pytest

from longgrpo.checks.rehearsal import Forecast
from longgrpo.cli import main
from longgrpo.config.run import load_config
from longgrpo.memory.cards import CARDS, GIB, card
from longgrpo.memory.ranks import owned
from longgrpo.memory.shape import model_shape
from longgrpo.train.shards import owners_of
from testing.planned_runs import MODELS

EXAMPLES = MODELS.parent
RECIPES = {
    "llama-3.1-8b-20k-80gb": "h100-80",
    "llama-3.1-8b-20k-24gb": "rtx4090-24",
    "phi-4-16k-80gb": "h100-80",
    "qwen2.5-1.5b-5gb": "5",
    "qwen3-8b-128k-80gb": "h100-80",
    "qwen3-8b-512k-80gb": "h100-80",
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)  # as recipes name their models


def run(capsys, *arguments):
    status = main(["plan", *map(str, arguments)])
    return status, capsys.readouterr()


@pytest.mark.parametrize(("name", "card_name"), RECIPES.items())
def test_a_recipe_fits_its_card(name, card_name):
    forecast = Forecast(load_config(EXAMPLES / f"{name}.yaml"), card_name)
    assert forecast.fits(), forecast.text()


def test_json_says_what_the_text_says(capsys):
    status, out = run(capsys, EXAMPLES / "llama-3.1-8b-20k-80gb.yaml", "--card", "h100-80", "--json")
    plan = json.loads(out.out)
    assert status == 0
    assert plan["fits"] is True
    for phase in ("rollout", "scoring", "training"):
        host = sum(size for name, size in plan[phase]["terms"].items() if name.endswith("(host)"))
        assert plan[phase]["host_bytes"] == host
        assert plan[phase]["device_bytes"] == sum(plan[phase]["terms"].values()) - host
    _, out = run(capsys, EXAMPLES / "llama-3.1-8b-20k-80gb.yaml", "--card", "h100-80")
    assert f"{plan['training']['device_bytes'] / GIB:.2f} GiB" in out.out


def test_changes_lead_to_a_config_that_fits(capsys, tmp_path):
    """Each change is applied as the command line takes it, and gives the peak that was promised."""
    arguments = [
        EXAMPLES / "llama-3.1-8b-20k-80gb.yaml", "--train.token_budget", 163840, "--memory.offload", "false",
        "--memory.tiled_mlp", "false", "--rollout.release_kv_cache", "false",
    ]  # fmt: skip
    status, out = run(capsys, *arguments, "--card", "40", "--json")
    plan = json.loads(out.out)
    assert (status, plan["fits"]) == (1, False)
    needs = [change["needs_bytes"] for change in plan["changes"]]
    assert needs == sorted(needs, reverse=True)
    assert [change["fits"] for change in plan["changes"]] == [False] * (len(needs) - 1) + [True]
    for change in plan["changes"]:
        for setting in change["change"].split(" and "):
            key, value = setting.split(": ")
            arguments += [f"--{key}", value]
    status, out = run(capsys, *arguments, "--card", "40", "--json")
    assert status == 0
    assert max(json.loads(out.out)[name]["device_bytes"] for name in ("rollout", "scoring", "training")) == needs[-1]


def test_a_card_too_small_for_the_weights(capsys):
    status, out = run(capsys, EXAMPLES / "llama-3.1-8b-20k-80gb.yaml", "--card", "t4-16", "--model.dtype", "float32")
    assert status == 1
    assert "no change of the config is enough" in out.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--card", "b900"], r"card 'b900': known cards are h100-80, h200-141, rtx4090-24, t4-16; or give its memory"),
        (["--card", "-3"], "card '-3'"),
        (["--rollout.max_model_len", "200000"], "the positions of this llama model reach 131072"),
        (["--rollout.kv_cache_gib", "2"], "one sequence of 20480 tokens needs 2.50 GiB"),
        (["--ranks", "2x"], "--ranks 2x: give a number, such as 8, or machines x ranks, such as 2x8"),
        (["--ranks", "64"], "train.prompts_per_step = 8, and there are 64 ranks"),
        (["--ranks", "2", "--bandwidth", "0"], "--bandwidth 0"),
        (["--model.path", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_bad_input(capsys, arguments, message):
    import re

    status, out = run(capsys, EXAMPLES / "llama-3.1-8b-20k-80gb.yaml", *arguments)
    assert status == 2
    assert re.search(message, out.err)


FULL = [EXAMPLES / "llama-3.1-8b-20k-80gb.yaml", "--lora", "null", "--train.prompts_per_step", 16, "--card", "h100-80"]


def test_ranks_share_masters_and_moments_out(capsys):
    """Whole parameters: a rank has no more than its part and the largest of them, the head."""
    plans = {}
    for ranks in ("1", "8", "2x8"):
        _, out = run(capsys, *FULL, "--ranks", ranks, "--json")
        plans[ranks] = json.loads(out.out)
    one = plans["1"]["training"]["terms"]
    assert "ranks" not in plans["1"]
    for text, ranks in (("8", 8), ("2x8", 16)):
        terms, exchange = plans[text]["training"]["terms"], plans[text]["ranks"]
        for term in ("float32 masters", "optimizer"):
            largest = (one[term] // one["float32 masters"]) * 4 * 128256 * 4096
            assert one[term] / ranks <= terms[term] <= one[term] / ranks + largest
        assert terms["gradients"] == one["gradients"]
        assert exchange["ranks"] == ranks
        assert exchange["machine_host_bytes"] == 8 * plans[text]["training"]["host_bytes"]
        assert exchange["sent_bytes"] == one["gradients"] * 3 // 2  # float32 gradients, and bfloat16 weights
        assert exchange["sent_seconds"] == exchange["sent_bytes"] / 25e9
    _, out = run(capsys, *FULL, "--ranks", "2x8", "--bandwidth", "50")
    assert "host memory of a machine's 8: " in out.out
    assert f"{exchange['sent_bytes'] / 50e9:.2g} s at 50 GB/s" in out.out


def test_ranks_have_an_adapter_each(capsys):
    plans = [
        json.loads(run(capsys, EXAMPLES / "llama-3.1-8b-20k-80gb.yaml", *ranks, "--card", "h100-80", "--json")[1].out)
        for ranks in ([], ["--ranks", "4"])
    ]
    one, four = (plan["training"]["terms"] for plan in plans)
    assert four == one
    assert plans[1]["ranks"]["sent_bytes"] == 2 * one["gradients"] * 3 // 4  # around a ring twice, but for the own part


def test_the_planned_share_is_that_of_the_ranks(tiny_model):
    """The owners of a model's own parameters, against the plan from its config.json."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for ranks in (2, 3, 5):
        owners = owners_of(dict(model.named_parameters()), ranks)
        loads = [sum(p.numel() for name, p in model.named_parameters() if owners[name] == one) for one in range(ranks)]
        assert max(loads) == pytest.approx(owned(model_shape(str(tiny_model)), ranks), rel=0.02)


def test_cards():
    assert card("h100-80").memory == 81559 << 20
    assert card("24").memory == 24 * GIB
    assert all(entry.memory > 14 * GIB for entry in CARDS.values())


def test_targets():
    """In training, without the CUDA context, which torch's allocator does not see."""

    def peak(name, phase="training", **terms):
        plan = Forecast(load_config(EXAMPLES / f"{name}.yaml"), "h100-80").plan
        phase = getattr(plan, phase)
        return phase.device_bytes - phase.terms["context"], phase.host_bytes

    device, host = peak("qwen3-8b-128k-80gb")
    assert device < 80e9
    assert host == pytest.approx(36 * 131072 * 4096 * 2, rel=0.1)
    device, host = peak("qwen3-8b-512k-80gb")
    assert device < 60 * GIB
    assert host == pytest.approx(36 * 524288 * 4096 * 2, rel=0.1)
    small = Forecast(load_config(EXAMPLES / "qwen2.5-1.5b-5gb.yaml"), "5").plan
    assert small.device_bytes <= 5 * GIB


def test_train_refuses_what_cannot_fit(tmp_path, capsys):
    options = {"rollout.kv_cache_gib": 10_000, "rollout.engine": "vllm", "output_dir": tmp_path / "run"}
    given = [f"--{key}={value}" for key, value in options.items()]
    assert main(["train", str(EXAMPLES / "smollm2-sums.yaml"), *given]) == 2
    err = capsys.readouterr().err
    assert "does not fit" in err
    assert "--force trains all the same" in err
    assert not (tmp_path / "run").exists()


def test_autotune(capsys, monkeypatch, tmp_path):
    """On the CPU a small head; the second time it is taken from the cache."""
    monkeypatch.setenv("LONGGRPO_CACHE", str(tmp_path))
    command = ["autotune", str(EXAMPLES / "qwen2.5-1.5b-5gb.yaml"), "--tokens", "16"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert first.splitlines()[-1].startswith("tiles of the head (1536 x 151936 bfloat16, ")
    assert main(command) == 0
    assert capsys.readouterr().out == first

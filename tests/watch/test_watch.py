"""The findings as functions of metrics, at their bounds; when the watch says that they begin and end."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest

from longgrpo.config.run import build_config
from longgrpo.config.watch import WatchConfig
from longgrpo.errors import ConfigError
from longgrpo.watch import Facts, History, Watch
from testing import ROOT

FINDINGS = WatchConfig().findings
FACTS = Facts(
    max_completion_length=100,
    max_grad_norm=1.0,
    weights={"right": 1.0, "form": 0.1, "logged": 0.0},
    tops={"right": 1.0},
)
GOOD = {
    "reward/mean": 0.5, "reward/min": 0.0, "reward/max": 1.0,
    "reward/right/min": 0.0, "reward/right/max": 1.0, "reward/right/correlation": 0.9,
    "reward/form/min": 0.0, "reward/form/max": 1.0, "reward/form/correlation": 0.4,
    "reward/logged/min": 0.0, "reward/logged/max": 0.0, "reward/logged/correlation": None,
    "groups_with_spread": 0.6, "entropy": 1.0, "completion_length/mean": 50.0, "completion_length/truncated": 0.05,
    "completions/alike": 0.3, "completions/repetition": 0.01, "advantages/positive": 0.45, "grad_norm": 0.5,
    "learning_rate": 1e-5, "reverse_kl": 0.01, "clip_low": 0.0, "clip_high": 0.0, "importance_cut": 0.0,
    "engine_trainer_logprob_diff_mean": 1e-5,
}  # fmt: skip

# Metrics from step 11 on, and the finding that they give; None: none, just inside of the bound.
CASES = [
    ("truncated", {"completion_length/truncated": 0.31}, {"completion_length/truncated": 0.19}),
    ("truncated", {"completion_length/truncated": 0.21}, {"completion_length/truncated": 0.19}),
    ("length_drift", {"completion_length/mean": 91.0}, {"completion_length/mean": 89.0}),
    ("length_drift", {"completion_length/mean": 4.9}, {"completion_length/mean": 5.1}),
    ("identical_replies", {"completions/alike": 0.96}, {"completions/alike": 0.94}),
    ("repetition", {"completions/repetition": 0.32}, {"completions/repetition": 0.3}),
    ("no_spread", {"groups_with_spread": 0.12}, {"groups_with_spread": 0.13}),
    ("constant_reward", {"reward/form/min": 0.0, "reward/form/max": 0.0}, {"reward/form/min": 1.0}),
    ("constant_reward", {"reward/right/max": 0.0}, {"reward/right/min": 1.0}),
    ("unrelated_reward", {"reward/form/correlation": 0.05}, {"reward/form/correlation": 0.11}),
    ("one_sided_advantages", {"advantages/positive": 1.0}, {"advantages/positive": 0.99}),
    ("one_sided_advantages", {"advantages/positive": 0.0}, {"advantages/positive": 0.01}),
    ("entropy_collapse", {"entropy": 0.049}, {"entropy": 0.051}),
    ("kl_runaway", {"reverse_kl": 1.1}, {"reverse_kl": 0.9}),
    ("kl_runaway", {"reverse_kl": None, "kl": 1.1}, {"reverse_kl": None, "kl": 0.9}),
    ("clipped_gradient", {"grad_norm": 10.1}, {"grad_norm": 9.9}),
    ("clipped_ratio", {"clip_low": 0.2, "clip_high": 0.11}, {"clip_low": 0.2, "clip_high": 0.09}),
    ("importance_cut", {"importance_cut": 0.06}, {"importance_cut": 0.04}),
    (
        "engine_drift",
        {"engine_trainer_logprob_diff_mean": 1.1e-3},
        {"engine_trainer_logprob_diff_mean": 0.9e-3},
    ),
    ("zero_learning_rate", {"learning_rate": 0.0}, {"learning_rate": 1e-12}),
]


def watched(*changes, facts=FACTS, **config):
    """The events of a run whose steps have GOOD metrics but for these; None: as GOOD."""
    watch = Watch(WatchConfig(**config).findings, facts)
    rows = [{"step": step, **GOOD, **(change or {})} for step, change in enumerate(changes, 1)]
    return [(e.step, e.name, e.begins) for row in rows for e in watch.observe(row)]


@pytest.mark.parametrize(("name", "sick", "well"), CASES)
def test_a_finding_begins_within_ten_steps_ends_once_and_no_other_begins(name, sick, well):
    (step, *begins), (_, *ends) = watched(*[None] * 10, *[sick] * 20, *[None] * 30)
    assert (begins, ends) == ([name, True], [name, False])
    assert 10 < step <= 20
    assert watched(*[None] * 10, *[well] * 30) == []


def test_every_finding_has_a_case_above_or_a_test_below():
    assert set(FINDINGS) == {name for name, *_ in CASES} | {"held_out_falls"}


def test_a_single_step_is_no_finding_but_a_share_that_is_far_beyond():
    for name, sick, _ in CASES:
        if name not in ("repetition", "kl_runaway"):  # their means need no second step
            assert all(
                found != name for _, found, _ in watched(*[None] * 10, sick, *[None] * 20) if name != "truncated"
            )


@pytest.mark.parametrize("lost", [{"entropy": 0.0}, {"groups_with_spread": 0.0}, {"completions/alike": 1.0}])
def test_what_is_lost_because_replies_are_right_is_no_finding(lost):
    assert watched(*[None] * 10, *[{**lost, "reward/mean": 0.91}] * 20) == []
    assert len(watched(*[None] * 10, *[{**lost, "reward/mean": 0.85}] * 20)) == 1


def test_the_top_is_the_best_that_the_run_has_seen():
    best, later = {"reward/max": 4.0}, {"reward/max": 1.0, "reward/mean": 1.0, "reward/min": 1.0}
    collapsed = later | {"groups_with_spread": 0.0, "entropy": 0.0, "completions/alike": 1.0}
    names = {name for _, name, _ in watched(best, *[None] * 9, *[collapsed] * 10)}
    assert names == {"no_spread", "entropy_collapse", "identical_replies"}
    assert watched(*[None] * 10, *[collapsed] * 10) == []


def test_a_reward_that_never_differed_is_below_its_top():
    dead = {"reward/mean": 0.0, "reward/max": 0.0, "reward/right/max": 0.0, "groups_with_spread": 0.0}
    assert {name for _, name, _ in watched(*[dead] * 10)} == {"no_spread", "constant_reward"}


def test_a_reward_that_is_always_earned_is_no_finding_once_it_was_not_or_if_its_top_is_known():
    form = {"reward/form/min": 1.0}
    assert watched(*[None] * 2, *[form] * 20) == []
    assert {name for _, name, _ in watched(*[form] * 20)} == {"constant_reward"}
    assert watched(*[{"reward/right/min": 1.0}] * 20) == []


def test_a_penalty_that_nobody_pays_is_no_finding():
    facts = Facts(max_completion_length=100, max_grad_norm=1.0, weights={"form": -0.5})
    assert watched(*[{"reward/form/max": 0.0}] * 20, facts=facts) == []
    paid = [None, *[{"reward/form/min": 1.0}] * 20]
    assert [name for _, name, _ in watched(*paid, facts=facts)] == ["constant_reward"]


def test_each_reward_function_begins_and_ends_by_itself():
    right, form = {"reward/right/max": 0.0}, {"reward/form/max": 0.0}
    watch = Watch({"constant_reward": FINDINGS["constant_reward"]}, FACTS)
    rows = [GOOD, *[right] * 4, *[right | form] * 8, *[form] * 13, *[GOOD] * 10]
    events = [e for step, row in enumerate(rows, 1) for e in watch.observe({"step": step, **GOOD, **row})]
    assert [(e.metric, e.begins) for e in events] == [
        ("watch/constant_reward/right", True), ("watch/constant_reward/form", True),
        ("watch/constant_reward/right", False), ("watch/constant_reward/form", False),
    ]  # fmt: skip
    assert watch.standing == []


def test_what_comes_and_goes_has_not_ended():
    sick = [{"completion_length/truncated": 0.6}] * 5
    assert watched(*[None] * 10, *(sick + [None] * 5) * 6)[1:] == []
    assert [begins for *_, begins in watched(*[None] * 10, *(sick + [None] * 20) * 2)] == [True, False, True, False]


def test_metrics_that_are_missing_or_not_finite_are_no_finding():
    assert watched(*[dict.fromkeys(GOOD)] * 20) == []
    watch = Watch(FINDINGS, FACTS)
    assert [event for step in range(20) for event in watch.observe({"step": step})] == []


def evaluated(rewards, accuracies, every=3):
    """Events of a run that is evaluated at every third step."""
    rows = []
    for step, reward in enumerate(rewards, 1):
        accuracy = {"eval/accuracy": accuracies[step // every - 1]} if step % every == 0 else {}
        rows.append({"reward/mean": reward, **accuracy})
    return watched(*rows)


def test_held_out_falls_while_the_reward_rises():
    rising, flat = [0.3 + 0.02 * step for step in range(30)], [0.5] * 30
    falling = [0.5, 0.55, 0.6, 0.55, 0.48, 0.42, 0.36, 0.3, 0.25, 0.2]
    (found,) = evaluated(rising, falling)
    assert found == (
        18,
        "held_out_falls",
        True,
    )  # 0.48 and 0.42 are below 0.5: step 9 was the best, 15 the first so low
    assert evaluated(flat, falling) == []
    assert evaluated(rising, sorted(falling)) == []
    assert evaluated(rising, [0.5, 0.6, 0.49, 0.6, 0.49, 0.6, 0.49, 0.6, 0.49, 0.6]) == []  # one alone is noise


def test_the_same_rows_give_the_same_events_whoever_begins_where():
    """As a resumed run does: from JSON, and only from what is on disk."""
    changes = [None] * 6 + [{"entropy": 0.01, "completion_length/truncated": 0.7}] * 9 + [None] * 12
    rows = [json.loads(json.dumps({"step": step, **GOOD, **(c or {})})) for step, c in enumerate(changes, 1)]
    whole = Watch(FINDINGS, FACTS)
    events = [whole.observe(row) for row in rows]
    assert sum(map(len, events)) == 4
    for cut in range(len(rows)):
        resumed = Watch(FINDINGS, FACTS)
        for row in rows[:cut]:
            resumed.observe(row)
        assert [resumed.observe(row) for row in rows[cut:]] == events[cut:]
        assert resumed.standing == whole.standing


def test_bounds_and_switches():
    sick = [None] * 10 + [{"completion_length/truncated": 0.35}] * 10
    assert len(watched(*sick)) == 1
    loose = dataclasses.replace(FINDINGS["truncated"], share=0.5, rise=0.5)
    assert watched(*sick, truncated=loose) == []
    assert watched(*sick, truncated=None) == []
    assert watched(*sick, enabled=False) == []


def test_history_looks_no_further_back_than_its_steps():
    history = History(FACTS)
    for step in range(1, 300):
        history.add({"step": step, "x": step, "y": step if step % 2 else None})
    assert history.last("x", 3) == [297, 298, 299]
    assert history.last("y", 4) == [297, 299]
    assert history.last("z", 4) == []
    assert history.start("x") == 3


# ---- the config


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        ({"truncatd": {}}, "unknown key 'watch.truncatd'; did you mean 'truncated'?"),
        ({"truncated": {"shar": 0.5}}, "unknown key 'watch.truncated.shar'; did you mean 'share'?"),
        ({"truncated": {"share": "many"}}, "watch.truncated.share = 'many'"),
        ({"truncated": {"share": 0}}, "watch.truncated: share = 0.0: must be a number above 0"),
        ({"truncated": {"steps": 1000}}, "watch.truncated: steps = 1000: the watch keeps the last 100; take fewer"),
        ({"stop_on": ["entropy_colapse"]}, "stop_on names 'entropy_colapse', which is not looked for; did you mean"),
        ({"stop_on": ["truncated"], "truncated": None}, "stop_on names 'truncated', which is not looked for"),
        ({"stop_on": ["truncated"], "enabled": False}, "stop_on needs the watch"),
    ],
)
def test_what_is_unknown_is_refused_by_name(watch, message):
    tree = {"model": {"path": "model"}, "task": {"name": "chain_sum"}, "rewards": [{"function": "exact_answer"}]}
    with pytest.raises(ConfigError) as refused:
        build_config(tree | {"watch": watch})
    assert message in str(refused.value)


# ---- the words


def test_every_finding_explains_itself():
    for name, finding in FINDINGS.items():
        assert all(len(text.split()) >= 5 for text in (inspect.getdoc(type(finding)), finding.WHY, finding.CURE)), name


def test_the_page_is_the_table():
    from testing import load

    docs = load(ROOT / "scripts" / "healthy_run_docs.py")
    page = (ROOT / "docs" / "healthy-run.md").read_text()
    assert page == docs.render(), "python scripts/healthy_run_docs.py"

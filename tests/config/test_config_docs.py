"""docs/config.md is what the dataclasses say."""

import dataclasses

from longgrpo.config.run import TrainConfig
from testing import ROOT, load

docs = load(ROOT / "scripts" / "config_docs.py")


def groups():
    return [group for hint in docs.hints(TrainConfig).values() for group in docs.dataclasses_in(hint)]


def test_the_page_is_up_to_date():
    assert docs.PAGE.read_text() == docs.render(), "python scripts/config_docs.py"


def test_every_field_is_described():
    for group in [*groups(), TrainConfig]:
        described = docs.field_docs(group)
        nested = {name for name, hint in docs.hints(group).items() if docs.dataclasses_in(hint)}
        missing = [field.name for field in dataclasses.fields(group) if field.name not in {*described, *nested}]
        assert not missing, f"{group.__name__}: a string below the field says what it is"


def test_differences_from_trl_are_stated_with_our_defaults():
    page = docs.render()
    assert "| `train.betas` | `[0.9, 0.99]` | [0.9, 0.999] |" in page
    assert "| `learning_rate` | `float \\| None` | `null` | The learning rate; default: 1e-5 for an adapter" in page

"""What the page's script unpacks."""

from __future__ import annotations

import base64
import gzip
import json
import math
import os.path
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from longgrpo.report.packed import by_halves, packed, shared_beginning, shortened
from longgrpo.visible import visible

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(st.lists(st.text(max_size=20)), plain)
def test_what_is_packed_is_unpacked_and_visible(texts, value):
    text = packed({"texts": texts, "by": {one: value for one in texts}})
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")
    found = json.loads(gzip.decompress(base64.b64decode(text)))
    seen = [visible(one) for one in texts]
    assert found == {"texts": seen, "by": {one: value for one in seen}}


@given(st.lists(st.lists(st.sampled_from("ab\n"), max_size=8).map("".join), max_size=5))
def test_the_shared_beginning_is_whole_lines_of_all(prompts):
    shared = shared_beginning(prompts)
    assert all(prompt.startswith(shared) for prompt in prompts)
    assert shared == "" or shared.endswith("\n")
    common = os.path.commonprefix(prompts)  # noqa: RUF071
    assert len(set(prompts)) < 2 or shared.count("\n") == common.count("\n")


@settings(deadline=None)
@given(st.integers(0, 300))
def test_by_halves_names_all_and_begins_spread(count):
    order = by_halves(count)
    assert sorted(order) == list(range(count))
    for kept in range(2, count):
        widest = max(after - before for before, after in pairwise(sorted(order[:kept])))
        parts = 2 ** ((kept - 1).bit_length() - 1)  # into which all is cut by then
        assert widest <= math.ceil((count - 1) / parts)
    assert order[:1] == ([count - 1] if count else [])


def test_a_long_text_loses_its_middle():
    assert shortened("x" * 4000) == "x" * 4000
    assert shortened("a" * 3000 + "b" * 3000) == "a" * 2000 + "\n[… 2,000 characters …]\n" + "b" * 2000

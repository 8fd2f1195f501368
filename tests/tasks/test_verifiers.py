"""Right and wrong pairs for every built-in that compares a reply with an answer."""

import datetime

import pytest

from longgrpo.tasks.builtin_rewards import exact_answer, graded_error, math_answer, numeric_answer, score_answer

BARE_LATEX = [  # answers as the MATH columns have them, without dollars
    r"\frac{1}{2}", r"\dfrac{3}{4}", r"-\frac{2}{3}", r"3\sqrt{13}", r"11\sqrt2", r"\sqrt{2}", r"2^{10}", r"\pi",
    r"\frac{\pi}{4}", r"x^2+1", "p - q", "6 + 9i", r"\left(3, \frac{\pi}{2}\right)", r"(-\infty, 2]\cup[3,\infty)",
    r"x \in [-2,7]", "[1,2)", r"\{1,2\}", "1,-2", r"10\%", r"\$18.90", r"5\text{ cm}", r"90^\circ", r"\text{Evelyn}",
    r"\text{(C)}", "even", "C", r"\begin{pmatrix}1\\2\end{pmatrix}", "x=5", "1,2", "12,34", "1{,}000", r"1,\!234", ".5",
    "\u22123", "1/2", r"\log_2 10",
]  # fmt: skip


@pytest.mark.parametrize("answer", BARE_LATEX)
def test_bare_latex_is_right_in_whatever_delimiters_the_reply_has(answer):
    said = [rf"so \boxed{{{answer}}}", f"we get ${answer}$", rf"it is \({answer}\) in the end", answer]
    assert math_answer(said, answer=[answer] * 4) == [1, 1, 1, 1]
    in_dollars = f"${answer}$"
    assert math_answer(said, answer=[in_dollars] * 4) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("answer", "reply", "value"),
    [
        # what a part of the answer, or of the reply, is worth
        (r"3\sqrt{13}", r"\boxed{3}", 0), (r"2^{10}", r"\boxed{2}", 0), (r"2^{10}", r"\boxed{1024}", 1),
        ("3", r"so the answer is 3\sqrt{13}.", 0), ("2", "so it is 2^{10}", 0), (r"6 + 9i", r"\boxed{9}", 0),
        (r"3\sqrt{13}", r"so the answer is 3\sqrt{13}.", 1), (r"\frac{a + b}{2}", r"we find \frac{a + b}{2}, then", 1),
        (r"5\text{ cm}", r"\boxed{5}", 1), (r"\sqrt{2}", r"\boxed{1.41}", 0), (r"\frac{1}{3}", r"\boxed{0.333333}", 1),
        # signs and forms of a number
        ("-3", "\u22123", 1), ("-3", r"\boxed{3}", 0), ("3", "$\u22123$", 0), ("0.5", ".5", 1),
        ("1/2", r"\boxed{.5}", 1),
        ("7425000", "7,425,000", 1), ("1000", "1 000", 1), ("1,22", "1.22", 1), ("1,2", r"\boxed{2,1}", 1),
        ("1,2", r"\boxed{1}", 0), ("1,234", r"\boxed{1234}", 1), (r"28\%", "28 percent", 1), ("50%", r"\boxed{0.5}", 1),
        ("50%", r"\boxed{5}", 0), (r"\$18.90", r"\boxed{18.9}", 1),
        # intervals, sets, order
        ("[1,2)", r"\boxed{[1,2]}", 0), ("(1,2)", r"\boxed{(2,1)}", 0), (r"\{1,2\}", r"\boxed{\{2,1\}}", 1),
        ("1,-2", r"\boxed{-2, 1}", 1), (r"x \in [-2,7]", r"\boxed{[-2,7]}", 1),
        # text, equations, prose
        (r"\text{Evelyn}", r"\boxed{\text{Carla}}", 0), ("even", r"\boxed{\text{odd}}", 0), ("x=5", r"\boxed{5}", 1),
        ("48 + 24 = 72 clips in all\n#### 72", r"\boxed{72}", 1), ("so the answer is 1/2", r"\boxed{0.5}", 1),
        ("10 square feet", r"\boxed{10}", 1), (r"$\frac{1}{2}$", r"\boxed{0.5}", 1),
        # nothing to compare with
        ("no number", r"\boxed{3}", None), ("", r"\boxed{3}", None), (None, r"\boxed{\text{None}}", None),
        (" ", "", None), ("5", "", 0), ("5", "I do not know", 0),
        (5, r"\boxed{5}", 1), (0.1, r"\boxed{\frac{1}{10}}", 1),
    ],
)  # fmt: skip
def test_math_answer(answer, reply, value):
    assert math_answer([reply], answer=[answer]) == [value]


NUMBERS = [
    ("5", "it is 5.", 1), ("-5", "\u22125", 1), ("5", "\u22125", 0), ("-5", "x=-5", 1), ("5", "10-5", 1),
    ("0.5", ".5", 1), ("-0.5", "-.5", 1), ("5", ".5", 0), ("1024", "1,024", 1), ("1,024", "1024.0", 1),
    ("1{,}024", r"\boxed{1,\!024}", 1), ("1/2", "0.5", 1), ("1/2", "2", 0), ("2", "1/2", 0), (r"\frac{1}{2}", "2", 0),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}", 1), ("-1/2", r"-\frac{1}{2}", 1), ("50%", "50 %", 1), ("25", "25 cm2", 1),
    ("25", "25 cm^2", 1), ("1e-05", "0.00001", 1), (1e-05, "1e-5", 1), ("5", "1e-5", 0), ("100000", "1e5", 1),
    ("12345678901234567891", "12345678901234567890", 0), ("9" * 5000, "9" * 5000, 1), ("9" * 5000, "9" * 4999, 0),
    ("#### 72", "72", 1), ("1", "1/0", 0), ("1/0", "1", None), ("7", "", 0), ("seven", "7", None), (None, "7", None),
    ("", "7", None), ("None", "7", None), (7, "7", 1), (7.0, "7", 1), (True, "1", None), (float("nan"), "7", None),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reply", "value"), NUMBERS)
def test_numeric_answer(answer, reply, value):
    assert numeric_answer([reply], answer=[answer]) == [value]


def test_a_tolerance_is_the_decimal_that_the_config_says():
    replies = ["1.3", "1.31", "0.7", "1 or 1.2999"]
    assert numeric_answer(replies, tolerance=0.3, answer=["1"] * 4) == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("answer", "reply", "value"),
    [
        ("7", "7", 0.5), ("7", "9", 0.5 / 3), ("-7", "\u22127", 0.5), ("\u22127", "-7", 0.5), (".5", "0.5", 0.5),
        ("1,024", "1024", 0.5), (7, "8", 0.25), (1e-05, "0.00001", 0.5), ("7", "none", 0), ("7", "9" * 5000, 0),
        ("cba", "7", None), (None, "7", None), ("", "7", None), ("7 apples", "7", None),
    ],
)  # fmt: skip
def test_graded_error(answer, reply, value):
    assert graded_error([reply], answer=[answer]) == [pytest.approx(value) if value is not None else None]


@pytest.mark.parametrize(
    ("answer", "reply", "value"),
    [("7", " 7\n", 1), ("7\n", "7", 1), ("7", "7.", 0), (7, "7", 1), ("a b", "a  b", 0), (None, "None", None),
     ("", "", None), ("None", "None", 1), (datetime.date(2026, 1, 2), "2026-01-02", 1)],
)  # fmt: skip
def test_exact_answer(answer, reply, value):
    assert exact_answer([reply], answer=[answer]) == [value]


@pytest.mark.parametrize(
    ("answer", "reply", "value"),
    [("7", "7", 1), ("-7", "\u22127", 1), ("7", "-7", 0), ("7", "10-7", 1), ("7", "21/7", 0), ("7", "7 cm2", 1),
     ("7", "+7", 1), ("7", "seven", 0)],
)  # fmt: skip
def test_score_answer(answer, reply, value):
    assert score_answer([reply], [answer], [{"source_dataset": "chain_sum"}]) == [value]

"""Sums and differences of numbers of three digits, and a calculator that a model can call for them."""

import random
import re
import zlib

SYSTEM = "You have a calculator: write [calc: EXPRESSION] and its result follows."
EXAMPLE = (214, "+", 571)
ARITHMETIC = re.compile(r"\s*(-?\d{1,9})\s*([-+*])\s*(-?\d{1,9})\s*")


def calculator(expression: str) -> str:
    """Calculates the sum, the difference or the product of two whole numbers.

    Args:
        expression: such as 12 + 30
    """
    found = ARITHMETIC.fullmatch(expression)
    if not found:
        raise ValueError(f"cannot calculate {expression!r}: write two numbers with +, - or * between them")
    a, operator, b = int(found[1]), found[2], int(found[3])
    return str(a + b if operator == "+" else a - b if operator == "-" else a * b)


def rows(split: str, size: int = 4000, seed: int = 0) -> list[dict]:
    """`size` problems; those of a quarter of all expressions are held out."""
    draw, found = random.Random(f"{seed} {split}"), []
    while len(found) < size:
        a, operator, b = draw.randint(100, 999), draw.choice("+-"), draw.randint(100, 999)
        if (zlib.crc32(f"{a}{operator}{b}".encode()) % 4 == 0) == (split == "held out"):
            found.append(row(a, operator, b))
    return found


def row(a: int, operator: str, b: int) -> dict:
    """The question after one worked example, as turns."""
    one, two = " ".join(map(str, EXAMPLE)), f"{a} {operator} {b}"
    result = calculator(one)
    turns = [
        ("system", SYSTEM),
        ("user", f"What is {one}?"),
        ("assistant", f"[calc: {one}]"),
        ("tool", result),
        ("assistant", result),
        ("user", f"What is {two}?"),
    ]
    return {"prompt": [{"role": role, "content": text} for role, text in turns], "answer": calculator(two)}

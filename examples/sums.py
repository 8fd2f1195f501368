"""Sums of two numbers below 100, each a conversation with one worked example; what is held out is never trained on."""

import random
import zlib

EXAMPLE = (41, 19)


def rows(split: str, operators: str = "+", seed: int = 0) -> list[dict]:
    """Every expression once, in random order; a quarter is held out, 3 + 4 together with 4 + 3."""
    expressions = [(a, operator, b) for a in range(100) for operator in operators for b in range(100)]
    random.Random(seed).shuffle(expressions)
    return [
        row(*expression)
        for expression in expressions
        if is_held_out(*expression) == (split == "held out") and {expression[0], expression[2]} != set(EXAMPLE)
    ]


def is_held_out(a: int, operator: str, b: int) -> bool:
    return zlib.crc32(f"{min(a, b)}{operator}{max(a, b)}".encode()) % 4 == 0


def row(a: int, operator: str, b: int) -> dict:
    example, answer = solved(EXAMPLE[0], operator, EXAMPLE[1])
    question, right = solved(a, operator, b)
    turns = [("system", "You add numbers."), ("user", example), ("assistant", answer), ("user", question)]
    prompt = [{"role": role, "content": text} for role, text in turns]
    return {"prompt": prompt, "answer": right}


def solved(a: int, operator: str, b: int) -> tuple[str, str]:
    """41 + 19 =, and the reply to it: 41 + 19 = 60."""
    question = f"{a} {operator} {b} ="
    return question, f"{question} {a + b if operator == '+' else a - b}"

"""What cannot be seen is shown as a sign, wherever text of others is shown."""

from __future__ import annotations

import logging
import subprocess
import sys
import unicodedata

import pytest

from longgrpo import cli, commands
from longgrpo.errors import ConfigError
from longgrpo.visible import visible

HIDDEN = {
    "\x1b[2J": "␛[2J", "\x00": "␀", "\r": "␍", "\x7f": "␡", "\x9b": "⟨U+009B⟩", "\u00ad": "⟨U+00AD⟩",
    "\u200b": "⟨U+200B⟩", "\u200d": "⟨U+200D⟩", "\u2028": "⟨U+2028⟩", "\u2029": "⟨U+2029⟩", "\u202e": "⟨U+202E⟩",
    "\u2060": "⟨U+2060⟩", "\u2066": "⟨U+2066⟩", "\ufeff": "⟨U+FEFF⟩", "\ufe0f": "⟨U+FE0F⟩", "\u3164": "⟨U+3164⟩",
    "\U000e0041": "⟨U+E0041⟩", "\U000e0100": "⟨U+E0100⟩", "\ud800": "⟨U+D800⟩", "\u034f": "⟨U+034F⟩",
}  # fmt: skip


@pytest.mark.parametrize("text", HIDDEN)
def test_signs(text):
    assert visible(f"a{text}b") == f"a{HIDDEN[text]}b"


def test_no_character_is_left_that_acts():
    shown = visible("".join(map(chr, range(sys.maxunicode + 1))))
    assert {unicodedata.category(character) for character in set(shown) - {"\n", "\t"}}.isdisjoint(
        {"Cc", "Cf", "Cs", "Zl", "Zp"}
    )
    shown.encode()  # no lone surrogate


def test_what_can_be_seen_stays():
    text = "Grüße, 世界! עברית العربية हिन्दी\n\tε ± ∑ 🙂 é"
    assert visible(text) == text


def test_an_error_quotes_with_signs():
    assert str(ConfigError("a\u202eb")) == f"{ConfigError(chr(0x202E))}".join("ab")


def test_errors_and_logs_of_the_command_line(monkeypatch, capsys):
    def fails(options, overrides):
        logging.getLogger("longgrpo").warning("a column %s", "x\u202ey")
        raise ConfigError("a value \x1b]0;title\x07\u00ad")

    monkeypatch.setattr(commands, "train", fails)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    assert cli.main(["train", "c.yaml"]) == 2
    error = capsys.readouterr().err
    assert "x⟨U+202E⟩y" in error
    assert "longgrpo: a value ␛]0;title␇⟨U+00AD⟩" in error


def test_a_name_of_a_file_reaches_the_terminal_as_signs(tmp_path):
    name = "c\x1b[31m\u202e.yaml"
    (tmp_path / name).write_text("a: 1\n")
    command = [sys.executable, "-m", "longgrpo.cli", "train", name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"\x1b" not in done.stderr + done.stdout
    assert "c␛[31m⟨U+202E⟩.yaml: 'model' is missing" in done.stderr.decode()

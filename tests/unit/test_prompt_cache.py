"""Prompt cache files on a fake engine: what comes back, what is refused, and what a crash leaves."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from serving import FakeEngine, fake_llm

from bitgen.errors import FileError
from bitgen.inference.prompt_cache import restore, save
from bitgen.inference.sampling import Sampling
from bitgen.inference.scheduler import Scheduler
from bitgen.inference.sequence import Request

PROMPT = tuple(259 + i % 29 for i in range(60))


def scheduler() -> Scheduler:
    return fake_llm(FakeEngine(batch=2), None).scheduler


def ask(house: Scheduler, owner: str = "", prompt: tuple[int, ...] = PROMPT) -> tuple[str, int]:
    """The text, and how many tokens of the prompt were computed."""
    sequence = house.submit(Request(prompt, 8, Sampling(seed=1), ignore_end=True, owner=owner))
    while sequence.finish is None:
        house.step()
    return sequence.text, sequence.computed


def test_a_prompt_comes_back_for_its_owner(tmp_path: Path) -> None:
    house, path = scheduler(), tmp_path / "cache"
    text, computed = ask(house, "a")
    ask(house, "b", PROMPT[::-1])
    assert computed == 60
    assert save(path, house, "m", [{"role": "user", "content": "hello"}]) == 2 * 67
    again = scheduler()
    assert restore(path, again, "m") == [{"role": "user", "content": "hello"}]
    assert ask(again, "a") == (text, 1)
    assert ask(again, "c") == (text, 60)
    small = fake_llm(FakeEngine(batch=1), None).scheduler  # the one that was used last is worth most
    restore(path, small, "m")
    assert ask(small, "b", PROMPT[::-1])[1] == 1


def test_a_file_that_is_not_whole_or_of_another_model_changes_nothing(tmp_path: Path) -> None:
    house, path = scheduler(), tmp_path / "cache"
    text, _ = ask(house)
    save(path, house, "m")
    with pytest.raises(FileError, match="is of another model"):
        restore(path, house, "n")
    with pytest.raises(FileError, match="cannot read"):
        restore(tmp_path / "nothing", house, "m")
    whole, rng = path.read_bytes(), random.Random(1)
    for _ in range(80):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        if len(damaged) == len(whole):
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        fresh = scheduler()
        try:
            restore(path, fresh, "m")
        except FileError:
            assert ask(fresh) == (text, 60)
        else:  # a letter of the owner or of a token that is not part of this prompt's start
            assert ask(fresh)[0] == text


def test_a_context_that_is_too_small_is_told(tmp_path: Path) -> None:
    house, path = scheduler(), tmp_path / "cache"
    ask(house)
    save(path, house, "m")
    engine = FakeEngine(batch=2, context=32)
    with pytest.raises(FileError, match="do not fit"):
        restore(path, fake_llm(engine, None).scheduler, "m")


def test_a_write_that_fails_leaves_the_file_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house, path = scheduler(), tmp_path / "cache"
    ask(house)
    save(path, house, "m")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left"):
        save(path, house, "m")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_kill_9_leaves_a_whole_file_and_the_next_save_tidies_up(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    support = Path(__file__).parents[1] / "support"
    code = (
        f"import sys; sys.path[:0] = [{str(support)!r}, {str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\nfrom test_prompt_cache import *\nhouse = scheduler()\nask(house)\n"
        f"while True: save(Path({str(path)!r}), house, 'm', [{{'content': 'x' * 5_000_000}}])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        end = time.monotonic() + 60
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    house = scheduler()
    restore(path, house, "m")
    assert ask(house)[1] == 1
    save(path, house, "m")
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]

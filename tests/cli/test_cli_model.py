"""The commands that run a model, from a file on disk through the compiled step."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from model_files import plain_model, preset_yaml, small_config, write_model
from text_models import piece_data

import bitgen
from bitgen.cli import main
from bitgen.cli.chat import _Lines
from bitgen.energy import open_source
from bitgen.errors import BitgenError, FileError, InterruptError, ToolchainError, UsageError
from bitgen.formats.config import ModelConfig, find_model
from bitgen.formats.open import open_model
from bitgen.inference import memory
from bitgen.inference.engine import Engine
from bitgen.inference.opening import find_library
from bitgen.inference.sequence import Sequence
from bitgen.inference.synthetic import random_weights
from bitgen.runtime import load

pytestmark = pytest.mark.slow


def config() -> ModelConfig:
    return small_config(vocab=len(piece_data().tokens), context=128, tied_head=False)


@pytest.fixture
def library(bundle: Path) -> Path:
    return bundle


@pytest.fixture
def model(tmp_path: Path, bitgen_home: Path) -> Path:
    """A GGUF file of random weights; packed weights go to an empty cache."""
    data = piece_data()
    metadata = {
        "tokenizer.ggml.tokens": list(data.tokens),
        "tokenizer.ggml.scores": data.scores,
        "tokenizer.ggml.token_type": data.types,
    }
    assert bitgen_home.name
    return write_model(tmp_path / "nonsense.gguf", plain_model(config()), metadata=metadata)


@pytest.fixture
def arguments(model: Path, library: Path) -> list[str]:
    return ["-m", str(model), "--library", str(library), "-t", "2"]


def out_of(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> tuple[str, str]:
    assert main(argv) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_run_prints_the_prompt_and_its_continuation(
    arguments: list[str], library: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = out_of(capsys, "run", *arguments, "-p", "the end", "-n", "9", "--seed", "5")
    with bitgen.LLM(model, library=library) as llm:
        expected = "".join(llm.generate("the end", max_tokens=9, seed=5))
    assert out == f"the end{expected}\n"
    for line in (
        "memory = ",
        "load time",
        "prompt eval time",
        "eval time",
        "sampling time",
        "total time",
        "seed = 5",
    ):
        assert line in err
    assert "running on untuned kernels; for faster ones: `bitgen tune" in err


def test_run_takes_the_flags_of_llama_and_bitnet_cpp(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    long = [
        "--prompt",
        "an end",
        "--n-predict",
        "6",
        "--ctx-size",
        "64",
        "--temperature",
        "0.5",
        "--seed",
        "1",
    ]
    short = ["-p", "an end", "-n", "6", "-c", "64", "-temp", "0.5", "-s", "1"]
    first, _ = out_of(capsys, "run", *arguments, *long, "--no-perf")
    second, _ = out_of(capsys, "run", *arguments, *short, "--top-k", "40", "--top-p", "0.95", "--lookup")
    assert first == second
    hidden, err = out_of(capsys, "run", *arguments, *short, "--no-display-prompt", "--no-perf")
    assert f"an end{hidden}" == first
    assert "eval time" not in err


def test_run_reads_prompts_from_files_and_standard_input(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("on a hand\n", encoding="utf-8")
    options = ["-n", "4", "--temp", "0"]
    expected, _ = out_of(capsys, "run", *arguments, "-p", "on a hand", *options)
    assert out_of(capsys, "run", *arguments, "-f", str(file), *options)[0] == expected
    for source in (["-f", "-"], []):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"on a hand\n")))
        assert out_of(capsys, "run", *arguments, *source, *options)[0] == expected
    escaped = out_of(capsys, "run", *arguments, "-e", "-p", r"a\n\\n\tb\q", "-n", "1")[0]
    assert escaped.startswith("a\n\\n\tb\\q")
    file.write_bytes(b"\xff")
    assert "not UTF-8" in out_of(capsys, "run", *arguments, "-f", str(file), code=FileError.exit_code)[1]


def test_run_says_when_the_context_is_full(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _, err = out_of(capsys, "run", *arguments, "-c", "16", "-n", "-1", "--ignore-eos", "-p", "the end")
    assert "the context of 16 positions is full; -c makes it larger" in err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["-p", "a", "-c", "999"], UsageError.exit_code, "the context must be 1 to 128 positions"),
        (["-p", "the end " * 99], UsageError.exit_code, "and the context holds 128: shorten it"),
        (["-p", "a", "--temp", "-1"], UsageError.exit_code, "temperature must be 0 or more"),
        (["-p", "a", "-n", "0"], UsageError.exit_code, "-n must be 1 or more, or -1 for no limit"),
        (["-p", "a\udcff"], UsageError.exit_code, "the text is not UTF-8 at character 1"),
        (["-p", "a", "-t", "0"], UsageError.exit_code, "threads must be 1 to 1024, not 0"),
        (["-p", "a", "--library", "no-such.so"], FileError.exit_code, "no-such.so: there is no such file"),
        (["-f", "no-such-file"], FileError.exit_code, "No such file"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = out_of(capsys, "run", *arguments, *options, code=code)
    line = next(line for line in err.splitlines() if message in line)
    assert line.startswith("bitgen: ")
    assert "Traceback" not in err
    assert out == ""  # not the prompt either


def test_a_model_that_is_not_there_is_one_line(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, says in (
        ("nothing.gguf", "nothing.gguf does not exist"),
        ("tinny", "'tinny' does not exist and is no model that ships: did you mean tiny or tiny_qwen3?"),
        ("3b", "3b is a preset, which has shapes and no weights"),
    ):
        argv = ("run", "-m", name, "--library", str(library), "-p", "a")
        _, err = out_of(capsys, *argv, code=FileError.exit_code)
        assert err.startswith(f"bitgen: {says}")
        assert err.count("\n") == 1


def test_ctrl_c_ends_a_run_with_its_timings(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitgen.inference.engine import Engine

    original, steps = Engine.forward, []

    def forward(self: Engine, *args: Any) -> Any:
        steps.append(0)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Engine, "forward", forward)
    out, err = out_of(
        capsys, "run", *arguments, "-p", "a", "-n", "50", "--ignore-eos", code=InterruptError.exit_code
    )
    assert out.startswith("a")
    assert "eval time" in err


def test_an_error_amid_a_text_is_a_line_of_its_own(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitgen.inference.engine import Engine

    def forward(*_: object) -> object:
        raise FileError("the model computes NaN or infinity")

    monkeypatch.setattr(Engine, "forward", forward)
    out, err = out_of(capsys, "run", *arguments, "-p", "a", code=FileError.exit_code)
    assert out == "a\n"
    assert err.splitlines()[-1] == "bitgen: the model computes NaN or infinity"


def test_chat_answers_line_by_line_and_knows_its_commands(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(*lines: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
        out, _ = out_of(capsys, "chat", *arguments, "-n", "3", "--temp", "0", "--stop", "\n", "--no-perf")
        return out.splitlines()

    once = talk("the end")
    assert len(once) == 1
    assert talk("the end", "/clear", "the end", "/exit", "never read") == once * 2
    assert talk("the \\", "end") == talk("the \\", "end", "")
    assert talk("/help", "") == []


def test_chat_goes_on_after_a_message_that_does_not_fit(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "the end " * 99 + "\nan end\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    out, err = out_of(
        capsys, "chat", *arguments, "-n", "3", code=UsageError.exit_code
    )  # nobody sees it on a pipe
    assert "the message has" in err
    assert len(out) > 1


def test_a_question_whose_answer_fails_is_not_remembered(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = bitgen.LLM.chat_prompt, []
    draw = Sequence.sample

    def chat_prompt(self: bitgen.LLM, messages: list[dict[str, str]]) -> object:
        calls.append(len(messages))
        return original(self, messages)

    def broken(self: Sequence, *rest: object) -> object:
        if len(calls) == 1:
            raise FileError("the model is damaged")
        return draw(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(bitgen.LLM, "chat_prompt", chat_prompt)
    monkeypatch.setattr(Sequence, "sample", broken)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the end\nan end\n")))
    _, err = out_of(capsys, "chat", *arguments, "-n", "3", code=FileError.exit_code)
    assert "bitgen: the model is damaged\n" in err
    assert calls == [1, 1]


def test_chat_goes_on_after_ctrl_c_before_an_answer(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = bitgen.LLM.chat_prompt, []

    def chat_prompt(self: bitgen.LLM, messages: list[dict[str, str]]) -> object:
        calls.append(len(messages))
        if len(calls) == 1:
            raise KeyboardInterrupt
        return original(self, messages)

    monkeypatch.setattr(bitgen.LLM, "chat_prompt", chat_prompt)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the end\nan end\n")))
    out, _ = out_of(capsys, "chat", *arguments, "-n", "3")
    assert out.startswith(" ...\n")
    assert calls == [1, 1]  # what was stopped is not part of the conversation


def test_a_terminal_that_lacks_a_character_gets_a_question_mark(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert main(["run", *arguments, "-p", "th\u00e9 end", "-n", "1"]) == 0
    assert shown.getvalue().startswith(b"th? end")


def test_run_with_cnv_is_a_chat(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for argv in (["run", "-cnv", "-p", "be an end"], ["chat", "-sys", "be an end"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the end\n")))
        texts.append(out_of(capsys, *argv, *arguments, "-n", "5", "--temp", "0")[0])
    assert texts[0] == texts[1]


def test_run_with_cnv_takes_the_system_message_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr("bitgen.cli.chat.converse", lambda _, system: asked.append(system))
    (tmp_path / "system").write_text("be an end\n")
    for more in (["-f", str(tmp_path / "system")], ["-e", "-p", "an\\tend"], []):
        out_of(capsys, "run", "-m", "tiny", "-cnv", *more)
    assert asked == ["be an end", "an\tend", None]
    cache = ["--prompt-cache", str(tmp_path / "cache")]
    _, err = out_of(capsys, "run", "-m", "tiny", "-cnv", *cache, code=UsageError.exit_code)
    assert "--prompt-cache is of one text" in err


def test_a_message_that_is_no_utf8_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"h\xe9\n"), "utf-8"))
    with pytest.raises(FileError, match="the message is not UTF-8 text"):
        _Lines().read()


def test_chat_templates_come_by_name_or_from_a_file(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ raise_exception('asked for') }}")
    for name, message in ((str(file), "asked for"), ("none", "no chat template 'none'")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n")))
        code = UsageError.exit_code if name == "none" else FileError.exit_code
        assert message in out_of(capsys, "chat", *arguments, "--chat-template", name, code=code)[1]


def test_perplexity_prints_its_windows_and_the_result(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("the end and the other end of the hand in the sand " * 8)
    argv = ["perplexity", *arguments, "-f", str(file), "-c", "32"]
    out, err = out_of(capsys, *argv, "--chunks", "3")
    title, head, rule, row = out.splitlines()
    assert (title, head.split()[:2], set(rule)) == ("perplexity", ["perplexity", "+/-"], {"-"})
    assert row.split()[2:] == ["3", "32", "45"]
    assert re.search(r"^perplexity [\d.]+ so far: 100%$", err, re.MULTILINE)
    (found,) = json.loads(out_of(capsys, *argv, "-o", "json")[0])["perplexity"]
    assert found["context"] == 32
    assert found["tokens"] == 15 * found["windows"]
    logits = str(tmp_path / "m.logits")
    assert (
        out_of(capsys, *argv, "--chunks", "2", "--save-logits", logits)[0].splitlines()[3].split()[2] == "2"
    )
    for other in (logits, arguments[arguments.index("-m") + 1]):
        out, _ = out_of(capsys, *argv, "--chunks", "2", "--against", other)
        assert out.splitlines()[3].split()[-3:] == ["0.000e+00", "0.0e+00", "100.000"]
    file.write_text("short")
    assert "two windows of 32" in out_of(capsys, *argv, code=UsageError.exit_code)[1]


def test_bench_times_prompts_steps_and_batches(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lists = ["-p", "8,0", "-n", "4", "-b", "1,3", "-t", "1,2", "-r", "2", "-o", "json"]
    out, _ = out_of(capsys, "bench", *arguments, *lists)
    rows = json.loads(out)["bench"]
    assert [(r["test"], r["batch"], r["threads"]) for r in rows] == [
        (test, batch, threads) for threads in (1, 2) for test, batch in (("pp8", 1), ("tg4", 1), ("tg4", 3))
    ]
    assert all(row["avg_ts"] > 0 and row["stddev_ts"] >= 0 for row in rows)
    assert len({row["streamed_mib"] for row in rows}) == 1
    deep = ["-p", "8", "-n", "4", "-d", "0,64", "-b", "2", "-t", "1", "-r", "1", "-o", "json"]
    rows = json.loads(out_of(capsys, "bench", *arguments, *deep)[0])["bench"]
    assert [row["test"] for row in rows] == ["pp8", "tg4", "pp8 @ d64", "tg4 @ d64"]
    assert (
        "context must be 1 to 128"
        in out_of(capsys, "bench", *arguments, "-p", "999", code=UsageError.exit_code)[1]
    )


def test_bench_has_null_without_a_sensor(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bitgen.energy.open_source", lambda _: open_source(root=tmp_path))
    argv = ["bench", *arguments, "-p", "8", "-n", "4", "-r", "1", "--energy"]
    out, err = out_of(capsys, *argv, "-o", "json")
    found = json.loads(out)
    assert found["energy"] is None
    assert [(row["joules_token"], row["net_joules_token"]) for row in found["bench"]] == [(None, None)] * 2
    assert err.count("energy: not available (neither powercap") == 1
    assert "J/token" not in out_of(capsys, *argv)[0]


def test_run_and_bench_with_an_energy_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bitgen.inference.bench._SPAN_S", 0.2)
    watts = "import time; print(5 * time.monotonic(), 'J')"
    with_energy = [*arguments, "--energy-command", shlex.join([sys.executable, "-S", "-c", watts])]
    argv = ["bench", *with_energy, "-p", "0", "-n", "64", "-r", "3", "-o", "json"]
    found = json.loads(out_of(capsys, *argv)[0])
    assert found["energy"]["idle_watts"] == pytest.approx(5.0, rel=0.2)
    (row,) = found["bench"]
    assert row["joules_token"] > 4.0 / row["avg_ts"]  # what passes between runs is in it
    assert row["net_joules_token"] < row["joules_token"]
    err = out_of(capsys, "run", *with_energy, "-p", "the end", "-n", "12")[1]
    assert "energy = what " in err
    assert "W idle" in err


def test_bench_takes_a_preset(tmp_path: Path, library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = tmp_path / "small.yaml"
    preset.write_text(
        "name: small\nhidden: 100\nffn: 130\nlayers: 1\nheads: 4\nkv_heads: 2\nhead_dim: 26\nvocab: 50\n"
        "rope_theta: 10000.0\nactivation: relu2\nsub_norms: true\ntied_head: true\nnorm_eps: 1.0e-5\n"
        "architecture: bitnet-b1.58\n"
    )
    argv = (
        "bench",
        "-m",
        str(preset),
        "--library",
        str(library),
        "-p",
        "4",
        "-n",
        "2",
        "-r",
        "1",
        "-o",
        "md",
    )
    out, _ = out_of(capsys, *argv)
    assert "| small |" in out
    assert "| tg2 |" in out


def test_a_model_larger_than_memory_runs_from_disk_alone(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is said, and that all of it is said before any packing."""
    preset = tmp_path / "large.yaml"
    sizes = {"hidden": 256, "ffn": 512, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 50}
    preset.write_text(preset_yaml("large", **sizes))
    with load(library) as table:
        plan = Engine(random_weights(replace(find_model(str(preset)), context=2)), table, context=2).memory
    argv = ["bench", "-m", str(preset), "--library", str(library), "-p", "0", "-n", "2", "-r", "1"]
    monkeypatch.setenv("BITGEN_HOME", str(tmp_path))
    monkeypatch.setattr(memory, "_SPARE", 0)
    room = plan.total - plan.weights // 2
    monkeypatch.setattr(memory, "available_memory", lambda: room)
    _, err = out_of(capsys, *argv, code=BitgenError.exit_code)
    said, refusal = (line for line in err.splitlines() if "memory: " in line)
    assert said.startswith("bitgen: memory: ")
    assert "--from-disk" in refusal
    assert not list(tmp_path.glob("cache/packed/*"))
    out, err = out_of(capsys, *argv, "--from-disk", "-o", "json")
    assert "MiB in each step, at " in err
    assert json.loads(out)["bench"][0]["avg_ts"] > 0
    assert len(list(tmp_path.glob("cache/packed/*"))) == 1


@pytest.mark.parametrize("options", [["-p", "x"], ["-p", "0", "-n", "0"], ["-r", "0"], ["-b", "0"]])
def test_bench_refuses_what_is_no_list(
    arguments: list[str], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments, *options]) == UsageError.exit_code
    assert capsys.readouterr().err.startswith("bitgen: ")


def test_an_int8_head_says_how_far_off_it_is(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = out_of(capsys, "run", *arguments, "--head", "q8", "--kv", "q8", "-p", "a", "-n", "2")
    assert "the int8 head differs from the exact one by 0." in err


def test_packed_weights_are_listed_and_cleared(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out_of(capsys, "run", *arguments, "-p", "a", "-n", "1")
    entries = json.loads(out_of(capsys, "cache", "-o", "json")[0])["cache"]
    assert {entry["model"] for entry in entries} == {"small"}
    assert out_of(capsys, "cache", "check", "-o", "json")[0] == out_of(capsys, "cache", "-o", "json")[0]
    damaged = Path(entries[0]["path"])
    damaged.write_bytes(damaged.read_bytes()[:-1])
    _, err = out_of(capsys, "cache", "check", code=FileError.exit_code)
    assert (
        f"damaged or of another version, and deleted: {damaged.name} (unreadable); the next start packs again"
        in err
    )
    assert "MiB freed" in out_of(capsys, "cache", "clear")[0]
    assert json.loads(out_of(capsys, "cache", "list", "-o", "json")[0])["cache"] == []


# ---- bitgen.LLM ----


def test_a_batch_makes_room_for_itself(model: Path, library: Path) -> None:
    prompts = ["the end", "a", "on a hand"]
    with bitgen.LLM(model, library=library) as llm:
        alone = ["".join(llm.generate(prompt, max_tokens=8, seed=1)) for prompt in prompts]
        assert llm.engine.max_batch == 1
        assert llm.generate(prompts, max_tokens=8, seed=1) == alone
        assert llm.engine.max_batch == 3
        assert llm.generate(prompts, max_tokens=8, seed=1, lookup=True) == alone
        assert llm.timings.load_s > 0
        assert "".join(llm.generate(prompts[0], max_tokens=8, seed=1)) == alone[0]


def test_threads_and_kv_types_give_the_same_text(model: Path, library: Path) -> None:
    texts = set()
    for threads in (1, 2):
        with bitgen.LLM(model, library=library, threads=threads) as llm:
            texts.add("".join(llm.generate("the end", max_tokens=12, seed=4)))
    assert len(texts) == 1


def test_the_library_is_found_or_its_absence_is_one_line(
    model: Path, library: Path, bitgen_home: Path
) -> None:
    assert find_library(open_model(model).config) is None
    (bitgen_home / "generated").mkdir(parents=True)
    (bitgen_home / "generated" / library.name).symlink_to(library)
    with bitgen.LLM(model) as llm:
        assert llm.table is not None
        assert llm.table.path.parent.name == library.name


def test_without_a_library_and_a_compiler_there_is_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/no/such/compiler")
    with pytest.raises(BitgenError, match="/no/such/compiler"):
        bitgen.LLM(model)
    _, err = out_of(capsys, "run", "-m", str(model), "-p", "a", code=ToolchainError.exit_code)
    assert "/no/such/compiler" in err

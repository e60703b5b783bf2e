"""Finished answers on disk until the database has them: a measurement that was made is not lost."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitgen.errors import BitgenError, FileError
from bitgen.fleet.messages import Answer, read_answer
from bitgen.paths import ensure_dir
from bitgen.records import dump, load_json
from bitgen.whole import whole


class Outbox:
    """A folder with one file an answer, written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = ensure_dir(folder)

    def put(self, answer: Answer, job: dict[str, Any]) -> Path:
        """Keep ``answer`` with what must be known to send it. FileError where the disk is full."""
        target = self.folder / f"{answer.key}.json"
        text = json.dumps({"job": job, "answer": dump(answer)}, separators=(",", ":"))
        try:
            with whole(target) as file:
                file.write(text.encode())
        except OSError as error:
            raise FileError(f"cannot write to {self.folder}: {error.strerror or error}") from error
        return target

    def kept(self) -> Iterator[tuple[Path, dict[str, Any], Answer]]:
        """What was not sent yet. A file that is no answer, or torn by a power cut, is put aside."""
        for path in sorted(self.folder.glob("*.json")):
            try:
                content = load_json(path)
                job, answer = content["job"], read_answer(content["answer"])
                if answer.key != path.stem or not isinstance(job, dict):
                    raise FileError(f"{path}: another answer than its name says")
            except (BitgenError, LookupError):
                path.replace(path.with_suffix(".broken"))
                continue
            yield path, job, answer

    @staticmethod
    def sent(path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()

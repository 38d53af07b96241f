"""Answers written as they come, one line an image: a run that was stopped, or lost its power, goes on where it was."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ksm_edge.errors import UsageError

COLUMNS = ("image", "label", "probability", "known", "error")


class AnswerFile:
    """A .csv or .jsonl file that answers are added to; a context manager.

    >>> with AnswerFile(Path("answers.csv")) as answers:       # doctest: +SKIP
    ...     if "cat.jpg" not in answers:
    ...         answers.add({"image": "cat.jpg", "error": "no such file"})
    """

    def __init__(self, path: Path) -> None:
        """Raises UsageError for another suffix, or for a file that is there and holds something else."""
        if path.suffix not in (".csv", ".jsonl"):
            raise UsageError(f"{path}: answers are written as .csv or .jsonl")
        self._is_csv = path.suffix == ".csv"
        try:
            self._file = open(path, "a+b")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from error
        try:
            self._images = self._read(path)
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, image: str) -> bool:
        return image in self._images

    def __len__(self) -> int:
        return len(self._images)

    def add(self, answer: Mapping[str, Any]) -> None:
        """`image`, and `error`, or `known` and `top`, a list of `label` and `probability`, the best first."""
        if self._is_csv:
            best = answer["top"][0] if "top" in answer else {"label": "", "probability": ""}
            known = str(answer.get("known", "")).lower()
            line = _row([answer["image"], best["label"], best["probability"], known, answer.get("error", "")])
        else:
            line = json.dumps(answer, ensure_ascii=False) + "\n"
        self._write(line)
        self._images.add(answer["image"])

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read(self, path: Path) -> set[str]:
        """The images answered so far; half a line at the end, left by a power cut, is taken off."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        try:
            lines = whole.decode("utf-8")
            if not self._is_csv:
                return {json.loads(line)["image"] for line in lines.splitlines()}
            head, *rows = csv.reader(io.StringIO(lines, newline="")) if lines else [list(COLUMNS)]
            if tuple(head) != COLUMNS:
                raise ValueError(f"its columns are {', '.join(head)}")
            if not lines:
                self._write(_row(COLUMNS))
            return {row[0] for row in rows}
        except (ValueError, KeyError, TypeError, IndexError, csv.Error) as error:
            raise UsageError(f"{path} is there and holds no answers: {error}. Give another --out") from error

    def _write(self, line: str) -> None:
        self._file.write(line.encode("utf-8"))
        self._file.flush()


def _row(values: Sequence[Any]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()

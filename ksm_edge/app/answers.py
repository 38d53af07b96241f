"""Answers written as they come, one line an image: a run that was stopped, or lost its power, goes on where it was."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ksm_edge.errors import UsageError

COLUMNS = ("image", "label", "probability", "known", "error", "pack")
UNDECODED = "surrogateescape"  # a file's name need not be UTF-8, and is written as it is


class AnswerFile:
    """A .csv or .jsonl file that one pack's answers are added to; a context manager.

    >>> with AnswerFile(Path("answers.csv"), "1f0c5a") as answers:       # doctest: +SKIP
    ...     if "cat.jpg" not in answers:
    ...         answers.add({"image": "cat.jpg", "error": "no such file"})
    """

    def __init__(self, path: Path, pack: str) -> None:
        """`pack`: what tells the pack from others, such as the beginning of its digest.

        Raises UsageError for another suffix, or for a file that is there and holds something else, or another pack's.
        """
        if path.suffix not in (".csv", ".jsonl"):
            raise UsageError(f"{path}: answers are written as .csv or .jsonl")
        self._is_csv, self._pack = path.suffix == ".csv", pack
        try:
            self._file = open(path, "a+b")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from error
        try:
            self._errors = self._read(path)  # of each image; "" of one that was answered
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, image: str) -> bool:
        """Whether it was answered. One that could not be read was not: it may be whole by now."""
        return self._errors.get(image) == ""

    def __len__(self) -> int:
        """How many images were answered."""
        return sum(error == "" for error in self._errors.values())

    def add(self, answer: Mapping[str, Any]) -> None:
        """`image`, and `error`, or `known` and `top`, a list of `label` and `probability`, the best first.

        An error that is there already is not written again.
        """
        image, error = answer["image"], answer.get("error", "")
        if error and self._errors.get(image) == error:
            return
        if self._is_csv:
            best = answer["top"][0] if "top" in answer else {"label": "", "probability": ""}
            known = str(answer.get("known", "")).lower()
            line = _row([image, best["label"], best["probability"], known, error, self._pack])
        else:
            line = _json_line({**answer, "pack": self._pack})
        self._write(line)
        self._errors[image] = error

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read(self, path: Path) -> dict[str, str]:
        """The error of each image there so far; half a line at the end, left by a power cut, is taken off."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            if not whole:
                self._require_beginning(content)
            text = whole.decode("utf-8-sig", UNDECODED)  # Excel puts a mark in front
            found = [*(_csv_answers(text) if self._is_csv else _json_answers(text))]
        except KeyError as error:
            raise UsageError(
                f"{path} is there and holds no answers: no {error} in a line. Give another --out"
            ) from error
        except (ValueError, TypeError, csv.Error) as error:
            raise UsageError(f"{path} is there and holds no answers: {error}. Give another --out") from error
        if others := {pack for _, _, pack in found} - {self._pack}:
            raise UsageError(
                f"{path} holds answers of another pack, {min(others)}, and this one is {self._pack}. Give another --out"
            )
        self._file.truncate(len(whole))
        if self._is_csv and not whole:
            self._write(_row(COLUMNS))
        return {image: error for image, error, _ in found}

    def _require_beginning(self, content: bytes) -> None:
        """ValueError where a file of less than a line was not begun by this class."""
        begins = _row(COLUMNS).encode() if self._is_csv else b'{"image": "'
        if not (begins.startswith(content) or content.startswith(begins)):
            raise ValueError("not one whole line")
        try:
            json.loads(content)
        except ValueError:  # half a line indeed
            return
        list(_json_answers(content.decode() + "\n"))

    def _write(self, line: str) -> None:
        self._file.write(line.encode("utf-8", UNDECODED))
        self._file.flush()


def _csv_answers(text: str) -> Iterator[tuple[str, str, str]]:
    """Image, error and pack of each row."""
    head, *rows = csv.reader(io.StringIO(text, newline="")) if text else [list(COLUMNS)]
    if tuple(head) != COLUMNS:
        raise ValueError(f"its columns are {', '.join(head)}")
    for image, _, _, _, error, pack in rows:
        yield image, error, pack


def _json_answers(text: str) -> Iterator[tuple[str, str, str]]:
    """Image, error and pack of each line."""
    for line in text.split("\n")[:-1]:  # names may hold what else ends lines
        answer = json.loads(line)
        found = answer["image"], "" if "top" in answer else answer["error"], answer["pack"]
        if not all(isinstance(text, str) for text in found):
            raise ValueError(f"{line[:60]!r}")
        yield found


def _row(values: Sequence[Any]) -> str:
    text = io.StringIO(newline="")
    # Of a name with a carriage return Python's writer does not see that it needs quotes.
    if any("\r" in str(value) for value in values):
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    else:
        writer = csv.writer(text, lineterminator="\n")
    writer.writerow(values)
    return text.getvalue()


def _json_line(value: Mapping[str, Any]) -> str:
    """In UTF-8 as it is, but for names that are none."""
    line = json.dumps(value, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(value) + "\n"
    return line

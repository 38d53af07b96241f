"""Files of answers: gone on with, never mistaken for another's, and never harmed where they are none."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from ksm_edge.app.answers import COLUMNS, AnswerFile
from ksm_edge.errors import UsageError

PACK = "1f0c5a"
ODD_NAMES = ["caf\udce9.jpg", "a\u2028b.jpg", "line\nbreak.jpg", "a\rb.jpg", 'quo"te,.jpg', "Öl.jpg"]


def answer(image: str) -> dict[str, object]:
    return {"image": image, "known": True, "top": [{"label": "cat", "probability": 0.5}]}


def fill(path: Path, *answers: dict[str, object], pack: str = PACK) -> None:
    with AnswerFile(path, pack) as file:
        for each in answers:
            file.add(each)


@pytest.fixture(params=["csv", "jsonl"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"answers.{request.param}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "name,label\na.jpg,cat\nb.jpg,dog"),
        ("a.csv", "one line without an end"),
        ("a.csv", "image,label,probability,known,error\na.jpg,cat,1,true,\n"),
        ("a.csv", ",".join(COLUMNS) + "\na.jpg,cat\n"),
        ("a.jsonl", '{"image":"x","list":[1,2]}'),
        ("a.jsonl", '{"image": "x", "list": [1, 2]}\n'),
        ("a.jsonl", '{"image": "x", "label": "cat"}'),
        ("a.jsonl", '{"image": "x", "error": "y", "pack": ["z"]}\n'),
        ("a.jsonl", '{"image": null, "error": "y", "pack": "z"}\n'),
        ("a.jsonl", "[]\n"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, name: str, content: str) -> None:
    (path := tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match="holds no answers"):
        AnswerFile(path, PACK)
    assert path.read_text() == content


@pytest.mark.parametrize("kept", [0, 1, 5, 12])
def test_half_a_first_line_is_begun_again(path: Path, kept: int) -> None:
    fill(path, answer("a.jpg"))
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    fill(path, answer("a.jpg"))
    assert path.read_bytes() == whole


def test_half_a_letter_at_the_end_is_half_a_line(tmp_path: Path) -> None:
    fill(path := tmp_path / "a.jsonl", answer("Öl.jpg"))
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\xc3") + 1])
    fill(path, answer("Öl.jpg"))
    assert path.read_bytes() == whole


def test_another_packs_answers_are_not_gone_on_with(path: Path) -> None:
    fill(path, answer("a.jpg"))
    before = path.read_bytes()
    with pytest.raises(UsageError, match="holds answers of another pack, 1f0c5a, and this one is 77"):
        AnswerFile(path, "77")
    assert path.read_bytes() == before


def test_an_image_that_could_not_be_read_is_tried_again_and_its_error_written_once(path: Path) -> None:
    broken = {"image": "a.jpg", "error": "cut short"}
    fill(path, broken)
    before = path.read_bytes()
    with AnswerFile(path, PACK) as file:
        assert "a.jpg" not in file
        assert len(file) == 0
        file.add(broken)
        assert path.read_bytes() == before
        file.add(answer("a.jpg"))
        assert "a.jpg" in file
    with AnswerFile(path, PACK) as file:
        assert "a.jpg" in file
        assert len(file) == 1


def test_any_name_that_a_file_may_have_is_written_and_found_again(path: Path) -> None:
    fill(path, *map(answer, ODD_NAMES))
    with AnswerFile(path, PACK) as file:
        assert [name for name in ODD_NAMES if name not in file] == []
        assert len(file) == len(ODD_NAMES)
    content = path.read_bytes()
    if path.suffix == ".csv":
        rows = list(csv.DictReader(content.decode("utf-8", "surrogateescape").splitlines(keepends=True)[:2]))
        assert rows == [{"image": ODD_NAMES[0], "label": "cat", "probability": "0.5", "known": "true", "error": "",
                         "pack": PACK}]  # fmt: skip
    else:
        lines = content.decode().rstrip("\n").split("\n")  # valid UTF-8, whatever the names
        assert [json.loads(line)["image"] for line in lines] == ODD_NAMES
        assert "Öl.jpg" in lines[-1]


def test_a_table_that_excel_saved_is_gone_on_with(tmp_path: Path) -> None:
    fill(path := tmp_path / "a.csv", answer("a.jpg"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    with AnswerFile(path, PACK) as file:
        assert "a.jpg" in file

import json
import os
import threading
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from ksm_edge.data.image import MAX_FILE_BYTES
from ksm_edge.data.image_set import Item, image_files, open_image_set
from ksm_edge.errors import DataError


def png(shade=0):
    buffer = BytesIO()
    Image.new("L", (4, 4), shade).save(buffer, "PNG")
    return buffer.getvalue()


def make(kind, root, names):
    """The files `names` (folders where they end in "/") in a folder or a zip; returns its path."""
    if kind == "zip":
        with zipfile.ZipFile(root.with_suffix(".zip"), "w") as archive:
            for shade, name in enumerate(names):
                archive.writestr(name, b"" if name.endswith("/") else png(shade))
        return root.with_suffix(".zip")
    for shade, name in enumerate(names):
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(png(shade))
    return root


both = pytest.mark.parametrize("kind", ["folder", "zip"])
SPLIT = ["train/b/2.png", "train/a/1.JPG", "test/a/1.png", "train/a/0.webp", "test/b/9.png"]


@both
def test_train_and_test_folders_become_the_two_parts(kind, tmp_path):
    images = open_image_set(make(kind, tmp_path / "pets", SPLIT))
    assert images.name == "pets"
    assert images.classes == ("a", "b")
    assert images.train == (Item("train/a/0.webp", 0), Item("train/a/1.JPG", 0), Item("train/b/2.png", 1))
    assert images.test == (Item("test/a/1.png", 0), Item("test/b/9.png", 1))
    assert images.remarks == ()
    assert images.read(images.train[0]) == png(3)


@both
def test_class_folders_alone_are_for_training(kind, tmp_path):
    images = open_image_set(make(kind, tmp_path / "pets", ["dog/1.png", "cat/deeper/2.png"]))
    assert images.classes == ("cat", "dog")
    assert images.train == (Item("cat/deeper/2.png", 0), Item("dog/1.png", 1))
    assert images.test == ()


@both
@pytest.mark.parametrize("names", [SPLIT, ["dog/1.png", "cat/2.png"]])
def test_one_folder_around_all_is_looked_through(kind, names, tmp_path):
    images = open_image_set(make(kind, tmp_path / "x", [f"my pets/{name}" for name in names]))
    plain = open_image_set(make(kind, tmp_path / "y", names))
    assert images.classes == plain.classes
    assert [item.source for item in images.train] == [f"my pets/{item.source}" for item in plain.train]
    assert len(images.test) == len(plain.test)


@both
def test_hidden_files_and_other_formats_are_not_images(kind, tmp_path):
    junk = [".DS_Store", "a/.hidden.png", "__MACOSX/a/._1.png", "a/notes.txt", "labels.csv", ".git/x/1.png"]
    images = open_image_set(make(kind, tmp_path / "d", ["a/1.png", "b/2.png", *junk]))
    assert [item.source for item in images.train] == ["a/1.png", "b/2.png"]


@both
def test_what_is_left_out_is_said(kind, tmp_path):
    names = [*SPLIT, "val/a/1.png", "train/loose.png", "train/looser.png"]
    images = open_image_set(make(kind, tmp_path / "d", names))
    assert images.remarks == (
        "val/ is left out: neither train/ nor test/",
        "2 image(s) directly in train/ left out: not in a class folder",
    )


@both
@pytest.mark.parametrize(
    ("names", "why"),
    [
        ([], r"no class folders; expected\n    DATA/train/<class>/<image>"),
        (["1.png", "2.png"], r"2 image\(s\), but no class folder"),
        (["a/1.png"], r"one class only \(a\)"),
        (["train/a/1.png", "train/b/"], "no images in class folder train/b"),
        (["a/1.png", "b/1.png", "docs/readme.txt"], "no images in class folder docs"),
        (["train/a/1.png", "train/b/1.png", "test/c/1.png"], "test/ has classes that train/ has not: c; train/"),
        (["test/a/1.png", "test/b/1.png"], "has test/ but no train/"),
        (["train/", "test/a/1.png"], "no class folders"),
    ],
)
def test_a_layout_that_cannot_be_learned_from_is_explained(kind, names, why, tmp_path):
    path = make(kind, tmp_path / "d", names)
    path.mkdir(exist_ok=True) if kind == "folder" else None
    with pytest.raises(DataError, match=rf"{path}: {why}"):
        open_image_set(path)


@both
def test_one_class_is_enough_to_evaluate_on(kind, tmp_path):
    assert open_image_set(make(kind, tmp_path / "d", ["a/1.png"]), least_classes=1).classes == ("a",)


@both
def test_a_test_part_may_lack_classes(kind, tmp_path):
    images = open_image_set(make(kind, tmp_path / "d", ["train/a/1.png", "train/b/1.png", "test/b/1.png", "test/c/"]))
    assert images.test == (Item("test/b/1.png", 1),)


def test_no_such_path_shows_the_layout(tmp_path):
    with pytest.raises(DataError, match=r"no such folder or zip; expected"):
        open_image_set(tmp_path / "nowhere")


def test_a_file_that_is_no_zip_is_refused(tmp_path):
    (tmp_path / "data.zip").write_text("hello")
    with pytest.raises(DataError, match=r"data\.zip: not a readable zip"):
        open_image_set(tmp_path / "data.zip")


def test_names_that_climb_out_of_a_zip_are_ignored(tmp_path):
    path = make("zip", tmp_path / "d", ["a/1.png", "b/1.png", "../evil/1.png", "a/../../2.png", "/etc/../x.png"])
    assert [item.source for item in open_image_set(path).train] == ["a/1.png", "b/1.png"]


def test_backslashes_in_a_zip_are_folders(tmp_path):
    path = make("zip", tmp_path / "d", ["a\\1.png", "b\\1.png"])
    images = open_image_set(path)
    assert images.classes == ("a", "b")
    assert images.read(images.train[1]) == png(1)


def test_a_zip_of_the_folder_that_one_is_in_is_read(tmp_path):
    path = make("zip", tmp_path / "d", ["./", "./a/1.png", "./b/1.png", "./.hidden/1.png"])
    images = open_image_set(path)
    assert images.classes == ("a", "b")
    assert images.read(images.train[1]) == png(2)


def test_a_damaged_member_is_named(tmp_path):
    path = make("zip", tmp_path / "d", ["a/1.png", "b/1.png"])
    data = path.read_bytes()
    path.write_bytes(data.replace(png(1), bytes(len(png(1)))))
    images = open_image_set(path)
    assert images.read(images.train[0]) == png(0)
    with pytest.raises(DataError, match=r"b/1\.png: damaged in the zip"):
        images.read(images.train[1])


def test_a_member_that_unpacks_to_gigabytes_is_refused(tmp_path):
    path = make("zip", tmp_path / "d", ["a/1.png", "b/1.png"])
    images = open_image_set(path)
    images.files._members["a/1.png"].file_size = MAX_FILE_BYTES + 1
    with pytest.raises(DataError, match=r"a/1\.png: .*the limit is"):
        images.read(images.train[0])


def test_a_file_that_vanished_is_named(tmp_path):
    images = open_image_set(make("folder", tmp_path / "d", ["a/1.png", "b/1.png"]))
    (tmp_path / "d/a/1.png").unlink()
    with pytest.raises(DataError, match=r"a/1\.png: cannot be read \(No such file"):
        images.read(images.train[0])


def test_folder_and_zip_of_the_same_images_have_the_same_digest(tmp_path):
    folder = open_image_set(make("folder", tmp_path / "d", SPLIT))
    packed = open_image_set(make("zip", tmp_path / "e", SPLIT))
    assert folder.digest() == packed.digest()
    assert len(folder.digest()) == 64


@pytest.mark.parametrize("change", ["longer", "renamed", "moved", "another class"])
def test_the_digest_changes_with_the_data(change, tmp_path):
    root = make("folder", tmp_path / "d", SPLIT)
    before = open_image_set(root).digest()
    if change == "longer":
        (root / "train/a/0.webp").write_bytes(png() + b"\0")
    elif change == "renamed":
        (root / "train/a/0.webp").rename(root / "train/a/00.webp")
    elif change == "moved":
        (root / "train/a/0.webp").rename(root / "test/a/0.webp")
    else:
        (root / "train/b").rename(root / "train/c")
        (root / "test/b").rename(root / "test/c")
    assert open_image_set(root).digest() != before


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = make("folder", tmp_path / "d", ["a/1.png", "b/1.png"])
    (root / "c").symlink_to(root / "a")
    (root / "a/again").symlink_to(root)
    (root / "b/lost.png").symlink_to(root / "nowhere")
    assert [item.source for item in open_image_set(root).train] == ["a/1.png", "b/1.png", "c/1.png"]


def test_names_that_are_not_unicode_work(tmp_path):
    root = make("folder", tmp_path / "d", ["a/1.png", "b/1.png"])
    Path(os.fsdecode(os.fsencode(root / "a") + b"/\xff.png")).write_bytes(png(7))
    images = open_image_set(root)
    assert images.digest()
    assert images.read(images.train[1]) == png(7)


def test_a_zip_is_read_from_several_threads(tmp_path):
    names = [f"{label}/{index}.png" for label in "ab" for index in range(40)]
    images = open_image_set(make("zip", tmp_path / "d", names))
    expected = {name: png(shade) for shade, name in enumerate(names)}
    wrong = []

    def read():
        wrong.extend(item for item in images.train if images.read(item) != expected[item.source])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_image_files_takes_files_and_folders(tmp_path):
    root = make("folder", tmp_path / "d", ["b.png", "a/2.jpg", "a/1.png", "a/x.txt", ".thumbs/1.png"])
    assert image_files([root]) == [root / "a/1.png", root / "a/2.jpg", root / "b.png"]
    assert image_files([str(root / "b.png"), root / "a"]) == [root / "b.png", root / "a/1.png", root / "a/2.jpg"]
    assert image_files([root / "a/x.txt"]) == [root / "a/x.txt"]  # asked for by name: the decoder judges it


def test_image_files_names_what_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images in this folder"):
        image_files([tmp_path / "empty"])
    with pytest.raises(DataError, match="gone: no such file or folder"):
        image_files([tmp_path / "gone"])


@pytest.mark.parametrize(
    ("name", "classes", "train", "test"),
    [
        ("flowers5", 5, 2250, 600),
        ("trashnet", 6, 1892, 629),
        ("pacs_sketch7", 7, 1480, 460),
        ("caltech100", 100, 2917, 1177),
        ("gtsrb43", 43, 2580, 1075),
        ("omniglot_small1", 136, 2040, 680),
    ],
)
def test_real_sets_are_read_as_they_are(name, classes, train, test, shared_data):
    images = open_image_set(shared_data / f"{name}.zip")
    assert (len(images.classes), len(images.train), len(images.test)) == (classes, train, test)
    assert images.remarks == ()
    assert images.read(images.test[-1])
    assert json.dumps(images.classes)


def test_pictures_that_are_only_in_one_folder_are_no_image_set(shared_data):
    with pytest.raises(DataError, match="one class only"):
        open_image_set(shared_data / "imagenet_sanity.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_is_named_however_it_is_packed(method, tmp_path):
    path = tmp_path / "d.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/1.png", bytes(1000))
        archive.writestr("b/1.png", bytes(range(256)) * 9)
        offset = archive.getinfo("b/1.png").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 50 : offset + 80] = bytes(30)
    path.write_bytes(data)
    images = open_image_set(path)
    with pytest.raises(DataError, match=r"b/1\.png: damaged in the zip"):
        images.read(images.train[1])

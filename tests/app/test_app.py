from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from signing import KeyFiles
from tiny import FEATURES, saved_tiny_bundle, tiny_bundle, tiny_pack

from ksm_edge.app.app import App, Prediction
from ksm_edge.app.images import opened
from ksm_edge.app.residents import Resident
from ksm_edge.data.image import open_rgb, to_input
from ksm_edge.errors import (
    BudgetError,
    DataError,
    KeyFileError,
    SignatureError,
    UnsignedError,
    UsageError,
    WrongBackboneError,
)
from ksm_edge.fuse import fuse
from ksm_edge.pack.files import save_pack
from ksm_edge.pack.keys import load_private_key
from ksm_edge.pack.signature import signed
from ksm_edge.runtimes.prepared import PreparedGraph
from ksm_edge.runtimes.reference import Session as Reference


@pytest.fixture
def app(tmp_path: Path) -> App:
    with App(tiny_bundle(tmp_path / "bundle"), threads=1, limit=2) as app:
        for seed, name in enumerate("abc", start=1):
            app.load(tiny_pack(seed=seed, cut=0.3, changes={"task": name}))
        yield app


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_prediction_is_the_softmax_of_the_oracles_logits(app: App, photo: Path) -> None:
    pack = tiny_pack(seed=2, cut=0.3)
    features = Reference(app.bundle.graph_path, fuse(app.bundle, pack)).run(to_input(open_rgb(photo), pack.input)[None])
    logits = (features @ pack.head_weight.T + pack.head_bias)[0].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    (prediction,) = app.predict([photo], task="b")
    assert prediction.label == f"class {expected.argmax()}"
    assert prediction.probability == pytest.approx(expected.max(), rel=1e-4)
    assert prediction.top[0] == (prediction.label, prediction.probability)
    assert [label for label, _ in prediction.top] == [f"class {c}" for c in np.argsort(-expected)]
    assert sum(share for _, share in prediction.top) == pytest.approx(1)


def test_paths_images_and_arrays_give_the_same(app: App, photo: Path) -> None:
    image = Image.open(photo)
    several = app.predict([photo, str(photo), image, np.asarray(image)])
    assert len(set(several)) == 1
    assert app.predict(photo)[0].probability == pytest.approx(several[0].probability, rel=1e-5)


@pytest.mark.parametrize("kind", ["turned", "16 bits", "transparent", "palette", "cmyk"])
def test_an_open_image_is_taken_as_its_file_is(app: App, tmp_path: Path, kind: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (20, 30, 4), np.uint8)
    path, options = tmp_path / "photo.png", {}
    if kind == "turned":
        image = Image.fromarray(pixels[..., :3])
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    elif kind == "16 bits":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif kind == "transparent":
        image = Image.fromarray(pixels)
    else:
        image = Image.fromarray(pixels[..., :3]).convert("P" if kind == "palette" else "CMYK")
        path = path.with_suffix(".tif")
    image.save(path, **options)
    with Image.open(path) as image:
        assert app.predict(image) == app.predict(path)
    assert app.predict(opened(path, app.bundle.input)) == app.predict(path)  # as the command line reads it


def test_a_large_open_image_is_reduced_as_its_file_is(app: App, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (900, 700, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    assert len(set(app.predict([tmp_path / "photo.png", Image.open(tmp_path / "photo.png"), pixels]))) == 1


def test_what_a_program_made_of_an_image_is_turned_by_the_tag_that_it_kept(app: App, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(1).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as image:
        turned = app.predict(np.rot90(pixels, -1).copy())
        assert app.predict(image.convert("RGB")) == app.predict(ImageOps.exif_transpose(image)) == turned


def test_an_open_image_that_is_cut_short_is_refused(app: App, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (200, 300, 3), np.uint8)
    Image.fromarray(pixels).save(path := tmp_path / "photo.jpg")
    path.write_bytes(path.read_bytes()[:2000])
    with Image.open(path) as image, pytest.raises(DataError, match="cut short"):
        app.predict(image)


def test_a_digest_tells_packs_apart_whoever_signed_them(app: App, tmp_path: Path, key_files: KeyFiles) -> None:
    path = tmp_path / "a.ksm"
    save_pack(tiny_pack(seed=1, cut=0.3), path)
    before = app.digest(app.load(path, name="file"))
    path.write_bytes(signed(path.read_bytes(), load_private_key(str(key_files.private), lambda: b"")))
    assert app.digest(app.load(path, name="signed")) == before != app.digest("b")
    assert app.digest("a") == app.digest(app.load(tiny_pack(seed=1, cut=0.3, changes={"task": "a"}), name="again"))


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_threads_that_no_board_has_are_refused(tmp_path: Path, threads: int) -> None:
    with pytest.raises(UsageError, match=f"threads {threads}: must be 1 to"):
        App(tiny_bundle(tmp_path / "bundle"), threads=threads)


def test_top_limits_the_classes_named(app: App, photo: Path) -> None:
    assert [len(app.predict(photo, top=n)[0].top) for n in (1, 2, 3, 99)] == [1, 2, 3, 3]


def test_many_images_are_predicted_in_order(app: App) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (18, 18, 3), np.uint8) for _ in range(19)]
    together = app.predict(images)
    assert [p.label for p in together] == [app.predict(image)[0].label for image in images]


def test_the_first_task_is_current_whatever_its_name(tmp_path: Path) -> None:
    with App(tiny_bundle(tmp_path / "bundle"), threads=1) as app:
        for name in ("", "b"):
            app.load(tiny_pack(changes={"task": "a"}), name=name)
        app.predict(np.zeros((20, 20, 3), np.uint8))
        assert app.ready == ("",)


def test_the_first_task_is_current_until_another_is(app: App, photo: Path) -> None:
    assert app.tasks == ("a", "b", "c")
    a, b = app.predict(photo, task="a"), app.predict(photo, task="b")
    assert a != b
    assert app.predict(photo) == a
    app.switch("b")
    assert app.predict(photo) == b
    app.unload("b")
    with pytest.raises(UsageError, match="no task is current: switch to one of a, c"):
        app.predict(photo)


def test_tasks_beyond_the_limit_come_back_the_same(app: App, photo: Path) -> None:
    before = {name: app.predict(photo, task=name) for name in app.tasks}
    assert len(app.ready) == 2
    for name in reversed(app.tasks):
        assert app.predict(photo, task=name) == before[name]
    assert app.ready == ("b", "a")


def test_threads_may_predict_different_tasks_at_once(app: App, photo: Path) -> None:
    expected = {name: app.predict(photo, task=name) for name in app.tasks}
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(10):
            if app.predict(photo, task=name) != expected[name]:
                wrong.append(name)

    workers = [threading.Thread(target=work, args=(name,)) for name in app.tasks * 2]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_pack_is_loaded_from_its_file_under_a_name_of_choice(app: App, tmp_path: Path) -> None:
    save_pack(tiny_pack(), tmp_path / "x.ksm")
    assert app.load(tmp_path / "x.ksm") == "tiny kernel"
    assert app.load(str(tmp_path / "x.ksm"), name="mine") == "mine"
    with pytest.raises(UsageError, match="'mine' is loaded already"):
        app.load(tmp_path / "x.ksm", name="mine")


def test_a_pack_of_another_backbone_is_refused(app: App) -> None:
    with pytest.raises(WrongBackboneError):
        app.load(tiny_pack(changes={"backbone": "f" * 64}), name="other")
    assert "other" not in app.tasks


@pytest.mark.parametrize("verb", ["switch", "unload"])
def test_a_task_that_is_not_loaded_is_named_with_those_that_are(app: App, verb: str) -> None:
    with pytest.raises(UsageError, match="no task 'd' is loaded; loaded are: a, b, c"):
        getattr(app, verb)("d")


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), 7, None]
)
def test_what_is_no_image_is_refused(app: App, image: object) -> None:
    with pytest.raises(DataError, match="is no image"):
        app.predict([image])


def test_an_image_that_is_not_there_is_named(app: App) -> None:
    with pytest.raises(DataError, match=r"absent\.png"):
        app.predict(["absent.png"])


def test_no_images_give_no_predictions(app: App) -> None:
    assert app.predict([]) == []


@pytest.mark.parametrize(
    "inputs",
    [
        np.zeros((1, 3, 18, 18), np.float32),
        np.zeros((1, 3, 16, 20), np.float32),
        np.zeros((3, 16, 16), np.float32),
        np.zeros((1, 3, 16, 16)),
        [[0.0]],
    ],
)
def test_logits_of_anything_but_preprocessed_images_are_refused(app: App, inputs: Any) -> None:
    with pytest.raises(UsageError, match=r"needed are float32 \(N, 3, 16, 16\)"):
        app.logits(inputs)


def test_logits_are_the_heads(app: App) -> None:
    logits, classes = app.logits(np.zeros((2, 3, 16, 16), np.float32))
    assert logits.shape == (2, 3)
    assert logits.dtype == np.float32
    assert classes == ("class 0", "class 1", "class 2")
    assert app.bundle.features == FEATURES


def test_a_closed_app_holds_no_task(tmp_path: Path) -> None:
    with App(tiny_bundle(tmp_path), threads=1) as app:
        app.load(tiny_pack())
    assert app.tasks == ()


def test_a_switch_between_two_runs_does_not_mix_tasks_in_one_answer(
    app: App, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = App.logits

    def switching(self: App, *arguments: object) -> object:
        answer = plain(self, *arguments)
        self.switch("c")  # as another thread would
        return answer

    expected = app.predict([photo] * 20, task="a")
    app.switch("a")
    monkeypatch.setattr(App, "logits", switching)
    assert app.predict([photo] * 20) == expected


def test_an_app_that_requires_a_signature_refuses_all_else(tmp_path: Path, key_files: KeyFiles) -> None:
    path = tmp_path / "a.ksm"
    save_pack(tiny_pack(), path)
    with App(tiny_bundle(tmp_path / "bundle"), threads=1, require_signature=key_files.public) as app:
        with pytest.raises(UnsignedError, match=r"a\.ksm: the pack is not signed"):
            app.load(path)
        with pytest.raises(UnsignedError, match="in memory, where it has no signature: give the path of its file"):
            app.load(tiny_pack())
        plain = path.read_bytes()
        path.write_bytes(signed(plain, load_private_key(key_files.other, bytes)))
        with pytest.raises(SignatureError, match=r"a\.ksm: the pack's signature fits none"):
            app.load(path)
        assert app.tasks == ()
        path.write_bytes(signed(plain, load_private_key(key_files.private, bytes)))
        assert app.load(path) == "tiny kernel"


def test_a_key_that_cannot_verify_is_refused_when_the_app_is_made(tmp_path: Path, key_files: KeyFiles) -> None:
    with pytest.raises(KeyFileError, match="needed an Ed25519 public key"):
        App(tiny_bundle(tmp_path), threads=1, require_signature=key_files.private)


def test_without_that_an_app_takes_signed_packs_too(tmp_path: Path, key_files: KeyFiles) -> None:
    path = tmp_path / "a.ksm"
    save_pack(tiny_pack(), path)
    path.write_bytes(signed(path.read_bytes(), load_private_key(key_files.private, bytes)))
    with App(tiny_bundle(tmp_path / "bundle"), threads=1) as app:
        assert app.load(path) == "tiny kernel"


def test_one_image_through_all_tasks_is_each_tasks_own_prediction(app: App, photo: Path) -> None:
    together = app.predict_all(photo)
    assert together == {name: app.predict(photo, task=name) for name in app.tasks}
    assert app.predict_all([photo] * 9, ["c", "a"], top=1) == {n: app.predict([photo] * 9, n, 1) for n in "ac"}
    assert app.predict_all(photo, []) == {}
    assert app.predict_all(photo, ["a", "a"]) == {"a": app.predict(photo, "a")}
    with pytest.raises(UsageError, match="no task 'x' is loaded"):
        app.predict_all(photo, ["a", "x"])


def test_a_budget_is_so_many_tasks_and_less_than_one_is_refused(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    each = sum(array.nbytes for array in fuse(bundle, None).values())
    with App(bundle, memory_budget=2 * each + each // 2) as app:
        for name in "abc":
            app.load(tiny_pack(changes={"task": name}))
            app.prefetch(name)
        assert app.ready == ("b", "c")
    with pytest.raises(BudgetError, match=f"the fused weights of one task take {each}"):
        App(bundle, memory_budget=each - 1)


def test_a_pinned_task_stays_ready(app: App, photo: Path) -> None:
    app.pin("a")
    app.predict_all(photo)
    assert "a" in app.ready
    with pytest.raises(BudgetError, match="'b' cannot be pinned"):
        app.pin("b")
    app.unpin("a")
    app.predict_all(photo, ["b", "c"])
    assert set(app.ready) == {"b", "c"}


def test_sixteen_threads_switch_and_predict_as_one_alone_would(app: App, photo: Path) -> None:
    expected, faults = app.predict_all(photo), []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for name in rng.choice(list("abc"), 12):
            app.switch(name)
            if app.predict(photo, task=name) != expected[name] or app.predict(photo) not in expected.values():
                faults.append(name)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not faults
    assert len(app.ready) == 2


def test_an_event_loop_goes_on_while_a_thread_predicts(app: App, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, seen, whole = threading.Event(), threading.Event(), Resident.logits

    def held_up(resident: Resident, inputs: np.ndarray) -> np.ndarray:
        inside.set()
        assert seen.wait(60)
        return whole(resident, inputs)

    async def main() -> tuple[list[Prediction], list[Prediction]]:
        answer = asyncio.ensure_future(asyncio.to_thread(app.predict, photo, "a"))
        while not inside.is_set():
            await asyncio.sleep(0.001)
        monkeypatch.undo()
        app.switch("b")  # with the other thread in the middle of its answer
        own = app.predict(photo)
        seen.set()
        return await answer, own

    expected = app.predict_all(photo, ["a", "b"])
    monkeypatch.setattr(Resident, "logits", held_up)
    assert asyncio.run(main()) == (expected["a"], expected["b"])


def test_a_prepared_backbone_answers_the_same(tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSM_EDGE_CACHE", str(tmp_path / "cache"))
    bundle = saved_tiny_bundle(tmp_path / "saved")
    answers, made = [], []
    whole = PreparedGraph.session
    monkeypatch.setattr(PreparedGraph, "session", lambda *given: made.append(None) or whole(*given))
    for prepares in (False, True, False):  # the last one finds what the second has prepared
        with App(bundle, threads=1) as app:
            if prepares:
                app.prepare()
            app.load(tiny_pack(cut=0.3, changes={"backbone": bundle.digest}))
            answers.append(app.predict(photo))
    assert answers[0] == answers[1] == answers[2]
    assert len(made) == 2  # all sessions but the first app's


def test_a_task_from_a_file_takes_the_files_bytes_until_it_is_used(app: App, tmp_path: Path, photo: Path) -> None:
    save_pack(tiny_pack(seed=5, cut=0.3), tmp_path / "x.ksm")
    app.load(tmp_path / "x.ksm", "x")
    app.load(tmp_path / "x.ksm", "y")
    loaded = app._tasks["x"]
    assert loaded.data == (tmp_path / "x.ksm").read_bytes()
    assert loaded.pack is None
    (tmp_path / "x.ksm").unlink()
    assert app.predict(photo, "x") == app.predict(photo, "y")
    assert app.record("x") == app.record("y")


def test_probabilities_are_the_calibrated_ones_and_below_the_threshold_an_image_is_unknown(
    app: App, photo: Path
) -> None:
    plain = app.predict(photo, task="a")[0]
    assert plain.known
    for threshold, known in ((0.0, True), (1.0, False)):
        record = {"calibration": {"temperature": 2.0, "threshold": threshold}}
        pack = tiny_pack(seed=1, cut=0.3, changes={"task": f"calibrated {threshold}", "record": record})
        found = app.predict(photo, task=app.load(pack))[0]
        assert found.known == known
        assert found.label == plain.label
        odds = np.array([p for _, p in plain.top]) ** 0.5
        np.testing.assert_allclose([p for _, p in found.top], odds / odds.sum(), rtol=1e-5)


def test_a_name_that_is_used_again_is_the_new_task(app: App, photo: Path, tmp_path: Path) -> None:
    for seed in (4, 5):
        save_pack(tiny_pack(seed=seed, cut=0.3), tmp_path / f"{seed}.ksm")
    expected = [app.predict(photo, app.load(tmp_path / f"{seed}.ksm", f"task {seed}")) for seed in (4, 5)]
    app.load(tmp_path / "4.ksm", "x")
    app.unload("x")
    app.load(tmp_path / "5.ksm", "x")
    assert app.predict(photo, "x") == expected[1]
    app.unload("x")
    app.load(tmp_path / "4.ksm", "x")
    assert app.predict(photo, "x") == expected[0]

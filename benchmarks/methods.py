"""The ways to learn a task that `accuracy.py` sets side by side, and how each of them is run."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grid import BEFORE
from measure import KSM_EDGE, fresh_json

if TYPE_CHECKING:
    from ksm_edge.bundle.layers import Bundle
    from ksm_edge.data.image_set import ImageSet

HERE = Path(__file__).parent
CROPS = ("crop_scale", "crop_start")
# Settings that tables have words for, where they had another default.
REMARKED = {"head_rate", "amplify", "join_at", *CROPS}
# "classifier only" beside `--method head`: the same layer, fitted to the end on features that never change.
IN_RIVALS = {"reference": "ksm"}
SCRIPTS = {"linear": "linear.py"}  # of this folder; all others that are not `ksm-edge adapt` run in rivals.py


@dataclass(frozen=True)
class Method:
    """One way to learn a task and keep it."""

    title: str
    words: Callable[[Bundle], tuple[str, ...]] | None  # options of `ksm-edge adapt`; None: it runs in a script
    ours: bool = False
    epochs: int | None = None  # where it brings its own; None: those of `ksm-edge adapt`
    batch: int | None = None


def _always(*words: str) -> Callable[[Bundle], tuple[str, ...]]:
    return lambda bundle: words


METHODS = {
    "ksm": Method("KSM, default", _always(), ours=True),
    "small": Method("KSM, --small", _always("--small"), ours=True),
    "whole": Method("KSM, --thin 0", _always("--thin", "0"), ours=True),
    "penalty": Method("KSM, --cut-penalty 0.05 --thin 0", _always("--cut-penalty", "0.05", "--thin", "0"), ours=True),
    "group4": Method("KSM, group:4", _always("--granularity", "group:4"), ours=True),
    "late": Method("KSM, masks in the second half", lambda bundle: ("--masked", _second_half(bundle)), ours=True),
    "norm": Method("batch-norm + head", _always("--method", "norm"), ours=True),
    "head": Method("head only", _always("--method", "head"), ours=True),
    "linear": Method("classifier only, logistic regression", None),
    # At the default's rate of 2e-4 a score for each weight falls to chance on omniglot_small1; chosen on its validation
    # split. Behind a head that learns as slowly as the default's, at 5e-4, masks fall apart as well.
    "piggyback": Method(
        "binary masks as Piggyback's, 1 bit per weight",
        _always("--granularity", "element", "--binary", "--score-rate", "1e-4", "--head-rate", "2e-3", "--norm-rate",
                "0", "--thin", "0", "--head-bits", "8"),
    ),
    # The constants of the authors' code: one rate for all that learns, no warm-up, the batch's statistics.
    "released": Method(
        "KSM as released, 30 epochs",
        _always("--score-rate", "2e-4", "--norm-rate", "2e-4", "--head-rate", "2e-4", "--warmup", "0", "--thin", "0",
                "--label-smoothing", "0", "--statistics", "batch", "--head-start", "random", "--absolute-rates"),
        epochs=30,
        batch=32,
    ),
    "reference": Method("KSM in torch, as --thin 0", None),
    "full": Method("full fine-tuning, fp16", None),
    "lora:4": Method("conv LoRA rank 4, fp16", None),
    "lora:8": Method("conv LoRA rank 8, fp16", None),
    "fast": Method("KSM, --fast", _always("--fast"), ours=True),
    "smaller": Method("KSM, --train-scale 0.7", _always("--train-scale", "0.7"), ours=True),
    "fast-smaller": Method("KSM, --fast --train-scale 0.7", _always("--fast", "--train-scale", "0.7"), ours=True),
}  # fmt: skip

# The default with one thing changed.
ABLATIONS = {
    "binary": Method("binary masks", _always("--binary"), ours=True),
    # A pack has room for amplified filters, which would be a second change.
    "channel": Method("one score per filter", _always("--granularity", "channel", "--no-amplify"), ours=True),
    "element": Method("one score per weight", _always("--granularity", "element"), ours=True),
    "masks-alone": Method("batch-norm as it is", _always("--norm-rate", "0"), ours=True),
    "statistics": Method("the batch's statistics", _always("--statistics", "batch"), ours=True),
    "score-slow": Method("scores at 2e-5", _always("--score-rate", "2e-5"), ours=True),
    "score-fast": Method("scores at 2e-3", _always("--score-rate", "2e-3"), ours=True),
    "norm-slow": Method("batch-norm at 2.5e-4", _always("--norm-rate", "2.5e-4"), ours=True),
    "norm-fast": Method("batch-norm at 1e-3", _always("--norm-rate", "1e-3"), ours=True),
    "warmup-short": Method("a warm-up of 5 %", _always("--warmup", "0.05"), ours=True),
    "head-random": Method("a head that starts at random", _always("--head-start", "random"), ours=True),
    "moments-8": Method("moments of Adam in 8 bits", _always("--moment-bits", "8"), ours=True),
    "activations-16": Method("activations in half precision", _always("--activation-bits", "16"), ours=True),
    "no-smoothing": Method("no label smoothing", _always("--label-smoothing", "0"), ours=True),
    "crop-narrow": Method("crops of 35 % of an image or more", _always("--crop-scale", "0.35"), ours=True),
    "crop-wide": Method("crops of 65 % of an image or more", _always("--crop-scale", "0.65"), ours=True),
    "flip": Method("mirrored images as well", _always("--flip"), ours=True),
    "epochs-2": Method("2 epochs", _always(), ours=True, epochs=2),
    "epochs-5": Method("5 epochs", _always(), ours=True, epochs=5),
    "epochs-10": Method("10 epochs", _always(), ours=True, epochs=10),
    "epochs-30": Method("30 epochs", _always(), ours=True, epochs=30),
}
ALL = {**METHODS, **ABLATIONS}


def _second_half(bundle: Bundle) -> str:
    return f"{bundle.layers[len(bundle.layers) // 2].name}.."


def identity(name: str, bundle: Bundle, images: ImageSet, seed: int) -> dict[str, Any]:
    """What makes two runs the same run; not the state of the code, which is recorded beside it."""
    from ksm_edge.training.settings import Settings, usual_epochs

    method = ALL[name]
    found: dict[str, Any] = {
        "method": name,
        "words": list(_words(method, bundle)),
        "task": images.name,
        "data_digest": images.digest(),
        "recipe": bundle.recipe,
        "backbone_digest": bundle.digest,
        "size": bundle.input.size,
        "seed": seed,
        "epochs": method.epochs or usual_epochs(len(images.train)),
        "batch": method.batch or Settings().batch,
    }
    if method.words or name in IN_RIVALS:
        found["settings"] = _settings(found)
    else:
        found |= _shared_with(name)
    return found


def _words(method: Method, bundle: Bundle) -> tuple[str, ...]:
    """Options of `ksm-edge adapt`; KSM in torch has no thinning, and everything else of the default."""
    if method.words:
        return method.words(bundle)
    return ("--thin", "0") if method is METHODS["reference"] else ()


def outdated(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What it was learned with where that has another default since, by setting."""
    now = _settings(identity) if "settings" in identity else _shared_with(identity["method"])
    then = BEFORE | {"amplify": None} | identity.get("settings", identity)
    changed = {name for name, value in now.items() if name not in ("epochs", "batch") and then[name] != value}
    return {name: then[name] for name in sorted(changed)}


def given(identity: Mapping[str, Any]) -> list[str]:
    """Settings that the method's own words change."""
    if "settings" not in identity:
        return []
    usual, its = _settings({**identity, "words": []}), _settings(identity)
    return sorted(dict(usual.items() ^ its.items()))


def _shared_with(name: str) -> dict[str, Any]:
    """Settings of today that a rival, which has none of its own, shares with the default."""
    from ksm_edge.training.settings import Settings

    shared = ("join_at",) if name in SCRIPTS else ("head_start", "head_rate", "join_at", *CROPS)
    return {name: getattr(Settings(), name) for name in shared}


def title(name: str, earlier: Iterable[str]) -> str:
    """The method's, with a remark on settings that have another default since its runs were learned."""
    return ALL[name].title + remark(earlier)


def remark(earlier: Iterable[str]) -> str:
    """How runs differ from today's, by names of settings: in crops throughout or at first, in the head's rate, in what
    is amplified, in what is never learned from, in more.

    >>> remark(["crop_scale", "head_rate", "join_at"])
    ' (crops of 35 %, head at 2e-3, a tenth left out)'
    """
    changed = set(earlier)
    if not changed <= REMARKED:
        return " (earlier settings)"
    crops = "crops of 35 %" if "crop_scale" in changed else "crops from 80 %" if "crop_start" in changed else ""
    head, cut = "head at 2e-3" * ("head_rate" in changed), "nothing amplified" * ("amplify" in changed)
    left = "a tenth left out" * ("join_at" in changed)
    parts = [part for part in (crops, head, cut, left) if part]
    return f" ({', '.join(parts)})" if parts else ""


def learn(identity: dict[str, Any], bundle: Bundle, images: ImageSet, data: Path, pack: Path) -> dict[str, Any]:
    """Learn it in fresh processes, read the test set once, and leave the pack, if the method has one, at `pack`."""
    name, common = identity["method"], ["--bundle", str(bundle.path), *_schedule(identity)]
    if ALL[name].words is None:
        script = HERE / SCRIPTS.get(name, "rivals.py")
        words = [] if name in SCRIPTS else [IN_RIVALS.get(name, name)]
        return fresh_json([sys.executable, str(script), *words, str(data), *common])
    adapt = [*KSM_EDGE, "adapt", str(data), "--out", str(pack), "--threads", "1", *common, *identity["words"], "--json"]
    found = fresh_json(adapt)
    _require_settings(pack, identity)
    found |= judged(pack, bundle.path, data)
    if name == "piggyback":  # as it is published: a bit for every weight; and the head of the pack
        weights = sum(w.weight.size for w in bundle.weights.values())
        found["coded_bytes"] = found["pack_bytes"]
        found["pack_bytes"] = weights // 8 + len(images.classes) * (bundle.features + 4)
    return found


def judged(pack: Path, bundle: Path, data: Path) -> dict[str, Any]:
    """A pack's `test_accuracy` on how many `test_images`, as `ksm-edge eval` finds it in a fresh process."""
    command = [*KSM_EDGE, "eval", str(pack), str(data), "--bundle", str(bundle), "--threads", "1", "--json"]
    found = fresh_json(command)
    if found["split"] != "test":
        raise SystemExit(f"{data}: has no test/ to judge by")
    return {"test_accuracy": found["accuracy"], "test_images": found["n"]}


def _schedule(identity: dict[str, Any]) -> list[str]:
    return [word for name in ("seed", "batch", "epochs") for word in (f"--{name}", str(identity[name]))]


def _settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Those that do something: how crops begin is nothing where they do not narrow."""
    from ksm_edge.training.crops import narrows
    from ksm_edge.training.settings import Settings

    found = settings_by([*_schedule(identity), *identity["words"]])
    if not narrows(Settings(**{name: found[name] for name in ("crop_scale", "train_scale")})):
        del found["crop_start"]
    return found


def settings_by(words: Iterable[str]) -> dict[str, Any]:
    """What `ksm-edge adapt` makes of these options, epochs and batch among them, the seed aside."""
    return dict(_settings_by(tuple(words)))


@cache
def _settings_by(words: tuple[str, ...]) -> Mapping[str, Any]:
    """Once for each: a table asks it of hundreds of runs, and the parser reads every board's profile."""
    from ksm_edge.cli.adapt_options import settings_of
    from ksm_edge.cli.main import build_parser
    from ksm_edge.device import Device

    args = build_parser().parse_args(["adapt", "DATA", *words])
    settings = settings_of(args, Device.load("host"), 0)
    limited = settings.thin is None and settings.method == "ksm"
    without = {"seed"} if limited else {"seed", "mask_bits"}  # which then limits nothing
    return {name: value for name, value in asdict(settings).items() if name not in without}


def _require_settings(pack: Path, identity: dict[str, Any]) -> None:
    from ksm_edge.pack.files import load_pack

    wanted = {**identity["settings"], "seed": identity["seed"]}
    used = dict(load_pack(pack).record["settings"])
    for name in {"mask_bits", "crop_start"} - wanted.keys():
        del used[name]
    if used != {**wanted, "batch": min(wanted["batch"], used["batch"])}:  # a task may have fewer images than a batch
        raise SystemExit(f"{identity['task']}: `ksm-edge adapt` used the settings {used}, expected were {wanted}")


def temporary_pack() -> tempfile.TemporaryDirectory[str]:
    """A folder for a pack that nobody keeps."""
    return tempfile.TemporaryDirectory(prefix="ksm-edge-accuracy-")

"""The options of `ksm-edge adapt`, and the settings that they come to."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksm_edge.cli.arguments import Options, add_bundle, add_device, add_json, add_threads, byte_size, positive

if TYPE_CHECKING:
    from ksm_edge.device import Device
    from ksm_edge.training.settings import Settings

# As in `ksm_edge.runtimes.engine`, whose imports are not needed for --help.
ENGINES = ("onnxruntime", "pytorch", "cuda")
DEMO_EPOCHS = 6
# Settings that are numbers, with what they mean; defaults are those of `ksm_edge.training.settings`.
RATES = {
    "score_rate": "learning rate of the scores",
    "norm_rate": "learning rate of batch-norm",
    "head_rate": "learning rate of the head",
    "warmup": "share of all steps in which the rates rise to their full value",
    "label_smoothing": "label smoothing",
    "validation": "share of the training images held out for choosing (default: 0.1)",
    "join_at": "share of the epochs behind which held-out images are learned from as well, once the epoch just ended "
    "would be chosen; 1: never (default: 0.75, of four epochs or more)",
}
CUTS = {
    "cut_penalty": "pull of the scores towards keeping, as a share of the score rate: fewer kernels are cut",
    "mask_bits": "bits that masks may take in the pack for each weight of the backbone, more beyond ten classes: in "
    "mid training cut kernels that matter least go back to 1 (default: 0.25, for packs below 1 %% of the backbone)",
    "thin": "put this share of the cut kernels back instead",
    "thin_at": "when, as a share of all steps; --learn-in-bits begins there too",
}
PACK_BITS = {
    "scale_bits": "bits of each mask scale in the pack, 1 to 8, or 7 where masks amplify",
    "norm_bits": "bits of each batch-norm difference, 2 to 8 (with batch statistics 8, with --from no fewer)",
    "head_bits": "bits of each weight of the head, 2 to 8",
}
OF_MASKS = (
    "masked",
    "granularity",
    "binary",
    "amplify",
    "score_rate",
    "cut_penalty",
    "mask_bits",
    "thin",
    "scale_bits",
)
LEARNING_BITS = {
    "moment_bits": "bits of each of a score's moments while learning, 32 or 8; 8 also where memory is short",
    "activation_bits": "bits of what the forward pass keeps for gradients, 32 or 16: in MobileNets half as much",
    "product_bits": "bits of what matrix products multiply while learning, 32, or 16 where this processor does that "
    "faster",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="folder or zip with train/<class>/ (and test/<class>/), or just <class>/ (default: handwritten digits)",
    )
    parser.add_argument("--out", type=Path, metavar="NAME.ksm", help="pack to write (default: the data's name, here)")
    add_bundle(parser)
    parser.add_argument(
        "--from",
        dest="parent",
        type=Path,
        metavar="PACK",
        help="go on from a pack: more photos, or more classes as well",
    )
    interrupted = parser.add_mutually_exclusive_group()
    interrupted.add_argument("--resume", action="store_true", help="go on from the checkpoint of an interrupted run")
    interrupted.add_argument("--fresh", action="store_true", help="begin anew where there is one, which loses it")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="less time for some accuracy, by fewer --layers, few --views and --product-bits 16",
    )
    parser.add_argument(
        "--small", action="store_true", help="a smaller pack for some accuracy, by more thinning and fewer bits"
    )
    add_json(parser)
    _add_board(parser.add_argument_group("the board"))
    _add_what_learns(parser.add_argument_group("what learns"))
    _add_how(parser.add_argument_group("how"))
    _add_pack(parser.add_argument_group("what the pack takes"))


def _add_board(group: Options) -> None:
    add_device(group)
    add_threads(group)
    group.add_argument("--memory-budget", type=byte_size, metavar="SIZE", help="such as 256MiB (default: the device's)")
    group.add_argument(
        "--runtime",
        choices=ENGINES,
        default=ENGINES[0],
        help="what computes gradients (default: onnxruntime); cuda, and pytorch on the processor, need torch and take "
        "what memory they want",
    )
    group.add_argument(
        "--tune",
        action="store_true",
        help="measure first, once for a backbone and these options, which forms of the computation are the fastest on "
        "this board; they change last bits",
    )
    _add_numbers(group, LEARNING_BITS, positive, "N")


def _add_what_learns(group: Options) -> None:
    group.add_argument(
        "--method", choices=("ksm", "norm", "head"), help="what learns: masks, batch-norm and head (ksm)"
    )
    group.add_argument(
        "--layers",
        metavar="NAMES",
        help="layers that may change: names, patterns, NAME.. for all from there on, or such as 35%%.. for all but the "
        "first 35 %% of them",
    )
    group.add_argument("--masked", metavar="NAMES", help="of those the ones that get a mask (default: all)")
    group.add_argument("--granularity", metavar="G", help="kernel, group:N, channel or element (default: kernel)")
    group.add_argument("--binary", action="store_true", help="masks of 0 and 1 only")
    group.add_argument(
        "--amplify",
        action=argparse.BooleanOptionalAction,
        help="kernels may also grow, to 1.5 to 2 times (default: without --thin, where --mask-bits has room for many)",
    )
    group.add_argument("--statistics", choices=("frozen", "batch"), help="batch-norm's statistics (default: frozen)")
    group.add_argument("--head-start", choices=("zero", "random"), help="what the head begins with (default: zero)")


def _add_how(group: Options) -> None:
    group.add_argument(
        "--epochs", type=positive, metavar="N", help="passes over the images (default: 8, more for few images)"
    )
    group.add_argument("--batch", type=positive, metavar="N", help="images per optimizer step (default: the device's)")
    group.add_argument(
        "--train-scale",
        type=float,
        metavar="X",
        help="for less time, size of images in most epochs, as a share of what the backbone takes (default: 1)",
    )
    group.add_argument(
        "--whole-at",
        type=float,
        metavar="X",
        help="with --train-scale, share of the epochs behind which they are whole; 1: never (default: 0.75)",
    )
    group.add_argument(
        "--views",
        type=positive,
        metavar="N",
        help="see each image in N ways only, and keep on disk what the layers in front of --layers make of them",
    )
    group.add_argument(
        "--crop-scale",
        type=float,
        metavar="X",
        help="least share of an image that a random crop shows (default: --crop-start, narrowing to 0.35 as training "
        "accuracy rises from 80 to 100 %%, or from the first of several --views to the last; with --train-scale 0.35)",
    )
    group.add_argument(
        "--crop-start",
        type=float,
        metavar="X",
        help="that share at first, when little is known of the task, 0.35 or more (default: 0.8 of what evaluation "
        "sees)",
    )
    group.add_argument("--flip", action="store_true", help="also train on mirrored images: not for signs or text")
    group.add_argument("--balanced", action="store_true", help="weigh rare classes more")
    group.add_argument(
        "--seed", type=int, metavar="N", help="of the split, the order and the augmentation (default: 0)"
    )
    _add_numbers(group, RATES, float, "X")
    group.add_argument(
        "--absolute-rates",
        action="store_true",
        help="take the rates of scores, batch-norm and head as they are: usually they are scaled from MobileNetV2's "
        "depth, gammas and features to the backbone's",
    )


def _add_pack(group: Options) -> None:
    _add_numbers(group, CUTS, float, "X")
    _add_numbers(group, PACK_BITS, positive, "N")
    group.add_argument(
        "--learn-in-bits", action="store_true", help="in the second half learn with the values that the pack will hold"
    )


def _add_numbers(group: Options, meanings: Mapping[str, str], kind: Callable[[str], float], letter: str) -> None:
    for name, meaning in meanings.items():
        group.add_argument(_option(name), type=kind, metavar=letter, help=meaning)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def settings_of(args: argparse.Namespace, device: Device, images: int) -> Settings:
    """What the options, the device and the defaults for that many training images come to."""
    from ksm_edge.errors import UsageError
    from ksm_edge.training.settings import FAST, SMALL, Settings, usual_epochs

    if args.mask_bits is not None and (args.small or args.thin is not None):
        raise UsageError("--mask-bits and --thin, which --small brings along, say the same in two ways: give one")
    if args.whole_at is not None and args.train_scale is None:
        raise UsageError("--whole-at says when images of --train-scale end: give that too")
    if args.crop_start is not None and any((args.crop_scale, args.train_scale)):
        raise UsageError(
            "--crop-start says where crops begin to narrow: with --crop-scale and --train-scale they do not"
        )
    if args.method in ("norm", "head"):
        options = [name for name in OF_MASKS if getattr(args, name) is not None and getattr(args, name) is not False]
        if options:
            raise UsageError(f"--method {args.method} learns no masks: leave out {', '.join(map(_option, options))}")
    names = ("epochs", "batch", "method", "layers", "train_scale", "whole_at", "views", "crop_scale", "crop_start",
             "masked", "granularity", "amplify", "statistics", "head_start", "seed", *RATES, *CUTS, *PACK_BITS,
             *LEARNING_BITS)  # fmt: skip
    given: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    epochs = DEMO_EPOCHS if args.data is None else usual_epochs(images)
    defaults: dict[str, Any] = {"batch": device.batch, "epochs": epochs}
    defaults |= {**(SMALL if args.small else {}), **(FAST if args.fast else {})}
    switches = {name: True for name in ("flip", "balanced", "learn_in_bits") if getattr(args, name)}
    return Settings(**{**defaults, **given, **switches}, soft=not args.binary, scaled_rates=not args.absolute_rates)

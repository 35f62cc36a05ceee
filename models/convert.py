"""`python -m models.checkpoint`: weights into other files, what a file holds, known weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from models.bsmamba2 import MAX_CHUNK_SECONDS
from models.checkpoint import (
    Checkpoint,
    build_model,
    read_checkpoint,
    save_checkpoint,
    save_pickled,
)
from models.errors import InputError, one_line_warnings
from models.files import write_text
from models.msst import to_msst
from models.official import to_official

# Kind -> the suffix that names it where --to is not given.
KINDS = {"safetensors": ".safetensors", "official": ".ckpt", "msst": ".pth", "onnx": ".onnx"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m models.checkpoint", description="Weights: convert, inspect, download."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    export = commands.add_parser("export", help="write weights for publishing, or for others")
    export.add_argument("source", type=Path, help="any checkpoint of BSMamba2")
    export.add_argument("target", type=Path, help="file to write")
    export.add_argument(
        "--to",
        choices=KINDS,
        help="official: the authors' Lightning file; msst: bare weights and a YAML beside; onnx: "
        "the spectrogram network (default: by the target's suffix, else safetensors)",
    )
    export.add_argument("--msst-yaml", type=Path, help="MSST's configuration of the source")
    export.add_argument("--ema", action="store_true", help="averaged weights of an official file")
    export.add_argument("--stem-names", metavar="A,B", help="name, or rename, its stems")
    export.add_argument("--license", metavar="ID", help="for the model card, as mit")
    export.add_argument(
        "--seconds", type=float, default=8.0, help="chunk of an ONNX file (default: 8)"
    )

    info = commands.add_parser("info", help="what a file holds")
    info.add_argument("source", type=Path)

    download = commands.add_parser("download", help="known weights, verified, into the cache")
    download.add_argument("name", nargs="?", help="without a name: list what is known")
    return parser.parse_args(argv)


def export(arguments: argparse.Namespace) -> None:
    """Read any weights, check every name and shape, write them as `--to` says."""
    target: Path = arguments.target
    kind = arguments.to or next(
        (kind for kind, suffix in KINDS.items() if suffix == target.suffix), "safetensors"
    )
    if kind == "safetensors" and target.suffix != ".safetensors":
        raise InputError(f"{target}: name it .safetensors, or say --to")
    found = read_checkpoint(arguments.source, arguments.msst_yaml, arguments.ema)
    if arguments.stem_names:
        names = tuple(arguments.stem_names.split(","))
        found = replace(found, config=replace(found.config, stem_names=names))
    build_model(found, str(arguments.source))
    writers: dict[str, Callable[[Checkpoint, argparse.Namespace], None]] = {
        "safetensors": _write_safetensors,
        "official": _write_official,
        "msst": _write_msst,
        "onnx": _write_onnx,
    }
    try:
        writers[kind](found, arguments)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error


def _write_safetensors(found: Checkpoint, arguments: argparse.Namespace) -> None:
    from models.card import model_card

    target: Path = arguments.target
    save_checkpoint(target, found.config, found.state_dict)
    print(target)
    card = model_card(found, target.stem, target.name, arguments.license)
    note = ": the model card, to be completed before you publish"
    _write_beside(target.with_suffix(".md"), card, note)


def _write_official(found: Checkpoint, arguments: argparse.Namespace) -> None:
    save_pickled(arguments.target, to_official(found.config, found.state_dict))
    print(arguments.target)


def _write_msst(found: Checkpoint, arguments: argparse.Namespace) -> None:
    target: Path = arguments.target
    content = to_msst(found.config)
    save_pickled(target, dict(found.state_dict))
    print(target)
    _write_beside(target.with_suffix(".yaml"), content)


def _write_beside(path: Path, content: str, note: str = "") -> None:
    """Write a text that goes with weights, unless there is one, which a person may have edited."""
    if path.exists():
        print(f"{path}: kept, it exists; see that it fits these weights")
        return
    write_text(path, content)
    print(f"{path}{note}")


def _write_onnx(found: Checkpoint, arguments: argparse.Namespace) -> None:
    from models.export import export_onnx

    config = found.config
    if not 1 / config.sample_rate <= arguments.seconds <= MAX_CHUNK_SECONDS:
        raise InputError(
            f"--seconds {arguments.seconds}: must be above 0, at most {MAX_CHUNK_SECONDS}"
        )
    samples = round(arguments.seconds * config.sample_rate)
    frames = samples // config.hop_length + 1
    error = export_onnx(build_model(found, str(arguments.source)), arguments.target, frames)
    print(f"{arguments.target}: {frames} frames, differs from PyTorch by {error:.1e}")


def print_info(source: Path) -> None:
    found = read_checkpoint(source)
    model = build_model(found, str(source))
    print(f"{source}: BSMamba2, {sum(p.numel() for p in model.parameters()):,} parameters")
    for name, value in asdict(found.config).items():
        if name not in ("scan_backend", "gradient_checkpointing", "band_widths"):
            print(f"  {name}: {', '.join(value) if isinstance(value, tuple) else value}")
    if found.training:
        print(f"  training state: {', '.join(found.training)}")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    with one_line_warnings():
        if arguments.command == "export":
            export(arguments)
        elif arguments.command == "info":
            print_info(arguments.source)
        else:
            from models.registry import describe, fetch

            print(fetch(arguments.name) if arguments.name else describe())
    return 0

"""A look at a data set: what is in it, what is broken, where each stem is active.

    python -m training.data.inspect ROOT [--picture FILE] [--listen N] [key=value ...]

prints tracks, hours, sample formats and the active share of every stem, and lists what is broken
and why. `--picture` draws where in each track which stem is active; `--listen N` writes N training
examples, mixture and targets, as the keys of training/config.py that follow would mix them
(`data.polarity_prob=0.5`, `model.stem_names=[drums]`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile

from models.errors import InputError, log_level, run_command
from models.files import whole_file
from training.config import Config, load_config
from training.data.activity import ActivityIndex, build_activity_index
from training.data.cache import HeaderCache, cache_folders
from training.data.mixing import RandomMixes
from training.data.sources import open_tracks
from training.data.splits import list_everything
from training.data.track import MIXTURE, Expected, Track
from training.loaders import make_mixes, open_subset

CONFIG = Path(__file__).parents[2] / "configs" / "bsmamba2.yaml"
_MAX_ROWS = 200  # tracks in a picture
_COLOURS = ("tab:red", "tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:brown")


def describe(
    subsets: dict[str, list[Track]], index: ActivityIndex, stems: Sequence[str]
) -> Iterator[str]:
    """What is in a data set, line by line.

    Args:
        subsets: the sound tracks.
        index: of all of them, in this order.
        stems: those to tell the activity of.
    """
    tracks = [track for members in subsets.values() for track in members]
    for subset, members in subsets.items():
        yield f"{subset}: {len(members)} tracks, {_hours(members):.2f} h"
    files = [file for track in tracks for stem in stems if (file := track.file(stem))]
    for title, counts in (
        ("rates", Counter(f"{file.sample_rate} Hz" for file in files)),
        ("sample formats", Counter(file.subtype for file in files)),
        ("channels", Counter({1: "mono", 2: "stereo"}[file.channels] for file in files)),
    ):
        yield f"{title}: " + ", ".join(f"{name} ({n} stems)" for name, n in counts.most_common())
    possible = [_windows(track, index.segment_frames) for track in tracks]
    yield f"{'stem':<12}{'active':>8}{'windows':>10}{'tracks without any':>20}{'files missing':>15}"
    for stem in stems:
        rows = index.windows[stem]
        share = len(rows) / max(1, sum(possible))
        without = len(tracks) - len(np.unique(rows[:, 0]))
        missing = sum(track.file(stem) is None for track in tracks)
        yield f"{stem:<12}{share:>8.1%}{len(rows):>10}{without:>20}{missing:>15}"


def draw_activity(tracks: Sequence[Track], index: ActivityIndex, path: Path) -> None:
    """Draw where in each track which stem is active; of many tracks some, evenly chosen.

    Raises:
        InputError: the picture cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    count = min(_MAX_ROWS, len(tracks))
    chosen = np.linspace(0, len(tracks) - 1, count).round().astype(int)
    figure = Figure(figsize=(12, 1.5 + 0.22 * count), dpi=100, layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(index.windows, itertools.cycle(_COLOURS)))  # noqa: B905 (endless)
    lane = 0.8 / len(index.windows)
    for row, number in enumerate(chosen):
        rate = tracks[number].sample_rate
        axes.barh(row, tracks[number].frames / rate, height=0.9, color="0.94")
        for place, (stem, rows) in enumerate(index.windows.items()):
            bars = _spans(rows[rows[:, 0] == number, 1], index.segment_frames, rate)
            axes.broken_barh(bars, (row - 0.4 + place * lane, 0.9 * lane), color=colours[stem])
    # Text between two dollar signs would be read as a formula.
    names = [tracks[number].name[:40].replace("$", r"\$") for number in chosen]
    axes.set_yticks(range(count), names, fontsize=7)
    axes.set(xlabel="time [s]", xlim=(0, None), ylim=(count - 0.5, -0.5))
    title = f"active {index.segment_frames / tracks[0].sample_rate:g} s windows"
    axes.set_title(title + (f", {count} of {len(tracks)} tracks" if count < len(tracks) else ""))
    patches = [Patch(color=colour, label=stem) for stem, colour in colours.items()]
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1, 1))
    try:
        with whole_file(path) as temporary:
            figure.savefig(temporary)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the picture cannot be written ({error})") from error


def write_examples(mixes: RandomMixes, count: int, names: Sequence[str], folder: Path) -> None:
    """Write examples of full length as float wav: `000_mixture.wav`, `000_vocals.wav`, ...

    Raises:
        InputError: a file cannot be written.
    """
    for i in range(count):
        example = mixes[i]
        waves = {MIXTURE: example["mixture"], **dict(zip(names, example["target"], strict=True))}
        for name, wave in waves.items():
            path = folder / f"{i:03d}_{name}.wav"
            try:
                with whole_file(path) as temporary:
                    rate = mixes.tracks[0].sample_rate
                    soundfile.write(temporary, wave.numpy().T, rate, subtype="FLOAT")
            except (OSError, soundfile.SoundFileRuntimeError) as error:
                raise InputError(f"{path}: cannot be written ({error})") from error


def inspect(root: Path, config: Config) -> tuple[dict[str, list[Track]], ActivityIndex, list[str]]:
    """Open a data root.

    Returns:
        Subset -> sound tracks, the index of all of them, and what is wrong with the others.

    Raises:
        InputError: `root` is no data root.
    """
    data = config.data
    expected = Expected(config.model.sample_rate, data.stems, data.missing_stems)
    headers = HeaderCache(root, cache_folders(root, data.cache_dir))
    subsets: dict[str, list[Track]] = {}
    broken: list[str] = []
    for subset, paths in list_everything(root).items():
        subsets[subset], reasons = open_tracks(root, paths, expected, headers, subset == "test")
        broken += reasons
    headers.save()
    tracks = [track for members in subsets.values() for track in members]
    index = _index(tracks, config)
    return subsets, index, [*broken, *index.broken.values()]


def _index(tracks: Sequence[Track], config: Config) -> ActivityIndex:
    data = config.data
    return build_activity_index(tracks, data.stems, config.segment_frames, data.cache_dir)


def _hours(tracks: Sequence[Track]) -> float:
    return sum(track.frames / track.sample_rate for track in tracks) / 3600


def _windows(track: Track, segment_frames: int) -> int:
    """How many windows a track has, active or not."""
    return max(0, (track.frames - segment_frames) // max(1, segment_frames // 2) + 1)


def _spans(starts: np.ndarray, segment_frames: int, rate: int) -> list[tuple[float, float]]:
    """Overlapping windows joined: first second and length of each stretch."""
    if len(starts) == 0:
        return []
    breaks = np.flatnonzero(np.diff(starts) > segment_frames) + 1
    return [
        (part[0] / rate, (part[-1] - part[0] + segment_frames) / rate)
        for part in np.split(starts, breaks)
    ]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m training.data.inspect", description="Look at a data set."
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="the data root")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for training.train")
    parser.add_argument(
        "--config", default=CONFIG, metavar="FILE", help="the run's (configs/bsmamba2.yaml)"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the activity (png, pdf)")
    parser.add_argument("--listen", type=int, metavar="N", default=0, help="write N examples")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        default=Path("listen"),
        help="of them (%(default)s)",
    )
    args = parser.parse_intermixed_args(argv)
    if args.listen < 0:
        parser.error("--listen must be 0 or more")
    return args


# What the index cannot read is in the list at the end.
@log_level(logging.ERROR, "training.data.activity")
def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # A JSON text is YAML whatever the path holds. A broken track is what this command is for.
    words = [f"data.root={json.dumps(str(args.root))}", "run.dir=unused", "data.skip_broken=true"]
    config = load_config(args.config, [*words, *args.overrides])
    subsets, index, broken = inspect(config.data.root, config)
    tracks = [track for members in subsets.values() for track in members]
    print(f"{args.root}: {len(tracks)} tracks, {_hours(tracks):.2f} h, {len(broken)} broken")
    if tracks:
        print("\n".join(f"  {line}" for line in describe(subsets, index, config.data.stems)))
    for reason in broken:
        print(f"broken: {reason}")
    if args.picture and tracks:
        draw_activity(tracks, index, args.picture)
        print(f"picture: {args.picture}")
    if args.listen:
        train = open_subset(config, "train", {})
        mixes = make_mixes(config, train, _index(train, config))
        write_examples(mixes, args.listen, config.model.stem_names, args.output)
        print(f"examples: {args.output} ({args.listen} mixtures and their targets)")
    return 0


if __name__ == "__main__":
    run_command(main)

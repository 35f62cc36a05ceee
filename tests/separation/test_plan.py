"""What is separated into which files, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.errors import InputError
from separation.plan import DEFAULT_NAME, Job, Song, check_template, find_songs, plan_jobs
from separation.sharding import Shard

STEMS = ("vocals", "instrumental")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Empty files: planning opens none."""
    for name in (
        "music/b.flac", "music/a.MP3", "music/cover.jpg", "music/.hidden.wav",
        "music/live/2001/a.wav", "music/.trash/x.wav", "dots/...Baby/...Baby.wav",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


def outputs(songs: list[Song], template: str = DEFAULT_NAME) -> tuple[list[str], list[str]]:
    jobs, problems = plan_jobs(songs, STEMS, Path("out"), template, "wav")
    return [str(job.paths[0]) for job in jobs], [problem.text for problem in problems]


def test_folders_are_mirrored(library: Path) -> None:
    songs, problems = find_songs([str(library / "music")], library / "out")
    assert not problems
    assert outputs(songs) == (
        ["out/a/vocals.wav", "out/b/vocals.wav", "out/live/2001/a/vocals.wav"],
        [],
    )


def test_names_of_songs_may_begin_with_dots(library: Path) -> None:
    songs, _ = find_songs([str(library / "dots")], library / "out")
    assert [song.track for song in songs] == ["...Baby"]


def test_what_goes_to_standard_output_is_never_done() -> None:
    assert not Job(Song("-"), ()).is_done


def test_a_folder_does_not_take_its_own_output(library: Path) -> None:
    (library / "music/live/2001/a.wav").rename(library / "music/live/2001/done.wav")
    songs, _ = find_songs([str(library / "music")], library / "music" / "live")
    assert [song.track for song in songs] == ["a", "b"]


def test_stems_do_not_go_among_the_songs(library: Path) -> None:
    with pytest.raises(InputError, match="--output .*music: is a folder of songs"):
        find_songs([str(library / "music")], library / "empty" / ".." / "music")


def test_folders_that_cannot_be_read_are_named(library: Path, refuse_folder) -> None:
    refuse_folder("live")
    songs, problems = find_songs([str(library / "music")], library / "out")
    assert [song.track for song in songs] == ["a", "b"]
    assert [problem.text for problem in problems] == [
        f"{library / 'music' / 'live'}: cannot be read (Permission denied)"
    ]


def test_files_are_taken_as_named_and_once(library: Path) -> None:
    cover = str(library / "music/cover.jpg")
    songs, problems = find_songs([cover, "-", cover], library)
    assert songs == [Song(cover), Song("-")]
    assert songs[1].track == "stdin"
    assert not problems


def test_what_is_not_there_is_a_problem_each(library: Path) -> None:
    songs, problems = find_songs([str(library / "empty"), "absent.wav"], library / "out")
    assert not songs
    assert [problem.text for problem in problems] == [
        f"{library / 'empty'}: no audio files in this folder",
        "absent.wav: no such file or folder",
    ]


def test_songs_that_would_share_a_file_are_refused_and_others_kept() -> None:
    songs = [Song("x/a.wav"), Song("y/a.flac"), Song("b.wav")]
    paths, problems = outputs(songs)
    assert paths == ["out/b/vocals.wav"]
    assert len(problems) == 1
    assert problems[0].startswith("x/a.wav and y/a.flac: both would write out/a/vocals.wav")
    paths, problems = outputs(songs, "{track}.{suffix}/{stem}.{ext}")
    assert len(paths) == 3
    assert not problems


def test_a_song_is_not_written_over(library: Path) -> None:
    song = library / "music/live/2001/a.wav"
    output = song.parents[1]
    jobs, problems = plan_jobs([Song(str(song))], ["2001"], output, "{stem}/{track}.{ext}", "wav")
    assert not jobs
    assert "would write over the song" in problems[0].text


def test_a_track_whose_name_leaves_the_folder() -> None:
    assert Path("...wav").stem == ".."
    paths, problems = outputs([Song("...wav"), Song("b.wav")])
    assert paths == ["out/b/vocals.wav"]
    assert problems == ["...wav: its stems would leave the output folder (../vocals.wav)"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("../{stem}.{ext}", "leave the output folder"),
        ("/tmp/{stem}.{ext}", "leave the output folder"),
        ("{track}/../../{stem}", "leave the output folder"),
        ("{track}_{stem}.mp3", "the files will be wav"),
        ("{track}_{stem}", "the files will be wav"),
        ("{track}_{stem}.{suffix}", "the files will be wav"),
        ("{track}.{ext}", "needs {stem}"),
        ("{artist}/{stem}.{ext}", "nothing else in braces"),
        ("{stem.__class__}", "nothing else in braces"),
        ("{stem!r}", "nothing else in braces"),
        ("{stem:>99}", "nothing else in braces"),
        ("{stem", "expected '}'"),
    ],
)
def test_templates_that_are_refused(template: str, message: str) -> None:
    with pytest.raises(InputError, match=r"--name") as caught:
        check_template(template, "wav")
    assert message in str(caught.value)


def test_shards_cover_everything_once() -> None:
    items = list(range(10))
    shards = [Shard.from_environment({"RANK": str(r), "WORLD_SIZE": "3"}) for r in range(3)]
    taken = [shard.take(items) for shard in shards]
    assert sorted(sum(taken, [])) == items
    assert max(map(len, taken)) - min(map(len, taken)) <= 1
    assert [shard.is_first for shard in shards] == [True, False, False]
    assert Shard.from_environment({}).take(items) == items


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
    ],
)
def test_ranks_that_cannot_be(environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match="RANK"):
        Shard.from_environment(environment)

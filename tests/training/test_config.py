"""The configuration: what the files say, and one line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from models import BSMamba2Config
from models.errors import InputError
from training.config import Config, dump_config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = "data: {root: music}\nrun: {dir: runs/x}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_paper_file_is_the_paper() -> None:
    config = load_config(CONFIGS / "bsmamba2.yaml", ["data.root=music"])
    assert config.model == BSMamba2Config()
    assert config.segment_frames == 352_800
    settings = config.training
    assert settings.batch_size * settings.accumulation == 60
    assert settings.learning_rate == 5e-4
    assert settings.betas == (0.9, 0.999)
    assert (settings.weight_decay, settings.clip_norm, settings.ema_decay) == (0.01, 3, 0.999)
    assert (settings.precision, settings.schedule, settings.seed) == ("bf16", "constant", 42)
    assert config.loss.windows == (4096, 2048, 1024, 512, 256)
    assert (config.loss.time_weight, config.loss.hop, config.loss.n_fft_min) == (10, 147, 2048)
    assert (config.data.silent_prob, config.data.gain_min, config.data.gain_max) == (0.1, 0.5, 1.5)


def test_defaults_are_the_paper_files_values(tmp_path: Path) -> None:
    paper = load_config(CONFIGS / "bsmamba2.yaml", ["data.root=music", "run.dir=runs/x"])
    default = load_config(write(tmp_path, MINIMAL), ["training.accumulation=12"])
    assert default == paper


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_is_valid_and_its_network_the_paper_s_or_smaller(path: Path) -> None:
    config = load_config(path, ["data.root=music"])
    assert config.model.dim <= 256 and config.model.depth <= 6


def test_demo_file_is_valid() -> None:
    config = load_config(CONFIGS / "demo.yaml")
    assert config.training.max_minutes is not None and config.training.max_minutes <= 5


def test_four_stems_differ_from_the_paper_in_little_else() -> None:
    paper = load_config(CONFIGS / "bsmamba2.yaml", ["data.root=music"])
    four = load_config(CONFIGS / "musdb_4stems.yaml", ["data.root=music"])
    assert four.model.stem_names == four.data.stems
    settings = four.training
    assert settings.batch_size * settings.accumulation == 60
    same = {"batch_size": 5, "accumulation": 12}
    assert settings.model_copy(update=same) == paper.training
    assert (four.data, four.loss) == (paper.data, paper.loss)


def test_overrides_are_yaml_and_win(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, MINIMAL),
        [
            "training.batch_size=2",
            "training.learning_rate=1e-3",
            "model.stem_names=[drums]",
            "run.dir=/a=b/c",
            "training.max_minutes=null",
            "training.save_ema=false",
            "data.root=~/music",
        ],
    )
    assert config.training.batch_size == 2
    assert config.training.learning_rate == 1e-3
    assert config.model.stem_names == ("drums",)
    assert config.run.dir == Path("/a=b/c")
    assert config.training.save_ema is False
    assert config.data.root == Path.home() / "music"


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "demo.yaml", ["training.learning_rate=1e-5"])
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.batch_siz=2"],
            r"^training.batch_siz: unknown key; did you mean training.batch_size\?$",
        ),
        (["model.dmi=2"], r"^model.dmi: unknown key; did you mean model.dim\?$"),
        (["trainin.seed=1"], r"^trainin: unknown key; did you mean training\?$"),
        (["training.batch_size=two"], r'^training.batch_size: .*valid integer, got "two"$'),
        (["training.batch_size=2.5"], r"^training.batch_size: .*valid integer, got 2.5$"),
        (["training.batch_size=true"], r"^training.batch_size: .*valid integer, got true$"),
        (["training.batch_size=0"], r"^training.batch_size: .*greater than 0, got 0$"),
        (["training.learning_rate=.nan"], r"^training.learning_rate: .*finite number, got NaN$"),
        (["training.learning_rate=-1"], r"^training.learning_rate: .*greater than 0, got -1$"),
        (["training.precision=fp8"], r"^training.precision: should be .*'bf16'.*, got \"fp8\"$"),
        (["training.device=gpu"], r"^training.device: should be auto, cpu.*, got \"gpu\"$"),
        (["training.betas=[0.9]"], r"^training.betas"),
        (["training.betas=[0.9, 1]"], r"^training.betas.1: .*less than 1, got 1$"),
        (["data.silent_prob=1"], r"^data.silent_prob: .*less than 1, got 1$"),
        (["data.gain_min=2"], r"^data: gain_min 2.0 should not exceed gain_max 1.5$"),
        (
            ["data.short_until=9", "data.short_pieces=173"],
            r"^data.short_pieces: 173 pieces of 8.0 s are too short for the STFT windows",
        ),
        (["data.segment_seconds=0.02"], r"^data.segment_seconds: should be at least 0.046"),
        (["training.seed=18446744073709551616"], r"^training.seed: .*less than"),
        (["loss.windows=[2049]"], r"^loss.windows: FFT lengths should be even, got 2049$"),
        (["data.stems=[vocals]"], r"^data.?.?stems: name all stems that sum to the mixture"),
        (["training.betas=[0.9]"], r"^training.betas: more values are needed, got \[0.9\]"),
        (["model.audio_channels=1"], r"^model.audio_channels: data are .* 2 is needed, got 1"),
        (["model.stem_names=[piano]"], r"^model.stem_names: 'piano' is not in data.stems"),
        (["model.dim=-4"], r"^model.*dim"),
        (["training=3"], r"^training: .*section.*, got 3$"),
        (["data.root="], r"^data.root: .*string, got null$"),
        (["training.batch_size"], r"^'training.batch_size': expected key=value"),
        (["data.root.x=1"], r"^data.root.x: 'root' is a value, not a section$"),
        (["training.betas=[0.9"], r"^training.betas=\[0.9, line 1: not valid YAML"),
    ],
)
def test_wrong_overrides(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_config(write(tmp_path, MINIMAL), overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [["data.short_until=9", "data.short_pieces=172"], ["data.short_pieces=999"]],
)
def test_short_pieces_that_do(tmp_path: Path, overrides: list[str]) -> None:
    load_config(write(tmp_path, MINIMAL), overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {dir: x}\n", r"^data.root: missing; .*data.root=VALUE$"),
        ("data: {root: x}\n", r"^run.dir: missing"),
        ("data: {}\nrun: {dir: x}\n", r"^data.root: missing"),
        ("- a\n- b\n", "expected sections"),
        ("", "expected sections"),
        ("data: [unclosed\n", "config.yaml, line 2: not valid YAML"),
        (MINIMAL + "data: {root: y}\n", "line 1: not valid YAML: key 'data' is given twice"),
        (MINIMAL + "training: {seed: !!python/name:os.system }\n", "not valid YAML"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent.yaml: cannot read the configuration: No such"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="cannot read the configuration"):
        load_config(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="binary.yaml: .*not UTF-8"):
        load_config(binary)


def test_every_key_is_documented() -> None:
    source = Path(load_config.__code__.co_filename).read_text(encoding="utf-8").splitlines()
    for name, field in Config.model_fields.items():
        for key in getattr(field.annotation, "model_fields", {}):
            line = next(i for i, text in enumerate(source) if text.startswith(f"    {key}: "))
            assert source[line + 1].strip().startswith('"""'), f"{name}.{key}"

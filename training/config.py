"""The typed configuration of a training run.

A YAML file fills it and `key=value` words on the command line override it; nothing else does.
Every mistake is one line that names the key and what was expected.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from models import BSMamba2Config
from models.errors import InputError
from training.data.track import AUDIO_CHANNELS, STEMS, MissingStems


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError("should be auto, cpu, cuda or cuda:N")
    return name


Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]


class Section(BaseModel):
    """A group of keys; an unknown key or a value of another type is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataSection(Section):
    """Where the examples come from and how they are mixed (recipe of arXiv 2508.14556)."""

    root: UserPath
    """Data set: root/{train,test}/TRACK/{vocals,drums,bass,other}.wav (or .flac; or MUSDB18's
    .stem.mp4), or root/TRACK/... with all tracks for training and validation."""
    extra_roots: tuple[UserPath, ...] = ()
    """Further data sets, in either layout, whose tracks join those of root."""
    stems: tuple[str, ...] = STEMS
    """Stems that sum to the mixture; the targets among them are model.stem_names."""
    missing_stems: MissingStems = "error"
    """Whether a track without one of the stems is an error or has silence there."""
    skip_broken: bool = False
    """Leave broken tracks out, with a warning, instead of stopping."""
    valid_tracks: tuple[str, ...] = ()
    """Names of the validation tracks of roots without a folder valid; empty: MUSDB18's own."""
    valid_fraction: Fraction = 0.1
    """Share of a root's tracks to validate on, the last by name, where nothing names them."""
    cache_dir: UserPath | None = None
    """Folder of activity indices and prepared copies; null: beside the data, in ROOT/.bsmamba2."""
    segment_seconds: PositiveFloat = 8.0
    """Length of one example, in seconds."""
    short_until: NonNegativeInt = 0
    """Examples from the start that are several short mixes each, of as much music in all."""
    short_pieces: PositiveInt = 2
    """How many, of as many times less than segment_seconds."""
    silent_prob: Fraction = 0.1
    """Probability, for each stem of an example, of silence in its place."""
    gain_min: NonNegativeFloat = 0.5
    """Lower end of the random linear gain of each stem."""
    gain_max: PositiveFloat = 1.5
    """Upper end of the random linear gain of each stem."""
    aligned_prob: Probability = 0.0
    """Probability that the stems of an example lie as in their song instead of being unrelated."""
    channel_swap_prob: Probability = 0.0
    """Probability, for each stem of an example, of left and right exchanged."""
    polarity_prob: Probability = 0.0
    """Probability, for each stem of an example, of an inverted sign."""
    same_stem_prob: Probability = 0.0
    """Probability of a second stem of the same kind on top, and then of a third."""
    time_shift_prob: Probability = 0.0
    """Probability that a stem starts elsewhere than at its active window."""
    time_shift_seconds: PositiveFloat = 2.0
    """Furthest such shift either way, in seconds."""
    speed_prob: Probability = 0.0
    """Probability of another speed, of pitch and tempo together (0.01 s of a core for 8 s)."""
    speed_min: Annotated[float, Field(ge=0.5, le=1)] = 0.9
    """Slowest speed, as a factor."""
    speed_max: Annotated[float, Field(ge=1, le=2)] = 1.1
    """Fastest speed, as a factor."""
    pitch_prob: Probability = 0.0
    """Probability of another pitch (needs python-stretch; 0.15 s of a core for 8 s)."""
    pitch_semitones: PositiveFloat = 2.0
    """Furthest move of the pitch either way, in semitones."""
    tempo_prob: Probability = 0.0
    """Probability of another tempo at the same pitch (needs python-stretch)."""
    tempo_min: Annotated[float, Field(ge=0.5, le=1)] = 0.9
    """Slowest tempo, as a factor."""
    tempo_max: Annotated[float, Field(ge=1, le=2)] = 1.1
    """Fastest tempo, as a factor."""
    augment_after: NonNegativeInt = 0
    """Examples from the start without any of these changes; over as many again they set in."""
    num_workers: NonNegativeInt = 4
    """Processes that read audio; 0 reads in the training process."""
    prefetch: PositiveInt = 2
    """Batches that each of them keeps ready."""
    max_failed_share: Fraction = 0.05
    """Stop when more than this share of the latest reads failed."""
    valid_segments: PositiveInt = 200
    """Most segments to validate on: the same ones every time, spread over the tracks."""

    @property
    def roots(self) -> tuple[Path, ...]:
        """All data roots."""
        return (self.root, *self.extra_roots)

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        if len(self.stems) < 2:
            raise InputError(
                "stems: name all stems that sum to the mixture, two at least;"
                " model.stem_names chooses those to learn"
            )
        if self.gain_min > self.gain_max:
            raise InputError(f"gain_min {self.gain_min} should not exceed gain_max {self.gain_max}")
        return self


class LossSection(Section):
    """L1 in time plus multi-resolution L1 of complex STFTs."""

    time_weight: NonNegativeFloat = 10.0
    """Factor of the time term."""
    windows: tuple[PositiveInt, ...] = (4096, 2048, 1024, 512, 256)
    """Window lengths of the spectral terms, in samples."""
    hop: PositiveInt = 147
    """Hop of every spectral term, in samples."""
    n_fft_min: PositiveInt = 2048
    """Shortest FFT, in samples; shorter windows are zero-padded to it."""


class CurriculumSection(Section):
    """Louder targets at the start, see `training/curriculum.py`; off by default, as in the paper.

    For networks that give some of the stems: where all are targets, the mixture grows as they do.
    """

    target_gain: Annotated[float, Field(ge=1)] = 1.0
    """Factor on the targets, beyond data.gain_min and gain_max, at the start; 1 is off."""
    release_sdr: float = 5.0
    """SDR of the training's own estimates, in dB, above which the factor falls."""
    release_rate: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share by which an optimizer step lowers it then; otherwise it rises by half of that."""


class TrainingSection(Section):
    """The optimisation, its limits and what it reports."""

    batch_size: PositiveInt = 5
    """Segments in one forward and backward pass; lower it when memory runs out."""
    accumulation: PositiveInt = 6
    """Passes whose averaged gradient makes one optimizer step."""
    learning_rate: PositiveFloat = 5e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    """Constant (the paper), a cosine from the peak to zero over the run, or steps down when the
    validation score stops rising."""
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Schedule plateau: what the rate is multiplied with each time."""
    plateau_patience: PositiveInt = 10
    """Schedule plateau: validations in a row without a new best score before that."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises linearly."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decays of AdamW's two running moments."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay of all parameters, norms and biases too (the authors' choice)."""
    clip_norm: PositiveFloat = 3.0
    """Largest L2 norm over all parameters of the gradient of one optimizer step."""
    ema_decay: Fraction = 0.999
    """Decay per optimizer step of the averaged weights, which are those that validate."""
    ema_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Average about this share of the steps so far where ema_decay would reach further back;
    null, as in the paper, leaves the start in the average until ema_decay has faded it."""
    save_ema: bool = True
    """Ship the averaged weights; false ships the raw ones, as the authors' checkpoints do."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Autocast type; parameters, STFTs and the loss stay float32."""
    tf32: bool = True
    """Allow TF32 in the float32 matrix products of CUDA."""
    deterministic: bool = False
    """Take the deterministic form of every operation that has one: two runs are then identical
    where the scan backend is (slower on CUDA; it warns of what has no such form)."""
    init_from: UserPath | None = None
    """Checkpoint of any kind whose weights to start from, for fine-tuning; null for none."""
    max_bad_steps: PositiveInt = 10
    """Steps in a row without a finite gradient, each of them skipped, after which to stop."""
    compile: bool = False
    """Run the network through torch.compile."""
    max_steps: PositiveInt = 200_000
    """Optimizer steps of the whole run (the paper: 2000 epochs of 100)."""
    max_minutes: PositiveFloat | None = None
    """Limit on the training time of the whole run, in minutes; null for none."""
    log_every: PositiveInt = 10
    """Optimizer steps between two rows of metrics.jsonl."""
    validate_every: PositiveInt = 100
    """Optimizer steps between two validations."""
    checkpoint_every: PositiveInt = 100
    """Optimizer steps between two checkpoints."""
    keep_checkpoints: NonNegativeInt = 2
    """Numbered checkpoints to keep, the newest ones, besides last.pt and best.pt."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Seed of the initial weights and of the stream of examples."""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """auto (CUDA where there is one, else the CPU), cpu, cuda or cuda:N."""


class RunSection(Section):
    """Where the run writes."""

    dir: UserPath
    """Folder of everything a run writes: config, log, metrics, checkpoints, TensorBoard."""
    tensorboard: bool = True
    """Write TensorBoard events to run.dir/tensorboard."""
    examples: NonNegativeInt = 2
    """Validation segments whose sound and spectrograms each validation shows there."""


class Config(Section):
    """A whole training run."""

    model: BSMamba2Config = BSMamba2Config()
    data: DataSection
    loss: LossSection = LossSection()
    curriculum: CurriculumSection = CurriculumSection()
    training: TrainingSection = TrainingSection()
    run: RunSection

    @property
    def segment_frames(self) -> int:
        """Samples of one example."""
        return round(self.data.segment_seconds * self.model.sample_rate)

    @model_validator(mode="after")
    def _check(self) -> Config:
        unknown = [name for name in self.model.stem_names if name not in self.data.stems]
        if unknown:
            raise InputError(
                f"model.stem_names: '{unknown[0]}' is not in data.stems {list(self.data.stems)}"
            )
        if self.model.audio_channels != AUDIO_CHANNELS:
            raise InputError(
                f"model.audio_channels: data are read in stereo, {AUDIO_CHANNELS} is needed,"
                f" got {self.model.audio_channels}"
            )
        odd = [n for w in self.loss.windows if (n := max(w, self.loss.n_fft_min)) % 2]
        if odd:
            raise InputError(f"loss.windows: FFT lengths should be even, got {odd[0]}")
        # Reflect padding reaches half a window beyond the ends.
        shortest = max(self.model.n_fft, self.loss.n_fft_min, *self.loss.windows, 0) // 2 + 1
        if self.segment_frames < shortest:
            seconds = shortest / self.model.sample_rate
            raise InputError(
                f"data.segment_seconds: should be at least {seconds:.3f} for the STFT windows"
                f" in use, got {self.data.segment_seconds}"
            )
        if self.data.short_until and self.segment_frames // self.data.short_pieces < shortest:
            raise InputError(
                f"data.short_pieces: {self.data.short_pieces} pieces of {self.data.segment_seconds}"
                f" s are too short for the STFT windows in use ({shortest} samples)"
            )
        return self


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides (values are YAML) and validate.

    Raises:
        InputError: the file cannot be read, or a key or value is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{path}: cannot read the configuration: {reason}") from error
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected sections such as 'data:' with keys below them")
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Validate nested plain values, as read from YAML.

    Raises:
        InputError: a key or value is wrong; the line names the first one.
    """
    try:
        # JSON mode is strict about numbers and text, yet takes a list for a tuple.
        return Config.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        details = error.errors(include_url=False)
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        raise InputError(_explain(details[0]) + more) from None


def dump_config(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 5e-4 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unexpected characters"
        raise InputError(f"{origin}{place}: not valid YAML: {problem}") from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise InputError(f"'{override}': expected key=value, such as training.batch_size=2")
    *sections, name = key.split(".")
    for section in sections:
        inner = values.get(section)
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise InputError(f"{key}: '{section}' is a value, not a section")
        values = inner
    values[name] = _parse_yaml(text, override)


def _explain(detail: ErrorDetails) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    kind, value = detail["type"], detail["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        close = difflib.get_close_matches(key, list(_known_keys()), n=1)
        return f"{key}: unknown key" + (f"; did you mean {close[0]}?" if close else "")
    if kind == "missing" and isinstance(detail["loc"][-1], int):
        key = ".".join(str(part) for part in detail["loc"][:-1])
        return f"{key}: more values are needed, got {json.dumps(value, default=str)}"
    if kind == "missing":
        if "." not in key:
            key += ".dir" if key == "run" else ".root"
        return f"{key}: missing; give it in the file or as {key}=VALUE"
    if kind == "value_error":
        message = str(detail["ctx"]["error"])
        prefix = f"{key}: " if key else ""
        got = f", got {json.dumps(value)}" if isinstance(value, str) else ""
        return f"{prefix}{message}{got}"
    message = detail["msg"].replace("an object", "a section with keys")
    expected = re.sub(r"^(Input|String|Tuple) (?=should)", "", message)
    return f"{key}: {expected}, got {json.dumps(value, default=str)}"


def _known_keys() -> Iterator[str]:
    for section, field in Config.model_fields.items():
        yield section
        names = getattr(field.annotation, "model_fields", None)
        if names is None:
            names = getattr(field.annotation, "__dataclass_fields__", {})
        for name in names:
            yield f"{section}.{name}"

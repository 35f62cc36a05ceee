"""Weights of the authors and of MSST: read without their classes, written back bit for bit."""

from __future__ import annotations

import argparse
import io
import pickle
import resource
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from models import BSMamba2, BSMamba2Config, InputError, load_checkpoint
from models.checkpoint import read_checkpoint, save_checkpoint
from models.convert import main
from models.unpickle import Placeholder, read_pickled

TINY = BSMamba2Config(dim=8, depth=1, d_state=16, headdim=16)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return BSMamba2(TINY).state_dict()


class Executed(Exception):
    """Raised by pickles of the tests if anything in them runs."""


def explode(*_: object) -> None:
    raise Executed


class DictConfig(dict):
    """As omegaconf's: a class of a package that the reader has not, with a state of its own."""

    def __init__(self, content: dict) -> None:
        super().__init__(content)
        self._metadata = {"object_type": dict, "flags": {"allow_objects": True}}

    def __reduce__(self):
        return (DictConfig, (dict(self),), {"_content": list(self), "_metadata": Path("x")})

    def __setstate__(self, state: dict) -> None:
        explode()


@pytest.fixture
def lightning(weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file as Lightning writes it for the authors; its classes are gone when it is read."""
    module = types.ModuleType("omegaconf_of_the_authors")
    for kind in (DictConfig,):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    content = {
        "epoch": 7,
        "global_step": 700,
        "pytorch-lightning_version": "2.2.0",
        "state_dict": OrderedDict(
            [("featurizer.window", torch.hann_window(2048))]
            + [(f"model.{name}", value) for name, value in weights.items()]
        ),
        "callbacks": {"ModelCheckpoint{'monitor': 'val/loss'}": {"best": Path("a/b.ckpt")}},
        "optimizer_states": [
            {"ema": tuple(value + 1 for value in weights.values()), "decay": 0.999}
        ],
        "lr_schedulers": [],
        "hparams_name": "hparams",
        "hyper_parameters": DictConfig({"lr": 5e-4, "paths": [Path("x"), argparse.Namespace(a=1)]}),
    }
    path = tmp_path / "sota_model.ckpt"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save(content, path)
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(pickle.UnpicklingError):  # the case is what it claims to be
        torch.load(path, weights_only=True)
    return path


def assert_same(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(given) == list(expected)
    for name, value in expected.items():
        assert torch.equal(given[name], value), name


def test_a_lightning_file_is_read_without_its_classes(lightning: Path, weights) -> None:
    found = read_checkpoint(lightning)
    assert found.config == TINY
    assert_same(found.state_dict, weights)
    assert isinstance(read_pickled(lightning)["hyper_parameters"], Placeholder)
    assert load_checkpoint(lightning).config == TINY


def test_averaged_weights_of_the_authors(lightning: Path, weights, tmp_path: Path) -> None:
    averaged = read_checkpoint(lightning, ema=True).state_dict
    assert_same(averaged, {name: value + 1 for name, value in weights.items()})
    torch.save({"state_dict": weights}, tmp_path / "raw.ckpt")
    with pytest.raises(InputError, match=r"raw\.ckpt: holds no averaged"):
        read_checkpoint(tmp_path / "raw.ckpt", ema=True)


class Shell:
    """A pickle that would run a command."""

    def __reduce__(self):
        import os

        return (os.system, ("touch executed",))


class State:
    def __reduce__(self):
        return (explode, ())


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("payload", [Shell(), State(), Path("x"), argparse.Namespace(a=State())])
def test_nothing_in_a_pickle_runs(
    payload, protocol: int, weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside weights they are ignored; the weights are had all the same."""
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": weights, "hyper_parameters": payload}
    torch.save(content, "evil.ckpt", pickle_protocol=protocol)
    torch.save(content, "old.ckpt", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    for name in ("evil.ckpt", "old.ckpt"):
        assert_same(read_checkpoint(name).state_dict, weights)
    assert not Path("executed").exists()


def test_a_bare_malicious_pickle_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = b"cos\nsystem\n(S'touch executed'\ntR."
    builtins = b'cbuiltins\neval\n(S\'__import__("os").system("touch executed")\'\ntR.'
    for index, content in enumerate([calls, builtins, pickle.dumps(Shell())]):
        Path(f"{index}.ckpt").write_bytes(content)
        with pytest.raises(InputError, match=rf"{index}\.ckpt"):
            read_checkpoint(f"{index}.ckpt")
    assert not Path("executed").exists()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_not_loaded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    (tmp_path / "script.pt").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match=r"script\.pt: not a checkpoint"):
        read_checkpoint(tmp_path / "script.pt")


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_round_trip_through_the_authors_names_is_bit_for_bit(
    weights, tmp_path: Path, suffix: str, capsys
) -> None:
    config = BSMamba2Config(
        dim=8, depth=1, d_state=16, headdim=16, hop_length=512, stem_names=("drums",)
    )
    save_checkpoint(tmp_path / "ours.pt", config, weights, {"step": 5})
    assert main(["export", str(tmp_path / "ours.pt"), str(tmp_path / f"a{suffix}")]) == 0
    source = str(tmp_path / f"a{suffix}")
    assert main(["export", source, str(tmp_path / "back.safetensors")]) == 0
    back = read_checkpoint(tmp_path / "back.safetensors")
    assert back.config == config
    assert set(back.state_dict) == set(weights)
    assert all(torch.equal(back.state_dict[name], value) for name, value in weights.items())
    card = (tmp_path / "back.md").read_text()
    assert "Separates drums" in card
    assert f"{sum(w.numel() for w in weights.values()):,}" in card


def test_an_official_export_has_the_authors_names(weights, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ours.pt", TINY, weights)
    main(["export", str(tmp_path / "ours.pt"), str(tmp_path / "a.ckpt"), "--to", "official"])
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert list(content["state_dict"]) == [f"model.{name}" for name in weights]


MSST_YAML = """
audio: {{chunk_size: 352800, sample_rate: 48000, num_channels: 2}}
model:
  dim: {dim}
  num_stems: 1
  stft_hop_length: 512
  multi_stft_resolutions_window_sizes: !!python/tuple
  - 4096
  - 2048
training: {{instruments: [vocals, other], target_instrument: drums}}
"""


@pytest.mark.parametrize("key", [None, "state", "state_dict", "model_state_dict"])
def test_msst_weights_and_their_yaml(weights, tmp_path: Path, key: str | None) -> None:
    path = tmp_path / "bs_mamba2.ckpt"
    torch.save(weights if key is None else {key: weights, "epoch": 3}, path)
    assert read_checkpoint(path).config == TINY
    yaml = tmp_path / "config.yaml"
    yaml.write_text(MSST_YAML.format(dim=8))
    config = read_checkpoint(path, yaml).config
    assert (config.hop_length, config.sample_rate, config.stem_names) == (512, 48000, ("drums",))
    yaml.rename(path.with_suffix(".yaml"))  # found by its name
    assert read_checkpoint(path).config == config


def test_a_yaml_that_does_not_fit_the_weights(weights, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "a.ckpt")
    for text, message in (
        (MSST_YAML.format(dim=256), "model.dim is 256, the weights have 8"),
        ("a: [", "not a configuration of MSST"),
        ("a: 1", "has no section model"),
        ("model: !!python/object/apply:os.system ['touch executed']", "not a configuration"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(InputError, match="c.yaml") as caught:
            read_checkpoint(tmp_path / "a.ckpt", tmp_path / "c.yaml")
        assert message in str(caught.value)


def test_values_of_a_yaml_that_cannot_be(weights, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "a.ckpt")
    for text, message in (
        ("model: {stft_hop_length: '512'}", "model.stft_hop_length is '512', a whole number"),
        ("model: {stft_hop_length: [512]}", r"model.stft_hop_length is \[512\], a whole number"),
        ("model: {stft_n_fft: 2048.0}", "model.stft_n_fft is 2048.0, a whole number"),
        ("model: {stereo: 2}", "model.stereo is 2, true or false"),
        ("model: {stereo: false}", "features, which are not those of mono with an n_fft"),
        ("{model: {dim: 8}, audio: [1]}", r"audio is \[1\], a section"),
        ("{model: {dim: 8}, audio: {sample_rate: high}}", "audio.sample_rate is 'high'"),
        ("{model: {dim: 8}, training: {instruments: 3}}", "training.instruments is 3"),
        ("model: {stft_hop_length: 5000}", "hop_length 5000 is more than half"),
        ("model: {stft_win_length: 1024}", "model.stft_win_length is 1024, only 2048"),
        ("model: {stft_normalized: true}", "model.stft_normalized is True, only False"),
        ("model: {mamba_gmlp: true}", "model.mamba_gmlp is True, only False"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(InputError, match=message) as caught:
            read_checkpoint(tmp_path / "a.ckpt", tmp_path / "c.yaml")
        assert "c.yaml" in str(caught.value)


def test_a_yaml_of_something_else_beside_the_weights_is_left_alone(weights, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "a.ckpt")
    (tmp_path / "a.yaml").write_text("optimizer: adam")
    assert read_checkpoint(tmp_path / "a.ckpt").config == TINY


def test_prefixes_come_in_any_order(weights, tmp_path: Path) -> None:
    for prefix in ("_orig_mod.module.", "module._orig_mod.model.", "model._orig_mod."):
        torch.save({prefix + name: value for name, value in weights.items()}, tmp_path / "a.ckpt")
        assert_same(read_checkpoint(tmp_path / "a.ckpt").state_dict, weights)


@pytest.mark.parametrize("kind", ["official", "msst"])
def test_shapes_that_others_cannot_load_are_told(tmp_path: Path, kind: str, capsys) -> None:
    shapes = ({}, "d_state is 16"), ({"d_state": 128, "expand": 8}, "expand is 8")
    for changes, message in shapes:
        config = BSMamba2Config(**{"dim": 8, "depth": 1, "d_state": 16, "headdim": 16} | changes)
        save_checkpoint(tmp_path / "ours.pt", config, BSMamba2(config).state_dict())
        main(["export", str(tmp_path / "ours.pt"), str(tmp_path / f"a.{kind}"), "--to", kind])
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line and "cannot load these weights" in line
    config = BSMamba2Config(dim=16, depth=1)
    save_checkpoint(tmp_path / "ours.pt", config, BSMamba2(config).state_dict())
    main(["export", str(tmp_path / "ours.pt"), str(tmp_path / f"a.{kind}"), "--to", kind])
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("target", "beside"), [("a.safetensors", "a.md"), ("a.pth", "a.yaml")])
def test_what_a_person_wrote_beside_the_weights_is_kept(
    weights, tmp_path: Path, target: str, beside: str, capsys
) -> None:
    save_checkpoint(tmp_path / "ours.pt", TINY, weights)
    (tmp_path / beside).write_text("ours")
    assert main(["export", str(tmp_path / "ours.pt"), str(tmp_path / target)]) == 0
    assert (tmp_path / beside).read_text() == "ours"
    assert f"{beside}: kept" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.pth"])
def test_an_export_to_a_full_disk_is_one_line(weights, tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path / "ours.pt", TINY, weights)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=rf"{name}: cannot be written \(the disk took only"):
            main(["export", str(tmp_path / "ours.pt"), str(tmp_path / name)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["ours.pt"]


def test_an_msst_export_comes_back(weights, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ours.pt", TINY, weights)
    assert main(["export", str(tmp_path / "ours.pt"), str(tmp_path / "a.pth")]) == 0
    assert list(torch.load(tmp_path / "a.pth", weights_only=True)) == list(weights)
    found = read_checkpoint(tmp_path / "a.pth")
    assert found.config == TINY
    assert_same(found.state_dict, weights)


def test_half_precision_weights_become_float32(weights, tmp_path: Path) -> None:
    torch.save({name: value.half() for name, value in weights.items()}, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth").state_dict
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_ts_bsmamba2_is_told_apart(tmp_path: Path) -> None:
    torch.save({"state": {"BN_mask.0.weight": torch.zeros(2)}}, tmp_path / "ts.ckpt")
    with pytest.raises(InputError, match=r"ts\.ckpt: weights of TS-BSMamba2"):
        read_checkpoint(tmp_path / "ts.ckpt")


def test_exports_that_cannot_be(weights, tmp_path: Path) -> None:
    short = {name: value for name, value in weights.items() if name != "layers.0.1.linear.bias"}
    torch.save(short, tmp_path / "short.pth")
    for arguments, message in (
        (["short.pth", "a.safetensors"], "layers.0.1.linear.bias is missing"),
        (["absent.pt", "a.safetensors"], "no such checkpoint"),
        (["short.pth", "a.foo"], "name it .safetensors"),
    ):
        source, target = (str(tmp_path / name) for name in arguments)
        with pytest.raises(InputError) as caught:
            main(["export", source, target])
        assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["short.pth"]

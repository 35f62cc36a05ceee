"""Weights from every kind of file, and one clear line for every file that holds none."""

from __future__ import annotations

import errno
import pickle
import resource
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models import BSMamba2, BSMamba2Config, InputError, load_checkpoint
from models.checkpoint import read_checkpoint, save_checkpoint
from models.unpickle import read_pickled

TINY = BSMamba2Config(
    dim=8, depth=1, d_state=16, headdim=16, num_stems=2, stem_names=("vocals", "bass")
)


@pytest.mark.parametrize("name", ("last.pt", "weights.safetensors"))
def test_own_files_come_back_bit_for_bit(name, tmp_path):
    model = BSMamba2(TINY)
    save_checkpoint(tmp_path / name, TINY, model.state_dict(), {"step": 3})
    loaded = load_checkpoint(tmp_path / name)
    assert loaded.config == TINY and not loaded.training
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    waveform = torch.randn(1, 2, 5000)
    assert torch.equal(loaded(waveform), model.eval()(waveform))
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ("half.pt", "half.safetensors"))
def test_half_precision_weights_run_in_float32(name, tmp_path):
    weights = {key: value.half() for key, value in BSMamba2(TINY).state_dict().items()}
    save_checkpoint(tmp_path / name, TINY, weights)
    loaded = load_checkpoint(tmp_path / name)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded(torch.randn(1, 2, 3000)).isfinite().all()


@pytest.mark.parametrize("name", ("last.pt", "weights.safetensors"))
def test_others_may_read_weights(name, tmp_path):
    save_checkpoint(tmp_path / name, TINY, BSMamba2(TINY).state_dict())
    (tmp_path / "plain").touch()
    assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_training_state_is_kept(tmp_path):
    state = {"step": 3, "rng": torch.get_rng_state(), "optimizer": {"state": {0: {"a": 1.5}}}}
    save_checkpoint(tmp_path / "last.pt", TINY, BSMamba2(TINY).state_dict(), state)
    found = read_checkpoint(tmp_path / "last.pt").training
    assert found["step"] == 3 and torch.equal(found["rng"], state["rng"])


@pytest.mark.parametrize("form", ("lightning", "bare", "safetensors"))
def test_the_authors_weights_separate_as_theirs(form, golden, tmp_path, assert_close):
    values = golden("network_a.npz")
    weights = {k[3:]: v for k, v in values.items() if k.startswith("sd/")}
    path = tmp_path / f"official.{'safetensors' if form == 'safetensors' else 'ckpt'}"
    if form == "lightning":
        prefixed = {f"model.{k}": v for k, v in weights.items()}
        torch.save({"state_dict": prefixed, "epoch": 7, "hyper_parameters": {"lr": 5e-4}}, path)
    elif form == "bare":
        torch.save(weights, path)
    else:
        from safetensors.torch import save_file

        save_file(weights, path)
    model = load_checkpoint(path)
    assert model.config == BSMamba2Config(**values["config"])
    with torch.no_grad():
        assert_close("output", model.forward_spectrogram(values["input"]), values["output"], 1e-5)


def test_shape_of_several_stems_and_deeper_masks_is_inferred(tmp_path):
    config = BSMamba2Config(
        dim=8, depth=2, d_state=16, d_conv=3, expand=2, headdim=4, num_stems=2,
        audio_channels=1, mask_estimator_depth=3, stem_names=("stem1", "stem2"),
    )  # fmt: skip
    torch.save(BSMamba2(config).state_dict(), tmp_path / "bare.pt")
    assert load_checkpoint(tmp_path / "bare.pt").config == config


def stft_of(n_fft: int, audio_channels: int) -> BSMamba2Config:
    widths = (10, 20, n_fft // 2 + 1 - 30)
    return BSMamba2Config(
        dim=8, depth=1, d_state=16, headdim=16, n_fft=n_fft, hop_length=100, band_widths=widths,
        audio_channels=audio_channels,
    )  # fmt: skip


@pytest.mark.parametrize("audio_channels", (1, 2))
@pytest.mark.parametrize("n_fft", (512, 1024, 2048, 4096))
def test_n_fft_and_channels_are_inferred_together(n_fft, audio_channels, tmp_path):
    config = replace(stft_of(n_fft, audio_channels), hop_length=min(441, n_fft // 2))
    torch.save(BSMamba2(config).state_dict(), tmp_path / "bare.pt")
    assert load_checkpoint(tmp_path / "bare.pt").config == config


def test_an_n_fft_that_shapes_do_not_tell_needs_the_yaml(tmp_path):
    config = stft_of(1200, 2)
    path, yaml = tmp_path / "bare.pt", tmp_path / "msst.yaml"
    torch.save(BSMamba2(config).state_dict(), path)
    with pytest.raises(InputError, match=r"bare\.pt: .*a power of two.*--msst-yaml"):
        load_checkpoint(path)
    section = "model: {stft_hop_length: 100, "
    for said in ("stft_n_fft: 1200", "stft_n_fft: 1200, stereo: true"):
        yaml.write_text(section + said + "}")
        assert read_checkpoint(path, yaml).config == config
    for said in ("stft_n_fft: 2048", "stereo: true", "stereo: false, stft_n_fft: 1200"):
        yaml.write_text(section + said + "}")
        with pytest.raises(InputError, match=r"bare\.pt with .*msst\.yaml: .*features"):
            read_checkpoint(path, yaml)


def test_shapes_that_no_network_has_are_named(tmp_path):
    weights = BSMamba2(BSMamba2Config(dim=8, depth=1, d_state=16, headdim=16)).state_dict()
    weights["layers.0.0.forward_blocks.0.mixer.A_log"] = torch.zeros(64)
    weights["layers.0.0.forward_blocks.0.mixer.norm.weight"] = torch.zeros(32)
    torch.save(weights, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=r"odd\.pt: .*headdim must be at least 1"):
        load_checkpoint(tmp_path / "odd.pt")


class Malicious:
    def __reduce__(self):
        return (Path.write_text, (Path("executed"), "yes"))


def test_pickled_code_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.ckpt").write_bytes(pickle.dumps(Malicious()))
    torch.save({"state_dict": Malicious()}, "evil.pt")
    for name in ("evil.ckpt", "evil.pt"):
        with pytest.raises(InputError, match=name):
            load_checkpoint(name)
    assert not Path("executed").exists()


def test_files_that_are_no_checkpoint_are_named(tmp_path):
    whole = tmp_path / "whole.pt"
    save_checkpoint(whole, TINY, BSMamba2(TINY).state_dict())
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("not weights")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.safetensors").write_text("not weights")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "linear.pt")
    for name in (
        "cut.pt", "text.pt", "empty.pt", "text.safetensors", "other.pt", "linear.pt", "absent.pt"
    ):  # fmt: skip
        with pytest.raises(InputError, match=name) as caught:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_missing_and_a_misshapen_weight_are_named(tmp_path):
    weights = BSMamba2(TINY).state_dict()
    kept = {k: v for k, v in weights.items() if k != "layers.0.1.linear.bias"}
    save_checkpoint(tmp_path / "a.pt", TINY, kept)
    with pytest.raises(InputError, match="layers.0.1.linear.bias is missing"):
        load_checkpoint(tmp_path / "a.pt")
    save_checkpoint(tmp_path / "b.pt", TINY, weights | {"final_norm.gamma": torch.ones(9)})
    with pytest.raises(InputError, match=r"final_norm.gamma has shape \(9,\), \(8,\) is needed"):
        load_checkpoint(tmp_path / "b.pt")


@pytest.mark.parametrize("name", ("last.pt", "weights.safetensors"))
def test_a_disk_that_fills_is_an_oserror_that_names_the_file(name, tmp_path):
    path = tmp_path / name
    path.write_text("old")
    weights = BSMamba2(TINY).state_dict()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="took only a part") as caught:
            save_checkpoint(path, TINY, weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == [name] and path.read_text() == "old"


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, TINY, BSMamba2(TINY).state_dict())
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        save_checkpoint(path, TINY, BSMamba2(TINY).state_dict())
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_pickle_changes_nothing_of_the_process(tmp_path):
    before = torch._utils._rebuild_tensor_v2.__defaults__
    functions = b"ctorch._utils\n_rebuild_tensor_v2\n"
    state = pickle.dumps((None, {"__defaults__": (1, 2)}), protocol=2)[2:-1]
    archive = tmp_path / "whole.pt"
    torch.save({"state_dict": {"a": torch.ones(2)}, "x": Path("an object")}, archive)
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "evil.pt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):  # global, state, build, then what was there
                content = b"\x80\x02" + functions + state + b"b0" + content[2:]
            new.writestr(name, content)
    with suppress(InputError):
        read_pickled(tmp_path / "evil.pt")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before
    assert torch.equal(read_pickled(archive)["state_dict"]["a"], torch.ones(2))

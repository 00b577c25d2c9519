"""Adapter files: what is saved is what is loaded; what is broken is named; pickles run no code."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import delta_mem as dm
from delta_mem import checkpoint
from families import backbone

GOLDEN = Path(__file__).parent / "golden"
IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "default": dm.DeltaMemConfig(),
    "everything": dm.DeltaMemConfig(
        rank=4, num_states=3, heads=("q", "k", "v", "o"), write="sentence", update="decay_outside",
        tied_gates=False, per_row_gates=False, layers=(0, 2), trainable_scale="head", o_norm=True, init="random",
    ),
}  # fmt: skip


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_saved_and_loaded(config, tmp_path):
    model = dm.DeltaMemModel(backbone("qwen3"), config)
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == [
        "README.md", "delta_mem.safetensors", "delta_mem_config.json",
    ]  # fmt: skip
    loaded = dm.DeltaMemModel.from_pretrained(backbone("qwen3"), tmp_path / "adapter")
    assert loaded.delta_config == config
    assert checkpoint.load_adapter(tmp_path / "adapter").fingerprint() == model.fingerprint()
    assert loaded.fingerprint() == model.fingerprint()
    assert torch.equal(logits(loaded), logits(model))
    memory = model.new_memory(2)
    model.write(memory, IDS)
    loaded.write(memory, IDS)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: delta-mem\n") and "arXiv 2605.12357" in card


@pytest.mark.parametrize("case", sorted(path.parent.name for path in GOLDEN.glob("*/delta_mem_config.json")))
def test_official_adapters_survive_both_ways(case, tmp_path):
    theirs = checkpoint.load_adapter(GOLDEN / case)
    checkpoint.save_adapter(theirs, tmp_path / "ours")
    ours = checkpoint.load_adapter(tmp_path / "ours")
    checkpoint.save_official(ours, tmp_path / "official")
    again = checkpoint.load_adapter(tmp_path / "official")
    assert theirs.official and again.official and not ours.official
    assert theirs.config == ours.config == again.config
    for name, tensor in theirs.weights.items():
        assert torch.equal(ours.weights[name], tensor) and torch.equal(again.weights[name], tensor)
    stored = torch.load(GOLDEN / case / "delta_mem_adapter.pt", weights_only=True)
    rewritten = torch.load(tmp_path / "official" / "delta_mem_adapter.pt", weights_only=True)
    assert {k: v.shape for k, v in rewritten.items()} == {k: v.shape for k, v in stored.items()}
    fields = json.loads((GOLDEN / case / "delta_mem_config.json").read_text())
    assert json.loads((tmp_path / "official" / "delta_mem_config.json").read_text()) == fields
    frozen = AutoModelForCausalLM.from_pretrained(GOLDEN / case / "backbone", dtype=torch.float32)
    first = dm.DeltaMemModel.from_pretrained(frozen, tmp_path / "ours")
    expected = logits(first)
    assert torch.equal(
        logits(dm.DeltaMemModel.from_pretrained(first.detach(), tmp_path / "official")), expected
    )


def test_a_crash_while_saving_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = dm.DeltaMemModel(backbone("qwen3"))
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def crash(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize("files", (0, 1, 2))
def test_a_save_torn_in_the_middle_leaves_one_of_the_two(files, tmp_path, monkeypatch):
    old = dm.DeltaMemModel(backbone("qwen3"))
    old.save_pretrained(tmp_path)
    replaced, replace = [], os.replace

    def crash(*args):
        if len(replaced) == files:
            raise OSError("power cut")
        replaced.append(args)
        replace(*args)

    monkeypatch.setattr(os, "replace", crash)
    new = dm.DeltaMemModel(backbone("qwen3", seed=5), dm.DeltaMemConfig(alpha=1.0))
    with pytest.raises(OSError, match="power cut"):
        new.save_pretrained(tmp_path)
    loaded, saved = checkpoint.load_adapter(tmp_path), new if files else old
    assert loaded.fingerprint() == saved.fingerprint() and loaded.config == saved.delta_config


def test_weights_beside_the_config_of_others_are_refused(tmp_path):
    assets = Path(dm.__file__).parent / "assets"  # saved before weights files brought the config along
    shutil.copy(assets / "tsw" / "delta_mem_config.json", tmp_path)
    shutil.copy(assets / "ssw" / "delta_mem.safetensors", tmp_path)
    with pytest.raises(dm.AdapterFormatError, match="saved with other weights"):
        checkpoint.load_adapter(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    adapter = dm.DeltaMemModel(backbone("qwen3")).to_adapter()
    checkpoint.save_official(adapter, tmp_path)
    stored = torch.load(tmp_path / "delta_mem_adapter.pt")
    next(iter(stored.values()))[0] = torch.nan
    torch.save(stored, tmp_path / "delta_mem_adapter.pt")
    with pytest.raises(dm.AdapterFormatError, match="holds NaN or infinity"):
        dm.DeltaMemModel.from_pretrained(backbone("qwen3"), tmp_path)


def test_a_disk_that_is_full_leaves_an_adapter_of_the_authors_format_whole(tmp_path, monkeypatch):
    model, official = dm.DeltaMemModel(backbone("qwen3")), tmp_path / "official"
    checkpoint.save_official(model.to_adapter(), official)
    before = {name: (official / name).read_bytes() for name in os.listdir(official)}
    synced, sync = [], os.fsync

    def full(file):
        synced.append(file)
        if len(synced) == 2:
            raise OSError("disk full")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    other = dm.DeltaMemModel(backbone("qwen3", seed=5), dm.DeltaMemConfig(alpha=1.0))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save_official(other.to_adapter(), official)
    assert {name: (official / name).read_bytes() for name in os.listdir(official)} == before


def edit(file, **fields):
    values = json.loads(file.read_text())
    values.update(fields)
    file.write_text(json.dumps(values))


def flip_last_byte(file):
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


OURS = {
    "no config": (lambda d: (d / "delta_mem_config.json").unlink(), FileNotFoundError, "delta_mem_config.json"),
    "no weights": (lambda d: (d / "delta_mem.safetensors").unlink(), None, "delta_mem.safetensors: missing"),
    "no JSON": (lambda d: (d / "delta_mem_config.json").write_text("{"), None, "delta_mem_config.json: not JSON"),
    "a list": (lambda d: (d / "delta_mem_config.json").write_text("[]"), None, "holds a list"),
    "foreign format": (lambda d: edit(d / "delta_mem_config.json", format="x"), None, "format: 'x'"),
    "newer version": (lambda d: edit(d / "delta_mem_config.json", format_version=9), None, "format_version: 9"),
    "unknown field": (
        lambda d: edit(d / "delta_mem_config.json", config={"rank": 8, "colour": 1}), None, "colour",
    ),
    "rank 0": (lambda d: edit(d / "delta_mem_config.json", config={"rank": 0}), None, "rank must be at least 1"),
    "contradiction": (
        lambda d: edit(d / "delta_mem_config.json", config={"o_norm": True, "heads": ["q"]}), None, "o_norm",
    ),
    "truncated": (
        lambda d: (d / "delta_mem.safetensors").write_bytes((d / "delta_mem.safetensors").read_bytes()[:999]),
        None, "not a whole safetensors file",
    ),
    "tampered": (lambda d: flip_last_byte(d / "delta_mem.safetensors"), None, "sha256"),
    "another rank": (lambda d: edit(d / "delta_mem_config.json", config={"rank": 4}), None, r"query_proj: is \[8, 48\]"),
    "more heads": (
        lambda d: edit(d / "delta_mem_config.json", config={"heads": ["q", "k", "o"]}), None, "delta_k: missing",
    ),
    "fewer heads": (
        lambda d: edit(d / "delta_mem_config.json", config={"heads": ["q"]}), None, "delta_o: no such weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "error", "message"), OURS.values(), ids=OURS)
def test_a_broken_adapter_is_named_with_file_and_field(damage, error, message, tmp_path):
    dm.DeltaMemModel(backbone("qwen3")).save_pretrained(tmp_path)
    damage(tmp_path)
    frozen = backbone("qwen3")
    with pytest.raises(error or dm.AdapterFormatError, match=message):
        dm.DeltaMemModel.from_pretrained(frozen, tmp_path)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in frozen.modules())


def test_an_adapter_of_another_backbone_is_refused(tmp_path):
    dm.DeltaMemModel(backbone("qwen3")).save_pretrained(tmp_path)
    with pytest.raises(dm.AdapterFormatError, match="this backbone and config need"):
        dm.DeltaMemModel.from_pretrained(backbone("qwen3", hidden_size=64), tmp_path)
    dm.DeltaMemModel(backbone("qwen3"), dm.DeltaMemConfig(layers=(1, 3))).save_pretrained(tmp_path)
    with pytest.raises(dm.AdapterFormatError, match=r"layers: this backbone has no attention layer \[3\]"):
        dm.DeltaMemModel.from_pretrained(backbone("qwen3", num_hidden_layers=2), tmp_path)


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_pickled_code_is_not_run(tmp_path):
    shutil.copy(GOLDEN / "tsw_qo" / "delta_mem_config.json", tmp_path)
    for dump in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        dump({"model.layers.0.self_attn.beta_bias": Payload()}, tmp_path / "delta_mem_adapter.pt")
        with pytest.raises(dm.AdapterFormatError, match="delta_mem_adapter.pt"):
            checkpoint.load_adapter(tmp_path)
    assert not Payload.ran


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_memory_partitions=4), "num_memory_partitions: 4 belongs to an experiment"),
        (dict(normalize_qk=False), "normalize_qk"),
        (dict(memory_write_granularity="page"), "memory_write_granularity: 'page'"),
        (dict(state_update_mode="x"), "state_update_mode"),
        (dict(colour="red"), "colour: unknown field"),
        (dict(rank=0), "rank must be at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_official_fields_that_are_not_understood_are_refused(change, message, tmp_path):
    shutil.copytree(GOLDEN / "tsw_qo", tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "delta_mem_config.json", **change)
    with pytest.raises(dm.AdapterFormatError, match=message):
        checkpoint.load_adapter(tmp_path)


def test_broken_official_weights(tmp_path):
    shutil.copytree(GOLDEN / "tsw_qo", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "delta_mem_adapter.pt"
    whole = file.read_bytes()
    for data in (whole[:1000], b"", b"hello"):
        file.write_bytes(data)
        with pytest.raises(dm.AdapterFormatError, match="delta_mem_adapter.pt"):
            checkpoint.load_adapter(tmp_path)
    torch.save({"model.layers.0.self_attn.something": torch.zeros(1)}, file)
    with pytest.raises(dm.AdapterFormatError, match="something: not a weight"):
        checkpoint.load_adapter(tmp_path)
    torch.save([1], file)
    with pytest.raises(dm.AdapterFormatError, match="holds a list"):
        checkpoint.load_adapter(tmp_path)


def test_the_hub(tmp_path, monkeypatch):
    """The download and the upload, with the hub's two functions replaced by a folder."""
    import huggingface_hub

    model = dm.DeltaMemModel(backbone("qwen3"))
    uploaded = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            assert (repo_id, private, exist_ok) == ("me/adapter", True, True)
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, uploaded)
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})

    def snapshot_download(repo_id, allow_patterns, revision=None):
        assert (repo_id, revision) == ("me/adapter", "v1")
        return str(uploaded)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    url = model.push_to_hub("me/adapter", private=True, token="secret")
    assert url == "https://hub/me/adapter/commit/1"
    loaded = dm.DeltaMemModel.from_pretrained(backbone("qwen3"), "me/adapter", revision="v1")
    assert loaded.fingerprint() == model.fingerprint()


def test_neither_folder_nor_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("no/such-adapter", "no such folder!"):
        with pytest.raises(FileNotFoundError, match=name):
            dm.DeltaMemModel.from_pretrained(backbone("qwen3"), name)


def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path):
    model = dm.DeltaMemModel(backbone("qwen3"), dm.DeltaMemConfig())
    model.save_pretrained(tmp_path)
    before = (tmp_path / "delta_mem.safetensors").read_bytes()
    with torch.no_grad():
        model.adapters["2"].delta_q[3, 1] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.2\.delta_q holds NaN or infinity; not saved"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "delta_mem.safetensors").read_bytes() == before

"""Adapter files: our format and the authors', read and written.

Ours is a folder: `delta_mem_config.json` (the settings, and what backbone they are for),
`delta_mem.safetensors` (weights by layer and name) and `README.md` (a model card). The authors' is
`delta_mem_config.json` with their field names and `delta_mem_adapter.pt`, a pickle, which is only ever
read with `weights_only=True`. An `Adapter` is either, in memory: settings and plain tensors, without a
model, so that `delta-mem info` and `delta-mem convert` need no backbone.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from .config import HEADS, DeltaMemConfig
from .errors import AdapterFormatError
from .files import check_header, checksum, download, read_json, write_together

CONFIG_FILE = "delta_mem_config.json"
WEIGHTS_FILE = "delta_mem.safetensors"
OFFICIAL_WEIGHTS_FILE = "delta_mem_adapter.pt"
FORMAT = "delta-mem-adapter"
FORMAT_VERSION = 1
_KEY = re.compile(r"layers\.\d+\.\w+")


@dataclass
class Adapter:
    """A trained adapter, without a model.

    Attributes:
        config: its settings.
        weights: {"layers.<index>.<name>": tensor}, with names query_proj, key_proj, value_proj,
            beta_proj, beta_bias, lambda_proj, lambda_bias, delta_q … delta_o, scale_raw, o_norm_weight.
        backbone: what is known of the backbone: name_or_path, model_type, hidden_size,
            num_hidden_layers, and `heads`: {q, k, v, o: width of the projection's output}.
        source: the file the weights came from, for error messages.
        official: whether that file is in the authors' format.
    """

    config: DeltaMemConfig
    weights: dict[str, Tensor]
    backbone: dict[str, Any] = field(default_factory=dict)
    source: str = "adapter"
    official: bool = False

    @property
    def layers(self) -> list[int]:
        """Indices of the layers with a memory."""
        return sorted({int(name.split(".")[1]) for name in self.weights})

    def fingerprint(self) -> str:
        """See `fingerprint`."""
        return fingerprint(self.config, self.weights)

    @torch.no_grad()
    def copy_to(self, weights: Mapping[str, Tensor]) -> None:
        """Copies the weights into those of a model, {name: tensor} with the same names.

        Raises:
            AdapterFormatError: tensors are missing, left over, misshapen or not finite; nothing is changed.
        """
        for name, target in weights.items():
            if name not in self.weights:
                raise AdapterFormatError(f"{self.source}: {name}: missing.")
            if self.weights[name].shape != target.shape:
                raise AdapterFormatError(
                    f"{self.source}: {name}: is {list(self.weights[name].shape)}, this backbone and config "
                    f"need {list(target.shape)}."
                )
        left_over = sorted(set(self.weights) - set(weights))
        if left_over:
            raise AdapterFormatError(
                f"{self.source}: {left_over[0]}: no such weight in this backbone and config."
            )
        if (name := not_finite(self.weights)) is not None:
            raise AdapterFormatError(f"{self.source}: {name}: holds NaN or infinity.")
        for name, target in weights.items():
            target.copy_(self.weights[name])


def fingerprint(config: DeltaMemConfig, weights: Mapping[str, Tensor]) -> str:
    """Identifies an adapter: a SHA-256 of its weights and of the settings that shape what they do.

    Weights are rounded to bfloat16 first, so that an adapter that was cast to it still knows the memories it
    wrote. (To float16 it is another.)
    """
    settings = {k: v for k, v in config.to_dict().items() if k not in ("init", "init_gain", "gate_bias")}
    digest = checksum({name: tensor.to(torch.bfloat16) for name, tensor in weights.items()})
    return hashlib.sha256(f"{json.dumps(settings, sort_keys=True)} {digest}".encode()).hexdigest()


# ---- folders ---------------------------------------------------------------------------------------


def load_adapter(path: str | os.PathLike, **hub_kwargs: Any) -> Adapter:
    """Reads an adapter folder, or downloads it from the hub; our format or the authors'.

    Raises:
        FileNotFoundError: neither a folder with an adapter nor a repository on the hub.
        AdapterFormatError: a broken or foreign file; file and field are named.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or folder.exists() or len(folder.parts) > 2:
            raise FileNotFoundError(f"{path}: no such folder.")
        folder = download(os.fspath(path), [CONFIG_FILE, WEIGHTS_FILE, OFFICIAL_WEIGHTS_FILE], **hub_kwargs)
    config_file = folder / CONFIG_FILE
    if not config_file.exists():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}: it is not a delta-mem adapter.")
    values = read_json(config_file)
    if "format" in values:
        return _load_ours(folder, values)
    return _load_official(folder, values)


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The name of the first of the weights that holds NaN or infinity, if one does."""
    return next((name for name, weight in weights.items() if not torch.isfinite(weight).all()), None)


def save_adapter(adapter: Adapter, path: str | os.PathLike) -> None:
    """Writes an adapter folder in our format. A crash leaves the old adapter there, or the new.

    Raises:
        ValueError: a weight holds NaN or infinity; it is named and nothing is written.
    """
    if (name := not_finite(adapter.weights)) is not None:
        raise ValueError(f"the adapter's weight {name} holds NaN or infinity; not saved.")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": adapter.config.to_dict(),
        "backbone": adapter.backbone,
    }
    values["weights_sha256"] = checksum(adapter.weights)
    # The weights come first and bring all the rest along: a save that is cut short behind them is done.
    metadata = {"format": FORMAT, "sha256": values["weights_sha256"], "config": json.dumps(values)}
    write_together(
        {
            folder / WEIGHTS_FILE: save_tensors(adapter.weights, metadata),
            folder / "README.md": model_card(adapter),
            folder / CONFIG_FILE: json.dumps(values, indent=2) + "\n",
        }
    )


def _load_ours(folder: Path, values: dict[str, Any]) -> Adapter:
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    check_header(config_file, values, FORMAT, FORMAT_VERSION, ("config", "backbone", "weights_sha256"))
    if not weights_file.exists():
        raise AdapterFormatError(f"{weights_file}: missing.")
    try:
        with safe_open(weights_file, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise AdapterFormatError(f"{weights_file}: not a whole safetensors file ({error}).") from None
    for name in weights:
        if not _KEY.fullmatch(name):
            raise AdapterFormatError(f"{weights_file}: {name}: not a weight of a δ-mem adapter.")
    if metadata.get("sha256") != checksum(weights):
        raise AdapterFormatError(f"{weights_file}: sha256: the contents are not those that were saved.")
    if metadata["sha256"] != values["weights_sha256"]:
        if "config" not in metadata:
            raise AdapterFormatError(
                f"{config_file}: weights_sha256: saved with other weights than those in {weights_file.name}."
            )
        values = json.loads(metadata["config"])
    config = _config(config_file, values["config"])
    return Adapter(config, weights, values["backbone"], str(weights_file))


def _config(file: Path, values: Mapping[str, Any]) -> DeltaMemConfig:
    try:
        return DeltaMemConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise AdapterFormatError(f"{file}: {error}") from None


# ---- the authors' format ---------------------------------------------------------------------------

_OFFICIAL_UPDATES = {
    "standard": "standard",
    "lambda_outside": "decay_outside",
    "no_lambda": "no_decay",
}
_OFFICIAL_WRITES = {"token": "token", "message_mean": "message", "sentence_mean": "sentence"}
_OFFICIAL_INITS = {
    "base_slice_fixed": "base_slice",
    "base_slice": "base_slice",
    "zero": "zero",
    "random": "random",
}

# Fields of removed experiments: they mean nothing at these values, and are refused at any other.
_OFFICIAL_LEFTOVERS: dict[str, Any] = {
    "normalize_qk": True,
    "base_slice_ref_width": 8,
    "num_memory_partitions": 1,
    "num_global_memory_partitions": 0,
    "memory_partition_routing": "soft",
    "memory_partition_basis": "shared",
    "tie_memory_partition_read_write": False,
    "memory_partition_read_mode": "softmax",
    "memory_partition_sigmoid_gate_bias_init": -2.0,
    "slot_read_top_k": 0,
    "global_memory_mode": "shared_rw",
    "global_memory_read_top_k": 0,
    "global_memory_merge_mode": "gated_residual",
    "global_memory_gate_bias_init": -2.0,
    "global_memory_read_logit_bias": 0.0,
    "memory_reader_layers": [],
    "memory_reader_hidden_size": 1024,
    "memory_reader_residual_scale": 0.1,
    "memory_reader_read_only": True,
    "memory_readout_mode": "delta",
    "memory_write_source": "learned_hidden",
    "memory_write_proposals_per_message": 2,
    "synthetic_memory_slots": 1,
    "latent_memory_layers": [],
    "latent_memory_hidden_size": 1024,
    "latent_memory_residual_scale": 0.1,
    "latent_memory_slots": 4,
    "latent_memory_init_std": 0.002,
    "latent_gate_init": 0.01,
    "target_modules": ["self_attn"],
    "delta_scale_parameterization": "alpha_over_rank",
}

_OFFICIAL_NAMES = {
    "memory_q_proj": "query_proj",
    "memory_k_proj": "key_proj",
    "memory_v_proj": "value_proj",
    "beta_proj": "beta_proj",
    "beta_bias": "beta_bias",
    "lambda_proj": "lambda_proj",
    "lambda_bias": "lambda_bias",
    **{f"delta_{head}_proj": f"delta_{head}" for head in HEADS},
    "delta_scale_raw": "scale_raw",
    "delta_o_rmsnorm_weight": "o_norm_weight",
}
_OFFICIAL_KEY = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.(\w+)")


def config_from_official(values: Mapping[str, Any], file: str | os.PathLike = CONFIG_FILE) -> DeltaMemConfig:
    """Our config of the authors' fields.

    Raises:
        AdapterFormatError: an unknown field, or a leftover one away from its default; it is named.
    """
    values = dict(values)

    def choice(name, table, default):
        given = values.pop(name, default)
        if not isinstance(given, str) or given not in table:
            raise AdapterFormatError(f"{file}: {name}: {given!r} is none of {', '.join(table)}.")
        return table[given]

    if "delta_heads" not in values:
        raise AdapterFormatError(f"{file}: delta_heads: missing.")
    scaled = values.pop("trainable_delta_scale", False)
    if not isinstance(scaled, bool):
        raise AdapterFormatError(f"{file}: trainable_delta_scale: {scaled!r} is not true or false.")
    granularity = choice("delta_scale_granularity", {"layer": "layer", "head": "head"}, "layer")
    fields = {
        "update": choice("state_update_mode", _OFFICIAL_UPDATES, "standard"),
        "write": choice("memory_write_granularity", _OFFICIAL_WRITES, "token"),
        "init": choice("output_init", _OFFICIAL_INITS, "base_slice_fixed"),
        "layers": values.pop("target_layers", None) or None,
        "trainable_scale": granularity if scaled else None,
    }
    for theirs, ours in (
        ("rank", "rank"),
        ("alpha", "alpha"),
        ("num_state_heads", "num_states"),
        ("delta_heads", "heads"),
        ("couple_lambda", "tied_gates"),
        ("rankwise_gates", "per_row_gates"),
        ("beta_bias_init", "gate_bias"),
        ("online_gain", "init_gain"),
        ("delta_o_rmsnorm", "o_norm"),
        ("delta_o_rmsnorm_eps", "o_norm_eps"),
        ("delta_scale_init", "scale_init"),
        ("delta_scale_max", "scale_max"),
    ):
        if theirs in values:
            fields[ours] = values.pop(theirs)
    for name, value in values.items():
        if name not in _OFFICIAL_LEFTOVERS:
            raise AdapterFormatError(f"{file}: {name}: unknown field.")
        if value != _OFFICIAL_LEFTOVERS[name]:
            raise AdapterFormatError(
                f"{file}: {name}: {value!r} belongs to an experiment that delta-mem does not have "
                f"(only {_OFFICIAL_LEFTOVERS[name]!r} is read)."
            )
    return _config(Path(file), fields)


def config_to_official(config: DeltaMemConfig) -> dict[str, Any]:
    """The authors' fields of our config."""

    def name(table, value):
        return next(theirs for theirs, ours in table.items() if ours == value)

    return {
        "rank": config.rank,
        "alpha": config.alpha,
        "beta_bias_init": config.gate_bias,
        "couple_lambda": config.tied_gates,
        "state_update_mode": name(_OFFICIAL_UPDATES, config.update),
        "rankwise_gates": config.per_row_gates,
        "output_init": name(_OFFICIAL_INITS, config.init),
        "online_gain": config.init_gain,
        "num_state_heads": config.num_states,
        "memory_write_granularity": name(_OFFICIAL_WRITES, config.write),
        "target_layers": list(config.layers or ()),
        "delta_heads": list(config.heads),
        "delta_o_rmsnorm": config.o_norm,
        "delta_o_rmsnorm_eps": config.o_norm_eps,
        "trainable_delta_scale": config.trainable_scale is not None,
        "delta_scale_init": config.scale_init,
        "delta_scale_max": config.scale_max,
        "delta_scale_granularity": config.trainable_scale or "layer",
        **_OFFICIAL_LEFTOVERS,
    }


def _load_official(folder: Path, values: dict[str, Any]) -> Adapter:
    weights_file = folder / OFFICIAL_WEIGHTS_FILE
    config = config_from_official(values, folder / CONFIG_FILE)
    if not weights_file.exists():
        raise AdapterFormatError(f"{weights_file}: missing.")
    try:
        stored = torch.load(weights_file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise AdapterFormatError(
            f"{weights_file}: holds pickled code, not only tensors; it was not run, and is not read."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise AdapterFormatError(f"{weights_file}: not a whole torch file ({error}).") from None
    if not isinstance(stored, dict):
        raise AdapterFormatError(f"{weights_file}: holds a {type(stored).__name__}, not a dict of tensors.")
    weights, sizes, widest = {}, {}, 0
    for key, tensor in stored.items():
        match = _OFFICIAL_KEY.fullmatch(key) if isinstance(key, str) else None
        name = _OFFICIAL_NAMES.get(match[2]) if match else None
        if name is None or not isinstance(tensor, Tensor):
            raise AdapterFormatError(f"{weights_file}: {key}: not a weight of a δ-mem adapter.")
        if (tensor.dim() == 2) != (name.endswith("_proj") or name.startswith("delta_")):
            raise AdapterFormatError(f"{weights_file}: {key}: cannot be {list(tensor.shape)}.")
        if name.startswith("delta_"):
            sizes[name[-1]] = tensor.shape[0]
            # The authors store all four corrections, also those of heads that are not used.
            if name[-1] not in config.heads:
                continue
        if name == "query_proj":
            widest = tensor.shape[1]
        weights[f"layers.{match[1]}.{name}"] = tensor.reshape(-1) if name == "scale_raw" else tensor
    backbone = {"hidden_size": widest, "heads": sizes}
    return Adapter(config, weights, backbone, str(weights_file), official=True)


def save_official(adapter: Adapter, path: str | os.PathLike) -> None:
    """Writes an adapter folder in the authors' format.

    Theirs stores all four corrections; those that this adapter has not are written as zeros.

    Raises:
        AdapterFormatError: the widths of those projections are not known.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    theirs = {ours: name for name, ours in _OFFICIAL_NAMES.items()}
    stored = {}
    for index in adapter.layers:
        prefix = f"layers.{index}."
        own = {k.removeprefix(prefix): v for k, v in adapter.weights.items() if k.startswith(prefix)}
        for head in HEADS:
            if f"delta_{head}" not in own:
                size = adapter.backbone.get("heads", {}).get(head)
                if size is None:
                    raise AdapterFormatError(
                        f"{adapter.source}: the width of the {head} projection is not known."
                    )
                own[f"delta_{head}"] = torch.zeros(size, adapter.config.width)
        stored |= {f"model.layers.{index}.self_attn.{theirs[name]}": own[name] for name in own}
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    config = json.dumps(config_to_official(adapter.config), indent=2) + "\n"
    write_together({folder / OFFICIAL_WEIGHTS_FILE: buffer.getvalue(), folder / CONFIG_FILE: config})


# ---- the hub ---------------------------------------------------------------------------------------


def push_to_hub(
    adapter: Adapter, repo_id: str, private: bool | None, token: str | None, commit_message: str
) -> str:
    """Uploads an adapter folder in our format. Returns the commit's URL."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapter, folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return commit.commit_url


def model_card(adapter: Adapter) -> str:
    """README.md of an adapter folder: front matter for the hub, what it is, how to load it."""
    name = adapter.backbone.get("name_or_path") or ""
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    front = ["library_name: delta-mem", "tags:", "- delta-mem", "- memory"]
    if on_hub:
        front.insert(1, f"base_model: {name}")
    parameters = sum(tensor.numel() for tensor in adapter.weights.values())
    config = adapter.config
    rows = "\n".join(f"| {key} | `{value}` |" for key, value in config.to_dict().items())
    state = len(adapter.layers) * config.num_states * config.rank**2 * 4
    return f"""---
{chr(10).join(front)}
---

# δ-mem adapter for {name or adapter.backbone.get("model_type", "a frozen backbone")}

An online memory beside the attention layers of a frozen language model
([arXiv 2605.12357](https://arxiv.org/abs/2605.12357)): {parameters:,} trained parameters, and
{state:,} bytes of memory a conversation.

```python
import delta_mem as dm
from transformers import AutoModelForCausalLM

backbone = AutoModelForCausalLM.from_pretrained({(name if on_hub else "path/or/hub-id of the backbone")!r})
model = dm.DeltaMemModel.from_pretrained(backbone, "path/or/hub-id of this adapter")
memory = model.new_memory()
```

| setting | value |
| --- | --- |
{rows}
"""

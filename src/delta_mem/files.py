"""Files that a crash leaves whole, headers that say what they are, checksums that notice a changed tensor."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterFormatError


def write_atomically(path: str | os.PathLike, data: bytes | str) -> None:
    """Writes `data` to `path` by way of a temporary name, so that a crash leaves the old file whole."""
    write_together({path: data})


def write_together(files: Mapping[str | os.PathLike, bytes | str]) -> None:
    """Writes `{path: data}`. The files take their places at the end, in their order, when all are written."""
    files = {os.path.realpath(path) if os.path.islink(path) else path: data for path, data in files.items()}
    temporaries: dict[str | os.PathLike, str] = {}
    try:
        for path, data in files.items():
            temporaries[path] = _write_beside(path, data)
        for path in files:
            os.replace(temporaries[path], path)
            del temporaries[path]
    finally:
        for temporary in temporaries.values():
            os.unlink(temporary)


def _write_beside(path: str | os.PathLike, data: bytes | str) -> str:
    """Writes `data` under a temporary name, which it returns, in the folder of `path`."""
    if isinstance(data, str):
        data = data.encode()
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder.")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{os.fspath(path)}: is a folder; name a file.")
    temporary = os.path.join(folder, f".delta-mem-{os.urandom(8).hex()}")
    # A file that is there may have been given rights of its own, which nobody gets more than in between.
    rights = stat.S_IMODE(os.stat(path).st_mode) if os.path.exists(path) else None
    mode = 0o666 if rights is None else rights
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if rights is not None:
            os.chmod(temporary, rights)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return temporary


def download(repo_id: str, files: Iterable[str], **hub_kwargs: Any) -> Path:
    """The folder of a hub repository's `files`, those of them that it has.

    Raises:
        FileNotFoundError: no such repository, or no network and nothing kept from an earlier time.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(files), **hub_kwargs))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{repo_id!r} is neither a folder here nor to be had from the hub ({reason})."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        AdapterFormatError: not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterFormatError(f"{path}: not JSON ({error}).") from None
    if not isinstance(values, dict):
        raise AdapterFormatError(f"{path}: holds a {type(values).__name__}, not an object.")
    return values


def check_header(
    path: str | os.PathLike, values: Mapping[str, Any], format: str, version: Any, fields: Iterable[str]
) -> None:
    """Sees that a file's `values` are of this format and version and have these fields.

    Raises:
        AdapterFormatError: they are not; file and field are named.
    """
    if values.get("format") != format:
        raise AdapterFormatError(f"{path}: format: {values.get('format')!r} is not {format!r}.")
    if values.get("format_version") != version:
        raise AdapterFormatError(
            f"{path}: format_version: {values.get('format_version')!r}; this release reads {version!r}."
        )
    for field in fields:
        if field not in values:
            raise AdapterFormatError(f"{path}: {field}: missing.")


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and contents, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

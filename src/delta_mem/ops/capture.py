"""Branches of a CUDA graph, made while it is captured: work that what is launched next need not wait for.

A stream that is being captured keeps the nodes that its next launch will wait for. A branch notes them when
it begins and puts them back when it ends; to join it is to add its last nodes to them. A second stream, and
an event to join them, would do the same, but CUDA refuses a capture that ends before they are joined, and
torch.compile may cut a graph anywhere. A branch that nobody joins is over when the graph is.

These are functions of CUDA's driver that PyTorch has no names for. Where they are missing, and where nothing
is captured, there are no branches: launches wait for each other in their order.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_ADD, _SET = 0, 1  # CUstreamUpdateCaptureDependencies_flags
_ACTIVE = 1  # CUstreamCaptureStatus

_allowed = True
_nodes: dict[int, list[int]] = {}  # the last ones of branches that are to be joined, by the capture's number
_results: dict[int, list[int]] = {}  # addresses of each branch's results, by that of the first


@contextlib.contextmanager
def branch(results: Sequence[Tensor]) -> Iterator[None]:
    """What is launched within it, on the current stream of the results' device, is a branch.

    Until it is joined, all that its launches read and write must stay allocated, and untouched by others.

    Args:
        results: what the launches write.
    """
    if not _allowed:
        yield
        return
    addresses = [x.data_ptr() for x in results]
    _results[addresses[0]] = addresses
    device = results[0].get_device()
    before = _captured(device)
    yield
    if before is not None and (after := _captured(device)) is not None:
        number, nodes = before
        _update(device, nodes, _SET)
        _nodes.setdefault(number, []).extend(after[1])


def join(results: Sequence[Tensor]) -> None:
    """What is launched next waits for all branches of this capture.

    Args:
        results: those of a branch. If they are copies of them, made by torch.compile too early, there will be
            no branches from now on: it runs a graph before it captures it.

    Raises:
        RuntimeError: copies, in the middle of a capture.
    """
    global _allowed
    device, addresses = results[0].get_device(), [x.data_ptr() for x in results]
    now = _captured(device)
    nodes = None if now is None else _nodes.pop(now[0], None)
    if nodes:
        _update(device, nodes, _ADD)
    if _results and _results.pop(addresses[0], None) != addresses:
        _allowed = False
        _results.clear()
        if nodes:
            raise RuntimeError("torch.compile has copied the results of a kernel that is still to run.")


def _captured(device: int) -> tuple[int, list[int]] | None:
    """The capture's number, and the nodes that the next launch will wait for; None if nothing is captured."""
    if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
        return None
    if device != torch.cuda.current_device() or (driver := _driver()) is None:
        return None
    status, number, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
    nodes, count = ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_size_t()
    results = map(ctypes.byref, (status, number, graph, nodes, count))
    if driver.cuStreamGetCaptureInfo_v2(_stream(device), *results) or status.value != _ACTIVE:
        return None
    return number.value, nodes[: count.value] if count.value else []


def _update(device: int, nodes: list[int], how: int) -> None:
    array = (ctypes.c_void_p * len(nodes))(*nodes)
    count, how = ctypes.c_size_t(len(nodes)), ctypes.c_uint(how)
    if error := _driver().cuStreamUpdateCaptureDependencies(_stream(device), array, count, how):
        raise RuntimeError(
            f"CUDA error {error} while a graph was captured (cuStreamUpdateCaptureDependencies)."
        )


def _stream(device: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(device))


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """CUDA's driver, with functions of CUDA 11.3; None on ROCm, and where it is not to be found."""
    if torch.version.cuda is None:
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        for name in ("cuStreamGetCaptureInfo_v2", "cuStreamUpdateCaptureDependencies"):
            getattr(driver, name)
    except (OSError, AttributeError):
        return None
    return driver

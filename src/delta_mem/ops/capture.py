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
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

_ADD, _SET = 0, 1  # CUstreamUpdateCaptureDependencies_flags
_ACTIVE = 1  # CUstreamCaptureStatus

_allowed = True
# By the addresses of their results, branches that are to be joined: the capture's number, and the last nodes.
# None for one that was none, because nothing is captured.
_begun: dict[tuple[int, ...], tuple[int, list[int]] | None] = {}


@contextlib.contextmanager
def branch(results: Sequence[Tensor], possible: bool = True) -> Iterator[None]:
    """What is launched within it, on the current stream of the results' device, is a branch.

    Until it is joined, all that its launches read and write must stay allocated, and untouched by others.

    Args:
        results: what the launches write.
        possible: False: it shall be none, and is joined all the same.
    """
    device, before, after = results[0].get_device(), None, None
    if possible and _allowed:
        with contextlib.suppress(RuntimeError):
            before = _captured(device)
    yield
    if before is not None:
        with contextlib.suppress(RuntimeError):  # then all that follows waits
            after = _captured(device)
            _update(device, before[1], _SET)
    _begun[_addresses(results)] = after


def join(results: Sequence[Tensor]) -> None:
    """What is launched next waits for a branch.

    Args:
        results: those of the branch. torch.compile runs a graph once before it captures it; if it has made
            copies of them, that shows there, and from then on there are no branches.

    Raises:
        RuntimeError: copies, or no news of the capture, while one goes on.
    """
    global _allowed
    device, addresses = results[0].get_device(), _addresses(results)
    if addresses in _begun:
        begun = _begun.pop(addresses)
        if begun is not None and (now := _captured(device)) is not None and now[0] == begun[0]:
            _update(device, begun[1], _ADD)
    elif _allowed:
        _allowed = False
        _logger.info("torch.compile copies results of a kernel, so it will not run beside others.")
        if _captured(device) is not None:
            raise RuntimeError("torch.compile has copied the results of a kernel that is still to run.")


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([x.data_ptr() for x in tensors])


def _captured(device: int) -> tuple[int, list[int]] | None:
    """The capture's number, and the nodes that the next launch will wait for; None if nothing is captured.

    Raises:
        RuntimeError: something is captured, and these are not to be had.
    """
    if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
        return None
    if device != torch.cuda.current_device() or (driver := _driver()) is None:
        raise RuntimeError("cannot look into what is captured.")
    status, number, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
    nodes, count = ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_size_t()
    results = map(ctypes.byref, (status, number, graph, nodes, count))
    error = driver.cuStreamGetCaptureInfo_v2(_stream(device), *results)
    if error or status.value != _ACTIVE:
        raise RuntimeError(f"CUDA error {error} while a graph was captured (cuStreamGetCaptureInfo_v2).")
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

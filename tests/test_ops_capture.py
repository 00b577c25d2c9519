"""Branches of a CUDA graph: what waits for what."""

import ctypes

import pytest
import torch

from delta_mem.ops import capture

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(capture, "_allowed", True)
    monkeypatch.setattr(capture, "_begun", {})
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def test_without_a_capture_there_are_none():
    results = [torch.zeros(3), torch.zeros(2)]
    with capture.branch(results):
        results[0].add_(1)
    capture.join(results)
    assert capture._allowed and not capture._begun


def test_an_exception_passes_through_and_leaves_nothing():
    with pytest.raises(KeyboardInterrupt), capture.branch([torch.zeros(1)]):
        raise KeyboardInterrupt
    assert not capture._begun


def test_results_that_were_copied_end_all_branches(caplog):
    caplog.set_level("INFO")
    results = [torch.zeros(3), torch.zeros(2)]
    with capture.branch(results):
        pass
    capture.join([results[0], results[1].clone()])
    assert not capture._allowed and "copies results" in caplog.text
    with capture.branch(results):
        pass
    capture.join(results)
    capture.join(results)  # knows of none, and says nothing more
    assert len(caplog.records) == 1


class Driver:
    """Notes which nodes the next launch of a capture waits for; each launch makes one."""

    def __init__(self, monkeypatch):
        self.nodes, self.made, self.fails = [1], 1, False
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(capture, "_stream", lambda device: None)
        monkeypatch.setattr(capture, "_driver", lambda: self)

    def launch(self):
        self.made += 1
        self.nodes = [self.made]

    def cuStreamGetCaptureInfo_v2(self, stream, status, number, graph, nodes, count):
        status._obj.value, number._obj.value, count._obj.value = capture._ACTIVE, 7, len(self.nodes)
        self.kept = (ctypes.c_void_p * len(self.nodes))(*self.nodes)
        ctypes.memmove(
            ctypes.addressof(nodes._obj), ctypes.byref(ctypes.c_void_p(ctypes.addressof(self.kept))), 8
        )
        return int(self.fails)

    def cuStreamUpdateCaptureDependencies(self, stream, nodes, count, how):
        given = list(nodes[: count.value])
        self.nodes = given if how.value == capture._SET else self.nodes + given
        return 0


def test_what_waits_for_what(monkeypatch):
    driver, results = Driver(monkeypatch), [torch.zeros(1)]
    with capture.branch(results):
        driver.launch()
        driver.launch()
    assert driver.nodes == [1]
    driver.launch()
    capture.join(results)
    assert driver.nodes == [4, 3] and not capture._begun
    with capture.branch(results, possible=False):
        driver.launch()
    capture.join(results)
    assert driver.nodes == [5]


def test_without_news_of_the_capture_there_is_no_branch_or_an_error(monkeypatch):
    driver, results = Driver(monkeypatch), [torch.zeros(1)]
    driver.fails = True
    with capture.branch(results):
        driver.launch()
    assert driver.nodes == [2]
    capture.join(results)
    driver.fails = False
    with capture.branch(results):
        driver.launch()
    driver.fails = True
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        capture.join(results)


def waited_for():
    return set(capture._captured(0)[1])


@on_gpu
@pytest.mark.gpu
def test_the_next_launch_waits_for_a_branch_once_it_is_joined():
    x, graph = torch.zeros(1 << 20, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, beside = x + 1, torch.empty_like(x)
        before = waited_for()
        with capture.branch([beside]):
            torch.sin(y, out=beside)
            beside.cos_()
            last = waited_for()
        assert waited_for() == before and not last & before
        z = y * 2
        after = waited_for()
        capture.join([beside])
        assert waited_for() == after | last and not capture._begun
        result = z + beside
        assert len(waited_for()) == 1
    for value in (0.5, 2.0):
        x.fill_(value)
        graph.replay()
        torch.testing.assert_close(result, (x + 1) * 2 + (x + 1).sin().cos())


@on_gpu
@pytest.mark.gpu
def test_two_branches_and_one_at_the_very_start():
    x, graph = torch.ones(1 << 20, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first, second = torch.empty_like(x), torch.empty_like(x)
        with capture.branch([first]):
            torch.add(x, 1, out=first)
        with capture.branch([second]):
            torch.add(x, 2, out=second)
        third = x + 3
        capture.join([first])
        capture.join([second])
        result = first * second * third
    graph.replay()
    assert (result == 24).all()


@on_gpu
@pytest.mark.gpu
def test_a_branch_that_nobody_joins_is_over_when_the_graph_is():
    x, beside = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with capture.branch([beside]):
            torch.add(x, 1, out=beside)
        x.mul_(1)
    with torch.cuda.graph(other):
        capture.join([beside])  # of the other capture, so there is nothing to wait for
        result = beside * 2
    graph.replay()
    other.replay()
    assert (result == 2).all()


@on_gpu
@pytest.mark.gpu
def test_copies_in_the_middle_of_a_capture_are_an_error():
    x, graph = torch.zeros(1 << 20, device="cuda"), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="still to run"), torch.cuda.graph(graph):
        beside = torch.empty_like(x)
        with capture.branch([beside]):
            torch.add(x, 1, out=beside)
        capture.join([beside.clone()])

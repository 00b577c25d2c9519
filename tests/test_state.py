"""A memory is a value: copied, stacked, taken apart, saved, and refused where it does not belong."""

import copy
import os

import pytest
import torch
from safetensors.torch import load, save

import delta_mem as dm
from delta_mem.files import checksum
from delta_mem.state import read_metadata
from families import backbone

IDS = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(1))
SETTINGS = dict(init="random", init_gain=0.3)
CONFIGS = {
    "token": dm.DeltaMemConfig(num_states=2, **SETTINGS),
    "message": dm.DeltaMemConfig(write="message", **SETTINGS),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return dm.DeltaMemModel(backbone("qwen3"), CONFIGS[request.param])


@pytest.fixture
def memory(model):
    """Three rows; under segment writes with a segment left open in each."""
    memory = model.new_memory(3)
    return model.write(memory, IDS, keep_segment_open=True)


def same(one, other):
    assert one.tokens_written.tolist() == other.tokens_written.tolist()
    assert list(one.layers) == list(other.layers)
    for index in one.layers:
        assert torch.equal(one.layers[index], other.layers[index])
    assert (one.open_segment is None) == (other.open_segment is None)
    if one.open_segment is not None:
        assert torch.equal(one.open_segment.count, other.open_segment.count)
        assert torch.equal(one.open_segment.ids, other.open_segment.ids)
        for index, total in one.open_segment.sums.items():
            assert torch.equal(total, other.open_segment.sums[index])


def test_new_is_zeros_of_the_documented_shape(model):
    memory = model.new_memory(2)
    config = model.delta_config
    assert list(memory.layers) == [0, 1, 2, 3]
    for state in memory.layers.values():
        assert state.shape == (2, config.num_states, 8, 8) and state.dtype == torch.float32
        assert not state.any()
    assert memory.batch_size == len(memory) == 2
    assert memory.tokens_written.tolist() == [0, 0]
    with pytest.raises(ValueError, match="batch_size"):
        model.new_memory(0)


def test_a_fork_goes_its_own_way(model, memory):
    fork, before = memory.fork(), memory.fork()
    model.write(fork, IDS)
    same(memory, before)
    assert fork.tokens_written.tolist() == [24] * 3


def test_stacked_rows_go_on_as_they_would_alone(model):
    memories = []
    for row, length in enumerate((5, 12, 9)):
        one = model.new_memory()
        memories.append(model.write(one, IDS[row : row + 1, :length], keep_segment_open=True))
    batch = dm.MemoryState.stack(memories)
    assert batch.tokens_written.tolist() == [5, 12, 9]
    model.write(batch, IDS)
    for row, one in enumerate(memories):
        model.write(one, IDS[row : row + 1])
        for index, state in one.layers.items():
            torch.testing.assert_close(batch[row].layers[index], state, atol=1e-5, rtol=1e-5)


def test_stack_and_take_apart(model, memory):
    same(dm.MemoryState.stack([memory[0], memory[1:]]), memory)
    same(dm.MemoryState.stack(memory), memory)
    same(memory[-1], memory[2])
    row = memory[1]
    row.layers[0].fill_(7)
    row.tokens_written.fill_(7)
    assert memory[1].tokens_written.tolist() == [12] and not (memory.layers[0] == 7).any()
    with pytest.raises(IndexError, match="no row 3"):
        memory[3]
    with pytest.raises(ValueError, match="at least one"):
        dm.MemoryState.stack([])


def test_reset_forgets_in_place(model, memory):
    memory.reset()
    same(memory, model.new_memory(3))


def test_saved_and_loaded(model, memory, tmp_path):
    memory.save(tmp_path / "memory.safetensors")
    loaded = dm.MemoryState.load(tmp_path / "memory.safetensors")
    same(loaded, memory)
    assert loaded.adapter == model.fingerprint() and loaded.created == memory.created
    same(dm.MemoryState.from_bytes(memory.to_bytes()), memory)
    model.write(loaded, IDS)
    model.write(memory, IDS)
    same(loaded, memory)
    assert os.listdir(tmp_path) == ["memory.safetensors"]


def test_the_size_promised_for_qwen3_4b(tmp_path):
    layers = {index: torch.randn(1, 1, 8, 8) for index in range(36)}
    written = torch.tensor([10**9])
    memory = dm.MemoryState(layers, written, adapter="0" * 64, backbone="Qwen/Qwen3-4B-Instruct-2507")
    assert memory.nbytes == 9216
    memory.save(tmp_path / "memory")
    assert (tmp_path / "memory").stat().st_size <= 10 * 1024


def test_metadata_names_adapter_backbone_tokens_and_dates(model, memory):
    metadata = read_metadata(memory.to_bytes())
    assert metadata["format_version"] == "1"
    assert metadata["adapter"] == model.fingerprint()
    assert metadata["backbone"] == "qwen3"
    assert metadata["tokens_written"] == "[12,12,12]"
    assert metadata["created"] <= metadata["saved"]


def test_nan_is_not_saved_and_the_old_file_stays(memory, tmp_path):
    path = tmp_path / "memory"
    memory.save(path)
    before = path.read_bytes()
    memory.layers[2][1, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="layer 2 holds NaN"):
        memory.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["memory"]


def tamper(data, **changes):
    """The memory file `data` with changed metadata or tensors."""
    tensors, metadata = load(data), read_metadata(data)
    for key, value in changes.items():
        target = tensors if key in tensors else metadata
        target.pop(key) if value is None else target.update({key: value})
    return save(tensors, metadata)


def signed(data, **tensors):
    """The memory file `data` with other tensors, and with the checksum that goes with them."""
    kept = {**load(data), **tensors}
    kept = {name: tensor for name, tensor in kept.items() if tensor is not None}
    return save(kept, {**read_metadata(data), "sha256": checksum(kept)})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda data: data[:-100], "safetensors"),
        (lambda data: data[:5], "safetensors"),
        (lambda data: b"", "safetensors"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "sha256"),
        (lambda data: tamper(data, format="something else"), "format"),
        (lambda data: tamper(data, format_version="99"), "format_version"),
        (lambda data: tamper(data, adapter=None), "adapter"),
        (lambda data: tamper(data, layers="[0]"), "layers"),
        (lambda data: tamper(data, layers="[0"), "layers"),
        (lambda data: tamper(data, layers="[0, 1, 2, 2]"), "layers"),
        (lambda data: tamper(data, layers="[0, 1, 2, 3, 3]"), "layers"),
        (lambda data: tamper(data, layers='"0123"'), "layers"),
        (lambda data: signed(data, states=torch.zeros(4, 0, 1, 8, 8)), "states"),
        (lambda data: tamper(data, segment_features="many"), "segment_features"),
        (lambda data: tamper(data, segment_features="²"), "segment_features"),
        (lambda data: tamper(data, segment_features="9" * 12), "segment_features"),
        (lambda data: signed(data, tokens_written=torch.ones(3)), "tokens_written"),
        (lambda data: signed(data, tokens_written=-torch.ones(3, dtype=torch.int64)), "tokens_written"),
        (lambda data: signed(data, open_sums=torch.zeros(4, 3, 1)), "open_sums"),
        (lambda data: signed(data, open_sums=None, open_ids=torch.zeros(3)), "open_sums"),
        (lambda data: tamper(data, states=torch.zeros(2)), "states|sha256"),
    ],
)
def test_a_broken_file_is_named_with_the_field(memory, tmp_path, change, field):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(change(memory.to_bytes()))
    with pytest.raises(dm.AdapterFormatError, match=rf"broken.safetensors: .*({field})"):
        dm.MemoryState.load(path)


def test_a_file_full_of_nan_is_refused(memory):
    states = torch.full((4, 3, *memory.layers[0].shape[1:]), float("nan"))
    data = signed(memory.to_bytes(), states=states)
    with pytest.raises(dm.AdapterFormatError, match="layer 0 holds NaN"):
        dm.MemoryState.from_bytes(data)


def test_a_memory_of_another_adapter_is_refused(model, memory):
    other = dm.DeltaMemModel(backbone("qwen3", seed=5), model.delta_config)
    before = memory.fork()
    none = memory.fork()
    none.adapter = None
    for call in (
        lambda: other(IDS, memory=memory),
        lambda: other.write(memory, IDS),
        lambda: other.generate(IDS, memory=memory),
        lambda: dm.MemoryState.stack([memory, other.new_memory()]),
        lambda: dm.MemoryState.stack([none, memory, other.new_memory()]),
    ):
        with pytest.raises(dm.IncompatibleMemoryError, match="another adapter|by 2 adapters"):
            call()
    same(memory, before)
    assert dm.MemoryState.stack([memory, memory]).adapter == model.fingerprint()
    for pair in ([none, memory], [memory, none]):
        assert dm.MemoryState.stack(pair).adapter is None


def test_a_memory_is_of_the_weights_that_wrote_it(model):
    model, other = (dm.DeltaMemModel(backbone("qwen3", seed=s), model.delta_config) for s in (4, 5))
    memory = model.new_memory()
    model.write(memory, IDS[:1])
    model.adapters.load_state_dict(other.adapters.state_dict())
    with pytest.raises(dm.IncompatibleMemoryError, match="another adapter"):
        model.write(memory, IDS[:1])


def test_what_a_database_or_a_list_gives(model, memory):
    for kind in (bytearray, memoryview):
        same(dm.MemoryState.from_bytes(kind(memory.to_bytes())), memory)
    same(memory.select([1, 0, 1]), memory.select(torch.tensor([1, 0, 1])))


def test_a_pickled_memory_is_no_larger_than_it_is(model):
    import pickle

    memory = model.new_memory()
    with torch.no_grad():
        model(IDS[:1], memory=memory)
        model(IDS[:1, :1], memory=memory)
    fresh = pickle.dumps(memory.fork())
    assert len(pickle.dumps(memory)) <= len(fresh)
    same(pickle.loads(pickle.dumps(memory)), memory)


def test_a_memory_of_segment_writes_is_refused_by_token_writes(model):
    other = dm.DeltaMemModel(
        backbone("qwen3"),
        dm.DeltaMemConfig(write="token" if model.delta_config.write != "token" else "message"),
    )
    for one, two in ((model, other), (other, model)):
        with pytest.raises(dm.IncompatibleMemoryError):
            one.place(two.new_memory())
    with pytest.raises(TypeError, match="memory must be a MemoryState, got str"):
        model.place("ada.safetensors")


def test_memories_whose_open_segments_differ_in_width_do_not_mix():
    ours, theirs = (
        dm.DeltaMemModel(backbone("qwen3"), dm.DeltaMemConfig(write="message", tied_gates=tied)).train()
        for tied in (True, False)
    )
    memory = theirs.new_memory()  # in training it names no adapter
    with pytest.raises(dm.IncompatibleMemoryError, match="open segments are 32 wide, the adapter's 24"):
        ours.write(memory, IDS[:1])
    with pytest.raises(dm.IncompatibleMemoryError, match="differ in width"):
        dm.MemoryState.stack([ours.new_memory(), memory])


def test_a_file_keeps_the_rights_it_was_given(memory, tmp_path):
    path = tmp_path / "memory.safetensors"
    memory.save(path)
    path.chmod(0o600)
    memory.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder"):
        memory.save(tmp_path / "nowhere" / "memory.safetensors")


def test_a_shallow_copy_shares_its_tensors(memory):
    twin = copy.copy(memory)
    assert twin.layers is not memory.layers
    assert all(twin.layers[index] is state for index, state in memory.layers.items())
    assert twin.adapter == memory.adapter


def test_a_deep_copy_of_what_gradients_run_through(model):
    memory = model.new_memory()
    model(IDS[:1], memory=memory)
    assert memory.layers[0].requires_grad
    same(copy.deepcopy(memory), memory)


def test_a_memory_is_saved_where_a_link_points(memory, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "memory")
    for _ in range(2):
        memory.save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
    same(dm.MemoryState.load(tmp_path / "memory"), memory)


def test_rows_that_cannot_be_selected(memory):
    with pytest.raises(IndexError, match="at least one row"):
        memory.select([])
    for rows in ([True, False, True], [[0, 1]], [0.5]):
        with pytest.raises(TypeError, match="rows must be integers in a list"):
            memory.select(rows)
    for rows in ([3], [-1]):
        with pytest.raises(IndexError, match="not all of"):
            memory.select(rows)
    same(memory.select(torch.tensor([2, 0], dtype=torch.uint8)), memory.select([2, 0]))


def test_the_same_weights_with_other_settings_are_another_adapter(model):
    import dataclasses

    twin = copy.deepcopy(model)
    twin.delta_config = dataclasses.replace(twin.delta_config, alpha=1.0)
    twin._fingerprint = None
    assert twin.fingerprint() != model.fingerprint()


def test_a_memory_that_does_not_fit_is_refused(model, memory):
    for wrong in (
        dm.DeltaMemConfig(rank=4, **SETTINGS),
        dm.DeltaMemConfig(num_states=3, **SETTINGS),
        dm.DeltaMemConfig(layers=(1, 2), **SETTINGS),
    ):
        other = dm.DeltaMemModel(backbone("qwen3"), wrong)
        with pytest.raises(dm.IncompatibleMemoryError):
            other(IDS, memory=memory)
    with pytest.raises(dm.IncompatibleMemoryError, match=r"3 row\(s\), the input 2"):
        model(IDS[:2], memory=memory)
    with pytest.raises(dm.IncompatibleMemoryError, match=r"on meta, the adapter on cpu; use model.place"):
        model(IDS, memory=memory.to("meta"))
    with pytest.raises(TypeError, match="float32"):
        memory.to(torch.bfloat16)
    with pytest.raises(TypeError, match="MemoryState"):
        model(IDS, memory={})


def test_placed_where_the_model_is(model, memory):
    placed = model.place(memory)
    same(placed, memory)
    assert placed.layers[0] is not memory.layers[0]
    other = dm.DeltaMemModel(backbone("qwen3"), dm.DeltaMemConfig(layers=(1,)))
    with pytest.raises(dm.IncompatibleMemoryError, match="layers"):
        other.place(memory)


def test_an_adapter_cast_to_bfloat16_knows_its_memories(model):
    import copy

    half = copy.deepcopy(model)
    half.adapters.to(torch.bfloat16)
    assert half.fingerprint() == model.fingerprint()


def test_a_memory_of_a_model_in_training_carries_no_fingerprint(model):
    model = dm.DeltaMemModel(backbone("qwen3"), model.delta_config).train()
    memory = model.new_memory()
    model.eval()
    assert memory.adapter is None
    model.write(memory, IDS[:1])


def test_a_memory_written_in_training_loses_its_fingerprint(model):
    model = dm.DeltaMemModel(backbone("qwen3"), model.delta_config)
    kept, written, generated = (model.new_memory() for _ in range(3))
    model.train()
    model.write(kept, IDS[:1], write=False)
    model.generate(IDS[:1], memory=kept, write=False, max_new_tokens=2)
    model.write(written, IDS[:1])
    model.generate(IDS[:1], memory=generated, max_new_tokens=2)
    assert kept.adapter == model.fingerprint()
    assert written.adapter is None and generated.adapter is None

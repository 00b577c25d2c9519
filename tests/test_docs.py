"""What the documentation says runs and exists; tiny stand-ins take the place of the models it names."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import delta_mem as dm
from delta_mem import checkpoint
from families import backbone
from helpers import tiny_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Any backbone on the hub is a tiny one, any adapter there a fresh one; files are written to a new folder."""
    tokenizer = tiny_tokenizer()
    real_tokenizer, real_model = AutoTokenizer.from_pretrained, AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer,
        "from_pretrained",
        lambda name: real_tokenizer(name) if Path(name).is_dir() else tokenizer,
    )

    def load(name, dtype=None):
        if Path(name).is_dir():  # the model that comes with the package
            return real_model(name, dtype=dtype)
        sizes = dict(vocab_size=400, num_hidden_layers=2, max_position_embeddings=1024)
        model = backbone("qwen3", eos_token_id=tokenizer.eos_token_id, **sizes)
        return model.to(dtype) if isinstance(dtype, torch.dtype) else model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    hub, work = tmp_path / "hub", tmp_path / "work"
    dm.DeltaMemModel(load("any")).save_pretrained(hub)
    monkeypatch.setattr(checkpoint, "download", lambda name, files: hub)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    work.mkdir()
    monkeypatch.chdir(work)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_one_after_the_other(page, stand_ins):
    text, names = (ROOT / page).read_text(encoding="utf-8"), {}
    for block in PYTHON.finditer(text):
        # So many empty lines that an error names the line of the page.
        lines = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(lines + block[1], str(ROOT / page), "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_functions_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link
    code = ROOT / "src" / "delta_mem"
    for path in re.findall(r"`([\w/]+(?:\.py|/))`", text):
        assert (code / path).exists() or (ROOT / path).exists(), path
    for name, path in re.findall(r"`([\w.]+)` in `([\w/]+\.py)`", text):
        source = (code / path).read_text(encoding="utf-8")
        assert re.search(rf"\b(def|class) {name.split('.')[-1]}\b", source), (name, path)

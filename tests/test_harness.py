"""The lm-evaluation-harness runs on a model with a memory: `python -m delta_mem.evaluation.harness`."""

import json
import subprocess
import sys

import pytest
import torch

import delta_mem as dm
from families import backbone
from helpers import tiny_tokenizer

pytest.importorskip("lm_eval", reason='needs lm_eval: pip install -e ".[harness]"')

ROWS = [
    {
        "q": "My name is Ada and I moved to Oslo. Where do I live now?",
        "choices": ["Oslo", "near the harbour"],
    },
    {"q": "The memory reads every token.", "choices": ["writes it afterwards", "yes", "no"]},
    {"q": "Dog?", "choices": ["the dog that the user found", "spring"]},
    {"q": "In the spring I moved to Oslo.", "choices": ["x", "y"]},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {output}
doc_to_text: "{{{{q}}}}"
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = "doc_to_choice: choices\ndoc_to_target: 0\n"
WRITE = """
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["<|im_end|>"], max_gen_toks: 8}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, a strong adapter, one without effect, and two tasks."""
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = tiny_tokenizer()
    base = backbone("qwen3", vocab_size=400, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id)
    base.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    for name, init in (("strong", "random"), ("zero", "zero")):
        torch.manual_seed(0)
        model = dm.DeltaMemModel(base, dm.DeltaMemConfig(init=init, alpha=64.0, gate_bias=1.0))
        model.save_pretrained(folder / name)
        model.detach()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tasks").mkdir()
    for name, output, metric, rest in (
        ("choose", "multiple_choice", "acc", CHOOSE),
        ("write", "generate_until", "exact_match", WRITE),
    ):
        text = TASK.format(name=name, rows=rows, output=output, metric=metric) + rest
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder


def evaluate(folder, model, batch_size=1, limit=None, **arguments):
    """{task: [what was answered to each row: likelihoods of the choices, or the text]}"""
    import lm_eval

    import delta_mem.evaluation.harness  # noqa: F401

    results = lm_eval.simple_evaluate(
        model,
        model_args={"pretrained": str(folder / "backbone"), **arguments},
        tasks=["choose", "write"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        limit=limit,
        apply_chat_template=True,
    )
    answers = {}
    for task, samples in results["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        answers[task] = [[reply for (reply,) in sample["resps"]] for sample in samples]
    answers["choose"] = [torch.tensor([float(score) for score, _ in row]) for row in answers["choose"]]
    return answers, results


def test_an_adapter_without_effect_answers_as_the_backbone_does(folder):
    plain, _ = evaluate(folder, "hf")
    zero, results = evaluate(folder, "delta_mem", adapter=str(folder / "zero"))
    assert zero["write"] == plain["write"]
    assert all(torch.equal(a, b) for a, b in zip(zero["choose"], plain["choose"], strict=True))
    assert results["config"]["adapter"] == str(folder / "zero")
    assert len(results["config"]["adapter_fingerprint"]) > 8


def test_every_request_has_a_memory_of_its_own(folder):
    adapter = str(folder / "strong")
    alone, _ = evaluate(folder, "delta_mem", adapter=adapter)
    together, _ = evaluate(folder, "delta_mem", adapter=adapter, batch_size=4)
    first, _ = evaluate(folder, "delta_mem", adapter=adapter, limit=1)
    plain, _ = evaluate(folder, "hf")
    assert together["write"] == alone["write"] and first["write"] == alone["write"][:1]
    for a, b in zip(together["choose"], alone["choose"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first["choose"][0], alone["choose"][0])
    assert alone["write"] != plain["write"]
    assert not torch.allclose(alone["choose"][0], plain["choose"][0], atol=1e-2)


@pytest.mark.slow
def test_from_the_command_line(folder, tmp_path):
    model = f"pretrained={folder / 'backbone'},adapter={folder / 'strong'}"
    command = [
        sys.executable,
        "-m",
        "delta_mem.evaluation.harness",
        "--model",
        "delta_mem",
        "--model_args",
        model,
    ]
    command += ["--tasks", "choose", "--include_path", str(folder / "tasks"), "--device", "cpu"]
    done = subprocess.run([*command, "--output_path", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["model"] == "delta_mem"

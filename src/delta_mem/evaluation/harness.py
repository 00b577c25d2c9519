"""General ability: any task of EleutherAI's lm-evaluation-harness with a memory attached.

The harness has no plug-ins: a model that it does not bring along is known to it once its module is imported.
This module is the harness's own command, `lm_eval`, with the model `delta_mem` known:

    python -m delta_mem.evaluation.harness --model delta_mem --tasks ifeval --apply_chat_template \\
        --model_args pretrained=Qwen/Qwen3-4B-Instruct-2507,adapter=path/or/hub-id

In Python, `import delta_mem.evaluation.harness` is enough for `lm_eval.simple_evaluate("delta_mem", …)`.

Every request has a memory of its own, empty at its start, which its tokens read and are written into.
"""

from __future__ import annotations

from typing import Any

from ..model import DeltaMemModel

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ImportError(f'the evaluation harness needs {error.name}: pip install -e ".[harness]"') from None


@register_model("delta_mem")
class DeltaMemLM(HFLM):
    """The harness's Hugging Face model with an adapter on it.

    Args:
        pretrained: the backbone: a folder, a hub id, or a loaded model.
        adapter: the adapter trained for it: a folder or a hub id, in our format or the authors'.
        settings: as for the harness's `hf` model.

    Raises:
        FileNotFoundError, AdapterFormatError: as `DeltaMemModel.from_pretrained`.
    """

    def __init__(self, pretrained: Any, adapter: str, **settings: Any):
        super().__init__(pretrained, **settings)
        self.adapter = adapter
        # A call without a memory gets a fresh one, a row for each request; padding comes after a text that is
        # only scored, and is masked where one is continued, so that it leaves no trace in an answer.
        self._model = DeltaMemModel.from_pretrained(self.model, adapter).eval()

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results; here with the adapter and its fingerprint."""
        return {
            **super().get_model_info(),
            "adapter": self.adapter,
            "adapter_fingerprint": self._model.fingerprint(),
        }


if __name__ == "__main__":
    cli_evaluate()

"""Asks transformers of every family's tiny models what the tests compare with.

`python tests/support/record_families.py`; it needs torch.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from families import CASES, CONTEXT, CONTINUATIONS, LONG, NEW, RECORDED, ROWS, Record, write
from paths import DATA
from safetensors import safe_open


def record(values: dict[str, Any], folder: Path) -> Record:
    """Outputs of transformers for a config; `folder` gets the checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
    fresh.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["transformers_version"]
    with safe_open(folder / "model.safetensors", "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    model = load(write(folder, config, shapes))
    greedy = list(LONG)
    for _ in range(NEW):
        greedy.append(int(_logits(model, greedy)[-1].argmax()))
    scores = []
    for continuation in CONTINUATIONS:
        all = torch.log_softmax(torch.tensor(_logits(model, CONTEXT + continuation)), -1)
        scores.append(float(sum(all[len(CONTEXT) - 1 + i, token] for i, token in enumerate(continuation))))
    return Record(config, shapes, recorded_logits(model), greedy[len(LONG) :], scores)


def load(folder: Path) -> Any:
    """transformers' model of a checkpoint, in float32; it must know every tensor and miss none."""
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    if any(hasattr(model.config, key) for key in ("num_experts", "num_local_experts")):
        model.set_experts_implementation("eager")  # grouped products want sizes of multiples of four
    return model.eval()


def recorded_logits(model: Any) -> list[np.ndarray]:
    """The logits that are kept of each row."""
    return [_logits(model, row.prompt + row.decoded)[at] for row, at in zip(ROWS, RECORDED, strict=True)]


def _logits(model: Any, tokens: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def main() -> None:
    texts: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, values in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            one = record(values, Path(folder))
        spread = float(np.concatenate(one.logits).std())
        assert 0.5 < spread < 10, f"{name}: logits are {spread:.2f} apart"
        texts[name] = {"config": one.config, "shapes": one.shapes, "greedy": one.greedy, "scores": one.scores}
        arrays |= {f"{name} {i}": x for i, x in enumerate(one.logits)}
        print(f"{name}: logits {spread:.2f} apart, {len(set(one.greedy))} different tokens of {NEW}")
    lines = [f'"{name}": {json.dumps(text)}' for name, text in texts.items()]
    (DATA / "families.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    np.savez_compressed(DATA / "families.npz", **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

"""Record what transformers says of SmolLM2-135M, for tests/decoder/test_model.py: `python tests/support/record_smollm2.py`.

Needs torch and accelerate (the `reference` extra). The model runs in float32 from the GGUF file that `resolve` fetches; each
prompt is continued greedily, end-of-sequence ids counting as any other. Written to data/smollm2_greedy.json, an object a line:

    prompt    the text, or the messages of a conversation
    ids       its tokens by transformers' own tokenizer of the file
    tokens    the continuation
    top       the likeliest tokens after the prompt, and their logits
    margin    the smallest distance between the two likeliest logits on the way; the rounding of float32 can only show below it
"""

from __future__ import annotations

import json
from typing import Any

from paths import DATA

from bench.peers import empty_cache
from checkpoints.hub import resolve

RECORD = DATA / "smollm2_greedy.json"
NEW_TOKENS, TOP = 48, 20

LONG_STORY = (
    "The lighthouse at Carrow Point had been dark for eleven years when Ines Marwood bought it at auction. The roof leaked, "
    "the stairs had lost every third step, and gulls nested in what used to be the keeper's kitchen. Her brother called it "
    "a ruin with a view. She called it a project, and moved in with two suitcases, a camp stove and a box of tools she did "
    "not yet know how to use. In the first winter she learned to mix lime mortar, to splice rope, and to sleep through "
    "gales that made the tower hum like a struck bell. In spring the village began to visit. Old Tomas, who had been the "
    "last keeper's apprentice, came up the path with a bundle of drawings under his arm: the lamp, the clockwork that "
    "turned it, the weights that drove the clockwork. 'It can run again,' he said, 'if you can find the lens.' The lens had "
    "been sold with the brass in a year when brass was worth more than ships. Ines wrote letters. She wrote to museums, to "
    "scrap dealers, to a man in Lisbon who collected glass, and to a school that had once been given a crate nobody had "
    "opened. The answer came in September, on the back of a postcard of a harbour she had never seen. It said only: 'We "
    "have something of yours. Come before the first snow, and bring a strong cart.' She read it twice, put it in her coat, "
    "and walked down to ask Tomas whether he still owned the"
)
LONG_NOTES = (
    "Meeting notes, water utility planning board. 1. The reservoir stands at 61 percent of capacity, down from 74 percent "
    "in the same week of last year. Inflow from the northern catchment is below the ten-year mean for the fifth month in a "
    "row. 2. Pump station B was offline for nineteen hours after a bearing failed; the spare was installed and the "
    "vibration sensor replaced. 3. The leak survey covered 212 kilometres of mains and found 38 leaks, of which 31 are "
    "repaired. Estimated saving: 4.2 megalitres a day. 4. The tariff proposal goes to consultation. The board asked for a "
    "version in which the first 60 litres per person and day are free, and for a table of what that costs in each district. "
    "5. The desalination study is late; the contractor blames the tide model. The board was not amused and set a final "
    "date. 6. Fluoride readings at two taps were above the alert level but below the limit; the dosing valve was "
    "recalibrated and readings are normal since Tuesday. 7. Any other business: the open day drew 1,400 visitors, most of "
    "whom wanted to see the big valve. Summary of the decisions in three bullet points:\n-"
)
PROMPTS: list[Any] = [
    "The",
    "1, 1, 2, 3, 5, 8,",
    "Once upon a time, in a village by the sea,",
    "The three primary colours are",
    "Photosynthesis is the process by which",
    "Q: What is the capital of France?\nA:",
    "def fibonacci(n):\n    ",
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    "SELECT name, COUNT(*) FROM orders\nJOIN customers ON",
    '{"name": "Ada", "born": 1815, "languages": ["',
    "Le chat est assis sur",
    "Die Hauptstadt von Deutschland ist",
    "日本の首都は",
    "Привет, меня зовут",
    "Ελλάδα είναι",
    [{"role": "user", "content": "What is gravity?"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    [
        {"role": "user", "content": "Give me a word that rhymes with 'light'."},
        {"role": "assistant", "content": "Night."},
        {"role": "user", "content": "Another one, please."},
    ],
    LONG_STORY,
    LONG_NOTES,
]


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve("smollm2-135m", print)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    lines = []
    for prompt in PROMPTS:
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        line = {"prompt": prompt, "ids": ids} | greedy(model, ids)
        lines.append(json.dumps(line, ensure_ascii=False))
        print(len(ids), f"{line['margin']:.4f}", repr(tokenizer.decode(line["tokens"])))
    RECORD.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def greedy(model: Any, ids: list[int]) -> dict[str, Any]:
    """The continuation of `ids` by the likeliest token, over and over."""
    import torch

    tokens: list[int] = []
    top: dict[int, float] = {}
    margin, cache, new = float("inf"), empty_cache(model), ids
    with torch.no_grad():
        while len(tokens) < NEW_TOKENS:
            best = model(torch.tensor([new]), **cache).logits[0, -1].topk(TOP)
            values = best.values.tolist()
            top = top or {token: round(value, 5) for token, value in zip(best.indices.tolist(), values, strict=True)}
            margin = min(margin, values[0] - values[1])
            new = [int(best.indices[0])]
            tokens += new
    return {"tokens": tokens, "top": top, "margin": round(margin, 5)}


if __name__ == "__main__":
    main()

"""One of several processes: makes an LLM and, as process 0, generates, scores and embeds; prints what came of it as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest.mock import patch

from jaxllm import LLM, SamplingParams, virtual_cpu_devices
from jaxllm.processes.distributed import Distributed
from jaxllm.processes.group import join

PROMPTS = [[5, 7, 11, 13] * 20, [3], [5, 7, 11, 13] * 17 + [2], [9, 8, 7]]
PAIRS: list[Any] = [([4, 5, 6], [[7, 8], [9]]), ([4, 5, 6, 1] * 30, [[2], [3, 4, 5]])]


def results(llm: LLM) -> dict[str, Any]:
    """Tokens and log-probabilities, greedy and drawn; scores; vectors."""
    params = [SamplingParams(max_tokens=20, logprobs=2, temperature=0.8 * (i % 2), seed=i, ignore_eos=True) for i in range(4)]
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    return {
        "tokens": [one.token_ids for one in outputs],
        "logprobs": [[step[i].logprob for step, i in zip(one.logprobs or [], one.token_ids, strict=True)] for one in outputs],
        "scores": [score.token_logprobs for of_one in llm.score(PAIRS) for score in of_one],
        "vectors": llm.embed(PROMPTS, pooling="mean").tolist(),
    }


def main() -> None:
    folder, layout, coordinator, count, index, devices = sys.argv[1:7]
    virtual_cpu_devices(int(devices))
    where = Distributed(coordinator, int(count), int(index), timeout=60)

    def say(where: Distributed) -> Any:
        group = join(where)
        print("joined", flush=True)
        return group

    with patch("jaxllm.llm.join", say):
        llm = LLM(folder, layout=layout, max_model_len=256, max_num_seqs=4, distributed=where, **json.loads(sys.argv[7]))
    found: dict[str, Any] = {}
    if llm.group is not None and llm.group.leads:
        found = results(llm)
        for target in sys.argv[8:9]:
            llm.save(target)
        if "stay" in sys.argv:
            print("ready", flush=True)
            while True:
                results(llm)
    else:
        llm.follow()
    print(json.dumps(found | {"bytes_read": llm.checkpoint.source.bytes_read}), flush=True)


if __name__ == "__main__":
    main()

"""vLLM's engine as a process that is spoken to in lines of JSON; run by the Python of an environment that has vLLM.

    python -I bench/vllm_peer.py '{"model": FOLDER, "dtype": "float32", ...}'

The argument holds vLLM's own `EngineArgs`. The first line of the answer is {"version": ...}, when the engine is up. Then each
line in is a workload, [[prompt, new tokens, arrival], ...] in the order of arrival, and the line out what became of it,
{"times": [[first, last], ...], "cached_tokens": n}: seconds after the start, looked at after each step. Ends with its input.
Imports nothing of this repository, and vLLM only once it runs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    import vllm

    engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**json.loads(sys.argv[1])))
    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    for run, line in enumerate(sys.stdin):
        print(json.dumps(serve(engine, vllm, json.loads(line), str(run))), file=answers, flush=True)


def serve(engine: Any, vllm: Any, requests: list[Any], run: str) -> dict[str, Any]:
    """All requests, greedily, to their full length."""
    times: list[list[float]] = [[] for _ in requests]
    submitted = cached_tokens = 0
    start = time.perf_counter()
    while submitted < len(requests) or engine.has_unfinished_requests():
        while submitted < len(requests) and requests[submitted][2] <= time.perf_counter() - start:
            prompt, new_tokens, _ = requests[submitted]
            params = vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
            engine.add_request(f"{run}-{submitted}", {"prompt_token_ids": prompt}, params)
            submitted += 1
        if not engine.has_unfinished_requests():
            time.sleep(max(requests[submitted][2] - (time.perf_counter() - start), 0))
            continue
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            index = int(output.request_id.rpartition("-")[2])
            if not times[index]:
                times[index].append(now)
                cached_tokens += output.num_cached_tokens or 0
            if output.finished:
                assert len(output.outputs[0].token_ids) == requests[index][1], "vLLM ended a request early"
                times[index].append(now)
    return {"times": times, "cached_tokens": cached_tokens}


if __name__ == "__main__":  # its own processes import this file
    main()

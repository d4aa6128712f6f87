"""Complete several prompts at once, each several times.

python examples/offline_generation.py [MODEL]
"""

import sys

from jaxllm import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Once upon a time", "def fibonacci(n):"]

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
params = SamplingParams(n=2, temperature=0.8, top_p=0.95, seed=1, max_tokens=24)
for result in llm.generate(PROMPTS, params):
    print(repr(result.prompt))
    for sample in result.outputs:
        print(f"  {sample.index}: {sample.text!r} ({len(sample.token_ids)} tokens, ended by {sample.finish_reason})")

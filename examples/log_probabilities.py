"""How likely each token of an answer was, and what else the model thought of.

python examples/log_probabilities.py [MODEL]
"""

import sys

from jaxllm import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
[result] = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8, logprobs=3))
[sample] = result.outputs
for token, choices in zip(sample.token_ids, sample.logprobs or [], strict=True):
    chosen = choices[token]
    others = ", ".join(f"{other.decoded_token!r} {other.logprob:.2f}" for key, other in choices.items() if key != token)
    print(f"{chosen.decoded_token!r} {chosen.logprob:.2f}, then {others}")
print(f"together {sample.cumulative_logprob:.2f}")

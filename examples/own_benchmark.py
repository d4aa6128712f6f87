"""Accuracy on multiple-choice questions of your own. `jaxllm score` does the same from a file, with lm-eval's delimiters.

python examples/own_benchmark.py [MODEL]
"""

import sys

from jaxllm import LLM

# Query, choices, and the index of the right one. A space begins each choice, as a word that follows the query does.
QUESTIONS = [
    ("The capital of France is", [" Paris", " Rome", " Berlin"], 0),
    ("Water freezes at a temperature of", [" 50 degrees Celsius", " 0 degrees Celsius"], 1),
    ("The opposite of hot is", [" warm", " cold"], 1),
]

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", workload="score")
right = 0
scored = llm.score([(query, choices) for query, choices, _ in QUESTIONS])
for (query, choices, gold), scores in zip(QUESTIONS, scored, strict=True):
    chosen = max(range(len(choices)), key=lambda i: scores[i].logprob)
    right += chosen == gold
    print(f"{'right' if chosen == gold else 'wrong'}: {query}{choices[chosen]} ({scores[chosen].logprob:.2f})")
print(f"accuracy {right / len(QUESTIONS):.2f}")

"""A conversation of two questions, the answers streamed.

python examples/chat.py [MODEL]
"""

import sys

from jaxllm import LLM, SamplingParams

QUESTIONS = ["Name a fruit.", "What colour is it?"]

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
params = SamplingParams(temperature=0, max_tokens=48)
messages = [{"role": "system", "content": "Be brief."}]
for question in QUESTIONS:
    messages.append({"role": "user", "content": question})
    print(f"> {question}")
    answer = ""
    for piece in llm.stream(llm.chat_prompt(messages), params):
        print(piece, end="", flush=True)
        answer += piece
    print()
    messages.append({"role": "assistant", "content": answer})

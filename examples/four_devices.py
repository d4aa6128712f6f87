"""Two layouts over four devices of a laptop: a CPU, split into virtual ones. The answers are the same.

python examples/four_devices.py [MODEL]
"""

import sys

from jaxllm import LLM, SamplingParams, virtual_cpu_devices

virtual_cpu_devices(4)  # before anything else uses jax; where there are GPUs, jax takes those all the same
model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
for layout in ("tensor", "gathered-2x2"):
    llm = LLM(model, layout=layout, devices=4)
    text = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=16))[0].outputs[0].text
    mesh = llm.plan.layout
    print(f"{layout}: {mesh.data} x {mesh.model} (data x model), {llm.plan.weight_bytes / 1e6:.1f} MB of weights a device")
    print(f"  {text!r}")

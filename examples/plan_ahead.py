"""What a model would cost on a machine that you do not have, from its config alone.

python examples/plan_ahead.py [MODEL] [DEVICES]
"""

import json
import subprocess
import sys

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
devices = sys.argv[2] if len(sys.argv) > 2 else "4xH100"

command = [sys.executable, "-m", "jaxllm", "plan", model, "--on", devices, "--json"]
plan = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
print(f"{plan['model']} on {plan['on']}")
for layout in plan["layouts"]:
    rate = layout["steps"][0]["tokens_per_second"]
    fits = f"{layout['sequences']} sequences" if layout["fits"] else "does not fit"
    print(f"  {layout['layout']:<15} {layout['weight_bytes'] / 2**30:7.2f} GiB of weights a device, {rate:7.0f} tokens/s, {fits}")

"""A checkpoint of any format to Orbax, compared with its source parameter by parameter.

python examples/convert_and_verify.py [MODEL] [FOLDER]

Orbax starts jax; with JAX_PLATFORMS=cpu it stays off accelerators, as the command `jaxllm convert` does by itself.
"""

import sys
from pathlib import Path

from checkpoints.checkpoint import open_checkpoint
from checkpoints.convert import convert, prepare
from checkpoints.hub import resolve
from checkpoints.verify import compare

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
target = Path(sys.argv[2] if len(sys.argv) > 2 else f"{Path(model).name}-orbax")

source = open_checkpoint(resolve(model))  # no weight is read yet
job = prepare(source, target, to="orbax")
print(f"{source.path} -> {job.target}: {source.config.num_params:,} parameters, {job.nbytes:,} bytes")
convert(job)  # whole or absent: a run that was stopped goes on where it was

compared = list(compare(source, open_checkpoint(target)))
print(f"{sum(one.equal for one in compared)} of {len(compared)} parameters are equal")
for one in compared:
    if not one.equal:
        print(f"  {one.parameter}: {one.verdict}")

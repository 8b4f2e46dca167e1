"""Two processes over gloo, started by `accelerate launch`; and a compiled step."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="needs peft")

from peft import get_peft_model

from tests.tuning.packing import TOKENS, adapters, packed, train

ROOT = Path(__file__).resolve().parents[2]

_SCRIPT = """
import os, sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tests.tuning.packing import TOKENS, adapters, packed

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
assert accelerator.num_processes == 2
torch.manual_seed(0)
model = get_peft_model(packed({method!r}), adapters()["lora"])
if {sharded}:
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    wrapped = fully_shard(model)
else:
    wrapped = DistributedDataParallel(model)
optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], 0.02)
mine = TOKENS[rank::2]  # every process has its own half of the batch
losses = []
for _ in range(5):
    loss = wrapped(input_ids=mine, labels=mine).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(accelerator.reduce(loss.detach(), "mean").item())
assert losses[-1] < losses[0] - 1e-3, losses
if rank == 0:
    print("losses", *losses, flush=True)
torch.distributed.barrier()  # neither leaves while the other needs it
os._exit(0)  # threads of gloo may outlive the interpreter, whose end then aborts the process
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_compute_what_one_does(sharded: bool, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        _SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), method="vptq", sharded=sharded)
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    # "multi_gpu" is its word for torchrun; the script asks for the CPU
    command += ["--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port()), str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = next(line for line in done.stdout.splitlines() if line.startswith("losses"))
    torch.manual_seed(0)
    wanted = train(get_peft_model(packed("vptq"), adapters()["lora"]), 5)[:5]
    assert [float(value) for value in found.split()[1:]] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("method", ["cvxq", "gptvq", "vptq"])
def test_compiled_step(method: str) -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(packed(method), adapters()["lora"])
        run = torch.compile(model, backend="aot_eager") if compiled else model
        loss = run(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    torch._dynamo.reset()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))

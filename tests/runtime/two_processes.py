"""What each of two processes does, for `test_distributed.py`: `torchrun --nproc-per-node 2 two_processes.py BASE OUT`.

The main process writes what was found to OUT/found.json.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import peftc
from runtime.tiny import batch, moved

STEPS = 3


def rows(which: slice) -> dict[str, torch.Tensor]:
    """Some rows of a padded batch, with the count of tokens in all of it."""
    given = batch(4, 9)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    count = (labels[:, 1:] != -100).sum()
    return {name: value[which] for name, value in {**given, "labels": labels}.items()} | {"num_items_in_batch": count}


def trained(model: Any, given: dict[str, torch.Tensor], scale: int) -> list[float]:
    """The losses of some steps; gradients of processes are averaged, so `scale` makes a sum of them."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(**given).loss
        (loss * scale).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    total = torch.stack(losses)
    if scale > 1:
        dist.all_reduce(total)
    return total.tolist()


def sharded(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def largest_difference(model: Any, other: Any) -> float:
    """Between the trained tensors of a model, sharded or not, and those of a whole one."""
    found = 0.0
    for (name, value), (also, wanted) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert name == also
        if wanted.requires_grad:
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found = max(found, (whole - wanted).abs().max().item())
    return found


def main() -> None:
    base, out = map(Path, sys.argv[1:])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = rows(slice(rank * 2, rank * 2 + 2))
    model = moved(peftc.apply("mam", base, set={"l": 3, "r": 4}, dtype=torch.float64))
    one, checkpointed = copy.deepcopy(model), copy.deepcopy(model)
    found: dict[str, Any] = {"one": trained(one, rows(slice(None)), 1)}

    several = DistributedDataParallel(copy.deepcopy(model))
    found["ddp"] = trained(several, mine, world)
    found["ddp difference"] = largest_difference(several.module, one)

    shards = sharded(copy.deepcopy(model))
    shards.save_pretrained(out / "fsdp-start", is_main_process=rank == 0)
    found["fsdp"] = trained(shards, mine, world)
    found["fsdp difference"] = largest_difference(shards, one)
    found["called"] = [step.unit for step in list(shards.surgery.executors.values())[-1].parts.steps]
    shards.save_pretrained(out / "fsdp", is_main_process=rank == 0)
    dcp.save({"model": get_model_state_dict(shards)}, checkpoint_id=out / "parts")

    sharded(checkpointed).activation_checkpointing_enable()
    found["checkpointed"] = trained(checkpointed, mine, world)
    found["checkpointed difference"] = largest_difference(checkpointed, one)

    again = sharded(copy.deepcopy(model))
    state = {"model": get_model_state_dict(again)}
    dcp.load(state, checkpoint_id=out / "parts")
    set_model_state_dict(again, state["model"])
    found["loaded difference"] = largest_difference(again, one)
    found["loaded loss is the saved model's"] = torch.equal(again.eval()(**mine).loss, shards.eval()(**mine).loss)

    if rank == 0:
        model.save_pretrained(out / "one-start")
        one.save_pretrained(out / "one")
        (out / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

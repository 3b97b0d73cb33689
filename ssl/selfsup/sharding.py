"""FSDP2: each process holds a part of every weight (torch's fully_shard), and checkpoints of such parts.

Accelerate's own FSDP plugin is not used: on CPUs it is ignored in silence (the model comes back under DDP), and
so could be tested on no machine without several GPUs. torch's fully_shard is what it calls; called here it is
one path for CPU and CUDA, before the optimizer is built. Checkpoints of parts go through
torch.distributed.checkpoint in its safetensors form: its default form holds pickles.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from selfsup import dist
from selfsup.layers.block import Block

Tensors = dict[str, Tensor]
_SINGLE = "torch.distributed is disabled"  # dcp's warning where it reads in one process, as is meant here


def shard(module: nn.Module, device: torch.device) -> None:
    """Splits every parameter of `module` over all processes along its first dimension, in place (FSDP2).

    Each transformer block of ours gathers its own weights while it computes; all other weights (embeddings, heads,
    backbones of timm) are gathered together for the whole forward and backward pass. Parameters become DTensors,
    on `device`; buffers go there, whole. Gradients are averaged over processes, as DDP does it. Weights stay in
    float32 and are cast by autocast as under DDP, so that both compute the same.
    """
    mesh = init_device_mesh(device.type, (dist.world_size(),))
    for block in [part for part in module.modules() if isinstance(part, Block)]:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` split its parameters."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All parts of a split tensor put together, on every process (a collective); a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a split tensor, sharing its memory; a plain one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place(tensor: Tensor, like: Tensor | None) -> Tensor:
    """A whole tensor, the same on every process, split as `like` is. No communication."""
    if not isinstance(like, DTensor) or like.shape != tensor.shape:
        return tensor
    moved = tensor.to(like.device_mesh.device_type)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def host_copy(tensors: Tensors) -> Tensors:
    """Copies in host memory, split as they were: what is written while training changes the originals."""
    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    stager = DefaultStager(options)
    copies = stager.stage(tensors)
    stager.close()
    return copies


def save_parts(tensors: Tensors, folder: Path, group: ProcessGroup) -> None:
    """Every process writes its parts into `folder`: one safetensors file each, of whole tensors a share.

    Called on all processes with the same names. Raises what torch.distributed.checkpoint raises, on all of them.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, process_group=group)


def own_files(folder: Path) -> list[Path]:
    """The files of `folder` that this process's `save_parts` wrote."""
    return sorted(folder.glob(f"shard-{dist.rank() + 1:05d}-*"))


def load_parts(folder: Path, prefix: str, like: Tensors) -> Tensors:
    """What `save_parts` wrote under names that begin with `prefix`, without it.

    like: tensors by parameter name (of a name `field:parameter` what follows the colon). A saved tensor of the
    same shape comes back split as that one is, read part by part; the others come whole. Any number of processes
    may have written it. Each process reads for itself.
    """
    reader = HuggingFaceStorageReader(str(folder))
    tensors: Tensors = {}
    for key, saved in reader.read_metadata().state_dict_metadata.items():
        if not key.startswith(prefix):
            continue
        model = like.get(key.removeprefix(prefix).rpartition(":")[2])
        if isinstance(model, DTensor) and model.shape == saved.size:
            tensors[key] = torch.empty_like(model, dtype=saved.properties.dtype)
        else:
            tensors[key] = torch.empty(saved.size, dtype=saved.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_SINGLE)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {key.removeprefix(prefix): value for key, value in tensors.items()}

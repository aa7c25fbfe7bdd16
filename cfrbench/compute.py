"""Where numbers are computed: threads, device, precision, seeds. The only file that touches torch's global state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cfrbench.batch_norm import is_exact_channels_last
from cfrbench.config import ComputeSection
from cfrbench.errors import ConfigError
from cfrbench.machine import computes_bf16, peak_mib

# Which GPU "cuda" and "auto" mean in this process; None leaves it to torch. No recipe knows of it.
_gpu: int | None = None

#: precisions of mixed training
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """A device and a precision; made once per process by `start`."""

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[object]:
        """The mixed-precision context of forward passes; nothing in single precision."""
        if self.precision not in HALF:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=HALF[self.precision])

    def place(self, network: nn.Module) -> nn.Module:
        """Move a network here, its 3D convolution weights channels last where that is faster and no less accurate."""
        network = network.to(self.device)
        if self.channels_last or (self.device.type == "cpu" and is_exact_channels_last(network)):
            for module in network.modules():
                if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                    module.to(memory_format=torch.channels_last_3d)
        return network

    def batch(self, volumes: Tensor) -> Tensor:
        """Move ``(B, channels, H, W, D)`` here in the matching memory order."""
        moved = volumes.to(self.device)
        return moved.contiguous(memory_format=torch.channels_last_3d) if self.channels_last else moved

    def peak_mib(self) -> float:
        """Most memory used since the last reset: of this process on a CPU, of its tensors on a GPU."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)
        return peak_mib()

    @property
    def channels_last(self) -> bool:
        # Plain fp32 asks each network: torch's own norms are less accurate channels last (docs/protocol.md).
        return self.precision != "fp32"


def start(section: ComputeSection) -> Compute:
    """Set threads, determinism and device for this process; ConfigError if the device is not there."""
    if torch.get_num_threads() != section.threads:
        torch.set_num_threads(section.threads)
    device = find_device(section.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # for what asks torch for the current one
    # On a GPU some 3D interpolation gradients have no deterministic kernel: warn there, promise on the CPU.
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    # The mode also writes NaN into every fresh tensor, to expose reads of unset memory; that costs a pass over each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return Compute(device, section.precision)


def settled(section: ComputeSection) -> ComputeSection:
    """``section`` with the precision ``auto`` decided for this machine, so that keys and tables state what was used.

    bf16 where the device has instructions for it. Without them a CPU emulates bf16, which took 2.6 times the time of
    single precision (V-Net of 8 filters on an AVX-512 Xeon), so it gets ``fp32-fast``.
    """
    if section.precision != "auto":
        return section
    device = find_device(section.device).type
    if device == "cpu":
        precision = "bf16" if computes_bf16() else "fp32-fast"
    else:
        precision = "bf16" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return section.model_copy(update={"precision": precision})


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Let a block compute in the precision of its inputs, whatever surrounds it."""
    if not torch.amp.is_autocast_available(device.type):  # the meta device has none
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def rounded_by_autocast(x: Tensor) -> Tensor:
    """What linear layers make of ``x`` first if autocast is on; ``x`` itself otherwise."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


@contextmanager
def single_thread() -> Iterator[None]:
    """Compute in one thread: in networks of a few channels, threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prefer_gpu(index: int) -> None:
    """Let ``cuda`` and ``auto`` mean this GPU in this process from now on; ``cuda:N`` goes on meaning GPU N."""
    global _gpu
    _gpu = index


def gpus() -> list[int]:
    """The GPUs over which stages may be spread: those of the same model as the first, for they compute alike."""
    models = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [index for index, model in enumerate(models) if model == models[0]]


def free_gpu_mib(index: int) -> float:
    """Memory of a GPU that no process holds."""
    free, _ = torch.cuda.mem_get_info(index)
    return free / 2**20


def find_device(name: str) -> torch.device:
    """``auto`` becomes CUDA, then MPS, then CPU; ConfigError for a device that is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and _gpu is not None:
        name = f"cuda:{_gpu}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"The device '{name}' cannot be used: {reason}. Choose --device cpu or auto.") from error
    return device


def seed_torch(seed: int, stream: str, step: int = 0) -> None:
    """Seed torch's generators for one purpose and step.

    Counter-based: the numbers of a step depend on (seed, stream, step) alone, so a resumed run needs no saved RNG.
    """
    text = f"{seed}/{stream}/{step}".encode()
    torch.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big"))

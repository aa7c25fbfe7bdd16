"""Where numbers are computed: threads, device, precision, seeds. The only file that touches torch's global state."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cfrbench.config import ComputeSection
from cfrbench.errors import ConfigError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """A device and a precision; made once per process by `start`."""

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[object]:
        """The mixed-precision context of forward passes; nothing for fp32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    def place(self, network: nn.Module) -> nn.Module:
        """Move a network here, its 3D convolution weights in the memory order this precision is fastest with."""
        network = network.to(self.device)
        if self.channels_last:
            for module in network.modules():
                if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                    module.to(memory_format=torch.channels_last_3d)
        return network

    def batch(self, volumes: Tensor) -> Tensor:
        """Move ``(B, channels, H, W, D)`` here in the matching memory order."""
        moved = volumes.to(self.device)
        return moved.contiguous(memory_format=torch.channels_last_3d) if self.channels_last else moved

    @property
    def channels_last(self) -> bool:
        # fp32 stays contiguous: torch's channels-last batch norm is 4-5 times less accurate there (docs/protocol.md).
        return self.precision != "fp32"


def start(section: ComputeSection) -> Compute:
    """Set threads, determinism and device for this process; ConfigError if the device is not there."""
    if torch.get_num_threads() != section.threads:
        torch.set_num_threads(section.threads)
    device = find_device(section.device)
    # On a GPU some 3D interpolation gradients have no deterministic kernel: warn there, promise on the CPU.
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    # The mode also writes NaN into every fresh tensor, to expose reads of unset memory; that costs a pass over each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Compute(device, section.precision)


def find_device(name: str) -> torch.device:
    """``auto`` becomes CUDA, then MPS, then CPU; ConfigError for a device that is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
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

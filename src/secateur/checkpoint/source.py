"""A Hugging Face model whose weights stay in their files until a block is at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.artifacts.hf_cut import build
from secateur.artifacts.hf_folder import (
    CONFIG,
    architecture,
    import_transformers,
    quiet,
    read_config,
    settings,
)
from secateur.artifacts.manifest import fingerprint
from secateur.artifacts.shards import Shards
from secateur.artifacts.tensors import first_line, listed
from secateur.core.errors import ArtifactError, StreamError
from secateur.reconstruct.passes import Enough, candidates

_INSTEAD = "load it with load_hf and prune it in memory with prune_"


class Source:
    """A model in a folder, built without values; blocks have them while they are resident.

    Blocks are the members of the model's lists of modules. All other weights are read at once and stay, but
    not those of an output head that stands alone: passes end before it.

    Args:
        folder: with configuration and safetensors.
        dtype: in which the model works.
        device: on which it does.

    Raises:
        ArtifactError: something is missing, corrupt or unknown.
        StreamError: the files hold the weights in another form than the model.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.folder, self.dtype, self.device = folder, dtype, torch.device(device)
        config = read_config(folder)
        cls = architecture(folder, config, None)
        self.shards = Shards.open(folder)
        with quiet():
            try:
                self.model: Any = build(cls, cls.config_class.from_dict(settings(config)), dtype).eval()
            except ArtifactError:
                raise
            except Exception as error:  # a configuration can be wrong in many ways
                raise ArtifactError(f"transformers cannot open {folder}: {first_line(error)}") from error
        self.keys = _keys(self.model, self.shards, folder)
        self._empty = {n: p for n, p in self.model.named_parameters()}
        self._places = _places(self.model)
        self._depth: dict[str, int] = {}
        self._blocks = [name for name, _ in candidates(self.model)]
        self.blocks_of = {n: self._block_of(n) for n in self._empty}
        self.head = _head(self.model)
        self._load([n for n, block in self.blocks_of.items() if block is None and n not in self.head])
        self._load_buffers()

    def stored(self) -> dict[str, torch.dtype]:
        """The types in which parameters lie in the files."""
        return {n: self.shards.entry(key).dtype for n, key in self.keys.items() if n in self._empty}

    @property
    def largest(self) -> int:
        """Bytes of the largest block, in the type in which the model works."""
        sizes: Counter[str] = Counter()
        for n, block in self.blocks_of.items():
            if block is not None:
                sizes[block] += self._empty[n].numel() * self.dtype.itemsize
        return max(sizes.values(), default=0)

    def stamps(self) -> dict[str, str]:
        """By name, what differs when a file was changed."""
        weights = (self.folder / name for name in self.shards.files)
        found = {path.name: f"{path.stat().st_size} {path.stat().st_mtime_ns}" for path in weights}
        return found | {CONFIG: fingerprint(self.folder / CONFIG).sha256}

    @contextmanager
    def resident(self, block: str) -> Iterator[None]:
        """While this holds, the weights of a block are in memory, and its own."""
        names = [n for n, b in self.blocks_of.items() if b == block]
        depth = self._depth.get(block, 0)
        self._depth[block] = depth + 1
        try:
            if depth == 0:
                self._load(names)
            yield
        finally:
            self._depth[block] = depth
            if depth == 0:
                for n in names:
                    self._set(n, self._empty[n])

    @contextmanager
    def ending_before_the_head(self) -> Iterator[None]:
        """While this holds, passes end where the output head would be called."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()

        def end(module: nn.Module, args: Any) -> None:
            raise Enough

        if not isinstance(head, nn.Module):
            yield
            return
        handle = head.register_forward_pre_hook(end)
        try:
            yield
        finally:
            handle.remove()

    def weight(self, name: str) -> Tensor:
        """One parameter, in float32, whether or not its block is resident."""
        return self.shards.read(self.keys[name]).to(torch.float32)

    def _load(self, names: list[str]) -> None:
        for n in names:
            value = self.shards.read(self.keys[n])
            if value.shape != self._empty[n].shape:
                raise ArtifactError(
                    f"The files in {self.folder} do not belong together: {n} is {tuple(value.shape)} in the "
                    f"weights and {tuple(self._empty[n].shape)} by config.json."
                )
            self._set(n, nn.Parameter(value.to(self.device, self.dtype), requires_grad=False))

    def _load_buffers(self) -> None:
        for n, b in self.model.named_buffers():
            if n in self.keys:
                b.copy_(self.shards.read(self.keys[n]))
        for module in self.model.modules():
            for key, b in module._buffers.items():
                if b is not None:
                    module._buffers[key] = b.to(self.device)

    def _set(self, name: str, value: Tensor) -> None:
        for module, key in self._places[id(self._empty[name])]:
            setattr(module, key, value)

    def _block_of(self, name: str) -> str | None:
        # A weight that lies outside too, tied to an embedding say, is always there.
        inside = {
            next((b for b in self._blocks if f"{path}.".startswith(f"{b}.")), None)
            for path in _paths(self.model, self._empty[name])
        }
        return inside.pop() if len(inside) == 1 else None


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                found.setdefault(id(p), []).append((module, key))
    return found


def _paths(model: nn.Module, parameter: Tensor) -> list[str]:
    cache: dict[int, list[str]] = model.__dict__.setdefault("_secateur_paths", {})
    if not cache:
        for path, module in model.named_modules():
            for p in module._parameters.values():
                if p is not None:
                    cache.setdefault(id(p), []).append(path)
    return cache[id(parameter)]


def _head(model: Any) -> set[str]:
    """Parameters of an output head, unless they are the embedding's."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        return set()
    own = {id(p) for p in head.parameters()}
    elsewhere = {
        id(p) for m in model.modules() if m is not head for p in m._parameters.values() if p is not None
    }
    return {n for n, p in model.named_parameters() if id(p) in own - elsewhere}


def _keys(model: Any, shards: Shards, folder: Path) -> dict[str, str]:
    """The name in the files of every parameter and of the buffers that are there, as transformers finds it.

    Raises `StreamError` where a parameter is put together from several, `ArtifactError` where it has none.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        version = import_transformers().__version__
        raise StreamError(
            f"transformers {version} does not say how it names weights, so {folder} cannot be read block by "
            f"block: {_INSTEAD}, or use transformers 5."
        ) from None
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    found: dict[str, str] = {}
    for key in shards.names:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        if pattern is not None and name in state:
            raise StreamError(
                f"{type(model).__name__} puts {name} together from several tensors of {folder} ({key} among "
                f"them), so it cannot be pruned block by block: {_INSTEAD}."
            )
        if name in state:
            found[name] = key
    by_tensor = {id(state[name]): key for name, key in found.items()}
    needed = {n: p for n, p in state.items() if isinstance(p, nn.Parameter)}
    lacking = [n for n, p in needed.items() if id(p) not in by_tensor]
    if lacking:
        raise ArtifactError(
            f"The weights in {folder} lack {listed(lacking)}, which {type(model).__name__} needs: copy the "
            f"folder again, or where the model makes them up, {_INSTEAD}."
        )
    return {n: by_tensor[id(t)] for n, t in state.items() if id(t) in by_tensor}

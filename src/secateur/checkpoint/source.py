"""A Hugging Face model whose weights stay in their files until a block is at work."""

from __future__ import annotations

import re
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
from secateur.checkpoint.pieces import Pieces, put_together
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
        self.pieces = _pieces(self.model, self.shards, folder)
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
        return {n: self.dtype_of(n) for n in self.pieces if n in self._empty}

    def dtype_of(self, name: str) -> torch.dtype:
        """The type in which a parameter or buffer lies in the files."""
        return self.shards.entry(self.pieces[name].first).dtype

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
        return self.pieces[name].read(self.shards).to(torch.float32)

    def _load(self, names: list[str]) -> None:
        for n in names:
            value = self.pieces[n].read(self.shards)
            if value.shape != self._empty[n].shape:
                raise ArtifactError(
                    f"The files in {self.folder} do not belong together: {n} is {tuple(value.shape)} in the "
                    f"weights and {tuple(self._empty[n].shape)} by config.json."
                )
            self._set(n, nn.Parameter(value.to(self.device, self.dtype), requires_grad=False))

    def _load_buffers(self) -> None:
        for n, b in self.model.named_buffers():
            if n in self.pieces:
                b.copy_(self.pieces[n].read(self.shards))
        for module in self.model.modules():
            for key, b in module._buffers.items():
                if b is not None and b.is_meta:
                    raise StreamError(
                        f"{type(self.model).__name__} makes up the buffer {key} of {type(module).__name__} "
                        f"when it is loaded, so it cannot be pruned block by block: {_INSTEAD}."
                    )
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


def _pieces(model: Any, shards: Shards, folder: Path) -> dict[str, Pieces]:
    """Where every parameter lies in the files, and the buffers that are there, as transformers finds them.

    Raises `StreamError` where a parameter is made of tensors in another way than by stacking and joining
    them, `ArtifactError` where there are none.
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
    found: dict[str, Pieces] = {}
    parts: dict[str, dict[str, list[str]]] = {}  # of a parameter, the tensors by pattern
    for key in shards.names:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        if name not in state:
            continue
        if pattern is None:
            found[name] = Pieces.whole(key, tuple(state[name].shape))
        else:
            parts.setdefault(name, {}).setdefault(pattern, []).append(key)
    for name, by_pattern in parts.items():
        converter = next(c for c in converters if by_pattern.keys() <= set(c.source_patterns))
        pieces = put_together(converter, by_pattern, tuple(state[name].shape), shards)
        if pieces is None:
            example = next(iter(by_pattern.values()))[0]
            raise StreamError(
                f"{type(model).__name__} makes {name} of other tensors of {folder} ({example} among them) in "
                f"a way that is not known here, so it cannot be pruned block by block: {_INSTEAD}."
            )
        found[name] = pieces
    by_tensor = {id(state[name]): pieces for name, pieces in found.items()}
    needed = {n: p for n, p in state.items() if isinstance(p, nn.Parameter)}
    lacking = [n for n, p in needed.items() if id(p) not in by_tensor]
    made_up = [n for n in lacking if _is_made_up(model, n)]
    if lacking and lacking == made_up:
        raise StreamError(
            f"{type(model).__name__} makes up {listed(made_up)} when it is loaded, so it cannot be pruned "
            f"block by block: {_INSTEAD}."
        )
    if lacking:
        raise ArtifactError(
            f"The weights in {folder} lack {listed(lacking)}, which {type(model).__name__} needs: copy the "
            "folder again."
        )
    return {n: by_tensor[id(t)] for n, t in state.items() if id(t) in by_tensor}


def _is_made_up(model: Any, name: str) -> bool:
    """Whether transformers expects no weight of that name in the files."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)

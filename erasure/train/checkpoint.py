"""The state of a training run on disk: there as a whole or not at all, and refused where it is not this run's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from erasure.io import remove_partial, sha256, write_atomically

if TYPE_CHECKING:
    from accelerate import PartialState

FORMAT = "erasure-training-2"
DAMAGE = (SafetensorError, KeyError, TypeError, ValueError, RecursionError, MemoryError, OSError)


class Checkpoint:
    """What a run needs to go on where it was stopped, in ``folder``:

        training.safetensors          trained tensors, state of the optimiser and of the loss scaler, averages, the step
        training-<name>.safetensors   what was made once before the first step, such as a bank of trajectories

    Each file is written under another name and renamed, so that the one before stays until the new one is complete,
    and holds the SHA-256 of its content. Made by :meth:`open`, which checks everything there is.

    Attributes:
        folder: where the files are; made when the first one is written.
        step: steps done by the state in ``training.safetensors``; 0 without one.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder, self.digest, self.step = folder, digest, 0

    @classmethod
    def open(cls, folder: str | os.PathLike[str], key: str) -> Checkpoint:
        """The checkpoint in a folder, read and checked. Call it before any work: nothing fails later that can fail now.

        Args:
            folder: need not exist.
            key: describes the run: settings, data and model. Two runs that may end in other weights have other keys.

        Raises:
            ValueError: a file there is truncated, altered, of another run or of another version.
        """
        found = cls(Path(folder), sha256(key))
        if found.folder.exists() and not found.folder.is_dir():
            raise ValueError(f"a checkpoint is a folder; {found.folder} is a file; give another path")
        for path in found.folder.glob("training-*.safetensors"):
            found._read(path)
        state = found.read()
        found.step = 0 if state is None else state["step"]
        return found

    def read(self) -> dict[str, Any] | None:
        """The state last written; None before the first."""
        path = self.folder / "training.safetensors"
        return self._read(path) if path.exists() else None

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the state by another: a tree of dicts, lists, tuples, tensors, numbers, strings and None.

        Args:
            state: with ``step``, an int.
        """
        self._write(self.folder / "training.safetensors", state)
        self.step = state["step"]

    def keep(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that are made once for a run and read again when it is resumed.

        Of several processes the first makes them and the others read them.
        """
        path = self.folder / f"training-{name}.safetensors"
        processes = launched()
        if processes is not None and not processes.is_main_process:
            processes.wait_for_everyone()
        if not path.exists():
            self._write(path, make())
        if processes is not None and processes.is_main_process:
            processes.wait_for_everyone()
        return self._read(path)

    def _write(self, path: Path, state: Mapping[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        text = json.dumps(_pack(state, "", tensors, set()))
        meta = {"format": FORMAT, "key": self.digest, "state": text, "sha256": _content(text, tensors)}
        remove_partial(path)
        try:
            write_atomically(path, save(tensors, metadata=meta))
        except FileNotFoundError:  # the temporary file is gone: it was somebody else's left-over
            raise RuntimeError(
                f"another process trains in {self.folder}; got {path.name} from both; give each a folder of its own"
            ) from None

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                ours = (meta.get("format"), meta.get("key")) == (FORMAT, self.digest)
                tensors = {name: file.get_tensor(name) for name in file.keys()} if ours else {}
            if ours and _content(meta["state"], tensors) != meta["sha256"]:
                raise ValueError("the content is not what was written")
            state = _unpack(json.loads(meta["state"]), tensors) if ours else {}
        except DAMAGE as error:
            raise ValueError(
                f"{path} is not a complete checkpoint; it is truncated or altered ({type(error).__name__}); delete it "
                "to start again"
            ) from None
        if not ours:
            raise ValueError(
                f"{self.folder} holds the checkpoint of another run (concept, settings, model or version differ); got "
                f"{path.name}; give an empty folder, or delete it"
            )
        return state


def launched() -> PartialState | None:
    """The processes that ``accelerate launch`` or ``torchrun`` started this one among; None where it is alone.

    Accelerate's state is a singleton, so a process that is alone is left without one.

    Raises:
        ValueError: there are others, but accelerate was set up in this process as if there were none.
    """
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    count = torch.distributed.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2:
        return None
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or not torch.accelerator.is_available())
    if state.num_processes != count:
        raise ValueError(
            f"{count} processes were started, and accelerate knows of {state.num_processes} on {state.device}; set "
            "ACCELERATE_USE_CPU=1 to train on CPUs, and make no Accelerator or PartialState of other settings before"
        )
    return state


def _pack(tree: Any, path: str, tensors: dict[str, Tensor], seen: set[int]) -> Any:
    """A tree as JSON, its tensors put aside by their place in it."""
    if isinstance(tree, Tensor):
        tensor = tree.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        tensors[path] = tensor.clone() if pointer in seen else tensor  # safetensors takes no shared memory
        seen.add(pointer)
        return {"tensor": path}
    if isinstance(tree, Mapping):
        items = [[key, _pack(value, f"{path}/{key}", tensors, seen)] for key, value in tree.items()]
        return {"items": items}
    if isinstance(tree, list | tuple):
        values = [_pack(value, f"{path}/{i}", tensors, seen) for i, value in enumerate(tree)]
        return {"tuple": values} if isinstance(tree, tuple) else values
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise ValueError(f"a training state holds tensors, numbers and strings; got {type(tree).__name__} at {path!r}")


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "tuple" in tree:
        return tuple(_unpack(value, tensors) for value in tree["tuple"])
    return {key: _unpack(value, tensors) for key, value in tree["items"]}


def _content(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state: its JSON, and every tensor with name, dtype and shape."""

    def pieces() -> Iterator[bytes | memoryview]:
        yield text.encode()
        for name, tensor in sorted(tensors.items()):
            yield f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
            yield tensor.reshape(-1).view(torch.uint8).numpy().data

    return sha256(pieces())

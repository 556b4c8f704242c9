"""The safetensors files of a folder as one table of tensors; nothing is trusted, little is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from torch import Tensor

from quantlab.errors import ModelError
from quantlab.models.json_files import read_json

INDEX = "*.safetensors.index.json"
BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies; `dtype` in the words of safetensors (F16, I32, …)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = BYTES.get(self.dtype, 4)
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Shards:
    """Every tensor of a folder by name, from the headers of its files."""

    folder: Path
    files: tuple[Path, ...]
    table: Mapping[str, Entry]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.table.values())

    def read(self, name: str) -> Tensor:
        """One tensor. Raises: KeyError where there is none, ModelError where it cannot be read."""
        from safetensors import SafetensorError, safe_open

        file = self.table[name].file
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
                return tensor
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(f"model: {file.name}: {name} cannot be read ({error})") from None


def open_shards(folder: Path) -> Shards:
    """The table of a folder. Raises: ModelError for files that are missing, corrupt or truncated,
    that lie elsewhere, or that hold the same tensor twice."""
    from safetensors import SafetensorError, safe_open

    files = weight_files(folder)
    table: dict[str, Entry] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    part = opened.get_slice(name)
                    if name in table:
                        raise ModelError(f"model: {folder.name} has {name[:80]} in two files")
                    table[name] = Entry(file, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"model: {file.name} is corrupt or truncated ({str(error)[:200]}); fetch it again"
            ) from None
    return Shards(folder, tuple(files), table)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the folder's index names, or all where it has none.

    Raises: ModelError for an index that names files elsewhere, or files that are not there.
    """
    indexes = sorted(folder.glob(INDEX))
    if not indexes:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"model: {folder} holds no .safetensors weights")
        return files
    named = read_json(indexes[0]).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ModelError(f"model: {folder.name}/{indexes[0].name} has no weight_map")
    found = []
    for name in sorted({str(value) for value in named.values()}):
        plain = PurePosixPath(name).name == name == PureWindowsPath(name).name
        if not plain or not name.endswith(".safetensors"):
            raise ModelError(
                f"model: {folder.name}/{indexes[0].name} names {name[:80]!r}, which is no "
                ".safetensors file of this folder"
            )
        if not (folder / name).is_file():
            raise ModelError(f"model: {folder.name} lacks the shard {name[:80]}; fetch it again")
        found.append(folder / name)
    return found

"""A program's file before torch reads it: which members it has, and what stands in them."""

import io
import json
import math
import re
import zipfile
from collections.abc import Collection, Mapping
from typing import Any, BinaryIO

import torch
from torch.export.pt2_archive import PT2ArchiveReader

from vera_fx.disk.safetensors_file import unique
from vera_fx.disk.sizes_and_names import check_path
from vera_fx.errors import first_line, shown
from vera_fx.export.checks.model_json import check_model

MANIFEST_FILE = "vera_fx.json"

_CONFIGS = {
    "data/weights/": ("data/weights/model_weights_config.json", re.compile(r"weight_\d{1,9}")),
    "data/constants/": (
        "data/constants/model_constants_config.json",
        re.compile(r"tensor_\d{1,9}"),
    ),
}
_MODEL, _INPUTS, _EXTRA = "models/model.json", "data/sample_inputs/model.pt", "extra/"
_MEMBER = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version|\.storage_alignment|"
    r"data/weights/(weight_\d{1,9}|model_weights_config\.json)|"
    r"data/constants/(tensor_\d{1,9}|model_constants_config\.json)|"
    r"data/sample_inputs/model\.pt|models/model\.json|extra/[\w.\-]{1,100}"
)
_MAX_MEMBERS = 100_000
_MAX_TEXT = 512 << 20
_MAX_NUMBERS = 2**40


def check_archive(file: BinaryIO, namespaces: Collection[str]) -> bytes | None:
    """Refuse a program whose file holds code, or what torch could make code of.

    Args:
        file: the open file; it is at its beginning again afterwards.
        namespaces: of operators that the program may call beside torch's own.

    Returns:
        The text of the manifest, if there is one.

    Raises:
        ValueError: with the member and what it holds. Other exceptions mean damage.
    """
    sizes = _members(file)
    file.seek(0)
    # Torch reads the members by the same code later, so that they are those which are checked here.
    reader = PT2ArchiveReader(file)
    if set(reader.get_file_names()) != sizes.keys():
        raise ValueError("its lists of members do not agree")
    for folder, (config, names) in _CONFIGS.items():
        _check_payloads(_text(reader, config, sizes), folder, names, sizes)
    check_model(_text(reader, _MODEL, sizes), namespaces)
    _check_inputs(_text(reader, _INPUTS, sizes))
    manifest = f"{_EXTRA}{MANIFEST_FILE}"
    text = _text(reader, manifest, sizes) if manifest in sizes else None
    file.seek(0)
    return text


def _members(file: BinaryIO) -> dict[str, int]:
    """The members' sizes, without the folder that all are in."""
    end, sizes = file.seek(0, io.SEEK_END), dict[str, int]()
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if not 0 < len(entries) <= _MAX_MEMBERS:
        raise ValueError(f"it has {len(entries):,} members")
    root = f"{entries[0].filename.partition('/')[0]}/"
    for entry in entries:
        name = entry.filename.removeprefix(root)
        if not entry.filename.startswith(root) or not _MEMBER.fullmatch(name):
            raise ValueError(f"the member {shown(entry.filename)} is not one of a program")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError(f"the member {shown(name)} is compressed or encrypted")
        if name in sizes:
            raise ValueError(f"the member {shown(name)} is there twice")
        sizes[name] = entry.file_size
    if sum(sizes.values()) > end:
        raise ValueError(f"its members have more bytes than its {end:,}")
    return sizes


def _text(reader: PT2ArchiveReader, name: str, sizes: Mapping[str, int]) -> bytes:
    if name not in sizes:
        raise ValueError(f"it has no member {name!r}")
    if sizes[name] != reader.archive_file.get_record_size(name) or sizes[name] > _MAX_TEXT:
        raise ValueError(f"the member {name!r} has {sizes[name]:,} bytes or more")
    return reader.read_bytes(name)


def _check_payloads(
    text: bytes, folder: str, names: re.Pattern[str], sizes: Mapping[str, int]
) -> None:
    values = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(values, dict) or values.keys() != {"config"}:
        raise ValueError(f"the list of {folder} is no list of tensors")
    for key, entry in values["config"].items():
        check_path(key)
        if entry.keys() != {"path_name", "is_param", "use_pickle", "tensor_meta"}:
            raise ValueError(f"{shown(key)} is described in another way than torch does")
        name = entry["path_name"]
        if entry["use_pickle"] is not False or not names.fullmatch(name):
            raise ValueError(
                f"{shown(key)} is a pickle or an object ({shown(name)}), which would run code of the file"
            )
        _check_tensor(key, entry["tensor_meta"], sizes[f"{folder}{name}"])


def _check_tensor(key: str, meta: Any, size: int) -> None:
    shape = [entry["as_int"] for entry in meta["sizes"]]
    numbers = [*shape, *(entry["as_int"] for entry in meta["strides"])]
    if not all(type(n) is int and 0 <= n < _MAX_NUMBERS for n in numbers):
        raise ValueError(f"{shown(key)} has sizes or strides that are none")
    # A tensor without bytes is made of zeros, of whatever size the file asks for.
    if math.prod(shape) > (_MAX_NUMBERS if size else 0):
        raise ValueError(f"{shown(key)} of sizes {shown(shape)} has {size:,} bytes")


def _check_inputs(data: bytes) -> None:
    """The example inputs: torch falls back to a pickle that may hold anything."""
    if not data:
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > len(data):
        raise ValueError("its example inputs are compressed")
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        raise ValueError(
            "its example inputs hold more than tensors and plain containers, which only a pickle brings "
            f"back: {first_line(error)}"
        ) from error

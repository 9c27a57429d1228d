"""Recognises files that are not archives of torch.save by their content, and explains what to do with each."""

from __future__ import annotations

import zipfile
from pathlib import Path

_HEAD = 512  # bytes that identify the format
_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a file of torch.save before PyTorch 1.6
_LONGEST = 100_000_000  # bytes of a safetensors header, as its own library allows
_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".tar"}  # of files that may hold weights
_PIECE = 2**20  # bytes that are read at a time
_NAMED = 3  # files that an error message names
_SAFE_PROTOCOLS = (2, 3)  # of pickle, that PyTorch reads with weights_only

_DISTRIBUTED = (
    "it is a distributed checkpoint, in pieces; of torch.distributed.checkpoint.format_utils, "
    "dcp_to_torch_save(FOLDER, FILE) makes one file of it"
)
_COMPRESSED = "it is packed ({}); unpack it and pass the file inside"
_STARTS = {
    b"\x1f\x8b": _COMPRESSED.format("gzip"),
    b"BZh": _COMPRESSED.format("bzip2"),
    b"\xfd7zXZ\x00": _COMPRESSED.format("xz"),
    b"7z\xbc\xaf'\x1c": _COMPRESSED.format("7z"),
    b"(\xb5/\xfd": _COMPRESSED.format("zstd"),
    b"Rar!": _COMPRESSED.format("rar"),
    b"version https://git-lfs": "it is a pointer of Git LFS instead of the file; git lfs pull fetches the file",
    b"\x93NUMPY": "it is a NumPy array; expected a state dict of PyTorch tensors",
    b"\x89HDF": "it is an HDF5 file, as Keras writes them; expected a state dict of PyTorch tensors",
    b"GGUF": "it is a GGUF file of quantised weights; expected a state dict of PyTorch tensors",
}


def is_safetensors(path: Path) -> bool:
    """Whether a file starts like safetensors: with the length of a JSON header, then the header."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _LONGEST


def foreign_format(path: Path) -> str | None:
    """Why a file cannot be an archive of torch.save, and what to do; None if it may be one.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "it is empty"
    if path.suffix == ".distcp" or path.name == ".metadata":
        return _DISTRIBUTED
    for start, reason in _STARTS.items():
        if head.startswith(start):
            return reason
    if head.startswith(b"PK"):
        return _foreign_zip(path)
    if head[257:262] == b"ustar":
        return _COMPRESSED.format("tar")
    if head.startswith(b"\x80") and not head.startswith(_MAGIC):
        return (
            "it is a pickle, which could run code and is left alone; where you trust the file, "
            "load it with the program that wrote it and write its tensors with torch.save"
        )
    return _foreign_text(head)


def damaged_entry(path: Path) -> str | None:
    """The first entry of an archive of torch.save that does not match its CRC; None if all match or have none.

    PyTorch does not check the CRCs itself: a flipped bit would silently become a wrong weight.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not entry.CRC:  # written without CRCs
                continue
            try:
                with archive.open(entry) as part:
                    while part.read(_PIECE):
                        pass
            except zipfile.BadZipFile:
                return entry.filename
    return None


def _foreign_text(head: bytes) -> str | None:
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page instead of the file; download the file again, logged in if that is required"
    if b'"weight_map"' in text or (text.startswith(b"{") and b'"metadata"' in text and b'"total_size"' in text):
        return "it is the index of weights in several files; save them as one, for example with save_pretrained(…, max_shard_size='100GB')"
    return None


def _foreign_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickled = next((name for name in names if name.endswith("/data.pkl")), None)
            protocol = 2 if pickled is None else _protocol(archive, pickled)
    except Exception:  # zipfile raises a dozen kinds
        return "it is cut short or damaged; copy or download it again"
    if any(name.endswith("/constants.pkl") for name in names):
        return "it is a TorchScript archive, which is a program; load it with torch.jit.load and save its state_dict()"
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        return "it is an exported program (.pt2); load it with torch.export.load and save its state_dict"
    if names and all(name.endswith(".npy") for name in names):
        return "it holds NumPy arrays (.npz); expected a state dict of PyTorch tensors"
    if pickled is None:
        return "it is a zip archive without weights of torch.save; unpack it and pass the file inside"
    if protocol not in _SAFE_PROTOCOLS:
        return (
            f"it was saved with pickle_protocol={protocol}, which PyTorch cannot read without running it; save it with torch.save's own, 2"
        )
    return None


def _protocol(archive: zipfile.ZipFile, name: str) -> int:
    try:
        with archive.open(name) as pickled:
            head = pickled.read(2)
    except zipfile.BadZipFile:  # written without CRCs, or damaged, which is checked later
        return _SAFE_PROTOCOLS[0]
    return head[1] if head[:1] == b"\x80" else 0


def folder_reason(path: Path) -> str:
    """Why a folder is not a checkpoint, and what to do."""
    if (path / ".metadata").is_file() or any(path.glob("*.distcp")):
        return _DISTRIBUTED
    files = sorted(file.name for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if not files:
        return "it is a folder without a file of weights"
    shown = ", ".join(files[:_NAMED]) + (", …" if len(files) > _NAMED else "")
    return f"it is a folder; pass a file in it ({shown})"

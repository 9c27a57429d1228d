"""Image files of every kind: equal to torchvision's loader where that is right, decoded properly where it is not, or named."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from dwa_fast import InputError
from dwa_fast.io.decode import BadImageError, check_image, decode

NOISE = np.random.default_rng(0).integers(0, 256, (12, 12, 4), dtype=np.uint8)
ORIENTATION = 274  # the EXIF tag


def noise(mode: str, size: tuple[int, int] = (12, 12)) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    levels = np.resize(NOISE, (size[1], size[0], 4))[..., :bands]
    return Image.fromarray(levels[..., 0] if bands == 1 else np.ascontiguousarray(levels), mode)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return exif


ORDINARY: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "rgb": ("x.png", lambda path: noise("RGB").save(path)),
    "grey": ("x.png", lambda path: noise("L").save(path)),
    "palette": ("x.png", lambda path: noise("RGB").quantize(16).save(path)),
    "two levels": ("x.png", lambda path: noise("L").convert("1").save(path)),
    "opaque alpha": ("x.png", lambda path: noise("RGB").convert("RGBA").save(path)),
    "16-bit colour": ("x.png", lambda path: path.write_bytes(png(12, 12, NOISE.tobytes() * 2, depth=16, colour=2))),
    "jpeg": ("x.JPEG", lambda path: noise("RGB").save(path, format="JPEG")),
    "grey jpeg": ("x.jpg", lambda path: noise("L").save(path)),
    "progressive jpeg": ("x.jpg", lambda path: noise("RGB").save(path, progressive=True)),
    "CMYK jpeg": ("x.jpg", lambda path: noise("CMYK").save(path)),
    "rotated by EXIF": ("x.jpg", lambda path: noise("RGB", (20, 12)).save(path, exif=rotated())),
    "wide": ("x.png", lambda path: noise("RGB", (31, 12)).save(path)),
    "tall": ("x.jpg", lambda path: noise("RGB", (13, 40)).save(path)),
    "large": ("x.png", lambda path: noise("RGB", (64, 50)).save(path)),
    "one pixel": ("x.png", lambda path: noise("RGB", (1, 1)).save(path)),
    "bmp": ("x.bmp", lambda path: noise("RGB").save(path)),
    "tiff": ("x.tiff", lambda path: noise("RGB").save(path)),
    "CMYK tiff": ("x.tif", lambda path: noise("CMYK").save(path)),
    "ppm": ("x.ppm", lambda path: noise("RGB").save(path)),
    "webp": ("x.webp", lambda path: noise("RGB").save(path)),
    "several pictures": (
        "x.jpg",
        lambda path: noise("RGB").save(path, "MPO", save_all=True, append_images=[noise("RGB")]),
    ),
    "under another name": ("x.JPEG", lambda path: noise("RGB").save(path, format="PNG")),
}


@pytest.mark.parametrize(("name", "write"), ORDINARY.values(), ids=ORDINARY.keys())
def test_ordinary_files_are_as_torchvision_reads_them(tmp_path: Path, name: str, write: Callable[[Path], Any]) -> None:
    write(tmp_path / name)
    steps = v2.Compose([v2.Resize(12, antialias=True), v2.CenterCrop(12), v2.PILToTensor()])
    wanted = steps(default_loader(str(tmp_path / name)))
    pixels = decode(tmp_path / name, 12, 3)
    assert torch.equal(pixels, wanted)
    grey = v2.PILToTensor()(Image.fromarray(wanted.permute(1, 2, 0).numpy()).convert("L"))
    assert (decode(tmp_path / name, 12, 1).int() - grey.int()).abs().max() < 2


def square(mode: str, colour: Any) -> Image.Image:
    return Image.new(mode, (8, 8), colour)


def paletted() -> Image.Image:
    image = square("P", 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


def png(width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG of the given header whatever the pixels; each row is cut from `rows`."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    length = width * depth // 8 * {0: 1, 2: 3}[colour]
    lines = b"".join(b"\0" + rows[i * length : (i + 1) * length] for i in range(len(rows) // max(1, length)))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def tiff(bits: int, rows: bytes) -> bytes:
    """A grey TIFF of 8 × 8 pixels of so many bits, without compression; Pillow itself writes none of 12 bits."""
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(rows)}
    directory = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + struct.pack("<H", len(tags)) + directory + bytes(4)


LEVELS = np.full((8, 8), 0x8040, np.uint16)  # 128 of 255
ANIMATION: dict[str, Any] = {"save_all": True, "append_images": [square("RGB", (0, 0, 255))]}
DECODED: dict[str, tuple[str, Callable[[Path], Any], tuple[int, int, int]]] = {
    "transparent": ("x.png", lambda path: square("RGBA", (200, 100, 50, 0)).save(path), (255, 255, 255)),
    "half transparent": ("x.png", lambda path: square("RGBA", (200, 100, 50, 128)).save(path), (227, 177, 152)),
    "grey and alpha": ("x.png", lambda path: square("LA", (200, 128)).save(path), (227, 227, 227)),
    "transparent webp": ("x.webp", lambda path: square("RGBA", (200, 100, 50, 0)).save(path, lossless=True), (255, 255, 255)),
    "transparent tiff": ("x.tif", lambda path: square("RGBA", (200, 100, 50, 0)).save(path), (255, 255, 255)),
    "palette": ("x.png", lambda path: paletted().save(path), (200, 100, 50)),
    "palette, one colour transparent": ("x.png", lambda path: paletted().save(path, transparency=1), (255, 255, 255)),
    "palette, another one transparent": ("x.png", lambda path: paletted().save(path, transparency=0), (200, 100, 50)),
    "palette with alphas": ("x.png", lambda path: paletted().save(path, transparency=bytes([255, 128])), (227, 177, 152)),
    "key colour": ("x.png", lambda path: square("RGB", (200, 100, 50)).save(path, transparency=(200, 100, 50)), (255, 255, 255)),
    "key level": ("x.png", lambda path: square("L", 200).save(path, transparency=200), (255, 255, 255)),
    "CMYK, inverted by Adobe": ("x.jpg", lambda path: square("CMYK", (0, 255, 51, 20)).save(path, quality=100), (235, 0, 188)),
    "16-bit png": ("x.png", lambda path: Image.fromarray(LEVELS).save(path), (128, 128, 128)),
    "16-bit tiff": ("x.tif", lambda path: Image.fromarray(LEVELS).save(path), (128, 128, 128)),
    "16-bit tiff, high byte first": ("x.tif", lambda path: Image.fromarray(LEVELS.astype(">u2")).save(path), (128, 128, 128)),
    "12-bit tiff": ("x.tif", lambda path: path.write_bytes(tiff(12, bytes([0x80, 0x48, 0x04] * 32))), (128, 128, 128)),
    "16-bit pgm": ("x.pgm", lambda path: path.write_bytes(b"P5 8 8 65535\n" + LEVELS.astype(">u2").tobytes()), (128, 128, 128)),
    "12-bit pgm": ("x.pgm", lambda path: path.write_bytes(b"P5 8 8 4095\n" + (LEVELS >> 4).astype(">u2").tobytes()), (128, 128, 128)),
    "16-bit white": ("x.png", lambda path: Image.fromarray(LEVELS * 0 + 65535).save(path), (255, 255, 255)),
    "animated gif": ("x.png", lambda path: square("RGB", (255, 0, 0)).save(path, format="GIF", **ANIMATION), (255, 0, 0)),
    "animated webp": ("x.webp", lambda path: square("RGB", (255, 0, 0)).save(path, lossless=True, **ANIMATION), (255, 0, 0)),
    "animated png": ("x.png", lambda path: square("RGB", (255, 0, 0)).save(path, **ANIMATION), (255, 0, 0)),
    "very wide": ("x.png", lambda path: Image.new("RGB", (800, 8), (9, 8, 7)).save(path), (9, 8, 7)),
}


@pytest.mark.parametrize(("name", "write", "colour"), DECODED.values(), ids=DECODED.keys())
def test_unusual_files(tmp_path: Path, name: str, write: Callable[[Path], Any], colour: tuple[int, int, int]) -> None:
    write(tmp_path / name)
    pixels = decode(tmp_path / name, 8, 3)
    assert pixels.shape == (3, 8, 8)
    assert torch.equal(pixels, torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8))


def test_transparency_of_single_pixels(tmp_path: Path) -> None:
    levels = NOISE.copy()
    levels[..., 3] = (levels[..., 3] > 127) * 255
    Image.fromarray(levels, "RGBA").save(tmp_path / "x.png")
    wanted = torch.from_numpy(np.where(levels[..., 3:] == 255, levels[..., :3], 255))
    assert torch.equal(decode(tmp_path / "x.png", 12, 3), wanted.permute(2, 0, 1))


def cut(share: float, **options: Any) -> Callable[[Path], Any]:
    """Writes a picture of noise in the file's format and leaves the first share of its bytes."""

    def write(path: Path) -> None:
        noise("RGB", (64, 64)).save(path, **options)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return write


def damaged_tiff(path: Path) -> None:
    """Whole header and directory, and ones where the compressed pixels were."""
    noise("RGB", (64, 64)).save(path, compression="tiff_lzw")
    content = bytearray(path.read_bytes())
    content[100:2000] = b"\xff" * 1900
    path.write_bytes(content)


BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "empty": ("x.png", lambda path: path.write_bytes(b""), "it is empty"),
    "text": ("x.png", lambda path: path.write_bytes(b"no image"), "it is in none of the formats BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"),
    "only a head": ("x.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\nhello"), "it is in none of the formats"),
    "truncated png": ("x.png", cut(0.5), "truncated"),
    "truncated jpeg": ("x.jpg", cut(0.5), "truncated"),
    "truncated webp": ("x.webp", cut(0.5), "could not create decoder object"),
    "truncated bmp": ("x.bmp", cut(0.5), "truncated"),
    "damaged tiff": ("x.tif", damaged_tiff, "decoder error -2"),
    "bomb": ("x.png", lambda path: path.write_bytes(png(60_000, 60_000, b"")), "3600000000 pixels) exceeds limit of 178956970"),
    "huge header": ("x.png", lambda path: path.write_bytes(png(2**31 - 1, 2**31 - 1, b"")), "exceeds limit of 178956970 pixels"),
    "no pixels": ("x.png", lambda path: path.write_bytes(png(0, 0, b"")), "it is in none of the formats"),
    "needle": ("x.png", lambda path: Image.new("L", (1000, 9)).save(path), "it has 1000 × 9 pixels, too narrow for a square"),
    "32-bit": ("x.tif", lambda path: Image.new("I", (8, 8)).save(path), "its pixels have 32 bits (mode I), and their range is not known"),
    "float": ("x.tif", lambda path: Image.new("F", (8, 8)).save(path), "its pixels have 32 bits (mode F), and their range is not known"),
    "icon": ("x.png", lambda path: Image.new("RGB", (16, 16)).save(path, format="ICO"), "it is in none of the formats"),
}


@pytest.mark.parametrize(("name", "write", "message"), BAD.values(), ids=BAD.keys())
def test_files_that_are_no_whole_images(tmp_path: Path, name: str, write: Callable[[Path], Any], message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(BadImageError, match=re.escape(message)) as bad:
        decode(tmp_path / name, 8, 3)
    assert str(bad.value).startswith(f"{tmp_path / name} is no image that can be read: ")
    assert "\n" not in str(bad.value)
    assert bad.value.cause


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp", "ppm"])
def test_damage_anywhere_is_one_sentence(tmp_path: Path, suffix: str, channels: int) -> None:
    """Bytes changed at random, seeded: an image of the right shape, or the one kind of error, and never another."""
    path = tmp_path / f"x.{suffix}"
    noise("RGB", (24, 24)).save(path)
    whole, source = path.read_bytes(), np.random.default_rng(1)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for position in source.integers(0, len(whole), 8):
            damaged[position] = source.integers(0, 256)
        path.write_bytes(damaged)
        try:
            assert decode(path, 8, channels).shape == (channels, 8, 8)
        except BadImageError:
            refused += 1
    assert refused > 0 or suffix in ("bmp", "ppm")


def test_a_file_that_cannot_be_read_is_not_called_bad(tmp_path: Path) -> None:
    for path, cause in ((tmp_path / "x.png", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=f"cannot be read: {cause}") as error:
            decode(path, 8, 3)
        assert not isinstance(error.value, BadImageError)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (EOFError(), "is no image that can be read: it is damaged"),
        (ValueError("two\nlines"), "is no image that can be read: two"),
        (OSError(5, "Input/output error"), "cannot be read: Input/output error"),
        (MemoryError(), "does not fit into memory"),
    ],
)
def test_failures_of_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, message: str) -> None:
    noise("RGB").save(tmp_path / "x.png")

    def fail(image: Image.Image) -> Image.Image:
        raise failure

    monkeypatch.setattr("dwa_fast.io.decode._eight_bits", fail)
    with pytest.raises(InputError, match=f"{re.escape(message)}$") as error:
        decode(tmp_path / "x.png", 8, 3)
    assert isinstance(error.value, BadImageError) == ("is no image" in message)


@pytest.mark.parametrize("form", ["baseline", "progressive", "grey", "CMYK", "PNG"])
def test_the_quick_check_finds_what_decoding_finds(tmp_path: Path, form: str) -> None:
    """A JPEG is decoded at an eighth of its size for it, and must still be read to its end."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    picture, path = Image.fromarray(pixels), tmp_path / "x"
    picture = picture.convert({"grey": "L", "CMYK": "CMYK"}.get(form, "RGB"))
    picture.save(path, format="PNG" if form == "PNG" else "JPEG", **({"progressive": True} if form == "progressive" else {}))
    check_image(path, 3)
    whole = path.read_bytes()
    for share in (0.0, 0.02, 0.3, 0.6, 0.9, 0.97):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(BadImageError) as slow:
            decode(path, 16, 3)
        with pytest.raises(BadImageError) as quick:
            check_image(path, 3)
        assert str(quick.value) == str(slow.value)
    Image.new("RGB", (500, 2)).save(tmp_path / "narrow.png")
    with pytest.raises(BadImageError, match="500 × 2 pixels, too narrow"):
        check_image(tmp_path / "narrow.png", 3)

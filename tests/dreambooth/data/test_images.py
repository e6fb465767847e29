"""What people put into image folders: every kind is read right or refused by name."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nara_diffusion.dreambooth.data.images import MAX_PIXELS, ImageError, decode_image, image_files, load_image
from tests.dreambooth.data.pictures import gradient, noise


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_plain_rgb_comes_back_bit_for_bit(tmp_path) -> None:
    picture = noise(31, 17)
    picture.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert loaded.mode == "RGB"
    assert loaded.size == (31, 17)
    assert np.array_equal(pixels(loaded), pixels(picture))


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_exif_rotation_is_applied(tmp_path, orientation: int, turn: Image.Transpose) -> None:
    """The file holds the upright picture turned by `turn`; EXIF says how to turn it back."""
    upright = noise(30, 20)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(turn).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(load_image(tmp_path / "a.png")), pixels(upright))


def test_broken_exif_does_not_spoil_a_whole_picture(tmp_path) -> None:
    picture = gradient(24, 16)
    picture.save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffjunk", quality=95)
    loaded = load_image(tmp_path / "a.jpg")
    assert np.abs(pixels(loaded) - pixels(picture)).max() < 20


def test_cmyk_keeps_its_colours(tmp_path) -> None:
    picture = gradient(64, 48)
    picture.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.mode == "CMYK"
    loaded = load_image(tmp_path / "a.jpg")
    assert loaded.mode == "RGB"
    assert np.abs(pixels(loaded) - pixels(picture)).mean() < 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_not_cut(tmp_path, suffix: str) -> None:
    values = np.linspace(0, 65535, 40 * 30).round().astype(np.uint16).reshape(30, 40)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    loaded = pixels(load_image(tmp_path / f"a.{suffix}"))
    expected = np.round(values.astype(float) / 65535 * 255)
    assert np.abs(loaded - expected[..., None]).max() <= 1
    assert loaded.min() == 0
    assert loaded.max() == 255


def test_16_bit_pgm_and_dark_16_bit_are_scaled_alike(tmp_path) -> None:
    """A dark picture stays dark: its range isn't stretched."""
    values = np.full((6, 9), 2570, dtype=">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 9 6 65535\n" + values.tobytes())
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "a.png")
    for name in ("a.pgm", "a.png"):
        assert np.array_equal(pixels(load_image(tmp_path / name)), np.full((6, 9, 3), 10))


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floating-point"), (np.int32, "32-bit")])
def test_values_of_unknown_range_are_refused(tmp_path, dtype, kind: str) -> None:
    Image.fromarray(np.full((5, 5), 70000, dtype=dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=rf"a\.tif holds {kind} values .* save it as 8-bit PNG or JPEG"):
        load_image(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["P", "L", "1"])
def test_palette_grey_and_black_and_white_become_rgb(tmp_path, mode: str) -> None:
    stored = gradient(40, 30).convert(mode)
    stored.save(tmp_path / "a.png")
    assert np.array_equal(pixels(load_image(tmp_path / "a.png")), pixels(stored.convert("RGB")))


def test_transparent_parts_become_white(tmp_path) -> None:
    picture = gradient(40, 30).convert("RGBA")
    alpha = np.zeros((30, 40), dtype=np.uint8)
    alpha[:, 20:] = 255
    alpha[:, :5] = 128
    picture.putalpha(Image.fromarray(alpha))
    picture.save(tmp_path / "a.png")
    loaded, stored = pixels(load_image(tmp_path / "a.png")), pixels(picture)[..., :3]
    assert np.array_equal(loaded[:, 20:], stored[:, 20:])
    assert (loaded[:, 5:20] == 255).all()
    half = stored[:, :5] * 128 / 255 + 255 * 127 / 255
    assert np.abs(loaded[:, :5] - half).max() <= 1


def test_a_transparent_palette_entry_becomes_white(tmp_path) -> None:
    picture = Image.new("P", (8, 6), 1)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.paste(0, (0, 0, 4, 6))
    picture.save(tmp_path / "a.png", transparency=0)
    loaded = pixels(load_image(tmp_path / "a.png"))
    assert (loaded[:, :4] == 255).all()
    assert (loaded[:, 4:] == [200, 100, 50]).all()


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame_and_says_so(tmp_path, caplog, suffix: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    content = (tmp_path / f"a.{suffix}").read_bytes()
    loaded = decode_image(content, f"a.{suffix}", warn=True)
    assert (pixels(loaded) == [255, 0, 0]).all()
    assert f"a.{suffix} is animated, or has several pages: its first one is taken" in caplog.text
    caplog.clear()
    decode_image(content, "a", warn=False)
    assert not caplog.text


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.1, 0.7])
def test_truncated_files_are_refused(tmp_path, suffix: str, share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    noise(64, 48).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImageError, match=rf"a\.{suffix} can't be decoded .*Save it again as PNG or JPEG, or remove it"):
        load_image(path)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + b"\0" * 50])
def test_what_only_has_an_image_name_is_refused(tmp_path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.jpg can't be decoded") as caught:
        load_image(tmp_path / "a.jpg")
    assert "BytesIO" not in str(caught.value)
    assert "0x" not in str(caught.value)


def claimed_png(path: Path, width: int, height: int) -> None:
    """A PNG of a few bytes that claims to be large: a decompression bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize("side", [13_500, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side: int) -> None:
    assert side**2 > MAX_PIXELS
    claimed_png(tmp_path / "a.png", side, side)
    with pytest.raises(ImageError, match=r"a\.png has more than 178,956,970 pixels, too many to decode: scale it down"):
        load_image(tmp_path / "a.png")


def test_the_bound_on_pixels_holds_where_pillow_has_none(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    claimed_png(tmp_path / "a.png", 13_500, 13_500)
    with pytest.raises(ImageError, match="too many to decode"):
        load_image(tmp_path / "a.png")


def test_a_large_photo_is_no_bomb(tmp_path, monkeypatch) -> None:
    """Pillow warns from half its limit on; photos of 100 megapixels exist, and warnings are errors here."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    noise(40, 40).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").size == (40, 40)


def test_only_images_by_name_are_taken(tmp_path) -> None:
    for name in ("b.PNG", "a.jpg", ".DS_Store", "._a.jpg", "Thumbs.db", "notes.txt", "a.heic"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    images, others = image_files(tmp_path)
    assert [path.name for path in images] == ["a.jpg", "b.PNG"]
    assert {path.name for path in others} == {".DS_Store", "._a.jpg", "Thumbs.db", "notes.txt", "a.heic", "folder.png"}


def test_a_missing_folder_and_a_file_in_its_place_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"the image folder .*nowhere doesn't exist: name a folder of \.png or \.jpg"):
        image_files(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"the image folder .*file is a file: name a folder"):
        image_files(tmp_path / "file")


def test_a_folder_and_a_file_without_permission_are_refused(tmp_path, monkeypatch) -> None:
    """Root may read everything, so the refusal is the test's own."""

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    noise(8, 8).save(tmp_path / "a.png")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ImageError, match=r"a\.png can't be read: Permission denied"):
        load_image(tmp_path / "a.png")
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ValueError, match="can't be read: Permission denied"):
        image_files(tmp_path)


def test_a_photo_with_a_preview_behind_it_is_no_animation(tmp_path, caplog) -> None:
    photo = gradient(40, 30)
    photo.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[gradient(20, 15)], quality=95)
    loaded = decode_image((tmp_path / "a.jpg").read_bytes(), "a.jpg", warn=True)
    assert np.abs(pixels(loaded) - pixels(photo)).mean() < 3
    assert not caplog.text


def test_a_file_that_vanished_is_named(tmp_path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png can't be read: No such file"):
        load_image(tmp_path / "gone.png")

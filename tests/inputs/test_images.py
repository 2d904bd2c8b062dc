"""Images are read within bounds: what is broken, too large or none is refused; the rest looks as it does to vLLM."""

import io
import json
import os
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from rag_rerank.errors import ContentError
from rag_rerank.inputs.images import BLANK, MOST_BYTES, MOST_PIXELS, read_image
from tests import drawn

ONE_OF_EACH = {
    "PNG": drawn.encoded(drawn.gradient((30, 20)), "PNG"),
    "JPEG": drawn.encoded(drawn.gradient((30, 20)), "JPEG"),
    "WEBP": drawn.encoded(drawn.gradient((30, 20)), "WEBP"),
    "GIF": drawn.encoded(drawn.gradient((30, 20)), "GIF"),
    "BMP": drawn.encoded(drawn.gradient((30, 20)), "BMP"),
    "TIFF": drawn.encoded(drawn.gradient((30, 20)), "TIFF"),
}


class TestKinds:
    """Six formats, as a file, its bytes, or an image in memory."""

    @pytest.mark.parametrize("kind", ONE_OF_EACH)
    def test_the_file_is_kept_as_it_is(self, kind: str, tmp_path: Path):
        """A server gets the very bytes; what they are is read from them, whatever the file is called."""
        data = ONE_OF_EACH[kind]
        (tmp_path / "page.txt").write_bytes(data)
        for source in (data, tmp_path / "page.txt"):
            image_file = read_image(source)
            assert (image_file.data, image_file.media_type) == (data, f"image/{kind.lower()}")
            assert (image_file.width, image_file.height) == (30, 20)
            assert image_file.decoded().size == (30, 20)

    def test_a_telephone_s_jpeg_with_two_images_is_a_jpeg(self):
        """Pillow calls it MPO."""
        data = drawn.encoded(drawn.gradient((30, 20)), "MPO", save_all=True, append_images=[drawn.gradient((15, 10))])
        assert Image.open(io.BytesIO(data)).format == "MPO"
        assert read_image(data).media_type == "image/jpeg"
        assert read_image(data, max_pixels=100).media_type == "image/jpeg"

    def test_an_animation_is_its_first_image(self):
        """As vLLM takes it."""
        frames = [Image.new("RGB", (5, 5), colour) for colour in (drawn.RED, drawn.BLUE)]
        data = drawn.encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert read_image(data).decoded().getpixel((2, 2)) == drawn.RED

    @pytest.mark.parametrize(
        "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F", "LAB"]
    )
    def test_an_image_in_memory_of_any_mode_becomes_a_png(self, mode: str):
        """And looks the same, but for what is transparent."""
        image = drawn.gradient((30, 20)).convert("L").convert("I").convert("I;16") if mode == "I;16" else None
        image = image or Image.new(mode, (30, 20))
        image_file = read_image(image)
        assert (image_file.media_type, image_file.width, image_file.height) == ("image/png", 30, 20)
        if mode in ("L", "RGB", "CMYK", "YCbCr"):
            assert image_file.decoded().tobytes() == image.convert("RGB").tobytes()

    def test_an_image_in_memory_is_not_changed(self):
        """Nor does it matter that it was opened and not read yet."""
        image = Image.open(io.BytesIO(ONE_OF_EACH["JPEG"]))
        assert read_image(image).decoded().tobytes() == image.convert("RGB").tobytes()
        assert image.format == "JPEG"


class TestLooks:
    """`decoded` is what vLLM's model gets to see (`tests/vllm/images/test_bytes.py` compares them)."""

    def test_turned_as_its_exif_data_says(self):
        """A portrait from a telephone lies on its side in the file; in memory, scaled or not, it is the same."""
        exif = Image.Exif()
        exif[0x0112] = 6  # turn it clockwise
        data = drawn.encoded(drawn.gradient((30, 20)), "JPEG", exif=exif, quality=100)
        upright = drawn.gradient((30, 20)).transpose(Image.Transpose.ROTATE_270)
        for image_file in (read_image(data), read_image(Image.open(io.BytesIO(data)))):
            assert image_file.decoded().size == (20, 30)
            assert _difference(image_file.decoded(), upright) < 3
        scaled = read_image(data, max_pixels=150).decoded()
        assert scaled.size == (10, 15)
        assert _difference(scaled, upright.resize((10, 15))) < 6

    def test_transparent_is_white(self):
        """Of a palette and of an alpha channel."""
        palette = Image.new("P", (4, 4), 1)
        palette.putpalette([0, 0, 0, 220, 40, 30])
        for data in (
            drawn.encoded(palette, "PNG", transparency=1),
            drawn.encoded(palette, "GIF", transparency=1),
            drawn.png((9, 9, 9, 0), mode="RGBA"),
            drawn.png((9, 0), mode="LA"),
        ):
            assert read_image(data).decoded().getpixel((1, 1)) == (255, 255, 255)

    @pytest.mark.parametrize("mode", ["1", "L", "CMYK", "P", "I;16"])
    def test_in_rgb(self, mode: str):
        """Whatever the file has."""
        kind = "JPEG" if mode == "CMYK" else "PNG"
        image = Image.new("I;16", (6, 6), 40_000) if mode == "I;16" else drawn.gradient((6, 6), mode)
        assert read_image(drawn.encoded(image, kind)).decoded().mode == "RGB"


class TestScaling:
    """max_pixels makes what is sent smaller, and keeps its shape."""

    @given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 5000))
    def test_no_more_pixels_than_that(self, width: int, height: int, most: int):
        """And never none; a strip may have to become wider than its shape."""
        image_file = read_image(drawn.png(size=(width, height)), max_pixels=most)
        assert 1 <= image_file.width * image_file.height <= max(most, width, height)
        if width * height <= most:
            assert (image_file.width, image_file.height) == (width, height)
        elif min(image_file.width, image_file.height) > 8:
            assert image_file.width / image_file.height == pytest.approx(width / height, rel=0.15)

    def test_a_photograph_stays_a_jpeg(self):
        """As PNG it would be several times as large."""
        assert read_image(ONE_OF_EACH["JPEG"], max_pixels=100).media_type == "image/jpeg"
        assert read_image(ONE_OF_EACH["GIF"], max_pixels=100).media_type == "image/png"


class TestRefusals:
    """Each with what is wrong, before anything is sent, and without a trace in memory."""

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "is no PNG"),
            (b"just text", "is no PNG"),
            (b"%PDF-1.7\n", "is no PNG"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no PNG"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no PNG"),  # Pillow would run Ghostscript
            (drawn.encoded(Image.new("RGB", (9, 9)), "ICO"), "is no PNG"),
            (ONE_OF_EACH["PNG"][:60], "damaged"),
            (ONE_OF_EACH["JPEG"][:-40], "damaged"),
            (ONE_OF_EACH["WEBP"][:-80], "damaged|is no PNG"),
            (drawn.bomb(8, 8)[:-20], "damaged"),
            (drawn.bomb(6400, 6400), "40,960,000|6,400 x 6,400"),
            (drawn.bomb(10_000, 10_000), "10,000 x 10,000 pixels; 40,000,000 are the most"),
            (drawn.bomb(60_000, 60_000), "too many pixels"),
            (drawn.bomb(0, 5), "0 x 5|is no PNG|damaged"),
            (drawn.wordy(200), "is no PNG|damaged"),
            (b"\x89PNG\r\n\x1a\n" + bytes(MOST_BYTES), "20,971,528 bytes; 20,971,520 are the most"),
        ],
    )
    def test_what_is_broken_too_large_or_none(self, data: bytes, message: str):
        """From files of a few bytes that claim to be huge, to huge ones."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            began = time.thread_time()
            with pytest.raises(ContentError, match=message):
                read_image(data)
            assert time.thread_time() - began < 2
            warnings.simplefilter("error")  # as some run Python; Pillow warns of pixels
            with pytest.raises(ContentError):
                read_image(data)

    @given(st.sampled_from(sorted(ONE_OF_EACH)), st.data())
    def test_any_damage_is_a_content_error(self, kind: str, data: st.DataObject):
        """Or is none: some bytes don't matter. Pillow alone raises a dozen kinds of errors."""
        file = bytearray(ONE_OF_EACH[kind])
        for _ in range(data.draw(st.integers(1, 4))):
            file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
        del file[data.draw(st.integers(0, len(file))) or len(file) :]
        try:
            image_file = read_image(bytes(file))
        except ContentError:
            return
        assert image_file.decoded().mode == "RGB"

    def test_what_is_no_file(self, tmp_path: Path):
        """A folder, nothing, a pipe (which would never end), a file that must not be read."""
        os.mkfifo(tmp_path / "pipe")
        for path, message in (
            (tmp_path, "is no file"),
            (tmp_path / "none.png", "is not there"),
            (tmp_path / "pipe", "is no file"),
            (Path("/dev/zero"), "is no file"),
            (tmp_path / ("x" * 300), "can't be read|is not there"),
        ):
            with pytest.raises(ContentError, match=message):
                read_image(path)

    def test_an_endless_file_is_not_read_to_its_end(self, tmp_path: Path):
        """A sparse one of a terabyte."""
        with (tmp_path / "huge.png").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(ContentError, match="are the most"):
            read_image(tmp_path / "huge.png")

    def test_an_image_in_memory_that_is_too_large_or_damaged(self):
        """An opened file is only read now."""
        with pytest.raises(ContentError, match="are the most"):
            read_image(Image.new("1", (10_000, 10_000)))
        with pytest.raises(ContentError, match="can't be written"):
            read_image(Image.open(io.BytesIO(ONE_OF_EACH["JPEG"][:-40])))
        with pytest.raises(ContentError, match="0 x 0"):
            read_image(Image.new("RGB", (0, 0)))

    def test_pillow_s_switch_for_cut_files_counts(self, monkeypatch: pytest.MonkeyPatch):
        """Who has set it wants them read."""
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        assert read_image(ONE_OF_EACH["JPEG"][:-40]).decoded().size == (30, 20)


class TestMemory:
    """Measured in a process of its own, from before to the highest point."""

    @pytest.mark.parametrize(
        ("source", "megabytes"),
        [
            ("drawn.bomb(60_000, 60_000)", 30),
            ("drawn.bomb(12_000, 12_000)", 30),
            ("drawn.wordy(500)", 110),  # Pillow stops at 64 MB
            ("drawn.encoded(Image.new('1', (10_000, 10_000)), 'PNG')", 60),
            ("drawn.encoded(Image.new('RGB', (6_000, 6_000)), 'PNG')", 200),  # allowed: its 108 MB, once
        ],
    )
    def test_reading_takes_no_more_than_the_image_may(self, source: str, megabytes: int):
        """A bomb takes nothing: its size is read from the header."""
        program = f"""
            import json, resource, warnings
            from PIL import Image
            from rag_rerank.errors import ContentError
            from rag_rerank.inputs.images import read_image
            from tests import drawn
            warnings.simplefilter("ignore")
            read_image(drawn.png())
            data = {source}
            open("/proc/self/clear_refs", "w").write("5")  # the highest point so far is forgotten

            def peak():
                return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

            before = peak()
            try:
                read_image(data)
            except ContentError:
                pass
            print(json.dumps((peak() - before) / 1024))
        """
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pytest.skip("Linux only")
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout) < megabytes


def test_the_blank_image_is_one():
    """What a server is asked with to see whether it takes images at all."""
    image_file = read_image(BLANK.data)
    assert image_file == BLANK
    assert set(image_file.decoded().tobytes()) == {255}
    assert MOST_PIXELS == 40_000_000


def _difference(one: Image.Image, other: Image.Image) -> float:
    """On average, of 255."""
    pairs = zip(one.convert("RGB").tobytes(), other.convert("RGB").tobytes(), strict=True)
    return sum(abs(a - b) for a, b in pairs) / (3 * one.width * one.height)

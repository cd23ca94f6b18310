"""The painter of abstract pictures (4.2.2) and letters from fonts (4.2.1)."""

from collections import Counter
from string import ascii_uppercase

import numpy as np
import pytest
from judge import composition
from PIL import ImageFont

import painter
from data import is_plain, mean_colour, nearest_colour, open_set, paint, rgb_to_lab

FONT = ImageFont.load_default(20).font_bytes  # the font that comes with Pillow


def test_pictures_have_the_colour_that_was_asked_for():
    labels = np.arange(48) % 8
    pictures = np.stack([paint(seed, label, 64) for seed, label in enumerate(labels)])
    assert pictures.dtype == np.uint8 and pictures.shape == (48, 64, 64, 3)
    for space in ("rgb", "lab"):
        assert (nearest_colour(mean_colour(pictures, space), space) == labels).mean() > 0.97
    assert not any(is_plain(picture) for picture in pictures)
    assert np.array_equal(paint(3, 3, 64), pictures[3])
    assert not np.array_equal(paint(4, 3, 64), pictures[3])


def test_a_picture_may_have_several_main_colours():
    """`shares`: the part of the pixels within Delta-E 20 of red, and of cyan. Strokes take one of
    them, not a mixture. Grey is the only other colour that the painter has."""
    red, cyan = (200, 30, 30), (30, 190, 200)

    def shares(colours):
        how = (64, colours, rgb_to_lab, lambda picture: True, [(90, 90, 90)] * 6)
        rngs = map(np.random.default_rng, range(24))
        pictures = np.stack([painter.paint(rng, *how) for rng in rngs])
        lab = rgb_to_lab(np.array([red, cyan], float))[:, None, None, None]
        return (np.linalg.norm(rgb_to_lab(pictures) - lab, axis=-1) < 20).mean((1, 2, 3))

    (one, other), both = shares([red]), shares([red, cyan])
    assert one > 0.05 and other < 0.001 and both.min() > 0.043  # with mixtures 0.035


def test_the_judge_knows_the_composition_of_a_picture(monkeypatch):
    painted = []
    recorders = [lambda easel, rng, k=k: painted.append(k) for k in range(8)]
    monkeypatch.setattr(painter, "COMPOSITIONS", recorders)
    for seed in range(20):
        paint(seed, seed % 8, 32)
    assert painted == [composition(seed, seed % 8) for seed in range(20)]
    assert len(set(painted)) > 4


def test_pictures_are_those_of_their_version():
    """Sets that were painted before are used as long as the version is the same."""
    means = [149.73, 106.7, 102.47, 134.8, 170.98, 91.63, 45.3, 197.53]
    assert painter.VERSION == 1
    assert [paint(seed, seed, 64).mean() for seed in range(8)] == pytest.approx(means, abs=0.05)


def test_letters_from_fonts(tmp_path, run, refused):
    fonts, out = tmp_path / "fonts", tmp_path / "out"
    (fonts / "deep").mkdir(parents=True)
    for name in ("a.ttf", "deep/b.TTF"):
        (fonts / name).write_bytes(FONT)
    (fonts / "c.otf").write_text("not a font")
    code, text, _ = run("data", "letters", "--fonts", fonts, "--out", out)
    assert code == 0 and "26 letters of 1 fonts" in text
    assert "1 same letters as another font" in text and "1 not a font that can be drawn" in text
    letters = open_set(out, 32)
    assert letters.classes == list(ascii_uppercase) and len(letters.images) == 26
    for image in letters.images[..., 0]:
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        assert max(np.ptp(rows), np.ptp(columns)) + 1 in (29, 30)  # a faint rim may become black
        assert abs(rows[0] + rows[-1] - 31) <= 1 and abs(columns[0] + columns[-1] - 31) <= 1
    narrow = letters.images[ascii_uppercase.index("I"), ..., 0]
    assert narrow.max() > 200 and narrow.any(0).sum() < 12  # an I is not stretched
    (tmp_path / "empty").mkdir()
    error = refused("data", "letters", "--fonts", tmp_path / "empty", "--out", tmp_path / "new")
    assert "no usable font" in error and not (tmp_path / "new").exists()


def test_fonts_without_letters_are_rejected(tmp_path, monkeypatch):
    (tmp_path / "fonts").mkdir()
    for name in "abcd":
        (tmp_path / "fonts" / f"{name}.ttf").write_bytes(FONT)
    glyph, faces = painter.glyph, {}

    def odd(face, letter):
        """Font b has no picture for Q, font c that of a missing letter, font d that of O."""
        kind = faces.setdefault(id(face), (face, len(faces)))[1]
        if letter == "Q" and kind:
            return glyph(face, " \U0010fffeO"[kind - 1])
        return glyph(face, letter)

    monkeypatch.setattr(painter, "glyph", odd)
    reasons = painter.letters_from_fonts(tmp_path / "fonts", tmp_path / "out")
    assert reasons == Counter(["", "blank letters", "missing letters", "identical letters"])
    assert (tmp_path / "out" / "fonts.csv").read_text().splitlines() == [
        "n,file,rejected",
        "0,a.ttf,",
        ",b.ttf,blank letters: Q",
        ",c.ttf,missing letters: Q",
        ",d.ttf,identical letters: O and Q",
    ]

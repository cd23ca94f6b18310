"""Grids, charts, and the figures that need no model."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import plots
from data import COLOURS, open_set
from plots import bars, chart, grid, join, relabel, time_embedding, transition_report
from unet import timestep_embedding

NAMES = list(COLOURS)


def test_grid_places_images_row_by_row():
    images = np.arange(6, dtype=np.uint8).repeat(4 * 4 * 3).reshape(6, 4, 4, 3) * 40
    picture = np.asarray(grid(images, 3, gap=1))
    assert picture.shape == (11, 16, 3)
    for i in range(6):
        row, column = divmod(i, 3)
        tile = picture[1 + 5 * row : 5 + 5 * row, 1 + 5 * column : 5 + 5 * column]
        assert (tile == 40 * i).all()
    assert grid(images, 3, ["one", "two"]).size[0] > 30


def test_join_places_pictures_row_by_row_below_their_titles():
    pictures = [Image.new("RGB", (40, 30), (0, 90 * i, 0)) for i in range(3)]
    joined = np.asarray(join(pictures, 2, ["a", "b", "c"]))
    assert joined.shape == (2 * 54, 80, 3)
    for i, (y, x) in enumerate([(24, 0), (24, 40), (78, 0)]):
        assert (joined[y : y + 30, x : x + 40] == (0, 90 * i, 0)).all()
        assert (joined[y - 24 : y, x : x + 40] < 128).any()  # the title
    assert join(pictures).size == (40, 90)


def test_chart_leaves_a_gap_where_a_run_was_interrupted():
    def columns_with_ink(pieces):
        picture = np.asarray(chart({"loss": pieces}, "", "", "")).astype(int)[60:400]
        return np.all(picture < (120, 160, 255), axis=-1).any(0).sum()

    whole = columns_with_ink([([0, 100], [1.0, 1.0])])
    interrupted = columns_with_ink([([0, 40], [1.0, 1.0]), ([60, 100], [1.0, 1.0])])
    assert 0.15 < 1 - interrupted / whole < 0.25


def test_chart_leaves_out_what_a_logarithm_does_not_have():
    nan, inf = float("nan"), float("inf")
    good = chart({"loss": [([0, 2], [1.0, 2.0])]}, "", "", "")
    values = ([0, 1, 1, 1, 2], [1.0, 0.0, -1.0, inf, 2.0])
    odd = chart({"loss": [values], "none": [([5], [nan])]}, "", "", "")
    assert np.array_equal(np.asarray(odd)[60:], np.asarray(good)[60:])
    assert chart({"none": [([5], [nan])]}, "", "", "").size == good.size


def test_5_2_the_chart_of_a_log(tmp_path, run, refused):
    """The command draws what training draws. A half-written last line is ignored."""
    log = tmp_path / "log.csv"
    log.write_text("run,update,train_loss,validation_loss,validation_loss_ema\n1,10,0.5,,\n")
    assert "no such file" in refused("plots", "losses", tmp_path / "nowhere")
    with log.open("a") as file:
        file.write("1,20,0.3,0.4,0.35\n2,30,0.2,,\n")
    rows = plots.log_rows(log)
    assert [(row["run"], row["update"]) for row in rows] == [("1", "10"), ("1", "20"), ("2", "30")]
    plots.draw_losses(rows, tmp_path / "loss.png")
    with log.open("a") as file:
        file.write("2,40,0.1,9")
    code, _, err = run("plots", "losses", tmp_path, "--out", tmp_path / "figures" / "loss.png")
    assert code == 0, err
    picture = (tmp_path / "figures" / "loss.png").read_bytes()
    assert picture == (tmp_path / "loss.png").read_bytes()
    two = ("losses", tmp_path, tmp_path / "figures", "--out", tmp_path / "two.png")
    assert "no such file" in refused("plots", *two)
    (tmp_path / "figures" / "log.csv").write_bytes((tmp_path / "log.csv").read_bytes())
    code, _, err = run("plots", *two)
    assert code == 0 and np.asarray(Image.open(tmp_path / "two.png")).std() > 5, err
    assert "not the name of a picture" in refused("plots", "losses", tmp_path, "--out", "loss")


def test_two_runs_of_one_name_are_two_curves(run, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(
        plots, "chart", lambda found, *text: lines.append(found) or Image.new("L", (9, 9))
    )
    for number, folder in enumerate(("a/run", "b/run")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "log.csv").write_text(
            f"run,update,validation_loss\n1,5,0.{number + 1}\n"
        )
    runs = [str(tmp_path / folder) for folder in ("a/run", "b/run")]
    assert run("plots", "losses", *runs, "--out", tmp_path / "two.png")[0] == 0
    assert lines == [{runs[0]: [([5], [0.1])], runs[1]: [([5], [0.2])]}]


def test_bars_are_as_high_as_their_shares():
    shares = {"a": 50, "b": 25, "c": 25, "d": float("nan")}
    rows = [{"label": label, "set": "all", "share": share} for label, share in shares.items()]
    picture = np.asarray(bars(rows, "share", "")).astype(int)
    ink = (np.abs(picture - plots.PALETTE[0]).max(-1) < 12)[40:].sum(0)  # in every column
    heights = [np.median(part[part > 20]) for part in np.array_split(ink[74:880], 3)]
    assert heights[0] / heights[1] == pytest.approx(2, rel=0.02) and heights[1] == heights[2]


def test_fig_4_1_a_row_a_letter(tmp_path, run, refused):
    code, _, err = run("plots", "sheet", "--each", 16, "--out", tmp_path / "figure_4_1.png")
    assert code == 0, err
    picture, letters = np.asarray(Image.open(tmp_path / "figure_4_1.png")), open_set("letters")
    left = picture.shape[1] - 16 * 34 - 2
    for label, place, which in ((0, 0, 0), (25, 15, -1)):
        row, x = np.flatnonzero(letters.labels == label)[which], left + 2 + 34 * place
        shown = picture[2 + 34 * label : 34 + 34 * label, x : x + 32]
        assert np.array_equal(shown, letters.images[row].repeat(3, -1))
    assert "not the name of a picture" in refused("plots", "sheet", "--out", tmp_path / "figure")
    assert "--each 0: must be 1 or more" in refused("plots", "sheet", "--each", 0)
    assert "no such file or folder" in refused("plots", "sheet", tmp_path / "nowhere")


def test_relabel_counts_against_a_plain_loop(tmp_path, run, refused):
    random = np.random.default_rng(0)
    base = random.integers(0, 2, (30, 1, 1, 3)) * random.integers(100, 256, (30, 1, 1, 3))
    images = np.clip(base + random.normal(0, 40, (30, 24, 24, 3)), 0, 255).astype(np.uint8)
    grey = np.clip(random.normal(100, 25, (1, 24, 24, 1)), 0, 255).astype(np.uint8).repeat(3, 3)
    images = np.concatenate([images, grey])  # fig. 4.2 (a): purple, should be black
    rgb, lab, excess = relabel(images)
    assert (excess >= 0).all() and ((excess > 0) == (rgb != lab)).all()
    assert (NAMES[rgb[30]], NAMES[lab[30]]) == ("purple", "black")
    moves = Counter(zip(rgb.tolist(), lab.tolist()))
    report = transition_report(rgb, lab)
    table = [list(map(int, line.split()[1:])) for line in report.splitlines()[-8:]]
    assert table == [[moves[a, b] for b in range(8)] for a in range(8)]
    assert f"changes {(rgb != lab).mean():.1%} of 31 labels" in report
    np.savez(tmp_path / "set.npz", images=images)
    figures = tmp_path / "figures"
    code, out, _ = run("plots", "relabel", tmp_path / "set.npz", "--size", 24, "--out", figures)
    assert code == 0 and report in out
    assert {path.name for path in figures.iterdir()} == {"figure_4_2.png", "figure_4_3.png"}
    assert "its images are grey" in refused("plots", "relabel", "letters", "--size", 32)


def test_fig_4_5_shows_the_table():
    """Orange 1, white 0, blue -1; t = 0 is all cos 0 = 1 above all sin 0 = 0."""
    steps, dim, scale = 12, 8, 4
    picture = np.asarray(time_embedding(steps, dim, scale)).astype(float)
    half, columns = 34 + scale * dim // 2, slice(64 + scale // 2, None, scale)
    cells = picture[34 + scale // 2 :: scale, columns][:dim, :steps]
    cells[dim // 2] = picture[half + scale - 1, columns][:steps]  # below the line between
    pe = timestep_embedding(torch.arange(steps), dim).T.numpy()
    strength = (255 - cells[..., 2]) / np.where(pe > 0, 255 - 14, 255 - 180)  # of the blue channel
    assert np.abs(strength - np.abs(pe)).max() < 0.01
    assert (cells[: dim // 2, 0] == (214, 93, 14)).all() and (cells[dim // 2 :, 0] == 255).all()


def test_fig_5_8_chosen_images_in_rows(tmp_path, run, refused):
    colours = {"LDM": (250, 0, 0), "GAN": (0, 0, 250)}
    for name, (r, _, b) in colours.items():
        (tmp_path / name / "deep").mkdir(parents=True)
        for i in range(5):  # the green channel says which of the five it is
            Image.new("RGB", (40, 40), (r, 10 * i, b)).save(tmp_path / name / "deep" / f"{i}.png")
    rows, out = [f"{name}={tmp_path / name}" for name in colours], tmp_path / "figure_5_8.png"
    code, _, err = run("plots", "rows", *rows, "--n", 3, "--size", 32, "--out", out)
    assert code == 0, err
    picture = np.asarray(Image.open(out))
    left = picture.shape[1] - 3 * 34 - 2
    for row, (r, _, b) in enumerate(colours.values()):
        middles = picture[18 + 34 * row, left + 18 :: 34]
        assert middles.tolist() == [[r, 10 * i, b] for i in (0, 2, 4)]  # evenly of five
    assert "no such file or folder" in refused("plots", "rows", f"LDM={tmp_path / 'nowhere'}")
    assert "NAME=DIR" in refused("plots", "rows", tmp_path / "LDM")


def test_5_2_every_loss_has_its_line_and_an_interruption_ends_it(monkeypatch, tmp_path):
    lines = {}

    def chart(found, *more):
        lines.update(found)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(plots, "chart", chart)
    names = "run,update,train_loss,validation_loss,validation_loss_ema"
    (tmp_path / "log.csv").write_text(f"{names}\n1,10,0.5,0.4,0.3\n2,20,0.2,,\n")
    plots.draw_losses(plots.log_rows(tmp_path / "log.csv"), tmp_path / "loss.png")
    assert lines["training"] == [([10], [0.5]), ([20], [0.2])]
    assert lines["validation"] == [([10], [0.4])]
    assert lines["validation, averaged weights"] == [([10], [0.3])]


def test_an_error_bar_reaches_one_standard_error_down():
    """1 with the error 0.5: the line hides the upper half of the bar's middle."""
    rows = [{"label": "a", "set": "all", "share": 1.0, "share_error": 0.5}]
    picture = np.asarray(bars(rows, "share", "")).astype(int)
    ink = (np.abs(picture - plots.PALETTE[0]).max(-1) < 12)[50:].sum(0)  # in every column
    assert ink[474:481].min() / ink[460] == pytest.approx(0.5, abs=0.03)


def test_a_film_runs_forwards_and_rests_at_its_end(tmp_path):
    plots.save([Image.new("L", (4, 4), grey) for grey in (0, 90, 180)], tmp_path / "a.gif")
    film, seen = Image.open(tmp_path / "a.gif"), []
    for i in range(film.n_frames):
        film.seek(i)
        seen.append((film.convert("L").getpixel((0, 0)), film.info["duration"]))
    assert seen == [(0, 70), (90, 70), (180, 2500)] and film.info["loop"] == 0


def test_real_images_are_grey_in_every_chart():
    rows = [{"label": "a", "set": name, "share": 1.0} for name in ("real", "ours")]
    picture = np.asarray(bars(rows, "share", "")).astype(int)[50:]  # below the legend
    counts = [
        (np.abs(picture - colour).max(-1) < 6).sum()
        for colour in (plots.GREY, plots.PALETTE[0], plots.PALETTE[1])
    ]
    assert min(counts[:2]) > 5000 and counts[2] == 0


def test_the_losses_have_a_logarithmic_axis():
    """1, 10 and 100 are equally far apart."""
    points = {str(x): [([x + 1], [10.0**x])] for x in range(3)}
    picture = np.asarray(chart(points, "", "", "")).astype(int)[40:]  # below the legend
    rows = [np.nonzero(np.abs(picture - c).max(-1) < 12)[0].mean() for c in plots.PALETTE[:3]]
    assert rows[0] - rows[1] == pytest.approx(rows[1] - rows[2], abs=1) and rows[1] > rows[2] + 50


def test_figs_4_2_and_4_3_have_both_rules_and_the_labels_that_fit_worst(monkeypatch, tmp_path):
    """Ten images, orange in RGB and green in LAB; the last one's label fits worst."""
    seen, blank = {}, Image.new("RGB", (8, 8))
    images, zeros = np.zeros((10, 8, 8, 3), np.uint8), np.zeros(10, int)
    found = SimpleNamespace(images=images)
    monkeypatch.setattr(plots.data, "open_set", lambda *a, **k: found)
    monkeypatch.setattr(plots, "relabel", lambda images: (zeros, zeros + 1, np.arange(10.0)))
    monkeypatch.setattr(plots, "bars", lambda rows, *a: seen.update(bars=rows) or blank)
    monkeypatch.setattr(plots, "picture_rows", lambda rows, n: seen.update(rows=rows) or blank)
    plots.relabel_command(SimpleNamespace(set="x", size=8, out=tmp_path))
    ((name, _, worst),) = seen["rows"]
    assert name == "orange > green" and worst.tolist() == [9, 8, 7, 6, 5, 4, 3, 2]
    shares = {(row["set"], row["label"]): row["share"] for row in seen["bars"] if row["share"]}
    assert shares == {("RGB", "orange"): 100, ("LAB", "green"): 100}

"""Everything that is drawn: grids of images, charts, films, and the figures that need no model.

    python plots.py sheet letters           some images of every label of a set (figs 4.1, 4.4)
    python plots.py relabel paintings       the two labelling rules compared (figs 4.2, 4.3)
    python plots.py time                    the table of time embeddings (fig. 4.5)
    python plots.py losses runs/letters     the loss chart of a training run (5.2)
    python plots.py rows LDM=DIR GAN=DIR    chosen images of several models (fig. 5.8)

Pictures are made with Pillow alone. A set is a name or path that `data.open_set` understands.
"""

import argparse
import csv
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data import (
    COLOURS,
    UserError,
    fit,
    open_set,
    picture_name,
    relabel,
    run_program,
    transition_report,
    whole_file,
)
from unet import timestep_embedding

INK, PAPER, RULE, GREY = (40, 40, 44), (255, 255, 255), (225, 225, 228), (150, 150, 156)
PALETTE = [(31, 98, 180), (214, 93, 14), (54, 140, 66), (150, 60, 160)]
LEFT, RIGHT, TOP = 148, 1760, 88  # the edges of a chart's plot, in pixels, at twice its size

# --------------------------------------------------------------------------------------------------
# Grids and films
# --------------------------------------------------------------------------------------------------


def font(size):
    return ImageFont.load_default(size)


def grid(images, columns, names=None, scale=1, gap=2):
    """Images (N, H, W, 3) uint8 row by row as one picture. names: for the left of every row."""
    height, width = (scale * side for side in images.shape[1:3])
    rows, margin = -(-len(images) // columns), 0
    if names:
        text = font(min(18, max(11, height // 3)))
        margin = 12 + int(max(text.getlength(name) for name in names))
    size = (margin + columns * (width + gap) + gap, rows * (height + gap) + gap)
    picture = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(picture)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        picture.paste(tile, (margin + gap + column * (width + gap), gap + row * (height + gap)))
    for row, name in enumerate(names or []):
        y = gap + row * (height + gap) + height // 2
        pen.text((margin - 6, y), name, INK, text, anchor="rm")
    return picture


def join(pictures, columns=1, titles=None):
    """Pictures in rows of `columns` as one picture, each below its title."""
    columns, top = min(columns, len(pictures)), 24 if titles else 0
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures) + top
    joined = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), PAPER)
    pen = ImageDraw.Draw(joined)
    for i, picture in enumerate(pictures):
        x, y = i % columns * width, i // columns * height
        joined.paste(picture, (x, y + top))
        if titles:
            pen.text((x + picture.width // 2, y + 12), titles[i], INK, font(15), anchor="mm")
    return joined


def save(picture, path):
    """Write a picture, or a list of pictures as a film (GIF) that rests at its end and repeats."""
    with whole_file(path) as temporary:
        if isinstance(picture, list):
            first, *others = picture
            times = [70] * len(others) + [2500]  # milliseconds
            first.save(temporary, save_all=True, append_images=others, duration=times, loop=0)
        else:
            picture.save(temporary)


# --------------------------------------------------------------------------------------------------
# Charts
# --------------------------------------------------------------------------------------------------


def frame(height, title, names, mark, low, high, scale=float):
    """The frame of a chart: title, legend, and the ticks of the y axis from `low` to `high`.

    It has twice the final size, which makes lines smooth. names: for the legend, with marks of
    `mark` pixels; scale: of the y axis, `float` or `np.log10`. Returns the picture, its pen, the
    colour of every name, and a function that maps a value to its y.
    """
    picture = Image.new("RGB", (1800, 2 * height), PAPER)
    pen, bottom = ImageDraw.Draw(picture), 2 * height - 104

    def y(value):
        return bottom - (bottom - TOP) * (scale(value) - scale(low)) / (scale(high) - scale(low))

    pen.text((LEFT, 44), title, INK, font(30), anchor="lm")
    for tick in linear_ticks(high, 5) if scale is float else log_ticks(low, high):
        pen.line((LEFT, y(tick), RIGHT, y(tick)), RULE, 2)
        pen.text((LEFT - 16, y(tick)), f"{tick:g}", INK, font(22), anchor="rm")
    colours = {"real": GREY} | dict(zip((n for n in names if n != "real"), PALETTE * len(names)))
    x = RIGHT
    for name in reversed(names):
        x -= font(24).getlength(name) + 80
        pen.line((x, 44, x + 36, 44), colours[name], mark)
        pen.text((x + 48, 44), name, INK, font(24), anchor="lm")
    return picture, pen, colours, y


def chart(lines, title, x_label, y_label):
    """A line chart with a logarithmic y axis.

    lines: name -> list of pieces (xs, ys). Pieces are not connected, so an interruption is a gap.
    Values that are not above 0, or not finite, are left out.
    """

    def drawable(piece):
        piece = np.array(piece, float)  # (2, n)
        return piece[:, (piece[1] > 0) & np.isfinite(piece[1])]

    lines = {name: [drawable(piece) for piece in pieces] for name, pieces in lines.items()}
    points = np.hstack(
        [np.empty((2, 0)), *(piece for pieces in lines.values() for piece in pieces)]
    )
    xs, ys = points if points.size else np.ones((2, 1))  # an empty chart
    low, high, x_max = ys.min() * 10**-0.03, ys.max() * 10**0.03, max(xs.max(), 1)
    picture, pen, colours, y = frame(460, title, list(lines), 6, low, high, np.log10)
    bottom = y(low)

    def x(value):
        return LEFT + (RIGHT - LEFT) * value / x_max

    for tick in linear_ticks(x_max, 6):
        pen.line((x(tick), bottom, x(tick), bottom + 8), INK, 2)
        pen.text((x(tick), bottom + 28), f"{tick:,.0f}", INK, font(22), anchor="mm")
    for name, pieces in reversed(lines.items()):  # the first line is on top
        for piece in pieces:
            points = [(x(a), y(b)) for a, b in piece.T]
            if len(points) == 1:
                pen.circle(points[0], 6, colours[name])
            else:
                pen.line(points, colours[name], 4, joint="curve")
    pen.line((LEFT, TOP, LEFT, bottom, RIGHT, bottom), INK, 2)
    pen.text((RIGHT, bottom + 72), x_label, INK, font(24), anchor="rm")
    pen.text((LEFT, TOP - 16), y_label, INK, font(22), anchor="lm")
    return picture.resize((900, picture.height // 2), Image.Resampling.LANCZOS)


def bars(rows, value, title, error=None):
    """Figures 4.3 and 5.5 to 5.7: a bar chart with one group of bars per label, one bar per set.

    rows: dicts with "label", "set", and the numbers `value` and perhaps `error`. A value that is
    NaN has no bar, an error that is NaN no line.
    """
    rows = [row for row in rows if np.isfinite(row[value])]
    errors = [np.nan_to_num(row[error]) if error else 0.0 for row in rows]
    labels, sets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("label", "set"))
    high = 1.08 * max([row[value] + e for row, e in zip(rows, errors)] + [1e-9])
    picture, pen, colours, y = frame(350, title, sets, 22, 0, high)
    bottom, step = y(0), (RIGHT - LEFT) / max(1, len(labels))
    width = min(0.8 * step / max(1, len(sets)), 128)
    for row, e in zip(rows, errors):
        place = labels.index(row["label"]) + 0.5, sets.index(row["set"]) - len(sets) / 2
        x, top = LEFT + step * place[0] + width * place[1], y(max(0, row[value]))
        pen.rectangle((x + 2, min(top, bottom - 2), x + width - 2, bottom), colours[row["set"]])
        middle, reach = x + width / 2, bottom - y(e)
        if reach:
            pen.line((middle, top - reach, middle, min(bottom, top + reach)), INK, 2)
        if width > 48:
            pen.text((middle, top - reach - 14), f"{row[value]:.3g}", INK, font(18), anchor="mm")
    for i, label in enumerate(labels):
        x = LEFT + step * (i + 0.5)
        if label in COLOURS:  # a dot of that colour before its name
            x += 16
            edge = x - font(24).getlength(label) / 2
            pen.circle((edge - 26, bottom + 32), 10, COLOURS[label], outline=INK)
        pen.text((x, bottom + 32), label, INK, font(24), anchor="mm")
    pen.line((LEFT, bottom, RIGHT, bottom), INK, 2)
    return picture.resize((900, picture.height // 2), Image.Resampling.LANCZOS)


def log_ticks(low, high):
    """Ticks 1, 2, 5 x 10^k from `low` to `high`; finer ones if these are fewer than three."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), np.arange(10, 100) / 10):
        ticks = [step * 10.0**k for k in decades for step in steps if low <= step * 10.0**k <= high]
        if len(ticks) >= 3:
            break
    return ticks


def linear_ticks(high, count):
    """At most `count` + 1 round numbers from 0 to `high`."""
    power = 10 ** np.floor(np.log10(high / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= high / count)
    return np.arange(0, high + 1e-9, step)


def log_rows(path):
    """The rows of a log.csv as dicts of strings. A half-written last line is ignored."""
    *lines, _ = path.read_text().split("\n")
    return list(csv.DictReader(lines))


def draw_losses(rows, path, loss_name=""):
    """5.2: the training and validation losses in the rows of a log.csv; interruptions are gaps."""
    names = {
        "train_loss": "training",
        "validation_loss": "validation",
        "validation_loss_ema": "validation, averaged weights",
    }
    lines = {}
    for column, name in names.items():
        runs = {}  # points per run; a run ends at an interruption
        for row in rows:
            if row[column]:
                xs, ys = runs.setdefault(row["run"], ([], []))
                xs.append(int(row["update"]))
                ys.append(float(row[column]))
        lines[name] = list(runs.values())
    save(chart(lines, "Loss", "update", loss_name), path)


# --------------------------------------------------------------------------------------------------
# Figures 4.1 to 4.5 and 5.8
# --------------------------------------------------------------------------------------------------


def thumbnails(images, rows, columns, side=96):
    """The images `rows` of a set, then white ones: (columns, side, side, 3)."""
    row = np.full((columns, side, side, 3), 255, np.uint8)
    for place, i in enumerate(rows):
        row[place] = fit(images[i], side)
    return row


def evenly(rows, count):
    """`count` of the rows, or all if there are fewer, at equal distances."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def contact_sheet(data, each=8):
    """Figures 4.1 and 4.4: one row per label with `each` of its images, evenly picked."""
    side = min(96, *data.images[0].shape[:2])
    images = []
    for label in range(len(data.classes)):
        rows = evenly(np.flatnonzero(data.labels == label), each)
        images.append(thumbnails(data.images, rows, each, side))
    return grid(np.concatenate(images), each, data.classes)


def worst_mismatches(images, rgb, lab, excess, rows=8, columns=8):
    """Figure 4.2: a row for each of the most frequent changes of label from RGB to LAB.

    It shows the images whose RGB label fits worst. rgb, lab, excess: from `data.relabel(images)`.
    """
    changed, shown, names = rgb != lab, [], []
    for (a, b), _ in Counter(zip(rgb[changed].tolist(), lab[changed].tolist())).most_common(rows):
        which = np.flatnonzero((rgb == a) & (lab == b))
        worst = which[np.argsort(-excess[which], kind="stable")][:columns]
        shown.append(thumbnails(images, worst, columns))
        names.append(f"{list(COLOURS)[a]} > {list(COLOURS)[b]}")
    return grid(np.concatenate(shown), columns, names)


def time_embedding(steps, dim, scale=8):
    """Figure 4.5: `timestep_embedding` of t = 0 .. steps - 1, one column per time step.

    Orange is 1, white 0, blue -1. Fast waves are at the top of each half: they change most from one
    step to the next.
    """
    pe = timestep_embedding(torch.arange(steps), dim).T.numpy()[..., None]  # (dim, steps, 1)
    ends = np.where(pe > 0, np.float32([214, 93, 14]), np.float32([31, 98, 180]))
    table = Image.fromarray((255 + np.abs(pe) * (ends - 255)).round().astype(np.uint8))
    width, height, left, top, text = steps * scale, dim * scale, 64, 34, font(15)
    picture = Image.new("RGB", (left + width + 20, top + height + 44), "white")
    picture.paste(table.resize((width, height), Image.Resampling.NEAREST), (left, top))
    pen = ImageDraw.Draw(picture)
    title = f"Time embedding, {dim} entries: orange 1, white 0, blue -1"
    pen.text((left, 17), title, "black", text, anchor="lm")
    for name, half in (("cos", 0.25), ("sin", 0.75)):
        pen.text((left - 10, top + half * height), name, "black", text, anchor="rm")
    pen.line((left, top + height // 2, left + width, top + height // 2), "black", 2)
    for t in range(0, steps, max(1, steps // 8)):
        place = (left + (t + 0.5) * scale, top + height + 14)
        pen.text(place, str(t), "black", text, anchor="mm")
    pen.text((left + width, top + height + 32), "time step t", "black", text, anchor="rm")
    return picture


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse():
    parser = argparse.ArgumentParser(description="Figures that need no model.")
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("sheet", help="some images of every label of a set (figs 4.1, 4.4)")
    p.set_defaults(command=sheet_command)
    p.add_argument("set", nargs="?", default="letters", help="as for training (default letters)")
    p.add_argument("--each", type=int, default=8, help="images per label (default 8)")
    p.add_argument("--size", type=int, help="open the set at this size (default: as it is)")
    p.add_argument("--out", default="sheet.png", help="default sheet.png")
    p = commands.add_parser("relabel", help="the two labelling rules compared (figs 4.2, 4.3)")
    p.set_defaults(command=relabel_command)
    p.add_argument("set", nargs="?", default="paintings", help="as for training (paintings)")
    p.add_argument("--size", type=int, default=256, help="pixels per side (default 256)")
    p.add_argument("--out", default="relabel", help="folder for the figures (default relabel)")
    p = commands.add_parser("rows", help="images of several folders, one row each (fig. 5.8)")
    p.set_defaults(command=rows_command)
    p.add_argument("rows", nargs="+", metavar="NAME=DIR", help="name and folder of a row")
    p.add_argument("--n", type=int, default=8, help="images per row, evenly picked (default 8)")
    p.add_argument("--size", type=int, default=128, help="pixels per side of each (default 128)")
    p.add_argument("--out", default="rows.png", help="default rows.png")
    p = commands.add_parser("time", help="the table of time embeddings (fig. 4.5)")
    p.set_defaults(command=time_command)
    p.add_argument("--out", default="figures/figure_4_5.png", help="default figures/figure_4_5.png")
    p = commands.add_parser("losses", help="the loss chart of a training run (5.2)")
    p.set_defaults(command=losses_command)
    p.add_argument("run", help="its folder, such as runs/letters")
    p.add_argument("--out", default="loss.png", help="default loss.png")
    return parser.parse_args()


def sheet_command(args):
    save(contact_sheet(open_set(args.set, args.size, pack=False), args.each), args.out)


def relabel_command(args):
    images = open_set(args.set, args.size, labels="rgb").images
    if images.shape[3] == 1:
        raise UserError(f"{args.set}: its images are grey; the rules compare colours")
    rgb, lab, excess = relabel(images)
    print(transition_report(rgb, lab, list(COLOURS)))
    rows = [
        {"label": label, "set": rule, "share": 100 * (labels == number).mean()}
        for rule, labels in (("RGB", rgb), ("LAB", lab))
        for number, label in enumerate(COLOURS)
    ]
    title = f"Labels of {len(rgb):,} images, per cent"
    save(bars(rows, "share", title), Path(args.out, "figure_4_3.png"))
    if (rgb != lab).any():
        picture = worst_mismatches(images, rgb, lab, excess)
        save(picture, Path(args.out, "figure_4_2.png"))


def rows_command(args):
    images, names = [], []
    for item in args.rows:
        name, _, folder = item.partition("=")
        if not folder:
            raise UserError(f"{item}: expected NAME=DIR, such as LDM=samples/blue")
        data = open_set(folder, args.size, pack=False)
        rows = evenly(np.arange(len(data.images)), args.n)
        images.append(thumbnails(data.images, rows, args.n, args.size))
        names.append(name)
    save(grid(np.concatenate(images), args.n, names), args.out)


def time_command(args):
    save(time_embedding(128, 64), args.out)


def losses_command(args):
    log = Path(args.run, "log.csv")
    if not log.exists():
        raise UserError(f"{log}: no such file; a folder that train.py made has one")
    if not (rows := log_rows(log)):
        raise UserError(f"{log}: no losses in it yet")
    draw_losses(rows, args.out)


def main():
    args = parse()
    for name, least in (("each", 1), ("n", 1), ("size", 8)):
        if (value := getattr(args, name, None)) is not None and value < least:
            raise UserError(f"--{name} {value}: must be {least} or more")
    if args.command is not relabel_command:  # its --out is a folder
        picture_name(args.out)
    args.command(args)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_program(main)

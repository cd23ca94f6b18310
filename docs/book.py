"""The book: python docs/book.py writes docs/book/, a page per chapter of the thesis.

Left the explanation of a function, which is its docstring; in the middle its code; in the margin
the errata that it mentions and the tests of its rows in the map. Standard library only.
"""

import ast
import html
import io
import keyword
import re
import textwrap
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
TITLES = {"2": "Foundations", "3": "Generative models", "4": "The system", "5": "Evaluation"}
GREEK = "alpha|beta|eps|theta|phi|lambda|mu|sigma|tau|xi|pi|Sigma|Phi|grad|infinity"
SIGNS = dict(zip(GREEK.split("|"), "αβεθφλμστξπΣΦ∇∞"))
ROOTED = re.compile(r"sqrt\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)")  # two more levels inside
SUB = re.compile(r"_\{([^{}]*)\}|(?<![A-Za-z]{2})_(\w+)")  # not in names such as kl_weight
ANCHOR = re.compile(r"\W+")  # 3.12 has the anchor 3-12
SUP = re.compile(r"\^(?:\{([^{}]*)\}|\(([^()]*)\)|(-?\w+))")


def rows(page):
    """The rows of all tables of a page, each a list of cells."""
    lines = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line[:2] == "| "]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells for cells in found if cells[0] not in ("id", "eq. or section")]


def typeset(text):
    """The plain notation of formulas as HTML: x_{t-1}, alpha_bar_t, sqrt(...), ^2, <=, grad."""
    text = html.escape(text, quote=False)
    for plain, sign in (("&lt;=", "≤"), ("&gt;=", "≥"), ("-&gt;", "→"), ("+-", "±"), ("...", "…")):
        text = text.replace(plain, sign)
    while ROOTED.search(text):
        text = ROOTED.sub(r'√<span class="root">\1</span>', text)
    for mark, accent in (("_bar", "\u0304"), ("_tilde", "\u0303"), ("", "")):
        pattern = rf"(?<![A-Za-z])({GREEK}){mark}(?![A-Za-z])"
        text = re.sub(pattern, lambda m: SIGNS[m[1]] + accent, text)  # noqa: B023
    text = text.replace("sum_", "∑_").replace("prod_", "∏_").replace("integral_", "∫_")
    text = SUB.sub(lambda m: f"<sub>{m[1] or m[2]}</sub>", text)
    text = SUP.sub(lambda m: f"<sup>{m[1] or m[2] or m[3]}</sup>", text)
    return re.sub(r"(?<=[ (])-(?=[ \w√])", "−", text)


def prose(text):
    """Running text: `names` are code, the rest may hold formulas, E27 leads to the errata."""
    parts = re.split(r"`([^`]*)`", text)
    parts[::2] = map(typeset, parts[::2])
    parts[1::2] = (f"<code>{html.escape(part)}</code>" for part in parts[1::2])
    return re.sub(r"\b(E\d\d)\b", r'<a href="../errata.md">\1</a>', "".join(parts))


def explanation(doc):
    """A docstring as HTML: indented blocks are formulas, and so is what follows "eq. 3.9:  "."""
    found = []
    for block in re.split(r"\n\s*\n", doc):
        title, colon, rest = block.partition(":  ")
        if not found and colon and "\n" not in title:
            formula, _, block = rest.partition("\n")
            found.append(f'<p>{prose(title)}:</p><div class="formula">{typeset(formula)}</div>')
        if block.startswith("    "):
            found.append(f'<div class="formula">{typeset(textwrap.dedent(block))}</div>')
        elif block:
            found.append(f"<p>{prose(block)}</p>")
    return "".join(found)


def coloured(code):
    """Python as HTML: keywords bold, comments faint."""
    lines = code.splitlines(keepends=True)
    for token in reversed(list(tokenize.generate_tokens(io.StringIO(code).readline))):
        if token.type == tokenize.COMMENT or keyword.iskeyword(token.string):
            tag, (row, start), end = "ib"[token.type == tokenize.NAME], token.start, token.end[1]
            line = lines[row - 1]
            lines[row - 1] = f"{line[:start]}\0{tag}\1{line[start:end]}\0/{tag}\1{line[end:]}"
    return html.escape("".join(lines), quote=False).replace("\0", "<").replace("\1", ">")


def definition(file, name):
    """The docstring of a function, class or table, and its code without it."""
    text = (ROOT / file).read_text()
    node = ast.parse(text)
    for part in name.split("."):
        names = {getattr(n, "name", getattr(n, "targets", [None])[0]): n for n in node.body}
        node = {getattr(name, "id", name): n for name, n in names.items()}[part]
    doc = ast.get_docstring(node) if hasattr(node, "body") else None
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
    code = text.splitlines()[first - 1 : node.end_lineno]
    if doc:
        del code[node.body[0].lineno - first : node.body[0].end_lineno - first + 1]
    return doc or "", textwrap.dedent("\n".join(code)) + "\n"


def section(file, name, of_map, errata, tests):
    """One function: its equations, explanation, code, errata and tests."""
    doc, code = definition(file, name)
    marks = "".join(f'<a id="{ANCHOR.sub("-", row[0])}"></a>' for row in of_map)
    what = "; ".join(f"<b>{typeset(row[0])}</b> {prose(row[1])}" for row in of_map)
    source, notes, links = f'<a href="../../{file}">{file}</a>', "", ""
    shown_by = dict.fromkeys(re.findall(r"`(\w+)`", " ".join(row[3] for row in of_map)))
    for number, where, printed, right, shown in errata:
        if number in doc + code or shown_by.keys() & set(re.findall(r"`(\w+)`", shown)):
            both = f"Printed: {prose(printed)}. Right: {prose(right)}."
            notes += f"<p><b>{number}</b>, {where}. {both}</p>"
    for test in shown_by:
        link = f"../../tests/{tests[test]}#:~:text={test}"
        links += f'<li><a href="{link}"><code>{test}</code></a></li>'
    return (
        f"<section>{marks}<header><h2><code>{name}</code></h2><p>{what} · {source}</p></header>\n"
        f"<div>{explanation(doc)}</div>\n<pre>{coloured(code)}</pre>\n"
        f"<aside>{notes}<ul>{links}</ul></aside></section>"
    )


def page(title, body):
    links = "".join(f'<a href="chapter_{n}.html">{n} {name}</a>' for n, name in TITLES.items())
    head = f'<meta charset="utf-8"><title>{title}</title><link rel="stylesheet" href="style.css">'
    head += '<meta name="viewport" content="width=device-width">'
    top = f'<h1>{title}</h1><nav><a href="index.html">Equations</a>{links}</nav>'
    return f'<!doctype html><html lang="en">{head}{top}\n{body}\n</html>\n'


def pages():
    """File name -> HTML. A function stands on the page of the first row that names it."""
    errata, tests, functions, home, index = rows("errata.md"), {}, {}, {}, ""
    for path in (ROOT / "tests").glob("test_*.py"):
        tests |= dict.fromkeys(re.findall(r"def (test_\w+)", path.read_text()), path.name)
    for row in rows("map.md"):
        keys = [tuple(entry.split(":")) for entry in re.findall(r"`([^`]+)`", row[2])]
        for key in keys:
            home.setdefault(key, min(re.search(r"\d", row[0])[0], "5"))
            functions.setdefault(key, []).append(row)
        link = f"chapter_{home[keys[0]]}.html#{ANCHOR.sub('-', row[0])}"
        what = f"<td>{prose(row[1])}<td><code>{keys[0][1]}</code>"
        index += f'<tr><td><a href="{link}">{typeset(row[0])}</a>{what}\n'
    written = {"index.html": page("Equations", f"<table>{index}</table>")}
    for number, title in TITLES.items():
        keys = [key for key in functions if home[key] == number]
        parts = [section(*key, functions[key], errata, tests) for key in keys]
        written[f"chapter_{number}.html"] = page(f"Chapter {number}: {title}", "\n".join(parts))
    return written


if __name__ == "__main__":
    for name, text in pages().items():
        (ROOT / "docs" / "book" / name).write_text(text)

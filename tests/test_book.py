"""The book: its pages are those of the code, every equation is on one, and formulas are set."""

import re

import book
import pytest
from test_readme import MAP, NUMBERED, ROOT

PAGES = book.pages()


def test_the_committed_pages_are_those_of_the_code():
    folder = ROOT / "docs" / "book"
    assert {path.name for path in folder.glob("*.html")} == set(PAGES)
    for name, text in PAGES.items():
        assert (folder / name).read_text() == text, "run python docs/book.py"


def test_every_entry_of_the_index_leads_to_its_place():
    links = re.findall(r'<td><a href="(\w+\.html)#([^"]+)"', PAGES["index.html"])
    assert len(links) == len(MAP)
    for page, anchor in links:
        assert f'<a id="{anchor}"></a>' in PAGES[page]
    anchors = {anchor for _, anchor in links}
    assert {number.replace(".", "-") for number in NUMBERED} <= anchors


def test_every_link_to_a_file_leads_to_one():
    for text in PAGES.values():
        for link in re.findall(r'href="([^"#]+)', text):
            assert (ROOT / "docs" / "book" / link).exists(), link


@pytest.mark.parametrize(
    "plain, html",
    [
        ("x_{t-1} ~ N(0, I)", "x<sub>t-1</sub> ~ N(0, I)"),
        ("sqrt(1 - beta_t)", '√<span class="root">1 − β<sub>t</sub></span>'),
        (
            "sqrt((1 - a) sqrt(b))",
            '√<span class="root">(1 − a) √<span class="root">b</span></span>',
        ),
        ("alpha_bar_t + beta_tilde_t", "α\u0304<sub>t</sub> + β\u0303<sub>t</sub>"),
        ("sum_{t>=2} Sigma^(1/2) x^2", "∑<sub>t≥2</sub> Σ<sup>1/2</sup> x<sup>2</sup>"),
        ("kl_weight, the integral of 2.8", "kl_weight, the integral of 2.8"),
        ("grad log p <= infinity -> a < b", "∇ log p ≤ ∞ → a &lt; b"),
    ],
)
def test_formulas_are_set(plain, html):
    assert book.typeset(plain) == html


def test_the_posterior_has_its_formula_code_erratum_and_tests():
    sections = re.findall(r"<section>.*?</section>", PAGES["chapter_3.html"], re.S)
    (text,) = (part for part in sections if "<code>Diffusion.posterior</code>" in part)
    assert '<a id="3-12"></a>' in text and "μ\u0303<sub>t</sub> = √" in text
    assert "self.at(self.beta_tilde, t, x_t)" in text and '"""' not in text
    assert "<b>E27</b>, below 3.12. Printed: the factor √" in text
    assert "test_eq_3_12_posterior_mean_tower_rule" in text

"""A figure as SVG to stand inside a page: its colours are the page's, its text is text, and it is small."""

import re
from collections.abc import Iterator, Mapping
from xml.etree.ElementTree import Element, fromstring, tostring

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"

INK, GRID, SURFACE = "#000001", "#000002", "#000003"
SERIES = ("#00000a", "#00000b", "#00000c")
_VARIABLES = {INK: "--ink", GRID: "--grid", SURFACE: "--surface"} | {
    colour: f"--series-{k}" for k, colour in enumerate(SERIES, 1)
}
"""What a plot is drawn in, and the page's custom properties that stand for it."""

_LEFT_OUT = ("font", "stroke-line", "stroke-dashoffset: 0", "text-anchor: start")  # it is so without
_ANCHORS = {"text-anchor:middle": "m", "text-anchor:end": "e"}  # classes of the page's style


def inlined(
    drawn: str,  # as Matplotlib writes it
) -> str:
    """The drawing as one element without ids, background, comments, metadata and fonts."""
    root = fromstring(drawn)
    marks = {f"#{path.get('id')}": path for path in root.iter(f"{_SVG}path") if path.get("id")}
    svg = Element("svg", {"viewBox": root.attrib["viewBox"], "aria-hidden": "true"})  # the figure around it has words
    grid: Element | None = None
    for element in _drawn_in(root, marks):
        if element.get("style") != f"fill:none;stroke:var({_VARIABLES[GRID]});stroke-width:0.6":
            svg.append(element)
        elif grid is None:
            svg.append(grid := element)
        else:
            grid.set("d", grid.attrib["d"] + element.attrib["d"])  # all its lines are one path
    return tostring(svg, encoding="unicode")


def _drawn_in(parent: Element, marks: Mapping[str, Element]) -> Iterator[Element]:
    """What is to be seen, in order, without the groups that it stands in."""
    for child in parent:
        match child.tag.removeprefix(_SVG) if isinstance(child.tag, str) else "comment":
            case "g":
                yield from _drawn_in(child, marks)
            case "path":
                yield Element("path", _style(child) | {"d": _short(child.attrib["d"])})
            case "text":
                text = Element("text", {name: _rounded(child.attrib[name]) for name in ("x", "y")})
                style = _style(child).get("style", "").replace(f"fill:var({_VARIABLES[INK]})", "").strip(";")
                if style:
                    text.set(*(("class", _ANCHORS[style]) if style in _ANCHORS else ("style", style)))
                if not child.get("transform", "rotate(-0").startswith("rotate(-0"):
                    text.set("transform", _rounded(child.attrib["transform"]))
                text.text = child.text
                yield text
            case "use":
                yield _mark(child, _short(marks[child.attrib[_HREF]].attrib["d"]))


def _mark(use: Element, outline: str) -> Element:
    x, y = (_rounded(use.attrib[name]) for name in ("x", "y"))
    if "C" in outline:  # only circles are curved
        return Element("circle", _style(use) | {"cx": x, "cy": y, "r": outline.split()[1]})
    return Element("path", _style(use) | {"transform": f"translate({x} {y})", "d": outline})


def _style(element: Element) -> dict[str, str]:
    parts = [part.strip() for part in element.get("style", "").split(";")]
    style = ";".join(_coloured(part) for part in parts if part and not part.startswith(_LEFT_OUT))
    return {"style": style} if style else {}


def _coloured(declaration: str) -> str:
    name, value = (part.strip() for part in declaration.split(":", 1))
    return f"{name}:var({_VARIABLES[value]})" if value in _VARIABLES else f"{name}:{_rounded(value)}"


def _rounded(text: str) -> str:
    return re.sub(r"-?\d+\.\d+", lambda found: f"{float(found.group()):.1f}".removesuffix(".0"), " ".join(text.split()))


def _short(path: str) -> str:
    """A path to one decimal; after an M or L further points need no letter."""
    return re.sub(r"(?<=\d) L ", " ", _rounded(path)).replace("M ", "M")

"""A page from a template: style and script inside it, everything else escaped, and nothing to be fetched."""

import base64
import hashlib
from pathlib import Path
from typing import Any

_TEMPLATES = Path(__file__).parent / "templates"


def page(template: str, **context: Any) -> str:
    """The template filled in. Text is escaped unless it is `Markup`; a name that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(_TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["dotted"] = lambda name: Markup(".<wbr>").join(name.split("."))  # where a long name may break
    environment.filters["drawn"] = Markup  # an SVG of our own
    style, script = (_TEMPLATES.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # the only script that may run
    parts = {"style": Markup(style), "script": Markup(script), "script_digest": Markup(digest)}
    text = environment.get_template(template).render(**parts, **context)
    return text.encode("utf-8", "replace").decode()  # a name may hold half a surrogate pair, which no file can

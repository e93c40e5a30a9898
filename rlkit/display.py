"""How a figure is shown and kept: one output bundle, one pair of files.

GitHub runs no JavaScript and shows the PNG of a bundle; JupyterLab swaps in the live plotly figure.
Both come from one ``display_data`` output, which is also what nbval compares.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from rlkit import paths
from rlkit.theme import HEIGHT, OVERRIDE_NOTE, PALETTE, WIDTH, add_note, overridden

CONFIG = {"showSendToCloud": False, "displaylogo": False, "responsive": True}
"""plotly 7 puts a button into every figure that uploads it to a cloud; this takes it out."""
SCALE = 2
PNG_SECONDS = 60.0
"""Give up on a picture after this long: a hanging browser must not hang a study."""


def describe(fig: go.Figure, name: str, caption: str | None = None) -> str:
    """The figure as one stable sentence for readers without pictures and for nbval.

    Holds no trained numbers, which differ between processors.
    """
    if caption:
        return f"Figure {name}: {caption}"

    def plain(text: str | None) -> str:
        for tag in ("<b>", "</b>", "<i>", "</i>"):
            text = (text or "").replace(tag, "")
        return (text or "").replace("<br>", " ")

    sentence = f"Figure {name}: {plain(fig.layout.title.text)}"
    axes = [*fig.select_yaxes(), *fig.select_xaxes()]
    parts = {
        "axes": [plain(axis.title.text) for axis in axes if axis.title.text],
        "series": [t.name for t in fig.data if t.name and t.showlegend is not False],
        "rows": [plain(t) for axis in axes for t in axis.ticktext or () if not t.isdigit()],
    }
    for part, texts in parts.items():
        if texts:
            sentence += f" | {part}: {'; '.join(dict.fromkeys(texts))}"
    return sentence


def to_data(fig: go.Figure) -> dict[str, Any]:
    """The figure as plain JSON data, without the random uids."""
    data: dict[str, Any] = json.loads(pio.to_json(fig, remove_uids=True))
    return data


def show(
    fig: go.Figure,
    name: str,
    caption: str | None = None,
    *,
    runs: Sequence[Path | str] = (),
    folder: Path | str | None = None,
) -> None:
    """Write ``<name>.png`` and ``<name>.json`` and display the figure as one bundle.

    Args:
        fig: the figure. name: file name without ending: letters, digits, ``_`` and ``-``.
        caption: stable text for ``text/plain``; default a sentence made from titles and series.
        runs: run folders behind the numbers. If one was trained with ``allow_exploitable``, the
            figure says so. Figures drawn from run folders do this by themselves.
        folder: default ``paths.figures_dir()``.

    Without Chromium the PNG is left out and one line on stderr says so, once per process.
    """
    if not name or not all(c.isalnum() or c in "_-" for c in name):
        raise ValueError(f"name={name!r}: expected letters, digits, '_' and '-' (a file name)")
    if overridden(runs):
        add_note(fig, OVERRIDE_NOTE, color=PALETTE[1])
    data = to_data(fig)
    text = describe(fig, name, caption)
    data["layout"]["meta"] = {**data["layout"].get("meta", {}), "name": name, "text": text}
    target = Path(folder) if folder is not None else paths.figures_dir()
    target.mkdir(parents=True, exist_ok=True)
    source = target / f"{name}.json"
    content = json.dumps(data, indent=1, sort_keys=True) + "\n"
    changed = not source.is_file() or source.read_text(encoding="utf-8") != content
    _write(source, content.encode())
    picture = png(data)
    image = target / f"{name}.png"
    if picture is not None:
        _write(image, picture)
    elif changed:
        image.unlink(missing_ok=True)  # an old picture must not stand beside new numbers
    _display(data, picture, text)


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content)
    aside.replace(path)


def _display(data: dict[str, Any], picture: bytes | None, text: str) -> None:
    from IPython.core.getipython import get_ipython
    from IPython.display import publish_display_data

    if get_ipython() is None:  # a plain script: no front end that could draw
        print(text)
        return
    bundle: dict[str, Any] = {
        "application/vnd.plotly.v1+json": {**data, "config": CONFIG},
        "text/plain": text,
    }
    if picture is not None:
        bundle["image/png"] = base64.b64encode(picture).decode()
    publish_display_data(bundle)


# --- PNG ------------------------------------------------------------------------------------------


def browser() -> str | None:
    """Path of the Chromium that would draw pictures, None if there is none."""
    from choreographer.browsers.chromium import Chromium

    path = os.environ.get("BROWSER_PATH") or Chromium.find_browser(skip_local=False)
    return path if path and Path(path).exists() else None


class _Renderer:
    """One Chromium for the whole process, behind an event loop in a thread of its own.

    kaleido's own server waits forever once its browser is gone; here every wait has an end and
    every failure arrives where it was caused.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        # The watchdog of a browser that dies warns in a thread of its own, before or after ``png``
        # gives the reason; what matters arrives as an exception.
        logging.getLogger("choreographer").setLevel(logging.ERROR)
        self.kaleido = self._wait(self._open())
        atexit.register(self._close)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PNG_SECONDS)

    async def _open(self) -> Any:
        from kaleido import Kaleido

        kaleido = Kaleido(n=1, timeout=PNG_SECONDS, mathjax=False)
        await kaleido.open()
        return kaleido

    def draw(self, data: dict[str, Any]) -> bytes:
        layout = data["layout"]
        options = {
            "format": "png",
            "scale": SCALE,
            "width": layout.get("width", WIDTH),
            "height": layout.get("height", HEIGHT),
        }
        figure = {"data": data["data"], "layout": layout}
        picture: bytes = self._wait(self.kaleido.calc_fig(figure, opts=options))
        return picture

    def _close(self) -> None:
        with contextlib.suppress(Exception):  # the process ends; nobody is left to tell
            self._wait(self.kaleido.close())


class _Export:
    """The renderer of this process, made when first needed, and whether it still works."""

    renderer: _Renderer | None = None
    off = False


def png(data: dict[str, Any]) -> bytes | None:
    """Render figure data at the size in its layout; None where that is impossible.

    ``RLKIT_PNG=0`` turns it off. Never raises for a missing or failing browser: the reason is said
    in one line, once, and later figures have no picture.
    """
    if _Export.off or os.environ.get("RLKIT_PNG") == "0":
        return None
    reason = "no Chromium found; install chromium or set BROWSER_PATH"
    if _Export.renderer is not None or browser() is not None:
        try:
            _Export.renderer = _Export.renderer or _Renderer()
            return _Export.renderer.draw(data)
        except Exception as error:  # whatever a browser can do wrong, the study goes on
            text = str(error.args[0] if error.args else "").partition("\n")[0]
            reason = f"Chromium failed ({type(error).__name__}: {text})"
    _Export.off = True
    print(f"PNG export is off: {reason}", file=sys.stderr)
    return None


def regenerate(folder: Path | str | None = None) -> list[str]:
    """Draw every ``*.json`` figure of a folder again as PNG; returns the names drawn.

    A JSON file that is no figure raises ValueError. Returns [] where pictures cannot be made.
    """
    target = Path(folder) if folder is not None else paths.figures_dir()
    drawn: list[str] = []
    for source in sorted(target.glob("*.json")):
        data = json.loads(source.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not {"data", "layout"} <= set(data):
            raise ValueError(f"{source.name} is no figure: expected the keys 'data' and 'layout'")
        picture = png(data)
        if picture is None:
            return drawn
        _write(source.with_suffix(".png"), picture)
        drawn.append(source.stem)
    return drawn

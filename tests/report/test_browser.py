"""The report in a browser: it fits narrow and wide pages, light and dark, and all its images load."""

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nemo_ext.neurons import NeuronSet
from nemo_ext.report.page import PromptImages, write_report
from nemo_ext.report.tables import ReportTable
from nemo_ext.results.record import Localization, Verdict

WIDTHS = (390, 1200)

# The page is shown in a frame of the wanted width, because a browser's window has a smallest width. The script is
# outside the page, whose own policy allows none.
FRAMES = """<!DOCTYPE html><meta charset="utf-8"><body>{frames}<script>
onload = () => {{
  const results = [...document.querySelectorAll("iframe")].map((frame) => {{
    const page = frame.contentDocument, width = frame.contentWindow.innerWidth;
    return {{
      width, scrollWidth: page.scrollingElement.scrollWidth,
      background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      images: page.images.length,
      missing: [...page.images].filter((image) => !image.complete || !image.naturalWidth).length,
    }};
  }});
  const text = document.createElement("pre");
  text.id = "results";
  text.textContent = JSON.stringify(results);
  document.body.append(text);
}};
</script>"""


def browser() -> str | None:
    """The executable of a Chromium, on the PATH or as playwright installs it; None if there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    installed = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache" / "ms-playwright"))
    return next((str(path) for path in sorted(installed.glob("chromium-*/chrome-linux*/chrome"))), None)


@pytest.fixture
def page(localization: Callable[..., Localization], verdict: Callable[..., Verdict], tmp_path: Path) -> str:
    """A report with everything in it, and with texts and numbers of seeds that are hard to fit."""
    layers = localization().layers
    history = tuple((240 // trial, 1 - 0.9 / trial) for trial in range(1, 120))
    wide = verdict((0.9,) * 10, (0.7,) * 10, instead=("W" * 300, *[None] * 9), originals_after=(0.1,) * 10)
    results = [
        localization("W" * 300, verdict=wide, history=history, notes=("W" * 300,)),
        localization("several words " * 40, verdict=verdict(), neurons=NeuronSet({layers[0]: range(90)})),
        localization(memorized=False, verdict=verdict()),
        *[localization(neurons=NeuronSet({layer: [i] for layer in layers}), certificate=None) for i in range(20)],
    ]
    image = Image.new("RGB", (512, 512), "red")
    images = {0: PromptImages(image, dict.fromkeys(range(1, 11), image)), 1: PromptImages(image, {1: image})}
    table = ReportTable("W" * 100, "A caption.", ["W" * 60] * 4, [["W" * 60] * 4])
    return write_report(tmp_path / "report.html", results, images=images, tables=[table]).read_text(encoding="utf-8")


def measured(page: str, folder: Path, *, dark: bool) -> list[dict[str, Any]]:
    """Show a page in a browser in each of `WIDTHS`, and measure it."""
    executable = browser()
    if executable is None:
        pytest.skip("there is no Chromium: neither chromium, chromium-browser, google-chrome nor playwright's")
    source = html.escape(page)
    frames = "".join(f'<iframe style="width:{width}px;border:0" srcdoc="{source}"></iframe>' for width in WIDTHS)
    (folder / "frames.html").write_text(FRAMES.format(frames=frames), encoding="utf-8")
    options = ["--headless", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--hide-scrollbars"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=10000"]
    address = (folder / "frames.html").as_uri()
    done = subprocess.run(
        [executable, *options, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
    )
    shown = re.search(r'<pre id="results">(.*?)</pre>', done.stdout, re.DOTALL)
    assert shown, done.stderr[-2000:]
    results: list[dict[str, Any]] = json.loads(html.unescape(shown[1]))
    return results


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_its_width_and_all_images_load(page: str, tmp_path: Path, dark: bool) -> None:
    results = measured(page, tmp_path, dark=dark)
    assert [one["width"] for one in results] == list(WIDTHS)
    for one in results:
        assert one["scrollWidth"] <= one["width"]
        assert one["images"] > 10
        assert one["missing"] == 0
        red = int(re.findall(r"\d+", one["background"])[0])
        assert red < 64 if dark else red > 192

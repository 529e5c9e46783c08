"""Reports: everything is said, nothing is loaded, no name is markup; and in a browser, where there is one."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from test_inspection import MIXED

import quantplan
from quantplan import inspect_checkpoint
from quantplan.cli import run
from quantplan.engine.verify import verify
from quantplan.errors import QuantplanError
from quantplan.report.applied import apply_page
from quantplan.report.charts import Bar, Cell, bar_chart, grid_chart, pareto, place_of
from quantplan.report.compared import comparison_page
from quantplan.report.inspected import inspection_page
from quantplan.report.svg import inline, standalone

EVIL = "<img src=x onerror=alert(1)>"
VOID = {"meta", "wbr", "br", "img", "link", "input", "hr"}


def timing(factor: float) -> dict[str, Any]:
    return {"tokens": 128, "runs": 5, "median_ms": 101.5 * factor, "p10_ms": 97.25 * factor, "p90_ms": 133.0 * factor,
            "tokens_per_second": 1261.1 / factor}  # fmt: skip


def model(name: str, size: int, kl: float | None) -> dict[str, Any]:
    return {
        "name": name, "path": f"/models/{name}", "size": size, "bits_per_weight": size / 1e7, "bits_per_quantized_weight": 4.25,
        "scheme": f"{name} scheme", "load_seconds": 1.25, "memory_loaded": size * 2, "peak_memory": size * 3,
        "prefill": timing(1.0), "decode": timing(2.0), "perplexity": 17.125 + (kl or 0), "perplexity_error": 0.25,
        "kl": kl,
        "kl_error": None if kl is None else 0.002, "top1": 0.8125, "top1_error": 0.003, "top5": 0.9375, "top5_error": 0.001,
        "weight_mse": 1.5e-4,
    }  # fmt: skip


COMPARISON: dict[str, Any] = {
    "reference": "float", "data": "/texts/eval.txt", "windows": 10,
    "machine": {"processor": "Imaginary 9000", "cores": 2, "threads": 1, "torch": "2.13", "quantplan": "0.1.0"},
    "models": [model("float", 269_000_000, None), model("int4", 116_800_000, 0.0907), model("int8", 166_800_000, 0.0146),
               model("worse", 170_000_000, 0.5)],
}  # fmt: skip


class Parsed(HTMLParser):
    """Elements with their attributes, and the text of each kind."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.raw: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("style", "script"):
            self.raw[self._open[-1]] = self.raw.get(self._open[-1], "") + data
        else:
            self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint with a hostile module, its output, and the report of it."""
    folder = tmp_path_factory.mktemp("report")
    hostile = {f"model.layers.0.{EVIL}.weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()}
    source = checkpoints.llama(folder / "model", change=hostile)
    plan = folder / "plan.yaml"
    plan.write_text(f"# {EVIL} & </script><script>alert(2)</script> $x_1$\n{json.dumps(MIXED)}\n")
    report = quantplan.apply(source, plan, folder / "out")
    page = apply_page(folder / "out", source, report)
    return {"source": source, "out": folder / "out", "plan": plan, "report": report, "page": page}


@pytest.fixture(scope="module")
def pages(made: dict[str, Any]) -> dict[str, str]:
    data = deepcopy(COMPARISON)
    data["models"][1]["name"] = data["models"][1]["scheme"] = data["machine"]["processor"] = EVIL
    inspection = inspect_checkpoint(made["out"], made["source"])
    return {
        "apply": made["page"],
        "bare": apply_page(made["out"]),
        "compare": comparison_page(data),
        "inspect": inspection_page(inspection),
    }


@pytest.mark.parametrize("name", ["apply", "bare", "compare", "inspect"])
def test_a_page_has_no_markup_but_its_own_and_loads_nothing(pages: dict[str, str], name: str) -> None:
    found = Parsed(pages[name])
    tags = [tag for tag, _ in found.elements]
    assert tags.count("script") == tags.count("style") == 1
    assert not {"img", "link", "iframe", "object", "embed", "form", "base", "image", "foreignobject", "a"} & set(tags)
    for tag, attributes in found.elements:
        for attribute, value in attributes.items():
            assert not attribute.startswith("on") and attribute not in ("style", "src", "action"), (tag, attribute)
            if "href" in attribute:
                assert (value or "").startswith("#")
            if not attribute.startswith("xmlns"):
                assert not re.search(r"https?:|//[a-z]", value or ""), (tag, attribute, value)
    assert not re.search(r"url\((?!#)|@import|https?:", found.raw["style"] + found.raw["script"])
    assert EVIL in found.text  # as text


@pytest.mark.parametrize("name", ["apply", "bare", "compare", "inspect"])
def test_the_policy_allows_what_is_in_the_page_and_nothing_else(pages: dict[str, str], name: str) -> None:
    found = Parsed(pages[name])
    [policy] = [a["content"] for tag, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in (policy or "").split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(found.raw[kind].encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"


@pytest.mark.parametrize("name", ["apply", "bare", "compare", "inspect"])
def test_a_page_is_accessible_and_its_charts_do_not_clash(pages: dict[str, str], name: str) -> None:
    found = Parsed(pages[name])
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in found.elements:
        for value in attributes.values():
            for target in re.findall(r"^#([\w-]+)$|url\(#([\w-]+)\)", value or ""):
                if value and not re.fullmatch("#[0-9a-f]{6}", value):
                    assert "".join(target) in ids
    tags = [tag for tag, _ in found.elements]
    charts = [a for tag, a in found.elements if tag == "svg"]
    assert charts and all(a["role"] == "img" and a["aria-label"] and a.get("viewbox") for a in charts)
    assert len(charts) == 2 * tags.count("figure") == 2 * tags.count("figcaption")
    assert all(a.get("scope") in ("col", "row") for tag, a in found.elements if tag == "th")
    assert all(a["aria-sort"] in ("none", "ascending", "descending") for tag, a in found.elements if a.get("scope") == "col")
    assert [tag for tag in tags if tag in ("html", "main", "h1")] == ["html", "h1", "main"]


def test_the_report_of_an_apply_says_everything(made: dict[str, Any]) -> None:
    text = Parsed(made["page"]).text
    report, record = made["report"], json.loads((made["out"] / "quantplan.json").read_text())
    for assignment in report.resolution.assignments.values():
        assert assignment.module.kind == "other" or assignment.name in text
    for layer in verify(made["out"], made["source"]).layers:
        assert f"{layer.snr:.2f}" in text
    for fact in (f"{report.seconds:.1f} s", record["versions"]["torch"], "int4 group 32", "fp8 channel, activations fp8 token"):
        assert fact in text
    for file in (*record["source"]["files"].values(), *record["files"].values()):
        assert file["header_sha256"] in text
    for line in made["plan"].read_text().splitlines():
        assert line in text
    for origin in ("plan.yaml:2:", "default", "dtype of the source"):
        assert origin in text
    assert str(made["plan"].parent) not in made["page"]  # no folder of the machine


def test_the_steps_of_the_size_add_up(made: dict[str, Any]) -> None:
    from quantplan.report.sizes import treatment_sizes

    sizes = treatment_sizes(made["report"].resolution)
    source, out = quantplan.read_checkpoint(made["source"]), quantplan.read_checkpoint(made["out"])
    assert sum(t.before for t in sizes) == source.size
    assert sum(t.after for t in sizes) == out.size
    assert {t.treatment for t in sizes if not t.quantized} >= {"kept (embeddings)", "other tensors"}


def test_a_report_without_the_source_says_what_it_needs(pages: dict[str, str]) -> None:
    text = Parsed(pages["bare"]).text
    assert "Errors need the source." in text and "int4 group 32" in text and "saturated" in text


def test_every_figure_of_a_comparison_is_in_its_page() -> None:
    text = Parsed(comparison_page(COMPARISON)).text
    for shown in (
        *(
            "Imaginary 9000",
            "int4 scheme",
            "0.09070 ± 0.00452",
            "17.216 ± 0.566",
            "81.25 % ± 0.68 %",
            "93.75 % ± 0.23 %",
            "0.00015",
        ),
        *(
            "116.8 MB",
            "4.250",
            "11.680",
            "1,261.1",
            "630.5",
            "101.5",
            "203.0",
            "1.25",
            "233.6 MB",
            "350.4 MB",
            "eval.txt",
            "−57 %",
        ),
    ):
        assert shown in text, shown
    assert "closer: int4, int8." in text  # the front


@pytest.mark.parametrize("absent", ["kl", "perplexity", "prefill", "memory_loaded", "bits_per_quantized_weight"])
def test_what_was_not_measured_is_left_out(absent: str) -> None:
    data = deepcopy(COMPARISON)
    for each in data["models"]:
        each[absent] = None
    text = Parsed(comparison_page(data)).text
    assert "None" not in text and "nan" not in text.lower().replace("dominant", "")
    data["data"], data["models"] = None, data["models"][:1]
    assert "0 models compared" in Parsed(comparison_page(data)).text


def test_a_comparison_without_models_is_refused() -> None:
    with pytest.raises(QuantplanError) as caught:
        comparison_page({"models": []})
    assert caught.value.problems[0].code == "QP105"


def test_the_front_holds_what_nothing_beats() -> None:
    points = pareto([("a", 1, 5), ("b", 2, 5), ("c", 3, 1), ("d", 3, 2), ("e", 9, 0.5)])
    assert [p.label for p in points if p.best] == ["a", "c", "e"]


def test_a_module_has_a_place_by_its_first_number() -> None:
    assert place_of("model.layers.3.mlp.experts.17.up_proj") == ("model.layers", 3, "mlp.experts.*.up_proj")
    assert place_of("lm_head") is None


def test_of_several_experts_the_worst_is_shown() -> None:
    cells = [Cell(f"m.{b}.experts.{e}.w", e, f"{e}") for b in range(3) for e in (2, 1, 3)]
    chart = grid_chart(cells, "text", ("a", "b"), True, 330)
    assert chart is not None and set(chart.titles.values()) == {f"m.{b}.experts.1.w: 1" for b in range(3)}
    assert grid_chart([Cell("lm_head", 1, "")], "text", ("a", "b")) is None


def test_formulas_and_markup_in_names_are_text_in_charts() -> None:
    chart = bar_chart([Bar(f"$x_1$ {EVIL}\x00", 1.0, "\\frac{1}{2}")], 'a "text"')
    for svg in (standalone(chart), inline(chart, "c1-")):
        assert "$x_1$ &lt;img" in svg and "<img" not in svg and "\\frac{1}{2}" in svg and "\x00" not in svg
    assert "style=" not in inline(chart, "c1-") and "var(--accent)" in inline(chart, "c1-")


def test_apply_writes_the_report_beside_the_output(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["apply", str(made["source"]), str(made["plan"]), "-q", "-o"]
    assert run([*arguments, str(tmp_path / "a"), "--report", "--json"]) == 0
    path = Path(json.loads(capsys.readouterr().out)["report"])
    assert path == tmp_path / "a.report.html" and "<h1>a</h1>" in path.read_text()
    assert run([*arguments, str(tmp_path / "b")]) == 0
    assert checkpoints.tree(tmp_path / "a") == checkpoints.tree(tmp_path / "b")
    assert verify(tmp_path / "a", made["source"]).ok
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.report.html", "b"]


def test_a_missing_package_is_said_before_the_work(made: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["apply", str(made["source"]), str(made["plan"]), "-o", str(tmp_path / "out"), "--report"]
    code = f"import sys; sys.modules['jinja2'] = None; import quantplan.cli; sys.exit(quantplan.cli.run({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 4 and "QP405" in done.stderr and "quantplan[report]" in done.stderr
    assert not (tmp_path / "out").exists()


# in a browser

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--enable-logging=stderr")  # fmt: skip


@pytest.fixture
def browse(tmp_path: Path) -> Any:
    """A function that opens a page in Chromium and returns its output and what it logged."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on PATH")

    def open_page(page: str, *flags: str) -> tuple[str, str]:
        file = tmp_path / "page.html"
        file.write_text(page, "utf-8")
        home = [f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run([program, *FLAGS, *home, *flags, file.as_uri()], capture_output=True, text=True, timeout=120)
        return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    return open_page


def clicking(page: str, script: str) -> str:
    """A copy of a page that runs `script` too, allowed by its hash like the page's own."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = page.replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
    return allowed.replace("</body>", f"<script>{script}</script></body>")


@pytest.mark.parametrize("name", ["apply", "compare", "inspect"])
def test_a_browser_refuses_nothing_of_a_page_and_everything_else(pages: dict[str, str], name: str, browse: Any) -> None:
    dom, log = browse(pages[name], "--dump-dom")
    assert "<h1>" in dom and log == ""
    injected = pages[name].replace("</body>", "<script>document.title = 'broken'</script></body>")
    dom, log = browse(injected, "--dump-dom")
    assert "<title>broken" not in dom and "Content Security Policy" in log


def test_a_click_on_a_heading_sorts(browse: Any) -> None:
    page = comparison_page(COMPARISON)

    def order(clicks: str) -> tuple[list[str], list[str]]:
        find = "const by = (t) => [...document.querySelectorAll('thead button')].find((b) => b.textContent === t).click();"
        dom, log = browse(clicking(page, find + clicks), "--dump-dom")
        assert log == ""
        return re.findall(r'<th scope="row" class="name">([^<]+)</th>', dom), re.findall(
            r'scope="col" aria-sort="(\w+ending)"', dom
        )

    assert order("") == (["float", "int4", "int8", "worse"], [])
    assert order("by('KL')") == (["worse", "int4", "int8", "float"], ["descending"])  # not measured: last
    assert order("by('KL'); by('KL')") == (["int8", "int4", "worse", "float"], ["ascending"])
    assert order("by('size')") == (["float", "worse", "int8", "int4"], ["descending"])
    assert order("by('size'); by('model')") == (["float", "int4", "int8", "worse"], ["ascending"])


def test_a_page_is_light_and_dark_and_prints(pages: dict[str, str], browse: Any, tmp_path: Path) -> None:
    from PIL import Image

    corners = []
    for scheme in ("1", "0"):
        shot = tmp_path / f"{scheme}.png"
        browse(
            pages["apply"], "--window-size=1000,800", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}"
        )
        corners.append(Image.open(shot).convert("L").getpixel((3, 3)))
    assert corners[0] == 255 and corners[1] < 40
    browse(pages["apply"], "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", pdf)) > 1
    width, height = map(float, re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf)[0])
    assert (round(width), round(height)) == (595, 842)  # A4


def test_a_narrow_page_does_not_scroll_sideways(pages: dict[str, str], browse: Any) -> None:
    for name, page in pages.items():
        script = "document.title = document.documentElement.scrollWidth - document.documentElement.clientWidth;"
        for width in (500, 1280):
            dom, _ = browse(clicking(page, script), f"--window-size={width},900", "--dump-dom")
            assert re.search("<title>(.+?)</title>", dom)[1] == "0", (name, width)  # type: ignore[index]


@pytest.mark.engine
def test_the_report_of_smollm2(tmp_path: Path) -> None:
    smollm2 = os.environ.get("QUANTPLAN_SMOLLM2")
    if not smollm2:
        pytest.skip("set QUANTPLAN_SMOLLM2")
    plan = Path(__file__).parent.parent / "configs" / "mixed.yaml"
    assert run(["apply", smollm2, str(plan), "-o", str(tmp_path / "out"), "--report", "-q"]) == 0
    page = (tmp_path / "out.report.html").read_text("utf-8")
    text = Parsed(page).text
    for layer in verify(tmp_path / "out", smollm2).layers:
        assert f"{layer.name}: {layer.snr:.2f} dB" in text
    assert len(page) < 1_500_000

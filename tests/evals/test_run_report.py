"""The page about a run: whole, escaped, alone; curves that lie where their numbers are; folders in any state."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.evals.run_report import write_report
from latentgen.evals.run_report.charts import stage_charts
from latentgen.evals.run_report.curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    Axis,
    Line,
    chart,
    nice_ticks,
    smoothed,
    thinned,
    value_axis,
)
from latentgen.evals.run_report.page import duration
from latentgen.evals.run_report.read import Series, Stage, read_run
from latentgen.evals.run_report.strips import evenly, read_strips
from latentgen.pipelines.pictures import grid, save_png

EVIL = "a <script>alert('x')</script> & \"circle\""
COLOURS = ["red", "lime", "blue"]
RECIPE = {
    "name": "demo",
    "seed": 0,
    "data": {"holdout": 2},
    "autoencoder": {"train": {"steps": 40, "global_batch": 8}},
    "train": {"steps": 100, "global_batch": 4, "precision": "fp32"},
    "preview": {"prompts": [EVIL, "b"], "num": 2},
}


def write_lines(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(stage: str, kind: str, step: int, **values: Any) -> dict[str, Any]:
    return {"stage": stage, "kind": kind, "step": step, **values}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with something of everything; tests may read it but not change it."""
    run = tmp_path_factory.mktemp("runs") / "demo"
    run.mkdir()
    lines = [line("vae", "train", s, loss=1.0 / s, steps_per_second=2.0, learning_rate=1e-3) for s in range(10, 41, 10)]
    for step in range(10, 81, 10):
        errors = {f"error/{k}": k + 100 / step for k in (1, 2, 3, 4)}
        lines.append(line("unet", "train", step, loss=-step / 7, grad_norm=1.5, steps_per_second=5.0, **errors))
        held_out = {
            "held_out/loss": step / 9,
            "held_out/loss_se": 0.25,
            "held_out/error/1": 2.0,
            "held_out/error/2": 3.0,
        }
        lines.append(line("unet", "validation", step, **held_out, **{"seen/loss": 0.5, "gap": 1.0}))
    lines.append(line("unet", "train", 70, loss=123.456))  # said again: the later line counts
    lines.append(line("unet", "guard", 50, what="gradient", examples=[EVIL, 7]))
    lines.append(line("unet", "preview", 80, psnr="inf"))
    write_lines(run, lines)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"stage": "unet", "ki')  # a kill in the middle of a line
    (run / "recipe.yaml").write_text(f"# latentgen 0, torch <b>\n{json.dumps(RECIPE)}\n")
    (run / "skipped.json").write_text(json.dumps({f"{EVIL}.png": "cut off", "b.png": "cut off", "c.png": "too small"}))
    (run / "starts.json").write_text(json.dumps([{"started": "then", "examples": 1234, "device": "CPU"}] * 2))
    (run / "shapes-score").mkdir()
    (run / "shapes-score/shapes.json").write_text(json.dumps({"score": 0.875, "rows": [{"category": EVIL, "n": 3}]}))
    (run / "stages/vae").mkdir(parents=True)
    for step, colour in zip((0, 40, 80), COLOURS, strict=True):
        pictures = [Image.new("RGB", (16, 16), name) for name in (colour, "black", "white", "black")]
        prompts = RECIPE["preview"]["prompts"]
        layout = {"captions": prompts, "columns": 2} if step else None  # the first from before sheets said it
        save_png(grid(pictures, 2, prompts, scale=8), run / f"samples/unet/{step:08d}.png", recipe=layout)
    (run / "samples/unet/00000090.png").write_bytes(b"not a picture")
    return run


@pytest.fixture(scope="module")
def page(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(demo, tmp_path_factory.mktemp("page") / "page.html").read_text()


class Reader(HTMLParser):
    """Checks that tags are closed in order, and collects what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_alone_and_nothing_written_by_others_acts_in_it(page: str) -> None:
    reader = read(page)
    tags = [tag for tag, _ in reader.seen]
    assert tags.count("script") == 1
    assert page.count("<script") == 1
    assert "<b>" not in page.split("</style>")[0]
    for tag, attributes in reader.seen:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name}"
            assert name != "style"
            if name in ("src", "href"):
                assert value is not None
                assert value.startswith(("data:image/", "#")), value
    assert "http" not in page.replace("http-equiv", "")
    # the prompt, the picture's name, the category and the example are shown as they are written
    text = "".join(reader.text)
    assert text.count(EVIL) == 4, "prompt, picture, category, example"
    assert any(attributes.get("alt") == f"{EVIL}, step 80" for _, attributes in reader.seen)


def test_the_policy_allows_this_script_and_this_style_and_nothing_else(page: str) -> None:
    policy = next(a["content"] for tag, a in read(page).seen if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    for tag in ("script", "style"):
        inside = page.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_links_within_the_page_lead_somewhere(page: str) -> None:
    reader = read(page)
    ids = [attributes["id"] for _, attributes in reader.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {str(attributes["href"])[1:] for tag, attributes in reader.seen if tag == "a"}
    assert links
    assert links <= set(ids)
    clips = {attributes["clip-path"] for tag, attributes in reader.seen if "clip-path" in attributes}
    assert clips
    assert {str(clip)[5:-1] for clip in clips} <= set(ids)


def test_what_a_person_asks_for_is_there(page: str) -> None:
    text = " ".join(read(page).text)
    for wanted in (
        "not finished: U-Net, step 80 of 100",  # status
        "36 s",  # 40 steps at 2 and 80 at 5 a second
        "5 steps/s",
        "20 pictures/s",
        "1,234",  # examples
        "2 times",  # started
        "0.875",  # score
        "what gradient, examples",
        "psnr was not a finite number in 1 lines",
        "3 pictures were left out",
        "too small",
        "latentgen 0, torch <b>",  # versions
        "global_batch",  # the recipe
        "123.5",  # the line that came again
    ):
        assert wanted in text, wanted
    assert "cannot be read" not in text, "a cut last line is nothing to speak of"


def test_each_measurement_is_in_one_chart_and_validation_beside_training(demo: Path) -> None:
    _, unet = read_run(demo).stages
    charts = {
        chart.title: [(line.label, len(line.series.steps)) for line in chart.lines] for chart in stage_charts(unet)
    }
    assert charts == {
        "Loss": [("train", 8), ("held out", 8), ("training examples, averaged weights", 8)],
        "Gradient norm": [("train", 8)],
        "Speed, steps a second": [("train", 8)],
        "Squared error by noise level": [("1 cleanest", 8), ("2", 8), ("3", 8), ("4 noisiest", 8)],
        "Squared error by noise level (held out)": [("1 cleanest", 8), ("2 noisiest", 8)],
        "Held-out loss less that of training examples": [("validation", 8)],
    }
    _, held_out, seen = next(chart for chart in stage_charts(unet) if chart.title == "Loss").lines
    assert (held_out.spread, seen.spread) == ([0.25] * 8, None)


def test_a_strip_shows_one_prompt_step_by_step(demo: Path) -> None:
    strips = read_strips(demo / "samples/unet", "unet", RECIPE)
    assert [strip.caption for strip in strips] == [EVIL, "b"]
    assert [strip.steps for strip in strips] == [[0, 40, 80, 90]] * 2
    for strip, colours in zip(strips, (COLOURS, ["white"] * 3), strict=True):
        for uri, colour in zip(strip.pictures, colours, strict=False):
            assert uri is not None
            picture = Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
            expected = Image.new("RGB", (128, 128), colour)
            assert picture.tobytes() == expected.tobytes()
        assert strip.pictures[3] is None, "a sheet that cannot be opened is passed over"


def test_large_pictures_are_shrunk(tmp_path: Path) -> None:
    sheet = grid([Image.effect_noise((512, 512), 90).convert("RGB")], 1, ["x"])
    save_png(sheet, tmp_path / "00000001.png", recipe={"captions": ["x"], "columns": 1})
    ((uri,),) = [strip.pictures for strip in read_strips(tmp_path, "unet", {})]
    assert uri is not None
    assert len(uri) < 60_000
    assert max(Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))).size) == 192


@pytest.mark.parametrize("left", ["recipe.yaml", "metrics.jsonl"])
def test_half_a_run_has_a_page_too(left: str, demo: Path, tmp_path: Path) -> None:
    shutil.copy(demo / left, tmp_path / left)
    assert write_report(tmp_path) == tmp_path / "report.html"
    read((tmp_path / "report.html").read_text())


def test_odd_files_do_not_stop_the_page(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(demo, run)
    (run / "recipe.yaml").write_text("a: [1\n")
    (run / "skipped.json").write_text("{")
    (run / "starts.json").write_text("3")
    (run / "quarantine.json").write_text(json.dumps(["x.png"]))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(["[]", "nonsense", '{"stage": 3}', *lines]))
    text = " ".join(read(write_report(run).read_text()).text)
    assert "2 lines of metrics.jsonl cannot be read" in text
    assert "1 pictures were left out" in text


def test_a_finished_run_says_so(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(demo, run)
    (run / "model").mkdir()
    (run / "model/model_index.json").write_text("{}")
    text = " ".join(read(write_report(run).read_text()).text)
    assert "finished" in text
    assert "not finished" not in text


def test_what_is_no_run_folder_is_refused(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match=r"neither metrics\.jsonl nor recipe\.yaml"):
        write_report(tmp_path)
    with pytest.raises(UserError, match=r"a part of one; give .*demo"):
        write_report(demo / "samples")
    assert list(tmp_path.iterdir()) == []


NUMBERS = st.floats(-1e9, 1e9, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(NUMBERS, st.floats(1e-6, 1e9))
def test_ticks_are_round_even_and_inside(low: float, width: float) -> None:
    high = low + width
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    room = 1e-6 * (high - low)
    assert all(low - room <= tick <= high + room for tick in ticks)
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    assert max(gaps) - min(gaps) <= 1e-6 * max(gaps) + 1e-9 * abs(high)
    assert f"{gaps[0]:.0e}"[0] in "125"


@settings(max_examples=60, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=80), st.integers(1, 20))
def test_thinning_keeps_the_mean_and_the_last_step(values: list[float], points: int) -> None:
    series = Series(list(range(1, len(values) + 1)), values)
    thin = thinned(series, points)
    assert len(thin.steps) == min(len(values), points)
    assert thin.steps[-1] == len(values)
    assert min(values) <= min(thin.values) + 1e-3
    assert max(thin.values) <= max(values) + 1e-3
    if len(values) % len(thin.values) == 0:
        size = 1 + max(abs(value) for value in values)
        assert sum(thin.values) / len(thin.values) == pytest.approx(sum(values) / len(values), abs=1e-9 * size)


@settings(max_examples=40, deadline=None)
@given(NUMBERS, NUMBERS, st.integers(1, 200))
def test_smoothing_leaves_straight_lines_alone(start: float, slope: float, count: int) -> None:
    values = [start + slope * k for k in range(count)]
    size = abs(start) + abs(slope) * count + 1
    assert smoothed(values) == pytest.approx(values, abs=1e-8 * size)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40))
def test_curves_lie_where_their_numbers_are(values: list[float]) -> None:
    line = Line("x", Series(list(range(0, 10 * len(values), 10)), values))
    axis = value_axis([line])
    drawn = re.search(r'class="line c1"[^>]* points="([^"]*)"', chart("t", [line], name="n"))
    assert drawn is not None
    points = [tuple(map(float, pair.split(","))) for pair in drawn[1].split()]
    assert len(points) == len(values)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    last_x, last_y = points[-1]
    assert last_x == (pytest.approx(410, abs=0.1) if len(values) > 1 else 52)
    assert 10 - 0.1 <= last_y <= 192 + 0.1, "the last value is never outside"
    assert last_y == pytest.approx(axis.at(values[-1]), abs=0.06)
    for a, b in zip(zip(values, points, strict=True), zip(values[1:], points[1:], strict=True), strict=False):
        assert (b[0] - a[0]) * (a[1][1] - b[1][1]) >= -1e-9, "larger is higher"


def test_axes_are_logarithmic_where_numbers_span_orders() -> None:
    wide = Line("x", Series(list(range(100)), [10.0 ** (-k / 20) for k in range(100)]))
    assert value_axis([wide]).log
    axis = Axis(1e-4, 1.0, 200, 0, log=True)
    assert [axis.at(value) for value in (1e-4, 1e-2, 1.0)] == pytest.approx([200, 100, 0])
    assert axis.ticks() == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])
    outlier = Line("x", Series(list(range(100)), [1000.0] + [1.0 + 0.01 * k for k in range(99)]))
    assert value_axis([outlier]).high < 10, "one wild point does not flatten the rest"


def test_error_bars_are_within_the_picture() -> None:
    line = Line("x", Series([1, 2], [1.0, 2.0]), spread=[5.0, 0.5])
    axis = value_axis([line])
    assert axis.low <= -4.0
    assert axis.high >= 6.0
    assert chart("t", [line], name="n").count('class="bar') == 2


def test_small_things() -> None:
    assert [duration(s) for s in (0.2, 12, 200, 18720, 273600)] == [
        "0 s",
        "12 s",
        "3 min 20 s",
        "5 h 12 min",
        "3 d 4 h",
    ]
    assert evenly([1, 2, 3], 3) == [1, 2, 3]
    assert evenly(list(range(101)), 5) == [0, 25, 50, 75, 100]
    stage = Stage("x", None, None, {"train": {"steps_per_second": Series([10, 30], [1.0, 4.0])}}, False)
    assert stage.seconds == 15.0
    assert stage.step == 30


def test_sizes_of_pictures_are_drawn_true_to_scale(tmp_path: Path) -> None:
    write_lines(tmp_path, [line("vae", "train", 1, loss=1.0)])
    assert "Sizes of pictures" not in write_report(tmp_path).read_text()
    document = {
        "pictures": [[100, 50, 9, 0], [60, 120, 1, 1]],
        "shapes": [[64, 32, 9], [48, 96, 1]],
        "cut_off": 0.125,
    }
    (tmp_path / "sizes.json").write_text(json.dumps(document))
    page = write_report(tmp_path).read_text()
    reader = read(page)
    assert "12.5% of the pictures' area is cut off" in " ".join(reader.text)
    dots = [attrs for tag, attrs in reader.seen if tag == "circle" and "fill-opacity" in attrs]
    tall, wide = ({key: float(attrs[key] or 0) for key in ("cx", "cy", "r")} for attrs in dots)
    assert (tall["cx"] - LEFT) / (wide["cx"] - LEFT) == pytest.approx(50 / 120, abs=0.01)
    floor = HEIGHT - BOTTOM
    assert (floor - tall["cy"]) / (floor - wide["cy"]) == pytest.approx(100 / 60, abs=0.02)
    assert tall["r"] > wide["r"]


@pytest.mark.parametrize(
    "document",
    ["{", "[]", '{"pictures": []}', '{"pictures": [[1, 2, 3, 4]], "shapes": [[1, 1, 1]], "cut_off": 0}',
     '{"pictures": [["<b>", 2, 3, 0]], "shapes": [[1, 1, 1]], "cut_off": 0}'],
)  # fmt: skip
def test_a_file_of_sizes_that_is_none_is_passed_over(document: str, tmp_path: Path) -> None:
    write_lines(tmp_path, [line("vae", "train", 1, loss=1.0)])
    (tmp_path / "sizes.json").write_text(document)
    assert "Sizes of pictures" not in write_report(tmp_path).read_text()

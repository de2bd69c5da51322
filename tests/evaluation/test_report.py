"""report.html in a real browser: opened from the disk, sorted, filtered, narrow and printed."""

import json
import shutil
from collections import Counter
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import combinations, islice

import pytest
import torch
from markupsafe import escape
from PIL import Image
from playwright.sync_api import sync_playwright

from lit_align.data.decoder import decode, decode_pixels
from lit_align.data.images import to_planes
from lit_align.data.shards.layout import parse_sample, read_samples
from lit_align.evaluation.report import page as report
from lit_align.evaluation.report.page import make_templates, write_report
from lit_align.evaluation.report.sections import MINUS, decimals
from lit_align.evaluation.win_rates import compare
from lit_align.scoring.presets import load_scorers
from tests.support.paths import PAIRS, ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)")
COUNT = 12  # prompts
HOSTILE = "<script>alert(1)</script> \"& '</script> $title"
HOSTILE_MODEL = "<script>alert('model')\"&"
MODELS = ["base", "aligned", "half & half"]
NAMES = ["clip", "style", "colour"]


def make_images():
    """Use bundled pairs as drawn images: the rejected image for base, the chosen one (or base's) for aligned."""
    pairs = [parse_sample(sample) for sample in islice(read_samples(str(PAIRS / "held_out/00000.tar")), COUNT)]
    images = {model: [] for model in MODELS}
    for number, pair in enumerate(pairs):
        chosen, rejected = pair.image_0, pair.image_1
        if pair.label_0 < 0.5:
            chosen, rejected = rejected, chosen
        base, aligned = decode(rejected).convert("RGB"), decode(chosen).convert("RGB")
        images["base"].append(base)
        images["aligned"].append(base if number % 5 == 4 else aligned)
        images["half & half"].append(Image.blend(base, aligned, 0.5))
    return [pair.prompt for pair in pairs], images


def planes(path):
    return to_planes(decode_pixels(path.read_bytes()))


def make_results(folder, models):
    """Write the output of `lit-align test`, with scores of the bundled scorers."""
    prompts, images = make_images()
    for model in models:
        (folder / "images" / model).mkdir(parents=True)
        for number, image in enumerate(images[model]):
            image.save(folder / f"images/{model}/{number:05d}.png")
    scorers = load_scorers(NAMES, ROOT / "assets/emoji/scorers/scorers.yaml")
    scores = {
        name: {
            model: scorer.score(
                [planes(folder / f"images/{model}/{number:05d}.png") for number in range(COUNT)], prompts
            ).double()
            for model in models
        }
        for name, scorer in scorers.items()
    }
    tolerances = {"clip": 0.0, "style": 0.0, "colour": 0.5}
    comparisons = []
    for against, model in combinations(models, 2):
        ours, theirs = ({name: scores[name][which] for name in NAMES} for which in (model, against))
        comparisons.append({"model": model, "against": against, **asdict(compare(ours, theirs, tolerances))})
    prompts[3] = HOSTILE
    results = {
        "format": 2,
        "made_with": {"lit_align": "0.1.0", "torch": torch.__version__, "options": {"limit": 12, "batch_size": 8}},
        "sampling": {"sampler": "euler", "steps": 50, "guidance_scale": 7.5, "height": 32, "width": 32, "seed": 0},
        "prompts": [{"prompt": prompt, "seed": number} for number, prompt in enumerate(prompts)],
        "models": {
            model: {
                "repo": "assets/emoji/pipeline",
                "weights": None if model == "base" else f"runs/{model}",
                "fingerprint": f"{number:016x}",
            }
            for number, model in enumerate(models)
        },
        "scorers": {
            name: {"fingerprint": scorers[name].fingerprint(), "tie_tolerance": tolerances[name]} for name in NAMES
        },
        "scores": {name: {model: values.tolist() for model, values in scores[name].items()} for name in NAMES},
        "comparisons": comparisons,
    }
    (folder / "results.json").write_text(json.dumps(results))
    return results


@pytest.fixture(scope="session")
def three(tmp_path_factory, _scorers_path):
    folder = tmp_path_factory.mktemp("three models")
    return folder, make_results(folder, MODELS), write_report(folder)


@pytest.fixture(scope="session")
def two(tmp_path_factory, _scorers_path):
    folder = tmp_path_factory.mktemp("two")
    return folder, make_results(folder, MODELS[:2]), write_report(folder)


@pytest.fixture(scope="session")
def _scorers_path():
    """Work in the project, to which the paths of the bundled scorers are relative."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")  # not the session: other tests fork this process, and their children share its pipes
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Function that opens a file. Fails at the end after console output, network requests or blocked content."""
    contexts, faults = [], []

    def open_page(path, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("dialog", lambda dialog: faults.append(f"dialog: {dialog.message}"))
        page.on("requestfailed", lambda request: faults.append(f"failed: {request.url[:200]}"))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or faults.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def shown(page):
    """Numbers of the prompts in the long list, in its order."""
    return [
        int(number) for number in page.eval_on_selector_all("#cards > article", "all => all.map(a => a.dataset.number)")
    ]


def differences(results, scorer, comparison=0):
    names = results["comparisons"][comparison]
    scores = results["scores"][scorer]
    return [a - b for a, b in zip(scores[names["model"]], scores[names["against"]], strict=True)]


def by_difference(results, scorer, descending=False, comparison=0):
    values = differences(results, scorer, comparison)
    return sorted(range(COUNT), key=lambda number: (-values[number] if descending else values[number], number))


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@in_browser
def test_every_picture_is_shown(three, open_page):
    folder, _, path = three
    page = open_page(path)
    count = page.locator("img").count()
    assert count >= 2 * COUNT
    page.eval_on_selector_all("img", "all => all.forEach(i => i.scrollIntoView())")
    assert page.eval_on_selector_all("img", "async all => (await Promise.all(all.map(i => i.decode())), true)")
    assert page.eval_on_selector_all("img", "all => all.map(i => i.naturalWidth)") == [32] * count
    links = page.eval_on_selector_all("#cards a", "all => all.map(a => decodeURIComponent(a.pathname))")
    assert sorted(links) == sorted(
        str(folder / f"images/{model}/{number:05d}.png") for model in ("base", "aligned") for number in range(COUNT)
    )


@in_browser
@pytest.mark.parametrize("scorer", NAMES)
def test_sorted_by_any_scorer_both_ways(two, open_page, scorer):
    _, results, path = two
    page = open_page(path)
    assert shown(page) == list(range(COUNT))
    page.select_option("#sort", scorer)
    assert shown(page) == by_difference(results, scorer)
    page.click("#direction")
    assert shown(page) == by_difference(results, scorer, descending=True)
    page.select_option("#sort", "")
    assert shown(page) == list(reversed(range(COUNT)))


@in_browser
def test_worst_regressions_come_first(two, open_page):
    _, results, path = two
    page = open_page(path)
    page.select_option("#sort", "colour")
    page.click("#direction")
    page.click("#worst-first")
    assert shown(page) == by_difference(results, "colour")
    for scorer, section in zip(NAMES, page.locator("#worst > .scorer").all(), strict=True):
        losses = results["comparisons"][0]["scorers"][scorer]["losses"]
        assert f"{losses} of {COUNT}" in section.locator("h3").inner_text()
        numbers = [int(card.get_attribute("data-number")) for card in section.locator("article").all()]
        assert numbers == by_difference(results, scorer)[: min(4, losses)]
    section = next(one for one in page.locator("#worst > .scorer").all() if one.locator("button").count())
    scorer = section.locator("button").get_attribute("data-scorer")
    page.fill("#filter", "script")
    section.locator("button").click()
    assert shown(page) == by_difference(results, scorer)


@in_browser
def test_cards_say_scores_and_outcome(two, open_page):
    _, results, path = two
    page = open_page(path)
    marks = {"▲": "wins", "=": "ties", "▼": "losses"}
    counted = {name: dict.fromkeys(marks.values(), 0) for name in NAMES}
    for number, card in enumerate(page.locator("#cards > article").all()):
        for scorer, row in zip(NAMES, card.locator("tbody tr").all(), strict=True):
            name, before, after, marked = row.locator("th, td").all_inner_texts()
            assert name == scorer
            mark, difference = marked.split()
            counted[scorer][marks[mark]] += 1
            scores = [results["scores"][scorer][model][number] for model in ("base", "aligned")]
            digits = len(before.partition(".")[2])
            numbers = [float(text.replace(MINUS, "-")) for text in (before, after, difference)]
            assert numbers == pytest.approx([*scores, scores[1] - scores[0]], abs=0.51 * 10**-digits)
    outcomes = results["comparisons"][0]["scorers"]
    assert counted == {name: {kind: outcomes[name][kind] for kind in marks.values()} for name in NAMES}
    assert all(counted[name]["ties"] >= 2 for name in NAMES)  # prompts 4 and 9 have the same picture twice


@in_browser
def test_filter_keeps_prompts_with_the_words(two, open_page):
    _, results, path = two
    page = open_page(path)
    prompts = [entry["prompt"] for entry in results["prompts"]]
    word = prompts[0].split()[-1].upper()
    page.fill("#filter", f" {word} ")
    wanted = [number for number, prompt in enumerate(prompts) if word.lower() in prompt.lower()]
    assert 0 in wanted
    assert shown(page) == wanted
    assert page.locator("#count").inner_text() == f"{len(wanted)} of {COUNT} prompts"
    page.fill("#filter", "no prompt has this")
    assert shown(page) == []


@in_browser
def test_hostile_prompt_is_text(two, open_page):
    page = open_page(two[2])
    page.fill("#filter", "<script>")
    assert page.locator("#cards .prompt").all_inner_texts() == [HOSTILE]


@pytest.fixture(scope="session")
def hostile(tmp_path_factory, two):
    """A report whose model, scorer and options are hostile too; the model's name is that of a folder, without `/`."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(two[0] / "images", folder / "images")
    (folder / "images/aligned").rename(folder / "images" / HOSTILE_MODEL)
    text = json.dumps(two[1])
    for name, other in (("aligned", HOSTILE_MODEL), ("colour", HOSTILE)):
        text = text.replace(json.dumps(name), json.dumps(other))
    results = json.loads(text)
    results["made_with"]["options"][HOSTILE] = HOSTILE
    results["sampling"]["sampler"] = HOSTILE
    (folder / "results.json").write_text(json.dumps(results))
    return write_report(folder)


def test_no_name_becomes_html(hostile, two):
    """The page has the elements and attributes of a page with plain names."""

    def elements(path):
        found, parser = [], HTMLParser()
        parser.handle_starttag = lambda tag, attributes: found.append((tag, [name for name, _ in attributes]))
        parser.feed(path.read_text())
        return Counter(map(str, found))

    plain, found = elements(two[2]), elements(hostile)
    assert found["('script', [])"] == found["('script', ['type', 'id'])"] == 1
    more = found - plain
    assert not plain - found
    assert more == {"('dt', [])": 1, "('dd', [])": 1}  # the option's
    text = hostile.read_text()
    for name in (HOSTILE, HOSTILE_MODEL):
        assert name not in text
        assert str(escape(name)) in text


@in_browser
def test_hostile_names_are_text(hostile, open_page):
    page = open_page(hostile)
    assert page.locator("h1").inner_text() == f"{HOSTILE_MODEL} against base"
    assert page.locator(".rates tbody th").all_inner_texts() == ["clip", "style", HOSTILE, "macro-average"]
    page.select_option("#sort", HOSTILE)
    assert HOSTILE in page.locator("#cards > article").first.locator("tbody th").all_inner_texts()
    assert page.locator("#cards figcaption").all_inner_texts()[:2] == ["base", HOSTILE_MODEL]


@in_browser
def test_summary_has_the_numbers(two, open_page):
    _, results, path = two
    page = open_page(path)
    comparison = results["comparisons"][0]
    rows = page.locator(".rates tbody tr").all()
    for row, name in zip(rows, [*NAMES, "macro-average"], strict=True):
        outcome = comparison["scorers"].get(
            name, {key.removeprefix("macro_"): value for key, value in comparison.items()}
        ) | ({"win_rate": comparison["macro"]} if name == "macro-average" else {})
        low, high = outcome["interval"]
        assert row.locator("th").inner_text() == name
        assert f"{outcome['win_rate']:.1%}" in row.locator(".rate").inner_text().replace(" %", "%")
        assert row.locator(".interval").inner_text() == f"{100 * low:.1f} to {100 * high:.1f} %"
        counts = row.locator("td").all_inner_texts()[-3:]
        assert counts == [str(outcome[kind]) for kind in ("wins", "ties", "losses")]
        # Where dot and whisker are drawn, as shares of the plot's width.
        plot, dot, line = (row.locator(f"svg{part}").bounding_box() for part in ("", " circle", " .range"))
        assert (dot["x"] + dot["width"] / 2 - plot["x"]) / plot["width"] == pytest.approx(outcome["win_rate"], abs=0.01)
        ends = (line["x"] - plot["x"]) / plot["width"], (line["x"] + line["width"] - plot["x"]) / plot["width"]
        assert ends == pytest.approx((low, high), abs=0.015)  # round caps
    assert page.locator(".pairs").count() == 0
    assert not page.locator("#chooser").is_visible()


@in_browser
def test_comparison_can_be_chosen(three, open_page):
    _, results, path = three
    page = open_page(path)
    assert page.locator(".pairs tbody tr").count() == 3
    assert page.locator(".summary:visible").count() == 1
    page.select_option("#comparison", "2")
    assert page.locator(".summary:visible h2").inner_text() == "half & half against aligned"
    page.select_option("#sort", "style")
    assert shown(page) == by_difference(results, "style", comparison=2)
    assert page.locator("#cards figcaption").all_inner_texts()[:2] == ["aligned", "half & half"]


@in_browser
def test_summary_needs_no_script(three, open_page):
    page = open_page(three[2], java_script_enabled=False)
    assert page.locator(".summary:visible").count() == 3
    assert page.locator(".verdicts li").count() == 3
    assert page.locator("noscript").is_visible()


@in_browser
@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_is_wider_than_the_screen(three, open_page, width):
    page = open_page(three[2], viewport={"width": width, "height": 740})
    assert overflow(page) == 0
    for number in range(3):
        page.select_option("#comparison", str(number))
        assert overflow(page) == 0


@in_browser
def test_prints(three, open_page, tmp_path):
    page = open_page(three[2])
    page.pdf(path=tmp_path / "report.pdf", format="A4", prefer_css_page_size=True)
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    page.emulate_media(media="print")
    assert not page.locator(".controls").is_visible()
    assert page.eval_on_selector_all(".card", "all => all.every(a => getComputedStyle(a).breakInside === 'avoid')")


@in_browser
def test_many_prompts_come_in_parts(two, open_page, tmp_path):
    folder, results, _ = two
    times = 10
    many = results | {"prompts": results["prompts"] * times}
    many["scores"] = {name: {m: v * times for m, v in models.items()} for name, models in results["scores"].items()}
    for model in MODELS[:2]:
        (tmp_path / "images" / model).mkdir(parents=True)
        for number in range(COUNT * times):
            shutil.copy(
                folder / f"images/{model}/{number % COUNT:05d}.png", tmp_path / f"images/{model}/{number:05d}.png"
            )
    (tmp_path / "results.json").write_text(json.dumps(many))
    page = open_page(write_report(tmp_path))
    assert len(shown(page)) == 48
    page.click("#more")
    assert shown(page) == list(range(96))
    page.click("#all")
    assert shown(page) == list(range(COUNT * times))
    assert not page.locator("#more").is_visible()


@in_browser
def test_only_small_drawings_are_enlarged_in_squares(two, open_page, tmp_path, monkeypatch):
    """The drawn size decides: large images that are embedded small are photographs."""
    folder, results, path = two
    rendering = "all => [...new Set(all.map(i => getComputedStyle(i).imageRendering))]"
    assert open_page(path).eval_on_selector_all("img", rendering) == ["pixelated"]
    for file in folder.glob("images/*/*.png"):
        large = tmp_path / file.relative_to(folder)
        large.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((256, 256), Image.Resampling.BICUBIC).save(large)
    large = results | {"sampling": results["sampling"] | {"width": 256, "height": 256}}
    (tmp_path / "results.json").write_text(json.dumps(large))
    monkeypatch.setattr(report, "PIXELS", 64 * 64 * 2 * COUNT)
    page = open_page(write_report(tmp_path))
    page.eval_on_selector_all("img", "async all => (await Promise.all(all.map(i => i.decode())), true)")
    assert page.eval_on_selector_all("img", "all => [...new Set(all.map(i => i.naturalWidth))]") == [64]
    assert page.eval_on_selector_all("img", rendering) == ["auto"]


def test_missing_parts_are_named(two, tmp_path):
    folder = two[0]
    with pytest.raises(FileNotFoundError, match=r"results\.json is missing"):
        write_report(tmp_path)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "images/base/00007.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"base/00007\.png is missing"):
        write_report(copy)
    for text, found in (('{"format": 1}', "1"), ("[]", "None")):
        (copy / "results.json").write_text(text)
        with pytest.raises(ValueError, match=f"format is {found}, not 2"):
            write_report(copy)


def test_digits_and_verdict():
    assert [decimals(step) for step in (20, 1, 0.5, 0.01, 0.0099, 0)] == [0, 0, 1, 2, 3, 3]
    scorers = {
        "a": {"interval": [0.6, 0.7]},
        "b": {"interval": [0.3, 0.4]},
        "<c>": {"interval": [0.4, 0.6]},
        "d": {"interval": [0.55, 0.8]},
    }
    comparison = {"model": "new", "against": "old", "macro": 0.5312, "macro_interval": [0.51, 0.55], "scorers": scorers}
    assert make_templates().get_template("sections.html").module.verdict(comparison) == (
        '<li class="better">▲ <strong>new</strong> is better than <strong>old</strong>: macro-average win rate '
        "53.1 % (51.0 to 55.0 %); better by a and d, undecided by &lt;c&gt;, worse by b.</li>"
    )

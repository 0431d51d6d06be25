from __future__ import annotations

from html.parser import HTMLParser

import pytest

from fastrl.report import CompletionSample, CompletionsLog, JsonLines, MetricsLog, log_errors, write_report
from fastrl.report.html import MOST_SAMPLES, metric_curves
from fastrl.rewards import RewardError

HOSTILE = '</pre><script>alert(1)</script><img src=x onerror=alert(1)>" onload="x\x1b[2J\u202e\ud800'
ALLOWED = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "section",
        "h1",
        "h2",
        "h3",
        "p",
        "div",
        "span",
    ),
    *("b", "i", "figure", "figcaption", "svg", "line", "text", "polyline", "circle", "details", "summary", "pre"),
}


class Tags(HTMLParser):
    """Collects tags, attributes and text; counts what is left open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta" and (self.get_starttag_text() or "")[-2] != "/":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path, opened):
    folder = tmp_path / "<my run>"
    log = opened(MetricsLog(folder / "metrics.jsonl", clock=iter(range(0, 1000, 60)).__next__))
    for step in range(1, 4):
        log.write(
            step, {"reward": step / 4, "loss": float("nan"), HOSTILE: 1.0, "time/rollout": 3.0, "time/train": 1.0}
        )
    return folder


def test_a_report_holds_what_the_run_wrote(run, opened):
    sample = CompletionSample(
        [{"role": "user", "content": "2+2?"}], "<b>4</b>", {"numeric": 1.0, "judge": None}, 0.75, -0.5
    )
    opened(CompletionsLog(run / "completions.jsonl")).write(3, [sample])
    log_errors(opened(JsonLines(run / "errors.jsonl")), 2, {"judge": RewardError(4, "Traceback: 503")})
    (run / "run.json").write_text('{"learning_rate": 1e-06}')
    (run / "environment.json").write_text('{"python": "3.11"}')
    path = write_report(run)
    assert path == run / "report.html"
    page = Tags(path.read_text(encoding="utf-8"))
    assert page.open == []
    for text in (
        *("<my run>", "reward, from 0.25", "0.75", "rollout 75%", "9 s", "non-finite values", "2 min"),
        *("[user] 2+2?", "<b>4</b>", "numeric 1", "judge -", "advantage -0.5"),
        *("judge: 4", "Traceback: 503", '{"learning_rate": 1e-06}', '{"python": "3.11"}'),
    ):
        assert text in page.text, text


def test_hostile_text_stays_text_everywhere(run, opened):
    sample = CompletionSample(HOSTILE, HOSTILE, {HOSTILE: 1.0}, 1.0, None, {HOSTILE: HOSTILE})
    opened(CompletionsLog(run / "completions.jsonl")).write(3, [sample])
    log_errors(opened(JsonLines(run / "errors.jsonl")), 2, {HOSTILE: RewardError(1, HOSTILE)})
    for name in ("run.json", "environment.json"):
        (run / name).write_text(HOSTILE.replace("\ud800", ""))
    source = write_report(run).read_text(encoding="utf-8")
    page = Tags(source)
    assert page.tags <= ALLOWED
    assert not any(name.startswith("on") or name in ("src", "href") for name in page.attributes)
    assert "default-src 'none'" in source
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert "\x1b" not in source
    assert "\u202e" not in source


def test_nothing_is_fetched(run):
    source = write_report(run).read_text(encoding="utf-8")
    assert "http://" not in source
    assert "https://" not in source
    assert "url(" not in source
    assert "@import" not in source


def test_a_run_of_one_step_and_no_metrics_is_a_report(tmp_path, opened):
    opened(MetricsLog(tmp_path / "metrics.jsonl")).write(1, {})
    assert Tags(write_report(tmp_path).read_text(encoding="utf-8")).open == []


def test_a_folder_without_a_log_is_refused(tmp_path, opened):
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        write_report(tmp_path)
    opened(MetricsLog(tmp_path / "metrics.jsonl"))
    with pytest.raises(ValueError, match="is empty"):
        write_report(tmp_path)


def test_curves_leave_out_nulls_and_bookkeeping():
    log = [{"step": 1, "time": 5.0, "loss": 2.0, "kl": None}, {"step": 2, "time": 6.0, "loss": 1, "num_tokens": 9}]
    assert metric_curves(log) == {"loss": [(1, 2.0), (2, 1)]}


def test_long_runs_keep_a_spread_of_samples_with_the_last(run, opened):
    log = opened(CompletionsLog(run / "completions.jsonl"))
    for step in range(1000):
        log.write(step, [CompletionSample("p", "c" * 30_000)] if step % 100 == 0 else [CompletionSample("p", "c")])
    page = Tags(write_report(run).read_text(encoding="utf-8"))
    assert f"{MOST_SAMPLES} of 1000 samples" in page.text
    assert "step 999" in page.text
    assert page.text.count("completion") < 3 * MOST_SAMPLES
    assert (run / "report.html").stat().st_size < 1_000_000

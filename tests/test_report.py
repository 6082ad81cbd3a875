"""report.html: one file that says what the run's files say, and in which nothing that they say is more than text."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inspect_report import META, eval_row, event, make_run, train_row, whole_run

from oneb.inspect.plots import write_plots
from oneb.inspect.report import write_report
from oneb.inspect.rows import read_run
from oneb.inspect.summary import write_summary

# What the page is made of: an element or attribute beside these was let in from somewhere.
ELEMENTS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "th", "td", "ul", "li",
            "code", "pre", "img"}
ATTRIBUTES = {"html": {"lang"}, "meta": {"charset", "http-equiv", "name", "content"}, "img": {"alt", "src"}}
VOID = {"meta", "img"}
HOSTILE = [
    "<script>alert(1)</script>", "</pre></code></td></title></style><script src=//evil></script>",
    '" onerror="alert(1)" x="', "' onload='alert(1)'", "<img src=x onerror=alert(1)>", "<!-- ", "]]>", "&lt;b&gt;&amp;",
    "`code` | cell | [link](javascript:alert(1)) ![pixel](http://evil/p.png)", "line\nbreak\n\n# heading",
    "中文 🚀 \u202eright to left\u202c é", "{{7*7}} ${7*7} <% 7*7 %>", "&#x3c;script&#x3e;", "<svg/onload=alert(1)>",
]


class Page(HTMLParser):
    """The elements, their attributes, and the text of each element that holds text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = [("", "")]
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.found.append((tag, dict(attrs)))
        self.texts.append((tag, ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.texts.append((self.open[-1] if self.open else "", ""))

    def handle_data(self, data):
        tag, text = self.texts[-1]
        self.texts[-1] = tag, text + data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    def text(self, *tags: str) -> str:
        return "\0".join(text for tag, text in self.texts if tag in tags)


def page(run_dir) -> Page:
    found = Page(write_report(run_dir).read_text(encoding="utf-8"))
    for tag, attributes in found.found:
        assert tag in ELEMENTS, tag
        assert set(attributes) <= ATTRIBUTES.get(tag, set()), attributes
    for tag, attributes in found.found:
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,")
    return found


def hostile_run(path, text: str):
    """A run with ``text`` wherever a run's files can hold one."""
    meta = {name: text if isinstance(value, str) and name != "type" else value for name, value in META.items()}
    rows = [meta | {"flops_per_token": {text: 5e9}}, train_row(20), eval_row(20, 3.0),
            event("warning", 20, text), event(text, 20, text)]
    run_dir = make_run(path, rows)
    options = json.loads((run_dir / "config.json").read_text())
    options["run"]["tag"] = options["data"]["path"] = options["train"]["device"] = options["run"]["root"] = text
    options["run"]["price"] = text
    options[text] = {text: text}
    options["more"] = [text]
    (run_dir / "config.json").write_text(json.dumps(options))
    (run_dir / "last.pt").touch()
    return run_dir


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(tmp_path, text):
    run_dir = hostile_run(tmp_path / "demo", text)
    found = page(run_dir)
    assert f"step 20: warning: {text}" in found.text("li")
    assert f"step 20: {text}: {text}" in found.text("li")
    assert text in found.text("code")  # the data's path
    assert f", {text}): " in found.text("li")  # its encoding
    assert found.text("td").split("\0").count(text) >= 5  # variant, and the options
    assert f"{text}.{text}" in found.text("td")
    # Its Markdown is one line each, without tags, links and pictures.
    summary = write_summary(run_dir).read_text(encoding="utf-8")
    plain = re.sub(r"\\.|^```.*?^```$|(`+).*?\1", "", summary, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in plain
    assert re.findall(r"!?\[[^]]*\]\([^)]*\)", plain) == [
        "[config.json](config.json)", "[plan.json](plan.json)", "[train.jsonl](train.jsonl)"]
    assert [line for line in plain.splitlines() if line.startswith("# ")] == ["# demo"]


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_text_stays_text(tmp_path_factory, text):
    run_dir = make_run(tmp_path_factory.mktemp("run") / "demo", [META, event("warning", 20, text)])
    assert f"step 20: warning: {text}" in page(run_dir).text("li").split("\0")
    write_summary(run_dir)


def test_a_directory_whose_name_is_hostile(tmp_path):
    name = "<script>'\"&"
    assert name in page(make_run(tmp_path / name, [META, train_row(20)])).text("h1", "title")


def test_controls_and_half_characters_are_marked(tmp_path):
    found = page(make_run(tmp_path / "demo", [META, event("warning", 20, "a\0b\x1b[31mc\ud800d")]))
    assert "a\ufffdb\ufffd[31mc\ufffdd" in found.text("li")
    assert "a\ufffdb" in write_summary(tmp_path / "demo").read_text(encoding="utf-8")


def test_the_page_forbids_scripts_and_loading(tmp_path):
    found = page(make_run(tmp_path / "demo", [META]))
    policy = next(attributes["content"] for tag, attributes in found.found
                  if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


def test_the_report_is_one_file_with_all_in_it(tmp_path):
    run_dir = whole_run(tmp_path / "demo")
    plots = write_plots(run_dir)
    found = page(run_dir)
    sources = [attributes["src"] for tag, attributes in found.found if tag == "img"]
    assert [base64.b64decode(source.split(",")[1]) for source in sources] == [path.read_bytes() for path in plots]
    assert found.text("h1") == "demo"
    for part in ("Finished: 400 steps", "2.8000 (step 400", "928,000,000", "warning: odd", "0.38 passes",
                 "--lr-schedule"):
        assert part in found.text("p", "td", "li"), part
    # The option that was given comes before those at their defaults.
    options = found.text("td")
    assert options.index("--tag\0demo") < options.index("--wandb-group")


def test_rows_that_no_run_writes_are_left_out_and_counted(tmp_path):
    odd = [12, "text", None, [1], {}, {"type": "other"}, {"type": "train", "step": 40}, {"type": [], "step": 1},
           train_row(40) | {"step": "40"}, train_row(40) | {"tokens": 1.5}, train_row(40) | {"step": True},
           eval_row(40, 3.0) | {"tokens": 10**40}, {"type": "event", "step": 1, "event": "warning", "message": None},
           {"type": "meta", "start_step": 0}, META | {"flops_per_token": {"64": "5"}}]
    values = train_row(60, loss="3.0", tok_s=float("inf"), mfu=10**400, elapsed_s=[1])
    run_dir = make_run(tmp_path / "demo", [META, train_row(20), *odd, values])
    run = read_run(run_dir)
    assert run.metas == [META]
    assert [(row["step"], row["loss"]) for row in run.train] == [(20, train_row(20)["loss"]), (60, None)]
    assert [run.train[1][name] for name in ("tok_s", "mfu", "elapsed_s")] == [None] * 3
    assert run.notes == (f"{len(odd)} rows of train.jsonl are not as a run writes them, and were left out",)
    write_plots(run_dir)
    write_summary(run_dir)
    assert run.notes[0] in page(run_dir).text("li")


@pytest.mark.parametrize("text", ["[1, 2]", "12", '{"run": 3, "train": null}', "[" * 100_000, ""])
def test_a_config_that_no_run_writes(tmp_path, text):
    run_dir = make_run(tmp_path / "demo", [META, train_row(20)])
    (run_dir / "config.json").write_text(text)
    (run_dir / "last.pt").touch()
    page(run_dir)
    write_summary(run_dir)

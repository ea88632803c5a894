# SPDX-License-Identifier: Apache-2.0
"""Parts of ``transferd demo kv``: pages, beginnings of prompts, the verdict, the picture."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from transferd.client.demo import kv, kvrecord, kvtimeline
from transferd.client.demo.kv import PREFIX, make_prompts
from transferd.client.demo.kvengine import CHUNK, CONFIG, Pages, Prefixes, layout_of
from transferd.client.demo.kvrecord import Attempt, Mark, Outcome, Request
from transferd.client.demo.main import command

if TYPE_CHECKING:
    from pathlib import Path


def test_pages_are_free_when_nobody_holds_them() -> None:
    pages = Pages(4)
    taken = pages.take(3)
    assert taken is not None
    assert pages.take(2) is None
    pages.hold(taken[:2])
    pages.drop(taken)
    assert pages.free == 2
    pages.drop(taken[:2])
    assert pages.free == 4


def test_beginnings_of_prompts_are_found_and_forgotten() -> None:
    pages = Pages(20)
    prefixes = Prefixes(pages)
    prompt = list(range(3 * CHUNK + 5))
    own = pages.take(7)
    assert own is not None
    prefixes.keep(prompt, own)
    pages.drop(own)
    assert pages.free == 20 - 6  # three chunks of two pages are kept
    other = prompt[: 2 * CHUNK] + [9] * CHUNK
    found = prefixes.find(other)
    assert found == own[:4]
    assert prefixes.find(prompt[: 2 * CHUNK]) == own[:2]  # the last token has to be computed
    while prefixes.forget():
        pass
    assert pages.free == 20 - 4  # held by those who found them
    pages.drop(found + own[:2])
    assert pages.free == 20


def test_prompts_are_mixed_and_some_begin_alike() -> None:
    prompts = make_prompts(24)
    assert prompts == make_prompts(24)
    assert len({len(prompt) for prompt in prompts}) > 10
    assert len({tuple(prompt[:PREFIX]) for prompt in prompts[::3]}) == 1
    assert all(len(prompt) + 16 <= CONFIG.pages * CONFIG.page_tokens for prompt in prompts)


def test_the_layout_is_the_model_s_cache() -> None:
    (group,) = layout_of(CONFIG).groups
    plain = np.empty(CONFIG.cache_shape, dtype=np.float32).strides
    assert len(group.layers) == CONFIG.cache_shape[0]
    for number, component in enumerate(group.components):
        assert [place.offset for place in component.places] == [
            plain[0] * layer + plain[1] * number for layer in group.layers
        ]
        strides = component.page_stride, component.token_stride, component.head_stride
        assert strides == plain[2:5]


def outcome(generated: list[int]) -> Outcome:
    lost = Attempt("0.0", "p0", "d0", 10.0, pages=16, failed="LOST", ended=11.0)
    lost.samples = [(10.1, 0), (10.4, 8)]
    last = Attempt("0.1", "p<1>", "d1", 11.1, pages=16, landed=12.5, ended=13.0)
    last.chunks = [(0, 20, [11.2 + 0.1 * layer for layer in range(9)])]
    last.samples = [(11.2, 0), (11.5, 8), (12.25, 16)]
    request = Request(0, [1] * 20, 3, [lost, last], {"p0"}, generated, [7, 8, 9])
    return Outcome([request], [Mark(10.5, "p0 is killed", "p0")], 3.0)


def shown(found: Outcome) -> str:
    console = Console(file=io.StringIO(), width=100)
    kvrecord.show(console, found)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_verdict_for_equal_tokens() -> None:
    found = outcome([7, 8, 9])
    assert found.good
    assert found.summary()["failed"] == [{"transfer": "0.0", "prefiller": "p0", "outcome": "LOST"}]
    assert round(found.behind_ms) == 250
    told = shown(found)
    assert "yes, 1 of 1" in told
    assert "1 LOST by p0" in told


def test_a_verdict_for_a_token_that_differs() -> None:
    for tokens in ([7, 8, 1], [7, 8], []):
        found = outcome(tokens)
        assert not found.good
        assert found.summary()["wrong"] == [0]
        assert "wrong tokens: request 0" in shown(found)


def test_the_picture_has_what_happened() -> None:
    page = kvtimeline.render(outcome([7, 8, 9]))
    found = re.search("<svg.*</svg>", page, re.DOTALL)
    assert found is not None
    root = ET.fromstring(found[0])
    titles = [each.text or "" for each in root.iter() if each.tag.endswith("title")]
    assert len([text for text in titles if text.startswith("p<1>: tokens 0-19, layer")]) == 8
    assert "d0: 8 of 16 pages" in titles
    assert "d1: 16 of 16 pages" in titles
    assert "0.0: LOST " in titles
    texts = [each.text or "" for each in root.iter() if each.tag.endswith("text")]
    assert "p0 is killed" in texts
    assert "WRONG" in kvtimeline.render(outcome([1]))


@pytest.mark.parametrize(("tokens", "status"), [([7, 8, 9], 0), ([7, 8, 1], 1)])
def test_the_exit_status_is_the_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokens: list[int], status: int
) -> None:
    monkeypatch.setattr(kv, "run", lambda _console, _count: outcome(tokens))
    arguments = ["kv", "--json", "--timeline", str(tmp_path / "picture.html")]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == status
    assert json.loads(done.stdout)["good"] == (status == 0)
    assert "<svg" in (tmp_path / "picture.html").read_text()

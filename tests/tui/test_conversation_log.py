"""What the conversation lays out, and when, beside what a person sees of it."""

import pytest
from textual.app import App, ComposeResult
from textual.strip import Strip

from tests.tui.screens import shown
from tui.markdown_text import Kind, TextLayout
from tui.widgets.conversation_log import ConversationLog


class LogApp(App[None]):
    """A conversation and nothing else."""

    CSS = "ConversationLog { overflow-x: hidden; overflow-y: scroll; }"

    def compose(self) -> ComposeResult:
        yield ConversationLog()


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were laid out, in their order."""
    texts: list[str] = []
    lines = TextLayout.lines

    def counted(
        self: TextLayout, text: str, kind: Kind, width: int, is_open: bool = False
    ) -> list[Strip]:
        texts.append(text)
        return lines(self, text, kind, width, is_open)

    monkeypatch.setattr(TextLayout, "lines", counted)
    return texts


@pytest.mark.parametrize("n_rows", [10, 250])
async def test_what_is_in_sight_is_laid_out_once_on_screens_of_any_height(
    n_rows: int, laid_out: list[str]
) -> None:
    app = LogApp()
    async with app.run_test(size=(60, n_rows)) as pilot:
        log = app.query_one(ConversationLog)
        log.extend("".join(f"{n}. an item\n" for n in range(1, 601)), is_thinking=False)
        log.end_answer()
        log.show_open()
        await pilot.pause()
        assert "600 an item" in shown(app), "the end is followed from the first line too many on"
        laid_out.clear()
        for remark in ("one", "two", "three"):
            log.add(remark, Kind.REMARK)
            log.show_open()
            await pilot.pause()
        assert laid_out == ["one", "two", "three"]


async def test_a_page_is_turned_without_laying_out_and_what_is_far_is_laid_out_again(
    laid_out: list[str],
) -> None:
    app = LogApp()
    async with app.run_test(size=(60, 20)) as pilot:
        log = app.query_one(ConversationLog)
        for n in range(500):
            log.add(f"text {n}", Kind.REMARK)
        log.show_open()
        await pilot.pause()
        laid_out.clear()
        log.turn_page(-1)
        await pilot.pause()
        assert laid_out == []
        log.scroll_home(animate=False, immediate=True)
        await pilot.pause()
        assert "text 0\n" in shown(app)
        assert 0 < len(laid_out) <= 20
        laid_out.clear()
        log.follow()
        await pilot.pause()
        assert "text 499" in shown(app)
        assert 0 < len(laid_out) <= 20, "the lines of the end were kept though they were far"

"""Who holds which page of a device's latent cache, and what the pages that nobody holds are still good for.

Pages are held by requests, several of which may share one; a page that holds 64 tokens of known text is published, so that a later
request with the same beginning finds it. A page that nobody holds keeps its text until it is taken for another.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence

from pallas_kernels.latent_pages import PAGE


class PagePool:
    """Pages 0 .. num_pages - 1 of one device. Knows token ids and no arrays."""

    def __init__(self, num_pages: int):
        self._holders = [0] * num_pages
        self._unheld: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))  # the next to be taken first
        # A text is a chain of pages. Each published page is a place in it, of its own number, never used again; the place before
        # and the page's 64 tokens find it.
        self._page_at: dict[tuple[int, tuple[int, ...]], int] = {}
        self._place: dict[
            int, tuple[int, tuple[int, tuple[int, ...]]]
        ] = {}  # of a published page: its number, and how it is found
        self._numbers = itertools.count(1)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._unheld)

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The published pages that hold the beginning of a text, as far as there are any; the caller now holds them too."""
        pages, before = [], 0
        for chunk in _whole_pages(tokens):
            page = self._page_at.get((before, chunk))
            if page is None:
                break
            pages.append(page)
            before = self._place[page][0]
        for page in pages:
            self._holders[page] += 1
            self._unheld.pop(page, None)
        return pages

    def take(self, count: int) -> list[int] | None:
        """`count` pages for the caller alone, those longest unused first; None, and nothing taken, if there are fewer."""
        if count > len(self._unheld):
            return None
        pages = [self._unheld.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
            self._forget(page)
        return pages

    def publish(self, pages: Sequence[int], tokens: Sequence[int]) -> None:
        """Says that the pages hold these tokens, the whole ones of which others may now share. The caller holds the pages."""
        before = 0
        for page, chunk in zip(pages, _whole_pages(tokens)):
            known = self._page_at.get((before, chunk))  # may be another page with the same text, which then stays the shared one
            if known is None:
                self._forget(page)  # its text before may have been taken, and published anew elsewhere
                known = self._page_at[before, chunk] = page
                self._place[page] = next(self._numbers), (before, chunk)
            before = self._place[known][0]

    def release(self, pages: Sequence[int]) -> None:
        """Lets go of pages. What is not published is taken first by others; of a text, its end before its beginning."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._unheld[page] = None
                if page not in self._place:
                    self._unheld.move_to_end(page, last=False)

    def _forget(self, page: int) -> None:
        if page in self._place:
            del self._page_at[self._place.pop(page)[1]]


def _whole_pages(tokens: Sequence[int]):
    return (tuple(tokens[first : first + PAGE]) for first in range(0, len(tokens) - PAGE + 1, PAGE))

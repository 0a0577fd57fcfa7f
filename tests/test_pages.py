"""Random operations on a pool of pages, beside a model that knows what every page holds: no leak, nothing shared is written."""

import os
import random
from collections import Counter

import pytest

from dsv2_jax.pages import PagePool
from pallas_kernels.latent_pages import PAGE

SEEDS = int(os.environ.get("PAGES_SEEDS", 4))
OPERATIONS = 10_000
PAGES = 24
CHUNKS = [[letter] * PAGE for letter in range(3)]  # texts are chains of few, so that beginnings are shared and found again


class Text:
    """A request: its tokens, its pages, and how many tokens it has written to them."""

    def __init__(self, tokens, pages, written):
        self.tokens, self.pages, self.written = tokens, pages, written


class World:
    def __init__(self, seed):
        self.random, self.pool = random.Random(seed), PagePool(PAGES)
        self.content: list[list[int]] = [[] for _ in range(PAGES)]
        self.texts: list[Text] = []
        self.found = 0

    def held(self) -> Counter:
        return Counter(page for text in self.texts for page in text.pages)

    def admit(self, tokens):
        pages = self.pool.match(tokens[:-1])
        for page, first in zip(pages, range(0, len(tokens), PAGE)):
            assert self.content[page] == tokens[first : first + PAGE]
        self.found += len(pages)
        fresh = self.pool.take(len(tokens) // PAGE + 1 - len(pages))
        if fresh is None:
            self.pool.release(pages)
            return
        assert not set(fresh) & set(self.held())
        self.texts.append(Text(tokens, pages + fresh, len(pages) * PAGE))
        if self.random.random() < 0.8:
            self.write(self.texts[-1])

    def write(self, text):
        holders = self.held()
        for place in range(text.written, len(text.tokens)):
            page = text.pages[place // PAGE]
            assert holders[page] == 1
            self.content[page] = [*self.content[page][: place % PAGE], text.tokens[place]]
        text.written = len(text.tokens)

    def new(self):
        tokens = [token for _ in range(self.random.randrange(6)) for token in self.random.choice(CHUNKS)]
        self.admit(tokens + [9] * self.random.randrange(1, PAGE))

    def fork(self):
        self.admit(list(self.random.choice(self.texts).tokens))

    def extend(self):
        text = self.random.choice(self.texts)
        for token in self.random.choice(CHUNKS)[: self.random.randrange(PAGE)]:
            if len(text.tokens) == len(text.pages) * PAGE:
                fresh = self.pool.take(1)
                if fresh is None:
                    break
                text.pages += fresh
            text.tokens.append(token)
        self.write(text)

    def publish(self):
        text = self.random.choice(self.texts)
        self.pool.publish(text.pages, text.tokens[: text.written])

    def free(self):
        text = self.texts.pop(self.random.randrange(len(self.texts)))
        self.pool.release(text.pages)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_operations(seed):
    world = World(seed)
    for _ in range(OPERATIONS):
        operations = (
            [world.new] if not world.texts else [world.new, world.fork, world.extend, world.publish, world.publish, world.free]
        )
        world.random.choice(operations)()
        assert world.pool.free == PAGES - len(world.held())
    assert world.found > OPERATIONS // 20
    while world.texts:
        world.free()
    assert world.pool.free == PAGES and sorted(world.pool.take(PAGES)) == list(range(PAGES))
    assert not world.pool._page_at and not world.pool._place  # nothing is remembered of pages that hold other text


def test_too_few_pages_take_none():
    pool = PagePool(3)
    assert pool.take(4) is None and pool.free == 3


def test_what_is_longest_unused_goes_first_and_the_end_of_a_text_before_its_beginning():
    pool, text = PagePool(4), [token for chunk in CHUNKS for token in chunk]
    pages = pool.take(3)
    pool.publish(pages, text)
    pool.release(pages)
    pool.take(2)  # the page that held nothing, and the text's last
    assert pool.match(text) == pages[:2]


def test_a_text_that_two_have_written_is_shared_once_and_survives_the_first():
    pool, text = PagePool(3), CHUNKS[0] + CHUNKS[1]
    first, second = pool.take(1), pool.take(2)
    pool.publish(first, text[:PAGE])
    pool.publish(second, text)  # its second page hangs on the first one's first
    pool.release(first)
    assert pool.take(1) == first  # and is something else from now on
    pool.publish(second, text)
    assert pool.match(text) == second

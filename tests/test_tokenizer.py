"""The tokenizer: one BOS, the published chat format, a sandbox that holds, and streams that equal decoding everything."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsv2_jax import tokenizer as tokenizer_lib
from dsv2_jax.fields import InputError
from dsv2_jax.tokenizer import BOS, EOS, TextStream, Tokenizer, train

TEXT = "def hello(world):\n    return 'Hello, world!' + str(1234)\n\n# größer, Привет, 你好世界 😀\n" * 30
TURNS = [("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


@pytest.fixture(scope="module")
def tokenizer():
    return train([TEXT], 400)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token a byte: token 2 + n for the nth of the byte alphabet; no merges, so that ids cut characters anywhere."""
    return train([], tokenizer_lib.SMALLEST_VOCABULARY)


@pytest.fixture
def directory(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    return tmp_path


def edit(directory, **fields):
    """Changes fields of tokenizer_config.json (None removes one) and loads the result."""
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return Tokenizer.load(directory)


def test_special_tokens_are_the_published_code_points():
    assert [f"{ord(c):x}" for c in BOS if ord(c) > 127] == ["ff5c", "2581", "2581", "ff5c"]
    assert BOS.replace("\uff5c", "|").replace("\u2581", "_") == "<|begin_of_sentence|>"
    assert EOS.replace("\uff5c", "|").replace("\u2581", "_") == "<|end_of_sentence|>"


def test_ids_of_the_special_tokens_and_the_size(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.vocab_size <= 400
    assert train([TEXT], 300).vocab_size == 300
    assert train(["ab"], 5000).vocab_size < 300  # little text yields few tokens, never an error
    with pytest.raises(InputError, match="vocab_size=257: a byte-level tokenizer needs at least 258"):
        train([TEXT], 257)


@pytest.mark.parametrize(
    "text", ["", " ", "hello", "  hello\n\n\tworld ", "größer 你好 😀\u3000x", "1234 5.6", "\x00\x7f\ufffd\r\n"]
)
def test_decode_inverts_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_and_line_ends_stand_alone(tokenizer):
    tokens = [tokenizer.decode([i]) for i in tokenizer.encode("return 1234\n\n    return", bos=False)]
    assert tokens.count("\n") == 2 and [t for t in tokens if t.strip().isdigit()] == list("1234")
    assert tokens[-1] == " return"  # a word takes one of the spaces before it


def test_bos_exactly_once(tokenizer, directory):
    ids = tokenizer.encode("hello")
    assert ids[0] == 0 and ids.count(0) == 1
    assert tokenizer.encode(BOS + "hello") == ids  # already there
    assert tokenizer.encode("hello", bos=False) == ids[1:]
    assert edit(directory, add_bos_token=False).encode("hello") == ids[1:]
    assert edit(directory, add_bos_token=True, bos_token={"content": BOS, "special": True}).encode("hello") == ids


def test_bos_rule_of_a_config_that_does_not_state_it(tokenizer, directory):
    ids = tokenizer.encode("hello")
    # tokenizer.json's own post-processor adds BOS: what is left of the rule after transformers 5 has saved a tokenizer
    assert edit(directory, add_bos_token=None).encode("hello") == ids
    backend = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(backend | {"post_processor": None}))
    assert Tokenizer.load(directory).encode("hello") == ids[1:]
    assert edit(directory, tokenizer_class="LlamaTokenizerFast").encode("hello") == ids
    (directory / "tokenizer_config.json").unlink()
    assert Tokenizer.load(directory).bos_id is None and Tokenizer.load(directory).encode("hello") == ids[1:]


def test_chat_is_the_published_rendering(tokenizer):
    ids = tokenizer.render_chat(MESSAGES)
    expected = f"{BOS}S\n\nUser: U1\n\nAssistant: A1{EOS}User: U2\n\nAssistant:"
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected
    assert ids.count(tokenizer.bos_id) == 1 and ids == tokenizer.encode(expected)


def test_chat_keeps_the_content_as_it_is(tokenizer):
    ids = tokenizer.render_chat([{"role": "user", "content": " <b>&\n 😀 "}])
    assert tokenizer.decode(ids) == "User:  <b>&\n 😀 \n\nAssistant:"


def test_the_template_may_be_named_or_a_file_and_is_trimmed(directory):
    template = "{% for m in messages %}\n  {% if m.role == 'user' %}\nU {{ m.content | tojson }}\n  {% endif %}\n{% endfor %}\n"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    rendered = 'U "ü"\n'
    message = [{"role": "user", "content": "ü"}]
    loaded = edit(directory, chat_template=named)
    assert loaded.decode(loaded.render_chat(message)) == rendered
    edit(directory, chat_template=None)
    (directory / "chat_template.jinja").write_text(template)
    loaded = Tokenizer.load(directory)
    assert loaded.decode(loaded.render_chat(message)) == rendered


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",  # immutable
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ nothing.field }}",
        "{% if %}",
        "{% include 'x' %}",
    ],
)
def test_a_template_reaches_nothing_and_its_errors_are_input_errors(directory, template):
    with pytest.raises(InputError, match="chat_template"):
        edit(directory, chat_template=template).render_chat(MESSAGES)


def test_what_is_not_a_conversation(tokenizer, directory):
    for messages in ([], "hi", {"role": "user", "content": "x"}, None):
        with pytest.raises(InputError, match="messages: expected a list"):
            tokenizer.render_chat(messages)
    for message in ("x", {}, {"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": "x", "name": "n"}):
        with pytest.raises(InputError, match=r"messages\[1\]"):
            tokenizer.render_chat([MESSAGES[0], message])
    with pytest.raises(InputError, match="unknown role tool"):
        tokenizer.render_chat([{"role": "tool", "content": "x"}])
    with pytest.raises(InputError, match="no chat_template"):
        edit(directory, chat_template=None).render_chat(MESSAGES)


def test_load_and_save_keep_every_byte(tokenizer, directory, tmp_path):
    assert Tokenizer.load(tmp_path / "nowhere") is None
    (directory / "chat_template.jinja").write_text("x")
    loaded = Tokenizer.load(directory)
    copy = tmp_path / "copy"
    copy.mkdir()
    loaded.save(copy)
    assert sorted(path.name for path in copy.iterdir()) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert all((copy / name).read_bytes() == (directory / name).read_bytes() for name in loaded.files)
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": {}}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"bos_token": "<s>"}'),
        ("tokenizer_config.json", '{"eos_token": 1}'),
        ("tokenizer_config.json", '{"chat_template": 5}'),
    ],
)
def test_a_malformed_file_is_named(directory, name, content):
    (directory / name).write_text(content)
    with pytest.raises(InputError, match=name):
        Tokenizer.load(directory)


def test_text_that_is_no_unicode(tokenizer):
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_training_is_deterministic_across_processes(tokenizer):
    """Other hash seeds and thread counts give the same file."""
    code = (
        f"import sys, hashlib; from dsv2_jax.tokenizer import train; t = train([{TEXT!r}] * 40, 400);"
        "print(hashlib.sha256(t.files['tokenizer.json']).hexdigest())"
    )
    digests = set()
    for seed, threads in [("0", "1"), ("1", "2"), ("2", "4")]:
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        root = Path(__file__).parents[1]
        digests.add(
            subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, check=True).stdout
        )
    assert len(digests) == 1


# -- streaming


def pieces(stream, ids):
    return [stream.feed(token) for token in ids] + [stream.flush()]


@pytest.mark.parametrize("text", [TEXT, "😀👨‍👩‍👧‍👦🇩🇪" * 20, "你好世界" * 40, "  indented\n\n\n\ttabs  ", "\ufffd\ufffda\ufffd"])
def test_stream_of_text_equals_decoding_it_all(tokenizer, byte_tokenizer, text):
    for each in (tokenizer, byte_tokenizer):
        ids = each.encode(text)
        assert "".join(pieces(TextStream(each), ids)) == each.decode(ids) == text


def test_stream_of_random_ids_equals_decoding_them_all(tokenizer, byte_tokenizer):
    """Any ids at all: broken UTF-8, special tokens, ids without a token, long runs of bytes that start nothing."""
    generator = random.Random(0)
    high = [i for i in range(258) if byte_tokenizer.decode([i]) == "\ufffd"]  # bytes above 127
    assert len(high) == 128
    for trial in range(400):
        each = (tokenizer, byte_tokenizer)[trial % 2]
        ids = [generator.choice(high) if generator.random() < trial / 400 else generator.randrange(450) for _ in range(60)]
        assert "".join(pieces(TextStream(each), ids)) == each.decode(ids)


def test_stream_gives_whole_characters_at_once(byte_tokenizer):
    ids = byte_tokenizer.encode("aé你😀", bos=False)
    assert pieces(TextStream(byte_tokenizer), ids) == ["a", "", "é", "", "", "你", "", "", "", "😀", ""]
    assert pieces(TextStream(byte_tokenizer), ids[:-1])[-1] == "\ufffd"  # what never became a character


@pytest.mark.parametrize("text", ["hello world ", "😀", "你", "\x80"])
def test_stream_costs_the_same_at_any_length(byte_tokenizer, text):
    """It decodes a window of bounded length, whatever is repeated (one byte that starts no character, too)."""

    class Counting:
        longest = 0
        is_silent = byte_tokenizer.is_silent

        def decode(self, ids):
            Counting.longest = max(Counting.longest, len(ids))
            return byte_tokenizer.decode(ids)

    ids = byte_tokenizer.encode(text, bos=False)
    ids = ids[1:] if text == "\x80" else ids  # U+0080 is C2 80; a lone 80 begins nothing
    stream = TextStream(Counting())
    assert "".join(pieces(stream, ids * 500)) == byte_tokenizer.decode(ids * 500)
    assert Counting.longest <= 20


def test_stream_of_another_kind_of_tokenizer(tmp_path):
    """Word pieces whose decoder drops the first space: the pieces keep the spaces between them."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    backend = tokenizers.Tokenizer(models.WordLevel({"▁hello": 0, "▁big": 1, "▁world": 2}, unk_token="▁hello"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("hello big world " * 10)
    assert "".join(pieces(TextStream(tokenizer), ids)) == tokenizer.decode(ids)


def reference_stop(text, stops):
    """The text before the stop string that ends first."""
    for end in range(len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return text[: end - max(map(len, matches))], max(matches, key=len)
    return text, None


def test_stop_strings_do_not_depend_on_the_tokens(byte_tokenizer):
    generator = random.Random(1)
    word_tokenizer = train(["".join(generator.choices("ab", k=2000))], 300)  # tokens in which several stop strings may end
    found = 0
    for _ in range(500):
        text = "".join(generator.choices("ab\n", k=40)) + "😀 ende"
        stops = ["".join(generator.choices("ab\n😀", k=generator.randrange(2, 7))) for _ in range(generator.randrange(1, 4))]
        expected = reference_stop(text, stops)
        found += expected[1] is not None
        for each in (word_tokenizer, byte_tokenizer):
            stream = TextStream(each, stops)
            parts = pieces(stream, each.encode(text))
            assert ("".join(parts), stream.stopped) == expected
    assert 100 < found < 450


def test_stream_holds_back_only_what_may_become_a_stop(byte_tokenizer):
    stream = TextStream(byte_tokenizer, ["\n\nUser", "STOP"])
    ids = byte_tokenizer.encode("a\nb\n\nUsing STO", bos=False)
    assert pieces(stream, ids) == ["a", "", "\nb", "", "", "", "", "\n\nUsi", "n", "g", " ", "", "", "", "STO"]
    stream = TextStream(byte_tokenizer, ["STOP"])
    assert "".join(pieces(stream, byte_tokenizer.encode("go STOP and on", bos=False))) == "go " and stream.stopped == "STOP"
    with pytest.raises(InputError, match="empty"):
        TextStream(byte_tokenizer, ["x", ""])


def test_an_interrupted_save_leaves_nothing_that_loads(directory, tmp_path):
    copy = tmp_path / "partial"
    copy.mkdir()
    shutil.copy(directory / "tokenizer_config.json", copy)  # tokenizer.json comes last
    (copy / "tokenizer.json.tmp").write_text("{")
    assert Tokenizer.load(copy) is None

"""A sample token by token: what is shown as trained on is what the loss reads."""

from dataclasses import dataclass

from lorakit.data.chat import encode_chat
from lorakit.data.encoded import IGNORED, Encoded, Labeled, encode_pair
from lorakit.data.explain import explained
from lorakit.data.pack import pack
from lorakit.data.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def shown(view):
    return "".join(f"[{s.text}]" if s.trained else s.text for s in view.segments)


def test_a_pair_s_completion_is_learned():
    (view,) = explained(TOKENIZER, encode_pair(TOKENIZER, "on ", "it"))
    assert (view.title, view.answer) == ("", "it<eos>")
    assert shown(view) == "on [i][t][<eos>]"
    assert [s.special for s in view.segments][-1]
    assert [s.id for s in view.segments] == encode_pair(TOKENIZER, "on ", "it").input_ids


def test_nothing_predicts_the_first_token():
    ids = TOKENIZER("ab").input_ids
    (view,) = explained(TOKENIZER, Encoded(ids, ids))
    assert shown(view) == "a[b]"
    windows = pack([Encoded(ids, ids), Encoded(ids, ids)], 8)
    assert shown(explained(TOKENIZER, windows[0])[0]) == "a[b]a[b]"


def test_a_chat_s_turns_are_learned():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "é"}]
    (view,) = explained(TOKENIZER, encode_chat(TOKENIZER, messages))
    assert view.answer == "é<eos>"
    assert "�" not in shown(view)  # half a character is shown by its token's name


def test_other_kinds_of_samples():
    ids = TOKENIZER("ab").input_ids
    (view,) = explained(TOKENIZER, Labeled(ids, 1), labels=["x", "y"])
    assert view.answer == "the class y"
    assert not any(s.trained for s in view.segments)
    source, target = explained(TOKENIZER, Encoded(ids, [*ids, 1]), encoder_decoder=True)
    assert (source.title, shown(source), target.title, shown(target)) == ("input", "ab", "target", "[a][b][<eos>]")
    (view,) = explained(TOKENIZER, Encoded(ids, [IGNORED, 1]), labels=["O", "NAME"], tags=True)
    assert [s.tag for s in view.segments] == ["", "NAME"]


@dataclass(frozen=True)
class Two:
    chosen: Encoded
    wanted: bool
    rejected: Encoded


def test_a_sample_of_several_sequences_shows_each_by_its_name():
    good, bad = (encode_pair(TOKENIZER, "q", c) for c in ("on", "er"))
    views = explained(TOKENIZER, Two(good, True, bad))
    assert [(v.title, v.answer) for v in views] == [("chosen", "on<eos>"), ("wanted", "yes"), ("rejected", "er<eos>")]

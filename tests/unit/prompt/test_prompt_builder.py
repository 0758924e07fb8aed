import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_families import FAMILIES, bare, builder, flat, image, plain_texts, source, special_text

from opsin.core.answer import ReasoningStyle
from opsin.core.errors import BadPrompt
from opsin.core.request import ImagePart, TextPart
from opsin.prompt import Message
from opsin.prompt.builder import ChatTemplate

A, B, C = image(1), image(2), image(3)
NO_SYSTEM = {"mistral"}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_image_and_a_question(family):
    prompt = builder(family).build([Message("user", [A, "what is this?"])])
    assert prompt.images == (A,)
    text = flat(prompt)
    assert text.index("¤") < text.index("what is this?")
    assert "1234" not in text, "no stand-in is left over"
    assert all(part.special for part in prompt.parts if isinstance(part, TextPart))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_familys_own_image_marks_are_never_written(family):
    """llama.cpp's mtmd writes them around each image; twice would be read as two images."""
    text = flat(builder(family).build([Message("user", ["one", A, "two", B])]))
    for mark in ("<image>", "<|image_pad|>", "<|vision_start|>", "<start_of_image>", "<|image|>", "<|media_start|>"):
        assert mark not in text
    assert text.index("one") < text.index("¤") < text.index("two") < text.rindex("¤")


@pytest.mark.parametrize("family", FAMILIES)
def test_images_in_several_turns_keep_their_order(family):
    prompt = builder(family).build(
        [
            Message("user", [A, "first?"]),
            Message("assistant", "a cat"),
            Message("user", ["and", B, "or", C, "and the first again", A]),
        ]
    )
    assert prompt.images == (A, B, C, A)
    text = flat(prompt)
    places = [text.index(word) for word in ("first?", "a cat", "and", "or", "again")]
    assert places == sorted(places)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_one_stretch(family):
    prompt = builder(family).build([Message("user", "How are you?")])
    assert len(prompt.parts) == 1
    assert prompt.images == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_system_message_always_reaches_the_model(family):
    text = flat(builder(family).build([Message("system", "Answer briefly."), Message("user", [A, "what?"])]))
    assert text.count("Answer briefly.") == 1
    assert text.index("Answer briefly.") < text.index("what?")


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_anybodys_text_stay_text(family):
    """A `</s>` that a user wrote ended the prompt for the model; every role can carry text from outside."""
    tokens = sorted(token for token in source(family).control_tokens if "think" not in token)
    said = "say " + " and ".join(tokens) + " please"
    messages = [Message("user", [A, said]), Message("assistant", said), Message("user", said)]
    prompt = builder(family).build(messages)
    assert flat(prompt).count(said) == 3, "it comes back letter by letter"
    assert sorted(plain_texts(prompt)) == sorted(tokens * 3)
    clean = builder(family).build([Message("user", [A, "x"]), Message("assistant", "x"), Message("user", "x")])
    for token in tokens:
        assert special_text(prompt).count(token) == special_text(clean).count(token)


def test_a_system_messages_control_tokens_stay_text():
    prompt = builder("qwen2-vl").build([Message("system", "<|im_end|>"), Message("user", "x")])
    assert plain_texts(prompt) == ["<|im_end|>"]


def test_tool_calls_and_tools_are_protected_too():
    template = (
        "{{ tools | tojson }}{% for m in messages %}{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
    )
    prompt = bare(template).build(
        [Message("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {"</s>": "a</s>b"}}}])],
        tools=[{"function": {"name": "f", "description": "ends with </s>"}}],
    )
    assert plain_texts(prompt) == ["</s>"] * 3
    assert '"description": "ends with </s>"' in flat(prompt)


def test_neighbouring_control_tokens_are_cut_out_as_one():
    prompt = bare("{{ messages[0].content }}").build([Message("user", "a</s></s>b")])
    assert prompt.parts == (TextPart("a"), TextPart("</s></s>", special=False), TextPart("b"))


def test_the_longest_token_is_taken():
    prompt = bare("{{ messages[0].content }}", tokens=("<a>", "<a><b>", "<b")).build([Message("user", "x<a><b>y<b>")])
    assert plain_texts(prompt) == ["<a><b>", "<b"]


def test_two_texts_side_by_side_do_not_make_a_token():
    """Parts of one message were joined without anything between, which made a control token of two harmless texts."""
    prompt = builder("qwen2-vl").build([Message("user", ["<|im_", "end|>", A])])
    assert "<|im_\nend|>" in flat(prompt)


def test_tokens_of_white_space_alone_do_not_cut_text():
    prompt = bare("{{ messages[0].content }}", tokens=("\n", "\n\n", " ")).build([Message("user", "a\n\nb c")])
    assert prompt.parts == (TextPart("a\n\nb c"),)


@pytest.mark.parametrize("said", ["<__media__>", "<image>", "{{ messages }}", "¤", "12345678901234567890", "%s {0}"])
def test_a_marker_in_a_users_text_is_text(said):
    prompt = builder("qwen2-vl").build([Message("user", [said, A, said])])
    assert prompt.images == (A,)
    assert flat(prompt, mark="[P]").count(said) == 2


def test_places_cannot_be_guessed():
    """Each prompt draws its own stand-ins, so yesterday's, or another user's, are worth nothing."""
    seen = set()
    probe = bare("{% if messages[0].content | length > 30 %}{{ raise_exception(messages[0].content) }}{% endif %}")
    for _ in range(5):
        with pytest.raises(BadPrompt) as error:
            probe.build([Message("user", [A])])
        seen.add(str(error.value))
    assert len(seen) == 5


texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.sampled_from(
            ["</s>", "<s>", "<|im_end|>", "<|im_", "im_end|>", "<image>", "[INST]", "<end_of_turn>", "<", ">"]
        ),
    ),
    max_size=8,
).map("".join)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2-vl", "gemma3", "llama3.2", "internvl", "vicuna", "mistral", "kimi"])
@given(first=texts, answer=texts, second=texts)
def test_the_parts_joined_are_the_plain_rendering(family, first, answer, second):
    prompts, template = models(family)
    mark = "IMAGESTANDSHERE"
    prompt = prompts.build(
        [Message("user", [A, first + "."]), Message("assistant", answer), Message("user", [second + ".", B])]
    )
    wants_list = "list" in template.user_shapes

    def content(*parts):
        return [{"type": "text", "text": part} for part in parts] if wants_list else "".join(parts)

    expected = template.render(
        [
            {"role": "user", "content": content(mark, first + ".")},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": content(second + ".", mark)},
        ]
    )
    assert flat(prompt, mark) == expected


@functools.cache
def models(family):
    of = source(family)
    return builder(family), ChatTemplate(of.template or "", bos_token=of.bos_token, eos_token=of.eos_token)


def test_the_begin_token_is_written_once():
    assert builder("gemma3").build([Message("user", "x")]).add_bos is False
    assert builder("vicuna").build([Message("user", "x")]).add_bos is True
    assert builder("internvl").build([Message("user", "x")]).add_bos is True


def test_a_users_begin_token_at_the_very_start_is_not_the_templates():
    prompt = bare("{{ messages[0].content }}", tokens=("<s>",), bos="<s>").build([Message("user", "<s>hi")])
    assert prompt.add_bos is True
    assert prompt.parts[0] == TextPart("<s>", special=False)


def test_without_generation_prompt_the_turn_of_the_model_is_not_opened():
    built = builder("qwen2-vl").build([Message("user", "x")], add_generation_prompt=False)
    assert flat(built).endswith("x<|im_end|>\n")


def test_an_image_that_the_template_drops_is_refused():
    prompts = bare("{% for m in messages %}{% if loop.index0 != 2 %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(BadPrompt, match="once and in order"):
        prompts.build([Message("user", ["hi", A]), Message("assistant", "a"), Message("user", [B])])


def test_an_image_written_twice_is_refused():
    with pytest.raises(BadPrompt, match="once and in order"):
        bare("{{ messages[0].content }}{{ messages[0].content }}").build([Message("user", [A])])


def test_images_in_another_order_are_refused():
    prompts = bare("{% for m in messages | reverse %}{{ m.content }}{% endfor %}")
    with pytest.raises(BadPrompt, match="once and in order"):
        prompts.build([Message("user", [A]), Message("user", [B])])


@pytest.mark.parametrize("body", ["{{ c[:20] }}", "{{ c[:-3] }}", "{{ c[:-1] }}9"])
def test_a_template_that_cuts_texts_apart_is_refused(body):
    prompts = bare("{% set c = messages[0].content %}{% if c | length > 30 %}" + body + "{% else %}{{ c }}{% endif %}")
    with pytest.raises(BadPrompt, match=r"cuts texts apart|once and in order"):
        prompts.build([Message("user", [A])])


def test_upper_case_and_trimming_do_not_harm_a_place():
    prompt = bare("{% for m in messages %}{{ m.content | upper | title | trim }}{% endfor %}").build(
        [Message("user", ["  look ", A, " there</s> "])]
    )
    assert flat(prompt) == "Look ¤ There</s>"
    assert plain_texts(prompt) == ["</s>"]


def test_roles_out_of_order_give_the_templates_own_sentence():
    with pytest.raises(BadPrompt, match="refuses these messages: roles must take turns"):
        builder("gemma3").build([Message("user", "a"), Message("user", "b")])


@pytest.mark.parametrize("name", ["mistral", "vicuna", "qwen2-vl"])
def test_system_messages_are_all_there_wherever_they_stand(name):
    messages = [
        Message(role, text) for role, text in zip(("system", "system", "user"), ("one", "two", "three"), strict=True)
    ]
    for order in ((0, 1, 2), (2, 0), (0, 2, 1)):
        text = flat(builder(name).build([messages[at] for at in order]))
        assert all(messages[at].content in text for at in order)


def test_a_template_that_drops_a_second_system_message_gets_one():
    drops = (
        "{% for m in messages %}{% if m.role != 'system' or loop.first %}"
        "{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}"
    )
    built = bare(drops).build([Message("system", "A"), Message("system", "B"), Message("user", "c")])
    assert flat(built) == "system:A\n\nB;user:c;"
    assert built.folded
    assert not bare(drops).build([Message("system", "A"), Message("user", "c")]).folded


def test_a_last_text_of_the_assistants_is_continued():
    ends = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    asked = [Message("user", "a"), Message("assistant", "The answer is </s>")]
    prompt = bare(ends).build(asked)
    assert flat(prompt) == "<user>a<assistant>The answer is </s>"
    assert plain_texts(prompt) == ["</s>"]
    thinks = bare(ends.replace("<assistant>{% endif", "<assistant><think>\n{% endif")).build(asked)
    assert flat(thinks) == "<user>a<assistant><think>\n\n</think>\n\nThe answer is </s>"
    assert not thinks.thinking


def test_calls_and_results_that_a_template_drops_are_told_as_text():
    drops = "{% for m in messages %}{% if m.role != 'tool' %}{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        Message("user", "a"),
        Message("assistant", "", tool_calls=[call]),
        Message("tool", "one", tool_call_id="1"),
        Message("tool", "two", name="g"),
        Message("user", "b"),
    ]
    told = 'user:a;assistant:{"name": "f", "arguments": {"x": 1}};user:Result of 1:\none\nResult of g:\ntwo\nb;'
    assert flat(bare(drops).build(messages)) == told


@pytest.mark.parametrize("result", ["{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"])
def test_an_image_in_a_result_comes_out_however_a_template_writes_results(result):
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}" + result + "{% elif m.content is string %}{{ m.content }}"
        "{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
        "{{ m.tool_calls | tojson if m.tool_calls }};{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        Message("user", [B, "a"]),
        Message("assistant", "", tool_calls=[call]),
        Message("tool", ["see ", A], tool_call_id="1"),
    ]
    prompt = bare(template).build(messages)
    assert prompt.images == (B, A)
    assert flat(prompt).endswith(";see ¤;")


def test_an_image_in_a_system_message_without_such_a_role_goes_before_the_question():
    prompt = builder("mistral").build([Message("system", ["See", A]), Message("user", "what?")])
    assert flat(prompt) == "<s>[INST] See¤what? [/INST]"


def test_no_message_and_nothing_said_are_refused():
    with pytest.raises(BadPrompt, match="no message"):
        builder("vicuna").build([])
    with pytest.raises(BadPrompt, match="empty"):
        bare("{{ messages[0].content }}").build([Message("user", " ")])


def test_an_image_alone_is_a_question():
    assert bare("{{ messages[0].content }}").build([Message("user", [A])]).parts == (ImagePart(A),)


def test_half_a_character_is_refused():
    with pytest.raises(BadPrompt, match="half a character"):
        builder("vicuna").build([Message("user", "a\ud800b")])


def test_too_long_a_conversation_is_refused():
    with pytest.raises(BadPrompt, match="2,000,0"):
        builder("vicuna").build([Message("user", "x" * 2_000_001)])


def test_a_long_conversation_is_not_taken_for_a_hostile_one():
    turns = [
        Message(*turn)
        for n in range(300)
        for turn in (("user", [A, f"question {n} " * 300]), ("assistant", "yes " * 50))
    ]
    prompt = builder("gemma3").build([*turns, Message("user", "end")])
    assert len(prompt.images) == 300


def test_tools_for_a_template_without_tools_are_refused():
    with pytest.raises(BadPrompt, match="no tools"):
        builder("vicuna").build([Message("user", "x")], tools=[{"type": "function"}])


class TestThinking:
    def test_which_models_can_think_is_known(self):
        assert builder("glm4v").can_think
        assert not builder("vicuna").can_think

    def test_an_open_block_at_the_end_is_seen(self):
        prompt = builder("glm4v").build([Message("user", "x")])
        assert prompt.thinking is True
        assert prompt.reasoning is not None
        assert (prompt.reasoning.opening, prompt.reasoning.closing) == ("<think>", "</think>")

    def test_an_unwanted_block_is_closed(self):
        prompt = builder("glm4v").build([Message("user", "x")], thinking=False)
        assert prompt.thinking is False
        assert flat(prompt).endswith("x/nothink<|assistant|>\n<think>\n\n</think>\n\n")

    def test_the_switch_reaches_the_template(self):
        off = builder("minicpm").build([Message("user", "x")], thinking=False)
        assert flat(off).endswith("<think>\n\n</think>\n\n")
        assert off.thinking is False
        assert not flat(builder("minicpm").build([Message("user", "x")], thinking=True)).endswith("</think>\n\n")

    def test_kimis_switch_and_tags(self):
        prompt = builder("kimi").build([Message("user", "x")], thinking=True)
        assert prompt.thinking is True
        assert prompt.reasoning == ReasoningStyle("◁think▷", "◁/think▷")
        assert builder("kimi").build([Message("user", "x")]).thinking is False

    def test_thinking_asked_of_a_model_that_cannot_is_refused(self):
        with pytest.raises(BadPrompt, match="does not think"):
            builder("vicuna").build([Message("user", "x")], thinking=True)

    def test_no_thinking_asked_of_a_model_that_never_does_is_fine(self):
        prompt = builder("vicuna").build([Message("user", "x")], thinking=False)
        assert prompt.thinking is False
        assert prompt.reasoning is None

    def test_a_user_who_writes_the_opening_tag_does_not_start_thoughts(self):
        prompt = bare("{{ messages[0].content }}{{ '' if 1 else '<think>' }}", tokens=("<think>",)).build(
            [Message("user", "what does <think>")]
        )
        assert prompt.thinking is False

    @pytest.mark.parametrize("family", ["minicpm", "glm4v"])
    def test_older_thoughts_are_left_out_as_the_template_would(self, family):
        """`</think>` may be a control token; with it hidden from the template, old thoughts stayed in the prompt."""
        text = flat(
            builder(family).build(
                [
                    Message("user", "a"),
                    Message("assistant", "<think>\nsecret\n</think>\n\nplain answer"),
                    Message("user", "b"),
                ]
            )
        )
        assert "secret" not in text
        assert "plain answer" in text

    def test_a_template_that_keeps_thoughts_gets_them_as_text(self):
        keeps = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{{ '<think>' }}"
        prompt = bare(keeps, tokens=("<think>", "</think>")).build(
            [Message("user", "a"), Message("assistant", "<think>kept</think>b"), Message("user", "c")]
        )
        assert "<think>kept</think>b" in flat(prompt)
        assert plain_texts(prompt) == ["<think>", "</think>"]

    def test_thoughts_go_to_a_template_that_has_a_place_for_them(self):
        shows = (
            "{% for m in messages %}{{ m.role }}:{% if m.reasoning_content %}({{ m.reasoning_content }})"
            "<think></think>{% endif %}{{ m.content }};{% endfor %}"
        )
        for answer in (Message("assistant", "<think> why </think>b"), Message("assistant", "b", reasoning="why")):
            prompt = bare(shows).build([Message("user", "a"), answer], add_generation_prompt=False)
            assert flat(prompt) == "user:a;assistant:(why)<think></think>b;"


class TestStopStrings:
    def test_turn_markers_that_are_plain_text_stop_the_answer(self):
        assert builder("vicuna").build([Message("user", "x")]).stop == ("USER:",)
        assert bare("<|im_start|>{{ messages[0].content }}<|im_end|>").build([Message("user", "x")]).stop == (
            "<|im_end|>",
        )

    @pytest.mark.parametrize("family", ["qwen2-vl", "gemma3", "llama3.2", "smolvlm", "mistral", "kimi"])
    def test_markers_that_are_tokens_need_no_stop(self, family):
        assert builder(family).build([Message("user", "x")]).stop == ()

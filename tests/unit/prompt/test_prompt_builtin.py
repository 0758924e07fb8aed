import pytest
from prompt_families import flat, image

from opsin.prompt import Message, PromptBuilder, TemplateSource
from opsin.prompt.template import choose

LLAMA_TOKENS = frozenset({"<s>", "</s>", "<unk>"})
A = image(1)


def model(name="LLaMA v2", architecture="llama", projector="mlp", tokens=LLAMA_TOKENS, kv_groups=1, template=None):
    return TemplateSource(template, architecture, name, projector, "<s>", "</s>", tokens, kv_groups)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (model(), "vicuna"),
        (model("llava-v1.5-13b"), "vicuna"),
        (model("llava-v1.6-vicuna-7b", kv_groups=4), "vicuna"),
        (model("llava-v1.6-mistral-7b"), "mistral"),
        (model("BakLLaVA-1"), "mistral"),
        (model("1.6", kv_groups=4), "mistral"),
        (model("small", kv_groups=2), "vicuna"),
        (model("llava-v1.6-34b", tokens=LLAMA_TOKENS | {"<|im_start|>"}), "llava-chatml"),
        (model("Qwen", "qwen2", None, LLAMA_TOKENS | {"<|im_start|>"}), "chatml"),
        (model("DeepSeek-OCR", "deepseek2-ocr", "deepseekocr"), "plain"),
        (model("unknown", "phi2", "mlp"), "vicuna"),
        (model("unknown", "falcon", None), "chatml"),
    ],
)
def test_the_choice_follows_the_file(source, expected):
    assert choose(source) == expected


def build(source, *messages):
    return PromptBuilder(source).build([Message(*message) for message in messages])


TALK = (("user", [A, "What is this?"]), ("assistant", "A cat."), ("user", "Which colour?"))
INTRO = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def test_vicuna():
    prompt = build(model(), *TALK)
    assert flat(prompt) == (f"{INTRO} USER: ¤\nWhat is this? ASSISTANT: A cat.</s>USER: Which colour? ASSISTANT:")
    assert prompt.stop == ("USER:",)
    assert prompt.add_bos is True
    assert prompt.images == (A,)


def test_vicuna_takes_a_system_message_instead_of_its_own():
    assert flat(build(model(), ("system", "Be brief. "), ("user", "Hi"))) == "Be brief. USER: Hi ASSISTANT:"


def test_mistral():
    prompt = build(model("llava mistral"), *TALK)
    assert flat(prompt) == "[INST] ¤\nWhat is this? [/INST] A cat.</s>[INST] Which colour? [/INST]"
    assert prompt.stop == ("[INST]",)
    assert flat(build(model("mistral"), ("system", "Be brief."), ("user", "Hi"))) == "[INST] Be brief.\n\nHi [/INST]"


def test_chatml_of_llava_34b():
    tokens = LLAMA_TOKENS | {"<|im_start|>", "<|im_end|>"}
    prompt = build(model("llava 34b", tokens=tokens), *TALK)
    assert flat(prompt) == (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n¤\nWhat is this?<|im_end|>"
        "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nWhich colour?<|im_end|><|im_start|>assistant\n"
    )
    assert prompt.stop == ()


def test_chatml_whose_end_marker_is_no_token_stops_at_its_text():
    assert build(model("x", "falcon", None), ("user", "Hi")).stop == ("<|im_end|>",)


def test_a_page_reader_gets_the_bare_instruction():
    assert (
        flat(build(model("DeepSeek-OCR", "deepseek2-ocr", "deepseekocr"), ("user", [A, "Free OCR."]))) == "¤Free OCR."
    )


def test_a_blank_template_counts_as_none():
    assert flat(build(model(template=" \n"), ("user", "Hi"))) == f"{INTRO} USER: Hi ASSISTANT:"


def test_images_around_a_text_stand_on_lines_of_their_own():
    assert "USER: a\n¤\n¤\nb ASSISTANT:" in flat(build(model(), ("user", ["a", A, A, "b"])))


@pytest.mark.parametrize("source", [model(), model("mistral")])
def test_roles_a_llava_does_not_know_are_told_as_text(source):
    assert "Result of the call:\nx" in flat(build(source, ("user", "Hi"), ("assistant", "?"), ("tool", "x")))

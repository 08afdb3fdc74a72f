"""The text templates, and the checks of chat templates."""

import pytest
from transformers import AutoTokenizer

from common.data.options import naming_flags
from common.data.records import Message, Prompt
from common.data.templates import TEMPLATE_NAMES, get_template
from common.errors import UserError
from tests.tokenizers_built import byte_level_bpe

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BRACKETS = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' </s>' }}{% endif %}{% endfor %}"
)


def prompt(*contents: str, system: str | None = None) -> Prompt:
    turns = [Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    return Prompt(tuple([Message("system", system)] * (system is not None) + turns))


def written(name: str, asked: Prompt, answer: str) -> str:
    template = get_template(name)
    return template.prompt_text(asked) + template.response_text(answer)


def test_human_assistant_is_the_layout_of_hh_transcripts():
    assert (
        written("human_assistant", prompt("Hi", "Hello.", "Who?"), "Me.")
        == "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: Me."
    )
    assert (
        written("human_assistant", prompt("Hi", system="Be kind."), "Yes.")
        == "Be kind.\n\nHuman: Hi\n\nAssistant: Yes."
    )


def test_question_answer_puts_the_system_prompt_first():
    assert written("question_answer", prompt("1+1?"), "2") == "Question: 1+1?\n\nAnswer: 2"
    assert (
        written("question_answer", prompt("1+1?", "2", "2+2?", system="Count."), "4")
        == "Count.\n\nQuestion: 1+1?\n\nAnswer: 2\n\nQuestion: 2+2?\n\nAnswer: 4"
    )


def test_alpaca_has_its_headings_and_a_system_prompt_instead_of_its_opening():
    text = written("alpaca", prompt("Sort this."), "Done.")
    assert text.startswith("Below is an instruction")
    assert text.endswith("\n\n### Instruction:\nSort this.\n\n### Response:\nDone.")
    assert (
        written("alpaca", prompt("Sort this.", system="Sort."), "Done.")
        == "Sort.\n\n### Instruction:\nSort this.\n\n### Response:\nDone."
    )


@pytest.mark.parametrize("name", [name for name in TEMPLATE_NAMES if name != "chat"])
def test_a_dialogue_grows_by_appending(name):
    """The prompt of a later turn starts with the prompt and answer of the earlier one."""
    earlier = written(name, prompt("a {} b", "c {x}", "{0}"), "an answer")
    later = get_template(name).prompt_text(prompt("a {} b", "c {x}", "{0}", "an answer", "more?"))
    assert later.startswith(earlier)


@pytest.mark.parametrize("chat_template, lead", [(CHATML, ""), (BRACKETS, " ")])
def test_chat_answers_continue_as_the_tokenizer_renders_them(tmp_path, chat_template, lead):
    tokenizer = AutoTokenizer.from_pretrained(byte_level_bpe(tmp_path, chat_template=chat_template))
    template = get_template("chat", tokenizer)
    dialogue = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    whole = tokenizer.apply_chat_template(dialogue, tokenize=False)
    assert template.lead == lead
    assert whole.startswith(template.prompt_text(prompt("Hi")) + template.response_text("Hello"))


def test_chat_without_a_chat_template_is_refused(tmp_path):
    with pytest.raises(UserError, match="--template chat: the tokenizer has no chat template"), naming_flags():
        get_template("chat", AutoTokenizer.from_pretrained(byte_level_bpe(tmp_path)))


def test_chat_templates_that_cannot_be_continued_are_refused(tmp_path):
    shouting = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(UserError, match="continuation"):
        get_template("chat", AutoTokenizer.from_pretrained(byte_level_bpe(tmp_path, chat_template=shouting)))


def test_a_role_the_chat_template_refuses_is_named(tmp_path):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    tokenizer = AutoTokenizer.from_pretrained(byte_level_bpe(tmp_path, chat_template=strict))
    template = get_template("chat", tokenizer)
    with pytest.raises(UserError, match="system, user: no system"):
        template.prompt_text(prompt("Hi", system="Be kind."))


def test_unknown_template_lists_the_known_ones():
    with pytest.raises(UserError, match="human_assistant, question_answer, alpaca, chat"):
        get_template("vicuna")

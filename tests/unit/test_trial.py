"""Tokenizers and chat templates that hang, recurse, fail or fill the memory are refused in one line."""

import json

import pytest

from common.data import trial
from common.data.tokenization import load_tokenizer
from common.data.trial import try_template, try_tokenizer
from common.errors import UserError
from tests.architectures import CONFIGS, build_model


@pytest.fixture
def directory(tmp_path, builtin_cache):
    return build_model("llama", tmp_path / "model", builtin_cache)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(trial, "SECONDS", 1)
    monkeypatch.setattr(trial, "MEMORY", 2**28)


@pytest.mark.parametrize("name", CONFIGS)
def test_usual_tokenizers_pass(name, tmp_path, builtin_cache):
    directory = build_model(name, tmp_path / name, builtin_cache)
    try_tokenizer(load_tokenizer(str(directory)), str(directory))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}",
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% endfor %}",
        "{{ messages[0]['content'] }}{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}",
    ],
)
def test_templates_that_render_or_refuse_in_their_own_words_pass(template, directory):
    tokenizer = load_tokenizer(str(directory))
    tokenizer.chat_template = template
    try_template(tokenizer, str(directory))


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recurses without end"),
        ("{{ 1 // 0 }}", "fails (ZeroDivisionError"),
        ("{{ 'x' * 10**10 }}", "takes more than 256 MiB of memory"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
            "{% endfor %}",
            "takes more than 1 seconds",
        ),
        ("{{ messages + 1 }}", "fails (TypeError"),
    ],
)
@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_templates_that_do_harm_are_refused_by_the_name_of_their_file(template, said, file, directory):
    if file == "chat_template.jinja":
        (directory / file).write_text(template)
    else:
        config = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps({**config, "chat_template": template}))
    with pytest.raises(UserError) as refused:
        try_template(load_tokenizer(str(directory)), str(directory))
    assert str(refused.value).startswith(f"{directory}/{file}: the chat template cannot be used: ")
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(\w+\s?)*\d", r"(\s+)+x", "(.*)*y", r"([a-z]|[a-z]+)*!"])
def test_patterns_that_backtrack_without_end_are_refused_by_the_name_of_their_file(pattern, tmp_path, builtin_cache):
    directory = build_model("opt", tmp_path / "model", builtin_cache)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            content["pre_tokenizer"],
        ],
    }
    path.write_text(json.dumps(content))
    from transformers import AutoTokenizer

    with pytest.raises(UserError) as refused:
        try_tokenizer(AutoTokenizer.from_pretrained(directory), str(directory))
    assert str(refused.value).startswith(f"{path}: the tokenizer cannot be used: to encode a text ")
    assert "\n" not in str(refused.value)

"""Chat templates render as in transformers, and stay in their sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmworks.core.errors import UsageError
from lmworks.generate.chat import ChatTemplate, load_template

TEMPLATES = {
    "chatml": """{% for message in messages %}{% if loop.first and messages[0].role != 'system' %}{{ '<|im_start|>system
You help.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
    "blocks": """
{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    [{{ message.role }}] {{ message.content | trim }}
    {% generation %}kept{% endgeneration %}
{% endfor %}
""",
    "namespace": "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% endfor %}{{ n.i }}",
    "dict": "{{ dict(a=1) }}",
    "json": "{{ messages | tojson(indent=2) }}{{ messages[0] | tojson(sort_keys=true) }}",
}
MESSAGES = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "  Größe? "},
    {"role": "assistant", "content": "5"},
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_as_transformers_renders_it(name: str, prompt: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    theirs, _ = utils.render_jinja_template(
        conversations=[MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=prompt, bos_token="<s>"
    )
    ours = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>"}).render(MESSAGES, add_generation_prompt=prompt)
    assert ours == theirs[0]


def test_a_template_that_refuses_says_why() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(UsageError, match="roles must alternate"):
        template.render(MESSAGES)


def test_a_broken_template_is_refused() -> None:
    with pytest.raises(UsageError, match="not Jinja"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ dict.__class__.__init__.__globals__ }}",
        "{% set n = namespace(__class__=1) %}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(text: str) -> None:
    template = ChatTemplate(text, {})
    try:
        shown = template.render(MESSAGES)
    except UsageError:
        return
    assert "class" not in shown
    assert len(MESSAGES) == 3


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert load_template(tmp_path) is None
    config = {"chat_template": "{{ eos_token }}", "eos_token": {"content": "</s>"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_template(tmp_path)
    assert found is not None
    assert found.render([]) == "</s>"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    found = load_template(tmp_path)
    assert found is not None
    assert found.render([]) == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    found = load_template(tmp_path)
    assert found is not None
    assert found.render([]) == "file"

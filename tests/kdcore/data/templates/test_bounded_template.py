"""A stranger's chat template: it renders as in transformers, or ends soon with its cause."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils import chat_template_utils

from kdcore.data.templates import bounded as bounded_template
from kdcore.data.templates.bounded import render
from kdcore.errors import UserError

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "héllo\n\tworld 100% {x}"},
    {"role": "assistant", "content": "<think>hm</think> yes"},
]
LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"

ORDINARY = [
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages if m.role != 'system' %}"
    "{% set ns.n = ns.n + loop.index0 %}{{ loop.length ~ ':' ~ loop.last ~ m.content * 2 }}"
    "{% endfor %}{{ ns.n }}",
    "{{ messages | tojson(indent=2) }}{{ dict(a=[1, 2], b={'c': (3,)}) }}",
    "{% macro turn(m) %}{{ '%-9s|%05d' % (m.role, 7) }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% if loop.index0 % 2 == 0 %}!{% endif %}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ '{:>8} {}'.format('a', 2 ** 8) }}",
    "{{ messages | selectattr('role', 'in', ['user']) | list | length }}"
    "{{ messages[2].content.split('</think>')[-1].replace('s', 'ss').strip().center(9) }}",
    "{% set tree = [['a', ['b', ['c']]], ['d', []]] %}{% for name, below in tree recursive %}"
    "{{ name }}{{ loop([below]) if below | length > 1 }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% continue %}{% endif %}{% endfor %}",
    "{% set x %}{% for m in messages[::-1] %}{{ m.content | upper | indent(4) }}{% endfor %}"
    "{% endset %}{{ x | replace('\\n', ' ') | default('none') }}{{ [1, 2] + [3] }}",
]


@pytest.mark.parametrize("template", ORDINARY)
def test_an_ordinary_template_renders_as_in_transformers(template: str) -> None:
    arguments: dict[str, Any] = {
        "conversations": [CHAT],
        "return_assistant_tokens_mask": "generation" in template,
        "eos_token": "</s>",
    }
    expected = chat_template_utils.render_jinja_template(chat_template=template, **arguments)
    for _ in range(2):
        assert render(template, "a chat", **arguments) == expected
    assert expected[0][0]


COSTLY = {
    "nested loops": LOOP * 3 + END * 3,
    "nested loops that print": LOOP * 2 + "x" + END * 2,
    "branching macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "a recursive loop": "{% for i in [40] recursive %}{% if i %}{{ loop([i - 1, i - 1]) }}"
    "{% endif %}{% endfor %}",
    "a filter that maps": LOOP + "{% if range(99999) | map('upper') | list %}{% endif %}" + END,
    "a test that selects": LOOP
    + "{% if range(99999) | select('in', [0]) | list %}{% endif %}"
    + END,
    "comparisons": "{% set s = 'a' * 9999999 %}" + "{{ 'b' in s }}" * 3000,
    "slices": "{% set s = 'a' * 9999999 %}" + "{% set x = s[1:] %}" * 300,
    "captured output": "{% set s = 'a' * 9999999 %}"
    + "{% set x %}{{ s }}{{ s }}{% endset %}" * 300,
}


@pytest.mark.parametrize("template", COSTLY.values(), ids=COSTLY)
def test_a_template_that_takes_long_is_given_up(
    monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(bounded_template, "SECONDS", 0.05)
    with pytest.raises(UserError, match=r"row 7: the chat template takes more than 0\.05 s"):
        render(template, "row 7", conversations=[CHAT])
    # and the next one has a time of its own
    assert render("{{ messages[0].role }}", "row 8", conversations=[CHAT])[0] == ["system"]


TWENTY = "{% for i in range(20) %}"
LARGE = {
    "a width in %": "{{ '%0999999999d' % 1 }}",
    "a width in % from a value": "{{ '%*d' % (999999999, 1) }}",
    "a width in the filter format": "{{ '%0999999999d' | format(1) }}",
    "a width in format": "{{ '{:999999999}'.format(1) }}",
    "a width in format from a value": "{{ '{:{}}'.format(1, 999999999) }}",
    "a width in format_map": "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "a string many times": "{{ 'a' * 999999999 }}",
    "many times a string": "{{ 999999999 * 'a' }}",
    "a list many times": "{{ [1, 2] * 999999999 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a huge integer that is read": "{% set x = ('f' * 99999) | int(0, 16) %}",
    "a huge integer that is written": "{{ 0x1" + "0" * 99999 + " // 7 }}",
    "center": "{{ 'a' | center(999999999) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "zfill": "{{ 'a'.zfill(999999999) }}",
    "expandtabs": "{{ '\\t'.expandtabs(999999999) }}",
    "to_bytes": "{{ (1).to_bytes(999999999, 'big') }}",
    "batch": "{{ [1] | batch(999999999, 'x') | list }}",
    "slice": "{{ [1] | slice(999999999, 'x') | list }}",
    "indent": "{{ ('a\\n' * 9999) | indent(9999) }}",
    "wordwrap": "{{ ('a ' * 9999) | wordwrap(1, wrapstring='b' * 9999) }}",
    "tojson": "{{ ([1] * 9999) | tojson(indent=9999) }}",
    "replace": "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "the filter replace": "{{ ('a' * 9999) | replace('a', 'b' * 9999) }}",
    "translate": "{{ ('a' * 9999).translate({97: 'b' * 9999}) }}",
    "join": "{{ ('b' * 9999).join(range(9999) | map('string')) }}",
    "the filter join": "{{ range(9999) | join('b' * 9999) }}",
    "map of replace": "{{ ['a' * 9999] | map('replace', 'a', 'b' * 9999) | list }}",
    "sum of lists": "{{ ([[1] * 99] * 99) | sum(start=[]) }}",
    "lipsum": "{{ lipsum(n=9999) }}",
    "doubling by ~": "{% set n = namespace(s='ab') %}"
    + TWENTY * 2 + "{% set n.s = n.s ~ n.s %}" + END * 2,
    "doubling by +": "{% set n = namespace(s='ab') %}"
    + TWENTY * 2 + "{% set n.s = n.s + n.s %}" + END * 2,
    "doubling by a block": "{% set n = namespace(s='ab') %}"
    + TWENTY * 2 + "{% set s %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = s %}" + END * 2,
    "a list of lists": "{% set n = namespace(s=[1]) %}"
    + TWENTY * 2 + "{% set n.s = [n.s, n.s] %}" + END * 2 + "{{ n.s }}",
    "a tuple of tuples": "{% set n = namespace(s=(1,)) %}"
    + TWENTY * 2 + "{% set n.s = (n.s, n.s) %}" + END * 2 + "{{ n.s }}",
    "a dict of dicts": "{% set n = namespace(s={}) %}"
    + TWENTY * 2 + "{% set n.s = {'a': n.s, 'b': n.s} %}" + END * 2 + "{{ n.s }}",
    "dict()": "{% set n = namespace(s={}) %}"
    + TWENTY * 2 + "{% set n.s = dict(a=n.s, b=n.s) %}" + END * 2 + "{{ n.s }}",
    "a namespace of itself": "{% set n = namespace() %}{% set n.s = n %}{{ [n] }}",
    "output": "{% for i in range(999) %}{{ 'a' * 9999 }}{% endfor %}",
    "output with marked parts": "{% generation %}{% endgeneration %}"
    "{% for i in range(999) %}{{ 'a' * 9999 }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("template", LARGE.values(), ids=LARGE)
def test_a_template_that_makes_something_large_is_refused(
    monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(bounded_template, "LARGEST", 2**22)
    with pytest.raises(UserError, match="row 7: the chat template") as refused:
        marks = "generation" in template
        render(template, "row 7", conversations=[CHAT], return_assistant_tokens_mask=marks)
    assert "\n" not in refused.value.cause
    assert len(refused.value.cause) < 200


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{% include 'other.jinja' %}", "includes the file 'other.jinja'"),
        ("{% import '/etc/passwd' as p %}", "includes the file '/etc/passwd'"),
        ("{% extends messages[0].role %}", "includes the file 'system'"),
        ("{{ raise_exception('no system') }}", "rejects the conversation: no system"),
        ("{{ raise_exception('no\nsystem' ~ 'x' * 999) }}", f"no system{'x' * 291}"),
        ("{{ ''.__class__.__mro__ }}", "fails: SecurityError: access to attribute"),
        ("{{ messages[9].role }}", "fails: UndefinedError: list object has no element 9"),
        ("{#" + " " * 2**20 + "#}", "has more than 262,144 characters"),
        ("{{ 1 + 'a' }}", "fails: TypeError"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ 'a'.index('b') }}", "fails: ValueError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "macros call each other"),
        ("{% for %}", "has an error in line 1"),
        ("{{ x | nothing }}", "has an error in line 1"),
        ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "the chat template fails"),
        ("{{ 9 ** 9999 }}", "fails: ValueError"),
    ],
)
def test_a_template_that_fails_says_why(template: str, cause: str) -> None:
    with pytest.raises(UserError) as refused:
        render(template, "row 7", conversations=[CHAT])
    assert cause in refused.value.cause
    assert "\n" not in refused.value.cause and len(refused.value.cause) < 400
    assert refused.value.cure


def test_a_long_conversation_is_not_large() -> None:
    """A million characters, as many templates treat them."""
    turn = {"role": "user", "content": "word\n" * 2000}
    template = (
        "{% for m in messages %}{{ '<%s>%s{x}' % (m.role, m.content.replace('\n', '\n\n')) }}"
        "{{ '{}: {}'.format(m.role, m.content | indent(8)) ~ m.content }}{% endfor %}"
        "{{ '\n'.join(messages | map(attribute='content')) }}{{ messages | tojson(indent=4) }}"
    )
    (text,), _ = render(template, "a chat", conversations=[[turn] * 100])
    assert len(text) > 5_000_000


def test_transformers_itself_renders_as_before() -> None:
    compiled = chat_template_utils._compile_jinja_template
    with pytest.raises(UserError):
        render("{{ 'a' * 999999999 }}", "row 7", conversations=[CHAT])
    assert chat_template_utils._compile_jinja_template is compiled

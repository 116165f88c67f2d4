"""Hostile chat templates are stopped in a capped process, before they run in this one."""

from __future__ import annotations

import resource
import time

import pytest
from tiny import FAMILIES, tiny_tokenizer

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.template_guard import check_template

HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops within loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "repeated string": "{{ 'a' * 10000000000 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "wide format": "{{ '%1000000000d' % 1 }}",
    "centered": "{{ 'a' | center(5000000000) }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for m in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling with every message": "{% set ns = namespace(x='ab') %}{% for m in messages %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x | length }}",
    "doubled lists": "{% set ns = namespace(x=[1]) %}{% for m in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "endless output": "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'spam spam' }}{% endfor %}{% endfor %}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}
SLICE = ("nested loops", "repeated string", "doubling with every message", "endless output")


def check(name: str) -> None:
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(ValueError, match=r"chat template (used more than|wrote more than)"):
        check_template(HOSTILE[name])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert time.monotonic() - started < 60
    # The largest child so far, in KiB: children of tests that ran before count too, and each begins as its parent is.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after.ru_maxrss <= max(before.ru_maxrss, own + 640 * 1024)


@pytest.mark.parametrize("name", SLICE)
def test_hostile_templates_are_stopped(name):
    check(name)


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(set(HOSTILE) - set(SLICE)))
def test_every_hostile_template_is_stopped(name):
    check(name)


def test_a_hostile_template_never_runs_in_this_process():
    tokenizer = tiny_tokenizer("chatml", chat_template=HOSTILE["repeated string"])
    with pytest.raises(ValueError, match="it is not run"):
        ChatTemplate(tokenizer)


def test_ordinary_templates_pass_also_when_they_object_to_the_probes():
    for family in FAMILIES.values():
        check_template(family.template)
    check_template("{{ raise_exception('no') }}")
    check_template("{% generation %}{{ messages[0].content }}{% endgeneration %}")


def test_a_template_in_bad_jinja_is_reported_where_it_is_compiled():
    check_template("{% for %}")

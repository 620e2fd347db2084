"""Chat templates: the same string as transformers, errors in one sentence, a closed sandbox."""

from __future__ import annotations

import copy
import json
import shutil
import time
from datetime import datetime
from enum import Enum
from pathlib import Path

import pytest

from fastinfer.text import (
    ChatTemplateError,
    RenderLimits,
    Tokenizer,
    encode_chat,
    load_tokenizer,
    render_chat,
)

# Written for these tests in the manner of the families named.
LLAMA3 = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
    {%- set rest = messages %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y") %}
    {%- else %}
        {%- set date_string = "2024" %}
    {%- endif %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in rest %}
    {%- if message.role in ['user', 'assistant', 'system'] and not 'tool_calls' in message %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("One call at a time, please!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|eom_id|>' }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

CHATML = """
{%- macro render_parameters(parameters, depth=0) %}
    {%- for name, schema in parameters.items() | sort %}
        {{- "  " * depth ~ "- " ~ name ~ ": " ~ (schema.type or "any") ~ "\\n" }}
        {%- if schema.properties %}{{ render_parameters(schema.properties, depth + 1) }}{% endif %}
    {%- endfor %}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}{{ tool | tojson }}{{ tool | tojson(indent=2) }}
        {{- render_parameters(tool.function.parameters.properties) }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- generation %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endgeneration %}
{%- endfor %}
{{- "last=%d" | format(ns.last_query_index) }}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate') }}
    {%- endif %}
    {%- if message["content"] == "skip me" %}{% continue %}{% endif %}
    {%- if message["content"] == "stop here" %}
        {%- break %}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and loop.last %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- '{"type": "function", ' }}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{ ", " }}{% endif %}
                {%- endfor %}
                {{- "}" if loop.last else "}, " }}
            {%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""

ODDS = """
{%- set d = dict(a=1, b='<&>') %}{{ d.a }}{{ d | tojson }}{{ dict.fromkeys(['k'], 2) | tojson }}
{% for item in documents or [] %}
  {{ loop.index }}/{{ loop.length }} {{ item.title | upper }}: {{ item.text | indent(2) }}
{% endfor %}
   {# a comment #}
{% set parts = [] %}{% for m in messages %}{% set parts = parts + [m.role] %}{% endfor %}
{{ messages | map(attribute='role') | join(', ') }} {{ missing_name }} {{ unk_token }}
{{ '%s-%05.2f' % ('x', 3.14159) }} {{ '{:>6}|{}'.format('ab', 3) }} {{ 'a' ~ 1 ~ none }}
{% set block %}<b>{{ messages[0].content }}</b>{% endset %}{{ block | replace('b>', 'i>') }}
{% filter upper %}shout{% endfilter %}{{ cycler('a', 'b').next() }}{{ range(3) | list }}
{% generation %}{% set inner = 1 %}[{{ inner }}]{% endgeneration %}{{ inner is defined }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 2 ** 10 }}{{ 7 * 3 }}
{{ ['x', 'y'] * 2 }}{{ ', '.join(['p', 'q']) }}{{ 'aXa'.replace('X', '-') }}{{ "é日" | tojson }}
{% macro outer(n) %}
{% macro nested(k) %}<{{ k }}>{% endmacro %}{{ nested(n) }}{{ caller() }}
{% endmacro %}
{% call outer(3) %}called{% endcall %}
{% for m in messages %}{{ m.tool_calls is defined }}{% endfor %}
{{ {'b': 1, 'a': [1, none, true]} | tojson(sort_keys=true, separators=(',', ':')) }}
"""
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "mistral": MISTRAL, "odds": ODDS}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What it's like outside <now> & later, in °C",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {
                        "type": "object",
                        "properties": {"city": {"type": "string"}, "zip": {"type": "integer"}},
                    }
                },
                "required": ["place"],
            },
        },
    }
]
SYSTEM = {"role": "system", "content": "  Be brief.\n"}
USER = {"role": "user", "content": 'Hello, 日本 <b>&amp;</b> "quoted"?\n'}
REPLY = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi. "}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"place": {"zip": 1}}}}
    ],
}
RESULT = {"role": "tool", "name": "weather", "content": '{"t": 3}'}
CONVERSATIONS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, REPLY, {"role": "user", "content": "and?"}],
    "skip": [USER, {"role": "assistant", "content": "skip me"}, USER],
    "break": [USER, {"role": "assistant", "content": "stop here"}, USER],
    "tool": [USER, CALL, RESULT],
}


@pytest.fixture(scope="module")
def tok(byte_level: Path) -> Tokenizer:
    return load_tokenizer(byte_level)


@pytest.fixture(scope="module")
def other(byte_level: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(byte_level)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_equal_to_transformers(tok: Tokenizer, other, template: str, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    before = copy.deepcopy(messages)
    documents = [{"title": "one", "text": "a\nb"}, {"title": "two", "text": ""}]
    for options in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": False, "tools": TOOLS},
        {"add_generation_prompt": True, "documents": documents, "enable_thinking": False},
        {"date_string": "26 Jul 2024", "add_generation_prompt": True, "bos_token": "<BOS>"},
    ):
        options = {**options, "chat_template": TEMPLATES[template]}
        try:
            want = other.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # both refuse, for the same reason
            with pytest.raises(ChatTemplateError) as info:
                render_chat(tok, messages, **options)
            assert str(error) in str(info.value)
            continue
        assert render_chat(tok, messages, **options) == want
        ids = other.encode(want, add_special_tokens=False)
        assert encode_chat(tok, messages, **options) == ids
    assert messages == before


def test_bos_appears_once(tok: Tokenizer) -> None:
    ids = encode_chat(tok, [USER], chat_template=MISTRAL)
    assert ids.count(tok.bos_token_id) == 1
    assert encode_chat(tok, [USER], chat_template="x") == tok.encode("x", add_special_tokens=False)


def test_strftime_now(tok: Tokenizer) -> None:
    form = "%d %b %Y"
    before = datetime.now().strftime(form)
    text = render_chat(tok, [USER], chat_template="{{ strftime_now('" + form + "') }}")
    assert text in (before, datetime.now().strftime(form))


# ---- where the template comes from ----------------------------------------------------------


def folder_with(byte_level: Path, tmp_path: Path, **config) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(byte_level, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **config}))
    return folder


def test_template_in_the_config(byte_level: Path, tmp_path: Path) -> None:
    tok = load_tokenizer(folder_with(byte_level, tmp_path, chat_template="C{{ messages[0].role }}"))
    assert render_chat(tok, [USER]) == "Cuser"


def test_named_templates(byte_level: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    folder = folder_with(byte_level, tmp_path, chat_template=named)
    tok = load_tokenizer(folder)
    assert render_chat(tok, [USER]) == "D"
    assert render_chat(tok, [USER], tools=TOOLS) == "T"
    assert render_chat(tok, [USER], tools=TOOLS, chat_template="default") == "D"
    assert render_chat(tok, [USER], chat_template="own {{ messages|length }}") == "own 1"

    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    tok = load_tokenizer(folder)  # files win over the config
    assert render_chat(tok, [USER], chat_template="rag") == "R"
    with pytest.raises(ChatTemplateError, match=r"must name one of .*\['rag'\]"):
        render_chat(tok, [USER])

    (folder / "chat_template.jinja").write_text("J")
    assert render_chat(load_tokenizer(folder), [USER]) == "J"
    shutil.rmtree(folder / "additional_chat_templates")
    assert load_tokenizer(folder).chat_template == "J"


def test_no_template(tok: Tokenizer) -> None:
    with pytest.raises(ChatTemplateError, match=r"must have a chat template, got none"):
        render_chat(tok, [USER])


# ---- wrong input ----------------------------------------------------------------------------

BAD_MESSAGES = [
    ("hi", "must be a list"),
    ({"role": "user", "content": "x"}, "must be a list"),
    ([], "at least one message"),
    (["hi"], r"messages\[0\] must be a mapping"),
    ([USER, {"content": "x"}], r"messages\[1\]\['role'\] must be a non-empty string, got None"),
    ([{"role": 1, "content": "x"}], r"messages\[0\]\['role'\]"),
    ([{"role": "user"}], r"messages\[0\] must have 'content'"),
    ([{"role": "user", "content": None}], r"messages\[0\] must have 'content'"),
    ([{"role": "user", "content": 3}], "must be a string, a list of parts or a mapping, got int"),
    ([{"role": "user", "content": b"x"}], "got bytes"),
    ([{"role": "user", "content": [b"x"]}], "made of strings, numbers"),
    ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\]\['extra'\]"),
]


@pytest.mark.parametrize(("messages", "match"), BAD_MESSAGES)
def test_bad_messages(tok: Tokenizer, messages, match: str) -> None:
    with pytest.raises(ChatTemplateError, match=match):
        render_chat(tok, messages, chat_template="x")


def test_bad_extras(tok: Tokenizer) -> None:
    with pytest.raises(ChatTemplateError, match="tools must be a list of mappings"):
        render_chat(tok, [USER], chat_template="x", tools=[print])
    with pytest.raises(ChatTemplateError, match="documents must be a list of mappings"):
        render_chat(tok, [USER], chat_template="x", documents={"title": "t"})
    with pytest.raises(ChatTemplateError, match="handle must be made of"):
        render_chat(tok, [USER], chat_template="x", handle=open)
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ChatTemplateError, match="nested at most"):
        render_chat(tok, [{"role": "user", "content": deep}], chat_template="x")


def test_template_faults(tok: Tokenizer) -> None:
    cases = {
        "{% if %}": "valid jinja2, got .* at line 1",
        "{{ messages[0].nothing.at_all }}": "has no attribute",
        "{{ 1 / 0 }}": "division by zero",
        "{{ raise_exception('not <this> way') }}": "refused them: not <this> way",
        "{{ 'a' + 1 }}": "must render these messages",
        "{{ unknown() }}": "undefined",
        "{% include 'x' %}": "must render these messages",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
        "(" * 5000 + "{{ " + "(" * 5000: "chat template must",
    }
    for template, match in cases.items():
        with pytest.raises(ChatTemplateError, match=match):
            render_chat(tok, [USER], chat_template=template)


def test_subclasses_are_reduced_to_plain_values(tok: Tokenizer) -> None:
    class Role(str, Enum):
        USER = "user"

    messages = ({"role": Role.USER, "content": ({"type": "text", "text": "x"},)},)
    template = "{{ messages[0].role }}{{ messages | tojson }}"
    text = render_chat(tok, messages, chat_template=template)
    assert text == 'user[{"role": "user", "content": [{"type": "text", "text": "x"}]}]'


# ---- the sandbox ----------------------------------------------------------------------------

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ [''] | map(attribute='__class__') | list | first | string }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['__builtins__'] }}",
    "{{ dict.__call__.__globals__ }}",
    "{{ dict.mro() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ ''.format.__self__.__class__.x }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__class__}' | format('') | length // 0 }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{% set f = '{x.__class__}'.format_map %}{{ f({'x': 1}) }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__init__=1) }}",
    "{{ environment.tick }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].clear() }}",
    "{{ import_module('os') }}",
    "{% import 'os' as os %}",
    "{{ open('/etc/passwd').read() }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_escapes_are_refused(tok: Tokenizer, template: str) -> None:
    messages = [dict(USER)]
    reasons = "is unsafe|underscore name|is undefined|has no attribute|not all arguments|no loader"
    with pytest.raises(ChatTemplateError, match=reasons):
        render_chat(tok, messages, chat_template=template)
    assert messages == [USER]


NESTED = "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}"
SLOW = [
    "{% set r = range(90000) | list %}" + NESTED,
    "{% set r = range(90000) %}" + NESTED,
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for a in range(90000) %}{{ range(90000) | map('string') | list | length }}{% endfor %}",
    "{% for a in range(90000) recursive %}{{ loop(range(9000)) }}{% endfor %}",
]


@pytest.mark.parametrize("template", SLOW)
def test_time_is_bounded(tok: Tokenizer, template: str) -> None:
    start = time.monotonic()
    with pytest.raises(ChatTemplateError, match=r"longer than 0\.1 seconds|recursion"):
        render_chat(tok, [USER], chat_template=template, limits=RenderLimits(max_seconds=0.1))
    assert time.monotonic() - start < 3


# What a variable is set to again and again, doubling each time.
GROWTH = [
    ("n", "ns.n * ns.n"),
    ("s", "ns.s + ns.s"),
    ("s", "ns.s ~ ns.s"),
    ("l", "ns.l + ns.l"),
    ("s", "ns.s.replace('a', 'aa')"),
    ("s", "ns.s | replace('a', 'aa')"),
    ("s", "ns.s.join([ns.s, ns.s])"),
    ("s", "[ns.s, ns.s] | join(ns.s)"),
    ("s", "[ns.s, ns.s] | join"),
    ("s", "'%s%s' % (ns.s, ns.s)"),
    ("s", "'%s%s' | format(ns.s, ns.s)"),
    ("s", "'{0}{0}'.format(ns.s)"),
]
LOOP = "{% set ns = namespace(s='aa', n=3, l=[1]) %}{% for i in range(99) %}BODY{% endfor %}"
LARGE = [
    *[LOOP.replace("BODY", f"{{% set ns.{name} = {value} %}}") for name, value in GROWTH],
    "{{ 'a' * 1000000000000 }}",
    "{{ 1000000000000 * 'a' }}",
    "{{ [1] * 1000000000000 }}",
    "{{ 9 ** 999999999999 }}",
    LOOP.replace("BODY", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
    "{% for i in range(90000) %}{{ 'text' * 1000 }}{% endfor %}",
    "{{ 'a' | center(1000000000000) }}",
    "{{ ['a'] | map('center', 1000000000000) | first }}",
    "{{ 'a\nb' | indent(1000000000000) }}",
    "{{ [1] | batch(1000000000000, 0) | list }}",
    "{{ [1] | slice(1000000000000) | list }}",
    "{{ 'a'.center(1000000000000) }}",
    "{{ 'a'.zfill(1000000000000) }}",
    "{{ (1).to_bytes(1000000000000, 'big') }}",
    "{{ 'aaa'.translate({97: 'b' * 100000}) }}",
    "{{ '%1000000000000d' % 1 }}",
    "{{ '%*d' % (1000000000000, 1) }}",
    "{{ '%1000000000000d' | format(1) }}",
    "{{ '{:>1000000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000000) }}",
    "{{ ('{0}' * 90000).format('a' * 90000) }}",
    "{{ ('{a}' * 60000).format_map({'a': 'a' * 90000}) }}",
    "{{ ('%(a)s' * 30000) % {'a': 'a' * 90000} }}",
    "{{ ('%(a)s' * 30000) | format(a='a' * 90000) }}",
    "{{ ('a\n' * 90000) | indent(900) }}",
    "{{ {} | tojson(indent=1000000000000) }}",
    "{{ 'a b' | wordwrap(1, wrapstring='x' * 90000) }}",
    "{{ range(1000000000000) | list }}",
    "x" * (2**20 + 1),
]


@pytest.mark.parametrize("template", LARGE, ids=range(len(LARGE)))
def test_size_is_bounded(tok: Tokenizer, template: str) -> None:
    start = time.monotonic()
    reasons = "within its limits|is unsafe|Range too big|No filter named"
    with pytest.raises(ChatTemplateError, match=reasons):
        render_chat(tok, [USER], chat_template=template, limits=RenderLimits(max_chars=200_000))
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "template",
    ["{{ ('{' ~ ':' * 200000).format(1) }}", "{{ ('%' ~ '1 ' * 200000) % 1 }}"],
)
def test_the_checks_themselves_take_linear_time(tok: Tokenizer, template: str) -> None:
    start = time.monotonic()
    with pytest.raises(ChatTemplateError):
        render_chat(tok, [USER], chat_template=template)
    assert time.monotonic() - start < 5


def test_limits_can_be_raised(tok: Tokenizer) -> None:
    messages = [{"role": "user", "content": "x" * 5000}]
    template = "{{ messages[0].content }}"
    with pytest.raises(ChatTemplateError, match=r"more than 4000 characters.*RenderLimits"):
        render_chat(tok, messages, chat_template=template, limits=RenderLimits(max_chars=4000))
    large = RenderLimits(max_chars=5000)
    assert render_chat(tok, messages, chat_template=template, limits=large) == "x" * 5000


def test_messages_reach_the_template_as_given(tok: Tokenizer) -> None:
    """transformers up to 5.17 gave a message without content an empty one; later releases and we
    do not.
    """
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    template = "{% for m in messages %}{{ m.content is defined }} {% endfor %}"
    assert render_chat(tok, messages, chat_template=template) == "True False "

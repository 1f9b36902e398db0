"""Templates: how a conversation becomes the text that a model reads."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from jinja2 import TemplateError

from tdistill.errors import ConfigError, DataFileError, did_you_mean

TemplateKind = Literal["chat", "alpaca", "none"]

# Stanford Alpaca's wording, with a line break after "Response:" as in MiniLLM's data scripts (arXiv 2306.08543).
# The preamble is given once, and a system message takes its place.
_ALPACA = "".join(
    (
        r"{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}",
        r"{% else %}Below is an instruction that describes a task",
        r"{% if messages[0]['input'] %}, paired with an input that provides further context{% endif %}",
        r". Write a response that appropriately completes the request.{% endif %}{{ '\n\n' }}",
        r"{% for message in messages %}",
        r"{% if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}",
        r"{% if message['input'] %}{{ '### Input:\n' + message['input'] + '\n\n' }}{% endif %}",
        r"{% elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] }}",
        r"{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endif %}{% endfor %}",
        r"{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    )
)
_RAW = "".join(
    (
        r"{% if messages | length > 2 or messages[0]['role'] != 'user' %}",
        r"{{ raise_exception('raw text has no roles, so it can hold one prompt and its answer only') }}{% endif %}",
        r"{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )
)

# Some chat templates write today's date into the prompt: token ids would then differ between the day of capture and
# the day of evaluation. The clock is replaced by the date that Llama 3.2's own template falls back to.
_DATE_CODES = "YymdBbAaHMS"
_DATE = ("2024", "24", "07", "26", "July", "Jul", "Friday", "Fri", "00", "00", "00")
_FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{code}', '{value}')" for code, value in zip(_DATE_CODES, _DATE, strict=True))
    # Jinja drops the line break after a block, and then treats what follows as the start of a line, as it was.
    + " }}{% endmacro %}\n"
)


@dataclass(frozen=True)
class Template:
    """A Jinja chat template and the rules of the kind it belongs to.

    Attributes:
        kind: ``chat`` (the tokenizer's own; writes its special tokens itself), ``alpaca`` (instruction template for
            tokenizers without one) or ``none`` (the bare text).
        text: source of the template. Templates that ask for the date get a fixed one, so that token ids do not
            depend on the day; settings such as ``enable_thinking`` are written into it.
    """

    kind: TemplateKind
    text: str

    @property
    def sha256(self) -> str:
        """Hash of kind and source, for the identity of a store."""
        return hashlib.sha256(f"{self.kind}\n{self.text}".encode()).hexdigest()

    def for_tokenizer(self, tokenizer: Any) -> str:
        """The same as a tokenizer's ``chat_template``, which writes special tokens itself."""
        begins = (
            self.kind != "chat" and tokenizer.bos_token_id in tokenizer("", add_special_tokens=True)["input_ids"][:1]
        )
        return ("{{ bos_token }}" if begins else "") + self.text

    def render(
        self, messages: Sequence[Mapping[str, str]], tokenizer: Any, *, add_generation_prompt: bool, who: str
    ) -> str:
        """Text of a conversation.

        Args:
            messages: maps with ``role``, ``content`` and, in the user turn of an instruction record, ``input``. Only
                ``alpaca`` has a place for the latter; elsewhere it follows the content after an empty line.
            tokenizer: gives the template its special tokens.
            add_generation_prompt: end with the opening of an assistant turn.
            who: names the conversation in errors.
        Raises:
            DataFileError: the template refuses the conversation.
        """
        conversation = [dict(message) for message in messages]
        if self.kind != "alpaca":
            for message in conversation:
                if extra := message.pop("input", ""):
                    message["content"] += f"\n\n{extra}"
        try:
            return tokenizer.apply_chat_template(
                conversation, chat_template=self.text, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as defect:
            raise DataFileError(
                f"{who}: the template '{self.kind}' refuses it: {defect}. "
                "Change the record's messages, or choose another template."
            ) from defect


def choose_template(tokenizer: Any, kind: str = "auto", settings: Mapping[str, Any] | None = None) -> Template:
    """Template of a kind; ``auto`` is the tokenizer's chat template if it has one, else ``alpaca``.

    Args:
        tokenizer: that may have a chat template.
        kind: as above.
        settings: variables of its chat template, such as ``enable_thinking: false``.
    Raises:
        ConfigError: unknown kind, ``chat`` for a tokenizer without a chat template, or settings that the template does
            not mention.
    """
    template = _of_kind(tokenizer, kind)
    for name in settings or ():
        if template.kind != "chat" or not re.search(rf"\b{re.escape(name)}\b", template.text):
            raise ConfigError(
                f"template_kwargs.{name}: the template '{template.kind}' has no such variable. Leave it out."
            )
    # JSON is Jinja, but for null. Jinja drops the line break after a block.
    given = "".join(f"{{%- set {name} = {json.dumps(value)} %}}\n" for name, value in (settings or {}).items())
    return replace(template, text=given + template.text)


def _of_kind(tokenizer: Any, kind: str) -> Template:
    known = ("auto", *get_args(TemplateKind))
    if kind not in known:
        raise ConfigError(f"template = '{kind}' is unknown.{did_you_mean(kind, known)}")
    if kind == "auto":
        kind = "chat" if tokenizer.chat_template else "alpaca"
    if kind == "alpaca":
        return Template("alpaca", _ALPACA)
    if kind == "none":
        return Template("none", _RAW)
    if not tokenizer.chat_template:
        raise ConfigError(
            "template = 'chat', but the tokenizer has no chat template. Use 'alpaca', or 'none' for raw text."
        )
    try:
        text = tokenizer.get_chat_template()
    except ValueError as defect:
        raise ConfigError(f"template = 'chat': {defect}") from defect
    return Template("chat", _FIXED_CLOCK + text if "strftime_now" in text else text)

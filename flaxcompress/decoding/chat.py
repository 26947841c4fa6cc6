"""Chat templates: messages to one prompt, as the checkpoint's own template says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flaxcompress.text import Assets


def render_chat(assets: Assets, messages: Sequence[Mapping[str, Any]], *, answer: bool = True) -> list[int]:
    """Token ids of a conversation.

    Args:
      messages: {"role": "user", "content": "…"} objects in order; roles as the template knows them.
      answer: ends with what opens the assistant's next message.

    Raises:
      ValueError: the checkpoint has no chat template, or the template refuses the messages.
    """
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = assets.chat_template
    if template is None:
        raise ValueError("chat: the checkpoint has no chat template (chat_template.jinja, or in tokenizer_config.json)")

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    try:
        text = environment.from_string(template).render(
            messages=[dict(message) for message in messages], add_generation_prompt=answer, **assets.special_tokens
        )
    except TemplateError as error:
        raise ValueError(f"chat: the checkpoint's template refuses these messages: {error}") from None
    return assets.tokenize_parts(text)

"""Chat templates: from messages to the text a checkpoint was trained on.

A template is a Jinja program that comes with the checkpoint, so it runs in a sandbox, with the
settings and the few functions that Hugging Face gives it.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from specjax.checkpoints import optional

__all__ = ["render"]


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """Renders a conversation.

    Args:
      template: Jinja source.
      messages: mappings with at least `role` and `content`.
      add_generation_prompt: also render the opening of the assistant's answer.
      special_tokens: texts by name (`bos_token`, `eos_token`).

    Raises:
      ValueError: no messages, a message without a role or content, a template that is not valid
        Jinja, or one that refuses these messages; the message holds what it says.
      ImportError: jinja2 is not installed.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError(f"messages={messages!r} must be a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(
                f"message {index} is {message!r}; it needs the keys 'role' and 'content'"
            )
    jinja2 = optional.require("jinja2")
    try:
        return _compile(template).render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template is not valid at line {error.lineno}: {error}"
        ) from error
    except (jinja2.exceptions.TemplateError, jinja2.exceptions.SecurityError, TypeError) as error:
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"the chat template refuses messages with roles {roles}: {error}"
        ) from error


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    jinja2 = optional.require("jinja2")
    sandbox = optional.require("jinja2.sandbox")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        # Jinja's own filter escapes characters for HTML, which no model was trained on.
        return json.dumps(value, **{"ensure_ascii": False, **options})

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template)

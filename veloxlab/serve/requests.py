"""Schema of requests to the server: every field that mlx-lm 0.32.2 reads, by type and range."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from veloxlab.errors import InputError

Schema = dict[str, Any]
SHOWN = 60  # characters of a wrong value in a message
WHOLE, MILLION = 2**31 - 1, 10**6


def _field(description: str, kind: str | list[str], **schema: object) -> Schema:
    return {**schema, "description": description, "type": kind}


def _number(least: float, most: float) -> Schema:
    return _field(f"a number from {least:,} to {most:,}", "number", minimum=least, maximum=most)


def _whole(least: int, most: int = WHOLE) -> Schema:
    return _field(f"a whole number from {least:,} to {most:,}", "integer", minimum=least, maximum=most)


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}], "description": f"{schema['description']}, or null"}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "required": [*required], "properties": properties}


STRING = _field("a string that is not empty", "string", minLength=1)
FLAG = _field("true or false", "boolean")
OBJECT = _field("an object", "object")
TEXT = _object(("type", "text"), type={"const": "text"}, text={"type": "string"})
ADDRESS: Schema = {"type": "string", "pattern": "^(data:|https?://)"}
PLACE: Schema = {"anyOf": [ADDRESS, _object(("url",), url=ADDRESS)]}
IMAGE = {
    **_object(("type",), type={"enum": ["image_url", "input_image", "image"]}, image_url=PLACE, image=PLACE),
    "anyOf": [{"required": ["image_url"]}, {"required": ["image"]}],
}
OR_NULL = ["object", "null"]
BIAS = {"propertyNames": {"pattern": "^[0-9]{1,9}$"}, "additionalProperties": _number(-MILLION, MILLION)}
CALL = _object(function=_object(arguments={"type": ["string", "object", "null"]}))

FIELDS: dict[str, Schema] = {
    "prompt": STRING,
    "model": STRING,
    **dict.fromkeys(("adapters", "draft_model"), _or_null(STRING)),
    **dict.fromkeys(("stream", "logprobs"), FLAG),
    "max_tokens": _whole(1),
    "max_completion_tokens": _or_null(_whole(1)),
    "num_draft_tokens": _whole(0, 1024),
    "top_logprobs": _whole(-1, 11),
    "temperature": _number(0, MILLION),
    **dict.fromkeys(("top_p", "min_p", "xtc_probability"), _number(0, 1)),
    "xtc_threshold": _number(0, 0.5),
    "repetition_penalty": _number(0, MILLION),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), _number(-MILLION, MILLION)),
    **dict.fromkeys(("top_k", *(f"{n}_context_size" for n in ("repetition", "presence", "frequency"))), _whole(0)),
    "seed": _or_null(_whole(0, 2**64 - 1)),
    "logit_bias": _field("an object of token ids and numbers, or null", OR_NULL, **BIAS),
    "stop": {
        "anyOf": [STRING, {"type": "array", "items": STRING}, {"type": "null"}],
        "description": "a string or a list of strings that are not empty, or null",
    },
    "stream_options": _field(
        "an object with include_usage, true or false, or null",
        OR_NULL,
        **_object(("include_usage",), include_usage=FLAG),
    ),
    "tools": _field("a list of objects, or null", ["array", "null"], items=OBJECT),
    "role_mapping": _field("an object of strings, or null", OR_NULL, additionalProperties={"type": "string"}),
    "chat_template_kwargs": _or_null(OBJECT),
}


def _validator(*parts: Schema) -> Draft202012Validator:
    """Return the validator of requests whose messages contain text, or a list of ``parts``."""
    message = _object(
        ("role",),
        role=STRING,
        content={"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": {"anyOf": parts}}]},
        tool_calls={"type": ["array", "null"], "items": CALL},
    )
    words = f"a list of objects with a role and a content of text{' or images' * (IMAGE in parts)}"
    messages = _field(words, "array", minItems=1, items=message)
    return Draft202012Validator({"type": "object", "properties": {"messages": messages, **FIELDS}})


TEXT_ONLY, WITH_IMAGES = _validator(TEXT), _validator(TEXT, IMAGE)


def check_fields(content: bytes, asked: str, *, images: bool) -> None:
    """Raise `InputError` unless a request is JSON with the fields of mlx-lm's server.

    ``content``: body of the request. ``asked``: the required field, ``"messages"`` or ``"prompt"``. ``images``: whether
    messages may contain images.
    """
    try:
        request = json.loads(content, parse_constant=_refuse, parse_float=_finite)
        json.dumps(request, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("The request holds half of a surrogate pair: send whole characters.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"The request is not valid JSON ({error}).") from None
    validator = WITH_IMAGES if images else TEXT_ONLY
    fields = validator.schema["properties"]
    fault = best_match(validator.iter_errors(request))
    if fault is not None:
        where = fault.json_path.removeprefix("$").removeprefix(".")
        value = json.dumps(fault.instance)
        value = value if len(value) <= SHOWN else f"{value[:SHOWN]}..."
        words = fields[fault.absolute_path[0]]["description"] if where else "an object"
        raise InputError(f"The {f'field {where}' if where else 'request'} is {value}: give {words}.")
    if asked not in request:
        raise InputError(f"The request has no field {asked}: give {fields[asked]['description']}.")


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    return _refuse(text) if abs(number) == float("inf") else number

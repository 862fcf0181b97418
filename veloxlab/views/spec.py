"""Split a Vega-Lite spec into a fixed part (the spec) and a variable part (data and params), and join them again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

Spec = dict[str, Any]
Rows = list[dict[str, Any]]


def split(spec: Spec) -> tuple[Spec, dict[str, Rows], dict[str, Any]]:
    """Take the rows, and the values of plain params, out of the result of ``chart.to_dict()``.

    Returns the spec without them; the rows by dataset name; the values by param name. NaN and infinities become
    ``None``. Altair names a dataset by a hash of its rows; here the names are ``data-0``, ``data-1``, ... in order of
    appearance, so that two charts that differ only in numbers have the same spec.
    """
    hashed: Mapping[str, Rows] = spec.get("datasets", {})
    names: dict[str, str] = {}
    rows: dict[str, Rows] = {}

    def adopt(data: Spec) -> Spec:
        given = str(data.get("name", ""))
        if given in hashed:
            name = names.setdefault(given, f"data-{len(rows)}")
            rows.setdefault(name, finite(hashed[given]))
        elif isinstance(data.get("values"), list):
            name = given or f"data-{len(rows)}"
            rows[name] = finite([row if isinstance(row, dict) else {"data": row} for row in data["values"]])
        else:
            return data
        return {"name": name} | {key: data[key] for key in ("format",) if key in data}

    def walk(node: Any) -> Any:  # noqa: ANN401 - any JSON
        if isinstance(node, list):
            return [walk(child) for child in node]
        if not isinstance(node, dict):
            return finite(node)
        return {k: adopt(v) if k == "data" and isinstance(v, dict) else walk(v) for k, v in node.items()}

    bare: Spec = walk({key: child for key, child in spec.items() if key != "datasets"})
    values = {param["name"]: param.pop("value", None) for param in bare.get("params", []) if _is_value(param)}
    return bare, rows, values


def join(spec: Spec, datasets: Mapping[str, Rows], params: Mapping[str, Any]) -> Spec:
    """Put rows and values of params back into a spec, for a standalone chart."""
    placed = [
        param | ({"value": params.get(param["name"])} if _is_value(param) else {}) for param in spec.get("params", [])
    ]
    return spec | ({"params": placed} if placed else {}) | {"datasets": dict(datasets)}


def data_names(spec: object) -> Iterator[str]:
    """Yield the name of every dataset that a spec reads."""
    if isinstance(spec, list):
        for child in spec:
            yield from data_names(child)
    elif isinstance(spec, dict):
        for key, child in spec.items():
            if key == "data" and isinstance(child, dict) and isinstance(child.get("name"), str):
                yield child["name"]
            yield from data_names(child)


def title_of(spec: Spec) -> str:
    """Return the first title with text in a spec, or an empty string."""
    title = spec.get("title", "")
    text = title.get("text", "") if isinstance(title, dict) else title
    if isinstance(text, list):
        return " ".join(text)
    inner = (title_of(child) for room in ("vconcat", "hconcat", "concat", "layer") for child in spec.get(room, []))
    return text if isinstance(text, str) and text else next(filter(None, inner), "")


def describe(spec: Spec, datasets: Mapping[str, Rows]) -> str:
    """Describe in one line what a chart shows, for text output."""
    return f"{title_of(spec) or 'Chart'} ({sum(map(len, datasets.values()))} rows)"


def finite(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """Replace NaN and infinities, which JSON does not have, by ``None``, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(child) for key, child in value.items()}
    return [finite(child) for child in value] if isinstance(value, list) else value


def compact(value: object) -> str:
    """Return JSON without spaces; raises `ValueError` for values that JSON does not have."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _is_value(param: Spec) -> bool:
    """Return whether a param holds a plain value, and is no selection or expression."""
    return "select" not in param and "expr" not in param

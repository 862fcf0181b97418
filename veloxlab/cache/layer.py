"""The compressed cache of one attention layer, with the interface that mlx-lm expects of a cache.

Three runs of tokens in order: `sinks` exact, then packed codes, then a `window` of recent exact tokens that are encoded
in blocks as they age out. What is held is what is counted: there is no other copy of a token anywhere. A layer whose
attention slides keeps only the tokens that it can still see.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Self

import mlx.core as mx

from veloxlab.cache import saved
from veloxlab.cache.attention import History, Segment, causal_mask, mask_for
from veloxlab.cache.counts import Arrival, Windows, token_count
from veloxlab.cache.plan import DEFAULT_CHUNK, DEFAULT_SINKS, DEFAULT_WINDOW, Chunk
from veloxlab.cache.runs import Run
from veloxlab.codecs import Code, Codec
from veloxlab.codecs.base import fitted_online
from veloxlab.codecs.none import Exact
from veloxlab.errors import InputError
from veloxlab.mlxlm.hooks import loadable
from veloxlab.mlxlm.probe import Path

_TOKENS = 2
# The largest magnitude that is stored; no root-mean-square is larger. An unbiased scale is that, times what the codes
# lose: 2.5 for one bit of a random direction, and never more than 4 where it is clipped. It is kept as the float16 of
# its root (`codec.store_scale`), and 4·1e9 < 65504².
_LARGEST = 1e9


@dataclass(frozen=True)
class Coming:
    """Tokens of one call that a cache can store: `CompressedKVCache.check` gives them, `CompressedKVCache.store` takes.

    Attributes
    ----------
    keys, values : as they came.
    all_seen : whether attention reads them as they came, and not as they are stored.
    arrival : where they go.
    codecs : of keys and of values, fitted.
    codes : of the keys and values that leave the window, if any do.
    """

    keys: mx.array
    values: mx.array
    all_seen: bool
    arrival: Arrival
    codecs: tuple[Codec, Codec]
    codes: tuple[Code, Code] | None


@loadable
class CompressedKVCache(saved.Saved):
    """Keys and values of one layer, compressed; a drop-in for mlx-lm's ``KVCache`` in a ``prompt_cache`` list.

    With ``max_size`` it stands in for a ``RotatingKVCache``: then it holds the ``sinks`` and the newest tokens, those
    that a query can still see, and never more bytes than that would.

    Parameters
    ----------
    key_codec, value_codec : how packed tokens are stored. Their head dimensions may differ. A codec that says it is
        ``online`` is fitted to the first tokens that are packed, and stays so, even if all of them are trimmed.
    sinks : tokens at the start of the text kept exact.
    window : newest tokens kept exact, and of a sliding layer at most a quarter of what it sees; up to
        `veloxlab.cache.counts.BLOCK` more wait to be encoded together.
    chunk : whether the tokens of one call attend to one another ``"exact"``, or through their ``"codes"`` as later
        tokens will.
    layer : index in the model, for messages and reports.
    path : ``"codes"`` hands attention a `History` that it reads packed; ``"arrays"`` hands out decoded arrays, for
        layers whose own arithmetic needs them.
    reason : why the layer takes that path, for reports.
    max_size : tokens that a sliding layer sees, sinks and the query's own included; None sees all.
    lends : whether other layers read this one's keys and values after it (`keys_and_values`).
    model : what the cache was made for, in words, so that a saved one is not continued by another model.
    """

    def __init__(
        self,
        key_codec: Codec,
        value_codec: Codec,
        *,
        sinks: int = DEFAULT_SINKS,
        window: int = DEFAULT_WINDOW,
        chunk: Chunk = DEFAULT_CHUNK,
        layer: int = 0,
        path: Path = "codes",
        reason: str = "",
        max_size: int | None = None,
        lends: bool = False,
        model: str = "",
    ) -> None:
        self._windows = Windows.of(sinks, window, max_size)
        if chunk not in ("exact", "codes"):
            raise InputError(f"chunk={chunk!r} is unknown: choose 'exact' or 'codes'.")
        self.key_codec, self.value_codec = key_codec, value_codec
        self.max_sinks, self.chunk, self.layer = self._windows.sinks, chunk, layer
        self.path, self.reason, self.max_size, self.lends, self.model = path, reason, max_size, lends, model
        self.sinks, self.packed, self.recent = Run(self.max_sinks), Run(), Run(self._windows.most_recent)
        self._evicted = 0  # tokens between the sinks and the oldest that is held
        self._values_per_token = 0  # batch · heads · (Dk + Dv), known from the first tokens on
        self._dtype = "float32"  # of the keys, by name: a saved cache is written as words and arrays
        self._lent: History | None = None
        if path == "codes":
            # mlx-lm sends a cache with these two attributes to its quantized attention, which `hooks` extends
            self.bits, self.group_size = 0, 0

    # what attention layers call -------------------------------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Store ``keys`` ``[B, H, S, Dk]`` and ``values`` ``[B, H, S, Dv]``, and return what attention is to read.

        On the ``"codes"`` path both results are the same `History`; on ``"arrays"`` they are decoded arrays.

        Raises
        ------
        InputError : if the head dimensions are not the codecs', if a key or value to be stored is NaN or infinite, or
            if a codec cannot encode yet. Then this call stored nothing in this layer.
        """
        return self.store(self.check(keys, values))

    def check(self, keys: mx.array, values: mx.array) -> Coming:
        """The first half of `update_and_fetch`: all that can fail, and changes nothing. See there what it raises."""
        self._check_shapes(keys, values)
        count = keys.shape[_TOKENS]
        all_seen = self.chunk == "exact" and count > self.window
        arrival = self._windows.arrival(count, self.offset, self.recent.tokens, all_seen=all_seen)
        to_sinks, first = arrival.to_sinks, arrival.to_sinks + arrival.gone
        leaving = []
        if arrival.to_packed:
            leaving = [x[:, :, first : first + arrival.from_new] for x in (keys, values)]
        if arrival.from_recent:
            oldest = [self.recent.code(side)[: arrival.from_recent].arrays["values"] for side in ("keys", "values")]
            leaving = [mx.concatenate([*pair], axis=_TOKENS) for pair in zip(oldest, leaving, strict=True)]
        self._check_range(*leaving, *((keys[:, :, :to_sinks], values[:, :, :to_sinks]) if to_sinks else ()))
        if not leaving:
            return Coming(keys, values, all_seen, arrival, (self.key_codec, self.value_codec), None)
        start = self.offset + first - (0 if arrival.gone else self.recent.tokens)  # of the oldest token to be encoded
        codecs = fitted_online(self.key_codec, leaving[0]), fitted_online(self.value_codec, leaving[1])
        codes = codecs[0].encode(leaving[0], start), codecs[1].encode(leaving[1], start)
        return Coming(keys, values, all_seen, arrival, codecs, codes)

    def store(self, coming: Coming) -> tuple[Any, Any]:
        """The second half of `update_and_fetch`, which nothing in the tokens can make fail."""
        self._lent = None
        keys, values = coming.keys, coming.values
        hidden = self._held - self.visible
        if coming.all_seen:
            segments = self._segments(hidden, extra=(keys, values))
            self._append(coming)
        else:
            self._append(coming)
            segments = self._segments(hidden)
        self._evict()
        self._values_per_token = keys.shape[0] * keys.shape[1] * (keys.shape[-1] + values.shape[-1])
        self._dtype = str(keys.dtype).rpartition(".")[2]
        history = History(segments, stored=tuple(self.buffers))
        if self.lends:
            self._lent = history
        if self.path == "codes":
            return history, history
        read_keys, read_values = mx.depends(list(history.expand(keys.dtype)), self.buffers)
        return read_keys, read_values

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | Literal["causal"] | None:
        """The mask that ``N`` new tokens need, in mlx-lm's terms."""
        if self.max_size is None:
            return mask_for(N, self.offset, return_array, window_size)
        seen = self.visible + N
        if N == 1:
            smaller = window_size is not None and window_size < min(seen, self.max_size)
            return causal_mask(1, seen, window_size)[0] if smaller else None
        window_size = window_size or self.max_size
        return causal_mask(N, seen, window_size) if seen > window_size or return_array else "causal"

    def keys_and_values(self) -> tuple[Any, Any]:
        """What attention read last, for a layer that shares this one's keys and values; else all that is held."""
        history = self._lent or self._history()
        return (history, history) if self.path == "codes" else self.arrays()

    @property
    def window(self) -> int:
        """Newest tokens kept exact."""
        return self._windows.window

    @property
    def offset(self) -> int:
        """Tokens seen, which is the position of the next one."""
        return self._evicted + self._held

    @property
    def visible(self) -> int:
        """Tokens held that the next one will see."""
        return self._held if self.max_size is None else min(self._held, self.max_size - 1)

    @property
    def sequences(self) -> int:
        """Sequences held, all of one length."""
        return next((buffer.shape[0] for buffer in self.buffers), 1)

    # what the rest of mlx-lm calls ----------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes held for this layer's tokens: sinks, codes, scales, window and growth slack."""
        return sum(run.nbytes for run in self._runs)

    @property
    def buffers(self) -> list[mx.array]:
        """The live buffers."""
        return [buffer for run in self._runs for buffer in run.buffers.values()]

    def side_nbytes(self, side: Literal["keys", "values"]) -> int:
        """Bytes held for the keys or for the values alone."""
        return sum(run.side_nbytes(side) for run in self._runs)

    @property
    def fp16_bytes(self) -> int:
        """Bytes that the layer's own cache holds of the same tokens at 16 bits a value."""
        return 2 * self.size() * self._values_per_token

    def arrays(self) -> tuple[mx.array, mx.array]:
        """All keys and values that attention read last, or else holds, decoded, in the dtype they came in."""
        return (self._lent or self._history()).expand(getattr(mx, self._dtype))

    def decoded(self) -> tuple[mx.array, mx.array]:
        """All keys and values held, decoded to float32: for looking at, not for attention."""
        return self._history().expand(mx.float32)

    def size(self) -> int:
        """Tokens that can be seen."""
        return self.offset if self.max_size is None else min(self.offset, self.max_size)

    def empty(self) -> bool:
        """Whether nothing is held."""
        return self.offset == 0

    def is_trimmable(self) -> bool:
        """Whether the newest tokens can be dropped: always, but for a sliding layer that has forgotten older ones."""
        return self.max_size is None or self.offset < self.max_size

    def check_trimmable(self) -> None:
        """Raise `InputError` unless it is trimmable."""
        if not self.is_trimmable():
            raise InputError(
                f"Layer {self.layer} sees {self.max_size} tokens and has forgotten those before, which a shorter text "
                "would see again: start a new cache."
            )

    def trim(self, n: int) -> int:
        """Drop the newest ``n`` tokens (at most all), release their memory, and return how many were dropped.

        What was encoded stays encoded: the window fills again with the tokens to come.

        Raises
        ------
        InputError : if ``n`` is no whole number of at least 0, or the cache is not trimmable.
        """
        count = token_count("n", n)
        self.check_trimmable()
        self._lent = None
        dropped = left = min(count, self.offset)
        for run in reversed(self._runs):
            newest = min(left, run.tokens)
            if newest:
                run.drop_newest(newest)
            left -= newest
        return dropped

    @staticmethod
    def merge(caches: Sequence[CompressedKVCache]) -> Any:  # noqa: ANN401 - the class would import this module
        """One `veloxlab.cache.batch.BatchCompressedKVCache` of copies of ``caches``, each holding one sequence."""
        from veloxlab.cache.batch import BatchCompressedKVCache

        return BatchCompressedKVCache([copy.deepcopy(cache) for cache in caches])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of its own tokens; codecs never change, and are shared."""
        twin = copy.copy(self)
        twin.sinks, twin.packed, twin.recent = (copy.deepcopy(run, memo) for run in self._runs)
        twin._lent = None
        return twin

    # inside ---------------------------------------------------------------------------------------------------------

    @property
    def _exact(self) -> tuple[Exact, Exact]:
        """The codecs of exact keys and values."""
        return _exact(self.key_codec.head_dim), _exact(self.value_codec.head_dim)

    @property
    def _runs(self) -> tuple[Run, Run, Run]:
        return self.sinks, self.packed, self.recent

    @property
    def _held(self) -> int:
        return self.sinks.tokens + self.packed.tokens + self.recent.tokens

    def _history(self) -> History:
        return History(self._segments())

    def _segments(self, hidden: int = 0, extra: tuple[mx.array, mx.array] | None = None) -> tuple[Segment, ...]:
        """Segments of what is held, but for the ``hidden`` oldest behind the sinks, and of ``extra`` exact keys and
        values behind it.
        """
        exact_keys, exact_values = self._exact
        segments = []
        for run in self._runs:
            skip = 0 if run is self.sinks else min(hidden, run.tokens)
            hidden -= skip
            if run.tokens > skip:
                packed = run is self.packed
                start = self.sinks.tokens + self._evicted if packed else 0
                segments.append(
                    Segment(
                        self.key_codec if packed else exact_keys,
                        run.code("keys", start, skip),
                        self.value_codec if packed else exact_values,
                        run.code("values", start, skip),
                    )
                )
        if extra:
            keys, values = extra
            segments.append(Segment(exact_keys, exact_keys.encode(keys), exact_values, exact_values.encode(values)))
        return tuple(segments)

    def _append(self, coming: Coming) -> None:
        """Add tokens: to the sinks while they last, then through the window into codes.

        Where attention has what it needs of them, those that a sliding layer will not see again are not stored.
        """
        keys, values, arrival = coming.keys, coming.values, coming.arrival
        exact, to_sinks = self._exact, arrival.to_sinks
        if to_sinks:
            self.sinks.append(exact[0].encode(keys[:, :, :to_sinks]), exact[1].encode(values[:, :, :to_sinks]))
        if arrival.gone:
            self._drop_oldest(self.packed.tokens + self.recent.tokens)
            self._evicted += arrival.gone
        if arrival.from_recent:
            self.recent.drop_oldest(arrival.from_recent)
        self.key_codec, self.value_codec = coming.codecs
        if coming.codes:
            self.packed.append(*coming.codes)
        if arrival.to_recent:
            rest = to_sinks + arrival.gone + arrival.from_new
            self.recent.append(exact[0].encode(keys[:, :, rest:]), exact[1].encode(values[:, :, rest:]))

    def _evict(self) -> None:
        """Forget what a sliding layer sees no more."""
        leaving = self._windows.leaving(self.packed.tokens, self.recent.tokens)
        if leaving:
            self._drop_oldest(leaving)

    def _drop_oldest(self, count: int) -> None:
        """Forget the first ``count`` tokens behind the sinks."""
        self._evicted += count
        for run in (self.packed, self.recent):
            dropped = min(count, run.tokens)
            if dropped:
                run.drop_oldest(dropped)
            count -= dropped

    def end_of_step(self) -> None:
        """See `veloxlab.cache.saved.Saved`."""
        self._lent = None

    def describe(self) -> tuple[saved.Content, list[mx.array]]:
        """See `veloxlab.cache.saved.Saved`."""
        codecs = {"keys": self.key_codec, "values": self.value_codec}
        described, arrays = saved.describe_codecs(codecs)
        content = {
            "settings": {
                "sinks": self.max_sinks,
                "window": self.window,
                "chunk": self.chunk,
                "layer": self.layer,
                "path": self.path,
                "reason": self.reason,
                "max_size": self.max_size,
                "lends": self.lends,
                "model": self.model,
            },
            "codecs": described,
            "evicted": self._evicted,
            "values_per_token": self._values_per_token,
            "dtype": self._dtype,
            "runs": [{"tokens": run.tokens, "buffers": list(run.buffers)} for run in self._runs],
        }
        return content, [*self.buffers, *arrays]

    @classmethod
    def rebuild(cls, content: saved.Content, arrays: Sequence[mx.array]) -> Self:
        """See `veloxlab.cache.saved.Saved`."""
        saved.check_model(content["settings"]["model"], content["settings"]["layer"])
        left = list(arrays)
        held = [{name: left.pop(0) for name in run["buffers"]} for run in content["runs"]]
        codecs = saved.restore_codecs(content["codecs"], left)
        self = cls(codecs["keys"], codecs["values"], **content["settings"])
        for run, buffers, said in zip(self._runs, held, content["runs"], strict=True):
            run.fill(buffers, said["tokens"])
        self._evicted, self._values_per_token = content["evicted"], content["values_per_token"]
        self._dtype = content["dtype"]
        return self

    def _check_shapes(self, keys: mx.array, values: mx.array) -> None:
        for name, x, codec in (("keys", keys, self.key_codec), ("values", values, self.value_codec)):
            if x.shape[-1] != codec.head_dim:
                raise InputError(
                    f"Layer {self.layer}: {name} have a head dimension of {x.shape[-1]}, but this cache was made for "
                    f"{codec.head_dim}. Make the cache for this model: vl.make_cache(model, ...)."
                )

    def _check_range(self, *keys_and_values: mx.array) -> None:
        """Raise `InputError` if a key or a value (they alternate) is no number that a codec can store."""
        within = [_in_range(x) for x in keys_and_values]
        if within and not mx.stack(within).all().item():  # one wait for the device, whatever the number of arrays
            bad = next(i for i, good in enumerate(within) if not good.item())
            raise InputError(
                f"Layer {self.layer}: the {('keys', 'values')[bad % 2]} of a token are NaN, infinite or beyond "
                f"±{_LARGEST:.0e} and were not stored. The model overflowed, most likely in float16: load it in "
                "bfloat16 or float32 and start with a new cache."
            )


def _in_range(x: mx.array) -> mx.array:
    """Whether all numbers are finite and none is beyond the largest. In float16 that limit itself is infinite."""
    return (mx.abs(x.astype(mx.float32)) <= _LARGEST).all()  # false for NaN too


@lru_cache
def _exact(head_dim: int) -> Exact:
    return Exact(head_dim)  # asked for at every token of every layer

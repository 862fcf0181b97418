"""The compressed cache of one attention layer, with the interface that mlx-lm expects of a cache.

Three runs of tokens in order: `sinks` exact, then packed codes, then a `window` of recent exact tokens that are encoded
in blocks as they age out. What is held is what is counted: there is no other copy of a token anywhere.
"""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

from veloxlab.attention import History, Segment, mask_for
from veloxlab.codecs import Code, Codec
from veloxlab.codecs.codec import fitted_online
from veloxlab.codecs.none import Exact
from veloxlab.errors import InputError

Chunk = Literal["exact", "codes"]
Path = Literal["codes", "arrays"]
Arrays = dict[str, mx.array]

DEFAULT_SINKS, DEFAULT_WINDOW = 4, 64  # tokens; a few first ones draw much attention, whatever the text
DEFAULT_CHUNK: Chunk = "exact"
BLOCK = 32  # tokens that leave the window together: encoding one at a time would cost a launch per token
_SLACK_SHARE = 64  # a buffer that has to grow takes 1/64 more than it needs, so that growth costs O(1) a token
_TOKENS = 2
# The largest magnitude that is stored; no root-mean-square is larger. An unbiased scale is that, times what the codes
# lose: 2.5 for one bit of a random direction, and never more than 4 where it is clipped. It is kept as the float16 of
# its root (`codec.store_scale`), and 4·1e9 < 65504².
_LARGEST = 1e9


class Run:
    """Consecutive tokens in growable buffers: named arrays ``[B, H, S, ...]``, all with the same tokens.

    ``most`` is the largest number of tokens it will ever hold, where that is known; ``start`` is the position in the
    text of the first one, where that never changes.
    """

    def __init__(self, most: int | None = None, start: int = 0) -> None:
        self._buffers: Arrays = {}
        self.tokens = 0
        self.most = most
        self.start = start

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, slack included."""
        return sum(b.nbytes for b in self._buffers.values())

    def side_nbytes(self, side: str) -> int:
        """Bytes of the buffers whose name starts with ``side/``."""
        return sum(b.nbytes for name, b in self._buffers.items() if name.startswith(f"{side}/"))

    @property
    def buffers(self) -> list[mx.array]:
        """The live buffers."""
        return list(self._buffers.values())

    def code(self, side: str) -> Code:
        """The arrays whose name starts with ``side/``, as the code of the tokens held."""
        return Code(
            {
                name.removeprefix(f"{side}/"): buffer[:, :, : self.tokens]
                for name, buffer in self._buffers.items()
                if name.startswith(f"{side}/")
            },
            self.start,
        )

    def append(self, keys: Code, values: Code) -> None:
        """Add tokens at the end."""
        arrays = {f"keys/{n}": a for n, a in keys.arrays.items()} | {f"values/{n}": a for n, a in values.arrays.items()}
        total = self.tokens + keys.tokens
        for name, new in arrays.items():
            buffer = self._buffers.get(name)
            if buffer is not None and total <= buffer.shape[_TOKENS]:
                buffer[:, :, self.tokens : total] = new
                continue
            # one token at a time is growth by decoding, and more will come; a longer append is sized as it is
            slack = max(8, total // _SLACK_SHARE) if keys.tokens < BLOCK else 0
            slack = slack if self.most is None else min(slack, self.most - total)
            parts = [] if buffer is None else [buffer[:, :, : self.tokens]]
            shape = (*new.shape[:_TOKENS], slack, *new.shape[_TOKENS + 1 :])
            self._buffers[name] = mx.concatenate([*parts, new, mx.zeros(shape, new.dtype)], axis=_TOKENS)
        self.tokens = total

    def drop_oldest(self, count: int) -> None:
        """Forget the first ``count`` tokens and release their memory."""
        self._keep(slice(count, self.tokens))

    def drop_newest(self, count: int) -> None:
        """Forget the last ``count`` tokens and release their memory."""
        self._keep(slice(0, self.tokens - count))

    def _keep(self, span: slice) -> None:
        if span.start == span.stop:
            self._buffers = {}
        else:  # a view would keep the whole buffer alive
            self._buffers = {n: mx.contiguous(b[:, :, span]) for n, b in self._buffers.items()}
        self.tokens = span.stop - span.start


class CompressedKVCache:
    """Keys and values of one layer, compressed; a drop-in for mlx-lm's ``KVCache`` in a ``prompt_cache`` list.

    Parameters
    ----------
    key_codec, value_codec : how packed tokens are stored. Their head dimensions may differ. A codec that says it is
        ``online`` is fitted to the first tokens that are packed, and stays so, even if all of them are trimmed.
    sinks : tokens at the start of the text kept exact.
    window : newest tokens kept exact; up to `BLOCK` more wait to be encoded together.
    chunk : whether the tokens of one call attend to one another ``"exact"``, or through their ``"codes"`` as later
        tokens will.
    layer : index in the model, for messages and reports.
    path : ``"codes"`` hands attention a `History` that it reads packed; ``"arrays"`` hands out decoded arrays, for
        layers whose own arithmetic needs them.
    reason : why the layer takes that path, for reports.
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
    ) -> None:
        for name, count in (("sinks", sinks), ("window", window)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise InputError(f"{name}={count!r} is not a number of tokens: give a whole number, 0 or more.")
        if chunk not in ("exact", "codes"):
            raise InputError(f"chunk={chunk!r} is unknown: choose 'exact' or 'codes'.")
        self.key_codec, self.value_codec = key_codec, value_codec
        self.max_sinks, self.window, self.chunk, self.layer = sinks, window, chunk, layer
        self.path, self.reason = path, reason
        # whole blocks leave the window, and none that it still covers
        self._block = min(BLOCK, max(1, window))
        self.sinks, self.packed, self.recent = Run(sinks), Run(start=sinks), Run(window + self._block - 1)
        self._values_per_token = 0  # batch · heads · (Dk + Dv), known from the first tokens on
        if path == "codes":
            # mlx-lm sends a cache with these two attributes to its quantized attention, which `integrate` extends
            self.bits, self.group_size = 0, 0

    # what attention layers call -------------------------------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[object, object]:
        """Store ``keys`` ``[B, H, S, Dk]`` and ``values`` ``[B, H, S, Dv]``, and return what attention is to read.

        On the ``"codes"`` path both results are the same `History`; on ``"arrays"`` they are decoded arrays.

        Raises
        ------
        InputError : if the head dimensions are not the codecs', or if a key or value to be stored is NaN or infinite.
            Then this call stored nothing in this layer.
        """
        self._check_shapes(keys, values)
        self._values_per_token = keys.shape[0] * keys.shape[1] * (keys.shape[-1] + values.shape[-1])
        if self.chunk == "exact" and keys.shape[_TOKENS] > self.window:
            history = self._history(extra=(keys, values))
            self._store(keys, values)
        else:
            self._store(keys, values)
            history = self._history()
        return (history, history) if self.path == "codes" else history.expand(keys.dtype)

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | Literal["causal"] | None:
        """The mask that ``N`` new tokens need, in mlx-lm's terms."""
        return mask_for(N, self.offset, return_array, window_size)

    @property
    def offset(self) -> int:
        """Tokens seen, which is the position of the next one."""
        return self.sinks.tokens + self.packed.tokens + self.recent.tokens

    # what the rest of mlx-lm calls ----------------------------------------------------------------------------------

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All keys and values, decoded to float32: for looking at, not for attention."""
        return self._history().expand(mx.float32)

    @property
    def state(self) -> list[mx.array]:
        """The live buffers, to be evaluated after each chunk of a prefill."""
        return [buffer for run in self._runs for buffer in run.buffers]

    @property
    def nbytes(self) -> int:
        """Bytes held for this layer's tokens: sinks, codes, scales, window and growth slack."""
        return sum(run.nbytes for run in self._runs)

    def side_nbytes(self, side: Literal["keys", "values"]) -> int:
        """Bytes held for the keys or for the values alone."""
        return sum(run.side_nbytes(side) for run in self._runs)

    @property
    def fp16_bytes(self) -> int:
        """Bytes that the keys and values of the same tokens take in 16 bits each."""
        return 2 * self.offset * self._values_per_token

    def size(self) -> int:
        """Tokens held."""
        return self.offset

    def empty(self) -> bool:
        """Whether nothing is held."""
        return self.offset == 0

    def is_trimmable(self) -> bool:
        """Always: the newest tokens can be dropped."""
        return True

    def trim(self, n: int) -> int:
        """Drop the newest ``n`` tokens (at most all), release their memory, and return how many were dropped.

        What was encoded stays encoded: the window fills again with the tokens to come.
        """
        dropped = left = min(n, self.offset)
        for run in reversed(self._runs):
            count = min(left, run.tokens)
            if count:
                run.drop_newest(count)
            left -= count
        return dropped

    # inside ---------------------------------------------------------------------------------------------------------

    @property
    def _runs(self) -> tuple[Run, Run, Run]:
        return self.sinks, self.packed, self.recent

    def _history(self, extra: tuple[mx.array, mx.array] | None = None) -> History:
        """Segments of what is held, and of ``extra`` exact keys and values behind it."""
        exact_keys, exact_values = Exact(self.key_codec.head_dim), Exact(self.value_codec.head_dim)
        segments = []
        for run in self._runs:
            if run.tokens:
                packed = run is self.packed
                segments.append(
                    Segment(
                        self.key_codec if packed else exact_keys,
                        run.code("keys"),
                        self.value_codec if packed else exact_values,
                        run.code("values"),
                    )
                )
        if extra:
            keys, values = extra
            segments.append(Segment(exact_keys, exact_keys.encode(keys), exact_values, exact_values.encode(values)))
        return History(tuple(segments))

    def _store(self, keys: mx.array, values: mx.array) -> None:
        """Append tokens: to the sinks while they last, then through the window into codes."""
        count = keys.shape[_TOKENS]
        if count == 0:
            return
        exact = Exact(self.key_codec.head_dim), Exact(self.value_codec.head_dim)
        to_sinks = min(count, max(0, self.max_sinks - self.offset))
        pending = self.recent.tokens + count - to_sinks
        to_packed = max(0, pending - self.window) // self._block * self._block
        from_recent = min(to_packed, self.recent.tokens)
        from_new = to_packed - from_recent

        leaving_keys = exact[0].decode(self.recent.code("keys")[:from_recent]) if from_recent else keys[:, :, :0]
        leaving_values = exact[1].decode(self.recent.code("values")[:from_recent]) if from_recent else values[:, :, :0]
        leaving_keys = mx.concatenate([leaving_keys, keys[:, :, to_sinks : to_sinks + from_new]], axis=_TOKENS)
        leaving_values = mx.concatenate([leaving_values, values[:, :, to_sinks : to_sinks + from_new]], axis=_TOKENS)

        # everything that can fail comes before anything changes
        self._check_range(leaving_keys, leaving_values, keys[:, :, :to_sinks], values[:, :, :to_sinks])

        if to_sinks:
            self.sinks.append(exact[0].encode(keys[:, :, :to_sinks]), exact[1].encode(values[:, :, :to_sinks]))
        if from_recent:
            self.recent.drop_oldest(from_recent)
        if to_packed:
            start = self.packed.start + self.packed.tokens
            self.key_codec = fitted_online(self.key_codec, leaving_keys)
            self.value_codec = fitted_online(self.value_codec, leaving_values)
            self.packed.append(
                self.key_codec.encode(leaving_keys, start), self.value_codec.encode(leaving_values, start)
            )
        if to_sinks + from_new < count:
            rest_keys, rest_values = (x[:, :, to_sinks + from_new :] for x in (keys, values))
            self.recent.append(exact[0].encode(rest_keys), exact[1].encode(rest_values))

    def _check_shapes(self, keys: mx.array, values: mx.array) -> None:
        for name, x, codec in (("keys", keys, self.key_codec), ("values", values, self.value_codec)):
            if x.shape[-1] != codec.head_dim:
                raise InputError(
                    f"Layer {self.layer}: {name} have a head dimension of {x.shape[-1]}, but this cache was made for "
                    f"{codec.head_dim}. Make the cache for this model: vl.make_cache(model, ...)."
                )

    def _check_range(self, *keys_and_values: mx.array) -> None:
        """Raise `InputError` if a key or a value (they alternate) is no number that a codec can store."""
        within = [(mx.abs(x) <= _LARGEST).all() for x in keys_and_values if x.size]  # false for NaN too
        if within and not mx.stack(within).all().item():  # one wait for the device, whatever the number of arrays
            bad = next(i for i, x in enumerate(keys_and_values) if x.size and not (mx.abs(x) <= _LARGEST).all().item())
            raise InputError(
                f"Layer {self.layer}: the {('keys', 'values')[bad % 2]} of a token are NaN, infinite or beyond "
                f"±{_LARGEST:.0e} and were not stored. The model overflowed, most likely in float16: load it in "
                "bfloat16 or float32 and start with a new cache."
            )

"""The compressed cache of one attention layer, with the interface that mlx-lm expects of a cache.

Three runs of tokens: exact `sinks`, packed codes, and a `window` of exact ones that are encoded in blocks as they age.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import create_attention_mask

from veloxlab.cache import saved
from veloxlab.cache.attention import FEW_QUERIES, History
from veloxlab.cache.coming import Checks, Coming, Joining, Largest
from veloxlab.cache.counts import TOKENS, Arrival, Windows
from veloxlab.cache.past import Past, Segment, before_window, exact_codes, exact_segment, segments_of
from veloxlab.cache.plan import DEFAULT_CHUNK, DEFAULT_SINKS, DEFAULT_WINDOW, Chunk
from veloxlab.cache.reach import warn_beyond
from veloxlab.cache.run import Run
from veloxlab.cache.runs import Runs
from veloxlab.checks import ARGUMENTS
from veloxlab.codecs import TENSORS, Code, Codec
from veloxlab.codecs.base import fitted_online
from veloxlab.errors import InputError
from veloxlab.kernels.checked import begin
from veloxlab.kernels.devices import current_backend
from veloxlab.kernels.slide import Slid
from veloxlab.mlxlm.hooks import loadable
from veloxlab.mlxlm.probe import Path

_SETTINGS = ("window", "chunk", "layer", "path", "reason", "max_size", "lends", "model")  # that a file has unchanged


@loadable
class CompressedKVCache(Runs, saved.Saved):
    """Keys and values of one layer, compressed; a drop-in for mlx-lm's ``KVCache`` in a ``prompt_cache`` list.

    With ``max_size`` it stands in for a ``RotatingKVCache``: then it holds the ``sinks`` and the newest tokens that a
    query can still see, in no more bytes.

    Parameters
    ----------
    key_codec, value_codec : for packed tokens. Their head dimensions may differ. An ``online`` codec is fitted to the
        first tokens that are packed, and does not change later, even if all of them are trimmed.
    sinks, window, chunk : as for `veloxlab.make_cache`. The window of a sliding layer is at most a quarter of the
        tokens that it sees. Up to `veloxlab.cache.counts.BLOCK` more tokens wait to be encoded together.
    layer : its number in the model (`veloxlab.mlxlm.probe.LayerFacts`), for messages and reports.
    path, reason : ``"codes"`` gives attention a `History`, which it reads packed. ``"arrays"`` gives decoded arrays,
        for layers whose own arithmetic needs them. ``"latents"`` (keys are latents) does the first for a single token
        and the second for many (see `veloxlab.mlxlm.probe.Probe`). The reason is for reports.
    max_size : tokens that a sliding layer sees, including sinks and the query itself; None for all.
    lends : whether later layers read this layer's keys and values (`keys_and_values`).
    model : the name of the model, so that a saved cache is not continued by another one.
    reach : the positions of a text that the calibration fits; a warning says that later ones are encoded. None for all,
        or if that is not known, as in a loaded cache.
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
        reach: int | None = None,
    ) -> None:
        super().__init__(Windows.of(sinks, window, max_size, layer))
        ARGUMENTS["chunk"]("chunk", chunk)
        self.key_codec, self.value_codec = key_codec, value_codec
        self.max_sinks, self.window = self.windows.sinks, self.windows.window
        self.chunk, self.layer, self.path, self.reason = chunk, layer, path, reason
        self.max_size, self.lends, self.model, self.reach = max_size, lends, model, reach
        self._values_per_token = 0  # batch · heads · (Dk + Dv), known from the first tokens on
        self._dtype = mx.float32  # of the keys
        self._lent: History | None = None
        self._stays = path == "codes" and max_size is None and not lends  # whether the past is used again:
        self._past: Past | None = None  # the tokens before the window, while only the window changes,
        self._one: tuple[object, ...] = ()  # by keys and values of these shapes and dtypes
        self._checks = Checks()
        if path == "codes":
            # mlx-lm sends a cache with these two attributes to its quantized attention, which `hooks` extends
            self.bits, self.group_size = 0, 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Store ``keys`` ``[B, H, S, Dk]`` and ``values`` ``[B, H, S, Dv]``, and return the input of attention.

        On the ``"codes"`` path both results are the same `History`; for others see `handed`. Raises `InputError`, and
        stores nothing, if the head dimensions are not the codecs', if a key or value to be stored is NaN or infinite,
        or if a codec is not fitted. On a GPU the check does not wait: a NaN is stored, and the second call after it
        raises, as do all later calls and `veloxlab.save_cache`.
        """
        self._checks.look(self.layer)
        if self._joins(keys, values):  # most tokens of a text, so nothing is made in between
            history = self._join(keys, values)
            self.begin()
            return history, history
        history = self.store(self._coming(keys, values))
        self.begin()
        return self.handed(history, keys.shape[2])

    def begin(self) -> None:
        """Start the computation of the newest keys and values, which a kernel on a CPU needs."""
        if self._past and self._past.filled is None:
            begin(*self.recent.buffers.values())

    def check(self, keys: mx.array, values: mx.array) -> Coming | Joining:
        """The first half of `update_and_fetch`: all that can fail. It changes nothing, and raises the same errors."""
        self._checks.look(self.layer)
        return Joining(keys, values) if self._joins(keys, values) else self._coming(keys, values)

    def _joins(self, keys: mx.array, values: mx.array) -> bool:
        """Whether tokens only join the window."""
        return (
            self._past is not None
            and self.recent.tokens < self.windows.most_recent
            and (keys.shape, values.shape, keys.dtype, values.dtype) == self._one
        )

    def _coming(self, keys: mx.array, values: mx.array) -> Coming:
        for name, x, codec in (("keys", keys, self.key_codec), ("values", values, self.value_codec)):
            if x.shape[-1] != codec.head_dim:
                raise InputError(
                    f"Layer {self.layer}: {name} have a head dimension of {x.shape[-1]}, but this cache was made for "
                    f"{codec.head_dim}. Make the cache for this model: vl.make_cache(model, ...)."
                )
        count, recent = keys.shape[2], self.recent.tokens
        all_seen = self.chunk == "exact" and count > self.window
        arrival = self.windows.arrival(count, self.offset, recent, all_seen=all_seen)
        first = arrival.to_sinks + arrival.gone
        leaving: list[mx.array] = []
        largest: list[Largest] = []
        if arrival.from_new:
            leaving = [x[:, :, first : first + arrival.from_new] for x in (keys, values)]
        slid, encoded = self._slid(arrival), 0 < self.packed.ahead == arrival.to_packed == arrival.from_recent
        if arrival.from_recent and not (encoded and slid):
            oldest = [x[:, :, : arrival.from_recent] for x in self.recent.buffers.values()]
            both = zip(oldest, leaving, strict=True)
            leaving = [mx.concatenate([*pair], axis=2) for pair in both] if leaving else oldest
        joining = [x[:, :, : arrival.to_sinks] for x in (keys, values)] if arrival.to_sinks else []
        if slid is not None:
            leaving, largest = self._checks.after(leaving, slid.largest)
        elif leaving or joining:
            checked, largest = self._checks.of(self.layer, [*leaving, *joining])
            leaving, joining = checked[: len(leaving)], checked[len(leaving) :]
        sinks = (Code({"values": joining[0]}), Code({"values": joining[1]})) if joining else None
        codecs, packed = (self.key_codec, self.value_codec), None
        if leaving and not encoded:
            start = self.offset + first - (0 if arrival.gone else recent)  # of the oldest token to be encoded
            self.encodes(start + leaving[0].shape[2])
            codecs = fitted_online(self.key_codec, leaving[0]), fitted_online(self.value_codec, leaving[1])
            packed = codecs[0].encode(leaving[0], start), codecs[1].encode(leaving[1], start)
        return Coming(keys, values, all_seen, arrival, codecs, sinks, packed, largest, slid)

    def encodes(self, tokens: int) -> None:
        """Warn if the calibration does not fit all of the first ``tokens`` positions, of which some are encoded now."""
        if self.reach is not None and tokens > self.reach:
            codec = self.value_codec if self.path == "latents" else self.key_codec
            warn_beyond(codec, self.reach, tokens, self.model)

    def _slid(self, arrival: Arrival) -> Slid | None:
        """The window without the block that leaves it when one token comes, by a kernel; else None."""
        backend = current_backend()
        if backend is None or not backend.lazy or not arrival.from_recent or arrival.from_new or arrival.to_recent != 1:
            return None
        return self.recent.slid(arrival.from_recent, backend)

    def handed(self, history: History, count: int) -> tuple[Any, Any]:
        """The input of attention for ``count`` tokens, made from a ``history`` by the path; see the class."""
        if self.path == "codes":
            return history, history
        if self.path == "latents" and count == 1:
            return history.of_latents(), history.expand_values(self._dtype)
        keys, values = mx.depends(list(history.expand(self._dtype)), self.buffers)
        return keys, values

    def store(self, coming: Coming | Joining) -> History:
        """The second half of `update_and_fetch`, which cannot fail: store the tokens, and return what can be seen."""
        if isinstance(coming, Joining):
            return self._join(*coming)
        keys, values, all_seen, arrival, codecs, sinks, packed, largest, slid = coming
        self._checks.kept(largest)
        last, self._past, self._dtype = self._past, None, keys.dtype
        self._values_per_token = keys.shape[0] * keys.shape[1] * (keys.shape[-1] + values.shape[-1])
        hidden, rest = self.held - self.visible, arrival.to_sinks + arrival.gone + arrival.from_new
        segments = (*self._segments(hidden), exact_segment(exact_codes(keys, values))) if all_seen else ()
        self.key_codec, self.value_codec = codecs
        self.take(arrival, sinks, packed, exact_codes(keys, values, rest), slid)
        if self._stays and keys.shape[2] == 1 and self.recent.tokens:
            self._past = before_window(self, codecs, last)
            self._one = keys.shape, values.shape, *(x.dtype for x in self.recent.exact.buffers)
            return History(past=self._past, newest=self.recent.exact)
        segments = segments or self._segments(hidden)
        self.evict()
        history = History(segments, tuple(self.buffers) if keys.shape[2] > FEW_QUERIES else (), dtype=keys.dtype)
        self._lent = history if self.lends else None
        return history

    def _join(self, keys: mx.array, values: mx.array) -> History:
        self._checks.kept(())
        if self.recent.tokens + 1 == self.windows.early and self._past and self._past.filled:
            self._encode_ahead(self._past)
        return History(past=self._past, newest=self.recent.join(keys, values))

    def _encode_ahead(self, past: Past) -> None:
        """Encode the block that leaves next, some steps before that."""
        self.encodes(self.offset - self.recent.tokens + self.windows.block)
        codecs, room = (self.key_codec, self.value_codec), self.packed.room
        self.encode_ahead(codecs)
        if self.packed.room > room:  # attention reads the larger buffers from now on
            self._past = before_window(self, codecs, past)

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | Literal["causal"] | None:
        """The mask that ``N`` new tokens need, in mlx-lm's terms."""
        if self.max_size is None:
            mask: mx.array | Literal["causal"] | None = create_attention_mask(N, self.offset, return_array, window_size)
            return mask
        reach = window_size or self.max_size
        if N == 1:
            smaller = reach < min(self.visible + 1, self.max_size)
            return create_causal_mask(1, self.visible, reach)[0] if smaller else None
        return create_causal_mask(N, self.visible, reach) if return_array or self.visible + N > reach else "causal"

    def keys_and_values(self) -> tuple[Any, Any]:
        """The last input of attention, for a layer that shares these keys and values; otherwise all held tokens."""
        history = self._lent or self._history()
        return (history, history) if self.path == "codes" else self.arrays()

    @property
    def visible(self) -> int:
        """Held tokens that the next token can see."""
        return self.held if self.max_size is None else min(self.held, self.max_size - 1)

    @property
    def fp16_bytes(self) -> int:
        """Bytes that the layer's own cache holds of the same tokens at 16 bits a value."""
        return 2 * self.size() * self._values_per_token

    def arrays(self) -> tuple[mx.array, mx.array]:
        """The keys and values of `keys_and_values` as decoded arrays, in the dtype that they came in."""
        return (self._lent or self._history()).expand(self._dtype)

    def decoded(self) -> tuple[mx.array, mx.array]:
        """All held keys and values in float32, for inspection."""
        return self._history().expand(mx.float32)

    def size(self) -> int:
        """Tokens that can be seen."""
        return self.offset if self.max_size is None else min(self.offset, self.max_size)

    def is_trimmable(self) -> bool:
        """Whether the newest tokens can be dropped: always, except for a sliding layer that has dropped older ones."""
        return self.max_size is None or self.offset < self.max_size

    def check_trim(self, n: object) -> int:
        """Return ``n``; raises `InputError` if it is not a number of tokens, or the cache is not trimmable."""
        if not self.is_trimmable():
            raise InputError(
                f"Layer {self.layer} sees {self.max_size} tokens and has forgotten those before, which a shorter text "
                "would see again: start a new cache."
            )
        return int(TOKENS("n", n))

    def trim(self, n: int) -> int:
        """Drop the newest ``n`` tokens (at most all), and return their number; raises as `check_trim`.

        Encoded tokens stay encoded: the window fills again with later tokens.
        """
        dropped = min(self.check_trim(n), self.offset)
        self._lent = self._past = None
        self.drop_newest(dropped)
        return dropped

    @staticmethod
    def merge(caches: Sequence[CompressedKVCache]) -> Any:  # noqa: ANN401 - the class would import this module
        """A `veloxlab.cache.batch.BatchCompressedKVCache` of copies of ``caches``, which hold one sequence each."""
        from veloxlab.cache.batch import BatchCompressedKVCache

        return BatchCompressedKVCache([copy.deepcopy(cache) for cache in caches])

    def to_batch(self, left_padding: Sequence[int]) -> Any:  # noqa: ANN401
        """A batch of copies of this cache, with padding before their tokens; mlx-vlm's batches need it."""
        batch = self.merge([self] * len(left_padding))
        batch.prepare(left_padding=left_padding)
        return batch

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with its own tokens. Codecs never change, and are shared."""
        other = copy.copy(self)
        other.sinks, other.packed, other.recent = (copy.deepcopy(run, memo) for run in self.runs)
        other._lent, other._past, other._checks = None, None, copy.copy(self._checks)
        return other

    def settle(self) -> None:
        """Wait for the checks of stored tokens; raises `InputError` as `update_and_fetch` does."""
        self._checks.settle(self.layer)

    def describe(self) -> tuple[saved.Content, list[mx.array]]:
        self._lent = None
        (keys, of_keys), (values, of_values) = map(saved.describe_codec, (self.key_codec, self.value_codec))
        content = {
            "settings": {"sinks": self.max_sinks} | {name: getattr(self, name) for name in _SETTINGS},
            "codecs": {"keys": keys, "values": values},
            "evicted": self.evicted,
            "values_per_token": self._values_per_token,
            "dtype": str(self._dtype).rpartition(".")[2],
            "runs": [{"tokens": run.tokens, "buffers": list(run.buffers)} for run in self.runs],
        }
        return content, [*self.buffers, *of_keys, *of_values]

    @classmethod
    def rebuild(cls, content: saved.Content, arrays: Iterator[mx.array]) -> Self:
        saved.check_model(content["settings"]["model"], content["settings"]["layer"])
        held = [{name: next(arrays) for name in run["buffers"]} for run in content["runs"]]
        codecs = (saved.restore_codec(content["codecs"][tensor], arrays) for tensor in TENSORS)
        self = cls(*codecs, **content["settings"])
        runs = zip(self.runs, content["runs"], held, strict=True)
        self.sinks, self.packed, self.recent = (Run(run.most, said["tokens"], own) for run, said, own in runs)
        self.evicted, self._values_per_token = content["evicted"], content["values_per_token"]
        self._dtype = getattr(mx, content["dtype"])
        return self

    def _history(self) -> History:
        return History(self._segments(), dtype=self._dtype)

    def _segments(self, hidden: int = 0) -> tuple[Segment, ...]:
        return segments_of(self, self.runs, (self.key_codec, self.value_codec), hidden)

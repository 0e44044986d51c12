"""The activation cache: the output of a frozen prefix, computed once per example and read ever after.

While it is attached, the layers below the cut are skipped for a batch whose examples are all known: the lower ones hand
their input through, the last of them returns the stored states. Everything else of the model's own forward (masks,
position embeddings, rotary tables) runs as always, so no family needs code of its own. States are kept per example,
without padding; they belong to one cut and to weights that have not moved since, and are dropped when either changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rgft.components import Partition
from rgft.errors import CacheError

log = logging.getLogger("rgft")


@dataclass(frozen=True, kw_only=True)
class CachedState:
    """Hidden states of one example at the cut.

    Attributes:
        states_TD: without padding.
        offset: position of the first token in its row; positions are absolute in some models, so it must recur.
        tokens: length of the row, padding included, where no mask told the tokens from it: then that must recur too.
    """

    states_TD: Tensor
    offset: int
    tokens: int | None = None


class _PrefixComputed(Exception):
    """Ends a filling pass at the cut: what lies above is not wanted."""


class ActivationCache:
    """Reads and writes prefix activations of one model at one cut, in memory.

    Args:
        model: the model; the forward of its frozen layers is wrapped until `detach`.
        partition: gives the layers.
        dtype: how states are stored; None keeps the model's (then a hit is exact).
        max_bytes: examples beyond this size are not stored, and recomputed each time.
        required: whether a model whose layers cannot be skipped is an error; else the cache says so once and stays out.

    Raises:
        CacheError: a layer returns more than hidden states (T5's position bias), or the model has no layers.
    """

    def __init__(
        self, model: nn.Module, partition: Partition, *, dtype: torch.dtype | None = None, max_bytes: int = 4 << 30,
        required: bool = True,
    ) -> None:  # fmt: skip
        if not partition.layers:
            raise CacheError("the activation cache needs a model with layers; this one has none. Use cache='none'")
        self._layers = [model.get_submodule(path) for path in partition.layers]
        self._dtype = dtype
        self._max_bytes = max_bytes
        self._required = required
        self._is_usable = True
        self._states: dict[int, CachedState] = {}
        self._bytes = 0
        self._cut = 0
        self._replaced: list[tuple[nn.Module, Any]] = []
        self._ids: Sequence[int] | None = None
        self._spans: list[tuple[int, int]] | None = None
        self._tokens: int | None = None
        self._hit = False
        self._filling = False
        self.hits = 0
        self.misses = 0

    @property
    def cut(self) -> int:
        return self._cut

    @property
    def bytes(self) -> int:
        """Bytes of stored states."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, example: int) -> bool:
        return example in self._states

    def set_cut(self, cut: int) -> None:
        """Keeps states at the output of the layer of depth cut−1; another cut drops them. Below 2 nothing is kept."""
        if cut == self._cut:
            return
        self.detach()
        self.clear()
        self._cut = cut
        if not self._is_usable:
            return
        frozen = min(cut - 1, len(self._layers))
        for position, layer in enumerate(self._layers[: max(frozen, 0)]):
            self._replaced.append((layer, layer.__dict__.get("forward")))
            layer.forward = self._wrap(layer.forward, is_last=position == frozen - 1)

    def clear(self) -> None:
        self._states.clear()
        self._bytes = 0

    def detach(self) -> None:
        """Gives the layers their own forward back."""
        for layer, own_forward in self._replaced:
            if own_forward is None:
                del layer.forward  # the class's own shows again
            else:
                layer.forward = own_forward
        self._replaced.clear()

    def begin(self, ids: Sequence[int] | None, attention_mask: Tensor | None, tokens: int | None = None) -> bool:
        """Announces the batch of the next forward; returns whether its prefix will be read from the cache.

        Args:
            ids: example ids in row order; None bypasses the cache.
            attention_mask: [B, T], 1 where a token is, or None where that is not known.
            tokens: T, or None without a token dimension; what tells states apart when the mask does not.
        """
        self._hit = False
        self._ids = ids if self._replaced else None
        if self._ids is None:
            return False
        self._spans = _spans(attention_mask)
        self._tokens = tokens if self._spans is None else None
        self._hit = not self._unknown(self._ids, self._spans, self._tokens)
        if self._hit:
            self.hits += len(self._ids)
        else:
            self.misses += len(self._ids)
        return self._hit

    def unknown_rows(
        self, ids: Sequence[int] | None, attention_mask: Tensor | None, tokens: int | None = None
    ) -> list[int]:  # fmt: skip
        """Rows whose states are not stored (at their place in the row); all of them while nothing is frozen."""
        if ids is None or not self._replaced:
            return list(range(len(ids or ())))
        return self._unknown(ids, _spans(attention_mask), tokens)

    def _unknown(
        self, ids: Sequence[int], spans: list[tuple[int, int]] | None, tokens: int | None
    ) -> list[int]:  # fmt: skip
        def is_known(row: int) -> bool:
            state = self._states.get(ids[row])
            if state is None or spans is None:
                return state is not None and state.tokens == tokens
            return state.tokens is None and (state.offset, len(state.states_TD)) == spans[row]

        return [row for row in range(len(ids)) if not is_known(row)]

    def fill(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], ids: Sequence[int], rows: list[int],
        tokens: int | None = None,
    ) -> None:  # fmt: skip
        """Computes and stores the states of some rows of a batch, and nothing above the cut.

        Args:
            model: whose layers these are.
            args, kwargs: what the model's forward takes for the whole batch.
            ids: example ids of the whole batch.
            rows: which rows.
            tokens: as in `begin`.
        """

        def chosen(value: Any) -> Any:
            is_batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == len(ids)
            return value[rows] if is_batched else value

        some = {name: chosen(value) for name, value in kwargs.items()}
        self.begin([ids[row] for row in rows], some.get("attention_mask"), tokens)
        self._filling = True
        try:
            with torch.no_grad():
                model(*(chosen(value) for value in args), **some)
        except _PrefixComputed:
            pass
        finally:
            self._filling = False
            self.end()

    def end(self) -> None:
        """Ends the batch: forwards until the next `begin` bypass the cache."""
        self._ids, self._hit = None, False

    def _wrap(self, forward: Callable[..., Any], *, is_last: bool) -> Callable[..., Any]:
        def cached_forward(*args: Any, **kwargs: Any) -> Any:
            if self._ids is None:
                return forward(*args, **kwargs)
            hidden_BTD = args[0] if args else kwargs["hidden_states"]
            if self._hit:
                return self._returns(self._read(hidden_BTD) if is_last else hidden_BTD)
            output = forward(*args, **kwargs)
            try:
                states = self._hidden_of(output)
            except CacheError as error:
                if self._required:
                    raise
                log.warning("no activation cache: %s", error)
                self._is_usable, self._ids = False, None
                self.detach()
                return output
            if is_last:
                self._write(states.detach())
                if self._filling:
                    raise _PrefixComputed
            return output

        return cached_forward

    def _hidden_of(self, output: Any) -> Tensor:
        self._returns = _identity
        if isinstance(output, tuple):
            if any(isinstance(item, Tensor) for item in output[1:]):
                raise CacheError(
                    "a layer returns tensors beside its hidden states (as T5's position bias), which later layers "
                    "need; the activation cache cannot skip it. Use cache='none'"
                )
            rest = output[1:]
            self._returns = lambda states: (states, *rest)
            output = output[0]
        if not isinstance(output, Tensor):
            raise CacheError(f"a layer returned {type(output).__name__}, expected hidden states. Use cache='none'")
        return output

    _returns: Callable[[Tensor], Any] = staticmethod(lambda states: states)

    def _read(self, like: Tensor) -> Tensor:
        assert self._ids is not None
        states = [self._states[example] for example in self._ids]
        if self._spans is None:
            return torch.stack([state.states_TD for state in states]).to(like.device, like.dtype)
        width = states[0].states_TD.shape[1:]
        output_BTD = torch.zeros(len(states), like.shape[1], *width, device=like.device, dtype=like.dtype)
        for row_TD, state in zip(output_BTD, states, strict=True):
            row_TD[state.offset : state.offset + len(state.states_TD)] = state.states_TD.to(like.device, like.dtype)
        return output_BTD

    def _write(self, states_BTD: Tensor) -> None:
        assert self._ids is not None
        if not bool(torch.isfinite(states_BTD).all()):
            raise CacheError(f"the states of examples {list(self._ids)} at cut {self._cut} are not finite; not cached")
        for row, example in enumerate(self._ids):
            offset, length = self._spans[row] if self._spans else (0, states_BTD.shape[1])
            states_TD = states_BTD[row, offset : offset + length].to("cpu", self._dtype or states_BTD.dtype, copy=True)
            known = self._states.get(example)
            freed = 0 if known is None else known.states_TD.nbytes
            if self._bytes - freed + states_TD.nbytes > self._max_bytes:
                continue
            self._bytes += states_TD.nbytes - freed
            self._states[example] = CachedState(states_TD=states_TD, offset=offset, tokens=self._tokens)

    def state_dict(self) -> dict[str, Any]:
        """All stored states; restoring them makes a resumed run read the same bytes."""
        return {
            "cut": self._cut,
            "ids": list(self._states),
            "offsets": [state.offset for state in self._states.values()],
            "tokens": [state.tokens for state in self._states.values()],
            "states": [state.states_TD for state in self._states.values()],
            "hits": self.hits,
            "misses": self.misses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.set_cut(state["cut"])
        self.clear()
        for example, offset, tokens, states_TD in zip(
            state["ids"], state["offsets"], state["tokens"], state["states"], strict=True
        ):
            self._states[example] = CachedState(states_TD=states_TD, offset=offset, tokens=tokens)
            self._bytes += states_TD.nbytes
        self.hits, self.misses = state["hits"], state["misses"]


def _identity(states: Tensor) -> Tensor:
    return states


def _spans(attention_mask: Tensor | None) -> list[tuple[int, int]] | None:
    """(offset, length) of each row's tokens. A mask with holes keeps the span from first to last token."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    spans = []
    for row in attention_mask.bool().cpu():
        places = row.nonzero()
        first, last = (int(places[0]), int(places[-1])) if len(places) else (0, -1)
        spans.append((first, last - first + 1))
    return spans

"""`linearize chat`: a conversation whose history is the model's state."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from linearize.errors import DataError, StateError
from linearize.generation.state import State
from linearize.generation.statefile import check_target, header
from linearize.generation.text import continue_text
from linearize.jobs.checks import check_dtype
from linearize.jobs.generate import check_chat
from linearize.model import LinearizedForCausalLM
from linearize.runtime.claims import claimed
from linearize.sources.source import open_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from linearize.generation.decoding import Decoding
    from linearize.generation.text import Continuation


class Conversation:
    """A conversation with a model. Each turn reads only its own text; all before it is in the state.

    Args:
        system: the system prompt.

    Attributes:
        last: the last answer and its figures; None before the first.

    Raises:
        ModelError: the model cannot be read, or has no chat template.
        DataError: `decoding.max_new_tokens` is 0.
    """

    def __init__(
        self,
        model: str,
        decoding: Decoding,
        *,
        system: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        check_dtype(dtype, int8=True)
        if decoding.max_new_tokens == 0:
            raise DataError("max_new_tokens 0: an answer needs 1 or more")
        self.model, self.tokenizer, source = open_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
        check_chat(self.tokenizer, source.name, chat=True, system=system)
        self.name, self.decoding, self.system = source.name, decoding, system
        self.last: Continuation | None = None
        self._state: State | None = None
        self._turns = 0

    @property
    def tokens(self) -> int:
        """Tokens of the conversation so far."""
        if self._state is not None:
            return int(self._state.tokens)
        past = None if self.last is None else self.last.past
        return 0 if past is None else past.ids.shape[1]

    @property
    def memory_bytes(self) -> int:
        """Bytes of the state, or of the cache of a model that was not converted."""
        if self._state is not None:
            return self._state.nbytes
        return 0 if self.last is None else self.last.memory_bytes

    def say(
        self, text: str, write: Callable[[str], object], interrupted: Callable[[], bool] | None = None
    ) -> Continuation:
        """The answer to `text`.

        Args:
            write: called with each piece of the answer.
            interrupted: called after each token; True ends the answer there.

        Raises:
            DataError: the text has no tokens, or no room in the model's positions.
        """
        past = None if self.last is None else self.last.past
        self.last = continue_text(
            self.model,
            self.tokenizer,
            text,
            decoding=replace(self.decoding, seed=(self.decoding.seed + self._turns) % 2**63),
            state=self._state,
            past=past,
            chat=True,
            system=self.system,
            write=write,
            interrupted=interrupted,
        )
        self._state, self._turns = self.last.state, self._turns + 1
        return self.last

    def reset(self, system: str | None = None) -> None:
        """Begin a new conversation with the system prompt `system`."""
        self.system, self.last, self._state, self._turns = system, None, None, 0

    def save(self, path: Path) -> int:
        """Write the state; returns the bytes of the file.

        Raises:
            StateError: nothing was said yet, or the model was not converted.
            OutputError: the file cannot be written.
        """
        self._check_converted()
        if self._state is None:
            raise StateError("nothing was said yet, so there is no state to save")
        check_target(path)
        with claimed(path):
            return self._state.save(path, self.model)

    def load(self, path: Path) -> int:
        """Go on with the conversation of a state; returns its tokens.

        Raises:
            StateError: the file is not a state of this model, or the model was not converted.
        """
        self._check_converted()
        header(path)
        state = State.load(path, self.model)
        if len(state.last) != 1:
            raise StateError(f"{path}: the state holds {len(state.last)} texts, and a conversation is one")
        self.reset(self.system)
        self._state = state
        return self.tokens

    def _check_converted(self) -> None:
        model: Any = self.model
        if not isinstance(model, LinearizedForCausalLM):
            raise StateError(f"{self.name}: is not a converted model, so it has no state to save or load")

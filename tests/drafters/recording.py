"""A drafter that remembers all that the loop tells it, for tests of the contract."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from specjax import types


@struct.dataclass
class Heard:
    """What the last `update` was given, the context's cache aside."""

    length: jax.Array
    active: jax.Array
    tokens: jax.Array
    verdict: types.Verdict
    output: types.ModelOutput


@struct.dataclass
class Memory:
    """The output heard at every committed token, by its position, and the last update.

    Attributes:
      logits: [B, S, V].
      features: [B, S, taps, H].
      steps: int32[], updates heard.
      last: the last one.
    """

    logits: jax.Array
    features: jax.Array
    steps: jax.Array
    last: Heard

    def hear(self, output, node, place, counts):
        """Writes the output at node[B, P] to place[B, P], where it counts."""
        row = jnp.arange(node.shape[0], dtype=jnp.int32)[:, None]
        place = jnp.where(counts, place, self.logits.shape[1])
        return dataclasses.replace(
            self,
            logits=self.logits.at[row, place].set(output.logits[row, node], mode="drop"),
            features=self.features.at[row, place].set(output.features[row, node], mode="drop"),
        )


@dataclasses.dataclass(frozen=True)
class Init:
    """Zeros of every form that will be heard."""

    nodes: int
    depth: int
    taps: int
    vocab_size: int
    hidden_size: int

    def __call__(self, params, batch, capacity):
        def zeros(*shape):
            return jnp.zeros((batch, *shape), jnp.int32)

        def output(count):
            features = jnp.zeros((batch, count, self.taps, self.hidden_size))
            return jnp.zeros((batch, count, self.vocab_size)), features

        nodes = self.nodes
        verdict = types.Verdict(zeros(self.depth), zeros(), zeros(), zeros(nodes + 1))
        heard = Heard(
            zeros(), zeros() > 0, zeros(nodes), verdict, types.ModelOutput(*output(nodes + 1))
        )
        return Memory(*output(capacity), jnp.zeros((), jnp.int32), heard)


def prefill(params, state, text, start, count, output):
    del params, text
    width = output.logits.shape[1]
    node = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (start.shape[0], width))
    return state.hear(output, node, start[:, None] + node, node < count[:, None])


def update(params, state, context, draft, verdict, output):
    del params
    nodes = jnp.pad(verdict.path, ((0, 0), (1, 0)))
    order = jnp.arange(nodes.shape[1], dtype=jnp.int32)[None]
    root = context.length - verdict.count - 2
    counts = (order <= verdict.count[:, None]) & context.active[:, None]
    state = state.hear(output, nodes, root[:, None] + order, counts)
    last = Heard(context.length, context.active, draft.tokens, verdict, output)
    return dataclasses.replace(state, steps=state.steps + 1, last=last)


def recorder(target, propose, nodes, depth, taps, params=()):
    """A drafter over `target` that proposes so, and whose state is a `Memory`."""
    return types.Drafter(
        params=params,
        init=Init(nodes, depth, len(taps), target.vocab_size, target.hidden_size),
        prefill=prefill,
        propose=propose,
        update=update,
        nodes=nodes,
        taps=taps,
        name="recorder",
    )

"""The conformance suite: hold your own model to the contract that specjax's are held to.

`check_language_model` runs a `LanguageModel` along every way in which decoding may drive it and
compares with one plain pass over the whole text: ragged chunks, single tokens, trees in one call
and grown depth by depth, commits, truncation, early exit. Whatever passes can be a target or a
draft model.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import trees, types

__all__ = ["check_language_model"]


def check_language_model(
    model: types.LanguageModel,
    key: jax.Array,
    *,
    batch: int = 3,
    length: int = 7,
    nodes: int = 5,
    tolerance: float = 1e-4,
) -> None:
    """Holds a model to the contract of `types.LanguageModel`, on random texts and trees.

    Every row has its own text length and its own accepted path, for rows that agree hide errors. A
    text of at most `2 * (length + nodes + 2)` tokens must fit.

    Args:
      model: any model; `truncate` and `resume` are checked where it has them.
      key: a typed key, consumed; draws texts and trees.
      batch: B, rows; at least 2.
      length: longest prompt; at least 3.
      nodes: N of the trees; at least 2.
      tolerance: largest absolute difference of logits (and of features) that counts as equal.

    Raises:
      AssertionError: the model breaks the contract; the message says where and by how much.
      ValueError: a size is too small to check anything.
    """
    if batch < 2 or length < 3 or nodes < 2:
        raise ValueError(
            f"need batch >= 2, length >= 3 and nodes >= 2, got {batch}, {length} and {nodes}"
        )
    check = _Check(model, key, batch, length, nodes, tolerance)
    check.functions()
    check.chunks()
    check.single_tokens()
    check.rows_alone()
    check.taps()
    static, dynamic = check.topologies()
    for tree in (static, dynamic):
        check.tree(tree)
        check.committed_path(tree)
    check.resume(None)
    check.resume(dynamic)
    check.truncation()


class _Check:
    """One model, one set of texts, and the logits of a plain pass over them."""

    def __init__(self, model, key, batch, length, nodes, tolerance):
        self.model, self.batch, self.length, self.nodes = model, batch, length, nodes
        self.tolerance = tolerance
        self.capacity = 2 * (length + nodes + 2)
        seed = np.asarray(jax.random.key_data(key)).tolist()
        self.random = np.random.default_rng(seed)
        self.apply = jax.jit(model.apply, static_argnums=(4,))
        self.append, self.commit = jax.jit(model.append), jax.jit(model.commit)
        self.texts = self.draw((batch, length + nodes + 2))
        # Unequal, 1 and the longest among them.
        others = [2 + row % (length - 2) for row in range(batch - 2)]
        self.lengths = np.asarray([length, 1, *others])
        self.plain = self.whole(self.texts)

    def draw(self, shape):
        return self.random.integers(0, self.model.vocab_size, shape).astype(np.int32)

    def call(self, tokens, cache, tree=None, taps=()) -> tuple[types.ModelOutput, Any]:
        """One pass over tokens[B, T], whose entries are appended."""
        tokens = jnp.asarray(tokens, jnp.int32)
        output, entries = self.apply(self.model.params, tokens, cache, tree, taps)
        for leaf in jax.tree.leaves(entries):
            self.demand(
                leaf.shape[:2] == tokens.shape,
                f"entries have shape {leaf.shape}, not [B, T, …] with B, T = {tokens.shape}",
            )
        return output, self.append(cache, entries)

    def whole(self, texts):
        """Logits [B, T, V] of whole texts in one pass."""
        output, _ = self.call(texts, self.model.init_cache(len(texts), self.capacity))
        return np.asarray(output.logits)

    def demand(self, holds, complaint):
        if not holds:
            raise AssertionError(f"language model: {complaint}")

    def compare(self, what, found, wanted, counts=None):
        """Demands equality of [B, T, …] at the first `counts` tokens of each row."""
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        self.demand(found.shape == wanted.shape, f"{what}: shape {found.shape}, not {wanted.shape}")
        gap = np.abs(np.where(found == wanted, 0.0, found - wanted))
        gap = gap.reshape(*gap.shape[:2], -1).max(axis=-1, initial=0.0)
        if counts is not None:
            gap[np.arange(gap.shape[1])[None] >= np.asarray(counts)[:, None]] = 0.0
        # A NaN is no agreement.
        gap = np.where(np.isnan(gap), np.inf, gap)
        row, token = np.unravel_index(np.argmax(gap), gap.shape)
        self.demand(
            gap[row, token] <= self.tolerance,
            f"{what}: differs from a plain pass over the text by {gap[row, token]:.3g} "
            f"at row {row}, token {token} (tolerance {self.tolerance:.3g})",
        )

    def prefilled(self, lengths=None):
        """A cache that holds the first `lengths` tokens of each text, fed in two ragged chunks."""
        lengths = self.lengths if lengths is None else np.asarray(lengths)
        cache = self.model.init_cache(self.batch, self.capacity)
        done = np.zeros_like(lengths)
        width = -(-self.length // 2)
        while np.any(done < lengths):
            counts = np.minimum(lengths - done, width)
            window = np.stack([self.texts[row, at : at + width] for row, at in enumerate(done)])
            output, cache = self.call(window, cache)
            wanted = np.stack([self.plain[row, at : at + width] for row, at in enumerate(done)])
            self.compare("chunks of unequal lengths", output.logits, wanted, counts)
            cache = self.commit(cache, None, jnp.asarray(counts, jnp.int32))
            done = done + counts
        return cache

    def proceeds(self, what, cache, texts, lengths):
        """Demands that a cache that holds texts[:, :lengths] goes on as the plain texts do."""
        plain = self.whole(texts)
        more = [texts[row, at : at + 2] for row, at in enumerate(lengths)]
        output, _ = self.call(np.stack(more), cache)
        wanted = np.stack([plain[row, at : at + 2] for row, at in enumerate(lengths)])
        self.compare(what, output.logits, wanted)

    def functions(self):
        model = self.model
        for name in ("apply", "append", "commit", "init_cache", "truncate", "resume"):
            function = getattr(model, name)
            try:
                hash(function)
            except TypeError as error:
                raise AssertionError(
                    f"language model: {name} is not hashable ({error}), so it cannot be static"
                ) from error
        for leaf in jax.tree.leaves(model.params):
            self.demand(hasattr(leaf, "dtype"), f"params hold {leaf!r}, not an array")
        self.demand(
            self.plain.shape == (*self.texts.shape, model.vocab_size),
            f"logits have shape {self.plain.shape}, and vocab_size is {model.vocab_size}",
        )

    def chunks(self):
        cache = self.prefilled()
        self.proceeds("going on after ragged chunks", cache, self.texts, self.lengths)
        # Chunks may also stay uncommitted: then they are one chain.
        empty = self.model.init_cache(self.batch, self.capacity)
        _, cache = self.call(self.texts[:, :2], empty)
        output, cache = self.call(self.texts[:, 2:3], cache)
        self.compare("a chunk after an uncommitted one", output.logits, self.plain[:, 2:3])
        keep = np.arange(self.batch) % 4
        cache = self.commit(cache, None, jnp.asarray(keep, jnp.int32))
        self.proceeds("committing part of a chain", cache, self.texts, keep)

    def single_tokens(self):
        cache = self.model.init_cache(self.batch, self.capacity)
        for at in range(self.length):
            output, cache = self.call(self.texts[:, at : at + 1], cache)
            self.compare(f"single tokens, position {at}", output.logits, self.plain[:, at : at + 1])
            cache = self.commit(cache, None, jnp.ones((self.batch,), jnp.int32))

    def rows_alone(self):
        for row in range(self.batch):
            alone = self.whole(self.texts[row : row + 1])
            self.compare("a row alone", alone, self.plain[row : row + 1])

    def taps(self):
        """Features: one axis a tap, the same however the text is cut."""
        model = self.model
        layers = tuple(range(model.num_layers + 1))
        empty = model.init_cache(self.batch, self.capacity)
        for taps in ((), layers, layers[::-1]):
            output, _ = self.call(self.texts, empty, None, taps)
            shape = (*self.texts.shape, len(taps), model.hidden_size)
            self.demand(
                output.features.shape == shape or not taps,
                f"features for taps={taps} have shape {output.features.shape}, not {shape}",
            )
            self.demand(
                output.features.shape[2] == len(taps),
                f"features for taps={taps} have shape {output.features.shape}",
            )
            self.compare(f"logits with taps={taps}", output.logits, self.plain)
        forward, _ = self.call(self.texts, empty, None, layers)
        backward, _ = self.call(self.texts, empty, None, layers[::-1])
        self.compare("taps in another order", backward.features[:, :, ::-1], forward.features)
        first, cache = self.call(self.texts[:, :3], empty, None, layers)
        second, _ = self.call(self.texts[:, 3:5], cache, None, layers)
        self.compare("features of a chunk", first.features, forward.features[:, :3])
        self.compare("features of a later chunk", second.features, forward.features[:, 3:5])

    def topologies(self):
        """Random trees: one static, and one a row."""
        yield trees.from_parents(self.parents())
        rows = np.stack([self.parents() for _ in range(self.batch)])
        yield trees.dynamic(jnp.asarray(rows, jnp.int32), self.nodes)

    def parents(self):
        return [int(self.random.integers(0, node)) for node in range(1, self.nodes + 1)]

    def grown(self, tree):
        """A drafted tree: its paths of node indices, tokens [B, N+1] and wanted logits."""
        parents = np.broadcast_to(np.asarray(trees.parents(tree)), (self.batch, tree.size))
        paths = [[[0]] for _ in range(self.batch)]
        for row in range(self.batch):
            for parent in parents[row]:
                paths[row].append([*paths[row][parent], len(paths[row])])
        tokens = self.draw((self.batch, tree.size + 1))
        texts = [
            self.joined(row, tokens[row, paths[row][node]])
            for row in range(self.batch)
            for node in range(tree.size + 1)
        ]
        shape = (self.batch, tree.size + 1, *self.plain.shape[1:])
        plain = self.whole(np.stack(texts)).reshape(shape)
        wanted = [
            [plain[row, node, self.lengths[row] + len(path) - 1] for node, path in enumerate(each)]
            for row, each in enumerate(paths)
        ]
        return paths, tokens, np.asarray(wanted)

    def joined(self, row, tail):
        """The prompt of a row, then `tail`, then something to fill the width."""
        text = self.texts[row].copy()
        text[self.lengths[row] : self.lengths[row] + len(tail)] = tail
        return text

    def name(self, tree):
        kind = "a dynamic tree" if tree.static_parents is None else f"tree {tree.static_parents}"
        return f"{kind} of {tree.size} nodes"

    def tree(self, tree):
        _, tokens, wanted = self.grown(tree)
        output, _ = self.call(tokens, self.prefilled(), tree)
        self.compare(f"{self.name(tree)} in one call", output.logits, wanted)
        # Grown like EAGLE's trees, some nodes a call; the uncommitted ones are read back.
        width = 1 if tree.static_parents is None else 2
        cache = self.prefilled()
        for at in range(0, tree.size + 1, width):
            end = min(at + width, tree.size + 1)
            output, cache = self.call(tokens[:, at:end], cache, _prefix(tree, end - 1))
            self.compare(
                f"{self.name(tree)} grown {width} nodes a call, node {at} on",
                output.logits,
                wanted[:, at:end],
            )

    def committed_path(self, tree):
        """Commits another path in every row, one of them empty, and goes on."""
        paths, tokens, _ = self.grown(tree)
        _, cache = self.call(tokens, self.prefilled(), tree)
        nodes = np.zeros((self.batch, tree.max_depth + 1), np.int32)
        counts, texts = np.zeros(self.batch, np.int32), []
        for row in range(self.batch):
            path = paths[row][-1 - row % (tree.size + 1)]
            nodes[row, : len(path)] = path
            counts[row] = 0 if row == 1 else len(path)
            texts.append(self.joined(row, tokens[row, path[: counts[row]]]))
        cache = self.commit(cache, jnp.asarray(nodes), jnp.asarray(counts))
        self.proceeds(
            f"going on after a committed path of {self.name(tree)}",
            cache,
            np.stack(texts),
            self.lengths + counts,
        )

    def truncation(self):
        """Forgets down to unequal lengths, a length beyond the text and uncommitted entries."""
        model = self.model
        if model.truncate is None:
            return
        for shorter in (self.lengths // 2, np.maximum(self.lengths - 1, 0), self.lengths + 1):
            _, cache = self.call(self.draw((self.batch, 2)), self.prefilled())
            cache = model.truncate(cache, jnp.asarray(shorter, jnp.int32))
            left = np.minimum(shorter, self.lengths)
            self.proceeds(f"going on after truncating to {left}", cache, self.texts, left)

    def resume(self, tree):
        """Early exit: from the features at any layer the rest gives the same logits."""
        model = self.model
        if model.resume is None:
            return
        if tree is None:
            tokens = self.draw((self.batch, 3))
            name = "a chain"
        else:
            tokens, name = self.grown(tree)[1], self.name(tree)
        resume = jax.jit(model.resume, static_argnums=(2, 5))
        layers = tuple(range(model.num_layers + 1))
        full, cache = self.call(tokens, self.prefilled(), tree, layers)
        for layer in layers[:-1]:
            hidden = full.features[:, :, layer]
            output, _ = resume(model.params, hidden, layer, cache, tree, layers[layer:])
            what = f"resuming {name} at layer {layer}"
            self.compare(what, output.logits, full.logits)
            self.compare(f"features on {what}", output.features, full.features[:, :, layer:])


def _prefix(tree: trees.Tree, size: int) -> trees.Tree:
    """The tree of the first `size` nodes."""
    if tree.static_parents is not None:
        return trees.from_parents(tree.static_parents[:size])
    return trees.dynamic(trees.parents(tree)[:, :size], min(tree.max_depth, size))

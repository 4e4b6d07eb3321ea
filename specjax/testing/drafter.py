"""Holds a `Drafter` to its contract by driving it through the loop that decodes.

After every step of two turns the next draft is looked at: by itself, against that of a fresh
prefill of the same text, and against that of the same row in another slot, another batch and alone.
Many drafts of one text tell whether tokens have the laws named for them.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax import decoding, types
from specjax.testing import drafts, driving, static

__all__ = ["check_drafter"]

# Keys under which every text is drafted for.
_CROWD = 256


def check_drafter(
    drafter: types.Drafter,
    target: types.LanguageModel,
    key: jax.Array,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    remembers: bool = False,
    tolerance: float = 1e-4,
) -> None:
    """Holds a drafter to the contract of `types.Drafter` over a small target.

    Args:
      drafter: any drafter.
      target: the model it drafts for; a small one, since it takes some hundred steps. It must hold
        the longest prompt and `8 * (D + 2) + 8` tokens more, D the draft's depth.
      key: a typed key, consumed; draws prompts, acceptances and the rows' keys.
      prompts: at least three, of unequal lengths, on which it drafts. By default four random ones
        of few tokens, in which n-grams recur.
      remembers: whether drafts may depend on how a text came about (Jacobi trajectories, a pool of
        n-grams seen in passing), so that a fresh prefill of it may lawfully draft otherwise. That
        one comparison is then left out.
      tolerance: largest absolute difference of probabilities that counts as equal.

    Raises:
      AssertionError: the drafter breaks the contract, and the message says where and by how much;
        or it never drafted, so that nothing has been checked.
      ValueError: the drafter has no nodes, or the prompts are too few or too much alike.
    """
    if drafter.nodes < 1:
        raise ValueError(f"drafter {drafter.name!r} has nodes={drafter.nodes}: nothing to check")
    if prompts is None:
        random = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
        few = min(target.vocab_size, 5)
        prompts = [random.integers(0, few, length).tolist() for length in (7, 1, 4, 10)]
    lengths = [len(prompt) for prompt in prompts]
    if len(prompts) < 3 or len(set(lengths)) < 2 or min(lengths) < 1:
        raise ValueError(
            f"need at least 3 prompts of unequal lengths, none of them empty, got lengths {lengths}"
        )
    check = _Check(drafter, target, key, prompts, tolerance)
    check.memory(remembers)
    check.rows_elsewhere()
    check.laws()
    check.text()
    check.traces()


class _Check:
    """One drafter and the rows it is driven over."""

    def __init__(self, drafter, target, key, prompts, tolerance):
        self.drafter, self.target, self.tolerance = drafter, target, tolerance
        self.functions()
        form = self.form_of_draft()
        depth = form.tree.max_depth
        self.rows = driving.rows_of(prompts, depth)
        self.stranger = dataclasses.replace(
            self.rows[0], turns=(list(prompts[-1][::-1]), [0]), key=len(prompts)
        )
        row_key, self.crowd_key = jax.random.split(key)
        keys = jax.random.split(row_key, len(prompts) + 1)
        capacity = max(map(len, prompts)) + 8 * (depth + 2) + 8
        self.driver = driving.Driver(target, drafter, form, keys, capacity)
        self.history: list[driving.Moment] = []

    def demand(self, holds, complaint):
        if not holds:
            raise AssertionError(f"drafter {self.drafter.name!r}: {complaint}")

    def same(self, where, found, row, wanted, other, than=""):
        """Demands that row `row` of a draft is row `other` of another."""
        complaint = drafts.difference(found, row, wanted, other, self.tolerance)
        self.demand(complaint is None, f"{where}: {complaint}{than}")

    def functions(self):
        for name in ("init", "prefill", "propose", "update"):
            complaint = static.fault(name, getattr(self.drafter, name))
            self.demand(complaint is None, complaint)
        for leaf in jax.tree.leaves(self.drafter.params):
            self.demand(hasattr(leaf, "dtype"), f"params hold {leaf!r}, not an array")

    def form_of_draft(self) -> types.Draft:
        """The form of a draft, held against what the drafter says of itself."""
        form = jax.eval_shape(decoding.first_draft, self.target, self.drafter)
        nodes, size = self.drafter.nodes, form.tree.size
        self.demand(size == nodes, f"nodes={nodes}, but its drafts have N={size}")
        given, vocab_size = form.log_probs.shape[2], self.target.vocab_size
        self.demand(
            given == vocab_size, f"its laws are over {given} tokens, the target's over {vocab_size}"
        )
        return form

    def memory(self, remembers):
        """Drafts by themselves, against a fresh prefill, and of rows that take no part."""
        for moment in self.driver.moments(self.rows):
            if not self.history:
                self.form_of_state(moment)
            complaint = drafts.fault(moment.draft, self.target.vocab_size, self.tolerance)
            self.demand(complaint is None, f"{moment.name}: {complaint}")
            if not remembers:
                self.fresh(moment)
            if self.history:
                self.active_rows(self.history[-1], moment)
                self.still_rows(self.history[-1], moment)
            self.history.append(moment)
        self.demand(
            any(np.any(moment.draft.present) for moment in self.history)
            or self.history[0].draft.passengers,
            f"no node was present in any of {len(self.history)} drafts; give prompts on which it "
            "drafts, for otherwise nothing has been checked",
        )

    def form_of_state(self, moment):
        after = self.driver.step_of_all(self.target, self.drafter, moment.request, moment.state)
        forms = []
        for state in (moment.state, after):
            leaves, structure = jax.tree.flatten(
                jax.eval_shape(lambda tree: tree, state.drafter.own)
            )
            shapes = [
                f"{'weak ' * leaf.weak_type}{leaf.dtype}{list(leaf.shape)}" for leaf in leaves
            ]
            forms.append(f"{structure} of {', '.join(shapes)}")
        self.demand(
            forms[0] == forms[1],
            f"its state has another form after a step: {forms[0]} became {forms[1]}",
        )

    def fresh(self, moment):
        """The draft after any history is that of a fresh prefill of the text."""
        wanted = self.driver.fresh(moment)
        for row, length in enumerate(np.asarray(moment.state.length)):
            where = f"{moment.name}, row {row}"
            if moment.info is not None:
                where = f"{where}, {moment.info.accepted[row]} accepted in the last"
            than = f", as after a fresh prefill of its {length} tokens"
            self.same(where, moment.draft, row, wanted, row, than)

    def active_rows(self, before, moment):
        """A step drafts for its active rows what it would with all rows active, and no others."""
        if moment.info is None:
            return
        made = jax.device_get(moment.state.drafter.draft)
        for row, active in enumerate(np.asarray(moment.info.active)):
            where = f"{moment.name}, row {row}"
            if active:
                than = ", as in a step of all rows"
                self.same(where, made, row, before.draft, row, than)
            else:
                drafted = int(moment.info.drafted[row])
                self.demand(drafted == 0, f"{where}: is inactive, and {drafted} drafts count")

    def still_rows(self, before, moment):
        """A row that took no part drafts what it did before, and its state is what it was."""
        if moment.info is None:
            # A new turn: the state of the last one is consumed, and its drafts alone are left.
            for row, given in enumerate(self.rows):
                if not given.turns[moment.turn]:
                    where = f"{moment.name}, row {row}, given no new tokens"
                    self.same(where, moment.draft, row, before.draft, row)
            return
        leaves = list(self.leaves_with_rows(before.state.drafter.own, moment.state.drafter.own))
        for row in np.flatnonzero(~np.asarray(moment.info.active)):
            where = f"{moment.name}, row {row}, inactive in the last"
            self.same(where, moment.draft, row, before.draft, row)
            for name, was, now in leaves:
                self.demand(
                    np.array_equal(was[row], now[row]),
                    f"{where}: its state{name} was {was[row]} and became {now[row]}",
                )

    def leaves_with_rows(self, before, now):
        """Leaves of a state, before and now, that have a row for each of the batch.

        Those that grow with the capacity are left out: a slot beyond the text may hold anything.
        """
        batch, slots = len(self.rows), self.driver.capacity
        sizes = ((batch, slots), (batch + 1, slots), (batch, 2 * slots))
        forms = zip(*(self.driver.state_forms(*size) for size in sizes), strict=True)
        leaves = zip(jax.tree.leaves_with_path(now), jax.tree.leaves(before), forms, strict=True)
        for (path, leaf), was, (shape, wider, longer) in leaves:
            if shape and wider == (batch + 1, *shape[1:]) and longer == shape:
                yield jax.tree_util.keystr(path), np.asarray(was), np.asarray(leaf)

    def rows_elsewhere(self):
        """A row drafts the same in another slot of another batch, and alone."""
        last = len(self.rows) - 1
        moved = {row - 1: row for row in range(1, last + 1)}
        self.same_rows("of another batch", [*self.rows[1:], self.stranger], moved, turns=2)
        self.same_rows("alone", [self.rows[last]], {0: last}, turns=1)

    def same_rows(self, place, rows, origin, turns):
        known = {(moment.turn, moment.step): moment.draft for moment in self.history}
        for moment in self.driver.moments(rows, turns):
            draft = known.get((moment.turn, moment.step))
            for row, other in origin.items() if draft is not None else ():
                where = f"{moment.name}, row {other} as row {row} {place}"
                self.same(where, moment.draft, row, draft, other)

    def laws(self):
        """Drafts of each text by many keys: presence follows from the prefix, tokens from laws."""
        if self.history[0].draft.is_deterministic:
            return
        batch = len(self.rows)
        request, state = self.driver.begin(self.rows)
        keys = jax.random.split(self.crowd_key, (_CROWD, batch))
        steps = ([], [])
        for index in range(_CROWD):
            asked, after = dataclasses.replace(request, keys=keys[index]), state
            for made in steps:
                after = self.driver.step_of_all(
                    self.target, self.driver.drafter.params, asked, after
                )
                made.append(jax.device_get(after.drafter.draft))
        crowd, later = (
            jax.tree.map(lambda *leaves: np.concatenate(leaves), *made) for made in steps
        )
        complaints = [drafts.hidden_choice(crowd, batch), drafts.miscalibration(crowd)]
        if crowd.siblings != "coupled":
            complaints.append(drafts.repetition(crowd, later))
        for complaint in complaints:
            self.demand(complaint is None, f"{_CROWD} drafts of each text: {complaint}")

    def text(self):
        """Under `match` the text is that of plain decoding."""
        prompts = [row.turns[0] for row in self.rows]
        for temperature in (0.0, 0.9):
            options = self.driver.options(self.rows, 0)
            options["capacity"] = self.driver.capacity
            options["sampling"] = types.Sampling(temperature=temperature)
            plain = decoding.autoregressive(self.target, prompts, **options)
            found = decoding.generate(
                self.target, self.driver.drafter, prompts, rule="match", **options
            )
            pairs = zip(found.new_tokens, plain.new_tokens, strict=True)
            for row, (text, wanted) in enumerate(pairs):
                self.demand(
                    text == wanted,
                    f"at temperature {temperature} under 'match', row {row} writes {text}, and "
                    f"plain decoding {wanted}",
                )

    def traces(self):
        """Other weights, keys and temperatures run the program that there is."""
        rows = [
            dataclasses.replace(
                row, temperature=row.temperature + 0.3, key=len(self.rows) - row.key
            )
            for row in self.rows
        ]
        request, state = self.driver.begin(rows)
        target, drafter = _other_weights(self.target), _other_weights(self.drafter)
        self.driver.step_of_all(target, drafter, request, state)
        for (batch, _), count in self.driver.traces.items():
            self.demand(
                count == 1,
                f"a step of {batch} rows was traced {count} times, and only keys, temperatures, "
                "weights and the state differed",
            )


def _other_weights(tree):
    def moved(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf * jnp.asarray(1.25, leaf.dtype)

    return jax.tree.map(moved, tree)

"""A GAN as it is trained: two models, two optimizers, windows of different length, and unequal micro-batches.

The judge is the undivided loop: each player sees its logical batch at once, float64.
"""

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

import wholebatch as wb
from menagerie import numbers
from properties import flat, relative_error

EXACT = 1e-12
ROUNDS = 3
CRITIC_UPDATES = 2  # per update of the generator
CRITIC_ROWS = (3, 1, 2, 5)  # its micro-batches
GENERATOR_ROWS = (4, 2)
EQUAL = {"critic_rows": (3, 3, 3, 3), "generator_rows": (3, 3)}


class Game:
    """Two players with their optimizers, and the logical batches of each update, the same in each game."""

    def __init__(self, critic_rows=CRITIC_ROWS, generator_rows=GENERATOR_ROWS):
        torch.manual_seed(7)
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.critic = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.for_generator = torch.optim.Adam(self.generator.parameters(), lr=0.02, betas=(0.5, 0.9))
        self.for_critic = torch.optim.SGD(self.critic.parameters(), lr=0.3, momentum=0.8)
        self.critic_rows, self.generator_rows = critic_rows, generator_rows

    def critic_batch(self, place):
        rows = sum(self.critic_rows)
        return {"real": numbers(rows, 3, seed=place), "noise": numbers(rows, 2, seed=100 + place)}

    def generator_batch(self, place):
        return {"noise": numbers(sum(self.generator_rows), 2, seed=200 + place)}

    def critic_loss(self, critic, batch):
        said, target = critic(batch["real"]), torch.ones(len(batch["real"]), 1).double()
        real = binary_cross_entropy_with_logits(said, target)
        return real + softplus(critic(self.generator(batch["noise"]).detach())).mean()

    def generator_loss(self, generator, batch):
        return softplus(-self.critic(generator(batch["noise"]))).mean()

    def play(self, critic_update, generator_update):
        for turn in range(ROUNDS):
            for place in range(CRITIC_UPDATES):
                critic_update(self.critic_batch(turn * CRITIC_UPDATES + place))
            generator_update(self.generator_batch(turn))
        return flat([*self.generator.parameters(), *self.critic.parameters()])


def cut(batch, rows):
    pieces = {name: tensor.split(rows) for name, tensor in batch.items()}
    return [{name: pieces[name][place] for name in pieces} for place in range(len(rows))]


def undivided(**sizes):
    """Return the weights of both players after the game without any cut."""
    game = Game(**sizes)

    def critic_update(batch):
        game.for_critic.zero_grad()
        game.critic_loss(game.critic, batch).backward()
        game.for_critic.step()

    def generator_update(batch):
        game.for_generator.zero_grad()
        game.generator_loss(game.generator, batch).backward()
        game.for_generator.step()

    return game.play(critic_update, generator_update)


def textbook(**sizes):
    """The loop of the tutorials, twice: divided by the number of micro-batches, and zeroed after each step."""
    game = Game(**sizes)

    def update(optimizer, loss_fn, model, parts):
        for part in parts:
            (loss_fn(model, part) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return game.play(
        lambda batch: update(game.for_critic, game.critic_loss, game.critic, cut(batch, game.critic_rows)),
        lambda batch: update(game.for_generator, game.generator_loss, game.generator, cut(batch, game.generator_rows)),
    )


def with_windows(game, critic, generator):
    def update(accumulator, loss_fn, model, parts):
        with accumulator.window() as window:
            for part in parts:
                window.backward(loss_fn(model, part), targets=len(part["noise"]))
        assert window.update.applied

    return game.play(
        lambda batch: update(critic, game.critic_loss, game.critic, cut(batch, game.critic_rows)),
        lambda batch: update(generator, game.generator_loss, game.generator, cut(batch, game.generator_rows)),
    )


def with_steps(game, critic, generator):
    return game.play(critic.step, generator.step)


def with_updates(game, critic, generator):
    """A loader of micro-batches for each player; the critic's loader brings both of its windows."""
    for turn in range(ROUNDS):
        batches = [game.critic_batch(turn * CRITIC_UPDATES + place) for place in range(CRITIC_UPDATES)]
        parts = [part for batch in batches for part in cut(batch, game.critic_rows)]
        assert len(list(critic.updates(parts, micro_batches=len(game.critic_rows)))) == CRITIC_UPDATES
        parts = cut(game.generator_batch(turn), game.generator_rows)
        assert len(list(generator.updates(parts, micro_batches=len(game.generator_rows)))) == 1
    return flat([*game.generator.parameters(), *game.critic.parameters()])


@pytest.mark.parametrize("sizes", [{}, EQUAL], ids=["unequal", "equal"])
@pytest.mark.parametrize("way", [with_windows, with_steps, with_updates], ids=lambda way: way.__name__)
def test_both_players_become_those_of_the_undivided_loops(way, sizes):
    game = Game(**sizes)
    critic = wb.Accumulator(game.critic, game.for_critic, game.critic_loss, micro_batch=wb.Rows(4))
    generator = wb.Accumulator(game.generator, game.for_generator, game.generator_loss, micro_batch=wb.Rows(5))
    assert relative_error(way(game, critic, generator), undivided(**sizes)) <= EXACT


@pytest.mark.parametrize("sizes", [{}, EQUAL], ids=["unequal", "equal"])
def test_the_bound_sees_the_textbook_loop(sizes):
    """With equal micro-batches too: what is left in the critic's ``.grad`` joins its next update."""
    assert relative_error(textbook(**sizes), undivided(**sizes)) > 1e-2


def test_what_the_generator_leaves_in_the_critic_does_not_matter():
    """Whatever stands in the critic's ``.grad``, by whomever: its next update is the same."""
    games = []
    for left in (None, float("nan")):
        game = Game()
        critic = wb.Accumulator(game.critic, game.for_critic, game.critic_loss, micro_batch=wb.Rows(4))
        if left is not None:
            for weight in game.critic.parameters():
                weight.grad = torch.full_like(weight, left)
        critic.step(game.critic_batch(0))
        games.append(flat(game.critic.parameters()))
    assert torch.equal(*games)


def test_a_penalty_on_gradients_is_part_of_the_loss():
    """As in WGAN-GP: a gradient inside the loss, whose own gradient is what trains."""
    found = []
    for micro_batch in (wb.Rows(4), None):
        game = Game()

        def loss_fn(critic, batch, game=game):
            real = batch["real"].clone().requires_grad_()
            (slope,) = torch.autograd.grad(critic(real).sum(), real, create_graph=True)
            return game.critic_loss(critic, batch) + 10 * (slope.norm(dim=1) - 1).square().mean()

        if micro_batch is None:
            loss_fn(game.critic, game.critic_batch(0)).backward()
            game.for_critic.step()
        else:
            wb.Accumulator(game.critic, game.for_critic, loss_fn, micro_batch=micro_batch).step(game.critic_batch(0))
        found.append(flat(game.critic.parameters()))
    assert relative_error(*found) <= EXACT


def test_both_windows_open_at_once():
    """The generator's backward pass runs through a critic whose window is open and half full."""
    game, alone = Game(), Game()
    critic = wb.Accumulator(game.critic, game.for_critic)
    generator = wb.Accumulator(game.generator, game.for_generator)
    with critic.window() as critic_window, generator.window() as generator_window:
        first, *rest = cut(game.critic_batch(0), CRITIC_ROWS)
        critic_window.backward(game.critic_loss(game.critic, first), targets=len(first["noise"]))
        for part in cut(game.generator_batch(0), GENERATOR_ROWS):
            generator_window.backward(game.generator_loss(game.generator, part), targets=len(part["noise"]))
        for part in rest:
            critic_window.backward(game.critic_loss(game.critic, part), targets=len(part["noise"]))
    losses = (
        alone.critic_loss(alone.critic, alone.critic_batch(0)),
        alone.generator_loss(alone.generator, alone.generator_batch(0)),
    )
    for player, loss in zip((alone.critic, alone.generator), losses, strict=True):
        for weight, gradient in zip(
            player.parameters(), torch.autograd.grad(loss, [*player.parameters()]), strict=True
        ):
            weight.grad = gradient
    alone.for_critic.step()
    alone.for_generator.step()
    for now, then in ((game.critic, alone.critic), (game.generator, alone.generator)):
        assert relative_error(flat(now.parameters()), flat(then.parameters())) <= EXACT

"""Synthetic ratings: embeddings of users and items learn who likes what."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from train.mesh import logical
from train.tasks import losses
from train.tasks.examples import Drawn, check_noise
from train.tasks.kinds import check_sizes
from train.tasks.transformer import Embed

_USERS = 256
_ITEMS = 128
_RANK = 4
_HELD_OUT = 2048


class Factors(nnx.Module):
  """The product of a user's vector and an item's, plus a number of each.

  From https://doi.org/10.1109/MC.2009.263.

  Args:
    model: `config.model` of configs/ratings.py.
    dtype: of the computation.
    rngs: stream "params".
  """

  def __init__(
    self,
    model: ml_collections.ConfigDict,
    *,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    def embed(count: int, width: int, **options: Any) -> Embed:
      return Embed(
        count,
        width,
        dtype=dtype,
        embedding_metadata=logical("vocab", "embed"),
        rngs=rngs,
        **options,
      )

    zeros = nnx.initializers.zeros
    self.user = embed(_USERS, model.embed_dim)
    self.item = embed(_ITEMS, model.embed_dim)
    self.user_bias = embed(_USERS, 1, embedding_init=zeros)
    self.item_bias = embed(_ITEMS, 1, embedding_init=zeros)

  def __call__(self, users: jax.Array, items: jax.Array) -> jax.Array:
    """Maps users and items, integers [B], to ratings [B]."""
    biases = self.user_bias(users) + self.item_bias(items)
    return jnp.sum(self.user(users) * self.item(items), -1) + biases[:, 0]


class Ratings(Drawn):
  """A number from a user and an item, with new pairs in every batch.

  rating = u . v / 2 + config.data.noise * e, where u and v are the user's and
  the item's 4 numbers and all numbers are ~ N(0, 1). There are 256 users and
  128 items; the k-th of either is drawn with a probability of ~ 1/k. u and v do
  not depend on the seed. Batches are {"user": int32 [B], "item": int32 [B],
  "rating": float32 [B]}; 2048 examples are held out.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    check_sizes(config.model, ["embed_dim"])
    check_noise(config.data.noise)
    rng = np.random.Generator(np.random.Philox(0))
    self._users = rng.standard_normal((_USERS, _RANK))
    self._items = rng.standard_normal((_ITEMS, _RANK))
    self._noise = config.data.noise
    super().__init__(config, self.draw(rng, _HELD_OUT, 0))
    self.description = (
      f"ratings: {_USERS} users and {_ITEMS} items, new pairs in every batch,"
      f" {_HELD_OUT} held out"
    )

  def create_model(self, rngs: nnx.Rngs) -> Factors:
    """Returns a new model."""
    return Factors(
      self._config.model, dtype=jnp.dtype(self._config.dtype), rngs=rngs
    )

  def loss(
    self, model: nnx.Module, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, losses.Metrics]:
    """Returns the mean squared error, noise^2 of which is the noise's."""
    ratings = model(batch["user"], batch["item"])
    return losses.squared_error(ratings, batch["rating"])

  def draw(
    self, rng: np.random.Generator, count: int, step: int
  ) -> dict[str, np.ndarray]:
    """Returns pairs and their ratings."""
    del step
    users, items = (
      rng.choice(len(each), count, p=_popularity(len(each))).astype(np.int32)
      for each in (self._users, self._items)
    )
    clean = (self._users[users] * self._items[items]).sum(1) / np.sqrt(_RANK)
    rating = clean + self._noise * rng.standard_normal(count)
    return {"user": users, "item": items, "rating": rating.astype(np.float32)}


def _popularity(count: int) -> np.ndarray:
  """Returns the probabilities of `count` users or items."""
  shares = 1 / np.arange(1, count + 1)
  return shares / shares.sum()

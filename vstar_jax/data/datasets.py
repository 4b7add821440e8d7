"""The datasets by name."""

from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.task import Task
from vstar_jax.errors import UserError


def make_task(config: Config, chat: Chat) -> Task:
    """The task that `config.data.dataset` names, prepared on disk if it was not; UserError when there is no such dataset."""
    if config.data.dataset != "stick_motion":
        raise UserError(f"data.dataset is {config.data.dataset!r}: choose stick_motion.")
    from vstar_jax.data.stick_motion.task import StickMotion

    return StickMotion(config, chat)

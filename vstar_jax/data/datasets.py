"""The datasets by name: what a configuration says becomes a task."""

from collections.abc import Mapping

from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.protocols import DATASETS, groups
from vstar_jax.data.task import Task
from vstar_jax.errors import UserError

STICK_MOTION = "stick_motion"


def make_task(config: Config, chat: Chat) -> Task:
    """The task that `config.data` names. StickMotion is rendered if it was not; recorded datasets must have been prepared.

    UserError when there is no such dataset or protocol, and when a list of it was not prepared.
    """
    data = config.data
    if data.dataset == STICK_MOTION:
        if data.protocol != "base_to_novel":
            raise UserError(f"stick_motion has no protocol {data.protocol}: set data.protocol=base_to_novel.")
        from vstar_jax.data.stick_motion.task import StickMotion

        return StickMotion(config, chat)
    if data.dataset not in DATASETS:
        raise UserError(f"data.dataset is {data.dataset!r}: choose {STICK_MOTION}, {', '.join(DATASETS)}.")
    wanted = groups(data.dataset, data.protocol, full=data.full, variant=data.variant)

    from vstar_jax.data.recorded import Recorded, Source, read_dialogues

    source = Source(data.dataset, data.dir, wanted, data.train, data.videos or None)
    return Recorded(config, chat, source, dialogues=read_dialogues(data.dialogues) if data.dialogues else ())


def glossary(config: Config) -> Mapping[str, str]:
    """Label -> explanation, for all labels of the dataset that `config` names which have one."""
    data = config.data
    if data.dataset == STICK_MOTION:
        from vstar_jax.data.stick_motion import names

        return names.glossary()
    from vstar_jax.data.builders.videos import Records

    lists = (*groups(data.dataset, data.protocol, full=data.full, variant=data.variant).values(), *data.train)
    found: dict[str, str] = {}
    for name in lists:
        found |= Records(data.dataset, data.dir, name, data.videos or None).explanations
    return found

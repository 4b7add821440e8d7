"""The clips that were uploaded or drawn lately, by their ids, in memory and bounded in bytes."""

from collections import OrderedDict

import numpy as np

from tools_server.cache import Cache
from vstar_jax.tools.protocol import clip_hash


class ClipStore:
    """Clips uint8 [T, H, W, 3] that nobody may write to; the least recently used go first. For one thread.

    shared: where clips are kept, too, for other servers that use it.
    """

    def __init__(self, capacity: int, shared: Cache | None = None):
        self._capacity, self._shared, self._bytes = capacity, shared, 0
        self._clips: OrderedDict[str, np.ndarray] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Bytes of all clips in memory."""
        return self._bytes

    def get(self, name: str) -> np.ndarray | None:
        """The clip, or None when it is not there (any more)."""
        if (clip := self._clips.get(name)) is not None:
            self._clips.move_to_end(name)
        elif self._shared and (kept := self._shared.get(_address(name))):
            shape, _, octets = kept.partition(b"\n")
            clip = np.frombuffer(octets, np.uint8).reshape([int(side) for side in shape.split(b",")])
            self._keep(name, clip)
        return clip

    def put(self, name: str, clip: np.ndarray) -> None:
        """Keeps the clip under its id; one that is larger than the whole store alone is kept until the next one comes."""
        self._keep(name, clip)
        if self._shared:
            self._shared.put(_address(name), f"{','.join(map(str, clip.shape))}\n".encode() + clip.tobytes())

    def _keep(self, name: str, clip: np.ndarray) -> None:
        self._bytes += clip.nbytes - getattr(self._clips.pop(name, None), "nbytes", 0)
        self._clips[name] = clip
        while self._bytes > self._capacity and len(self._clips) > 1:
            self._bytes -= self._clips.popitem(last=False)[1].nbytes


def _address(name: str) -> str:
    return f"clip {name}"


def clip_id(clip: np.ndarray) -> str:
    """The id of a clip uint8 [T, H, W, 3]."""
    digest = clip_hash(clip.shape)
    digest.update(np.ascontiguousarray(clip).data)
    return digest.hexdigest()

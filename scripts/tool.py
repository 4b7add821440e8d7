"""Shows what a tool returns for a clip or for labels: python scripts/tool.py pose clip.mp4 --out pose.png"""

import argparse
import os
from pathlib import Path

import numpy as np

from vstar_jax.data import video
from vstar_jax.errors import UserError, run_script
from vstar_jax.tools.client import ClientAnswer, ToolsClient, clip_digest
from vstar_jax.tools.protocol import People, Request, Tool

COMMANDS: dict[str, Tool] = {
    "pose": "pose_estimation",
    "detect": "person_detection",
    "explain": "action_explanation",
    "describe": "video_description",
}
COLUMNS = 4
"""Frames beside each other in a picture."""
FPS = 8.0
"""Of an annotated clip that is written as a video."""


def ask(client: ToolsClient, command: str, subjects: list[str], frames: int, seconds: float) -> ClientAnswer:
    """The answer of a tool about the video file `subjects[0]`, of which `frames` frames are taken, or about labels."""
    tool = COMMANDS[command]
    if tool == "action_explanation":
        request = Request(episode="tool", turn=0, tools=(tool,), labels=tuple(subjects))
        return client.call([request], {}, seconds)[0]
    if len(subjects) != 1:
        raise UserError(f"{command} looks at one video file at a time, not at {len(subjects)}: give one path.")
    clip = video.read(subjects[0], frames, exact=frames).frames
    digest = clip_digest(clip)
    return client.call([Request(episode="tool", turn=0, tools=(tool,), clip=digest)], {digest: clip}, seconds)[0]


def show(people: People) -> str:
    """The people in each frame, a line a frame."""
    lines = []
    for number, frame in enumerate(people):
        found = []
        for person in frame:
            left, top, right, bottom = person.box
            joints = f", {sum(c > 0.5 for _, _, c in person.keypoints)} of 17 joints" if person.keypoints else ""
            found.append(f"{person.confidence:.2f} at ({left:.0f}, {top:.0f}) to ({right:.0f}, {bottom:.0f}){joints}")
        lines.append(f"frame {number}: {'; '.join(found) or 'nobody'}")
    return "\n".join(lines)


def write(frames: np.ndarray, path: Path) -> None:
    """Writes frames uint8 [T, H, W, 3] as a picture of all of them, or as a clip when the path ends in .mp4."""
    from PIL import Image

    if path.suffix == ".mp4":
        height, width = (side // 2 * 2 for side in frames.shape[1:3])
        video.write(path, frames[:, :height, :width], FPS)
        return
    count, height, width, _ = frames.shape
    rows = -(-count // COLUMNS)
    sheet = np.zeros((rows * COLUMNS, height, width, 3), np.uint8)
    sheet[:count] = frames
    sheet = sheet.reshape(rows, COLUMNS, height, width, 3).swapaxes(1, 2).reshape(rows * height, COLUMNS * width, 3)
    try:
        Image.fromarray(sheet).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written ({error}): give a path that ends in .png or .mp4.") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=COMMANDS, help="what is asked")
    parser.add_argument("subjects", nargs="+", help="a video file, or labels to explain")
    parser.add_argument("--out", type=Path, default=None, help="where the annotated frames go: a .png picture or an .mp4 clip")
    parser.add_argument("--frames", type=int, default=16, help="frames taken from the clip, evenly spread")
    parser.add_argument("--url", default="http://127.0.0.1:8765", help="address of the server")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds to wait for the answer")
    arguments = parser.parse_args()

    client = ToolsClient(arguments.url, token=os.environ.get("TOOLS_TOKEN"), timeout=2.0)
    if not client.ready():
        raise UserError(
            f"no tools server answers at {arguments.url}: start one with python -m tools_server, or give its --url."
        )
    given = ask(client, arguments.command, arguments.subjects, arguments.frames, arguments.timeout)
    client.close()
    answer = given.answer
    if answer.status != "ok":
        problem = "; ".join(answer.problems.values()) or answer.message
        raise UserError(f"the tool answered {answer.status} ({problem}): see the server's log.")
    print(f"answered by {', '.join(answer.backends.values())}")
    for people in (answer.poses, answer.boxes):
        if people is not None:
            print(show(people))
    for text in (answer.explanation, answer.description):
        if text is not None:
            print(text)
    if arguments.out and given.frames is not None:
        write(given.frames, arguments.out)
        print(f"wrote {arguments.out}")
    elif arguments.out:
        raise UserError(f"{arguments.command} draws nothing that could be written to {arguments.out}: leave --out away.")


if __name__ == "__main__":
    run_script(main)
